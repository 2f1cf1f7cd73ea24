"""Ways to make a network cheaper by a share, and the bench that measures all of them alike."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from effuse.compress.cache.error_budget import ErrorBudget, Frontier
from effuse.compress.cache.first_block import FirstBlock
from effuse.compress.cache.harmonica import Harmonica, Share, learn_cache
from effuse.compress.cache.keys import Explicit
from effuse.compress.cache.levels import Blocks, Layers, Level
from effuse.compress.calibrate import calls_from_pipeline, walks
from effuse.compress.factorize.maestro import Factored, Maestro
from effuse.compress.healing import Spoiled, heal, own_samples
from effuse.compress.prune.choose import Macs
from effuse.compress.prune.ecodiff import EcoDiff
from effuse.compress.prune.iss_p import Sparsify
from effuse.compress.prune.laptop_diff import (
    Criterion,
    LaptopDiff,
    Magnitude,
    OutputError,
    Random,
    Taylor,
)
from effuse.compress.prune.members import Budget
from effuse.compress.prune.slimsam import SlimSAM
from effuse.compress.quantize.int8 import Int8
from effuse.compress.rewire.asdm_assembly import Inherit
from effuse.compress.rewire.asdm_redundancy import DropRedundant
from effuse.compress.rewire.koala import Koala
from effuse.compress.rewire.linfusion import LinearizeAttention
from effuse.compress.units import parameters
from effuse.core import Applied, Solver, Transform
from effuse.evaluate import cost
from effuse.evaluate.quality import FeatureDistance, Frechet, Psnr
from effuse.ops.stats import paired
from effuse.recipe.applied import network_name
from effuse.solvers import DDIM
from effuse.solvers.momentum import Momentum

from . import Scale

Row = dict[str, Any]
COSTS = ("macs", "parameters", "network_bytes", "time_ratio")


@dataclass
class Cheaper:
    """A pipeline made cheaper: its solver and steps, what is on it, a handle that can be healed."""

    solver: Solver
    steps: int
    handle: Applied | None = None
    note: str = ""


Make = Callable[["Bench", Any, float], Cheaper]
"""Called with the bench, a pipeline of its own and the share to remove."""


@dataclass(frozen=True)
class Way:
    """A way to remove a share.

    of: "parameters" of the network, its "network_bytes", or "macs" of a picture. heals: learns
    from the original afterwards, in a row of its own. once: of one strength, whatever is asked.
    """

    name: str
    of: str
    make: Make
    heals: bool = False
    once: bool = False


@dataclass
class Bench:
    """One pipeline with what it is asked, who judges, and what it gave as it was.

    solver, steps, guidance: of the original. told: what calibration and healing ask, shares no
    name with `asked` where the pipeline has enough names. seeds: of the noise, one a picture.
    """

    name: str
    load: Callable[[], Any]
    asked: list[Any]
    texts: list[str]
    seeds: list[int]
    steps: int
    scale: Scale
    told: list[Any]
    solver: Solver = field(default_factory=DDIM)
    guidance: float = 4.0
    judge: Any = None
    features: Any = None
    reference: Tensor | None = None
    calls: list[Any] = field(default_factory=list)
    first: tuple[Tensor, Tensor] | None = None
    frontier: Frontier | None = None
    samples: Spoiled | None = None
    judged: Factored | None = None
    pipe: Any = None

    @torch.no_grad()
    def draw(self, pipe: Any, how: Cheaper, rows: slice | None = None) -> Tensor:
        """Return pictures (N, 3, H, W) in [0, 1], each from the noise of its own seed."""
        from effuse.bridge.pipeline import wrap

        model, out = wrap(pipe), []
        asked, seeds = self.asked[rows or slice(None)], self.seeds[rows or slice(None)]
        for first in range(0, len(asked), 16):
            some = asked[first : first + 16]
            noise = [
                model.prior(1, rng=torch.Generator().manual_seed(s))
                for s in seeds[first : first + 16]
            ]
            if how.handle is not None:
                how.handle.reset()
            out.append(
                model.sample(
                    some,
                    how.solver,
                    steps=how.steps,
                    guidance=self.guidance,
                    latents=torch.cat(noise),
                )
            )
        return torch.cat(out)

    def fit(self, pictures: Tensor) -> Tensor:
        """Return how well each picture fits its text, (N,)."""
        return self.judge.score(pictures, self.texts).double()

    def row(
        self, name: str, of: str, share: float, pipe: Any, how: Cheaper, unhealed: Row | None = None
    ) -> Row:
        """Return all figures of one variant; healing leaves the costs of `unhealed`."""
        pictures = self.draw(pipe, how)
        fits = self.fit(pictures)
        if self.first is None:
            self.first = pictures, fits
        costs = {n: unhealed[n] for n in COSTS} if unhealed else self.costs(pipe, how)
        kept = float(fits.mean() / self.first[1].mean())
        difference, interval = paired(fits, self.first[1])
        psnr = Psnr()
        psnr.update(pictures, self.first[0])
        out: Row = {
            "network": self.name,
            "variant": name,
            "share_of": of,
            "share": share,
            "solver": type(how.solver).__name__,
            "steps": how.steps,
            "score": float(fits.mean()),
            "score_kept": kept,
            "score_change": difference,
            "score_change_low": interval[0],
            "score_change_high": interval[1],
            "squared_error": float((pictures - self.first[0]).square().mean()),
            "psnr_db": min(psnr.compute(), 99.0),
            **costs,
            "healing_minutes": 0.0,
            "note": how.note,
        }
        if self.features is not None and self.reference is not None:
            seen = self.features(pictures)
            law = Frechet(self.reference, components=16)
            law.update(seen)
            out["frechet"] = law.compute()
            apart = FeatureDistance()
            apart.update(seen, self.features(self.first[0]))
            out["feature_distance"] = apart.compute()
        return out

    def costs(self, pipe: Any, how: Cheaper) -> Row:
        """Return `COSTS` of a variant."""
        whole = Cheaper(self.solver, self.steps)
        found = cost.measure(
            {"first": self.pipe, "now": pipe},
            {
                "first": lambda: self.draw(self.pipe, whole, slice(1)),
                "now": lambda: self.draw(pipe, how, slice(1)),
            },
            rounds=self.scale.pick(1, 3, 2),
        )["now"]
        stored = cost.stored_bytes(cost.denoising_network(pipe))
        figures = found.macs_per_image, found.network_parameters, stored, found.ratio
        return dict(zip(COSTS, figures, strict=True))

    def heal(self, pipe: Any, how: Cheaper, steps: int) -> float:
        """Heal in place on the original's own guided samples; return minutes of processor time.

        The samples are drawn once for all ways and not counted.
        """
        assert how.handle is not None
        teacher = copy.deepcopy(cost.denoising_network(self.pipe)).requires_grad_(False)
        if self.samples is None:
            self.samples = own_samples(
                self.pipe,
                self.told,
                guidance=self.guidance,
                steps=self.scale.pick(2, 6, 8),
                rows=self.scale.pick(2, 16, 16),
                seed=500,
            )
        spent = time.process_time()
        heal(pipe, how.handle, teacher, self.samples, minutes=None, steps=steps, progress=False)
        return (time.process_time() - spent) / 60


def fewer(solver: Solver) -> Make:
    """Fewer steps of a solver, the original network."""

    def make(bench: Bench, pipe: Any, share: float) -> Cheaper:
        return Cheaper(solver, max(1, round(bench.steps * (1 - share))))

    return make


def transformed(build: Callable[[Bench, Any, float], Transform]) -> Make:
    """A transform on the network, observing calibration calls."""

    def make(bench: Bench, pipe: Any, share: float) -> Cheaper:
        transform = build(bench, pipe, share)
        handle = transform.attach(cost.denoising_network(pipe))
        if transform.calibrated:
            handle.observe(bench.calls if transform.targeted else [b["call"] for b in bench.calls])
        return Cheaper(bench.solver, bench.steps, handle)

    return make


def budgeted(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """The route of least predicted error that costs at most what is left."""
    handle = ErrorBudget(tried=1, trajectories=bench.scale.pick(1, 1, 2)).attach(
        cost.denoising_network(pipe)
    )
    if bench.frontier is None:
        draw = walks(pipe, bench.told[:8], steps=bench.steps, guidance=bench.guidance)
        handle.learn(draw, rng=torch.Generator().manual_seed(60), progress=False)
        bench.frontier = handle.frontier
    assert bench.frontier is not None
    handle.follow(bench.frontier.at(1 - share)[0])
    handle.restart()
    return Cheaper(bench.solver, bench.steps, handle)


def harmonized(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """A learned route; the share of the cost that inherits is what its penalty steers to."""
    how = Harmonica(
        penalty=Share(share), lr=0.1, iterations=bench.scale.pick(2, 20, 100), normalized=True
    )
    handle = learn_cache(
        pipe, bench.told[:8], steps=bench.steps, guidance=bench.guidance, how=how, progress=False
    )
    return Cheaper(bench.solver, bench.steps, handle, f"{how.iterations} iterations")


def narrowed(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """Stream and bottlenecks by as much each as leaves the parameters that stay."""
    network = cost.denoising_network(pipe)
    whole, low, high = parameters(network), 0.0, 0.95

    def cut(side: float, calls: Sequence[Any]) -> tuple[Applied, float]:
        handle = SlimSAM(embed=side, bottleneck=side).attach(network)
        handle.observe(calls)
        return handle, 1 - parameters(network) / whole

    for _ in range(7):
        side = (low + high) / 2
        handle, gone = cut(side, bench.calls[:2])
        handle.detach()
        low, high = (side, high) if gone < share else (low, side)
    handle, gone = cut(high, bench.calls)
    if gone < share - 0.03:
        raise ValueError(f"{gone:.0%} is the most that its widths give")
    return Cheaper(bench.solver, bench.steps, handle, f"widths {1 - high:.2f}")


def factored(of: Literal["macs", "parameters"]) -> Make:
    """Thin products in the place of layers, judged once for all shares."""

    def make(bench: Bench, pipe: Any, share: float) -> Cheaper:
        if bench.judged is None:
            calls = [b["call"] for b in bench.calls]
            whole = Maestro().attach(copy.deepcopy(cost.denoising_network(pipe)))
            whole.count(calls)
            whole.split(calls)
            whole.judge(calls)
            bench.judged = whole
        handle = copy.deepcopy(bench.judged)
        handle.transform = Maestro(keep=1 - share, of=of)
        handle.extract(1 - share)
        pipe.register_modules(**{network_name(pipe): handle.model})
        return Cheaper(bench.solver, bench.steps, handle)

    return make


def zeroed(bench: Bench, pipe: Any, share: float) -> Transform:
    """Single weights by magnitude, as many parameters of the network as stay."""
    network, how = cost.denoising_network(pipe), Sparsify()
    within: list[Any] = [m for n, m in network.named_modules() if how.wants(n, m)]
    among = {id(m.weight): m.weight.numel() for m in within}
    return Sparsify(share * parameters(network) / sum(among.values()))


def layers(criterion: Criterion) -> Callable[[Bench, Any, float], Transform]:
    """Whole layers by a criterion, the best set for the parameters that stay."""
    return lambda bench, pipe, share: LaptopDiff(keep=1 - share, criterion=criterion)


def masked(bench: Bench, pipe: Any, share: float) -> Transform:
    """Heads and neurons by masks learnt on single answers, as many parameters as stay."""
    return EcoDiff(Budget(1 - share), steps=bench.scale.pick(2, 10, 60))


def inherited(level: Level, order: int) -> Callable[[Bench, Any, float], Transform]:
    """Features inherited at evenly spread steps; as many as the share of MACs needs."""

    def build(bench: Bench, pipe: Any, share: float) -> Transform:
        probe = Inherit(level, Explicit((0,)), order).attach(cost.denoising_network(pipe))
        try:
            probe.observe(calls_from_pipeline(pipe, 1, steps=2, limit=1))
            (priced,) = {c.inherited / c.full for c in probe.costs.values()}
        finally:
            probe.detach()
        steps = bench.steps
        spare = steps * (share - 0.015 * (1 - share))  # within 2 % of fewer steps
        computed = steps - math.ceil(spare / max(1 - priced, 1e-6))
        if computed < 2:
            raise ValueError(f"a step that inherits still costs {priced:.0%} of a whole one")
        keys = sorted({round(i * (steps - 1) / (computed - 1)) for i in range(computed)})
        return Inherit(level, Explicit(tuple(keys)), order)

    return build


def first_block(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """The first-block cache with the least threshold that spends no more, on other noise."""
    network, low, high = cost.denoising_network(pipe), 1e-3, 4.0
    tuning = replace(bench, asked=bench.told[:2], seeds=[70, 71])

    def spent(tau: float) -> int:
        with FirstBlock(tau).attach(network) as handle, cost.CountMacs() as count:
            tuning.draw(pipe, Cheaper(bench.solver, bench.steps, handle))
            return count.macs

    most = (1 - share) * spent(1e-9)
    for _ in range(6):
        tau = (low * high) ** 0.5
        low, high = (low, tau) if spent(tau) <= most else (tau, high)
    return Cheaper(bench.solver, bench.steps, FirstBlock(high).attach(network), f"tau {high:.3g}")


CACHES: tuple[Way, ...] = (
    Way("fewer steps, ddim", "macs", fewer(DDIM())),
    Way("fewer steps, momentum", "macs", fewer(Momentum())),
    Way("first_block", "macs", first_block),
    Way("deep_cache, even steps", "macs", transformed(inherited(Blocks(1), 0))),
    Way("inherit, order 0", "macs", transformed(inherited(Layers(), 0))),
    Way("inherit, order 1", "macs", transformed(inherited(Layers(), 1))),
    Way("inherit all blocks, order 1", "macs", transformed(inherited(Blocks(0), 1))),
)

WAYS: tuple[Way, ...] = (
    *CACHES,
    Way("error_budget", "macs", budgeted),
    Way("harmonica", "macs", harmonized),
    Way(
        "asdm_redundancy",
        "macs",
        transformed(lambda bench, pipe, share: DropRedundant(keep=1 - share, cost=Macs())),
    ),
    Way("maestro", "macs", factored("macs"), heals=True),
    Way("maestro, of parameters", "parameters", factored("parameters"), heals=True),
    Way("laptop_diff", "parameters", transformed(layers(OutputError())), heals=True),
    Way("ecodiff", "parameters", transformed(masked), heals=True),
    Way("slimsam", "parameters", narrowed, heals=True),
    Way("layers by magnitude", "parameters", transformed(layers(Magnitude())), heals=True),
    Way("layers by Taylor", "parameters", transformed(layers(Taylor())), heals=True),
    Way("layers at random", "parameters", transformed(layers(Random())), heals=True),
    Way("iss_p, one shot", "parameters", transformed(zeroed)),
    Way("koala", "parameters", transformed(lambda *_: Koala()), heals=True, once=True),
    Way("linfusion", "macs", transformed(lambda *_: LinearizeAttention()), heals=True, once=True),
    Way("int8", "network_bytes", transformed(lambda *_: Int8()), once=True),
)
