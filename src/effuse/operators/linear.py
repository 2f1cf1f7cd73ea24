"""Linear measurements of pictures, each with its adjoint and its pseudo-inverse in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core.contracts import Operator
from effuse.core.method import method


@method("linear", example=lambda: Known(torch.tensor([[1.0, 0.0], [1.0, 1.0]]).repeat(4, 4)))
class Known(Operator):
    """Keeps what is known and blanks the rest: A x = mask x. Inpainting.

    Args:
        mask: (H, W), (C, H, W) or (B, C, H, W), one where known and zero elsewhere.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        mask = torch.as_tensor(mask).float()
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask: expected ones where known and zeros elsewhere")
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return x: (B, C, H, W), zero where unknown."""
        return self.mask.to(x) * x

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """Return the same, A' = A."""
        return self(y)

    def pinv(self, y: Tensor) -> Tensor:
        """Return the same: a projection is its own pseudo-inverse."""
        return self(y)


def colors() -> Tensor:
    """Return an orthogonal (3, 3) change of colors; its first axis is gray, (1, 1, 1) / sqrt(3)."""
    gray = torch.ones(3, dtype=torch.float64) / 3**0.5
    blue = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64) / 6**0.5
    red = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / 2**0.5
    return torch.stack([gray, blue, red])


@method("linear", example=lambda: Mix(colors()[:1]))
class Mix(Operator):
    """Mixes channels: y_j = sum_i matrix_ji x_i. `Mix(colors()[:1])` is gray: colorization.

    Args:
        matrix: (K, C) of full row rank.
    """

    matrix: Tensor
    inverse: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        matrix = torch.as_tensor(matrix).double()
        if matrix.ndim != 2 or torch.linalg.matrix_rank(matrix) < len(matrix):
            raise ValueError(f"matrix of shape {tuple(matrix.shape)}: expected (K, C) of rank K")
        self.register_buffer("matrix", matrix)
        self.register_buffer("inverse", torch.linalg.pinv(matrix))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K, H, W) of x: (B, C, H, W)."""
        return torch.einsum("kc,bchw->bkhw", self.matrix.to(x), x)

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """Return (B, C, H, W) of y: (B, K, H, W)."""
        return torch.einsum("kc,bkhw->bchw", self.matrix.to(y), y)

    def pinv(self, y: Tensor) -> Tensor:
        """Return (B, C, H, W) of y: (B, K, H, W)."""
        return torch.einsum("ck,bkhw->bchw", self.inverse.to(y), y)


@method("linear", example=lambda: Average(2))
class Average(Operator):
    """Means of blocks of factor x factor pixels: super-resolution.

    Args:
        factor: divides both sides.
    """

    def __init__(self, factor: int):
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"factor={factor!r}: expected a positive integer")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H / factor, W / factor) of x: (B, C, H, W)."""
        if any(side % self.factor for side in x.shape[-2:]):
            raise ValueError(f"sides {tuple(x.shape[-2:])}: expected divisible by {self.factor}")
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """Return y spread over its blocks, shared among their pixels."""
        return self.pinv(y) / self.factor**2

    def pinv(self, y: Tensor) -> Tensor:
        """Return y repeated over its blocks."""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


def _bell() -> Tensor:
    row = torch.tensor([0.25, 0.5, 0.25])
    return row.outer(row)


@method("linear", example=lambda: Blur(_bell()))
class Blur(Operator):
    """Convolution with a kernel, periodic at the edges, by Fourier transform.

    Args:
        kernel: (h, w), centered at (h // 2, w // 2).
        floor: frequencies kept to less than this share of the strongest count as lost: the
            pseudo-inverse leaves them out.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, floor: float = 1e-3):
        super().__init__()
        kernel = torch.as_tensor(kernel).double()
        if kernel.ndim != 2 or not kernel.any():
            raise ValueError(f"kernel of shape {tuple(kernel.shape)}: expected (h, w), not zero")
        self.register_buffer("kernel", kernel)
        self.floor = floor

    def _gain(self, like: Tensor) -> Tensor:
        h, w = like.shape[-2:]
        rows, columns = self.kernel.shape
        if rows > h or columns > w:
            raise ValueError(f"a kernel of {rows} x {columns} on {h} x {w} pixels: expected less")
        whole = F.pad(self.kernel, (0, w - columns, 0, h - rows))
        whole = whole.roll((-(rows // 2), -(columns // 2)), (0, 1))
        gain = torch.fft.rfft2(whole)
        lost = gain.abs() < self.floor * gain.abs().max()
        return torch.where(lost, 0.0, gain).to(like.device)

    def _filtered(self, x: Tensor, gain: Tensor) -> Tensor:
        out = torch.fft.irfft2(torch.fft.rfft2(x.double()) * gain, s=x.shape[-2:])
        return out.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x: (B, C, H, W), blurred."""
        return self._filtered(x, self._gain(x))

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """Return y blurred with the kernel turned round."""
        return self._filtered(y, self._gain(y).conj())

    def pinv(self, y: Tensor) -> Tensor:
        """Return y sharpened, in the frequencies that are left."""
        gain = self._gain(y)
        return self._filtered(y, torch.where(gain == 0, 0.0, 1 / torch.where(gain == 0, 1.0, gain)))
