"""A-SDM, redundancy removal: probe, drop, incubate, keep the dropped kernels, attend by regions.

Of the paper only the abstract was at hand (and its later version was withdrawn): the order of ideas
and the speed figures are its own, the parts are reconstructions, A-SDM-style.

    dropped = DropRedundant(keep=0.7).attach(pipe.unet)
    dropped.observe(batches)                             # probe, choose, remove
    student, log = incubate(teacher, dropped.removed, batches)    # or part by part, in a teacher
    GlobalRegional(window=8).attach(pipe.unet)           # attention of the largest resolution
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from effuse.compress.prune.choose import CostVector, Greedy, Macs, Milliseconds, Parameters
from effuse.compress.prune.criteria import Batch, Given, OutputError, batch_of, evaluating
from effuse.compress.prune.laptop_diff import LaptopDiff, Pruned
from effuse.compress.swap import Swapped
from effuse.compress.units import Removal, Unit, found, units
from effuse.core.contracts import Objective, Transform, Where, everywhere
from effuse.core.errors import check_whole
from effuse.core.method import method
from effuse.core.training import fit, warmup_cosine
from effuse.evaluate.cost import median, rounds_of
from effuse.nn.cond_conv import CondConv2d
from effuse.nn.regional_attention import Canvas, RegionalAttention

from .asdm_assembly import Copies, Experts, Removed
from .selves import self_attentions

__all__ = [
    "Copies",
    "CostVector",
    "DropRedundant",
    "Given",
    "GlobalRegional",
    "Greedy",
    "Macs",
    "Milliseconds",
    "OutputError",
    "Parameters",
    "Probed",
    "Regional",
    "Removed",
    "Thinned",
    "incubate",
    "latencies",
    "parts_of",
    "probe",
]

PAPER = (
    "A-SDM: Accelerating Stable Diffusion through Redundancy Removal and Performance Optimization"
)


# ---- the probe


@dataclass(frozen=True)
class Probed:
    """One removable unit: the error without it, s = E||eps(without) - eps||^2, and what it costs.

    cost: in the probe's unit, milliseconds or multiply-accumulates of a call. worth: s / cost, the
    least of which goes first.
    """

    unit: Unit
    error: float
    cost: float

    @property
    def worth(self) -> float:
        """Error over cost; infinite where removing it saves nothing."""
        return self.error / self.cost if self.cost > 0 else float("inf")


def probe(
    model: nn.Module,
    batches: Sequence[Batch],
    cost: Macs | Milliseconds | None = None,
    where: Where = everywhere,
) -> list[Probed]:
    """Return every removable unit with its sensitivity and cost, the most redundant first.

    Args:
        model: a diffusers network, or one with `effuse.nn.residual.Residual`.
        batches: calls, or batches with a `call`.
        cost: `Milliseconds()` if not given.
        where: units it forbids are not probed.
    """
    told = [batch_of(b) for b in batches]
    every = units(model, where)
    with evaluating(model):
        errors = OutputError().scores(model, every, told)
        _, costs = (cost or Milliseconds()).price(model, every, told)
    rows = [Probed(u, e, c) for u, e, c in zip(every, errors, costs, strict=True)]
    return sorted(rows, key=lambda p: p.worth)


# ---- dropping


@method(
    "asdm_redundancy",
    seed=28,
    paper=PAPER,
    year=2023,
    buys="fewer branches where they do least for their cost, windowed attention at large canvases",
    missing="Only the abstract was at hand, and a later version was withdrawn: probe, incubation, "
    "kernels of removed layers as experts, regional attention and semantic supervision are "
    "reconstructions, A-SDM-style. In a network the router of the kernels sees the picture, not "
    "the time embedding. Latencies of the paper (22 % of the network, 19 % of the pipeline on a "
    "GPU) were not reproduced.",
    example=lambda: DropRedundant(keep=0.8, cost=Macs()),
)
@dataclass(frozen=True)
class DropRedundant(LaptopDiff):
    """Drop the branches that do least for their cost; their kernels may stay on as experts.

    s_k = E||eps(without k) - eps||^2, m_k the measured cost;  least s_k / m_k goes first, until the
    share `keep` of the network's cost is left

    keep, cost, criterion, floors, where: as in `LaptopDiff`; by default cost is measured time, so
        what is dropped may differ from machine to machine: `Macs()` does not.
    experts: `Removed()` mixes kernels of a dropped residual block, where shapes are equal, into the
        nearest block that stays in its stage (CLME-CondConv), which begins as it was, bit for bit,
        and executes one convolution; None leaves plain convolutions.

    It needs healing: `Applied.objective` for all at once, `incubate` part by part.
    """

    solver: Any = field(default_factory=Greedy)
    cost: Any = field(default_factory=Milliseconds)
    experts: Experts | None = None
    kind = "prune"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.experts is not None and not isinstance(self.experts, Experts):
            raise TypeError(f"experts={self.experts!r}: expected an object, such as Removed()")

    def attach(self, model: nn.Module) -> Thinned:
        """See `LaptopDiff.attach`."""
        handle = super().attach(model)
        return Thinned(self, model, handle.units)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Thinned:
        """Remove on a fresh `model` what a plan names, and make room for its experts."""
        handle = Thinned(self, model, units(model))
        handle.rebuild(plan["removed"], plan["experts"])
        handle.found = {**handle.found, **plan.get("found", {})}
        return handle


class Thinned(Pruned):
    """A network without its redundant branches; see `DropRedundant`."""

    transform: DropRedundant

    def __init__(self, transform: DropRedundant, model: nn.Module, found: Sequence[Unit]):
        super().__init__(transform, model, found)
        self.experts: dict[str, int] = {}

    def remove(self, names: Sequence[str]) -> None:
        """Take these units away; kernels of dropped convolutions join the nearest that stay."""
        experts = self.transform.experts
        mixed = {} if experts is None else _heirs(self.model, names, experts)
        super().remove(names)
        assert self._removal is not None
        self.experts = _mix(self._removal, mixed, experts)

    def rebuild(self, names: Sequence[str], counts: Mapping[str, int]) -> None:
        """Take units away and put conditional convolutions of so many kernels."""
        super().remove(names)
        assert self._removal is not None
        mixed = {n: [_conv(self.model, n)] * count for n, count in counts.items()}
        self.experts = _mix(self._removal, mixed, self.transform.experts)

    def plan(self) -> dict[str, Any]:
        """Return what is gone and the kernels by convolution."""
        return {**super().plan(), "experts": dict(self.experts)}

    def report(self) -> dict[str, Any]:
        """Return what `Pruned.report` does, and how many convolutions are conditional."""
        return {**super().report(), "conditional_convolutions": len(self.experts)}


def _conv(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _heirs(model: nn.Module, names: Sequence[str], experts: Experts) -> dict[str, list[nn.Conv2d]]:
    """Return, for each convolution that stays and inherits, itself and what it inherits."""
    gone = set(names)
    stages: dict[str, list[str]] = {}
    for f in found(model):
        if f.kind == "conv":
            stages.setdefault(f.name.rpartition(".")[0], []).append(f.name)
    out: dict[str, list[nn.Conv2d]] = {}
    for row in stages.values():
        kept = [i for i, n in enumerate(row) if n not in gone]
        for child in ("conv1", "conv2"):
            left: dict[int, list[nn.Conv2d]] = {i: [] for i in kept}
            for i, n in enumerate(row):
                conv = getattr(_conv(model, n), child)
                if n in gone and kept and type(conv) is nn.Conv2d:
                    near = [(abs(k - i), k) for k in kept]
                    left[min(near)[1]].append(conv)
            for i, removed in left.items():
                own = getattr(_conv(model, row[i]), child)
                if removed and type(own) is nn.Conv2d:
                    convs = experts.convs(own, removed)
                    if len(convs) > 1:
                        out[f"{row[i]}.{child}"] = convs
    return out


def _mix(
    removal: Removal, mixed: Mapping[str, Sequence[nn.Conv2d]], experts: Experts | None
) -> dict[str, int]:
    router = "sigmoid" if experts is None else experts.router
    for name, convs in mixed.items():
        removal.put(name, CondConv2d.from_convs(convs, router=router))
    return {name: len(convs) for name, convs in mixed.items()}


# ---- incubation


Goal = Callable[[nn.Module, nn.Module, Sequence[str]], Objective]
"""Makes what a student learns: called with teacher, student and the stages to compare."""


def stage_and_output(teacher: nn.Module, student: nn.Module, stages: Sequence[str]) -> Objective:
    """Return L_k = sum over stages ||out_S - out_T||^2 + ||eps_S - eps_T||^2, no task."""
    from effuse.distill.features import NormalizedFeatureDistillation, Plain

    return NormalizedFeatureDistillation(
        teacher, student, list(stages), normalizer=Plain(), weights=(0.0, 1.0, 1.0)
    )


def everything(teacher: nn.Module, student: nn.Module, stages: Sequence[str]) -> Objective:
    """Return task, output and all stage features, each of comparable size."""
    from effuse.distill.features import NormalizedFeatureDistillation

    return NormalizedFeatureDistillation(teacher, student)


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Group units by stage, in the order in which the stages first come up.

    A stage is a block of a UNet, "down_blocks.1" or "mid_block", or a block of a transformer.
    """
    out: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        out.setdefault(".".join(parts[: 1 if parts[0] == "mid_block" else 2]), []).append(name)
    return out


def incubate(
    teacher: nn.Module,
    names: Sequence[str],
    batches: Any,
    *,
    steps: int = 100,
    joint: int = 200,
    lr: float = 2e-4,
    experts: Experts | None = None,
    hybrid: bool = True,
    part_goal: Goal = stage_and_output,
    joint_goal: Goal = everything,
    rng: torch.Generator | None = None,
    progress: bool = True,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Drop units stage by stage, each stage learning alone within its teacher; then all together.

    L_k = ||out_k(B'_k) - out_k(B_k)||^2 + ||eps_hybrid - eps_T||^2  moves stage k alone

    Args:
        teacher: stays as it is.
        names: units to drop, as `Thinned.removed`; stages are taken in the order in which they
            first come up here.
        batches: what `fit` takes: batches with `call`, and perhaps `target` for the joint task.
        steps: of each stage.
        joint: steps of the whole at the end; errors that each stage could not see add up.
        lr: of AdamW, with warm-up and cosine decay in each phase.
        experts: see `DropRedundant`.
        hybrid: each stage learns within the stages that are finished; else within the teacher.
        part_goal: what a stage learns.
        joint_goal: what the whole learns.
        rng: draws batches.
        progress: show a bar for each phase.

    Returns:
        The student, and a row for each phase: stage, steps, first and last loss.

    Raises:
        ValueError: a name that is no unit.
    """
    check_whole("steps", steps, 0)
    check_whole("joint", joint, 0)
    rng = rng if rng is not None else torch.Generator().manual_seed(0)
    student = copy.deepcopy(teacher)
    thin = DropRedundant(keep=1.0, cost=Macs(), experts=experts)
    log: list[dict[str, Any]] = []

    def learn(goal: Objective, stage: str, count: int) -> None:
        mine = goal.parameters_of("student")
        if not count or not mine:
            return
        done = fit(
            goal,
            batches,
            torch.optim.AdamW(mine, lr=lr, weight_decay=0.0),
            steps=count,
            rng=rng,
            schedule=warmup_cosine(),
            log_every=max(count // 20, 1),
            progress=progress,
        )
        goal.eval()
        first, last = done.history[0]["loss"], done.history[-1]["loss"]
        log.append({"stage": stage, "steps": count, "first": first, "last": last})

    for stage, gone in parts_of(names).items():
        nest = student if hybrid else copy.deepcopy(teacher)
        handle = thin.attach(nest)
        handle.remove(gone)
        handle.finalize()
        nest.requires_grad_(False)
        nest.get_submodule(stage).requires_grad_(True)
        learn(part_goal(teacher, nest, [stage]), stage, steps)
        if not hybrid:
            owner, _, child = stage.rpartition(".")
            setattr(student.get_submodule(owner), child, nest.get_submodule(stage))
    student.requires_grad_(True)
    learn(joint_goal(teacher, student, list(parts_of(names))), "all", joint)
    return student.eval().requires_grad_(True), log


# ---- attention


@method("asdm_redundancy", example=lambda: GlobalRegional(window=2, pool=2))
@dataclass(frozen=True)
class GlobalRegional(Transform):
    """Let tokens attend to their window and to pooled tokens of the whole canvas (GRI attention).

    Multiply-accumulates N (w^2 + N / p^2) instead of N^2, at the largest resolution that has
    self-attention, where N is largest. Projections are the layer's own; no weights are new, and
    with a window of the whole canvas and no pooled tokens it is the original.

    window: side of a window in tokens; 0 leaves the own tokens out.
    pool: side of the patches that are averaged; None is the window's, 0 leaves them out.
    interactive: pooled values are what pooled queries gather from the windows, not means.
    every: swap the self-attention of all resolutions.
    where: layers it forbids stay as they are.
    """

    window: int = 8
    pool: int | None = None
    interactive: bool = False
    every: bool = False
    where: Where = everywhere
    kind = "rewire"

    def __post_init__(self) -> None:
        """Check the sides."""
        check_whole("window", self.window, 0)
        if self.pool is not None:
            check_whole("pool", self.pool, 0)
        if not self.window and not self.pool:
            raise ValueError("window=0 and no pool: expected tokens to attend to")
        if self.interactive and not (self.window and self.pool != 0):
            raise ValueError("interactive=True: expected a window and pooled tokens")

    def attach(self, model: nn.Module) -> Regional:
        """Swap the layers of `model`.

        Raises:
            TypeError: it has no plain self-attention.
            ValueError: `where` allows none.
        """
        names = self_attentions(model)
        if not self.every:
            least = min(_level(model, n) for n in names)
            names = [n for n in names if _level(model, n) == least]
        chosen = [n for n in names if self.where(n, model.get_submodule(n))]
        if not chosen:
            raise ValueError(
                f"`where` allows none of the {len(names)} self-attention layers of the largest "
                f"resolution of {type(model).__name__}, such as {names[0]!r}"
            )
        return self.restore(model, {"layers": chosen})

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Regional:
        """Swap the layers that `plan` names."""
        canvas = Canvas()
        pool = self.window if self.pool is None else self.pool
        layers = {
            name: RegionalAttention(
                model.get_submodule(name),
                self.window,
                pool,
                interactive=self.interactive,
                canvas=canvas,
            )
            for name in plan["layers"]
        }
        return Regional(self, model, layers, canvas)


def _level(model: Any, name: str) -> int:
    """Return how often the canvas has been halved where a layer runs."""
    parts = name.split(".")
    depth = len(getattr(model, "down_blocks", ()))
    if parts[0] == "down_blocks":
        return int(parts[1])
    if parts[0] == "up_blocks":
        return depth - 1 - int(parts[1])
    return depth


class Regional(Swapped):
    """A network with global-regional attention; see `GlobalRegional`."""

    transform: GlobalRegional

    def __init__(
        self,
        transform: GlobalRegional,
        model: nn.Module,
        layers: Mapping[str, RegionalAttention],
        canvas: Canvas,
    ):
        super().__init__(transform, model, layers)
        # a bound method, so that a deep copy of the network listens with its own canvas
        self._hook = model.register_forward_pre_hook(canvas.look, with_kwargs=True)

    def plan(self) -> dict[str, Any]:
        """Return the names of the layers."""
        return {"layers": list(self.layers)}

    def detach(self) -> None:
        """Put the original layers back."""
        super().detach()
        self._hook.remove()


# ---- latency


def latencies(
    call_of: Mapping[str, Callable[[], Any]],
    picture_of: Mapping[str, Callable[[], Any]] | None = None,
    *,
    rounds: int = 9,
) -> dict[str, dict[str, float]]:
    """Return median milliseconds of processor time by name: of the network, of the whole pipeline.

    All are timed in turn in one process, so that what slows the machine slows all.

    Args:
        call_of: by name, runs the network once.
        picture_of: by name, draws one picture; None times networks alone.
        rounds: how often each is timed, after one unmeasured turn.
    """
    out: dict[str, dict[str, float]] = {name: {} for name in call_of}
    for what, draws in (("network_ms", call_of), ("pipeline_ms", picture_of or {})):
        if draws:
            for name, seconds in rounds_of(draws, rounds).items():
                out[name][what] = 1e3 * median(seconds[1])[0]
    return out
