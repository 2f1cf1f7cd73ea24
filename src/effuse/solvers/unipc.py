"""UniPC: a predictor and a corrector that share every evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Process, Solver, Step, Time
from effuse.core.errors import check_choice
from effuse.core.method import method
from effuse.ops.tensors import expand_as

from .dpmpp import half_logsnr
from .multistep import along_data, data_gain, kept


class Trail(NamedTuple):
    """What UniPC remembers.

    x0: the last data predictions, newest first, each (B, *); h: the steps in lambda that followed
    each, () or (B,); used: the direction of the last step; gain: its weight, () or (B,).
    """

    x0: tuple[Tensor, ...]
    h: tuple[Tensor, ...]
    used: Tensor
    gain: Tensor


def _nodes(h: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Return a mask of usable steps, and where the past stands in units of `h`, all below zero."""
    back, usable, nodes = torch.zeros_like(h), h.isfinite() & (h != 0), []
    for step in before:
        back = back - step
        node = back / torch.where(usable, h, 1.0)
        usable = usable & node.isfinite() & (node != 0)
        nodes.append(node)
    return usable, [torch.where(usable, n, -1.0 - i) for i, n in enumerate(nodes)]


def _solve(h: Tensor, nodes: list[Tensor], count: int) -> list[Tensor]:
    """Return rho with sum_m rho_m node_m^(i - 1) = i! phi_{i+1}(-h) / phi_1(-h), i = 1..count.

    These are the weights of UniPC with B(h) = e^h - 1 ("bh2").
    """
    h = -torch.where(h.isfinite() & (h != 0), h, 1.0).double()
    phi, below = torch.expm1(h) / h, torch.expm1(h)
    rows, right = [], []
    for i in range(1, count + 1):
        rows.append(torch.stack([n.double() ** (i - 1) for n in nodes], -1))
        phi = phi - 1 / math.factorial(i)
        right.append(phi * math.factorial(i) / below)
        phi = phi / h
    return list(torch.linalg.solve(torch.stack(rows, -2), torch.stack(right, -1)).unbind(-1))


@method(
    "unipc",
    paper="UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
    year=2023,
    buys="a corrector at no further evaluation",
    missing="orders above three, and the variant B(h) = h",
    measured_in="schedulers",
)
@dataclass(frozen=True)
class UniPC(Solver):
    """Multistep predictor of `order` on the data, corrected with the next step's own prediction.

    predict  x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) D,  D = x0 + sum_m rho_m D_m,
             D_m = (x0_m - x0) / r_m over the past;
    correct  the same step with D_m of the new prediction too, once it is known.

    h is the step in lambda = log(alpha / sigma), r_m = (lambda_m - lambda_t) / h. The order-2
    predictor has rho = 1/2, the one-point corrector too, as in the paper. First steps use what
    there is; steps with infinite h (pure noise, clean data) are of first order.

    `order` in 1..3; `corrector=False` leaves the predictor, which at order 1 is DDIM.
    """

    order: int = 2  # type: ignore[misc]
    corrector: bool = True
    counterpart = "UniPCMultistepScheduler"

    def __post_init__(self) -> None:
        """Check the order."""
        check_choice("order", self.order, (1, 2, 3))

    @property
    def walk_order(self) -> int:
        """At most two: steps from pure noise and to clean data are of first order."""
        return min(self.order, 2)

    def direction(
        self, process: Process, x0: Tensor, t: Time, s: Time, trail: Trail | None
    ) -> tuple[Tensor, Tensor]:
        """Return D: (B, *) for the step from `t` to `s`, and where it is of more than order 1."""
        h = half_logsnr(process, s) - half_logsnr(process, t)
        count = 0 if trail is None else min(self.order - 1, len(trail.x0))
        if trail is None or count == 0:
            return kept(x0), torch.zeros_like(h, dtype=torch.bool)
        usable, nodes = _nodes(h, trail.h[:count])
        rho = [torch.full_like(h, 0.5)] if count == 1 else _solve(h, nodes, count)
        return self._sum(kept(x0), kept(x0), trail.x0, nodes, rho, usable), usable

    def corrected(self, x0: Tensor, trail: Trail) -> tuple[Tensor, Tensor]:
        """Return D: (B, *) of the step just taken, now that its end is predicted to be `x0`.

        Also where it is of more than order 1.
        """
        h, start = trail.h[0], trail.x0[0]
        count = min(self.order - 1, len(trail.x0) - 1)
        plain = start + 0.5 * (kept(x0) - start)
        if count == 0:
            return plain, torch.zeros_like(h, dtype=torch.bool)
        usable, nodes = _nodes(h, trail.h[1 : count + 1])
        rho = _solve(h, [*nodes, torch.ones_like(h)], count + 1)
        out = self._sum(start, start, trail.x0[1:], nodes, rho[:-1], usable)
        out = out + expand_as(rho[-1], out) * (kept(x0) - start)
        return torch.where(expand_as(usable, out).bool(), out, plain), usable

    @staticmethod
    def _sum(
        out: Tensor,
        center: Tensor,
        past: tuple[Tensor, ...],
        nodes: list[Tensor],
        rho: list[Tensor],
        usable: Tensor,
    ) -> Tensor:
        for value, node, weight in zip(past, nodes, rho, strict=False):
            gain = torch.where(usable, weight / node, 0.0)
            out = out + expand_as(gain, out) * (value - center)
        return out

    def remember(
        self, process: Process, x0: Tensor, t: Time, s: Time, used: Tensor, trail: Trail | None
    ) -> Trail:
        """Return the state after a step from `t` to `s` along `used`."""
        h = half_logsnr(process, s) - half_logsnr(process, t)
        old = ((), ()) if trail is None else (trail.x0, trail.h)
        return Trail(
            (kept(x0), *old[0])[: self.order],
            (h, *old[1])[: self.order],
            used,
            data_gain(process, t, s),
        )

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: Trail | None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        process, pred = denoiser.process, denoiser(x, t)
        fix: Tensor | None = None
        if self.corrector and state is not None:
            better, _ = self.corrected(pred.x0, state)
            fix = expand_as(state.gain, x) * (better - state.used)
        used, _ = self.direction(process, pred.x0, t, s, state)
        out = along_data(process, x, t, s, pred, used)
        if fix is not None:
            out = out + carried(process, t, s, fix).to(x.dtype)
        return Step(out, self.remember(process, pred.x0, t, s, used, state))


def carried(process: Process, t: Time, s: Time, change: Tensor) -> Tensor:
    """Return what a change of x at level `t` becomes at `s` while D is held: sigma_s / sigma_t."""
    sigma_t, sigma_s = process.coefficients(t)[1], process.coefficients(s)[1]
    ratio = sigma_s / torch.where(sigma_t == 0, 1.0, sigma_t)
    return expand_as(torch.where(sigma_t == 0, 1.0, ratio), change) * change
