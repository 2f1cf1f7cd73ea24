"""Linear and convolution layers whose weights are stored as int8, and how they compute.

    w ~ scale_n q_n        q: int8, scale: float32, one for each output channel

`Integer` quantizes activations too, on the fly, and multiplies whole numbers: exact in int32, four
times the numbers in a vector register, faster than float32 where the processor has instructions
for it (`EXACT`). `Dequantized` makes the weight from q at each call: smaller, never faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.ops.grid import Grid, quantize_rows

GRID = Grid(bits=8)


class Compute(ABC):
    """How a layer with int8 weights computes. A value; knows nothing of a layer."""

    name: str

    @abstractmethod
    def linear(self, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return x: (*, K) times the transposed weight q: (N, K), scale: (N,), plus bias: (N,)."""

    @abstractmethod
    def conv(
        self,
        x: Tensor,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        total: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """Return x: (B, C, H, W) convolved with q: (N, C, h, w).

        total: (N,) sums of q over all but the first dimension.
        how: stride, padding and dilation, as of `torch.nn.functional.conv2d`, pairs each.
        """


class Dequantized(Compute):
    """The weight in floating point at each call; activations stay as they are."""

    name = "dequantized"

    def linear(self, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """See `Compute.linear`."""
        return F.linear(x, dequantize(q, scale, x.dtype), bias)

    def conv(
        self,
        x: Tensor,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        total: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """See `Compute.conv`."""
        return F.conv2d(x, dequantize(q, scale, x.dtype), bias, **how)


class Integer(Compute):
    """Activations to int8 on the fly; products of whole numbers, summed exactly in int32.

    y_mn = s_m scale_n sum_k (q^x_mk - z_m) q_nk + bias_n

    A linear layer and a 1x1 convolution have a scale s_m for each row or position and no z_m. Other
    convolutions have both for each sample, so that the range of activations that are hardly ever
    negative is not half empty; they gather their windows in int8, with z_m for the padding. No
    sample depends on its batch. As `Dequantized` where a gradient with respect to `x` is asked for,
    on a processor without `EXACT`, and on an accelerator whose kernel refuses the shape.
    """

    name = "integer"

    def linear(self, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """See `Compute.linear`."""
        flat = x.reshape(-1, x.shape[-1])
        if not _integer(flat.shape[0], q, x):
            return _FLOAT.linear(x, q, scale, bias)
        rows = quantize_rows(flat)
        y = _scaled(torch._int_mm(rows.q, q.t()), scale, rows.scale, bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def conv(
        self,
        x: Tensor,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        total: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """See `Compute.conv`; the result is in channels-last memory."""
        matrix = q.permute(0, 2, 3, 1).reshape(q.shape[0], -1)
        height, width = _conv_size(x, q, how)
        if not _integer(x.shape[0] * height * width, matrix, x):
            return _FLOAT.conv(x, q, scale, bias, total, how)
        if q.shape[2:] == (1, 1) and how["stride"] == (1, 1) and how["padding"] == (0, 0):
            return self.linear(x.permute(0, 2, 3, 1), matrix, scale, bias).permute(0, 3, 1, 2)
        codes, step, zero = quantize_samples(x)
        windows = _windows(codes, zero, q.shape[2:], height, width, how)
        y = torch._int_mm(windows, matrix.t()).view(x.shape[0], height, width, -1)
        shift = -step * zero * scale * total
        y = _scaled(y, scale, step, shift if bias is None else shift + bias)
        return y.to(x.dtype).permute(0, 3, 1, 2)


_FLOAT = Dequantized()
COMPUTES: dict[str, Compute] = {c.name: c for c in (Integer(), Dequantized())}


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of q: (N, *) and scale: (N,)."""
    return (q.float() * scale.view(-1, *[1] * (q.ndim - 1))).to(dtype)


def quantize_samples(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x: (B, C, H, W) on the fly to int8, asymmetric, one step and zero a sample.

    Returns:
        (q, step, zero) with x ~ step (q - zero): q like `x`, the others (B, 1, 1, 1) float32,
        `zero` whole. 0 is a level, so padding is exact. |x - step (q - zero)| <= step / 2, up to
        float32 rounding.
    """
    low = x.amin((1, 2, 3), keepdim=True).float().clamp_max(0)
    high = x.amax((1, 2, 3), keepdim=True).float().clamp_min(0)
    step = ((high - low) / 254).clamp_min_(1e-30)  # 254: both ends may round outwards
    zero = -128 - (low / step).round_()
    return (x * step.reciprocal()).round_().add_(zero).to(torch.int8), step, zero


def _scaled(sums: Tensor, one: Tensor, two: Tensor, bias: Tensor | None) -> Tensor:
    """Return sums * one * two + bias in float32, in the memory of the int32 `sums`: (*, N)."""
    y = sums.view(torch.float32).copy_(sums).mul_(one)
    if bias is None:
        return y.mul_(two)
    if torch.is_grad_enabled() and bias.requires_grad:
        return torch.addcmul(bias.float(), y, two)
    return torch.addcmul(bias.float(), y, two, out=y)


def _exact() -> bool:
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    most = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(most, most.t()) == 64 * 127**2).all())


EXACT = torch.backends.mkldnn.is_available() and _exact()
"""Whether this processor sums products of int8 exactly, and in few instructions (VNNI, AMX).

An x86 processor without them adds pairs of products in 16 bits, which saturate; elsewhere torch has
only a plain loop. Found by one small product when this module is imported.
"""


def _integer(rows: int, matrix: Tensor, x: Tensor) -> bool:
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    if matrix.shape[1] >= 2**17:  # sums of so many products may leave int32
        return False
    if x.device.type == "cuda":  # what its kernel takes
        return rows > 16 and matrix.shape[0] % 8 == 0 and matrix.shape[1] % 8 == 0
    return EXACT and rows > 0 and x.device.type == "cpu"


def _conv_size(x: Tensor, q: Tensor, how: dict[str, Any]) -> tuple[int, int]:
    one, two = (
        (x.shape[2 + i] + 2 * how["padding"][i] - how["dilation"][i] * (q.shape[2 + i] - 1) - 1)
        // how["stride"][i]
        + 1
        for i in (0, 1)
    )
    return one, two


def _windows(
    q: Tensor, zero: Tensor, kernel: Any, height: int, width: int, how: dict[str, Any]
) -> Tensor:
    """Return the windows of q: (B, C, H, W) int8 as rows: (B height width, h w C)."""
    (down, right), (dy, dx) = how["padding"], how["dilation"]
    b, c, inner, across = q.shape
    whole = q.new_empty(b, inner + 2 * down, across + 2 * right, c)
    if down or right:
        whole.copy_(zero.expand_as(whole))
    whole[:, down : down + inner, right : right + across] = q.permute(0, 2, 3, 1)
    s = whole.stride()
    (sy, sx), (h, w) = how["stride"], kernel
    view = whole.as_strided(
        (b, height, width, h, w, c), (s[0], s[1] * sy, s[2] * sx, s[1] * dy, s[2] * dx, s[3])
    )
    return view.reshape(b * height * width, h * w * c)


class Quantized(nn.Module):
    """What the two layers share: q, scale, bias, and a `weight` for code that looks at it.

    The scale stays in float32 when the network is cast; `like` follows, so that `weight.dtype` is
    the floating dtype of the network and never int8.
    """

    q: Tensor
    scale: Tensor
    total: Tensor
    like: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d, compute: Compute):
        super().__init__()
        weight = base.weight.detach()
        scale, zero = GRID.fit(weight)
        q = GRID.quantize(weight, scale, zero)
        # convolutions gather windows with channels last, so their weights lie like that
        order = torch.channels_last if q.ndim == 4 else torch.contiguous_format
        self.register_buffer("q", q.contiguous(memory_format=order))
        self.register_buffer("scale", scale.flatten().float())
        self.register_buffer("total", None, persistent=False)
        self._sum()
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self.bias = None if base.bias is None else _copy(base.bias)
        self.compute = compute
        self.training = base.training

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, made anew at each look."""
        return dequantize(self.q, self.scale, self.like.dtype)

    def _sum(self) -> None:
        self.total = self.q.flatten(1).sum(1, dtype=torch.int32).float()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sum()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        self._sum()
        return self

    @property
    def kind(self) -> str:
        """The name of the way it computes."""
        return self.compute.name


class QuantizedLinear(Quantized):
    """A linear layer with int8 weights: q (N, K), scale (N,)."""

    def __init__(self, base: nn.Linear, compute: Compute):
        super().__init__(base, compute)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x: (*, K) to (*, N); further arguments, such as a LoRA scale, have no meaning."""
        return self.compute.linear(x, self.q, self.scale, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer within a printed network."""
        return f"{self.in_features}, {self.out_features}, int8, {self.kind}"


class QuantizedConv2d(Quantized):
    """A convolution with int8 weights: q (N, C, h, w), scale (N,). One group, zero padding."""

    def __init__(self, base: nn.Conv2d, compute: Compute):
        super().__init__(base, compute)
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.kernel_size, self.stride = base.kernel_size, base.stride
        self.padding, self.dilation, self.groups = base.padding, base.dilation, 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x: (B, C, H, W) to (B, N, H', W')."""
        how = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return self.compute.conv(x, self.q, self.scale, self.bias, self.total, how)

    def extra_repr(self) -> str:
        """Describe the layer within a printed network."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, int8, {self.kind}"
        )


def _copy(p: Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach().clone(), p.requires_grad)


def quantizable(module: nn.Module) -> bool:
    """Say whether `quantized` takes the layer: exactly a linear layer, or a plain convolution."""
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def quantized(module: nn.Module, compute: Compute) -> Quantized:
    """Return the layer with int8 weights; bias and weight are copies.

    Raises:
        TypeError: the layer is of another kind.
    """
    if not quantizable(module):
        raise TypeError(f"{type(module).__name__}: expected a Linear, or a Conv2d of one group")
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module, compute)
    return QuantizedConv2d(cast(nn.Conv2d, module), compute)
