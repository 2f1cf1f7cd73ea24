"""DDIM, the first-order step along the prediction held fixed, and its stochastic family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Process, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import randn_like, weighted_sum


def shrink(process: Process, t: Time, s: Time) -> Tensor:
    """Return r_s / r_t, r = sigma / alpha, () or (B,); one where a step stays at either end."""
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = process.coefficients(t), process.coefficients(s)
    above, below = sigma_s * alpha_t, alpha_s * sigma_t
    return torch.where(below == 0, 1.0, above / torch.where(below == 0, 1.0, below))


def fresh_noise(process: Process, t: Time, s: Time, eta: float) -> tuple[Tensor, Tensor]:
    """Split sigma_s into a kept and a fresh part for a step from level `t` to `s` < `t`.

    fresh^2 = eta^2 sigma_s^2 (1 - (r_s / r_t)^2),   kept^2 = sigma_s^2 - fresh^2,

    r = sigma / alpha; eta = 1 is the reverse transition (for VP, DDPM's posterior variance).
    """
    sigma_s = process.coefficients(s)[1]
    fresh = eta * sigma_s * (1 - shrink(process, t, s).square()).clamp_min(0).sqrt()
    return (sigma_s.square() - fresh.square()).clamp_min(0).sqrt(), fresh


@method("ddim", paper="Denoising Diffusion Implicit Models", year=2021)
@dataclass(frozen=True)
class DDIM(Solver):
    """First-order step along the prediction held fixed.

    x_s = alpha_s x0 + shift_s + kept noise + fresh z,   kept^2 + fresh^2 = sigma_s^2.

    `eta` in [0, 1]: 0 is deterministic, x + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) noise;
    1 draws from the reverse transition (ancestral sampling). Walking up (inversion) needs eta = 0.
    """

    eta: float = 0.0
    order = 1
    counterpart = "DDIMScheduler"

    def __post_init__(self) -> None:
        """Check `eta`."""
        check_fraction("eta", self.eta, zero=True)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether noise is drawn."""
        return self.eta > 0

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
        out = process.advance(x, t, s, pred)
        if self.eta == 0:
            return Step(out)
        kept, fresh = fresh_noise(process, t, s, self.eta)
        change = kept - process.coefficients(s)[1]
        z = randn_like(x, rng)
        return Step(weighted_sum((1.0, out), (change, pred.noise), (fresh, z)))
