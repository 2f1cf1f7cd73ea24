"""Samples that fall between the modes of the data: told by their own walk, and left out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method

from .trajectory import NoiseToSignal, Scored, Steps, Trajectory, Window, scored

__all__ = [
    "AtRandom", "ByScore", "Chosen", "HallucinationFilter", "NoiseToSignal", "Scored", "Selection",
    "Steps", "Trajectory", "Window", "auc", "choose_window", "filter_samples", "generations",
    "lowest", "removed", "scored", "threshold",
]  # fmt: skip


def lowest(score: Tensor, count: int, groups: Tensor | None = None) -> Tensor:
    """Return the rows of the `count` lowest of score: (B,), rising; of equal ones the first.

    groups: (B,) integers; `count` are kept of each group, which is compared with itself alone.

    Raises:
        ValueError: a group has fewer rows than that.
    """
    check_whole("count", count, 1)
    if score.ndim != 1:
        raise ValueError(f"score of shape {tuple(score.shape)}: expected (B,)")
    groups = torch.zeros(len(score)) if groups is None else torch.as_tensor(groups)
    if len(groups) != len(score):
        raise ValueError(f"{len(groups)} groups for {len(score)} scores: expected as many")
    kept = []
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten().to(score.device)
        if len(rows) < count:
            raise ValueError(f"count={count} of {len(rows)} samples: expected at most as many")
        kept.append(rows[score[rows].argsort(stable=True)[:count]])
    if not kept:
        raise ValueError("no samples: expected at least one")
    return torch.cat(kept).sort().values


def filter_samples(samples: Tensor, score: Tensor, keep: float = 0.96) -> Tensor:
    """Return the share `keep` of samples: (B, *) with the lowest score: (B,), in their own order.

    keep: in (0, 1]; 1 is the identity. The number is rounded, at least one.
    """
    check_fraction("keep", keep)
    if len(samples) != len(score):
        raise ValueError(f"{len(samples)} samples, {len(score)} scores: expected as many")
    return samples[lowest(score, max(1, round(keep * len(score))))]


def threshold(score: Tensor, keep: float = 0.96) -> float:
    """Return the score below which the share `keep` of score: (B,) lies, to judge later samples."""
    check_fraction("keep", keep)
    return float(torch.quantile(score.double(), keep))


@method(
    "hallucination",
    seed=56,
    paper="Understanding Hallucinations in Diffusion Models through Mode Interpolation",
    year=2024,
    buys="fewer samples that mix what does not go together, without a classifier",
    missing="the study on MNIST; a network trained on the simple shapes",
)
@dataclass(frozen=True)
class HallucinationFilter:
    """Draws more samples than wanted and keeps those whose predicted clean sample moved least.

    window: where along the walk; on labelled samples `choose_window` finds it. Of an image with
        fine texture the score is high too: compare within a prompt or class, never across them.
    keep: share of the samples drawn that is kept, (0, 1]; 1 leaves nothing out.
    """

    window: Window = field(default_factory=Steps)
    keep: float = 0.96

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("keep", self.keep)
        if not isinstance(self.window, Window):
            raise TypeError(f"window={self.window!r}: expected Steps(...) or NoiseToSignal(...)")

    def drawn(self, count: int) -> int:
        """Return how many samples to draw to keep `count`: one more at least, if keep < 1."""
        check_whole("count", count, 1)
        return count if self.keep == 1 else max(math.ceil(count / self.keep - 1e-9), count + 1)

    def __call__(
        self,
        denoiser: Denoiser,
        solver: Solver,
        x: Tensor,
        times: Tensor,
        count: int,
        *,
        groups: Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> tuple[Scored, Tensor]:
        """Return the samples kept and their rows among those drawn.

        Args:
            denoiser: with conditions bound, for as many rows as x; guided if you like.
            solver: any.
            x: (n', *) the starts, `drawn(count)` of each group.
            times: (steps + 1,) the grid.
            count: how many to keep of each group.
            groups: (n',) which prompt or class each row is of; by default all are one.
            rng: draws the solver's noise.
        """
        out = scored(denoiser, solver, x, times, self.window, rng=rng)
        rows = lowest(out.score, count, groups)
        return Scored(out.x[rows], out.score[rows]), rows


# How well a score tells, and where to look.


def auc(score: Tensor, strange: Tensor) -> float:
    """Return the chance that a strange sample scores above another, ties half; nan without both.

    score: (B,); strange: (B,) bool.
    """
    high, low = score[strange].double(), score[~strange].double().sort().values
    if not len(high) or not len(low):
        return math.nan
    low, high = low.contiguous(), high.contiguous()
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / (2 * len(low)))


def removed(score: Tensor, strange: Tensor, kept: float = 0.96) -> float:
    """Return the share of strange samples above the score below which `kept` of the others lie.

    score: (B,); strange: (B,) bool; nan without both kinds.
    """
    check_fraction("kept", kept)
    high, low = score[strange].double(), score[~strange].double()
    if not len(high) or not len(low):
        return math.nan
    limit = low.sort().values[max(math.ceil(kept * len(low)), 1) - 1]
    return float((high > limit).double().mean())


class Chosen(NamedTuple):
    """A window, how well it tells, and the same of every window that was tried."""

    window: Steps
    auc: float
    removed: float
    tried: list[tuple[Steps, float, float]]


def choose_window(
    x0: Tensor, strange: Tensor, windows: Sequence[Steps] | None = None, *, kept: float = 0.96
) -> Chosen:
    """Return the window that tells strange samples best: by `auc`, then `removed` at `kept`.

    Choose on samples other than those that are judged.

    Args:
        x0: (S, B, *) predictions of every step, from `Trajectory`.
        strange: (B,) bool, what is known of each sample; both kinds must be there.
        windows: which are tried; by default all between ends at 1, 2, 3, 5, 7, 10, 15, ... steps
            from the last, of two steps or more.
        kept: share of ordinary samples that is kept.
    """
    if x0.ndim < 2 or strange.shape != x0.shape[1:2]:
        raise ValueError(
            f"x0 of shape {tuple(x0.shape)}, labels of {tuple(strange.shape)}: expected (S, B, *) "
            "and (B,)"
        )
    if strange.all() or not strange.any():
        raise ValueError("labels are all alike: expected strange and ordinary samples")
    count = len(x0)
    if windows is None:
        marks = sorted({m * 10**e // 10 for e in range(1, 6) for m in (10, 15, 20, 30, 50, 70)})
        ends = [0, *(m for m in marks if m < count), count]
        windows = [Steps(-b, -a or None) for a, b in combinations(ends, 2) if b - a >= 2]
    flat = (x0 - x0[-1:]).flatten(2).double()  # about the last, so that squares do not cancel
    sums = torch.nn.functional.pad(flat.cumsum(0), (0, 0, 0, 0, 1, 0))
    squares = torch.nn.functional.pad(flat.square().cumsum(0), (0, 0, 0, 0, 1, 0))
    tried = []
    for window in windows:
        first, last, _ = slice(window.start, window.stop).indices(count)
        if last <= first:
            raise ValueError(f"{window}: no step among the {count} of the walk")
        n = last - first
        mean = (sums[last] - sums[first]) / n
        score = ((squares[last] - squares[first]) / n - mean.square()).clamp_min(0).mean(1)
        tried.append((window, auc(score, strange), removed(score, strange, kept)))
    best = max(tried, key=lambda row: row[1:])
    return Chosen(*best, tried)


class Selection(ABC):
    """Which samples of a generation the next one learns from."""

    @abstractmethod
    def __call__(self, score: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """Return `count` rows of score: (B,), rising."""


@dataclass(frozen=True)
class ByScore(Selection):
    """The lowest scores."""

    def __call__(self, score: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """See `Selection`."""
        return lowest(score, count)


@dataclass(frozen=True)
class AtRandom(Selection):
    """Any: the control, at an equal number of samples."""

    def __call__(self, score: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """See `Selection`."""
        if count > len(score):
            raise ValueError(f"count={count} of {len(score)} samples: expected at most as many")
        return torch.randperm(len(score), generator=rng)[:count].sort().values.to(score.device)


def generations(
    data: Tensor,
    learn: Callable[[Tensor, int], Denoiser],
    draw: Callable[[Denoiser, int, torch.Generator], Scored],
    select: Selection,
    count: int,
    *,
    keep: float = 0.96,
    rng: torch.Generator,
) -> list[tuple[Tensor, Scored]]:
    """Train `count` models, each on what was kept of the samples of the one before.

    Args:
        data: (N, *) real data, of the first.
        learn: of data and the number of the generation, from 0, a denoiser.
        draw: of a denoiser, a number of samples and a generator, samples with their score.
        select: which are kept; N of N / keep.
        count: generations.
        keep: share kept.
        rng: draws everything.

    Returns:
        What each generation learned from, and what it drew before the selection.
    """
    check_fraction("keep", keep)
    check_whole("count", count, 1)
    size, out = len(data), []
    for index in range(count):
        drawn = draw(learn(data, index), math.ceil(size / keep - 1e-9), rng)
        out.append((data, drawn))
        data = drawn.x[select(drawn.score, size, rng)]
    return out
