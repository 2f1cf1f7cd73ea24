"""CODE: encode along the probability-flow ODE, raise the likelihood by Langevin steps, decode."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from effuse.core import Denoiser, Process
from effuse.core.clip import Clip, Clipped
from effuse.core.errors import check_fraction, check_positive, check_whole
from effuse.core.method import method
from effuse.ops.tensors import randn_like, require_finite

from .editor import Band, Clamp, Editor, Latents, Walked, climb

GUARD = 4.0
"""How many times its norm a row may grow within one correction before it counts as diverged."""


class StepScale(ABC):
    """Which levels take larger Langevin steps: gamma_k of each level of a whole walk."""

    @abstractmethod
    def __call__(self, process: Process, times: Tensor) -> Tensor:
        """Return gamma: (N,) float64 at the rising levels `times`: (N,)."""


@dataclass(frozen=True)
class LogSpaced(StepScale):
    """From `top` at the cleanest level to 1 at the noisiest, evenly in the logarithm of gamma."""

    top: float = 100.0

    def __post_init__(self) -> None:
        """Check `top`."""
        check_positive("top", self.top)

    def __call__(self, process: Process, times: Tensor) -> Tensor:
        """Return gamma; see `StepScale`."""
        falling = torch.linspace(1, 0, len(times), dtype=torch.float64)
        return torch.exp(math.log(self.top) * falling)


@dataclass(frozen=True)
class BySigma(StepScale):
    """Inverse to the noise: gamma_k = sigma_{N-1} / sigma_k."""

    def __call__(self, process: Process, times: Tensor) -> Tensor:
        """Return gamma; see `StepScale`."""
        sigma = process.sigma(times)
        return sigma[-1] / sigma


@dataclass(frozen=True)
class Langevin:
    """Raises the likelihood of a latent: annealed stages of noisy steps, each with a quiet end.

    Stage j of A: eps_j = size gamma_k factor^j;   x <- x + eps_j score + sqrt(2 eps_j) z, steps / A
    times;   x <- x + eps_j score.

    On data of variance s^2 this is AR(1): it contracts by 1 - eps / s^2 to the variance
    s^2 / (1 - eps / (2 s^2)), and diverges from eps = 2 s^2 on, which sigma_k^2 bounds from below.

    size: eps at the noisiest level; 0 corrects nothing. Deep levels and 1e-6 .. 1e-4 suit color,
        contrast, fog and masks; shallow ones and 1e-4 .. 1e-2 blur and speckle.
    steps: noisy steps a level, shared among the stages, the first ones take the remainder.
    stages: A. factor: of the size from stage to stage, (0, 1]. scale: gamma.
    """

    size: float = 1.15e-5
    steps: int = 250
    stages: int = 4
    factor: float = 0.8
    scale: StepScale = field(default_factory=LogSpaced)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.size < math.inf:
            raise ValueError(f"size={self.size!r}: expected a finite step, zero or above")
        check_whole("stages", self.stages, 1)
        check_whole("steps", self.steps, self.stages)
        check_fraction("factor", self.factor)

    @property
    def calls(self) -> int:
        """Calls of the denoiser, a level."""
        return self.steps + self.stages

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        gamma: float = 1.0,
        *,
        rng: torch.Generator | None = None,
        band: Clamp | None = None,
    ) -> Tensor:
        """Return a likelier x: (B, *) at level `t`, clamped to `band` after every step.

        Raises:
            FloatingPointError: the norm of a row grew beyond all measure, as too large a step does.
        """
        process = denoiser.process
        start = _norm(x)
        for stage in range(self.stages):
            eps = self.size * gamma * self.factor**stage
            noisy = self.steps // self.stages + (stage < self.steps % self.stages)
            for index in range(noisy + 1):
                score = process.score(t, denoiser(x, t))
                x = x + eps * score
                if index < noisy:
                    x = x + math.sqrt(2 * eps) * randn_like(x, rng)
                x = x if band is None else band(x, t, process)
            self._guard(x, start, t, eps, float(process.sigma(t)))
        return x

    def _guard(self, x: Tensor, start: Tensor, t: Tensor, eps: float, sigma: float) -> None:
        worst = float((_norm(x) / start.clamp_min(max(sigma, 1.0))).max())
        if not worst <= GUARD:
            raise FloatingPointError(
                f"Langevin steps of {eps:.3g} at level {float(t):.3g} took a sample to {worst:.3g} "
                f"times its norm: below 2 sigma^2 = {2 * sigma**2:.3g} they cannot diverge, lower "
                "size or scale, or correct deeper levels only"
            )


def _norm(x: Tensor) -> Tensor:
    """Return the root mean square of each row of x: (B, *) as (B,)."""
    return x.flatten(1).square().mean(1).sqrt()


def _example() -> CODE:
    return CODE(levels=12, depth=0.5, langevin=Langevin(1e-4, 8), band=Band())


@method(
    "confident_ode",
    seed=57,
    paper="CODE: Confident Ordinary Differential Editing",
    year=2024,
    buys="edits of damaged pictures without training; a band that takes outliers out",
    example=_example,
)
@dataclass(frozen=True)
class CODE(Editor):
    """Encode by the ODE, make latents likelier at chosen levels, decode by the same ODE.

    Up:    x_0 = y + noise z;   [clamp x_k to the band];   x_{k+1} = advance(x_k, t_k, t_{k+1}).
    Down:  from the deepest latent;   [Langevin at k if k is corrected];   x_{k-1} = advance(x_k).

    Without corrections and bands this is a round trip that comes back as `levels` grows.

    levels: N, levels of a whole walk to t = 1. depth: the deepest level encoded, t in (0, 1].
    langevin: the correction. corrections: K, how many levels are corrected, evenly spaced from
        `shallow` to `deep`; one is `deep` itself, 0 is the round trip.
    shallow, deep: t of the shallowest and deepest corrected level; `deep` left out is `depth`. With
        deep < depth the walk down begins uncorrected in the deepest latent (start_from_latent).
    band: clamps while encoding (CBC); None leaves the latents. band_decoding, band_langevin: clamp
        while decoding, after each step of the correction.
    threshold: keeps the predicted x0 in range in ODE and correction; `Clip(1.3, 0.98)` is the
        paper's dynamic thresholding, None leaves it.
    noise: deviation of the noise added to the input.
    """

    clipped = False  # an inversion through clipped predictions does not come back

    levels: int = 200
    depth: float = 1.0
    langevin: Langevin = field(default_factory=Langevin)
    corrections: int = 2
    shallow: float = 0.1
    deep: float | None = None
    band: Clamp | None = None
    band_decoding: Clamp | None = None
    band_langevin: Clamp | None = None
    threshold: Clip | None = None
    noise: float = 0.01

    def __post_init__(self) -> None:
        """Check levels and counts."""
        check_whole("levels", self.levels, 2)
        check_whole("corrections", self.corrections, 0)
        check_fraction("depth", self.depth)
        check_fraction("shallow", self.shallow, zero=True)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise!r}: expected a finite deviation, zero or above")
        if self.deep is not None and not 0 < self.deep <= self.depth:
            raise ValueError(f"deep={self.deep!r}: expected a level in (0, depth={self.depth!r}]")

    @property
    def bands(self) -> tuple[Clamp, ...]:
        """Those that are set."""
        all_ = (self.band, self.band_decoding, self.band_langevin)
        return tuple(b for b in all_ if b is not None)

    def times(self, process: Process) -> Tensor:
        """Return the L levels that are encoded, rising."""
        return climb(process, self.levels, self.depth)

    def corrected(self, process: Process) -> dict[int, float]:
        """Return the corrected levels, as their index, with their gamma.

        Raises:
            ValueError: there is no level from `shallow` to `deep`.
        """
        if not self.corrections:
            return {}
        every = climb(process, self.levels, 1.0)
        deep = self.depth if self.deep is None else self.deep
        high = int((every <= deep + 1e-9).sum()) - 1
        low = min(int((every < self.shallow - 1e-9).sum()), high)
        if self.corrections > 1 and self.shallow > deep:
            raise ValueError(
                f"shallow={self.shallow!r} is deeper than {deep!r}: lower it, or correct one level"
            )
        spread = torch.linspace(high, low, self.corrections, dtype=torch.float64).round()
        gamma = self.langevin.scale(process, every)
        return {k: float(gamma[k]) for k in spread.long().tolist()}

    def calls(self, process: Process) -> int:
        """Return how often the denoiser is called, a picture: up, corrections, down."""
        walk = len(self.times(process)) - 1
        return 2 * walk + self.langevin.calls * len(self.corrected(process))

    @torch.no_grad()
    def encode(
        self, denoiser: Denoiser, x: Tensor, *, rng: torch.Generator | None = None
    ) -> Latents:
        """Return the latents of x: (B, *) at every level."""
        denoiser, process = self._thresholded(denoiser), denoiser.process
        times = self.times(process).to(x.device)
        x = x + self.noise * randn_like(x, rng) if self.noise else x
        out = [self._clamped(self.band, x, times[0], process)]
        for t, s in pairwise(times):
            x = process.advance(out[-1], t, s, denoiser(out[-1], t))
            require_finite(x, f"encoding, t {t:.4g} to {s:.4g}")
            out.append(self._clamped(self.band, x, s, process))
        return Latents(times, torch.stack(out))

    @torch.no_grad()
    def decode(
        self, denoiser: Denoiser, latents: Latents, *, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return the sample (B, *), corrected on the way down from the deepest latent."""
        denoiser, process = self._thresholded(denoiser), denoiser.process
        times, x, corrected = latents.times, latents.x[-1], self.corrected(denoiser.process)
        if len(times) != len(self.times(process)):
            raise ValueError(
                f"latents of {len(times)} levels: expected {len(self.times(process))}, encoded "
                "with the same levels and depth"
            )
        for k in range(len(times) - 1, -1, -1):
            t = times[k]
            x = self._clamped(self.band_decoding, x, t, process)
            if k in corrected:
                x = self.langevin(denoiser, x, t, corrected[k], rng=rng, band=self.band_langevin)
            if k:
                x = process.advance(x, t, times[k - 1], denoiser(x, t))
                require_finite(x, f"decoding, t {t:.4g} to {times[k - 1]:.4g}")
        return x

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        rng: torch.Generator | None = None,
        encoder: Denoiser | None = None,
    ) -> Walked:
        """Encode and decode; see `Editor.__call__`."""
        latents = self.encode(denoiser if encoder is None else encoder, x, rng=rng)
        return Walked(self.decode(denoiser, latents, rng=rng), latents)

    def _thresholded(self, denoiser: Denoiser) -> Denoiser:
        return denoiser if self.threshold is None else Clipped(denoiser, self.threshold)

    @staticmethod
    def _clamped(band: Clamp | None, x: Tensor, t: Tensor, process: Process) -> Tensor:
        return x if band is None else band(x, t, process)
