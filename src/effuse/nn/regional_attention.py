"""Attention within windows that also sees a coarse picture of everything."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import SelfAttention


class Canvas:
    """How high and wide the canvas of a network's present call is, for layers that see tokens.

    A pre-hook of the network, `network.register_forward_pre_hook(canvas.look, with_kwargs=True)`,
    tells it; one value a thread. Without it tokens are taken for those of a square.
    """

    def __init__(self) -> None:
        self._sides: dict[int, tuple[int, int]] = {}

    def look(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the sides of the sample in the arguments of a call."""
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if isinstance(x, Tensor) and x.ndim == 4:
            self._sides[threading.get_ident()] = (x.shape[-2], x.shape[-1])

    def grid(self, tokens: int) -> tuple[int, int]:
        """Return (h, w) with h w = tokens, of the canvas' shape.

        Raises:
            ValueError: there is no such grid.
        """
        high, wide = self._sides.get(threading.get_ident(), (1, 1))
        h = max(1, round(math.sqrt(tokens * high / wide)))
        for guess in (h, h - 1, h + 1):
            if guess > 0 and tokens % guess == 0:
                return guess, tokens // guess
        raise ValueError(
            f"{tokens} tokens of a canvas of {high} x {wide}: expected sides that every level of "
            "the network divides"
        )


class RegionalAttention(SelfAttention):
    """Softmax attention of each token to its window and to pooled tokens of the whole canvas.

    keys and values of a window = its own w x w tokens, and the means of all p x p patches
    out = softmax(Q [K_own, K_pooled]^T / sqrt(D)) [V_own, V_pooled]

    Multiply-accumulates 2 N (w^2 + N / p^2) D a head instead of 2 N^2 D; with p = w least at
    w = N^(1/4). Where a window does not divide the canvas, the rest is padded and masked.

    A reconstruction of A-SDM's global-regional interactive attention (2312.15516), of which only
    the abstract was at hand.

    Args:
        layer: see `SelfAttention`.
        window: w; 0 leaves the own tokens out.
        pool: p; 0 leaves the pooled tokens out.
        interactive: pooled values are what pooled queries gather from the windows' own outputs,
            instead of means.
        canvas: tells how tokens lie.

    Raises:
        ValueError: neither own nor pooled tokens are left.
    """

    def __init__(
        self,
        layer: Any,
        window: int,
        pool: int,
        *,
        interactive: bool = False,
        canvas: Canvas | None = None,
    ):
        super().__init__(layer)
        if not window and not pool:
            raise ValueError("window=0, pool=0: expected tokens to attend to")
        if interactive and not (window and pool):
            raise ValueError("interactive: expected a window and pooled tokens to go between")
        self.window, self.pool, self.interactive = window, pool, interactive
        self.scale = getattr(layer, "scale", None)
        self.canvas = Canvas() if canvas is None else canvas
        self._grids: dict[int, tuple[int, int]] = {}

    @contextlib.contextmanager
    def arranged(self, shape: torch.Size) -> Iterator[None]:
        """See `SelfAttention.arranged`."""
        me = threading.get_ident()
        self._grids[me] = (shape[2], shape[3]) if len(shape) == 4 else self.canvas.grid(shape[1])
        try:
            yield
        finally:
            self._grids.pop(me, None)

    def mix(self, x: Tensor) -> Tensor:
        """See `SelfAttention.mix`."""
        h, w = self._grids[threading.get_ident()]
        q = self.split(self.to_q(x), self.norm_q)
        k = self.split(self.to_k(x), self.norm_k)
        v = self.split(self.to_v(x))
        if not self.window:
            return self.join(
                self._attend(q, pooled(k, h, w, self.pool), pooled(v, h, w, self.pool))
            )
        side = (min(self.window, h), min(self.window, w))
        asks, keys, values = (windows(a, h, w, side) for a in (q, k, v))
        real = windows(x.new_ones(1, 1, h * w, 1), h, w, side)[..., 0] > 0  # (n, 1, tokens)
        padded = not bool(real.all())
        if not self.pool:
            mask = real.repeat(len(x), 1, 1)[:, :, None] if padded else None
            return self.join(
                self._together(self._attend(asks, keys, values, mask), h, w, side, len(x))
            )
        far_keys, far = pooled(k, h, w, self.pool), pooled(v, h, w, self.pool)
        if self.interactive:
            mask = real.repeat(len(x), 1, 1)[:, :, None] if padded else None
            regional = self._together(self._attend(asks, keys, values, mask), h, w, side, len(x))
            far = self._attend(pooled(q, h, w, self.pool), k, regional)
        count = len(real)
        far_keys, far = (a.repeat_interleave(count, 0) for a in (far_keys, far))
        mask = None
        if padded:
            coarse = real.new_ones(count, 1, far.shape[2])
            mask = torch.cat([real, coarse], -1).repeat(len(x), 1, 1)[:, :, None]
        out = self._attend(
            asks, torch.cat([keys, far_keys], -2), torch.cat([values, far], -2), mask
        )
        return self.join(self._together(out, h, w, side, len(x)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)

    @staticmethod
    def _together(x: Tensor, h: int, w: int, side: tuple[int, int], batch: int) -> Tensor:
        """Undo `windows`: (B n, H, a b, D) to (B, H, h w, D), without what was padded."""
        (a, b), heads, width = side, x.shape[1], x.shape[-1]
        rows, columns = -(-h // a), -(-w // b)
        x = x.reshape(batch, rows, columns, heads, a, b, width).permute(0, 3, 1, 4, 2, 5, 6)
        return x.reshape(batch, heads, rows * a, columns * b, width)[:, :, :h, :w].flatten(2, 3)


def windows(x: Tensor, h: int, w: int, side: tuple[int, int]) -> Tensor:
    """Return tokens x: (B, H, h w, D) by windows of `side`, (B n, H, a b, D), padded with zeros."""
    (a, b), heads, width = side, x.shape[1], x.shape[-1]
    x = F.pad(x.unflatten(2, (h, w)), (0, 0, 0, -w % b, 0, -h % a))
    x = x.unflatten(3, (-1, b)).unflatten(2, (-1, a))  # (B, H, rows, a, columns, b, D)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, heads, a * b, width)


def pooled(x: Tensor, h: int, w: int, patch: int) -> Tensor:
    """Return the means of tokens x: (B, H, h w, D) over patches, (B, H, g, D); rests count less."""
    if patch == 1:
        return x
    batch, heads, _, width = x.shape
    picture = x.transpose(2, 3).reshape(batch * heads, width, h, w)
    small = F.avg_pool2d(
        picture, (min(patch, h), min(patch, w)), ceil_mode=True, count_include_pad=False
    )
    return small.flatten(2).mT.reshape(batch, heads, -1, width)
