"""Criteria: what each removable unit is worth. The paper's, and those it is compared with.

Each gives one score per unit, higher is worth more, at least 0. They differ in what they look at:
outputs, weights, gradients, features, pictures, or nothing.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import not_finite, to_device
from effuse.compress.units import Removal, Unit, branches, found, without
from effuse.core.contracts import Call

Batch = Mapping[str, Any]
"""`call`, the network's arguments, and perhaps `target`, what it should answer."""


class Criterion(ABC):
    """Scores units. A frozen dataclass."""

    @abstractmethod
    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """Return one score per unit; `model` is in evaluation mode and left as it was."""


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode for the length of a `with` block, then each module back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def answers(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return what the network answers to each batch.

    Raises:
        FloatingPointError: it is not finite; names the call and its bad argument or first layer.
    """
    out = []
    for i, batch in enumerate(batches):
        out.append(answer_to(model, batch))
        if not out[-1].isfinite().all():
            raise not_finite(model, call_of(model, batch), i)
    return out


def call_of(model: nn.Module, batch: Batch) -> Call:
    """Return the call of a batch on the model's device."""
    first = next(model.parameters(), None)
    return batch["call"] if first is None else to_device(batch["call"], first.device)


def answer_to(model: nn.Module, batch: Batch) -> Tensor:
    """Return what the network answers to one batch, on the model's device."""
    args, kwargs = call_of(model, batch)
    out = model(*args, **kwargs)
    if not isinstance(out, Tensor):
        out = out.sample if hasattr(out, "sample") else out[0]
    return out


def joint_error(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    whole: Sequence[Tensor] | None = None,
) -> float:
    """Return E||eps(R) - eps||^2, the mean squared change of the answer without units `names`."""
    whole = answers(model, batches) if whole is None else whole
    with torch.no_grad(), without(model, names):
        less = [answer_to(model, b) for b in batches]
    changes = [(a.double() - b.double()).square().mean() for a, b in zip(less, whole, strict=True)]
    error = _mean(changes)
    if not math.isfinite(error):
        raise FloatingPointError(
            f"without {', '.join(names[:3])} the network's answer is not finite: leave such a "
            "unit out with `where`"
        )
    return error


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack([v.cpu() for v in values]).mean())


def _rise(value: float) -> float:
    """Return at least 0; what is not a number stays so, to be noticed."""
    return 0.0 if value < 0 else value


@dataclass(frozen=True)
class OutputError(Criterion):
    """The paper's: s(l) = E||eps without l - eps||^2, with the same inputs and no dropout."""

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`; one forward a unit and batch, and one more a batch."""
        whole = answers(model, batches)
        return [joint_error(model, [u.name], batches, whole) for u in units]


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Sum of |w| over the unit's parameters; looks at no data."""

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`."""
        known = {f.name: f for f in found(model)}
        out = []
        for u in units:
            removal = Removal(model)
            known[u.name].remove(removal)
            mass = removal.difference(lambda p: float(p.detach().double().abs().sum()))
            removal.undo()
            out.append(_rise(mass))
        return out


@dataclass(frozen=True)
class Taylor(Criterion):
    """First-order change of the task loss, E|dL/dm|, m = 1 scales the branch; needs targets."""

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`; one forward and backward a batch."""
        _need_targets(self, batches)
        total = torch.zeros(len(units), dtype=torch.float64)
        at = {u.name: i for i, u in enumerate(units)}
        for batch in batches:
            masks = torch.ones(len(units), requires_grad=True)

            def scale(name: str, value: Tensor, masks: Tensor = masks) -> Tensor:
                return value * masks[at[name]].to(value)

            with torch.enable_grad(), branches(model, units, scale):
                loss = task_loss(answer_to(model, batch), batch)
            (grad,) = torch.autograd.grad(loss, masks)
            total += grad.double().abs()
        return (total / len(batches)).tolist()


@dataclass(frozen=True)
class TaskLoss(Criterion):
    """How much the task loss rises without the unit, at least 0. Needs targets."""

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`."""
        _need_targets(self, batches)
        whole = mean_task_loss(model, batches)
        out = []
        for u in units:
            with without(model, [u.name]):
                out.append(_rise(mean_task_loss(model, batches) - whole))
        return out


@dataclass(frozen=True)
class BlockInfluence(Criterion):
    """1 - cos(out, out without the unit) of the block around it, its input the same (ShortGPT)."""

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`."""
        total = [0.0] * len(units)
        for batch in batches:
            heard = _hear(model, {u.block for u in units}, batch)
            for i, u in enumerate(units):
                args, kwargs, out = heard[u.block]
                with torch.no_grad(), without(model, [u.name]):
                    less = model.get_submodule(u.block)(*args, **kwargs)
                total[i] += _rise(1 - _cosine(out, less)) / len(batches)
        return total


@torch.no_grad()
def _hear(model: nn.Module, names: set[str], batch: Batch) -> dict[str, Any]:
    heard: dict[str, Any] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            heard[name] = (args, kwargs, out)

        return hook

    hooks = [
        model.get_submodule(n).register_forward_hook(listen(n), with_kwargs=True) for n in names
    ]
    try:
        answer_to(model, batch)
    finally:
        for h in hooks:
            h.remove()
    return heard


def _cosine(a: Any, b: Any) -> float:
    a, b = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor)]
    a = torch.cat([x.double().flatten(1) for x, _ in pairs], 1)
    b = torch.cat([y.double().flatten(1) for _, y in pairs], 1)
    return float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean())


@dataclass(frozen=True)
class TextScoreDrop(Criterion):
    """How much the score of sampled pictures falls without the unit, at least 0.

    scorer: called with the network as it stands; samples a few pictures with it and returns their
    mean text-image score. Cannot be written into a recipe file: a saved pipeline needs `Given`.
    """

    scorer: Callable[[nn.Module], float]

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`; one sampling a unit."""
        whole = float(self.scorer(model))
        out = []
        for u in units:
            with without(model, [u.name]):
                out.append(_rise(whole - float(self.scorer(model))))
        return out


@dataclass(frozen=True)
class Random(Criterion):
    """A number in [0, 1) for each unit; the floor of every comparison."""

    seed: int = 0

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`."""
        rng = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(units), generator=rng, dtype=torch.float64).tolist()


@dataclass(frozen=True)
class Given(Criterion):
    """Scores found elsewhere, by the name of the unit."""

    values: Mapping[str, float] = field(default_factory=dict)

    def scores(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> list[float]:
        """See `Criterion.scores`."""
        missing = [u.name for u in units if u.name not in self.values]
        if missing:
            raise ValueError(f"no score for {missing[0]!r}: expected one for each of the units")
        return [float(self.values[u.name]) for u in units]


def task_loss(out: Tensor, batch: Batch) -> Tensor:
    """Return ||target - eps||^2, the mean over elements; a learned variance is left out."""
    target = batch["target"].to(out)
    return (out[:, : target.shape[1]] - target).square().mean()


@torch.no_grad()
def mean_task_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean task loss over batches with targets."""
    return _mean([task_loss(answer_to(model, b), b) for b in batches])


def batch_of(call: Call | Batch) -> Batch:
    """Return a batch of a bare call, a batch as it is."""
    return call if isinstance(call, Mapping) else {"call": call}


def _need_targets(criterion: Criterion, batches: Sequence[Batch]) -> None:
    if any(b.get("target") is None for b in batches):
        raise ValueError(
            f"{type(criterion).__name__} needs what the network should answer: observe batches "
            'with a "target" (`effuse.compress.calibrate.uniform_calls`), not bare calls'
        )
