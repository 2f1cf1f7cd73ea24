"""The mean-reverting process: data decay towards a degraded picture while noise comes in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effuse.core.contracts import Process, Time
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like, weighted_sum

from .tabulated import Entries
from .vp import levels

Rate = Callable[[int], Tensor]
"""Says how fast data decay in each of `count` intervals, up to a factor: (count,) float64."""


@dataclass(frozen=True)
class Steady:
    """The same rate throughout: theta = 1."""

    def __call__(self, count: int) -> Tensor:
        """Return ones."""
        return torch.ones(count, dtype=torch.float64)


@dataclass(frozen=True)
class Rising:
    """Rates that rise evenly from `low` to `high`; only their ratio matters."""

    low: float = 1e-4
    high: float = 0.02

    def __post_init__(self) -> None:
        """Check the rates."""
        if not 0 < self.low <= self.high < math.inf:
            raise ValueError(f"low={self.low}, high={self.high}: expected 0 < low <= high")

    def __call__(self, count: int) -> Tensor:
        """Return an even division."""
        return torch.linspace(self.low, self.high, count, dtype=torch.float64)


@dataclass(frozen=True)
class CosineRate:
    """Slow next to the data: theta_k = 1 - c_{k+1} / c_0 for k = 0..T, as in IR-SDE.

    c_k = cos^2(pi / 2 (k / (T + 2) + offset) / (1 + offset)).
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        """Check the offset."""
        check_fraction("offset", self.offset, zero=True)

    def __call__(self, count: int) -> Tensor:
        """Return the rates of count = T + 1 intervals."""
        k = torch.arange(count + 1, dtype=torch.float64)
        c = torch.cos((k / (count + 1) + self.offset) / (1 + self.offset) * math.pi / 2).square()
        return 1 - c[1:] / c[0]


@method(
    "mean_reverting",
    paper="Image Restoration with Mean-Reverting Stochastic Differential Equations",
    year=2023,
)
@dataclass(frozen=True)
class MeanReverting(Entries):
    """Data that decay towards mu while noise comes in (IR-SDE): dx = theta (mu - x) dt + g dW.

    x_t = alpha x0 + (1 - alpha) mu + sigma noise,   alpha = exp(-B),
    sigma = spread sqrt(1 - alpha^2),   g^2 = 2 spread^2 theta,   B the integral of theta.

    As IR-SDE's tables have T + 1 entries k = 0..T and entry 0 is a state of its own a little above
    clean data, entry k stands at t = (k + 1) / (T + 1), and t = 0 is clean data. Within an interval
    theta is constant, so B is linear between entries: the SDE of the tables, at all real times.

    This reverts to zero; `toward(mu)` gives the process that reverts to a picture.

    rate: how theta runs over the intervals: `CosineRate()`, `Rising()`, `Steady()`.
    steps: T. spread: deviation of the noise at the end of all time, in units of the data: 50 / 255
    for pictures in [0, 1]. remains: alpha at t = 1, (0, 1).
    """

    rate: Rate = field(default_factory=CosineRate)
    steps: int = 100
    spread: float = 50 / 255
    remains: float = 0.005

    def __post_init__(self) -> None:
        """Check the fields and lay out B at t = 0 and at the entries."""
        check_whole("steps", self.steps, 1)
        check_fraction("remains", self.remains, one=False)
        if not 0 < self.spread <= 1:
            raise ValueError(
                f"spread={self.spread!r}: expected a deviation in (0, 1], in units of the data; "
                "for grey levels of 0..255 divide it, 50 / 255"
            )
        theta = torch.as_tensor(self.rate(len(self))).double()
        if theta.shape != (len(self),) or not ((theta > 0) & theta.isfinite()).all():
            raise ValueError(f"rate={self.rate!r}: expected {len(self)} finite rates above zero")
        decay = torch.cat([theta.new_zeros(1), theta.cumsum(0)])
        decay *= -math.log(self.remains) / decay[-1]
        object.__setattr__(self, "_decay", {torch.device("cpu"): decay})

    def __len__(self) -> int:
        """Return T + 1, the number of entries."""
        return self.steps + 1

    def _knots(self, device: torch.device) -> Tensor:
        copies: dict[torch.device, Tensor] = self.__dict__["_decay"]
        if device not in copies:
            copies[device] = copies[torch.device("cpu")].to(device)
        return copies[device]

    def decay(self, t: Time) -> Tensor:
        """Return B, the integral of theta up to `t`: () or (B,), float64.

        At an entry its rate is that of the interval below, which a step down goes through.
        """
        t = levels(t)
        knots, at = self._knots(t.device), t.double() * len(self)
        near = at.detach().round()  # a level written as (k + 1) / (T + 1) must meet entry k
        at = torch.where((at - near).abs() < 1e-9 * len(self), at + (near - at).detach(), at)
        low = (at.detach().ceil() - 1).clamp(0, self.steps).long()
        return torch.lerp(knots[low], knots[low + 1], at - low)

    def alpha(self, t: Time) -> Tensor:
        """Return exp(-B): one at clean data, `remains` at t = 1."""
        return (-self.decay(t)).exp()

    def sigma(self, t: Time) -> Tensor:
        """Return spread sqrt(1 - alpha^2), without cancellation near t = 0."""
        return self.spread * (-torch.expm1(-2 * self.decay(t))).clamp_min(0).sqrt()

    def time_at(self, logsnr: Time) -> Tensor:
        """Return the `t` of a log signal-to-noise ratio, in closed form."""
        ratio = torch.as_tensor(logsnr, dtype=torch.float64) + 2 * math.log(self.spread)
        decay = torch.nn.functional.softplus(-ratio, threshold=700) / 2
        knots = self._knots(decay.device)
        high = torch.searchsorted(knots, decay.contiguous()).clamp(1, len(self))
        part = (decay - knots[high - 1]) / (knots[high] - knots[high - 1])
        return ((high - 1 + part) / len(self)).clamp(0, 1)

    def toward(self, mu: Tensor | float) -> Toward:
        """Return the process that reverts to mu: (B, *) or one row (1, *), or one number for all.

        Raises:
            ValueError: mu has values that are not finite, or no batch dimension.
        """
        return Toward(self, torch.as_tensor(mu))


class Toward(Process):
    """A `MeanReverting` process bound to what each row reverts to; shift = (1 - alpha) mu.

    Its samples have the rows of mu: (B, *), or any number of them where mu has one.
    """

    def __init__(self, free: MeanReverting, mu: Tensor):
        if not mu.is_floating_point() or mu.ndim == 1:
            raise ValueError(
                f"mu of shape {tuple(mu.shape)}, {mu.dtype}: expected floating-point rows (B, *), "
                "with the batch first, or one number"
            )
        if not mu.isfinite().all():
            raise ValueError("mu: expected finite values, got a NaN or an infinity")
        self.free, self.mu = free, mu

    def __len__(self) -> int:
        return len(self.free)

    def alpha(self, t: Time) -> Tensor:
        """Return the scale of the data."""
        return self.free.coefficients(t)[0]

    def sigma(self, t: Time) -> Tensor:
        """Return the scale of the noise."""
        return self.free.coefficients(t)[1]

    def shift(self, t: Time) -> Tensor:
        """Return (1 - alpha) mu, shaped as mu (with a row a level where `t` has rows)."""
        return self._rows(-torch.expm1(-self.free.decay(t)))

    def _rows(self, c: Tensor) -> Tensor:
        mu = self.mu.to(c.device)
        if mu.ndim == 0:
            return c * mu
        return (c.reshape(-1, *[1] * (mu.ndim - 1)) if c.ndim else c).to(mu.dtype) * mu

    def rates(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Return d/dt of (alpha, sigma, shift) at `t`."""
        d_alpha, d_sigma, _ = self.free.rates(t)
        return d_alpha, d_sigma, self._rows(-d_alpha)

    def logsnr(self, t: Time) -> Tensor:
        """Return log(alpha^2 / sigma^2), which mu has no part in."""
        return self.free.logsnr(t)

    def time_at(self, logsnr: Time) -> Tensor:
        """Return the `t` of a log signal-to-noise ratio."""
        return self.free.time_at(logsnr)

    def prior(
        self,
        shape: Sequence[int],
        *,
        rng: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a start at t = 1, mu + spread z: what is left of the data is taken to be mu too."""
        like = torch.empty(tuple(shape), dtype=dtype, device=device)
        mu = expand_as(self.mu, like).to(like).expand_as(like)
        return weighted_sum((1.0, mu), (self.free.spread, randn_like(like, rng)))

    def remember(self, times: Tensor) -> None:
        """Compute what does not depend on mu, (N,) on the CPU, in one go."""
        self.free.remember(times)
