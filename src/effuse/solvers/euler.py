"""Euler's method in the variance-exploding coordinates that Karras et al. use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver, Step, Time
from effuse.core.method import method


@method(
    "euler", paper="Elucidating the Design Space of Diffusion-Based Generative Models", year=2022
)
@dataclass(frozen=True)
class Euler(Solver):
    """First order in y = x / alpha over r = sigma / alpha: y_s = y_t + (r_s - r_t) noise.

    Written with the pair, x_s = x + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) noise: in exact
    arithmetic the same map as deterministic DDIM, and free of division at both ends.
    """

    order = 1
    counterpart = "EulerDiscreteScheduler"

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
        return Step(denoiser.process.advance(x, t, s, denoiser(x, t)))
