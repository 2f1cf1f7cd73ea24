"""A denoiser whose training is subspace clustering: the low-rank mixture with learned bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Denoiser, Loss, Objective, Prediction, Process, Time
from effuse.core.exact import LowRankMixture, ranks_of
from effuse.core.method import method
from effuse.ops.tensors import randn_like
from effuse.processes import Linear

from .clustering import random_bases

Weight = Callable[[Tensor, Tensor], Tensor]
"""lambda of alpha and sigma, both of one shape."""


@dataclass(frozen=True)
class Soft:
    """Each subspace counts by its probability given the spoiled sample: the exact posterior."""

    def __call__(self, logits: Tensor, clean: Tensor | None = None) -> Tensor:
        """Return weights (..., K) of logits: (..., K)."""
        return logits.softmax(-1)


@dataclass(frozen=True)
class Hard:
    """The likeliest subspace alone counts.

    In training, where the clean sample is known, that is the one of the largest ||U_k' x0||: then
    the expected loss is that of K-subspaces.
    """

    def __call__(self, logits: Tensor, clean: Tensor | None = None) -> Tensor:
        """Return one-hot weights (..., K) of logits: (..., K), or of clean: ||U_k' x0||^2."""
        rank = logits if clean is None else clean
        return nn.functional.one_hot(rank.argmax(-1), rank.shape[-1]).to(logits)


SOFT = Soft()


def _example() -> LowRankAutoencoder:
    rng = torch.Generator().manual_seed(0)
    return LowRankAutoencoder(Linear(), random_bases(6, (2, 2), rng=rng).float())


@method(
    "subspace",
    seed=67,
    paper="Diffusion Models Learn Low-Dimensional Distributions via Subspace Clustering",
    year=2024,
    buys="how many samples a class needs, the rank a denoiser works in, directions to edit along",
    example=_example,
)
class LowRankAutoencoder(Denoiser):
    """Predicts as the posterior mean of a mixture of low-rank normals, with bases to be learned.

    x0 = alpha / (alpha^2 + sigma^2) sum_k w_k U_k U_k' x,
    w = softmax_k of log pi_k + phi ||U_k' x||^2 + d_k / 2 log(sigma^2 / (alpha^2 + sigma^2)),
    phi = alpha^2 / (2 sigma^2 (alpha^2 + sigma^2)).

    The bases are the Q of a QR decomposition of the parameter `raw` at every call: orthonormal
    whatever an optimizer does. `exact()` is the same as a fixture with density and draws.

    Args:
        process: what spoils the data; without a shift.
        start: (K, n, d) bases to begin with, see `random_bases`; (M, K, n, d) trains M models side
            by side, through `Subspaces`. Columns of zeros make a lower rank.
        weights: (K,) pi, equal by default; not learned.
        share: `Soft()` or `Hard()`.
    """

    ranks: Tensor
    log_weights: Tensor

    def __init__(
        self,
        process: Process,
        start: Tensor,
        weights: Sequence[float] | None = None,
        share: Soft | Hard = SOFT,
    ):
        super().__init__()
        if start.ndim not in (3, 4):
            raise ValueError(f"start of shape {tuple(start.shape)}: expected (K, n, d)")
        ranks = ranks_of(start)
        count, d = start.shape[-3], start.shape[-1]
        pi = torch.ones(count) if weights is None else torch.as_tensor(list(weights))
        if pi.shape != (count,) or not (pi > 0).all():
            raise ValueError(f"weights={weights}: expected {count} positive numbers")
        self.process, self.share = process, share
        pi = pi.double() / pi.double().sum()
        self.register_buffer("log_weights", pi.log())
        self.register_buffer("ranks", ranks)
        kept = torch.arange(d, device=start.device) < ranks.unsqueeze(-1)
        self.register_buffer("kept", kept.unsqueeze(-2), persistent=False)
        # columns that do not count come last, so they leave the Q of the others alone
        order = (start.abs().amax(-2, keepdim=True) == 0).long().argsort(stable=True, dim=-1)
        start = start.gather(-1, order.expand_as(start))
        rng = torch.Generator().manual_seed(0)
        self.raw = nn.Parameter(torch.where(kept.unsqueeze(-2), start, randn_like(start, rng)))

    @property
    def bases(self) -> Tensor:
        """Orthonormal bases, shaped as `start`."""
        return torch.linalg.qr(self.raw).Q * self.kept

    def exact(self) -> LowRankMixture:
        """Return the mixture it stands for, with density and draws; `Soft()` predicts as that."""
        return LowRankMixture(self.process, self.bases.detach(), weights=self.log_weights.exp())

    def mean(self, x: Tensor, alpha: Tensor, sigma: Tensor, clean: Tensor | None = None) -> Tensor:
        """Return x0 of x: (*M, B, n); alpha, sigma: () or (*M, B); `clean`: the true x0, if known.

        Each of M models sees its own x.
        """
        bases = self.bases.to(x)
        alpha, sigma = (c.to(x).unsqueeze(-1) for c in (alpha, sigma))
        inner = x.unsqueeze(-3) @ bases  # (*M, K, B, d)
        energy = inner.square().sum(-1).mT  # (*M, B, K)
        wide = alpha**2 + sigma**2
        logits = self.log_weights.to(x) + alpha**2 / (2 * sigma**2 * wide) * energy
        logits = logits + self.ranks.to(x).unsqueeze(-2) / 2 * (sigma**2 / wide).log()
        known = None if clean is None else (clean.unsqueeze(-3) @ bases).square().sum(-1).mT
        w = self.share(logits, known).mT.unsqueeze(-1)  # (*M, K, B, 1)
        return alpha / wide * ((w * inner) @ bases.mT).sum(-3)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict from x: (B, *) of n values a row, sigma above 0; see `Denoiser.forward`."""
        if self.raw.ndim == 4:
            raise ValueError(f"{len(self.raw)} models side by side: expected one, take its bases")
        alpha, sigma = (c.reshape(-1) for c in self.process.coefficients(t)[:2])
        x0 = self.mean(x.flatten(1), alpha, sigma).reshape(x.shape)
        return self.process.complete(x, t, x0=x0)


def flat(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weigh all levels alike: lambda = 1."""
    return torch.ones_like(alpha)


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weigh by the signal-to-noise ratio, alpha^2 / sigma^2, as the loss of the noise does."""
    return alpha**2 / sigma**2


class Subspaces(Objective):
    """Denoising score matching of a low-rank autoencoder, which learns subspaces.

    mean over t, noise of lambda(t) ||x0_hat(x_t) - x0||^2. With one subspace every minimum is PCA,
    for any lambda; with `Hard()` shares its expectation over the noise is const - c times what
    K-subspaces captures.

    Batches: "x0": (B, *), or (M, B, n) of M models side by side; "keep": as x0 but for the last
    dimension, 0 for rows that are padding.

    Args:
        student: what is trained.
        levels: range of t, drawn uniformly; one fixed level is (t, t). Small ones suit `Hard()`.
        weight: lambda, of alpha and sigma: `flat`, `snr` or your own.
    """

    def __init__(
        self,
        student: LowRankAutoencoder,
        levels: tuple[float, float] = (0.001, 1.0),
        weight: Weight = flat,
    ):
        super().__init__()
        if not 0 < levels[0] <= levels[1] <= 1:
            raise ValueError(f"levels={levels}: expected 0 < low <= high <= 1")
        self.student, self.levels, self.weight = student, levels, weight

    def error(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return lambda ||x0_hat - x0||^2 of every row, (*M, B); t: () or (*M, B)."""
        process = self.student.process
        alpha, sigma = (c.to(x0) for c in (process.alpha(t), process.sigma(t)))
        x = alpha.unsqueeze(-1) * x0 + sigma.unsqueeze(-1) * noise
        off = self.student.mean(x, alpha, sigma, x0) - x0
        return self.weight(alpha, sigma) * off.square().sum(-1)

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the loss, summed over models side by side; see `Objective.loss`."""
        x0 = batch["x0"]
        x0 = x0 if self.student.raw.ndim == 4 else x0.flatten(1)
        device = x0.device if rng is None else rng.device
        u = torch.rand(x0.shape[:-1], generator=rng, dtype=torch.float64, device=device)
        low, high = self.levels
        error = self.error(x0, (low + (high - low) * u).to(x0.device), randn_like(x0, rng))
        keep = batch["keep"].to(error) if "keep" in batch else torch.ones_like(error)
        return Loss(((error * keep).sum(-1) / keep.sum(-1).clamp_min(1)).sum())
