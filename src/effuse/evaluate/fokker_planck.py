"""Whether ODE and SDE samplers of one network agree: a training that makes them, and the gap."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Loss, Objective, Process, Solver
from effuse.core.errors import check_positive, check_whole
from effuse.core.method import method
from effuse.core.sampling import sample
from effuse.ops.tensors import randn_like
from effuse.ops.transport import sliced_wasserstein2, wasserstein2

from .residual import (
    LogResidual,
    Potential,
    PotentialScore,
    Residual,
    ScoreResidual,
    require_smooth,
)


class Weight(ABC):
    """A factor on a loss at each level."""

    @abstractmethod
    def __call__(self, process: Process, t: Tensor) -> Tensor:
        """Return the factor, (B,), at t: (B,)."""


@dataclass(frozen=True)
class Unweighted(Weight):
    """One at every level, so that the lowest levels rule; the paper's."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        """See `Weight`."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class ByVariance(Weight):
    """sigma^(2 power): power 1 makes a score a noise, 2 suits the squared residual of a log."""

    power: float = 1.0

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        """See `Weight`."""
        return process.sigma(t) ** (2 * self.power)


@dataclass(frozen=True)
class ByDiffusion(Weight):
    """g^2, the weight that makes denoising score matching a bound on the likelihood."""

    def __call__(self, process: Process, t: Tensor) -> Tensor:
        """See `Weight`."""
        return process.diffusion(t) ** 2


# Where a training looks at the residual, and the training itself.


class Points(ABC):
    """Where the residual is taken during training."""

    @abstractmethod
    def __call__(
        self, x: Tensor, t: Tensor, low: float, high: float, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return x: (C, *) and t: (C,), given the spoiled batch and the ends of the levels."""


@dataclass(frozen=True)
class OnData(Points):
    """The spoiled batch itself."""

    def __call__(
        self, x: Tensor, t: Tensor, low: float, high: float, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See `Points`."""
        return x, t


def uniform(shape: Sequence[int], like: Tensor, rng: torch.Generator | None) -> Tensor:
    """Draw from [0, 1) in the dtype and on the device of `like`."""
    device = like.device if rng is None else rng.device
    return torch.rand(tuple(shape), generator=rng, dtype=like.dtype, device=device).to(like.device)


@dataclass(frozen=True)
class Box(Points):
    """Uniform in [-side, side]^D and in t; `count` points, and `walls` on every face of the box."""

    side: float = 3.5
    count: int = 1024
    walls: int = 64

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive("side", self.side)
        check_whole("count", self.count, 1)
        check_whole("walls", self.walls, 1)

    def _draw(
        self, count: int, x: Tensor, t: Tensor, low: float, high: float, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        where = self.side * (2 * uniform((count, *x.shape[1:]), x, rng) - 1)
        return where, low + (high - low) * uniform((count,), t, rng)

    def __call__(
        self, x: Tensor, t: Tensor, low: float, high: float, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """See `Points`."""
        return self._draw(self.count, x, t, low, high, rng)

    def boundary(
        self, x: Tensor, t: Tensor, low: float, high: float, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw `walls` points on each of the 2 D faces."""
        size = x[0].numel()
        where, at = self._draw(2 * size * self.walls, x, t, low, high, rng)
        face = torch.arange(2 * size, device=x.device).repeat(self.walls)
        flat = where.flatten(1)
        ends = torch.where(face < size, -self.side, self.side).to(flat)
        flat = flat.scatter(1, (face % size)[:, None], ends[:, None])
        return flat.reshape(where.shape), at


def _student() -> FokkerPlanck:
    from effuse.processes import OrnsteinUhlenbeck

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Potential(2, 16, 2, clock=3.0)
    student = PotentialScore(net, OrnsteinUhlenbeck(3.0))
    return FokkerPlanck(student, 0.1, points=Box(3.0, 32, 4), start=0.01)


@method(
    "fokker_planck",
    seed=48,
    paper="Closing the ODE-SDE gap in score-based diffusion models through the Fokker-Planck "
    "equation",
    year=2023,
    buys="one law from ODE and SDE sampling of one network, and a figure of how far they are apart",
    missing="its two-dimensional data at 100 000 iterations: the proof is on the line",
    example=_student,
)
class FokkerPlanck(Objective):
    """Denoising score matching with the Fokker-Planck residual as a penalty.

    mean v(t) ||s(x_t, t) + noise / sigma||^2
        + weight [ mean w(t) R(x, t)^2 + walls mean exp(2 phi) on the faces of the box ]

    `weight = 0` is denoising score matching, draw for draw. For a `ScoreResidual`, R^2 is the mean
    square of a row.

    Args:
        student: what is trained; a `PotentialScore` for a `LogResidual`.
        weight: of the penalty, zero or above; the paper's 0.1, 1, 10.
        residual: the equation. points: where; `Box` has walls, for potentials.
        walls: weight of the boundary term, within the penalty.
        start, end: lowest and highest level, 0 < start < end <= 1.
        power: levels of the denoising term are t = start + (end - start) (1 - u^(1 / power)): 1 is
            uniform, 2 the paper's Beta(1, 2), higher is cleaner.
        denoising, equation: v and w.
    """

    def __init__(
        self,
        student: Denoiser,
        weight: float = 0.1,
        *,
        residual: Residual | None = None,
        points: Points | None = None,
        walls: float = 1.0,
        start: float = 1e-6,
        end: float = 1.0,
        power: float = 2.0,
        denoising: Weight | None = None,
        equation: Weight | None = None,
    ):
        super().__init__()
        for name, value in (("weight", weight), ("walls", walls)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number, zero or above")
        if not 0 < start < end <= 1:
            raise ValueError(f"start={start!r}, end={end!r}: expected 0 < start < end <= 1")
        check_positive("power", power)
        require_smooth(student)
        scalar = isinstance(student, PotentialScore)
        self.student, self.weight, self.walls = student, weight, walls
        self.residual = (
            (LogResidual() if scalar else ScoreResidual()) if residual is None else residual
        )
        self.points = (Box() if scalar else OnData()) if points is None else points
        if isinstance(self.residual, LogResidual) and not scalar:
            raise TypeError(f"LogResidual needs a PotentialScore, got {type(student).__name__}")
        self.start, self.end, self.power = start, end, power
        self.denoising = Unweighted() if denoising is None else denoising
        self.equation = Unweighted() if equation is None else equation

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the loss on batch["x0"]: (B, *), with optional conditions batch["cond"]."""
        x0, cond, process = batch["x0"], batch.get("cond", {}), self.student.process
        u = uniform((len(x0),), x0.double(), rng)
        t = self.start + (self.end - self.start) * (1 - u ** (1 / self.power))
        noise = randn_like(x0, rng)
        x = process.corrupt(x0, t, noise)
        off = self.student(x, t, **cond).noise - noise  # sigma times the difference of scores
        scale = (self.denoising(process, t) / process.sigma(t) ** 2).to(off)
        terms = {"denoising": (scale * off.square().flatten(1).sum(1)).mean()}
        total = terms["denoising"]
        if self.weight > 0:
            where, at = self.points(x, t, self.start, self.end, rng)
            own = cond if isinstance(self.points, OnData) else {}
            r = self.residual(self.student, where, at, rng=rng, **own)
            square = r.square() if r.ndim == 1 else r.flatten(1).square().mean(1)
            terms["residual"] = (self.equation(process, at).to(square) * square).mean()
            total = total + self.weight * terms["residual"]
            if (
                self.walls > 0
                and isinstance(self.points, Box)
                and isinstance(self.student, PotentialScore)
            ):
                where, at = self.points.boundary(x, t, self.start, self.end, rng)
                terms["walls"] = (2 * self.student.potential(where, at)).exp().mean()
                total = total + self.weight * self.walls * terms["walls"]
        return Loss(total, terms)


# What to look at afterwards.


class Gap(NamedTuple):
    """Distances between laws, in the unit of the data; `floor` is that of two SDE draws.

    None but `ode_sde` and `floor` without real data.
    """

    ode_sde: float
    floor: float
    ode_data: float | None = None
    sde_data: float | None = None


def distance_of(a: Tensor, b: Tensor) -> float:
    """Return the Wasserstein-2 distance on the line, the sliced one for rows of more values."""
    return (wasserstein2 if a[0].numel() == 1 else sliced_wasserstein2)(a, b)


@torch.no_grad()
def ode_sde_gap(
    denoiser: Denoiser,
    ode: Solver,
    sde: Solver,
    times: Tensor,
    count: int,
    shape: Sequence[int],
    *,
    data: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    distance: Callable[[Tensor, Tensor], float] = distance_of,
    batch: int = 20_000,
    rng: torch.Generator | None = None,
) -> Gap:
    """Return how far the laws of two samplers of one denoiser on one grid are apart.

    Args:
        denoiser: with its conditions bound.
        ode: a deterministic solver.
        sde: a stochastic one.
        times: (steps + 1,) levels for both; see `with_fine_end`.
        count: samples of each, from starts of their own.
        shape: of one sample.
        data: (M, *) real samples, for the distances to them; count of them for a like floor.
        features: what is compared of a sample; by default itself.
        distance: of two batches of features.
        batch: samples at once.
        rng: draws starts and noise.

    Raises:
        ValueError: the first solver draws noise, or the second does not.
    """
    check_whole("count", count, 1)
    if ode.stochastic or not sde.stochastic:
        raise ValueError(f"ode={ode!r}, sde={sde!r}: expected a deterministic and a stochastic one")
    features = (lambda x: x) if features is None else features
    like = next((p for p in denoiser.parameters()), torch.empty(0))
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32

    def law(solver: Solver) -> Tensor:
        parts = []
        for first in range(0, count, batch):
            rows = (min(batch, count - first), *shape)
            x = denoiser.process.prior(rows, rng=rng, dtype=dtype, device=like.device)
            parts.append(features(sample(denoiser, solver, x, times, rng=rng)))
        return torch.cat(parts)

    smooth, noisy, again = law(ode), law(sde), law(sde)
    between = distance(smooth, noisy), distance(noisy, again)
    if data is None:
        return Gap(*between)
    real = features(data).to(smooth)
    return Gap(*between, distance(smooth, real), distance(noisy, real))


def with_fine_end(times: Tensor, last: int = 10, parts: int = 10) -> Tensor:
    """Return a grid whose `last` steps are split in `parts` each, as in the paper's samplers."""
    check_whole("last", last, 1)
    check_whole("parts", parts, 1)
    if last >= len(times):
        raise ValueError(f"last={last}: expected fewer than the {len(times) - 1} steps of the grid")
    inner = torch.arange(1, parts + 1, dtype=times.dtype) / parts
    tail = times[-last - 1 :]
    split = torch.lerp(tail[:-1, None], tail[1:, None], inner).flatten()
    return torch.cat([times[:-last], split])


def monitor(
    residual: Residual,
    denoiser: Denoiser,
    x0: Tensor,
    levels: Sequence[float],
    *,
    weight: Weight | None = None,
    rng: torch.Generator | None = None,
    **cond: Any,
) -> list[dict[str, float]]:
    """Return the residual at each level, on the data and off them.

    On: rows of x0: (B, *) spoiled to the level. Off: each value uniform between the least and the
    greatest that it has there among those rows. Both as the root mean square over rows and values,
    times the square root of `weight`; none by default.
    """
    process = denoiser.process
    weight = Unweighted() if weight is None else weight
    rows = []
    for level in levels:
        t = torch.full((len(x0),), level, dtype=torch.float64, device=x0.device)
        x = process.corrupt(x0, t, randn_like(x0, rng))
        low, high = x.amin(0), x.amax(0)
        places = {"on": x, "off": low + (high - low) * uniform(x.shape, x, rng)}
        scale = float(weight(process, t[:1]).sqrt())
        row = {"t": float(level)}
        for name, where in places.items():
            with torch.no_grad():
                found = residual(denoiser, where, t, rng=rng, **cond).double()
            row[name] = scale * float(found.square().mean().sqrt())
        rows.append(row)
    return rows
