"""Edits that keep a measurement of the picture and sample the rest: inpainting and colorization."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core import Denoiser, Operator, Process, Solver, sample
from effuse.core.errors import check_whole
from effuse.core.method import method
from effuse.operators import Known, Mix, colors
from effuse.ops.tensors import randn_like
from effuse.processes import Tapered
from effuse.solvers.langevin import Langevin
from effuse.solvers.score_sde import Imposed, PredictorCorrector

from .editor import Editor, Walked


def _sampler() -> Solver:
    return PredictorCorrector(corrector=Langevin(0.1))


class Measured(Editor):
    """Samples from noise what agrees with a linear measurement of the picture; see `Imposed`.

    levels: of the walk. solver: takes the steps.
    """

    levels: int
    solver: Solver

    def operator(self, like: Tensor) -> Operator:
        """Return what is measured of samples shaped as like: (B, C, H, W)."""
        raise NotImplementedError

    def calls(self, process: Process) -> int:
        """Return how often the denoiser is called, a picture."""
        return self.levels * self.solver.evals

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        rng: torch.Generator | None = None,
        encoder: Denoiser | None = None,
    ) -> Walked:
        """See `Editor.__call__`; nothing is encoded."""
        process, operator = denoiser.process, self.operator(x).to(x.device)
        start = process.corrupt(torch.zeros_like(x), 1.0, randn_like(x, rng))
        times = Tapered()(process, self.levels)
        imposed = Imposed(self.solver, operator, operator(x))
        return Walked(sample(denoiser, imposed, start, times, rng=rng))


@method("measured", example=lambda: Inpaint(torch.ones(8, 8)))
@dataclass(frozen=True, eq=False)
class Inpaint(Measured):
    """Keeps the pixels where the mask is one and samples the others.

    On latents the mask is brought to their size; one is known where every pixel of it is.

    mask: (H, W), one where known and zero elsewhere.
    """

    mask: Tensor
    levels: int = 100
    solver: Solver = field(default_factory=_sampler)

    def __post_init__(self) -> None:
        """Check the mask and the count."""
        check_whole("levels", self.levels, 1)
        if self.mask.ndim != 2 or not ((self.mask == 0) | (self.mask == 1)).all():
            raise ValueError(
                f"mask of shape {tuple(self.mask.shape)}: expected (H, W) of ones and zeros"
            )

    def operator(self, like: Tensor) -> Operator:
        """See `Measured.operator`."""
        (h, w), (rows, columns) = self.mask.shape, like.shape[-2:]
        if h % rows or w % columns:
            raise ValueError(f"a mask of {h} x {w} on samples of {rows} x {columns}: no multiple")
        lost = 1 - self.mask.float()[None, None]
        return Known(1 - F.max_pool2d(lost, (h // rows, w // columns))[0, 0])


@method("measured", example=lambda: Colorize())
@dataclass(frozen=True)
class Colorize(Measured):
    """Keeps what is gray in the picture, (R + G + B) / sqrt(3), and samples the colors."""

    levels: int = 100
    solver: Solver = field(default_factory=_sampler)

    def __post_init__(self) -> None:
        """Check the count."""
        check_whole("levels", self.levels, 1)

    def operator(self, like: Tensor) -> Operator:
        """See `Measured.operator`; raises for latents, which have no colors."""
        if like.shape[1] != 3:
            raise ValueError(
                f"samples of {like.shape[1]} channels: colorization needs a pipeline on pixels"
            )
        return Mix(colors()[:1])
