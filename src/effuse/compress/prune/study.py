"""Studies of layer pruning: do single errors add up, and what does each share kept cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import macs, milliseconds, units, without
from effuse.core.contracts import Call

from .choose import CostVector
from .criteria import (
    Batch,
    Given,
    answers,
    batch_of,
    call_of,
    evaluating,
    joint_error,
    mean_task_loss,
)
from .laptop_diff import LaptopDiff


@dataclass(frozen=True)
class Additivity:
    """How well single errors add up: one row a set of units.

    predicted, measured: (n,) sum of single scores, joint error. pearson, spearman: correlations.
    slope: least squares through zero of measured on predicted; 1 is exact.
    """

    predicted: Tensor
    measured: Tensor

    @property
    def pearson(self) -> float:
        """Linear correlation."""
        return _correlation(self.predicted, self.measured)

    @property
    def spearman(self) -> float:
        """Rank correlation, ties at their mean rank."""
        return _correlation(_ranks(self.predicted), _ranks(self.measured))

    @property
    def slope(self) -> float:
        """Measured over predicted."""
        return float((self.predicted * self.measured).sum() / self.predicted.square().sum())


def additivity(
    model: nn.Module,
    scores: Mapping[str, float],
    batches: Sequence[Call | Batch],
    sets: Sequence[Sequence[str]],
    *,
    task: bool = False,
) -> Additivity:
    """Compare joint errors of sets of units with the sums of their scores.

    Args:
        model: whole; in evaluation mode.
        scores: of single units by name, by the same measure.
        batches: what the scores were taken on.
        sets: names of units removed together, one row each.
        task: measure the rise of the task loss instead of the change of the answer.
    """
    rows = [batch_of(b) for b in batches]
    whole = answers(model, rows)
    base = mean_task_loss(model, rows) if task else 0.0
    predicted, measured = [], []
    for names in sets:
        predicted.append(sum(scores[n] for n in names))
        if task:
            with without(model, names):
                measured.append(mean_task_loss(model, rows) - base)
        else:
            measured.append(joint_error(model, names, rows, whole))
    return Additivity(torch.tensor(predicted).double(), torch.tensor(measured).double())


def sweep(
    model: nn.Module,
    calls: Iterable[Call | Batch],
    keeps: Sequence[float],
    transform: LaptopDiff | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each share kept: parameters, error predicted and measured, MACs, time.

    Units are scored once; the model is left as it was. An unreachable share gives a row with the
    reason as "refused".
    """
    t, batches = transform or LaptopDiff(), [batch_of(c) for c in calls]
    if not batches:
        raise ValueError("no calls: expected at least one recorded call")
    rows: list[dict[str, Any]] = []
    with evaluating(model):
        found, call = units(model, t.where), call_of(model, batches[0])
        names = [u.name for u in found]
        scores = dict(zip(names, t.criterion.scores(model, found, batches), strict=True))
        total, prices = t.cost.price(model, found, batches)
        cost = CostVector(dict(zip(names, prices, strict=True)), total - sum(prices))
        once = dataclasses.replace(t, criterion=Given(scores), cost=cost)
        for keep in keeps:
            row: dict[str, Any] = {"keep": keep}
            handle = dataclasses.replace(once, keep=keep).attach(model)
            try:
                handle.observe(batches)
            except ValueError as error:
                rows.append({**row, "refused": str(error)})
                continue
            made = handle.report()
            row |= {k: made[k] for k in ("parameters", "kept", "removed")}
            row |= {k: made[k] for k in ("predicted_error", "measured_error")}
            row |= {"macs": macs(model, call), "milliseconds": milliseconds(model, call)}
            handle.detach()
            rows.append(row)
    return rows


def _ranks(x: Tensor) -> Tensor:
    return torch.stack([((x < v).sum() + ((x == v).sum() - 1) / 2).double() for v in x])


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))
