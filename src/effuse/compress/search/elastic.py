"""Sub-networks of a transformer: the first widths, heads and neurons, and some of its blocks.

A point (depth l, hidden h, heads a, ratio r) takes of every tensor the leading entries:

    hidden:  the first h of every axis along the residual stream, norms and embeddings too
    heads:   the first a, of the teacher's width each, in q, k, v and the output layer
    ratio:   the first round(h r) neurons of each feed-forward layer
    depth:   blocks floor(i L / l), i = 0 ... l - 1, of L

Adaptive norms hold several rows of `hidden` one after the other; of each its first h are taken. No
layer is special: a sub-network is the same classes over slices of the same tensors.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, HEADS, NEURONS = "hidden", "heads", "neurons"


@dataclass(frozen=True)
class Rule:
    """What the axes of matching tensors are. pattern: of the name in a block, or of the network.

    axes: by axis, a width and how often it stands there in a row.
    """

    pattern: str
    axes: Mapping[int, tuple[str, int]]


@dataclass(frozen=True)
class Family:
    """How one class of networks is cut.

    blocks: dotted name of the list of blocks. attention: of the module in a block that knows its
    heads, with the names of q, k, v in it. head_names: numbers that are the heads; inner_names:
    heads times their width. rules: first match counts; a tensor without one is whole.
    """

    blocks: str
    attention: str
    qkv: tuple[str, str, str]
    head_names: tuple[str, ...]
    inner_names: tuple[str, ...]
    rules: tuple[Rule, ...]
    stream_names: tuple[str, ...] = ()


_OUT, _IN = {0: (HIDDEN, 1)}, {1: (HIDDEN, 1)}
_UP = {0: (NEURONS, 1), 1: (HIDDEN, 1)}
_DOWN = {0: (HIDDEN, 1), 1: (NEURONS, 1)}
_TO_HEADS = {0: (HEADS, 1), 1: (HIDDEN, 1)}
_FROM_HEADS = {0: (HIDDEN, 1), 1: (HEADS, 1)}
_BOTH = {0: (HIDDEN, 1), 1: (HIDDEN, 1)}


def _layer(name: str, axes: Mapping[int, tuple[str, int]]) -> tuple[Rule, Rule]:
    """Return the rules of a layer's weight and bias."""
    return Rule(f"{name}.weight", axes), Rule(f"{name}.bias", {0: axes[0]})


FAMILIES: dict[str, Family] = {
    "BertModel": Family(
        "encoder.layer",
        "attention.self",
        ("query", "key", "value"),
        ("num_attention_heads",),
        ("all_head_size",),
        (
            *_layer("*.attention.self.*", _TO_HEADS),
            *_layer("*.attention.output.dense", _FROM_HEADS),
            *_layer("*.intermediate.dense", _UP),
            *_layer("*.layer.*.output.dense", _DOWN),
            *_layer("pooler.dense", _BOTH),
            Rule("*LayerNorm.*", _OUT),
            Rule("embeddings.*embeddings.weight", _IN),
        ),
    ),
    "ViTModel": Family(
        "layers",
        "attention",
        ("q_proj", "k_proj", "v_proj"),
        ("num_attention_heads",),
        (),
        (
            *_layer("*.attention.[qkv]_proj", _TO_HEADS),
            *_layer("*.attention.o_proj", _FROM_HEADS),
            *_layer("*.mlp.fc1", _UP),
            *_layer("*.mlp.fc2", _DOWN),
            *_layer("pooler.dense", _BOTH),
            Rule("*layernorm*", _OUT),
            Rule("embeddings.*_embeddings", {2: (HIDDEN, 1)}),
            Rule("embeddings.*_token", {2: (HIDDEN, 1)}),
            Rule("embeddings.patch_embeddings.projection.*", _OUT),
        ),
    ),
    "CLIPTextModel": Family(
        "encoder.layers",
        "self_attn",
        ("q_proj", "k_proj", "v_proj"),
        ("num_heads",),
        (),
        (
            *_layer("*.self_attn.[qkv]_proj", _TO_HEADS),
            *_layer("*.self_attn.out_proj", _FROM_HEADS),
            *_layer("*.mlp.fc1", _UP),
            *_layer("*.mlp.fc2", _DOWN),
            Rule("*layer_norm*", _OUT),
            Rule("embeddings.*_embedding.weight", _IN),
        ),
    ),
    "DiTTransformer2DModel": Family(
        "transformer_blocks",
        "attn1",
        ("to_q", "to_k", "to_v"),
        ("heads", "sliceable_head_dim"),
        ("inner_dim", "inner_kv_dim"),
        (
            *_layer("*.attn1.to_[qkv]", _TO_HEADS),
            *_layer("*.attn1.to_out.0", _FROM_HEADS),
            *_layer("*.ff.net.0.proj", _UP),
            *_layer("*.ff.net.2", _DOWN),
            *_layer("*.norm1.linear", {0: (HIDDEN, 6), 1: (HIDDEN, 1)}),
            *_layer("*.timestep_embedder.linear_1", {0: (HIDDEN, 1)}),
            *_layer("*.timestep_embedder.linear_2", _BOTH),
            Rule("*.embedding_table.weight", _IN),
            Rule("pos_embed.proj.*", _OUT),
            Rule("pos_embed.pos_embed", {2: (HIDDEN, 1)}),
            *_layer("proj_out_1", {0: (HIDDEN, 2), 1: (HIDDEN, 1)}),
            Rule("proj_out_2.weight", {1: (HIDDEN, 1)}),
        ),
    ),
}
"""Classes that can be cut, by name: BERT as in the paper, ViT, CLIP's text encoder, DiT."""


def family_of(model: nn.Module) -> Family:
    """Return how a network is cut.

    Raises:
        TypeError: nobody knows.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(
        f"{type(model).__name__} cannot be cut by width and depth: expected one of "
        f"{', '.join(FAMILIES)}"
    )


@dataclass(frozen=True)
class Size:
    """A sub-network: blocks, channels of the stream, heads, neurons a channel."""

    depth: int
    hidden: int
    heads: int
    ratio: float

    @property
    def neurons(self) -> int:
        """Neurons of one feed-forward layer."""
        return round(self.hidden * self.ratio)


@dataclass(frozen=True)
class Whole:
    """The sizes of a network as it is. span: width of a head."""

    size: Size
    span: int


def whole_of(model: nn.Module) -> Whole:
    """Return the sizes of a network that is not cut."""
    family = family_of(model)
    rows: Any = model.get_submodule(family.blocks)
    attention = rows[0].get_submodule(family.attention)
    q: Any = attention.get_submodule(family.qkv[0])
    heads = int(getattr(attention, family.head_names[0]))
    neurons = 0
    for name, p in rows[0].named_parameters():
        rule = _rule(family, f"{family.blocks}.0.{name}")
        if rule is not None and rule.axes.get(0, ("",))[0] == NEURONS:
            neurons = p.shape[0]
    hidden = q.in_features
    return Whole(Size(len(rows), hidden, heads, neurons / hidden), q.out_features // heads)


def _rule(family: Family, name: str) -> Rule | None:
    return next((r for r in family.rules if fnmatch.fnmatchcase(name, r.pattern)), None)


def kept_blocks(depth: int, of: int) -> list[int]:
    """Return floor(i L / l): strictly rising, all of them where l = L."""
    return [i * of // depth for i in range(depth)]


def check(size: Size, whole: Whole) -> None:
    """Raise `ValueError` if a network does not hold a sub-network of this size."""
    most = whole.size
    for name in ("depth", "hidden", "heads"):
        if not 1 <= getattr(size, name) <= getattr(most, name):
            raise ValueError(
                f"{name}={getattr(size, name)}: expected 1 to {getattr(most, name)}, what the "
                "teacher has"
            )
    if not 1 <= size.neurons <= most.neurons:
        raise ValueError(
            f"ratio={size.ratio}: {size.neurons} neurons at hidden={size.hidden}, expected 1 to "
            f"{most.neurons}, what the teacher has"
        )


class Cut:
    """How every tensor of a network of one size comes from the whole one's.

    skeleton: modules of that size; their tensors are on the meta device.
    """

    def __init__(self, model: nn.Module, size: Size, whole: Whole | None = None):
        self.family, self.size = family_of(model), size
        whole = whole or whole_of(model)
        check(size, whole)
        self.widths = {
            HIDDEN: (whole.size.hidden, size.hidden),
            HEADS: (whole.size.heads * whole.span, size.heads * whole.span),
            NEURONS: (whole.size.neurons, size.neurons),
        }
        self.blocks = kept_blocks(size.depth, whole.size.depth)
        memo: dict[int, Any] = {}
        for t in (*model.parameters(), *model.buffers()):
            meta = t.detach().to("meta")
            memo[id(t)] = (
                nn.Parameter(meta, t.requires_grad) if isinstance(t, nn.Parameter) else meta
            )
        self.skeleton: nn.Module = copy.deepcopy(model, memo)
        shorten(self.skeleton, self.family, self.blocks)
        names = [n for n, _ in self.skeleton.named_parameters()]
        names += [n for n, _ in self.skeleton.named_buffers()]
        self.sources = {n: self._source(n) for n in names}
        resize(self.skeleton, self.family, size, whole.span, self.slice_of)

    def _source(self, name: str) -> str:
        head = self.family.blocks + "."
        if not name.startswith(head):
            return name
        number, _, rest = name.removeprefix(head).partition(".")
        return f"{head}{self.blocks[int(number)]}.{rest}"

    def slice_of(self, name: str, t: Tensor) -> Tensor:
        """Return the part of a whole tensor that the sub-network has; differentiable."""
        rule = _rule(self.family, name)
        for axis, (width, times) in (rule.axes if rule else {}).items():
            before, after = self.widths[width]
            if t.shape[axis] != before * times:
                raise ValueError(
                    f"{name} has {t.shape[axis]} along axis {axis}: expected {times} times "
                    f"{before} ({width})"
                )
            if times == 1:
                t = t.narrow(axis, 0, after)
            else:
                t = t.unflatten(axis, (times, before)).narrow(axis + 1, 0, after)
                t = t.flatten(axis, axis + 1)
        return t

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the sub-network's tensors, slices of the model's, by its own names."""
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        return {n: self.slice_of(n, held[s]) for n, s in self.sources.items()}

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-network on the model's own tensors, without dropout of anything."""
        self.skeleton.eval()
        return torch.func.functional_call(
            self.skeleton, self.tensors(model), args, kwargs, tie_weights=False
        )

    def extract(self, model: nn.Module) -> nn.Module:
        """Return the sub-network alone, with tensors of its own."""
        out = copy.deepcopy(self.skeleton)
        for name, t in self.tensors(model).items():
            owner_name, _, key = name.rpartition(".")
            owner = out.get_submodule(owner_name)
            own = t.detach().clone()
            if key in owner._parameters:
                old = owner._parameters[key]
                assert old is not None
                owner._parameters[key] = nn.Parameter(own, old.requires_grad)
            else:
                owner._buffers[key] = own
        return out.train(model.training)


def shorten(model: nn.Module, family: Family, blocks: list[int]) -> None:
    """Keep these blocks of a network, in place; the list of blocks is a new one."""
    owner_name, _, key = family.blocks.rpartition(".")
    owner = model.get_submodule(owner_name)
    rows: Any = owner._modules[key]
    owner._modules[key] = nn.ModuleList([rows[i] for i in blocks])


Slicer = Callable[[str, Tensor], Tensor]
Setter = Callable[[dict[str, Any], str, Any], None]


def _set(owner: dict[str, Any], key: str, value: Any) -> None:
    owner[key] = value


def resize(
    model: nn.Module,
    family: Family,
    size: Size,
    span: int,
    part: Slicer,
    put: Setter = _set,
) -> None:
    """Narrow the tensors of a network whose blocks are already chosen, and the numbers it keeps.

    Args:
        model: changed in place.
        family: of it.
        size: to become.
        span: width of a head.
        part: gives the slice of a tensor by its name.
        put: writes owner[key] = value; remembers what was there, where that is wanted.
    """
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        changed = False
        for held in (module._parameters, module._buffers):
            for key, t in list(held.items()):
                if t is None:
                    continue
                new = part(prefix + key, t.detach())
                if new.shape == t.shape:
                    continue
                changed = True
                own = new.clone() if new.device.type != "meta" else new
                is_weight = isinstance(t, nn.Parameter)
                put(held, key, nn.Parameter(own, t.requires_grad) if is_weight else own)
        numbers = vars(module)
        if isinstance(module, nn.Linear) and changed:
            put(numbers, "out_features", module.weight.shape[0])
            put(numbers, "in_features", module.weight.shape[1])
        elif isinstance(module, nn.Embedding) and changed:
            put(numbers, "embedding_dim", module.weight.shape[1])
        elif isinstance(module, nn.Conv2d) and changed:
            put(numbers, "out_channels", module.weight.shape[0])
        elif isinstance(module, nn.LayerNorm):
            # every norm of these networks is of the stream, those without weights too
            put(numbers, "normalized_shape", (size.hidden,))
    for block in model.get_submodule(family.blocks).children():
        attention = vars(block.get_submodule(family.attention))
        for key in family.head_names:
            put(attention, key, size.heads)
        for key in family.inner_names:
            put(attention, key, size.heads * span)
