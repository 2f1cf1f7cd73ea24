"""Momentum samplers: damp a multistep solver so that it survives few steps and strong guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Prediction, Process, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as

from .dpmpp import DPMpp2M, midpoint
from .multistep import along_data, along_noise, combine, kept, weights
from .plms import PLMS
from .unipc import UniPC, carried

Base = PLMS | DPMpp2M | UniPC


@method(
    "momentum",
    seed=32,
    paper="Diffusion Sampling with Momentum for Mitigating Divergence Artifacts",
    year=2024,
    buys="fewer blotches at few steps and strong guidance",
    missing="stochastic sampling, which the paper leaves out too",
)
@dataclass(frozen=True)
class Momentum(Solver):
    """Adams-Bashforth on smoothed noise, with weights that undo the lag (GHVB): the order stays.

    v <- (1 - beta) v + beta noise,   y_s = y_t + (r_s - r_t) / beta sum_j c_j(beta) v_{n-j},
    y = x / alpha, r = sigma / alpha; v starts at the first noise. Wider stability region, larger
    error constant: for y' = l y stable at -(2 - beta) < (r_s - r_t) l < 0 for order 2.

    order: 1..5, of equal steps in r with the past given. The low-order start and the weights, which
        are those of equal steps on any grid, as in the paper, cap that of a whole walk at 2.
    beta: damping in (0, 1], 1 is `PLMS(order)`. Left out, `order` is read as the paper's real
        number: 2.7 is order 3 with beta 0.7, 2 is order 2 with beta 1. Mind that 1.0 is DDIM, while
        0.99 is smoothed.
    """

    order: float = 1.8  # type: ignore[misc, assignment]
    beta: float | None = None

    def __post_init__(self) -> None:
        """Split a real order into order and damping, and check both."""
        order, beta = self.order, self.beta
        if not 0 < order <= 5:
            raise ValueError(f"order={order!r}: expected a number in (0, 5]")
        whole = math.ceil(order)
        if beta is None:
            object.__setattr__(self, "beta", round(1 - (whole - order), 12))
        elif whole != order:
            raise ValueError(
                f"order={order!r}, beta={beta!r}: expected a whole order beside beta; "
                f"leave beta out to read {order!r} as order {whole}, beta {1 - whole + order:g}"
            )
        check_fraction("beta", self.damping)
        object.__setattr__(self, "order", whole)

    @property
    def walk_order(self) -> int:
        """At most two: the start and uneven steps in r cap it."""
        return min(int(self.order), 2)

    @property
    def damping(self) -> float:
        """`beta`, never `None`."""
        return 1.0 if self.beta is None else self.beta

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: tuple[Tensor, ...] | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`; the state is v of the last steps, newest first."""
        pred = denoiser(x, t)
        v = kept(pred.noise)
        if state:
            v = torch.lerp(state[0], v, self.damping)
        past = (v, *(state or ()))[: int(self.order)]
        by = tuple(c / self.damping for c in weights(len(past), self.damping))
        return Step(along_noise(denoiser.process, x, t, s, pred, combine(past, by)), past)


class Lag(NamedTuple):
    """A smoothed direction, v: (B, *), and where it has begun: () or (B,) bool."""

    v: Tensor
    begun: Tensor


class Smoothed(NamedTuple):
    """What the wrappers remember: the base's own state, and v of its steps and corrections."""

    base: Any
    lag: Lag
    fixes: Lag | None = None


def _smooth(lag: Lag | None, new: Tensor, high: Tensor, beta: float) -> tuple[Tensor, Lag]:
    """Return (1 - beta) v + beta new, `new` itself where not `high`, and the new lag."""
    if lag is None:
        return new, Lag(new, high)
    v = torch.where(_mask(lag.begun, new), torch.lerp(lag.v, new, beta), new)
    high = high.expand(torch.broadcast_shapes(high.shape, lag.begun.shape))
    v = torch.where(_mask(high, new), v, lag.v)
    return torch.where(_mask(high, new), v, new), Lag(v, lag.begun | high)


def _mask(rows: Tensor, like: Tensor) -> Tensor:
    return expand_as(rows, like).bool()


@method("momentum", example=lambda: HeavyBall(0.8))
@dataclass(frozen=True)
class HeavyBall(Solver):
    """Smooths the update of any multistep solver (HB).

    v <- (1 - beta) v + beta d, then the base's step along v in place of its direction d: the
    extrapolated noise of `PLMS`, the extrapolated data of `DPMpp2M` and `UniPC`. The real stability
    interval of PLMS grows by (2 - beta) / beta, the order falls to one.

    beta: damping in (0, 1]; 1 is the base, below 0.7 pictures blur.
    base: `PLMS`, `DPMpp2M` or `UniPC`. Of the latter two only steps above first order are smoothed,
        so the last step to clean data is not, and v starts with the first of them.
    predictor: whether the predictor of `UniPC` is smoothed besides its corrector, which has a v of
        its own. False is what the paper's code does, True what the paper says.
    """

    beta: float = 0.8
    base: Base = field(default_factory=lambda: PLMS(2))
    predictor: bool = True

    def __post_init__(self) -> None:
        """Check damping and base."""
        check_fraction("beta", self.beta)
        if not isinstance(self.base, Base):
            raise TypeError(f"base={self.base!r}: expected PLMS(...), DPMpp2M() or UniPC(...)")
        if not self.predictor and not (isinstance(self.base, UniPC) and self.base.corrector):
            raise ValueError(
                f"predictor=False smooths only a corrector and {self.base!r} has none: "
                "expected UniPC(corrector=True)"
            )

    @property
    def order(self) -> int:  # type: ignore[override]
        """One, or that of the base at beta = 1."""
        return self.base.order if self.beta == 1 else 1

    @property
    def walk_order(self) -> int:
        """That of the base at most."""
        return min(self.order, self.base.walk_order)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Smoothed | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, pred = denoiser.process, denoiser(x, t)
        past, lag, fixes = state if state is not None else (None, None, None)
        fix: Tensor | None = None
        if isinstance(self.base, UniPC) and self.base.corrector and past is not None:
            plain, high = self.base.corrected(pred.x0, past)
            used, fixes = self._smooth(fixes, plain, high)
            fix = carried(process, t, s, expand_as(past.gain, x) * (used - past.used))
        plain, high, past = self._direction(process, pred, t, s, past)
        used, lag = self._smooth(lag, plain, high)
        used = used if self.predictor else plain
        if isinstance(self.base, UniPC):
            past = self.base.remember(process, pred.x0, t, s, used, past)
        walk = along_noise if isinstance(self.base, PLMS) else along_data
        out = walk(process, x, t, s, pred, used)
        out = out if fix is None else out + fix.to(x.dtype)
        return Step(out, Smoothed(past, lag, fixes))

    def _smooth(self, lag: Lag | None, plain: Tensor, high: Tensor) -> tuple[Tensor, Lag]:
        """Return the direction to walk along, and the new lag."""
        return _smooth(lag, plain, high, self.beta)

    def _direction(
        self, process: Process, pred: Prediction, t: Time, s: Time, past: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Return the base's direction, where it is to be smoothed, and the base's new state."""
        base = self.base
        if isinstance(base, PLMS):
            noise, past = base.direction(pred.noise, past)
            return noise, torch.ones_like(process.alpha(t), dtype=torch.bool), past
        if isinstance(base, UniPC):
            data, high = base.direction(process, pred.x0, t, s, past)
            return data, high, past
        return midpoint(process, pred.x0, t, s, past)


@method("momentum", example=lambda: Nesterov(0.8))
@dataclass(frozen=True)
class Nesterov(HeavyBall):
    """`HeavyBall` that looks ahead (NT): walks along (1 - beta) v + beta d with the new v.

    The lag is (1 - beta)^2 / beta steps in place of (1 - beta) / beta. `beta = 1` is the base.
    """

    def _smooth(self, lag: Lag | None, plain: Tensor, high: Tensor) -> tuple[Tensor, Lag]:
        used, lag = super()._smooth(lag, plain, high)
        ahead = torch.lerp(used, plain, self.beta)
        return ahead, lag
