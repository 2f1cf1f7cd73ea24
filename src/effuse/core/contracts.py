"""The eight contracts on which every method stands.

    data -> process.corrupt -> denoiser -> (control, canvas) -> solver -> sample -> metric -> report
                                  ^  trained by objective      ^ shrunk by transform

Time `t` runs over [0, 1] and 0 is data. `t` is a float, a () tensor, or (B,) one level per row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from effuse.ops.tensors import expand_as, has_zero, number, randn_like, weighted_sum

Time = Tensor | float
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""One recorded call of a network: positional and keyword arguments, as its forward takes them."""


def _moved(x: Tensor, by: Tensor | float) -> Tensor:
    """Return x + by, where there is anything to add."""
    return x if number(by) == 0 else x + expand_as(by, x)


class Prediction(NamedTuple):
    """Both parts of a spoiled sample, always consistent: x_t = alpha x0 + shift + sigma noise.

    x0: (B, *) the clean sample; noise: (B, *) the standard normal part.
    """

    x0: Tensor
    noise: Tensor

    def mix(self, other: Prediction, weight: Time) -> Prediction:
        """Return (1 - weight) self + weight other; affine, so the same in x0, noise or score.

        `weight` is () or (B,). `weak.mix(strong, w)` is classifier-free guidance of scale w.
        """
        return Prediction(
            *(weighted_sum((1 - weight, a), (weight, b)) for a, b in zip(self, other, strict=True))
        )


class Process(ABC):
    """What spoils data: x_t = alpha(t) x_0 + shift(t) + sigma(t) noise.

    A value: what it is at a level never changes, so it is remembered.
    """

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Return the scale of the data at `t`: () or (B,); float64 where `t` is a float."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Return the scale of the noise at `t`, shaped as `alpha`."""

    def shift(self, t: Time) -> Tensor:
        """Return what is added besides; zero unless the process reverts to a mean."""
        return torch.zeros_like(self.alpha(t))

    def corrupt(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """Spoil x0: (B, *) to level `t` with noise: (B, *)."""
        alpha, sigma, shift = self.at(t)
        return _moved(weighted_sum((alpha, x0), (sigma, noise)), shift)

    def advance(self, x: Tensor, t: Time, s: Time, pred: Prediction) -> Tensor:
        """Walk x: (B, *) from level `t` to `s` along the prediction held fixed: the DDIM step.

        x + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) noise: no division, so nothing special at
        either end.
        """
        at, to = self.at(t), self.at(s)
        d_alpha, d_sigma, d_shift = (b - a for a, b in zip(at, to, strict=True))
        out = weighted_sum((1.0, x), (d_alpha, pred.x0), (d_sigma, pred.noise))
        return _moved(out, d_shift)

    def complete(
        self, x: Tensor, t: Time, *, x0: Tensor | None = None, noise: Tensor | None = None
    ) -> Prediction:
        """Return the pair of x: (B, *) at level `t` of which one half, (B, *), is known.

        Raises:
            ValueError: not one half given; or the other cannot be told: x0 where alpha = 0, the
                noise where sigma = 0.
        """
        if (x0 is None) == (noise is None):
            raise ValueError("expected one of x0 and noise")
        alpha, sigma, shift = self.at(t)
        if noise is not None and has_zero(alpha):
            raise ValueError(
                "x0 cannot be told from the noise at alpha = 0: start below pure noise"
            )
        if x0 is not None and has_zero(sigma):
            raise ValueError(
                "the noise cannot be told from x0 at sigma = 0: end the grid before clean data, or "
                "evaluate the network at noisy levels only"
            )
        moved = _moved(x, -shift)
        if noise is not None:
            return Prediction(weighted_sum((1 / alpha, moved), (-sigma / alpha, noise)), noise)
        assert x0 is not None
        return Prediction(x0, weighted_sum((1 / sigma, moved), (-alpha / sigma, x0)))

    def coefficients(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Return (alpha, sigma, shift) at `t`."""
        return self._recall(t)[0]

    def at(self, t: Time) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return `coefficients` as numbers where `t` is one plain level, for fast arithmetic."""
        tensors, numbers = self._recall(t)
        return tensors if numbers is None else numbers

    def _recall(
        self, t: Time
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[float, float, float] | None]:
        """Return both; a walk asks for the same few levels again and again, so they are kept."""
        level = number(t)
        if level is None:
            return (self.alpha(t), self.sigma(t), self.shift(t)), None
        memo = self.__dict__.setdefault("_memo", {})
        key = level, getattr(t, "dtype", None)
        found = memo.get(key)
        if found is None:
            tensors = self.alpha(t), self.sigma(t), self.shift(t)
            if any(number(c) is None for c in tensors):
                return tensors, None  # a shift of the size of a sample is not to be kept
            if len(memo) >= 1 << 14:
                memo.clear()
            found = memo[key] = tensors, tuple(c.item() for c in tensors)
        return found

    def remember(self, times: Tensor) -> None:
        """Compute the coefficients at all levels of a walk, (N,) on the CPU, in one go."""
        parts = self.alpha(times), self.sigma(times), self.shift(times)
        if any(c.shape != times.shape or c.requires_grad for c in parts):
            return
        memo = self.__dict__.setdefault("_memo", {})
        each = zip(*(c.unbind() for c in parts), strict=True)
        numbers = zip(*(c.tolist() for c in parts), strict=True)
        for t, tensors, values in zip(times.tolist(), each, numbers, strict=True):
            memo.setdefault((t, times.dtype), (tensors, values))

    def rates(self, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Return d/dt of (alpha, sigma, shift) at `t`, by automatic differentiation.

        Infinite where sigma grows like the square root of t, which is at t = 0 of `VP` and `VE`.
        """
        with torch.enable_grad():
            t = torch.as_tensor(t, dtype=torch.float64).detach().requires_grad_()
            out = []
            for c in self.coefficients(t):  # t is tracked: nothing is remembered
                if c.requires_grad:
                    (g,) = torch.autograd.grad(c.sum(), t, retain_graph=True)
                else:
                    g = torch.zeros_like(t)
                out.append(g.detach())
        return out[0], out[1], out[2]

    def velocity(self, t: Time, pred: Prediction) -> Tensor:
        """Return dx/dt of the probability-flow ODE: x0 d(alpha) + d(shift) + noise d(sigma)."""
        d_alpha, d_sigma, d_shift = (expand_as(c, pred.x0) for c in self.rates(t))
        return d_alpha * pred.x0 + d_shift + d_sigma * pred.noise

    def score(self, t: Time, pred: Prediction) -> Tensor:
        """Return the gradient of the log density at `t`, -noise / sigma; infinite at sigma = 0."""
        return -pred.noise / expand_as(self.sigma(t), pred.noise)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """Return the drift of the forward SDE at x: (B, *), (d log alpha)(x - shift) + d(shift)."""
        d_alpha, _, d_shift = self.rates(t)
        rate = expand_as(d_alpha / self.alpha(t), x)
        return rate * (x - expand_as(self.shift(t), x)) + expand_as(d_shift, x)

    def diffusion(self, t: Time) -> Tensor:
        """Return g(t) of the forward SDE: g^2 = d(sigma^2) - 2 sigma^2 d(log alpha), () or (B,)."""
        d_alpha, d_sigma, _ = self.rates(t)
        sigma = self.sigma(t)
        return (2 * sigma * (d_sigma - sigma * d_alpha / self.alpha(t))).clamp_min(0).sqrt()

    def logsnr(self, t: Time) -> Tensor:
        """Return log(alpha^2 / sigma^2): falls with `t`, infinite where one of them is zero."""
        alpha, sigma, _ = self.coefficients(t)
        return 2 * (alpha.log() - sigma.log())

    def time_at(self, logsnr: Time) -> Tensor:
        """Return the `t` of a log signal-to-noise ratio in float64, by bisection within [0, 1]."""
        target = torch.as_tensor(logsnr, dtype=torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            cleaner = self.logsnr(middle) > target
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return (low + high) / 2

    def prior(
        self,
        shape: Sequence[int],
        *,
        rng: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a start at t = 1: shift(1) + sigma(1) times standard normal noise of `shape`."""
        like = torch.empty(tuple(shape), dtype=dtype, device=device)
        return expand_as(self.shift(1.0), like) + expand_as(self.sigma(1.0), like) * randn_like(
            like, rng
        )


class Denoiser(nn.Module, ABC):
    """Predicts both parts of a spoiled sample."""

    process: Process

    @abstractmethod
    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict from x: (B, *) at level `t`: () or (B,), under the conditions `cond`."""

    def given(self, **cond: Any) -> Denoiser:
        """Return this denoiser with `cond` bound; conditions of a later call win."""
        return Given(self, cond)


class Given(Denoiser):
    """A denoiser with conditions bound."""

    def __init__(self, base: Denoiser, cond: Mapping[str, Any]):
        super().__init__()
        self.base, self.cond, self.process = base, dict(cond), base.process

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict with the bound conditions; see `Denoiser.forward`."""
        return self.base(x, t, **{**self.cond, **cond})


class Step(NamedTuple):
    """What a solver's step gives: x: (B, *) at the new level, and the state for the next step."""

    x: Tensor
    state: Any = None


class Solver(ABC):
    """Walks from noise to data. A frozen dataclass of hyper-parameters; its state is a value.

    order: order of convergence of the ODE solver; for a stochastic one, of its moments.
    evals: calls of the denoiser a step. stochastic: whether `step` draws from `rng`.
    counterpart: the diffusers scheduler that takes the same steps; as a scheduler the solver then
    keeps to the levels of the one it replaces, unless told otherwise.
    """

    order: ClassVar[int] = 1
    evals: ClassVar[int] = 1
    stochastic = False
    counterpart: ClassVar[str] = ""

    @property
    def walk_order(self) -> int:
        """Order of a whole walk from t = 1 to 0: below `order` where its start or ends cap it."""
        return self.order

    def init(self, x: Tensor) -> Any:
        """Return the state before the first step."""
        return None

    @abstractmethod
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
        """Walk x: (B, *) from level `t` to `s`; from `t` to `t` is the identity."""


@dataclass(frozen=True)
class Loss:
    """A scalar to minimize, and the named terms it is made of (for logs and for error messages)."""

    total: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """Says what to learn and never how to loop: owns no optimizer, no device, no loop.

    players: who takes a step, in order. `parameters_of(player)` are theirs alone.
    A teacher is frozen once, in the constructor.
    """

    players: tuple[str, ...] = ("student",)

    @abstractmethod
    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return what `player` minimizes on `batch`."""

    def forward(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Same as `loss`, so that engines that wrap modules can wrap this one."""
        return self.loss(player, batch, rng=rng)

    def parameters_of(self, player: str) -> list[nn.Parameter]:
        """Return the trainable parameters of `player`, by default those of the member so named."""
        if player not in self.players:
            raise ValueError(f"player={player!r}: expected one of {self.players}")
        return [p for p in getattr(self, player).parameters() if p.requires_grad]


Where = Callable[[str, nn.Module], bool]
"""Which layers a transform may touch: called with the layer's dotted name and the layer."""


def everywhere(name: str, module: nn.Module) -> bool:
    """Allow every layer."""
    return True


class Transform(ABC):
    """Makes a model smaller or faster, and can be taken off again. A frozen dataclass.

    kind: what it does, for the order in a recipe: "prune", "factorize", "rewire", "quantize",
    "cache". calibrated: whether `observe` must be called before it acts. targeted: whether
    `observe` also takes batches of a `call` and its `target`, what the network should answer.
    walked: whether the handle's `learn` must be called before it acts, with what draws whole walks,
    `effuse.compress.calibrate.walks`.
    """

    kind: ClassVar[str]
    calibrated: ClassVar[bool] = False
    targeted: ClassVar[bool] = False
    walked: ClassVar[bool] = False

    @abstractmethod
    def attach(self, model: nn.Module) -> Applied:
        """Put it on `model`, in place, and return the handle.

        Raises:
            Unsuited: the model has nothing for it, by its own word; nothing has been touched.
        """

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Applied:
        """Rebuild on a fresh `model` the structure that `plan` (from `Applied.plan`) describes.

        The weights come afterwards with `load_state_dict`. The default attaches anew.
        """
        return self.attach(model)


class Applied(ABC):
    """A transform on a model."""

    transform: Transform
    model: nn.Module

    def observe(self, calls: Iterable[Call]) -> None:  # noqa: B027 - optional
        """Calibrate on recorded calls of the model; nothing to do by default."""

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective | None:
        """Return what heals the model from `teacher`'s answers; `None` if nothing needs it.

        steps: of the healing to come, for losses that fade over it; None if nobody knows.
        """
        return None

    def reset(self) -> None:  # noqa: B027 - optional
        """Forget what a run left behind; a new sampling run starts."""

    def report(self) -> dict[str, Any]:
        """Return what was done in numbers: counted parameters, bytes, calls; json-able."""
        return {}

    def plan(self) -> dict[str, Any]:
        """Return the json-able data from which `Transform.restore` rebuilds the structure."""
        return {}

    @abstractmethod
    def detach(self) -> None:
        """Take the transform off: the original back, bit for bit."""

    @abstractmethod
    def finalize(self) -> None:
        """Make it permanent: plain modules, ready to save. `detach` raises from now on."""


class Operator(nn.Module, ABC):
    """Measures: y = A(x). Degradation, window, projection, renderer."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply A to x: (B, *)."""

    def adjoint(self, y: Tensor, like: Tensor) -> Tensor:
        """Apply the adjoint (at `like`, the vector-Jacobian product) to y; shaped as `like`."""
        with torch.enable_grad():
            x = like.detach().requires_grad_()
            (out,) = torch.autograd.grad(self(x), x, y)
        return out

    def pinv(self, y: Tensor) -> Tensor:
        """Apply the pseudo-inverse to y, where there is one: A(pinv(A(x))) = A(x)."""
        raise NotImplementedError(f"{type(self).__name__} has no pseudo-inverse in closed form")


class Metric(ABC):
    """Judges samples. `update` as often as you like, `compute` once, `reset` to begin again."""

    name: str
    unit: str
    better: Literal["higher", "lower"]

    @abstractmethod
    def update(self, samples: Any, reference: Any = None) -> None:
        """Take in samples, and what they are compared with where the metric is a paired one."""

    @abstractmethod
    def compute(self) -> float:
        """Return the value over all that was taken in."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all that was taken in."""

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval of `compute` at `level`; (nan, nan) where none is known."""
        return math.nan, math.nan
