"""Several networks behind the face of one, another at other steps.

`Switched` derives from diffusers' `ModelMixin` so that a pipeline saves and loads it; it is made on
first use, and importing this module does not import diffusers.
"""

from __future__ import annotations

import functools
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from effuse.compress.cache.clock import Clock, level_of
from effuse.core.contracts import Applied
from effuse.core.errors import StoreError, check_whole
from effuse.core.fields import build, dump_fields, nearest


class Schedule(ABC):
    """Which of several networks runs at a step. A frozen dataclass."""

    @abstractmethod
    def pick(self, step: int, timestep: float) -> int:
        """Return the number of the network for `step`, from 0, or its `timestep`."""

    def models(self) -> int:
        """Return how many networks the schedule names."""
        return 2

    def cost(self, timesteps: Sequence[float], costs: Sequence[float]) -> float:
        """Return the sum over a run of what its networks cost a call."""
        return sum(costs[self.pick(i, t)] for i, t in enumerate(timesteps))


@dataclass(frozen=True)
class AtSteps(Schedule):
    """Network `then[i]` from step `starts[i]` on: (0, 15) runs the first for 15 steps.

    Steps count from the first one executed; for img2img take `BelowTimesteps`.
    """

    starts: tuple[int, ...] = (0, 15)
    then: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        """Check that the rows fit and begin at 0."""
        for name in ("starts", "then"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _rows(self.starts, self.then, "starts")
        if min(self.then) < 0:
            raise ValueError(f"then={self.then}: expected numbers of networks, from 0")
        if self.starts[0] != 0 or list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"starts={self.starts}: expected 0 first, then rising")

    def models(self) -> int:
        """See `Schedule.models`."""
        return max(self.then) + 1

    def pick(self, step: int, timestep: float) -> int:
        """See `Schedule.pick`."""
        return self.then[max(i for i, start in enumerate(self.starts) if start <= step)]


@dataclass(frozen=True)
class BelowTimesteps(Schedule):
    """Network i + 1 below the timestep `bounds[i]`, the first one from there up."""

    bounds: tuple[float, ...] = (500,)

    def __post_init__(self) -> None:
        """Check that the bounds fall."""
        object.__setattr__(self, "bounds", tuple(self.bounds))
        if not self.bounds or list(self.bounds) != sorted(set(self.bounds), reverse=True):
            raise ValueError(f"bounds={self.bounds}: expected falling timesteps")

    def models(self) -> int:
        """See `Schedule.models`."""
        return len(self.bounds) + 1

    def pick(self, step: int, timestep: float) -> int:
        """See `Schedule.pick`."""
        return sum(timestep < bound for bound in self.bounds)


@dataclass(frozen=True)
class Interleaved(Schedule):
    """The first network at every `every`-th step, the second in between; 1 is the first alone."""

    every: int = 2

    def __post_init__(self) -> None:
        """Check the period."""
        check_whole("every", self.every, 1)

    def pick(self, step: int, timestep: float) -> int:
        """See `Schedule.pick`."""
        return int(step % self.every != 0)


SCHEDULES: tuple[Any, ...] = (AtSteps, BelowTimesteps, Interleaved)

SAME = (
    "in_channels",
    "out_channels",
    "prediction_type",
    "cross_attention_dim",
    "caption_channels",
    "joint_attention_dim",
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "num_embeds_ada_norm",
    "center_input_sample",
    "time_cond_proj_dim",
)
"""Entries of a network's config that decide what goes in and comes out."""


def check_alike(models: Sequence[Any]) -> None:
    """Raise `ValueError` unless networks take the same inputs and give the same kind of answer."""
    for i, model in enumerate(models[1:], 1):
        for name in SAME:
            mine, theirs = models[0].config.get(name), model.config.get(name)
            if mine != theirs:
                raise ValueError(
                    f"network {i} has {name} {theirs}, the first {mine}: switching needs the same "
                    "latent space, conditions and prediction type"
                )


def check_pipelines(pipes: Sequence[Any]) -> None:
    """Raise `ValueError` unless pipelines share prediction type, noise table and latent scale."""
    for i, pipe in enumerate(pipes[1:], 1):
        for part, names in (
            ("scheduler", ("prediction_type", "num_train_timesteps")),
            ("vae", ("scaling_factor", "shift_factor", "latent_channels")),
        ):
            one, two = (getattr(p, part, None) for p in (pipes[0], pipe))
            for name in names:
                mine, theirs = (None if p is None else p.config.get(name) for p in (one, two))
                if mine != theirs:
                    raise ValueError(
                        f"pipeline {i} has {part}.{name} {theirs}, the first {mine}: their "
                        "networks cannot take over from each other"
                    )
        tables = [getattr(p.scheduler, "alphas_cumprod", None) for p in (pipes[0], pipe)]
        if not _close(*tables):
            raise ValueError(f"pipeline {i} has another noise table than the first")


@functools.cache
def _switched() -> type:
    from diffusers import ModelMixin

    class Switched(ModelMixin):
        """Runs one of several networks at each call: D_sigma(step)(x, t, c).

        A drop-in for `pipe.unet` or `pipe.transformer`: takes the arguments of its networks, has
        the config of the first, dtype and device of their weights, and saves with the pipeline.

            pipe.unet = Switched([big, small], AtSteps((0, 15)))
            pipe.unet = Switched.at({0: big, 15: small})

        The step is read from the timestep, as in `effuse.compress.cache.base`; `reset()` begins a
        new run where that cannot be seen. Each network may carry its own transforms.

        Args:
            models: networks of one latent space and prediction type.
            schedule: which runs when.
            applied: handles of the transforms that lie on the networks, in the order in which they
                were put on, to save them too.
        """

        __module__ = "effuse.bridge.saved"
        __qualname__ = "Switched"
        _supports_gradient_checkpointing = False

        def __init__(
            self,
            models: Sequence[nn.Module],
            schedule: Schedule,
            applied: Sequence[Applied] = (),
        ):
            super().__init__()
            if not isinstance(schedule, Schedule):
                raise TypeError(f"schedule={schedule!r}: expected one such as AtSteps((0, 15))")
            if not models or len(models) < schedule.models():
                raise ValueError(f"{len(models)} networks: {schedule} needs {schedule.models()}")
            check_alike(models)
            self.models = nn.ModuleList(models)
            self.schedule = schedule
            for handle in applied:
                if all(handle.model is not m for m in models):
                    raise ValueError(
                        f"applied: {type(handle.transform).__name__} lies on none of the networks"
                    )
            self._applied = list(applied)
            self._clock = Clock()
            self._names = list(inspect.signature(type(models[0]).forward).parameters)[1:]

        @classmethod
        def at(cls, starts: Mapping[int, nn.Module]) -> Any:
            """Switch at steps: {0: big, 15: small}; a network may come back."""
            order = sorted(starts)
            models = list({id(starts[s]): starts[s] for s in order}.values())
            then = tuple(next(i for i, m in enumerate(models) if m is starts[s]) for s in order)
            return cls(models, AtSteps(tuple(order), then))

        @classmethod
        def of(cls, pipes: Sequence[Any], schedule: Schedule) -> Any:
            """Switch between the networks of pipelines, after checking that these agree."""
            check_pipelines(pipes)
            name = "unet" if getattr(pipes[0], "unet", None) is not None else "transformer"
            return cls([getattr(p, name) for p in pipes], schedule)

        @property
        def config(self) -> Any:
            """The config of the first network."""
            first: Any = self.models[0]
            return first.config

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Call the network whose turn it is."""
            named = dict(zip(self._names, args, strict=False)) | kwargs
            level = level_of(named.get("timestep"))
            clock: Any = self._clock
            step, _ = clock.step(level)
            networks: Any = self.models
            schedule: Any = self.schedule
            return networks[schedule.pick(step, level)](*args, **kwargs)

        def reset(self) -> None:
            """Forget the run: the next call is a first step."""
            clock: Any = self._clock
            clock.reset()

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or name == "models":
                    raise
                networks: Any = super().__getattr__("models")
                return getattr(networks[0], name)

        def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
            """Write each network into its own folder, and the schedule beside them.

            Raises:
                StoreError: a network or the schedule would not come back as it is.
            """
            schedule: Any = self.schedule
            name = type(schedule).__name__
            if type(schedule) not in SCHEDULES:
                raise StoreError(f"{name}: only schedules of effuse can be saved, such as AtSteps")
            networks: Any = self.models
            applied: Any = self._applied
            views = [
                _savable(m, i, [h for h in applied if h.model is m]) for i, m in enumerate(networks)
            ]
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            kinds = []
            for i, view in enumerate(views):
                view.save_pretrained(folder / f"network_{i}", **kwargs)
                root = type(view).__module__
                root = root if root.startswith("effuse") else root.split(".")[0]
                kinds.append([root, type(view).__name__])
            plan = {
                "format": 1,
                "schedule": {name: dump_fields(schedule, name)},
                "networks": kinds,
            }
            (folder / "switched.json").write_text(json.dumps(plan, indent=2) + "\n")

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
            """Read what `save_pretrained` wrote.

            Raises:
                StoreError: the plan is missing, damaged or of another version.
            """
            from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

            folder = Path(pretrained_model_name_or_path)
            folder = folder / (kwargs.pop("subfolder", None) or "")
            schedule, kinds = _read(folder / "switched.json")
            models = [
                simple_get_class_obj(*which).from_pretrained(folder / f"network_{i}", **kwargs)
                for i, which in enumerate(kinds)
            ]
            return cls(models, schedule).eval()

    return Switched


def _savable(model: Any, number: int, given: Sequence[Applied]) -> Any:
    """Return what saves the network with all that lies on it."""
    from effuse.bridge.slimmed import applied_of
    from effuse.bridge.store import is_plain, view_to_save

    loaded = applied_of(model)
    handles = [*loaded, *(h for h in given if all(h is not k for k in loaded))]
    if is_plain(model, handles):
        return model
    if not handles:
        raise StoreError(
            f"network {number} is more than its config says: give the handles of the transforms "
            "that lie on it, Switched(..., applied=[handle])"
        )
    return view_to_save(model, handles)


def _read(path: Path) -> tuple[Schedule, list[list[str]]]:
    """Return the schedule and, for each network, library and class."""
    try:
        plan = json.loads(path.read_text())
        if plan["format"] != 1:
            raise ValueError(f"format {plan['format']!r}, this version of effuse reads 1")
        ((name, fields),) = plan["schedule"].items()
        known = {c.__name__: c for c in SCHEDULES}
        if name not in known:
            raise ValueError(f"unknown schedule {name!r}{nearest(name, known)}")
        return build(known[name], fields, name), [[root, kind] for root, kind in plan["networks"]]
    except KeyError as error:
        raise StoreError(f"{path}: {error} is missing") from error
    except (OSError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{path}: expected the plan of a Switched network: {error}") from error


def _close(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(a.allclose(b))


def _rows(one: Sequence[Any], two: Sequence[Any], name: str) -> None:
    if not one or len(one) != len(two):
        raise ValueError(f"{name}: expected as many as networks to run, got {len(one)}, {len(two)}")


def __getattr__(name: str) -> Any:
    if name == "Switched":
        return _switched()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
