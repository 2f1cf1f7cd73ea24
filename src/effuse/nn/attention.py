"""Self-attention that inherits another layer's projections and mixes tokens in its own way."""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """In the place of a self-attention layer: its projections, another rule between tokens.

    Q, K, V = heads of to_q(x), to_k(x), to_v(x);  out = to_out(mix(Q, K, V))

    Takes tokens (B, N, d), or a picture (B, d, H, W) where the layer did; its group norm, its norms
    of queries and keys, its residual sum and its output factor are kept. Projections are copies
    under the same names, so that what finds `to_q` by name (LoRA, int8) finds it here too. Other
    keyword arguments that diffusers passes to attention are not used.

    Args:
        layer: diffusers' `Attention` or one built alike: to_q, to_k, to_v, to_out and heads.

    Raises:
        ValueError: of a call with a mask, or with other tokens to attend to.
    """

    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    group_norm: Any
    norm_q: Any
    norm_k: Any

    def __init__(self, layer: Any):
        super().__init__()
        self.heads = int(layer.heads)
        for name in ("group_norm", "norm_q", "norm_k", "to_q", "to_k", "to_v", "to_out"):
            part = getattr(layer, name, None)
            setattr(self, name, None if part is None else copy.deepcopy(part))
        self.residual_connection = bool(getattr(layer, "residual_connection", False))
        self.rescale_output_factor = float(getattr(layer, "rescale_output_factor", 1.0))
        self.train(layer.training)

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Return what each of the tokens x: (B, N, d) gathers, (B, N, heads x width)."""

    def split(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Return x: (B, N, H D) by heads, (B, H, N, D), each normalized by `norm`."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return x if norm is None else norm(x)

    @staticmethod
    def join(x: Tensor) -> Tensor:
        """Return x: (B, H, N, D) as (B, N, H D)."""
        return x.transpose(1, 2).flatten(-2)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Return the layer's output, shaped as hidden_states: (B, N, d) or (B, d, H, W)."""
        if attention_mask is not None:
            raise ValueError(
                f"{type(self).__name__} was given an attention mask, which it cannot follow: "
                "detach it, or leave this layer out with `where`"
            )
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            raise ValueError(
                f"{type(self).__name__} was given other tokens to attend to: it stands for "
                "self-attention only, leave this layer out with `where`"
            )
        x, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:
            x = x.flatten(2).mT
        if self.group_norm is not None:
            x = self.group_norm(x.mT).mT
        with self.arranged(shape):
            out = self.mix(x)
        out = self.to_out[1](self.to_out[0](out))
        if len(shape) == 4:
            out = out.mT.reshape(shape)
        if self.residual_connection:
            out = out + hidden_states
        return out if self.rescale_output_factor == 1.0 else out / self.rescale_output_factor

    def arranged(self, shape: torch.Size) -> Any:
        """Return a context in which `mix` may know the shape the layer was called with."""
        return contextlib.nullcontext()
