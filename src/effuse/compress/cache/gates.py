"""Gates: what stands in for the forward of a module and either computes or inherits.

`Gate` keeps a whole output, `Branch` and `Delta` what is added to a trunk, `Silent` nothing.
"""

from __future__ import annotations

import functools
import inspect
import threading
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
        weight = now.weight(self.part)
        if weight is not None:
            return self.blend(now, weight, *args, **kwargs)
        with now.cache.accounts.charge(self.part, fresh):
            if fresh:
                return self.compute(now, *args, **kwargs)
            return self.inherit(now, *args, **kwargs)

    def keep(self, now: Now, value: Any) -> None:
        """Keep `value`, unless a cache below inherited in this very module.

        What came out is then no value of this part (of a row that inherits together all but one
        block adds nothing), so the part computes at the next occasion.
        """
        inner = getattr(self.before, "__self__", None)
        below = inner.cache.now() if isinstance(inner, Gate) and inner.cache else None
        if below is not None and inner is not None and below.fresh.get(inner.part) is False:
            now.forget(self.part)
        else:
            now.keep(self.part, value)

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the gate stands in for."""
        return self.before or functools.partial(type(self.module).forward, self.module)

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original and keep what later steps inherit: here the whole output."""
        out = self.original(*args, **kwargs)
        self.keep(now, copied(out))
        return out

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Give an output from what was kept."""
        return copied(now.kept(self.part))

    def blend(self, now: Now, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give weight * (computed) + (1 - weight) * (kept), which has a gradient in the weight."""
        return now.blend(self.part, self.original(*args, **kwargs), weight)

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
        self.slot = name

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original and note the shape of what it gives."""
        out = self.original(*args, **kwargs)
        now.stream.shapes[self.slot] = mapped(out, lambda a: (a.shape, a.dtype, a.device))
        return out

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Give zeros."""
        noted = now.stream.shapes[self.slot]
        return mapped(noted, lambda a: torch.zeros(a[0], dtype=a[1], device=a[2]), _is_shape)

    def blend(self, now: Now, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the original: the gate that keeps the value blends."""
        return self.original(*args, **kwargs)


def _is_shape(a: Any) -> bool:
    return isinstance(a, tuple) and len(a) == 3 and isinstance(a[0], torch.Size)


# ---- gates that keep a branch


class Branch(Gate):
    """A module with out = join(in, branch), where its child `last` gives the branch.

    join: (module, in, branch, return_dict) -> out; it recomputes the skip.
    """

    def __init__(self, part: str, module: nn.Module, last: str, join: Callable[..., Any]):
        super().__init__(part, module)
        self.last, self.join = last, join

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original, listening to the last child."""
        out, branch = self._both(args, kwargs)
        self.keep(now, None if branch is None else branch.detach())
        return out

    def blend(self, now: Now, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Join the blended branch with the fresh skip."""
        out, branch = self._both(args, kwargs)
        if branch is None:  # a cache below inherited here
            return out
        x = args[0] if args else kwargs["hidden_states"]
        return self.join(self.module, x, now.blend(self.part, branch, weight), kwargs)

    def _both(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        me, heard = threading.get_ident(), []

        def listen(child: nn.Module, given: Any, out: Tensor) -> None:
            if threading.get_ident() == me:
                heard.append(out)

        hook = self.module.get_submodule(self.last).register_forward_hook(listen)
        try:
            out = self.original(*args, **kwargs)
        finally:
            hook.remove()
        return out, heard[-1] if heard else None

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Join the kept branch with the fresh skip."""
        x = args[0] if args else kwargs["hidden_states"]
        return self.join(self.module, x, now.kept(self.part), kwargs)


def join_resnet(module: Any, x: Tensor, branch: Tensor, given: Any) -> Tensor:
    """Return (shortcut(x) + branch) / scale, of a ResnetBlock2D."""
    if module.upsample is not None:
        x = module.upsample(x.contiguous() if x.shape[0] >= 64 else x)
    elif module.downsample is not None:
        x = module.downsample(x)
    if module.conv_shortcut is not None:
        x = module.conv_shortcut(x)
    return (x + branch) / module.output_scale_factor


def join_attention(module: Any, x: Tensor, branch: Tensor, given: Any) -> Tensor:
    """Return (x + branch) / factor, of an Attention with a residual connection."""
    return (_as_map(branch, x) + x) / module.rescale_output_factor


def join_transformer(module: nn.Module, x: Tensor, branch: Tensor, given: Any) -> Any:
    """Return x + branch as a Transformer2DModel gives it."""
    out = _as_map(branch, x) + x
    if not given.get("return_dict", True):
        return (out,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=out)


def _as_map(branch: Tensor, x: Tensor) -> Tensor:
    """Turn (B, H W, C) into the (B, C, H, W) of `x`, as the module does after its last layer."""
    return branch if branch.ndim == x.ndim else branch.transpose(-1, -2).reshape(x.shape)


class Delta(Gate):
    """One of a row of transformer blocks that inherit together what the row adds to its input.

    flow: names of the arguments that flow through, in the order in which the block returns them.
    first: notes the input; last: keeps out - in. Blocks between hand their input on.
    """

    def __init__(
        self, part: str, module: nn.Module, flow: tuple[str, ...], first: bool, last: bool
    ):
        super().__init__(part, module)
        self.flow, self.first, self.last = flow, first, last
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        named = dict(zip(self.names, args, strict=False)) | kwargs
        return tuple(named.get(n) for n in self.flow)

    def compute(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Run the original; the ends of the row note what went in and what came out."""
        if self.first:
            now.held[self.part] = self._given(args, kwargs)
        out = self.original(*args, **kwargs)
        if self.last:
            added = self._added(now.held.pop(self.part), out)
            self.keep(now, mapped(added, lambda a: a.detach()))
        return out

    def blend(self, now: Now, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the original; the last of the row adds what is blended to what the row was given."""
        if self.first:
            now.held[self.part] = self._given(args, kwargs)
        out = self.original(*args, **kwargs)
        if not self.last:
            return out
        start = now.held.pop(self.part)
        mixed = now.blend(self.part, self._added(start, out), weight)
        joined = tuple(None if d is None else a + d for a, d in zip(start, mixed, strict=True))
        return joined if len(joined) > 1 else joined[0]

    @staticmethod
    def _added(start: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
        came = out if isinstance(out, tuple) else (out,)
        return tuple(
            None if a is None or b is None else b - a for a, b in zip(start, came, strict=True)
        )

    def inherit(self, now: Now, *args: Any, **kwargs: Any) -> Any:
        """Hand the input on; the last of the row adds what was kept."""
        given = self._given(args, kwargs)
        if self.last:
            kept = now.kept(self.part)
            given = tuple(None if d is None else a + d for a, d in zip(given, kept, strict=True))
        return given if len(given) > 1 else given[0]


class Watch(Gate):
    """Shows the rule what a block adds to its input, and always computes.

    part: whose decision it is for. Where the shapes differ, what the block gives is shown.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `Gate.__call__`."""
        out = self.original(*args, **kwargs)
        now = self.cache.now() if self.cache is not None else None
        if now is not None:
            came = out[-1] if isinstance(out, tuple) else out
            x = first_tensor(args, kwargs)
            now.watch(self.part, came - x if x is not None and x.shape == came.shape else came)
        return out


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


def copied(value: Any) -> Any:
    """Return `value` cut from the graph, with its own memory: FreeU and adapters write into it."""
    return mapped(value, lambda a: a.detach().clone())


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors within `value`."""
    total = 0

    def add(a: Tensor) -> Tensor:
        nonlocal total
        total += a.numel() * a.element_size()
        return a

    mapped(value, add)
    return total
