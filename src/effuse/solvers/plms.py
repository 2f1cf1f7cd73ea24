"""PLMS: Adams-Bashforth on the predicted noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver, Step, Time
from effuse.core.errors import check_choice
from effuse.core.method import method

from .multistep import along_noise, combine, kept, weights


@method(
    "plms",
    paper="Pseudo Numerical Methods for Diffusion Models on Manifolds",
    year=2022,
    buys="second order and up at one evaluation a step",
    missing="the Runge-Kutta start-up of the paper: the first steps are of lower order",
    measured_in="schedulers",
)
@dataclass(frozen=True)
class PLMS(Solver):
    """Adams-Bashforth of `order` on the noise, in y = x / alpha over r = sigma / alpha.

    y_s = y_t + (r_s - r_t) sum_j w_j noise_{n-j};  w = 1 | 3/2, -1/2 | 23, -16, 5 over 12 | ...

    The first steps use what there is (order 1, 2, ...), and the weights are those of equal steps in
    r on any grid, as in the paper: the error of a whole walk falls like h^2 at best (`walk_order`).
    Above two, `order` is that of equal steps with the past given.

    `order` in 1..5; 1 is deterministic DDIM.
    """

    order: int = 3  # type: ignore[misc]

    def __post_init__(self) -> None:
        """Check the order."""
        check_choice("order", self.order, (1, 2, 3, 4, 5))

    @property
    def walk_order(self) -> int:
        """At most two: the start and uneven steps in r cap it."""
        return min(self.order, 2)

    def direction(
        self, noise: Tensor, past: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the noise to walk along, (B, *), and the past with `noise` in it."""
        past = (kept(noise), *(past or ()))[: self.order]
        return combine(past, weights(len(past))), past

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: tuple[Tensor, ...] | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`; the state is the noise of the last steps, newest first."""
        pred = denoiser(x, t)
        noise, past = self.direction(pred.noise, state)
        return Step(along_noise(denoiser.process, x, t, s, pred, noise), past)
