"""First-block cache: run the rest only where what the first block adds has changed. A baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_choice, check_positive, check_whole
from effuse.core.method import method

from .inherited import Inherited
from .keys import Adaptive
from .levels import Level, Rest

__all__ = ["FirstBlock"]


@method(
    "first_block",
    buys="fewer multiply-accumulates a picture, chosen by each picture while it is sampled",
    missing="The change is the largest of the batch, in the 2-norm; the public versions take means "
    "of absolute values over the whole batch.",
    measured_in="slimming",
)
@dataclass(frozen=True)
class FirstBlock(Transform):
    """Inherit what all other blocks add while the residual of the first `fresh` blocks stays.

    compute where  max over rows ||r - r_key|| / ||r_key|| > tau,  r what block `fresh` adds

    tau: > 0; at 0+ everything computes. fresh: blocks that always run, the last is watched. In a
    UNet these are layers of the encoder, with their mirror images in the decoder.
    """

    tau: float = 0.1
    fresh: int = 1
    order: int = 0
    where: Where = everywhere
    kind = "cache"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive("tau", self.tau)
        check_whole("fresh", self.fresh, 1)
        check_choice("order", self.order, (0, 1))

    @property
    def level(self) -> Level:
        """Which parts inherit, and what is watched."""
        return Rest(self.fresh)

    def attach(self, model: nn.Module) -> Inherited:
        """Put gates on `model`."""
        return Inherited(self, model, Adaptive(self.tau))

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Inherited:
        """Put gates on the parts named in `plan` of a fresh `model`."""
        return Inherited(self, model, Adaptive(self.tau), tuple(plan["parts"]))
