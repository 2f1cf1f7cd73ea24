"""The sub-VP process: less noise than VP at every level, the same drift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Time
from effuse.core.method import method

from .vp import Linear, levels


@method("sub_vp", paper="Score-Based Generative Modeling through SDEs", year=2021)
@dataclass(frozen=True)
class SubVP(Linear):
    """Linear schedule with sigma = 1 - alpha^2: at most the VP noise, the same alpha."""

    def sigma(self, t: Time) -> Tensor:
        """Return 1 - alpha^2, without cancellation near t = 0."""
        return -torch.expm1(2 * self._log_alpha(levels(t)))
