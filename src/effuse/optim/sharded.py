"""Parameters that lie in pieces on several processes: DTensors, as `fully_shard` makes them.

A piece is updated where it lies; what the formulas sum over a whole tensor is summed over all
processes, so that a sharded run makes the steps of a whole one, to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sharded(p: Tensor) -> bool:
    """Return whether a parameter is a DTensor."""
    return hasattr(p, "device_mesh")


def local(x: Tensor) -> Tensor:
    """Return the piece of a DTensor that lies here; another tensor as it is."""
    piece: Any = x
    return piece.to_local() if sharded(x) else x


def like(x: Tensor, owner: Tensor) -> Tensor:
    """Return a whole tensor cut as `owner` is, where it is."""
    if not sharded(owner) or sharded(x):
        return x
    from torch.distributed.tensor import distribute_tensor

    mine: Any = owner
    return distribute_tensor(x, mine.device_mesh, mine.placements)


def axes(owner: Tensor) -> list[int]:
    """Return the axes of a parameter that are cut."""
    mine: Any = owner
    return [p.dim for p in mine.placements if p.is_shard()] if sharded(owner) else []


def over_all(x: Tensor, owner: Tensor, largest: bool = False) -> Tensor:
    """Return x, one number a process or more, summed over the pieces of `owner`, or their largest.

    All processes that hold a piece must call it.
    """
    mine: Any = owner
    if not sharded(owner):
        return x
    import torch.distributed as dist

    x = x.clone()
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    for number, placement in enumerate(mine.placements):
        if placement.is_shard():
            dist.all_reduce(x, op, group=mine.device_mesh.get_group(number))
    return x


def total(x: Tensor, owner: Tensor) -> float:
    """Return the sum of a piece's elements over all pieces, in double precision."""
    return float(over_all(x.double().sum(), owner))


def numel(owner: Tensor) -> int:
    """Return how many real numbers a parameter has, all pieces together."""
    return owner.numel() * (2 if torch.is_complex(owner) else 1)
