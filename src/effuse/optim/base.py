"""What every optimizer here stands on: many tensors a call, any dtype, torch's state format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .sharded import local, sharded

SMALL = 1 << 16
"""Elements up to which tensors on the CPU are updated together: larger ones fill the cache."""
STACKED = 1 << 12
"""Elements up to which tensors of one shape on the CPU are worked on as one, with an axis more.

Sixty of 256 elements: 0.34 against 0.58 ms a step of AdamP; above this, copying costs more.
"""
STACK = 1 << 18
"""Elements of such a stack at the most, so that it stays in the cache."""


@dataclass
class Batch:
    """Tensors that are updated in one go, all real, of one dtype and device.

    params, grads: the weights (or a copy of them) and what to walk against; kept: for each kept
    name, as many tensors; steps: how many steps each has made, this one included; owners: the
    parameters each stands for. Where `stacked`, a tensor has a first axis over its owners;
    otherwise each has one owner and its shape.
    """

    params: list[Tensor]
    grads: list[Tensor]
    kept: dict[str, list[Tensor]]
    steps: list[int]
    owners: list[list[Tensor]]
    stacked: bool = False

    def corrections(self, beta: float) -> list[float]:
        """Return 1 - beta^t for each parameter."""
        known = {t: 1 - beta**t for t in set(self.steps)}
        return [known[t] for t in self.steps]

    def split(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, its part) of a tensor for each of `params`."""
        for owners, x in zip(self.owners, tensors, strict=True):
            yield from zip(owners, x.unbind() if self.stacked else [x], strict=True)


@dataclass
class Stack:
    """Small tensors of one shape whose state lies together: what a parameter's state has is a row.

    kept: (K, *shape) each; count: (K,) steps, all equal; held: (state, name, row) as it was put.
    """

    owners: list[Tensor]
    kept: dict[str, Tensor]
    count: Tensor
    held: list[tuple[dict[str, Any], str, Tensor]]

    @classmethod
    def of(cls, owners: list[Tensor], states: list[dict[str, Any]], names: Sequence[str]) -> Stack:
        """Move the state of the owners into one stack."""
        whole = {name: torch.stack([state[name] for state in states]) for name in names}
        count = torch.stack([state["step"] for state in states])
        held = []
        for name, x in (*whole.items(), ("step", count)):
            for state, row in zip(states, x.unbind(), strict=True):
                state[name] = row
                held.append((state, name, row))
        return cls(owners, whole, count, held)


@dataclass
class Plan:
    """Which parameters of a group step how: in stacks, or in lists of their own tensors.

    ids: of the parameters with gradients; states: theirs.
    """

    foreach: bool | None
    ids: list[int]
    states: list[dict[str, Any]]
    lists: list[list[Tensor]] = field(default_factory=list)
    stacks: list[list[Stack]] = field(default_factory=list)

    def fits(self, foreach: bool | None, live: list[Tensor], states: list[dict[str, Any]]) -> bool:
        """Return whether it still holds: nobody put other state in, nor other parameters."""
        return (
            self.foreach == foreach
            and self.ids == [id(p) for p in live]
            and all(a is b for a, b in zip(self.states, states, strict=True))
            and all(
                state.get(name) is row
                for part in self.stacks
                for stack in part
                for state, name, row in stack.held
            )
        )


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


def rowwise(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return a number for each row of `like`, which broadcasts over it."""
    out = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return out.view(-1, *[1] * (like.ndim - 1))


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


def piled(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one shape with a new first axis; a view where there is one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


class Together(Optimizer):
    """An optimizer that updates lists of tensors by one formula, `update`.

    foreach: True updates all tensors of a group in one call, False one at a time; None lets the
    measured rule decide: all together on an accelerator, on the CPU those of up to `SMALL`
    elements. On the CPU those of one shape and up to `STACKED` elements are worked on as one,
    unless False. All give the same numbers, to rounding. State is zeros shaped as the parameter;
    parameters in half precision get float32 state and arithmetic. A complex parameter is two real
    ones. Of a DTensor (`fully_shard`) each process steps its piece; sums go over all of them.

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
        self._plans: dict[int, Plan] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was copied or unpickled."""
        super().__setstate__(state)
        self._plans = {}

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
        for number, group in enumerate(self.param_groups):
            plan = self._plan(number, group)
            for owners in plan.lists:
                self._step(group, owners)
            for stacks in plan.stacks:
                self._step_stacked(group, stacks)
        return loss

    def before(self) -> None:
        """Look at all gradients before the first update; nothing by default."""

    def stackable(self, state: Mapping[str, Any]) -> bool:
        """Return whether a parameter with this state can step in a stack by now."""
        return True

    def _plan(self, number: int, group: dict[str, Any]) -> Plan:
        """Return who steps with whom: as the last time, where nothing has changed since."""
        live = [p for p in group["params"] if p.grad is not None]
        for p in live:
            if p.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} needs dense gradients, got a sparse one of shape "
                    f"{tuple(p.shape)}: make the embedding with sparse=False"
                )
        states, foreach = [self.state[p] for p in live], group["foreach"]
        last = self._plans.pop(number, None)
        if last is not None and last.fits(foreach, live, states):
            self._plans[number] = last
            return last
        plan = Plan(foreach, [id(p) for p in live], states)
        lists: dict[Any, list[Tensor]] = {}
        alike: dict[Any, list[Tensor]] = {}
        for place, (p, state) in enumerate(zip(live, states, strict=True)):
            self._begin(p, state)
            small = p.is_cpu and p.numel() <= STACKED and not sharded(p)
            if small and foreach is not False and self.stackable(state):
                kinds = tuple(state[name].dtype for name in self.kept)
                same = p.dtype, p.shape, float(state["step"]), kinds
                alike.setdefault(same, []).append(p)
                continue
            together = not p.is_cpu or p.numel() <= SMALL if foreach is None else foreach
            key = p.device, p.dtype, sharded(p), None if together else place
            lists.setdefault(key, []).append(p)
        plan.lists = list(lists.values())
        stacks: dict[Any, list[Stack]] = {}
        for (dtype, *_, kinds), owners in alike.items():
            most = max(1, STACK // max(1, owners[0].numel()))
            for i in range(0, len(owners), most):
                part = owners[i : i + most]
                made = Stack.of(part, [self.state[p] for p in part], self.kept)
                stacks.setdefault((dtype, kinds), []).append(made)
        plan.stacks = list(stacks.values())
        if all(self.stackable(state) for state in states):
            self._plans[number] = plan
        return plan

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        low = p.dtype in (torch.float16, torch.bfloat16)
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in self.kept:
            if name not in state:
                state[name] = torch.zeros_like(
                    p,
                    dtype=torch.float32 if low else None,
                    memory_format=torch.preserve_format,
                )

    def _step(self, group: dict[str, Any], owners: list[Tensor]) -> None:
        states = [self.state[p] for p in owners]
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, each(1.0, counts))
        kept = {name: [local(state[name]) for state in states] for name in self.kept}
        grads = [local(p.grad) for p in owners if p.grad is not None]
        pieces = [local(p) for p in owners]
        batch = Batch(pieces, grads, kept, [int(c) for c in counts], [[p] for p in owners])
        self._update(group, batch)

    def _step_stacked(self, group: dict[str, Any], stacks: list[Stack]) -> None:
        for stack in stacks:
            stack.count.add_(1)
        batch = Batch(
            [piled(stack.owners) for stack in stacks],
            [piled([p.grad for p in stack.owners if p.grad is not None]) for stack in stacks],
            {name: [stack.kept[name] for stack in stacks] for name in self.kept},
            [int(stack.count[0]) for stack in stacks],
            [stack.owners for stack in stacks],
            stacked=True,
        )
        self._update(group, batch)
        for stack, whole in zip(stacks, batch.params, strict=True):
            if len(stack.owners) > 1:
                torch._foreach_copy_(stack.owners, list(whole.unbind()))

    def _update(self, group: dict[str, Any], batch: Batch) -> None:
        """Update real tensors of enough precision that stand for those of the batch."""
        given = batch.params
        low = given[0].dtype in (torch.float16, torch.bfloat16)
        params = reals([p.float() for p in given] if low else given)
        grads = reals([g.float() for g in batch.grads] if low else batch.grads)
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        kept = {name: reals(tensors) for name, tensors in batch.kept.items()}
        self.update(group, replace(batch, params=params, grads=grads, kept=kept))
        if low:
            torch._foreach_copy_(given, params)

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
