"""Euler with fresh noise: ancestral sampling in the variance-exploding coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as, randn_like


@method("ancestral", paper="Denoising Diffusion Probabilistic Models", year=2020)
@dataclass(frozen=True)
class Ancestral(Solver):
    """Euler step to a lower level, then noise up again, in r = sigma / alpha.

    up^2 = min(r_s, eta sqrt(r_s^2 (r_t^2 - r_s^2)) / r_t)^2,   down^2 = r_s^2 - up^2,
    y_s = x0 / 1 + down noise + up z,   x_s = alpha_s y_s.

    `eta` in (0, 1]: 1 is the reverse transition of the process, the same law as `DDIM(eta=1)`.
    """

    eta: float = 1.0
    order = 1
    stochastic = True

    def __post_init__(self) -> None:
        """Check `eta`."""
        check_fraction("eta", self.eta)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, pred = denoiser.process, denoiser(x, t)
        alpha_s, sigma_s = process.alpha(s), process.sigma(s)
        shrink = sigma_s * process.alpha(t) / (alpha_s * process.sigma(t))  # r_s / r_t
        up = self.eta * sigma_s * (1 - shrink.square()).clamp_min(0).sqrt()
        down = (sigma_s.square() - up.square()).clamp_min(0).sqrt()
        out = expand_as(alpha_s, x) * pred.x0 + expand_as(process.shift(s), x)
        out = out + expand_as(down, x) * pred.noise
        return Step(out + expand_as(up, x) * randn_like(x, rng))
