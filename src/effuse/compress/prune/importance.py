"""Importance of channels: disturbed Taylor and what it is compared with, and who stays.

A channel of a width is a slice of several tensors. Its importance is the mean over the tensors of
the sum over the slice of a value per weight:

    I_i = mean over tensors of sum_{w in slice i} value(w)

value is |w dL/dw| (Taylor), |w| (magnitude). Higher is worth more.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effuse.compress.calibrate import not_finite
from effuse.core.errors import check_positive
from effuse.ops.tensors import randn_like

from .criteria import Batch, answer_to, answers, call_of, evaluating
from .vit_groups import Width, narrow


def pooled(
    model: nn.Module, found: Sequence[Width], value: Callable[[nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    """Return the importance of each width's channels, (size,) in float64, of a value per weight.

    Axes of which several lie in a row (heads, halves) are summed over. A tied parameter counts
    once a width. Buffers do not count.
    """
    out = {}
    for w in found:
        each: dict[tuple[int, int], Tensor] = {}
        for slot in w.slots:
            p = model.get_submodule(slot.path)._parameters.get(slot.name)
            if p is not None and (id(p), slot.dim) not in each:
                v = value(p).detach().double().movedim(slot.dim, 0)
                each[id(p), slot.dim] = v.reshape(slot.repeats, w.size, -1).sum((0, 2)).cpu()
        if not each:
            raise ValueError(f"{w.name}: holds no parameter, nothing can be scored")
        out[w.name] = torch.stack(list(each.values())).mean(0)
    return out


class Importance(ABC):
    """Scores the channels of widths. A frozen dataclass."""

    @abstractmethod
    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Return (size,) scores at least 0 by the width's name; the model is left as it was."""


Summed = Callable[[Tensor, Batch], tuple[Tensor, float]]
"""Of a network's answer and a batch: a loss () summed over what it is a mean of, and the count."""


def taylor(
    model: nn.Module,
    found: Sequence[Width],
    batches: Sequence[Batch],
    loss: Summed,
    each: bool = False,
) -> dict[str, Tensor]:
    """Return I of |w dL/dw| for a loss of the answer, gradients summed over batches.

    The gradient is taken of the loss's sum and divided by the count after, in float32: the mean's
    would vanish in half precision. With `each`, |w dL/dw| is summed batch by batch.

    Raises:
        ValueError: no batches.
        FloatingPointError: a loss is not finite; names the call.
    """
    if not batches:
        raise ValueError("no calls: expected at least one, for the gradients")
    slots = [model.get_submodule(s.path)._parameters.get(s.name) for w in found for s in w.slots]
    unique = {id(p): p for p in slots if p is not None}
    held = [(p, p.requires_grad) for p in unique.values()]
    total = {k: torch.zeros_like(p, dtype=_wider(p.dtype)) for k, p in unique.items()}
    params = list(unique.values())
    try:
        for p in params:
            p.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for i, batch in enumerate(batches):
                given = answer_to(model, batch)
                value, count = loss(given, batch)
                if not torch.isfinite(value):
                    if given.isfinite().all():
                        raise FloatingPointError(f"call {i}: its target is not finite")
                    raise not_finite(model, call_of(model, batch), i)
                grads = torch.autograd.grad(value, params, allow_unused=True)
                for p, g in zip(params, grads, strict=True):
                    if g is not None:
                        g = g.to(total[id(p)].dtype) / count
                        total[id(p)] += (p.detach() * g).abs() if each else g
    finally:
        for p, needed in held:
            p.requires_grad_(needed)
    if each:
        return pooled(model, found, lambda p: total[id(p)])
    return pooled(model, found, lambda p: (p.detach() * total[id(p)]).abs())


def _squares(wanted: Tensor, given: Tensor) -> tuple[Tensor, float]:
    apart = wanted - given[:, : wanted.shape[1]]
    return apart.to(_wider(apart.dtype)).square().sum(), apart.numel()


def _wider(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class DisturbedTaylor(Importance):
    """The paper's, without labels: what would a slightly wrong target want to change?

    L = mean (S + n - S')^2 at S' = S,  n ~ N(0, sigma^2):   dL/dw = -(2 / N) n . dS/dw

    E(dL/dw)^2 = (2 sigma / N)^2 ||dS/dw||^2: a random probe of the Jacobian, so the ranking
    does not depend on sigma. Without noise every gradient is zero. N: outputs of a call.

    sigma: > 0. each: sum |w dL/dw| call by call, instead of gradients first (the paper's, whose
    random signs make it grow with the square root of the calls only). seed: of the noise.
    """

    sigma: float = 0.01
    each: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the noise."""
        check_positive("sigma", self.sigma)

    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Importance.scores`; one forward and backward a call."""
        rng = torch.Generator().manual_seed(self.seed)

        def loss(given: Tensor, batch: Batch) -> tuple[Tensor, float]:
            clean = given.detach()
            return _squares(clean + self.sigma * randn_like(clean, rng), given)

        return taylor(model, found, batches, loss, self.each)


@dataclass(frozen=True)
class Taylor(Importance):
    """|w dL/dw| of L = mean (target - S)^2 with the batches' own `target`: needs labels."""

    each: bool = False

    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Importance.scores`."""

        def loss(given: Tensor, batch: Batch) -> tuple[Tensor, float]:
            if batch.get("target") is None:
                raise ValueError(
                    "Taylor needs batches with a `target`; DisturbedTaylor does without"
                )
            return _squares(batch["target"].to(given), given)

        return taylor(model, found, batches, loss, self.each)


@dataclass(frozen=True)
class Magnitude(Importance):
    """|w|; looks at no data."""

    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        return pooled(model, found, lambda p: p.detach().abs())


@dataclass(frozen=True)
class Random(Importance):
    """Uniform at random; what any criterion must beat."""

    seed: int = 0

    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Importance.scores`."""
        rng = torch.Generator().manual_seed(self.seed)
        return {w.name: torch.rand(w.size, generator=rng, dtype=torch.float64) for w in found}


def exhaustive(
    model: nn.Module, width: Width, count: int, batches: Sequence[Batch]
) -> tuple[Tensor, float]:
    """Return the `count` channels of one width that change the answer least, and by how much.

    Tries every subset, E||S(kept) - S||^2 on the calls; for tiny widths without a twin.

    Raises:
        ValueError: more than 100 000 subsets.
    """
    import math

    if math.comb(width.size, count) > 100_000:
        raise ValueError(f"{width.name}: {math.comb(width.size, count)} subsets are too many")
    subsets = [torch.tensor(c) for c in itertools.combinations(range(width.size), count)]
    errors = [change(model, [width], {width.name: keep}, batches) for keep in subsets]
    best = min(range(len(errors)), key=errors.__getitem__)
    return subsets[best], errors[best]


def change(
    model: nn.Module,
    found: Sequence[Width],
    keep: Mapping[str, Tensor],
    batches: Sequence[Batch],
    whole: Sequence[Tensor] | None = None,
) -> float:
    """Return E||S(kept) - S||^2, the mean squared change of the answer with these channels only."""
    with evaluating(model):
        whole = answers(model, batches) if whole is None else whole
        narrowed = narrow(model, found, keep)
        try:
            less = answers(model, batches)
        finally:
            narrowed.undo()
    parts = [(a.double() - b.double()).square().mean() for a, b in zip(less, whole, strict=True)]
    return float(torch.stack(parts).mean())


# ---- who stays


class Normalizer(ABC):
    """Makes importances of different widths comparable. A frozen dataclass."""

    @abstractmethod
    def normal(self, scores: Tensor) -> Tensor:
        """Return scores: (n,) of one width, normalized."""


@dataclass(frozen=True)
class Mean(Normalizer):
    """I / mean(I): the paper's for the stream. All zero stays zero."""

    def normal(self, scores: Tensor) -> Tensor:
        """See `Normalizer.normal`."""
        mean = scores.mean()
        return scores / mean if mean > 0 else scores


@dataclass(frozen=True)
class Gaussian(Normalizer):
    """(I - mean) / std: the paper's for ranking across layers. All equal gives zeros."""

    def normal(self, scores: Tensor) -> Tensor:
        """See `Normalizer.normal`."""
        apart, std = scores - scores.mean(), scores.std(correction=0)
        return apart / std if std > 0 else apart


def choose(
    found: Sequence[Width],
    scores: Mapping[str, Tensor],
    ratio: float,
    normalizer: Normalizer,
    *,
    together: bool,
    step: int | None = None,
    least: float = 0.0,
) -> dict[str, Tensor]:
    """Return the channels of each width that stay, sorted.

    Args:
        found: widths.
        scores: (size,) by name.
        ratio: share of the channels that go, [0, 1).
        normalizer: of each width's scores.
        together: whether widths compete for one number of channels, or each keeps the same share.
        step: what a width is left with is a multiple of this; by default of `Width.multiple`.
        least: share of every width that stays, whatever it scores.

    Raises:
        ValueError: a step that does not divide a width.
    """
    if ratio == 0 or not found:
        return {w.name: torch.arange(w.size) for w in found}
    steps = {w.name: step or w.multiple for w in found}
    for w in found:
        if w.size % steps[w.name]:
            raise ValueError(
                f"{w.name}: {w.size} channels are not a multiple of {steps[w.name]}: expected a "
                "`round_to` that divides them"
            )
    normal = {w.name: normalizer.normal(scores[w.name]) for w in found}
    wanted = {w.name: (1 - ratio) * w.size for w in found}
    if together:
        wanted = {k: float(n) for k, n in _compete(found, normal, ratio, least).items()}
    counts = {}
    for w in found:
        mean = (wanted[w.name] + wanted[w.twin]) / 2 if w.twin in wanted else wanted[w.name]
        m = steps[w.name]
        counts[w.name] = min(w.size, max(m, m * round(mean / m)))
    order = {w.name: normal[w.name].argsort(descending=True, stable=True) for w in found}
    return {w.name: order[w.name][: counts[w.name]].sort().values for w in found}


def _compete(
    found: Sequence[Width], normal: Mapping[str, Tensor], ratio: float, least: float
) -> dict[str, int]:
    """Return how many channels of each width are among the best of all; `least` stay in each."""
    every = torch.cat([normal[w.name] for w in found])
    owner = torch.cat([torch.full((w.size,), i) for i, w in enumerate(found)])
    safe = every.clone()
    begin = 0
    for w in found:
        floor = max(1, int(least * w.size + 1 - 1e-9))
        best = normal[w.name].argsort(descending=True, stable=True)[:floor]
        safe[begin + best] = torch.inf
        begin += w.size
    stays = safe.argsort(descending=True, stable=True)[: round((1 - ratio) * len(every))]
    counts = torch.bincount(owner[stays], minlength=len(found)).tolist()
    return {w.name: max(1, int(n)) for w, n in zip(found, counts, strict=True)}
