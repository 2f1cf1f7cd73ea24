"""AdamP and SGDP against AdamW and SGD: loss, growth of norms, where it fires, time of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effuse.optim import SGDP, AdamP

from . import Claim, Evidence, Scale, proof
from ._optimizers import (
    ADAM,
    SGD,
    Task,
    _seeded,
    baselines,
    close,
    compare,
    conv,
    peers,
    speeds,
    tasks,
    train,
)


class Plain:
    """AdamP as one writes it first: a loop over tensors, the published step for each."""

    def __init__(self, params: Sequence[Tensor]):
        self.params = list(params)
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        """Step all, one after the other, with AdamP's defaults."""
        self.t += 1
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            g = p.grad
            assert g is not None
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            u = m / (v.sqrt() / math.sqrt(1 - 0.999**self.t)).add_(1e-8)
            if p.ndim > 1:
                for shape in ((p.shape[0], -1), (1, -1)):
                    pv, gv = p.reshape(shape), g.reshape(shape)
                    cos = F.cosine_similarity(gv, pv, dim=1, eps=1e-8).abs_()
                    if cos.max() < 0.1 / math.sqrt(pv.shape[1]):
                        n = pv / (pv.norm(dim=1, keepdim=True) + 1e-8)
                        uv = u.reshape(shape)
                        u = (uv - n * (n * uv).sum(1, keepdim=True)).reshape(p.shape)
                        break
            p.add_(u, alpha=-1e-3 / (1 - 0.9**self.t))


def growth(name: str, seeds: Sequence[int], steps: int) -> float:
    """Return the mean of ||w||^4 after steps of noise orthogonal to w, divided by ||w||."""
    total = 0.0
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        w = torch.nn.Parameter(torch.randn(1, 50, generator=rng, dtype=torch.float64))
        w.data /= w.data.norm()
        mu, delta = (0.0 if name == "SGD" else 0.9), (0.1 if name == "SGDP" else 0.0)
        optimizer = SGDP([w], lr=0.02, momentum=mu, delta=delta)
        for _ in range(steps):
            n, c = w.data.norm(), torch.randn(1, 50, generator=rng, dtype=torch.float64)
            u = w.data / n
            w.grad = (c - u * (u * c).sum()) / n
            optimizer.step()
        total += float(w.data.norm()) ** 4
    return total / len(seeds)


@proof("adamp")
def prove(scale: Scale) -> Evidence:
    """Walk on noise; train three networks; train one without norms; time a step."""
    steps = scale.pick(300, 3000, 3000)
    ends = {name: growth(name, scale.seeds, steps) for name in ("SGD", "SGDM", "SGDP")}
    rows: list[dict[str, Any]] = [{"walk": "norm to the fourth", "steps": steps, **ends}]
    ratio = ends["SGDM"] / ends["SGDP"]
    claims = [
        Claim(
            "a walk on noise: momentum grows the fourth power of the norm 19 times as much",
            19.0,
            ratio,
            "times, of SGD with momentum over SGDP",
            "higher",
            abs(ratio / 19 - 1) < 0.2,
            "off 19 by more than 20 %",
        )
    ]
    todo: list[Task] = tasks(scale)
    for task in todo:
        makers: dict[str, Any] = {
            **baselines(),
            "AdamP": (partial(AdamP, weight_decay=1e-2), ADAM),
            "SGDP": (partial(SGDP, momentum=0.9), SGD),
        }
        found, losses = compare(task, makers, scale.seeds)
        rows += found
        for ours, theirs in (("AdamP", "AdamW"), ("SGDP", "SGD")):
            statement = f"{ours} is no worse than {theirs}, rates tuned"
            claims.append(close(statement, losses[ours], losses[theirs], task.name, 0.0))
    first = todo[0]
    bare = Task("conv net without norms", partial(_seeded, partial(conv, False)), first.loss,
                first.judge, first.steps)  # fmt: skip
    fired = train(bare, AdamP, 1e-3, 0)["fired"]
    claims.append(
        Claim(
            "a conv net without norms: the projection never fires",
            0.0,
            fired,
            "share of its weights a step",
            "lower",
            fired == 0,
            "any weight is projected",
        )
    )
    told = speeds(
        {
            "plain": Plain,
            "AdamP": AdamP,
            "AdamP one at a time": partial(AdamP, foreach=False),
            "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
            "AdamW one at a time": partial(torch.optim.AdamW, foreach=False),
            **peers("AdamP"),
        },
        scale.pick(5, 100, 300),
    )
    rows.append({"ms_a_step_120_tensors": told})
    for other, factor, text in (
        ("plain", 1 / 3, "AdamP takes a third of a plain loop's time or less at 120 small tensors"),
        ("AdamW foreach", 1.5, "AdamP takes at most 1.5 times the step of torch's foreach AdamW"),
    ):
        bound = factor * told[other]
        claims.append(
            Claim(text, bound, told["AdamP"], "ms a step", "lower", told["AdamP"] <= bound, "more")
        )
    return Evidence(
        claims,
        rows,
        "Rates are tuned on seed 100 and on pictures that nothing is judged by. `fired` is the "
        "share of weights of two axes or more projected, the mean over the steps of the last seed.",
    )
