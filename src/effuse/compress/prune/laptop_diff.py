"""Layer pruning in one shot: score each unit alone, keep the best by knapsack, heal once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from effuse.compress.units import Removal, Unit, freed, parameters, remove, units
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
    batch_of,
    evaluating,
    joint_error,
)

__all__ = [
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
]

# ---- the transform


@method(
    "laptop_diff",
    seed=20,
    paper="LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models",
    year=2024,
    buys="a network with any share of its layers gone, chosen by itself, in one pass",
    missing="the paper's feature normalizer is not public, ours is the teacher's mean square; what "
    "units free together is put to use after the knapsack, not within it; six numbers per channel "
    "of a PixArt block's modulation table stay when its layers go; the second attention of SD3.5 "
    "medium is not a unit; PickScore and days of retraining on SDXL have not been tried",
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

    Parameters that serve two units only (the label embedding of a DiT block) go with the last one;
    what this frees beyond need puts the best of the removed units back.

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
    targeted = True

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
        if not found and (self.keep < 1 or self.floors):
            raise ValueError(
                f"{type(model).__name__} has no removable units that `where` allows: expected "
                "residual blocks of diffusers, or `effuse.nn.residual.Residual` in a network of "
                "your own"
            )
        if isinstance(self.cost, Parameters):
            costs = [float(u.params) for u in found]
            # scores are not known yet: the cheapest units would do for the floors
            _room(self, model, found, float(parameters(model)), costs, [-c for c in costs])
        return Pruned(self, model, found)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Pruned:
        """Remove on a fresh `model` the units that a plan names."""
        handle = Pruned(self, model, units(model))
        handle.remove(plan["removed"])
        handle.found = {**handle.found, **plan.get("found", {})}
        return handle


def _room(
    transform: LaptopDiff,
    model: nn.Module,
    found: Sequence[Unit],
    total: float,
    costs: Sequence[float],
    scores: Sequence[float],
) -> tuple[float, list[int]]:
    """Return what units may cost in all, and which must stay; check that it can be done."""
    must = budget.floors(scores, [u.kind for u in found], dict(transform.floors))
    stays, fixed = sum(costs[i] for i in must), total - sum(costs)
    lowest = fixed + stays
    if isinstance(transform.cost, Parameters):
        lowest = total - freed(model, [u.name for i, u in enumerate(found) if i not in must])
    if transform.keep * total < lowest * (1 - 1e-12):
        least = math.ceil(1e4 * lowest / total) / 1e4
        raise ValueError(
            f"keep={transform.keep:g}: expected at least {least:.4f}; {1 - least:.1%} of this "
            f"network is the most that its {len(found)} removable units allow"
        )
    return max(transform.keep * total - fixed, stays), must


def _refilled(
    model: nn.Module, found: Sequence[Unit], scores: Sequence[float], kept: set[int], limit: float
) -> set[int]:
    """Return `kept` and what may stay beside it with at most `limit` parameters, best first.

    Units that go together may free more than the sum of their own, which is all a knapsack sees.
    Those worth nothing stay out.
    """
    total = parameters(model)
    gone = [i for i in range(len(found)) if i not in kept and scores[i] > 0]
    for i in sorted(gone, key=lambda i: (-scores[i], i)):
        more = {*kept, i}
        if total - freed(model, [u.name for j, u in enumerate(found) if j not in more]) <= limit:
            kept = more
    return kept


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
            FloatingPointError: a call, the answer to it or a score is not finite; names the call
                and its argument, the first bad layer, or the unit.
        """
        self._check()
        batches = [batch_of(c) for c in calls]
        if not batches:
            raise ValueError("no calls to observe: expected at least one recorded call")
        if self._unhealed:
            raise ValueError("it has been healed already: attach anew to the original")
        self._undo()
        t, model = self.transform, self.model
        with evaluating(model):
            whole = answers(model, batches)
            self.scores = t.criterion.scores(model, self.units, batches)
            for u, s in zip(self.units, self.scores, strict=True):
                if not math.isfinite(s):
                    raise FloatingPointError(f"unit {u.name}: its score is {s}")
                if s < 0:
                    raise ValueError(f"unit {u.name}: its score is {s}, expected at least 0")
            total, self.costs = t.cost.price(model, self.units, batches)
            room, must = _room(t, model, self.units, total, self.costs, self.scores)
            kept = set(range(len(self.units)))
            if sum(self.costs) > room * (1 + 1e-12):
                problem = Problem(model, self.units, batches, self.scores, self.costs, room, must)
                kept = set(t.solver.keep(problem))
                if isinstance(t.cost, Parameters):
                    kept = _refilled(model, self.units, self.scores, kept, t.keep * total)
            names = [u.name for i, u in enumerate(self.units) if i not in kept]
            predicted = sum(s for i, s in enumerate(self.scores) if i not in kept)
            measured = joint_error(model, names, batches, whole) if names else 0.0
        self.remove(names)
        self.found = {"predicted_error": float(predicted), "measured_error": measured}

    def remove(self, names: Sequence[str]) -> None:
        """Take these units away, whatever they score."""
        self._check()
        if self._removal is not None:
            raise ValueError("units have been removed already: detach first")
        self._removal = remove(self.model, names)
        self.removed = list(names)

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective | None:
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
