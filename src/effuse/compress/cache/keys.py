"""Key steps: at which steps of a run to compute, and at which to inherit. Values, not callbacks.

Steps are counted from 0, the first one executed (the noisiest), which always computes: a run that
begins in the middle of a schedule (img2img, a refiner) is counted from where it begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from effuse.core.errors import check_positive, check_whole


class Rule(ABC):
    """Says for a step and a part whether to compute or to inherit. A frozen dataclass.

    watches: whether `fresh` asks how far the features moved, which costs a copy of one feature.
    limit: the number of steps it was made for, `None` for any.
    """

    watches: ClassVar[bool] = False

    @property
    def limit(self) -> int | None:
        """Return the number of steps the rule was made for."""
        return None

    def check(self, step: int, level: float) -> None:
        """Raise `ValueError` where a run at `step`, timestep `level` is none it was made for."""
        if self.limit is not None and step >= self.limit:
            raise ValueError(
                f"step {step + 1} of a run, at timestep {level:g}: {self} was made for "
                f"{self.limit} steps; give it the number of steps you sample with"
            )

    @abstractmethod
    def fresh(self, step: int, part: str, change: Callable[[], float]) -> bool:
        """Say whether `part` computes at `step`; `change()` is the watched relative change."""


class Keys(Rule):
    """A rule that is the same for all parts: a set K of key steps, 0 in K."""

    @abstractmethod
    def key(self, step: int) -> bool:
        """Say whether `step` is in K."""

    def fresh(self, step: int, part: str, change: Callable[[], float]) -> bool:
        """See `Rule.fresh`."""
        return self.key(step)

    def of(self, steps: int) -> tuple[int, ...]:
        """Return the key steps of a run of `steps` steps."""
        if steps < 1 or (self.limit is not None and steps > self.limit):
            raise ValueError(f"steps={steps}: expected 1 to {self.limit or 'any'} for {self}")
        return tuple(i for i in range(steps) if self.key(i))


@dataclass(frozen=True)
class Uniform(Keys):
    """Every k-th step: ceil(T / k) key steps. `every` = 1 computes all."""

    every: int = 3

    def __post_init__(self) -> None:
        """Check the period."""
        check_whole("every", self.every, 1)

    def key(self, step: int) -> bool:
        """See `Keys.key`."""
        return step % self.every == 0


@dataclass(frozen=True)
class _Dense(Keys):
    steps: int = 30
    count: int = 10
    power: float = 2.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_whole("steps", self.steps, 1)
        check_whole("count", self.count, 1)
        check_positive("power", self.power)
        if self.count > self.steps:
            raise ValueError(f"count={self.count}: expected at most steps={self.steps}")

    @property
    def limit(self) -> int | None:
        """Return the number of steps the rule was made for."""
        return self.steps

    def _at(self, u: float) -> float:
        raise NotImplementedError

    def key(self, step: int) -> bool:
        """See `Keys.key`."""
        return step in self._positions()

    def _positions(self) -> list[int]:
        out: list[int] = []
        for j in range(self.count):
            near = round(self._at(j / self.count) * (self.steps - 1))
            # rounding makes neighbours meet at the dense end: each takes the next free step
            near = max(near, out[-1] + 1 if out else 0)
            out.append(min(near, self.steps - self.count + j))
        return out


@dataclass(frozen=True)
class FrontDense(_Dense):
    """`count` key steps of `steps`, close together at the start (noise): i_j = (j / n)^g (T - 1).

    `power` g > 0: 1 spreads evenly, larger is denser.
    """

    def _at(self, u: float) -> float:
        return u**self.power


@dataclass(frozen=True)
class BackDense(_Dense):
    """`count` key steps of `steps`, close together at the end (data).

    i_j = (1 - (1 - j / n)^g) (T - 1).
    """

    def _at(self, u: float) -> float:
        return 1 - (1 - u) ** self.power


@dataclass(frozen=True)
class Window(Keys):
    """Inherit only in the steps `start` <= i < `stop`; in there every `every`-th step is key.

    The first step of the window inherits from the one before it, so `start` >= 1; `every` = 0 has
    no key step inside.
    """

    start: int = 5
    stop: int = 25
    every: int = 2

    def __post_init__(self) -> None:
        """Check the window."""
        check_whole("start", self.start, 1)
        check_whole("every", self.every, 0)
        if self.stop < self.start:
            raise ValueError(f"stop={self.stop}: expected at least start={self.start}")

    def key(self, step: int) -> bool:
        """See `Keys.key`."""
        if not self.start <= step < self.stop:
            return True
        return self.every > 0 and (step - self.start + 1) % self.every == 0


@dataclass(frozen=True)
class Explicit(Keys):
    """The key steps themselves; 0 must be among them. Later steps than the last one inherit."""

    steps: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Check that the first step is there."""
        steps = tuple(self.steps)
        object.__setattr__(self, "steps", steps)
        for step in steps:
            check_whole("steps", step, 0)
        if 0 not in steps:
            raise ValueError(
                f"steps={steps}: expected 0 among them, the first step has nothing to inherit"
            )

    def key(self, step: int) -> bool:
        """See `Keys.key`."""
        return step in self.steps


@dataclass(frozen=True)
class Route(Rule):
    """For each part the steps at which it inherits; it computes at all others.

    steps: of the run. inherits: steps by part, never 0; a part that is not named computes always.
    levels: (steps,) the timesteps of the run it was made for, which another schedule does not
        share, so that it is refused; () accepts any.
    """

    steps: int = 1
    inherits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the table."""
        check_whole("steps", self.steps, 1)
        levels = tuple(float(level) for level in self.levels)
        if levels and len(levels) != self.steps:
            raise ValueError(f"{len(levels)} levels: expected steps={self.steps} of them")
        table = {part: tuple(sorted(at)) for part, at in self.inherits.items()}
        for part, at in table.items():
            if at and not (at[0] >= 1 and at[-1] < self.steps):
                raise ValueError(
                    f"{part} inherits at steps {at}: expected 1 to {self.steps - 1}, the first "
                    "step has nothing to inherit"
                )
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "inherits", table)

    @property
    def limit(self) -> int | None:
        """Return the number of steps the rule was made for."""
        return self.steps

    def check(self, step: int, level: float) -> None:
        """See `Rule.check`."""
        super().check(step, level)
        made = self.levels[step] if self.levels else level
        if abs(level - made) > 2e-3 * max(abs(made), 1e-3):
            raise ValueError(
                f"step {step + 1} of a run is at timestep {level:g}: the route was made for "
                f"{made:g} there, on {self.steps} steps; sample on that schedule, or make a route "
                "for this one"
            )

    def fresh(self, step: int, part: str, change: Callable[[], float]) -> bool:
        """See `Rule.fresh`."""
        return step not in self.inherits.get(part, ())

    def count(self) -> int:
        """Return how many (step, part) pairs inherit."""
        return sum(len(at) for at in self.inherits.values())

    def saved(self, saved: Mapping[str, int]) -> int:
        """Return what a run saves, where a part saves `saved[part]` at each step it inherits."""
        return sum(len(at) * saved[part] for part, at in self.inherits.items())

    def only(self, steps: Collection[int]) -> Route:
        """Return the route that inherits at these steps and computes at all others."""
        table = {part: tuple(i for i in at if i in steps) for part, at in self.inherits.items()}
        return Route(self.steps, table, self.levels)

    def __str__(self) -> str:
        """Say how long it is and how much it inherits."""
        return f"Route of {self.steps} steps, {self.count()} inheritances"


@dataclass(frozen=True)
class Adaptive(Rule):
    """Key when the watched feature moved by more than `tau` since the last key step.

    change = max over rows of ||h - h_key|| / ||h_key||, h the input of the first part that could
    be inherited: what the fresh layers before it made of the sample. `tau` > 0; at 0+ every step
    is key. Which steps are key depends on the picture, and on the worst row of a batch.
    """

    tau: float = 0.1
    watches = True

    def __post_init__(self) -> None:
        """Check the threshold."""
        check_positive("tau", self.tau)

    def fresh(self, step: int, part: str, change: Callable[[], float]) -> bool:
        """See `Rule.fresh`."""
        return step == 0 or change() > self.tau
