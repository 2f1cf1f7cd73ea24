"""Ancestral sampling: Euler steps with fresh noise."""

from __future__ import annotations

from dataclasses import dataclass

from effuse.core.method import method

from .ddim import DDIM


@method("ancestral", paper="Denoising Diffusion Probabilistic Models", year=2020)
@dataclass(frozen=True)
class Ancestral(DDIM):
    """Draws from the reverse transition of the process: `DDIM` with eta = 1.

    In y = x / alpha over r = sigma / alpha, an Euler step to a lower level and noise up again:

    up^2 = eta^2 r_s^2 (1 - (r_s / r_t)^2),   down^2 = r_s^2 - up^2,   y_s = x0 + down noise + up z.

    `eta` in [0, 1]; 0 is Euler.
    """

    eta: float = 1.0
    counterpart = "EulerAncestralDiscreteScheduler"
