"""Points that no other beats: domination, ranks, crowding, and the volume a front covers.

All to be minimized: y (N, M), one row a point, one column an objective. `a` dominates `b` if it is
nowhere larger and somewhere smaller. Equal points do not dominate each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dominates(y: Tensor, excess: Tensor | None = None) -> Tensor:
    """Return (N, N) bool: row i dominates row j.

    Args:
        y: (N, M).
        excess: (N,) by how much each breaks its limits, 0 where it keeps them: what breaks less
            dominates, whatever its objectives (Deb's rule of constrained domination).
    """
    a, b = y[:, None], y[None]
    better = (a <= b).all(2) & (a < b).any(2)
    if excess is None:
        return better
    less, same = excess[:, None] < excess[None], excess[:, None] == excess[None]
    return less | (same & better)


def ranks(y: Tensor, excess: Tensor | None = None) -> Tensor:
    """Return (N,) int: 0 for what nothing dominates, 1 for what only those dominate, and so on."""
    beats = dominates(y, excess)
    rank = torch.full((len(y),), -1, dtype=torch.long)
    left = torch.ones(len(y), dtype=torch.bool)
    level = 0
    while bool(left.any()):
        free = left & ~(beats & left[:, None]).any(0)
        rank[free] = level
        left &= ~free
        level += 1
    return rank


def front(y: Tensor) -> Tensor:
    """Return (N,) bool: which points no other dominates."""
    if y.shape[1] == 2 and len(y) > 512:  # sorted by the first, the second must fall
        order = sorted(range(len(y)), key=y.tolist().__getitem__)
        s = y[order]
        before = torch.cat([s.new_full((1,), torch.inf), s[:, 1].cummin(0).values[:-1]])
        twin = torch.cat([torch.zeros(1, dtype=torch.bool), (s[1:] == s[:-1]).all(1)])
        good: list[bool] = (s[:, 1] < before).tolist()
        kept: list[bool] = []
        for is_good, is_twin in zip(good, twin.tolist(), strict=True):
            kept.append(kept[-1] if is_twin else is_good)
        out = torch.zeros(len(y), dtype=torch.bool)
        out[order] = torch.tensor(kept)
        return out
    return ~dominates(y).any(0)


def crowding(y: Tensor) -> Tensor:
    """Return (N,): the room each point has among its neighbors; infinite at the ends.

    Sum over objectives of (next - previous) / (largest - smallest).
    """
    out = torch.zeros(len(y), dtype=torch.float64)
    for column in y.double().unbind(1):
        order = column.argsort(stable=True)
        s = column[order]
        span = s[-1] - s[0]
        room = torch.full_like(s, torch.inf)
        if len(s) > 2:
            room[1:-1] = (s[2:] - s[:-2]) / span if span > 0 else 0.0
        out[order] += room
    return out


def hypervolume(y: Tensor, reference: Sequence[float] | Tensor) -> float:
    """Return the volume between a front and a reference point that is worse in everything.

    Measure of {v : some y_i <= v <= reference}; exact, up to three objectives.

    Args:
        y: (N, M), M in 1, 2, 3. Points not below the reference count nothing.
        reference: (M,).

    Raises:
        ValueError: other numbers of objectives.
    """
    y, ref = y.double(), torch.as_tensor(reference, dtype=torch.float64)
    if y.ndim != 2 or not 1 <= y.shape[1] <= 3 or ref.shape != y.shape[1:]:
        raise ValueError(
            f"points {tuple(y.shape)} and a reference {tuple(ref.shape)}: expected (N, M) and (M,) "
            "with M of 1, 2 or 3"
        )
    y = y[(y < ref).all(1)]
    if not len(y):
        return 0.0
    if y.shape[1] == 1:
        return float(ref[0] - y.min())
    if y.shape[1] == 2:
        s = y[y[:, 0].argsort()]
        height = ref[1] - s[:, 1].cummin(0).values
        ends = torch.cat([s[1:, 0], ref[:1]])
        return float(((ends - s[:, 0]) * height).sum())
    s = y[y[:, 2].argsort()]
    ends = torch.cat([s[1:, 2], ref[2:]])
    return sum(
        float(ends[i] - s[i, 2]) * hypervolume(s[: i + 1, :2], ref[:2])
        for i in range(len(s))
        if ends[i] > s[i, 2]
    )


def reached(y: Tensor, reference: Sequence[float] | Tensor) -> list[float]:
    """Return the hypervolume after the first 1, 2, ..., N points of y: (N, M); never falls."""
    best: list[float] = []
    kept = y[:0]
    for i in range(len(y)):
        kept = torch.cat([kept, y[i : i + 1]])
        kept = kept[front(kept)]
        best.append(hypervolume(kept, reference))
    return best
