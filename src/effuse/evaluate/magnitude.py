"""How far latents stray from their usual range: the sign of a sampler that diverges."""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.core.contracts import Metric
from effuse.core.errors import check_positive


class MagnitudeScore(Metric):
    """Mean over all positions of max(0, |z| - tau), z = (latent - mean) / std for each channel.

    0 for latents within tau deviations of their mean. The paper max-pools the excess before it
    averages and does not give its threshold; this is the plain mean, with tau = 3.

    Args:
        mean: () or (C,) of good latents.
        std: () or (C,), positive.
        tau: threshold in standard deviations.
    """

    name = "magnitude"
    unit = "standard deviations"
    better = "lower"

    def __init__(self, mean: Tensor | float = 0.0, std: Tensor | float = 1.0, tau: float = 3.0):
        check_positive("tau", tau)
        self.mean, self.std = torch.as_tensor(mean).double(), torch.as_tensor(std).double()
        if self.mean.ndim > 1 or self.std.ndim > 1 or not (self.std > 0).all():
            raise ValueError(
                f"mean of shape {tuple(self.mean.shape)}, std={self.std}: expected () or (C,), "
                "std above zero"
            )
        self.tau = tau
        self.reset()

    @classmethod
    def of(cls, latents: Tensor, tau: float = 3.0) -> MagnitudeScore:
        """Return the score whose statistics are those of `latents`: (B, C, *)."""
        rows = latents.detach().double().transpose(0, 1).flatten(1)
        return cls(rows.mean(1), rows.std(1), tau)

    def reset(self) -> None:
        """Forget all samples."""
        self.total, self.count = 0.0, 0

    def score(self, samples: Tensor) -> Tensor:
        """Return the score of each row of samples: (B, C, *), as (B,) float64."""
        shape = (1, -1, *[1] * (samples.ndim - 2))
        mean, std = (c.to(samples.device).reshape(shape) for c in (self.mean, self.std))
        z = (samples.double() - mean) / std
        return (z.abs() - self.tau).clamp_min(0).flatten(1).mean(1)

    def update(self, samples: Tensor, reference: object = None) -> None:
        """Take in latents: (B, C, *)."""
        self.total += float(self.score(samples).sum())
        self.count += len(samples)

    def compute(self) -> float:
        """Return the mean over all samples.

        Raises:
            ValueError: there were none.
        """
        if self.count == 0:
            raise ValueError("no samples: call update before compute")
        return self.total / self.count
