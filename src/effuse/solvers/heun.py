"""Heun's second-order method on prediction pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver, Step, Time
from effuse.core.method import method


@method(
    "heun", paper="Elucidating the Design Space of Diffusion-Based Generative Models", year=2022
)
@dataclass(frozen=True)
class Heun(Solver):
    """The trapezoidal rule: advance with the mean of the predictions at both ends of the step.

    p = denoiser(x, t);  p' = denoiser(advance(x, p), s);  x_s = advance(x, (p + p') / 2).

    Two evaluations a step. A step whose `s` has no noise left (sigma_s = 0) is an Euler step, as in
    the paper: the network was never trained there.
    """

    order = 2
    evals = 2
    counterpart = "HeunDiscreteScheduler"

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
        guess = process.advance(x, t, s, pred)
        noisy = process.coefficients(s)[1] > 0
        if not noisy.any():
            return Step(guess)
        half = 0.5 * noisy.to(x.dtype)  # a row that ends in clean data keeps its Euler step
        return Step(process.advance(x, t, s, pred.mix(denoiser(guess, s), half)))
