"""Which items to keep under a budget: 0-1 knapsack, exactly and greedily.

max sum_{i in K} value_i   subject to   sum_{i in K} cost_i <= capacity,   required <= K
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CELLS = 50_000_000
"""Largest table `exact` fills; beyond it costs are rounded up to a coarser unit."""


def exact(
    values: Sequence[float],
    costs: Sequence[float],
    capacity: float,
    *,
    unit: float | None = None,
    required: Sequence[int] = (),
) -> list[int]:
    """Return the items to keep, by dynamic programming; O(n capacity / unit).

    Costs are rounded up and the capacity down to multiples of `unit`, so the budget holds in exact
    costs whatever the unit; with `unit` dividing all costs the choice is optimal. Among equals
    the item of the lower index stays, and an item of value zero does not.

    Args:
        values: (n,) what each item is worth, finite, at least 0.
        costs: (n,) what each takes, at least 0.
        capacity: at least 0.
        unit: of the table; None takes the largest that divides all costs, or a coarser one where
            the table would exceed `CELLS`.
        required: indices that are kept whatever they are worth.

    Returns:
        Rising indices of the items kept.

    Raises:
        ValueError: values or costs are negative or not finite, or `required` exceeds the capacity.
    """
    free, room, kept = _begin(values, costs, capacity, required)
    unit = unit if unit is not None else grain(costs, max(1, len(values)))
    if not unit > 0:
        raise ValueError(f"unit={unit!r}: expected a positive number")
    size = math.floor(room / unit + 1e-9)
    steps = [math.ceil(costs[i] / unit - 1e-9) for i in free]
    best = torch.zeros(size + 1, dtype=torch.float64)
    taken = []
    for i, step in zip(free, steps, strict=True):
        with_it = torch.full_like(best, -math.inf)
        if step <= size:
            with_it[step:] = best[: size + 1 - step] + float(values[i])
        take = with_it > best  # ties: leave the later one
        best = torch.where(take, with_it, best)
        taken.append(take)
    at = size
    for i, step, take in zip(reversed(free), reversed(steps), reversed(taken), strict=True):
        if bool(take[at]):
            kept.append(i)
            at -= step
    return sorted(kept)


def greedy(
    values: Sequence[float],
    costs: Sequence[float],
    capacity: float,
    *,
    required: Sequence[int] = (),
) -> list[int]:
    """Return the items to keep, taken by falling value / cost while they fit; O(n log n).

    At least half of the optimum together with the best single item, which is tried too. Ties go to
    the lower index. Arguments as in `exact`.
    """
    free, room, kept = _begin(values, costs, capacity, required)

    def rank(i: int) -> tuple[float, int]:
        return (-math.inf if costs[i] == 0 else -values[i] / costs[i], i)

    chosen, left = [], room
    for i in sorted(free, key=rank):
        if values[i] > 0 and costs[i] <= left:
            chosen.append(i)
            left -= costs[i]
    single = [i for i in free if costs[i] <= room]
    if single:
        top = max(single, key=lambda i: (values[i], -i))
        if values[top] > sum(values[i] for i in chosen):
            chosen = [top]
    return sorted(kept + chosen)


def exhaustive(
    values: Sequence[float],
    costs: Sequence[float],
    capacity: float,
    *,
    required: Sequence[int] = (),
) -> list[int]:
    """Return the items to keep by trying all 2^n sets, n <= 20; arguments as in `exact`."""
    free, room, kept = _begin(values, costs, capacity, required)
    if len(free) > 20:
        raise ValueError(f"{len(free)} items: expected at most 20 for an exhaustive search")
    best, chosen = -1.0, 0
    for mask in range(1 << len(free)):
        some = [i for bit, i in enumerate(free) if mask >> bit & 1]
        if sum(costs[i] for i in some) <= room * (1 + 1e-12):
            value = sum(values[i] for i in some)
            if value > best:
                best, chosen = value, mask
    return sorted(kept + [i for bit, i in enumerate(free) if chosen >> bit & 1])


def choices(errors: Tensor, gains: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the least total error for each total gain, where each item is taken n times.

    best[g] = min sum_i errors[i, n_i]   subject to   sum_i n_i gains[i] >= g:  a knapsack of
    multiple choice, exact, by dynamic programming; O(items counts cells) tensor operations.

    Args:
        errors: (items, counts) of taking item i n times, n = 0, 1, ...; inf where it cannot be.
        gains: whole numbers, at least 0, a time.

    Returns:
        best: (cells + 1,) float64, cells the largest total gain; rising, inf where unreachable.
        taken: (items, cells + 1) the n of each item at each g; -1 where unreachable.
    """
    items, counts = errors.shape
    if len(gains) != items or any(g < 0 or g != int(g) for g in gains):
        raise ValueError(f"gains={gains!r}: expected {items} whole numbers, at least 0")
    cells = int(sum(gains)) * (counts - 1)
    if cells * items > CELLS:
        raise ValueError(f"{cells} cells for {items} items: expected smaller gains, see `grain`")
    best = torch.full((cells + 1,), math.inf, dtype=torch.float64)
    best[0] = 0
    first = torch.zeros(items, cells + 1, dtype=torch.int16)
    at = torch.arange(cells + 1)
    for i, gain in enumerate(gains):
        new, pick = torch.full_like(best, math.inf), torch.full_like(at, -1)
        for n in range(counts):
            shifted = torch.full_like(best, math.inf)
            shifted[n * gain :] = best[: cells + 1 - n * gain]
            shifted += errors[i, n].to(best)
            better = shifted < new
            new, pick = torch.where(better, shifted, new), torch.where(better, n, pick)
        best, first[i] = new, pick.to(torch.int16)
    # at least g: the best of all gains from g on
    low = best.flip(0).cummin(0)
    exact_at = cells - low.indices.flip(0)
    taken = torch.empty(items, cells + 1, dtype=torch.int16)
    for i in reversed(range(items)):
        taken[i] = first[i][exact_at]
        exact_at = (exact_at - taken[i].long() * gains[i]).clamp_min(0)
    reached = low.values.flip(0)
    taken[:, ~reached.isfinite()] = -1
    return reached, taken


def floors(
    values: Sequence[float], kinds: Sequence[str], shares: dict[str, float] | None
) -> list[int]:
    """Return the most valuable items of each kind that must stay: at least `shares` of the kind.

    Args:
        values: (n,) what each item is worth.
        kinds: (n,) the kind of each.
        shares: fraction of each kind's items that stays, in [0, 1].

    Raises:
        ValueError: a kind that no item has, or a share outside [0, 1].
    """
    out: list[int] = []
    for kind, share in (shares or {}).items():
        mine = [i for i, k in enumerate(kinds) if k == kind]
        if not mine:
            raise ValueError(f"floor for {kind!r}: expected one of {', '.join(sorted(set(kinds)))}")
        if not 0 <= share <= 1:
            raise ValueError(f"floor {share!r} of {kind!r}: expected a fraction in [0, 1]")
        ranked = sorted(mine, key=lambda i: (-values[i], i))
        out += ranked[: math.ceil(share * len(mine) - 1e-9)]
    return sorted(out)


def grain(costs: Sequence[float], rows: int) -> float:
    """Return the unit `exact` takes by itself: the divisor of all costs, coarser where needed."""
    total = float(sum(costs))
    coarse = total * rows / CELLS
    if not total:
        return 1.0
    if all(float(c).is_integer() for c in costs):
        return max(float(math.gcd(*(int(c) for c in costs))), math.ceil(coarse))
    return max(coarse, total / 200_000)


def _begin(
    values: Sequence[float], costs: Sequence[float], capacity: float, required: Sequence[int]
) -> tuple[list[int], float, list[int]]:
    if len(values) != len(costs):
        raise ValueError(f"{len(values)} values for {len(costs)} costs: expected one each")
    for name, row in (("values", values), ("costs", costs)):
        for i, v in enumerate(row):
            if not (math.isfinite(v) and v >= 0):
                raise ValueError(f"{name}[{i}]={v!r}: expected a finite number, at least 0")
    must = sorted(set(required))
    room = capacity - sum(costs[i] for i in must)
    if room < 0:
        raise ValueError(
            f"capacity {capacity:g} is below {sum(costs[i] for i in must):g}, the cost of what "
            "must stay: lower the floors or raise the budget"
        )
    return [i for i in range(len(values)) if i not in set(must)], room, must
