"""Gates: what stands in for the forward of a module and either computes or inherits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import Cached, Now


class Gate:
    """Stands in for the forward of one module.

    part: the name under which decision and value are kept. Several gates may share a part: they
    decide alike, and one of them keeps the value.
    """

    def __init__(self, part: str, module: nn.Module):
        self.part, self.module = part, module
        self.cache: Cached | None = None
        self.before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of `module.forward`."""
        now = self.cache.now() if self.cache is not None else None
        if now is None:
            return self.original(*args, **kwargs)
        fresh = now.computes(self.part, first_tensor(args, kwargs))
        with self.cache.counted(self.part, fresh):  # type: ignore[union-attr]
            if fresh:
                return self.compute(now, *args, **kwargs)
            return self.inherit(now, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the gate stands in for."""
        return self.before or functools.partial(type(self.module).forward, self.module)

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original and keep what later steps inherit: here the whole output."""
        out = self.original(*args, **kwargs)
        now.keep(self.part, detached(out))
        return out

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Give an output from what was kept."""
        return now.kept(self.part)

    def put(self, cache: Cached) -> None:
        """Stand in for the module's forward from now on."""
        self.cache, self.before = cache, vars(self.module).get("forward")
        self.module.forward = self.__call__

    def mine(self) -> bool:
        """Say whether the module's forward is still this gate."""
        return getattr(vars(self.module).get("forward"), "__self__", None) is self

    def take_off(self) -> None:
        """Give the module its forward back."""
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before


class Silent(Gate):
    """A module whose output nobody needs when its part inherits: gives zeros of the right shapes.

    It keeps shapes only; another gate of the part keeps the value.
    """

    def __init__(self, part: str, module: nn.Module, name: str):
        super().__init__(part, module)
        self.slot = f"{part}: shape of {name}"

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original and note the shape of what it gives."""
        out = self.original(*args, **kwargs)
        now.stream.store[self.slot] = mapped(out, lambda a: (a.shape, a.dtype, a.device))
        return out

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Give zeros."""
        noted = now.stream.store[self.slot]
        return mapped(noted, lambda a: torch.zeros(a[0], dtype=a[1], device=a[2]), _is_shape)


def _is_shape(a: Any) -> bool:
    return isinstance(a, tuple) and len(a) == 3 and isinstance(a[0], torch.Size)


# ---- nested values


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor argument: the features that flow in."""
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def mapped(
    value: Any, change: Callable[[Any], Any], leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Return `value` with `change` applied to its tensors (or leaves), through tuples and dicts."""
    is_leaf = leaf or (lambda a: isinstance(a, Tensor))
    if is_leaf(value):
        return change(value)
    if isinstance(value, Mapping):  # diffusers' outputs are ordered mappings too
        return type(value)(**{k: mapped(v, change, leaf) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(v, change, leaf) for v in value)
    return value


def paired(one: Any, two: Any, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return `one` with `change` applied to its tensors and those at the same place in `two`."""
    others: list[Tensor] = []
    mapped(two, lambda a: others.append(a))
    rest = iter(others)
    return mapped(one, lambda a: change(a, next(rest)))


def detached(value: Any) -> Any:
    """Return `value` cut from the graph."""
    return mapped(value, lambda a: a.detach())


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors within `value`."""
    total = 0

    def add(a: Tensor) -> Tensor:
        nonlocal total
        total += a.numel() * a.element_size()
        return a

    mapped(value, add)
    return total
