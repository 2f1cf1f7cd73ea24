"""Supervision by meaning: what student and teacher take the clean picture for should look alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.bridge.pipeline import Network
from effuse.bridge.table import predict
from effuse.core.contracts import Call, Loss, Objective
from effuse.processes.tabulated import Tabulated

from .features import NormalizedFeatureDistillation, answer, listening

Encoder = Callable[[Tensor, Call], Tensor]
"""Maps clean samples, (B, C, h, w), and the call they were predicted in to features, (B, F)."""


class Middle:
    """Features of clean samples: the teacher's own middle, averaged over the picture.

    The teacher is asked at its lowest noise level under the conditions of the call; a middle block
    of a UNet, the block at half depth of a transformer.

    Args:
        teacher: a diffusers network.
        tap: dotted name of the module to listen to, if not the middle.

    Raises:
        TypeError: the network has no middle; name the tap.
    """

    def __init__(self, teacher: nn.Module, tap: str | None = None):
        self.teacher = teacher
        if tap is None:
            row: Any = getattr(teacher, "transformer_blocks", None)
            if getattr(teacher, "mid_block", None) is not None:
                tap = "mid_block"
            elif row is not None:
                tap = f"transformer_blocks.{len(row) // 2}"
            else:
                raise TypeError(
                    f"{type(teacher).__name__} has neither mid_block nor transformer_blocks: give "
                    "`tap` by name"
                )
        teacher.get_submodule(tap)
        self.tap = tap

    def __call__(self, x0: Tensor, call: Call) -> Tensor:
        """Return (B, F) of x0: (B, C, h, w)."""
        args, kwargs = call
        label = torch.zeros(len(x0), device=x0.device)
        if "timestep" in kwargs:
            args, kwargs = (x0, *args[1:]), {**kwargs, "timestep": label}
        else:
            args = (x0, label, *args[2:])
        with listening(self.teacher, [self.tap]) as heard:
            self.teacher(*args, **kwargs)
        found = heard[self.tap].float()
        return found.mean((2, 3)) if found.ndim == 4 else found.mean(1)


class SemanticSupervision(Objective):
    """A distillation, and the angle between what both networks take the clean picture for.

    L = L_base + weight (1 - cos(phi(x0_T), phi(x0_S))),  x0 from each network's answer in one step

    Zero beside the base where the answers agree. Nothing runs twice: answers are overheard. phi is
    asked once for each; gradients reach the student alone.

    A reconstruction of A-SDM's semantic-aware supervision (2312.15516), of which only the abstract
    was at hand.

    Args:
        base: what is distilled besides.
        network: how the networks were trained, `effuse.wrap(pipe).bare`.
        encoder: phi; `Middle(base.teacher)` if not given.
        weight: at least 0.

    Raises:
        ValueError: a negative weight, or a network whose noise level cannot be read from its call.
    """

    def __init__(
        self,
        base: NormalizedFeatureDistillation,
        network: Network,
        encoder: Encoder | None = None,
        weight: float = 0.1,
    ):
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight={weight!r}: expected at least 0")
        odd = type(network) is not Network or not isinstance(network.process, Tabulated)
        if odd or network.schedule.continuous or network.schedule.by_sigma:
            raise ValueError(
                f"{type(network).__name__} of a {type(network.process).__name__} process: expected "
                "a network on latents whose timestep is an index into a table of noise levels"
            )
        self.base, self.weight = base, weight
        self.schedule = network.schedule
        self.encoder = Middle(base.teacher) if encoder is None else encoder

    @property
    def student(self) -> nn.Module:
        """The network that learns."""
        return self.base.student

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the base's terms and `semantic`."""
        call, target = self.base._call(batch, rng)
        told = {"call": call} if target is None else {"call": call, "target": target}
        with listening(self.base.teacher, [""]) as theirs, listening(self.student, [""]) as own:
            found = self.base.loss(player, told, rng=rng)
        if self.weight == 0:
            return found
        args, kwargs = call
        label = kwargs["timestep"] if "timestep" in kwargs else args[1]
        x = args[0].float()
        label = torch.as_tensor(label, device=x.device).reshape(-1).expand(len(x))
        process: Any = self.schedule.process
        t = process.time_of(label.cpu()).to(x.device)
        wanted, given = (
            predict(self.schedule.kind, answer(heard[""]).float(), x, t, process).x0
            for heard in (theirs, own)
        )
        dtype = args[0].dtype
        with torch.no_grad():
            aim = self.encoder(wanted.to(dtype), call)
        angle = F.cosine_similarity(aim, self.encoder(given.to(dtype), call), dim=-1)
        term = self.weight * (1 - angle).mean()
        return Loss(found.total + term, {**found.terms, "semantic": term})
