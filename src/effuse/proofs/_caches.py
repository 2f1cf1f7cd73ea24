"""Caches, learned routes and fewer steps at one share of the multiply-accumulates, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effuse.bridge.pipeline import Walk
from effuse.compress.cache.base import Cached
from effuse.compress.cache.error_budget import Budgeted, ErrorBudget
from effuse.compress.cache.first_block import FirstBlock
from effuse.compress.cache.inherited import Routed
from effuse.compress.cache.keys import BackDense, FrontDense, Keys, Route
from effuse.compress.cache.levels import Blocks, Layers, Level
from effuse.compress.rewire.asdm_assembly import Inherit
from effuse.core import Solver
from effuse.ops.stats import bootstrap, paired
from effuse.solvers import DDIM
from effuse.solvers.momentum import Momentum

from . import Claim, Scale
from ._study import Study, of_pipeline, off, tiny

SHARE = 0.5
"""Of the full run's multiply-accumulates: twice as few."""

Draw = Callable[[torch.Generator], Walk]


@dataclass
class Case:
    """A study with its full runs, and trajectories of other prompts to learn on.

    judged: seeds of the noise that is judged on, of prompts that nothing was learned on; tuned: of
    the noise on which settings are chosen, of the prompts that are judged.
    """

    study: Study
    draw: Draw
    judged: Sequence[int]
    tuned: Sequence[int]
    ends: dict[int, Tensor] = field(default_factory=dict)
    macs: int = 0
    narrow: bool = False  # try few settings: for the smoke size

    def begin(self) -> None:
        """Sample in full and count one call."""
        self.ends = {seed: self.study.run(seed) for seed in {*self.judged, *self.tuned}}
        with Inherit(self._any()).attach(self.study.network) as handle:
            handle.observe([self.study.call()])
            self.macs = next(iter(handle.costs.values())).full

    def _any(self) -> Level:
        return Layers(deep=None)

    def errors(self, seeds: Sequence[int], **kwargs: Any) -> Tensor:
        """Return the errors of pictures against the full runs, (seeds x pictures,)."""
        return torch.cat([off(self.study.run(s, **kwargs), self.ends[s]) for s in seeds])


@dataclass(frozen=True)
class Tried:
    """One way to spend the share: its errors where it is judged, and what it took."""

    name: str
    errors: Tensor
    share: float
    seconds: float
    tuned: float = float("nan")
    notes: str = ""

    @property
    def mean(self) -> float:
        """Mean error."""
        return float(self.errors.mean())

    def row(self, network: str) -> dict[str, Any]:
        """Return the line of the table."""
        low, high = bootstrap(self.errors)
        return {
            "network": network,
            "variant": self.name,
            "macs_share": self.share,
            "error": self.mean,
            "error_low": low,
            "error_high": high,
            "error_where_tuned": self.tuned,
            "cpu_seconds_a_run": round(self.seconds, 3),
            "notes": self.notes,
        }


def cases(scale: Scale) -> Iterator[Case]:
    """Yield the studies of this size, full runs included."""
    judged, tuned = tuple(range(scale.pick(1, 2, 3))), (1000,)
    if scale.size == "smoke":
        study = tiny()

        def draw(rng: torch.Generator) -> Walk:
            x, denoiser = study.draw(int(torch.randint(1 << 30, (), generator=rng)))
            return Walk(denoiser, DDIM(), x, study.times(study.steps))

        yield _begun(Case(study, draw, judged, tuned, narrow=True))
        return
    from effuse import house
    from effuse.compress.calibrate import walks

    steps, count = 16, scale.pick(0, 2, 3)
    texts = [p.text for p in house.prompts()]
    asked: dict[str, tuple[Sequence[Any], Sequence[Any], float]] = {
        "emoji-dit": (list(range(0, 10 * count, 10)), list(range(3, 93, 10)), 3.0),
        "emoji": (texts[:count], texts[8:20], 4.0),
    }
    for name in ("emoji-dit", "emoji") if scale.size == "proof" else ("emoji-dit",):
        judge, learn, guidance = asked[name]
        pipe = house.load(name)
        study = of_pipeline(f"house:{name}", pipe, judge, guidance, steps)
        draws: Draw = walks(pipe, learn, steps=steps, guidance=guidance, batch=1)
        yield _begun(Case(study, draws, judged, tuned))


def _begun(case: Case) -> Case:
    case.begin()
    return case


# ---- ways to spend the share


def fewer(case: Case) -> list[Tried]:
    """Plain sampling in as many steps as the share pays for: DDIM, and momentum tuned."""
    steps = max(int(SHARE * case.study.steps), 1)
    share = steps / case.study.steps

    def tried(name: str, solver: Solver) -> Tried:
        seen = float(case.errors(case.tuned, solver=solver, steps=steps).mean())
        begun = time.process_time()
        errors = case.errors(case.judged, solver=solver, steps=steps)
        spent = (time.process_time() - begun) / len(case.judged)
        return Tried(f"{name}, {steps} steps", errors, share, spent, seen)

    options = [Momentum(order=o) for o in ((2.0,) if case.narrow else (1.2, 1.5, 1.8, 2.0))]
    best = min(
        options,
        key=lambda s: float(case.errors(case.tuned, solver=s, steps=steps).mean()),
    )
    return [tried("DDIM", DDIM()), tried(f"{best}", best)]


def keys_within(case: Case, level: Level) -> list[Keys]:
    """Return key steps as many as the share pays for, evenly spread and denser at either end."""
    steps = case.study.steps
    with Inherit(level).attach(case.study.network) as handle:
        handle.observe([case.study.call()])
        cost = next(iter(handle.costs.values()))
    least = cost.inherited / cost.full
    count = int((SHARE * steps - least * steps) / (1 - least) + 1e-9)
    if count < 1:
        return []
    even = FrontDense(steps, count, 1.0)
    return [even] if case.narrow else [even, FrontDense(steps, count), BackDense(steps, count)]


def cached(case: Case, name: str, handle: Cached, tuned: float, notes: str = "") -> Tried:
    """Judge a cache that is on, and take it off."""
    try:
        handle.observe([case.study.call()])
        before = handle.report().get("macs", 0)
        begun = time.process_time()
        errors = case.errors(case.judged)
        spent = (time.process_time() - begun) / len(case.judged)
        macs = (handle.report()["macs"] - before) / len(case.judged)
    finally:
        handle.detach()
    return Tried(name, errors, macs / (case.macs * case.study.steps), spent, tuned, notes)


def seen(case: Case, transform: Any) -> float:
    """Return the error of a cache where settings are chosen."""
    with transform.attach(case.study.network):
        return float(case.errors(case.tuned).mean())


def inherited(case: Case, name: str, levels: Sequence[Level], order: int) -> Tried:
    """Inherit by the best of a few levels and key steps."""
    options = []
    for level in levels:
        try:
            options += [Inherit(level, keys, order) for keys in keys_within(case, level)]
        except ValueError as error:
            if "fresh=" not in str(error):
                raise
    found = [(seen(case, t), t) for t in options]
    tuned, best = min(found, key=lambda row: row[0])
    handle = best.attach(case.study.network)
    return cached(case, name, handle, tuned, f"{best.level}, {best.keys}")


def first_block(case: Case) -> Tried:
    """Take the first-block cache with the least threshold that stays within the share."""
    low, high, best = 1e-3, 4.0, float("nan")
    for _ in range(2 if case.narrow else 7):
        tau = (low * high) ** 0.5
        with FirstBlock(tau).attach(case.study.network) as handle:
            handle.observe([case.study.call()])
            error = float(case.errors(case.tuned).mean())
            spent = handle.report()["macs"] / len(case.tuned)
        if spent <= SHARE * case.macs * case.study.steps:
            high, best = tau, error
        else:
            low = tau
    return cached(
        case, "first-block", FirstBlock(high).attach(case.study.network), best, f"tau {high:.3g}"
    )


def plain(case: Case) -> list[Tried]:
    """Everything that needs no learning."""
    every: list[Level] = [Blocks(0), Layers(deep=None)]
    return [
        *fewer(case),
        inherited(case, "DeepCache", [Blocks(1), Blocks(2)], 0),
        first_block(case),
        inherited(case, "inherit, order 0", every, 0),
        inherited(case, "inherit, order 1", every, 1),
    ]


def routed(case: Case, name: str, handle: Routed, route: Route, notes: str = "") -> Tried:
    """Judge a route."""
    handle.follow(route)
    tuned = float(case.errors(case.tuned).mean())
    return cached(case, name, handle, tuned, notes)


def budgeted(case: Case, scale: Scale, name: str = "error budget") -> tuple[Tried, Budgeted]:
    """Take the route of least predicted error at the share, of the level that does best."""
    found = []
    for level in (Blocks(0), Layers(deep=None)):
        how = ErrorBudget(
            level=level, order=1, trajectories=scale.pick(1, 1, 2), tried=scale.pick(2, 4, 6)
        )
        handle = how.attach(case.study.network)
        handle.learn(case.draw, rng=torch.Generator().manual_seed(5), progress=False)
        assert handle.frontier is not None
        route, _ = handle.frontier.at(SHARE)
        handle.follow(route)
        found.append((float(case.errors(case.tuned).mean()), level, handle, route))
        handle.detach()
    tuned, level, handle, route = min(found, key=lambda row: row[0])
    again = handle.transform.restore(case.study.network, {"parts": handle.parts, "route": None})
    again.follow(route)
    return cached(case, name, again, tuned, f"{level}"), handle


# ---- claims


def below(
    network: str, ours: Tried, theirs: Tried, statement: str, falsifier: str, factor: float = 1.0
) -> Claim:
    """State that ours is lower than `factor` times theirs; held if the paired interval says so."""
    _, interval = paired(ours.errors, factor * theirs.errors)
    return Claim(
        f"{network}: {statement}",
        factor * theirs.mean,
        ours.mean,
        "relative squared error of the final latent",
        "lower",
        interval[1] < 0,
        falsifier,
        interval,
    )


def best_where_tuned(some: Sequence[Tried]) -> Tried:
    """Return the one that did best on the noise that nothing is judged on."""
    return min(some, key=lambda t: t.tuned)


def table(case: Case, tried: Sequence[Tried]) -> list[Mapping[str, Any]]:
    """Return the lines of all that was tried."""
    return [t.row(case.study.name) for t in tried]
