"""Evolution over genes: NSGA-II for one or two objectives, U-NSGA-III for three.

    parents -> tournament -> crossover (SBX) -> mutation (polynomial) -> rounding -> children
    parents + children -> non-dominated sort -> the best by rank, then by room -> parents

With one objective ranks are places, and NSGA-II is the elitist genetic algorithm.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effuse.ops import pareto

from .base import SearchSpace, Study, Tactic

Fitness = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Genes (N, G) to objectives (N, M), minimized, and by how much limits are broken (N,) or None."""


@dataclass(frozen=True)
class Variation:
    """How children come from parents: integer SBX, then polynomial mutation, then rounding.

    crossover: probability of a pair to be crossed; its genes then each with one half. mutation: of
    each gene, None is one over their number. The larger eta, the nearer children stay.
    """

    crossover: float = 0.9
    crossover_eta: float = 15.0
    mutation: float | None = None
    mutation_eta: float = 20.0

    def children(self, a: Tensor, b: Tensor, sizes: Tensor, rng: torch.Generator) -> Tensor:
        """Return (2 N, G) children of the pairs a, b: (N, G), within 0 ... sizes - 1."""

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=rng, dtype=torch.float64)

        x, y, top = a.double(), b.double(), (sizes - 1).double()
        u = rand(*x.shape)
        power = 1 / (self.crossover_eta + 1)
        beta = torch.where(u <= 0.5, (2 * u) ** power, (0.5 / (1 - u)) ** power)
        crossed = (rand(len(x), 1) < self.crossover) & (rand(*x.shape) < 0.5)
        beta = torch.where(crossed, beta, 1.0)
        swap = crossed & (rand(*x.shape) < 0.5)
        x, y = torch.where(swap, y, x), torch.where(swap, x, y)
        middle, half = (x + y) / 2, beta * (x - y) / 2
        out = torch.cat([middle + half, middle - half])
        rate = 1 / out.shape[1] if self.mutation is None else self.mutation
        u = rand(*out.shape)
        power = 1 / (self.mutation_eta + 1)
        step = torch.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 * (1 - u)) ** power)
        hit = rand(*out.shape) < rate
        # a range half a step wider at both ends, so that choices of two can change
        out = torch.where(hit, out + step * (top + 1), out)
        return out.round().clamp_min(0).minimum(top).long()


@dataclass(frozen=True)
class Evolution(Tactic):
    """What NSGA-II and U-NSGA-III share: pairs, children without duplicates, elitist merging."""

    population: int = 50
    variation: Variation = Variation()

    @abstractmethod
    def order(
        self, y: Tensor, excess: Tensor | None, keep: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return which of y: (N, M) survive, (keep,), and a (N, 2) key: rank, then tie-break."""

    def parents(self, keys: Tensor, rng: torch.Generator) -> Tensor:
        """Return (2, P) winners of tournaments between two, smaller keys first."""
        n = len(keys)
        half = (self.population + 1) // 2
        a, b = torch.randint(n, (2, 2 * half), generator=rng)
        first = (keys[a, 0] < keys[b, 0]) | (
            (keys[a, 0] == keys[b, 0]) & (keys[a, 1] <= keys[b, 1])
        )
        return torch.where(first, a, b).view(2, half)

    def evolve(
        self,
        space: SearchSpace,
        fitness: Fitness,
        evaluations: int,
        rng: torch.Generator,
        first: Tensor | None = None,
    ) -> Tensor:
        """Return the last population (P, G) after about `evaluations` of `fitness`."""
        genes = space.random(self.population, rng) if first is None else first
        y, excess = fitness(genes)
        spent = len(genes)
        while spent < evaluations:
            _, keys = self.order(y, excess, len(genes), rng)
            new = self.offspring(space, genes, keys, rng)[: max(1, evaluations - spent)]
            if not len(new):
                break
            more, over = fitness(new)
            spent += len(new)
            genes, y = torch.cat([genes, new]), torch.cat([y, more])
            if excess is not None and over is not None:
                excess = torch.cat([excess, over])
            stay, _ = self.order(y, excess, min(self.population, len(genes)), rng)
            genes, y = genes[stay], y[stay]
            excess = None if excess is None else excess[stay]
        return genes

    def offspring(
        self, space: SearchSpace, genes: Tensor, keys: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Return up to P children, none of them a parent, none twice."""
        seen = {tuple(r) for r in genes.tolist()}
        out: list[tuple[int, ...]] = []
        for _ in range(8):
            a, b = self.parents(keys, rng)
            made = space.canonical(self.variation.children(genes[a], genes[b], space.sizes, rng))
            for row in map(tuple, made.tolist()):
                if row not in seen and len(out) < self.population and space.permits(row):
                    seen.add(row)
                    out.append(row)
            if len(out) >= self.population:
                break
        return torch.tensor(out, dtype=torch.long).view(-1, len(space.places))

    def run(self, study: Study, budget: int, rng: torch.Generator) -> None:
        """Search on real measurements alone: every child is measured."""

        def fitness(genes: Tensor) -> tuple[Tensor, Tensor | None]:
            trials = study.measure(genes)
            worst = [float("inf")] * len(study.objectives)
            rows = [worst if t.failure else study.signed(t.metrics) for t in trials]
            bounds = {
                b.metric: torch.tensor(
                    [t.metrics.get(b.metric, float("nan")) for t in trials], dtype=torch.float64
                )
                for b in study.budgets
            }
            excess = study.excess(bounds, len(trials))
            y = torch.tensor(rows, dtype=torch.float64)
            return y, None if excess is None else excess.nan_to_num(nan=float("inf"))

        self.evolve(study.space, fitness, budget, rng)


@dataclass(frozen=True)
class NSGA2(Evolution):
    """Survival by rank, then by crowding distance."""

    def order(
        self, y: Tensor, excess: Tensor | None, keep: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `Evolution.order`."""
        rank = pareto.ranks(y, excess)
        room = torch.zeros(len(y), dtype=torch.float64)
        for level in range(int(rank.max()) + 1):
            mine = rank == level
            room[mine] = pareto.crowding(y[mine].nan_to_num(posinf=1e300))
        keys = torch.stack([rank.double(), -room], 1)
        best = sorted(range(len(y)), key=keys.tolist().__getitem__)[:keep]
        return torch.tensor(best), keys


@functools.cache
def _spread(count: int, objectives: int) -> Tensor:
    """Return (count, M) directions on the simplex, pushed apart: least sum of 1 / distance^M.

    The corners are among them and stay.
    """
    rng = torch.Generator().manual_seed(0)
    corners = torch.eye(objectives, dtype=torch.float64)
    free = torch.randn(count - objectives, objectives, generator=rng, dtype=torch.float64)
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        w = torch.cat([corners, free.softmax(1)])
        apart = torch.pdist(w).clamp_min(1e-6)
        loss = (apart**-objectives).sum().log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat([corners, free.detach().softmax(1)])


@dataclass(frozen=True)
class UNSGA3(Evolution):
    """Survival by rank, then by how empty the niche of a reference direction is.

    directions: so many, spread over the simplex by energy. Parents of one niche fight by rank, then
    by distance to its direction; of different ones, chance decides: the "U".
    """

    variation: Variation = Variation(crossover=1.0, crossover_eta=30.0)
    directions: int = 20

    def order(
        self, y: Tensor, excess: Tensor | None, keep: int, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """See `Evolution.order`; keys are rank and distance, `_niche` apart."""
        rank = pareto.ranks(y, excess)
        niche, distance = self._niches(y, rank)
        keys = torch.stack([rank.double(), distance, niche.double()], 1)
        stay = torch.zeros(len(y), dtype=torch.bool)
        for level in range(int(rank.max()) + 1):
            mine = (rank == level).nonzero().flatten()
            if int(stay.sum()) + len(mine) <= keep:
                stay[mine] = True
                continue
            left = mine.tolist()
            while int(stay.sum()) < keep:
                counts = torch.bincount(niche[stay], minlength=self.directions)
                open_ = sorted({int(niche[i]) for i in left})
                least = min(int(counts[n]) for n in open_)
                choices = [n for n in open_ if int(counts[n]) == least]
                at = choices[int(torch.randint(len(choices), (), generator=rng))]
                inside = [i for i in left if int(niche[i]) == at]
                pick = (
                    min(inside, key=lambda i: float(distance[i]))
                    if least == 0
                    else inside[int(torch.randint(len(inside), (), generator=rng))]
                )
                stay[pick] = True
                left.remove(pick)
            break
        return stay.nonzero().flatten(), keys

    def parents(self, keys: Tensor, rng: torch.Generator) -> Tensor:
        """See `Evolution.parents`."""
        half = (self.population + 1) // 2
        a, b = torch.randint(len(keys), (2, 2 * half), generator=rng)
        chance = torch.rand(2 * half, generator=rng) < 0.5
        same = keys[a, 2] == keys[b, 2]
        better = (keys[a, 0] < keys[b, 0]) | (
            (keys[a, 0] == keys[b, 0]) & (keys[a, 1] <= keys[b, 1])
        )
        return torch.where(torch.where(same, better, chance), a, b).view(2, half)

    def _niches(self, y: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """Return each point's nearest direction and its distance, in units of the front."""
        good = torch.isfinite(y).all(1)
        y = torch.where(good[:, None], y, y[good].max(0).values if good.any() else 0.0)
        first = y[rank == 0]
        ideal = y.min(0).values
        shifted = first - ideal
        # the point nearest to each axis, by the largest of its coordinates off it
        weights = torch.full((y.shape[1],) * 2, 1e6, dtype=y.dtype).fill_diagonal_(1.0)
        extreme = shifted[(shifted[:, None] * weights).max(2).values.argmin(0)]
        span = shifted.max(0).values
        if float(torch.linalg.matrix_rank(extreme)) == y.shape[1]:
            cut = torch.linalg.solve(extreme, torch.ones(y.shape[1], dtype=y.dtype))
            if bool((cut > 1e-12).all()):
                span = 1 / cut
        unit = (y - ideal) / torch.where(span > 1e-12, span, 1.0)
        to = _spread(self.directions, y.shape[1])
        to = to / to.norm(dim=1, keepdim=True)
        along = unit @ to.mT
        apart = (unit.square().sum(1, keepdim=True) - along.square()).clamp_min(0).sqrt()
        distance, niche = apart.min(1)
        return niche, distance


def engine_for(objectives: int, population: int, variation: Variation | None = None) -> Evolution:
    """Return the engine for a number of objectives: NSGA-II up to two, U-NSGA-III for three."""
    made: type[Evolution] = UNSGA3 if objectives == 3 else NSGA2
    return made(population) if variation is None else made(population, variation)
