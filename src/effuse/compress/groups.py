"""Dependency groups of a network: heads, neurons and channels that go together, sliced or masked.

A group is one hidden axis and everything that must be cut with it. Its members are told apart by
position: member i of `size` owns entries offset + i span ... offset + (i + 1) span along `dim` of
each slot.

- "heads": of diffusers' attention. Rows of q, k and v (of both streams in joint attention), columns
  of the output layers; norms of queries and keys within a head are shared by all and stay.
- "neurons": hidden units of a FeedForward, of Linear-activation-Linear in a Sequential, and of the
  MLP of a single-stream block of FLUX. Rows of value and gate of a GEGLU or SwiGLU move together.
- "channels": between the two convolutions of a ResnetBlock2D, by whole groups of its GroupNorm,
  whose statistics would change otherwise.

The law: `narrow` equals `masked` by zeros and ones, to rounding. What a branch adds when it has
lost all its members is the bias of its output layer, and that stays: a branch narrowed to nothing
becomes `Bias`.

Groups are found by the type of a module, never by a path; `register` adds a type. Layers that are
not plain (quantized, fused, adapted, tied to others) are no slots, and a group that needs one is
not there; nor is attention with fewer heads for keys than for queries or with norms across heads.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.swap import Changes
from effuse.compress.units import Finders, Nothing, Pass, Removal, macs, parameters
from effuse.core.contracts import Call, Where, everywhere


@dataclass(frozen=True)
class Slot:
    """Where a group's members stand in one tensor.

    module: dotted name. param: "weight", "bias" or a buffer's name. dim: the axis cut. offset: of
    the first member along it.
    """

    module: str
    param: str
    dim: int
    offset: int = 0


@dataclass(frozen=True)
class Book:
    """A number that a module keeps beside its tensors: falls by `each` for every member that goes.

    module: dotted name. attribute: of the module. index: in it, where it is a list.
    """

    module: str
    attribute: str
    each: int
    index: int | None = None


@dataclass(frozen=True)
class Group:
    """Members that can go one by one.

    name: dotted name of the branch. kind: "heads", "neurons", "channels". size: members. span:
    entries of each. slots: where. books: numbers to keep right.
    """

    name: str
    kind: str
    size: int
    span: int
    slots: tuple[Slot, ...]
    books: tuple[Book, ...] = ()

    @property
    def taps(self) -> tuple[Slot, ...]:
        """Slots of layers that take the members in: their input holds the members' activations."""
        return tuple(s for s in self.slots if s.param == "weight" and s.dim == 1)


@dataclass(frozen=True)
class Found:
    """What a finder gives: a group, and how to take the branch away once it is empty.

    empty: puts modules in the place of the branch's; None where layers of width zero will do.
    """

    group: Group
    empty: Callable[[Removal], None] | None = None


_FINDERS: Finders[Found] = Finders()
register = _FINDERS.register


class Bias(nn.Module):
    """Stands where a branch was that has lost all its members: what its output layer still adds.

    Args:
        biases: (C,) one for each output of the branch, None for nothing; two in joint attention.
        skip: add the first input, as attention with a residual connection of its own does.
        scale: divide the sum by this.
    """

    def __init__(self, biases: Sequence[Tensor | None], skip: bool = False, scale: float = 1.0):
        super().__init__()
        self.biases = nn.ParameterList(
            nn.Parameter(b.detach().clone(), requires_grad=b.requires_grad)
            for b in biases
            if b is not None
        )
        self.there = tuple(b is not None for b in biases)
        self.skip, self.scale = skip, scale

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the biases with as many axes as the input, (B, N, C) or (B, C, H, W)."""
        left, axes = iter(self.biases), hidden_states.ndim
        out = []
        for there in self.there:
            if not there:
                out.append(hidden_states.new_zeros((1,) * axes))
            else:
                b = next(left)
                out.append(b[:, None, None] if axes == 4 else b.reshape((1,) * (axes - 1) + (-1,)))
        if self.skip:
            out[0] = hidden_states + out[0]
        if self.scale != 1:
            out[0] = out[0] / self.scale
        return out[0] if len(out) == 1 else tuple(out)


class Narrowing:
    """Groups of one model that are narrowed, and the way back.

    kept: which members stayed, by the name of the group. freed: parameters that are gone.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, Sequence[int]]):
        self.model, self.kept = model, {n: list(i) for n, i in kept.items()}
        self._removal, self._changes = Removal(model), Changes()
        self.freed = 0

    def undo(self) -> None:
        """Put everything back as it was, bit for bit."""
        self._removal.undo()
        self._changes.undo()

    def forget(self) -> None:
        """Give up the way back, and with it the memory of what was cut off."""
        self._removal.forget()
        self._changes.forget()

    def _cut(self, module: nn.Module, name: str, keep: Mapping[int, Tensor]) -> None:
        """Keep entries of one tensor, a mask for each axis that is cut."""
        owner: Any = module._parameters if name in module._parameters else module._buffers
        old = owner[name]
        new = old.detach()
        for dim, mask in keep.items():
            new = new.index_select(dim, mask.nonzero().flatten().to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        self._changes.put(owner, name, new)

    def _write(self, module: nn.Module, book: Book, gone: int) -> None:
        """Keep a number right."""
        new = vars(module)[book.attribute]
        if book.index is None:
            new -= gone * book.each
        else:
            new = list(new)
            new[book.index] -= gone * book.each
        self._changes.put(vars(module), book.attribute, new)


# ---- finding


def groups(model: nn.Module, where: Where = everywhere) -> list[Group]:
    """Return the groups of `model` that `where` allows, in the order of its modules.

    `where` is asked with the group's name and the module of that name.
    """
    found = (f.group for f in _found(model))
    return [g for g in found if where(g.name, model.get_submodule(g.name))]


def _found(model: nn.Module) -> list[Found]:
    made = [one for _, _, one in _FINDERS(model)]
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return [f for f in made if all(uses[id(_tensor(model, s))] <= 1 for s in f.group.slots)]


def _tensor(model: nn.Module, slot: Slot) -> Tensor:
    out: Tensor = getattr(model.get_submodule(slot.module), slot.param)
    return out


def _known(model: nn.Module, names: Iterable[str]) -> dict[str, Found]:
    known = {f.group.name: f for f in _found(model)}
    odd = [n for n in names if n not in known]
    if odd:
        raise ValueError(
            f"no group {odd[0]!r} in {type(model).__name__}: expected one of its {len(known)} "
            f"groups ({', '.join(list(known)[:3])}, ...)"
        )
    return known


# ---- narrowing


def narrow(model: nn.Module, kept: Mapping[str, Iterable[int]]) -> Narrowing:
    """Cut members off the groups of `model`, in place, and return the way back.

    Args:
        model: keeps its class; layers keep theirs, with fewer rows and columns.
        kept: by the name of a group, the members that stay, in any order; [] empties the branch.

    Raises:
        ValueError: no such group, or members it does not have; nothing has been cut.
    """
    known = _known(model, kept)
    stay: dict[str, list[int]] = {}
    for name, members in kept.items():
        size, given = known[name].group.size, [int(i) for i in members]
        stay[name] = sorted(set(given))
        if len(stay[name]) < len(given) or not all(0 <= i < size for i in given):
            raise ValueError(
                f"{name}: keeps {given}: expected members between 0 and {size - 1}, each once"
            )
    narrowing, before = Narrowing(model, stay), parameters(model)
    cuts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, members in stay.items():
        group = known[name].group
        if len(members) == group.size:
            continue
        for slot in group.slots:
            axes = cuts.setdefault((slot.module, slot.param), {})
            whole = torch.ones(_tensor(model, slot).shape[slot.dim], dtype=torch.bool)
            mask = axes.setdefault(slot.dim, whole)
            mine = mask[slot.offset : slot.offset + group.size * group.span]
            mine.view(group.size, group.span)[
                [i not in set(members) for i in range(group.size)]
            ] = False
        for book in group.books:
            narrowing._write(model.get_submodule(book.module), book, group.size - len(members))
    for (module, param), axes in cuts.items():
        narrowing._cut(model.get_submodule(module), param, axes)
    for module in dict.fromkeys(module for module, _ in cuts):
        narrowing._changes.resize(model.get_submodule(module))
    for name, members in stay.items():
        empty = known[name].empty
        if not members and empty is not None:
            empty(narrowing._removal)
    narrowing.freed = before - parameters(model)
    return narrowing


@contextlib.contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Multiply the members' activations for the length of a `with` block; differentiable.

    Args:
        model: left as it was.
        masks: (size,) by the name of a group; ones change nothing, zeros are as if narrowed.

    Raises:
        ValueError: no such group, or a mask of another shape.
    """
    known = _known(model, masks)
    for name, mask in masks.items():
        if mask.shape != (known[name].group.size,):
            raise ValueError(
                f"{name}: a mask of shape {tuple(mask.shape)}, expected "
                f"({known[name].group.size},): one number a member"
            )
    hooks = []
    try:
        for name, mask in masks.items():
            group = known[name].group
            for slot in group.taps:
                layer: Any = model.get_submodule(slot.module)
                hooks.append(layer.register_forward_pre_hook(_multiply(mask, group, slot, layer)))
        yield model
    finally:
        for h in hooks:
            h.remove()


def _multiply(mask: Tensor, group: Group, slot: Slot, layer: Any) -> Callable[..., Any]:
    last, width = isinstance(layer, nn.Linear), layer.weight.shape[1]

    def hook(module: nn.Module, given: tuple[Any, ...]) -> Any:
        (x, *rest) = given
        m = mask.to(x).repeat_interleave(group.span)
        after = width - slot.offset - len(m)
        if slot.offset or after:
            m = torch.cat([m.new_ones(slot.offset), m, m.new_ones(after)])
        return (x * (m if last else m[:, None, None]), *rest)

    return hook


# ---- costs


def member_params(model: nn.Module, group: Group) -> int:
    """Return the parameters of one member: how many go when one of many goes."""
    total = 0
    for slot in group.slots:
        t = _tensor(model, slot)
        if isinstance(t, nn.Parameter):
            total += t.numel() // t.shape[slot.dim] * group.span
    return total


def member_macs(model: nn.Module, which: Sequence[Group], call: Call) -> list[float]:
    """Return by how many multiply-accumulates a call is cheaper without a member of each group.

    One call a group: members of a group cost the same, and half of them that many times as much.
    """
    whole, out = macs(model, call), []
    for g in which:
        gone = max(1, g.size // 2)
        narrowing = narrow(model, {g.name: range(g.size - gone)})
        out.append((whole - macs(model, call)) / gone)
        narrowing.undo()
    return out


# ---- the types of diffusers


def _at(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _plain(layer: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Tell whether a layer is one of torch's own, whose weight can be cut."""
    return (
        type(layer) is kind
        and isinstance(layer.weight, nn.Parameter)
        and getattr(layer, "groups", 1) == 1
        and not hasattr(layer, "parametrizations")
    )


def _rows(path: str, layer: Any, offset: int = 0) -> list[Slot]:
    """Return the slots of members that a layer gives out."""
    names = ("weight",) if layer.bias is None else ("weight", "bias")
    return [Slot(path, name, 0, offset) for name in names]


def _columns(path: str, offset: int = 0) -> Slot:
    """Return the slot of members that a layer takes in."""
    return Slot(path, "weight", 1, offset)


def _within_heads(norm: Any, span: int) -> bool:
    """Tell whether a norm of queries or keys looks at one head at a time."""
    if norm is None or type(norm).__name__ == "LpNorm":
        return True
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    return isinstance(shape, tuple) and tuple(shape) == (span,)


@register("Attention", "FluxAttention")
def _attention(name: str, attn: Any) -> Iterator[Found]:
    out = getattr(attn, "to_out", None)
    if getattr(attn, "pre_only", False) or not isinstance(out, nn.ModuleList):
        return  # its output layer is the block's
    found = _heads(name, attn, _at(name, "to_out.0"), out[0])
    if found is None:
        return
    slots, span = found
    biases: list[Any] = [out[0].bias]
    if getattr(attn, "add_q_proj", None) is not None:
        add_out = getattr(attn, "to_add_out", None)
        if add_out is not None:
            if not _plain(add_out):
                return
            slots.append(_columns(_at(name, "to_add_out")))
        biases.append(None if add_out is None else add_out.bias)
    skip = bool(getattr(attn, "residual_connection", False))
    scale = float(getattr(attn, "rescale_output_factor", 1.0))

    def empty(r: Removal) -> None:
        r.put(name, Bias(biases, skip, scale))

    yield Found(_head_group(name, attn, slots, span), empty)


def _heads(name: str, attn: Any, path: str, out: Any) -> tuple[list[Slot], int] | None:
    """Return the slots of the heads and their width; None where they cannot be cut."""
    heads = attn.heads
    names = ["to_q", "to_k", "to_v"]
    names += [n for n in ("add_q_proj", "add_k_proj", "add_v_proj") if getattr(attn, n, None)]
    layers: list[Any] = [getattr(attn, n, None) for n in names]
    if getattr(attn, "fused_projections", False) or not all(map(_plain, [*layers, out])):
        return None
    width = attn.to_q.out_features
    if width % heads or any(layer.out_features != width for layer in layers):
        return None
    span = width // heads
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    if not all(_within_heads(getattr(attn, n, None), span) for n in norms):
        return None
    processor = getattr(attn, "processor", None)
    if isinstance(processor, nn.Module) and any(True for _ in processor.parameters()):
        return None
    slots = [s for n, layer in zip(names, layers, strict=True) for s in _rows(_at(name, n), layer)]
    return [*slots, _columns(path)], span


def _head_group(name: str, attn: Any, slots: Sequence[Slot], span: int) -> Group:
    books = [Book(name, "heads", 1), Book(name, "inner_dim", span)]
    if hasattr(attn, "inner_kv_dim"):
        books.append(Book(name, "inner_kv_dim", span))
    if hasattr(attn, "sliceable_head_dim"):
        books.append(Book(name, "sliceable_head_dim", 1))
    return Group(name, "heads", attn.heads, span, tuple(slots), tuple(books))


@register("FeedForward")
def _feed_forward(name: str, ff: Any) -> Iterator[Found]:
    layers: list[Any] = list(getattr(ff, "net", []))
    if len(layers) < 3 or not hasattr(layers[0], "proj"):
        return
    first, last = layers[0].proj, layers[2]
    if not _plain(first) or not _plain(last):
        return
    size, path, bias = last.in_features, _at(name, "net.0.proj"), last.bias
    halves, odd = divmod(first.out_features, size)
    if odd or halves not in (1, 2):
        return
    slots = [s for i in range(halves) for s in _rows(path, first, i * size)]
    slots.append(_columns(_at(name, "net.2")))

    def empty(r: Removal) -> None:
        r.put(name, Bias([bias]))

    yield Found(Group(name, "neurons", size, 1, tuple(slots)), empty)


@register("FluxSingleTransformerBlock")
def _one_stream(name: str, block: Any) -> Iterator[Found]:
    """Yield heads and neurons, which meet in one output layer: heads first, then neurons."""
    out, mlp, path = block.proj_out, block.proj_mlp, _at(name, "proj_out")
    if not _plain(out) or not _plain(mlp):
        return
    before = out.in_features - mlp.out_features
    found = _heads(_at(name, "attn"), block.attn, path, out)
    if found is not None and block.attn.heads * found[1] == before:
        attn, (slots, span) = _at(name, "attn"), found
        group = _head_group(attn, block.attn, slots, span)
        packed = Book(path, "_tp_packed_row_blocks", span, 0)
        yield Found(
            Group(
                group.name,
                "heads",
                group.size,
                span,
                group.slots,
                (*group.books, *_of(out, packed)),
            ),
            lambda r: r.put(attn, Width0()),
        )
    inside = _at(name, "proj_mlp")
    slots = [*_rows(inside, mlp), _columns(path, before)]
    books = (Book(name, "mlp_hidden_dim", 1), *_of(out, Book(path, "_tp_packed_row_blocks", 1, 1)))
    yield Found(
        Group(inside, "neurons", mlp.out_features, 1, tuple(slots), books),
        lambda r: r.put(inside, Width0()),
    )


def _of(module: Any, book: Book) -> tuple[Book, ...]:
    return (book,) if hasattr(module, book.attribute) else ()


class Width0(nn.Module):
    """Gives out nothing: (B, N, 0)."""

    out_features = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return no channels of the input."""
        return hidden_states[..., :0]


@register("ResnetBlock2D")
def _resnet(name: str, block: Any) -> Iterator[Found]:
    convs, norm = (block.conv1, block.conv2), block.norm2
    if not all(_plain(c, nn.Conv2d) for c in convs) or not _plain(norm, nn.GroupNorm):
        return
    width, count = norm.num_channels, norm.num_groups
    slots = _rows(_at(name, "conv1"), block.conv1) + _rows(_at(name, "norm2"), norm)
    if block.time_emb_proj is not None:
        halves = 2 if block.time_embedding_norm == "scale_shift" else 1
        path, layer = _at(name, "time_emb_proj"), block.time_emb_proj
        if not _plain(layer) or layer.out_features != halves * width:
            return
        slots += [s for i in range(halves) for s in _rows(path, layer, i * width)]
    slots.append(_columns(_at(name, "conv2")))
    resamples, bias = block.upsample is not None or block.downsample is not None, block.conv2.bias

    def empty(r: Removal) -> None:
        r.put(_at(name, "norm1"), Pass() if resamples else Nothing())
        if block.time_emb_proj is not None:
            r.put(_at(name, "time_emb_proj"), None)
        for child in ("conv1", "norm2"):
            r.put(_at(name, child), Nothing())
        r.put(_at(name, "conv2"), Bias([bias]))

    book = Book(_at(name, "norm2"), "num_groups", 1)
    yield Found(Group(name, "channels", count, width // count, tuple(slots), (book,)), empty)


_PLAIN_BETWEEN = (
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.ELU,
    nn.Softplus,
    nn.Mish,
    nn.Dropout,
    nn.Identity,
)
"""What acts on each unit alone, so that it may stand between two layers."""


@register("Sequential")
def _sequential(name: str, layers: Any) -> Iterator[Found]:
    """Yield the hidden units between two linear layers that stand one after the other."""
    left: tuple[str, Any] | None = None
    for child, layer in layers.named_children():
        if isinstance(layer, _PLAIN_BETWEEN):
            continue
        if not _plain(layer):
            left = None
            continue
        path = _at(name, child)
        if left is not None:
            slots = (*_rows(*left), _columns(path))
            yield Found(Group(left[0], "neurons", layer.in_features, 1, slots))
        left = path, layer
