"""One-shot layer pruning: do errors add up, does it choose well, does normalized healing help.

All errors are mean squared changes of the network's answer on calls that no criterion has seen.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import uniform_calls
from effuse.compress.prune.criteria import answers, joint_error, mean_task_loss
from effuse.compress.prune.laptop_diff import (
    BlockInfluence,
    Criterion,
    Exhaustive,
    Given,
    Greedy,
    LaptopDiff,
    Magnitude,
    OutputError,
    Random,
    Taylor,
    TextScoreDrop,
)
from effuse.compress.prune.study import additivity
from effuse.compress.units import Unit, macs, parameters, units, without
from effuse.core.training import fit, warmup_cosine
from effuse.distill.features import (
    Matched,
    NormalizedFeatureDistillation,
    Normalizer,
    PerBatch,
    Plain,
)
from effuse.ops.transport import sliced_wasserstein2

from . import Claim, Evidence, Scale, proof
from ._study import small_pixels


@dataclass
class Study:
    """A pipeline with calls to calibrate on, calls to judge on, calls to learn from."""

    pipe: Any
    network: nn.Module
    asked: Any
    calibration: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    learning: list[dict[str, Any]]
    steps: int
    seeds: int
    note: str
    text_score: Callable[[nn.Module], float] | None = None

    def samples(self, network: nn.Module, steps: int) -> Tensor:
        """Return samples (N, C, h, w) of a network in the pipeline, from the same noise always."""
        import effuse

        model = replace(effuse.wrap(self.pipe), network=network)
        parts = [
            model.sample(
                self.asked, steps=steps, decode=False, rng=torch.Generator().manual_seed(seed)
            )
            for seed in range(self.seeds)
        ]
        return torch.cat(parts)


@proof("laptop_diff")
def prove(scale: Scale) -> Evidence:
    """Check additivity, selection, the gap to the optimum, healing, and fewer steps."""
    study = _tiny() if scale.size == "smoke" else _house(scale)
    scores: Scores = {}
    return Evidence.of(
        _additivity(study, scale, scores),
        _selection(study, scale, scores),
        _optimum(study, scale),
        _healing(study, scale, scores),
        notes=study.note,
    )


Found = Iterator[Claim | dict[str, Any]]
Scores = dict[str, dict[str, float]]
"""Of each criterion by name: the score of each unit by name."""


# ---- (a) additivity


def _additivity(study: Study, scale: Scale, scores: Scores) -> Found:
    model, batches = study.network, study.calibration
    found = units(model)
    names = [u.name for u in found]
    scores["laptop"] = dict(zip(names, OutputError().scores(model, found, batches), strict=True))
    base = mean_task_loss(model, batches)
    signed = {}
    for n in names:
        with without(model, [n]):
            signed[n] = mean_task_loss(model, batches) - base
    scores["task loss"] = {n: max(0.0, v) for n, v in signed.items()}
    draw = random.Random(0)
    count = scale.pick(12, 20, 60)
    sets = [draw.sample(names, draw.randint(2, 6)) for _ in range(count)]
    out = additivity(model, scores["laptop"], batches, sets)
    task = additivity(model, signed, batches, sets, task=True)
    for what, a in (("output error", out), ("task loss", task)):
        yield {
            "part": "additivity",
            "variant": what,
            "sets": count,
            "pearson": a.pearson,
            "spearman": a.spearman,
            "slope": a.slope,
        }
    yield Claim(
        "joint output errors are the sums of single ones: correlation above 0.9",
        0.9,
        out.pearson,
        "Pearson correlation",
        "higher",
        out.pearson > 0.9,
        "below 0.7",
    )
    yield Claim(
        "output errors add up better than rises of the task loss",
        task.pearson,
        out.pearson,
        "Pearson correlation",
        "higher",
        out.pearson > task.pearson,
    )


# ---- (b) selection


def _selection(study: Study, scale: Scale, scores: Scores) -> Found:
    model, found = study.network, units(study.network)
    names, whole = [u.name for u in found], answers(study.network, study.held_out)
    others: dict[str, Criterion] = {
        "magnitude": Magnitude(),
        "Taylor": Taylor(),
        "block influence": BlockInfluence(),
    }
    if study.text_score is not None:
        others["text score"] = TextScoreDrop(study.text_score)
    for what, criterion in others.items():
        scores[what] = dict(
            zip(names, criterion.scores(model, found, study.calibration), strict=True)
        )
    for seed in range(scale.pick(2, 3, 5)):
        scores[f"random {seed}"] = dict(
            zip(names, Random(seed).scores(model, found, []), strict=True)
        )
    full = study.samples(model, study.steps)
    call = study.held_out[0]["call"]
    whole_macs = macs(model, call)
    for keep in (0.75, 0.5):
        errors: dict[str, float] = {}
        chosen: dict[str, list[str]] = {"hand-crafted": _second_of_each_pair(found, model, keep)}
        for what, values in scores.items():
            # no more is removed than must be, also of what a criterion takes for harmful
            least = 1e-9 * max(values.values())
            even = Given({n: v + least for n, v in values.items()})
            chosen[what] = _choose(study, LaptopDiff(keep=keep, criterion=even))
        greedy = LaptopDiff(keep=keep, criterion=Given(scores["laptop"]), solver=Greedy())
        chosen["laptop, greedy"] = _choose(study, greedy)
        for what, gone in chosen.items():
            errors[what] = joint_error(model, gone, study.held_out, whole)
            row = {"part": "selection", "keep": keep, "variant": what, "removed": len(gone)}
            with without(model, gone):
                row |= {"parameters": parameters(model), "macs": macs(model, call)}
                row |= {"output_error": errors[what]}
                if not what.startswith("random") or what == "random 0":
                    row |= _distance(study.samples(model, study.steps), full)
            yield row
        chance = [v for k, v in errors.items() if k.startswith("random")]
        rivals = {k: v for k, v in errors.items() if not k.startswith(("laptop", "random"))}
        rivals["random, mean"] = sum(chance) / len(chance)
        best = min(rivals, key=lambda k: rivals[k])
        yield Claim(
            f"at {keep:.0%} kept it changes the answer less than the best of "
            f"{', '.join(rivals)} (here {best})",
            rivals[best],
            errors["laptop"],
            "mean squared change of the answer",
            "lower",
            errors["laptop"] < rivals[best],
            "another criterion is lower",
        )
        if keep == 0.75:
            with without(model, chosen["laptop"]):
                spent = macs(model, call) * study.steps
                ours = _distance(study.samples(model, study.steps), full)
            less = max(1, round(spent / whole_macs))
            theirs = _distance(study.samples(model, less), full)
            yield {"part": "fewer steps", "variant": f"original, {less} steps", **theirs}
            yield {"part": "fewer steps", "variant": f"pruned, {study.steps} steps", **ours}
            yield Claim(
                f"unhealed at {keep:.0%} it stays closer to the original's samples than "
                f"{less} steps of the original, which cost the same",
                theirs["sample_error"],
                ours["sample_error"],
                "mean squared difference of samples from the same noise",
                "lower",
                ours["sample_error"] < theirs["sample_error"],
                "fewer steps are closer",
            )


def _choose(study: Study, transform: LaptopDiff) -> list[str]:
    handle = transform.attach(study.network)
    handle.observe(study.calibration[:1])
    gone = list(handle.removed)
    handle.detach()
    return gone


def _second_of_each_pair(found: Sequence[Unit], model: nn.Module, keep: float) -> list[str]:
    """Remove the second of each two units of a kind in order, then firsts, from the end."""
    seen: dict[str, int] = {}
    seconds: list[Unit] = []
    firsts: list[Unit] = []
    for u in found:
        seen[u.kind] = seen.get(u.kind, 0) + 1
        (firsts if seen[u.kind] % 2 else seconds).append(u)
    left, out = parameters(model), []
    for u in [*reversed(seconds), *reversed(firsts)]:
        if left <= keep * parameters(model):
            break
        out.append(u.name)
        left -= u.params
    return out


def _distance(x: Tensor, full: Tensor) -> dict[str, float]:
    """Return the paired mean square and the sliced Wasserstein-2 distance, squared."""
    a, b = x.double(), full.double()
    sliced = sliced_wasserstein2(a, b) ** 2
    return {"sample_error": float((a - b).square().mean()), "sliced_w2": sliced}


# ---- the gap to the optimum


def _optimum(study: Study, scale: Scale) -> Found:
    model = study.network
    every = units(model)
    count = min(len(every), scale.pick(6, 7, 9))
    names = {every[i * len(every) // count].name for i in range(count)}
    some = [u for u in every if u.name in names]
    total = parameters(model)
    batch = study.calibration[:1]
    for share in (0.25, 0.5):
        keep = 1 - share * sum(u.params for u in some) / total
        errors = {}
        for solver in (Exhaustive(), LaptopDiff().solver):
            made = LaptopDiff(keep=keep, solver=solver, where=lambda n, m: n in names).attach(model)
            made.observe(batch)
            errors[type(solver).__name__] = made.report()["measured_error"]
            made.detach()
        ratio = errors["Exact"] / max(errors["Exhaustive"], 1e-30)
        yield {"part": "optimum", "units": len(some), "share": share, **errors, "ratio": ratio}
        yield Claim(
            f"of {len(some)} units, {share:.0%} of their parameters removed, the sum of single "
            "errors chooses within 1.3 of the measured optimum",
            1.3,
            ratio,
            "error over the least possible",
            "lower",
            ratio <= 1.3,
            "above 1.3",
        )


# ---- (c) healing


def _healing(study: Study, scale: Scale, scores: Scores) -> Found:
    teacher = copy.deepcopy(study.network)
    whole = answers(teacher, study.held_out)
    rules: dict[str, Normalizer] = {
        "plain": Plain(),
        "normalized": PerBatch(),
        "normalized to the output term": Matched(),
    }
    after: dict[str, list[float]] = {what: [] for what in rules}
    shares: dict[str, float] = {}
    best: tuple[float, nn.Module] | None = None
    for seed in range(scale.pick(2, 2, 3)):
        for what, rule in rules.items():
            student = copy.deepcopy(teacher).requires_grad_(True)
            handle = LaptopDiff(keep=0.5, criterion=Given(scores["laptop"])).attach(student)
            handle.observe(study.calibration[:1])
            before = handle.report()["measured_error"]
            objective = NormalizedFeatureDistillation(teacher, student, normalizer=rule)
            shares.setdefault(what, _largest_share(objective, study.learning[0]))
            _heal(objective, study.learning, scale.pick(6, 20, 40), seed)
            error = joint_error(student, [], study.held_out, whole)
            after[what].append(error)
            yield {
                "part": "healing",
                "variant": what,
                "seed": seed,
                "error_before": before,
                "error_after": error,
                "largest_gradient_share": shares[what],
            }
            if best is None or error < best[0]:
                best = (error, student)
    yield Claim(
        "normalized feature terms share the gradient more evenly than plain ones",
        shares["plain"],
        shares["normalized"],
        "largest share of one feature term in the sum of gradient norms",
        "lower",
        shares["normalized"] < shares["plain"],
    )
    for what in ("normalized", "normalized to the output term"):
        gaps = torch.tensor(after["plain"]).double() - torch.tensor(after[what]).double()
        mean, spread = float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)
        yield Claim(
            f"after healing as long, the loss with features {what} leaves a lower error than with "
            "plain ones",
            float(torch.tensor(after["plain"]).mean()),
            float(torch.tensor(after[what]).mean()),
            "mean squared change of the answer",
            "lower",
            mean > 0,
            "plain wins by more than 2 standard errors",
            (mean - 2 * spread, mean + 2 * spread),
        )
    assert best is not None
    full = study.samples(teacher, study.steps)
    call = study.held_out[0]["call"]
    less = max(1, round(macs(best[1], call) * study.steps / macs(teacher, call)))
    ours, theirs = (
        _distance(study.samples(n, s), full) for n, s in ((best[1], study.steps), (teacher, less))
    )
    yield {"part": "fewer steps", "variant": f"original, {less} steps", **theirs}
    yield {"part": "fewer steps", "variant": f"50% kept, healed, {study.steps} steps", **ours}
    yield Claim(
        f"healed at 50% it stays closer to the original's samples than {less} steps of the "
        "original, which cost the same",
        theirs["sample_error"],
        ours["sample_error"],
        "mean squared difference of samples from the same noise",
        "lower",
        ours["sample_error"] < theirs["sample_error"],
        "fewer steps are closer",
    )


def _heal(
    objective: NormalizedFeatureDistillation,
    batches: Sequence[dict[str, Any]],
    steps: int,
    seed: int,
) -> None:
    def draw(rng: torch.Generator) -> dict[str, Any]:
        return batches[int(torch.randint(len(batches), (), generator=rng))]

    # eval mode: the student is judged without dropout too
    fit(
        objective,
        draw,
        torch.optim.AdamW(objective.parameters_of("student"), lr=3e-4, weight_decay=0.0),
        steps=steps,
        rng=torch.Generator().manual_seed(seed),
        schedule=warmup_cosine(),
        progress=False,
    )
    objective.student.eval()


def _largest_share(objective: NormalizedFeatureDistillation, batch: dict[str, Any]) -> float:
    """Return the largest share of a single feature term in the sum of all terms' gradient norms."""
    loss = objective.loss("student", batch)
    mine = objective.parameters_of("student")
    norms = []
    for name, term in loss.terms.items():
        if name.startswith("feature/"):
            grads = torch.autograd.grad(term, mine, retain_graph=True, allow_unused=True)
            norms.append(sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5)
    return max(norms) / sum(norms)


# ---- what it is shown on


def _house(scale: Scale) -> Study:
    from effuse import house
    from effuse.house.examples import prompts

    pipe: Any = house.load("emoji")
    network = pipe.unet.eval()
    asked = [p.text for p in prompts()][: scale.pick(2, 3, 12)]
    rows = scale.pick(2, 3, 8)

    def batches(count: int, seed: int) -> list[dict[str, Any]]:
        return uniform_calls(pipe, asked, clean=clean, count=count, batch=rows, seed=seed)

    import effuse

    rng = torch.Generator().manual_seed(100)
    clean = effuse.wrap(pipe).sample(asked, steps=scale.pick(2, 8, 20), decode=False, rng=rng)
    some, judge = asked[: scale.pick(2, 2, 6)], house.clip()

    def text_score(network: nn.Module) -> float:
        model = replace(effuse.wrap(pipe), network=network)
        rng = torch.Generator().manual_seed(7)
        images = model.sample(some, steps=scale.pick(2, 3, 6), rng=rng)
        return float(judge.score(images.clamp(0, 1), some).mean())

    return Study(
        pipe,
        network,
        asked,
        batches(scale.pick(1, 1, 2), 0),
        batches(scale.pick(1, 1, 2), 1),
        batches(scale.pick(4, 6, 40), 2),
        steps=scale.pick(2, 5, 10),
        seeds=1,
        note="house:emoji, without data: clean latents are the pipeline's own samples, t uniform, "
        "no guidance in calibration; samples with the pipeline's own guidance, DDIM.",
        text_score=text_score,
    )


def _tiny() -> Study:
    """Train a pixel network on little rectangles for a few seconds."""
    pipe = small_pixels()
    network = pipe.unet.train()
    rng = torch.Generator().manual_seed(0)
    ends = torch.randint(1, 8, (64, 2), generator=rng)
    clean = torch.full((64, 3, 8, 8), -1.0)
    for picture, (h, w), channel in zip(clean, ends.tolist(), [0, 1, 2] * 22, strict=False):
        picture[channel, :h, :w] = 1.0

    def batches(count: int, seed: int, rows: int = 16) -> list[dict[str, Any]]:
        return uniform_calls(pipe, 64, clean=clean, count=count, batch=rows, seed=seed)

    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for batch in batches(60, 9, 32):
        args, kwargs = batch["call"]
        out: Any = network(*args, **{**kwargs, "return_dict": False})
        loss = (out[0] - batch["target"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    return Study(
        pipe,
        network,
        8,
        batches(1, 0),
        batches(1, 1),
        batches(4, 2),
        steps=4,
        seeds=1,
        note="a pixel network of 180 thousand weights, trained for a few seconds on rectangles",
    )
