"""EcoDiff: masks on heads and neurons, learnt through the whole sampling run, then cut for good.

handle = EcoDiff(PerKind(0.8)).attach(pipe.unet)
handle.learn(walks(pipe, prompts, steps=20))       # learns, chooses and cuts
handle.cut(PerKind(0.7))                           # another share of what was learnt

EcoDiff(PerKind(0.8), by=Curvature())              # ours: ranked within a minute, nothing learnt
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from effuse.compress.groups import Group, Narrowing, groups, masked, narrow
from effuse.compress.units import parameters
from effuse.core.contracts import (
    Applied,
    Call,
    Denoiser,
    Loss,
    Objective,
    Solver,
    Transform,
    Where,
    everywhere,
)
from effuse.core.errors import check_choice, check_whole
from effuse.core.method import method
from effuse.core.rollout import Rollout
from effuse.core.training import fit
from effuse.nn.hard_concrete import Binary, HardConcrete, Soft

from .criteria import Batch, answer_to, answers, batch_of, evaluating
from .members import Budget, Choice, PerKind, PerLayer, Threshold

__all__ = [
    "L0",
    "L1",
    "L2",
    "Binary",
    "BoundedL1",
    "Budget",
    "Curvature",
    "EcoDiff",
    "HardConcrete",
    "Masked",
    "Penalty",
    "PerKind",
    "PerLayer",
    "Soft",
    "Threshold",
]


class Gate(Protocol):
    """Makes masks in [0, 1] of logits and uniform noise."""

    def draw(self, logit: Tensor, u: Tensor) -> Tensor:
        """Return M: (n,) of logit: (n,) and u: (n,)."""
        ...


Draw = Callable[[torch.Generator], tuple[Denoiser, Solver, Tensor, Tensor]]
"""Draws (denoiser, solver, start, levels) to sample; see `effuse.compress.calibrate.walks`."""

# ---- what a sparse mask is rewarded with


class Penalty(ABC):
    """R(lambda), the mean over layers. A frozen dataclass."""

    def of(self, logits: Sequence[Tensor]) -> Tensor:
        """Return R, (), of the logits of each layer, (n_l,)."""
        return torch.stack([self.each(x).mean() for x in logits]).mean()

    @abstractmethod
    def each(self, logit: Tensor) -> Tensor:
        """Return what each member pays."""


@dataclass(frozen=True)
class L1(Penalty):
    """|lambda|: the paper's for UNets."""

    def each(self, logit: Tensor) -> Tensor:
        """See `Penalty.each`."""
        return logit.abs()


@dataclass(frozen=True)
class L2(Penalty):
    """lambda^2."""

    def each(self, logit: Tensor) -> Tensor:
        """See `Penalty.each`."""
        return logit.square()


@dataclass(frozen=True)
class BoundedL1(Penalty):
    """sigmoid(gain lambda + shift): the paper's for FLUX, a pull that does not grow with lambda."""

    gain: float = 0.4
    shift: float = 1.0

    def each(self, logit: Tensor) -> Tensor:
        """See `Penalty.each`."""
        return torch.sigmoid(self.gain * logit + self.shift)


@dataclass(frozen=True)
class L0(Penalty):
    """P(M > 0) = sigmoid(lambda - b log(-gamma / zeta)), the share of members that are open."""

    gate: HardConcrete = field(default_factory=HardConcrete)

    def each(self, logit: Tensor) -> Tensor:
        """See `Penalty.each`."""
        return self.gate.open(logit)


# ---- a ranking in place of learning


@dataclass(frozen=True)
class Curvature:
    """How far the end moves, to first order, when a member goes: || dz_0 / dM_i ||.

    E_v (v^T dz_0/dM_i)^2 = || dz_0/dM_i ||^2,   v ~ N(0, I),   M = 1

    the diagonal of the Gauss-Newton matrix of the very loss that masks learn from, whose gradient
    is zero at open masks. Each draw costs what an update does.

    draws: of v, each on one example; relative error of the square about sqrt(2 / draws).
    """

    draws: int = 24

    def __post_init__(self) -> None:
        """Check the number."""
        check_whole("draws", self.draws, 1)

    def scores(self, goal: MaskObjective, rng: torch.Generator) -> dict[str, Tensor]:
        """Return || dz_0 / dM_i ||, (size,), by the name of a group."""
        total = {g.name: torch.zeros(g.size, device=goal.masks[0].device) for g in goal.groups}
        for k in range(self.draws):
            masks = {n: torch.ones_like(t, requires_grad=True) for n, t in total.items()}
            with torch.enable_grad():
                z = goal.end(k % goal.count, masks)
                v = torch.randn(z.shape, generator=rng, device=rng.device).to(z)
                along = (v * z).sum()
            grads = torch.autograd.grad(along, list(masks.values()))
            for name, grad in zip(masks, grads, strict=True):
                total[name] += grad.float().square() / self.draws
        return {n: t.sqrt().cpu() for n, t in total.items()}


# ---- the transform


@method(
    "ecodiff",
    seed=40,
    paper="Effortless Efficiency: Low-Cost Pruning of Diffusion Models",
    year=2024,
    buys="heads and neurons gone without training a weight, chosen by what the last sample loses",
    missing="masks on the outputs of adaLN norms (optional in the paper); the full fine-tune "
    "afterwards is feature distillation, a LoRA is peft's own (`add_adapter` before healing); "
    "grouped-query attention is left alone; recipes learn masks on single answers (`observe`), the "
    "whole trajectory takes a pipeline (`learn`); SDXL and FLUX themselves have not been tried; "
    "learned as long as in the paper, its masks beat single answers but not Taylor on house:emoji "
    "(our `Curvature`, through the same walk, is as good as Taylor)",
    example=lambda: EcoDiff(PerLayer(0.5), steps=2, accumulate=2),
)
@dataclass(frozen=True)
class EcoDiff(Transform):
    """Learns which heads and neurons the last sample can do without, then slices them off.

    min over lambda of  E || z_0(theta) - z_0(theta M(lambda)) ||^2 + beta R(lambda)

    z_0 is where the whole sampler ends, with the same noise, prompt and levels; M multiplies each
    head's output and each hidden neuron; no weight is trained. `learn` goes back through the walk a
    step at a time (`effuse.core.rollout`), so memory does not grow with steps. The masks' noise is
    drawn once a trajectory: drawn again in the second pass, the gradient would be of other masks.

    The members with the highest lambda stay. What is cut is really gone, and nothing else is: the
    bias of an output layer stays even where all members of a layer went.

    choice: who stays, of `PerKind`, `PerLayer`, `Budget` (a share of the network's parameters) and
    `Threshold`. kinds: of groups that may be cut; "channels" too where they exist. gate: makes
    masks. penalty, beta: R and its weight. start: lambda at first. by: None learns lambda, the
    paper's; a `Curvature` takes its place and ignores gate, penalty, start, rates and steps. rates:
    learning rate by kind. samples: trajectories that are drawn once, with the teacher's z_0. steps:
    of the optimizer. accumulate: trajectories a step. where: groups that may be cut.

    Defaults are the paper's for SDXL: 100 prompts, four rounds of four a step. For FLUX: smoothing
    0.1, `BoundedL1()`, beta 0.01, rates 0.5 for heads and 0.1 for neurons. On a large
    network they take hours; on the house pipelines beta 0.05 and 0.2 cut better than 0.5. Where
    there are minutes, `by=Curvature()`.
    """

    choice: Choice = field(default_factory=PerKind)
    kinds: tuple[str, ...] = ("heads", "neurons")
    gate: Gate = field(default_factory=HardConcrete)
    penalty: Penalty = field(default_factory=L1)
    beta: float = 0.5
    start: float = 3.0
    by: Curvature | None = None
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"heads": 0.1, "neurons": 0.1, "channels": 0.1}
    )
    samples: int = 100
    steps: int = 100
    accumulate: int = 4
    where: Where = everywhere
    kind = "prune"
    calibrated = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.by is not None and not isinstance(self.by, Curvature):
            raise TypeError(f"by={self.by!r}: expected Curvature(draws), or None to learn masks")
        # a minute of walks is at hand in a recipe; the hours that masks take are not
        object.__setattr__(self, "calibrated", self.by is None)
        object.__setattr__(self, "walked", self.by is not None)
        for name in self.kinds:
            check_choice("kinds", name, ("heads", "neurons", "channels"))
            if not self.rates.get(name, 0) > 0:
                raise ValueError(f"rates={dict(self.rates)}: expected a rate above 0 for {name!r}")
        if not self.beta >= 0:
            raise ValueError(f"beta={self.beta!r}: expected at least 0")
        for name in ("samples", "steps", "accumulate"):
            check_whole(name, getattr(self, name), 1)

    def attach(self, model: nn.Module) -> Masked:
        """Look for groups; nothing changes before `learn` or `observe`.

        Raises:
            ValueError: there is no group of these kinds that `where` allows.
        """
        found = [g for g in groups(model, self.where) if g.kind in self.kinds]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(self.kinds)} that `where` allows: "
                "expected attention or feed-forward layers of diffusers whose weights are plain"
            )
        return Masked(self, model, found)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Masked:
        """Cut on a fresh `model` what a plan says."""
        kept = {name: _members(text) for name, text in plan["kept"].items()}
        handle = Masked(self, model, [g for g in groups(model) if g.name in kept])
        handle.narrow(kept)
        handle.found = dict(plan.get("found", {}))
        return handle


class Example(NamedTuple):
    """A trajectory and where it ends: the walk, the state of the generator, z_0 of the whole."""

    denoiser: Denoiser
    solver: Solver
    x: Tensor
    times: Tensor
    noise: tuple[Tensor, torch.device]
    target: Tensor


class Masked(Applied):
    """A network whose groups are masked while it learns, and narrower afterwards.

    groups: in order. logits: (size,) by the name of a group, once learnt. kept: members that
    stayed, of the groups that are cut. history: of the last learning, a row a logged step.
    """

    transform: EcoDiff

    def __init__(self, transform: EcoDiff, model: nn.Module, found: Sequence[Group]):
        self.transform, self.model, self.groups = transform, model, list(found)
        self.total = parameters(model)
        self.logits: dict[str, Tensor] = {}
        self.kept: dict[str, list[int]] = {}
        self.found: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self.finalized = False
        self._narrowing: Narrowing | None = None
        self._unhealed: dict[str, Tensor] = {}

    def learn(
        self,
        draw: Draw,
        *,
        rng: torch.Generator | None = None,
        progress: bool = True,
        folder: str | Path | None = None,
    ) -> dict[str, Tensor]:
        """Learn the logits through whole trajectories, cut by them, and return them.

        Args:
            draw: gives a trajectory, see `effuse.compress.calibrate.walks`; it must sample with
                this network.
            rng: of trajectories, of the masks and of the order.
            progress: show a bar.
            folder: for checkpoints; a stopped run with the same `rng` goes on where it was.

        Raises:
            FloatingPointError: a sample or the loss is not finite; names the step.
        """
        self._whole()
        rng = rng if rng is not None else torch.Generator().manual_seed(0)
        with self._still():
            how = self.transform
            count = how.samples if how.by is None else min(how.samples, how.by.draws)
            examples = [_example(draw(rng), rng) for _ in range(count)]
            goal = EndToEnd(self, examples)
            self._learn(goal, rng, progress, folder)
        self.cut()
        return self.logits

    def observe(self, calls: Iterable[Call | Batch]) -> None:
        """Learn the logits on single answers instead, E || eps(theta) - eps(theta M) ||^2, and cut.

        For where only recorded calls are at hand: cheaper, and blind to how errors add up along
        the trajectory.

        Raises:
            ValueError: no calls. FloatingPointError: an answer is not finite.
        """
        self._whole()
        batches = [batch_of(c) for c in calls]
        if not batches:
            raise ValueError("no calls to observe: expected at least one recorded call")
        with self._still():
            goal = Answers(self, batches, answers(self.model, batches))
            rng = torch.Generator().manual_seed(0)
            self._learn(goal, rng, False, None)
        self.cut()

    def _learn(
        self,
        goal: MaskObjective,
        rng: torch.Generator,
        progress: bool,
        folder: str | Path | None,
    ) -> None:
        how, count = self.transform, goal.count
        if how.by is not None:
            self.logits, self.history = how.by.scores(goal, rng), []
            return
        optimizer = torch.optim.AdamW(
            [
                {"params": [goal.masks[i] for i in goal.of(kind)], "lr": how.rates[kind]}
                for kind in goal.kinds
            ],
            weight_decay=0.0,  # the penalty is the only pull
        )

        def batch(rng: torch.Generator) -> dict[str, Tensor]:
            order = torch.randperm(count, generator=rng, device=rng.device)
            return {"index": order.repeat(-(-how.accumulate // count))[: how.accumulate]}

        done = fit(
            goal,
            batch,
            optimizer,
            steps=how.steps,
            rng=rng,
            schedule=lambda part: min(1.0, (part * how.steps + 1) / 10),
            clip=None,
            folder=folder,
            log_every=max(1, how.steps // 50),
            progress=progress,
        )
        self.history = done.history
        self.logits = {
            g.name: p.detach().cpu().clone() for g, p in zip(self.groups, goal.masks, strict=True)
        }

    def cut(self, choice: Choice | None = None) -> None:
        """Cut what `choice` (the transform's own if None) leaves by what was learnt, anew.

        Raises:
            ValueError: nothing was learnt, or it was healed already.
        """
        if not self.logits:
            raise ValueError("nothing was learnt: call `learn` or `observe` first")
        self._whole()
        self.narrow((choice or self.transform.choice).choose(self.model, self.groups, self.logits))
        if self.history:
            self.found = {"loss": self.history[-1]["loss"]}

    def narrow(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Keep these members of these groups, whatever was learnt."""
        self._whole()
        sizes = {g.name: g.size for g in self.groups}
        self._narrowing = narrow(self.model, kept)
        self.kept = {n: k for n, k in self._narrowing.kept.items() if len(k) < sizes[n]}

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective | None:
        """Return the feature distillation from `teacher`; None if nothing was cut.

        Healing changes weights in place; `detach` puts those of this moment back.
        """
        if not self.kept:
            return None
        from effuse.distill.features import NormalizedFeatureDistillation

        if not self._unhealed:
            self._unhealed = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        return NormalizedFeatureDistillation(teacher, self.model)

    def report(self) -> dict[str, Any]:
        """Return counted parameters, members left by kind and emptied groups, json-able."""
        members: dict[str, list[int]] = {}
        for g in self.groups:
            at = members.setdefault(g.kind, [0, 0])
            at[0] += len(self.kept.get(g.name, range(g.size)))
            at[1] += g.size
        return {
            "parameters_before": self.total,
            "parameters": parameters(self.model),
            "kept": parameters(self.model) / self.total,
            "members": {kind: f"{a} of {b}" for kind, (a, b) in members.items()},
            "emptied": [n for n, k in self.kept.items() if not k],
            **self.found,
        }

    def plan(self) -> dict[str, Any]:
        """Return who stayed, a bit a member, the first lowest, in hexadecimal; and findings."""
        return {"kept": {n: _text(k) for n, k in self.kept.items()}, "found": dict(self.found)}

    def detach(self) -> None:
        """Put all members back, and the weights as they were before healing."""
        self._check()
        if self._unhealed:
            self.model.load_state_dict(self._unhealed)
            self._unhealed = {}
        self._whole()

    def finalize(self) -> None:
        """Give up the way back and its memory."""
        self._check()
        if self._narrowing is not None:
            self._narrowing.forget()
        self._unhealed, self.finalized = {}, True

    def _whole(self) -> None:
        """Put everything back that is cut."""
        self._check()
        if self._unhealed:
            raise ValueError("it has been healed already: detach first")
        if self._narrowing is not None:
            self._narrowing.undo()
        self._narrowing, self.kept, self.found = None, {}, {}

    def _check(self) -> None:
        if self.finalized:
            raise RuntimeError("it was finalized, members are gone for good: load the original")

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Freeze the weights and put the network into evaluation mode meanwhile."""
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.requires_grad_(False)
        try:
            with evaluating(self.model):
                yield
        finally:
            for p, needed in wanted:
                p.requires_grad_(needed)


def _text(kept: Sequence[int]) -> str:
    return f"{sum(1 << i for i in kept):x}"


def _members(text: str) -> list[int]:
    bits = int(text, 16)
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


# ---- what masks learn from


class MaskObjective(Objective):
    """What a masked network loses, and what its masks pay.

    Args:
        handle: on the network.
    """

    players = ("masks",)

    def __init__(self, handle: Masked):
        super().__init__()
        how = handle.transform
        device = next(handle.model.parameters()).device
        self.masks = nn.ParameterList(
            nn.Parameter(torch.full((g.size,), float(how.start), device=device))
            for g in handle.groups
        )
        # out of reach of train() and state_dict(): it learns nothing
        self._network, self.groups, self.transform = (handle.model,), handle.groups, how

    @property
    def network(self) -> nn.Module:
        """The network that is masked."""
        return self._network[0]

    @property
    def kinds(self) -> list[str]:
        """The kinds of groups that there are."""
        return list(dict.fromkeys(g.kind for g in self.groups))

    def of(self, kind: str) -> list[int]:
        """Return where the groups of a kind are."""
        return [i for i, g in enumerate(self.groups) if g.kind == kind]

    def drawn(self, rng: torch.Generator | None) -> dict[str, Tensor]:
        """Draw a mask for each group, with a gradient."""
        device = None if rng is None else rng.device
        out = {}
        for g, logit in zip(self.groups, self.masks, strict=True):
            u = torch.rand(g.size, generator=rng, device=device or logit.device).to(logit.device)
            out[g.name] = self.transform.gate.draw(logit, u)
        return out

    @property
    @abstractmethod
    def count(self) -> int:
        """How many examples there are."""

    @abstractmethod
    def end(self, index: int, masks: Mapping[str, Tensor]) -> Tensor:
        """Return what example `index` ends with under masks, (B, *)."""

    @abstractmethod
    def target(self, index: int) -> Tensor:
        """Return what it ends with when all is open, (B, *)."""

    def lost(self, index: int, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared change of example `index`, ()."""
        end, target = self.end(index, masks), self.target(index)
        wide = torch.promote_types(end.dtype, torch.float32)
        return (end.to(wide) - target.to(wide)).square().mean()

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """See `Objective.loss`; batch: {"index": (k,) examples}, each with masks of its own."""
        index = batch["index"].tolist()
        change = torch.stack([self.lost(i, self.drawn(rng)) for i in index]).mean()
        penalty = self.transform.beta * self.transform.penalty.of(list(self.masks))
        return Loss(change + penalty, {"change": change, "penalty": penalty})


class EndToEnd(MaskObjective):
    """The paper's: how far the last sample of a whole walk moves; see `EcoDiff`.

    Args:
        handle: on the network.
        examples: trajectories with their ends, of that network.
    """

    def __init__(self, handle: Masked, examples: Sequence[Example]):
        super().__init__(handle)
        self.examples = tuple(examples)

    @property
    def count(self) -> int:
        """See `MaskObjective.count`."""
        return len(self.examples)

    def target(self, index: int) -> Tensor:
        """See `MaskObjective.target`."""
        return self.examples[index].target

    def end(self, index: int, masks: Mapping[str, Tensor]) -> Tensor:
        """See `MaskObjective.end`; two forwards and a backward a step."""
        e = self.examples[index]
        state, device = e.noise
        rng = torch.Generator(device)
        rng.set_state(state)
        rollout = Rollout(e.denoiser, e.solver, e.times, lambda: masked(self.network, masks))
        return rollout.run(e.x, list(masks.values()), rng=rng)


class Answers(MaskObjective):
    """How far single answers move.

    Args:
        handle: on the network.
        batches: with a `call` each.
        whole: what the network answers to each.
    """

    def __init__(self, handle: Masked, batches: Sequence[Batch], whole: Sequence[Tensor]):
        super().__init__(handle)
        self.batches, self.whole = tuple(batches), tuple(whole)

    @property
    def count(self) -> int:
        """See `MaskObjective.count`."""
        return len(self.batches)

    def target(self, index: int) -> Tensor:
        """See `MaskObjective.target`."""
        return self.whole[index]

    def end(self, index: int, masks: Mapping[str, Tensor]) -> Tensor:
        """See `MaskObjective.end`; one forward and backward."""
        with masked(self.network, masks):
            return answer_to(self.network, self.batches[index])


def _example(walk: tuple[Denoiser, Solver, Tensor, Tensor], rng: torch.Generator) -> Example:
    """Walk once with the whole network, and note where it began and ended."""
    denoiser, solver, x, times = walk
    noise = rng.get_state(), rng.device
    target = Rollout(denoiser, solver, times).run(x, rng=rng)
    return Example(denoiser, solver, x, times, noise, target.detach())
