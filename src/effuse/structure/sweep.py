"""How many samples until the subspaces are found: sweeps over the number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from effuse.core.contracts import Process
from effuse.core.errors import check_positive, check_whole
from effuse.core.training import fit
from effuse.ops.tensors import randn_like
from effuse.processes import Linear

from .clustering import (
    Start,
    principal,
    random_bases,
    random_start,
    recovery_error,
    spectral_start,
    subspace_cluster,
)
from .subspace import SOFT, Hard, LowRankAutoencoder, Soft, Subspaces, Weight, flat


class Learner(Protocol):
    """Finds subspaces."""

    def __call__(self, x: Tensor, ranks: Sequence[int], rng: torch.Generator) -> Tensor:
        """Return bases (M, K, n, d) of M data sets, x: (M, N, n); rows of zeros are padding."""


@dataclass(frozen=True)
class PCA:
    """The leading singular vectors; one subspace only."""

    def __call__(self, x: Tensor, ranks: Sequence[int], rng: torch.Generator) -> Tensor:
        """See `Learner`."""
        if len(ranks) != 1:
            raise ValueError(f"PCA of {len(ranks)} subspaces: expected one, take KSubspaces")
        return principal(x, ranks[0], rng=rng).unsqueeze(1)


@dataclass(frozen=True)
class KSubspaces:
    """`subspace_cluster`."""

    restarts: int = 20
    steps: int = 100
    start: Start = spectral_start

    def __call__(self, x: Tensor, ranks: Sequence[int], rng: torch.Generator) -> Tensor:
        """See `Learner`."""
        return subspace_cluster(
            x, ranks, restarts=self.restarts, steps=self.steps, start=self.start, rng=rng
        ).bases


@dataclass(frozen=True)
class Trained:
    """A low-rank autoencoder, by Adam on the denoising loss; all data sets are trained at once.

    rate: first learning rate, falling to zero as a cosine. draws: of the noise, a sample and step.
    restarts: how often each data set is begun, from `start`, as of `subspace_cluster`; the lowest
    loss, averaged over `judged` draws of the noise, is kept. levels, weight: see `Subspaces`.
    share, process: see `LowRankAutoencoder`.
    """

    steps: int = 500
    rate: float = 0.1
    draws: int = 8
    restarts: int = 1
    judged: int = 32
    start: Start = random_start
    levels: tuple[float, float] = (0.001, 1.0)
    weight: Weight = flat
    share: Soft | Hard = SOFT
    process: Process = field(default_factory=Linear)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_whole("steps", self.steps, 1)
        check_whole("draws", self.draws, 1)
        check_whole("restarts", self.restarts, 1)
        check_whole("judged", self.judged, 1)
        check_positive("rate", self.rate)

    def __call__(self, x: Tensor, ranks: Sequence[int], rng: torch.Generator) -> Tensor:
        """See `Learner`."""
        start = self.start(x, ranks, self.restarts, rng).flatten(0, 1)
        model = LowRankAutoencoder(self.process, start, share=self.share)
        objective = Subspaces(model, self.levels, self.weight)
        many = x.repeat(self.restarts, 1, 1)
        keep = many.abs().amax(-1) > 0
        batch = {"x0": many.repeat(1, self.draws, 1), "keep": keep.repeat(1, self.draws)}
        fit(
            objective,
            lambda rng: batch,
            torch.optim.Adam(model.parameters(), self.rate, betas=(0.9, 0.99)),
            steps=self.steps,
            rng=rng,
            schedule=_cosine,
            clip=None,  # a common norm would tie the models
            log_every=self.steps,
            progress=False,
        )
        with torch.no_grad():
            bases = model.bases.unflatten(0, (self.restarts, len(x)))
            if self.restarts == 1:
                return bases[0]
            low, high = self.levels
            total = many.new_zeros(len(many))
            for _ in range(self.judged):  # of all restarts at once, with the same noise
                u = torch.rand(x.shape[:-1], generator=rng, dtype=torch.float64)
                t = (low + (high - low) * u).repeat(self.restarts, 1)
                noise = randn_like(x, rng).repeat(self.restarts, 1, 1)
                total += (objective.error(many, t, noise) * keep).sum(-1)
            best = total.unflatten(0, (self.restarts, len(x))).argmin(0)
        return bases[best, torch.arange(len(x))]


def _cosine(progress: float) -> float:
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * progress)))


@dataclass(frozen=True)
class Cells:
    """Data sets of a sweep: for every count of samples a class, as many sets as trials.

    x: (C * T, K * max count, n), rows beyond the count are zeros; true: (C * T, K, n, d).
    """

    x: Tensor
    true: Tensor
    ranks: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def draw(
        cls,
        dim: int,
        ranks: Sequence[int],
        counts: Sequence[int],
        trials: int,
        *,
        noise: float = 0.0,
        rng: torch.Generator | None = None,
    ) -> Cells:
        """Draw x_i = U_k a_i + noise e_i: `counts` of each class, subspaces orthogonal; float64."""
        true = random_bases(dim, ranks, stack=(len(counts) * trials,), rng=rng)
        many = max(counts)
        a = torch.randn(*true.shape[:2], many, true.shape[-1], generator=rng, dtype=true.dtype)
        x = a @ true.mT  # (C * T, K, max count, n)
        x = x + noise * randn_like(x, rng) if noise else x
        there = torch.arange(many) < torch.tensor(list(counts)).repeat_interleave(trials)[:, None]
        x = x * there[:, None, :, None]
        return cls(x.flatten(1, 2), true, tuple(ranks), tuple(counts))

    def errors(self, learner: Learner, rng: torch.Generator) -> Tensor:
        """Return the `recovery_error` of what `learner` finds, (C, T).

        The learner draws from a stream that `rng` begins: the seed of the data itself would give
        the answer away.
        """
        begin = int(torch.randint(2**62, (), generator=rng))
        found = learner(self.x, self.ranks, torch.Generator().manual_seed(begin))
        return recovery_error(found, self.true).reshape(len(self.counts), -1)


def transition(counts: Sequence[int], errors: Tensor, below: float = 0.5) -> int | None:
    """Return the least of the rising `counts` from which on most trials succeed, None if none.

    Args:
        counts: (C,) samples a class.
        errors: (C, T) recovery errors.
        below: which errors are a success.
    """
    most = (errors < below).double().mean(1) > 0.5
    late = most.flip(0).long().cumprod(0).flip(0).bool()
    return int(torch.as_tensor(counts)[late].min()) if late.any() else None
