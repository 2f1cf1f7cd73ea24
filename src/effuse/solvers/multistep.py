"""What multistep solvers stand on: two ways to walk along a direction, and weights over the past.

A direction that is no prediction of its own (an average, an extrapolation) leaves open what the
other half of the pair is. `along_noise` keeps the walk linear in y = x / alpha over
r = sigma / alpha, `along_data` in y = x / sigma over 1 / r. Both are the DDIM step plus a
correction, so a direction equal to the prediction is that step at any level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effuse.core.contracts import Prediction, Process, Time
from effuse.ops.tensors import expand_as, weighted_sum

# c_j = (a + b beta) / d over the newest values first; beta = 1 is Adams-Bashforth.
_WEIGHTS: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {
    1: (1, ((0, 1),)),
    2: (2, ((2, 1), (-2, 1))),
    3: (12, ((18, 5), (-24, 8), (6, -1))),
    4: (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    5: (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
}


def weights(order: int, beta: float = 1.0) -> tuple[float, ...]:
    """Return the Adams-Bashforth weights on v_n, v_{n-1}, ... that undo the lag of smoothing.

    v_n = (1 - beta) v_{n-1} + beta e_n;  y_{n+1} = y_n + h / beta sum_j c_j v_{n-j} is of `order`.
    They sum to beta. beta = 1: plain Adams-Bashforth, 1; 3/2, -1/2; 23/12, -16/12, 5/12; ...
    """
    below, rows = _WEIGHTS[order]
    return tuple((a + b * beta) / below for a, b in rows)


def combine(past: Sequence[Tensor], by: Sequence[float]) -> Tensor:
    """Return sum_j by_j past_j; past: each (B, *), newest first."""
    return past[0] if tuple(by) == (1,) else weighted_sum(*zip(by, past, strict=True))


def kept(x: Tensor) -> Tensor:
    """Return `x` as it is kept from step to step: in float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def noise_gain(process: Process, t: Time, s: Time) -> Tensor:
    """Return alpha_s (r_s - r_t), r = sigma / alpha; zero at pure noise, where r_t is infinite."""
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = process.coefficients(t), process.coefficients(s)
    empty = alpha_t == 0
    ratio = alpha_s / torch.where(empty, 1.0, alpha_t)
    return torch.where(empty, 0.0, sigma_s - sigma_t * ratio)


def data_gain(process: Process, t: Time, s: Time) -> Tensor:
    """Return sigma_s (1 / r_s - 1 / r_t); zero at clean data, where 1 / r_t is infinite."""
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = process.coefficients(t), process.coefficients(s)
    clean = sigma_t == 0
    ratio = sigma_s / torch.where(clean, 1.0, sigma_t)
    return torch.where(clean, 0.0, alpha_s - alpha_t * ratio)


def along_noise(
    process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, noise: Tensor
) -> Tensor:
    """Return y_s = y_t + (r_s - r_t) noise, y = (x - shift) / alpha, as x: (B, *) at level `s`.

    Computed as advance(x, pred) + alpha_s (r_s - r_t) (noise - pred.noise): the same map, finite
    at both ends. From pure noise the DDIM step, as only the prediction itself fits x there.
    """
    return _bent(process, x, t, s, pred, noise_gain(process, t, s), noise, pred.noise)


def along_data(
    process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, x0: Tensor
) -> Tensor:
    """Return sigma_s / sigma_t x + (alpha_s - alpha_t sigma_s / sigma_t) x0 as x at level `s`.

    Computed as advance(x, pred) + (alpha_s - alpha_t sigma_s / sigma_t) (x0 - pred.x0): the same
    map, finite at both ends.
    """
    return _bent(process, x, t, s, pred, data_gain(process, t, s), x0, pred.x0)


def _bent(
    process: Process,
    x: Tensor,
    t: Time,
    s: Time,
    pred: Prediction,
    gain: Tensor,
    used: Tensor,
    own: Tensor,
) -> Tensor:
    """Return advance(x, pred) + gain (used - own)."""
    out = process.advance(x, t, s, pred)
    if used is own:
        return out
    if used.dtype != x.dtype:
        return out + (expand_as(gain, used) * (used - own)).to(x.dtype)
    return weighted_sum((1.0, out), (gain, used), (-gain, own))
