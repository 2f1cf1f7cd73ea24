"""Attention whose time and memory grow with the number of tokens, not with its square."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SelfAttention


def positive(u: Tensor) -> Tensor:
    """Return elu(u) + 1 > 0: exp(u) below zero and u + 1 above."""
    return F.elu(u) + 1


class Mixing(ABC):
    """How tokens gather values through positive features. A frozen dataclass."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (B, H, N, E) of q, k: (B, H, N, D), positive, and v: (B, H, N, E)."""


@dataclass(frozen=True)
class Normalized(Mixing):
    """out_i = q_i (mean_j k_j^T v_j) / (q_i . mean_j k_j + eps): weights over tokens sum to one.

    Every token sees every other one, whatever their order or number: repeating all tokens changes
    nothing. Multiply-accumulates 2 N D E a head. eps = 0 is exact and unsafe where features vanish.
    """

    eps: float = 1e-4

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Mixing.__call__`."""
        values = (k.mT @ v) / k.shape[-2]  # (B, H, D, E)
        return (q @ values) / (self.denominator(q, k) + self.eps)

    def denominator(self, q: Tensor, k: Tensor) -> Tensor:
        """Return q_i . mean_j k_j, (B, H, N, 1); near eps, outputs shrink."""
        return q @ k.mean(-2).unsqueeze(-1)


@dataclass(frozen=True)
class Unnormalized(Mixing):
    """out_i = q_i (mean_j k_j^T v_j): an ablation; the sum of weights depends on the tokens."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Mixing.__call__`."""
        return q @ ((k.mT @ v) / k.shape[-2])


@dataclass(frozen=True)
class Causal(Mixing):
    """out_i = q_i (mean_{j <= i} k_j^T v_j) / (q_i . mean_{j <= i} k_j + eps): an ablation.

    A scan in the order of the tokens. In chunks: products within a chunk, running sums before it.
    """

    eps: float = 1e-4
    chunk: int = 64

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Mixing.__call__`."""
        n = q.shape[-2]
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the last column sums the weights
        pad = -n % self.chunk
        qs, ks, vs = (F.pad(a, (0, 0, 0, pad)).unflatten(-2, (-1, self.chunk)) for a in (q, k, v))
        states = ks.mT @ vs  # (B, H, chunks, D, E + 1)
        before = states.cumsum(-3) - states
        out = qs @ before + (qs @ ks.mT).tril() @ vs
        out = out.flatten(-3, -2)[..., :n, :]
        count = torch.arange(1, n + 1, device=q.device, dtype=q.dtype)[:, None]
        return out[..., :-1] / (out[..., -1:] + self.eps * count)


@dataclass(frozen=True)
class Bidirectional(Mixing):
    """The mean of a scan forwards and a scan backwards, each as `Causal`: an ablation."""

    eps: float = 1e-4
    chunk: int = 64

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Mixing.__call__`."""
        scan = Causal(self.eps, self.chunk)
        back = scan(*(a.flip(-2) for a in (q, k, v))).flip(-2)
        return (scan(q, k, v) + back) / 2


class LinearAttention(SelfAttention):
    """Linear attention in the place of a self-attention layer, with its projections.

    Q = phi((x + f_q(x)) W_q),  K = phi((x + f_k(x)) W_k),  V = x W_v,  phi(u) = elu(u) + 1
    f(x) = Linear(d, m), LayerNorm(m), LeakyReLU, Linear(m, d), the last one zero at first

    Half precision computes in float32 from phi to the mixed values: sums over many tokens and small
    denominators do not fit. Bounded by width, not by tokens: the N x N weights it stands for have
    rank D of a head at most.

    Source: LinFusion (2409.02097).

    Args:
        layer: see `SelfAttention`.
        hidden: m; 0 leaves f out.
        mixing: `Normalized`, or one of the ablations.
        rng: draws the first layers of f_q and f_k.
    """

    f_q: Any
    f_k: Any

    def __init__(
        self,
        layer: Any,
        hidden: int,
        mixing: Mixing | None = None,
        *,
        rng: torch.Generator | None = None,
    ):
        super().__init__(layer)
        self.mixing = Normalized() if mixing is None else mixing
        like = next(p for p in layer.parameters() if p.is_floating_point())
        width = layer.to_q.in_features
        self.f_q = _residual(width, hidden, like, rng) if hidden else None
        self.f_k = _residual(width, hidden, like, rng) if hidden else None
        self.train(layer.training)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q and K of the tokens x: (B, N, d), each (B, H, N, D), in float32 or better."""
        asks = x if self.f_q is None else x + self.f_q(x)
        keys = x if self.f_k is None else x + self.f_k(x)
        q = self.split(self.to_q(asks), self.norm_q)
        k = self.split(self.to_k(keys), self.norm_k)
        return positive(_wide(q)), positive(_wide(k))

    def mix(self, x: Tensor) -> Tensor:
        """See `SelfAttention.mix`."""
        q, k = self.features(x)
        v = self.split(self.to_v(x))
        return self.join(self.mixing(q, k, _wide(v)).to(v.dtype))

    @torch.no_grad()
    def least_denominator(self, x: Tensor) -> float:
        """Return the least q_i . mean_j k_j over the tokens x: (B, N, d) as `mix` gets them."""
        q, k = self.features(x)
        return float((q @ k.mean(-2).unsqueeze(-1)).min())


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _residual(width: int, hidden: int, like: Tensor, rng: torch.Generator | None) -> nn.Sequential:
    """Return f with its last layer zero, of the dtype and device of `like`."""
    with torch.device("meta"):
        f = nn.Sequential(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(), nn.Linear(hidden, width)
        )
    f = f.to_empty(device=like.device).to(like.dtype)
    if like.device.type != "meta":
        parts: Any = f
        first, norm, _, last = parts
        bound = width**-0.5
        for p in first.parameters():
            draw = torch.rand(p.shape, generator=rng, device=rng.device if rng else None)
            p.data.copy_((2 * draw - 1) * bound)
        nn.init.ones_(norm.weight)
        for p in (norm.bias, last.weight, last.bias):
            nn.init.zeros_(p)
    return f
