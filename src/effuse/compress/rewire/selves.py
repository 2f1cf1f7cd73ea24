"""Self-attention layers of diffusers networks that another kind of attention can stand in for."""

from __future__ import annotations

from typing import Any

from torch import nn

from effuse.core.contracts import Where, everywhere
from effuse.core.errors import Unsuited
from effuse.nn.attention import SelfAttention

# processors that do nothing but softmax(q k^T) v, with or without slices
PLAIN = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "JointAttnProcessor2_0",
)


def self_attentions(model: nn.Module, where: Where = everywhere) -> list[str]:
    """Return the names of the plain self-attention layers of `model` that `where` allows.

    Cross-attention and joint attention of text and picture are none; nor is a layer whose processor
    does more than attention (rotary positions, adapters).

    Raises:
        Unsuited: the network has no such layer; says what it has instead.
        ValueError: it has, but `where` allows none.
    """
    found: list[str] = []
    odd: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            odd[name] = f"is {type(module).__name__} already"
        elif all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "heads", "processor")):
            why = _not_plain(module)
            if why:
                odd[name] = why
            else:
                found.append(name)
    if not found:
        listed = "; ".join(f"{n} {w}" for n, w in list(odd.items())[:2]) or "no attention at all"
        raise Unsuited(
            f"{type(model).__name__} has no plain self-attention layer to replace ({listed}): "
            "expected a UNet, DiT or PixArt network"
        )
    allowed = [n for n in found if where(n, model.get_submodule(n))]
    if not allowed:
        raise ValueError(
            f"`where` allows none of the {len(found)} self-attention layers of "
            f"{type(model).__name__}, such as {found[0]!r}"
        )
    return allowed


def _not_plain(layer: Any) -> str:
    """Return why attention of another kind cannot stand in for a layer; empty where it can."""
    if getattr(layer, "added_kv_proj_dim", None) is not None:
        return "attends to text and picture jointly"
    if getattr(layer, "is_cross_attention", False):
        return "attends to conditions"
    if type(layer.processor).__name__ not in PLAIN:
        return f"has a {type(layer.processor).__name__}, which does more than attention"
    if getattr(layer, "fused_projections", False):
        return "has fused projections: unfuse them first"
    if getattr(layer, "to_out", None) is None or getattr(layer, "pre_only", False):
        return "has no output projection of its own"
    if getattr(layer, "spatial_norm", None) is not None or getattr(layer, "is_causal", False):
        return "has a spatial norm or a causal mask"
    return ""
