"""A solver turned inside out: predictions are handed in one by one, and samples come out.

A solver calls its denoiser; a diffusers pipeline calls the network itself and hands the output in.
`Replay` records the outputs of a step and re-runs the solver's own `step` on the record until it
stops asking for more, so a solver with several evaluations needs no second implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core import Denoiser, Prediction, Process, Solver, Time

Predict = Callable[[Tensor, Tensor, Time], Prediction]
"""Turns a network's output: (B, C, *) and the sample it saw, at a level, into a prediction."""

Generators = torch.Generator | Sequence[torch.Generator] | None


class _Ask(Exception):
    """The solver asks for a prediction at x that is not on record yet."""

    def __init__(self, x: Tensor):
        super().__init__("not on record yet")
        self.x = x


class _Tape:
    """Recorded (output, sample) pairs of a step, how many were played, and x0 by the last."""

    __slots__ = ("count", "pairs", "x0")

    def __init__(self) -> None:
        self.pairs: Sequence[tuple[Tensor, Tensor]] = ()
        self.count, self.x0 = 0, torch.empty(0)


class _Record(Denoiser):
    """Answers from a tape, in the order it was asked."""

    def __init__(self, process: Process, predict: Predict):
        super().__init__()
        self.process, self.predict, self.tape = process, predict, _Tape()

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Return the next prediction on record, or raise `_Ask`."""
        tape = self.tape
        if tape.count == len(tape.pairs):
            raise _Ask(x)
        output, seen = tape.pairs[tape.count]
        tape.count += 1
        found = self.predict(output, seen, t)
        tape.x0 = found.x0
        return found


class _Probe(Denoiser):
    """Notes the levels at which it is asked."""

    def __init__(self, process: Process):
        super().__init__()
        self.process = process
        self.asked: list[float] = []

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Note the level."""
        self.asked.append(float(t))
        return Prediction(torch.zeros_like(x), x)


def levels_asked(solver: Solver, process: Process, levels: Tensor) -> list[list[float]]:
    """Return the levels at which `solver` asks in each step of levels: (steps + 1,).

    Raises:
        ValueError: it asks first at another level than the one it is at, which no pipeline does.
    """
    if solver.evals == 1:
        return [[float(t)] for t in levels[:-1]]
    probe = _Probe(process)
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    state, rng, out = solver.init(x), torch.Generator(), []
    for t, s in pairwise(levels):
        probe.asked = []
        x, state = solver.step(probe, x, t, s, state, rng=rng)
        if not probe.asked or probe.asked[0] != float(t):
            raise ValueError(
                f"{type(solver).__name__} asks first at another level than the one it is at: no "
                "pipeline can drive it, use effuse.sample"
            )
        out.append(probe.asked)
    return out


class Taken(NamedTuple):
    """What comes of one output.

    x: (B, C, *) what the network is to be asked next, or the sample at the end of the step;
    x0: (B, C, *) the clean sample by the last output; done: whether the step has ended.
    """

    x: Tensor
    x0: Tensor
    done: bool


@dataclass
class _Draws:
    """Some rows, their generator with its state before the current step, and their solver state."""

    rows: slice | None  # all
    rng: torch.Generator | None
    mark: Tensor | None = None
    state: Any = None
    begun: bool = False

    def rewind(self) -> None:
        if self.rng is not None and self.mark is not None:
            self.rng.set_state(self.mark)


class Replay:
    """One run of `solver` that is handed one network output after another.

    Args:
        solver: takes the steps.
        process: on which it walks.
        predict: turns an output into a prediction.
    """

    def __init__(self, solver: Solver, process: Process, predict: Predict):
        self.solver, self._record = solver, _Record(process, predict)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._draws: list[_Draws] = []

    def take(self, output: Tensor, x: Tensor, t: Time, s: Time, generator: Generators) -> Taken:
        """Take in the output: (B, C, *) for x: (B, C, *), within the step from level `t` to `s`.

        Args:
            output: of the network.
            x: what the network saw.
            t: the level the step starts from.
            s: the level it ends at.
            generator: draws the solver's noise; one, or one a row. Without it torch's global seed
                decides. Every re-run of a step draws the same.

        Raises:
            ValueError: there are neither one generator nor one for each row.
        """
        if not self._pairs:
            self._mark(generator, len(x))
        record = [*self._pairs, (output, x)]
        start, outs, x0s, done = record[0][1], [], [], False
        played, tape = self._record, self._record.tape
        for draws in self._draws:
            rows = draws.rows
            first = start if rows is None else start[rows]
            if not draws.begun:
                draws.state, draws.begun = self.solver.init(first), True
            draws.rewind()
            tape.count = 0
            tape.pairs = record if rows is None else [(a[rows], b[rows]) for a, b in record]
            try:
                step = self.solver.step(played, first, t, s, draws.state, rng=draws.rng)
                draws.state, done = step.state, True
                outs.append(step.x)
            except _Ask as ask:
                draws.rewind()
                outs.append(ask.x)
            x0s.append(tape.x0)
        self._pairs = [] if done else record
        if len(outs) == 1:
            return Taken(outs[0], x0s[0], done)
        return Taken(torch.cat(outs), torch.cat(x0s), done)

    def _mark(self, generator: Generators, count: int) -> None:
        """Note the generators' states at the start of a step."""
        many: list[torch.Generator | None]
        many = list(generator) if isinstance(generator, Sequence) else [generator]
        if not self.solver.stochastic:
            many = [None]
        elif many[0] is None:
            many = [torch.Generator().manual_seed(int(torch.randint(2**62, ())))]
        if len(many) not in (1, count):
            raise ValueError(f"{len(many)} generators for {count} samples: expected one, or each")
        if len(many) != len(self._draws):
            rows = [None] if len(many) == 1 else [slice(i, i + 1) for i in range(count)]
            self._draws = [_Draws(r, None) for r in rows]
        for draws, rng in zip(self._draws, many, strict=True):
            draws.rng, draws.mark = rng, None if rng is None else rng.get_state()
