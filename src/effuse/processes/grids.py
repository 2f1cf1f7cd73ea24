"""Time grids: at which levels a solver stops. A grid is a value; called, it gives the times.

`Grid(process, steps)` returns (steps + 1,) float64 levels that fall from noise to data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from effuse.core.contracts import Process
from effuse.core.errors import check_choice, check_fraction, check_positive

from .tabulated import Entries, Tabulated

Last = Literal["clean", "first"]


class Grid(ABC):
    """Where the steps are. A frozen dataclass."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return (steps + 1,) falling levels in [0, 1], float64.

        Raises:
            ValueError: `steps` is no positive integer, or the process does not suit the grid.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: expected a positive integer")
        # only roundings are clamped: the ends were checked when the grid was made
        return self.levels(process, steps).double().clamp(0, 1)

    @abstractmethod
    def levels(self, process: Process, steps: int) -> Tensor:
        """Return the levels; `steps` has been checked."""


@dataclass(frozen=True)
class Power(Grid):
    """Equal steps in t^(1 / rho) from `start` to `end`: Karras' spacing, of times.

    rho = 1 is `Uniform`; above it the grid is denser towards the data.
    """

    rho: float = 7.0
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Check exponent and ends."""
        check_positive("rho", self.rho)
        _check_ends(self.start, self.end)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return an even division of the roots."""
        high, low = self.start ** (1 / self.rho), self.end ** (1 / self.rho)
        return torch.linspace(high, low, steps + 1, dtype=torch.float64) ** self.rho


@dataclass(frozen=True)
class Above(Grid):
    """Another grid that starts no further out than where log(alpha / sigma) is `least`.

    Its levels move together evenly, the last one stays; a grid that starts within is as it was.
    """

    grid: Grid
    least: float = -5.0

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return the levels of `grid`, moved."""
        times = self.grid.levels(process, steps).double()
        if float(process.logsnr(times[0])) >= 2 * self.least:
            return times
        first = process.time_at(2 * self.least)
        if not first > times[-1]:
            raise ValueError(
                f"least={self.least:g}: the walk would start at t={float(first):g}, at or below "
                f"its end t={float(times[-1]):g}; expected a lower bound on log(alpha / sigma)"
            )
        return times[-1] + (times - times[-1]) * (first - times[-1]) / (times[0] - times[-1])


def _check_ends(start: float, end: float) -> None:
    if not 0 <= end < start <= 1:
        raise ValueError(f"start={start!r}, end={end!r}: expected 0 <= end < start <= 1")


@dataclass(frozen=True)
class Levels(Grid):
    """The levels themselves, as trained few-step weights ask for them."""

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the levels."""
        if not all(1 >= t > s >= 0 for t, s in pairwise(self.times)) or len(self.times) < 2:
            raise ValueError(f"times={self.times!r}: expected two or more falling levels in [0, 1]")

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return them; their number must fit."""
        if len(self.times) != steps + 1:
            raise ValueError(f"{len(self.times)} levels for {steps} steps: expected {steps + 1}")
        return torch.tensor(self.times, dtype=torch.float64)


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t from `start` to `end`."""

    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        """Check the ends."""
        _check_ends(self.start, self.end)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return an even division."""
        return torch.linspace(self.start, self.end, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformLogSNR(Grid):
    """Equal steps in log SNR from `start` to `end`, where it is finite, then one to clean data."""

    start: float = 0.999
    end: float = 0.001

    def __post_init__(self) -> None:
        """Check the ends."""
        _check_ends(self.start, self.end)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` even levels and zero."""
        low, high = process.logsnr(self.start), process.logsnr(self.end)
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"log SNR is infinite at t={self.start:g} or {self.end:g}: move it in")
        inner = torch.linspace(0, 1, steps, dtype=torch.float64)
        times = process.time_at(torch.lerp(low.double(), high.double(), inner))
        return torch.cat([times, times.new_zeros(1)])


def _ends(process: Process, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Return sigma / alpha at both ends; a table's own first and last entry where they fall out."""
    if isinstance(process, Entries):
        start, end = max(start, 1 / len(process)), max(end, 1 / len(process))
    r = [process.sigma(t).double() / process.alpha(t).double() for t in (start, end)]
    if not (r[0].isfinite() and r[1] > 0):
        raise ValueError(
            f"sigma / alpha is {float(r[0]):g} at t={start:g} and {float(r[1]):g} at t={end:g}: "
            "expected finite and above zero, move start or end inside"
        )
    return r[0], r[1]


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in (sigma / alpha)^(1 / rho) from `start` to `end`, then one to clean data."""

    rho: float = 7.0
    start: float = 1.0
    end: float = 0.001

    def __post_init__(self) -> None:
        """Check exponent and ends."""
        check_positive("rho", self.rho)
        _check_ends(self.start, self.end)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` levels and zero."""
        high, low = (r ** (1 / self.rho) for r in _ends(process, self.start, self.end))
        ratios = torch.lerp(high, low, torch.linspace(0, 1, steps, dtype=torch.float64)) ** self.rho
        times = process.time_at(-2 * ratios.log())
        return torch.cat([times, times.new_zeros(1)])


@dataclass(frozen=True)
class Beta(Grid):
    """Steps in sigma / alpha at the quantiles of a Beta(a, b) law, then one to clean data."""

    a: float = 0.6
    b: float = 0.6
    start: float = 1.0
    end: float = 0.001

    def __post_init__(self) -> None:
        """Check law and ends."""
        check_positive("a", self.a)
        check_positive("b", self.b)
        _check_ends(self.start, self.end)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` levels and zero."""
        from scipy.stats import beta

        high, low = _ends(process, self.start, self.end)
        at = torch.from_numpy(
            beta.ppf(1 - torch.linspace(0, 1, steps).double().numpy(), self.a, self.b)
        )
        times = process.time_at(-2 * (low + at * (high - low)).log())
        return torch.cat([times, times.new_zeros(1)])


def _table(process: Process, grid: Grid, steps: int) -> int:
    if not isinstance(process, Entries):
        raise ValueError(
            f"{type(grid).__name__} means table entries, {type(process).__name__} has none: "
            "use Uniform, UniformLogSNR, Karras or Beta"
        )
    if steps > len(process):
        raise ValueError(f"steps={steps}: the table has only {len(process)} entries")
    return len(process)


def _closed(process: Entries, index: Tensor, last: Last) -> Tensor:
    check_choice("last", last, ("clean", "first"))
    times = process.time_of(index.double().clamp(0, len(process) - 1))
    end = process.time_of(-1 if last == "clean" else 0)
    return torch.cat([times, end.reshape(1)])


@dataclass(frozen=True)
class Trailing(Grid):
    """Table entries counted back from the last one, as diffusers' "trailing" spacing.

    last: "clean" ends at t = 0 (diffusers' `set_alpha_to_one=True`), "first" at entry 0.
    """

    last: Last = "clean"

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` entries and the end."""
        n = _table(process, self, steps)
        index = (n - torch.arange(steps, dtype=torch.float64) * n / steps).round() - 1
        return _closed(process, index, self.last)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tapered(Grid):
    """Steps from pure noise that shorten towards the data, the last one most.

    t_i = ((n - 1 - i + tail) / (n - 1 + tail))^power for i < n = steps, then t = 0; whole entries
    of a table. What a step of a low order loses, it loses near the data, most of all in the last
    one; one of hardly any length is a call wasted. tail = 1, power = 1 is `Trailing`.

    tail: length of the last step, in others, (0, 1]. power: 1 for even steps, above it the grid is
    denser towards the data.
    """

    tail: float = 0.4
    power: float = 1.3

    def __post_init__(self) -> None:
        """Check both."""
        check_fraction("tail", self.tail)
        check_positive("power", self.power)

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` levels and zero."""
        left = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        times = ((left + self.tail) / (steps - 1 + self.tail)) ** self.power
        if not isinstance(process, Tabulated):
            return torch.cat([times, times.new_zeros(1)])
        index = (_table(process, self, steps) * times).round() - 1
        # no entry twice: each at least one above the next
        index = (index.clamp_min(0) - left).flip(0).cummax(0).values.flip(0) + left
        return _closed(process, index, "clean")


@dataclass(frozen=True)
class Leading(Grid):
    """Table entries at multiples of N // steps, plus `offset`, as diffusers' "leading" spacing."""

    offset: int = 0
    last: Last = "clean"

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` entries and the end."""
        n = _table(process, self, steps)
        index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (n // steps) + self.offset
        return _closed(process, index, self.last)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Linspace(Grid):
    """Table entries spread evenly over the table, as diffusers' "linspace" spacing.

    rounded: to whole entries (DDIM, DPM-Solver) or not (Euler).
    """

    rounded: bool = True
    last: Last = "clean"

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return `steps` entries and the end."""
        n = _table(process, self, steps)
        index = torch.linspace(0, n - 1, steps, dtype=torch.float64).flip(0)
        return _closed(process, index.round() if self.rounded else index, self.last)  # type: ignore[arg-type]
