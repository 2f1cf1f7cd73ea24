"""Adam and SGD that do not inflate the norms of weights a normalization follows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effuse.core.errors import check_choice
from effuse.core.method import method

from .base import (
    Batch,
    Together,
    adam,
    check_adam,
    each,
    in_range,
    moments,
    piled,
    plain,
    rowwise,
    walk,
)
from .sharded import axes, numel, over_all, sharded

VIEWS = ("auto", "channel", "layer", "off")


def rows(x: Tensor, view: str) -> Tensor:
    """Return x: (K, *shape), K tensors of one shape, as (K, R, L): a row a channel, or one."""
    return x.flatten(2) if view == "channel" else x.reshape(len(x), 1, -1)


def cosines(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Return |<x, y>| / (max(||x||, eps) max(||y||, eps)) over the last axis."""
    lengths = x.norm(dim=-1).clamp_min(eps) * y.norm(dim=-1).clamp_min(eps)
    return (x * y).sum(-1).abs() / lengths


def tangent(p: Tensor, w: Tensor, eps: float) -> Tensor:
    """Return p - u <u, p> with u = w / (||w|| + eps), over the last axis."""
    u = w / (w.norm(dim=-1, keepdim=True) + eps)
    return p - u * (u * p).sum(-1, keepdim=True)


def project(
    updates: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    *,
    delta: float,
    wd_ratio: float,
    eps: float,
    view: str = "auto",
) -> tuple[list[float], list[str]]:
    """Take the radial part out of updates of scale-invariant weights, in place.

    A weight counts as scale-invariant in a view, each channel a row or the whole tensor one, where
    max_r |cos(g_r, w_r)| < delta / sqrt(L), L the length of a row. The channel view is asked first.
    Tensors of one shape are looked at together.

    Args:
        updates: a tensor a weight, of two axes or more, changed in place.
        weights: what is stepped.
        grads: their gradients, which only the test looks at.
        delta: how near to orthogonal counts.
        wd_ratio: what the weight decay of a projected weight is multiplied by.
        eps: guards the norms.
        view: "auto"; "channel" or "layer" projects in that view without asking; "off" never.

    Returns:
        For each weight what its weight decay is multiplied by, and the view that fired or "".
    """
    fired = [""] * len(updates)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, w in enumerate(weights):
        shapes.setdefault(tuple(w.shape), []).append(i)
    for some in shapes.values():
        u, w, g = (piled([part[i] for i in some]) for part in (updates, weights, grads))
        names = project_stack(u, w, g, delta=delta, eps=eps, view=view)
        done = [i for i, name in enumerate(names) if name]
        if done and len(some) > 1:
            torch._foreach_copy_([updates[some[i]] for i in done], [u[i] for i in done])
        for i in done:
            fired[some[i]] = names[i]
    return [wd_ratio if name else 1.0 for name in fired], fired


def project_stack(
    updates: Tensor, weights: Tensor, grads: Tensor, *, delta: float, eps: float, view: str
) -> list[str]:
    """Do `project` with tensors of one shape, (K, *shape) each; return the views that fired."""
    names, left = [""] * len(weights), list(range(len(weights)))
    for name in ("channel", "layer") if view == "auto" else () if view == "off" else (view,):
        w, g = (x if len(left) == len(weights) else x[left] for x in (weights, grads))
        w = rows(w, name)
        hits = [True] * len(left)
        if view == "auto":
            limit = delta / math.sqrt(w.shape[-1])
            hits = (cosines(rows(g, name), w, eps).amax(-1) < limit).tolist()
        chosen = [i for i, hit in zip(left, hits, strict=True) if hit]
        if len(chosen) == len(weights):
            updates.copy_(tangent(rows(updates, name), w, eps).reshape(updates.shape))
        elif chosen:
            w = rows(weights[chosen], name)
            some = tangent(rows(updates[chosen], name), w, eps)
            updates[chosen] = some.reshape(len(chosen), *updates.shape[1:])
        for i in chosen:
            names[i] = name
        left = [i for i, hit in zip(left, hits, strict=True) if not hit]
        if not left:
            break
    return names


def project_piece(
    update: Tensor,
    weight: Tensor,
    grad: Tensor,
    owner: Tensor,
    *,
    delta: float,
    eps: float,
    view: str,
) -> str:
    """Do `project` with the piece of a DTensor that lies here; return the view, or ""."""
    for name in ("channel", "layer") if view == "auto" else () if view == "off" else (view,):
        channel = name == "channel"
        w, g, u = (x.flatten(1) if channel else x.reshape(1, -1) for x in (weight, grad, update))
        sums = torch.stack(
            [(g * w).sum(-1), g.square().sum(-1), w.square().sum(-1), (w * u).sum(-1)]
        )
        if not channel or any(axes(owner)):  # rows that are cut themselves
            sums = over_all(sums, owner)
        gw, gg, ww, wu = sums
        if view == "auto":
            lengths = gg.sqrt().clamp_min(eps) * ww.sqrt().clamp_min(eps)
            cosine = torch.cat([gw.abs() / lengths, gw.new_zeros(1)]).amax()
            row = numel(owner) // (owner.shape[0] if channel else 1)
            if not float(over_all(cosine, owner, largest=True)) < delta / math.sqrt(row):
                continue
        u.sub_(w * (wu / (ww.sqrt() + eps).square())[:, None])
        if u.data_ptr() != update.data_ptr():
            update.copy_(u.reshape(update.shape))
        return name
    return ""


class Projected(Together):
    """What AdamP and SGDP share: the projection, and a count of where it fired."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        if not defaults["delta"] >= 0:
            raise ValueError(f"delta must be at least 0, got {defaults['delta']}")
        in_range("wd_ratio", defaults["wd_ratio"], 0)
        super().__init__(params, {**defaults, "projection": "auto"})
        for group in self.param_groups:
            check_choice("projection", group["projection"], VIEWS)
        self._fired: dict[Tensor, str] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was copied or unpickled."""
        super().__setstate__(state)
        self._fired = {}

    def _project(
        self, group: dict[str, Any], batch: Batch, updates: list[Tensor]
    ) -> list[float | Tensor]:
        """Project in place what has two axes or more; return the share of the decay of each."""
        how = {"delta": group["delta"], "eps": group["eps"], "view": group["projection"]}
        ratios: list[float | Tensor] = [1.0] * len(updates)
        wide = [i for i, owners in enumerate(batch.owners) if owners[0].ndim > 1]
        if sharded(batch.owners[0][0]):
            for i in wide:
                owner = batch.owners[i][0]
                name = project_piece(updates[i], batch.params[i], batch.grads[i], owner, **how)
                ratios[i] = group["wd_ratio"] if name else 1.0
                self._fired[owner] = name
            return ratios
        if not batch.stacked:
            parts = ([x[i] for i in wide] for x in (updates, batch.params, batch.grads))
            found, fired = project(*parts, wd_ratio=group["wd_ratio"], **how)
            for i, ratio, name in zip(wide, found, fired, strict=True):
                ratios[i] = ratio
                self._fired[batch.owners[i][0]] = name
            return ratios
        for i in wide:
            names = project_stack(updates[i], batch.params[i], batch.grads[i], **how)
            self._fired.update(zip(batch.owners[i], names, strict=True))
            each = [group["wd_ratio"] if name else 1.0 for name in names]
            ratios[i] = each[0] if len(set(each)) == 1 else rowwise(each, updates[i])
        return ratios

    def _decay(self, batch: Batch, decay: float, ratios: list[float | Tensor]) -> None:
        """Multiply each of the parameters by 1 - decay ratio."""
        numbers = [r for r in ratios if not isinstance(r, Tensor)]
        if len(numbers) == len(ratios):
            shrink = plain([1 - decay * r for r in numbers])
            torch._foreach_mul_(batch.params, each(shrink, batch.params))
        else:
            for p, ratio in zip(batch.params, ratios, strict=True):
                p.mul_(1 - decay * ratio)

    def fired(self) -> dict[str, int]:
        """Return how many tensors were projected in the last step: by "channel", "layer", "none".

        Tensors of one axis, which are never projected, are not counted.
        """
        counts = Counter(name or "none" for name in self._fired.values())
        return {name: counts[name] for name in ("channel", "layer", "none")}


@method(
    "adamp",
    seed=19,
    paper="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    year=2020,
    buys="an effective step that does not die as norms of normalized weights grow",
    missing="weights that a sharding flattens to one axis (FSDP1, ZeRO) are not projected",
    example=lambda: AdamP([torch.nn.Parameter(torch.ones(2, 2))]),
)
class AdamP(Projected):
    """Adam whose update loses its radial part where a weight is scale-invariant.

        p = m / (sqrt(v / (1 - b2^t)) + eps)     (nesterov: b1 m + (1 - b1) g above the line)
        w <- (1 - lr weight_decay ratio) w - lr / (1 - b1^t) P(p)
    with P and ratio from `project`: for weights where max |cos(g, w)| < delta / sqrt(L), P removes
    the part along w and ratio is `wd_ratio`; elsewhere P(p) = p and ratio is 1, which is AdamW.
    A gradient of exact zeros counts as orthogonal, as in the released code.

    A group's key `projection` forces a view ("channel", "layer") or "off"; default "auto".
    """

    kept = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
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
                "delta": delta,
                "wd_ratio": wd_ratio,
                "nesterov": nesterov,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Step all tensors of the batch."""
        b1, b2 = group["betas"]
        moments(batch, (b1, b2))
        roots, sizes = adam(batch, group["lr"], (b1, b2), group["eps"])
        above = batch.kept["exp_avg"]
        if group["nesterov"]:
            above = list(torch._foreach_lerp(batch.grads, above, b1))
        updates = list(torch._foreach_div(above, roots))
        ratios = self._project(group, batch, updates)
        if group["weight_decay"]:
            self._decay(batch, group["lr"] * group["weight_decay"], ratios)
        walk(batch.params, updates, sizes)


@method("adamp", example=lambda: SGDP([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1))
class SGDP(Projected):
    """SGD with momentum whose update loses its radial part where a weight is scale-invariant.

        m <- momentum m + (1 - dampening) g;   p = m     (nesterov: g + momentum m)
        w <- (1 - lr weight_decay ratio / (1 - momentum)) w - lr P(p)
    with P and ratio as in `AdamP`. The weight decay is decoupled and divided by 1 - momentum: its
    values are not those of torch's SGD.
    """

    kept = ("momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        in_range("lr", lr, 0)
        in_range("momentum", momentum, 0, 1)
        in_range("eps", eps, 0)
        in_range("weight_decay", weight_decay, 0)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "eps": eps,
                "delta": delta,
                "wd_ratio": wd_ratio,
                "foreach": foreach,
                "maximize": maximize,
                "capturable": capturable,
            },
        )

    def update(self, group: dict[str, Any], batch: Batch) -> None:
        """Step all tensors of the batch."""
        mu, buffers = group["momentum"], batch.kept["momentum"]
        torch._foreach_mul_(buffers, each(mu, buffers))
        torch._foreach_add_(buffers, batch.grads, alpha=1 - group["dampening"])
        if group["nesterov"]:
            updates = list(torch._foreach_add(batch.grads, buffers, alpha=mu))
        else:
            updates = [buffer.clone() for buffer in buffers]
        ratios = self._project(group, batch, updates)
        if group["weight_decay"]:
            self._decay(batch, group["lr"] * group["weight_decay"] / (1 - mu), ratios)
        walk(batch.params, updates, [group["lr"]] * len(updates))
