"""The optimizer of the house: Muon for matrices, AdamW for the rest, as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return about U V' of the singular value decomposition of matrices: (N, A, B), in bfloat16.

    Newton-Schulz of fifth order with Jordan's coefficients: singular values end near one.
    """
    x = matrices.bfloat16()
    turned = x.size(-2) > x.size(-1)
    x = x.mT if turned else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if turned else x


class MatrixAdam(torch.optim.Optimizer):
    """Muon (momentum, made orthogonal) where a group says `matrix`, AdamW elsewhere.

    Matrices of one shape are done in one batched product. The step of a matrix has the size of an
    AdamW step of the same learning rate (0.2 sqrt(max(A, B)) times an orthogonal matrix).

    Args:
        params: groups as torch takes them; see `groups`.
        lr, betas, weight_decay: of AdamW. momentum: of Muon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ):
        default = {"matrix": False, "lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, default | {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = closure() if closure else None
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if group["matrix"]:
                self._matrices(group, live)
            else:
                self._rest(group, live)
        return loss

    def _matrices(self, group: dict[str, Any], live: list[Tensor]) -> None:
        shapes = defaultdict(list)
        for p in live:
            shapes[(p.shape[0], p.numel() // p.shape[0])].append(p)
        for shape, members in shapes.items():
            for p in members:
                if "m" not in self.state[p]:
                    self.state[p]["m"] = torch.zeros_like(p)
            moments = [self.state[p]["m"] for p in members]
            grads = [p.grad for p in members if p.grad is not None]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, moments, group["momentum"])
            out = orthogonalize(torch.stack([a.reshape(shape) for a in ahead])).float()
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
            for p, o in zip(members, out, strict=True):
                p.add_(o.reshape(p.shape), alpha=-rate)

    def _rest(self, group: dict[str, Any], live: list[Tensor]) -> None:
        if not live:
            return
        b1, b2 = group["betas"]
        for p in live:
            state = self.state[p]
            if not state:
                state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
        group["count"] = group.get("count", 0) + 1
        m = [self.state[p]["m"] for p in live]
        v = [self.state[p]["v"] for p in live]
        grads = [p.grad for p in live if p.grad is not None]
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        down = torch._foreach_sqrt(v)
        torch._foreach_div_(down, (1 - b2 ** group["count"]) ** 0.5)
        torch._foreach_add_(down, 1e-8)
        torch._foreach_mul_(live, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(live, m, down, -group["lr"] / (1 - b1 ** group["count"]))


def groups(model: nn.Module, matrix: Callable[[str, Tensor], bool] | None = None) -> list[Any]:
    """Split the trainable parameters: matrices; other weights; biases and norms, not decayed.

    Args:
        model: whose parameters.
        matrix: which are matrices, by default all of two dimensions except embeddings and what
            goes in or out.
    """

    def default(name: str, p: Tensor) -> bool:
        outer = ("embed", "proj_out", "conv_in", "conv_out", "patch", "logit")
        return p.ndim == 2 and not any(word in name for word in outer)

    matrix = matrix or default
    kinds: dict[str, list[Tensor]] = {"matrix": [], "weight": [], "flat": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "matrix" if matrix(name, p) else "weight" if p.ndim > 1 else "flat"
            kinds[kind].append(p)
    return [
        {"params": kinds["matrix"], "matrix": True},
        {"params": kinds["weight"]},
        {"params": kinds["flat"], "weight_decay": 0.0},
    ]
