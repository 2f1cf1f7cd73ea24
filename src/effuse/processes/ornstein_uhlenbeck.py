"""The Ornstein-Uhlenbeck process: noise at a constant rate against a pull to the origin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.errors import check_positive
from effuse.core.method import method

from .vp import levels


@method("ornstein_uhlenbeck", paper="On the Theory of the Brownian Motion", year=1930)
@dataclass(frozen=True)
class OrnsteinUhlenbeck(Process):
    """dx = -x du + g dW over the time u = horizon t, which settles at variance g^2 / 2.

    alpha = exp(-horizon t),   sigma^2 = g^2 (1 - exp(-2 horizon t)) / 2.

    In t itself the drift is -horizon x and the diffusion sqrt(horizon) g. With g = sqrt(2) it
    preserves variance one, as `Linear(2 horizon, 2 horizon)` does.

    horizon: u at t = 1, above zero. noise: g, above zero.
    """

    horizon: float = 10.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        """Check both."""
        check_positive("horizon", self.horizon)
        check_positive("noise", self.noise)

    def alpha(self, t: Time) -> Tensor:
        """Return exp(-horizon t)."""
        return (-self.horizon * levels(t)).exp()

    def sigma(self, t: Time) -> Tensor:
        """Return the deviation, without cancellation near t = 0."""
        grown = -torch.expm1(-2 * self.horizon * levels(t))
        return self.noise * (grown.clamp_min(0) / 2).sqrt()

    def time_at(self, logsnr: Time) -> Tensor:
        """Return the `t` of a log signal-to-noise ratio in closed form, clamped to [0, 1].

        1 / (exp(2 u) - 1) = SNR g^2 / 2, so u = log(1 + 2 / (SNR g^2)) / 2.
        """
        target = torch.as_tensor(logsnr, dtype=torch.float64)
        ratio = (math.log(2 / self.noise**2) - target).exp()
        return (torch.log1p(ratio) / (2 * self.horizon)).clamp(0, 1)
