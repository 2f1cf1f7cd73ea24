"""DPM-Solver++ (2M): second order, one evaluation a step, and its stochastic form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Process, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like, weighted_sum

from .ddim import shrink
from .multistep import along_data, kept


class Past(NamedTuple):
    """The previous prediction of x0, (B, *), and the step in log SNR / 2 it was made for."""

    x0: Tensor
    h: Tensor


def half_logsnr(process: Process, t: Time) -> Tensor:
    """Return lambda = log(alpha / sigma)."""
    return process.logsnr(t) / 2


def midpoint(
    process: Process, x0: Tensor, t: Time, s: Time, past: Past | None
) -> tuple[Tensor, Tensor, Past]:
    """Return D = x0 + h / (2 h') (x0 - x0'), the data at the middle of the step from `t` to `s`.

    Also where D is of second order, and the past of the next step. First order (x0 itself) without
    a past, and where a step in log SNR is infinite or nothing.
    """
    x0, h = kept(x0), half_logsnr(process, s) - half_logsnr(process, t)
    if past is None:
        return x0, torch.zeros_like(h, dtype=torch.bool), Past(x0, h)
    high = h.isfinite() & past.h.isfinite() & (past.h != 0)
    gain = torch.where(high, h / past.h / 2, 0.0)
    return weighted_sum((1 + gain, x0), (-gain, past.x0)), high, Past(x0, h)


@method("dpmpp", paper="DPM-Solver++", year=2022)
@dataclass(frozen=True)
class DPMpp2M(Solver):
    """Second-order multistep in lambda = log(alpha / sigma), on the data prediction.

    D = x0 + h / (2 h') (x0 - x0'),   x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) D,
    h = lambda_s - lambda_t, primes belong to the step before.

    The first step, and steps where h is infinite (pure noise, clean data), are first order.
    """

    order = 2
    counterpart = "DPMSolverMultistepScheduler"

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Past | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, pred = denoiser.process, denoiser(x, t)
        data, _, past = midpoint(process, pred.x0, t, s, state)
        return Step(along_data(process, x, t, s, pred, data), past)


@method("dpmpp")
@dataclass(frozen=True)
class DPMpp2MSDE(Solver):
    """The stochastic form of `DPMpp2M`: the same step on the reverse SDE.

    x_s = sigma_s / sigma_t e^-(eta h) x + alpha_s (1 - e^-((1 + eta) h)) D
          + sigma_s sqrt(1 - e^-(2 eta h)) z.

    `eta` in (0, 1]: 1 is the reverse SDE, to 0 it goes over into the ODE.
    """

    eta: float = 1.0
    order = 1
    stochastic = True
    counterpart = "DPMSolverMultistepScheduler"

    def __post_init__(self) -> None:
        """Check `eta`."""
        check_fraction("eta", self.eta)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Past | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process = denoiser.process
        data, _, past = midpoint(process, denoiser(x, t).x0, t, s, state)
        _, sigma_t, center_t = process.coefficients(t)
        alpha_s, sigma_s, center_s = process.coefficients(s)
        ratio = shrink(process, t, s)  # e^-h, finite at pure noise and zero at clean data
        calm = ratio**self.eta
        keep = torch.where(sigma_t == 0, 1.0, sigma_s / torch.where(sigma_t == 0, 1.0, sigma_t))
        gain = alpha_s * (1 - ratio * calm)
        fresh = sigma_s * (1 - calm.square()).clamp_min(0).sqrt()
        z = randn_like(x, rng)
        moved = keep * calm * center_t
        out = weighted_sum((keep * calm, x), (gain, data.to(x.dtype)), (fresh, z))
        return Step(out + expand_as(center_s - moved, x), past)
