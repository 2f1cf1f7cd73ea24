"""Adam damped where the gradient hardly changes from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from effuse.core.method import method

from .base import Batch, Together, adam, check_adam, each, moments


@method(
    "diffgrad",
    seed=45,
    paper="diffGrad: An Optimization Method for Convolutional Neural Networks",
    year=2019,
    buys="steps that shrink to half where the gradient stops changing",
    missing="the paper's ablated forms of the friction (versions 1 to 5)",
    example=lambda: DiffGrad([torch.nn.Parameter(torch.ones(2, 2))]),
)
class DiffGrad(Together):
    """Adam with a friction from the change of the gradient.

        w <- w - lr xi m_hat / (sqrt(v_hat) + eps),   xi = sigmoid(|g_before - g|) in [0.5, 1)
    with Adam's moments, g_before = 0 at the first step, a true copy after. The friction is not free
    of scale: gradients far below 1, those of most networks, leave xi at 0.5, which is Adam at half
    the rate. Unscale gradients before the step; clipping them changes xi.

    Args:
        params: parameters, groups, or named parameters.
        lr, betas, eps: as Adam's; eps stands beside the corrected root, as in torch's Adam.
        weight_decay: added to the gradient, before the difference.
        decoupled: take the weight decay off the weights instead, as AdamW does; not in the paper.
        foreach, maximize, capturable: see `Together`.
    """

    kept = ("exp_avg", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        decoupled: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        check_adam(lr, betas, eps, weight_decay)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decoupled": decoupled,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Step all tensors of the batch."""
        b1, b2 = group["betas"]
        grads, before = batch.grads, batch.kept["previous_grad"]
        if group["weight_decay"] and group["decoupled"]:
            shrink = 1 - group["lr"] * group["weight_decay"]
            torch._foreach_mul_(batch.params, each(shrink, batch.params))
        elif group["weight_decay"]:
            grads = list(torch._foreach_add(batch.grads, batch.params, alpha=group["weight_decay"]))
        moments(batch, (b1, b2), grads)
        friction = list(torch._foreach_sub(before, grads))
        torch._foreach_abs_(friction)
        torch._foreach_sigmoid_(friction)
        torch._foreach_copy_(before, grads)
        torch._foreach_mul_(friction, batch.kept["exp_avg"])
        roots, sizes = adam(batch, group["lr"], (b1, b2), group["eps"])
        torch._foreach_addcdiv_(batch.params, friction, roots, [-size for size in sizes])
