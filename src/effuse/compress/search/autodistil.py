"""AutoDistil: a few small super-networks, taught by attention relations; students for any budget.

Xu et al., "Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models"
(2201.12507). One super-network a sub-space of sizes, since what differs too much in width and depth
disturbs each other's gradients. Sub-networks are slices of its tensors (see `elastic`).

    R_Q = q q^T / sqrt(D / A)      for each of A relation heads, D channels of q; R_K, R_V alike
    L = sum over Q, K, V of 1 / (A T) sum KL(softmax R^teacher || softmax R^student)

q, k, v of the last block. A is common to teacher and student, so that widths may differ.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import macs
from effuse.core.contracts import Call, Loss, Objective
from effuse.core.method import method

from .base import Found, SearchSpace, Tactic, search
from .elastic import Cut, Size, family_of, whole_of

Relations = tuple[Tensor, Tensor, Tensor]
"""q, k, v of one block, (B, T, D), heads side by side."""


@method(
    "autodistil",
    seed=62,
    paper="Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models",
    year=2022,
    buys="students of many sizes from one training of a transformer, chosen without retraining",
    missing="UNets, whose streams differ by stage; a transform for recipes: students are networks",
    example=lambda: SubSpace((1, 2), (16, 32), (1, 2), (2.0, 3.0)),
)
@dataclass(frozen=True)
class SubSpace:
    """Sizes that share one super-network: four of each in the paper, close together.

    depth: blocks. hidden: channels of the stream. heads: of attention, of the teacher's width.
    ratio: neurons a channel in feed-forward layers.
    """

    depth: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    ratio: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that sizes rise."""
        for name in ("depth", "hidden", "heads", "ratio"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name}={values!r}: expected rising numbers, each once")

    @property
    def space(self) -> SearchSpace:
        """The same as a space to search."""
        return SearchSpace(vars(self))

    @property
    def largest(self) -> Size:
        """The network that holds all others."""
        return Size(self.depth[-1], self.hidden[-1], self.heads[-1], self.ratio[-1])

    @property
    def smallest(self) -> Size:
        """The least of all."""
        return Size(self.depth[0], self.hidden[0], self.heads[0], self.ratio[0])

    def sizes(self) -> list[Size]:
        """Return all sizes."""
        return [Size(**self.space.decode(g)) for g in self.space.points()]

    def draw(self, rng: torch.Generator) -> Size:
        """Return a size by chance."""
        return Size(**self.space.decode(self.space.random(1, rng)[0]))


BASE = SubSpace((9, 10, 11, 12), (544, 576, 608, 640), (9, 10, 11, 12), (2.5, 3.0, 3.5, 4.0))
SMALL = SubSpace((9, 10, 11, 12), (256, 288, 320, 352), (7, 8, 9, 10), (2.5, 3.0, 3.5, 4.0))
TINY = SubSpace((4, 5, 6, 7), (128, 160, 192, 224), (7, 8, 9, 10), (2.0, 2.5, 3.0, 3.5))
"""The paper's sub-spaces of BERT base (12 blocks, 768 channels, 12 heads)."""


# ---- relations


class Distance(ABC):
    """How far relations are apart. A frozen dataclass."""

    @abstractmethod
    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor) -> Tensor:
        """Return (B, A, T) of relations (B, A, T, T); pairs: (B, 1, 1, T) bool, which count."""


@dataclass(frozen=True)
class KL(Distance):
    """KL(softmax of the teacher's || softmax of the student's) of every row: the paper's."""

    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor) -> Tensor:
        """See `Distance`."""
        low = torch.finfo(teacher.dtype).min
        p, q = (x.masked_fill(~pairs, low).log_softmax(-1) for x in (teacher, student))
        return (p.exp() * (p - q)).masked_fill(~pairs, 0.0).sum(-1)


@dataclass(frozen=True)
class MSE(Distance):
    """Mean square difference of raw relations: what the authors' code does."""

    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor) -> Tensor:
        """See `Distance`."""
        apart = (teacher - student).square().masked_fill(~pairs, 0.0)
        return apart.sum(-1) / pairs.sum(-1).clamp_min(1)


def relation(x: Tensor, heads: int) -> Tensor:
    """Return x x^T / sqrt(d), (B, A, T, T), of x: (B, T, D) in A heads of d = floor(D / A).

    Raises:
        ValueError: fewer channels than heads.
    """
    d = x.shape[-1] // heads
    if d < 1:
        raise ValueError(
            f"{x.shape[-1]} channels in {heads} relation heads: expected at least one channel each"
        )
    split = x[..., : d * heads].unflatten(-1, (heads, d)).transpose(1, 2)
    return split @ split.mT / math.sqrt(d)


@dataclass(frozen=True)
class AttentionRelationLoss:
    """Distance of the last block's relations, summed over Q, K, V.

    heads: A, relation heads. distance: `KL`, or `MSE`.
    """

    heads: int = 12
    distance: Distance = field(default_factory=KL)

    def __call__(
        self, teacher: Relations, student: Relations, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss, (): mean over rows, heads and tokens.

        Args:
            teacher: q, k, v.
            student: likewise, of any width.
            mask: (B, T) bool, tokens that count; all if None.
        """
        b, t = teacher[0].shape[:2]
        valid = teacher[0].new_ones(b, t, dtype=torch.bool) if mask is None else mask.bool()
        pairs, total = valid[:, None, None], teacher[0].new_zeros(())
        for old, new in zip(teacher, student, strict=True):
            rows = self.distance(relation(old, self.heads), relation(new, self.heads), pairs)
            rows = rows.masked_fill(~valid[:, None], 0.0)
            total = total + rows.sum() / (self.heads * valid.sum())
        return total


@contextmanager
def attending(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect q, k, v of a network's last block while inside."""
    family = family_of(model)
    rows: Any = model.get_submodule(family.blocks)
    attention = rows[len(rows) - 1].get_submodule(family.attention)
    heard: list[Tensor] = []
    hooks = [
        attention.get_submodule(n).register_forward_hook(lambda m, args, out: heard.append(out))
        for n in family.qkv
    ]
    try:
        yield heard
    finally:
        for h in hooks:
            h.remove()


# ---- the super-network


class ElasticTransformer(nn.Module):
    """A network whose sub-networks of a sub-space share its tensors.

    Args:
        network: as large as the sub-space's largest size. See `from_pretrained_dense`.
        space: the sub-space.
    """

    def __init__(self, network: nn.Module, space: SubSpace):
        super().__init__()
        self.network, self.space = network, space
        self.whole = whole_of(network)
        self._cuts: dict[Size, Cut] = {}
        self.cut(space.largest)
        self.size = space.largest

    @classmethod
    def from_pretrained_dense(cls, teacher: nn.Module, space: SubSpace) -> ElasticTransformer:
        """Return a super-network with the teacher's leading slices, of the largest size.

        Raises:
            TypeError: nobody knows how such a network is cut.
            ValueError: the teacher is smaller than the sub-space.
        """
        return cls(Cut(teacher, space.largest).extract(teacher).requires_grad_(True), space)

    def cut(self, size: Size) -> Cut:
        """Return how the sub-network of a size is cut; remembered."""
        if size not in self._cuts:
            self._cuts[size] = Cut(self.network, size, self.whole)
        return self._cuts[size]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-network of `self.size`."""
        return self.cut(self.size)(self.network, *args, **kwargs)

    def relations(self, size: Size, call: Call) -> Relations:
        """Return q, k, v of the last block of one sub-network."""
        cut, (args, kwargs) = self.cut(size), call
        with attending(cut.skeleton) as heard:
            cut(self.network, *args, **kwargs)
        q, k, v = heard
        return q, k, v

    def extract(self, size: Size | Mapping[str, Any]) -> nn.Module:
        """Return a sub-network alone, with tensors of its own.

        The same of a fresh network, and `load_state_dict`, read it back from a file.
        """
        made = size if isinstance(size, Size) else Size(**size)
        return self.cut(made).extract(self.network)

    def parameters_at(self, size: Size) -> int:
        """Count the parameters of a sub-network."""
        return sum(p.numel() for p in self.cut(size).skeleton.parameters())

    def macs_at(self, size: Size, call: Call) -> int:
        """Count the multiply-accumulates of one call of a sub-network."""
        return macs(self.extract(size), call)


def relations_of(model: nn.Module, call: Call) -> Relations:
    """Return q, k, v of the last block of a network, which runs as it is set: to train or not."""
    args, kwargs = call
    with attending(model) as heard:
        model(*args, **kwargs)
    q, k, v = heard
    return q, k, v


class Sandwich(Objective):
    """Teaches all sizes at once: each step the largest, the smallest and some drawn by chance.

    Their losses are added. What is drawn follows from `seed` and the step alone, so that all
    workers of one training draw the same. A batch is {"call": (args, kwargs)}, and a "mask".

    Both run without dropout, of labels too: their answers must be comparable. Decay and moments of
    an optimizer also act where no sub-network of a step reached; the largest one is part of every
    step, so all is reached.

    Args:
        teacher: frozen.
        student: the super-network.
        loss: of relations.
        drawn: sizes by chance.
        sizes: called with a generator in place of all that: the sizes of one step.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: ElasticTransformer,
        loss: AttentionRelationLoss | None = None,
        *,
        drawn: int = 2,
        seed: int = 0,
        sizes: Callable[[torch.Generator], Sequence[Size]] | None = None,
    ):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.student, self.measure = student, loss or AttentionRelationLoss()
        self.drawn, self.seed, self.sizes = drawn, seed, sizes or self._sandwich
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def _sandwich(self, rng: torch.Generator) -> list[Size]:
        space = self.student.space
        return [space.largest, space.smallest, *(space.draw(rng) for _ in range(self.drawn))]

    def train(self, mode: bool = True) -> Sandwich:
        """Set all but the teacher to train or not."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """See `Objective.loss`; terms are the largest, the smallest, and the drawn ones' sum."""
        call, mask = batch["call"], batch.get("mask")
        with torch.no_grad():
            target = relations_of(self.teacher, call)
        chance = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.step))
        self.step += 1
        each = [
            self.measure(target, self.student.relations(size, call), mask)
            for size in self.sizes(chance)
        ]
        terms = {f"size{i}": v for i, v in enumerate(each)}
        return Loss(torch.stack(each).sum(), terms)


# ---- choosing


@torch.no_grad()
def held_out_loss(
    student: ElasticTransformer,
    size: Size,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    loss: AttentionRelationLoss,
) -> float:
    """Return the mean loss of one sub-network over batches."""
    values = [
        loss(relations_of(teacher, b["call"]), student.relations(size, b["call"]), b.get("mask"))
        for b in batches
    ]
    return float(torch.stack(values).double().mean())


def choose(
    student: ElasticTransformer,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    most_macs: float = math.inf,
    loss: AttentionRelationLoss | None = None,
    tactic: Tactic | None = None,
    budget: int | None = None,
    proxy: Callable[[nn.Module], float] | None = None,
    **how: Any,
) -> tuple[Size, Found]:
    """Return the sub-network with the least held-out loss that is cheap enough, and all trials.

    Every size is measured, or what a `tactic` (LINAS, say) asks for with its `budget`.

    Args:
        student: the trained super-network.
        teacher: what it was taught by.
        batches: held out.
        most_macs: multiply-accumulates of one call of the first batch, at most.
        loss: of relations.
        tactic: None measures all sizes under the bound.
        budget: of the tactic.
        proxy: a task's loss of an extracted sub-network, in place of the held-out loss.
        how: of `search`: journal, workers, seed.

    Raises:
        ValueError: nothing is cheap enough.
    """
    measure, call = loss or AttentionRelationLoss(), batches[0]["call"]
    space = student.space.space
    price = functools.cache(lambda size: student.macs_at(size, call))
    least = price(student.space.smallest)
    if most_macs < least:
        raise ValueError(
            f"most_macs={most_macs:g}: the smallest sub-network needs {least:g}, expected as much"
        )

    def evaluate(config: dict[str, Any]) -> dict[str, float]:
        size = Size(**config)
        cost = price(size)
        if proxy is not None:
            value = proxy(student.extract(size))
        else:
            value = held_out_loss(student, size, teacher, batches, measure)
        return {"loss": value, "macs": cost, "parameters": student.parameters_at(size)}

    if tactic is None:
        space.allowed = lambda c: price(Size(**c)) <= most_macs
        tactic, budget = _All(), space.size
    limits = [f"macs<{most_macs:.0f}"] if math.isfinite(most_macs) else []
    goals: Any = {"loss": "min", "macs": "min"}
    found = search(
        space, evaluate, goals, tactic=tactic, budget=budget or 250, budgets=limits, **how
    )
    if not found.front:
        raise ValueError(f"most_macs={most_macs:g}: nothing measured was cheap enough")
    return Size(**min(found.front, key=lambda t: t.metrics["loss"]).config), found


@dataclass(frozen=True)
class _All(Tactic):
    """Every point."""

    def run(self, study: Any, budget: int, rng: torch.Generator) -> None:
        """See `Tactic.run`."""
        study.measure(study.space.points())
