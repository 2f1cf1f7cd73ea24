"""Wasserstein-2 distances between samples: on the line, along random lines, on a grid."""

from __future__ import annotations

import torch
from torch import Tensor


def _quantiles(rows: Tensor, count: int) -> Tensor:
    """Return `count` even quantiles of sorted rows: (N, K), at (i + 1/2) / count."""
    if len(rows) == count:
        return rows
    at = (torch.arange(count, dtype=rows.dtype, device=rows.device) + 0.5) / count
    at = (at * len(rows) - 0.5).clamp(0, len(rows) - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(len(rows) - 1)
    return rows[low] + (at - low).unsqueeze(1) * (rows[high] - rows[low])


def _check(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if not len(a) or not len(b) or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"samples of shape {tuple(a.shape)} and {tuple(b.shape)}: expected rows of one shape, "
            "at least one in each"
        )
    return a.reshape(len(a), -1), b.reshape(len(b), -1).to(a)


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Return the Wasserstein-2 distance of two samples on the line, a: (N,) or (N, 1), b: (M, ...).

    The root of the mean square of the difference of sorted quantiles; exact for N = M.

    Raises:
        ValueError: an empty sample, or rows of more than one value.
    """
    a, b = _check(a, b)
    if a.shape[1] != 1:
        raise ValueError(f"rows of {a.shape[1]} values: expected one, see sliced_wasserstein2")
    count = max(len(a), len(b))
    a, b = _quantiles(a.sort(0).values, count), _quantiles(b.sort(0).values, count)
    return float((a - b).square().mean().sqrt())


def sliced_wasserstein2(
    a: Tensor, b: Tensor, *, directions: int = 256, rng: torch.Generator | None = None
) -> float:
    """Return the sliced Wasserstein-2 distance of two samples, a: (N, *), b: (M, *).

    The root of the mean square, over `directions` unit vectors drawn from `rng` (seed 0 if not
    given, so that every call takes the same ones), of the distance of the projections. Two samples
    of one law of D values have about sqrt(2 / N) times the spread: compare with a second draw.

    Raises:
        ValueError: an empty sample, or rows of different shapes.
    """
    a, b = _check(a, b)
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    lines = torch.randn(a.shape[1], directions, generator=rng, dtype=torch.float64)
    lines = (lines / lines.norm(dim=0)).to(a)
    count = max(len(a), len(b))
    a, b = (
        _quantiles((a @ lines).sort(0).values, count),
        _quantiles((b @ lines).sort(0).values, count),
    )
    return float((a - b).square().mean().sqrt())


def binned_wasserstein2(a: Tensor, b: Tensor, *, bins: int = 24) -> float:
    """Return the Wasserstein-2 distance of two samples binned on one grid, a: (N, D), b: (M, D).

    Optimal transport between the occupied cells of `bins` per side of the box that holds both, by
    linear programming: exact for the binned samples, off by at most about a cell for the samples
    themselves. For D of one to three; the cost grows with the square of the occupied cells.

    Raises:
        ValueError: an empty sample, rows of different shapes, or too many occupied cells.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import identity, kron, vstack

    a, b = (p.double().cpu() for p in _check(a, b))
    both = torch.cat([a, b])
    low = both.amin(0)
    cell = (both.amax(0) - low).clamp_min(torch.finfo(torch.float64).tiny) / bins
    sides = []
    for rows in (a, b):
        index = ((rows - low) / cell).floor().clamp(0, bins - 1)
        cells, counts = index.unique(dim=0, return_counts=True)
        sides.append(((cells + 0.5) * cell, (counts / len(rows)).numpy()))
    (x, p), (y, q) = sides
    if len(x) * len(y) > 1_000_000:
        raise ValueError(
            f"{len(x)} and {len(y)} occupied cells: expected at most a million pairs, lower bins "
            "or take sliced_wasserstein2"
        )
    cost = torch.cdist(x, y).square().flatten().numpy()
    sums = vstack(
        [kron(identity(len(x)), np.ones(len(y))), kron(np.ones(len(x)), identity(len(y)))]
    )
    found = linprog(cost, A_eq=sums.tocsr()[:-1], b_eq=np.concatenate([p, q])[:-1], method="highs")
    if not found.success:
        raise ValueError(f"no transport between the samples was found: {found.message}")
    return float(max(found.fun, 0.0)) ** 0.5
