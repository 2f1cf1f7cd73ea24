"""Proofs: a method's claims against strong baselines, in one run, on this machine.

`effuse prove NAME` runs `effuse.proofs.NAME` and writes `evidence/NAME.json`, whole or not at all.
A claim that does not hold is a result and is written down as one.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import math
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from effuse.core.errors import check_choice
from effuse.core.files import write_whole
from effuse.core.machine import machine, versions
from effuse.core.method import methods

T = TypeVar("T")
Size = Literal["smoke", "small", "proof"]


@dataclass(frozen=True)
class Scale:
    """How much a proof may cost: smoke about 5 s, small about a minute, proof about ten minutes."""

    size: Size = "small"

    def __post_init__(self) -> None:
        """Check the name."""
        check_choice("size", self.size, ("smoke", "small", "proof"))

    def pick(self, smoke: T, small: T, proof: T) -> T:
        """Return the value for this size."""
        return {"smoke": smoke, "small": small, "proof": proof}[self.size]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds to repeat over: one, two, three."""
        return tuple(range(self.pick(1, 2, 3)))


@dataclass(frozen=True)
class Claim:
    """One statement with the two figures it compares, and what would refute it.

    interval: of the difference or of `measured`, where there are enough repetitions.
    """

    statement: str
    baseline: float
    measured: float
    unit: str
    better: Literal["higher", "lower"]
    holds: bool
    falsifier: str = ""
    interval: tuple[float, float] | None = None


@dataclass
class Evidence:
    """What a proof found: its claims, and a row for every variant compared, with exact costs."""

    claims: Sequence[Claim]
    rows: Sequence[Mapping[str, Any]] = ()
    notes: str = ""
    method: str = ""
    size: str = ""
    seconds: float = math.nan
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, *parts: Iterable[Claim | Mapping[str, Any]], notes: str = "") -> Evidence:
        """Return the evidence of parts that yield claims and rows, in any order."""
        found = [f for part in parts for f in part]
        claims = [f for f in found if isinstance(f, Claim)]
        return cls(claims, [f for f in found if not isinstance(f, Claim)], notes)

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(c.holds for c in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a json file."""
        return {"method": self.method, "holds": self.holds, **dataclasses.asdict(self)}

    def summary(self) -> str:
        """Return a line a claim, for a terminal."""
        lines = [f"{self.method} ({self.size}, {self.seconds:.0f} s)"]
        for c in self.claims:
            mark = "holds" if c.holds else "does not hold"
            lines.append(
                f"  {mark}: {c.statement}: {c.measured:.4g} against {c.baseline:.4g} {c.unit}"
            )
        return "\n".join(lines)


_PROOFS: dict[str, Callable[[Scale], Evidence]] = {}


def proof(
    name: str,
) -> Callable[[Callable[[Scale], Evidence]], Callable[[Scale], Evidence]]:
    """Record the decorated function as the proof of method `name`."""

    def register(run: Callable[[Scale], Evidence]) -> Callable[[Scale], Evidence]:
        _PROOFS[name] = run
        return run

    return register


def names() -> list[str]:
    """Return the methods that have a proof, sorted."""
    return sorted(i.name for i in pkgutil.iter_modules(__path__) if not i.name.startswith("_"))


def prove(name: str, size: str = "small", out: str | Path | None = "evidence") -> Evidence:
    """Run the proof of a method and write `out`/NAME.json.

    Args:
        name: of the method; its proof has the same file name.
        size: "smoke", "small" or "proof".
        out: folder; None writes nothing.

    Raises:
        ValueError: no such proof, or no such size.
    """
    scale = Scale(cast(Size, size))
    if name not in names():
        card = methods().get(name)
        if card is not None and card.measured_in:
            raise ValueError(
                f"{name!r} has no proof of its own: it is measured beside others, run "
                f"`effuse prove {card.measured_in}`"
            )
        raise ValueError(f"no proof of {name!r}: expected one of {', '.join(names())}")
    importlib.import_module(f"effuse.proofs.{name}")
    begun = time.perf_counter()
    evidence = _PROOFS[name](scale)
    evidence.seconds = round(time.perf_counter() - begun, 1)
    evidence.method, evidence.size = name, size
    evidence.date = datetime.date.today().isoformat()
    evidence.versions, evidence.machine = versions(), machine()
    if out is not None:
        write(evidence, Path(out))
    return evidence


def write(evidence: Evidence, folder: Path) -> Path:
    """Write the evidence into `folder`, whole or not at all; not-a-numbers become null."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{evidence.method}.json"
    write_whole(file, json.dumps(_plain(evidence.to_dict()), indent=1) + "\n")
    return file


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
