"""Log densities of several models along one walk, and how the weights of their scores are chosen.

Lengths are counted in sigma_t, so nothing divides by a level's scale. With n_i the noise that model
i predicts, score_i = -n_i / sigma_t, a step is u = -gain m + std z, m the mixed noise, and Ito's
lemma gives what log q_i gains: -<u, n_i> - gain / 2 |n_i|^2. No divergence is needed; it is the
same formula for any u, whoever chose it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effuse.core.errors import check_positive


def ito(u: Tensor, noise: Tensor, gain: Tensor) -> Tensor:
    """Return what each log density gains along a step: (B, M), float64.

    d log q_i = -<u, n_i> - gain / 2 |n_i|^2, that is <dx + f r, s_i> - g^2 r / 2 |s_i|^2 with
    u = (dx + f r) / sigma_t, gain = g^2 r / sigma_t^2. The term div f r, the same for all models,
    is left out: the densities are those of x / alpha.

    Args:
        u: (B, D) the step without its drift, over sigma_t; any step.
        noise: (B, M, D) the noise each model predicts.
        gain: () or (B,).
    """
    u, noise = u.double(), noise.double()
    gain = gain.double().reshape(-1, 1)
    return -(noise @ u.unsqueeze(-1)).squeeze(-1) - gain / 2 * noise.square().sum(-1)


class Instant(NamedTuple):
    """What a rule may know at one step; float64. Gains are of the coming step, its noise included.

    log_q: (B, M) so far. even: (B, M) what each gains with equal weights. cross: (B, M, M) inner
    products <n_i, n_j - mean n>. gram: (B, M, M) the same, centered on both sides. slope: (B, 1),
    so that the gains are even + slope cross (kappa - 1 / M). floor: (B, 1) the square of the
    rounding of n: differences below it are none.
    """

    log_q: Tensor
    even: Tensor
    cross: Tensor
    gram: Tensor
    slope: Tensor
    floor: Tensor

    @classmethod
    def of(cls, log_q: Tensor, even: Tensor, noise: Tensor, slope: Tensor) -> Instant:
        """Return it from noise: (B, M, D), in the type that the models gave."""
        eps = torch.finfo(noise.dtype).eps
        noise = noise.double()
        off = centered(noise, 1)
        floor = (4 * eps) ** 2 * noise.square().sum(-1).mean(-1, keepdim=True)
        gram, cross = off @ off.mT, noise @ off.mT
        return cls(log_q, even, cross, gram, slope.double().reshape(-1, 1), floor)

    def gains(self, kappa: Tensor) -> Tensor:
        """Return what each log density gains with weights kappa: (B, M) that sum to one."""
        off = (kappa - 1 / kappa.shape[1]).unsqueeze(-1)
        return self.even + self.slope * (self.cross @ off).squeeze(-1)


def centered(v: Tensor, dim: int) -> Tensor:
    """Return v minus its mean over `dim`; exactly zero where all are equal."""
    v = v - v.narrow(dim, v.shape[dim] - 1, 1)
    return v - v.mean(dim, keepdim=True)


class Rule(ABC):
    """Chooses the weights kappa of the models' scores. A frozen dataclass."""

    @abstractmethod
    def weights(self, now: Instant) -> Tensor:
        """Return kappa: (B, M), each row of sum one."""


@dataclass(frozen=True)
class Fixed(Rule):
    """The same weights all along: equal by default, which is the average of the scores.

    kappa: one number a model, of sum one; (1, 0) is the first model alone.
    """

    kappa: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the sum."""
        if self.kappa is not None and not math.isclose(sum(self.kappa), 1, abs_tol=1e-9):
            raise ValueError(f"kappa={self.kappa!r}: expected weights that sum to one")

    def weights(self, now: Instant) -> Tensor:
        """See `Rule.weights`."""
        count = now.log_q.shape[1]
        own = (1 / count,) * count if self.kappa is None else _one_each("kappa", self.kappa, count)
        return now.log_q.new_tensor(own).expand_as(now.log_q)


@dataclass(frozen=True)
class OR(Rule):
    """Samples the mixture of the models: each where it is the likelier one.

    kappa = softmax(temperature log q + bias).

    temperature: 0 or above: 0 averages, 1 is the mixture, infinity takes the likeliest.
    bias: one number a model, log of its share; -infinity leaves it out. Equal if not given.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check both."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature!r}: expected zero or above")
        if self.bias is not None and not any(math.isfinite(b) for b in self.bias):
            raise ValueError(f"bias={self.bias!r}: expected at least one finite number")

    def weights(self, now: Instant) -> Tensor:
        """See `Rule.weights`."""
        log_q, count = now.log_q, now.log_q.shape[1]
        bias = log_q.new_zeros(count)
        if self.bias is not None:
            bias = log_q.new_tensor(_one_each("bias", self.bias, count))
        if math.isinf(self.temperature):
            open_ = torch.where(bias.isneginf(), -torch.inf, log_q)
            best = open_ == open_.amax(1, keepdim=True)
            return bias.masked_fill(~best, -torch.inf).softmax(1)
        return (self.temperature * log_q + bias).softmax(1)


@dataclass(frozen=True)
class AND(Rule):
    """Stays where all densities are equal: every log q gains the same in each step, noise included.

    Solves slope gram (kappa - 1/M) = centered(lift - gains at equal weights), of least norm; where
    models agree to rounding, 1 / M. For two models, d = s_1 - s_2, no guidance:

    kappa_1 = 1/2 - <eps, d> / (g sqrt(r) |d|^2) + (l_1 - l_2) / (g^2 r |d|^2)

    so the step is the average score and noise without its part along d. The identity is that of the
    discrete step, of any size; but the weights grow as 1 / sqrt(r): take 200 steps or more.

    lift: one number a model, what log q_i gains above the others' in each step; none if not given.
    limit: keeps |kappa - 1/M| below it by shrinking (not in the paper); then log q may part.
    """

    lift: tuple[float, ...] | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check both."""
        if self.lift is not None and not all(math.isfinite(b) for b in self.lift):
            raise ValueError(f"lift={self.lift!r}: expected finite numbers")
        if self.limit is not None:
            check_positive("limit", self.limit)

    def weights(self, now: Instant) -> Tensor:
        """See `Rule.weights`."""
        count = now.log_q.shape[1]
        aim = -now.even
        if self.lift is not None:
            aim = aim + now.even.new_tensor(_one_each("lift", self.lift, count))
        aim = centered(aim, 1)
        size, axes = torch.linalg.eigh(now.gram)  # ascending
        real = (size > 1e-12 * size[:, -1:]) & (size > now.floor) & (now.slope > 0)
        inverse = torch.where(real, 1 / torch.where(real, size * now.slope, 1.0), 0.0)
        off = (axes @ (inverse.unsqueeze(-1) * (axes.mT @ aim.unsqueeze(-1)))).squeeze(-1)
        off = off - off.mean(1, keepdim=True)  # what rounding left along (1, ..., 1)
        if self.limit is not None:
            most = off.abs().amax(1, keepdim=True)
            off = off * (self.limit / most.clamp_min(self.limit))
        return 1 / count + off


def _one_each(name: str, values: tuple[float, ...], count: int) -> tuple[float, ...]:
    if len(values) != count:
        raise ValueError(f"{name} of {len(values)} numbers for {count} models: expected one each")
    return values
