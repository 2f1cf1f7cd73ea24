"""Redundancy removal, A-SDM-style, part by part: what each part adds at equal steps of training.

Errors are of the network's answer, ||student - teacher||^2 / ||teacher||^2, on calls that nobody
learned from. Every arm drops the same units and takes as many steps of training in all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import uniform_calls
from effuse.compress.rewire.asdm_redundancy import (
    DropRedundant,
    GlobalRegional,
    Macs,
    Removed,
    everything,
    incubate,
    latencies,
    parts_of,
)
from effuse.compress.units import macs
from effuse.core.contracts import Objective
from effuse.core.training import fit, warmup_cosine
from effuse.distill.semantic import SemanticSupervision
from effuse.nn.regional_attention import RegionalAttention
from effuse.ops.stats import paired, psnr

from . import Claim, Evidence, Scale, proof
from ._drawn import both_halves, drawn
from ._study import answers, error, small_pixels

Row = dict[str, Any]
LR = 5e-4


@dataclass
class Study:
    """A pipeline with calls to probe with, to learn from and to judge on."""

    pipe: Any
    network: nn.Module
    bare: Any
    probing: list[dict[str, Any]]
    learning: list[dict[str, Any]]
    judged: list[dict[str, Any]]
    texts: Sequence[str]
    note: str
    trained: bool


@proof("asdm_redundancy")
def prove(scale: Scale) -> Evidence:
    """Check incubation, experts and supervision at equal steps, and attention by regions."""
    study = _random() if scale.size == "smoke" else _house(scale)
    return Evidence.of(
        _layers(scale), _arms(study, scale), _regions(study, scale), notes=study.note
    )


# ---- attention by regions: one layer


def _layers(scale: Scale) -> Iterator[Claim | Row]:
    """Time one layer of 4 heads of 32, windows of 8, in turn with fused softmax attention."""
    from diffusers.models.attention_processor import Attention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        old: Any = Attention(128, heads=4, dim_head=32).eval()
    new = RegionalAttention(old, 8, 8).eval()
    for side in scale.pick((16, 32), (32, 64), (32, 64, 128)):
        x = torch.randn(1, side * side, 128, generator=torch.Generator().manual_seed(side))
        with torch.inference_mode():
            spent = latencies(
                {"SDPA": partial(old, x), "regional": partial(new, x)},
                rounds=scale.pick(3, 5, 9 if side < 128 else 3),
            )
        ms = {name: found["network_ms"] for name, found in spent.items()}
        yield {"part": "layer", "tokens": side * side, **ms, "speedup": ms["SDPA"] / ms["regional"]}
        least = {1024: 1.5, 4096: 1.0}.get(side * side)
        if least is not None:
            yield Claim(
                f"one layer of {side * side} tokens is at least {least:g} times as fast as SDPA",
                least,
                ms["SDPA"] / ms["regional"],
                "times as fast, processor time",
                "higher",
                ms["SDPA"] / ms["regional"] >= least,
                "slower than SDPA at 4096 tokens",
            )


# ---- what each part adds


def _arms(study: Study, scale: Scale) -> Iterator[Claim | Row]:
    probed = DropRedundant(keep=0.7, cost=Macs()).attach(copy.deepcopy(study.network))
    probed.observe(study.probing)
    # the probe's order: stages whose units do least for their cost come first
    worth = {
        u.name: s / max(c, 1.0)
        for u, s, c in zip(probed.units, probed.scores, probed.costs, strict=True)
    }
    names = sorted(probed.removed, key=lambda n: worth[n])
    whole = answers(study.network, study.judged)
    call = study.judged[0]["call"]
    total = scale.pick(6, 20, 60)
    stages = len(parts_of(names))
    each = max(1, total // 2 // stages)
    joint = total - each * stages

    def semantic(teacher: nn.Module, student: nn.Module, which: Sequence[str]) -> Objective:
        base: Any = everything(teacher, student, which)
        return SemanticSupervision(base, study.bare)

    arms: dict[str, dict[str, Any]] = {
        "all at once": {"steps": 0, "joint": total},
        "incubation": {"steps": each, "joint": joint},
        "incubation in the teacher": {"steps": each, "joint": joint, "hybrid": False},
        "incubation, experts": {"steps": each, "joint": joint, "experts": Removed()},
        "incubation, experts, meaning": {
            "steps": each,
            "joint": joint,
            "experts": Removed(),
            "joint_goal": semantic,
        },
        "all at once, meaning": {"steps": 0, "joint": total, "joint_goal": semantic},
    }
    without = _dropped(study.network, names)
    yield {
        "part": "dropped",
        "variant": "not healed",
        "units": names,
        "output_error": error(without, study.judged, whole),
        "macs": macs(without, call),
        "macs_before": macs(study.network, call),
    }
    errors: dict[str, list[float]] = {}
    students: dict[str, nn.Module] = {}
    for name, how in arms.items():
        seeds = scale.seeds if name in MAIN else scale.seeds[:1]
        for seed in seeds:
            student, log = incubate(
                study.network,
                names,
                _shuffled(study.learning),
                lr=LR,
                rng=torch.Generator().manual_seed(seed),
                progress=False,
                **how,
            )
            errors.setdefault(name, []).append(error(student, study.judged, whole))
            students.setdefault(name, student)
            yield {
                "part": "healed",
                "variant": name,
                "seed": seed,
                "steps": sum(row["steps"] for row in log),
                "output_error": errors[name][-1],
                "macs": macs(student, call),
            }
    study.network.requires_grad_(True)
    args, kwargs = call
    with torch.inference_mode():
        spent = latencies(
            {
                n: partial(m, *args, **kwargs)
                for n, m in {"original": study.network, **students}.items()
            },
            rounds=scale.pick(3, 5, 9),
        )
    for name, found in spent.items():
        yield {"part": "latency", "variant": name, **found}
    for statement, ours, theirs in (
        ("incubation is no worse than healing all at once", "incubation", "all at once"),
        ("kernels of dropped layers help", "incubation, experts", "incubation"),
        (
            "semantic supervision helps",
            "incubation, experts, meaning",
            "incubation, experts",
        ),
    ):
        count = min(len(errors[ours]), len(errors[theirs]))
        a, b = (torch.tensor(errors[n][:count], dtype=torch.float64) for n in (ours, theirs))
        interval = paired(a, b)[1] if count > 1 else None
        yield Claim(
            f"after {total} steps in all, {statement}",
            float(b.mean()),
            float(a.mean()),
            "squared error of the answer, relative",
            "lower",
            bool(a.mean() <= b.mean()),
            "the other is lower",
            interval,
        )
    extra = macs(students["incubation, experts"], call) / macs(students["incubation"], call)
    yield Claim(
        "experts leave the executed multiply-accumulates within 3 %",
        1.03,
        extra,
        "multiply-accumulates over those without",
        "lower",
        extra <= 1.03,
    )
    if study.trained:
        best = min(errors, key=lambda n: sum(errors[n]) / len(errors[n]))
        yield from _pictures(study, best, students[best], without, scale)


MAIN = ("all at once", "incubation", "incubation, experts")


def _dropped(network: nn.Module, names: Sequence[str]) -> nn.Module:
    student = copy.deepcopy(network)
    handle = DropRedundant(keep=1.0, cost=Macs()).attach(student)
    handle.remove(names)
    handle.finalize()
    return student


def _pictures(
    study: Study, name: str, student: nn.Module, without: nn.Module, scale: Scale
) -> Iterator[Claim | Row]:
    """Compare with the original in fewer steps, which cost the same."""
    import effuse
    from effuse import house

    call, steps, texts = study.judged[0]["call"], scale.pick(2, 6, 10), list(study.texts)
    share = macs(student, call) / macs(study.network, call)
    less = max(1, round(share * steps))
    judge = house.clip()
    pictures: dict[str, Tensor] = {}
    near: dict[str, Tensor] = {}
    for label, network, count in (
        ("original", study.network, steps),
        ("dropped, not healed", without, steps),
        (f"dropped, {name}", student, steps),
        (f"original, {less} steps", study.network, less),
    ):
        model = replace(effuse.wrap(study.pipe), network=network)
        rng = torch.Generator().manual_seed(700)
        x = model.sample(texts, steps=count, guidance=4.0, rng=rng).clamp(0, 1).float()
        pictures[label] = x
        near[label] = psnr(x, pictures["original"])
        yield {
            "part": "pictures",
            "variant": label,
            "steps": count,
            "text_score": float(judge.score(x, texts).mean()),
            "psnr": float(near[label].mean()),
        }
    ours, theirs = near[f"dropped, {name}"], near[f"original, {less} steps"]
    yield Claim(
        f"healed for {scale.pick(6, 20, 60)} steps ({name}), its pictures are closer to the "
        f"original's than {less} of {steps} steps of the original, which cost the same",
        float(theirs.mean()),
        float(ours.mean()),
        "dB of PSNR",
        "higher",
        bool(ours.mean() > theirs.mean()),
        "fewer steps are closer",
        paired(ours, theirs)[1],
    )


# ---- attention by regions: in the network


def _regions(study: Study, scale: Scale) -> Iterator[Claim | Row]:
    """Swap the top self-attention, learn its weights for a while, look at the task's error."""
    network = copy.deepcopy(study.network)
    whole, before = answers(network, study.judged), _task(network, study.judged)
    rises = {}
    for name, made in {
        "means": GlobalRegional(window=4),
        "means, finer": GlobalRegional(window=4, pool=2),
        "interactive": GlobalRegional(window=4, interactive=True),
        "windows alone": GlobalRegional(window=4, pool=0),
    }.items():
        student = copy.deepcopy(network)
        handle = made.attach(student)
        at_once = error(student, study.judged, whole)
        goal: Any = everything(study.network, student, ())
        student.requires_grad_(False)
        for layer in handle.layers.values():
            layer.requires_grad_(True)
        steps = scale.pick(3, 8, 30)
        fit(
            goal,
            _shuffled(study.learning),
            torch.optim.AdamW(goal.parameters_of("student"), lr=LR, weight_decay=0.0),
            steps=steps,
            rng=torch.Generator().manual_seed(0),
            schedule=warmup_cosine(),
            progress=False,
        )
        goal.eval()
        rises[name] = _task(student, study.judged) / before - 1
        yield {
            "part": "regions",
            "variant": name,
            "layers": len(handle.layers),
            "steps": steps,
            "output_error_at_once": at_once,
            "output_error": error(student, study.judged, whole),
            "task_error_rise": rises[name],
        }
    yield Claim(
        "attention by regions at the largest resolution raises the task's error by less than 10 %",
        0.1,
        rises["means"],
        "rise of the mean squared error of the answer over the original's",
        "lower",
        rises["means"] < 0.1,
        "10 % or more",
    )


# ---- helpers


def _shuffled(batches: Sequence[dict[str, Any]]) -> Any:
    return lambda rng: batches[int(torch.randint(len(batches), (), generator=rng))]


def _task(network: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    given = answers(network, batches)
    off = [(a - b["target"]).square().mean() for a, b in zip(given, batches, strict=True)]
    return float(torch.stack(off).mean())


def _house(scale: Scale) -> Study:
    import effuse
    from effuse import house
    from effuse.house.examples import prompts

    pipe: Any = house.load("emoji")
    model = effuse.wrap(pipe)
    count = scale.pick(4, 20, 56)
    asked, clean = drawn(pipe, count, 60)
    told, held = both_halves(asked), count // 5

    def calls(first: int, last: int, many: int, batch: int, seed: int) -> list[dict[str, Any]]:
        return uniform_calls(
            pipe, told[first:last], clean=clean[first:last], count=many, batch=batch, seed=seed
        )

    return Study(
        pipe,
        model.network.eval().requires_grad_(True),
        model.bare,
        calls(held, count, 1, 6, 61),
        calls(held, count, scale.pick(2, 16, 60), 4, 62),
        calls(0, held, scale.pick(1, 2, 3), held, 63),
        [p.text for p in prompts()][: scale.pick(2, 6, 24)],
        note=f"house:emoji, without data: {count - held} pictures drawn by the pipeline itself "
        f"(8 steps, guidance 4, names of emoji) to probe and to learn from and {held} others to "
        "judge by, t uniform, a quarter with the empty prompt. 30 % of the multiply-accumulates "
        f"dropped. AdamW, batches of 4, learning rate {LR:g} for all. A-SDM-style: only the "
        "abstract was at hand. Times are processor time of one thread.",
        trained=True,
    )


def _random() -> Study:
    """Study random weights: shows that everything runs, and nothing else."""
    import effuse

    pipe = small_pixels(layers_per_block=2)
    clean = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = [uniform_calls(pipe, 8, clean=clean, count=2, batch=4, seed=s) for s in range(3)]
    return Study(
        pipe,
        pipe.unet,
        effuse.wrap(pipe).bare,
        calls[0],
        calls[1],
        calls[2],
        texts=[],
        note="a pixel network with random weights: shows that everything runs, and nothing else",
        trained=False,
    )
