"""Controls: from a wrapped pipeline and prompts to the denoiser and the solver that sample them.

drawing = controlled(effuse.wrap(pipe), W2SD(), ["a red apple"], steps=20)
pictures = drawing.sample(rng=rng)
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.bridge.families import default_of, listed
from effuse.bridge.pipeline import Wrapped
from effuse.core.contracts import Denoiser, Solver
from effuse.core.errors import check_whole
from effuse.core.fields import nearest
from effuse.core.method import methods
from effuse.core.sampling import sample
from effuse.processes import Grid

from .guide import one_process


class Branches(NamedTuple):
    """What guidance needs: the conditional denoiser, the unconditional one or None, the scale."""

    told: Denoiser
    empty: Denoiser | None
    scale: float


def branches(
    model: Wrapped,
    what: Sequence[Any],
    guidance: float | None = None,
    negative: Any = None,
) -> Branches:
    """Return the branches of `model` for prompts or labels `what`, with the conditions bound.

    what: None in each place for a pipeline without conditions. guidance: diffusers' scale; the
    pipeline's own if not given. Without a second branch (1, or a
    network that is told the scale) `empty` is None and the scale 1. x0 is not clipped: what is
    clipped is no score.
    """
    scale = default_of(model.pipe, "guidance_scale", 1.0) if guidance is None else guidance
    guided, told = model.family.guides(model, scale, guidance is not None)
    if what[0] is None:  # unconditional: as many as there are rows
        what = len(what)  # type: ignore[assignment]
    if not guided:
        if negative is not None:
            raise ValueError(
                f"negative={negative!r} with guidance {scale:g}: expected a scale above 1"
            )
        return Branches(model.bare.given(**model.embed(what), **told), None, 1.0)
    cond = model.embed(what, negative, guided=True)
    empty = cond.pop("negative")
    return Branches(
        model.bare.given(**cond, **told), model.bare.given(**empty, **told), float(scale)
    )


def same_space(models: Sequence[Wrapped]) -> None:
    """Raise `ValueError` unless all `models` share one schedule and one latent space."""
    first = models[0]
    one_process([m.bare for m in models])
    for index, other in enumerate(models[1:], 1):
        mine, its = (_space(m) for m in (first, other))
        if mine != its:
            raise ValueError(
                f"model {index} has samples of {its} beside {mine} of model 0: expected one shape "
                "and one latent space for all"
            )


def _space(model: Wrapped) -> dict[str, Any]:
    said: dict[str, Any] = {"shape": model.shape}
    if model.codec.vae is not None:
        config: Any = model.codec.vae.config
        for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            said[key] = getattr(config, key, None)
    return said


class Control(ABC):
    """Steers the sampling of a pipeline. A frozen dataclass."""

    @property
    def steps(self) -> int | None:
        """Steps it needs to work well; `None` where the pipeline's own default will do."""
        return None

    def rows(self, what: Sequence[Any], count: int) -> list[Any]:
        """Return what each picture is asked for, in order: `count` of each prompt by default."""
        return [one for one in what for _ in range(count)]

    @abstractmethod
    def build(
        self,
        model: Wrapped,
        what: Sequence[Any],
        count: int,
        *,
        guidance: float | None,
        negative: Any,
    ) -> tuple[Denoiser, Callable[[float], Solver]]:
        """Return the denoiser, conditions bound, and what makes the solver of the walk's end."""


@dataclass(frozen=True)
class Controlled:
    """A control on a pipeline, ready to sample; the parts are there to be used by themselves.

    denoiser, solver, times: arguments of `effuse.sample`. start: deviation of its first sample.
    count: how many pictures it draws.
    """

    model: Wrapped
    denoiser: Denoiser
    solver: Solver
    times: Tensor
    start: float
    count: int

    @torch.no_grad()
    def sample(
        self,
        *,
        rng: torch.Generator | None = None,
        latents: Tensor | None = None,
        on_step: Callable[..., Tensor | None] | None = None,
        decode: bool = True,
    ) -> Tensor:
        """Sample (count, 3, H, W) pictures in [0, 1], or (count, C, h, w); see `Wrapped.sample`."""
        x = self.model.prior(self.count, rng=rng) if latents is None else latents
        if x.shape != (self.count, *self.model.shape):
            raise ValueError(
                f"latents of shape {tuple(x.shape)}: expected {(self.count, *self.model.shape)}"
            )
        x = self.start * x.float().to(self.model.device)
        out = sample(self.denoiser, self.solver, x, self.times, rng=rng, on_step=on_step)
        return self.model.codec.decode(out).clamp(0, 1) if decode else out


def controlled(
    model: Wrapped,
    control: Control | str,
    what: Any,
    *,
    count: int = 1,
    steps: int | None = None,
    grid: Grid | None = None,
    guidance: float | None = None,
    negative: Any = None,
    size: int | tuple[int, int] | None = None,
) -> Controlled:
    """Put a control on a pipeline.

    Args:
        model: `effuse.wrap(pipe)`.
        control: a control, or the name of one for its defaults: what a command line says.
        what: prompts or class labels. What several mean is the control's to say: `w2sd` draws each,
            `superdiff` all of them in one picture. A number for a pipeline without conditions,
            times `count`.
        count: pictures of each, or of all together.
        steps: the control's own default, then the pipeline's, if not given.
        grid: as in `Wrapped.sample`.
        guidance: diffusers' scale; the pipeline's own if not given, 1 for none.
        negative: one prompt to keep away from.
        size: (height, width) in pixels.

    Raises:
        ValueError: no such control, or arguments that make no sense for this pipeline.
    """
    control = control_named(control) if isinstance(control, str) else control
    check_whole("count", count, 1)
    what = listed(what)
    if isinstance(what, int):
        what, count = [None], what * count
    model, enough = model.at(size), control.steps
    if steps is not None and enough is not None and steps < enough:
        warnings.warn(
            f"{steps} steps: {type(control).__name__} is noisy below {enough}", stacklevel=2
        )
    steps = enough if steps is None else steps
    steps = default_of(model.pipe, "num_inference_steps", 50) if steps is None else steps
    check_whole("steps", steps, 1)
    denoiser, make = control.build(model, what, count, guidance=guidance, negative=negative)
    own, solver = model.schedule.walk(steps), make(0.0)
    grid = model.schedule.grid_for(solver) if grid is None else grid
    times = own.levels if grid is None else grid(model.process, steps)
    solver = make(float(times[-1]))
    return Controlled(model, denoiser, solver, times, own.start, len(control.rows(what, count)))


def control_named(name: str) -> Control:
    """Return the control of a method with its default fields.

    Raises:
        ValueError: no method of this name has a control; the nearest one is named.
    """
    cards = {
        n: [c for c in card.classes if issubclass(c, Control)] for n, card in methods().items()
    }
    known = {n: found for n, found in cards.items() if found}
    if name not in known:
        raise ValueError(
            f"control {name!r}: expected one of {', '.join(known)}{nearest(name, known)}"
        )
    return known[name][0]()
