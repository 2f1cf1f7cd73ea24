"""Rectified flow: a straight line between data and noise."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.errors import check_positive
from effuse.core.method import method

from .vp import levels


@method("flow", paper="Flow Straight and Fast", year=2022)
@dataclass(frozen=True)
class Flow(Process):
    """Straight lines: alpha = 1 - u, sigma = u, u = k t / (1 + (k - 1) t).

    `shift_factor` k > 0 spends more of [0, 1] on noisy levels (SD3, FLUX: 3 and up); 1 is u = t.
    """

    shift_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check the factor."""
        check_positive("shift_factor", self.shift_factor)

    def sigma(self, t: Time) -> Tensor:
        """Return u."""
        t = levels(t)
        return self.shift_factor * t / (1 + (self.shift_factor - 1) * t)

    def alpha(self, t: Time) -> Tensor:
        """Return 1 - u, exactly zero at 1."""
        t = levels(t)
        return (1 - t) / (1 + (self.shift_factor - 1) * t)
