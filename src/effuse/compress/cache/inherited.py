"""A network that inherits features, whatever decides when: a level of parts and a rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effuse.bridge.pipeline import Walk
from effuse.core import sample
from effuse.core.contracts import Where, everywhere

from .accounts import Accounts, Cost, Plan
from .base import Cached
from .keys import Keys, Route, Rule, Uniform
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


class Routed(Inherited):
    """A network whose parts inherit by a `Route` that was found for it; before that all compute.

    Args:
        transform: as of `Inherited`.
        model: to put the gates on.
        plan: of an earlier one, to bring its parts and route back.
    """

    def __init__(self, transform: Any, model: nn.Module, plan: Mapping[str, Any] | None = None):
        if plan is None:
            super().__init__(transform, model, Uniform(1))
            return
        table = plan["route"]
        rule: Rule = Uniform(1)
        if table is not None:
            rule = Route(table["steps"], table["inherits"], tuple(table["levels"]))
        super().__init__(transform, model, rule, tuple(plan["parts"]))

    @property
    def route(self) -> Route | None:
        """The route that is followed; None before there is one."""
        return self.rule if isinstance(self.rule, Route) else None

    def follow(self, rule: Rule) -> None:
        """Decide by `rule` from the next run on."""
        odd = set(rule.inherits) - set(self.parts) if isinstance(rule, Route) else set()
        if odd:
            raise ValueError(
                f"the route names {min(odd)!r}: expected parts of {type(self.model).__name__} at "
                f"{self.transform.level}"  # type: ignore[attr-defined]
            )
        self.rule = rule
        self.reset()

    def plan(self) -> dict[str, Any]:
        """Return the parts and the route, as plain data."""
        route = self.route
        return {
            "parts": list(self.parts),
            "route": route
            and {
                "steps": route.steps,
                "inherits": {part: list(at) for part, at in route.inherits.items()},
                "levels": list(route.levels),
            },
        }

    def report(self) -> dict[str, Any]:
        """Return the counts of `Cached.report`, and what a run by the route will take.

        inherited_share: of all (step, part) pairs. macs_share: of the multiply-accumulates of a
        full run, once a call has been observed.
        """
        out, route = super().report(), self.route
        if route is not None:
            out["inherited_share"] = route.count() / (route.steps * len(self.parts))
            for cost in list(self.costs.values())[:1]:
                out["macs_share"] = 1 - route.saved(cost.saved) / (route.steps * cost.full)
        return out

    @torch.no_grad()
    def survey(self, walk: Walk) -> tuple[Tensor, tuple[float, ...], Cost]:
        """Sample in full; return the sample, the timestep of each step and what a call costs.

        Raises:
            ValueError: the solver calls the network at more levels than it has steps.
        """
        seen: dict[int, float] = {}

        def hear(step: int, level: float, part: str, value: Any) -> None:
            seen.setdefault(step, level)

        calls: list[Any] = []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not calls:
                calls.append((args, dict(kwargs)))

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        with self.following(Uniform(1)):
            self.heard = hear
            try:
                x = sample(*walk, rng=torch.Generator().manual_seed(0))
            finally:
                self.heard = None
                hook.remove()
            steps = len(walk.times) - 1
            if len(seen) != steps:
                raise ValueError(
                    f"{type(walk.solver).__name__} calls the network at {len(seen)} levels in "
                    f"{steps} steps: expected a solver with one call a step, such as DDIM"
                )
            if not self.costs:
                self.observe(calls)
        return x, tuple(seen[i] for i in range(steps)), next(iter(self.costs.values()))

    def restart(self) -> None:
        """Begin to count anew; what calls cost stays known."""
        costs, self.accounts = self.accounts.costs, Accounts(self.parts)
        self.accounts.costs = costs

    @contextlib.contextmanager
    def following(self, rule: Rule) -> Iterator[None]:
        """Follow another rule, and blend nothing, while inside."""
        kept, mixture = self.rule, self.mixture
        self.rule, self.mixture = rule, None
        self.reset()
        try:
            yield
        finally:
            self.rule, self.mixture = kept, mixture
            self.reset()

    def run(self, walk: Walk, route: Rule, seed: int = 0) -> Tensor:
        """Sample by a route; `seed` is of the noise of a stochastic solver."""
        with self.following(route):
            return sample(*walk, rng=torch.Generator().manual_seed(seed))
