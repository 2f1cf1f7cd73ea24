"""DiffGrad beside Adam, AdamW, SGD and Adam at half the rate; how far its friction is from 1/2."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from effuse.optim import DiffGrad

from . import Claim, Evidence, Scale, proof
from ._optimizers import ADAM, baselines, close, compare, peers, speeds, tasks, train


def half(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return Adam at half the rate."""
    return torch.optim.Adam(params, lr=lr / 2)


def frictions(optimizer: DiffGrad) -> torch.Tensor:
    """Return sigmoid(|g_before - g|) of every weight, the gradient left from the last step."""
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [optimizer.state[p]["last_change"] for p in owners if p in optimizer.state]
    return torch.cat([part.flatten() for part in parts]).abs().sigmoid()


class Watched(DiffGrad):
    """Keeps the last change of the gradient to look at."""

    def update(self, group: dict[str, Any], batch: Any) -> None:
        """Note the change, then step."""
        change = torch._foreach_sub(batch.grads, batch.kept["previous_grad"])
        for owner, x in batch.split(change):
            self.state[owner]["last_change"] = x
        super().update(group, batch)


@proof("diffgrad")
def prove(scale: Scale) -> Evidence:
    """Train three networks, and look at the friction of the trained."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for task in tasks(scale):
        makers = {
            **baselines(),
            "Adam": (torch.optim.Adam, ADAM),
            "Adam at half the rate": (half, ADAM),
            "DiffGrad": (DiffGrad, ADAM),
        }
        found, losses = compare(task, makers, scale.seeds)
        rows += found
        lr = found[-1]["lr"]
        xi = frictions(train(task, Watched, lr, 0)["optimizer"]).double()
        near = float((xi < 0.51).double().mean())
        rows.append({"task": task.name, "friction": float(xi.mean()), "below_0.51": near})
        statement = "DiffGrad is no worse than Adam, rates tuned"
        claims.append(close(statement, losses["DiffGrad"], losses["Adam"], task.name, 0.0))
        same = train(task, half, lr, 0)["losses"].double().mean()
        own = losses["DiffGrad"][0]
        claims.append(
            Claim(
                f"{task.name}: DiffGrad differs from Adam at half its rate by more than 1 %",
                float(same),
                float(own),
                "loss held out, one seed, one rate",
                "lower",
                abs(float(own / same) - 1) > 0.01,
                "the same loss, as where the friction is 0.5",
            )
        )
    timed: dict[str, Any] = {
        "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        "DiffGrad": DiffGrad,
        "DiffGrad one at a time": partial(DiffGrad, foreach=False),
        **peers("DiffGrad"),
    }
    rows.append({"ms_a_step_120_tensors": speeds(timed, scale.pick(5, 50, 200))})
    return Evidence(
        claims,
        rows,
        "Rates are tuned on seed 100 and on pictures that nothing is judged by. The friction is "
        "of all weights at the last step; below 0.51 DiffGrad is Adam at half the rate within 2 %.",
    )
