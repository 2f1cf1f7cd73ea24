"""MRS: multistep solvers for mean-reverting diffusion, ODE and SDE, along data or noise.

All in lambda = log(alpha / sigma) with h = lambda_s - lambda_t > 0. What the process adds besides,
(1 - alpha) mu where it reverts to mu, is `Process.shift`: so they run on any process, and with
mu = 0 they are the DPM-Solver family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Prediction, Process, Solver, Step, Time
from effuse.core.errors import check_choice, check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like, weighted_sum

from .ddim import shrink
from .dpmpp import half_logsnr
from .multistep import along_data, along_noise, kept


class Form(ABC):
    """Which half of the pair is taken as a polynomial in lambda over a step."""

    @abstractmethod
    def half(self, pred: Prediction) -> Tensor:
        """Return that half."""

    @abstractmethod
    def bend(self, h: Tensor, *, noisy: bool) -> tuple[Tensor, Tensor]:
        """Return k1, k2 of the function `bend` for this half, on the SDE if `noisy`."""

    @abstractmethod
    def ode(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor
    ) -> Tensor:
        """Walk the probability-flow ODE with the half at `to`: (B, *)."""

    @abstractmethod
    def sde(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor, z: Tensor
    ) -> Tensor:
        """Walk the reverse SDE with the half at `to`: (B, *) and noise z."""


@dataclass(frozen=True)
class AlongData(Form):
    """The data: the calmer choice at few steps.

    ODE: x_s = sigma_s / sigma_t x + (...) mu + alpha_s (1 - e^-h) D
    SDE: x_s = sigma_s / sigma_t e^-h x + (...) mu + alpha_s (1 - e^-2h) D
         + sigma_s sqrt(1 - e^-2h) z
    """

    def half(self, pred: Prediction) -> Tensor:
        """Return x0."""
        return pred.x0

    def bend(self, h: Tensor, *, noisy: bool) -> tuple[Tensor, Tensor]:
        """See `Form.bend`: the SDE weighs by e^2(tau - h)."""
        return bend(2 * h if noisy else h)

    def ode(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor
    ) -> Tensor:
        """See `Form.ode`."""
        return along_data(process, x, t, s, pred, to)

    def sde(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor, z: Tensor
    ) -> Tensor:
        """See `Form.sde`."""
        ratio = shrink(process, t, s)  # e^-h, finite at pure noise and zero at clean data
        sigma_s = process.coefficients(s)[1]
        out = process.advance(x, t, s, pred)
        fresh = sigma_s * (1 - ratio.square()).clamp_min(0).sqrt()
        gain = process.coefficients(s)[0] * (1 - ratio.square())
        # advance keeps all noise, the transition e^-h of it
        return weighted_sum(
            (1.0, out),
            (sigma_s * (ratio - 1), pred.noise),
            (gain, (to - pred.x0).to(x.dtype)),
            (fresh, z),
        )


@dataclass(frozen=True)
class AlongNoise(Form):
    """The noise, as published first: unstable at few steps, the SDE most of all.

    ODE: x_s = alpha_s / alpha_t x + (1 - alpha_s / alpha_t) mu - sigma_s (e^h - 1) D
    SDE: x_s = alpha_s / alpha_t x + (1 - alpha_s / alpha_t) mu - 2 sigma_s (e^h - 1) D
         + sigma_s sqrt(e^2h - 1) z

    Steps from pure noise and, of the SDE, to clean data, where h is infinite, go along the data.
    """

    def half(self, pred: Prediction) -> Tensor:
        """Return the noise."""
        return pred.noise

    def bend(self, h: Tensor, *, noisy: bool) -> tuple[Tensor, Tensor]:
        """See `Form.bend`: the noise is weighed by e^-(tau - h), on either walk."""
        return bend(-h)

    def ode(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor
    ) -> Tensor:
        """See `Form.ode`."""
        return along_noise(process, x, t, s, pred, to)

    def sde(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, to: Tensor, z: Tensor
    ) -> Tensor:
        """See `Form.sde`."""
        ratio, sigma_s = shrink(process, t, s), process.coefficients(s)[1]
        ends = ratio == 0
        grow = 1 / torch.where(ends, 1.0, ratio)
        out = process.advance(x, t, s, pred)
        inner = weighted_sum(
            (1.0, out),
            (-sigma_s * (grow - 1), pred.noise),
            (-2 * sigma_s * (grow - 1), (to - pred.noise).to(x.dtype)),
            (sigma_s * (grow.square() - 1).clamp_min(0).sqrt(), z),
        )
        pure = process.coefficients(t)[0] == 0
        ends = ends | pure
        if not ends.any():
            return inner
        plain = AlongData().sde(process, x, t, s, pred, pred.x0, z)
        return torch.where(expand_as(ends, x).bool(), plain, inner)


def bend(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return k1, k2 of the mean m + k1 h m' + k2 h^2 m'' over a step h, under e^(tau - h).

    k1 = 1 / (1 - e^-h) - 1 / h,   k2 = (1/2 - k1) / h + k1 / 2;   1/2 and 1/6 at h = 0.
    """
    small = h.abs() < 0.05
    wide = torch.where(small, 1.0, h)
    k1 = torch.where(
        small,
        1 / 2 + h * (1 / 12 - h.square() * (1 / 720 - h.square() / 30240)),
        -1 / torch.expm1(-wide) - 1 / wide,
    )
    left = torch.where(
        small, -1 / 12 + h.square() * (1 / 720 - h.square() / 30240), (1 / 2 - k1) / wide
    )
    return k1, left + k1 / 2


class Seen(NamedTuple):
    """A half of a past prediction, (B, *), and the log(alpha / sigma) it was made at."""

    half: Tensor
    at: Tensor


@dataclass(frozen=True)
class _Multistep(Solver):
    """What both walks share: the half of the pair, extrapolated over the step."""

    order: int = 2  # type: ignore[misc]
    form: Form = field(default_factory=AlongData)
    falls: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check order and form."""
        check_choice("order", self.order, (1, 2) if self.stochastic else (1, 2, 3))
        if not isinstance(self.form, Form):
            raise TypeError(f"form={self.form!r}: expected AlongData() or AlongNoise()")

    def on(self, times: Tensor, below: int = 10) -> Self:
        """Return the solver for a walk along `times`: (steps + 1,).

        In fewer than `below` steps the order falls towards the end, to one in the last step.
        """
        levels = times.flip(0).tolist()
        short = len(levels) - 1 < below
        return replace(self, falls=tuple(levels[: self.order - 1]) if short else ())

    def _direction(
        self, process: Process, pred: Prediction, t: Time, s: Time, past: tuple[Seen, ...]
    ) -> tuple[Tensor, tuple[Seen, ...]]:
        """Return the half over the step from `t` to `s`, and the past of the next step."""
        seen = (Seen(kept(self.form.half(pred)), half_logsnr(process, t)), *past)[: self.order]
        h = half_logsnr(process, s) - seen[0].at
        gaps = [a.at - b.at for a, b in pairwise(seen)]
        fit = h.isfinite()
        allowed = [torch.ones_like(fit)] * 2
        for k, level in enumerate(self.falls):  # falls[k] ends a step of order k + 1 at most
            apart = (torch.as_tensor(s, dtype=torch.float64) - level).abs() > 1e-9
            allowed = [a & apart if k <= j else a for j, a in enumerate(allowed)]
        h = torch.where(fit, h, 1.0)
        k1, k2 = self.form.bend(h, noisy=self.stochastic)
        by = [torch.ones_like(h), *[torch.zeros_like(h)] * (len(seen) - 1)]
        for j, gap in enumerate(gaps):
            fit = fit & gap.isfinite() & (gap != 0) & allowed[j]
            gap = torch.where(fit, gap, 1.0)
            if j == 0:  # h m' = h (m - m') / gap
                first, near = h / gap, gap
                tilt = torch.where(fit, k1 * first, 0.0)
                by[0], by[1] = by[0] + tilt, by[1] - tilt
                continue
            # c: of the second difference, which also corrects the first derivative
            c = torch.where(fit, (k1 * near + 2 * k2 * h) / (near + gap), 0.0)
            by[0], by[1] = by[0] + c * first, by[1] - c * (first + h / gap)
            by[2] = by[2] + c * h / gap
        return weighted_sum(*((b, m.half) for b, m in zip(by, seen, strict=True))), seen


@method(
    "mrs",
    seed=37,
    paper="MRS: A Fast Sampler for Mean Reverting Diffusion based on ODE and SDE Solvers",
    year=2025,
    buys="restored pictures in 10 to 20 calls, with or without noise on the way",
)
@dataclass(frozen=True)
class MRS(_Multistep):
    """Restores in few calls: the exact ODE of mean-reverting diffusion, order 1 to 3.

    x_s = shift_s + sigma_s / sigma_t (x - shift_t) + alpha_s (1 - e^-h) D,
    shift = (1 - alpha) mu,
    D = x0 + k1 h x0' + k2 h^2 x0'',   k1 = 1 / (1 - e^-h) - 1 / h,   k2 = (1/2 - k1) / h + k1 / 2,

    derivatives in lambda by differences of the last predictions; along the noise in `AlongNoise`.
    One evaluation a step. Any process will do: with mu = 0 this is DPM-Solver++.

    The first steps are of lower order, as there is no past; steps where h is infinite (pure noise,
    clean data) of first. The published third order takes half the second derivative and so is of
    second; this is of third.

    order: 1, 2 or 3. form: what is extrapolated, `AlongData()` or `AlongNoise()`.
    falls: levels at which a step of order at most 1, 2, ... ends; `on(times)` gives those of the
    paper for a walk of less than ten steps.
    """

    @property
    def walk_order(self) -> int:
        """At most two: the first step caps it."""
        return min(self.order, 2)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: tuple[Seen, ...] | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`; the state is what was seen, newest first."""
        process, pred = denoiser.process, denoiser(x, t)
        to, seen = self._direction(process, pred, t, s, state or ())
        return Step(self.form.ode(process, x, t, s, pred, to), seen)


@method("mrs")
@dataclass(frozen=True)
class MRSSDE(_Multistep):
    """The same on the reverse SDE, order 1 or 2.

    x_s = shift_s + sigma_s / sigma_t e^-h (x - shift_t) + alpha_s (1 - e^-2h) D
          + sigma_s sqrt(1 - e^-2h) z,   D = x0 + k1(2h) h x0'.

    First order along the data is the posterior sampler of IR-SDE, which draws from
    q(x_s | x_t, x0): `Ancestral` in another dress. The paths are rough, so the moments are of first
    order whatever `order`; the second lowers the error, not its slope.

    order: 1 or 2. form, falls: as of `MRS`; along the noise it needs many steps.
    """

    stochastic = True

    @property
    def walk_order(self) -> int:
        """One, of the moments."""
        return 1

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: tuple[Seen, ...] | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, pred = denoiser.process, denoiser(x, t)
        to, seen = self._direction(process, pred, t, s, state or ())
        return Step(self.form.sde(process, x, t, s, pred, to, randn_like(x, rng)), seen)


@dataclass(frozen=True)
class ReverseEuler(Solver):
    """Euler-Maruyama on the reverse SDE or, at eta = 0, Euler on the ODE: the plain way.

    x_s = x + (s - t) (f - (1 + eta^2) / 2 g^2 score) + eta g sqrt(t - s) z.

    The baseline of `MRS`: what IR-SDE is sampled with, a step an entry. Needs rates that are finite
    on the way, so no pure noise (alpha = 0) and no clean data but at the end.
    """

    eta: float = 1.0
    order = 1

    def __post_init__(self) -> None:
        """Check `eta`."""
        check_fraction("eta", self.eta, zero=True)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0

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
        process, pred = denoiser.process, denoiser(x, t)
        dt = torch.as_tensor(s, dtype=torch.float64) - torch.as_tensor(t, dtype=torch.float64)
        g = process.diffusion(t)
        drift, score = process.drift(x, t), process.score(t, pred)
        pull = -(1 + self.eta**2) / 2 * g.square() * dt
        out = weighted_sum((1.0, x), (dt, drift.to(x.dtype)), (pull, score.to(x.dtype)))
        if not self.stochastic:
            return Step(out)
        return Step(weighted_sum((1.0, out), (self.eta * g * dt.abs().sqrt(), randn_like(x, rng))))
