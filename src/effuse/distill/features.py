"""Heal a student from its teacher: task, output and stage features, each term of comparable size.

    L = L_task + L_out + L_feature
    L_task = ||eps - eps_S||^2,  L_out = ||eps_T - eps_S||^2
    L_feature = sum_i w_i a_i ||f_T^i - A_i f_S^i||^2

Means over elements and the batch; w_i is the tap's weight; A_i is the identity, or a 1x1 layer that
learns where widths differ. `Plain` has a_i = 1 (BK-SDM, the default of `FeatureDistillation`):
stages with large features rule the sum. `PerBatch` has a_i = g / mean ||f_T^i||^2 without a
gradient: each term is then g where the student's features are zero and does not change when both
networks' features are rescaled. Sources: BK-SDM (2305.15798); LAPTOP-Diff (2404.11098), whose exact
normalizer is not public, this one is ours.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Call, Loss, Objective
from effuse.ops import randn_like

from .taps import ROWS, Adapter, Tapped, tap_of, width

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of the teacher's features and the student's, wide and of one shape: their difference, ()."""
Spoil = Callable[[Mapping[str, Any], torch.Generator | None], tuple[Call, Tensor]]
"""Turns a batch of clean samples into the network's arguments and what it should answer."""


def stages(model: nn.Module, groups: int = 4) -> list[str]:
    """Return the names of the modules whose outputs are a network's stage features.

    Down blocks, middle and up blocks of a UNet; of a transformer the last block of each of `groups`
    runs of blocks.

    Raises:
        TypeError: the network has neither; name the taps yourself.
    """
    if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        out = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]  # type: ignore[arg-type]
        if getattr(model, "mid_block", None) is not None:
            out.append("mid_block")
        return out + [f"up_blocks.{i}" for i in range(len(model.up_blocks))]  # type: ignore[arg-type]
    blocks = [f"{row}.{i}" for row in ROWS for i in range(len(getattr(model, row, ())))]
    if not blocks:
        raise TypeError(
            f"{type(model).__name__} has neither down_blocks nor transformer_blocks: expected a "
            "diffusers network, or give `taps` by name"
        )
    count = min(groups, len(blocks))
    return [blocks[(i + 1) * len(blocks) // count - 1] for i in range(count)]


@contextlib.contextmanager
def listening(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the named modules, by name, while inside; hooks are gone after.

    Of a module that returns several tensors the last one is taken: a picture's stream, not the
    text's; of a down block the hidden state.
    """
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if hasattr(out, "sample"):
                out = out.sample
            if not isinstance(out, Tensor):
                out = [o for o in out if isinstance(o, Tensor)][-1]
            heard[name] = out

        return hook

    hooks: list[Any] = []
    try:
        for n in names:
            hooks.append(model.get_submodule(n).register_forward_hook(listen(n)))
        yield heard
    finally:
        for h in hooks:
            h.remove()


class Normalizer(ABC):
    """Says how much each feature term counts. A frozen dataclass."""

    @abstractmethod
    def weights(self, power: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a_i, (n,), and what to remember.

        Args:
            power: (n,) mean squares of the teacher's features, without a gradient.
            before: what was remembered, `None` at first.
        """

    def balanced(self, terms: Tensor, output: Tensor) -> Tensor:
        """Return one factor for all terms, (), of their values (n,) and that of the output term."""
        return torch.ones_like(output)


@dataclass(frozen=True)
class Plain(Normalizer):
    """All terms as they are: a_i = scale."""

    scale: float = 1.0

    def weights(self, power: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Normalizer.weights`."""
        return torch.full_like(power, self.scale), None


@dataclass(frozen=True)
class PerBatch(Normalizer):
    """a_i = scale / (power_i + tiny), of this batch. A term without a signal is near zero."""

    scale: float = 1.0
    tiny: float = 1e-12

    def weights(self, power: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Normalizer.weights`."""
        return self.scale / (power + self.tiny), None


@dataclass(frozen=True)
class Matched(PerBatch):
    """As `PerBatch`, then all terms scaled so that their sum is the output term, times `scale`.

    Where the output error is far below 1, terms of size 1 would drown it.
    """

    def balanced(self, terms: Tensor, output: Tensor) -> Tensor:
        """See `Normalizer.balanced`."""
        return output * self.scale / (terms.sum() + self.tiny)


@dataclass(frozen=True)
class Running(Normalizer):
    """As `PerBatch`, of a moving average over batches; does not tie a row to its batch."""

    scale: float = 1.0
    decay: float = 0.99
    tiny: float = 1e-12

    def weights(self, power: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Normalizer.weights`."""
        now = power if before is None else self.decay * before + (1 - self.decay) * power
        return self.scale / (now + self.tiny), now


class FeatureDistillation(Objective):
    """Teach a student its teacher's answers and features; see the module.

    A batch is `{"call": (args, kwargs)}`, perhaps with the `target` of the task, which is how it
    works without data: on recorded calls, or on x0 the teacher drew itself. Or it is what `spoil`
    takes, such as `{"x0": ...}` with conditions. Without a target there is no task term. Zero, with
    zero gradient, where the student is the teacher (but for the task).

    Args:
        teacher: frozen here, once. Must be another object than the student; may be in another
            precision, calls are in the student's.
        student: learns in place.
        taps: dotted names, the same in both, pairs (teacher's, student's), or `Tap`s with weights
            (`effuse.distill.taps.pairs` makes them); `stages` if None, none if empty.
        normalizer: `Plain` (BK-SDM), `PerBatch`, `Matched` or `Running`.
        weights: of task, output and features; a part of weight 0 is not computed.
        spoil: makes a call and its target of a batch without a call.
        distance: of two features; mean squared error if None.
        example: a call on which widths are compared: taps of different width get an `Adapter`,
            begun as the least-squares map on this call. Without it widths must agree.

    Raises:
        ValueError: the teacher is the student, or shares parameters with it.
        AttributeError: a network has no module of a tap's name.
    """

    normal: Normalizer = Plain()

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Sequence[Tapped] | None = None,
        *,
        normalizer: Normalizer | None = None,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        spoil: Spoil | None = None,
        distance: Distance | None = None,
        example: Call | None = None,
    ):
        super().__init__()
        mine = {id(p) for p in student.parameters()}
        if teacher is student or any(id(p) in mine for p in teacher.parameters()):
            raise ValueError(
                "teacher and student share parameters: a tap would be compared with itself; give "
                "a copy of the original as the teacher"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.matched = [tap_of(t) for t in (stages(student) if taps is None else taps)]
        for tap in self.matched:
            teacher.get_submodule(tap.teacher), student.get_submodule(tap.student)
        self.normalizer = normalizer or self.normal
        self.weights, self.spoil, self.distance = weights, spoil, distance
        # a buffer, so that a run taken up again goes on with the same average
        self.remembered: Tensor
        self.register_buffer("remembered", torch.full((len(self.matched),), math.nan))
        self.adapters = nn.ModuleDict()
        if example is not None and self.matched:
            self._adapt(example)

    @property
    def taps(self) -> list[tuple[str, str]]:
        """Names of the modules compared, (teacher's, student's)."""
        return [(t.teacher, t.student) for t in self.matched]

    def parameters_of(self, player: str) -> list[nn.Parameter]:
        """Return the student's trainable parameters, and those of the adapters."""
        return [*super().parameters_of(player), *self.adapters.parameters()]

    @torch.no_grad()
    def _adapt(self, example: Call) -> None:
        (args, kwargs), training = example, self.student.training
        self.student.eval()
        asked = _cast(example, _dtype(self.student), _dtype(self.teacher))
        with listening(self.teacher, [a for a, _ in self.taps]) as theirs:
            self.teacher(*asked[0], **asked[1])
        with listening(self.student, [b for _, b in self.taps]) as own:
            self.student(*args, **kwargs)
        self.student.train(training)
        for i, (a, b) in enumerate(self.taps):
            _require(a, theirs.get(a), b, own.get(b))
            if width(theirs[a]) != width(own[b]):
                self.adapters[str(i)] = Adapter.fitted(own[b], theirs[a])

    def train(self, mode: bool = True) -> FeatureDistillation:
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the sum, and terms `task`, `output` and one `feature/NAME` a tap."""
        call, target = self._call(batch, rng)
        args, kwargs = call
        task, output, feature = self.weights
        heard = self.taps if feature else []
        with torch.no_grad(), listening(self.teacher, [a for a, _ in heard]) as theirs:
            asked = _cast(call, _dtype(self.student), _dtype(self.teacher))
            wanted = answer(self.teacher(*asked[0], **asked[1]))
        with listening(self.student, [b for _, b in heard]) as own:
            given = answer(self.student(*args, **kwargs))
        error = (_wide(given) - _wide(wanted)).square().mean()
        terms = {"output": output * error}
        if target is not None and task:
            answered = _wide(given[:, : target.shape[1]])
            terms["task"] = task * (answered - _wide(target)).square().mean()
        if heard:
            for tap, term in zip(self.matched, self._features(theirs, own, error), strict=True):
                terms[f"feature/{tap.student}"] = feature * term
        return Loss(torch.stack(list(terms.values())).sum(), terms)

    def _features(
        self, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], error: Tensor
    ) -> Tensor:
        """Return the feature terms, (n,)."""
        pairs = [self._pair(i, theirs, own) for i in range(len(self.matched))]
        errors = feature_errors(pairs, self.distance)
        power = torch.stack([_wide(t.detach()).square().mean() for t, _ in pairs])
        before = None if self.remembered.isnan().any() else self.remembered
        a, now = self.normalizer.weights(power, before)
        if now is not None:
            self.remembered.copy_(now)
        a = a * a.new_tensor([t.weight for t in self.matched])
        return a * self.normalizer.balanced((a * errors).detach(), error.detach()) * errors

    def _pair(
        self, index: int, theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        a, b = self.taps[index]
        _require(a, theirs.get(a), b, own.get(b))
        mine = own[b]
        if str(index) in self.adapters:
            mine = self.adapters[str(index)](mine)
        if theirs[a].shape != mine.shape:
            raise ValueError(
                f"tap {a!r} of the teacher gives {tuple(theirs[a].shape)}, {b!r} of the student "
                f"{tuple(mine.shape)}: expected the same shape; where only widths differ, give an "
                "`example` call for adapters"
            )
        return theirs[a], mine

    def _call(
        self, batch: Mapping[str, Any], rng: torch.Generator | None
    ) -> tuple[Call, Tensor | None]:
        if "call" in batch:
            return batch["call"], batch.get("target")
        if self.spoil is None:
            raise ValueError(
                f"a batch of {sorted(batch)}: expected a recorded `call`, or `spoil` to make one "
                "of clean samples"
            )
        return self.spoil(batch, rng)


class NormalizedFeatureDistillation(FeatureDistillation):
    """As `FeatureDistillation`, with every feature term of comparable size: `PerBatch` if None."""

    normal: Normalizer = PerBatch()


def _require(a: str, theirs: Tensor | None, b: str, own: Tensor | None) -> None:
    if theirs is None or own is None:
        who, name = ("teacher", a) if theirs is None else ("student", b)
        raise ValueError(f"tap {name!r} was not called by the {who}: name a layer that runs")


def squared(theirs: Tensor, own: Tensor) -> Tensor:
    """Return the mean squared difference, ()."""
    return (theirs - own).square().mean()


def feature_errors(
    pairs: Sequence[tuple[Tensor, Tensor]], distance: Distance | None = None
) -> Tensor:
    """Return the distance of each pair, (n,), in float32 or better; mean squared if None."""
    apart = distance or squared
    return torch.stack([apart(_wide(t.detach()), _wide(s)) for t, s in pairs])


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _cast(value: Any, was: torch.dtype | None, now: torch.dtype | None) -> Any:
    """Return a call, or any nest of tensors, with those of dtype `was` in `now`, but timesteps."""
    if was == now:
        return value
    if isinstance(value, Tensor):
        return value.to(now) if value.dtype == was and value.ndim > 1 else value
    if isinstance(value, Mapping):
        return {k: _cast(v, was, now) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, was, now) for v in value)
    return value


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, float64 as it is: squares of half precision overflow."""
    return x if x.dtype == torch.float64 else x.float()


def answer(out: Any) -> Tensor:
    """Return the tensor a network answers with."""
    if isinstance(out, Tensor):
        return out
    return out.sample if hasattr(out, "sample") else out[0]


@dataclass(frozen=True)
class UniformNoise:
    """Spoils batch["x0"]: (B, C, H, W) at levels uniform over the training range; for `spoil`.

    network: of the pipeline, `effuse.wrap(pipe).bare`. All else in the batch goes to it by name.
    """

    network: Any

    def __call__(
        self, batch: Mapping[str, Any], rng: torch.Generator | None
    ) -> tuple[Call, Tensor]:
        """Return the network's arguments and its target."""
        cond = dict(batch)
        x0 = cond.pop("x0")
        place = x0.device if rng is None else rng.device
        t = torch.rand(len(x0), generator=rng, device=place).to(x0.device)
        noise = randn_like(x0, rng)
        x = self.network.process.corrupt(x0, t, noise)
        return self.network.call(x, t, **cond), self.network.target(x0, noise, t)
