"""Changes of resolution that keep all frequencies, each band through a gate of its own.

WGDown: X' = conv(sum_k g_k * X_k),  X_k the Haar bands of X
WGUp:   X' = conv(IDWT(g_1 X_1, ..., g_4 X_4)),  X_k the four quarters of X's channels
g = sigmoid(FFN(mean over pixels of X, perhaps beside the time embedding)),  one for each band and
channel. Source: Spectral Diffusion, 2211.17106.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from effuse.ops.bands import haar, unhaar


class Heard:
    """A forward hook that keeps the last output of a module, for each thread that calls it.

    So that layers to which a network passes no time embedding can see it. Copies begin empty.
    """

    def __init__(self) -> None:
        self.last: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the output."""
        self.last[threading.get_ident()] = output

    def get(self) -> Tensor | None:
        """Return what this thread heard last; in a thread of autograd, what any did."""
        mine = self.last.get(threading.get_ident())
        return next(reversed(self.last.values()), None) if mine is None else mine

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors and threads behind."""
        return {"last": {}}


class Gates(nn.Module):
    """Gates in (0, 1) for four bands of a feature map, (B, 4, C).

    Args:
        channels: of the map that is pooled.
        gated: C, the channels of a band.
        hidden: width of the layer between.
        time: width of the time embedding; 0 takes none (the pooled features know the level).

    heard: where the time embedding comes from if a call has none.
    """

    heard: Heard | None = None

    def __init__(self, channels: int, gated: int, hidden: int, time: int = 0):
        super().__init__()
        self.gated, self.time = gated, time
        self.one = nn.Linear(channels + time, hidden)
        self.two = nn.Linear(hidden, 4 * gated)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return the gates of x: (B, channels, H, W), with temb: (B, time)."""
        pooled = x.mean((-2, -1))
        if self.time:
            temb = self.heard.get() if temb is None and self.heard is not None else temb
            if temb is None or temb.shape[-1] != self.time:
                raise ValueError(f"expected a time embedding of width {self.time}")
            pooled = torch.cat([pooled, temb.to(pooled).expand(len(pooled), -1)], -1)
        g = torch.sigmoid(self.two(nn.functional.silu(self.one(pooled))))
        return g.unflatten(-1, (4, self.gated))


class WGDown(nn.Module):
    """Half the size: (B, C, H, W) to (B, out, H / 2, W / 2); H and W even."""

    def __init__(self, channels: int, out: int | None = None, time: int = 0):
        super().__init__()
        self.channels, self.out_channels = channels, out or channels
        self.gates = Gates(channels, channels, max(8, channels // 2), time)
        self.conv = nn.Conv2d(channels, self.out_channels, 3, padding=1)

    def forward(self, x: Tensor, *_: Any, temb: Tensor | None = None, **__: Any) -> Tensor:
        """Return the map at half the size."""
        return self.conv(self.gated(x, self.gates(x, temb)))

    @staticmethod
    def gated(x: Tensor, gates: Tensor) -> Tensor:
        """Return sum_k g_k X_k: (B, C, H / 2, W / 2), gates: (B, 4, C)."""
        return (haar(x) * gates[..., None, None]).sum(-4)


class WGUp(nn.Module):
    """Double the size: (B, C, H, W) to (B, out, 2H, 2W); C divisible by 4."""

    def __init__(self, channels: int, out: int | None = None, time: int = 0):
        if channels % 4:
            raise ValueError(f"channels={channels}: expected a multiple of 4, one part a band")
        super().__init__()
        self.channels, self.out_channels = channels, out or channels
        self.gates = Gates(channels, channels // 4, max(8, channels // 2), time)
        self.conv = nn.Conv2d(channels // 4, self.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        output_size: Any = None,
        *_: Any,
        temb: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """Return the map at double the size."""
        if output_size is not None and tuple(output_size) != (2 * x.shape[-2], 2 * x.shape[-1]):
            raise ValueError(
                f"{tuple(output_size)} from {tuple(x.shape[-2:])}: expected twice the size; give "
                "pictures whose sides halve evenly at every stage"
            )
        return self.conv(self.gated(x, self.gates(x, temb)))

    @staticmethod
    def gated(x: Tensor, gates: Tensor) -> Tensor:
        """Return IDWT(g_k X_k): (B, C / 4, 2H, 2W), gates: (B, 4, C / 4)."""
        return unhaar(x.unflatten(1, (4, -1)) * gates[..., None, None])
