"""Draws from any diffusers pipeline: by text, by class, or without a condition."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Condition = str | int | None
"""A prompt, a class (its number or name), or None where a pipeline takes neither."""

Kind = Literal["text", "class", "none"]

STEPS = 25
"""Sampling steps where nothing is said."""


@dataclass(frozen=True)
class Entry:
    """A pipeline and how it is called.

    pipe: a diffusers pipeline. steps: 25 if None. guidance: scale, the pipeline's own if None.
    folder: where it is saved, for its bytes on disk. call: further arguments of its call.
    """

    pipe: Any
    steps: int | None = None
    guidance: float | None = None
    folder: str | Path | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the number of steps, and that there is something to guide."""
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: expected a positive integer")
        if self.guidance is not None and "guidance_scale" not in _arguments(self.pipe):
            raise ValueError(
                f"guidance={self.guidance}: {type(self.pipe).__name__} has no guidance_scale, "
                "leave it None"
            )


def _arguments(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def kind_of(pipe: Any) -> Kind:
    """Return what a pipeline is conditioned on."""
    known = _arguments(pipe)
    return "text" if "prompt" in known else "class" if "class_labels" in known else "none"


def usual(pipe: Any) -> list[Condition]:
    """Return conditions to try a pipeline with where none are given."""
    kind = kind_of(pipe)
    if kind == "text":
        from effuse import house

        return [p.text for p in house.prompts()]
    if kind == "class":
        numbers = sorted(set(getattr(pipe, "labels", {}).values())) or list(range(10))
        return list(numbers[:: max(1, len(numbers) // 24)][:24])
    return [None]


def checked(pipe: Any, conditions: Sequence[Condition] | None) -> list[Condition]:
    """Return conditions that fit a pipeline, class names as numbers, or complain.

    Raises:
        ValueError: an empty list, an unknown class, or a condition where none is taken.
    """
    if conditions is None:
        return usual(pipe)
    kind = kind_of(pipe)
    listed: list[Condition] = [conditions] if isinstance(conditions, str) else [*conditions]
    if not listed:
        raise ValueError("an empty list of prompts: expected one or more, or None")
    if kind == "text":
        wrong = [c for c in listed if not isinstance(c, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no prompt: expected text")
        return listed
    if kind == "none":
        if any(c is not None for c in listed):
            raise ValueError(
                f"{type(pipe).__name__} takes no prompts: expected None, got {listed[0]!r}"
            )
        return listed
    names: Mapping[str, int] = getattr(pipe, "labels", {})
    out: list[Condition] = []
    for c in listed:
        if isinstance(c, str) and not c.isdigit():
            if c not in names:
                from effuse.core.fields import nearest

                raise ValueError(f"no class {c!r}{nearest(c, names)}")
            c = names[c]
        if not isinstance(c, (int, str)):
            raise ValueError(f"{c!r} is no class: expected a name or a number")
        out.append(int(c))
    return out


def words(pipe: Any, condition: Condition) -> str:
    """Return a condition as a reader knows it."""
    if kind_of(pipe) == "class":
        found = [n for n, i in getattr(pipe, "labels", {}).items() if i == condition]
        return found[0] if found else f"class {condition}"
    return "unconditional" if condition is None else str(condition)


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    old = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**old, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**old)


def draw_some(
    entry: Entry,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    *,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return pictures (N, 3, H, W), float32 in [0, 1], one a condition and seed.

    Args:
        entry: the pipeline and its settings.
        conditions: N, fit for it.
        seeds: N; the noise of each picture comes from its own generator on the CPU, so a picture
            depends neither on its neighbors nor on the device.
        batch: pictures at a time.
        progress: called with the number of pictures just finished.
    """
    kind, known = kind_of(entry.pipe), _arguments(entry.pipe)
    call: dict[str, Any] = {"num_inference_steps": entry.steps or STEPS, **entry.call}
    if entry.guidance is not None:
        call["guidance_scale"] = entry.guidance
    out = []
    with _quiet(entry.pipe), torch.no_grad():
        for first in range(0, len(seeds), batch):
            some = list(conditions[first : first + batch])
            if kind == "text":
                call["prompt"] = some
            elif kind == "class":
                call["class_labels"] = some
            elif "batch_size" in known:
                call["batch_size"] = len(some)
            rng = [torch.Generator().manual_seed(s) for s in seeds[first : first + batch]]
            made = entry.pipe(generator=rng, output_type="np", **call).images
            array = torch.from_numpy(np.asarray(made, dtype=np.float32))
            out.append(array.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous())
            if progress:
                progress(len(some))
    return torch.cat(out)


def draw(
    pipe: Any,
    prompts: Sequence[Condition] | None = None,
    *,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Return `count` pictures of each prompt, (P count, 3, H, W) in [0, 1], prompt by prompt.

    Args:
        pipe: a diffusers pipeline.
        prompts: prompts or classes; a few usual ones if None.
        count: pictures of each.
        steps: of sampling, 25 if None.
        guidance: scale, the pipeline's own if None.
        seed: picture i of every prompt starts from the noise of seed + i.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected a positive integer")
    entry = Entry(pipe, steps, guidance)
    some = usual(pipe)[:4] if prompts is None else checked(pipe, prompts)
    return draw_some(
        entry, [c for c in some for _ in range(count)], [seed + i for i in range(count)] * len(some)
    )
