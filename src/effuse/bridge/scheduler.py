"""Solver out: any solver as a diffusers scheduler that a stock pipeline accepts.

    pipe.scheduler = effuse.scheduler("momentum", pipe.scheduler)

A pipeline calls the network itself and hands in one output after another; `Replay` runs the solver
on them. Here is what diffusers wants besides: config, levels, labels, noise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from effuse import processes
from effuse.core import Prediction, Solver, Time, methods
from effuse.core.fields import build, dump_fields, nearest
from effuse.ops import expand_as
from effuse.ops.tensors import require_finite
from effuse.processes import Flow, Grid, Tabulated

from .replay import Replay, levels_asked
from .table import AsScheduler, Schedule, Walk, predict, solver_named

__all__ = ["SolverOutput", "SolverScheduler", "scheduler"]


@dataclass
class SolverOutput(BaseOutput):
    """What `SolverScheduler.step` gives.

    prev_sample: what the network is asked next, or the sample in the end;
    pred_original_sample: x0 as predicted by the last output.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


def scheduler(solver: Solver | str, like: Any, *, grid: Grid | None = None) -> SolverScheduler:
    """Return `solver` as a diffusers scheduler that stands in for `like`.

    Args:
        solver: a solver, or a method's name for its first solver with default fields.
        like: the scheduler to replace; its config gives the table of noise levels, the prediction
            type, and the flags for clipping.
        grid: where the steps are. Left out, a solver that diffusers has too keeps to the levels of
            `like`, so it gives what diffusers gives; any other takes `Tapered` in place of even
            levels, at a fraction of the error. `grid_of(like)` keeps to `like` in any case.

    Raises:
        ValueError: no method of this name has a solver (the nearest is named), or the solver or
            the grid has fields that cannot be written down.
        TypeError: `like` is no scheduler of diffusers over a table or flow sigmas.
    """
    if isinstance(solver, str):
        solver = solver_named(solver)
    if not isinstance(solver, Solver):
        raise TypeError(f"solver={solver!r}: expected a Solver or a method's name")
    like = like.like if isinstance(like, SolverScheduler) else like
    name = type(like).__name__
    if getattr(diffusers, name, None) is not type(like):
        raise TypeError(f"like is a {name}: expected a scheduler of diffusers, or one made here")
    Schedule(like)  # refuses what has neither table nor flow sigmas
    config = {k: v for k, v in like.config.items() if not k.startswith("_")}
    config |= {"solver": _dump(solver), "like": name, "grid": None}
    if isinstance(grid, AsScheduler):
        if Schedule(like).config != grid.schedule.config:
            raise ValueError(f"the grid of {grid.schedule} in place of {Schedule(like)}")
        config["grid"] = {"class": "AsScheduler", "fields": {}}
    elif grid is not None:
        config["grid"] = {
            "class": _grid_class(type(grid).__name__).__name__,
            "fields": dump_fields(grid, "grid"),
        }
    return SolverScheduler.from_config(config)


def _dump(solver: Solver) -> dict[str, Any]:
    card = next((c for c in methods().values() if type(solver) in c.classes), None)
    if card is None:
        raise ValueError(
            f"{type(solver).__name__} has no method card, so it cannot be saved by name: decorate "
            "it with @method"
        )
    return {
        "method": card.name,
        "class": type(solver).__name__,
        "fields": dump_fields(solver, card.name),
    }


def _load(saved: Mapping[str, Any] | None) -> Solver:
    if saved is None:
        return solver_named("ddim")
    plain = solver_named(saved.get("method", ""), saved.get("class"))
    return build(type(plain), saved.get("fields", {}), f"solver {saved['method']}")


def _grid_class(name: str) -> type[Grid]:
    known = [n for n, c in vars(processes).items() if isinstance(c, type) and issubclass(c, Grid)]
    if name not in known:
        raise ValueError(f"grid {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    return getattr(processes, name)


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """A solver in the form diffusers pipelines want.

    Make one with `effuse.scheduler`. Walks in x = alpha x0 + sigma noise at every level, whatever
    coordinates the replaced scheduler took, so nothing is scaled on the way into the network.
    The state of a half precision run is kept in float32. A solver with several evaluations a step
    repeats its levels in `timesteps`, as diffusers' Heun does; `order` is their number.

    Args:
        num_train_timesteps: entries of the table.
        beta_start: noise rate of the first entry.
        beta_end: noise rate of the last one.
        beta_schedule: how the rates go from one to the other.
        trained_betas: the rates themselves, instead.
        prediction_type: what the network predicts.
        solver: method, class and fields of the solver; deterministic DDIM by default.
        like: name of the scheduler this one stands for. All other entries of its config are kept
            in this one's, and mean what they mean there.
        grid: class and fields of the grid, if not left to `like` and us; see `scheduler`.
    """

    __module__ = "effuse.bridge.saved"
    _compatibles: ClassVar[list[str]] = [
        # without torchsde that one is a stand-in that only raises
        *(e.name for e in KarrasDiffusionSchedulers if e.name != "DPMSolverSDEScheduler"),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        solver: dict[str, Any] | None = None,
        like: str = "DDIMScheduler",
        grid: dict[str, Any] | None = None,
    ):
        self.solver = _load(solver)
        self.num_inference_steps: int | None = None
        self._like: Any = None
        self._schedule: Schedule | None = None
        self._walk: Walk | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop everything of a run but its levels."""
        self._at: int | None = None  # position in the plan of what comes in next
        self._begin_index: int | None = None
        self._replay: Replay | None = None
        # of a half precision run: what was given out, and what it was rounded from
        self._given: Tensor | None = None
        self._kept: Tensor | None = None

    # What it stands for

    @property
    def like(self) -> Any:
        """The scheduler this one stands for."""
        if self._like is None:
            cls = getattr(diffusers, self.config.like, None)
            if cls is None:
                raise ValueError(f"like={self.config.like!r}: diffusers has no such scheduler")
            own = inspect.signature(cls.__init__).parameters
            self._like = cls(**{k: v for k, v in self.config.items() if k in own})
        return self._like

    @property
    def schedule(self) -> Schedule:
        """Process, prediction kind and spacing; of the current run where a run shifts them."""
        if self._schedule is None:
            self._schedule = Schedule(self.like)
        return self._schedule

    @property
    def order(self) -> int:
        """Evaluations a step: timesteps per step of the solver."""
        return int(self.solver.evals)

    @property
    def betas(self) -> Tensor:
        """The table's noise rates."""
        return self.like.betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """The table itself, alpha squared."""
        return self.like.alphas_cumprod

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # A run

    @property
    def timesteps(self) -> Tensor:
        """What the pipeline tells the network, call by call."""
        return self.like.timesteps if self._walk is None else self._timesteps

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the run, (steps + 1,): sigma / alpha, or sigma for flow matching."""
        if self._walk is None:
            return self.like.sigmas
        process, levels = self.schedule.process, self._walk.levels
        sigma = process.sigma(levels)
        return (sigma if isinstance(process, Flow) else sigma / process.alpha(levels)).float()

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise a run starts from."""
        if self._walk is not None:
            return self._walk.start
        start = float(getattr(self.like, "init_noise_sigma", 1.0))
        return start * float(self.schedule.process.alpha(1.0)) if start > 1 else start

    @property
    def step_index(self) -> int | None:
        """Position in `timesteps` of what comes in next; None before the first."""
        return self._at

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` the run starts, if a pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where in `timesteps` the run starts (image to image)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a run anew.

        Args:
            num_inference_steps: steps of the solver.
            device: of `timesteps`.
            timesteps: falling labels, instead of a number of steps.
            sigmas: falling noise levels, instead.
            mu: dynamic shift of a flow schedule.

        Raises:
            ValueError: the arguments contradict one another, the number of steps is not within 1
                and the table's length, or the solver cannot be driven by a pipeline.
        """
        steps = num_inference_steps
        if steps is None and timesteps is None and sigmas is None:
            raise ValueError("expected num_inference_steps, timesteps or sigmas")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"num_inference_steps={steps!r}: expected a positive integer")
        if mu is not None or self.schedule.mu is not None:
            self._schedule = Schedule(self.like, mu)
        schedule = self.schedule
        grid = self._grid(schedule, free=timesteps is None and sigmas is None)
        if grid is None:
            walk = schedule.walk(steps, timesteps=timesteps, sigmas=sigmas, mu=mu)
        else:
            if timesteps is not None:
                raise ValueError("timesteps beside a grid: leave one of them out")
            # FLUX always hands in sigmas; the grid given by the user wins
            walk = self._gridded(schedule, grid, len(sigmas) if steps is None else steps)
        self._walk, self.num_inference_steps = walk, len(walk.labels)
        schedule.process.remember(walk.levels)
        self._plan, labels = self._asked(walk)
        self._timesteps, self._labels = labels.to(device), labels.tolist()
        self._forget()

    def _grid(self, schedule: Schedule, *, free: bool) -> Grid | None:
        """Return the grid of a run, or None for what the scheduler this one stands for would do."""
        if self.config.grid is None:
            return schedule.grid_for(self.solver) if free else None
        if self.config.grid["class"] == "AsScheduler":
            return None
        return build(_grid_class(self.config.grid["class"]), self.config.grid["fields"], "grid")

    def _gridded(self, schedule: Schedule, grid: Grid, steps: int) -> Walk:
        levels = grid(schedule.process, steps)
        labels = schedule.label(levels[:-1])
        whole = (labels - labels.round()).abs().max() < 1e-6  # pipelines may index with them
        labels = labels.round().long() if whole else labels.float()
        return Walk(levels, labels, self._unit(schedule, levels))

    @staticmethod
    def _unit(schedule: Schedule, levels: Tensor) -> float:
        return float(schedule.process.sigma(levels[0])) if schedule.flow else 1.0

    def _asked(self, walk: Walk) -> tuple[list[tuple[int, int]], Tensor]:
        """Return (step, evaluation) of every call, and its label."""
        asked = levels_asked(self.solver, self.schedule.process, walk.levels)
        plan = [(i, e) for i, levels in enumerate(asked) for e in range(len(levels))]
        if len(plan) == len(walk.labels):
            return plan, walk.labels
        on_grid = {float(t): label for t, label in zip(walk.levels, walk.labels, strict=False)}
        labels = [on_grid.get(t, self.schedule.label(t)) for levels in asked for t in levels]
        listed = torch.stack([torch.as_tensor(label) for label in labels])
        return plan, listed if walk.labels.dtype == listed.dtype else listed.float()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
    ) -> SolverOutput | tuple[Tensor, Tensor]:
        """Take in one output of the network.

        Args:
            model_output: (B, C, *), or (B, 2C, *) with a learned variance.
            timestep: the one it was made at: the next of `timesteps`.
            sample: (B, C, *) what the network saw.
            generator: draws the solver's noise; one, or one a row. Without it torch's global seed
                decides, as with every pipeline that passes none on (SD3, FLUX, DiT).
            return_dict: whether to give an object rather than a pair.
            eta: must be zero; the solver says itself how much noise it draws.
            use_clipped_model_output: clipping, where asked for, always carries over to the noise.

        Raises:
            ValueError: no run was set, the timestep is not the next one, or `eta` is given.
            FloatingPointError: the output, or what comes of it, has a NaN or an infinity.
        """
        if self._walk is None:
            raise ValueError("no run: call set_timesteps first")
        if eta:
            raise ValueError(
                f"eta={eta}: the solver draws its own noise, make it with effuse.scheduler("
                f"DDIM(eta={eta}), ...) instead"
            )
        at = self._first(timestep) if self._at is None else self._at
        self._check(at, timestep)
        index = self._plan[at][0]
        if self._replay is None:
            self._replay = Replay(self.solver, self.schedule.process, self._predict)
        t, s = self._walk.levels[index], self._walk.levels[index + 1]
        out, x0, done = self._replay.take(model_output, self._full(sample), t, s, generator)
        if not math.isfinite(out.sum().item()):
            step = f"step {index} of {type(self.solver).__name__}, timestep {float(timestep):g}"
            require_finite(model_output, f"{step}, the network's output")
            require_finite(out, step)
        self._at = at + 1
        more = self._at < len(self._plan) and self._plan[self._at][0] == index
        if more is done:
            raise RuntimeError(
                f"{type(self.solver).__name__} asked for {'fewer' if done else 'more'} evaluations "
                f"in step {index} than it did on a run on zeros: no pipeline can drive it"
            )
        given, x0 = out.to(sample.dtype), x0.to(sample.dtype)
        if given.dtype != out.dtype:
            self._given, self._kept = given, out
        return SolverOutput(given, x0) if return_dict else (given, x0)

    def _predict(self, output: Tensor, x: Tensor, t: Time) -> Prediction:
        schedule = self.schedule
        return predict(schedule.kind, output, x, t, schedule.process, schedule.clip)

    def _first(self, timestep: Any) -> int:
        begin = self._begin_index
        if begin is not None and begin < len(self._plan) and self._plan[begin][1] == 0:
            return begin
        for at, (_, evaluation) in enumerate(self._plan):
            if evaluation == 0 and self._same(at, timestep):
                return at
        some = ", ".join(f"{float(t):g}" for t in self._timesteps[:4])
        raise ValueError(
            f"timestep {float(timestep):g} is none of this run's {len(self._plan)}: expected one "
            f"of scheduler.timesteps ({some}, ...)"
        )

    def _same(self, at: int, timestep: Any) -> bool:
        mine = self._labels[at]
        return abs(mine - float(timestep)) <= 1e-5 * max(1.0, abs(mine))

    def _check(self, at: int, timestep: Any) -> None:
        if at >= len(self._plan):
            raise ValueError("the run is over: call set_timesteps to begin another")
        if not self._same(at, timestep):
            raise ValueError(
                f"timestep {float(timestep):g} is repeated or out of order: expected "
                f"{self._labels[at]:g}, call {at} of {len(self._plan)}; call "
                "set_timesteps to begin anew"
            )

    def _full(self, sample: Tensor) -> Tensor:
        """Return the sample in float32 or better; what was rounded off comes back."""
        if sample.dtype in (torch.float32, torch.float64):
            return sample
        given, kept = self._given, self._kept
        if given is not None and given.shape == sample.shape and torch.equal(given, sample):
            assert kept is not None
            return kept
        return sample.float()

    # Noise by label, for training and image to image

    def _levels(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at labels, (B,), shaped to broadcast over `like`."""
        schedule, out = self.schedule, []
        for label in torch.as_tensor(timesteps).reshape(-1):
            starts = (
                [] if self._walk is None else [a for a, p in enumerate(self._plan) if p[1] == 0]
            )
            at = next((a for a in starts if self._same(a, label)), None)
            if at is not None:
                out.append(self._walk.levels[self._plan[at][0]])  # type: ignore[union-attr]
            elif isinstance(schedule.process, Tabulated):
                out.append(schedule.process.time_of(label.double().cpu()))
            else:
                out.append(schedule.time_of_sigma(label / schedule.count))
        t = torch.stack(out)
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"timesteps {timesteps}: expected labels within [0, {len(self)})")
        alpha, sigma = (c.to(like.dtype) for c in schedule.process.coefficients(t)[:2])
        return expand_as(alpha, like), expand_as(sigma, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha x0 + sigma noise at the level of each row's label, timesteps: (B,)."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """Same as `add_noise`, as flow-matching pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha noise - sigma x0 (for flow matching noise - x0), a training target."""
        if self.schedule.flow:
            return noise - sample
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample
