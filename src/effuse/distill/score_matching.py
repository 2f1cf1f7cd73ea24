"""Denoising score matching: what a denoiser of any process learns from clean data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Loss, Objective, Process
from effuse.core.errors import check_fraction
from effuse.ops.tensors import randn_like
from effuse.processes import Tabulated

Weight = Callable[[Process, Tensor], Tensor]
"""lambda, (B,) float64, at levels t: (B,) of a process: of the squared error of the score."""


def variance(process: Process, t: Tensor) -> Tensor:
    """Return sigma^2: every level's noise weighs the same, which is best for samples."""
    return process.coefficients(t)[1].square()


def likelihood(process: Process, t: Tensor) -> Tensor:
    """Return g^2: the loss, less that of the true score, is what the law is off, in nats.

    KL(p || q) at `first` less that at t = 1 if the score is that of a law q; else a bound on it.
    Grows like 1 / t in units of the noise: expect noisy gradients.
    """
    return process.diffusion(t).square()


class ScoreMatching(Objective):
    """A denoiser learns the score of its process from clean data.

    E over t uniform on [first, 1] of lambda / 2 |s - grad log p(x_t | x0)|^2, with s = -noise' /
    sigma and the target -noise / sigma: lambda / (2 sigma^2) |noise' - noise|^2. The loss is the
    mean over values; `nats`, the sum over a row times 1 - first, is what `likelihood` bounds.

    The levels are spread evenly over the rows of a batch; those of a table are its entries.

    batch["x0"]: (B, *); all else in the batch is a condition of the denoiser.

    Args:
        student: the denoiser, such as `effuse.wrap(pipe).bare`.
        weight: `variance`, `likelihood`, or your own.
        first: the cleanest level, a fraction.
    """

    student: Denoiser

    def __init__(self, student: Denoiser, weight: Weight = variance, first: float = 1e-5):
        super().__init__()
        check_fraction("first", first, one=False)
        self.student, self.weight, self.first = student, weight, first

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the loss, and the terms `nats` and `noise`, the plain error of the noise."""
        x0, process = batch["x0"], self.student.process
        t = self.levels(len(x0), rng).to(x0.device)
        noise = randn_like(x0, rng)
        cond = {k: v for k, v in batch.items() if k != "x0"}
        pred = self.student(process.corrupt(x0, t, noise), t, **cond)
        each = (pred.noise - noise).square().flatten(1)
        share = self.weight(process, t) / process.coefficients(t)[1].square()
        rows = 0.5 * share.to(each) * each.mean(1)
        nats = rows.mean().detach() * each.shape[1] * (1 - self.first)
        return Loss(rows.mean(), {"nats": nats, "noise": each.mean().detach()})

    def levels(self, count: int, rng: torch.Generator | None = None) -> Tensor:
        """Draw levels, (count,) float64 rising, one in each of as many even parts."""
        u = torch.rand(count, generator=rng, dtype=torch.float64)
        t = self.first + (1 - self.first) * (torch.arange(count) + u) / count
        process = self.student.process
        return process.time_of(process.index_at(t).ceil()) if isinstance(process, Tabulated) else t
