"""What a diffusers scheduler's config says, read once: process, prediction kind, levels, labels.

Both directions of the bridge stand on it. A *level* is our t in [0, 1]; a *label* is what the
network is told: a table index (whole or fractional), or 1000 sigma for flow matching.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.core import Prediction, Process, Solver, Time, methods
from effuse.core.clip import Clip
from effuse.core.fields import nearest
from effuse.ops import expand_as, weighted_sum
from effuse.ops.tensors import has_zero
from effuse.processes import Flow, Grid, Tabulated, Tapered

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")

# Schedulers whose timesteps repeat or interleave for several evaluations: spaced by a plain one.
_SPACED_BY = {
    "PNDMScheduler": "DDIMScheduler",
    "HeunDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2DiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "DPMSolverSDEScheduler": "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
}
# Spacings chosen in sigma, whose labels diffusers finds by interpolating log sigma.
_BY_SIGMA = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
_FLOAT_LABELS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)


def solver_named(name: str, cls: str | None = None) -> Solver:
    """Return the solver of a method with its default fields; `cls` names one of several.

    Raises:
        ValueError: no method of this name has a solver; the nearest one is named.
    """
    cards = {n: [c for c in card.classes if issubclass(c, Solver)] for n, card in methods().items()}
    known = {n: found for n, found in cards.items() if found}
    if name not in known:
        listed = ", ".join(known)
        raise ValueError(f"solver {name!r}: expected one of {listed}{nearest(name, known)}")
    found = [c for c in known[name] if cls in (None, c.__name__)]
    if not found:
        listed = ", ".join(c.__name__ for c in known[name])
        raise ValueError(f"solver {name!r} has no class {cls!r}: expected one of {listed}")
    return found[0]()


class Walk(NamedTuple):
    """A run of `steps` steps.

    levels: (steps + 1,) float64, falling; labels: (steps,) as diffusers gives them to the network;
    start: standard deviation of the noise that the first sample is made of.
    """

    levels: Tensor
    labels: Tensor
    start: float


def predict(
    kind: str, output: Tensor, x: Tensor, t: Time, process: Process, clip: Clip | None = None
) -> Prediction:
    """Turn a network's output into both parts of the sample x = alpha x0 + sigma noise.

    epsilon: output = noise;  sample: output = x0;  v_prediction: output = alpha noise - sigma x0;
    flow_prediction: output = noise - x0.

    Args:
        kind: one of `KINDS`.
        output: (B, C, *), or (B, 2C, *) with a learned variance, which is split off.
        x: (B, C, *) the sample at level `t`, in the dtype the pair gets.
        t: the level, () or (B,).
        process: what spoiled x.
        clip: keeps x0 in range; the noise is then taken from x and x0.

    Raises:
        ValueError: the kind is unknown, or cannot give the pair at this level: epsilon says nothing
            of x0 where alpha = 0, and sample says nothing of the noise where sigma = 0.
    """
    if output.shape[1] == 2 * x.shape[1]:
        output = output.chunk(2, dim=1)[0]
    if output.shape != x.shape:
        raise ValueError(
            f"the network gave {tuple(output.shape)} for a sample of {tuple(x.shape)}: expected "
            "the same shape, or twice the channels with a learned variance"
        )
    output = output.to(x.dtype)
    alpha, sigma, _ = process.at(t)
    if kind == "epsilon" and has_zero(alpha):
        raise ValueError(
            "epsilon prediction at alpha = 0: pure noise tells nothing of the data; a schedule "
            "with zero terminal SNR needs v_prediction or sample, or a grid that starts below it"
        )
    if kind == "epsilon":
        pair = Prediction(weighted_sum((1 / alpha, x), (-sigma / alpha, output)), output)
    elif kind == "v_prediction":
        x0 = weighted_sum((alpha, x), (-sigma, output))
        pair = Prediction(x0, weighted_sum((alpha, output), (sigma, x)))
    elif kind == "flow_prediction":
        x0 = weighted_sum((1.0, x), (-sigma, output))
        pair = Prediction(x0, weighted_sum((1.0, x), (alpha, output)))
    elif kind == "sample":
        pair = process.complete(x, t, x0=output)
    else:
        raise ValueError(f"prediction_type={kind!r}: expected one of {KINDS}")
    if clip is None:
        return pair
    return process.complete(x, t, x0=clip(pair.x0))


def answer_for(kind: str, x0: Tensor, noise: Tensor, t: Time, process: Process) -> Tensor:
    """Return the output from which `predict` gives back x0: (B, C, *) and noise, at level `t`."""
    alpha, sigma, _ = (expand_as(c, x0) for c in process.coefficients(t))
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


class Schedule:
    """A diffusers scheduler's config in our words.

    Args:
        scheduler: any scheduler over a table of alphas_cumprod, a flow-matching one, or a
            `SolverScheduler` (then the one it stands for).
        mu: the shift of a flow schedule with dynamic shifting, once it is known.
        even: the pipeline itself asks for sigmas 1, ..., 1 / steps before the shift (FLUX).

    process: `Tabulated`, or `Flow` with the schedule's shift. kind: what the network predicts.
    clip: the flags clip_sample and thresholding, where the scheduler honors them.

    Raises:
        TypeError: the scheduler has neither such a table nor flow sigmas.
    """

    def __init__(self, scheduler: Any, mu: float | None = None, *, even: bool = False):
        scheduler = getattr(scheduler, "like", scheduler)
        self.scheduler, self.name = scheduler, type(scheduler).__name__
        self.config = dict(scheduler.config)
        self.mu, self.even = mu, even
        own = inspect.signature(type(scheduler).__init__).parameters
        # What another class left in the config is not honored by this one.
        self.config = {k: v for k, v in self.config.items() if k in own}
        self.flow = self.name.startswith("FlowMatch") or self.config.get("use_flow_sigmas", False)
        self.count = int(self.config.get("num_train_timesteps", 1000))
        self.kind = self.config.get("prediction_type", "epsilon")
        self.process: Process
        if self.flow:
            self.kind = "flow_prediction"
            self.process = Flow(self._shift())
        elif getattr(scheduler, "alphas_cumprod", None) is not None and "EDM" not in self.name:
            self.process = Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod)
        else:
            raise TypeError(
                f"{self.name}: expected a scheduler with alphas_cumprod (DDIM, DDPM, PNDM, Euler, "
                "DPMSolver, UniPC, ...) or a flow-matching one"
            )
        if self.kind == "original_sample":
            self.kind = "sample"
        if self.kind not in KINDS:
            raise ValueError(f"prediction_type={self.kind!r}: expected one of {KINDS}")
        self.by_sigma = any(self.config.get(k) for k in _BY_SIGMA)
        self.continuous = (
            self.config.get("timestep_type") == "continuous" and self.kind == "v_prediction"
        )
        self.clip = self._clip()

    def _shift(self) -> float:
        if self.config.get("use_dynamic_shifting"):
            if self.mu is None:
                return 1.0
            linear = self.config.get("time_shift_type") == "linear"
            return self.mu if linear else math.exp(self.mu)
        return float(self.config.get("shift", self.config.get("flow_shift", 1.0)) or 1.0)

    def _clip(self) -> Clip | None:
        if self.config.get("thresholding"):
            c = self.config
            return Clip(c.get("sample_max_value", 1.0), c.get("dynamic_thresholding_ratio", 0.995))
        if self.config.get("clip_sample"):
            return Clip(self.config.get("clip_sample_range") or 1.0)
        return None

    def __repr__(self) -> str:
        said = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "final_sigmas_type")
        shown = [f"{k}={self.config[k]!r}" for k in (*said, *_BY_SIGMA) if self.config.get(k)]
        return f"{self.name}({', '.join(shown)})"

    def grid_for(self, solver: Solver) -> Grid | None:
        """Return `Tapered` for a solver of ours where diffusers spreads its levels evenly.

        None, for the scheduler's own levels: for a solver that diffusers has too, so that it gives
        what diffusers gives; where sigmas are spaced or few-step weights fix the levels; and where
        the table begins with pure noise, of which epsilon says nothing.
        """
        free = (
            isinstance(self.process, Tabulated)
            and not solver.counterpart
            and not (self.by_sigma or self.continuous or "original_inference_steps" in self.config)
            and not (self.kind == "epsilon" and float(self.process.alpha(1.0)) == 0)
        )
        return Tapered() if free else None

    def _spaced(self) -> Any:
        """Return a scheduler of its own whose set_timesteps gives plain, unrepeated steps."""
        import diffusers

        name = _SPACED_BY.get(self.name)
        cls = type(self.scheduler) if name is None else getattr(diffusers, name)
        own = inspect.signature(cls.__init__).parameters
        return cls(**{k: v for k, v in self.config.items() if k in own})

    def walk(self, steps: int | None = None, **given: Any) -> Walk:
        """Return levels and labels of a run, as the scheduler itself would set them.

        Args:
            steps: how many, unless `given` says so.
            **given: timesteps, sigmas, mu, as `set_timesteps` takes them.

        Raises:
            ValueError: diffusers refuses the number of steps or the arguments.
        """
        given = {k: v for k, v in given.items() if v is not None}
        if not self.flow and ("timesteps" in given or "sigmas" in given):
            return self._by_hand(**given)
        if self.flow and self.mu is not None:
            given.setdefault("mu", self.mu)
        like = self._spaced()
        if not self.config.get("use_dynamic_shifting"):
            given.pop("mu", None)
        if self.even and steps and "sigmas" not in given and not self.config.get("use_flow_sigmas"):
            given["sigmas"] = [1 - i / steps for i in range(steps)]
        if steps is not None:
            given["num_inference_steps"] = steps
        like.set_timesteps(**given)
        labels = torch.as_tensor(like.timesteps).cpu()
        sigmas = getattr(like, "sigmas", None)
        if self.flow:
            levels = self.time_of_sigma(torch.as_tensor(sigmas))
            return Walk(levels, labels, float(self.process.sigma(levels[0])))
        assert isinstance(self.process, Tabulated)
        if self.by_sigma or self.continuous:
            inner = self.time_of_sigma(torch.as_tensor(sigmas)[:-1])
        else:
            inner = self.process.time_of(labels.double())
        clean = self.config.get("set_alpha_to_one", True)
        if sigmas is not None:
            clean = float(sigmas[-1]) == 0
        levels = torch.cat([inner, self.process.time_of(-1 if clean else 0).reshape(1)])
        return Walk(levels, labels, self._start(like, levels))

    def _start(self, like: Any, levels: Tensor) -> float:
        start = float(like.init_noise_sigma)
        # Above one: diffusers walks in x / alpha; we always walk in x itself.
        return start * float(self.process.alpha(levels[0])) if start > 1 else start

    def _by_hand(self, timesteps: Any = None, sigmas: Any = None, mu: float | None = None) -> Walk:
        assert isinstance(self.process, Tabulated)
        if timesteps is not None and sigmas is not None:
            raise ValueError("both timesteps and sigmas were given: expected one of them")
        if timesteps is not None:
            labels = torch.as_tensor(timesteps)
            inner = self.process.time_of(labels.double())
            levels = torch.cat([inner, inner.new_zeros(1)])
        else:
            levels = self.time_of_sigma(torch.as_tensor(sigmas))
            if levels[-1] > 0:
                levels = torch.cat([levels, levels.new_zeros(1)])
            labels = self.label(levels[:-1]).float()
        if not (levels.diff() < 0).all() or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(
                f"timesteps={timesteps}, sigmas={sigmas}: expected values inside the table that "
                "fall from noise to data"
            )
        return Walk(levels, labels, 1.0)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """Return the level of diffusers' sigma: sigma / alpha, or sigma itself for flow."""
        sigma = sigma.double().cpu()
        if isinstance(self.process, Flow):
            k = self.process.shift_factor
            return sigma / (k - (k - 1) * sigma)
        return self.process.time_at(-2 * sigma.log())

    def label(self, t: Time) -> Tensor:
        """Return what the network is told at level `t`, in float64, shaped as `t`."""
        if not isinstance(self.process, Tabulated):
            return self.process.sigma(t) * self.count
        if self.continuous:
            return -self.process.logsnr(t) / 8  # log(sigma / alpha) / 4
        if not self.by_sigma:
            return self.process.index_at(t)
        knots = -self.process.logsnr(self.process.time_of(torch.arange(len(self.process)))) / 2
        at = (-self.process.logsnr(t) / 2).double().contiguous()
        knots = knots.to(at.device)
        high = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
        part = (at - knots[high - 1]) / (knots[high] - knots[high - 1])
        index = high - 1 + part.clamp(0, 1)
        if self.name in _FLOAT_LABELS or self.name in _SPACED_BY:
            return index
        # The others tell the network whole numbers (diffusers cuts off some where we round).
        return index.round()


@dataclass(frozen=True)
class AsScheduler(Grid):
    """The levels at which a diffusers scheduler stops, whatever its config asks for."""

    schedule: Schedule

    def levels(self, process: Process, steps: int) -> Tensor:
        """Return them; `process` must be the schedule's."""
        if process != self.schedule.process:
            raise ValueError(
                f"the grid of {self.schedule} on another process: use the process read from the "
                "same scheduler"
            )
        return self.schedule.walk(steps).levels


def grid_of(scheduler: Any, mu: float | None = None, *, even: bool = False) -> Grid:
    """Return the grid on which `scheduler` walks: spacing, offset, last level, sigma spacing.

    One thing differs: where the number of steps does not divide the table, or with "linspace",
    DDIM in diffusers steps to another level than the one it evaluates next; this grid does not.

    Args:
        scheduler: a diffusers scheduler.
        mu: the shift of a flow schedule with dynamic shifting.
        even: as the FLUX pipeline, which hands its scheduler the sigmas 1, ..., 1 / steps.
    """
    return AsScheduler(Schedule(scheduler, mu, even=even))
