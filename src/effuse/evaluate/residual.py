"""By how much a denoiser breaks the Fokker-Planck equation, in its log density or its score.

Levels are of the process, t in [0, 1], and residuals are in units of that time: a process that runs
over a longer clock u = c t has the residual of its own clock at R / c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from effuse.core.contracts import Denoiser, Prediction, Process, Time
from effuse.core.errors import check_fraction, check_whole
from effuse.ops.tensors import expand_as
from effuse.ops.trace import divergence, rademacher_like

LARGEST = 64
"""Values of a row above which an exact divergence, a backward pass for each, is refused."""

Field = Callable[[Tensor, Tensor], Tensor]
"""A function of x: (B, *) and t: (B,), each row by itself."""

PIECEWISE_LINEAR = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip


def require_smooth(model: object) -> None:
    """Raise `ValueError` if a layer of `model` has no second derivative."""
    for name, layer in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(layer, PIECEWISE_LINEAR):
            raise ValueError(
                f"{name or 'the network'} is {type(layer).__name__}, whose second derivative is "
                "zero, so the residual would be silently wrong: expected Softplus, SiLU, Tanh, ..."
            )


class Potential(nn.Module):
    """A scalar network phi(x, t), x: (B, *) of `size` values a row, t: (B,); gives (B,).

    Args:
        size: values of a row. width, depth: of the hidden layers, the paper's 80 and 3.
        activation: smooth; the paper's is Softplus(beta=100), nearly ReLU and stiff.
        clock: factor on t before it enters beside x; the horizon of an Ornstein-Uhlenbeck process.
    """

    def __init__(
        self,
        size: int,
        width: int = 80,
        depth: int = 3,
        activation: nn.Module | None = None,
        clock: float = 1.0,
    ):
        super().__init__()
        check_whole("size", size, 1)
        check_whole("depth", depth, 1)
        activation = nn.Softplus(beta=20) if activation is None else activation
        require_smooth(activation)
        sides = [size + 1, *[width] * depth]
        layers = [p for a, b in pairwise(sides) for p in (nn.Linear(a, b), activation)]
        self.net, self.clock = nn.Sequential(*layers, nn.Linear(width, 1)), clock

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return phi at x: (B, *) and t: (B,)."""
        return self.net(torch.cat([x.flatten(1), self.clock * t.to(x)[:, None]], 1)).squeeze(1)


class PotentialScore(Denoiser):
    """A scalar phi(x, t), the log density up to a constant, as a denoiser: score = grad phi.

    noise = -sigma grad phi: conservative whatever phi is. A function of t alone changes nothing.

    Args:
        phi: x: (B, *), t: (B,) -> (B,), each row by itself; a network, or a closed form such as
            `Mixture.log_prob`.
        process: what spoils the data.

    Raises:
        ValueError: phi has a layer without second derivative.
        TypeError: called in half precision, where derivatives of derivatives are noise.
    """

    def __init__(self, phi: Field, process: Process):
        super().__init__()
        require_smooth(phi)
        self.phi, self.process = phi, process

    def potential(self, x: Tensor, t: Time) -> Tensor:
        """Return phi at x: (B, *), as (B,)."""
        _full_precision(x)
        out = self.phi(x, _rows(t, x))
        if out.shape != (len(x),):
            raise ValueError(f"phi of shape {tuple(out.shape)}: expected ({len(x)},), one a row")
        return out

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return grad phi at x: (B, *); with its graph where gradients are on."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (out,) = grad(self.potential(x, t).sum(), x, create_graph=keep)
        return out

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`."""
        noise = -expand_as(self.process.sigma(t), x) * self.score(x, t)
        return self.process.complete(x, t, noise=noise)


def _full_precision(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}: expected float32 or float64, as it is differentiated")


def _rows(t: Time, x: Tensor) -> Tensor:
    """Return the level of each row, (B,) in the dtype of a given tensor, float64 of a float."""
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    return t.to(x.device).expand(len(x))


# What a residual is made of.


class Probe(ABC):
    """How a divergence is taken."""

    @abstractmethod
    def __call__(self, x: Tensor, rng: torch.Generator | None) -> Tensor | None:
        """Return probes for x: (B, *), or None for the exact divergence."""


@dataclass(frozen=True)
class Exact(Probe):
    """Every diagonal entry: a backward pass for each value of a row, at most 64 of them."""

    def __call__(self, x: Tensor, rng: torch.Generator | None) -> None:
        """Check the size; see `Probe`."""
        if x[0].numel() > LARGEST:
            raise ValueError(
                f"an exact divergence over {x[0].numel()} values: expected at most {LARGEST}, "
                "take Rademacher()"
            )


@dataclass(frozen=True)
class Rademacher(Probe):
    """Hutchinson's estimate from `count` random signs a row: unbiased.

    The square of a residual so estimated is too large by the estimate's variance.
    """

    count: int = 1

    def __post_init__(self) -> None:
        """Check the count."""
        check_whole("count", self.count, 1)

    def __call__(self, x: Tensor, rng: torch.Generator | None) -> Tensor:
        """Draw (count, B, *); see `Probe`."""
        return rademacher_like(x.detach().expand(self.count, *x.shape), rng)


class Slope(ABC):
    """How a derivative in t is taken."""

    @abstractmethod
    def __call__(self, value: Field, x: Tensor, t: Tensor) -> Tensor:
        """Return d value / dt at x: (B, *), t: (B,); of the shape of value(x, t)."""


@dataclass(frozen=True)
class Autograd(Slope):
    """By automatic differentiation, exact; of vectors by the reverse of the reverse."""

    def __call__(self, value: Field, x: Tensor, t: Tensor) -> Tensor:
        """See `Slope`."""
        t = t.detach().requires_grad_()
        out = value(x, t)
        if not out.requires_grad:
            return torch.zeros_like(out)
        weight = torch.zeros_like(out, requires_grad=True)
        by = weight if out.ndim > 1 else torch.ones_like(out)
        back: Tensor | None = grad(out, t, by, create_graph=True, allow_unused=True)[0]
        if back is None:
            return torch.zeros_like(out)
        return grad(back.sum(), weight, create_graph=True)[0] if out.ndim > 1 else back


@dataclass(frozen=True)
class Central(Slope):
    """(value(t + step) - value(t - step)) / (2 step): two calls, for networks in pipelines.

    step: in t, above zero; half the spacing of a table if `t` stands between two of its entries.
    """

    step: float = 5e-4

    def __post_init__(self) -> None:
        """Check the step."""
        check_fraction("step", self.step, one=False)

    def __call__(self, value: Field, x: Tensor, t: Tensor) -> Tensor:
        """See `Slope`."""
        if not ((t > self.step) & (t <= 1 - self.step)).all():
            raise ValueError(
                f"t from {float(t.min()):g} to {float(t.max()):g} with a step of {self.step:g}: "
                "expected levels at least a step inside (0, 1)"
            )
        t = t.detach().double()
        return (value(x, t + self.step) - value(x, t - self.step)) / (2 * self.step)


class Terms(NamedTuple):
    """The forward SDE at x: drift f: (B, *), its divergence: (B,), and g^2 / 2: (B,)."""

    drift: Tensor
    spread: Tensor
    half: Tensor


def _forward(process: Process, x: Tensor, t: Tensor) -> Terms:
    d_alpha, *_ = process.rates(t)
    rate = d_alpha / process.alpha(t.detach())
    half = process.diffusion(t.detach()) ** 2 / 2
    if not (rate.isfinite() & half.isfinite()).all():
        raise ValueError(
            f"t from {float(t.min()):g} to {float(t.max()):g}: the SDE has no finite drift and "
            "diffusion there, stay inside (0, 1)"
        )
    drift = process.drift(x, t.detach())
    return Terms(drift, (rate * x[0].numel()).to(x), half.to(x))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


class Residual(ABC):
    """By how much a denoiser breaks an equation that the true law obeys; zero where it is exact."""

    probe: Probe
    slope: Slope

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        *,
        rng: torch.Generator | None = None,
        **cond: Any,
    ) -> Tensor:
        """Return the residual at x: (B, *) and level `t`, (), (B,) or a float inside (0, 1).

        With its graph where gradients are on. `rng` draws the probes; `cond` goes to the denoiser.

        Raises:
            ValueError: a level where drift or diffusion is infinite; a piecewise linear network.
            TypeError: half precision, or a denoiser without what the residual needs.
        """
        _full_precision(x)
        require_smooth(denoiser)
        keep = torch.is_grad_enabled()
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused attention has no second derivative
            out = self.of(denoiser, x, _rows(t, x), rng, cond)
        return out if keep else out.detach()

    @abstractmethod
    def of(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        rng: torch.Generator | None,
        cond: Mapping[str, Any],
    ) -> Tensor:
        """Return the residual at t: (B,) with its graph."""


@dataclass(frozen=True)
class LogResidual(Residual):
    """Of the log density, (B,), for a `PotentialScore`.

    R = d_t phi + div f + <f, grad phi> - g^2 / 2 (lap phi + ||grad phi||^2)

    If R does not depend on x at any level, and phi is right at t = 1, then ODE and SDE of the
    potential have the same law.
    """

    probe: Probe = field(default_factory=Exact)
    slope: Slope = field(default_factory=Autograd)

    def of(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        rng: torch.Generator | None,
        cond: Mapping[str, Any],
    ) -> Tensor:
        """See `Residual`."""
        if not isinstance(denoiser, PotentialScore):
            raise TypeError(
                f"{type(denoiser).__name__} has no scalar potential: expected a PotentialScore, "
                "or take ScoreResidual"
            )
        drift, spread, half = _forward(denoiser.process, x, t)

        def gradient(y: Tensor) -> Tensor:
            return grad(denoiser.potential(y, t).sum(), y, create_graph=True)[0]

        score, laplacian = divergence(gradient, x, self.probe(x, rng), create_graph=True)
        if not laplacian.any() and not (score == score[:1]).all():
            raise ValueError(
                "the second derivative of phi is zero at every row although its gradient varies: "
                "it is piecewise linear, expected a smooth activation (Softplus, SiLU, Tanh)"
            )
        d_t = self.slope(denoiser.potential, x, t)
        return d_t + spread + _dot(drift, score) - half * (laplacian + _dot(score, score))


@dataclass(frozen=True)
class ScoreResidual(Residual):
    """Of the score, (B, *), for any denoiser: the gradient in x of the residual of the log.

    r = d_t s - grad_x [ g^2 / 2 (div s + ||s||^2) - <f, s> - div f ]

    A score that is no gradient is not found out: only its divergence and size enter.
    """

    probe: Probe = field(default_factory=Rademacher)
    slope: Slope = field(default_factory=Central)

    def of(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        rng: torch.Generator | None,
        cond: Mapping[str, Any],
    ) -> Tensor:
        """See `Residual`."""
        process = denoiser.process

        def score(y: Tensor, at: Tensor) -> Tensor:
            return process.score(at, denoiser(y, at, **cond))

        x = x if x.requires_grad else x.detach().requires_grad_()
        drift, _, half = _forward(process, x, t)
        s, div = divergence(lambda y: score(y, t), x, self.probe(x, rng), create_graph=True)
        inside = half * (div + _dot(s, s)) - _dot(drift, s)  # div f is the same for every x
        (right,) = grad(inside.sum(), x, create_graph=True)
        return self.slope(score, x, t) - right
