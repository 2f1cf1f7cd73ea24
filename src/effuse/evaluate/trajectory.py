"""How the predicted clean sample moves along a walk: whole, or its variance within a window."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Prediction, Process, Solver, Time
from effuse.core.sampling import check_times, sample
from effuse.ops.tensors import expand_as

NEAR = 1e-9
"""Levels closer than this are one."""


class Window(ABC):
    """Which steps of a walk are looked at."""

    @abstractmethod
    def span(self, process: Process, times: Tensor) -> tuple[float, float]:
        """Return the lowest and the highest level looked at in a walk along `times`: (steps + 1,).

        Raises:
            ValueError: no step of the walk starts there.
        """

    def ratios(self, process: Process, times: Tensor) -> NoiseToSignal:
        """Return the same window in noise to signal, to be used with another solver and grid."""
        low, high = (process.sigma(t) / process.alpha(t) for t in self.span(process, times))
        return NoiseToSignal(float(low), float(high))


@dataclass(frozen=True)
class Steps(Window):
    """Steps `start` to `stop` of the walk, as a slice: (-10, None) are the last ten."""

    start: int | None = -10
    stop: int | None = None

    def span(self, process: Process, times: Tensor) -> tuple[float, float]:
        """See `Window.span`; a start before the first step is an error, not the first step."""
        levels = times[:-1]
        for end in (self.start, self.stop):
            if end is not None and not -len(levels) <= end <= len(levels):
                raise ValueError(f"{self}: the walk has only {len(levels)} steps")
        seen = levels[self.start : self.stop]
        if not len(seen):
            raise ValueError(f"{self}: no step among the {len(levels)} of the walk")
        return float(seen.min()), float(seen.max())


@dataclass(frozen=True)
class NoiseToSignal(Window):
    """Steps that start where sigma / alpha lies within [low, high]: the same for every solver.

    (0.03, 0.14) are the last ten of the paper's 1000 steps, betas of 0.001 to 0.2.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the ends."""
        if not 0 <= self.low <= self.high or math.isnan(self.high):
            raise ValueError(f"low={self.low!r}, high={self.high!r}: expected 0 <= low <= high")

    def span(self, process: Process, times: Tensor) -> tuple[float, float]:
        """See `Window.span`."""
        levels = times[:-1].double()
        ratio = process.sigma(levels) / process.alpha(levels)
        inside = (ratio >= self.low * (1 - 1e-6)) & (ratio <= self.high * (1 + 1e-6))
        if not inside.any():
            raise ValueError(
                f"{self}: the {len(levels)} steps start at ratios of {float(ratio.min()):.3g} to "
                f"{float(ratio.max()):.3g} with none inside, widen the window or take more steps"
            )
        return float(levels[inside].min()), float(levels[inside].max())


class Trajectory(Denoiser):
    """Keeps the clean sample predicted at every level of one walk.

    A level asked for twice in a row (a corrector) counts once, with the last answer. Around a
    guided denoiser the guided prediction is kept. `levels`: (S,) and `x0`: (S, B, *) are what was
    seen; see `TrajectoryVariance` for long walks of large samples.
    """

    def __init__(self, base: Denoiser):
        super().__init__()
        self.base, self.process = base, base.process
        self._seen: list[tuple[float, Tensor]] = []

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`. All rows stand at one level."""
        pred = self.base(x, t, **cond)
        levels = torch.as_tensor(t, dtype=torch.float64)
        if levels.numel() > 1 and not (levels == levels.flatten()[0]).all():
            raise ValueError("rows at different levels: expected one, take TrajectoryVariance")
        level = float(levels.flatten()[0])
        if self._seen and abs(self._seen[-1][0] - level) < NEAR:
            self._seen.pop()
        self._seen.append((level, pred.x0.detach()))
        return pred

    @property
    def levels(self) -> Tensor:
        """(S,) float64."""
        return torch.tensor([level for level, _ in self._seen], dtype=torch.float64)

    @property
    def x0(self) -> Tensor:
        """(S, B, *)."""
        if not self._seen:
            raise ValueError("nothing was predicted yet: sample with this denoiser first")
        return torch.stack([x0 for _, x0 in self._seen])


class TrajectoryVariance(Denoiser):
    """Follows the variance of the predicted clean sample within a window, in three tensors.

    Hal = mean over values of the population variance over the levels in [low, high] of x0, by
    Welford's recurrence: n <- n + 1, d = x0 - mean, mean <- mean + d / n, m2 <- m2 + d (x0 - mean).

    A level asked for twice in a row counts once, with the last answer. One object follows one walk.

    Args:
        base: predicts; under guidance the guided denoiser.
        low: lowest level.
        high: highest level.
    """

    def __init__(self, base: Denoiser, low: float, high: float):
        super().__init__()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low={low!r}, high={high!r}: expected 0 <= low <= high <= 1")
        self.base, self.process, self.low, self.high = base, base.process, low, high
        self._open: tuple[Tensor, Tensor, Tensor] | None = None
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`."""
        pred = self.base(x, t, **cond)
        level = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        inside = (level >= self.low - NEAR) & (level <= self.high + NEAR)
        if self._open is not None:
            before, x0, live = self._open
            if len(x0) != len(x):
                raise ValueError(
                    f"{len(x)} rows after {len(x0)}: expected one walk, follow each with an "
                    "object of its own"
                )
            self._settle(x0, live & ((before - level).abs() >= NEAR))
        self._open = level, pred.x0.detach(), inside
        return pred

    def _settle(self, x0: Tensor, rows: Tensor) -> None:
        """Take x0: (B, *) of `rows`: (B,) bool into the sums."""
        if not rows.any():
            return
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        if self._sums is None:
            self._sums = torch.zeros(len(x0)), torch.zeros_like(x0), torch.zeros_like(x0)
        count, mean, m2 = self._sums
        count = count + rows.to(count)
        off = expand_as(rows.to(x0), x0) * (x0 - mean)
        mean = mean + off / expand_as(count.clamp_min(1), x0)
        self._sums = count, mean, m2 + off * (x0 - mean)

    def score(self) -> Tensor:
        """Return Hal of each row, (B,): high is strange.

        Raises:
            ValueError: some row was never predicted within the window.
        """
        if self._open is not None:
            _, x0, live = self._open
            self._open = None
            self._settle(x0, live)
        if self._sums is None or not self._sums[0].all():
            raise ValueError(
                f"no prediction between the levels {self.low:g} and {self.high:g}: sample first, "
                "through this denoiser, or widen the window"
            )
        count, _, m2 = self._sums
        return m2.flatten(1).mean(1) / count.to(m2)


class Scored(NamedTuple):
    """Samples x: (B, *) and their score: (B,), high is strange."""

    x: Tensor
    score: Tensor


def scored(
    denoiser: Denoiser,
    solver: Solver,
    x: Tensor,
    times: Tensor,
    window: Window | None = None,
    *,
    rng: torch.Generator | None = None,
) -> Scored:
    """Sample as `effuse.sample` does, and score each sample; the last ten steps by default."""
    times = check_times(times)
    low, high = (Steps() if window is None else window).span(denoiser.process, times)
    follow = TrajectoryVariance(denoiser, low, high)
    return Scored(sample(follow, solver, x, times, rng=rng), follow.score())
