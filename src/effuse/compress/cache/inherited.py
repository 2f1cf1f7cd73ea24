"""A network that inherits features, whatever decides when: a level of parts and a rule."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from effuse.core.contracts import Where, everywhere

from .accounts import Plan
from .base import Cached
from .keys import Keys, Route, Rule
from .levels import Level


class Inheriting(Protocol):
    """What `Inherited` asks of its transform: which parts, how they are carried on, and where."""

    @property
    def level(self) -> Level:
        """Which parts, and what of them is kept."""

    @property
    def order(self) -> int:
        """0 inherits the last value, 1 the line through the last two."""

    @property
    def where(self) -> Where:
        """Parts whose modules it forbids always compute."""


class Inherited(Cached):
    """A network with gates of a level on it; see `effuse.compress.cache.base.Cached`.

    Args:
        transform: a transform with level, order and where.
        model: to put the gates on.
        rule: when to compute.
        parts: those of a plan, all of which must be there; None takes what `where` allows.

    Raises:
        ValueError: the network has no part of the level, or not one that the plan names.
    """

    def __init__(
        self,
        transform: Any,
        model: nn.Module,
        rule: Rule,
        parts: tuple[str, ...] | None = None,
    ):
        made: Inheriting = transform
        level = made.level
        gates = level.gates(model, made.where if parts is None else everywhere)
        if parts is None and not gates and not level.gates(model, everywhere):
            raise ValueError(f"{level}: {type(model).__name__} has no such part to inherit")
        if parts is not None:
            found = {g.part for g in gates}
            if missing := [p for p in parts if p not in found]:
                raise ValueError(
                    f"the plan names the part {missing[0]!r}, which {type(model).__name__} does "
                    "not have: expected the network that the plan was made for"
                )
            gates = [g for g in gates if g.part in parts]
        super().__init__(transform, model, rule, gates, level.drops(gates), made.order)

    def plan(self) -> dict[str, Any]:
        """Return the parts by name; level and keys are fields of the transform."""
        return {"parts": list(self.parts)}

    def expected(self, steps: int) -> dict[str, int]:
        """Return what a run of `steps` calls executes, before it is run.

        `parts` executions; `macs` and `macs_full` on the first observed shape, if any. Needs key
        steps that are known beforehand: not `Adaptive`.
        """
        rule = self.rule
        if isinstance(rule, Route):
            rule.check(steps - 1, rule.levels[steps - 1] if rule.levels else 0.0)
            short = rule.only(range(steps))
            out = {"parts_computed": steps * len(self.parts) - short.count()}
            for cost in list(self.costs.values())[:1]:
                full = steps * cost.full
                out |= {"macs": full - short.saved(cost.saved), "macs_full": full}
            return out
        if not isinstance(rule, Keys):
            raise ValueError(f"{rule}: its key steps are known only after the run, see report")
        plan = Plan(rule, self.parts)
        out = {
            "key_calls": len(rule.of(steps)),
            "parts_computed": plan.runs(steps, len(self.parts)),
        }
        for cost in list(self.costs.values())[:1]:
            out |= {"macs": plan.macs(steps, cost), "macs_full": steps * cost.full}
        return out
