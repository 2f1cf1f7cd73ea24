"""Quantizer grids: w ~ scale (q - zero), q a whole number of few bits. Fit, quantize, undo, pack.

A `Grid` says bits, symmetry and granularity; `fit` finds scale and zero of a tensor, `quantize`
gives whole numbers for any scale and zero (a method may have better ones), `dequantize` goes back,
`pack` puts numbers of 1 to 8 bits side by side into bytes. `zero` may be fractional.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""From real positions on the grid to whole ones, elementwise."""


def nearest(u: Tensor) -> Tensor:
    """Round to the nearest whole number, halves to the even one."""
    return u.round()


@dataclass(frozen=True)
class Stochastic:
    """Round up with the probability of the fraction, so that the mean is kept."""

    rng: torch.Generator | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """Round u: (*)."""
        coin = torch.rand(u.shape, generator=self.rng, dtype=u.dtype, device=u.device)
        return (u + coin).floor()


class Granularity(ABC):
    """Which entries of a tensor share a scale. A frozen dataclass."""

    @abstractmethod
    def rows(self, w: Tensor) -> Tensor:
        """Return w: (*) as (R, L): one row for each scale."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all."""

    def rows(self, w: Tensor) -> Tensor:
        """See `Granularity.rows`: (1, L)."""
        return w.reshape(1, -1)


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each output channel, the first dimension."""

    def rows(self, w: Tensor) -> Tensor:
        """See `Granularity.rows`: (N, L)."""
        return w.reshape(w.shape[0], -1)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `size` neighbors within an output channel; `size` must divide it."""

    size: int = 64

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected a positive number of entries")

    def rows(self, w: Tensor) -> Tensor:
        """See `Granularity.rows`: (N L / size, size)."""
        each = w.numel() // max(w.shape[0], 1)
        if each % self.size:
            raise ValueError(
                f"groups of {self.size} do not fit into the {each} entries of a channel of "
                f"{tuple(w.shape)}: expected a divisor"
            )
        return w.reshape(-1, self.size)


@dataclass(frozen=True)
class Grid:
    """Equally spaced levels: scale (q - zero).

    bits: 2 to 8, and 1 if not symmetric. symmetric: zero is 0 and q lies within
    +-(2^(bits-1) - 1); otherwise q lies within 0 and 2^bits - 1, and min and max are levels.
    whole_zero: round `zero`, as some integer kernels want; then 0 is a level.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerChannel)
    whole_zero: bool = False

    def __post_init__(self) -> None:
        """Check the bits."""
        least = 2 if self.symmetric else 1
        if not least <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: expected {least} to 8")

    @property
    def low(self) -> int:
        """The least q."""
        return -self.high if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest q."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """How q is stored before packing: int8 or uint8."""
        return torch.int8 if self.symmetric else torch.uint8

    def fit(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale, zero), both (R, 1), that reach the extremes of w: (*).

        Rows of zeros (symmetric) or of one value get a scale with which they are exact. In the
        dtype of `w`, at least float32.

        Raises:
            FloatingPointError: `w` is not finite.
        """
        rows = self.granularity.rows(w)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not torch.isfinite(rows).all():
            raise FloatingPointError("cannot quantize: weights hold a NaN or an infinity")
        if self.symmetric:
            scale = rows.abs().amax(1, keepdim=True) / self.high
            return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
        low, high = rows.aminmax(dim=1, keepdim=True)
        if self.whole_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / self.high
        scale = torch.where(scale > 0, scale, torch.where(low == 0, 1.0, low.abs()))
        zero = -low / scale
        return scale, zero.round() if self.whole_zero else zero

    def quantize(
        self, w: Tensor, scale: Tensor, zero: Tensor, rounding: Rounding = nearest
    ) -> Tensor:
        """Return q = clip(rounding(w / scale + zero)) of w: (*), shaped as `w`, one byte each."""
        rows = self.granularity.rows(w).to(scale.dtype)
        q = rounding(rows / scale + zero).clamp(self.low, self.high)
        return q.to(self.dtype).reshape(w.shape)

    def dequantize(self, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return scale (q - zero), shaped as q: (*), in the dtype of `scale`."""
        rows = self.granularity.rows(q).to(scale.dtype)
        return (scale * (rows - zero)).reshape(q.shape)

    def round_trip(self, w: Tensor, rounding: Rounding = nearest) -> Tensor:
        """Return w: (*) moved to its own grid, in its dtype."""
        scale, zero = self.fit(w)
        return self.dequantize(self.quantize(w, scale, zero, rounding), scale, zero).to(w.dtype)


class Rows(NamedTuple):
    """q: (M, K) int8 and scale: (M, 1) float32 with x ~ scale q."""

    q: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, dims: Sequence[int] = (-1,)) -> Rows:
    """Quantize activations to int8 on the fly, symmetric, one scale over `dims` of x: (*).

    Three passes over `x`; rows of zeros stay zeros. Elementwise |x - scale q| <= scale / 2, up to
    float32 rounding.
    """
    scale = x.abs().amax(tuple(dims), keepdim=True).float().div_(127).clamp_min_(1e-30)
    return Rows((x * scale.reciprocal()).round_().to(torch.int8), scale)


def pack(q: Tensor, bits: int) -> Tensor:
    """Put whole numbers of `bits` bits side by side into bytes, lowest bit first.

    Args:
        q: (*) int8 within +-2^(bits-1), kept in two's complement, or uint8 below 2^bits.
        bits: 1 to 8.

    Returns:
        (ceil(n bits / 8),) uint8.

    Raises:
        ValueError: a number needs more bits.
    """
    _check_bits(bits)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if q.dtype == torch.int8 else (0, 2**bits)
    if q.numel() and (int(q.min()) < low or int(q.max()) >= high):
        raise ValueError(
            f"numbers from {int(q.min())} to {int(q.max())} do not fit into {bits} bits: "
            f"expected {low} to {high - 1}"
        )
    flat = q.reshape(-1).view(torch.uint8)
    if bits == 8:
        return flat.clone()
    each = torch.arange(bits, dtype=torch.uint8, device=q.device)
    stream = ((flat[:, None] >> each) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=q.device)
    return (stream * weights).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Undo `pack`: whole numbers of `shape`, of `dtype` int8 or uint8.

    Raises:
        ValueError: `packed` has not the bytes that `shape` and `bits` need.
    """
    _check_bits(bits)
    count = math.prod(shape)
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(
            f"{packed.numel()} bytes: expected {-(-count * bits // 8)} for {count} numbers of "
            f"{bits} bits"
        )
    each = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> each) & 1).reshape(-1)[: count * bits].reshape(-1, bits)
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=packed.device)
    value = (stream * weights).sum(1)
    if dtype == torch.int8:
        value = torch.where(value >= 2 ** (bits - 1), value - 2**bits, value)
    return value.to(dtype).reshape(tuple(shape))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: expected 1 to 8")
