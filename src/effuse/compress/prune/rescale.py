"""DAREx-q: by how much to rescale a randomly pruned change, and which way of pruning to take.

small = find_q(delta.prune(0.99), network, base, tuned, calls)          # no labels, one q
small = find_q(..., by=Labels(losses))                                  # from a few labels
small = learn_q(delta.prune(0.99), network, base, tuned, calls)         # one q a tensor
found = select(delta, 0.99, network, base, tuned, calls)                # all ways, by what they do
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Call
from effuse.core.errors import check_whole

from .darex import Delta, Pruned, Source, Weights


class Judge(ABC):
    """Says how bad an output of the rescaled network is."""

    @abstractmethod
    def loss(self, output: Tensor, wanted: Tensor, index: int) -> Tensor:
        """Return (), lower is better, of an output beside the fine-tune's, of call `index`."""


@dataclass(frozen=True)
class Change(Judge):
    """The mean |f_q(x) - f_ft(x)|, of a hidden layer or a denoiser's answer: needs no labels."""

    def loss(self, output: Tensor, wanted: Tensor, index: int) -> Tensor:
        """Return the mean absolute change."""
        return (output - wanted).abs().mean()


@dataclass(frozen=True)
class TopLogits(Judge):
    """The mean squared change of the fine-tune's `count` largest logits, over the last axis."""

    count: int = 5

    def __post_init__(self) -> None:
        """Check the count."""
        check_whole("count", self.count, 1)

    def loss(self, output: Tensor, wanted: Tensor, index: int) -> Tensor:
        """Return the mean squared change."""
        top = wanted.topk(min(self.count, wanted.shape[-1]), dim=-1)
        return (output.gather(-1, top.indices) - top.values).square().mean()


@dataclass(frozen=True)
class Labels(Judge):
    """The task's own loss on a few labelled calls: q_v of the paper.

    losses: one function of the output a call.
    """

    losses: Sequence[Callable[[Tensor], Tensor]]

    def loss(self, output: Tensor, wanted: Tensor, index: int) -> Tensor:
        """Return the loss of this call."""
        if index >= len(self.losses):
            raise ValueError(f"{len(self.losses)} losses: expected one for every call")
        return self.losses[index](output)


def outputs(network: nn.Module, weights: Mapping[str, Tensor], calls: Iterable[Call]) -> list[Any]:
    """Return the network's answers with other weights."""
    found = []
    for args, kwargs in calls:
        out = torch.func.functional_call(network, dict(weights), args, kwargs)
        out = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.sample
        found.append(out.double())
    return found


def _tuned(network: nn.Module, finetuned: Weights, calls: Sequence[Call]) -> list[Tensor]:
    source = Source(finetuned)
    with torch.no_grad():
        return outputs(network, {n: source[n] for n in source.names()}, calls)


def output_change(
    pruned: Pruned,
    network: nn.Module,
    base: Weights,
    wanted: Sequence[Tensor],
    calls: Iterable[Call],
    by: Judge | None = None,
) -> float:
    """Return the mean loss over calls of the network with the pruned change."""
    judge = by or Change()
    with torch.no_grad():
        found = outputs(network, pruned.apply(base), calls)
        each = [judge.loss(a, b, i) for i, (a, b) in enumerate(zip(found, wanted, strict=True))]
    return float(torch.stack(each).mean())


def find_q(
    pruned: Pruned,
    network: nn.Module,
    base: Weights,
    finetuned: Weights,
    calls: Sequence[Call],
    *,
    by: Judge | None = None,
    step: float | None = None,
    patience: int = 4,
) -> Pruned:
    """Return it rescaled by one q for all: the one whose outputs `by` likes best.

    q goes up from 1 - p by `step` (a fiftieth of the way to 1 unless told) until `patience` points
    in a row are no better; then tenths of a step around.

    by: `Change()` (DAREx-q_e, the default), `TopLogits()` for decoders, `Labels(losses)` (q_v).
    """
    if pruned.p == 0:
        return pruned.rescale(1.0)
    step = pruned.p / 50 if step is None else step
    wanted = _tuned(network, finetuned, calls)
    low = 1 - pruned.p

    def loss(q: float) -> float:
        return output_change(pruned.rescale(q), network, base, wanted, calls, by)

    best, least, idle, q = low, loss(low), 0, low
    while idle < patience and q + step <= 1:
        q += step
        value = loss(q)
        best, least, idle = (q, value, 0) if value < least else (best, least, idle + 1)
    around = [best + i * step / 10 for i in range(-9, 10) if i]
    fine = {q: loss(q) for q in around if low <= q <= 1}
    fine[best] = least
    return pruned.rescale(min(fine, key=lambda q: fine[q]))


def average_q(
    delta: Delta,
    p: float,
    network: nn.Module,
    base: Weights,
    finetuned: Weights,
    calls: Sequence[Call],
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    **how: Any,
) -> float:
    """Return the mean q of several masks, without the one farthest from their mean.

    `how` goes to `find_q`. One q then serves every mask of this drop rate.
    """
    found = [find_q(delta.prune(p, seed=s), network, base, finetuned, calls, **how) for s in seeds]
    q = torch.tensor([f.q for f in found], dtype=torch.float64)
    if len(q) > 2:
        far = int((q - q.mean()).abs().argmax())
        q = torch.cat([q[:far], q[far + 1 :]])
    return float(q.mean())


def learn_q(
    pruned: Pruned,
    network: nn.Module,
    base: Weights,
    finetuned: Weights,
    calls: Sequence[Call],
    *,
    by: Judge | None = None,
    lr: float = 1e-2,
    steps: int = 200,
    patience: int = 5,
) -> Pruned:
    """Return it rescaled by a learned q for every tensor, q_l = |a_l| + 1 - p, at most 1.

    a begins at 1e-4, DARE; AdamW with a cosine over `steps` passes over the calls; stops after
    `patience` passes that are no better, and keeps the best.

    by: what is minimized, `TopLogits()` unless told; its gradient must exist.
    """
    if pruned.p == 0:
        return pruned.rescale(1.0)
    judge = by or TopLogits()
    wanted = _tuned(network, finetuned, calls)
    source = Source(base)
    weights = {n: source[n] for n in source.names()}
    fixed = pruned.rescale(1.0)
    changes = {n: fixed.change(n).to(weights[n].dtype) for n in fixed.parts}
    learns = [n for n, part in fixed.parts.items() if not part.dense]
    a = torch.full((len(learns),), 1e-4, requires_grad=True)
    optimizer = torch.optim.AdamW([a], lr=lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    best, least, idle = a.detach().clone(), float("inf"), 0
    for _ in range(steps):
        q = (a.abs() + 1 - pruned.p).clamp_max(1.0)
        given = dict(weights)
        for i, name in enumerate(learns):
            given[name] = weights[name] + (changes[name] / q[i]).to(weights[name].dtype)
        for name in fixed.parts.keys() - set(learns):
            given[name] = weights[name] + changes[name]
        found = outputs(network, given, calls)
        loss = torch.stack(
            [judge.loss(x, y, i) for i, (x, y) in enumerate(zip(found, wanted, strict=True))]
        ).mean()
        if float(loss.detach()) < least:
            best, least, idle = a.detach().clone(), float(loss.detach()), 0
        else:
            idle += 1
            if idle >= patience:
                break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    last = (best.abs().double() + 1 - pruned.p).clamp_max(1.0).tolist()
    return pruned.rescale(dict(zip(learns, last, strict=True)))


@dataclass(frozen=True)
class Selected:
    """The way that changes the outputs least, and what each way did.

    name: of the way; pruned: the change; losses: of all ways, and of the base alone; advice: what
    training anew would do, in the paper's words.
    """

    name: str
    pruned: Pruned
    losses: Mapping[str, float]
    advice: str


def select(
    delta: Delta,
    p: float,
    network: nn.Module,
    base: Weights,
    finetuned: Weights,
    calls: Sequence[Call],
    *,
    by: Judge | None = None,
    norms: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Selected:
    """Return the best way to prune a change to 1 - p, of DARE, DAREx-q, magnitude and Wanda.

    The paper's rule: small changes take DAREx-q, large ones importance, and who can train anew
    takes AdamR first. How small is small depends on the network, so all ways are tried on the
    calls, which must not be those that the result is judged by.

    Args:
        delta: from `Delta.between`.
        p: share dropped.
        network: takes the weights.
        base: weights without the change.
        finetuned: weights with all of it.
        calls: what outputs are compared on.
        by: as in `find_q`.
        norms: of inputs, for Wanda; without, it is not tried.
        seed: of the mask.
    """
    wanted = _tuned(network, finetuned, calls)
    dare = delta.prune(p, seed=seed)
    ways = {
        "DARE": dare,
        "DAREx-q": find_q(dare, network, base, finetuned, calls, by=by),
        "magnitude": delta.prune(p, "magnitude"),
    }
    if norms is not None:
        ways["wanda"] = delta.prune(p, "wanda", norms=norms)
    losses = {n: output_change(w, network, base, wanted, calls, by) for n, w in ways.items()}
    source = Source(base)
    with torch.no_grad():
        bare = outputs(network, {n: source[n] for n in source.names()}, calls)
    judge = by or Change()
    parts = [judge.loss(a, b, i) for i, (a, b) in enumerate(zip(bare, wanted, strict=True))]
    losses["base"] = float(torch.stack(parts).mean())
    name = min(ways, key=lambda n: losses[n])
    lost = losses[name] / losses["base"] if losses["base"] else 0.0
    advice = (
        "this keeps most of the fine-tune"
        if lost < 0.5
        else "fine-tune anew with effuse.optim.AdamR, whose changes are small, or drop less"
    )
    return Selected(name, ways[name], losses, advice)
