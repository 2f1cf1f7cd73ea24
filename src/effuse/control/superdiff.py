"""SuperDiff: superpose diffusion models by the densities of the sample under each.

The log densities are part of the walk, so this is a solver that carries them in its state, beside a
denoiser that keeps its members apart. A wrapping denoiser could not do it: weights hang on the
noise of the step, which only the solver sees.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effuse.bridge.pipeline import Wrapped
from effuse.core.contracts import Denoiser, Prediction, Process, Solver, Step, Time
from effuse.core.errors import check_whole
from effuse.core.method import method
from effuse.ops.tensors import expand_as, has_zero, randn_like, weighted_sum
from effuse.ops.trace import divergence, rademacher_like
from effuse.solvers.ddim import fresh_noise, shrink

from .base import Control, branches, same_space
from .densities import AND, Instant, Rule, ito
from .guide import one_process


class Parts(NamedTuple):
    """What the members say: one pair each, that of the unconditional branch, and the scale."""

    each: list[Prediction]
    empty: Prediction | None
    scale: float

    def mixed(self, kappa: Tensor) -> Prediction:
        """Return empty + scale (sum_i kappa_i p_i - empty), kappa: (B, M) of sum one."""
        last, out = self.each[-1], self.each[-1]
        for k, p in zip(kappa.unbind(1), self.each[:-1], strict=False):
            terms = zip(out, p, last, strict=True)
            out = Prediction(*(a + expand_as(k, a) * (b - c) for a, b, c in terms))
        return out if self.empty is None else self.empty.mix(out, self.scale)


class Several(Denoiser):
    """Denoisers side by side; as a denoiser of its own, their average.

    Guided, if there is an unconditional one: empty + scale (average - empty). Densities are always
    those of the members, unguided: a guided score is the score of no density that is known.

    Args:
        members: of one schedule, with their conditions bound: prompts of one pipeline, several
            pipelines, networks of your own.
        empty: the unconditional denoiser, for guidance.
        scale: of guidance, diffusers' meaning, above zero.
    """

    def __init__(
        self, members: Sequence[Denoiser], empty: Denoiser | None = None, scale: float = 1.0
    ):
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale!r}: expected a finite guidance scale above zero")
        if empty is None and scale != 1:
            raise ValueError(f"scale={scale:g} without an unconditional denoiser: give `empty`")
        self.process = one_process([*members, *([] if empty is None else [empty])])
        self.members = nn.ModuleList(members)
        self.empty = None if scale == 1 else empty
        self.scale = scale

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict the guided average; see `Denoiser.forward`."""
        parts = self.parts(x, t, **cond)
        count = len(parts.each)
        return parts.mixed(x.new_full((len(x), count), 1 / count))

    def parts(self, x: Tensor, t: Time, **cond: Any) -> Parts:
        """Return what each member predicts from x: (B, *), in shapes that agree."""
        each = [member(x, t, **cond) for member in self.members]
        return self._parts(each, x, t, cond)

    def parts_and_divergence(
        self, x: Tensor, t: Time, probe: Tensor | None, **cond: Any
    ) -> tuple[Parts, Tensor]:
        """Return the parts and the divergence of each member's noise, (B, M), by one probe."""
        found = [_with_divergence(member, x, t, probe, cond) for member in self.members]
        each, div = zip(*found, strict=True)
        return self._parts(list(each), x, t, cond), torch.stack(div, 1)

    def _parts(self, each: list[Prediction], x: Tensor, t: Time, cond: Any) -> Parts:
        for index, pred in enumerate(each):
            if pred.noise.shape != x.shape:
                raise ValueError(
                    f"denoiser {index} predicts {tuple(pred.noise.shape)} for samples of "
                    f"{tuple(x.shape)}: expected one latent space for all"
                )
        empty = None if self.empty is None else self.empty(x, t, **cond)
        return Parts(each, empty, self.scale)


def _with_divergence(
    member: Any, x: Tensor, t: Time, probe: Tensor | None, cond: Any
) -> tuple[Prediction, Tensor]:
    kept: list[Prediction] = []

    def noise(y: Tensor) -> Tensor:
        kept.append(member(y, t, **cond))
        return kept[0].noise

    out, div = divergence(noise, x, probe)
    return Prediction(kept[0].x0.detach(), out), div


class Transition(ABC):
    """How a stochastic step is discretized: u = -gain m + std z, in units of sigma_t."""

    @abstractmethod
    def scales(self, process: Process, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """Return gain and std, () or (B,) float64."""

    @abstractmethod
    def move(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Tensor:
        """Walk x: (B, *) along the mixed prediction with standard normal noise z: (B, *)."""


@dataclass(frozen=True)
class Reverse(Transition):
    """The reverse transition of the process, as in ancestral sampling; finite from t = 1 to 0.

    gain = 1 - q^2, std = q sqrt(1 - q^2), q = r_s / r_t, r = sigma / alpha. Same limit as the
    others; the last step to clean data leaves no noise.
    """

    def scales(self, process: Process, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """See `Transition.scales`."""
        q = shrink(process, t, s)
        gain = (1 - q.square()).clamp_min(0)
        return gain, q * gain.sqrt()

    def move(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Tensor:
        """See `Transition.move`."""
        kept, fresh = fresh_noise(process, t, s, 1.0)
        out = process.advance(x, t, s, pred)
        change = kept - process.coefficients(s)[1]
        return weighted_sum((1.0, out), (change, pred.noise), (fresh, z))


@dataclass(frozen=True)
class SigmaEuler(Transition):
    """Euler-Maruyama in y = x / alpha over r = sigma / alpha, the form used with Stable Diffusion.

    dy = 2 (r_s - r_t) m + sqrt(2 (r_t - r_s) r_t) z: gain = 2 (1 - q), std^2 = gain. Not from pure
    noise, alpha = 0.
    """

    def scales(self, process: Process, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """See `Transition.scales`."""
        gain = 2 * (1 - shrink(process, t, s)).clamp_min(0)
        return gain, gain.sqrt()

    def move(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Tensor:
        """See `Transition.move`."""
        gain, std = self.scales(process, t, s)
        _refuse_pure_noise(process, t, self)
        (alpha_t, sigma_t, shift_t), (alpha_s, _, shift_s) = (
            process.coefficients(t),
            process.coefficients(s),
        )
        u = weighted_sum((-gain, pred.noise), (std, z))
        out = weighted_sum((alpha_s / alpha_t, x), (alpha_s / alpha_t * sigma_t, u))
        return out + expand_as(shift_s - alpha_s / alpha_t * shift_t, x).to(x)


@dataclass(frozen=True)
class Maruyama(Transition):
    """Euler-Maruyama in x: dx = -f r + g^2 r s + g sqrt(r) z with the process's own drift.

    gain = g^2 r / sigma_t^2, std^2 = gain. Needs alpha > 0 and finite rates at every level left.
    """

    def scales(self, process: Process, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """See `Transition.scales`."""
        length = _level(t) - _level(s)
        gain = process.diffusion(t).square() * length / process.sigma(t).square()
        return gain, gain.sqrt()

    def move(
        self, process: Process, x: Tensor, t: Time, s: Time, pred: Prediction, z: Tensor
    ) -> Tensor:
        """See `Transition.move`."""
        _refuse_pure_noise(process, t, self)
        gain, std = self.scales(process, t, s)
        sigma = process.sigma(t)
        length = expand_as(_level(t) - _level(s), x)
        out = x - (length * process.drift(x, t)).to(x)
        return weighted_sum((1.0, out), (-gain * sigma, pred.noise), (std * sigma, z))


def _level(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _refuse_pure_noise(process: Process, t: Time, transition: Transition) -> None:
    if has_zero(process.coefficients(t)[0]):
        raise ValueError(
            f"{type(transition).__name__} from alpha = 0: start below pure noise, or use Reverse()"
        )


class Trace(NamedTuple):
    """The state: where the densities stand, and the weights of the step before.

    log_q: (B, M) log density of each model at x / alpha, from zero at the start, float64.
    kappa: (B, M) the weights of the last step; equal before the first.
    """

    log_q: Tensor
    kappa: Tensor


def _begun(state: Trace | None, x: Tensor, count: int) -> Trace:
    if state is not None:
        return state
    zero = torch.zeros(len(x), count, dtype=torch.float64, device=x.device)
    return Trace(zero, zero + 1 / count)


def _flat(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return the noise of each, (B, M, D), and of the guided average, (B, D) float64."""
    noise = torch.stack([p.noise.flatten(1) for p in parts.each], 1)
    even = noise.double().mean(1)
    if parts.empty is not None:
        even = torch.lerp(parts.empty.noise.flatten(1).double(), even, parts.scale)
    return noise, even


def _several(denoiser: Denoiser) -> Several:
    return denoiser if isinstance(denoiser, Several) else Several([denoiser])


@method(
    "superdiff",
    seed=16,
    paper="The Superposition of Diffusion Models Using the Itô Density Estimator",
    year=2024,
    buys="several models or prompts in one sample: either of them, or all at once",
    missing="the protein models of the paper",
)
@dataclass(frozen=True)
class Superposition(Solver):
    """Walks along the scores of several models, weighted by a rule that sees their densities.

    x_s = step along empty + scale (sum_i kappa_i p_i - empty), kappa = rule(log q, noise);
    log q_i grows by Ito's lemma (`densities.ito`), which costs no call more. The state is a
    `Trace`; `on_step` of `sample` sees it.

    A `Several` gives the members; any other denoiser is the only one, and with `Reverse` the walk
    is then ancestral sampling. `Fixed()` is the average of scores.

    rule: `AND()`, `OR()`, `Fixed()`. transition: `Reverse()`, `SigmaEuler()`, `Maruyama()`.
    """

    rule: Rule = field(default_factory=AND)
    transition: Transition = field(default_factory=Reverse)
    order = 1
    stochastic = True

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Trace | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        parts, process = _several(denoiser).parts(x, t), denoiser.process
        state = _begun(state, x, len(parts.each))
        noise, mean = _flat(parts)
        gain, std = (c.to(x.device).reshape(-1, 1) for c in self.transition.scales(process, t, s))
        z = randn_like(x, rng)
        even = ito(std * z.flatten(1).double() - gain * mean, noise, gain)
        now = Instant.of(state.log_q, even, noise, gain * parts.scale)
        kappa = self.rule.weights(now)
        out = self.transition.move(process, x, t, s, parts.mixed(kappa), z)
        return Step(out, Trace(state.log_q + now.gains(kappa), kappa))


@method("superdiff", example=lambda: SuperpositionODE(probes=0))
@dataclass(frozen=True)
class SuperpositionODE(Solver):
    """The same along the probability-flow ODE, where the densities need a divergence.

    The DDIM step along the mixed prediction m; with h = 1 - r_s / r_t, r = sigma / alpha,
    d log q_i = h (<n_i, m - n_i> + sigma_t div n_i), the divergence by probes all models share.

    rule: as in `Superposition`. For two models AND is, d = s_1 - s_2,
        kappa_1 = (div s_1 - div s_2 + <s_1, d>) / |d|^2.
    probes: signs drawn a step for Hutchinson's estimate; 0 is the exact divergence, a backward pass
        for each value of a sample.
    """

    rule: Rule = field(default_factory=AND)
    probes: int = 1
    order = 1

    def __post_init__(self) -> None:
        """Check the probes."""
        check_whole("probes", self.probes, 0)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether probes are drawn."""
        return self.probes > 0

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Trace | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, probe = denoiser.process, None
        if self.probes:
            signs = [rademacher_like(x, rng) for _ in range(self.probes)]
            probe = torch.stack(signs)
        parts, div = _several(denoiser).parts_and_divergence(x, t, probe)
        state = _begun(state, x, len(parts.each))
        noise, mean = _flat(parts)
        h = (1 - shrink(process, t, s)).to(x.device).reshape(-1, 1)
        sigma = process.coefficients(t)[1].to(x.device).reshape(-1, 1)
        wide = noise.double()
        along = ((mean.unsqueeze(1) - wide) * wide).sum(-1)
        even = h * (along + sigma * div.double())
        now = Instant.of(state.log_q, even, noise, h * parts.scale)
        kappa = self.rule.weights(now)
        out = process.advance(x, t, s, parts.mixed(kappa))
        return Step(out, Trace(state.log_q + now.gains(kappa), kappa))


@method("superdiff")
@dataclass(frozen=True)
class Superdiff(Control):
    """Superposes all prompts, and the same prompts of other pipelines, in every picture.

    With one prompt and no other pipeline it is that prompt alone, sampled by the same solver.

    solver: `Superposition` or `SuperpositionODE`, with its rule.
    others: wrapped pipelines of the same schedule and latent space, told the same prompts.
    """

    solver: Superposition | SuperpositionODE = field(default_factory=Superposition)
    others: tuple[Wrapped, ...] = ()

    @property
    def steps(self) -> int | None:
        """200 for a stochastic walk: fewer make the weights of AND and the densities noisy."""
        return 200 if isinstance(self.solver, Superposition) else None

    def rows(self, what: Sequence[Any], count: int) -> list[Any]:
        """Return the first prompt, once a picture; see `Control.rows`."""
        return [what[0]] * count

    def build(
        self,
        model: Wrapped,
        what: Sequence[Any],
        count: int,
        *,
        guidance: float | None,
        negative: Any,
    ) -> tuple[Denoiser, Callable[[float], Solver]]:
        """See `Control.build`."""
        models = [model, *self.others]
        same_space(models)
        found = [branches(m, [p] * count, guidance, negative) for m in models for p in what]
        several = Several([b.told for b in found], found[0].empty, found[0].scale)
        return several, lambda end: self.solver
