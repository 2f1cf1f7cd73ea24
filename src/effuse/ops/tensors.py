"""Broadcasting, seeded noise, the narrowest exact type and the check for finite values."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_as(a: Tensor | float, like: Tensor) -> Tensor:
    """Return `a` shaped to broadcast over the batch of `like`.

    Args:
        a: () one value for all, (B,) one per row, or as many dimensions as `like`, one per value.
        like: (B, *) the tensor it will meet.

    Returns:
        () in the dtype of `a`, (B, 1, ..., 1) or `a` in the dtype of `like`; on its device.
        Either way a product with `like` keeps the dtype of `like`.

    Raises:
        ValueError: `a` is none of these.
    """
    a = torch.as_tensor(a, device=like.device)
    if a.ndim == 0:
        return a
    if a.ndim == like.ndim and all(n in (1, m) for n, m in zip(a.shape, like.shape, strict=True)):
        return a.to(like.dtype)
    if a.ndim != 1 or a.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"a coefficient of shape {tuple(a.shape)} does not fit a sample of shape "
            f"{tuple(like.shape)}: expected () or ({like.shape[0]},)"
        )
    return a.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def randn_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape, dtype and device of `x` from `rng`.

    A generator on another device than `x` draws there and the noise is moved, so a CPU seed gives
    the same picture on every device.
    """
    device = x.device if rng is None else rng.device
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=device).to(x.device)


def narrowest(x: Tensor) -> Tensor:
    """Return float32 or float64 `x` in the narrowest type that holds its every value exactly.

    Weights that came in half precision and were widened to compute with get their bytes back.
    Others come back as they are.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return x
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        small = x.to(dtype)
        if torch.equal(small.to(x.dtype), x):
            return small
    return x


def require_finite(x: Tensor, what: str) -> None:
    """Raise `FloatingPointError` naming `what` if `x` holds a NaN or an infinity."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise FloatingPointError(f"{what}: {bad} of {x.numel()} values are not finite")
