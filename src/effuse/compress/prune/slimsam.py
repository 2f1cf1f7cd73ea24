"""Alternate slimming: prune the stream's width, heal on what stayed, prune the rest, heal again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effuse.compress.swap import Changes
from effuse.compress.units import Removal, parameters
from effuse.core.contracts import Applied, Call, Loss, Objective, Transform, Where, everywhere
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method
from effuse.core.training import Batches, fit

from .criteria import Batch, answers, batch_of, evaluating
from .importance import (
    DisturbedTaylor,
    Gaussian,
    Importance,
    Magnitude,
    Mean,
    Normalizer,
    Random,
    Taylor,
    choose,
)
from .vit_groups import Width, narrow, split, widths

__all__ = [
    "AlignedDistillation",
    "DisturbedTaylor",
    "Fade",
    "Gaussian",
    "Half",
    "Magnitude",
    "Mean",
    "Random",
    "SlimSAM",
    "Slimmed",
    "Taylor",
    "alternate",
    "heal",
]

STAGES = ("embed", "bottleneck")

# ---- distillation


class Dynamic(Protocol):
    """How much of a loss is on aligned features, over a run of distillation."""

    def weight(self, progress: float) -> float:
        """Return a in [0, 1] at this share of the run."""


@dataclass(frozen=True)
class Half(Dynamic):
    """The paper's of the first step: `level` over the first half of the run, then 0."""

    level: float = 0.5

    def weight(self, progress: float) -> float:
        """See `Dynamic.weight`."""
        return self.level if progress < 0.5 else 0.0


@dataclass(frozen=True)
class Fade(Dynamic):
    """The paper's of the second step: a_e = (last - e) / (last + 1) in epoch e < last, then 0."""

    epochs: int = 20
    last: int = 10

    def weight(self, progress: float) -> float:
        """See `Dynamic.weight`."""
        return self.of(math.floor(progress * self.epochs + 1e-9))

    def of(self, epoch: int) -> float:
        """Return a_e."""
        return max(0.0, (self.last - epoch) / (self.last + 1))


class AlignedDistillation(Objective):
    """Teach a slimmed network its teacher's answers, and features where widths agree.

        L = (1 - a) MSE(S, T) + a [ MSE(S, P) + sum_k mean_{i in k} MSE(S_i, R_i) ]

    T is the original; P the network before this pruning, where that is another one; R (P, or T
    without a P) has the features that are compared; a is `dynamic.weight` of the share of `steps`
    done. Means over elements, in float32 or better. All zero where student and teachers agree.

    A batch is `{"call": (args, kwargs)}`. What is done is counted in a buffer, so that a run taken
    up again goes on as it was.

    Args:
        teacher: T, frozen here.
        student: learns in place; shares no parameter with a teacher.
        aligned: names of modules of both S and R, by kind k.
        previous: P, or None; frozen here.
        dynamic: `Half`, `Fade` or another.
        steps: losses until the run is done.

    Raises:
        ValueError: networks share parameters, or features differ in shape.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        aligned: Mapping[str, Sequence[str]],
        *,
        previous: nn.Module | None = None,
        dynamic: Dynamic | None = None,
        steps: int = 1000,
    ):
        super().__init__()
        mine = {id(p) for p in student.parameters()}
        for other in (teacher, previous):
            if other is not None and any(id(p) in mine for p in other.parameters()):
                raise ValueError(
                    "teacher and student share parameters: give a copy of the original as teacher"
                )
        self.teacher = teacher.eval().requires_grad_(False)
        self.previous = None if previous is None else previous.eval().requires_grad_(False)
        self.student, self.steps = student, steps
        self.aligned = {k: tuple(names) for k, names in aligned.items() if names}
        self.dynamic: Dynamic = dynamic or Half()
        self.done: Tensor
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> AlignedDistillation:
        """Set the student's mode; the teachers stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        if self.previous is not None:
            self.previous.eval()
        return self

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the sum, and terms `output`, `previous` and `aligned/KIND` as they count."""
        from effuse.distill.features import answer, listening

        if "call" not in batch:
            raise ValueError(f"a batch of {sorted(batch)}: expected a recorded `call`")
        args, kwargs = batch["call"]
        a = self.dynamic.weight(min(1.0, int(self.done) / self.steps))
        names = [n for part in self.aligned.values() for n in part] if a else []
        rival = self.teacher if self.previous is None else self.previous
        with torch.no_grad(), listening(rival, names) as theirs:
            felt = answer(rival(*args, **kwargs)) if a or self.previous is None else None
        with torch.no_grad():
            wanted = answer(self.teacher(*args, **kwargs)) if rival is not self.teacher else felt
        with listening(self.student, names) as own:
            given = answer(self.student(*args, **kwargs))
        assert wanted is not None
        terms = {"output": (1 - a) * _apart("the answer", wanted, given)}
        if a and self.previous is not None and felt is not None:
            terms["previous"] = a * _apart("the answer", felt, given)
        if a:
            for kind, part in self.aligned.items():
                each = torch.stack([_apart(n, theirs.get(n), own.get(n)) for n in part])
                terms[f"aligned/{kind}"] = a * each.mean()
        if self.training and torch.is_grad_enabled():
            self.done += 1
        return Loss(torch.stack(list(terms.values())).sum(), terms)


def _apart(name: str, theirs: Tensor | None, own: Tensor | None) -> Tensor:
    if theirs is None or own is None:
        raise ValueError(f"{name} was not called: align layers that run")
    if theirs.shape != own.shape:
        raise ValueError(
            f"{name}: {tuple(theirs.shape)} of the teacher, {tuple(own.shape)} of the student; "
            "only what this pruning left alone can be aligned"
        )
    wide = torch.float64 if own.dtype == torch.float64 else torch.float32
    return (theirs.to(wide) - own.to(wide)).square().mean()


def inner(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers whose outputs are bottlenecks: of q, k and v ("attn"), of MLPs ("mlp")."""
    out: dict[str, list[str]] = {"attn": [], "mlp": []}
    for name, m in model.named_modules():
        if any(c.__name__ == "SamVisionAttention" for c in type(m).__mro__):
            out["attn"].append(f"{name}.qkv".lstrip("."))
    for w in widths(model):
        if w.kind != "embed":
            tops = [s.path for s in w.slots if s.name == "weight" and s.dim == 0]
            out["mlp" if w.kind == "mlp" else "attn"] += tops
    return out


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """Return the blocks whose outputs are the stream; of a UNet its stages."""
    from effuse.distill.features import stages

    out = []
    for w in widths(model):
        if w.blocks:
            each = model.get_submodule(w.blocks)
            out += [f"{w.blocks}.{i}" for i in range(len(list(each.children())))]
    for name, m in model.named_modules():  # a stream that was widened again is no width any more
        if type(m).__name__ == "Expand":
            parent, _, last = name.rpartition(".")
            out += [f"{parent}.{i}" for i in range(int(last))]
    return {"blocks": out or stages(model)}


# ---- the transform


@method(
    "slimsam",
    seed=41,
    paper="0.1% Data Makes Segment Anything Slim",
    year=2023,
    buys="a narrower vision or diffusion transformer, plain layers, from few unlabeled inputs",
    missing="SAM's own weights and mask IoU have not been tried; whole heads are not removed, as "
    "in the reference code; rates that fall on a plateau are left to the caller; one term aligns "
    "q, k and v together; streams of SD3, FLUX and UNets are not narrowed, only their heads and "
    "hidden layers, and no heads where a norm or a rotation acts on their channels",
)
@dataclass(frozen=True)
class SlimSAM(Transform):
    """Narrows the residual stream, and each block's heads and hidden layers, by importance.

        I_i = mean over tensors of sum_{w in channel i} |w dL/dw|,   L = mean (S + n - S')^2

    Both at once by `observe`. The paper's way is to alternate: `alternate` does, and so does a
    recipe that lists it twice, `embed: 0.5, bottleneck: 0` and `embed: 0, bottleneck: 0.5`, healing
    after each: the first is healed on bottlenecks, which it left alone, the second on blocks.

    embed: share of the stream's channels that go, [0, 1). bottleneck: share of the channels of all
    heads, and of all hidden layers, that go; layers compete. 0 leaves a part alone. importance:
    `DisturbedTaylor`, `Taylor`, `Magnitude` or `Random`. local, across: normalize the stream's
    scores and those of bottlenecks. round_to: widths of stream and hidden layers become multiples
    of it; by default of the number of heads for the stream, any for hidden layers. least: share of
    any bottleneck that stays. reset_tables: tables of relative positions begin anew at zero where
    the head's width changed (the paper's); without, they keep the queries' channels. steps: of
    healing, over which aligned features fade out. where: asked with the module a width belongs to.

    A network without a stream to narrow (a UNet) has its bottlenecks narrowed; `report()` says so.
    """

    embed: float = 0.5
    bottleneck: float = 0.5
    importance: Importance = field(default_factory=DisturbedTaylor)
    local: Normalizer = field(default_factory=Mean)
    across: Normalizer = field(default_factory=Gaussian)
    round_to: int | None = None
    least: float = 0.125
    reset_tables: bool = True
    steps: int = 1000
    where: Where = everywhere
    kind = "prune"
    calibrated = True
    targeted = True

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("embed", "bottleneck", "least"):
            value = getattr(self, name)
            check_fraction(name, value, zero=True)
            if value == 1:
                raise ValueError(f"{name}=1: expected a share in [0, 1)")
        if not isinstance(self.importance, Importance):
            raise TypeError(f"importance={self.importance!r}: expected an object, such as Taylor()")
        check_whole("steps", self.steps, 1)
        if self.round_to is not None:
            check_whole("round_to", self.round_to, 1)

    def ratio(self, stage: str) -> float:
        """Return the share of channels that goes in this stage."""
        return self.embed if stage == "embed" else self.bottleneck

    def attach(self, model: nn.Module) -> Slimmed:
        """Look for widths; nothing is narrowed before `observe`.

        Raises:
            ValueError: there are none to narrow, or layers were swapped before.
        """
        handle = Slimmed(self, model)
        asked = [s for s in STAGES if self.ratio(s)]
        if asked and not any(handle.widths(s) for s in asked):
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(asked)} width that `where` allows: "
                "expected a vision encoder of transformers or a network of diffusers with "
                "attention; `effuse.compress.prune.vit_groups.register` adds a type"
            )
        return handle

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Slimmed:
        """Narrow a fresh `model` as `plan` says."""
        handle = Slimmed(self, model)
        for line in plan["stages"]:
            handle.narrow(line["stage"], {k: unpacked(v) for k, v in line["kept"].items()})
        return handle


class Slimmed(Applied):
    """A network with narrower widths.

    kept: channels that stayed, by the name of the width, stage by stage.
    """

    transform: SlimSAM

    def __init__(self, transform: SlimSAM, model: nn.Module):
        self.transform, self.model = transform, model
        self.total = parameters(model)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.before: dict[str, int] = {}
        self.finalized = False
        self._way_back: list[Changes | Removal] = []
        self._previous: nn.Module | None = None
        self._unhealed: list[tuple[Tensor, Tensor]] = []

    def widths(self, stage: str) -> list[Width]:
        """Return the widths of a stage that are there now, SAM's q, k and v apart."""
        apart = split(self.model, self.transform.where) if stage == "bottleneck" else None
        try:
            found = widths(self.model, self.transform.where)
        finally:
            if apart is not None:
                apart.undo()
        return [w for w in found if (w.kind == "embed") == (stage == "embed")]

    def observe(self, calls: Iterable[Call | Batch]) -> None:
        """Score all widths on the whole network, and narrow them; see `prune`.

        Observing again begins anew with the whole network.
        """
        self._check()
        if self._unhealed:
            raise ValueError("it has been healed already: attach anew to the original")
        self._undo()
        self.prune(calls, *(s for s in STAGES if self.transform.ratio(s)))

    def prune(self, calls: Iterable[Call | Batch], *stages: str) -> None:
        """Narrow the widths of these stages, "embed" and "bottleneck", together.

        Args:
            calls: calls of this network, or batches with a `call` and a `target`.
            stages: each once in the life of this handle.

        Raises:
            ValueError: no calls, an unknown stage, or one that was done.
            FloatingPointError: an answer, a target or a score is not finite.
        """
        self._check()
        for s in stages:
            if s not in STAGES or s in self.kept:
                raise ValueError(f"stage {s!r}: expected one of {STAGES} that was not done yet")
        batches = [batch_of(c) for c in calls]
        if not batches:
            raise ValueError("no calls to observe: expected at least one recorded call")
        t = self.transform
        with evaluating(self.model):
            answers(self.model, batches)
        apart = split(self.model, t.where) if "bottleneck" in stages else None
        try:
            found = {s: self.widths(s) for s in stages}
            every = [w for part in found.values() for w in part]
            scores = t.importance.scores(self.model, every, batches) if every else {}
            for name, score in scores.items():
                if not score.isfinite().all() or (score < 0).any():
                    raise FloatingPointError(f"{name}: a score is negative or not finite")
            keep = {s: self._choose(s, found[s], scores) for s in stages}
        finally:
            if apart is not None:
                apart.undo()
        if stages == ("bottleneck",):
            self._previous = copy.deepcopy(self.model)
        for s in stages:
            if found[s]:
                self.narrow(s, keep[s])

    def _choose(
        self, stage: str, found: Sequence[Width], scores: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        t = self.transform
        if stage == "embed":
            return choose(found, scores, t.embed, t.local, together=False, step=t.round_to)
        out: dict[str, Tensor] = {}
        for kinds in (("qk", "v"), ("mlp",)):
            some = [w for w in found if w.kind in kinds]
            step = t.round_to if kinds == ("mlp",) else None
            out |= choose(
                some, scores, t.bottleneck, t.across, together=True, step=step, least=t.least
            )
        return out

    def narrow(self, stage: str, keep: Mapping[str, Tensor]) -> None:
        """Keep these channels of these widths, whatever they score."""
        self._check()
        if stage == "bottleneck":
            paths = {name.rpartition(":")[0] for name in keep}
            self._way_back.append(split(self.model, lambda name, module: name in paths))
        found = widths(self.model)
        odd = keep.keys() - {w.name for w in found}
        if odd:
            raise ValueError(f"no width {min(odd)!r} in {type(self.model).__name__}")
        self.before |= {w.name: w.size for w in found if w.name in keep}
        self._way_back.append(narrow(self.model, found, keep, self.transform.reset_tables))
        self.kept[stage] = {k: v.cpu() for k, v in keep.items()}

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective | None:
        """Return what heals what was narrowed last from `teacher`; None if nothing was.

        The stream alone: answers, and bottlenecks for the first half of `steps` (the transform's if
        None). Bottlenecks: also the blocks and answers of the network before, fading. Both at once:
        answers only, as no width is left to compare. Healing changes weights in place; `detach`
        puts them back.
        """
        if not self.kept:
            return None
        if not self._unhealed:
            every = [*self.model.parameters(), *self.model.buffers()]
            self._unhealed = [(p, p.detach().clone()) for p in every]
        steps = steps or self.transform.steps
        last = list(self.kept)[-1]
        if self._previous is not None and last == "bottleneck":
            return AlignedDistillation(
                teacher,
                self.model,
                blocks(self.model),
                previous=self._previous,
                dynamic=Fade(),
                steps=steps,
            )
        aligned = inner(self.model) if list(self.kept) == ["embed"] else {}
        level = Half() if aligned else Half(0.0)
        return AlignedDistillation(teacher, self.model, aligned, dynamic=level, steps=steps)

    def report(self) -> dict[str, Any]:
        """Return counted parameters, and each width before and after; json-able."""
        now = parameters(self.model)
        sizes = {k: len(v) for part in self.kept.values() for k, v in part.items()}
        asked = [s for s in STAGES if self.transform.ratio(s)]
        return {
            "parameters_before": self.total,
            "parameters": now,
            "kept": now / self.total,
            "widths": {k: [self.before[k], n] for k, n in sizes.items()},
            "not_there": [s for s in asked if self.kept and s not in self.kept],
        }

    def plan(self) -> dict[str, Any]:
        """Return the channels of each width that stayed, packed; see `packed`."""
        return {
            "stages": [
                {"stage": s, "kept": {k: packed(v, self.before[k]) for k, v in part.items()}}
                for s, part in self.kept.items()
            ]
        }

    def detach(self) -> None:
        """Put all channels back, and the weights as they were before healing."""
        self._check()
        with torch.no_grad():
            for p, value in self._unhealed:
                p.copy_(value)
        self._unhealed = []
        self._undo()

    def finalize(self) -> None:
        """Give up the way back and its memory."""
        self._check()
        for part in self._way_back:
            part.forget()
        self._way_back, self._unhealed, self._previous = [], [], None
        self.finalized = True

    def _undo(self) -> None:
        while self._way_back:
            self._way_back.pop().undo()
        self.kept, self.before, self._previous = {}, {}, None

    def _check(self) -> None:
        if self.finalized:
            raise RuntimeError("it was finalized, the channels are gone: load the original")


def alternate(
    handle: Slimmed,
    calls: Sequence[Call | Batch],
    batches: Batches,
    teacher: nn.Module,
    *,
    lr: float = 1e-4,
    rng: torch.Generator | None = None,
    schedule: Callable[[float], float] | None = None,
    progress: bool = True,
    **options: Any,
) -> None:
    """Prune the stream, heal, prune the bottlenecks, heal: each for `handle.transform.steps`.

    Args:
        handle: a `SlimSAM` attached, nothing pruned yet.
        calls: to score on, twice.
        batches: to heal on, as `core.training.fit` takes them.
        teacher: a copy of the original.
        lr: of Adam; the paper's 1e-4.
        rng: draws batches.
        schedule: of the learning rate, over each healing.
        progress: show a progress bar.
        options: more for `fit`.
    """
    for stage in STAGES:
        if handle.transform.ratio(stage) and handle.widths(stage):
            handle.prune(calls, stage)
            heal(
                handle,
                batches,
                teacher,
                lr=lr,
                rng=rng,
                schedule=schedule,
                progress=progress,
                **options,
            )


def heal(
    handle: Slimmed, batches: Batches, teacher: nn.Module, *, lr: float = 1e-4, **options: Any
) -> None:
    """Heal what was pruned last for `handle.transform.steps`, with Adam."""
    objective = handle.objective(teacher)
    if objective is None:
        return
    mode = handle.model.training
    optimizer = torch.optim.Adam(objective.parameters_of("student"), lr=lr)
    fit(objective, batches, optimizer, steps=handle.transform.steps, **options)
    handle.model.train(mode)


def packed(keep: Tensor, size: int) -> str:
    """Return "SIZE:HEX", bit i set where channel i is in keep: (k,)."""
    return f"{size}:{sum(1 << i for i in keep.tolist()):x}"


def unpacked(text: str) -> Tensor:
    """Return the channels, sorted, that `packed` wrote."""
    size, _, bits = text.partition(":")
    mask = int(bits, 16)
    return torch.tensor([i for i in range(int(size)) if mask >> i & 1])
