"""Predictor-corrector sampling of the reverse SDE.

The forward SDE of a process is dx = f dt + g dW, f = `drift`, g = `diffusion`; with the score s the
reverse is dx = (f - g^2 s) dt + g dW. From s to t it carries x_t = a x_s + b z,
a = alpha_t / alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2, about what the process shifts to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Operator, Prediction, Process, Solver, Step, Time
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like, require_finite, weighted_sum
from effuse.processes import SubVP

from .langevin import Corrector


class Moved(NamedTuple):
    """x: (B, *) after a predictor; mean: (B, *) the same before its fresh noise."""

    x: Tensor
    mean: Tensor


def carried(process: Process, t: Time, s: Time) -> tuple[Tensor, Tensor]:
    """Return (a, b^2) of the forward step from level `s` up to `t`: x_t = a x_s + b z."""
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = process.coefficients(t), process.coefficients(s)
    still = (alpha_s == 0) | (sigma_t == sigma_s)  # a step that stays, at either end too
    a = torch.where(still, 1.0, alpha_t / torch.where(still, 1.0, alpha_s))
    return a, (sigma_t.square() - (a * sigma_s).square()).clamp_min(0)


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, zero where the part is."""
    return torch.where(part == 0, 0.0, part / torch.where(part == 0, 1.0, whole))


class Predictor(ABC):
    """A step of the reverse SDE. A frozen dataclass."""

    @abstractmethod
    def __call__(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Moved:
        """Move x: (B, *) from level `t` to `s` with its prediction and standard normal z."""


@dataclass(frozen=True)
class EulerMaruyama(Predictor):
    """mean = x + (f - g^2 s) dt,   x = mean + g sqrt(-dt) z,   dt = s - t < 0.

    Needs a finite drift: alpha_t > 0.
    """

    def __call__(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Moved:
        """See `Predictor.__call__`."""
        dt = torch.as_tensor(s, dtype=torch.float64) - torch.as_tensor(t, dtype=torch.float64)
        g = process.diffusion(t)
        slope = process.drift(x, t) - expand_as(g.square(), x) * process.score(t, pred)
        mean = x + expand_as(dt, x) * slope
        require_finite(mean, lambda: f"drift of {type(process).__name__} at level {t}")
        return Moved(mean + expand_as(g * (-dt).clamp_min(0).sqrt(), x) * z, mean)


@dataclass(frozen=True)
class ReverseDiffusion(Predictor):
    """The forward step turned round: mean = (2 - a) x + b^2 s,   x = mean + b z."""

    def __call__(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Moved:
        """See `Predictor.__call__`."""
        a, var = carried(process, t, s)
        off, to = _centered(process, x, t, s)
        sigma = process.coefficients(t)[1]
        mean = weighted_sum((2 - a, off), (-_over(var, sigma), pred.noise)) + to
        return Moved(weighted_sum((1.0, mean), (var.sqrt(), z)), mean)


@dataclass(frozen=True)
class AncestralSampling(Predictor):
    """mean = (x + b^2 s) / a,   x = mean + c z.

    c = b, as the paper's code takes for VP; with `posterior` the deviation given clean data,
    c = b sigma_s / sigma_t, which for VE is the paper's. Defined for VP and VE only.
    """

    posterior: bool = True

    def __call__(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Moved:
        """See `Predictor.__call__`; raises `TypeError` for a sub-VP process."""
        if isinstance(process, SubVP):
            raise TypeError(
                "ancestral sampling of a sub-VP process: expected VP or VE, or another predictor"
            )
        a, var = carried(process, t, s)
        off, to = _centered(process, x, t, s)
        sigma_t, sigma_s = process.coefficients(t)[1], process.coefficients(s)[1]
        mean = weighted_sum((1 / a, off), (-_over(var, sigma_t * a), pred.noise)) + to
        fresh = var.sqrt() * (_over(sigma_s, sigma_t) if self.posterior else 1.0)
        return Moved(weighted_sum((1.0, mean), (fresh, z)), mean)


def _centered(process: Process, x: Tensor, t: Time, s: Time) -> tuple[Tensor, Tensor]:
    """Return x about the shift at `t`, and the shift at `s`."""
    shifts = [expand_as(process.coefficients(u)[2], x) for u in (t, s)]
    return x - shifts[0], shifts[1]


@method(
    "score_sde",
    seed=5,
    paper="Score-Based Generative Modeling through Stochastic Differential Equations",
    year=2021,
    buys="samples by the reverse SDE, corrected at every level; likelihoods and codes by its ODE",
    missing="the NCSN++ networks and their FID. Likelihood, codes and the adaptive ODE are in "
    "effuse.solvers.likelihood, guidance by a classifier in effuse.control.classifier, the loss in "
    "effuse.distill.score_matching, inpainting and colorization in effuse.solvers.inverse",
)
@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A corrector at the level, then a predictor to the next; the last step gives its mean.

    predictor: `ReverseDiffusion()`, `EulerMaruyama()`, `AncestralSampling()`; None stays.
    corrector: `Langevin(snr)`, `Annealed(snr)`; None does nothing.
    end: steps that arrive at this level or below leave their fresh noise out.
    """

    predictor: Predictor | None = field(default_factory=ReverseDiffusion)
    corrector: Corrector | None = None
    end: float = 0.0
    order = 1
    stochastic = True

    @property
    def evals(self) -> int:  # type: ignore[override]
        """One, and those of the corrector."""
        more = 0 if self.corrector is None else self.corrector.steps
        return max(1, (self.predictor is not None) + more)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        return Step(self.predict(denoiser, self.correct(denoiser, x, t, s, rng), t, s, rng))

    def correct(
        self, denoiser: Denoiser, x: Tensor, t: Time, s: Time, rng: torch.Generator | None
    ) -> Tensor:
        """Return x: (B, *) corrected at level `t`, before a step to `s`."""
        still = (torch.as_tensor(s) == torch.as_tensor(t)).all()
        if self.corrector is None or still:
            return x
        kept = carried(denoiser.process, t, s)[0]
        return self.corrector(denoiser, x, t, kept, rng=rng)

    def predict(
        self, denoiser: Denoiser, x: Tensor, t: Time, s: Time, rng: torch.Generator | None
    ) -> Tensor:
        """Return x: (B, *) moved from level `t` to `s`."""
        if self.predictor is None:
            return x
        z = randn_like(x, rng)
        moved = self.predictor(denoiser.process, x, t, s, denoiser(x, t), z)
        last = torch.as_tensor(s, dtype=torch.float64) <= self.end
        if last.ndim == 0:
            return moved.mean if last else moved.x
        return torch.where(expand_as(last, x).bool(), moved.mean, moved.x)


@dataclass(frozen=True, eq=False)
class Imposed(Solver):
    """Samples what agrees with a measurement y = A x0: inpainting, colorization, any linear A.

    After every predictor and every corrector the measured part is replaced by that of y spoiled to
    the level: x <- x + A^+ (A corrupt(A^+ y, t, z) - A x). In the end the mean, without noise.

    solver: takes the steps, any; of a `PredictorCorrector` the correction is imposed upon too.
    operator: linear, with a pseudo-inverse; None imposes nothing.
    measured: (B, *) or (1, *), A of what is wanted.
    """

    solver: Solver
    operator: Operator | None
    measured: Tensor | None

    @property
    def order(self) -> int:  # type: ignore[override]
        """That of the solver."""
        return self.solver.order

    @property
    def evals(self) -> int:  # type: ignore[override]
        """Those of the solver."""
        return self.solver.evals

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.solver.stochastic or self.operator is not None

    def init(self, x: Tensor) -> Any:
        """See `Solver.init`."""
        return self.solver.init(x)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Any = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        base, process = self.solver, denoiser.process
        if isinstance(base, PredictorCorrector):
            if base.corrector is not None:
                x = self._impose(process, base.correct(denoiser, x, t, s, rng), t, rng)
            step = Step(base.predict(denoiser, x, t, s, rng))
        else:
            step = base.step(denoiser, x, t, s, state, rng=rng)
        end = base.end if isinstance(base, PredictorCorrector) else 0.0
        return step._replace(x=self._impose(process, step.x, s, rng, end))

    def _impose(
        self,
        process: Process,
        x: Tensor,
        t: Time,
        rng: torch.Generator | None,
        end: float = -1.0,
    ) -> Tensor:
        if self.operator is None or self.measured is None:
            return x
        known = self.operator.pinv(self.measured.to(x)).expand_as(x)
        noisy = torch.as_tensor(t, dtype=torch.float64) > end  # where a mean is given, of both
        spoiled = process.corrupt(known, t, expand_as(noisy, x) * randn_like(x, rng))
        return x + self.operator.pinv(self.operator(spoiled) - self.operator(x))
