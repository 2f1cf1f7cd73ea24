"""Denoisers that are exact: the closed-form answers that samplers, guidance and losses are held to.

Each knows its data law, so the prediction is the conditional mean E[x0 | x_t], and where the
probability-flow ODE has a closed solution, `transport` is that solution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
        safe = var.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
        logits = self.log_weights.to(x) - off.square().sum(-1) / (2 * safe)
        logits = logits - flat.shape[1] / 2 * (2 * math.pi * safe).log()
        if label is not None:
            label = torch.as_tensor(label, device=x.device).reshape(-1, 1)
            hidden = (self.labels != label) & (label >= 0)  # a negative label means no label
            if hidden.all(-1).any():
                raise ValueError(f"label {label.flatten().tolist()}: no component has it")
            logits = logits.masked_fill(hidden, -torch.inf)
        return alpha, sigma, var, off, logits

    def forward(
        self, x: Tensor, t: Time, *, label: Tensor | int | None = None, **cond: object
    ) -> Prediction:
        """Predict exactly from x: (B, *); `label`: (), (B,), -1 for a row without a class."""
        alpha, sigma, var, off, logits = self._parts(x, t, label)
        share = logits.softmax(-1).unsqueeze(-1)  # (B, K, 1)
        var = var.unsqueeze(-1)
        spread = self.std.to(x).square().reshape(1, -1, 1)
        alpha, sigma = alpha.unsqueeze(-1), sigma.unsqueeze(-1)
        empty = var == 0  # a point at sigma = 0: x0 is where we stand
        gain = torch.where(empty, 1 / alpha, alpha * spread / torch.where(empty, 1.0, var))
        pull = torch.where(empty, 0.0, sigma / torch.where(empty, 1.0, var))
        means = self.means.to(x).flatten(1)
        x0 = (share * (means + gain * off)).sum(1)
        noise = (share * (pull * off)).sum(1)
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

    def draw(self, count: int, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw (count, *) clean samples, float64."""
        pick = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=rng)
        rows = self.means[pick]
        noise = torch.randn(rows.shape, dtype=rows.dtype, generator=rng)
        return rows + expand_as(self.std[pick], rows) * noise


class Empirical(Mixture):
    """A finite data set, points: (N, *): the denoiser that a perfect learner would become."""

    def __init__(self, process: Process, points: Tensor, labels: Tensor | None = None):
        super().__init__(process, points, 0.0, labels=labels)
