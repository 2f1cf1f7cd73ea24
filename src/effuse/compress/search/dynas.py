"""LINAS (DyNAS): find the best sub-networks or recipes with few true measurements.

Sarah et al., "A Hardware-Aware System for Accelerating Deep Neural Network Optimization" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effuse.core.method import method

from .base import Study, Tactic, Trial
from .evolution import Evolution, Variation, engine_for
from .predictors import Predictor


@method(
    "dynas",
    seed=30,
    paper="A Hardware-Aware System for Accelerating Deep Neural Network Optimization",
    year=2022,
    buys="the best sub-networks or recipes for a budget, with few measurements",
    missing="the paper's concurrent search, whose protocol it does not give; its super-networks",
)
@dataclass(frozen=True)
class LINAS(Tactic):
    """Measures a population, learns to predict, evolves on predictions, measures what came out.

        P = N random points
        repeat E / N times:  measure P;  f_m = fit(all measured) for each metric m
                             P = the last population of evolution on f, for M evaluations

    Measurements made: (E / N) N, less what was known. With E = N it is random search. What it
    returns was measured; predictions are never reported.

    Attributes:
        population: N.
        predictions: M, evaluations of the predictors in one loop; the paper has 5,000 to 20,000.
        predictor: of each metric.
        engine: evolution; None takes NSGA-II for one or two objectives and U-NSGA-III for three,
            with the paper's settings.
        warm: trials of an earlier search of the same space, on other hardware or other data: the
            first population then comes from predictors fitted on them.
        fresh: ask for nothing twice: the best that evolution met and nobody has measured comes in
            place of what was measured. The paper's loop loses those places, more of them the
            smaller N is.
    """

    population: int = 50
    predictions: int = 20_000
    predictor: Predictor = field(default_factory=Predictor)
    engine: Evolution | None = None
    warm: tuple[Trial, ...] = ()
    fresh: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.population < 2 or self.predictions < self.population:
            raise ValueError(
                f"population={self.population}, predictions={self.predictions}: expected two or "
                "more, and at least as many predictions"
            )

    def run(self, study: Study, budget: int, rng: torch.Generator) -> None:
        """See `Tactic.run`."""
        size = min(self.population, budget)
        engine = self.engine or self._paper(len(study.objectives), size)
        points = study.space.random(size, rng)
        if self.warm:
            genes = torch.tensor([study.space.encode(t.config) for t in self.warm if not t.failure])
            metrics = [t.metrics for t in self.warm if not t.failure]
            points = self._next(study, genes, metrics, engine, rng)[:size]
        for loop in range(max(1, round(budget / size))):
            if loop:
                good = [t for t in study.trials.values() if not t.failure]
                if len(good) < 2:
                    points = study.space.random(size, rng)
                else:
                    genes, _ = study.table()
                    points = self._next(study, genes, [t.metrics for t in good], engine, rng)
            study.measure(points[:size])

    def _paper(self, objectives: int, size: int) -> Evolution:
        if objectives == 3:
            return engine_for(3, size, Variation(1.0, 30.0, 0.02, 20.0))
        return engine_for(objectives, size, Variation(0.9, 15.0, 0.02, 20.0))

    def _next(
        self,
        study: Study,
        genes: Tensor,
        metrics: Sequence[Any],
        engine: Evolution,
        rng: torch.Generator,
    ) -> Tensor:
        """Return the last population of evolution on what is predicted from measured points."""
        x = study.space.onehot(genes)
        names = dict.fromkeys([*study.objectives, *(b.metric for b in study.budgets)])
        fitted = {
            n: self.predictor.fit(x, torch.tensor([m[n] for m in metrics], dtype=torch.float64))
            for n in names
        }
        pool = _Pool(engine, study, rng)

        def predicted(some: Tensor) -> tuple[Tensor, Tensor | None]:
            features = study.space.onehot(some)
            found = {n: f(features) for n, f in fitted.items()}
            y = [found[n] if g == "min" else -found[n] for n, g in study.objectives.items()]
            out = torch.stack(y, 1), study.excess(found, len(some))
            if self.fresh:
                pool.add(some, *out)
            return out

        last = engine.evolve(study.space, predicted, self.predictions, rng)
        if self.fresh:
            best = pool.best().tolist()
            best += [r for r in study.space.random(4 * engine.population, rng).tolist()
                     if tuple(r) not in pool.seen]  # fmt: skip
            last = torch.tensor(best[: engine.population], dtype=torch.long)
        return last.view(-1, len(study.space.places))


class _Pool:
    """The best points that evolution met and nobody has measured."""

    def __init__(self, engine: Evolution, study: Study, rng: torch.Generator):
        self.engine, self.rng = engine, rng
        self.seen = set(study.trials)
        self.parts: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def add(self, genes: Tensor, y: Tensor, excess: Tensor | None) -> None:
        """Take what is new; now and then forget what is far from best."""
        new = [i for i, r in enumerate(map(tuple, genes.tolist())) if r not in self.seen]
        self.seen.update(map(tuple, genes[new].tolist()))
        self.parts.append((genes[new], y[new], None if excess is None else excess[new]))
        if sum(len(g) for g, _, _ in self.parts) > 20 * self.engine.population:
            self.best()

    def best(self) -> Tensor:
        """Return as many as a population has, or all."""
        genes, y, excess = (
            None if part[0] is None else torch.cat(part) for part in zip(*self.parts, strict=True)
        )
        assert genes is not None
        assert y is not None
        if len(genes) > self.engine.population:
            stay, _ = self.engine.order(y, excess, self.engine.population, self.rng)
            genes, y = genes[stay], y[stay]
            excess = None if excess is None else excess[stay]
        self.parts = [(genes, y, excess)]
        return genes
