"""DPM-Solver++ (2M): second order, one evaluation a step, and its stochastic form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Process, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like


class Past(NamedTuple):
    """The previous prediction of x0, (B, *), and the step in log SNR / 2 it was made for."""

    x0: Tensor
    h: Tensor


def half_logsnr(process: Process, t: Time) -> Tensor:
    """Return lambda = log(alpha / sigma)."""
    return process.logsnr(t) / 2


def extrapolate(x0: Tensor, past: Past | None, h: Tensor) -> Tensor:
    """Return x0 + h / (2 h') (x0 - x0'): the data prediction at the middle of the coming step.

    First order (x0 itself) without a past, and where a step in log SNR is infinite.
    """
    if past is None:
        return x0
    gain = torch.nan_to_num(h / past.h / 2, nan=0.0, posinf=0.0, neginf=0.0)
    gain = torch.where(torch.isfinite(h) & torch.isfinite(past.h), gain, torch.zeros_like(gain))
    return x0 + expand_as(gain, x0) * (x0 - past.x0)


@method("dpmpp", paper="DPM-Solver++", year=2022)
@dataclass(frozen=True)
class DPMpp2M(Solver):
    """Second-order multistep in lambda = log(alpha / sigma), on the data prediction.

    D = x0 + h / (2 h') (x0 - x0'),   x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) D,
    h = lambda_s - lambda_t, primes belong to the step before.

    The first step, and steps where h is infinite (pure noise, clean data), are first order.
    """

    order = 2

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
        x0 = denoiser(x, t).x0
        h = half_logsnr(process, s) - half_logsnr(process, t)
        data = extrapolate(x0, state, h)
        keep = process.sigma(s) / process.sigma(t)
        # alpha_s (1 - e^-h) without logarithms: nothing special at either end.
        gain = process.alpha(s) - keep * process.alpha(t)
        center_t, center_s = (expand_as(process.shift(u), x) for u in (t, s))
        out = expand_as(keep, x) * (x - center_t) + expand_as(gain, x) * data + center_s
        return Step(out, Past(x0, h))


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
        x0 = denoiser(x, t).x0
        h = half_logsnr(process, s) - half_logsnr(process, t)
        data = extrapolate(x0, state, h)
        sigma_t, sigma_s = process.sigma(t), process.sigma(s)
        # e^-h = r_s / r_t, finite at pure noise and zero at clean data
        shrink = (sigma_s * process.alpha(t)) / (process.alpha(s) * sigma_t)
        calm = shrink**self.eta
        keep = sigma_s / sigma_t * calm
        gain = process.alpha(s) * (1 - shrink * calm)
        fresh = sigma_s * (1 - calm.square()).clamp_min(0).sqrt()
        center_t, center_s = (expand_as(process.shift(u), x) for u in (t, s))
        out = expand_as(keep, x) * (x - center_t) + expand_as(gain, x) * data + center_s
        return Step(out + expand_as(fresh, x) * randn_like(x, rng), Past(x0, h))
