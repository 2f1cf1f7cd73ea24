"""Incubation: a lighter network learns part by part inside its teacher, then as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from effuse.core.errors import check_whole
from effuse.core.training import fit, warmup_cosine

from .asdm_assembly import Assemble, Experts
from .stages import Kept, check_plan, groups, stage_sizes, taps


def incubate(
    teacher: nn.Module,
    batches: Any,
    kept: Kept | float = 0.5,
    *,
    steps: int = 200,
    joint: int = 400,
    lr: float = 2e-4,
    experts: Experts | None = None,
    rng: torch.Generator | None = None,
    progress: bool = True,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Assemble a lighter network part by part, then tune it as a whole.

    Each part (mirrored stages of a UNet, a row of transformer blocks) is cut out of the hybrid of
    finished parts and teacher, and only that part is trained to give the teacher's features and
    output; at the end everything learns together.

    Args:
        teacher: stays as it is.
        batches: what `fit` takes: batches with `call`, and perhaps `target` for the task loss.
        kept: the layers that stay, by stage, or a share.
        steps: of training a part.
        joint: steps of training the whole at the end.
        lr: of AdamW, with warm-up and cosine decay in each phase.
        experts: see `Assemble`; put in before the joint phase.
        rng: draws batches.
        progress: show a bar for each phase.

    Returns:
        The student, and a row for each phase: its stages, its first and its last loss.

    Raises:
        ValueError: the kept layers do not fit together.
    """
    from effuse.distill.features import NormalizedFeatureDistillation

    check_whole("steps", steps, 0)
    check_whole("joint", joint, 0)
    student = copy.deepcopy(teacher)
    chosen = Assemble(kept=kept) if isinstance(kept, Mapping) else Assemble(keep=kept)
    plan = chosen.choose(teacher)
    check_plan(teacher, plan)
    rng = rng if rng is not None else torch.Generator().manual_seed(0)
    log: list[dict[str, Any]] = []

    def learn(part: Kept, pairs: Sequence[tuple[str, str]], names: Sequence[str], n: int) -> None:
        student.requires_grad_(False)
        for name in names:
            student.get_submodule(name).requires_grad_(True)
        goal = NormalizedFeatureDistillation(teacher, student, pairs)
        done = fit(
            goal,
            batches,
            torch.optim.AdamW(goal.parameters_of("student"), lr=lr, weight_decay=0.0),
            steps=n,
            rng=rng,
            schedule=warmup_cosine(),
            log_every=max(n // 20, 1),
            progress=progress,
        )
        first, last = done.history[0]["loss"], done.history[-1]["loss"]
        log.append({"stages": list(part), "steps": n, "first": first, "last": last})

    for part in groups(teacher, plan):
        pairs, trained = _neighbors(student, part)
        Assemble(kept=part, experts=experts).attach(student).finalize()
        if steps:
            learn(part, pairs, trained, steps)
    if joint:
        learn(plan, taps(stage_sizes(teacher), plan), [""], joint)
    return student.eval().requires_grad_(True), log


def _neighbors(model: nn.Module, part: Kept) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what to compare after `part` is cut out of `model`, and what may learn then."""
    ((name, layers), *_) = part.items()
    if name == "mid_block":
        last = sum(n.startswith("down_blocks") for n in stage_sizes(model)) - 1
        return [], [f"down_blocks.{last}", "up_blocks.0"]
    if "_blocks." in name:
        return [(n, n) for n in part], list(part)
    missing = [i for i in range(stage_sizes(model)[name]) if i not in layers]
    if missing[0] == 0:
        return [], [f"{name}.0"]
    before = f"{name}.{missing[0] - 1}"
    return [(f"{name}.{missing[-1]}", before)], [before]
