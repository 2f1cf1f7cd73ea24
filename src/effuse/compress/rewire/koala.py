"""KOALA: a denoiser with half the layers and shallower attention, taught its self-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import parameters
from effuse.core.contracts import Applied, Objective, Transform, Where, everywhere
from effuse.core.errors import Unsuited, check_fraction, check_whole
from effuse.core.method import method
from effuse.distill.features import (
    FeatureDistillation,
    Matched,
    Normalizer,
    PerBatch,
    Plain,
    Running,
)
from effuse.distill.taps import (
    CrossAttention,
    Even,
    FeedForward,
    First,
    Kind,
    Last,
    Match,
    Residual,
    SelfAttention,
    Tap,
    Top,
    Within,
    pairs,
    stage_of,
)

from .stages import (
    ROWS,
    Kept,
    check_depths,
    check_plan,
    cut,
    even_plan,
    origin,
    stage_depths,
    stage_sizes,
    uncut,
)

__all__ = [
    "CrossAttention",
    "Even",
    "FeedForward",
    "First",
    "Koala",
    "Last",
    "Matched",
    "PerBatch",
    "Plain",
    "Residual",
    "Running",
    "SelfAttention",
    "Shortened",
    "Top",
    "UNetPlan",
    "Within",
]


@dataclass(frozen=True)
class UNetPlan:
    """What stays of a network, as data; a stage that is not named stays whole.

    layers: of each stage, indices of its pairs of residual block and attention; of a transformer,
    of its blocks. blocks: of each stage of a UNet, indices of the transformer blocks of every
    attention. `{"mid_block": ()}` in `layers` drops the middle.
    """

    layers: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Make the rows tuples."""
        for name in ("layers", "blocks"):
            try:
                rows = {k: tuple(int(i) for i in v) for k, v in getattr(self, name).items()}
            except (AttributeError, TypeError, ValueError):
                raise TypeError(
                    f"{name}={getattr(self, name)!r}: expected indices by stage, "
                    "{'down_blocks.0': (0,)}"
                ) from None
            object.__setattr__(self, name, rows)

    def origin(self, name: str) -> str:
        """Return what a module or tensor of the smaller network is called in the whole one."""
        return origin(name, self.layers, self.blocks)


@method(
    "koala",
    seed=46,
    paper="KOALA: Empirical Lessons Toward Memory-Efficient and Fast Diffusion Models",
    year=2024,
    buys="half the layers and shallower attention, in a plain diffusers config",
    missing="The paper's training (LAION, 100,000 steps on four A100) and its speeds are not "
    "reproduced. Stages of one layer and rows of up to two blocks stay: of house:emoji only the "
    "middle can go. The kinds of features and rules of matching are in effuse.distill.taps, the "
    "losses in effuse.distill.features. Units must be removed after this, not before.",
)
@dataclass(frozen=True)
class Koala(Transform):
    """Keep one of two layers a stage, fewer transformer blocks a layer, perhaps no middle block.

    L = w_task ||eps - eps_S||^2 + w_out ||eps_T - eps_S||^2 + w_feat sum_l ||f_T^m(l) - f_S^l||^2

    with f the output of self-attention before its skip, in every stage that has it, and the last
    feature of stages that have none. Weights are the teacher's, one to one.

    keep: share of the layers of each down stage, evenly spread; its up stage keeps one more, the
        first and the last: 2 -> 1 and 3 -> 2 (the middle one of three goes). Of a transformer, the
        share of its blocks, evenly spread.
    depth: share of the transformer blocks of a layer, rounded up, in stages with more than
        `shallow`. On SDXL, 0.5 is KOALA-700M (10 -> 5) and 0.6 KOALA-1B (10 -> 6), with its middle.
    middle: whether the middle block of a UNet stays.
    shallow: rows of up to this many blocks stay whole.
    copy: which blocks of a row stay. match: which of the teacher's a block is taught by; both the
        first ones in the paper, `Even()` and `Top()` beside it.
    plan: or what stays, exactly.
    features: what is compared: `SelfAttention`, `CrossAttention`, `FeedForward`, `Residual`,
        `Last`; those the network does not have are left out. within: in which stages.
    weights: of task, output and features. normalizer: of the feature terms, `Plain` in the paper.
    where: stages that it forbids stay whole, mirrored ones too.

    keep = depth = 1 with the middle is the original. The teacher of `Applied.objective` may be any
    network of the original's layout: the original, or one distilled to few steps or other sizes;
    what it is taught on comes with the batches.
    """

    keep: float = 0.5
    depth: float = 0.5
    middle: bool = False
    shallow: int = 2
    copy: Match = field(default_factory=First)
    match: Match = field(default_factory=First)
    plan: UNetPlan | None = None
    features: tuple[Kind, ...] = (SelfAttention(), Last(bare=True))
    within: Within = field(default_factory=Within)
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    normalizer: Normalizer = field(default_factory=Plain)
    where: Where = everywhere
    kind = "prune"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fraction("keep", self.keep)
        check_fraction("depth", self.depth)
        check_whole("shallow", self.shallow, 1)
        for name, cls in (("copy", Match), ("match", Match), ("normalizer", Normalizer)):
            if not isinstance(getattr(self, name), cls):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a {cls.__name__}")
        if not all(isinstance(k, Kind) for k in self.features):
            raise TypeError(f"features={self.features!r}: expected kinds, as SelfAttention()")
        if len(self.weights) != 3 or min(self.weights) < 0:
            raise ValueError(
                f"weights={self.weights}: expected three, of task, output and features, from 0"
            )

    def choose(self, model: nn.Module) -> UNetPlan:
        """Return what stays of `model`.

        Raises:
            TypeError: it is neither a UNet nor a transformer of diffusers.
        """
        if self.plan is not None:
            return self.plan
        layers = even_plan(model, self.keep, self.middle)
        size = sum(name.startswith("down_blocks") for name in layers)

        def allowed(name: str) -> bool:
            side, _, i = name.partition(".")
            other = {"down_blocks": "up_blocks", "up_blocks": "down_blocks"}.get(side)
            both = [name] if other is None else [name, f"{other}.{size - 1 - int(i)}"]
            return all(self.where(n, model.get_submodule(n)) for n in both)

        layers = {n: k for n, k in layers.items() if allowed(n)}
        blocks = {
            name: self.copy.blocks(depth, max(1, math.ceil(self.depth * depth - 1e-9)))
            for name, depth in stage_depths(model).items()
            if depth > self.shallow and allowed(name) and layers.get(name, (0,))
        }
        return UNetPlan(layers, blocks)

    def attach(self, model: nn.Module) -> Shortened:
        """Cut `model` in place.

        Raises:
            Unsuited: it is neither a UNet nor a transformer of diffusers, or so small that nothing
                can go.
            ValueError: what stays does not fit together.
        """
        plan = self.choose(model)
        sizes, depths = stage_sizes(model), stage_depths(model)
        shorter = any(len(k) < sizes.get(n, 0) for n, k in plan.layers.items())
        shorter |= any(len(k) < depths.get(n, 0) for n, k in plan.blocks.items())
        asked = self.keep < 1 or self.depth < 1 or not self.middle
        if self.plan is None and asked and not shorter:
            raise Unsuited(
                f"{type(model).__name__} with layers {sizes} of depth {depths}: nothing can go at "
                f"keep={self.keep:g}, depth={self.depth:g}, middle={self.middle}; ask for less, or "
                "use a method that removes units"
            )
        return Shortened(self, model, plan, None)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Shortened:
        """Cut a fresh network as `plan` says, or take one that its config built that short."""
        return Shortened(self, model, UNetPlan(plan["layers"], plan["blocks"]), plan["whole"])


class Shortened(Applied):
    """A network with fewer and shallower layers; see `Koala`.

    plan_: what stayed of it. whole: layers, depths and parameters of the network before.
    """

    transform: Koala

    def __init__(
        self, transform: Koala, model: nn.Module, plan: UNetPlan, whole: Mapping[str, Any] | None
    ):
        self.transform, self.model, self.plan_ = transform, model, plan
        self.finalized = False
        self._weights: dict[str, Tensor] = {}
        sizes, depths = stage_sizes(model), stage_depths(model)
        short = whole is not None and (sizes, depths) == _after(whole, plan)
        self.whole: dict[str, Any] = dict(
            whole or {"layers": sizes, "depths": depths, "parameters": parameters(model)}
        )
        self._old: list[tuple[Any, str, Any]] = []
        if not short:
            check_plan(model, plan.layers)
            check_depths(model, plan.blocks)
            self._old = cut(model, plan.layers, plan.blocks)

    def taps(self, teacher: nn.Module) -> list[Tap]:
        """Return what is compared with `teacher`, a whole network of the original's layout.

        Raises:
            ValueError: the teacher has another layout, or there is nothing to compare.
        """
        sizes, depths = stage_sizes(teacher), stage_depths(teacher)
        if (sizes, depths) != (self.whole["layers"], self.whole["depths"]):
            raise ValueError(
                f"a teacher with layers {sizes} of depth {depths}: expected "
                f"{self.whole['layers']} of {self.whole['depths']}, those of the original"
            )
        t = self.transform
        out: list[Tap] = []
        for kind in t.features:
            names = [n for n in kind.modules(self.model) if t.within(stage_of(n))]
            if names:
                out += pairs(
                    teacher,
                    self.model,
                    kind,
                    match=t.match,
                    layers=self.plan_.layers,
                    where=t.within,
                )
        if t.features and not out:
            raise ValueError(
                f"{type(self.model).__name__} has none of {t.features} in {t.within}: nothing "
                "would be compared; features=() teaches by the output alone"
            )
        return out

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective:
        """Return the losses of the paper; from here on a copy of the weights is kept, for `detach`.

        Raises:
            ValueError: see `taps`.
        """
        out = FeatureDistillation(
            teacher,
            self.model,
            self.taps(teacher),
            normalizer=self.transform.normalizer,
            weights=self.transform.weights,
        )
        self._weights = self._weights or {
            n: v.detach().clone() for n, v in self.model.state_dict().items()
        }
        return out

    def origins(self) -> dict[str, str]:
        """Return, for each tensor of the network, the name of the original's that it began as."""
        return {name: self.plan_.origin(name) for name in self.model.state_dict()}

    @torch.no_grad()
    def copy_from(self, teacher: nn.Module) -> None:
        """Take the weights of another network of the original's layout, one to one.

        Raises:
            ValueError: tensors are missing from it or have other shapes; nothing was copied.
        """
        theirs, mine = teacher.state_dict(), self.model.state_dict()
        names = self.origins()
        odd = [b for a, b in names.items() if b not in theirs or theirs[b].shape != mine[a].shape]
        if odd:
            raise ValueError(
                f"{len(odd)} tensors are missing or of another shape, first {odd[0]!r}: expected "
                "a network of the original's layout"
            )
        for name, value in mine.items():
            value.copy_(theirs[names[name]])

    def plan(self) -> dict[str, Any]:
        """Return the layers and blocks that stayed, and what there was before."""
        return {
            "layers": {n: list(k) for n, k in self.plan_.layers.items()},
            "blocks": {n: list(k) for n, k in self.plan_.blocks.items()},
            "whole": dict(self.whole),
        }

    def report(self) -> dict[str, Any]:
        """Return parameters, layers and depths, before and after."""
        now = parameters(self.model)
        return {
            "parameters_before": self.whole["parameters"],
            "parameters": now,
            "kept": now / self.whole["parameters"],
            "layers_before": self.whole["layers"],
            "layers": stage_sizes(self.model),
            "depths_before": self.whole["depths"],
            "depths": stage_depths(self.model),
        }

    def detach(self) -> None:
        """Put the dropped layers back, and the weights as they were before healing."""
        if self.finalized:
            raise RuntimeError("it was finalized, the layers are gone for good: load the original")
        if self._weights:
            self.model.load_state_dict(self._weights)
            self._weights = {}
        uncut(self._old)
        self._old = []

    def finalize(self) -> None:
        """Let go of the dropped layers."""
        if "mid_block" in self.model._modules and self.plan_.layers.get("mid_block") == ():
            del self.model.mid_block  # as in a network that is built without one
            self.model.mid_block = None  # type: ignore[assignment]
        self._old, self._weights, self.finalized = [], {}, True


def _after(whole: Mapping[str, Any], plan: UNetPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Return the layers and depths that a network of this plan has."""
    layers: Kept = plan.layers
    sizes = {n: len(layers.get(n, range(size))) for n, size in whole["layers"].items()}
    sizes = {n: size for n, size in sizes.items() if size or n in ROWS}
    depths = {
        n: len(plan.blocks.get(n, range(depth)))
        for n, depth in whole["depths"].items()
        if n in sizes
    }
    return sizes, depths
