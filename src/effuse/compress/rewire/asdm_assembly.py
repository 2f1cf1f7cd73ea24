"""A-SDM, assembly and feature inheritance: a lighter denoiser with or without training.

Without training, `Inherit` reuses features of earlier steps, and `Switched` runs another network at
other steps. With training, `assemble` builds a lighter network from a teacher's parts, which
`incubate` heals part by part.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from effuse.compress.cache.inherited import Inherited
from effuse.compress.cache.keys import (
    Adaptive,
    BackDense,
    Explicit,
    FrontDense,
    Route,
    Rule,
    Uniform,
    Window,
)
from effuse.compress.cache.levels import Blocks, Group, Layers, Level, Named, Rest, Units
from effuse.core.contracts import Applied, Objective, Transform, Where, everywhere
from effuse.core.errors import check_choice, check_fraction
from effuse.core.method import method
from effuse.nn.cond_conv import CondConv2d, Router

from .stages import Kept, check_plan, cut, even_plan, stage_sizes, taps, uncut

__all__ = [
    "Adaptive",
    "Assemble",
    "BackDense",
    "Blocks",
    "Copies",
    "Explicit",
    "FrontDense",
    "Group",
    "Inherit",
    "Inherited",
    "Layers",
    "Named",
    "Removed",
    "Rest",
    "Route",
    "Uniform",
    "Units",
    "Window",
    "assemble",
]

PAPER = "Accelerating Stable Diffusion through Model Assembly and Feature Inheritance Strategies"


@method(
    "asdm_assembly",
    seed=29,
    paper=PAPER,
    year=2024,
    buys="fewer multiply-accumulates a picture without training",
    missing="Only the abstract was at hand: sampling modes, the router and the order of incubation "
    "are reconstructions. A stage of one layer cannot be shortened, its skip needs a taker. The "
    "router of an assembled network does not see the time embedding (CondConv2d alone can). "
    "Switched has no recipe entry; transforms on its networks are saved when it is told of them. A "
    "broken-off run followed by a lower start with equal conditions needs reset(). Windows that "
    "change places from step to step inherit from each other.",
)
@dataclass(frozen=True)
class Inherit(Transform):
    """Compute in full at key steps, inherit chosen features in between. No training, no weights.

    step i in K: all parts compute, each leaves its branch b in the store
    otherwise:   out = skip(in) + b

    level: which parts, and what of them is kept: `Blocks`, `Group`, `Rest`, `Layers`, `Units`,
        `Named`.
    keys: the key steps K: `Uniform`, `FrontDense`, `BackDense`, `Window`, `Explicit`, `Adaptive`;
        or a `Route`, which has key steps for each part.
    order: 0 inherits the last value, the paper's; 1 the line through the last two, in the timestep
        (TaylorSeer's first order), for twice the memory and no computation to speak of.
    where: parts whose modules it forbids always compute.

    With `Uniform(1)`, or where `where` forbids all, the original bit for bit. Clock, guidance,
    threads and errors: see `effuse.compress.cache.base`.

        with Inherit(Layers(), Uniform(3)).attach(pipe.unet):
            pipe(prompt)
    """

    level: Level = field(default_factory=Layers)
    keys: Rule = field(default_factory=Uniform)
    order: int = 0
    where: Where = everywhere
    kind = "cache"

    def __post_init__(self) -> None:
        """Check the objects."""
        if not isinstance(self.level, Level):
            raise TypeError(f"level={self.level!r}: expected an object, such as Layers(deep=2)")
        if not isinstance(self.keys, Rule):
            raise TypeError(f"keys={self.keys!r}: expected an object, such as Uniform(3)")
        check_choice("order", self.order, (0, 1))

    def attach(self, model: nn.Module) -> Inherited:
        """Put gates on `model`.

        Raises:
            TypeError: the level does not know this kind of network.
            ValueError: the network has no part of the level.
        """
        return Inherited(self, model, self.keys)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Inherited:
        """Put gates on the parts named in `plan` of a fresh `model`."""
        return Inherited(self, model, self.keys, tuple(plan["parts"]))


# ---- assembly: a lighter network from a teacher's parts


class Experts(ABC):
    """Where the kernels beside the kept one come from. A frozen dataclass."""

    router: Router

    @abstractmethod
    def convs(self, kept: nn.Conv2d, removed: Sequence[nn.Conv2d]) -> list[nn.Conv2d]:
        """Return the kept convolution and the others."""


@dataclass(frozen=True)
class Removed(Experts):
    """Kernels of the removed layers of the same stage, those of equal shape."""

    router: Router = "sigmoid"

    def convs(self, kept: nn.Conv2d, removed: Sequence[nn.Conv2d]) -> list[nn.Conv2d]:
        """See `Experts.convs`."""
        return [kept, *(c for c in removed if c.weight.shape == kept.weight.shape)]


@dataclass(frozen=True)
class Copies(Experts):
    """`count` kernels in all: the kept one and copies, with normal noise of `noise` times its std.

    Without noise the kernels would learn alike for ever.
    """

    count: int = 2
    noise: float = 0.01
    router: Router = "sigmoid"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.count < 2 or self.noise < 0:
            raise ValueError(
                f"count={self.count}, noise={self.noise}: expected at least two kernels, noise >= 0"
            )

    def convs(self, kept: nn.Conv2d, removed: Sequence[nn.Conv2d]) -> list[nn.Conv2d]:
        """See `Experts.convs`."""
        rng = torch.Generator().manual_seed(self.seed)
        out = [kept]
        for _ in range(self.count - 1):
            other = copy.deepcopy(kept)
            weight = other.weight.data
            noise = torch.randn(weight.shape, generator=rng).to(weight)
            weight += self.noise * weight.std() * noise
            out.append(other)
        return out


@method("asdm_assembly", example=lambda: Assemble(keep=0.5))
@dataclass(frozen=True)
class Assemble(Transform):
    """Keep some layers of each stage of the network and drop the rest; weights are inherited.

    keep: share of the layers of each stage, evenly spread; 1 keeps all.
    kept: or the layers themselves, by stage: {"down_blocks.0": (0,), "up_blocks.1": (0, 2)}.
    middle: whether the middle block of a UNet stays.
    experts: makes convolutions of shortened stages conditional, with several kernels (ME-CondConv):
        `Removed()` or `Copies()`; they begin as the kept kernel, bit for bit. `None`: plain ones.
    where: stages whose layers it forbids stay whole (both of a mirrored pair).

    Without experts the result is a plain diffusers network with a shorter config. It needs healing:
    `Applied.objective` gives the joint stage, `incubate` the stages before it.
    """

    keep: float = 0.5
    kept: Kept | None = None
    middle: bool = True
    experts: Experts | None = None
    where: Where = everywhere
    kind = "prune"

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("keep", self.keep)
        if self.experts is not None and not isinstance(self.experts, Experts):
            raise TypeError(f"experts={self.experts!r}: expected an object, such as Removed()")
        if self.kept is not None:
            try:
                rows = {k: tuple(v) for k, v in self.kept.items()}
            except (AttributeError, TypeError):
                raise TypeError(
                    f"kept={self.kept!r}: expected layers by stage, {{'down_blocks.0': (0,)}}"
                ) from None
            object.__setattr__(self, "kept", rows)

    def choose(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the layers that stay, by stage."""
        if self.kept is not None:
            return dict(self.kept)
        plan = even_plan(model, self.keep, self.middle)
        depth = sum(name.startswith("down_blocks") for name in plan)
        for name in list(plan):
            if not self.where(name, model.get_submodule(name)):
                side, _, i = name.partition(".")
                other = {"down_blocks": "up_blocks", "up_blocks": "down_blocks"}.get(side)
                plan.pop(name, None)
                if other:
                    plan.pop(f"{other}.{depth - 1 - int(i)}", None)
        return plan

    def attach(self, model: nn.Module) -> Assembled:
        """Cut `model` in place; raises `ValueError` where the kept layers do not fit together."""
        return Assembled(self, model, self.choose(model), None)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Assembled:
        """Cut a fresh network as `plan` says, or take one that its config built that short."""
        kept = {name: tuple(layers) for name, layers in plan["kept"].items()}
        return Assembled(self, model, kept, plan["experts"])


class Assembled(Applied):
    """A network with fewer layers; see `Assemble`."""

    transform: Assemble

    def __init__(
        self,
        transform: Assemble,
        model: nn.Module,
        kept: Kept,
        experts: Mapping[str, int] | None,
    ):
        self.transform, self.model, self.kept = transform, model, dict(kept)
        self.finalized = False
        self._weights: dict[str, torch.Tensor] = {}
        self.before = sum(p.numel() for p in model.parameters())
        self.sizes = stage_sizes(model)
        # a saved network comes back from its config, which is short already
        short = experts is not None and all(
            self.sizes.get(n, 0) == len(layers) for n, layers in kept.items()
        )
        if not short:
            check_plan(model, kept)
        removed = {} if short else _removed_convs(model, kept)
        self._old: list[tuple[Any, str, Any]] = [] if short else cut(model, kept)
        self.experts: dict[str, int] = {}
        if experts is not None:
            for name, count in experts.items():
                self._mix(name, [_conv(model, name)] * count)
        elif transform.experts is not None:
            for name in [n for n, m in model.named_modules() if type(m) is nn.Conv2d]:
                layer = name.rpartition(".")[2]
                stage = ".".join(name.split(".")[:2])
                shorter = stage in kept and len(kept[stage]) < self.sizes[stage]
                if layer in ("conv1", "conv2") and ".resnets." in name and shorter:
                    conv = _conv(model, name)
                    convs = transform.experts.convs(conv, removed.get((stage, layer), ()))
                    if len(convs) > 1:
                        self._mix(name, convs)

    def _mix(self, name: str, convs: Sequence[nn.Conv2d]) -> None:
        experts = self.transform.experts
        router: Router = "sigmoid" if experts is None else experts.router
        parent, _, child = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        self._old.append((owner, child, getattr(owner, child)))
        setattr(owner, child, CondConv2d.from_convs(convs, router=router))
        self.experts[name] = len(convs)

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective:
        """Return the joint stage of the distillation: stage features and output, and the task.

        From here on a copy of the weights is kept, for `detach`.
        """
        self._weights = self._weights or {
            n: p.detach().clone() for n, p in self.model.named_parameters()
        }
        from effuse.distill.features import NormalizedFeatureDistillation

        return NormalizedFeatureDistillation(teacher, self.model, taps(self.sizes, self.kept))

    def plan(self) -> dict[str, Any]:
        """Return the kept layers by stage and the kernels by convolution."""
        return {"kept": {n: list(k) for n, k in self.kept.items()}, "experts": dict(self.experts)}

    def report(self) -> dict[str, Any]:
        """Return parameters before and after, and layers by stage."""
        return {
            "parameters_before": self.before,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": stage_sizes(self.model),
            "layers_before": self.sizes,
            "conditional_convolutions": len(self.experts),
        }

    def detach(self) -> None:
        """Put the dropped layers back, and the weights as they were before healing."""
        if self.finalized:
            raise RuntimeError("the assembly was finalized: load the original instead")
        with torch.no_grad():
            now = dict(self.model.named_parameters())
            for name, weight in self._weights.items():
                now[name].copy_(weight)
        uncut(self._old)
        self._old = []

    def finalize(self) -> None:
        """Let go of the dropped layers."""
        if "mid_block" in self.model._modules and self.kept.get("mid_block") == ():
            del self.model.mid_block  # as in a network that is built without one
            self.model.mid_block = None  # type: ignore[assignment]
        self._old, self._weights, self.finalized = [], {}, True


def assemble(
    teacher: nn.Module, kept: Kept | float = 0.5, *, experts: Experts | None = None
) -> nn.Module:
    """Build a lighter network from a copy of `teacher`: a share of its layers, or those named."""
    student = copy.deepcopy(teacher)
    chosen = kept if isinstance(kept, Mapping) else None
    share = 0.5 if isinstance(kept, Mapping) else kept
    Assemble(share, chosen, experts=experts).attach(student).finalize()
    return student


def _conv(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _removed_convs(model: Any, kept: Kept) -> dict[tuple[str, str], list[nn.Conv2d]]:
    out: dict[tuple[str, str], list[nn.Conv2d]] = {}
    for stage, layers in kept.items():
        for i, resnet in enumerate(getattr(model.get_submodule(stage), "resnets", ())):
            for name in ("conv1", "conv2"):
                conv = getattr(resnet, name, None)
                if i not in layers and type(conv) is nn.Conv2d:
                    out.setdefault((stage, name), []).append(conv)
    return out
