"""DeepCache: run the deep part of a network at every k-th step only. A plain baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_choice, check_whole
from effuse.core.method import method

from .inherited import Inherited
from .keys import Uniform
from .levels import Blocks, Level

__all__ = ["DeepCache"]


@method(
    "deep_cache",
    paper="DeepCache: Accelerating Diffusion Models for Free",
    year=2024,
    buys="fewer multiply-accumulates a picture without training or calibration",
    missing="the non-uniform schedule of the paper: Inherit takes FrontDense and BackDense",
    measured_in="slimming",
    example=lambda: DeepCache(every=2, fresh=0),
)
@dataclass(frozen=True)
class DeepCache(Transform):
    """Inherit everything deeper than `fresh` layers between every `every`-th step.

    In a UNet the up-sampled deep feature is kept and the shallow skip path stays fresh; in a
    transformer, what the blocks between the first and the last `fresh` add. `every` = 1 is the
    original bit for bit. The same as `Inherit(Blocks(fresh), Uniform(every))`, whose other levels,
    key steps and order 1 go further.
    """

    every: int = 3
    fresh: int = 1
    order: int = 0
    where: Where = everywhere
    kind = "cache"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_whole("every", self.every, 1)
        check_whole("fresh", self.fresh, 0)
        check_choice("order", self.order, (0, 1))

    @property
    def level(self) -> Level:
        """Which parts inherit."""
        return Blocks(self.fresh)

    def attach(self, model: nn.Module) -> Inherited:
        """Put gates on `model`."""
        return Inherited(self, model, Uniform(self.every))

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Inherited:
        """Put gates on the parts named in `plan` of a fresh `model`."""
        return Inherited(self, model, Uniform(self.every), tuple(plan["parts"]))
