"""Adam pulled toward the weights it starts from, so that what it learned prunes well."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effuse.core.errors import check_choice
from effuse.core.method import method

from .base import Batch, Together, adam, check_adam, moments, real
from .sharded import like, local, numel, total


@method(
    "adam_r",
    buys="fine-tunes whose change of the weights is small, for pruning it",
    measured_in="darex",
    example=lambda: AdamR([torch.nn.Parameter(torch.ones(2, 2))]),
)
class AdamR(Together):
    """Adam with decoupled decay toward reference weights, the half of DAREx-L2 that trains.

        s = sqrt(mean over all elements of all parameters of v_hat)     (1 where that is zero)
        w <- w - lr (weight_decay / s) (w - reference)     (penalty "l1": sign(w - reference))
        w <- w - lr m_hat / (sqrt(v_hat) + eps)
    Without weight decay it is Adam. The reference is state, so a resumed run keeps it.

    Args:
        params: parameters, groups, or named parameters.
        reference: a tensor a parameter, in their order; default copies them as they are now.
        lr, betas, eps, weight_decay: the paper's.
        penalty: "l2", or "l1", which goes with pruning by magnitude.
        foreach, maximize, capturable: see `Together`.
    """

    kept = ("exp_avg", "exp_avg_sq", "reference")

    def __init__(
        self,
        params: Iterable[Any],
        reference: Iterable[Tensor] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        penalty: str = "l2",
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        check_adam(lr, betas, eps, weight_decay)
        check_choice("penalty", penalty, ("l1", "l2"))
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "penalty": penalty,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
            },
        )
        owners = [p for group in self.param_groups for p in group["params"]]
        given = owners if reference is None else list(reference)
        if [r.shape for r in given] != [p.shape for p in owners]:
            raise ValueError(
                f"expected a reference of each parameter's shape, got {len(given)} tensors for "
                f"{len(owners)} parameters or other shapes: pass them in the parameters' order"
            )
        for p, r in zip(owners, given, strict=True):
            self._refer(p, r)
        self._spread = 1.0

    def _refer(self, p: Tensor, reference: Tensor) -> None:
        low = p.dtype in (torch.float16, torch.bfloat16)
        kind = torch.float32 if low else p.dtype
        own = reference.detach().to(p.device, kind, copy=True)
        self.state[p]["reference"] = like(own, p)

    def before(self) -> None:
        """Take the second moments of all parameters, this gradient included, before any moves."""
        whole, count = 0.0, 0
        for group in self.param_groups:
            b2 = group["betas"][1]
            for p in group["params"]:
                if "reference" not in self.state[p]:  # of a group added later
                    self._refer(p, p)
                if p.grad is None or not group["weight_decay"]:
                    continue
                state = self.state[p]
                power = total(real(local(p.grad)).double().square(), p) * (1 - b2)
                if "exp_avg_sq" in state:
                    power += b2 * total(real(local(state["exp_avg_sq"])), p)
                whole += power / (1 - b2 ** (int(state.get("step", 0)) + 1))
                count += numel(p)
        self._spread = math.sqrt(whole / count) if count and whole > 0 else 1.0

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Pull toward the reference, then make Adam's step."""
        b1, b2 = group["betas"]
        moments(batch, (b1, b2))
        if group["weight_decay"]:
            pull = list(torch._foreach_sub(batch.params, batch.kept["reference"]))
            pull = list(torch._foreach_sign(pull)) if group["penalty"] == "l1" else pull
            size = group["lr"] * group["weight_decay"] / self._spread
            torch._foreach_add_(batch.params, pull, alpha=-size)
        roots, sizes = adam(batch, group["lr"], (b1, b2), group["eps"])
        torch._foreach_addcdiv_(
            batch.params, batch.kept["exp_avg"], roots, [-size for size in sizes]
        )
