"""The variance-exploding process: alpha = 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.method import method

from .vp import levels


@method("ve", paper="Score-Based Generative Modeling through SDEs", year=2021)
@dataclass(frozen=True)
class VE(Process):
    """Data plus geometrically growing noise.

    alpha = 1,   sigma^2 = low^2 ((high / low)^(2 t) - 1).

    0 < low < high, in units of the data. sigma(0) = 0 exactly; sigma(1) is `high` but for low^2.
    """

    low: float = 0.01
    high: float = 50.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: expected 0 < low < high")

    def alpha(self, t: Time) -> Tensor:
        """Return one."""
        return torch.ones_like(levels(t))

    def sigma(self, t: Time) -> Tensor:
        """Return the noise level, without cancellation near t = 0."""
        ratio = 2 * torch.log(torch.tensor(self.high / self.low, dtype=torch.float64))
        return self.low * torch.expm1(levels(t) * ratio.item()).clamp_min(0).sqrt()
