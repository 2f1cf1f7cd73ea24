"""What a cache spends: calls, executions of parts, bytes and multiply-accumulates."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effuse.evaluate.cost import CountMacs

from .keys import Keys

Shape = tuple[Any, ...]
"""Size, dtype and device of the sample of a call."""


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one call: all of it, and what each part saves when it inherits."""

    full: int
    saved: Mapping[str, int]

    @property
    def inherited(self) -> int:
        """Return the cost of a call in which every part inherits."""
        return self.full - sum(self.saved.values())


@dataclass(frozen=True)
class Plan:
    """Key steps times parts: what a run of `steps` calls will execute, before it is run."""

    keys: Keys
    parts: tuple[str, ...]

    def runs(self, steps: int, parts: int) -> int:
        """Return executions: |K| n_all + (T - |K|) (n_all - n_parts), of `parts` = n_all parts."""
        key = len(self.keys.of(steps))
        return key * parts + (steps - key) * (parts - len(self.parts))

    def macs(self, steps: int, cost: Cost) -> int:
        """Return multiply-accumulates of a run of `steps` calls."""
        key = len(self.keys.of(steps))
        saved = sum(cost.saved[p] for p in self.parts)
        return key * cost.full + (steps - key) * (cost.full - saved)


class Accounts:
    """Counts since a cache was attached, and the costs by sample shape that turn them into MACs.

    forced: while costs are measured, whether all parts compute or all inherit; `None` otherwise.
    """

    def __init__(self, parts: Sequence[str]):
        self.parts = tuple(parts)
        self.costs: dict[Shape, Cost] = {}
        self.forced: bool | None = None
        self.runs = self.key_calls = self.computed = self.inherited = self.peak = 0
        self._calls: Counter[Shape] = Counter()
        self._inherits: Counter[tuple[Shape, str]] = Counter()
        self._count: CountMacs | None = None
        self._spent: Counter[tuple[bool, str]] = Counter()

    def note(self, shape: Shape, inherited: Sequence[str], computed: int, held: int) -> None:
        """Note one call: the parts that inherited, how many computed, the bytes held after it."""
        self._calls[shape] += 1
        self.key_calls += not inherited
        self.computed += computed
        self.inherited += len(inherited)
        for part in inherited:
            self._inherits[shape, part] += 1
        self.peak = max(self.peak, held)

    @contextlib.contextmanager
    def charge(self, part: str, fresh: bool) -> Iterator[None]:
        """Charge multiply-accumulates spent inside to `part`, while costs are measured."""
        if self._count is None:
            yield
            return
        start = self._count.macs
        yield
        self._spent[fresh, part] += self._count.macs - start

    @torch.no_grad()
    def measure(self, shape: Shape, call: Callable[[], object]) -> None:
        """Count a call with all parts computed and one with all inherited."""
        totals = {}
        self._spent.clear()
        try:
            for fresh in (True, False):
                self.forced = fresh
                with CountMacs() as self._count:
                    call()
                totals[fresh] = self._count.macs
        finally:
            self.forced, self._count = None, None
        saved = {p: self._spent[True, p] - self._spent[False, p] for p in self.parts}
        self.costs[shape] = Cost(totals[True], saved)

    def report(self) -> dict[str, Any]:
        """Return the counts; `macs` and `macs_full` once every shape that was run has a cost."""
        calls = sum(self._calls.values())
        out: dict[str, Any] = {
            "parts": len(self.parts),
            "runs": self.runs,
            "calls": calls,
            "key_calls": self.key_calls,
            "parts_computed": self.computed,
            "parts_inherited": self.inherited,
            "cache_bytes_peak": self.peak,
        }
        if self.costs:
            cost = next(iter(self.costs.values()))
            out |= {"macs_key_call": cost.full, "macs_inherited_call": cost.inherited}
        if calls and all(shape in self.costs for shape in self._calls):
            full = sum(n * self.costs[s].full for s, n in self._calls.items())
            saved = sum(n * self.costs[s].saved[p] for (s, p), n in self._inherits.items())
            out |= {"macs": full - saved, "macs_full": full}
        return out
