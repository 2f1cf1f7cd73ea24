"""AutoDistil: a few small super-networks, taught by attention relations; students for any budget.

Xu et al., "Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models"
(2201.12507). One super-network a sub-space of sizes, since what differs too much in width and depth
disturbs each other's gradients. Sub-networks are slices of its tensors (see `elastic`).

    R_Q = q q^T / sqrt(D / A)      for each of A relation heads, D channels of q; R_K, R_V alike
    L = sum over Q, K, V of 1 / (A T) sum KL(softmax R^teacher || softmax R^student)

q, k, v of the last block. A is common to teacher and student, so that widths may differ. Networks
that are used as they come out (a DiT that predicts noise) learn answers instead: `Answer`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.units import macs
from effuse.core.contracts import Applied, Call, Loss, Objective, Transform, Where, everywhere
from effuse.core.errors import Unsuited
from effuse.core.method import method

from .base import Found, SearchSpace, Tactic, search
from .elastic import FAMILIES, Cut, Size, family_of, whole_of

# ---- one student


@method(
    "autodistil",
    seed=62,
    paper="Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models",
    year=2022,
    buys="students of many sizes from one training of a transformer, chosen without retraining",
    missing="UNets, whose streams differ by stage; PixArt, SD3 and FLUX transformers",
    example=lambda: Slice(depth=2, hidden=24, heads=1, ratio=2.0),
)
@dataclass(frozen=True)
class Slice(Transform):
    """One student of a transformer: the leading channels, heads and neurons of some blocks.

    None keeps what the network has. The slice alone is rough: it wants healing, or the weights of a
    trained super-network: `handle.model.load_state_dict(student.extract(size).state_dict())`.

    depth: blocks. hidden: channels of the stream. heads: of attention. ratio: neurons a channel.
    where: must allow every block, since the stream runs through all.
    """

    depth: int | None = None
    hidden: int | None = None
    heads: int | None = None
    ratio: float | None = None
    where: Where = everywhere
    kind = "prune"

    def attach(self, model: nn.Module) -> Sliced:
        """Cut the network in place; the original's tensors are kept until `finalize`.

        Raises:
            Unsuited: nobody knows how such a network is cut.
            ValueError: it is smaller than asked, or `where` leaves out a block.
        """
        if not any(c.__name__ in FAMILIES for c in type(model).__mro__):
            raise Unsuited(
                f"{type(model).__name__} cannot be sliced: expected one of {', '.join(FAMILIES)}"
            )
        whole = whole_of(model)
        asked = {n: getattr(self, n) for n in vars(whole.size)}
        size = Size(**{n: vars(whole.size)[n] if v is None else v for n, v in asked.items()})
        head = f"{family_of(model).blocks}."
        for name, module in model.named_modules():
            block = name.startswith(head) and "." not in name.removeprefix(head)
            if block and not self.where(name, module):
                raise ValueError(f"where leaves out {name}: a slice goes through every block")
        return Sliced(self, model, Cut(model, size, whole))


class Sliced(Applied):
    """A network that is a slice of what it was. cut: which."""

    transform: Slice

    def __init__(self, transform: Slice, model: nn.Module, cut: Cut):
        self.transform, self.model, self.cut = transform, model, cut
        self.before = sum(p.numel() for p in model.parameters())
        self._old = [dict(held) for held in _held(model)]
        for held, new in zip(_held(model), _held(cut.extract(model)), strict=True):
            held.clear()
            held.update(new)
        self.finalized = False

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective:
        """Return the squared distance to `teacher`'s answers."""
        from effuse.distill.features import FeatureDistillation

        return FeatureDistillation(teacher, self.model, [])

    def report(self) -> dict[str, Any]:
        """Return the size, and counted parameters before and after."""
        now = sum(p.numel() for p in self.model.parameters())
        return {**vars(self.cut.size), "parameters_before": self.before, "parameters": now}

    def detach(self) -> None:
        """Put the whole network back; what the slice learnt since is gone."""
        if self.finalized:
            raise RuntimeError("it was finalized, the rest is gone for good: load the original")
        for held, old in zip(_held(self.model), self._old, strict=True):
            held.clear()
            held.update(old)

    def finalize(self) -> None:
        """Give up the way back and its memory."""
        self._old, self.finalized = [], True


def _held(model: nn.Module) -> tuple[dict[str, Any], ...]:
    return model._modules, model._parameters, model._buffers


# ---- sub-spaces


@method("autodistil", example=lambda: SubSpace((1, 2), (16, 32), (1, 2), (2.0, 3.0)))
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

    def of(self, relations: Tensor, pairs: Tensor | None) -> Tensor:
        """Return what of one network's relations, (B, A, T, T), is compared: themselves here."""
        return relations

    @abstractmethod
    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor | None) -> Tensor:
        """Return (B, A, T) of what `of` gives; pairs: (B, 1, 1, T) bool, which count; None all."""


@dataclass(frozen=True)
class KL(Distance):
    """KL(softmax of the teacher's || softmax of the student's) of every row: the paper's."""

    def of(self, relations: Tensor, pairs: Tensor | None) -> Tensor:
        """Return log-probabilities of each row."""
        if pairs is not None:
            relations = relations.masked_fill(~pairs, torch.finfo(relations.dtype).min)
        return relations.log_softmax(-1)

    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor | None) -> Tensor:
        """See `Distance`."""
        apart = teacher.exp() * (teacher - student)
        return (apart if pairs is None else apart.masked_fill(~pairs, 0.0)).sum(-1)


@dataclass(frozen=True)
class MSE(Distance):
    """Mean square difference of raw relations: what the authors' code does."""

    def __call__(self, teacher: Tensor, student: Tensor, pairs: Tensor | None) -> Tensor:
        """See `Distance`."""
        apart = (teacher - student).square()
        if pairs is None:
            return apart.mean(-1)
        return apart.masked_fill(~pairs, 0.0).sum(-1) / pairs.sum(-1).clamp_min(1)


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
    return (split / math.sqrt(d)) @ split.mT


class Lesson(ABC):
    """What a student shall have in common with its teacher. A frozen dataclass."""

    @abstractmethod
    def read(
        self, model: nn.Module, run: Callable[[], Any], mask: Tensor | None = None
    ) -> list[Tensor]:
        """Return what is compared, of one run of a network.

        Args:
            model: teacher or student.
            run: runs it.
            mask: (B, T) bool, tokens that count; all if None.
        """

    @abstractmethod
    def apart(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss, (), of what was read of both."""


@dataclass(frozen=True)
class Answer(Lesson):
    """Mean square difference of answers, the first of them if there are several."""

    def read(
        self, model: nn.Module, run: Callable[[], Any], mask: Tensor | None = None
    ) -> list[Tensor]:
        """See `Lesson`."""
        out = run()
        return [out if isinstance(out, Tensor) else out[0]]

    def apart(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """See `Lesson`; a mask is of the first two axes."""
        square = (teacher[0] - student[0]).square()
        return (square if mask is None else square[mask.bool()]).mean()


@dataclass(frozen=True)
class AttentionRelationLoss(Lesson):
    """Distance of the last block's relations, summed over Q, K, V: the paper's.

    heads: A, relation heads. distance: `KL`, or `MSE`.
    """

    heads: int = 12
    distance: Distance = field(default_factory=KL)

    def read(
        self, model: nn.Module, run: Callable[[], Any], mask: Tensor | None = None
    ) -> list[Tensor]:
        """See `Lesson`; what comes after q, k, v is not run."""
        with attending(model) as heard, suppress(_Heard):
            run()
        return self.relations([heard[i] for i in range(3)], mask)

    def relations(self, qkv: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
        """Return what is compared of q, k, v: (B, T, D), of any width, heads side by side."""
        pairs = None if mask is None else mask.bool()[:, None, None]
        return [self.distance.of(relation(x, self.heads), pairs) for x in qkv]

    def apart(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """See `Lesson`: mean over rows, heads and tokens."""
        total = teacher[0].new_zeros(())
        for old, new in zip(teacher, student, strict=True):
            if mask is None:
                total = total + self.distance(old, new, None).mean()
                continue
            rows = self.distance(old, new, mask.bool()[:, None, None])
            rows = rows.masked_fill(~mask.bool()[:, None], 0.0)
            total = total + rows.sum() / (self.heads * mask.bool().sum())
        return total

    def __call__(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of q, k, v of both."""
        return self.apart(self.relations(teacher, mask), self.relations(student, mask), mask)


class _Heard(BaseException):
    """All was heard that is needed; not an error."""


@contextmanager
def attending(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect q, k, v (0, 1, 2) of a network's last block, and end its run there by `_Heard`."""
    family = family_of(model)
    rows: Any = model.get_submodule(family.blocks)
    attention = rows[len(rows) - 1].get_submodule(family.attention)
    heard: dict[int, Tensor] = {}

    def hear(i: int, out: Tensor) -> None:
        heard[i] = out
        if len(heard) == 3:
            raise _Heard

    hooks = [
        attention.get_submodule(n).register_forward_hook(lambda m, args, out, i=i: hear(i, out))
        for i, n in enumerate(family.qkv)
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

    def read(self, size: Size, batch: Mapping[str, Any], lesson: Lesson) -> list[Tensor]:
        """Return what a lesson compares, of one sub-network; batch: as of `Sandwich`."""
        cut, (args, kwargs) = self.cut(size), batch["call"]
        run = lambda: cut(self.network, *args, **kwargs)  # noqa: E731
        return lesson.read(cut.skeleton, run, batch.get("mask"))

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


def read_of(model: nn.Module, batch: Mapping[str, Any], lesson: Lesson) -> list[Tensor]:
    """Return what a lesson compares, of a network, which runs as it is set: to train or not."""
    args, kwargs = batch["call"]
    return lesson.read(model, lambda: model(*args, **kwargs), batch.get("mask"))


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
        loss: what is learnt; attention relations if None.
        drawn: sizes by chance.
        sizes: called with a generator in place of all that: the sizes of one step.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: ElasticTransformer,
        loss: Lesson | None = None,
        *,
        drawn: int = 2,
        seed: int = 0,
        sizes: Callable[[torch.Generator], Sequence[Size]] | None = None,
    ):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.measure: Lesson = loss or AttentionRelationLoss()
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
        how, mask = self.measure, batch.get("mask")
        with torch.no_grad():
            target = read_of(self.teacher, batch, how)
        chance = torch.Generator().manual_seed(1_000_003 * self.seed + int(self.step))
        self.step += 1
        each = [
            how.apart(target, self.student.read(size, batch, how), mask)
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
    loss: Lesson,
    targets: Sequence[Sequence[Tensor]] | None = None,
) -> float:
    """Return the mean loss of one sub-network over batches.

    targets: what `targets_of` gives, where many sub-networks are asked.
    """
    values = [
        loss.apart(target, student.read(size, b, loss), b.get("mask"))
        for target, b in zip(targets or targets_of(teacher, batches, loss), batches, strict=True)
    ]
    return float(torch.stack(values).double().mean())


@torch.no_grad()
def targets_of(
    teacher: nn.Module, batches: Sequence[Mapping[str, Any]], loss: Lesson
) -> list[list[Tensor]]:
    """Return what the teacher has of each batch."""
    return [read_of(teacher, b, loss) for b in batches]


def choose(
    student: ElasticTransformer,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    most_macs: float = math.inf,
    loss: Lesson | None = None,
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
        loss: what was learnt; attention relations if None.
        tactic: None measures all sizes under the bound.
        budget: of the tactic.
        proxy: a task's loss of an extracted sub-network, in place of the held-out loss.
        how: of `search`: journal, workers, seed.

    Raises:
        ValueError: nothing is cheap enough.
    """
    measure, call = loss or AttentionRelationLoss(), batches[0]["call"]
    targets = targets_of(teacher, batches, measure) if proxy is None else None
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
            value = held_out_loss(student, size, teacher, batches, measure, targets)
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
