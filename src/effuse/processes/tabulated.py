"""A process read from a table: any alphas_cumprod or sigmas of a diffusers scheduler."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.errors import check_choice
from effuse.core.method import method

from .vp import levels


def _example() -> Tabulated:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


class Entries(Process):
    """A process trained at N levels: entry i stands at t = (i + 1) / N, and t = 0 is clean data."""

    @abstractmethod
    def __len__(self) -> int:
        """Return N."""

    def time_of(self, index: Tensor | float) -> Tensor:
        """Return the t of an entry, which may be fractional, or -1 for clean data."""
        return (torch.as_tensor(index, dtype=torch.float64) + 1) / len(self)

    def index_at(self, t: Time) -> Tensor:
        """Return the (fractional) entry of `t`; -1 at clean data."""
        return levels(t) * len(self) - 1


@method("tabulated", example=_example)
class Tabulated(Entries):
    """N tabulated levels; entry i stands at t = (i + 1) / N, and t = 0 is clean data.

    Between entries the angle arctan(sigma / alpha) is interpolated linearly for "vp" (so zero
    terminal SNR is an ordinary entry) and sigma for "ve" and "flow":
    vp: alpha = cos(angle), sigma = sin(angle);   ve: alpha = 1;   flow: alpha = 1 - sigma.

    Args:
        values: (N,) angles for "vp", sigmas else; not falling, positive.
        kind: which of the three.

    Two tables are equal if kind and values are.
    """

    def __init__(self, values: Tensor, kind: Literal["vp", "ve", "flow"] = "vp"):
        check_choice("kind", kind, ("vp", "ve", "flow"))
        values = torch.as_tensor(values).double().cpu()
        if values.ndim != 1 or len(values) < 1:
            raise ValueError(f"values of shape {tuple(values.shape)}: expected (N,)")
        if not (values > 0).all() or not (values.diff() >= 0).all():
            raise ValueError("values: expected noise levels above zero that do not fall")
        self.kind = kind
        self.values = values
        self._knots = torch.cat([values.new_zeros(1), values])
        self._copies: dict[torch.device, Tensor] = {}

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Tabulated:
        """Read a VP table, alphas_cumprod: (N,) within [0, 1), falling."""
        kept = torch.as_tensor(alphas_cumprod).double()
        if not ((kept >= 0) & (kept < 1)).all():
            raise ValueError("alphas_cumprod: expected values in [0, 1)")
        return cls(torch.atan2((1 - kept).sqrt(), kept.sqrt()), "vp")

    @classmethod
    def from_sigmas(cls, sigmas: Tensor, kind: Literal["ve", "flow"] = "ve") -> Tabulated:
        """Read noise levels, sigmas: (N,) in either order; for "flow" within (0, 1]."""
        return cls(torch.as_tensor(sigmas).double().sort().values, kind)

    def __len__(self) -> int:
        """Return N."""
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        """Compare kind and values."""
        return (
            isinstance(other, Tabulated)
            and self.kind == other.kind
            and torch.equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        """Hash kind and length."""
        return hash((self.kind, len(self.values)))

    def _level(self, t: Time) -> Tensor:
        t = levels(t)
        knots = self._copies.setdefault(t.device, self._knots.to(t.device))
        # A level written as (i + 1) / N must meet entry i itself, whatever its rounding.
        at = (t.double() * len(self)).clamp(0, len(self))
        near = at.round()
        at = torch.where((at - near).abs() < 1e-7 * len(self), at + (near - at).detach(), at)
        low = at.detach().floor().clamp_max(len(self) - 1).long()
        return torch.lerp(knots[low], knots[low + 1], at - low)

    def alpha(self, t: Time) -> Tensor:
        """Return the scale of the data."""
        level = self._level(t)
        if self.kind == "vp":
            return torch.sin(math.pi / 2 - level)  # exactly zero at zero SNR
        return torch.ones_like(level) if self.kind == "ve" else 1 - level

    def sigma(self, t: Time) -> Tensor:
        """Return the scale of the noise."""
        level = self._level(t)
        return torch.sin(level) if self.kind == "vp" else level

    def time_at(self, logsnr: Time) -> Tensor:
        """Return the `t` of a log signal-to-noise ratio in closed form between entries."""
        ratio = torch.exp(-torch.as_tensor(logsnr, dtype=torch.float64) / 2)
        value = {
            "vp": torch.atan(ratio),
            "ve": ratio,
            "flow": torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio)),
        }[self.kind]
        knots = self._knots.to(value.device)
        high = torch.searchsorted(knots, value.contiguous()).clamp(1, len(self))
        low = high - 1
        part = (value - knots[low]) / (knots[high] - knots[low])
        return ((low + part) / len(self)).clamp(0, 1)
