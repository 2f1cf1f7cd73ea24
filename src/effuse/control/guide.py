"""Two denoisers into one: guidance, and what both must share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Prediction, Process, Time


def one_process(members: Sequence[Denoiser]) -> Process:
    """Return the process that all `members` share: same scales at the same levels.

    Raises:
        ValueError: no members, or two with different schedules; names the one that differs.
    """
    if not members:
        raise ValueError("no denoisers: expected one or more")
    first = members[0].process
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    for index, member in enumerate(members[1:], 1):
        other = member.process
        if other is first or other == first:
            continue
        pairs = zip(first.coefficients(t), other.coefficients(t), strict=True)
        if not all(a.shape == b.shape and torch.allclose(a, b, 1e-6, 1e-9) for a, b in pairs):
            raise ValueError(
                f"denoiser {index} has another noise schedule than denoiser 0: expected one "
                "schedule for all, as their scores are of the same noisy data"
            )
    return first


class Guide(Denoiser):
    """The weaker of two denoisers, driven towards and past the stronger.

    weak + scale (strong - weak), on the pair, so the same in x0, noise, velocity and score.
    Classifier-free guidance, autoguidance, negative prompts, by what the two are. `scale` = 1 is
    the strong one, whose pass is then the only one, and 0 the weak one alike.

    Args:
        strong: (conditional) denoiser; conditions may be bound.
        weak: (unconditional) denoiser of the same schedule.
        scale: finite; diffusers' meaning.
    """

    def __init__(self, strong: Denoiser, weak: Denoiser, scale: float):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale!r}: expected a finite number")
        self.process = one_process([strong, weak])
        self.strong, self.weak, self.scale = strong, weak, float(scale)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`. Conditions go to both."""
        if self.scale == 1:
            return self.strong(x, t, **cond)
        weak = self.weak(x, t, **cond)
        return weak if self.scale == 0 else weak.mix(self.strong(x, t, **cond), self.scale)
