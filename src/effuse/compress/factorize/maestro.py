"""Maestro: ordered low-rank layers, trained so that each may be cut after any component.

from effuse.compress.factorize import maestro

handle = maestro.Maestro(keep=0.5).attach(net)                  # SVD split, nothing is lost yet
goal = handle.training(maestro.Classes(), lasso=1e-5)
fit(goal, batches, optimizer, steps=1000)                       # ordered dropout
goal.shrink(1e-4)                                               # each epoch: drop dead tails
handle.observe(calls)                                           # ranks for half the products
maestro.recalibrate(net, calls)                                 # where it has BatchNorm
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.compress.calibrate import to_device
from effuse.compress.healing import round_as
from effuse.compress.swap import Swapped, layers_of, owners
from effuse.compress.units import parameters
from effuse.core.contracts import Call, Loss, Objective, Transform, Where, everywhere
from effuse.core.errors import check_choice, check_fraction, check_whole
from effuse.core.method import method
from effuse.nn.low_rank import (
    InputMoments,
    LowRank,
    can_factor,
    empty_like,
    factored,
    full_rank,
    group_lasso,
    low_rank_layers,
    ranks,
)

__all__ = [
    "Classes",
    "Factored",
    "Independent",
    "LossOverRanks",
    "Maestro",
    "Numbers",
    "OneLayer",
    "Sampling",
    "Task",
    "allocate",
    "energy_losses",
    "recalibrate",
]


# ---- which ranks a step runs at


class Sampling(ABC):
    """Draws at which ranks the layers run in a step. A frozen dataclass; its state is a buffer."""

    @abstractmethod
    def draw(
        self, full: Sequence[int], kept: Sequence[int], state: Tensor, rng: torch.Generator | None
    ) -> dict[int, int]:
        """Return {layer: rank} of the layers that are cut.

        Args:
            full: ranks at the start.
            kept: ranks now.
            state: (1 + sum of full,) int64, zeros at first; changed in place.
            rng: of the draws.
        """


@dataclass(frozen=True)
class OneLayer(Sampling):
    """One layer at one of its ranks, all others whole: all (i, b) once in a cycle, shuffled."""

    def draw(
        self, full: Sequence[int], kept: Sequence[int], state: Tensor, rng: torch.Generator | None
    ) -> dict[int, int]:
        """See `Sampling.draw`. state[0] counts within the cycle, the rest is its order."""
        total, ends = sum(full), torch.tensor(full).cumsum(0)
        if not any(kept):
            return {}
        while True:
            at = int(state[0]) % total
            if at == 0:
                state[1:] = torch.randperm(total, generator=rng).to(state)
            state[0] = at + 1
            pair = int(state[1 + at])
            i = int(torch.searchsorted(ends, pair, right=True))
            b = pair - int(ends[i]) + full[i] + 1
            if b <= kept[i]:
                return {i: b}


@dataclass(frozen=True)
class Independent(Sampling):
    """Every layer at a rank of its own, uniform over those it has."""

    def draw(
        self, full: Sequence[int], kept: Sequence[int], state: Tensor, rng: torch.Generator | None
    ) -> dict[int, int]:
        """See `Sampling.draw`; keeps no state."""
        u = torch.rand(len(kept), generator=rng).tolist()
        return {i: 1 + min(int(x * r), r - 1) for i, (x, r) in enumerate(zip(u, kept)) if r}


# ---- what is learned


class Task(ABC):
    """How answers are judged, and what a whole network teaches a cut one. Frozen dataclass."""

    @abstractmethod
    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """Return the loss, (); lowest where the answer is the target."""

    @abstractmethod
    def soft(self, answer: Tensor) -> Tensor:
        """Return the target that an answer makes."""


@dataclass(frozen=True)
class Numbers(Task):
    """Mean squared error; a network's answer is the target."""

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """See `Task.loss`."""
        return (answer.float() - target.float()).square().mean()

    def soft(self, answer: Tensor) -> Tensor:
        """See `Task.soft`."""
        return answer


@dataclass(frozen=True)
class Classes(Task):
    """Cross entropy of logits (B, C) and classes (B,) or probabilities (B, C)."""

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """See `Task.loss`."""
        return F.cross_entropy(answer, target)

    def soft(self, answer: Tensor) -> Tensor:
        """See `Task.soft`."""
        return answer.softmax(-1)


class LossOverRanks(Objective):
    """Train all ranks at once: the loss at a drawn rank, and a lasso on the tails.

    L = loss(h(x), y) + loss(h_{i,b}(x), y') + lasso sum_i sum_b (||U^i_{b:}|| + ||V^i_{b:}||)

    The first term is there with `whole`, and y' is then what the whole network answers, without a
    gradient; without it y' = y. With `sampling` None there is no cut: ordinary training of the
    factors, of `loss(h(x), y)` and the lasso. A batch is `{"call": (args, kwargs), "target": y}`;
    given a teacher, y is its answer. On a linear map with white inputs the minimum is the SVD cut
    at every rank at once.

    Args:
        student: a network with low-rank layers; learns in place.
        task: `Numbers` or `Classes`.
        lasso: the knob to tune, 1e-7 to 1e-3. Weight decay on the factors is a lasso of its own
            (the nuclear norm): do not use both without looking.
        sampling: `OneLayer` (the paper's), `Independent`, or None.
        whole: add the pass of the whole network, which teaches the cut one.
        teacher: frozen here; None where batches bring targets.

    Raises:
        ValueError: the student has no low-rank layer, or shares parameters with the teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        *,
        lasso: float = 1e-6,
        sampling: Sampling | None = OneLayer(),
        whole: bool = True,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        if not 0 <= lasso < math.inf:
            raise ValueError(f"lasso={lasso!r}: expected a finite number, 0 or more")
        self.layers = low_rank_layers(student)
        if not self.layers:
            raise ValueError(f"{type(student).__name__}: has no low-rank layer; attach Maestro")
        if teacher is not None:
            mine = {id(p) for p in student.parameters()}
            if any(id(p) in mine for p in teacher.parameters()):
                raise ValueError("teacher and student share parameters: give a copy as the teacher")
            teacher.eval().requires_grad_(False)
        self.student, self.teacher, self.task = student, teacher, task
        self.lasso, self.sampling, self.whole = lasso, sampling, whole
        self.full = [layer.rank for layer in self.layers.values()]
        # buffers, so that a run taken up again goes on where it was
        self.kept: Tensor
        self.state: Tensor
        self.register_buffer("kept", torch.tensor([m.kept for m in self.layers.values()]))
        self.register_buffer("state", torch.zeros(1 + sum(self.full), dtype=torch.int64))

    def train(self, mode: bool = True) -> LossOverRanks:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the sum, and terms `whole`, `cut` and `lasso`."""
        kept = self.kept.tolist()
        for layer, r in zip(self.layers.values(), kept, strict=True):
            layer.kept = r
        (args, kwargs), terms = batch["call"], {}
        target = self._target(batch)
        if self.whole or self.sampling is None:
            out = _answer(self.student(*args, **kwargs))
            terms["whole"] = self.task.loss(out, target)
            target = self.task.soft(out.detach())
        if self.sampling is not None:
            drawn = self.sampling.draw(self.full, kept, self.state, rng)
            names = list(self.layers)
            with ranks(self.student, {names[i]: b for i, b in drawn.items()}):
                out = _answer(self.student(*args, **kwargs))
            terms["cut"] = self.task.loss(out, target)
        if self.lasso and any(kept):
            terms["lasso"] = self.lasso * group_lasso(self.student)
        return Loss(torch.stack(list(terms.values())).sum(), terms)

    @torch.no_grad()
    def shrink(self, least: float = 1e-5) -> dict[str, int]:
        """Drop each layer's tail of importance ||U_{b:}|| ||V_{b:}|| below `least`.

        Returns the ranks that stay, which may be 0: such a layer answers its bias. Call it after
        each epoch. Nothing is removed physically before `Factored.observe` or `shrink` there.
        """
        for k, layer in enumerate(self.layers.values()):
            layer.kept = int((layer.importance() >= least).sum())
            self.kept[k] = layer.kept
        return {n: m.kept for n, m in self.layers.items()}

    def _target(self, batch: Mapping[str, Any]) -> Tensor:
        if self.teacher is not None:
            args, kwargs = batch["call"]
            with torch.no_grad():
                return self.task.soft(_answer(self.teacher(*args, **kwargs)))
        if "target" not in batch:
            raise ValueError("the batch has no `target`: expected one, or a teacher")
        target: Tensor = batch["target"]
        return target


def _answer(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    found: Tensor = out.sample if hasattr(out, "sample") else out[0]
    return found


# ---- the transform


@method(
    "maestro",
    seed=34,
    paper="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    year=2024,
    buys="layers as thin products, cut to any size after one training",
    missing="No schedule of its own: give `fit` one. Grouped convolutions, tied weights, "
    "embeddings and layers of other classes stay. ImageNet and Multi30k are not reproduced. "
    'Splitting by inputs and pricing ranks by answers (by="answers", the default) are ours.',
    example=lambda: Maestro(keep=0.5, by="inputs", least=4),
)
@dataclass(frozen=True)
class Maestro(Transform):
    """Split layers by SVD into ordered components, and keep those worth their multiplications.

    W_b = sum_{i <= b} u_i v_i^T

    `attach` splits at full rank: the same answers to rounding, for more bytes until it is cut.
    `Factored.training` orders the components; without it they are those of the SVD. `observe`
    keeps the share asked for; a layer whose factors would cost more than its product becomes dense
    again; at `keep` = 1 all do. Factors of weights that half precision holds are rounded to it, and
    stored so. What a cut to rank b loses in layer i:

        by="weights", "inputs"   -log(sum_{j <= b} e_ij / sum_j e_ij),  e_ij = (||u_j|| ||v_j||)^2
        by="answers"             E||f(x; i cut to b) - f(x)||^2 / E||f(x)||^2, f the network

    Before that, "inputs" and "answers" (not the paper's) split every layer that was not trained
    since `attach` anew, by what it reads in the calls: see `effuse.nn.low_rank.factored`.

    keep: share that stays, in (0, 1], of what `of` says.
    of: the "macs" of the layers it touches, or the "parameters" of the whole network.
    by: "answers", "inputs" or "weights", see above. "answers" tries six sizes of every layer.
    least: layers with fewer in- or outputs stay as they are.
    where: layers it forbids stay as well.
    """

    keep: float = 0.5
    of: Literal["macs", "parameters"] = "macs"
    by: Literal["answers", "inputs", "weights"] = "answers"
    least: int = 32
    where: Where = everywhere
    kind = "factorize"
    calibrated = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fraction("keep", self.keep)
        check_choice("of", self.of, ("macs", "parameters"))
        check_choice("by", self.by, ("answers", "inputs", "weights"))
        check_whole("least", self.least, 1)

    def attach(self, model: nn.Module) -> Factored:
        """Split the layers of `model` at full rank; one that has none stays as it is."""
        held: dict[int, int] = {}
        for module in model.modules():
            for p in module._parameters.values():
                if p is not None:
                    held[id(p)] = held.get(id(p), 0) + 1

        def wanted(name: str, module: nn.Module) -> bool:
            if not can_factor(module):
                return False
            weight: Any = module.weight
            tied = held[id(weight)] > 1
            return min(weight.shape[:2]) >= self.least and not tied and self.where(name, module)

        layers = {name: factored(m) for name, m in layers_of(model, wanted)}
        return Factored(self, model, layers)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Factored:
        """Put layers of the ranks that `plan` names in place; those of rank None stay dense."""
        layers = {
            name: empty_like(model.get_submodule(name), rank)
            for name, rank in plan["layers"].items()
            if rank is not None
        }
        return Factored(self, model, layers)


class Factored(Swapped):
    """A network with low-rank layers; see `Maestro`."""

    transform: Maestro

    def __init__(self, transform: Maestro, model: nn.Module, layers: Mapping[str, LowRank]):
        super().__init__(transform, model, layers)
        self.positions: dict[str, int] = {}
        self.losses: dict[str, Tensor] = {}
        self._originals = {n: self._original(n) for n in layers}

    def _original(self, name: str) -> nn.Module:
        here = owners(self.model, self.layers[name])
        return next(m for owner, child, m in self._old if (owner, child) == here[0])

    @property
    def factors(self) -> dict[str, LowRank]:
        """The layers that are low-rank now."""
        return {n: m for n, m in self.layers.items() if isinstance(m, LowRank)}

    def training(
        self,
        task: Task,
        *,
        lasso: float = 1e-6,
        sampling: Sampling | None = OneLayer(),
        whole: bool = True,
    ) -> LossOverRanks:
        """Return what orders the components, on batches of a `call` and its `target`."""
        return LossOverRanks(self.model, task, lasso=lasso, sampling=sampling, whole=whole)

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective:
        """Return what heals from `teacher`: its answers at all ranks, or as cut once it is cut."""
        if self.positions or not self.factors:
            from effuse.distill.features import NormalizedFeatureDistillation

            return NormalizedFeatureDistillation(teacher, self.model)
        return LossOverRanks(self.model, Numbers(), teacher=teacher)

    @torch.no_grad()
    def observe(self, calls: Iterable[Call]) -> None:
        """Cut to the share `keep` of multiplications or parameters, as `Maestro` says."""
        calls = list(calls)
        self.count(calls)
        if self.transform.by != "weights":
            self.split(calls)
        if self.transform.by == "answers":
            self.judge(calls)
        self.extract(self.transform.keep)

    @torch.no_grad()
    def split(self, calls: Sequence[Call], room: int = 2**31) -> list[str]:
        """Split layers anew by what they read in the calls; those that were trained stay.

        The calls are answered once for every `room` bytes of second moments.

        Returns the names of the layers that were split.
        """
        fresh = [n for n, m in self.factors.items() if self._untouched(n, m)]
        parts: list[dict[str, LowRank]] = [{}]
        taken = 0
        for name in fresh:
            size = 8 * self.factors[name].right.shape[1] ** 2
            if parts[-1] and taken + size > room:
                parts.append({})
                taken = 0
            parts[-1][name], taken = self.factors[name], taken + size
        for part in parts:
            with InputMoments(part) as heard:
                self._answer_all(calls)
            for name, moment in heard.moments.items():
                original: Any = self._originals[name]
                self._replace(name, factored(original, inputs=moment))
        return fresh

    @torch.no_grad()
    def judge(self, calls: Sequence[Call], most: int = 2) -> dict[str, Tensor]:
        """Measure what the network loses when one layer is cut, at six sizes of every layer.

        E||f(x; i cut to b) - f(x)||^2 / E||f(x)||^2, between the sizes on a straight line of its
        logarithm. `extract` goes by it from now on.

        Args:
            calls: `most` of them are answered, evenly spread.
            most: see above.

        Returns:
            By layer, the losses at ranks 1 to r, (r,) in float64.
        """
        some = calls[:: -(-len(calls) // most)]
        whole = self._answer_all(some)
        size = float(sum(y.double().square().sum() for y in whole)) or 1.0
        self.losses = {}
        for name, layer in self.factors.items():
            top = min(layer.kept, (layer.dense_cost - 1) // layer.per_component)
            shares = (0.0, 0.07, 0.15, 0.3, 0.55, 0.85) if top else ()
            sizes = sorted({max(1, round(top * s)) for s in shares})
            found = []
            for rank in sizes:
                with ranks(self.model, {name: rank}):
                    cut = self._answer_all(some)
                moved = ((a - b).double().square().sum() for a, b in zip(cut, whole, strict=True))
                found.append(float(sum(moved)) / size)
            self.losses[name] = _between(sizes, found, layer.kept)
        return self.losses

    def _untouched(self, name: str, layer: LowRank) -> bool:
        """Say whether a layer's product is the original's weight, to its factors' rounding."""
        original: Any = self._originals[name]
        if layer.kept < full_rank(original):
            return False
        weight = original.weight.flatten(1).double()
        apart = (layer.left.double() @ layer.right.double() - weight).norm()
        return bool(apart <= torch.finfo(original.weight.dtype).eps * weight.norm())

    def _answer_all(self, calls: Sequence[Call]) -> list[Tensor]:
        device = next(self.model.parameters()).device
        out = []
        for call in calls:
            args, kwargs = to_device(call, device)
            out.append(_answer(self.model(*args, **kwargs)).float())
        return out

    def _replace(self, name: str, new: nn.Module) -> None:
        for owner, child in owners(self.model, self.layers[name]):
            setattr(owner, child, new)
        self.layers[name] = new

    @torch.no_grad()
    def count(self, calls: Iterable[Call]) -> None:
        """Count at how many positions each layer is applied in the calls; cuts nothing."""
        seen = dict.fromkeys(self.layers, 0)

        def listen(name: str) -> Any:
            def hook(layer: Any, args: Any, out: Tensor) -> None:
                dim = 1 if isinstance(layer, nn.Conv2d) or hasattr(layer, "kernel_size") else -1
                seen[name] += out.numel() // out.shape[dim]

            return hook

        hooks = [m.register_forward_hook(listen(n)) for n, m in self.layers.items()]
        device = next(self.model.parameters()).device
        some = False
        try:
            for call in calls:
                args, kwargs = to_device(call, device)
                self.model(*args, **kwargs)
                some = True
        finally:
            for hook in hooks:
                hook.remove()
        if not some:
            raise ValueError("no calls to observe: expected at least one")
        self.positions = seen

    def extract(self, keep: float) -> dict[str, int | None]:
        """Cut to the share `keep` of what `Maestro.of` says; returns the ranks.

        None stands for a dense layer. By the losses that `judge` found, else by the share of each
        layer's energy. Only ever takes away: extract large sizes before small ones, or from a copy.

        Raises:
            ValueError: nothing was observed, or even rank 1 everywhere is more than `keep`.
        """
        check_fraction("keep", keep)
        if not self.positions:
            raise ValueError("multiplications are not counted yet: call count first")
        names = list(self.factors)
        often = self.positions
        fixed = sum(often[n] * m.weight.numel() for n, m in self._dense())
        if self.transform.of == "parameters":
            often = dict.fromkeys(self.layers, 1)
            split = sum(m.left.numel() + m.right.numel() for m in self.factors.values())
            fixed = parameters(self.model) - split
        chosen = allocate(
            [self.losses.get(n, energy_losses(self.factors[n].energies())) for n in names],
            [self.factors[n].per_component for n in names],
            [self.factors[n].dense_cost for n in names],
            [max(1, often[n]) for n in names],
            keep,
            fixed=fixed,
        )
        for name, rank in zip(names, chosen, strict=True):
            self._put(name, rank)
        return dict(self.plan()["layers"])

    def _dense(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self.layers.items() if not isinstance(m, LowRank)]

    def _put(self, name: str, rank: int | None) -> None:
        layer = self.factors[name]
        new: nn.Module = layer
        if rank is None:
            original: Any = self._originals[name]
            dense = layer.dense()
            atol = 1e-6 * float(original.weight.detach().abs().max())
            same = layer.kept == layer.rank == full_rank(original) and torch.allclose(
                dense.weight, original.weight, rtol=1e-4, atol=atol
            )
            same = same and (
                original.bias is None or torch.equal(dense.bias, original.bias)  # type: ignore[arg-type]
            )
            new = original if same else dense
        elif rank < layer.rank:
            cut = layer.cut(max(1, rank))
            if rank == 0:  # shrunk away: one component that is zero, so the bias answers
                nn.init.zeros_(cut.up.weight)
            new = cut
        was = self._originals.get(name)
        if was is not None and new is not was:
            round_as(new, was)
        self._replace(name, new)

    def plan(self) -> dict[str, Any]:
        """Return the rank each layer stores, None where it is dense."""
        return {
            "layers": {
                n: m.rank if isinstance(m, LowRank) else None for n, m in self.layers.items()
            }
        }

    def report(self) -> dict[str, Any]:
        """Return counted bytes, ranks, and the share of multiplications at observed sizes."""
        out = {**super().report(), "ranks": self.plan()["layers"]}
        if self.positions:
            cost = {n: p * _cost(self.layers[n]) for n, p in self.positions.items()}
            whole = {n: p * _dense(self.layers[n]) for n, p in self.positions.items()}
            out["macs"] = sum(cost.values()) / max(1, sum(whole.values()))
        return out

    def finalize(self) -> None:
        """Give the original layers up."""
        super().finalize()
        self._originals = {}


def _cost(layer: Any) -> int:
    if isinstance(layer, LowRank):
        return layer.kept * layer.per_component
    return int(layer.weight.numel())


def _dense(layer: Any) -> int:
    return layer.dense_cost if isinstance(layer, LowRank) else int(layer.weight.numel())


def allocate(
    losses: Sequence[Tensor],
    per_component: Sequence[int],
    dense: Sequence[int],
    positions: Sequence[int],
    keep: float,
    fixed: float = 0.0,
) -> list[int | None]:
    """Return the rank of each layer, None for dense, within a share of all multiplications.

    minimize sum_i loss_i(b_i)   subject to   sum_i cost_i <= keep

    A layer costs positions min((m + n) b, m n), and loses nothing when dense. Each layer has the
    lower convex hull of its sizes, dense among them; the steps along all hulls are taken by what
    they lose per multiplication saved, the best for every budget at which a step ends. What the
    last step saved too much is given back.

    Args:
        losses: (r_i,) of each layer cut to its first 1 to r_i components.
        per_component: m + n of each layer.
        dense: m n of each layer.
        positions: how often each is applied.
        keep: share of sum_i positions dense + `fixed` that may be spent, `fixed` being spent.
        fixed: multiplications that are spent anyway.

    Raises:
        ValueError: rank 1 everywhere costs more.
    """
    whole = fixed + sum(p * d for p, d in zip(positions, dense, strict=True))
    budget, at, steps = keep * whole * (1 + 1e-12), [], []
    for i, (lost, one, full) in enumerate(zip(losses, per_component, dense, strict=True)):
        hull = _hull(_sizes(lost, one, full))
        at.append(hull[0])
        for a, b in pairwise(hull):
            saved = positions[i] * (a.cost - b.cost)
            steps.append(((b.loss - a.loss) / saved, i, a, b, saved))
    spent = fixed + sum(p * s.cost for p, s in zip(positions, at, strict=True))
    for _, i, a, b, saved in sorted(steps, key=lambda step: step[:2]):
        if spent <= budget:
            break
        spent -= saved
        at[i] = b
        if spent <= budget and b.rank is not None:
            most = (a.cost - 1) // per_component[i]
            back = int((budget - spent) // (positions[i] * per_component[i]))
            at[i] = b._replace(rank=min(most, b.rank + back))
    if spent > budget:
        raise ValueError(
            f"keep={keep}: rank 1 everywhere is {spent / whole:.3f} of the cost already; keep more"
        )
    return [size.rank for size in at]


class _Size(NamedTuple):
    """A size of a layer: multiplications at one position, what it loses, rank."""

    cost: int
    loss: float
    rank: int | None


def _sizes(lost: Tensor, one: int, full: int) -> list[_Size]:
    """Return the sizes worth having, dear ones first: dense, and all ranks that are cheaper."""
    if not len(lost):
        return [_Size(0, 0.0, 0)]
    loss = lost.tolist()
    ranks = range(min(len(loss), (full - 1) // one), 0, -1)
    some = [_Size(b * one, loss[b - 1], b) for b in ranks]
    return some if len(loss) * one < full else [_Size(full, 0.0, None), *some]


def energy_losses(energy: Tensor) -> Tensor:
    """Return -log of the share of energy kept, (r,): it forbids to strip a layer of all it has."""
    kept = energy.double().cumsum(0)
    # of no energy none is lost
    return -(kept / kept[-1:]).nan_to_num(1.0).clamp(1e-12, 1).log()


def _between(ranks: Sequence[int], losses: Sequence[float], count: int) -> Tensor:
    """Return losses at ranks 1 to `count` from some, straight in the logarithm; never rising."""
    if not ranks:
        return torch.zeros(count, dtype=torch.float64)
    tried = torch.tensor(ranks, dtype=torch.float64)
    logs = torch.tensor(losses, dtype=torch.float64).clamp_min(1e-12).log()
    logs = logs.flip(0).cummax(0).values.flip(0)
    at = torch.arange(1, count + 1, dtype=torch.float64)
    i = torch.searchsorted(tried, at).clamp(1, max(1, len(tried) - 1))
    if len(tried) == 1:
        return logs.exp().expand(count).clone()
    part = ((at - tried[i - 1]) / (tried[i] - tried[i - 1])).clamp(0, 1)
    return (logs[i - 1] + part * (logs[i] - logs[i - 1])).exp()


def _hull(sizes: Sequence[_Size]) -> list[_Size]:
    """Return the lower convex hull of loss over cost, of sizes whose cost falls."""
    out: list[_Size] = []
    for c in sizes:
        while len(out) > 1:
            a, b = out[-2:]
            if (b.loss - a.loss) * (a.cost - c.cost) < (c.loss - a.loss) * (a.cost - b.cost):
                break
            out.pop()
        out.append(c)
    return out


@torch.no_grad()
def recalibrate(model: nn.Module, calls: Iterable[Call]) -> int:
    """Measure BatchNorm statistics anew on calls of the size as it is; returns the layers.

    Means and variances are averages over the calls, each counted once. Other norms need nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats]
    before = [(m, m.momentum) for m in norms]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for args, kwargs in calls:
            model(*args, **kwargs)
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return len(norms)
