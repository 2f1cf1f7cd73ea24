"""The clock of a run: which step a call belongs to, read from the noise level it is made at."""

from __future__ import annotations

import math
import threading
from typing import Any

from torch import Tensor


class Clock:
    """Counts steps of a run by its noise level, a run for each thread."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[float, int]] = {}

    def step(self, level: float) -> tuple[int, bool]:
        """Return the step (from 0) that a call at `level` belongs to, and whether a run begins."""
        me = threading.get_ident()
        last, step = self._at.get(me, (-math.inf, 0))
        if level > last:
            forget_ended(self._at)
            step, last = 0, -math.inf
        elif level < last:
            step += 1
        self._at[me] = (level, step)
        return step, last == -math.inf

    def reset(self, thread: int | None = None) -> None:
        """Forget the run of a thread, or all runs: the next call there is a first step."""
        if thread is None:
            self._at.clear()
        else:
            self._at.pop(thread, None)


def level_of(timestep: Any) -> float:
    """Return the one noise level of a call, from a number, a () or a (B,) tensor."""
    if timestep is None:
        raise ValueError("timestep is missing: the clock of a cache is read from it")
    if not isinstance(timestep, Tensor):
        return float(timestep)
    flat = timestep.detach().reshape(-1)
    low, high = (float(a) for a in flat.aminmax()) if flat.numel() > 1 else (float(flat), None)
    if high is not None and low != high:
        raise ValueError(
            f"timesteps from {low:g} to {high:g} in one call: expected all rows at one step of a "
            "run; detach the cache, or train with model.train()"
        )
    return low


def forget_ended(kept: dict[int, Any]) -> None:
    """Drop what threads that have ended left behind."""
    alive = {t.ident for t in threading.enumerate()}
    for thread in list(kept):
        if thread not in alive:
            kept.pop(thread, None)
