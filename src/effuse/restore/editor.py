"""What editors share: the levels they walk, and the bands in which clean data land."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from effuse.core import Denoiser, Process, Time
from effuse.core.errors import check_whole
from effuse.ops.tensors import expand_as
from effuse.processes import Tabulated

Clamp = Callable[[Tensor, Time, Process], Tensor]
"""Takes x: (B, *) at level t of a process to where clean data could have brought it."""


@dataclass(frozen=True)
class Latents:
    """What encoding leaves: a latent at every level.

    times: (L,) rising levels; x: (L, B, *).
    """

    times: Tensor
    x: Tensor

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every latent, (L, B): an input that leaves the shell shows here."""
        flat = self.x.flatten(2).double()
        return flat.mean(2), flat.std(2)


class Walked(NamedTuple):
    """What an editor gives: the sample x: (B, *), and the latents if it encoded any."""

    x: Tensor
    latents: Latents | None = None


class Editor(ABC):
    """Makes a likelier sample of a given one. A frozen dataclass of hyper-parameters.

    clipped: whether it keeps the clipping of x0 that the pipeline's scheduler asks for.
    """

    clipped: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        rng: torch.Generator | None = None,
        encoder: Denoiser | None = None,
    ) -> Walked:
        """Edit x: (B, *), clean data as the denoiser knows it; pixels in [-1, 1].

        Args:
            denoiser: predicts; conditions are bound.
            x: what is edited; its dtype is that of the walk.
            rng: draws all noise.
            encoder: predicts while walking up, where the editor does; by default the denoiser.
        """

    @abstractmethod
    def calls(self, process: Process) -> int:
        """Return how often the denoiser is called, a picture."""

    @property
    def bands(self) -> tuple[Clamp, ...]:
        """The bands to which samples are clamped."""
        return ()


def climb(process: Process, count: int, depth: float) -> Tensor:
    """Return the levels from clean to `depth` of a walk of `count` even levels, rising, float64.

    The first is the first entry of a table, 1 / N, and 0.001 of other processes: at t = 0 a network
    that predicts noise is told of none.

    Raises:
        ValueError: fewer than two levels lie within `depth`.
    """
    check_whole("levels", count, 2)
    first = 1 / len(process) if isinstance(process, Tabulated) else 1e-3
    times = torch.linspace(first, 1.0, count, dtype=torch.float64)
    times = times[times <= depth + 1e-9]
    if len(times) < 2:
        raise ValueError(
            f"depth={depth!r} holds {len(times)} of {count} levels: expected two or more, "
            f"at least {first + (1 - first) / (count - 1):.4g}"
        )
    return times


def _check_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"eta={eta!r}: expected a number, zero or above; 1.7 to 2 is usual")


@dataclass(frozen=True)
class Band:
    """Confidence-based clipping: clamp to where clean data land with the confidence of eta.

    x <- clamp(x, alpha low + shift - eta sigma, alpha high + shift + eta sigma), elementwise.

    Values inside are untouched; eta = inf is the identity.

    eta: deviations of the noise that are believed, 1.7 to 2.
    low, high: range of clean data, one number or one a channel. Left out, that of pixels, [-1, 1];
        latents have another, which `Band.of` estimates.
    """

    eta: float = 1.7
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check width and range."""
        _check_eta(self.eta)
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low={self.low!r}, high={self.high!r}: expected both or neither")
        low, high = (torch.as_tensor(v) for v in self.ends)
        if low.shape != high.shape or not (low <= high).all():
            raise ValueError(f"low={self.low!r}, high={self.high!r}: expected low below high")

    @classmethod
    def of(cls, data: Tensor, eta: float = 1.7, *, tail: float = 0.001) -> Band:
        """Return the band whose range, a channel, holds all of data: (B, C, *) but its tails.

        Args:
            data: clean latents, as `model.codec.encode(pictures)` gives; the more the better.
            eta: see `Band`.
            tail: share of the values left out below, and above.
        """
        if data.ndim < 2 or not data.numel():
            raise ValueError(f"data of shape {tuple(data.shape)}: expected (B, C, *), not empty")
        if not 0 <= tail < 0.5:
            raise ValueError(f"tail={tail!r}: expected a share in [0, 0.5)")
        ranked = data.detach().double().movedim(1, 0).flatten(1).sort(-1).values
        cut = int(tail * ranked.shape[1])
        low, high = ranked[:, cut], ranked[:, ranked.shape[1] - 1 - cut]
        return cls(eta, tuple(low.tolist()), tuple(high.tolist()))

    @property
    def ends(self) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
        """Low and high."""
        return -1.0 if self.low is None else self.low, 1.0 if self.high is None else self.high

    def __call__(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Return x: (B, C, *) at level `t` clamped to the band."""
        if self.eta == math.inf:
            return x
        alpha, sigma, shift = (expand_as(c, x) for c in process.coefficients(t))
        low, high = (self._shaped(v, x) for v in self.ends)
        return x.clamp(
            alpha * low + shift - self.eta * sigma, alpha * high + shift + self.eta * sigma
        )

    def _shaped(self, value: float | Sequence[float], x: Tensor) -> Tensor:
        if isinstance(value, Sequence):
            if x.ndim < 2 or x.shape[1] != len(value):
                raise ValueError(
                    f"a band of {len(value)} channels for a sample of shape {tuple(x.shape)}: "
                    "expected as many, estimate it on samples of this model"
                )
            return torch.tensor(value).to(x).reshape(1, -1, *[1] * (x.ndim - 2))
        return torch.tensor(value, dtype=torch.float64, device=x.device)


@dataclass(frozen=True, eq=False)
class Around:
    """Clamp to where one clean sample lands: alpha reference + shift +- eta sigma.

    reference: (*) one sample, or (B, *) one a row. eta: deviations that are believed; inf is the
    identity.
    """

    reference: Tensor
    eta: float = 1.7

    def __post_init__(self) -> None:
        """Check the width."""
        _check_eta(self.eta)

    def __call__(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Return x: (B, *) at level `t` clamped to the band."""
        if self.eta == math.inf:
            return x
        alpha, sigma, shift = (expand_as(c, x) for c in process.coefficients(t))
        center = alpha * self.reference.to(x) + shift
        return x.clamp(center - self.eta * sigma, center + self.eta * sigma)
