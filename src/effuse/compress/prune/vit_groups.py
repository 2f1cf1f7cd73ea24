"""Widths of vision and diffusion transformers: which tensors shrink together, and how.

A width is a number of channels that several tensors share:

- "embed": the residual stream D of a whole transformer: patch embedding, positions, every norm,
  the inputs of q, k, v and of the MLPs, the outputs of both, neck or last layer.
- "qk", "v": channels of a head, per attention: those of queries and keys (with the tables of
  relative positions), and those of values. A position goes in every head at once.
- "mlp": hidden channels of one feed-forward layer; both halves of a GEGLU move together.

Groups of `effuse.compress.groups` are members in one piece of one branch, such as whole heads, and
cut exactly. Here a channel is strided through heads and tensors, and a stream's norms change.

Found by the type of a module, never by a path; `register` adds a type. SAM's attention holds q, k
and v in one tensor; `split` makes three of it, so that they may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.compress.swap import Changes
from effuse.compress.units import Finders, Removal
from effuse.core.contracts import Where, everywhere


@dataclass(frozen=True)
class Slot:
    """One axis of one tensor that has the channels of a width, `repeats` times in a row.

    path: dotted name of the module. name: of its parameter or buffer. dim: which axis. repeats:
    heads, halves of a GEGLU or rows of an adaptive norm; channel i is at i, size + i, ...
    """

    path: str
    name: str
    dim: int
    repeats: int = 1

    def places(self, keep: Tensor, size: int) -> Tensor:
        """Return where the channels keep: (k,) of a width of `size` are on this axis."""
        starts = size * torch.arange(self.repeats, device=keep.device)
        return (starts[:, None] + keep).flatten()


@dataclass(frozen=True)
class Number:
    """A number that a module knows a width by; `of` gives it for the channels left."""

    path: str
    name: str
    of: Callable[[int], Any] = lambda n: n


@dataclass(frozen=True)
class Width:
    """Channels that stand or fall together.

    name: of the module it belongs to, and its kind. size: channels. multiple: the natural step
    (heads) for "embed" and "mlp". tables: slots of relative positions. folded: slots of queries
    whose attention divides by sqrt(channels): what is left is scaled so that the logits stay.
    twin: another width of which as many must stay. blocks: of a stream, the list of its blocks.
    widen: whether the old width must come out behind them; a linear layer then follows. positions:
    a PatchEmbed that computes positions anew for other sizes of pictures.
    """

    name: str
    kind: str
    size: int
    slots: tuple[Slot, ...]
    numbers: tuple[Number, ...] = ()
    multiple: int = 1
    tables: tuple[Slot, ...] = ()
    folded: tuple[Slot, ...] = ()
    twin: str = ""
    blocks: str = ""
    widen: bool = False
    positions: str = ""

    @property
    def path(self) -> str:
        """The dotted name of the module it belongs to."""
        return self.name.rpartition(":")[0]


_FINDERS: Finders[Width] = Finders()
register = _FINDERS.register


def widths(model: nn.Module, where: Where = everywhere) -> list[Width]:
    """Return the widths of `model` that `where` allows, in the order of its modules.

    `where` is asked with the dotted name of the module that a width belongs to.
    """
    return [one for name, module, one in _FINDERS(model) if where(name, module)]


# ---- narrowing


class Expand(nn.Module):
    """Stands after the last block and gives the stream its old width: x W^T, W: (D, kept).

    Begins as the kept channels in their old places, and zeros between.
    """

    def __init__(self, size: int, keep: Tensor, like: Tensor):
        super().__init__()
        self.linear = nn.Linear(len(keep), size, bias=False, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            eye = torch.zeros_like(self.linear.weight)
            eye[keep.to(like.device), torch.arange(len(keep), device=like.device)] = 1
            self.linear.weight.copy_(eye)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (B, N, D) of hidden_states: (B, N, kept)."""
        out: Tensor = self.linear(hidden_states)
        return out


class SlicedPatchEmbed(nn.Module):
    """A PatchEmbed of diffusers of which some channels stayed; shares all it holds.

    Positions of other sizes than its own are computed in the old width, then sliced.
    """

    proj: nn.Module
    pos_embed: Tensor

    def __init__(self, whole: Any, keep: Sequence[int], size: int):
        super().__init__()
        vars(self).update(vars(whole))
        before = getattr(whole, "kept", range(size))
        self.kept, self.size = [before[i] for i in keep], getattr(whole, "size", size)

    def forward(self, latent: Tensor) -> Tensor:
        """Return tokens (B, N, kept) of latent: (B, C, H, W)."""
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        h, w = (n // self.patch_size for n in latent.shape[-2:])  # type: ignore[operator]
        tokens = self.proj(latent).flatten(2).transpose(1, 2)
        at = self.pos_embed
        if (h, w) != (self.height, self.width):
            at = get_2d_sincos_pos_embed(
                embed_dim=self.size,
                grid_size=(h, w),
                base_size=self.base_size,
                interpolation_scale=self.interpolation_scale,
                device=latent.device,
                output_type="pt",
            )
            at = at.float()[None, :, self.kept]
        out: Tensor = (tokens + at).to(tokens.dtype)
        return out


def narrow(
    model: nn.Module,
    found: Iterable[Width],
    keep: Mapping[str, Tensor],
    tables: bool = False,
) -> Changes:
    """Keep the channels keep[name], sorted, of each of these widths; in place, with the way back.

    The rest of the model is as if the channels were zero, but that a norm of the stream is taken
    over fewer channels. With `tables`, tables of relative positions begin anew at zero.

    Raises:
        ValueError: channels that are not there, none, or twins of different widths.
    """
    found = [w for w in found if w.name in keep]
    counts = {w.name: len(keep[w.name]) for w in found}
    for w in found:
        k = keep[w.name]
        if not len(k) or int(k.min()) < 0 or int(k.max()) >= w.size or len(k.unique()) != len(k):
            raise ValueError(
                f"{w.name}: expected 1 to {w.size} different channels in [0, {w.size}), got {k}"
            )
        if w.twin and counts.get(w.twin) != counts[w.name]:
            raise ValueError(f"{w.name}: {counts[w.name]} channels, {w.twin} must keep as many")
    out = Changes()
    done: dict[tuple[int, int], Any] = {}
    for w in found:
        _narrow(model, out, w, keep[w.name].sort().values, done, tables)
    return out


def _narrow(
    model: nn.Module,
    out: Changes,
    w: Width,
    keep: Tensor,
    done: dict[tuple[int, int], Any],
    tables: bool,
) -> None:
    for slot in w.slots:
        module: Any = model.get_submodule(slot.path)
        owner = module._parameters if slot.name in module._parameters else module._buffers
        old = owner[slot.name]
        key = (id(old), slot.dim)  # tied parameters stay tied
        if key not in done:
            keep_here = keep.to(old.device)
            part = old.detach().index_select(slot.dim, slot.places(keep_here, w.size))
            if slot in w.folded:
                part = part * (len(keep) / w.size) ** 0.5
            if tables and slot in w.tables and len(keep) < w.size:
                part = torch.zeros_like(part)
            part = part.contiguous()
            is_parameter = isinstance(old, nn.Parameter)
            done[key] = nn.Parameter(part, old.requires_grad) if is_parameter else part
        out.put(owner, slot.name, done[key])
        out.resize(module)
    for n in w.numbers:
        out.put(vars(model.get_submodule(n.path)), n.name, n.of(len(keep)))
    if w.positions:
        parent, _, child = w.positions.rpartition(".")
        whole = model.get_submodule(w.positions)
        sliced = SlicedPatchEmbed(whole, keep.tolist(), w.size)
        out.put(model.get_submodule(parent)._modules, child, sliced)
    if w.widen:
        parent, _, child = w.blocks.rpartition(".")
        blocks: Any = model.get_submodule(w.blocks)
        like = next(blocks.parameters())
        more = nn.ModuleList([*blocks, Expand(w.size, keep, like)]).train(blocks.training)
        out.put(model.get_submodule(parent)._modules, child, more)


# ---- SAM's attention with q, k and v apart


class SplitAttention(nn.Module):
    """SAM's attention with q, k and v in three layers, whose head widths may differ.

    softmax(scale q k^T + q.R_h + q.R_w) v over a window of h x w tokens; scale is that of the
    original head width, whatever is left of it. Called as the original is.
    """

    def __init__(self, attention: Any):
        super().__init__()
        qkv, self.heads = attention.qkv, attention.num_attention_heads
        self.scale, self.dropout = attention.scale, attention.dropout
        rows = qkv.out_features // 3
        for i, name in enumerate("qkv"):
            with torch.device("meta"):
                layer = nn.Linear(qkv.in_features, rows, bias=qkv.bias is not None)
            for key, p in qkv._parameters.items():
                if p is not None:
                    part = p.detach()[i * rows : (i + 1) * rows].clone()
                    setattr(layer, key, nn.Parameter(part, p.requires_grad))
            setattr(self, name, layer)
        self.proj = attention.proj
        self.use_rel_pos = attention.use_rel_pos
        if self.use_rel_pos:
            self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, hidden_states: Tensor, output_attentions: Any = None) -> tuple[Tensor, None]:
        """Return the attended (B, h, w, D) and None of hidden_states: (B, h, w, D)."""
        b, h, w, _ = hidden_states.shape
        layers: Any = self.q, self.k, self.v
        q, k, v = (
            layer(hidden_states).reshape(b, h * w, self.heads, -1).transpose(1, 2)
            for layer in layers
        )
        bias = None
        if self.use_rel_pos:
            at = q.reshape(b, self.heads, h, w, -1)
            rows = torch.einsum("bnhwc,hkc->bnhwk", at, _relative(self.rel_pos_h, h))
            columns = torch.einsum("bnhwc,wkc->bnhwk", at, _relative(self.rel_pos_w, w))
            bias = rows[..., :, None] + columns[..., None, :]
            bias = bias.reshape(b, self.heads, h * w, h * w)
        out = F.scaled_dot_product_attention(
            q, k, v, bias, self.dropout if self.training else 0.0, scale=self.scale
        )
        out = out.transpose(1, 2).reshape(b, h, w, -1)
        return self.proj(out), None


def _relative(table: Tensor, n: int) -> Tensor:
    """Return (n, n, c), the row of table: (L, c) for each pair of places; L is made 2 n - 1."""
    if len(table) != 2 * n - 1:
        table = F.interpolate(table.T[None], size=2 * n - 1, mode="linear")[0].T
    at = torch.arange(n, device=table.device)
    return table[at[:, None] - at[None, :] + n - 1]


def split(model: nn.Module, where: Where = everywhere) -> Removal:
    """Put q, k and v of SAM's attentions that `where` allows into layers of their own."""
    found = [
        (name, m)
        for name, m in model.named_modules()
        if any(c.__name__ == "SamVisionAttention" for c in type(m).__mro__) and where(name, m)
    ]
    removal = Removal(model)
    for name, m in found:
        removal.put(name, SplitAttention(m))
    return removal


# ---- what a finder writes down


class _Slots:
    """Collects slots of one width below one module; layers that were taken away are left out."""

    def __init__(self, name: str, root: nn.Module, size: int):
        self.name, self.root, self.size = name, root, size
        self.slots: list[Slot] = []
        self.numbers: list[Number] = []

    def at(self, path: str) -> tuple[str, Any]:
        """Return the dotted name of a module below the root, and the module or None."""
        try:
            module: Any = self.root.get_submodule(path)
        except AttributeError:
            module = None
        return ".".join(p for p in (self.name, path) if p), module

    def out(self, path: str, repeats: int = 1) -> list[Slot]:
        """Add the outputs of a layer."""
        return self._layer(path, 0, repeats)

    def into(self, path: str, repeats: int = 1) -> list[Slot]:
        """Add the inputs of a layer."""
        return self._layer(path, 1, repeats)

    def _layer(self, path: str, dim: int, repeats: int) -> list[Slot]:
        full, layer = self.at(path)
        if layer is None or not list(layer.state_dict()):
            return []
        weight = layer._parameters.get("weight")
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or weight is None:
            raise ValueError(
                f"{full} is a {type(layer).__name__}, not a plain layer: slim widths before "
                "anything swaps layers (quantize, sparsify, adapters)"
            )
        if weight.shape[dim] != repeats * self.size:
            raise ValueError(
                f"{full}: {weight.shape[dim]} channels, expected {repeats} x {self.size}: its "
                "width is not that of the others, slim it once only"
            )
        made = [Slot(full, "weight", dim, repeats)]
        if dim == 0 and layer.bias is not None:
            made.append(Slot(full, "bias", 0, repeats))
        self.slots += made
        return made

    def norm(self, *paths: str) -> None:
        """Add layer norms, with or without weights."""
        for full, layer in map(self.at, paths):
            if isinstance(layer, nn.LayerNorm):
                held = [k for k, p in layer._parameters.items() if p is not None]
                self.slots += [Slot(full, k, 0) for k in held]
                self.numbers.append(Number(full, "normalized_shape", lambda n: (n,)))

    def tensor(self, path: str, name: str, dim: int, repeats: int = 1) -> Slot | None:
        """Add a parameter or buffer, if it is there."""
        full, module = self.at(path)
        if module is None or getattr(module, name, None) is None:
            return None
        self.slots.append(Slot(full, name, dim % getattr(module, name).ndim, repeats))
        return self.slots[-1]

    def width(self, kind: str, **more: Any) -> Width:
        """Return what was collected as a width."""
        return Width(
            f"{self.name}:{kind}", kind, self.size, tuple(self.slots), tuple(self.numbers), **more
        )


def _plain(*layers: Any) -> bool:
    return all(isinstance(m, nn.Linear) and "weight" in m._parameters for m in layers)


# ---- residual streams


@register("SamVisionEncoder")
def _sam(name: str, encoder: Any) -> Iterator[Width]:
    s = _Slots(name, encoder, encoder.patch_embed.projection.out_channels)
    s.out("patch_embed.projection")
    s.tensor("", "pos_embed", -1)
    for i in range(len(encoder.layers)):
        at = f"layers.{i}"
        s.norm(f"{at}.layer_norm1", f"{at}.layer_norm2")
        for part in ("qkv", "q", "k", "v"):
            s.into(f"{at}.attn.{part}")
        s.out(f"{at}.attn.proj")
        s.into(f"{at}.mlp.lin1"), s.out(f"{at}.mlp.lin2")
    s.into("neck.conv1")
    heads = encoder.config.num_attention_heads
    yield s.width("embed", multiple=heads, blocks=s.at("layers")[0])


@register("ViTModel")
def _vit(name: str, model: Any) -> Iterator[Width]:
    if type(model.layers[-1]).__name__ == "Expand":
        return
    s = _Slots(name, model, model.embeddings.patch_embeddings.projection.out_channels)
    s.out("embeddings.patch_embeddings.projection")
    for tensor in ("cls_token", "mask_token", "position_embeddings"):
        s.tensor("embeddings", tensor, -1)
    for i in range(len(model.layers)):
        at = f"layers.{i}"
        s.norm(f"{at}.layernorm_before", f"{at}.layernorm_after")
        for part in ("q_proj", "k_proj", "v_proj"):
            s.into(f"{at}.attention.{part}")
        s.out(f"{at}.attention.o_proj")
        s.into(f"{at}.mlp.fc1"), s.out(f"{at}.mlp.fc2")
    heads = model.config.num_attention_heads
    yield s.width("embed", multiple=heads, blocks=s.at("layers")[0], widen=True)


@register("CLIPVisionModel", "CLIPVisionTransformer")
def _clip(name: str, model: Any) -> Iterator[Width]:
    if type(model.encoder.layers[-1]).__name__ == "Expand":
        return
    s = _Slots(name, model, model.embeddings.patch_embedding.out_channels)
    s.out("embeddings.patch_embedding")
    s.tensor("embeddings", "class_embedding", 0)
    s.tensor("embeddings.position_embedding", "weight", 1)
    s.norm("pre_layrnorm")
    for i in range(len(model.encoder.layers)):
        at = f"encoder.layers.{i}"
        s.norm(f"{at}.layer_norm1", f"{at}.layer_norm2")
        for part in ("q_proj", "k_proj", "v_proj"):
            s.into(f"{at}.self_attn.{part}")
        s.out(f"{at}.self_attn.out_proj")
        s.into(f"{at}.mlp.fc1"), s.out(f"{at}.mlp.fc2")
    heads = model.config.num_attention_heads
    yield s.width("embed", multiple=heads, blocks=s.at("encoder.layers")[0], widen=True)


def _positions(s: _Slots) -> str:
    name, module = s.at("pos_embed")
    if type(module).__name__ not in ("PatchEmbed", "SlicedPatchEmbed") or not module.flatten:
        raise ValueError(
            f"{name} is a {type(module).__name__}: expected the PatchEmbed of diffusers"
        )
    if module.norm is not None or module.pos_embed is None or module.pos_embed_max_size:
        raise ValueError(
            f"{name}: expected sine positions, without a norm and without a largest size"
        )
    return name


def _blocks(s: _Slots, count: int) -> None:
    """Add the blocks of DiT and PixArt."""
    for i in range(count):
        at = f"transformer_blocks.{i}"
        s.norm(f"{at}.norm1", f"{at}.norm1.norm", f"{at}.norm2")
        s.norm(f"{at}.norm3")
        _, rows = s.at(f"{at}.norm1.linear")
        if rows is not None:  # six rows of an adaptive norm; three where units are gone
            s.out(f"{at}.norm1.linear", rows.weight.shape[0] // s.size)
        s.tensor(at, "scale_shift_table", -1)
        for attention in ("attn1", "attn2"):
            _, a = s.at(f"{at}.{attention}")
            if hasattr(a, "to_q"):
                for part in ("to_q", "to_k", "to_v"):
                    s.into(f"{at}.{attention}.{part}")
                s.out(f"{at}.{attention}.to_out.0")
                full = s.at(f"{at}.{attention}")[0]
                s.numbers += [Number(full, k) for k in ("query_dim", "out_dim")]
        s.into(f"{at}.ff.net.0.proj")
        s.out(f"{at}.ff.net.2")


@register("DiTTransformer2DModel")
def _dit(name: str, model: Any) -> Iterator[Width]:
    s = _Slots(name, model, model.pos_embed.proj.out_channels)
    s.out("pos_embed.proj"), s.tensor("pos_embed", "pos_embed", -1)
    _blocks(s, len(model.transformer_blocks))
    s.norm("norm_out")
    s.out("proj_out_1", 2), s.into("proj_out_2")
    heads = model.config.num_attention_heads
    blocks, positions = s.at("transformer_blocks")[0], _positions(s)
    yield s.width("embed", multiple=heads, blocks=blocks, positions=positions)


@register("PixArtTransformer2DModel")
def _pixart(name: str, model: Any) -> Iterator[Width]:
    if model.use_additional_conditions or model.caption_projection is None:
        return  # the embedding of time is a sum of parts of fixed shares of D
    s = _Slots(name, model, model.pos_embed.proj.out_channels)
    s.out("pos_embed.proj"), s.tensor("pos_embed", "pos_embed", -1)
    s.out("adaln_single.emb.timestep_embedder.linear_2")
    s.into("adaln_single.linear"), s.out("adaln_single.linear", 6)
    s.out("caption_projection.linear_2")
    _blocks(s, len(model.transformer_blocks))
    s.norm("norm_out")
    s.tensor("", "scale_shift_table", -1), s.into("proj_out")
    heads = model.config.num_attention_heads
    blocks, positions = s.at("transformer_blocks")[0], _positions(s)
    yield s.width("embed", multiple=heads, blocks=blocks, positions=positions)


# ---- bottlenecks


@register("SplitAttention")
def _split(name: str, a: Any) -> Iterator[Width]:
    qk = _Slots(name, a, a.q.out_features // a.heads)
    qk.out("q", a.heads), qk.out("k", a.heads)
    made = [qk.tensor("", t, 1) for t in ("rel_pos_h", "rel_pos_w")] if a.use_rel_pos else []
    yield qk.width("qk", tables=tuple(t for t in made if t is not None))
    v = _Slots(name, a, a.v.out_features // a.heads)
    v.out("v", a.heads), v.into("proj", a.heads)
    yield v.width("v")


@register("ViTAttention", "CLIPAttention")
def _heads(name: str, a: Any) -> Iterator[Width]:
    heads = getattr(a, "num_heads", None) or a.num_attention_heads
    last = "o_proj" if hasattr(a, "o_proj") else "out_proj"
    if not _plain(a.q_proj, a.k_proj, a.v_proj, getattr(a, last)):
        return
    qk, v = _Slots(name, a, a.head_dim), _Slots(name, a, a.head_dim)
    qk.out("q_proj", heads), qk.out("k_proj", heads)
    v.out("v_proj", heads), v.into(last, heads)
    for s in (qk, v):
        s.numbers.append(Number(name, "head_dim"))
    yield qk.width("qk", twin=f"{name}:v")
    yield v.width("v", twin=f"{name}:qk")


_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")


@register("Attention")
def _attention(name: str, a: Any) -> Iterator[Width]:
    layers = [getattr(a, k, None) for k in ("to_q", "to_k", "to_v")]
    out = a.to_out[0] if getattr(a, "to_out", None) is not None else None
    if not _plain(*layers, out) or type(a.processor).__name__ not in _PROCESSORS:
        return
    if a.norm_q is not None or a.norm_k is not None or a.fused_projections:
        return  # a norm of the head's channels would be another one over fewer
    if a.inner_dim != a.inner_kv_dim or a.to_q.out_features % a.heads:
        return
    size = a.to_q.out_features // a.heads
    qk, v = _Slots(name, a, size), _Slots(name, a, size)
    queries = [s for k in ("to_q", "add_q_proj") for s in qk.out(k, a.heads)]
    for k in ("to_k", "add_k_proj"):
        qk.out(k, a.heads)
    for k in ("to_v", "add_v_proj"):
        v.out(k, a.heads)
    for k in ("to_out.0", "to_add_out"):
        v.into(k, a.heads)
    for s in (qk, v):
        s.numbers += [Number(name, k, lambda n: n * a.heads) for k in ("inner_dim", "inner_kv_dim")]
        if a.scale_qk:
            s.numbers.append(Number(name, "scale", lambda n: n**-0.5))
    fold = tuple(queries) if a.scale_qk else ()
    yield qk.width("qk", twin=f"{name}:v", folded=fold)
    yield v.width("v", twin=f"{name}:qk")


def _mlp(first: str, last: str) -> Callable[[str, Any], Iterator[Width]]:
    def find(name: str, m: Any) -> Iterator[Width]:
        s = _Slots(name, m, 0)
        (_, a), (_, b) = s.at(first), s.at(last)
        if _plain(a, b) and a.out_features % b.in_features == 0:
            s.size = b.in_features
            s.out(first, a.out_features // s.size), s.into(last)
            yield s.width("mlp")

    return find


register("SamMLPBlock")(_mlp("lin1", "lin2"))
register("ViTMLP", "CLIPMLP")(_mlp("fc1", "fc2"))
register("FeedForward")(_mlp("net.0.proj", "net.2"))
