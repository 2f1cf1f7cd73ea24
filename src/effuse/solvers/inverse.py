"""Inverse problems by a score alone: inpainting, colorization, anything linear.

    pictures = inpaint(model.bare, pictures, mask, steps=100, rng=rng)

One call each over `effuse.solvers.score_sde.Imposed`, which is the method; pixels, not latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Operator, Solver, Step
from effuse.core.errors import check_whole
from effuse.core.sampling import sample
from effuse.operators import Known, Mix, colors
from effuse.processes import Grid, Tapered

from .langevin import Langevin
from .score_sde import Imposed, PredictorCorrector

OnStep = Callable[[int, Tensor, Step], Tensor | None]


def agreeing(
    denoiser: Denoiser,
    operator: Operator,
    measured: Tensor,
    *,
    solver: Solver | None = None,
    steps: int = 100,
    grid: Grid | None = None,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample (B, *) what agrees with a measurement: operator(sample) is `measured`, exactly.

    The measured part is spoiled and put in at every level. What is free meets it only through the
    network, so that the sample is of the conditional law only about: see `Imposed`.

    Args:
        denoiser: conditions bound; x0 not clipped, such as `effuse.wrap(pipe).bare`.
        operator: linear, with a pseudo-inverse; `effuse.operators` has some.
        measured: (B, *) floating point, operator of what is wanted; its dtype is that of the walk.
        solver: `PredictorCorrector` with a Langevin corrector by default: two calls a step.
        steps: of the solver.
        grid: where they are; `Tapered()` by default.
        rng: draws all noise.
        on_step: see `effuse.sample`.

    Raises:
        ValueError: `measured` is no measurement of this operator, or of integers.
    """
    check_whole("steps", steps, 1)
    if not measured.is_floating_point():
        raise ValueError(f"measured is {measured.dtype}: expected floating point")
    known = operator.pinv(measured)
    off = float((operator(known) - measured).abs().max())
    if not off <= 1e-2 * (1 + float(measured.abs().max())):
        raise ValueError(
            f"measured: nothing has it under {type(operator).__name__}, off by {off:.2g}; "
            "expected operator(something)"
        )
    base = PredictorCorrector(corrector=Langevin()) if solver is None else solver
    process = denoiser.process
    times = (Tapered() if grid is None else grid)(process, steps)
    x = process.prior(known.shape, rng=rng, dtype=known.dtype, device=known.device)
    solver = Imposed(base, operator, measured)
    return sample(denoiser, solver, x, times, rng=rng, on_step=on_step)


def inpaint(
    denoiser: Denoiser,
    pictures: Tensor,
    mask: Tensor,
    *,
    solver: Solver | None = None,
    steps: int = 100,
    grid: Grid | None = None,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return pictures: (B, C, H, W) with new contents where mask is 0, and their own where it is 1.

    mask: (H, W), (C, H, W) or (B, C, H, W). The rest as in `agreeing`.
    """
    operator = Known(mask).to(pictures.device)
    return agreeing(
        denoiser,
        operator,
        operator(pictures),
        solver=solver,
        steps=steps,
        grid=grid,
        rng=rng,
        on_step=on_step,
    )


def colorize(
    denoiser: Denoiser,
    gray: Tensor,
    *,
    solver: Solver | None = None,
    steps: int = 100,
    grid: Grid | None = None,
    rng: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Return colored pictures, (B, 3, H, W), whose mean over the colors is gray: (B, 1, H, W).

    The rest as in `agreeing`.
    """
    if gray.ndim != 4 or gray.shape[1] != 1:
        raise ValueError(f"gray of shape {tuple(gray.shape)}: expected (B, 1, H, W)")
    return agreeing(
        denoiser,
        Mix(colors()[:1]).to(gray.device),
        gray * 3**0.5,  # the gray axis has length one: sum over sqrt(3)
        solver=solver,
        steps=steps,
        grid=grid,
        rng=rng,
        on_step=on_step,
    )
