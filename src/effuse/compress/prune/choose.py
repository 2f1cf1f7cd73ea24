"""What units cost, and which of them to keep under a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from effuse.compress.units import (
    Unit,
    macs,
    milliseconds,
    parameters,
    unit_macs,
    unit_milliseconds,
)
from effuse.ops import budget

from .criteria import Batch, answers, call_of, joint_error

# ---- what a unit costs


class Cost(ABC):
    """Prices units. A frozen dataclass."""

    @abstractmethod
    def price(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> tuple[float, list[float]]:
        """Return the cost of the whole network and of each unit."""


@dataclass(frozen=True)
class Parameters(Cost):
    """Numbers of parameters."""

    def price(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> tuple[float, list[float]]:
        """See `Cost.price`."""
        return float(parameters(model)), [float(u.params) for u in units]


@dataclass(frozen=True)
class Macs(Cost):
    """Multiply-accumulates of the first call observed, exact."""

    def price(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> tuple[float, list[float]]:
        """See `Cost.price`."""
        call = call_of(model, batches[0])
        return float(macs(model, call)), [float(c) for c in unit_macs(model, units, call)]


@dataclass(frozen=True)
class Milliseconds(Cost):
    """Measured time of the first call observed, on this machine; medians of `repeats` pairs."""

    repeats: int = 9

    def price(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> tuple[float, list[float]]:
        """See `Cost.price`."""
        call = call_of(model, batches[0])
        saved = unit_milliseconds(model, units, call, self.repeats)
        return milliseconds(model, call, self.repeats), saved


@dataclass(frozen=True)
class CostVector(Cost):
    """Costs found elsewhere: of each unit by name, and of all that cannot be removed."""

    values: Mapping[str, float] = field(default_factory=dict)
    rest: float = 0.0

    def price(
        self, model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch]
    ) -> tuple[float, list[float]]:
        """See `Cost.price`."""
        missing = [u.name for u in units if u.name not in self.values]
        if missing:
            raise ValueError(f"no cost for {missing[0]!r}: expected one for each of the units")
        mine = [float(self.values[u.name]) for u in units]
        for u, cost in zip(units, mine, strict=True):
            if not 0 <= cost < math.inf:
                raise ValueError(f"cost of {u.name!r} is {cost}: expected at least 0, and finite")
        return self.rest + sum(mine), mine


# ---- which units to keep


@dataclass(frozen=True)
class Problem:
    """What a selector solves: keep sum of scores high with sum of costs at most `capacity`."""

    model: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Batch]
    scores: Sequence[float]
    costs: Sequence[float]
    capacity: float
    required: Sequence[int]


class Selector(ABC):
    """Chooses units to keep. A frozen dataclass."""

    @abstractmethod
    def keep(self, problem: Problem) -> list[int]:
        """Return the rising indices of the units that stay."""


@dataclass(frozen=True)
class Exact(Selector):
    """The knapsack's optimum by dynamic programming; see `effuse.ops.budget.exact`.

    unit: of the table, in units of cost; None takes the finest that fits.
    """

    unit: float | None = None

    def keep(self, problem: Problem) -> list[int]:
        """See `Selector.keep`."""
        p = problem
        return budget.exact(p.scores, p.costs, p.capacity, unit=self.unit, required=p.required)


@dataclass(frozen=True)
class Greedy(Selector):
    """By falling score / cost while it fits."""

    def keep(self, problem: Problem) -> list[int]:
        """See `Selector.keep`."""
        p = problem
        return budget.greedy(p.scores, p.costs, p.capacity, required=p.required)


@dataclass(frozen=True)
class Exhaustive(Selector):
    """The set with the least *measured* joint error, among all of at most 16 units.

    Only sets to which no unit can be put back without breaking the budget are measured.
    """

    def keep(self, problem: Problem) -> list[int]:
        """See `Selector.keep`."""
        p, n = problem, len(problem.units)
        if n > 16:
            raise ValueError(f"{n} units: expected at most 16 for an exhaustive search")
        whole, best = answers(p.model, p.batches), (math.inf, list(range(n)))
        for mask in range(1 << n):
            kept = [i for i in range(n) if mask >> i & 1]
            left = p.capacity - sum(p.costs[i] for i in kept)
            out = [i for i in range(n) if not mask >> i & 1]
            if left < 0 or any(p.costs[i] <= left for i in out) or set(p.required) & set(out):
                continue
            error = joint_error(p.model, [p.units[i].name for i in out], p.batches, whole)
            best = min(best, (error, kept))
        return best[1]
