"""Keep the predicted clean sample in range: clamping and dynamic thresholding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Prediction, Time
from effuse.ops.tensors import expand_as


@dataclass(frozen=True)
class Clip:
    """Keeps the predicted x0 in range: clamp to `limit`, or dynamic thresholding.

    With `ratio`, each row is divided by its quantile s = clamp(quantile(|x0|, ratio), 1, limit)
    after clamping to [-s, s] (Imagen). The noise follows, so the pair stays consistent.
    """

    limit: float = 1.0
    ratio: float | None = None

    def __call__(self, x0: Tensor) -> Tensor:
        """Return x0: (B, *) in range."""
        if self.ratio is None:
            return x0.clamp(-self.limit, self.limit)
        s = torch.quantile(x0.flatten(1).abs(), self.ratio, dim=1).clamp(1, max(self.limit, 1))
        s = expand_as(s, x0)
        return x0.clamp(-s, s) / s


class Clipped(Denoiser):
    """A denoiser whose x0 is kept in range; needs sigma above zero, as the noise follows."""

    def __init__(self, base: Denoiser, clip: Clip):
        super().__init__()
        self.base, self.clip, self.process = base, clip, base.process

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict, then clip x0; see `Denoiser.forward`."""
        x0 = self.clip(self.base(x, t, **cond).x0)
        return self.process.complete(x, t, x0=x0)
