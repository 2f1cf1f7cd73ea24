"""The one sampling loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver, Step
from effuse.ops.tensors import require_finite


def check_times(times: Tensor) -> Tensor:
    """Return `times` as a 1-D tensor, or raise `ValueError` if it is no walk within [0, 1].

    A walk has at least two levels, all within [0, 1], and goes one way: down (sampling) or up
    (inversion). A level may repeat.
    """
    times = torch.as_tensor(times)
    if not times.is_floating_point():
        raise ValueError(f"times are {times.dtype}: expected floating-point levels in [0, 1]")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times of shape {tuple(times.shape)}: expected (steps + 1,), two or more")
    if not ((times >= 0) & (times <= 1)).all():
        raise ValueError(
            f"times run from {float(times[0]):g} to {float(times[-1]):g}: expected levels in [0, 1]"
        )
    steps = times.diff()
    if not ((steps <= 0).all() or (steps >= 0).all()):
        raise ValueError("times go down and up: expected one direction, restart for the other")
    return times


def _named(index: int, solver: Solver, t: Tensor, s: Tensor) -> str:
    return f"step {index} of {type(solver).__name__}, t {t:.4g} to {s:.4g}"


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    solver: Solver,
    x: Tensor,
    times: Tensor,
    *,
    rng: torch.Generator | None = None,
    on_step: Callable[[int, Tensor, Step], Tensor | None] | None = None,
) -> Tensor:
    """Walk `x` through the levels `times` with `solver`, from noise to data.

    Args:
        denoiser: predicts; conditions are bound beforehand with `denoiser.given(...)`.
        solver: takes the steps.
        x: (B, *) the start, drawn with `denoiser.process.prior`; its dtype is that of the walk.
        times: (steps + 1,) levels, a value of its own: see `effuse.processes.grids`.
        rng: draws all noise; the same seed gives the same sample.
        on_step: called after each step with its index, the new level and the step. What it
            returns replaces the sample (projection, re-encoding); `None` keeps it.

    Returns:
        (B, *) the sample at the last level.

    Raises:
        ValueError: `times` is no walk within [0, 1].
        FloatingPointError: a step gave a NaN or an infinity; names the step and its levels.
    """
    times = check_times(times).cpu()  # coefficients are numbers: nothing waits for a device
    denoiser.process.remember(times)
    state = solver.init(x)
    for index, (t, s) in enumerate(pairwise(times)):
        step = solver.step(denoiser, x, t, s, state, rng=rng)
        if on_step is not None:
            changed = on_step(index, s, step)
            if changed is not None:
                step = step._replace(x=changed)
        x, state = step
        require_finite(x, functools.partial(_named, index, solver, t, s))
    return x
