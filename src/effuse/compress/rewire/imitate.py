"""Learn a teacher's answers and the features of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Loss, Objective

from .stages import stage_sizes

Taps = Sequence[tuple[str, str]]
"""Pairs of dotted names, the teacher's and the student's, whose outputs should agree."""


def stage_taps(student: nn.Module) -> list[tuple[str, str]]:
    """Return the stages of a UNet, by the same names in teacher and student; none else."""
    return [(n, n) for n in stage_sizes(student) if "_blocks." in n or n == "mid_block"]


class Imitate(Objective):
    """Learn a teacher's answers and stage features: L = task + output + features.

    output = ||eps_T - eps_S||^2,   features = sum_i ||f_T^i - f_S^i||^2 / ||f_T^i||^2,
    task = ||target - eps_S||^2 where the batch has a `target`.

    A batch holds `call`, the arguments of the network, and perhaps `target`. Zero if teacher and
    student are alike (without a target).

    Args:
        teacher: frozen here.
        student: learns in place.
        taps: whose features to compare.
        trained: dotted names in the student that learn; all by default.
        weights: of task, output and features.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Taps = (),
        *,
        trained: Sequence[str] = (),
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.student, self.taps, self.weights = student, list(taps), weights
        self.trained = tuple(trained)
        for theirs, mine in self.taps:
            teacher.get_submodule(theirs), student.get_submodule(mine)

    def train(self, mode: bool = True) -> Imitate:
        """Set the student's mode; the teacher stays as it is used."""
        super().train(mode)
        self.teacher.eval()
        return self

    def parameters_of(self, player: str) -> list[nn.Parameter]:
        """See `Objective.parameters_of`."""
        every = super().parameters_of(player)
        if not self.trained:
            return every
        mine = {id(p) for n in self.trained for p in self.student.get_submodule(n).parameters()}
        return [p for p in every if id(p) in mine]

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """See `Objective.loss`."""
        args, kwargs = batch["call"]
        with torch.no_grad(), _listening(self.teacher, [a for a, _ in self.taps]) as theirs:
            wanted = _sample(self.teacher(*args, **kwargs))
        with _listening(self.student, [b for _, b in self.taps]) as mine:
            given = _sample(self.student(*args, **kwargs))
        terms = {"output": (given - wanted).square().mean()}
        if self.taps:
            parts = [
                (mine[b] - theirs[a]).square().mean() / theirs[a].square().mean().clamp_min(1e-12)
                for a, b in self.taps
            ]
            terms["features"] = torch.stack(parts).mean()
        if batch.get("target") is not None:
            target = batch["target"]
            terms["task"] = (given[:, : target.shape[1]] - target).square().mean()
        scale = dict(zip(("task", "output", "features"), self.weights, strict=True))
        total = torch.stack([scale[k] * v for k, v in terms.items()]).sum()
        return Loss(total, terms)


class _listening:
    """Collect the outputs of the named modules, the first tensor of each, while inside."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model, self.names, self.heard = model, names, {}  # type: ignore[var-annotated]

    def __enter__(self) -> dict[str, Tensor]:
        def listen(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, out: Any) -> None:
                self.heard[name] = out[0] if isinstance(out, tuple) else out

            return hook

        self.hooks = [
            self.model.get_submodule(n).register_forward_hook(listen(n)) for n in self.names
        ]
        return self.heard

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _sample(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample
