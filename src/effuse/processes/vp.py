"""Variance-preserving processes: alpha^2 + sigma^2 = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.method import method


def levels(t: Time) -> Tensor:
    """Return `t` as a tensor: floats become float64."""
    return t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)


@method("vp", paper="Score-Based Generative Modeling through SDEs", year=2021)
@dataclass(frozen=True)
class Linear(Process):
    """The linear schedule: noise rate beta(t) = low + t (high - low).

    log alpha = -(t low + t^2 (high - low) / 2) / 2,   sigma^2 = 1 - alpha^2.

    `low`, `high` >= 0 are N beta_1 and N beta_N of an N-step table: the defaults are DDPM's.
    At t = 1 a little data remains: alpha = exp(-(low + high) / 4), 0.0066 by default.
    """

    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        """Check the rates."""
        if not 0 <= self.low <= self.high or self.high == 0:
            raise ValueError(f"low={self.low}, high={self.high}: expected 0 <= low <= high > 0")

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * (self.low + t * (self.high - self.low) / 2) / 2

    def alpha(self, t: Time) -> Tensor:
        """Return exp(log alpha)."""
        return self._log_alpha(levels(t)).exp()

    def sigma(self, t: Time) -> Tensor:
        """Return sqrt(1 - alpha^2), without cancellation near t = 0."""
        return (-torch.expm1(2 * self._log_alpha(levels(t)))).clamp_min(0).sqrt()


@method("vp")
@dataclass(frozen=True)
class Cosine(Process):
    """The cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2). Pure noise at t = 1."""

    def alpha(self, t: Time) -> Tensor:
        """Return cos(pi t / 2), exactly zero at 1."""
        return torch.sin(math.pi / 2 * (1 - levels(t)))

    def sigma(self, t: Time) -> Tensor:
        """Return sin(pi t / 2), exactly zero at 0."""
        return torch.sin(math.pi / 2 * levels(t))
