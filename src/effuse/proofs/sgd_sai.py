"""SGD-SaI against AdamW, SGD, and SGD with sqrt(n) for its scale: loss, and bytes of state."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from effuse.optim import SGDSaI

from . import Claim, Evidence, Scale, proof
from ._optimizers import baselines, close, compare, peers, speeds, tasks

RATES = (1e-4, 1e-3, 3e-3, 1e-2)


class BySize(SGDSaI):
    """The control: every scale is sqrt(n), whatever the gradient."""

    def update(self, group: dict[str, Any], batch: Any) -> None:
        """Set the scales, then step."""
        for owner in (p for owners in batch.owners for p in owners):
            self.state[owner].setdefault("scale", math.sqrt(owner.numel()))
        super().update(group, batch)


@proof("sgd_sai")
def prove(scale: Scale) -> Evidence:
    """Train three networks; count bytes; time a step."""
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    bytes_: dict[str, int] = {}
    for task in tasks(scale):
        makers = {**baselines(), "SGDSaI": (SGDSaI, RATES), "SGD at lr sqrt(n)": (BySize, RATES)}
        found, losses = compare(task, makers, scale.seeds)
        rows += found
        bytes_ = {row["optimizer"]: row["state_bytes"] for row in found}
        claims += [
            close("SGD-SaI is within 5 % of AdamW", losses["SGDSaI"], losses["AdamW"], task.name),
            close("SGD-SaI is below SGD", losses["SGDSaI"], losses["SGD"], task.name, 0.0),
            close(
                "the control of scale sqrt(n) is within 5 % of SGD-SaI",
                losses["SGD at lr sqrt(n)"],
                losses["SGDSaI"],
                task.name,
            ),
        ]
    claims.append(
        Claim(
            "state is half of AdamW's, but for a number a tensor",
            float(bytes_["AdamW"]),
            float(bytes_["SGDSaI"]),
            "bytes",
            "lower",
            bytes_["SGDSaI"] <= 0.51 * bytes_["AdamW"],
            "more than 51 %",
        )
    )
    timed: dict[str, Any] = {
        "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
        "SGDSaI": SGDSaI,
        "SGDSaI one at a time": partial(SGDSaI, foreach=False),
        **peers("SGDSaI"),
    }
    rows.append({"ms_a_step_120_tensors": speeds(timed, scale.pick(5, 50, 200))})
    return Evidence(
        claims,
        rows,
        "Rates are tuned on seed 100 and on pictures that nothing is judged by. Where the control "
        "is as good, the scale acts through the number of elements of a tensor.",
    )
