"""A space of choices, what was measured of its points, and the search over them.

    space -> tactic -> points -> evaluate(config) -> metrics -> journal -> Found (front)
               ^_________________________________________|

What a point is, a sub-network or a recipe, only `evaluate` knows. Every evaluation is written down
whole the moment it is there; the same search over the same journal goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from effuse.core.fields import nearest
from effuse.core.files import write_whole
from effuse.ops import pareto

Config = dict[str, Any]
Evaluate = Callable[[Config], Mapping[str, float]]
"""What a point is worth: metrics by name. An exception is a failure of that point."""
Goal = Literal["min", "max"]


@dataclass(frozen=True)
class Gene:
    """A choice among values, made at `count` positions."""

    values: tuple[Any, ...]
    count: int = 1

    def __post_init__(self) -> None:
        """Check that there is something to choose."""
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or self.count < 1:
            raise ValueError(f"{self.values!r} at {self.count} positions: expected at least one")
        if any(a == b for i, a in enumerate(self.values) for b in self.values[:i]):
            raise ValueError(f"{self.values!r}: a value stands there twice")


class SearchSpace:
    """Named choices; a point is a config {name: value} or its genes, indices into the values.

    Args:
        genes: values by name; `Gene(values, count)` where one choice is made at many positions, a
            tuple in the config.
        silent: called with a config, names the choices that change nothing there ("ratio", or
            "ratio[2]" for one position): they are set to their first value, so that one thing is
            measured once.
        allowed: called with a config; False leaves the point out.
    """

    def __init__(
        self,
        genes: Mapping[str, Sequence[Any] | Gene],
        silent: Callable[[Config], Iterable[str]] | None = None,
        allowed: Callable[[Config], bool] | None = None,
    ):
        if not genes:
            raise ValueError("a space without choices: expected {name: values}")
        self.genes = {n: g if isinstance(g, Gene) else Gene(tuple(g)) for n, g in genes.items()}
        self.silent, self.allowed = silent, allowed
        self.places = [
            (n, f"{n}[{i}]" if g.count > 1 else n)
            for n, g in self.genes.items()
            for i in range(g.count)
        ]
        self.sizes = torch.tensor([len(self.genes[n].values) for n, _ in self.places])

    @property
    def size(self) -> int:
        """Number of points, silent and forbidden ones counted: the product of all choices."""
        return math.prod(self.sizes.tolist())

    def encode(self, config: Mapping[str, Any]) -> list[int]:
        """Return the genes of a config: one index a position.

        Raises:
            ValueError: names or values that the space does not have.
        """
        if config.keys() != self.genes.keys():
            odd = sorted(config.keys() ^ self.genes.keys())[0]
            raise ValueError(
                f"a config with or without {odd!r}{nearest(odd, self.genes)}: expected exactly "
                f"{', '.join(self.genes)}"
            )
        out = []
        for name, gene in self.genes.items():
            given = config[name] if gene.count > 1 else (config[name],)
            if len(given) != gene.count or any(v not in gene.values for v in given):
                raise ValueError(
                    f"{name}={config[name]!r}: expected {gene.count} of {gene.values!r}"
                )
            out += [gene.values.index(v) for v in given]
        return out

    def decode(self, genes: Sequence[int] | Tensor) -> Config:
        """Return the config of genes: (G,)."""
        left = [int(g) for g in genes]
        if len(left) != len(self.places):
            raise ValueError(f"{len(left)} genes: expected {len(self.places)}")
        out: Config = {}
        for name, gene in self.genes.items():
            mine, left = left[: gene.count], left[gene.count :]
            values = tuple(gene.values[g] for g in mine)
            out[name] = values if gene.count > 1 else values[0]
        return out

    def _silenced(self, genes: Tensor) -> Tensor:
        """Return (N, G) bool: what changes nothing at each point."""
        out = torch.zeros_like(genes, dtype=torch.bool)
        if self.silent is not None:
            for i, row in enumerate(genes):
                quiet = set(self.silent(self.decode(row)))
                out[i] = torch.tensor([n in quiet or p in quiet for n, p in self.places])
        return out

    def canonical(self, genes: Tensor) -> Tensor:
        """Return genes: (N, G) with silent choices at their first value."""
        return genes.masked_fill(self._silenced(genes), 0) if self.silent else genes

    def onehot(self, genes: Tensor) -> Tensor:
        """Return (N, sum of sizes) float64: a one a gene, in its segment; silent segments zero."""
        segments = [
            torch.nn.functional.one_hot(column, int(n)).double()
            for column, n in zip(genes.unbind(1), self.sizes, strict=True)
        ]
        if self.silent is not None:
            loud = (~self._silenced(genes)).double()
            segments = [s * loud[:, i, None] for i, s in enumerate(segments)]
        return torch.cat(segments, 1)

    def random(self, count: int, rng: torch.Generator) -> Tensor:
        """Return (count, G) points, each once, allowed, silent choices at their first value.

        Fewer where the space has fewer (or seems to, after many draws).
        """
        found: dict[tuple[int, ...], None] = {}
        for _ in range(64):
            u = torch.rand(max(count, 16), len(self.places), generator=rng, dtype=torch.float64)
            for row in self.canonical((u * self.sizes).long()).tolist():
                if len(found) < count and tuple(row) not in found and self.permits(row):
                    found[tuple(row)] = None
            if len(found) >= count:
                break
        return torch.tensor(list(found), dtype=torch.long).view(-1, len(self.places))

    def permits(self, genes: Sequence[int] | Tensor) -> bool:
        """Say whether a point is allowed."""
        return self.allowed is None or bool(self.allowed(self.decode(genes)))

    def points(self, most: int = 1 << 20) -> Tensor:
        """Return all points (N, G), each once, in order.

        Raises:
            ValueError: more than `most`.
        """
        if self.size > most:
            raise ValueError(f"{self.size} points: expected at most {most} to list them all")
        each = [torch.arange(int(n)) for n in self.sizes]
        genes = torch.cartesian_prod(*each).view(-1, len(each))
        if self.silent is not None:
            genes = self.canonical(genes).unique(dim=0)
        if self.allowed is not None:
            genes = genes[torch.tensor([self.permits(g) for g in genes])]
        return genes

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain data, to tell one space from another."""
        return {n: [list(map(repr, g.values)), g.count] for n, g in self.genes.items()}


@dataclass(frozen=True)
class Budget:
    """A bound on a metric: `Budget("latency", 0.5, times=True)` is half the original's latency.

    above: the metric must be at least `bound`, not at most. times: bound is a multiple of what the
    metric is at the starting point.
    """

    metric: str
    bound: float
    above: bool = False
    times: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "latency<0.5x", "bytes<=2e6", "score>0.95x".

        Raises:
            ValueError: anything else.
        """
        found = re.fullmatch(
            r"\s*([A-Za-z_][\w.]*)\s*([<>])=?\s*([0-9.]+(?:[eE][+-]?\d+)?)\s*([x×]?)\s*", text
        )
        try:
            if found is None:
                raise ValueError
            return cls(found[1], float(found[3]), found[2] == ">", bool(found[4]))
        except ValueError:
            raise ValueError(
                f'budget {text!r}: expected a metric, < or >, and a number, as in "latency<0.5x" '
                '(half of the original) or "bytes<2e6"'
            ) from None

    def at(self, start: Mapping[str, float]) -> Budget:
        """Return it in the metric's own unit; `start` are the metrics of the original."""
        if not self.times:
            return self
        if self.metric not in start:
            raise ValueError(
                f"budget on {self.metric!r}{nearest(self.metric, start)}: measured were "
                f"{', '.join(start)}"
            )
        return Budget(self.metric, self.bound * start[self.metric], self.above)

    def excess(self, value: Tensor) -> Tensor:
        """Return by how much values break the bound, as a share of it; 0 where they keep it."""
        over = (self.bound - value) if self.above else (value - self.bound)
        return over.clamp_min(0) / max(abs(self.bound), 1e-12)


@dataclass(frozen=True)
class Trial:
    """One evaluation: metrics, or why there are none. seconds: it took. cached: from a journal."""

    config: Config
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "config": self.config,
            "metrics": dict(self.metrics),
            "failure": self.failure,
            "seconds": round(self.seconds, 4),
        }


class Journal:
    """A folder with one file a trial, written whole or not at all.

    Args:
        folder: made if missing. None keeps nothing on disk.
        about: what the figures depend on (pipeline, prompts, machine); a folder begun with other
            words, or for another space, is refused.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any] | None = None):
        self.folder = None if folder is None else Path(folder)
        self.about = dict(about or {})

    def open(self, space: SearchSpace) -> dict[tuple[int, ...], Trial]:
        """Return what was written before, by genes; what cannot be read is measured again.

        Raises:
            ValueError: the folder is another search's.
        """
        if self.folder is None:
            return {}
        (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        head = json.loads(json.dumps({"space": space.to_dict(), "about": self.about}, default=repr))
        file = self.folder / "search.json"
        if file.exists():
            if json.loads(file.read_text()) != head:
                raise ValueError(
                    f"{self.folder}: holds trials of another search (space, pipeline or prompts "
                    "differ); give another folder or remove this one"
                )
        else:
            write_whole(file, json.dumps(head, indent=1) + "\n")
        out = {}
        for path in sorted((self.folder / "trials").glob("*.json")):
            try:
                read = json.loads(path.read_text())
                genes = tuple(int(g) for g in read["genes"])
                out[genes] = Trial(
                    space.decode(genes), read["metrics"], read["failure"], read["seconds"], True
                )
            except (ValueError, KeyError, IndexError):
                continue
        return out

    def write(self, genes: Sequence[int], trial: Trial) -> None:
        """Write one trial."""
        if self.folder is None:
            return
        name = hashlib.sha256(repr(tuple(genes)).encode()).hexdigest()[:16]
        plain = json.dumps({"genes": list(genes), **trial.to_dict()}, indent=1, default=repr)
        write_whole(self.folder / "trials" / f"{name}.json", plain + "\n")


class Workers(Protocol):
    """Where evaluations run."""

    def run(self, evaluate: Evaluate, configs: Sequence[Config]) -> Iterator[tuple[int, Trial]]:
        """Yield (which, trial) as they come, in any order, one for each config."""
        ...


def attempt(evaluate: Evaluate, config: Config) -> Trial:
    """Evaluate one point; an exception or a metric that is not finite is a failure, not a 0."""
    begun = time.perf_counter()
    try:
        metrics = {n: float(v) for n, v in evaluate(dict(config)).items()}
    except Exception as error:
        return Trial(config, {}, f"{type(error).__name__}: {error}", time.perf_counter() - begun)
    spent = time.perf_counter() - begun
    odd = [n for n, v in metrics.items() if not math.isfinite(v)]
    if odd:
        return Trial(config, {}, f"{odd[0]} is {metrics[odd[0]]}", spent)
    return Trial(config, metrics, "", spent)


@dataclass(frozen=True)
class Local:
    """One after the other, in this process: the one to measure seconds with."""

    def run(self, evaluate: Evaluate, configs: Sequence[Config]) -> Iterator[tuple[int, Trial]]:
        """See `Workers.run`."""
        for i, config in enumerate(configs):
            yield i, attempt(evaluate, config)


@dataclass(frozen=True)
class Ray:
    """Many at once on Ray's workers; a point whose worker dies is given to another one.

    workers: at most so many at once. cpus: of each. retries: how often a point may lose its worker
    before the search stops. address: of a running cluster; None starts one here. Seconds measured
    beside each other disturb each other: search latency with `Local`, or one worker a machine.
    """

    workers: int = 2
    cpus: float = 1.0
    retries: int = 3
    address: str | None = None

    def run(self, evaluate: Evaluate, configs: Sequence[Config]) -> Iterator[tuple[int, Trial]]:
        """See `Workers.run`."""
        try:
            import ray
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'effuse[ray]'") from error
        if not ray.is_initialized():
            ray.init(
                address=self.address,
                num_cpus=None if self.address else self.workers,
                include_dashboard=False,
                log_to_driver=False,
            )
        seat = ray.remote(
            num_cpus=self.cpus, max_restarts=self.retries, max_task_retries=self.retries
        )(_Seat)
        free = [seat.remote(evaluate) for _ in range(min(self.workers, len(configs)))]
        waiting = list(enumerate(configs))
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and free:
                (i, config), actor = waiting.pop(0), free.pop()
                running[actor.run.remote(config)] = i, actor
            (done,), _ = ray.wait(list(running), num_returns=1)
            i, actor = running.pop(done)
            free.append(actor)
            yield i, ray.get(done)


class _Seat:
    """A worker's own `evaluate`: what it loads, it loads once."""

    def __init__(self, evaluate: Evaluate):
        self.evaluate = evaluate

    def run(self, config: Config) -> Trial:
        """Return the trial of one point."""
        return attempt(self.evaluate, config)


class Study:
    """What a tactic works with: the space, and `measure`; keeps the books.

    asked: evaluations a tactic asked for. measured: those that were really made, in this run.
    """

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluate,
        objectives: Mapping[str, Goal],
        budgets: Sequence[Budget],
        journal: Journal,
        workers: Workers,
        on_trial: Callable[[Trial, int], None] | None = None,
    ):
        self.space, self.evaluate, self.objectives = space, evaluate, dict(objectives)
        self.budgets, self.journal, self.workers = list(budgets), journal, workers
        self.on_trial = on_trial
        self.known = journal.open(space)
        self.trials: dict[tuple[int, ...], Trial] = {}
        self.asked = self.measured = 0

    def measure(self, genes: Tensor) -> list[Trial]:
        """Return the trials of genes: (N, G); what is known is not evaluated again."""
        rows = [tuple(r) for r in self.space.canonical(genes).tolist()]
        self.asked += len(rows)
        new = list(dict.fromkeys(r for r in rows if r not in self.known))
        configs = [self.space.decode(r) for r in new]
        for i, trial in self.workers.run(self.evaluate, configs):
            self._check(trial)
            self.journal.write(new[i], trial)
            self.known[new[i]] = trial
            self.measured += 1
            if self.on_trial:
                self.on_trial(trial, self.measured)
        for r in rows:
            self.trials.setdefault(r, self.known[r])
        return [self.known[r] for r in rows]

    def _check(self, trial: Trial) -> None:
        needed = [*self.objectives, *(b.metric for b in self.budgets)]
        missing = [n for n in needed if n not in trial.metrics]
        if not trial.failure and missing:
            raise ValueError(
                f"evaluate gave {', '.join(trial.metrics) or 'nothing'}: expected "
                f"{missing[0]!r}{nearest(missing[0], trial.metrics)} too"
            )

    def signed(self, metrics: Mapping[str, float]) -> list[float]:
        """Return the objectives of one trial, all to be minimized."""
        return [metrics[n] if g == "min" else -metrics[n] for n, g in self.objectives.items()]

    def table(self) -> tuple[Tensor, Tensor]:
        """Return genes (N, G) and objectives (N, M), to be minimized, of what did not fail."""
        good = {g: t for g, t in self.trials.items() if not t.failure}
        genes = torch.tensor(list(good), dtype=torch.long).view(-1, len(self.space.places))
        y = torch.tensor([self.signed(t.metrics) for t in good.values()], dtype=torch.float64)
        return genes, y.view(-1, len(self.objectives))

    def metric(self, name: str) -> Tensor:
        """Return one metric (N,) of what did not fail, in the order of `table`."""
        good = [t.metrics[name] for t in self.trials.values() if not t.failure]
        return torch.tensor(good, dtype=torch.float64)

    def excess(self, metrics: Mapping[str, Tensor], count: int) -> Tensor | None:
        """Return (count,): by how much points break the budgets; None where there are none."""
        if not self.budgets:
            return None
        return torch.stack([b.excess(metrics[b.metric]) for b in self.budgets]).sum(0)


class Tactic(ABC):
    """Which points to measure next. A frozen dataclass."""

    @abstractmethod
    def run(self, study: Study, budget: int, rng: torch.Generator) -> None:
        """Ask `study.measure` for `budget` evaluations."""


@dataclass(frozen=True)
class RandomSearch(Tactic):
    """Points drawn evenly, each once: what every tactic must beat."""

    def run(self, study: Study, budget: int, rng: torch.Generator) -> None:
        """See `Tactic.run`."""
        study.measure(study.space.random(budget, rng))


@dataclass(frozen=True)
class Found:
    """What a search found, in the order in which it was asked for.

    start: metrics of the original, where there is one. asked, measured: see `Study`.
    """

    trials: tuple[Trial, ...]
    objectives: Mapping[str, Goal]
    budgets: tuple[Budget, ...] = ()
    start: Mapping[str, float] = field(default_factory=dict)
    asked: int = 0
    measured: int = 0

    def _points(self, trials: Sequence[Trial]) -> Tensor:
        rows = [
            [t.metrics[n] if g == "min" else -t.metrics[n] for n, g in self.objectives.items()]
            for t in trials
        ]
        return torch.tensor(rows, dtype=torch.float64).view(-1, len(self.objectives))

    @property
    def within(self) -> list[Trial]:
        """Trials that did not fail and keep every budget."""

        def keeps(t: Trial) -> bool:
            return all(
                float(b.excess(torch.tensor(t.metrics[b.metric], dtype=torch.float64))) == 0
                for b in self.budgets
            )

        return [t for t in self.trials if not t.failure and keeps(t)]

    @property
    def front(self) -> list[Trial]:
        """Measured trials within the budgets that no other one beats, by the first objective."""
        good = self.within
        if not good:
            return []
        y = self._points(good)
        kept = [(y[i].tolist(), i) for i in pareto.front(y).nonzero().flatten().tolist()]
        return [good[i] for _, i in sorted(kept)]

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Return the volume the front covers below `reference` (maximized metrics negated)."""
        return pareto.hypervolume(self._points(self.within), reference)

    def samples_to_reach(self, volume: float, reference: Sequence[float]) -> int | None:
        """Return after how many trials the front covers `volume`; None if it never does."""
        for i, v in enumerate(pareto.reached(self._points(self.within), reference)):
            if v >= volume:
                return i + 1
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: the front, all trials, how it was searched."""
        return {
            "objectives": dict(self.objectives),
            "budgets": [vars(b) for b in self.budgets],
            "start": dict(self.start),
            "asked": self.asked,
            "measured": self.measured,
            "failures": sum(bool(t.failure) for t in self.trials),
            "front": [t.to_dict() for t in self.front],
            "trials": [t.to_dict() for t in self.trials],
        }


def search(
    space: SearchSpace,
    evaluate: Evaluate,
    objectives: Mapping[str, Goal],
    *,
    tactic: Tactic | None = None,
    budget: int = 250,
    budgets: Iterable[Budget | str] = (),
    start: Mapping[str, float] | None = None,
    journal: Journal | str | Path | None = None,
    workers: Workers | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial, int], None] | None = None,
) -> Found:
    """Measure points of a space and return those that no other beats.

    Args:
        space: what there is to choose.
        evaluate: metrics of one config; failures may raise.
        objectives: "min" or "max" of one to three metrics.
        tactic: which points; LINAS by default.
        budget: evaluations a tactic may ask for, those found in the journal included.
        budgets: bounds on metrics, as objects or as text ("latency<0.5x").
        start: metrics of the original, which bounds with "x" are multiples of.
        journal: a folder; the same search again goes on from what it holds.
        workers: where evaluations run; here, one after the other, by default.
        seed: of the tactic; the same seed asks for the same points.
        on_trial: called after each evaluation with the trial and how many there were.

    Raises:
        ValueError: no objectives or more than three, or bounds on what is not measured.
    """
    if not 1 <= len(objectives) <= 3:
        raise ValueError(f"{len(objectives)} objectives: expected one, two or three")
    wrong = [f"{n}={g!r}" for n, g in objectives.items() if g not in ("min", "max")]
    if wrong:
        raise ValueError(f"objective {wrong[0]}: expected 'min' or 'max'")
    if budget < 1:
        raise ValueError(f"budget={budget}: expected a positive number of evaluations")
    if tactic is None:
        from .dynas import LINAS

        tactic = LINAS()
    bounds = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
    bounds = [b.at(start or {}) for b in bounds]
    kept = journal if isinstance(journal, Journal) else Journal(journal)
    study = Study(space, evaluate, objectives, bounds, kept, workers or Local(), on_trial)
    tactic.run(study, budget, torch.Generator().manual_seed(seed))
    return Found(
        tuple(study.trials.values()),
        dict(objectives),
        tuple(bounds),
        dict(start or {}),
        study.asked,
        study.measured,
    )
