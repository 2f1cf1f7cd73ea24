"""How pictures are spoiled for house:restore: four tasks, drawn from a generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TASKS = ("noise", "blur", "rain", "holes")


def noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) in [0, 1] under grain of deviation 0.1 to 0.25."""
    level = 0.1 + 0.15 * torch.rand(len(x), 1, 1, 1, generator=rng)
    return (x + level * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def blur(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) under a Gaussian of deviation 1 to 2 pixels, with grain of 0.02."""
    width = 1 + torch.rand(len(x), 1, generator=rng)
    at = torch.arange(-6, 7, dtype=x.dtype)
    kernel = torch.exp(-(at**2) / (2 * width**2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    b, c, h, w = x.shape
    y = F.pad(x, (6, 6, 6, 6), mode="replicate").reshape(1, b * c, h + 12, w + 12)
    y = F.conv2d(y, kernel.reshape(b * c, 1, 13, 1), groups=b * c)
    y = F.conv2d(y, kernel.reshape(b * c, 1, 1, 13), groups=b * c).reshape(b, c, h, w)
    return (y + 0.02 * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def rain(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) behind 12 to 30 slanted grey streaks, half see-through."""
    b, _, h, w = x.shape
    many = 30
    u = torch.rand(6, b, many, generator=rng)
    slant = 0.6 * (u[0, :, :1] - 0.5)
    top, left, long = u[1] * 1.3 * h - 0.3 * h, u[2] * 1.2 * w - 0.1 * w, (0.15 + 0.25 * u[3]) * h
    falls = torch.arange(many) < 12 + 19 * u[4, :, :1]
    row = torch.arange(h, dtype=x.dtype).reshape(1, 1, h, 1)
    column = torch.arange(w, dtype=x.dtype).reshape(1, 1, 1, w)
    top, left, long, slant = (v[..., None, None] for v in (top, left, long, slant))
    beside = (column - left - slant * (row - top)).abs()
    inside = ((row >= top) & (row <= top + long)).to(x.dtype) * falls[..., None, None]
    cover = ((1.3 - beside).clamp(0, 1) * inside).amax(1, keepdim=True) * 0.65
    return x * (1 - cover) + (0.55 + 0.15 * u[5, :, 0].reshape(b, 1, 1, 1)) * cover


def holes(x: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) with five grey boxes of 6 to 14 pixels."""
    b, _, h, w = x.shape
    u = torch.rand(4, b, 5, 1, 1, generator=rng)
    high, wide = 6 + 8 * u[0], 6 + 8 * u[1]
    top, left = u[2] * (h - high), u[3] * (w - wide)
    row = torch.arange(h, dtype=x.dtype).reshape(1, 1, h, 1)
    column = torch.arange(w, dtype=x.dtype).reshape(1, 1, 1, w)
    box = (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)
    return torch.where(box.any(1, keepdim=True), 0.5, x)


def degrade(x: Tensor, task: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) in [0, 1] with each row spoiled by its task: (B,), into `TASKS`."""
    out = x.clone()
    for k, spoil in enumerate((noise, blur, rain, holes)):
        mine = task == k
        if mine.any():
            out[mine] = spoil(x[mine], rng)
    return out
