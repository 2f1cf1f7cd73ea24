"""Every way to make a network cheaper, at equal shares removed, in one table.

What is removed: parameters of the network for those that prune or factorize it, a picture's
multiply-accumulates for caches and fewer steps. A table, not a race: both are measured of all.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effuse.compress.cache.error_budget import ErrorBudget, Frontier
from effuse.compress.cache.harmonica import Harmonica, Share, learn_cache
from effuse.compress.cache.keys import Explicit
from effuse.compress.cache.levels import Layers
from effuse.compress.calibrate import calls_from_pipeline, uniform_calls, walks
from effuse.compress.factorize.maestro import Maestro
from effuse.compress.healing import heal, own_samples
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
from effuse.core import Applied, Solver, Transform
from effuse.evaluate import cost
from effuse.evaluate.quality import FeatureDistance, Frechet, Psnr
from effuse.ops.stats import paired
from effuse.solvers import DDIM
from effuse.solvers.momentum import Momentum

from . import Claim, Evidence, Scale, proof

SHARES = (0.1, 0.2, 0.3, 0.5)


@dataclass
class Cheaper:
    """A pipeline made cheaper: its solver and steps, what is on it, minutes of healing."""

    solver: Solver
    steps: int
    handles: Sequence[Applied] = ()
    minutes: float = 0.0
    note: str = ""


Make = Callable[["Bench", Any, float], Cheaper]
"""Called with the bench, a pipeline of its own and the share to remove."""


@dataclass(frozen=True)
class Contender:
    """A way to remove a share. of: "parameters" or "macs"; once: it has a share of its own."""

    name: str
    of: str
    make: Make
    once: bool = False


@dataclass
class Bench:
    """One pipeline with what it is asked, who judges, and what it gave as it was."""

    name: str
    load: Callable[[], Any]
    asked: list[Any]
    texts: list[str]
    seeds: list[int]
    steps: int
    guidance: float
    scale: Scale
    judge: Any = None
    features: Any = None
    reference: Tensor | None = None
    told: list[Any] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    first: tuple[Tensor, Tensor] | None = None
    frontier: Frontier | None = None
    pipe: Any = None

    def draw(self, pipe: Any, how: Cheaper, rows: slice | None = None) -> Tensor:
        """Return pictures (N, 3, H, W) in [0, 1], each from the noise of its own seed."""
        from effuse.bridge.pipeline import wrap

        model, out = wrap(pipe), []
        asked, seeds = (self.asked, self.seeds) if rows is None else (self.asked[rows], [0])
        for first in range(0, len(asked), 16):
            some = asked[first : first + 16]
            noise = [
                model.prior(1, rng=torch.Generator().manual_seed(s))
                for s in seeds[first : first + 16]
            ]
            for handle in how.handles:
                if isinstance(handle, Applied):
                    handle.reset()
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
        if self.judge is None:
            return pictures.flatten(1).mean(1)
        return self.judge.score(pictures, self.texts).double()

    def row(self, name: str, of: str, share: float, pipe: Any, how: Cheaper) -> dict[str, Any]:
        """Return all figures of one variant."""
        pictures = self.draw(pipe, how)
        fits = self.fit(pictures)
        whole = Cheaper(DDIM(), self.steps)
        if self.first is None:
            self.first = pictures, fits
        found = cost.measure(
            {"first": self.pipe, "now": pipe},
            {
                "first": lambda: self.draw(self.pipe, whole, slice(1)),
                "now": lambda: self.draw(pipe, how, slice(1)),
            },
            rounds=self.scale.pick(1, 3, 5),
        )["now"]
        kept = float(fits.mean() / self.first[1].mean())
        difference, interval = paired(fits, self.first[1])
        psnr = Psnr()
        psnr.update(pictures, self.first[0])
        out: dict[str, Any] = {
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
            "psnr_db": min(psnr.compute(), 99.0),
            "macs": found.macs_per_image,
            "parameters": found.network_parameters,
            "network_bytes": cost.stored_bytes(cost.denoising_network(pipe)),
            "time_ratio": found.ratio,
            "healing_minutes": round(how.minutes, 2),
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


# ---- the ways


def fewer(solver: Solver) -> Make:
    """Fewer steps of a solver, the original network."""

    def make(bench: Bench, pipe: Any, share: float) -> Cheaper:
        return Cheaper(solver, max(1, round(bench.steps * (1 - share))))

    return make


def transformed(
    build: Callable[[Bench, Any, float], Transform], minutes: Callable[[Bench], float] | None = None
) -> Make:
    """A transform on the network, observing calibration calls; healed for some minutes if asked."""

    def make(bench: Bench, pipe: Any, share: float) -> Cheaper:
        network = cost.denoising_network(pipe)
        teacher = copy.deepcopy(network) if minutes is not None else None
        transform = build(bench, pipe, share)
        handle = transform.attach(network)
        if transform.calibrated:
            handle.observe(bench.calls if transform.targeted else [b["call"] for b in bench.calls])
        spent, note = 0.0, ""
        if minutes is not None and teacher is not None:
            begun = time.monotonic()
            batches = own_samples(pipe, bench.told, teacher=teacher, guidance=bench.guidance)
            drawn = time.monotonic() - begun
            heal(pipe, handle, teacher, batches, minutes=minutes(bench), progress=False)
            spent = (time.monotonic() - begun) / 60
            note = f"healed on {len(bench.told)} samples of its own, drawn in {drawn:.0f} s"
        return Cheaper(DDIM(), bench.steps, [handle], spent, note)

    return make


def budgeted(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """The route of least predicted error that costs at most what is left."""
    handle = ErrorBudget(tried=1, trajectories=bench.scale.pick(1, 1, 2)).attach(
        cost.denoising_network(pipe)
    )
    if bench.frontier is None:
        draw = walks(pipe, bench.told, steps=bench.steps, guidance=bench.guidance)
        handle.learn(draw, rng=torch.Generator().manual_seed(60), progress=False)
        bench.frontier = handle.frontier
    assert bench.frontier is not None
    handle.follow(bench.frontier.at(1 - share)[0])
    handle.restart()
    return Cheaper(DDIM(), bench.steps, [handle])


def harmonized(bench: Bench, pipe: Any, share: float) -> Cheaper:
    """A learned route; the share of the cost that inherits is what its penalty steers to."""
    how = Harmonica(
        penalty=Share(share), lr=0.1, iterations=bench.scale.pick(2, 20, 200), normalized=True
    )
    handle = learn_cache(
        pipe, bench.told, steps=bench.steps, guidance=bench.guidance, how=how, progress=False
    )
    return Cheaper(DDIM(), bench.steps, [handle], note=f"{how.iterations} iterations")


def narrowed(bench: Bench, pipe: Any, share: float) -> Transform:
    """Both widths by the root of what stays, as parameters grow with their product."""
    side = (1 - share) ** 0.5
    return SlimSAM(embed=side, bottleneck=side)


def layers(criterion: Criterion) -> Callable[[Bench, Any, float], Transform]:
    """Whole layers by a criterion, the best set for the parameters that stay."""
    return lambda bench, pipe, share: LaptopDiff(keep=1 - share, criterion=criterion)


def inherited(order: int) -> Callable[[Bench, Any, float], Transform]:
    """Features inherited at evenly spread steps; as many as the share of MACs needs."""

    def build(bench: Bench, pipe: Any, share: float) -> Transform:
        probe = Inherit(Layers(), Explicit((0,)), order).attach(cost.denoising_network(pipe))
        try:
            probe.observe(calls_from_pipeline(pipe, 1, steps=2, limit=1))
            (priced,) = {c.inherited / c.full for c in probe.costs.values()}
        finally:
            probe.detach()
        steps = bench.steps
        cached = min(steps - 2, math.ceil(steps * share / max(1 - priced, 1e-6)))
        computed = max(2, steps - cached)
        keys = sorted({round(i * (steps - 1) / (computed - 1)) for i in range(computed)})
        return Inherit(Layers(), Explicit(tuple(keys)), order)

    return build


WAYS: tuple[Contender, ...] = (
    Contender("fewer steps, ddim", "macs", fewer(DDIM())),
    Contender("fewer steps, momentum", "macs", fewer(Momentum())),
    Contender("inherit, order 0", "macs", transformed(inherited(0))),
    Contender("inherit, order 1", "macs", transformed(inherited(1))),
    Contender("error_budget", "macs", budgeted),
    Contender("harmonica", "macs", harmonized),
    Contender(
        "asdm_redundancy",
        "macs",
        transformed(lambda bench, pipe, share: DropRedundant(keep=1 - share, cost=Macs())),
    ),
    Contender("laptop_diff", "parameters", transformed(layers(OutputError()))),
    Contender(
        "laptop_diff, healed",
        "parameters",
        transformed(layers(OutputError()), lambda bench: bench.scale.pick(0.02, 1.0, 10.0)),
    ),
    Contender(
        "ecodiff",
        "parameters",
        transformed(
            lambda bench, pipe, share: EcoDiff(Budget(1 - share), steps=bench.scale.pick(2, 10, 60))
        ),
    ),
    Contender("slimsam", "parameters", transformed(narrowed)),
    Contender("maestro", "macs", transformed(lambda bench, pipe, share: Maestro(keep=1 - share))),
    Contender(
        "iss_p, one shot",
        "parameters",
        transformed(lambda bench, pipe, share: Sparsify(share)),
    ),
    Contender("linfusion", "macs", transformed(lambda *_: LinearizeAttention()), once=True),
    Contender("int8", "parameters", transformed(lambda *_: Int8()), once=True),
    Contender("koala, its one plan", "parameters", transformed(lambda *_: Koala()), once=True),
    Contender("layers by magnitude", "parameters", transformed(layers(Magnitude()))),
    Contender("layers by Taylor", "parameters", transformed(layers(Taylor()))),
    Contender("layers at random", "parameters", transformed(layers(Random()))),
)


QUICK = ("fewer steps, ddim", "inherit, order 1", "laptop_diff")


# ---- the benches, and what is claimed of them


def benches(scale: Scale) -> list[Bench]:
    """Return house:emoji, and house:emoji-dit from the small size on."""
    from effuse import house
    from effuse.core.errors import MissingExtra
    from effuse.evaluate.features import EfficientNetFeatures

    judge = house.clip()
    features: Any = None
    reference = None
    try:
        reference = house.reference()
        features = EfficientNetFeatures(reference.settings.get("size") or 128)
    except (MissingExtra, FileNotFoundError):
        pass
    count, steps = scale.pick(2, 16, 32), scale.pick(3, 10, 20)
    out = []
    for name in ("emoji",) if scale.size == "smoke" else ("emoji", "emoji-dit"):
        pipe: Any = house.load(name)
        if name == "emoji":
            known = [p.text for p in house.prompts()]
            texts = [known[i * 5 % len(known)] for i in range(count)]
            asked: list[Any] = texts
        else:
            labels = list(pipe.labels.items())
            some = [labels[i * 7 % len(labels)] for i in range(count)]
            texts, asked = [n for n, _ in some], [i for _, i in some]
        bench = Bench(
            f"house:{name}",
            lambda name=name: house.load(name),  # type: ignore[misc]
            asked,
            texts,
            list(range(2000, 2000 + count)),
            steps,
            4.0,
            scale,
            judge,
            features,
            None if reference is None else reference.features,
        )
        bench.pipe = pipe
        told: list[Any] = known if name == "emoji" else [i for _, i in labels]
        bench.told = told[: scale.pick(2, 24, 256)]
        bench.calls = list(
            uniform_calls(
                pipe,
                bench.told[: scale.pick(2, 24, 96)],
                count=scale.pick(2, 8, 64),
                batch=scale.pick(2, 8, 8),
                steps=scale.pick(2, 8, 15),
                seed=50,
            )
        )
        out.append(bench)
    return out


def table(bench: Bench, ways: Sequence[Contender], shares: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for the original, then one for every way and share; refusals say why."""
    rows = [bench.row("original", "", 0.0, bench.pipe, Cheaper(DDIM(), bench.steps))]
    for way in ways:
        for share in shares[:1] if way.once else shares:
            pipe = bench.load()
            cost.denoising_network(pipe).requires_grad_(True)
            try:
                how = way.make(bench, pipe, share)
                rows.append(bench.row(way.name, way.of, share, pipe, how))
                if way.once:
                    rows[-1]["share"] = 1 - rows[-1][way.of] / rows[0][way.of]
            except (ValueError, TypeError) as error:
                rows.append(
                    {
                        "network": bench.name,
                        "variant": way.name,
                        "share_of": way.of,
                        "share": share,
                        "note": f"refused: {error}",
                    }
                )
    return rows


@proof("slimming")
def prove(scale: Scale) -> Evidence:
    """Measure all ways side by side; say which of the round's bars they reach."""
    shares = scale.pick((0.3,), (0.3, 0.5), SHARES)
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    ways = [w for w in WAYS if scale.size != "smoke" or w.name in QUICK]
    for bench in benches(scale):
        found = table(bench, ways, shares)
        rows += found
        claims += [*_parameters(bench.name, found), *_calls(bench.name, found)]
    return Evidence(
        claims,
        rows,
        "The original: DDIM, guidance 4. share: of the network's parameters, or of a picture's "
        "multiply-accumulates. score: cosine of picture and text in house:clip, score_kept its "
        "ratio to the original's; psnr_db and feature_distance: to the original's pictures from "
        "the same noise; frechet: 16 components of EfficientNet-Lite0 features to real pictures, "
        "biased upwards by few pictures, alike in all rows; time_ratio: of one picture, median, "
        "interleaved. Healing minutes on this machine's two cores, shared with other work.",
    )


def _parameters(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """At 30 % fewer parameters a way stays within 2 % of the original's text-image score."""
    return [
        Claim(
            f"{name}: {r['variant']} at 30 % fewer parameters keeps 98 % of the text-image score",
            0.98,
            r["score_kept"],
            "share of the original's score",
            "higher",
            r["score_kept"] >= 0.98,
            "it keeps less",
        )
        for r in rows
        if r["share_of"] == "parameters" and r["share"] == 0.3 and "score_kept" in r
    ]


def _calls(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """At half the multiply-accumulates a cache is 30 % closer to the original than fewer steps."""

    def error(row: Mapping[str, Any]) -> float:
        return float(10 ** (-row["psnr_db"] / 10))

    mine = [r for r in rows if r["share_of"] == "macs" and r["share"] == 0.5 and "psnr_db" in r]
    plain = [r for r in mine if r["variant"].startswith("fewer steps")]
    if not plain:
        return []
    rival = min(plain, key=error)
    return [
        Claim(
            f"{name}: {r['variant']} at half the multiply-accumulates is at least 30 % closer to "
            f"the original's pictures than {rival['variant']}",
            error(rival),
            error(r),
            "mean squared error of pictures",
            "lower",
            error(r) <= 0.7 * error(rival) and r["macs"] <= 1.02 * rival["macs"],
            "it is less than 30 % closer",
        )
        for r in mine
        if r not in plain
    ]
