"""A learned cache at half the cost, against its own parts left out, other caches, fewer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from effuse.compress.cache.harmonica import (
    Even,
    Harmonica,
    Keyed,
    Share,
    Single,
    StepwiseDenoising,
)
from effuse.compress.cache.keys import Route
from effuse.compress.cache.levels import Units
from effuse.core import Prediction

from . import Claim, Evidence, Scale, proof
from ._caches import (
    SHARE,
    Case,
    Tried,
    below,
    best_where_tuned,
    cases,
    inherited,
    plain,
    routed,
    table,
)

KEYED = "HarmoniCa from even keys, ours"
LONG = "HarmoniCa, 20,000 iterations"


class Independent(StepwiseDenoising):
    """Learning-to-Cache: the teacher's trajectory, and pairs of a full step and one that reuses.

    Errors of earlier steps are never seen. Samples of the teacher stand for real pictures.
    """

    @torch.no_grad()
    def _begin(self, rng: torch.Generator) -> None:
        super()._begin(rng)
        if bool(torch.rand((), generator=rng) < 0.5):
            self._fill(rng)

    def _follow(self, full: Prediction, mixed: Prediction, rng: torch.Generator | None) -> None:
        self._advance(full, rng)
        if self._at < self._steps:
            self._fill(rng)

    @torch.no_grad()
    def _fill(self, rng: torch.Generator | None) -> None:
        assert self._walk is not None
        kept, self._handle.mixture = self._handle.mixture, None
        try:
            full = self._walk.denoiser(self._x, self._walk.times[self._at])
        finally:
            self._handle.mixture = kept
        self._advance(full, rng)


def learned(case: Case, name: str, how: Harmonica, goal: type = StepwiseDenoising) -> Tried:
    """Learn a route on other prompts and judge it."""
    handle = how.attach(case.study.network)
    with torch.enable_grad():
        handle.learn(case.draw, rng=torch.Generator().manual_seed(11), progress=False, goal=goal)
    route, told = handle.route, dict(handle.learned or {})
    assert route is not None
    notes = (
        f"{told['iterations']} steps of learning in {told['seconds']} s, beta {told['beta']:.3g}"
    )
    return routed(case, name, handle, route, notes)


def at_random(case: Case, how: Harmonica) -> Tried:
    """Take a random route of the same share."""
    rng = torch.Generator().manual_seed(3)
    handle = how.attach(case.study.network)
    _, levels, cost = handle.survey(case.draw(rng))
    saved = torch.tensor([float(cost.saved[p]) for p in handle.parts])
    table = torch.rand(len(levels), len(handle.parts), generator=rng)
    inherits = how.penalty.inherits(table, saved, how.tau)
    parts = {p: tuple(inherits[:, k].nonzero()[:, 0].tolist()) for k, p in enumerate(handle.parts)}
    return routed(case, "random route", handle, Route(len(levels), parts, levels))


def variants(case: Case, scale: Scale, wide: bool) -> Mapping[str, Tried]:
    """Learn with and without each part of the method, at the same share and length."""
    call = case.study.call()
    level = Units(deep=None)
    with Harmonica(level=level).attach(case.study.network) as handle:
        handle.observe([call])
        cost = next(iter(handle.costs.values()))
    reuse = min((1 - SHARE) * cost.full / sum(cost.saved.values()), 0.94)
    steps = case.study.steps - 1
    base = Harmonica(
        level=level,
        penalty=Share(reuse, beta=1e-3, rate=1.0),
        lr=0.2,
        iterations=steps * scale.pick(1, 8, 15),
        refresh=steps * scale.pick(1, 4, 5),
        normalized=True,
        proxy=Single(),
    )
    found = [
        learned(case, "HarmoniCa", base),
        learned(case, "HarmoniCa, order 1", replace(base, order=1)),
        learned(case, KEYED, replace(base, start=Keyed())),
        learned(case, f"{KEYED}, order 1", replace(base, start=Keyed(), order=1)),
    ]
    if wide:
        even = replace(base, proxy=Even())
        if scale.size == "proof":
            slow = Share(reuse, beta=1e-3, rate=0.05)  # logits move a twentieth as fast
            long = replace(base, penalty=slow, lr=0.01, iterations=20_000, refresh=500)
            found.append(learned(case, LONG, long))
        found += [
            learned(case, "without the image error", even),
            learned(case, "Learning-to-Cache style", even, Independent),
            at_random(case, base),
        ]
    return {t.name: t for t in found}


def prove_case(case: Case, scale: Scale, wide: bool) -> tuple[list[Claim], list[Any]]:
    """Compare on one network."""
    name, others = case.study.name, plain(case)
    mine = variants(case, scale, wide)
    ours = mine["HarmoniCa"]
    paper = best_where_tuned([mine[n] for n in ("HarmoniCa", LONG) if n in mine])
    even_keys, lines = (
        inherited(case, f"all sub-layers at every k-th step, order {k}", [Units(deep=None)], k)
        for k in (0, 1)
    )
    steps = best_where_tuned(others[:2])
    rows = table(case, [*others, even_keys, lines, *mine.values()])
    claims = [
        below(
            name,
            paper,
            even_keys,
            "the learned route errs less than the same sub-layers at the best common key steps",
            "common key steps match it",
        ),
        below(
            name,
            best_where_tuned([mine[KEYED], mine[f"{KEYED}, order 1"]]),
            best_where_tuned([even_keys, lines]),
            "learned from a plain cache, ours, the route errs less than the better plain cache",
            "learning changes nothing for the better",
        ),
        below(
            name,
            best_where_tuned([*mine.values(), *others[2:]]),
            steps,
            f"the best cache at {SHARE:.0%} of the cost errs at least 30 % less than {steps.name}",
            "fewer steps come within 30 %",
            0.7,
        ),
        below(
            name,
            best_where_tuned([t for n, t in mine.items() if n.startswith("HarmoniCa")]),
            steps,
            f"the learned route at {SHARE:.0%} of the cost errs less than {steps.name}",
            "fewer steps are as good",
        ),
    ]
    if wide:
        chain = [ours, mine["without the image error"], mine["Learning-to-Cache style"]]
        words = (
            ("learning with the image error", "without it"),
            ("learning on the own trajectory", "on the teacher's, as Learning-to-Cache does"),
        )
        for one, two, (what, than) in zip(chain, chain[1:], words, strict=False):
            claims.append(below(name, one, two, f"{what} errs less than {than}", "no less"))
        claims.append(
            below(name, ours, mine["random route"], "the route errs less than a random one", "no")
        )
    return claims, rows


@proof("harmonica")
@torch.no_grad()
def prove(scale: Scale) -> Evidence:
    """Spend half of the multiply-accumulates by a learned route, and compare."""
    claims: list[Claim] = []
    rows: list[Any] = []
    for case in cases(scale):
        found, more = prove_case(case, scale, wide=case.study.name != "house:emoji")
        claims += found
        rows += more
    notes = (
        "Full runs are DDIM in 16 steps. Settings are chosen on the noise of seed 1000 and judged "
        "on other noise; routes are learned on other prompts. Learning is far shorter than the "
        "paper's 20,000 steps and at a higher rate. beta follows a share of reuse and lambda is "
        "divided by its mean, both ours; from even keys learning begins with all parts computed at "
        "every second step. All routes cost the same; the first-block cache costs what its "
        "threshold gives. Milliseconds are of a shared CPU."
    )
    if scale.size == "smoke":
        notes += " Random weights: whether the claims hold here means nothing."
    return Evidence(claims, rows, notes)
