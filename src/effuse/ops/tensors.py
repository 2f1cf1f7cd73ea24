"""Broadcasting, weighted sums, seeded noise, the narrowest exact type, finite values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
    a = torch.as_tensor(
        a, device=like.device, dtype=None if isinstance(a, Tensor) else torch.float64
    )
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


def number(c: Tensor | float) -> float | None:
    """Return `c` as a number, or None if it must stay a tensor.

    That is if it has rows, is on a device that would have to be waited for, or something is
    differentiating or batching through it.
    """
    if not isinstance(c, Tensor):
        return float(c)
    if c.ndim or c.requires_grad or not c.is_cpu:
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return c.item()


def has_zero(c: Tensor | float) -> bool:
    """Say whether `c`, a number or a tensor, is or has a zero."""
    return bool((c == 0).any()) if isinstance(c, Tensor) else c == 0


def weighted_sum(*terms: tuple[Tensor | float, Tensor]) -> Tensor:
    """Return sum_i c_i x_i; c_i: () or (B,), x_i: (B, *) of one shape.

    With plain numbers for c and one type for x it takes one new tensor and a pass a term.
    """
    first = terms[0][1]
    by = [number(c) for c, _ in terms]
    alike = all(x.dtype == first.dtype and x.shape == first.shape for _, x in terms[1:])
    if not alike or None in by or torch._C._are_functorch_transforms_active():
        out = expand_as(terms[0][0], first) * first
        for c, x in terms[1:]:
            out = out + expand_as(c, x) * x
        return out
    numbers: list[float] = by  # type: ignore[assignment]
    if numbers[0] == 1 and len(terms) > 1:
        out, rest = torch.add(first, terms[1][1], alpha=numbers[1]), 2
    else:
        out, rest = first * numbers[0], 1
    for c, (_, x) in zip(numbers[rest:], terms[rest:], strict=True):
        out.add_(x, alpha=c)
    return out


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


def require_finite(x: Tensor, what: str | Callable[[], str]) -> None:
    """Raise `FloatingPointError` naming `what` if `x` holds a NaN or an infinity."""
    if math.isfinite(x.sum().item()):  # one pass that writes nothing; a sum may overflow, though
        return
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        named = what if isinstance(what, str) else what()
        raise FloatingPointError(f"{named}: {bad} of {x.numel()} values are not finite")
