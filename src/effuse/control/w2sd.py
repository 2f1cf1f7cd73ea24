"""W2SD: before each step, go down with a strong model and back up with a weak one.

The sample moves along the gap between the two, towards where the stronger one would lead it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from effuse.bridge.families import default_of
from effuse.bridge.pipeline import Wrapped
from effuse.core.clip import Clipped
from effuse.core.contracts import Denoiser, Prediction, Process, Solver, Step, Time
from effuse.core.errors import check_fraction
from effuse.core.method import method
from effuse.ops.tensors import expand_as
from effuse.solvers.ddim import DDIM

from .base import Control, branches, same_space
from .guide import Guide, one_process
from .hint import Hint


class Pair(Denoiser):
    """A strong and a weak denoiser, and the plain one, which it is for everyone else.

    Args:
        strong: goes down in a reflection.
        weak: goes back up.
        plain: takes the ordinary step; `strong` if not given.
    """

    def __init__(self, strong: Denoiser, weak: Denoiser, plain: Denoiser | None = None):
        super().__init__()
        plain = strong if plain is None else plain
        self.process = one_process([plain, strong, weak])
        self.strong, self.weak, self.plain = strong, weak, plain

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict with the plain one; see `Denoiser.forward`."""
        return self.plain(x, t, **cond)


@dataclass(frozen=True)
class Target:
    """The weak model is told the noisier level, to which it goes: what the paper's code does."""

    def of(self, t: Time, s: Time) -> Time:
        """Return t, the noisier of the two."""
        return t


@dataclass(frozen=True)
class Source:
    """The weak model is told the cleaner level, at which the sample is: textbook DDIM inversion."""

    def of(self, t: Time, s: Time) -> Time:
        """Return s, the cleaner of the two."""
        return s


def back(process: Process, y: Tensor, s: Time, t: Time, pred: Prediction) -> Tensor:
    """Return y: (B, *) at level `s` carried up to `t` along a prediction: inverse to `advance`.

    The noise is what is kept (the DDIM map: scaled by alpha_t / alpha_s, exact inverse of the way
    down along the same noise); on straight lines, alpha + sigma = 1, it is the velocity, noise - x0
    (an Euler step of the flow). A prediction that is consistent at `s` gives the same either way.
    """
    alpha_s, sigma_s, shift_s = process.coefficients(s)
    alpha_t, sigma_t, shift_t = process.coefficients(t)
    lines = torch.cat([(alpha_s + sigma_s).reshape(-1), (alpha_t + sigma_t).reshape(-1)]) - 1
    if bool((lines.abs() < 1e-9).all()) and not shift_s.any() and not shift_t.any():
        return y + expand_as(sigma_t - sigma_s, y) * (pred.noise - pred.x0)
    ratio = alpha_t / torch.where(alpha_s == 0, 1.0, alpha_s)  # there t = s, and nothing moves
    ratio = torch.where(alpha_s == 0, 1.0, ratio)
    out = expand_as(ratio, y) * y + expand_as(sigma_t - ratio * sigma_s, y) * pred.noise
    return out + expand_as(shift_t - ratio * shift_s, y)


@method(
    "w2sd",
    seed=18,
    paper="Weak-to-Strong Diffusion with Reflection",
    year=2025,
    buys="a better sample from a strong and a weak model, without training",
    missing="a ready-made pair of good and bad experts: give any two denoisers to Pair",
)
@dataclass(frozen=True)
class Reflect(Solver):
    """Reflects before each step of a deterministic one-step solver: down strong, up weak.

    y = Phi_{t -> s}(x, strong),   x <- Phi_{s -> t}(y, weak),   then the base's step along plain.

    Phi is the DDIM map, an Euler step on flows. To first order x moves by K (n_weak - n_strong),
    K = sigma_t - alpha_t / alpha_s sigma_s > 0: along the score of the strong minus that of the
    weak. A `Pair` gives the three; any other denoiser is all of them.

    base: of no state and no randomness: `DDIM()`, `Euler()`, `Heun()`.
    label: `Target()` or `Source()`, the level that the weak model is told on its way up.
    start, end: steps from levels above `start`, or that end at `end` or below, are not reflected;
        so the last step is not, as K grows without bound. start = end turns it off. N steps
        cost 3N - 2 calls.
    """

    base: Solver = field(default_factory=DDIM)
    label: Target | Source = field(default_factory=Target)
    start: float = 1.0
    end: float = 0.0
    order = 1

    def __post_init__(self) -> None:
        """Check the base and the ends."""
        if not isinstance(self.base, Solver):
            raise TypeError(f"base={self.base!r}: expected a solver")
        if self.base.stochastic:
            raise ValueError(
                f"base={self.base!r} draws noise, which a reflection cannot take back: expected a "
                "deterministic solver, DDIM() with eta = 0"
            )
        if not isinstance(self.label, (Target, Source)):
            raise TypeError(f"label={self.label!r}: expected Target() or Source()")
        check_fraction("start", self.start, zero=True)
        check_fraction("end", self.end, zero=True)

    @property
    def evals(self) -> int:  # type: ignore[override]
        """Two more than the base."""
        return 2 + self.base.evals

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """See `Solver.step`."""
        pair = denoiser if isinstance(denoiser, Pair) else Pair(denoiser, denoiser)
        step = self.base.step(pair.plain, self.reflected(pair, x, t, s), t, s, None, rng=rng)
        if step.state is not None:
            raise ValueError(
                f"{self.base!r} remembers earlier steps, which a reflection makes wrong: expected "
                "a one-step solver, DDIM(), Euler() or Heun()"
            )
        return step

    def reflected(self, pair: Pair, x: Tensor, t: Time, s: Time) -> Tensor:
        """Return x: (B, *) at level `t` after the way to `s` < `t` and back."""
        level, lower = (torch.as_tensor(c, dtype=torch.float64) for c in (t, s))
        here = (level <= self.start) & (lower > self.end)
        if not bool(here.any()):
            return x
        process = pair.process
        y = process.advance(x, t, s, pair.strong(x, t))
        out = back(process, y, s, t, pair.weak(y, self.label.of(t, s)))
        return out if bool(here.all()) else torch.where(expand_as(here, x).bool(), out, x)


# Pairs of one pipeline, or of several.


def tuners(network: nn.Module, adapter: str) -> list[Any]:
    """Return the layers of peft that carry the LoRA `adapter`.

    Raises:
        ValueError: none do, or it is merged into the weights, where its scale is fixed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    found = [m for m in layers if adapter in getattr(m, "scaling", {})]
    if not found:
        known = sorted({n for m in layers for n in getattr(m, "scaling", {})})
        raise ValueError(f"no LoRA adapter {adapter!r}: the network has {known or 'none'}")
    if any(m.merged for m in found):
        raise ValueError(
            f"the LoRA adapter {adapter!r} is merged: unmerge it, a merged one has one scale only"
        )
    return found


class Scaled(Denoiser):
    """A denoiser while the LoRA `adapter` of its network has another scale, put back afterwards.

    Args:
        base: the denoiser; calls `network`.
        network: carries the adapter, unmerged.
        adapter: its name in peft.
        scale: 0 is the base model, 1 as trained, negative away from it.
    """

    def __init__(self, base: Denoiser, network: nn.Module, adapter: str, scale: float):
        super().__init__()
        self.base, self.process = base, base.process
        self.network, self.adapter, self.scale = network, adapter, scale
        tuners(network, adapter)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`."""
        with self._scaled():
            return self.base(x, t, **cond)

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        layers = tuners(self.network, self.adapter)
        before = [m.scaling[self.adapter] for m in layers]
        try:
            for m in layers:
                m.set_scale(self.adapter, self.scale)
            yield
        finally:
            for m, value in zip(layers, before, strict=True):
                m.scaling[self.adapter] = value


@dataclass(frozen=True)
class Branch:
    """One side of a pair; what is not given is as it is without a control.

    guidance: scale of its own. lora: scale of the control's adapter. what: other prompts or labels,
    one for all or one each. negative: a prompt of its own to keep away from. model: another
    wrapped pipeline of the same schedule and latent space. hint: a ControlNet and its picture.
    """

    guidance: float | None = None
    lora: float | None = None
    what: Any = None
    negative: str | None = None
    model: Wrapped | None = None
    hint: Hint | None = None


@method("w2sd")
@dataclass(frozen=True)
class W2SD(Control):
    """Builds the pair for `Reflect` from a pipeline; gaps of several kinds add up.

    By default the gap is that of guidance: the pipeline's own scale against 1.

    strong, weak, plain: the branches; see `Branch`.
    adapter: the LoRA that their scales are of.
    solver: the reflection, its `end` is set to that of the walk.
    """

    strong: Branch = field(default_factory=Branch)
    weak: Branch = field(default_factory=lambda: Branch(guidance=1.0))
    plain: Branch = field(default_factory=Branch)
    adapter: str = "default"
    solver: Reflect = field(default_factory=Reflect)

    def build(
        self,
        model: Wrapped,
        what: Sequence[Any],
        count: int,
        *,
        guidance: float | None,
        negative: Any,
    ) -> tuple[Denoiser, Callable[[float], Solver]]:
        """See `Control.build`."""
        others = [b.model for b in (self.strong, self.weak, self.plain) if b.model is not None]
        same_space([model, *others])
        rows = self.rows(what, count)
        own = default_of(model.pipe, "guidance_scale", 1.0) if guidance is None else guidance
        strong, weak = (
            replace(b, guidance=own if b.guidance is None else b.guidance)
            for b in (self.strong, self.weak)
        )
        if strong == weak:
            raise ValueError(
                f"the strong and the weak side are the same, guidance {own:g} and all: expected "
                "a gap between them, of guidance, prompts, LoRA scale, model or hint"
            )
        sides = [
            self._side(side, model, rows, count, guidance, negative)
            for side in (self.strong, self.weak, self.plain)
        ]
        reflect = self.solver

        def make(end: float) -> Solver:
            return replace(reflect, end=max(reflect.end, end))

        return Pair(*sides), make

    def _side(
        self,
        side: Branch,
        model: Wrapped,
        rows: list[Any],
        count: int,
        guidance: float | None,
        negative: Any,
    ) -> Denoiser:
        model = model if side.model is None else side.model
        model = model if side.hint is None else side.hint.on(model)
        if side.what is not None:
            told = [side.what] if isinstance(side.what, (str, int)) else list(side.what)
            told = self.rows(told, count)
            if len(told) not in (count, len(rows)):
                raise ValueError(
                    f"{len(told) // count} prompts of a branch for {len(rows) // count}: expected "
                    "one, or as many"
                )
            rows = told * (len(rows) // len(told))
        scale = guidance if side.guidance is None else side.guidance
        keep = negative if side.negative is None else side.negative
        parts = branches(model, rows, scale, None if scale == 1 else keep)
        out = parts.told
        if parts.empty is not None:
            out = Guide(parts.told, parts.empty, parts.scale)
        if model.schedule.clip is not None:
            out = Clipped(out, model.schedule.clip)
        if side.lora is not None:
            out = Scaled(out, model.network, self.adapter, side.lora)
        return out


def guidance_pair(strong: float, weak: float = 1.0) -> W2SD:
    """Return a control whose gap is that of two guidance scales; the ordinary step is `strong`."""
    return W2SD(Branch(guidance=strong), Branch(guidance=weak), Branch(guidance=strong))


def lora_pair(adapter: str, strong: float = 1.5, weak: float = -1.5, plain: float = 0.8) -> W2SD:
    """Return a control whose gap is that of two scales of a LoRA, with guidance alike in both."""
    return W2SD(Branch(lora=strong), Branch(lora=weak), Branch(lora=plain), adapter)


def prompt_pair(weak: Any) -> W2SD:
    """Return a control whose weak side is told other prompts or labels."""
    return W2SD(weak=Branch(what=weak))


def model_pair(weak: Wrapped) -> W2SD:
    """Return a control whose weak side is another pipeline."""
    return W2SD(weak=Branch(model=weak))


def hint_pair(hint: Hint) -> W2SD:
    """Return a control whose strong side is shown a picture by a ControlNet, the plain one too."""
    return W2SD(Branch(hint=hint), Branch(), Branch(hint=hint))
