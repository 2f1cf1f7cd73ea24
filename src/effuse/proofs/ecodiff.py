"""Masks learnt through whole walks against single answers, magnitude, Taylor, chance, fewer steps.

Errors are || z_0' - z_0 ||^2 / || z_0 ||^2 of last samples from the same noise, on prompts and
noise that nothing was learnt or chosen on. Every criterion may cut by layer or by kind: whichever
is better on noise and prompts of its own, which are not the judge's. Steps are whole: the fewer
that cost at most as much cost less, and the rows say by how much.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import uniform_calls, walks
from effuse.compress.groups import masked
from effuse.compress.prune.ecodiff import Curvature, EcoDiff, Masked, PerKind, PerLayer
from effuse.compress.prune.laptop_diff import LaptopDiff
from effuse.compress.prune.members import Magnitude, Random, Taylor
from effuse.compress.units import macs, parameters
from effuse.core import Denoiser, Solver
from effuse.core.rollout import Rollout
from effuse.ops.stats import bootstrap, paired
from effuse.ops.transport import sliced_wasserstein2
from effuse.solvers import DDIM
from effuse.solvers.momentum import Momentum

from . import Claim, Evidence, Scale, proof
from ._study import Study, of_pipeline, off, tiny

JUDGED, TUNED = 0, 5000
Row = dict[str, Any]


@dataclass
class Bench:
    """A study to judge on, and what may be learnt from.

    draw: trajectories. calls: with targets, t uniform. score: of pictures against their texts.
    """

    study: Study
    tuning: Study
    how: EcoDiff
    draw: Callable[[torch.Generator], tuple[Denoiser, Solver, Tensor, Tensor]]
    calls: Callable[[], Sequence[Mapping[str, Any]]]
    score: Callable[[Tensor], Tensor] | None = None


@proof("ecodiff")
def prove(scale: Scale) -> Evidence:
    """Compare who is cut at the same shares of members, and count what backward keeps."""
    claims: list[Claim] = []
    rows: list[Row] = []
    benches = [_tiny()] if scale.size == "smoke" else _house(scale)
    for bench in benches:
        mine = _compared(bench, scale)
        rows += mine
        claims += _claims(bench.study.name, mine)
    found, made = _memory(benches[-1], scale)
    return Evidence(
        [*claims, *made],
        [*rows, *found],
        f"z_0 of {benches[0].study.steps} DDIM steps, guidance 4; learnt on other prompts than "
        "judged. Members are heads "
        "and neurons. Single answers: the same masks, as many updates, a walk's worth of calls an "
        "update. Fewer steps: as many as cost at most what the network with masks costs.",
    )


# ---- who is cut


def _compared(bench: Bench, scale: Scale) -> list[Row]:
    study, network, rows = bench.study, bench.study.network, []
    full, call = study.run(JUDGED), study.call()
    near = bench.tuning.run(TUNED)
    whole = {"macs": macs(network, call) * study.steps, "parameters": parameters(network)}
    rows.append({"network": study.name, "variant": "original", **whole, **_seen(bench, full, full)})
    handles = _learnt(bench, scale)
    for share in scale.pick((0.5,), (0.2,), (0.1, 0.2, 0.3)):
        left: dict[str, Any] = {}
        for what, handle in handles.items():
            tried = []
            for choice in (PerKind(1 - share), PerLayer(1 - share)):
                handle.cut(choice)
                tried.append((float(off(bench.tuning.run(TUNED), near).mean()), choice))
                handle.narrow({})
            error, choice = min(tried, key=lambda pair: pair[0])
            handle.cut(choice)
            spent = {"macs": macs(network, call) * study.steps, "parameters": parameters(network)}
            row = {"network": study.name, "variant": what, "share": share, **spent}
            row |= {"cut": type(choice).__name__, "error_on_tuning_noise": error}
            rows.append(row | _seen(bench, study.run(JUDGED), full))
            if what == "masks through the walk":
                left = spent
            handle.narrow({})
        rows += _others(bench, share, left, whole, full)
    return rows


def _others(
    bench: Bench, share: float, left: Mapping[str, int], whole: Mapping[str, int], full: Tensor
) -> list[Row]:
    """Return rows for whole layers at as many parameters and fewer steps at as many MACs."""
    study, network, out = bench.study, bench.study.network, []
    keep = left["parameters"] / whole["parameters"]
    head = {"network": study.name, "share": share}
    try:
        handle = LaptopDiff(keep=keep).attach(network)
        handle.observe(bench.calls())
        row = {"macs": macs(network, study.call()) * study.steps, "parameters": parameters(network)}
        seen = _seen(bench, study.run(JUDGED), full)
        out.append({**head, "variant": "laptop_diff, as many parameters", **row, **seen})
        handle.detach()
    except ValueError as error:
        out.append({**head, "variant": "laptop_diff, as many parameters", "refused": str(error)})
    steps = max(1, int(study.steps * left["macs"] / whole["macs"]))
    for solver in (DDIM(), Momentum()):
        what = f"fewer steps, {type(solver).__name__}"
        row = {"steps": steps, "macs": whole["macs"] // study.steps * steps}
        row |= {"parameters": whole["parameters"]}
        seen = _seen(bench, study.run(JUDGED, solver, steps), full)
        out.append({**head, "variant": what, **row, **seen})
    return out


def _learnt(bench: Bench, scale: Scale) -> dict[str, Masked]:
    """Return one handle a criterion with its scores; nothing is cut yet."""
    network, calls, out = bench.study.network, bench.calls(), {}
    through = bench.how.attach(network)
    through.learn(bench.draw, rng=torch.Generator().manual_seed(77), progress=False)
    out["masks through the walk"] = through
    through.narrow({})
    ranked = replace(bench.how, by=Curvature(scale.pick(2, 12, 48)), samples=48).attach(network)
    ranked.learn(bench.draw, rng=torch.Generator().manual_seed(78), progress=False)
    out[RANKED] = ranked
    ranked.narrow({})
    single = replace(bench.how, accumulate=bench.how.accumulate * bench.study.steps)
    alone = single.attach(network)
    alone.observe([c["call"] for c in calls])
    alone.narrow({})
    out["masks on single answers"] = alone
    for what, worth in {
        "magnitude": Magnitude(),
        "Taylor": Taylor(),
        **{f"random {k}": Random(k) for k in range(scale.pick(1, 3, 3))},
    }.items():
        handle = bench.how.attach(network)
        handle.logits = worth.scores(network, handle.groups, calls)
        out[what] = handle
    return out


def _seen(bench: Bench, x: Tensor, full: Tensor) -> Row:
    each = off(x, full)
    low, high = bootstrap(each)
    out: Row = {"error": float(each.mean()), "error_low": low, "error_high": high}
    out["errors"] = each.tolist()
    out["sliced_w2"] = sliced_wasserstein2(x.double(), full.double()) ** 2
    if bench.score is not None:
        out["score"] = float(bench.score(x).mean())
    return out


def _claims(name: str, rows: Sequence[Row]) -> list[Claim]:
    shares = sorted({r["share"] for r in rows if "share" in r})
    out = []
    for share in shares:
        at = {r["variant"]: r for r in rows if r.get("share") == share and "error" in r}
        ours = torch.tensor(at["masks through the walk"]["errors"])
        chance = [r["errors"] for what, r in at.items() if what.startswith("random")]
        rivals = {
            "masks learnt on single answers": at["masks on single answers"]["errors"],
            "magnitude": at["magnitude"]["errors"],
            "Taylor": at["Taylor"]["errors"],
            "chance": torch.tensor(chance).mean(0).tolist(),
        }
        layers = at.get("laptop_diff, as many parameters")
        if layers is not None:
            rivals["whole layers by laptop_diff, as many parameters or fewer"] = layers["errors"]
        fewer = {w: r for w, r in at.items() if w.startswith("fewer steps")}
        best = min(fewer, key=lambda w: fewer[w]["error"])
        rivals[f"{best}, at most as many multiply-accumulates"] = fewer[best]["errors"]
        pairs = [(what, errors, "", ours) for what, errors in rivals.items()]
        ranked = torch.tensor(at[RANKED]["errors"])
        for what, errors in {**rivals, "the masks of the paper": ours.tolist()}.items():
            pairs.append((what, errors, f"{RANKED}, is ", ranked))
        for what, errors, who, mine in pairs:
            gain, interval = paired(torch.tensor(errors), mine)
            out.append(
                Claim(
                    f"{name}, {share:.0%} of the members cut: {who}closer to the original's "
                    f"samples than {what}",
                    sum(errors) / len(errors),
                    float(mine.mean()),
                    "relative squared error of the last sample",
                    "lower",
                    gain > 0 and interval[0] > 0,
                    f"{what} is as close: the interval of the paired difference holds zero",
                    interval,
                )
            )
    return out


# ---- what backward keeps


def _memory(bench: Bench, scale: Scale) -> tuple[list[Row], list[Claim]]:
    """Count the bytes that backward keeps, whole and a step at a time, and compare gradients."""
    network, rows = bench.study.network, []
    made: list[dict[str, int]] = []
    handle = bench.how.attach(network)
    counts = scale.pick((2, 4), (2, 4), (2, 4, 8))
    worst = 0.0
    for steps in counts:
        denoiser, solver, x, _ = bench.draw(torch.Generator().manual_seed(1))
        times, x = bench.study.times(steps), x[:1]
        if bench.score is not None:
            denoiser, solver, x, times = _one(bench, steps)
        masks = {g.name: torch.full((g.size,), 0.7, requires_grad=True) for g in handle.groups}
        kept, grads = _both(network, masks, Rollout(denoiser, solver, times), x)
        apart = float((grads["whole"] - grads["a step at a time"]).norm() / grads["whole"].norm())
        worst = max(worst, apart)
        made.append(kept)
        rows.append(
            {
                "network": bench.study.name,
                "variant": "memory",
                "steps": steps,
                "kept_bytes_whole": kept["whole"],
                "kept_bytes_a_step_at_a_time": kept["a step at a time"],
                "gradients_apart": apart,
            }
        )
    first, last = made[0], made[-1]
    grown, ours = (last[w] / first[w] for w in ("whole", "a step at a time"))
    return rows, [
        Claim(
            f"from {counts[0]} to {counts[-1]} steps, what backward keeps does not grow, while "
            "that of a whole graph does as the steps",
            grown,
            ours,
            "times as many bytes",
            "lower",
            ours < 1.05 and grown > 0.9 * counts[-1] / counts[0],
            "it grows",
        ),
        Claim(
            "both ways give the same gradient",
            1e-4,
            worst,
            "relative difference in float32",
            "lower",
            worst < 1e-4,
        ),
    ]


def _both(
    network: nn.Module, masks: Mapping[str, Tensor], walk: Rollout, x: Tensor
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the bytes kept and the gradient of both ways through one walk."""
    rollout = replace(walk, within=lambda: masked(network, masks))

    def whole() -> Tensor:
        point = rollout.prepare(x)
        for index in range(len(rollout)):
            point = rollout.step(index, point)
        return rollout.finish(point)

    ways = {"whole": whole, "a step at a time": lambda: rollout.run(x, list(masks.values()))}
    kept, grads = {}, {}
    for what, through in ways.items():
        gc.collect()
        with _counting() as count:
            through().square().mean().backward()
        kept[what] = count.most
        grads[what] = torch.cat([m.grad for m in masks.values() if m.grad is not None])
        for m in masks.values():
            m.grad = None
    return kept, grads


def _one(bench: Bench, steps: int) -> tuple[Denoiser, Solver, Tensor, Tensor]:
    """Return the study's own walk, in another number of steps."""
    x, denoiser = bench.study.draw(TUNED)
    return denoiser, DDIM(), x, bench.study.times(steps)


class _Count:
    """Bytes kept for backward: now, and the most at one time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, t: Tensor) -> Any:
        held = _Held(t)
        size = t.numel() * t.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.drop, size)
        return held

    def drop(self, size: int) -> None:
        self.now -= size


@dataclass(eq=False)
class _Held:
    value: Tensor


@contextlib.contextmanager
def _counting() -> Iterator[_Count]:
    count = _Count()
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda held: held.value):
        yield count


# ---- what it is shown on


def _house(scale: Scale) -> list[Bench]:
    from effuse import house
    from effuse.bridge.pipeline import wrap
    from effuse.house.examples import prompts

    out = []
    for name in scale.pick(("emoji",), ("emoji-dit",), ("emoji", "emoji-dit")):
        pipe: Any = house.load(name)
        network: nn.Module = (pipe.unet if name == "emoji" else pipe.transformer).eval()
        if name == "emoji":
            every: list[Any] = [p.text for p in prompts()]
            texts = {t: t for t in every}
        else:
            texts = {i: n for n, i in pipe.labels.items()}
            every = list(texts)
        judged = every[1::4][: scale.pick(2, 8, 12)]
        tuned = every[3::4][: scale.pick(2, 2, 4)]
        told = [p for i, p in enumerate(every) if i % 2 == 0][:16]
        steps = scale.pick(3, 4, 6)
        count = scale.pick(2, 8, 24)
        calls = partial(
            uniform_calls, pipe, told, count=count, batch=scale.pick(2, 2, 4), steps=steps, seed=50
        )
        score = partial(_score, house.clip(), wrap(pipe), [texts[a] for a in judged])
        how = EcoDiff(
            beta=BETA,
            samples=scale.pick(2, 8, 12),
            steps=scale.pick(2, 20, 30),
            accumulate=1,
            rates={"heads": RATE, "neurons": RATE},
        )
        draw = walks(pipe, told, steps=steps, batch=scale.pick(1, 1, 2), guidance=4.0)
        study = of_pipeline(f"house:{name}", pipe, judged, 4.0, steps)
        tuning = of_pipeline(f"house:{name}", pipe, tuned, 4.0, steps)
        network.requires_grad_(False)
        out.append(Bench(study, tuning, how, draw, calls, score))
    return out


def _score(judge: Any, model: Any, texts: list[str], z: Tensor) -> Tensor:
    out: Tensor = judge.score(model.codec.decode(z.float()).clamp(0, 1), texts)
    return out


RANKED = "curvature through the walk, ours"
BETA, RATE = 0.05, 0.15
"""Beta of 0.5 and 0.05 on the tuning noise, walks of 4 steps; a rate that gets there in 30."""


def _tiny() -> Bench:
    """Random weights: shows that everything runs and counts, and nothing else."""
    study = tiny()
    times = study.times(3)
    study.steps = 3

    def draw(rng: torch.Generator) -> tuple[Denoiser, Solver, Tensor, Tensor]:
        x, denoiser = study.draw(int(torch.randint(100, (), generator=rng)))
        return denoiser, DDIM(), x, times

    def calls() -> Sequence[Mapping[str, Any]]:
        args, kwargs = study.call()
        return [{"call": (args, kwargs), "target": torch.zeros_like(args[0])}]

    how = EcoDiff(kinds=("heads", "channels"), samples=2, steps=3, accumulate=1, beta=BETA)
    return Bench(study, study, how, draw, calls)
