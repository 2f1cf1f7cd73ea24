"""Edit along what a denoiser has most freedom in: singular vectors of its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from effuse.core import Denoiser, Process
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method
from effuse.ops.tensors import require_finite
from effuse.structure import directions

from .editor import Editor, Latents, Walked, climb


@method(
    "along",
    paper="Diffusion Models Learn Low-Dimensional Distributions via Subspace Clustering",
    year=2024,
    buys="edits along what the network itself has most freedom in, without a prompt",
    measured_in="subspace",
)
@dataclass(frozen=True)
class Along(Editor):
    """Encode to a level, move along a singular vector of the denoiser's Jacobian, walk back.

    x_t <- x_t + amount sigma_t sqrt(n) v,   v a right singular vector of d x0 / d x_t, norm one.

    At `amount` zero it is a round trip of the probability-flow ODE. One amount is one norm of the
    noise in x_t: 0.05 to 0.5 is usual. Mid levels change what is shown, deep ones layout and color,
    shallow ones details.

    amount: how far; the sign is a way, see `directions`. direction: which vector, 0 is the leading.
    level: t in (0, 1), where it moves. levels: of a whole walk to t = 1; those within `level` are
        taken, a call each, up and down. steps: of the power iteration, which begins anew a picture;
        it costs 2 steps (direction + 1 + extra) passes.
    """

    clipped = False  # an inversion through clipped predictions does not come back

    amount: float = 0.1
    direction: int = 0
    level: float = 0.6
    levels: int = 50
    steps: int = 10
    extra: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fraction("level", self.level)
        check_whole("direction", self.direction, 0)
        check_whole("levels", self.levels, 2)
        check_whole("steps", self.steps, 1)
        check_whole("extra", self.extra, 0)
        if not math.isfinite(self.amount):
            raise ValueError(f"amount={self.amount!r}: expected a finite number")

    def calls(self, process: Process) -> int:
        """Return how often the denoiser is called, a picture, and once for its Jacobian."""
        return 2 * (len(climb(process, self.levels, self.level)) - 1) + 1

    @torch.no_grad()
    def encode(self, denoiser: Denoiser, x: Tensor) -> Latents:
        """Return the latents of x: (B, *) at every level up to `level`."""
        process = denoiser.process
        times = climb(process, self.levels, self.level).to(x.device)
        out = [x]
        for t, s in pairwise(times):
            out.append(process.advance(out[-1], t, s, denoiser(out[-1], t)))
            require_finite(out[-1], f"encoding, t {t:.4g} to {s:.4g}")
        return Latents(times, torch.stack(out))

    @torch.no_grad()
    def move(
        self, denoiser: Denoiser, latents: Latents, v: Tensor, amounts: Sequence[float]
    ) -> Tensor:
        """Return (A, B, *): the deepest latents moved by each amount of v: (B, *), walked back."""
        process, times, x = denoiser.process, latents.times, latents.x[-1]
        far = float(process.sigma(times[-1])) * math.sqrt(x[0].numel())
        out = []
        for amount in amounts:
            y = x + amount * far * v
            for t, s in pairwise(times.flip(0)):
                y = process.advance(y, t, s, denoiser(y, t))
                require_finite(y, f"walking back, t {t:.4g} to {s:.4g}")
            out.append(y)
        return torch.stack(out)

    def directions(
        self, denoiser: Denoiser, latents: Latents, rng: torch.Generator | None = None
    ) -> Tensor:
        """Return the leading vectors at the deepest latents, (B, direction + 1, *)."""
        return directions(
            denoiser,
            latents.x[-1],
            float(latents.times[-1]),
            self.direction + 1,
            steps=self.steps,
            extra=self.extra,
            rng=rng,
        )

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        rng: torch.Generator | None = None,
        encoder: Denoiser | None = None,
    ) -> Walked:
        """Edit x; see `Editor.__call__`. `rng` draws the start of the power iteration."""
        latents = self.encode(denoiser if encoder is None else encoder, x)
        v = self.directions(denoiser, latents, rng)[:, self.direction]
        return Walked(self.move(denoiser, latents, v, [self.amount])[0], latents)
