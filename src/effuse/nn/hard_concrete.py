"""Gates that are exactly zero or one with some probability, and still have a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """A stretched and clipped concrete variable (Louizos et al., 1712.01312).

    s = sigmoid((log(u + e) - log(1 - u + e) + logit) / b)
    M = clamp(s (zeta - gamma) + gamma, 0, 1)

    u ~ U(0, 1). temperature: b > 0. gamma < 0, zeta > 1: how far it is stretched. smoothing: e >= 0
    bounds the logistic noise, |noise| <= log((1 + e) / e); 0 is the gate of Louizos et al. EcoDiff
    has 0.5 for UNets and 0.1 for FLUX: with 0.5 the noise is at most 1.1, so a logit of 3 is open.
    """

    temperature: float = 0.83
    gamma: float = -0.1
    zeta: float = 1.1
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r}: expected a number above zero")
        if not (self.gamma < 0 and self.zeta > 1):
            raise ValueError(
                f"gamma={self.gamma:g}, zeta={self.zeta:g}: expected below 0 and above 1"
            )
        if not self.smoothing >= 0:
            raise ValueError(f"smoothing={self.smoothing:g}: expected at least 0")

    def draw(self, logit: Tensor, u: Tensor) -> Tensor:
        """Return M: (*) in [0, 1] of logit: (*) and u: (*), uniform in [0, 1)."""
        e = self.smoothing
        noise = (u + e).log() - (1 - u + e).log()
        return self.clipped(torch.sigmoid((noise + logit) / self.temperature))

    def median(self, logit: Tensor) -> Tensor:
        """Return M at u = 1/2, without noise."""
        return self.clipped(torch.sigmoid(logit / self.temperature))

    def clipped(self, s: Tensor) -> Tensor:
        """Return s: (*) stretched and clipped to [0, 1]."""
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def open(self, logit: Tensor) -> Tensor:
        """Return P(M > 0) = sigmoid(logit - b log(-gamma / zeta)), which is exact for e = 0."""
        return torch.sigmoid(logit - self.temperature * math.log(-self.gamma / self.zeta))

    def full(self, logit: Tensor) -> Tensor:
        """Return P(M = 1) = sigmoid(logit - b log((1 - gamma) / (zeta - 1))), exact for e = 0."""
        return torch.sigmoid(
            logit - self.temperature * math.log((1 - self.gamma) / (self.zeta - 1))
        )


@dataclass(frozen=True)
class Soft:
    """sigmoid(logit): no noise, and never quite zero or one."""

    def draw(self, logit: Tensor, u: Tensor) -> Tensor:
        """Return M: (*) of logit: (*); u is not looked at."""
        return torch.sigmoid(logit)


@dataclass(frozen=True)
class Binary:
    """1 above a logit, 0 elsewhere; the gradient passes as that of the sigmoid does.

    at: the logit.
    """

    at: float = 0.0

    def draw(self, logit: Tensor, u: Tensor) -> Tensor:
        """Return M: (*), 0 or 1, of logit: (*); u is not looked at."""
        soft = torch.sigmoid(logit - self.at)
        return (logit > self.at).to(soft) + (soft - soft.detach())
