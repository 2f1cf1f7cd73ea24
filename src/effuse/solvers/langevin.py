"""Langevin steps: noise and score in balance, so that a sample drifts to its law at one level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Time
from effuse.core.errors import check_whole
from effuse.ops.tensors import expand_as, number, randn_like, weighted_sum


def langevin_step(
    x: Tensor, score: Tensor, size: Tensor | float, rng: torch.Generator | None = None
) -> Tensor:
    """Return x + size score + sqrt(2 size) z for x, score: (B, *); size: () or (B,), zero or above.

    On N(0, s^2) its stationary variance is s^2 / (1 - size / (2 s^2)): it diverges from 2 s^2 on.
    """
    root = (2 * torch.as_tensor(size, dtype=torch.float64)).sqrt()
    return weighted_sum((1.0, x), (size, score), (root, randn_like(x, rng)))


class Corrector(ABC):
    """Moves a sample at its own level towards the law there. A frozen dataclass.

    steps: calls of the denoiser.
    """

    steps: int = 1

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        kept: Tensor | float = 1.0,
        *,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Return a likelier x: (B, *) at level `t`; kept: share of the signal a step keeps."""


def _check(snr: float, steps: int) -> None:
    if not (math.isfinite(snr) and snr >= 0):
        raise ValueError(f"snr={snr!r}: expected a finite ratio, zero or above")
    check_whole("steps", steps, 1)


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin steps of a length in which noise and score keep a ratio.

    x <- x + eta g + sqrt(2 eta) z,   eta = 2 kept^2 (snr |z| / |g|)^2,   g the score,

    kept = alpha_t / alpha_s of the predictor's step from t to s: 1 for VE, sqrt(1 - beta) for VP.

    snr: 0 is the identity; 0.16 is the paper's for CIFAR-10 under VE.
    steps: a level. together: whether the norms are means over the batch, as in the paper, so that a
        row depends on its neighbors; else those of each row. Steps that are longer where the score
        is weak or the noise strong settle at a wider law: for normal data of D values at ((D + 2)
        / D)^2 times the variance, nothing to speak of in pictures and wrong for few values.
    """

    snr: float = 0.16
    steps: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        """Check ratio and count."""
        _check(self.snr, self.steps)

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        kept: Tensor | float = 1.0,
        *,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """See `Corrector.__call__`."""
        if self.snr == 0:
            return x
        for _ in range(self.steps):
            score = denoiser.process.score(t, denoiser(x, t))
            z = randn_like(x, rng)
            strength, noise = (a.flatten(1).norm(dim=1) for a in (score, z))
            if self.together:
                strength, noise = (a.mean().expand(len(x)) for a in (strength, noise))
            eta = 2 * (torch.as_tensor(kept).to(x) * self.snr * noise / strength).square()
            x = x + expand_as(eta, x) * score + expand_as((2 * eta).sqrt(), x) * z
        return x


@dataclass(frozen=True)
class Annealed(Corrector):
    """Langevin steps whose length falls with the noise: eta = 2 kept^2 (snr sigma_t)^2."""

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        """Check ratio and count."""
        _check(self.snr, self.steps)

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        kept: Tensor | float = 1.0,
        *,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """See `Corrector.__call__`."""
        eta = 2 * (torch.as_tensor(kept) * self.snr * denoiser.process.coefficients(t)[1]).square()
        if number(eta) == 0:
            return x
        for _ in range(self.steps):
            x = langevin_step(x, denoiser.process.score(t, denoiser(x, t)), eta, rng)
        return x
