"""Linear and convolution layers that store where their weights are not zero, and those weights.

    bits: one bit a weight,   values: what is not zero, in order

n weights of b bits, a share p zero, take n (1 + (1 - p) b) bits: at 95 % of float16 a ninth.
The weight is put together at the first call and kept: storage shrinks, neither time nor memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PLACES = 2 ** torch.arange(8, dtype=torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """Return mask: (n,) bool as bytes, (ceil(n / 8),) uint8, the first in the lowest bit."""
    padded = F.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).reshape(-1, 8)
    return (padded * _PLACES.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the `count` bools that `pack_bits` was given, (count,)."""
    return (packed[:, None] & _PLACES.to(packed.device)).ne(0).flatten()[:count]


class Sparse(nn.Module):
    """A layer without the zeros of its weight; gives what the dense layer gives, bit for bit.

    Args:
        layer: nn.Linear or nn.Conv2d.
        mask: of the weight's shape, bool: what is kept. Left out, what is not zero.
    """

    def __init__(self, layer: Any, mask: Tensor | None = None):
        super().__init__()
        weight = layer.weight.detach()
        mask = weight.ne(0) if mask is None else mask
        self.shape = tuple(weight.shape)
        self.bits: Tensor
        self.register_buffer("bits", pack_bits(mask.flatten()))
        self.values = nn.Parameter(weight[mask].clone(), requires_grad=False)
        self.bias = layer.bias
        self._dense: Tensor | None = None

    @property
    def nonzero(self) -> int:
        """How many weights are stored."""
        return self.values.numel()

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        kept, values = self._dense, self.values
        if kept is None or kept.device != values.device or kept.dtype != values.dtype:
            count = int(torch.Size(self.shape).numel())
            kept = values.new_zeros(count)
            kept[unpack_bits(self.bits, count)] = values.detach()
            self._dense = kept = kept.reshape(self.shape)
        return kept

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._dense = None

    def __deepcopy__(self, memo: Any) -> Sparse:
        kept, self._dense = self._dense, None
        try:
            new = type(self).__new__(type(self))
            memo[id(self)] = new
            for key, value in self.__dict__.items():
                new.__dict__[key] = copy.deepcopy(value, memo)
        finally:
            self._dense = kept
        return new


class SparseLinear(Sparse):
    """A linear layer; see `Sparse`."""

    def __init__(self, layer: nn.Linear, mask: Tensor | None = None):
        super().__init__(layer, mask)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return x: (*, K) times the transposed weight, plus the bias."""
        return F.linear(x, self.weight, self.bias)


class SparseConv2d(Sparse):
    """A convolution; see `Sparse`."""

    def __init__(self, layer: nn.Conv2d, mask: Tensor | None = None):
        super().__init__(layer, mask)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.how: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return x: (B, C, H, W) convolved with the weight, plus the bias."""
        return F.conv2d(x, self.weight, self.bias, **self.how)


def sparse(layer: nn.Module, mask: Tensor | None = None) -> Sparse:
    """Return a linear layer or a convolution, padded with zeros, without the zeros of its weight.

    Raises:
        TypeError: another layer.
    """
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer, mask)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        return SparseConv2d(layer, mask)
    raise TypeError(f"{type(layer).__name__}: expected nn.Linear, or nn.Conv2d padded with zeros")


def prunable(module: nn.Module) -> bool:
    """Say whether `sparse` takes a layer."""
    if type(module) is nn.Linear:
        return True
    return type(module) is nn.Conv2d and module.padding_mode == "zeros"
