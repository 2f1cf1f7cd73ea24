"""A walk that can be differentiated from its last sample, in the memory of one step.

    rollout = Rollout(denoiser, DDIM(), times)
    x0 = rollout.run(noise, parameters, rng=rng)       # like `sample`, and x0.backward() works
    loss(x0).backward()                                # reaches `parameters` and the noise

Backward holds g = dL/d(x, state) after a step and takes the steps again, last first, one at a time:

    dL/dp += (d step / dp)^T g,        g <- (d step / d(x, state))^T g

so that all that is kept are the samples between the steps, and one step's activations while it is
pulled back through. The price is one more forward pass a step. Noise is drawn as it was the first
time: the generator's state is recorded before each step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Solver
from effuse.core.sampling import check_times
from effuse.ops.tensors import require_finite


class Point(NamedTuple):
    """Where a walk stands between two steps.

    x: (B, *) the sample. state: of the solver. noise: state of the generator that draws from here
    on, and its device; None where there is none.
    """

    x: Tensor
    state: Any = None
    noise: tuple[Tensor, torch.device] | None = None


@dataclass(frozen=True)
class Rollout:
    """A walk in three parts: `prepare`, as many times `step`, and `finish`; `run` does all.

    Each step is a function of the point before it and of nothing else, so it can be taken again.
    What else changes the denoiser must not have changed until backward is done; a network in
    training mode with dropout draws anew and gives gradients of another walk.

    denoiser: conditions bound. solver: may carry a history, which is carried back through as well,
    and may be stochastic. times: (steps + 1,) levels. within: entered around every step, the first
    time and again in backward: hooks that put masks on a network belong here.
    """

    denoiser: Denoiser
    solver: Solver
    times: Tensor
    within: Callable[[], AbstractContextManager[Any]] = field(default=contextlib.nullcontext)

    def __post_init__(self) -> None:
        """Check the levels."""
        object.__setattr__(self, "times", check_times(self.times).cpu())

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.times) - 1

    def prepare(self, x: Tensor, *, rng: torch.Generator | None = None) -> Point:
        """Return the first point: x: (B, *) at the first level."""
        self.denoiser.process.remember(self.times)
        noise = None if rng is None else (rng.get_state(), rng.device)
        return Point(x, self.solver.init(x), noise)

    def step(self, index: int, point: Point) -> Point:
        """Take one step; the same point gives the same next point, noise and all.

        Raises:
            FloatingPointError: the sample is not finite; names the step.
        """
        rng = None
        if point.noise is not None:
            state, device = point.noise
            rng = torch.Generator(device)
            rng.set_state(state)
        with self.within():
            x, state = self.solver.step(
                self.denoiser,
                point.x,
                self.times[index],
                self.times[index + 1],
                point.state,
                rng=rng,
            )
        require_finite(x, functools.partial(_named, index, self))
        return Point(x, state, None if rng is None else (rng.get_state(), rng.device))

    def finish(self, point: Point) -> Tensor:
        """Return the sample (B, *) of the last point."""
        return point.x

    def points(self, x: Tensor, *, rng: torch.Generator | None = None) -> list[Point]:
        """Return all steps + 1 points of a walk, without gradients."""
        with torch.no_grad():
            out = [self.prepare(x.detach(), rng=rng)]
            for index in range(len(self)):
                out.append(self.step(index, out[-1]))
        if rng is not None and out[-1].noise is not None:
            rng.set_state(out[-1].noise[0])
        return out

    def pull(
        self, index: int, point: Point, grads: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Carry gradients back through one step: its vector-Jacobian product.

        Args:
            index: of the step.
            point: before it.
            grads: of the tensors of the point after it, in the order of `tensors_of`.
            parameters: which tensors else to give gradients for.

        Returns:
            Gradients of the tensors of `point`, and of the parameters; None where there is none.
        """
        x, state = _mapped(tuple(point[:2]), lambda a: a.detach().requires_grad_())
        here = Point(x, state, point.noise)
        inputs = tensors_of(here)
        with torch.enable_grad():
            after = self.step(index, here)
        pairs = [
            (out, g)
            for out, g in zip(tensors_of(after), grads, strict=True)
            if g is not None and out.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs), [None] * len(parameters)
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [*inputs, *parameters],
            [g.to(out.dtype) for out, g in pairs],
            allow_unused=True,
        )
        return list(found[: len(inputs)]), list(found[len(inputs) :])

    def run(
        self,
        x: Tensor,
        parameters: Sequence[Tensor] = (),
        *,
        rng: torch.Generator | None = None,
        watch: Callable[[Sequence[Point]], None] | None = None,
    ) -> Tensor:
        """Return the last sample (B, *), connected to `x` and `parameters`.

        Args:
            x: (B, *) the start.
            parameters: tensors that the denoiser reads and that gradients are wanted for; each may
                itself be computed from others. Gradients add up over steps in float32 or better.
            rng: draws the noise of a stochastic solver.
            watch: called with all points, once the walk is done.
        """
        return _Walk.apply(self, rng, watch, x, *parameters)


def _named(index: int, rollout: Rollout) -> str:
    t, s = rollout.times[index], rollout.times[index + 1]
    return f"step {index} of {type(rollout.solver).__name__}, t {t:.4g} to {s:.4g}"


class _Walk(torch.autograd.Function):
    """The whole walk as one function of the start and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        rollout: Rollout,
        rng: torch.Generator | None,
        watch: Callable[[Sequence[Point]], None] | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.rollout, ctx.parameters = rollout, parameters
        ctx.points = rollout.points(x, rng=rng)
        if watch is not None:
            watch(ctx.points)
        return rollout.finish(ctx.points[-1]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rollout, points = ctx.rollout, ctx.points
        wanted = [
            p for p, need in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if need
        ]
        total: list[Tensor | None] = [None] * len(wanted)
        grads: list[Tensor | None] = [None] * len(tensors_of(points[-1]))
        grads[0] = grad
        for index in reversed(range(len(rollout))):
            grads, more = rollout.pull(index, points[index], grads, wanted)
            total = [_sum(a, b) for a, b in zip(total, more, strict=True)]
        found = iter(total)
        out = [next(found) if need else None for need in ctx.needs_input_grad[4:]]
        given = [
            g if g is None else g.to(p.dtype) for g, p in zip(out, ctx.parameters, strict=True)
        ]
        return (None, None, None, grads[0] if ctx.needs_input_grad[3] else None, *given)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    return b if a is None else a + b


def tensors_of(point: Point) -> list[Tensor]:
    """Return what gradients flow through: the sample, then the floating tensors of the state."""
    out: list[Tensor] = []
    _mapped(tuple(point[:2]), lambda a: out.append(a) or a)  # type: ignore[func-returns-value]
    return out


def _mapped(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Apply `f` to the floating tensors of a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return f(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, f) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, f) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, f) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [n.name for n in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: _mapped(getattr(value, n), f) for n in names})
    return value
