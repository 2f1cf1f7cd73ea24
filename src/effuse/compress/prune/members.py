"""Members of dependency groups: what each is worth, and which stay.

Scores are one tensor a group, (size,), by its name; higher is worth more.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effuse.compress.groups import Group, masked, member_params
from effuse.compress.units import parameters
from effuse.core.errors import check_fraction

from .criteria import Batch, answer_to, evaluating, task_loss

Scores = Mapping[str, Tensor]

# ---- what a member is worth


class Worth(ABC):
    """Scores the members of groups. A frozen dataclass."""

    @abstractmethod
    def scores(
        self, model: nn.Module, which: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Return (size,) scores by the group's name; `model` is left as it was."""


@dataclass(frozen=True)
class Magnitude(Worth):
    """Root mean square of the member's weights in all slots; looks at no data."""

    def scores(
        self, model: nn.Module, which: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Worth.scores`."""
        out = {}
        for g in which:
            total, count = torch.zeros(g.size, dtype=torch.float64), 0
            for s in g.slots:
                p = getattr(model.get_submodule(s.module), s.param).detach()
                mine = p.narrow(s.dim, s.offset, g.size * g.span).movedim(s.dim, 0)
                mine = mine.double().reshape(g.size, -1)
                total += mine.square().sum(1).cpu()
                count += mine.shape[1]
            out[g.name] = (total / count).sqrt()
        return out


@dataclass(frozen=True)
class Taylor(Worth):
    """First-order change of the task loss, E|dL/dm|, m = 1 scales the member; needs targets."""

    def scores(
        self, model: nn.Module, which: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Worth.scores`; one forward and backward a batch."""
        if not batches or any(b.get("target") is None for b in batches):
            raise ValueError(
                'Taylor needs batches with a "target" (`effuse.compress.calibrate.uniform_calls`)'
            )
        out = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in which}
        with evaluating(model):
            for batch in batches:
                masks = {g.name: torch.ones(g.size, requires_grad=True) for g in which}
                with torch.enable_grad(), masked(model, masks):
                    loss = task_loss(answer_to(model, batch), batch)
                grads = torch.autograd.grad(loss, list(masks.values()))
                for name, grad in zip(masks, grads, strict=True):
                    out[name] += grad.double().abs() / len(batches)
        return out


@dataclass(frozen=True)
class Random(Worth):
    """Uniform at random; the floor of every comparison."""

    seed: int = 0

    def scores(
        self, model: nn.Module, which: Sequence[Group], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Worth.scores`."""
        rng = torch.Generator().manual_seed(self.seed)
        return {g.name: torch.rand(g.size, generator=rng, dtype=torch.float64) for g in which}


# ---- who stays


class Choice(ABC):
    """Says which members stay. A frozen dataclass."""

    @abstractmethod
    def choose(
        self, model: nn.Module, which: Sequence[Group], scores: Scores
    ) -> dict[str, list[int]]:
        """Return the members that stay of each group, by its name, in order."""


@dataclass(frozen=True)
class Threshold(Choice):
    """Those that score above a number: the paper's 2.5 for logits that began at 3."""

    above: float = 2.5

    def choose(
        self, model: nn.Module, which: Sequence[Group], scores: Scores
    ) -> dict[str, list[int]]:
        """See `Choice.choose`."""
        return {g.name: (scores[g.name] > self.above).nonzero().flatten().tolist() for g in which}


@dataclass(frozen=True)
class PerLayer(Choice):
    """The best floor(keep n) of every group; of equal ones the first.

    keep: fraction of the members, [0, 1]; 1 keeps all.
    """

    keep: float = 0.8

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("keep", self.keep, zero=True)

    def choose(
        self, model: nn.Module, which: Sequence[Group], scores: Scores
    ) -> dict[str, list[int]]:
        """See `Choice.choose`."""
        return {g.name: _best(scores[g.name], self.keep).tolist() for g in which}


@dataclass(frozen=True)
class PerKind(Choice):
    """The best floor(keep n) of all heads, of all neurons, and so on; a group may lose all.

    keep: fraction of the members of a kind, [0, 1]; 1 keeps all.
    """

    keep: float = 0.8

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("keep", self.keep, zero=True)

    def choose(
        self, model: nn.Module, which: Sequence[Group], scores: Scores
    ) -> dict[str, list[int]]:
        """See `Choice.choose`."""
        out: dict[str, list[int]] = {}
        for kind in dict.fromkeys(g.kind for g in which):
            mine = [g for g in which if g.kind == kind]
            stay = _best(torch.cat([scores[g.name] for g in mine]), self.keep)
            out |= _split(mine, stay)
        return {g.name: out[g.name] for g in which}


@dataclass(frozen=True)
class Budget(Choice):
    """As many as the network may have parameters: an equal share of every kind, the worst go first.

    keep: fraction of the parameters of the whole network that stay at most, (0, 1]; 1 keeps all.
    """

    keep: float = 0.8

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("keep", self.keep)

    def choose(
        self, model: nn.Module, which: Sequence[Group], scores: Scores
    ) -> dict[str, list[int]]:
        """See `Choice.choose`.

        Raises:
            ValueError: all members together are not enough; says which is the least.
        """
        total = parameters(model)
        rank, cost = [], []
        for g in which:
            kind = torch.cat([scores[h.name] for h in which if h.kind == g.kind])
            # of equal scores, in the order of the groups
            order = kind.argsort(stable=True, descending=True).argsort(stable=True)
            before = sum(h.size for h in _before(which, g) if h.kind == g.kind)
            rank.append(1 - order[before : before + g.size].double() / len(kind))
            cost.append(torch.full((g.size,), member_params(model, g)))
        worth, price = torch.cat(rank), torch.cat(cost)
        order = worth.argsort(stable=True)
        gone = price[order].cumsum(0)
        need = (1 - self.keep) * total
        if need > float(gone[-1]) * (1 + 1e-12):
            least = math.ceil(1e4 * (1 - float(gone[-1]) / total)) / 1e4
            raise ValueError(
                f"keep={self.keep:g}: expected at least {least:.4f}; {1 - least:.1%} of this "
                f"network is the most that its {len(which)} groups allow"
            )
        count = 0 if need <= 0 else int((gone < need - 1e-6).sum()) + 1
        stay = order[count:].sort().values
        return _split(which, stay)


def _before(which: Sequence[Group], group: Group) -> Sequence[Group]:
    return which[: [g.name for g in which].index(group.name)]


def _best(scores: Tensor, keep: float) -> Tensor:
    """Return where the best floor(keep n) are, in order; of equal ones the first."""
    count = math.floor(keep * len(scores) + 1e-9)
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _split(which: Sequence[Group], stay: Tensor) -> dict[str, list[int]]:
    """Return by group what is given by place in all groups one after the other."""
    out, begin = {}, 0
    for g in which:
        mine = stay[(stay >= begin) & (stay < begin + g.size)] - begin
        out[g.name], begin = mine.tolist(), begin + g.size
    return out
