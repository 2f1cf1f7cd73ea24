"""A-SDM, assembly and feature inheritance: a lighter denoiser with or without training.

Without training, `Inherit` reuses features of earlier steps, and `Switched` runs another network at
other steps. With training, `assemble` builds a lighter network from a teacher's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from effuse.compress.cache.base import Cached, Plan
from effuse.compress.cache.keys import (
    Adaptive,
    BackDense,
    Explicit,
    FrontDense,
    Keys,
    Rule,
    Uniform,
    Window,
)
from effuse.compress.cache.levels import Blocks, Group, Layers, Level, Named, Units
from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.method import method

__all__ = [
    "Adaptive",
    "BackDense",
    "Blocks",
    "Explicit",
    "FrontDense",
    "Group",
    "Inherit",
    "Inherited",
    "Layers",
    "Named",
    "Uniform",
    "Units",
    "Window",
]

PAPER = "Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies"


@method(
    "asdm_assembly",
    seed=29,
    paper=PAPER,
    year=2024,
    buys="fewer multiply-accumulates a picture without training",
)
@dataclass(frozen=True)
class Inherit(Transform):
    """Compute in full at key steps, inherit chosen features in between. No training, no weights.

    step i in K: all parts compute, each leaves its branch b in the store
    otherwise:   out = skip(in) + b

    level: which parts, and what of them is kept: `Blocks`, `Group`, `Layers`, `Units`, `Named`.
    keys: the key steps K: `Uniform`, `FrontDense`, `BackDense`, `Window`, `Explicit`, `Adaptive`.
    where: parts whose modules it forbids always compute.

    With `Uniform(1)`, or no parts, the original bit for bit. Clock, guidance, threads and errors:
    see `effuse.compress.cache.base`.

        with Inherit(Layers(), Uniform(3)).attach(pipe.unet):
            pipe(prompt)
    """

    level: Level = field(default_factory=Layers)
    keys: Rule = field(default_factory=Uniform)
    where: Where = everywhere
    kind = "cache"

    def __post_init__(self) -> None:
        """Check the objects."""
        if not isinstance(self.level, Level):
            raise TypeError(f"level={self.level!r}: expected an object, such as Layers(deep=2)")
        if not isinstance(self.keys, Rule):
            raise TypeError(f"keys={self.keys!r}: expected an object, such as Uniform(3)")

    def attach(self, model: nn.Module) -> Inherited:
        """Put gates on `model`; raises `TypeError` where the level does not know its kind."""
        return Inherited(self, model, None)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Inherited:
        """Put gates on the parts named in `plan` of a fresh `model`."""
        return Inherited(self, model, tuple(plan["parts"]))


class Inherited(Cached):
    """A network that inherits features; see `Inherit` and `effuse.compress.cache.base.Cached`."""

    transform: Inherit

    def __init__(self, transform: Inherit, model: nn.Module, parts: tuple[str, ...] | None):
        level = transform.level
        gates = level.gates(model, transform.where if parts is None else everywhere)
        if parts is not None:
            found = {g.part for g in gates}
            if missing := [p for p in parts if p not in found]:
                raise ValueError(
                    f"the plan names the part {missing[0]!r}, which {type(model).__name__} does "
                    "not have: expected the network that the plan was made for"
                )
            gates = [g for g in gates if g.part in parts]
        super().__init__(transform, model, transform.keys, gates, level.drops(gates))

    def plan(self) -> dict[str, Any]:
        """Return the parts by name; level and keys are fields of the transform."""
        return {"parts": list(self.parts)}

    def expected(self, steps: int) -> dict[str, int]:
        """Return what a run of `steps` calls executes, before it is run.

        `parts` executions; `macs` and `macs_full` on the first observed shape, if any. Needs key
        steps that are known beforehand: not `Adaptive`.
        """
        if not isinstance(self.rule, Keys):
            raise ValueError(f"{self.rule}: its key steps are known only after the run, see report")
        plan = Plan(self.rule, self.parts)
        out = {
            "key_calls": len(self.rule.of(steps)),
            "parts_computed": plan.runs(steps, len(self.parts)),
        }
        for cost in list(self.costs.values())[:1]:
            out |= {"macs": plan.macs(steps, cost), "macs_full": steps * cost.full}
        return out
