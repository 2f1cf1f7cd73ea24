"""What every optimizer here stands on: many tensors a call, any dtype, torch's state format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALL = 1 << 16
"""Elements up to which tensors on the CPU are updated together: larger ones fill the cache."""


@dataclass
class Batch:
    """Tensors that are updated in one go, all real, of one dtype and device.

    params, grads: the weights (or a float32 copy of weights in half precision) and what to walk
    against; kept: for each kept name, a tensor a parameter; steps: how many steps each has made,
    this one included; owners: the parameters themselves.
    """

    params: list[Tensor]
    grads: list[Tensor]
    kept: dict[str, list[Tensor]]
    steps: list[int]
    owners: list[Tensor]

    def corrections(self, beta: float) -> list[float]:
        """Return 1 - beta^t for each parameter."""
        known = {t: 1 - beta**t for t in set(self.steps)}
        return [known[t] for t in self.steps]


def plain(numbers: list[float]) -> float | list[float]:
    """Return one number where all are the same: an operation on a list of numbers costs more."""
    return numbers[0] if len(set(numbers)) == 1 else numbers


def each(numbers: float | list[float], like: list[Tensor]) -> Any:
    """Return what a foreach operation takes fastest as a number for each of `like`.

    On the CPU a tensor of no axes, repeated, as torch wraps a number anew for every tensor: 54
    against 173 microseconds for 120 small tensors. Elsewhere the number, which a kernel takes.
    """
    if isinstance(numbers, list) or like[0].device.type != "cpu":
        return numbers
    return [torch.tensor(numbers, dtype=like[0].dtype)] * len(like)


def walk(params: list[Tensor], updates: list[Tensor], sizes: list[float]) -> None:
    """Subtract sizes times updates, in place."""
    size = plain(sizes)
    if isinstance(size, float):
        torch._foreach_sub_(params, updates, alpha=size)
    else:
        torch._foreach_sub_(params, list(torch._foreach_mul(updates, size)))


def in_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def real(x: Tensor) -> Tensor:
    """Return a view in real numbers: a complex tensor gets a last axis of two."""
    return torch.view_as_real(x) if x.is_complex() else x


def reals(tensors: list[Tensor]) -> list[Tensor]:
    """Return views in real numbers of tensors of one dtype."""
    return [real(x) for x in tensors] if tensors[0].is_complex() else tensors


class Together(Optimizer):
    """An optimizer that updates lists of tensors by one formula, `update`.

    foreach: True updates all tensors of a group in one call, False one at a time; None lets the
    measured rule decide: all together on an accelerator, on the CPU those of up to `SMALL`
    elements. All give the same numbers. State is zeros shaped as the parameter; parameters in half
    precision get float32 state and arithmetic. A complex parameter is two real ones.

    Raises:
        ValueError: `capturable=True`; a sparse gradient; options out of range.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    """Names of the state tensors."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        if defaults.pop("capturable", False):
            raise ValueError(
                f"{type(self).__name__} is not capturable in a CUDA graph: it reads numbers off "
                "the device while it steps; expected capturable=False"
            )
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Change `batch.params` and `batch.kept` in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step and return what the closure, called once with gradients on, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before()
        for group in self.param_groups:
            for owners in self._split(group):
                self._step(group, owners)
        return loss

    def before(self) -> None:
        """Look at all gradients before the first update; nothing by default."""

    def _split(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Return the parameters that have gradients, in lists to update together."""
        lists: dict[Any, list[Tensor]] = {}
        foreach = group["foreach"]
        for number, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} needs dense gradients, got a sparse one of shape "
                    f"{tuple(p.shape)}: make the embedding with sparse=False"
                )
            together = foreach
            if together is None:
                together = not p.is_cpu or p.numel() <= SMALL
            lists.setdefault((p.device, p.dtype, None if together else number), []).append(p)
        return list(lists.values())

    def _step(self, group: dict[str, Any], owners: list[Tensor]) -> None:
        low = owners[0].dtype in (torch.float16, torch.bfloat16)
        states = [self.state[p] for p in owners]
        for p, state in zip(owners, states, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
            for name in self.kept:
                if name not in state:
                    state[name] = torch.zeros_like(
                        p,
                        dtype=torch.float32 if low else None,
                        memory_format=torch.preserve_format,
                    )
        params = reals([p.float() for p in owners] if low else owners)
        grads = reals([p.grad.float() if low else p.grad for p in owners if p.grad is not None])
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, each(1.0, counts))
        kept = {name: reals([state[name] for state in states]) for name in self.kept}
        steps = [int(count) for count in counts]
        self.update(group, Batch(params, grads, kept, steps, owners))
        if low:
            torch._foreach_copy_(owners, params)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load, and keep the dtype of what was saved, so that resuming is exact."""
        super().load_state_dict(dict(state_dict))
        owners = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, index in zip(owners, saved, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step" and value.dtype != p.dtype:
                    self.state[p][name] = value.detach().to(p.device, copy=True)


def moments(batch: Batch, betas: tuple[float, float], grads: list[Tensor] | None = None) -> None:
    """Move exp_avg by (1 - b1)(g - m) and exp_avg_sq to b2 v + (1 - b2) g^2, in place."""
    g = batch.grads if grads is None else grads
    torch._foreach_lerp_(batch.kept["exp_avg"], g, 1 - betas[0])
    torch._foreach_mul_(batch.kept["exp_avg_sq"], each(betas[1], g))
    torch._foreach_addcmul_(batch.kept["exp_avg_sq"], g, g, 1 - betas[1])


def adam(
    batch: Batch, lr: float, betas: tuple[float, float], eps: float
) -> tuple[list[Tensor], list[float]]:
    """Return roots and sizes such that Adam's step of a numerator m is - sizes m / roots.

    lr / (1 - b1^t) m / (sqrt(v) / c + eps) = lr c / (1 - b1^t) m / (sqrt(v) + eps c),
    c = sqrt(1 - b2^t): one operation less.
    """
    roots = list(torch._foreach_sqrt(batch.kept["exp_avg_sq"]))
    corrections = [math.sqrt(c) for c in batch.corrections(betas[1])]
    torch._foreach_add_(roots, each(plain([eps * c for c in corrections]), roots))
    first = batch.corrections(betas[0])
    return roots, [lr * c / m for c, m in zip(corrections, first, strict=True)]


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError where an option of the Adam family is out of range."""
    in_range("lr", lr, 0)
    in_range("betas[0]", betas[0], 0, 1)
    in_range("betas[1]", betas[1], 0, 1)
    in_range("eps", eps, 0)
    in_range("weight_decay", weight_decay, 0)
