"""Denoisers that are exact: the closed-form answers that samplers, guidance and losses are held to.

Each knows its data law, so the prediction is the conditional mean E[x0 | x_t], and where the
probability-flow ODE has a closed solution, `transport` is that solution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effuse.core.contracts import Denoiser, Prediction, Process, Time
from effuse.ops.tensors import expand_as


def _deviation(std: Tensor | float) -> Tensor:
    std = torch.as_tensor(std, dtype=torch.float64)
    if not ((std >= 0) & std.isfinite()).all():
        raise ValueError(f"std={std.tolist()!r}: expected finite deviations, zero or above")
    return std


class Gaussian(Denoiser):
    """Normal data with independent coordinates, x0 ~ N(mean, std^2).

    x0 = mean + alpha std^2 / v d,   noise = sigma / v d,
    d = x - alpha mean - shift,   v = alpha^2 std^2 + sigma^2.

    Args:
        process: what spoils the data.
        mean: () or one row, (*), of the data.
        std: () or (*), zero allowed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, process: Process, mean: Tensor | float = 0.0, std: Tensor | float = 1.0):
        super().__init__()
        self.process = process
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float64))
        self.register_buffer("std", _deviation(std))

    def _law(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma, shift = (expand_as(c, x) for c in self.process.coefficients(t))
        mean, std = self.mean.to(x), self.std.to(x)
        return alpha, sigma, alpha * mean + shift, (alpha * std) ** 2 + sigma**2

    def forward(self, x: Tensor, t: Time, **cond: object) -> Prediction:
        """Predict exactly; see `Denoiser.forward`."""
        alpha, sigma, center, v = self._law(x, t)
        off = (x - center) / v.clamp_min(torch.finfo(x.dtype).tiny)
        mean, std = self.mean.to(x), self.std.to(x)
        return Prediction(mean + alpha * std**2 * off, sigma * off)

    def transport(self, x: Tensor, t: Time, s: Time) -> Tensor:
        """Solve the probability-flow ODE exactly for x: (B, *) from level `t` to `s`."""
        *_, center_t, v_t = self._law(x, t)
        *_, center_s, v_s = self._law(x, s)
        return center_s + (v_s / v_t).sqrt() * (x - center_t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the gradient of the log density of x: (B, *) at level `t`."""
        *_, center, v = self._law(x, t)
        return -(x - center) / v


class Mixture(Denoiser):
    """A mixture of isotropic normals, each with a class label if you like.

    Prediction = sum_k w_k(x) prediction_k(x), w = softmax over k of
    log weight_k + log N(x; alpha mean_k + shift, alpha^2 std_k^2 + sigma^2).

    Args:
        process: what spoils the data.
        means: (K, *) one row a component.
        std: () or (K,), zero for points.
        weights: (K,) positive, normalized here; equal by default.
        labels: (K,) integer class of each component, for the condition `label`.
    """

    means: Tensor
    std: Tensor
    labels: Tensor
    log_weights: Tensor

    def __init__(
        self,
        process: Process,
        means: Tensor,
        std: Tensor | float = 0.0,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
    ):
        super().__init__()
        count = len(means)
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if weights.shape != (count,) or not (weights > 0).all():
            raise ValueError(f"weights: expected {count} positive numbers, got {weights}")
        self.process = process
        weights = weights.double()
        self.register_buffer("means", means.double())
        self.register_buffer("std", _deviation(std).expand(count).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        labels = torch.arange(count) if labels is None else torch.as_tensor(labels)
        self.register_buffer("labels", labels.long())

    def _parts(self, x: Tensor, t: Time, label: Tensor | int | None) -> tuple[Tensor, ...]:
        alpha, sigma, shift = (expand_as(c, x) for c in self.process.coefficients(t))
        flat = x.flatten(1)
        alpha, sigma = (
            c.expand(len(x), *[1] * (x.ndim - 1)).reshape(-1, 1).to(x)
            if c.ndim
            else c.to(x).reshape(1, 1)
            for c in (alpha, sigma)
        )
        shift = shift.to(x).expand_as(x).flatten(1)  # which may be a picture of its own
        means, std = self.means.to(x).flatten(1), self.std.to(x)
        var = (alpha * std) ** 2 + sigma**2  # (B | 1, K)
        off = (flat - shift).unsqueeze(1) - alpha.unsqueeze(-1) * means  # (B, K, D)
        logits = self.log_weights.to(x) + self._log_laws(off, var, alpha)
        if label is not None:
            label = torch.as_tensor(label, device=x.device).reshape(-1, 1)
            hidden = (self.labels != label) & (label >= 0)  # a negative label means no label
            if hidden.all(-1).any():
                raise ValueError(f"label {label.flatten().tolist()}: no component has it")
            logits = logits.masked_fill(hidden, -torch.inf)
        return alpha, sigma, var, off, logits

    def _log_laws(self, off: Tensor, var: Tensor, alpha: Tensor) -> Tensor:
        """Return the log density of each component, (B, K), from off: (B, K, D) its center."""
        safe = var.clamp_min(torch.finfo(off.dtype).tiny ** 0.5)
        return -off.square().sum(-1) / (2 * safe) - off.shape[-1] / 2 * (2 * math.pi * safe).log()

    def _pairs(
        self, off: Tensor, var: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the prediction of each component, x0 and noise, (B, K, D) each."""
        var = var.unsqueeze(-1)
        spread = self.std.to(off).square().reshape(1, -1, 1)
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        empty = var == 0  # a point at sigma = 0: x0 is where we stand
        gain = torch.where(empty, 1 / alpha, alpha * spread / torch.where(empty, 1.0, var))
        pull = torch.where(empty, 0.0, sigma / torch.where(empty, 1.0, var))
        return self.means.to(off).flatten(1) + gain * off, pull * off

    def forward(
        self, x: Tensor, t: Time, *, label: Tensor | int | None = None, **cond: object
    ) -> Prediction:
        """Predict exactly from x: (B, *); `label`: (), (B,), -1 for a row without a class."""
        alpha, sigma, var, off, logits = self._parts(x, t, label)
        share = logits.softmax(-1).unsqueeze(-1)  # (B, K, 1)
        x0, noise = ((share * part).sum(1) for part in self._pairs(off, var, alpha, sigma))
        return Prediction(x0.reshape(x.shape), noise.reshape(x.shape))

    def log_prob(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """Return the log density of x: (B, *) at level `t` as (B,); of its class if labelled."""
        *_, logits = self._parts(x, t, label)
        out = logits.logsumexp(-1)
        if label is not None:
            label = torch.as_tensor(label, device=x.device).reshape(-1, 1)
            own = ((self.labels == label) | (label < 0)).to(x)
            out = out - (own * self.log_weights.exp().to(x)).sum(-1).log()
        return out

    def score(self, x: Tensor, t: Time, **cond: object) -> Tensor:
        """Return the gradient of `log_prob` at x: (B, *), which is -noise / sigma."""
        return -self(x, t, **cond).noise / expand_as(self.process.sigma(t), x)

    def shares(self, x: Tensor, t: Time, *, label: Tensor | int | None = None) -> Tensor:
        """Return the probability of each component given x: (B, *) at level `t`, (B, K)."""
        return self._parts(x, t, label)[-1].softmax(-1)

    def draw(self, count: int, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw (count, *) clean samples, float64."""
        pick = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=rng)
        return self.draw_of(pick, rng=rng)

    def draw_of(self, components: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw clean samples of the given components: (N,) integers, as (N, *) float64."""
        rows = self.means[components]
        noise = torch.randn(rows.shape, dtype=rows.dtype, generator=rng)
        return rows + expand_as(self.std[components], rows) * noise


class Empirical(Mixture):
    """A finite data set, points: (N, *): the denoiser that a perfect learner would become."""

    def __init__(self, process: Process, points: Tensor, labels: Tensor | None = None):
        super().__init__(process, points, 0.0, labels=labels)


class LowRankMixture(Mixture):
    """A mixture of low-rank normals: data on a union of subspaces.

    x0 ~ sum_k weight_k N(mean_k, U_k U_k' + std_k^2 I),   U_k' U_k = I.

    With c = U_k U_k' off, off = x - shift - alpha mean_k, v = alpha^2 std_k^2 + sigma^2, component
    k predicts

    x0 = mean_k + alpha (1 + std_k^2) / (alpha^2 + v) c + alpha std_k^2 / v (off - c),
    noise = sigma / (alpha^2 + v) c + sigma / v (off - c),

    and log w_k = log weight_k - ||c||^2 / (2 (alpha^2 + v)) - ||off - c||^2 / (2 v)
    - d_k / 2 log(alpha^2 + v) - (n - d_k) / 2 log v + const. Bases of rank zero make it `Mixture`.

    Args:
        process: what spoils the data.
        bases: (K, *, d) orthonormal over d; or K of them, (*, d_k) each, of unequal ranks.
        std: () or (K,) deviation of a floor of isotropic noise, zero for none.
        weights: (K,) positive, normalized here; equal by default.
        means: (K, *), zero by default.
        labels: (K,) integer class of each component, for the condition `label`.

    Raises:
        ValueError: a basis is not orthonormal, or of a higher rank than dimension.
    """

    bases: Tensor
    ranks: Tensor

    def __init__(
        self,
        process: Process,
        bases: Tensor | Sequence[Tensor],
        std: Tensor | float = 0.0,
        weights: Tensor | None = None,
        means: Tensor | None = None,
        labels: Tensor | None = None,
    ):
        widest = max(b.shape[-1] for b in bases)
        padded = [nn.functional.pad(b.double(), (0, widest - b.shape[-1])) for b in bases]
        stacked = torch.stack(padded)
        means = torch.zeros(stacked.shape[:-1]) if means is None else means
        if means.shape != stacked.shape[:-1]:
            raise ValueError(
                f"means of shape {tuple(means.shape)} beside bases of {tuple(stacked.shape)}: "
                f"expected {tuple(stacked.shape[:-1])}"
            )
        super().__init__(process, means, std, weights, labels)
        flat = stacked.flatten(1, -2)  # (K, D, d)
        self.register_buffer("bases", flat)
        self.register_buffer("ranks", ranks_of(flat))

    def _split(self, off: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of off: (B, K, D) inside and outside the subspaces."""
        bases = self.bases.to(off)
        inside = torch.einsum("bkr,kdr->bkd", torch.einsum("bkd,kdr->bkr", off, bases), bases)
        return inside, off - inside

    def _log_laws(self, off: Tensor, var: Tensor, alpha: Tensor) -> Tensor:
        inside, outside = self._split(off)
        wide = alpha**2 + var
        more = (wide / var.clamp_min(torch.finfo(off.dtype).tiny ** 0.5)).log()
        within = inside.square().sum(-1) / wide + self.ranks.to(off) * more
        return super()._log_laws(outside, var, alpha) - within / 2

    def _pairs(
        self, off: Tensor, var: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        inside, outside = self._split(off)
        x0, noise = super()._pairs(outside, var, alpha, sigma)
        each = inside / (alpha**2 + var).unsqueeze(-1)
        spread = 1 + self.std.to(off).square().reshape(1, -1, 1)
        return x0 + alpha.unsqueeze(-1) * spread * each, noise + sigma.unsqueeze(-1) * each

    def draw_of(self, components: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw clean samples of the given components: (N,) integers, as (N, *) float64."""
        rows = super().draw_of(components, rng=rng)
        bases = self.bases[components]  # (N, D, d)
        weights = torch.randn(len(bases), bases.shape[-1], 1, dtype=bases.dtype, generator=rng)
        return rows + (bases @ weights).reshape(rows.shape)


def ranks_of(bases: Tensor) -> Tensor:
    """Return the ranks (..., K) of bases: (..., K, n, d), orthonormal but for columns of zeros.

    Raises:
        ValueError: they are not.
    """
    n, d = bases.shape[-2:]
    if d > n:
        raise ValueError(f"bases of rank {d} in {n} dimensions: expected at most {n}")
    if not bases.is_floating_point():
        raise ValueError(f"bases are {bases.dtype}: expected floating point")
    present = bases.detach().abs().amax(-2) > 0  # (..., K, d)
    gram = bases.detach().mT @ bases.detach()
    worst = float((gram - torch.diag_embed(present.to(gram))).abs().amax()) if d else 0.0
    if worst > 100 * torch.finfo(torch.float32).eps:
        raise ValueError(f"||U'U - I|| is {worst:.2g}: expected orthonormal columns, take their QR")
    return present.sum(-1)
