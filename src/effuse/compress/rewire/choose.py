"""The schedule of a switch by measured quality: all with few switch points are tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import macs
from effuse.core.contracts import Call
from effuse.core.errors import check_whole

from .switched import AtSteps, Switched


@dataclass(frozen=True)
class Trial:
    """One schedule: ||sample - full||^2 / ||full||^2, full by the first network alone, and cost.

    macs: multiply-accumulates of a run of one call a step.
    """

    schedule: AtSteps
    error: float
    macs: int


def schedules(steps: int, networks: int = 2, points: int = 1, every: int = 1) -> Iterator[AtSteps]:
    """Give all schedules with at most `points` switches, at multiples of `every`."""
    check_whole("steps", steps, 1)
    check_whole("networks", networks, 1)
    check_whole("every", every, 1)
    check_whole("points", points, 0)
    if points > 3:
        raise ValueError(f"points={points}: expected at most 3, all schedules are tried")
    for count in range(points + 1):
        for starts in itertools.combinations(range(every, steps, every), count):
            for then in itertools.product(range(networks), repeat=count + 1):
                if all(a != b for a, b in itertools.pairwise(then)):
                    yield AtSteps((0, *starts), then)


@torch.no_grad()
def choose(
    networks: Sequence[Any],
    run: Callable[[nn.Module], Tensor],
    call: Call,
    steps: int,
    *,
    budget: float = 1.0,
    points: int = 1,
    every: int = 1,
) -> list[Trial]:
    """Try all schedules within a budget and return them, closest to the first network's run first.

    Args:
        networks: what to switch between, the one to be true to first.
        run: samples from fixed noise with the network it is given.
        call: one call as `run` makes them, to count multiply-accumulates on.
        steps: of a run.
        budget: share of the first network's cost that a schedule may have, above 0.
        points: most switches in a run, 0 to 3.
        every: switches happen at multiples of this step.

    Raises:
        ValueError: no schedule is within the budget.
    """
    costs = [macs(model, call) for model in networks]
    allowed = budget * steps * costs[0]
    tried = list(schedules(steps, len(networks), points, every))
    within = [s for s in tried if s.cost([0.0] * steps, costs) <= allowed]
    if not within:
        cheapest = min(s.cost([0.0] * steps, costs) for s in tried) / (steps * costs[0])
        raise ValueError(
            f"budget={budget}: the cheapest of {len(tried)} schedules costs {cheapest:.3g} of the "
            "first network alone"
        )
    full = run(networks[0]).double()
    trials = []
    for schedule in within:
        got = run(Switched(networks, schedule)).double()
        error = float((got - full).square().sum() / full.square().sum())
        trials.append(Trial(schedule, error, int(schedule.cost([0.0] * steps, costs))))
    return sorted(trials, key=lambda t: (t.error, t.macs))
