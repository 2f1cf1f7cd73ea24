"""SDEdit: spoil to some depth, then sample back; one knob trades fidelity for realism."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from effuse.core import Denoiser, Process, Solver, sample
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method
from effuse.ops.tensors import randn_like
from effuse.solvers import Ancestral

from .editor import Clamp, Editor, Walked, climb


@method("sdedit", paper="SDEdit: Guided Image Synthesis and Editing with SDEs", year=2021)
@dataclass(frozen=True)
class SDEdit(Editor):
    """Noise, then denoise: x = alpha_L y + sigma_L z, sampled to clean data, once or repeatedly.

    depth: the level L in (0, 1]; deeper is more realistic and less faithful.
    levels: levels of a whole walk from t = 1; those within `depth` are taken, a call each.
    repeats: how often; each begins with what the last one gave.
    solver: samples; ancestral, as in the paper.
    band: clamps the sample at every level; None leaves it. It takes outliers out, but cuts the
        tails of fresh noise too: deep walks come out less realistic.
    """

    depth: float = 0.5
    levels: int = 200
    repeats: int = 1
    solver: Solver = field(default_factory=Ancestral)
    band: Clamp | None = None

    def __post_init__(self) -> None:
        """Check depth and counts."""
        check_fraction("depth", self.depth)
        check_whole("levels", self.levels, 2)
        check_whole("repeats", self.repeats, 1)

    @property
    def bands(self) -> tuple[Clamp, ...]:
        """The band, if there is one."""
        return () if self.band is None else (self.band,)

    def times(self, process: Process) -> Tensor:
        """Return the levels of one walk, falling to clean data."""
        times = climb(process, self.levels, self.depth)
        return torch.cat([times.flip(0), times.new_zeros(1)])

    def calls(self, process: Process) -> int:
        """Return how often the denoiser is called, a picture."""
        return self.repeats * self.solver.evals * (len(self.times(process)) - 1)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        *,
        rng: torch.Generator | None = None,
        encoder: Denoiser | None = None,
    ) -> Walked:
        """See `Editor.__call__`; nothing is encoded, so `encoder` is not called."""
        process, times, band = denoiser.process, self.times(denoiser.process), self.band
        for _ in range(self.repeats):
            x = process.corrupt(x, float(times[0]), randn_like(x, rng))
            if band is None:
                x = sample(denoiser, self.solver, x, times, rng=rng)
            else:
                x = band(x, times[0], process)
                x = sample(
                    denoiser,
                    self.solver,
                    x,
                    times,
                    rng=rng,
                    on_step=lambda index, s, step: band(step.x, s, process),
                )
        return Walked(x)
