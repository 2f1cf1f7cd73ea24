"""Intervals by resampling: deterministic, on the data's own device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def bootstrap(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic of `values` at `level`.

    Args:
        values: (N, *) one row a sample.
        statistic: (N, *) -> () ; the mean by default, which is resampled in one tensor operation.
        level: coverage in (0, 1).
        draws: resamples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        Lower and upper end; (nan, nan) of fewer than two rows.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: expected a fraction in (0, 1)")
    values = torch.as_tensor(values)
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(values), (draws, len(values)), generator=rng).to(values.device)
    if statistic is None:
        found = values.double()[pick].mean(1)
    else:
        found = torch.stack([torch.as_tensor(statistic(values[i])).double() for i in pick])
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(found, ends.to(found.device))
    return float(low), float(high)


def paired(a: Tensor, b: Tensor, **kwargs: object) -> tuple[float, tuple[float, float]]:
    """Return the mean of a - b over pairs, and its bootstrap interval. a, b: (N,)."""
    difference = torch.as_tensor(a).double() - torch.as_tensor(b).double()
    return float(difference.mean()), bootstrap(difference, **kwargs)  # type: ignore[arg-type]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return -10 log10 of the squared error of pictures in [0, 1], (N,) dB; 100 for equal ones."""
    return -10 * (a - b).double().square().flatten(1).mean(1).clamp_min(1e-10).log10()
