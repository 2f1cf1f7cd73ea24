"""Masks learnt through whole walks against single answers, magnitude, Taylor, chance, fewer steps.

Errors are || z_0' - z_0 ||^2 / || z_0 ||^2 of last samples from the same noise, on prompts and
noise that nothing was learnt or chosen on. Every criterion may cut by layer or by kind: whichever
is better on noise and prompts of its own, which are not the judge's. Steps are whole: the fewer
that cost at most as much cost less, and the rows say by how much.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import uniform_calls, walks
from effuse.compress.groups import masked
from effuse.compress.prune.ecodiff import Curvature, EcoDiff, Masked, PerKind, PerLayer
from effuse.compress.prune.laptop_diff import LaptopDiff
from effuse.compress.prune.members import Choice, Magnitude, Random, Taylor
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
SHOWN = 0.2  # of the members: the paper's share, which claims are about
STEPS = 6
BETAS = (0.2, 0.05, 0.5)
WALK, SINGLE = "masks through the walk", "masks on single answers"
RANKED = "curvature through the walk, ours"
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
    names = scale.pick(("tiny",), ("emoji-dit",), ("emoji", "emoji-dit"))
    if len(names) == 1:
        parts = [measured(name, scale) for name in names]
    else:  # a process a network, as many threads in all
        with ProcessPoolExecutor(len(names), multiprocessing.get_context("spawn")) as pool:
            share = max(1, torch.get_num_threads() // len(names))
            parts = list(pool.map(partial(measured, scale=scale, threads=share), names))
    return Evidence(
        [c for _, claims in parts for c in claims],
        [r for rows, _ in parts for r in rows],
        f"z_0 of {STEPS if scale.size != 'smoke' else 3} DDIM steps, guidance 4; learnt on other "
        "prompts than judged. Members are heads and neurons. At proof size masks learn as long as "
        "in the paper: 100 updates of four trajectories, rate 0.1; beta is the best of "
        f"{BETAS} at {SHOWN:.0%} on noise and prompts of its own, for masks on single answers "
        "too, which see a walk's worth of calls where the others see a walk. Fewer steps: as many "
        "as cost at most what the network with masks costs.",
    )


def measured(name: str, scale: Scale, threads: int = 0) -> tuple[list[Row], list[Claim]]:
    """Return rows and claims of one network; `threads`: of this process, as it is if 0."""
    if threads:
        torch.set_num_threads(threads)
    bench = _tiny() if name == "tiny" else _house(name, scale)
    rows = _compared(bench, scale)
    claims = _claims(bench.study.name, rows, scale.pick(0.5, SHOWN, SHOWN))
    if name != "emoji":
        found, made = _memory(bench, scale)
        rows, claims = rows + found, claims + made
    return rows, claims


# ---- who is cut


def _compared(bench: Bench, scale: Scale) -> list[Row]:
    study, network, rows = bench.study, bench.study.network, []
    full, call = study.run(JUDGED), study.call()
    whole = {"macs": macs(network, call) * study.steps, "parameters": parameters(network)}
    rows.append({"network": study.name, "variant": "original", **whole, **_seen(bench, full, full)})
    handles, tried = _learnt(bench, scale)
    rows += tried
    for share in scale.pick((0.5,), (SHOWN,), (0.1, SHOWN, 0.3)):
        left: dict[str, Any] = {}
        for what, handle in handles.items():
            error, choice = _cut(bench, handle, share)
            handle.cut(choice)
            spent = {"macs": macs(network, call) * study.steps, "parameters": parameters(network)}
            row = {"network": study.name, "variant": what, "share": share, **spent}
            row |= {"cut": type(choice).__name__, "error_on_tuning_noise": error}
            rows.append(row | _seen(bench, study.run(JUDGED), full))
            if what == WALK:
                left = spent
            handle.narrow({})
        rows += _others(bench, share, left, whole, full)
    return rows


def _cut(bench: Bench, handle: Masked, share: float) -> tuple[float, Choice]:
    """Return the better of cuts by kind and by layer on the tuning noise, and its error there."""
    near, tried = bench.tuning.run(TUNED), []
    for choice in (PerKind(1 - share), PerLayer(1 - share)):
        handle.cut(choice)
        tried.append((float(off(bench.tuning.run(TUNED), near).mean()), choice))
        handle.narrow({})
    return min(tried, key=lambda pair: pair[0])


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


def _learnt(bench: Bench, scale: Scale) -> tuple[dict[str, Masked], list[Row]]:
    """Return a handle a criterion with its scores, nothing cut, and what beta was tuned by."""
    network, calls, out = bench.study.network, bench.calls(), {}
    rows: list[Row] = []

    def walked(how: EcoDiff) -> Masked:
        handle = how.attach(network)
        handle.learn(bench.draw, rng=torch.Generator().manual_seed(77), progress=False)
        return handle

    def alone(how: EcoDiff) -> Masked:
        handle = replace(how, accumulate=how.accumulate * bench.study.steps).attach(network)
        handle.observe([c["call"] for c in calls])
        return handle

    for what, learn in ((WALK, walked), (SINGLE, alone)):
        tried = []
        for beta in scale.pick(BETAS[:1], BETAS[:1], BETAS):
            handle = learn(replace(bench.how, beta=beta))
            handle.narrow({})
            error, _ = _cut(bench, handle, scale.pick(0.5, SHOWN, SHOWN))
            tried.append((error, handle))
            row = {"network": bench.study.name, "variant": f"{what}, beta {beta:g}"}
            rows.append({**row, "error_on_tuning_noise": error})
        out[what] = min(tried, key=lambda pair: pair[0])[1]
    ranked = replace(bench.how, by=Curvature(scale.pick(2, 12, 48)), samples=48).attach(network)
    ranked.learn(bench.draw, rng=torch.Generator().manual_seed(78), progress=False)
    ranked.narrow({})
    out[RANKED] = ranked
    for what, worth in {
        "magnitude": Magnitude(),
        "Taylor": Taylor(),
        **{f"random {k}": Random(k) for k in range(scale.pick(1, 3, 3))},
    }.items():
        handle = bench.how.attach(network)
        handle.logits = worth.scores(network, handle.groups, calls)
        out[what] = handle
    return out, rows


def _seen(bench: Bench, x: Tensor, full: Tensor) -> Row:
    each = off(x, full)
    low, high = bootstrap(each)
    out: Row = {"error": float(each.mean()), "error_low": low, "error_high": high}
    out["errors"] = each.tolist()
    out["sliced_w2"] = sliced_wasserstein2(x.double(), full.double()) ** 2
    if bench.score is not None:
        out["score"] = float(bench.score(x).mean())
    return out


def _claims(name: str, rows: Sequence[Row], share: float) -> list[Claim]:
    """Return one claim a bar, at one share; the other shares are in the rows."""
    at = {r["variant"]: r for r in rows if r.get("share") == share and "error" in r}
    chance = [r["errors"] for what, r in at.items() if what.startswith("random")]
    fewer = min((w for w in at if w.startswith("fewer steps")), key=lambda w: at[w]["error"])
    plain = min(("magnitude", "Taylor"), key=lambda w: at[w]["error_on_tuning_noise"])
    members = min((WALK, SINGLE, plain), key=lambda w: at[w]["error_on_tuning_noise"])
    mine = min((WALK, RANKED), key=lambda w: at[w]["error_on_tuning_noise"])
    bars = [
        (WALK, SINGLE, at[SINGLE]["errors"]),
        (WALK, f"{plain}, the better of magnitude and Taylor on other noise", at[plain]["errors"]),
        (WALK, "chance", torch.tensor(chance).mean(0).tolist()),
        (RANKED, f"{members}, the best of the others on other noise", at[members]["errors"]),
        (mine, f"{fewer}, at most as many multiply-accumulates", at[fewer]["errors"]),
    ]
    out = []
    for who, what, errors in bars:
        gain, interval = paired(torch.tensor(errors), torch.tensor(at[who]["errors"]))
        out.append(
            Claim(
                f"{name}, {share:.0%} of the members cut: {who}, closer to the original's samples "
                f"than {what}",
                sum(errors) / len(errors),
                at[who]["error"],
                "relative squared error of the last sample",
                "lower",
                gain > 0 and interval[0] > 0,
                "it is as close or closer: the interval of the paired difference holds zero",
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


def _house(name: str, scale: Scale) -> Bench:
    from effuse import house
    from effuse.bridge.pipeline import wrap
    from effuse.house.examples import prompts

    pipe: Any = house.load(name)
    network: nn.Module = (pipe.unet if name == "emoji" else pipe.transformer).eval()
    if name == "emoji":
        every: list[Any] = [p.text for p in prompts()]
        texts = {t: t for t in every}
    else:
        texts = {i: n for n, i in pipe.labels.items()}
        every = list(texts)
    judged = every[1::4][: scale.pick(2, 8, 12)]
    tuned = every[3::4][: scale.pick(2, 2, 8)]
    told = [p for i, p in enumerate(every) if i % 2 == 0][: scale.pick(2, 16, 50)]
    count = scale.pick(2, 8, 96)
    calls = partial(uniform_calls, pipe, told, count=count, batch=2, steps=STEPS, seed=50)
    score = partial(_score, house.clip(), wrap(pipe), [texts[a] for a in judged])
    how = EcoDiff(
        samples=scale.pick(2, 8, 100),
        steps=scale.pick(2, 20, 100),
        accumulate=scale.pick(1, 1, 4),
        rates={"heads": 0.1, "neurons": 0.1},
    )
    draw = walks(pipe, told, steps=STEPS, batch=1, guidance=4.0)
    study = of_pipeline(f"house:{name}", pipe, judged, 4.0, STEPS)
    tuning = of_pipeline(f"house:{name}", pipe, tuned, 4.0, STEPS)
    network.requires_grad_(False)
    return Bench(study, tuning, how, draw, calls, score)


def _score(judge: Any, model: Any, texts: list[str], z: Tensor) -> Tensor:
    out: Tensor = judge.score(model.codec.decode(z.float()).clamp(0, 1), texts)
    return out


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

    how = EcoDiff(kinds=("heads", "channels"), samples=2, steps=3, accumulate=1)
    return Bench(study, study, how, draw, calls)
