"""Class guidance: a denoiser driven towards a class by a classifier of noisy data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.core.contracts import Denoiser, Loss, Objective, Prediction, Process, Time
from effuse.core.errors import check_fraction
from effuse.ops.tensors import expand_as, has_zero, randn_like

Classifier = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, K) of x: (B, *) at levels t: (B,) float64; each row by itself. A module, or not."""


class Classified(Denoiser):
    """A denoiser driven by the gradient of log p(y | x_t), which a classifier of noisy data gives.

    score + scale grad, on the pair: noise - scale sigma grad and x0 + scale sigma^2 / alpha grad.
    `scale` = 1 with the classifier of the denoiser's own law is exactly the conditional denoiser;
    0 is `base`, without a call of the classifier. Differentiable, so its likelihoods can be taken.

    Args:
        base: unconditional denoiser; or of a class, bound beforehand: `base.given(...)`.
        classifier: see `Classifier`.
        scale: finite; above 1 the class is sharper than it is.
    """

    def __init__(self, base: Denoiser, classifier: Classifier, scale: float = 1.0):
        super().__init__()
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale!r}: expected a finite number")
        self.process, self.base = base.process, base
        self.classifier, self.scale = classifier, float(scale)

    def forward(self, x: Tensor, t: Time, *, label: Tensor | int = -1, **cond: Any) -> Prediction:
        """Predict from x: (B, *) at level `t`.

        Args:
            x: (B, *) spoiled data.
            t: () or (B,) level.
            label: () or (B,) class of each row; -1 leaves a row to the base.
            **cond: goes to the base.

        Raises:
            ValueError: no such class, logits of another shape, or alpha = 0, where x0 cannot be
                told from the score.
        """
        pred = self.base(x, t, **cond)
        label = torch.as_tensor(label, device=x.device).expand(len(x))
        if self.scale == 0 or (label < 0).all():
            return pred
        alpha, sigma, _ = self.process.coefficients(t)
        if has_zero(alpha):
            raise ValueError(
                "x0 cannot be told from the score at alpha = 0: start below pure noise"
            )
        grad = self.scale * self.slope(x, t, label)
        noise = pred.noise - expand_as(sigma, x) * grad
        return Prediction(pred.x0 + expand_as(sigma.square() / alpha, x) * grad, noise)

    def slope(self, x: Tensor, t: Time, label: Tensor) -> Tensor:
        """Return grad_x log p(label | x_t): (B, *), zero in rows whose label: (B,) is negative."""
        graph = x.requires_grad and torch.is_grad_enabled()
        levels = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        with torch.enable_grad():
            x = x if graph else x.detach().requires_grad_()
            logits = self.classifier(x, levels)
            if logits.ndim != 2 or len(logits) != len(x):
                raise ValueError(
                    f"logits of shape {tuple(logits.shape)}: expected ({len(x)}, classes)"
                )
            if int(label.max()) >= logits.shape[1]:
                raise ValueError(f"label {int(label.max())}: expected below {logits.shape[1]}")
            told = logits.log_softmax(1).gather(1, label.clamp_min(0).long().unsqueeze(1))
            own = (told.squeeze(1) * (label >= 0)).sum()
            (grad,) = torch.autograd.grad(own, x, create_graph=graph)
        return grad


class NoisyClasses(Objective):
    """A classifier learns classes of data spoiled to every level, t uniform on [first, 1].

    Mean cross-entropy of classifier(corrupt(x0, t, noise), t). The levels are spread evenly over
    the rows of a batch.

    batch["x0"]: (B, *); batch["label"]: (B,) integers.

    Args:
        student: a module called as a `Classifier`.
        process: what spoils the data, that of the denoiser to be guided.
        first: the cleanest level, a fraction.
    """

    student: nn.Module

    def __init__(self, student: nn.Module, process: Process, first: float = 1e-5):
        super().__init__()
        check_fraction("first", first, one=False)
        self.student, self.process, self.first = student, process, first

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the cross-entropy in nats, and the share of right answers as `hit`."""
        x0, label = batch["x0"], batch["label"]
        u = torch.rand(len(x0), generator=rng, dtype=torch.float64)
        spread = (torch.arange(len(x0)) + u) / len(x0)
        t = (self.first + (1 - self.first) * spread).to(x0.device)
        logits = self.student(self.process.corrupt(x0, t, randn_like(x0, rng)), t).float()
        hit = (logits.argmax(1) == label).double().mean()
        return Loss(F.cross_entropy(logits, label), {"hit": hit})
