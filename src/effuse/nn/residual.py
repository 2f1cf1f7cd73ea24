"""A plain residual layer with separable branches, for networks of your own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Residual(nn.Module):
    """Adds branches to a skip: y = skip(x) + sum_l branch_l(x, ...).

    Args:
        branches: each takes x and whatever else the layer is called with, and returns what the
            skip returns in shape.
        skip: the identity by default.
    """

    def __init__(self, *branches: nn.Module, skip: nn.Module | None = None):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.skip = skip

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the skip plus all branches; x: (B, *)."""
        y = x if self.skip is None else self.skip(x)
        for branch in self.branches:
            y = y + branch(x, *args, **kwargs)
        return y
