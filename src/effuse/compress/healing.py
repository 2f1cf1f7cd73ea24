"""Heal a slimmed pipeline: what it learns on, and for how long.

On house:emoji with 30 % fewer parameters (evidence/healing.json), clean samples spoiled to all
levels heal better than states along sampling; the network's own samples do as well as real
pictures; stage features help more than any choice of data; pictures keep their score, not details.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Applied, Objective
from effuse.core.errors import check_fraction, check_whole
from effuse.core.training import Fit, fit, warmup_cosine
from effuse.ops import randn_like

from .calibrate import What, asked_of, network_of

_SHARED = ("img_ids", "txt_ids")  # of FLUX: not one row a sample


@dataclass(frozen=True)
class Spoiled:
    """Batches for `fit`: clean samples spoiled to levels spread over the range, with conditions.

    x_t = alpha x0 + sigma noise; a batch has a `call` and its `target`, what the network was
    trained to answer.

    model: from `effuse.wrap`. clean: (N, C, h, w). cond: of N samples, from `embed`. rows: of a
    batch. empty: share of rows that get what is under "negative" in `cond`, where that is.
    """

    model: Any
    clean: Tensor
    cond: Mapping[str, Any]
    rows: int = 16
    empty: float = 0.1

    def __post_init__(self) -> None:
        """Check the share."""
        check_fraction("empty", self.empty, zero=True)

    def __call__(self, rng: torch.Generator) -> dict[str, Any]:
        """Draw a batch."""
        pick = torch.randint(len(self.clean), (self.rows,), generator=rng)
        x0 = self.clean[pick].float()
        even = (torch.arange(self.rows) + torch.rand(self.rows, generator=rng)) / self.rows
        t, noise = even.to(x0.device), randn_like(x0, rng)
        x = self.model.process.corrupt(x0, t, noise)
        cond = {k: v for k, v in self.cond.items() if k != "negative"}
        told = _taken(cond, pick)
        if "negative" in self.cond:
            bare = torch.rand(self.rows, generator=rng) < self.empty
            told = _where(bare, _taken(self.cond["negative"], pick), told)
        target = self.model.bare.target(x0, noise, t)
        return {"call": self.model.bare.call(x, t, **told), "target": target}


def _taken(cond: Mapping[str, Any], pick: Tensor) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in cond.items():
        if isinstance(value, Mapping):
            out[key] = _taken(value, pick)
        elif isinstance(value, Tensor) and value.ndim and key not in _SHARED:
            out[key] = (
                value[pick.to(value.device)]
                if len(value) > 1
                else value.expand_as(value.new_empty(len(pick), *value.shape[1:]))
            )
        else:
            out[key] = value
    return out


def _where(rows: Tensor, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditions `a` at the rows that are true, `b` at the others."""
    out: dict[str, Any] = {}
    for key, value in b.items():
        if isinstance(value, Mapping):
            out[key] = _where(rows, a[key], value)
        elif isinstance(value, Tensor) and value.ndim and key not in _SHARED:
            mask = rows.to(value.device).view(-1, *(1,) * (value.ndim - 1))
            out[key] = torch.where(mask, a[key], value)
        else:
            out[key] = value
    return out


@torch.no_grad()
def own_samples(
    pipe: Any,
    what: What = 256,
    *,
    teacher: nn.Module | None = None,
    clean: Tensor | None = None,
    guidance: float | None = None,
    steps: int = 10,
    rows: int = 16,
    empty: float = 0.1,
    batch: int = 32,
    seed: int = 0,
) -> Spoiled:
    """Return batches of a pipeline's own samples, or of clean ones given, for `fit`.

    Args:
        pipe: what `effuse.wrap` takes.
        what: prompts or labels, one a sample, or how many; many different ones heal better.
        teacher: samples in place of the pipeline's network.
        clean: (N, C, h, w) samples as the network sees them, one a prompt; None draws them.
        guidance: diffusers' scale of the draw, the pipeline's own if None.
        steps: of the draw.
        rows: of a batch.
        empty: share of rows without their condition, where guidance is above 1.
        batch: samples drawn at once.
        seed: of the draw.

    Raises:
        ValueError: as many clean samples as prompts were expected, or prompts that are none.
    """
    from effuse.bridge.families import default_of
    from effuse.bridge.pipeline import wrap

    model: Any = wrap(pipe)
    takes = inspect.signature(type(pipe).__call__).parameters
    key = next((k for k in ("prompt", "class_labels") if k in takes), "batch_size")
    asked: Any = asked_of(pipe, what, key)
    scale = default_of(pipe, "guidance_scale", 1.0) if guidance is None else guidance
    drawer = model if teacher is None else replace(model, network=teacher)
    rng = torch.Generator().manual_seed(seed)
    given: Any = len(asked) if key == "batch_size" else asked
    if clean is None:
        parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
        clean = torch.cat(
            [
                drawer.sample(
                    len(p) if key == "batch_size" else p,
                    steps=steps,
                    guidance=guidance,
                    rng=rng,
                    decode=False,
                )
                for p in parts
            ]
        )
    if len(clean) != len(asked):
        raise ValueError(f"{len(clean)} clean samples for {len(asked)} prompts: expected one each")
    guided, told = model.family.guides(model, scale, guidance is not None)
    cond = model.embed(given, guided=True) if guided else model.embed(given)
    cond |= told
    if guided:
        cond["negative"] |= told
    return Spoiled(model, clean, cond, rows, empty)


class Features(ABC):
    """Says what a healed network is compared by with its teacher. A frozen dataclass."""

    @abstractmethod
    def goal(
        self, handle: Applied, teacher: nn.Module, steps: int | None = None
    ) -> Objective | None:
        """Return the objective; None if the handle's network has nothing to heal.

        steps: of the healing, where known.
        """


@dataclass(frozen=True)
class Own(Features):
    """What the method itself says, its `objective`: stage features where units were removed."""

    def goal(
        self, handle: Applied, teacher: nn.Module, steps: int | None = None
    ) -> Objective | None:
        """See `Features.goal`."""
        return handle.objective(teacher, steps)


@dataclass(frozen=True)
class Stages(Features):
    """Answers and stage features of comparable size, whatever the method: widths must agree."""

    def goal(
        self, handle: Applied, teacher: nn.Module, steps: int | None = None
    ) -> Objective | None:
        """See `Features.goal`."""
        from effuse.distill.features import NormalizedFeatureDistillation

        if handle.objective(teacher, steps) is None:
            return None
        return NormalizedFeatureDistillation(teacher, handle.model)


@dataclass(frozen=True)
class Answers(Features):
    """Answers alone."""

    def goal(
        self, handle: Applied, teacher: nn.Module, steps: int | None = None
    ) -> Objective | None:
        """See `Features.goal`."""
        from effuse.distill.features import FeatureDistillation

        if handle.objective(teacher, steps) is None:
            return None
        return FeatureDistillation(teacher, handle.model, [])


def heal(
    pipe: Any,
    handle: Applied,
    teacher: nn.Module,
    batches: Any = None,
    *,
    objective: Objective | None = None,
    minutes: float | None = 15.0,
    steps: int = 100_000,
    lr: float = 3e-4,
    task: bool = False,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
) -> Fit:
    """Heal the network of a slimmed pipeline in place, from its teacher's answers.

    Not from the noise in the batches, which is what `task` adds: it is far from its mean, and in
    guided samples not what the teacher would answer.

    Args:
        pipe: with the slimmed network in it.
        handle: what was put on it, for its `objective`.
        teacher: the network as it was, a copy of its own.
        batches: what `fit` takes; `own_samples(pipe, teacher=teacher)` if None.
        objective: what is compared; that of the handle if None.
        minutes: at most; None leaves the end to `steps`, the same every time.
        steps: at most.
        lr: of AdamW without decay, with warm-up and a cosine down.
        task: learn from targets in the batches as well.
        seed: of the batches.
        progress: show a bar.
        folder: of a checkpoint; broken off and called again, it goes on where it was.

    Raises:
        ValueError: the handle needs no healing.
    """
    check_whole("steps", steps, 1)
    known = steps if minutes is None else None
    own = handle.objective(teacher, known)  # from here on, detach puts weights back too
    goal = objective or own
    if goal is None:
        raise ValueError(f"{type(handle.transform).__name__} changed nothing that could be healed")
    batches = own_samples(pipe, teacher=teacher) if batches is None else batches
    batches = batches if task else _without_targets(batches)
    network = network_of(pipe)
    learns = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(True)
    (player,) = goal.players
    try:
        return fit(
            goal,
            batches,
            torch.optim.AdamW(goal.parameters_of(player), lr=lr, weight_decay=0.0),
            steps=steps,
            rng=torch.Generator().manual_seed(seed),
            schedule=warmup_cosine(),
            minutes=minutes,
            progress=progress,
            folder=folder,
            save_every=50,
        )
    finally:
        network.eval()
        for p, was in zip(network.parameters(), learns, strict=True):
            p.requires_grad_(was)
        round_as(network, teacher)


@dataclass(frozen=True)
class _Untold:
    """Batches that can be gone through again, without their targets."""

    batches: Any

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_untold, self.batches)


def _without_targets(batches: Any) -> Any:
    if callable(batches):
        return lambda rng: _untold(batches(rng))
    return _Untold(batches)


def _untold(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k != "target"}


@torch.no_grad()
def round_as(network: nn.Module, teacher: nn.Module) -> None:
    """Round weights to half precision where all the teacher's are, so that they are stored so.

    A float32 network whose weights came from half precision is stored in half; learning would
    double its bytes.
    """
    if any((p != p.half()).any() for p in teacher.parameters() if p.dtype == torch.float32):
        return
    for p in network.parameters():
        if p.dtype == torch.float32:
            p.copy_(p.half())
