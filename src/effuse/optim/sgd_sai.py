"""SGD with momentum at a rate for each tensor, measured once at its first gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from effuse.core.errors import check_whole
from effuse.core.method import method

from .base import Batch, Together, each, in_range, real, rowwise
from .sharded import local, numel, total


def signal_to_noise(
    grad: Tensor, eps: float = 1e-8, spread: float | None = None, owner: Tensor | None = None
) -> float | None:
    """Return ||g|| / (std(g) + eps), or None where `grad` is zero or not finite.

    The deviation is the unbiased one over all n elements, so the ratio is
    sqrt(n - 1 + n (mean / std)^2): near sqrt(n), whatever the scale of the gradient. Where it is
    not defined, for one element or equal elements, it is sqrt(n).

    Args:
        grad: real numbers.
        eps: beside the deviation.
        spread: in place of std(g).
        owner: the parameter of which `grad` is a piece, where it is a DTensor.
    """
    owner = grad if owner is None else owner
    n, g = numel(owner), grad.double()
    norm = math.sqrt(total(g.square(), owner))
    if not math.isfinite(norm) or norm == 0:
        return None
    if spread is None:
        spread = deviation(g, owner)
    equal = spread <= 1e-7 * norm / math.sqrt(n)  # all elements one number, but for rounding
    return math.sqrt(n) if equal else norm / (spread + eps)


def deviation(g: Tensor, owner: Tensor) -> float:
    """Return the unbiased deviation over all elements of all pieces; 0 of a single one."""
    n = numel(owner)
    if n == 1:
        return 0.0
    mean = total(g, owner) / n
    return math.sqrt(total((g.double() - mean).square(), owner) / (n - 1))


@method(
    "sgd_sai",
    seed=13,
    paper="No More Adam: Learning Rate Scaling at Initialization is All You Need",
    year=2024,
    buys="training like AdamW's with half of its state",
    example=lambda: SGDSaI([torch.nn.Parameter(torch.ones(2, 2))]),
)
class SGDSaI(Together):
    """SGD with momentum, each tensor at a rate scaled by its first gradient's signal to noise.

    scale = ||g|| / (std(g) + eps) at a tensor's first gradient that is finite and not zero; then
        m <- momentum m + (1 - momentum) g      (m = g at first)
        w <- (1 - lr weight_decay) w - lr scale m
    A tensor whose first gradients are zero (a LoRA factor, a zero convolution) waits, unmoved, and
    is measured when one arrives. The scale does not depend on the scale of the loss, the step does.

    Args:
        params: parameters, groups, or named parameters.
        lr: at least 0.
        momentum: in [0, 1).
        eps: beside the deviation, as the released code has it.
        weight_decay: decoupled, at `lr` itself.
        max_scale: where given, scales are at most this; not in the paper.
        foreach, maximize, capturable: see `Together`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_scale: float | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        in_range("lr", lr, 0)
        in_range("momentum", momentum, 0, 1)
        in_range("eps", eps, 0)
        in_range("weight_decay", weight_decay, 0)
        if max_scale is not None and max_scale <= 0:
            raise ValueError(f"max_scale must be above 0, got {max_scale}")
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "eps": eps,
                "weight_decay": weight_decay,
                "max_scale": max_scale,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    kept = ("momentum_buffer",)

    def stackable(self, state: Mapping[str, Any]) -> bool:
        """Return whether it has a scale."""
        return "scale" in state

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Measure what has no scale yet, then step all that has one."""
        buffers, lr = batch.kept["momentum_buffer"], group["lr"]
        if not batch.stacked:
            for owners, grad, buffer in zip(batch.owners, batch.grads, buffers, strict=True):
                self._measure(group, owners[0], grad, buffer)
        ready = [i for i, owners in enumerate(batch.owners) if "scale" in self.state[owners[0]]]
        if not ready:
            return
        scales = [[self.state[p]["scale"] for p in batch.owners[i]] for i in ready]
        params, grads, buffers = (
            [tensors[i] for i in ready] for tensors in (batch.params, batch.grads, buffers)
        )
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])  # the first: with itself
        if group["weight_decay"]:
            torch._foreach_mul_(params, each(1 - lr * group["weight_decay"], params))
        if batch.stacked:
            for p, buffer, some in zip(params, buffers, scales, strict=True):
                p.addcmul_(buffer, rowwise(some, p), value=-lr)
        else:
            one = torch.ones((), dtype=params[0].dtype, device=params[0].device)
            sizes = [-lr * some[0] for some in scales]
            torch._foreach_addcmul_(params, buffers, [one] * len(params), sizes)

    def _measure(self, group: dict[str, Any], owner: Tensor, grad: Tensor, buffer: Tensor) -> None:
        """Give a parameter its scale and its first momentum, if this gradient can tell."""
        state, scale = self.state[owner], None
        if "scale" not in state:
            scale = signal_to_noise(grad, group["eps"], owner=owner)
        if scale is not None:
            state["scale"] = min(state.pop("calibrated", scale), group["max_scale"] or math.inf)
            buffer.copy_(grad)

    def calibrate(self, closure: Callable[[], Any], batches: int = 8) -> dict[str, float | None]:
        """Measure scales on several batches before the first step; not in the paper.

        scale = ||mean g|| / (mean std(g) + eps), which is the paper's at one batch
        Noise that differs between batches cancels in the mean. A tensor that has no gradient, or
        none but zeros, is measured when one arrives. Gradients are cleared in the end.

        Args:
            closure: clears the gradients, computes the loss of another batch each time, goes
                backward, as for `step`.
            batches: how often it is called, at least 1.

        Returns:
            Scales by the parameters' names, or places; see `scales`.

        Raises:
            RuntimeError: steps were made already; scales stay as they are then.
            ValueError: a gradient is not finite, as after an overflow: nothing is measured.
        """
        check_whole("batches", batches, 1)
        owners = [(group, p) for group in self.param_groups for p in group["params"]]
        if any("step" in self.state.get(p, {}) for _, p in owners):
            raise RuntimeError(
                "calibrate: steps were made already, scales are set once; call it first"
            )
        means: dict[Tensor, Tensor] = {}
        spreads: dict[Tensor, float] = {}
        for _ in range(batches):
            with torch.enable_grad():
                closure()
            for _, p in owners:
                if p.grad is None:
                    continue
                g = real(local(p.grad.detach())).double()
                if not math.isfinite(total(g, p)):
                    raise ValueError(
                        f"calibrate: a gradient of shape {tuple(p.shape)} is not finite; "
                        "lower the loss scale and call again"
                    )
                means[p] = means[p] + g / batches if p in means else g / batches
                spreads[p] = spreads.get(p, 0.0) + deviation(g, p) / batches
        for group, p in owners:
            found = None
            if p in means:
                found = signal_to_noise(means[p], group["eps"], spreads[p], p)
            if found is not None:
                self.state[p]["calibrated"] = min(found, group["max_scale"] or math.inf)
        self.zero_grad()
        return self.scales()

    def scales(self) -> dict[str, float | None]:
        """Return the scale of each parameter by its name, or place; None before it has one."""
        found: dict[str, float | None] = {}
        for group in self.param_groups:
            names = group.get("param_names") or range(len(found), len(found) + len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                state = self.state.get(p, {})
                found[str(name)] = state.get("scale", state.get("calibrated"))
        return found
