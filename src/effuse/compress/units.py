"""Removable residual units of a network: find them, price them, listen to them, take them away.

A unit is a branch of h <- skip(h) + branch(h). Without it the skip stays and every shape with it:

- "conv": the branch of a ResnetBlock2D, its time projection included; a shortcut stays.
- "attn1", "attn2", "ff": self-attention, cross-attention and feed-forward of a transformer block,
  each with the norm and the adaLN rows that serve it alone; the attention layers of UNet2DModel
  are "attn1". In two-stream blocks "ff_context" is the feed-forward of the text.
- "block": a single-stream block of FLUX, which is one branch.
- "branch": a branch of `effuse.nn.residual.Residual`, for networks of your own.

Units are found by the type of the module around them, never by a path; `register` adds a type.
Not units: first and last layers, down- and up-samplers, embeddings of time and conditions, and the
projections around the blocks of a Transformer2DModel.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from effuse.core.contracts import Call, Where, everywhere

F = TypeVar("F", bound=Callable[[str, Any], Iterable[Any]])
Edit = Callable[[str, Tensor], Tensor | None]
"""Called with a unit's name and its branch's value; what it returns takes the value's place."""


@dataclass(frozen=True)
class Unit:
    """One removable branch.

    name: dotted name of the module that is the branch, or holds it. kind: see the module.
    params: parameters that go when this unit goes. tap: dotted name of the module whose output is
    the branch's value (in front of an adaLN gate; a pair in two-stream attention). block: dotted
    name of the module that joins the branch to its skip.
    """

    name: str
    kind: str
    params: int
    tap: str
    block: str


@dataclass(frozen=True)
class Found:
    """What a finder gives for one unit: its name, kind, tap and block, and how to take it away.

    remove: puts parameter-free modules into the place of the branch's.
    """

    name: str
    kind: str
    tap: str
    block: str
    remove: Callable[[Removal], None]


T = TypeVar("T")


class Finders(Generic[T]):
    """What is found in a network, by the types of its modules.

    A finder is called with the dotted name of a module of a registered type and the module, and
    gives what there is in it.
    """

    def __init__(self) -> None:
        self._known: dict[str, Callable[[str, Any], Iterable[T]]] = {}

    def register(self, *types: str | type) -> Callable[[F], F]:
        """Record the decorated finder for modules of these types (or names of types) or derived."""

        def put(finder: F) -> F:
            for t in types:
                self._known[t if isinstance(t, str) else t.__name__] = finder
            return finder

        return put

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, T]]:
        """Yield (name of the module, the module, what was found), in the order of the modules."""
        for name, module in model.named_modules():
            for cls in type(module).__mro__:
                if cls.__name__ in self._known:
                    for one in self._known[cls.__name__](name, module):
                        yield name, module, one
                    break


_FINDERS: Finders[Found] = Finders()
register = _FINDERS.register


class Nothing(nn.Module):
    """Stands where a branch was: zero, with as many axes as its input and one element."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return zero, or a tuple of `outputs` of them."""
        zero = hidden_states.new_zeros((1,) * hidden_states.ndim)
        return zero if self.outputs == 1 else (zero,) * self.outputs


class Pass(nn.Module):
    """Hands its first argument on, divided by `scale`."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input."""
        return hidden_states if self.scale == 1.0 else hidden_states / self.scale


class PassStreams(nn.Module):
    """Hands two streams on: text and picture, in the order in which FLUX returns them."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs."""
        return encoder_hidden_states, hidden_states


class SlicedAdaNorm(nn.Module):
    """An AdaLayerNormZero that modulates one half only: attention's three rows or the MLP's.

    Without either half no linear layer is left, and the embedding, if this block has one of its
    own, is not called. Called as AdaLayerNormZero is; missing shifts, scales and gates are zero.
    """

    def __init__(self, emb: Any, linear: nn.Linear | None, norm: nn.Module, half: str | None):
        super().__init__()
        self.emb, self.silu, self.linear, self.norm = emb, nn.SiLU(), linear, norm
        self.serves = half

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the normalized x: (B, N, C) and attention's gate, the MLP's shift, scale, gate."""
        zero = x.new_zeros(1, 1)
        if self.linear is None:
            return x, zero, zero, zero, zero
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        if self.serves == "mlp":
            return x, zero, shift, scale, gate
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], gate, zero, zero, zero


class Removal:
    """Modules put in the place of others in one model, and the way back."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._old: list[tuple[nn.Module, str, nn.Module | None]] = []

    def put(self, path: str, module: nn.Module | None) -> None:
        """Put `module` at the dotted name `path`; order and names of all others stay."""
        owner_name, _, child = path.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        old = owner._modules[child]
        self._old.append((owner, child, old))
        if module is not None and old is not None:
            module.train(old.training)
        owner._modules[child] = module

    def undo(self) -> None:
        """Put everything back as it was, last first."""
        while self._old:
            owner, child, module = self._old.pop()
            owner._modules[child] = module

    def freed(self) -> int:
        """Return by how many parameters the model is smaller."""
        return int(self.difference(Tensor.numel))

    def difference(self, measure: Callable[[Tensor], float]) -> float:
        """Return the sum of `measure` over what was there, less that over what is there now."""
        first: dict[tuple[int, str], nn.Module | None] = {}
        last: dict[tuple[int, str], nn.Module | None] = {}
        for owner, child, module in self._old:
            first.setdefault((id(owner), child), module)
            last[id(owner), child] = owner._modules[child]
        return _total(first.values(), measure) - _total(last.values(), measure)

    def forget(self) -> None:
        """Give up the way back, and with it the memory of what was taken away."""
        self._old.clear()

    def __len__(self) -> int:
        return len(self._old)


# ---- finding and removing


def found(model: nn.Module) -> list[Found]:
    """Return the units that are still there, in the order of the model's modules."""
    return [one for _, _, one in _FINDERS(model)]


def units(model: nn.Module, where: Where = everywhere) -> list[Unit]:
    """Return the removable units of `model` that `where` allows.

    `where` is asked with the unit's name and the module of that name. Parameters are counted by
    removing each unit once, so they are what its removal really frees.
    """
    out = []
    for f in found(model):
        if where(f.name, model.get_submodule(f.name)):
            removal = Removal(model)
            try:
                f.remove(removal)
                out.append(Unit(f.name, f.kind, removal.freed(), f.tap, f.block))
            finally:
                removal.undo()
    return out


def remove(model: nn.Module, names: Iterable[str]) -> Removal:
    """Take the units of these names out of `model`, in place, and return the way back.

    Raises:
        ValueError: a name that is no unit of the model; nothing has been removed.
    """
    wanted, known = list(dict.fromkeys(names)), {f.name: f for f in found(model)}
    odd = [n for n in wanted if n not in known]
    if odd:
        raise ValueError(
            f"no unit {odd[0]!r} in {type(model).__name__}: expected one of its {len(known)} "
            f"units ({', '.join(list(known)[:3])}, ...)"
        )
    removal = Removal(model)
    try:
        for name in wanted:
            known[name].remove(removal)
    except BaseException:
        removal.undo()
        raise
    return removal


def freed(model: nn.Module, names: Iterable[str]) -> int:
    """Return how many parameters go when all units of these names go.

    The sum of their `params`, and what only they had used together: the label embedding of a DiT
    block (but the first) of which both units go.
    """
    removal = remove(model, names)
    count = removal.freed()
    removal.undo()
    return count


@contextlib.contextmanager
def without(model: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """Take units out of `model` for the length of a `with` block."""
    removal = remove(model, names)
    try:
        yield model
    finally:
        removal.undo()


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, shared ones once."""
    return int(_total([model], Tensor.numel))


def _total(modules: Iterable[nn.Module | None], measure: Callable[[Tensor], float]) -> float:
    every = {id(p): p for m in modules if m is not None for p in m.parameters()}
    return sum(measure(p) for p in every.values())


# ---- listening


@contextlib.contextmanager
def branches(model: nn.Module, which: Sequence[Unit], edit: Edit) -> Iterator[None]:
    """Call `edit` with the value of each branch in `which`, at each call of the model.

    What `edit` returns takes the value's place in h <- skip(h) + value: `torch.zeros_like(value)`
    masks the unit, a kept value inherits it, `None` leaves it (to record it, say). Two-stream
    attention gives two values, that of the picture first, one call of `edit` each.
    """

    def listen(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, out: Any) -> Any:
            values = out if isinstance(out, tuple) else (out,)
            changed = [edit(name, v) for v in values]
            if all(c is None for c in changed):
                return None
            given_back = tuple(v if c is None else c for v, c in zip(values, changed, strict=True))
            return given_back if isinstance(out, tuple) else given_back[0]

        return hook

    hooks = []
    try:
        for u in which:
            hooks.append(model.get_submodule(u.tap).register_forward_hook(listen(u.name)))
        yield
    finally:
        for h in hooks:
            h.remove()


# ---- costs besides parameters


@torch.no_grad()
def macs(model: nn.Module, call: Call) -> int:
    """Return the multiply-accumulates of one call, exactly: products and attention."""
    from effuse.evaluate.cost import CountMacs

    args, kwargs = call
    with CountMacs() as count:
        model(*args, **kwargs)
    return count.macs


def unit_macs(model: nn.Module, which: Sequence[Unit], call: Call) -> list[int]:
    """Return by how many multiply-accumulates a call is cheaper without each unit."""
    whole = macs(model, call)
    out = []
    for u in which:
        with without(model, [u.name]):
            out.append(whole - macs(model, call))
    return out


@torch.no_grad()
def milliseconds(model: nn.Module, call: Call, repeats: int = 9) -> float:
    """Return the median time of a call in milliseconds, on this machine, after one warm-up."""
    args, kwargs = call
    device = next(model.parameters()).device
    spent = []
    for i in range(repeats + 1):
        begun = time.perf_counter()
        model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            spent.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(spent)


def unit_milliseconds(
    model: nn.Module, which: Sequence[Unit], call: Call, repeats: int = 9
) -> list[float]:
    """Return by how many milliseconds a call is faster without each unit; 0 where it is not.

    With and without are timed in turn, so a slow spell of the machine meets both.
    """
    out = []
    for u in which:
        gains = []
        for _ in range(repeats):
            whole = milliseconds(model, call, 1)
            with without(model, [u.name]):
                gains.append(whole - milliseconds(model, call, 1))
        out.append(max(0.0, statistics.median(gains)))
    return out


# ---- the types of diffusers


def _at(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _gone(module: Any) -> bool:
    return module is None or isinstance(module, (Nothing, Pass))


@register("ResnetBlock2D")
def _resnet(name: str, block: Any) -> Iterator[Found]:
    if _gone(block.conv2):
        return
    resamples = block.upsample is not None or block.downsample is not None

    def take(r: Removal) -> None:
        # where the block resamples, the shape must reach the sampler
        r.put(_at(name, "norm1"), Pass() if resamples else Nothing())
        if block.time_emb_proj is not None:
            r.put(_at(name, "time_emb_proj"), None)
        for child in ("conv1", "norm2", "conv2"):
            r.put(_at(name, child), Nothing())

    yield Found(name, "conv", _at(name, "conv2"), name, take)


@register("Attention", "SelfAttention")
def _residual_attention(name: str, module: Any) -> Iterator[Found]:
    if not getattr(module, "residual_connection", False):
        return
    yield Found(
        name,
        "attn1",
        _at(name, "to_out.0"),
        name,
        lambda r: r.put(name, Pass(module.rescale_output_factor)),
    )


@register("BasicTransformerBlock")
def _transformer_block(name: str, block: Any) -> Iterator[Found]:
    kind = block.norm_type

    def first(r: Removal) -> None:
        r.put(_at(name, "attn1"), Nothing())
        if kind == "ada_norm_zero":
            _slice(r, _at(name, "norm1"), "mlp", shared=name.endswith("blocks.0"))
        else:
            r.put(_at(name, "norm1"), Pass())

    def second(r: Removal) -> None:
        r.put(_at(name, "attn2"), None)
        if kind != "ada_norm_single":  # there it is the norm of the feed-forward
            r.put(_at(name, "norm2"), None)

    def third(r: Removal) -> None:
        r.put(_at(name, "ff"), Nothing())
        if kind == "ada_norm_zero":
            _slice(r, _at(name, "norm1"), "attn", shared=name.endswith("blocks.0"))
        norm = "norm2" if kind == "ada_norm_single" else "norm3"
        if getattr(block, norm, None) is not None:
            r.put(_at(name, norm), Pass())

    for child, take in (("attn1", first), ("attn2", second), ("ff", third)):
        if not _gone(getattr(block, child, None)):
            yield Found(_at(name, child), child, _at(name, child), name, take)


def _slice(r: Removal, path: str, half: str, *, shared: bool) -> None:
    """Leave of the adaLN-zero norm at `path` what serves `half`, beside what is gone already.

    shared: its embedding is used from outside: DiT's last layer takes it from block 0.
    """
    norm: Any = r.model.get_submodule(path)
    now = getattr(norm, "serves", "both")
    if now not in ("both", half):
        r.put(path, SlicedAdaNorm(norm.emb if shared else None, None, norm.norm, None))
        return
    if now == half or type(norm).__name__ != "AdaLayerNormZero":
        return
    old, d = norm.linear, norm.linear.out_features // 2
    if not isinstance(old, nn.Linear):
        raise ValueError(
            f"{path}.linear is {type(old).__name__}, which cannot be cut in two: remove layers "
            "before others are stored in fewer bytes"
        )
    rows = slice(d, None) if half == "mlp" else slice(None, d)
    with torch.device("meta"):
        linear = nn.Linear(old.in_features, d, bias=old.bias is not None)
    for key, p in old._parameters.items():
        if p is not None:
            part = nn.Parameter(p.detach()[rows].clone(), requires_grad=p.requires_grad)
            setattr(linear, key, part)
    r.put(path, SlicedAdaNorm(norm.emb, linear, norm.norm, half))


@register("JointTransformerBlock", "FluxTransformerBlock")
def _two_streams(name: str, block: Any) -> Iterator[Found]:
    def attention(r: Removal) -> None:
        r.put(_at(name, "attn"), Nothing(outputs=2))
        for norm in ("norm1", "norm1_context"):
            if type(getattr(block, norm)).__name__ == "AdaLayerNormContinuous":
                r.put(_at(name, norm), Pass())
            else:
                _slice(r, _at(name, norm), "mlp", shared=True)

    def feed(child: str, own: str, ada: str) -> Callable[[Removal], None]:
        def take(r: Removal) -> None:
            r.put(_at(name, child), Nothing())
            r.put(_at(name, own), Pass())
            _slice(r, _at(name, ada), "attn", shared=True)

        return take

    made = [
        ("attn", "attn1", attention),
        ("ff", "ff", feed("ff", "norm2", "norm1")),
        ("ff_context", "ff_context", feed("ff_context", "norm2_context", "norm1_context")),
    ]
    for child, kind, take in made:
        if not _gone(getattr(block, child, None)):
            yield Found(_at(name, child), kind, _at(name, child), name, take)


@register("FluxSingleTransformerBlock")
def _one_stream(name: str, block: Any) -> Iterator[Found]:
    yield Found(name, "block", _at(name, "proj_out"), name, lambda r: r.put(name, PassStreams()))


@register("Residual")
def _branches(name: str, layer: Any) -> Iterator[Found]:
    def take(path: str) -> Callable[[Removal], None]:
        return lambda r: r.put(path, Nothing())

    for i, branch in enumerate(layer.branches):
        if not _gone(branch):
            path = _at(name, f"branches.{i}")
            yield Found(path, "branch", path, name, take(path))
