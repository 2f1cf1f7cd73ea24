"""Layer pruning in one shot: score each unit alone, keep the best by knapsack, heal once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import (
    Removal,
    Unit,
    macs,
    milliseconds,
    parameters,
    remove,
    units,
    without,
)
from effuse.core.contracts import Applied, Call, Objective, Transform, Where, everywhere
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops import budget

from .choose import (
    Cost,
    CostVector,
    Exact,
    Exhaustive,
    Greedy,
    Macs,
    Milliseconds,
    Parameters,
    Problem,
    Selector,
)
from .criteria import (
    Batch,
    BlockInfluence,
    Criterion,
    Given,
    Magnitude,
    OutputError,
    Random,
    TaskLoss,
    Taylor,
    TextScoreDrop,
    answers,
    joint_error,
    mean_task_loss,
)

__all__ = [
    "Additivity",
    "BlockInfluence",
    "CostVector",
    "Criterion",
    "Exact",
    "Exhaustive",
    "Given",
    "Greedy",
    "LaptopDiff",
    "Macs",
    "Magnitude",
    "Milliseconds",
    "OutputError",
    "Parameters",
    "Pruned",
    "Random",
    "TaskLoss",
    "Taylor",
    "TextScoreDrop",
    "additivity",
    "sweep",
]

# ---- the transform


@method(
    "laptop_diff",
    seed=20,
    paper="LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models",
    year=2024,
    buys="a network with any share of its layers gone, chosen by itself, in one pass",
    missing="the paper's feature normalizer is not public, ours is the teacher's mean square; six "
    "numbers per channel of a PixArt block's modulation table stay when its layers go",
)
@dataclass(frozen=True)
class LaptopDiff(Transform):
    """Removes the layers that change the network's answer least, for a share of parameters kept.

    s(l) = E||eps without l - eps||^2                       one forward a unit, on recorded calls
    min sum_{l in R} s(l)   subject to   cost(all) - sum_{l in R} cost(l) <= keep cost(all)

    That joint errors add up, E||eps(R) - eps||^2 ~ sum s(l), is what makes one shot enough: single
    changes are small and nearly uncorrelated. `report()` says how far off it is; two branches that
    double each other are where it fails (the joint error is twice what is predicted).

    keep: fraction of the network's cost that stays, (0, 1]; 1 removes nothing. solver: `Exact`,
    `Greedy` or `Exhaustive`. cost: `Parameters`, `Macs`, `Milliseconds` or a `CostVector`.
    criterion: `OutputError` is the paper's. floors: fraction of the units of a kind that stays
    whatever they score, {"attn2": 0.5}: without cross-attention a network forgets its prompt though
    the error looks small. where: units that may go.

    Scores depend on the law of t and on guidance: the paper's are taken with t uniform and without
    guidance, as `effuse.compress.calibrate.uniform_calls` gives them.
    """

    keep: float = 0.7
    solver: Selector = field(default_factory=Exact)
    cost: Cost = field(default_factory=Parameters)
    criterion: Criterion = field(default_factory=OutputError)
    floors: Mapping[str, float] = field(default_factory=dict)
    where: Where = everywhere
    kind = "prune"
    calibrated = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fraction("keep", self.keep)
        for name, share in self.floors.items():
            check_fraction(f"floors[{name!r}]", share, zero=True)

    def attach(self, model: nn.Module) -> Pruned:
        """Look for units; nothing is removed before `observe`.

        Raises:
            ValueError: there are no units, or too few for this `keep`; says which is the least.
        """
        found = units(model, self.where)
        if isinstance(self.cost, Parameters):
            costs = [float(u.params) for u in found]
            _room(self, found, float(parameters(model)), costs, [0.0] * len(found))
        return Pruned(self, model, found)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Pruned:
        """Remove on a fresh `model` the units that a plan names."""
        handle = Pruned(self, model, units(model))
        handle.remove(plan["removed"])
        handle.found = {**handle.found, **plan.get("found", {})}
        return handle


def _room(
    transform: LaptopDiff,
    found: Sequence[Unit],
    total: float,
    costs: Sequence[float],
    scores: Sequence[float],
) -> tuple[float, list[int]]:
    """Return what units may cost in all, and which must stay; check that it can be done."""
    if transform.floors and not found:
        raise ValueError("floors: this network has no units of any kind")
    must = budget.floors(scores, [u.kind for u in found], dict(transform.floors))
    fixed = total - sum(costs)
    least = (fixed + sum(costs[i] for i in must)) / total
    room = transform.keep * total - fixed
    if transform.keep < least - 1e-12:
        raise ValueError(
            f"keep={transform.keep:g}: expected at least {least:.4f}; {1 - least:.1%} of this "
            f"network is the most that its {len(found)} removable units allow"
        )
    return room, must


class Pruned(Applied):
    """A network without some of its units, and what is known of each.

    units: those found when it was attached, in order. scores, costs: one a unit, once observed.
    removed: names of those that are gone.
    """

    transform: LaptopDiff

    def __init__(self, transform: LaptopDiff, model: nn.Module, found: Sequence[Unit]):
        self.transform, self.model, self.units = transform, model, list(found)
        self.total = parameters(model)
        self.scores: list[float] = []
        self.costs: list[float] = []
        self.removed: list[str] = []
        self.found: dict[str, Any] = {}
        self.finalized = False
        self._removal: Removal | None = None
        self._unhealed: dict[str, Tensor] = {}

    def observe(self, calls: Iterable[Call | Batch]) -> None:
        """Score every unit on recorded calls, choose, and remove.

        Args:
            calls: calls of this network, or batches with a `call` and a `target`. Observing again
                begins anew with the whole network.

        Raises:
            ValueError: no calls, `keep` out of reach, or a criterion without what it needs.
            FloatingPointError: a score is not finite; names the unit.
        """
        self._check()
        batches = [_as_batch(c) for c in calls]
        if not batches:
            raise ValueError("no calls to observe: expected at least one recorded call")
        if self._unhealed:
            raise ValueError("it has been healed already: attach anew to the original")
        self._undo()
        t, model = self.transform, self.model
        modes = {m: m.training for m in model.modules()}
        model.eval()
        try:
            self.scores = t.criterion.scores(model, self.units, batches)
            for u, s in zip(self.units, self.scores, strict=True):
                if not math.isfinite(s):
                    raise FloatingPointError(f"unit {u.name}: its score is {s}")
            total, self.costs = t.cost.price(model, self.units, batches)
            room, must = _room(t, self.units, total, self.costs, self.scores)
            kept = set(range(len(self.units)))
            if sum(self.costs) > room * (1 + 1e-12):
                problem = Problem(model, self.units, batches, self.scores, self.costs, room, must)
                kept = set(t.solver.keep(problem))
            names = [u.name for i, u in enumerate(self.units) if i not in kept]
            predicted = sum(s for i, s in enumerate(self.scores) if i not in kept)
            measured = joint_error(model, names, batches) if names else 0.0
        finally:
            for m, mode in modes.items():
                m.training = mode
        self.remove(names)
        self.found = {"predicted_error": float(predicted), "measured_error": measured}

    def remove(self, names: Sequence[str]) -> None:
        """Take these units away, whatever they score; on top of those already gone."""
        self._check()
        if self._removal is not None:
            raise ValueError("units have been removed already: detach first")
        self._removal = remove(self.model, names)
        self.removed = list(names)

    def objective(self, teacher: nn.Module) -> Objective | None:
        """Return the normalized feature distillation from `teacher`; None if nothing was removed.

        Healing changes weights in place; `detach` puts those of this moment back.
        """
        if not self.removed:
            return None
        from effuse.distill.features import NormalizedFeatureDistillation

        if not self._unhealed:
            self._unhealed = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        return NormalizedFeatureDistillation(teacher, self.model)

    def report(self) -> dict[str, Any]:
        """Return counted parameters, the units that are gone, and the errors, json-able."""
        kinds = [u.kind for u in self.units if u.name in set(self.removed)]
        return {
            "parameters_before": self.total,
            "parameters": parameters(self.model),
            "kept": parameters(self.model) / self.total,
            "units": len(self.units),
            "removed": list(self.removed),
            "removed_by_kind": {k: kinds.count(k) for k in sorted(set(kinds))},
            **self.found,
        }

    def plan(self) -> dict[str, Any]:
        """Return the names of the units that are gone, and what was found."""
        return {"removed": list(self.removed), "found": dict(self.found)}

    def detach(self) -> None:
        """Put all units back, and the weights as they were before healing."""
        self._check()
        if self._unhealed:
            self.model.load_state_dict(self._unhealed)
            self._unhealed = {}
        self._undo()

    def finalize(self) -> None:
        """Give up the way back and its memory."""
        self._check()
        if self._removal is not None:
            self._removal.forget()
        self._unhealed = {}
        self.finalized = True

    def _undo(self) -> None:
        if self._removal is not None:
            self._removal.undo()
        self._removal, self.removed, self.found = None, [], {}

    def _check(self) -> None:
        if self.finalized:
            raise RuntimeError("it was finalized, the units are gone for good: load the original")


def _as_batch(call: Call | Batch) -> Batch:
    return call if isinstance(call, Mapping) else {"call": call}


# ---- studies


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
    rows = [_as_batch(b) for b in batches]
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
    import dataclasses

    t, batches = transform or LaptopDiff(), [_as_batch(c) for c in calls]
    found = units(model, t.where)
    was = model.training
    model.eval()
    values = dict(
        zip((u.name for u in found), t.criterion.scores(model, found, batches), strict=True)
    )
    total, prices = t.cost.price(model, found, batches)
    listed = dict(zip((u.name for u in found), prices, strict=True))
    cost: Cost = CostVector(listed, total - sum(prices))
    rows: list[dict[str, Any]] = []
    for keep in keeps:
        row: dict[str, Any] = {"keep": keep}
        try:
            handle = dataclasses.replace(t, keep=keep, criterion=Given(values), cost=cost).attach(
                model
            )
            handle.observe(batches)
        except ValueError as error:
            rows.append({**row, "refused": str(error)})
            continue
        made = handle.report()
        call = batches[0]["call"]
        row |= {k: made[k] for k in ("parameters", "kept", "removed")}
        row |= {k: made[k] for k in ("predicted_error", "measured_error")}
        row |= {"macs": macs(model, call), "milliseconds": milliseconds(model, call)}
        handle.detach()
        rows.append(row)
    model.train(was)
    return rows


def _ranks(x: Tensor) -> Tensor:
    return torch.stack([((x < v).sum() + ((x == v).sum() - 1) / 2).double() for v in x])


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))
