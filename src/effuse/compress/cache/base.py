"""The caching engine: clock, store and gates. It decides nothing; a `Rule` does.

    call of a model -> clock (its timestep) -> stream (its conditions) -> gates (compute | inherit)

**Clock.** Read from the model's own `timestep` argument: a lower one is the next step, an equal
one the same step (both halves of guidance, both calls of Heun, the windows of a canvas), a higher
one a new run. A run that was broken off between two calls, followed by one that starts lower with
the same conditions, cannot be told apart: call `reset()`.

**Stream.** What is stored belongs to calls of one thread with the same conditions (text, labels,
masks: by content, not by object) and the same turn among those of a step: the second window
inherits from the second window, an unconditional half from unconditional halves. A stream that is
new, or was absent for a step, computes before it inherits, and one whose batch, resolution or dtype
changes within a run is an error. From the `TURNS`-th call of a step on nothing is stored.

**Gate.** Stands in for `forward` of one module as an attribute of that instance: keys of the state
dict, types and children stay as they are. When it computes, it calls the original forward, so a
key step is bit-exact. Stored values are detached copies.

**Stacked caches.** Each has its own clock and rule. A part that an outer cache inherited around at
one of its own key steps computes at the next occasion, and so does one of the outer cache that at
its key step met what a cache below inherited in the same module. A cache on pieces of a row that
one below inherits as a whole is refused; the other way round they stack. The costs of one count
the other as it computes in full.

Python decides at each call, so `torch.compile` of the whole model breaks its graph at every gate.
In training mode everything computes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from effuse.core.contracts import Applied, Call, Transform

from .accounts import Accounts, Cost, Shape
from .clock import Clock, forget_ended, level_of
from .gates import Gate, Watch, copied, paired, tensor_bytes
from .keys import Rule

CONTROLS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)
"""Arguments that change from step to step and are no condition: residuals of side networks."""

TURNS = 64
"""Calls of one step under the same conditions that are told apart; it bounds the memory."""

Key = tuple[Any, ...]


@dataclass
class Stream:
    """What the calls of one stream remember.

    kept: by part, the last values with the levels at which they were computed, newest first.
    shapes: by gate, what a silent one must look like. asked: by part, the last step at which its
    gate was reached. watched: a feature at the last key step, and whose.
    """

    shape: Shape
    step: int
    kept: dict[str, list[tuple[float, Any]]] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    watched: tuple[str, Tensor] | None = None
    bytes: int = 0


@dataclass
class Run:
    """The streams of a thread since its run began, and whose turn it is in this step."""

    step: int = 0
    streams: dict[Key, Stream] = field(default_factory=dict)
    turns: Counter[Key] = field(default_factory=Counter)

    def stream(self, step: int, conditions: Key, shape: Shape, repeats: bool) -> Stream:
        """Return the stream of the next call at `step`; `repeats`: it is the last call again."""
        if step != self.step:
            self.step, self.turns = step, Counter()
            self.streams = {k: s for k, s in self.streams.items() if s.step >= step - 1}
        turn = 0 if repeats else self.turns[conditions]
        self.turns[conditions] += 1
        stream = self.streams.get((turn, conditions))
        if stream is None:
            stream = Stream(shape, step)
            if turn < TURNS:
                self.streams[turn, conditions] = stream
        elif stream.shape != shape:
            raise ValueError(
                f"the sample went from {_spell(stream.shape)} to {_spell(shape)} within a run "
                f"(step {step}): the stored features do not fit; call reset() before a new picture"
            )
        stream.step = step
        return stream


class Now:
    """One call of the model while it runs: the decision of each part, made once."""

    def __init__(self, cache: Cached, step: int, level: float, stream: Stream, controlled: bool):
        self.cache, self.step, self.level, self.stream = cache, step, level, stream
        self.controlled = controlled
        self.fresh: dict[str, bool] = {}
        self.held: dict[str, Any] = {}  # what one gate leaves for another within the call
        self._seen: tuple[str, Tensor] | None = None
        self._then = stream.watched
        self._change: float | None = None

    def computes(self, part: str, x: Tensor | None) -> bool:
        """Say whether `part` computes in this call; x: the input of its first gate."""
        if part not in self.fresh:
            self.watch(part, x)
            fresh = self._decide(part)
            if fresh and self._seen is not None:
                self.stream.watched = self._seen
            self.fresh[part] = fresh
        return self.fresh[part]

    def weight(self, part: str) -> Tensor | None:
        """Return the weight of what `part` computes in a blend; None where nothing is blended."""
        mixture = self.cache.mixture
        if (
            mixture is None
            or part not in self.stream.kept
            or self.cache.accounts.forced is not None
        ):
            return None
        return mixture.weight(self.step, part)

    def blend(self, part: str, value: Any, weight: Tensor) -> Any:
        """Return weight * value + (1 - weight) * kept, in float32 or better; keep it if it is due.

        Its gradient reaches the weight and `value`, never what was kept.
        """

        def mix(new: Tensor, old: Tensor) -> Tensor:
            wide = torch.promote_types(new.dtype, torch.float32)
            w = weight.to(new.device, wide)
            return (w * new.to(wide) + (1 - w) * old.to(wide)).to(new.dtype)

        out = paired(value, self.kept(part), mix)
        mixture = self.cache.mixture
        if mixture is not None and float(weight.detach()) > mixture.tau:
            self.keep(part, copied(out))
        return out

    def _decide(self, part: str) -> bool:
        rule, forced = self.cache.rule, self.cache.accounts.forced
        missed = range(self.stream.asked.get(part, self.step) + 1, self.step)
        self.stream.asked[part] = self.step
        if part not in self.stream.kept:
            return True
        if forced is not None:
            return forced
        if any(rule.fresh(step, part, lambda: 0.0) for step in missed):
            return True
        return rule.fresh(self.step, part, self._moved)

    def watch(self, part: str, x: Tensor | None) -> None:
        """Take x for the feature whose change the rule may ask for; the first in a call counts."""
        if self.cache.rule.watches and self._seen is None and x is not None:
            self._seen = part, x.detach().clone()

    def keep(self, part: str, value: Any) -> None:
        """Store what later steps inherit, and with `order` 1 the value before it."""
        if self.cache.heard is not None:
            self.cache.heard(self.step, self.level, part, value)
        before = self.stream.kept.get(part, [])
        self.stream.kept[part] = [(self.level, value), *before][: self.cache.order + 1]

    def forget(self, part: str) -> None:
        """Let `part` compute at the next occasion."""
        self.stream.kept.pop(part, None)

    def kept(self, part: str) -> Any:
        """Return what was stored, carried on to this level if the cache is of order 1.

        b(t) = b_1 + (t - t_1) / (t_1 - t_0) (b_1 - b_0), 0 and 1 the last two key steps.
        """
        (t_1, value), *before = self.stream.kept[part]
        if not before:
            return value
        t_0, then = before[0]
        gain = (self.level - t_1) / (t_1 - t_0)
        return paired(value, then, lambda new, old: new + gain * (new - old))

    def _moved(self) -> float:
        """Return max over rows ||x - x_key|| / ||x_key|| of the watched feature."""
        if self._change is None:
            if self._seen is None or self._then is None or self._seen[0] != self._then[0]:
                return math.inf
            x, then = (a.flatten(1).float() for _, a in (self._seen, self._then))
            off = (x - then).norm(dim=1) / then.norm(dim=1).clamp_min(1e-12)
            self._change = float(off.max())
        return self._change


class Mixture(ABC):
    """Blends what is computed with what is kept, instead of deciding: for learning a route.

    tau: what is blended replaces what is kept where its weight exceeds this.
    """

    tau: float = 0.1

    @abstractmethod
    def weight(self, step: int, part: str) -> Tensor | None:
        """Return the weight r, (), of what is computed; None computes and keeps."""


class Cached(Applied):
    """Gates on a model, with their clock and store. Also a context: `with ...attach(unet):`.

    Args:
        transform: what made it.
        model: takes `timestep`, and the sample as its first argument.
        rule: when to compute.
        gates: in the order in which they were found.
        drops: parts that lose residuals of side networks (ControlNet) while they inherit.
        order: 0 inherits the last value, 1 the line through the last two.
    """

    def __init__(
        self,
        transform: Transform,
        model: nn.Module,
        rule: Rule,
        gates: Sequence[Gate],
        drops: Iterable[str] = (),
        order: int = 0,
    ):
        self.transform, self.model, self.rule = transform, model, rule
        self.gates, self.drops, self.order = list(gates), frozenset(drops), order
        self.parts = tuple(dict.fromkeys(g.part for g in gates))
        kind: Any = type(model)
        names = list(_signature(kind).parameters)[1:]
        if "timestep" not in names:
            raise TypeError(
                f"{type(model).__name__}.forward has no argument `timestep`: the clock of a cache "
                "is read from it; expected a diffusers UNet or transformer, or one network of "
                "a Switched"
            )
        self._sample = names[0]
        _refuse_pieces(self.gates)
        self.finalized = False
        self.mixture: Mixture | None = None
        self.heard: Callable[[int, float, str, Any], None] | None = None
        self._paused: set[int] = set()
        self.accounts = Accounts(self.parts)
        self._digests: dict[int, tuple[Any, int, str]] = {}
        self._clock = Clock()
        self._runs: dict[int, Run] = {}
        self._now: dict[int, Now] = {}
        self._warned = False
        for gate in self.gates:
            gate.put(self)
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    # ---- the clock

    def now(self) -> Now | None:
        """Return the call of the model that this thread is in, `None` outside or in training."""
        return self._now.get(threading.get_ident())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Compute everything in this thread while inside; clock and store do not notice."""
        me = threading.get_ident()
        self._paused.add(me)
        try:
            yield
        finally:
            self._paused.discard(me)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        me = threading.get_ident()
        self._now.pop(me, None)
        if model.training or not self.gates or me in self._paused:
            return
        given = self._arguments(args, kwargs)
        level = level_of(given.get("timestep"))
        measuring = self.accounts.forced is not None
        step, begins = self._clock.step(level)
        run = None if begins else self._runs.get(me)
        if run is None:
            forget_ended(self._runs)
            run = self._runs[me] = Run(step)
            self.accounts.runs += not measuring
        self.rule.check(step, level)
        shape = _shape(given[self._sample])
        stream = run.stream(step, self._conditions(given), shape, repeats=measuring)
        controlled = any(given.get(name) is not None for name in CONTROLS)
        self._now[me] = Now(self, step, level, stream, controlled)

    def _leave(self, model: nn.Module, args: Any, out: Any) -> None:
        me = threading.get_ident()
        now = self._now.pop(me, None)
        if now is None:
            return
        if out is None:  # it raised: what was stored belongs to no whole call
            self._clock.reset(me)
            self._runs.pop(me, None)
            return
        inherited = [p for p, fresh in now.fresh.items() if not fresh]
        if now.controlled and not self._warned and self.drops.intersection(inherited):
            self._warned = True
            warnings.warn(
                f"residuals of a side network (ControlNet, adapter) meet inherited parts "
                f"({', '.join(inherited[:3])}): they act there at key steps only; keep more layers "
                "fresh or inherit at layer or unit level",
                stacklevel=2,
            )
        if self.accounts.forced is None:
            stream = now.stream
            stream.bytes = tensor_bytes([*stream.kept.values(), stream.watched])
            computed = len(now.fresh) - len(inherited)
            self.accounts.note(stream.shape, inherited, computed, self.bytes())

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        kind: Any = type(self.model)
        bound = _signature(kind).bind_partial(self.model, *args, **kwargs).arguments
        if not isinstance(bound.get(self._sample), Tensor):
            raise TypeError(f"{self._sample} is missing: expected the noisy sample, (B, C, H, W)")
        return bound

    def _conditions(self, given: Mapping[str, Any]) -> Key:
        """Return what tells streams apart: the content of all tensors but sample and residuals."""
        return tuple(
            (name, _nested(value, self._digest))
            for name, value in given.items()
            if name not in ("self", self._sample, "timestep", "return_dict", *CONTROLS)
            and value is not None
        )

    def _digest(self, a: Tensor) -> str:
        version = -1 if a.is_inference() else a._version
        known = self._digests.get(id(a))
        if known and known[0]() is a and known[1] == version >= 0:
            return known[2]
        raw = a.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = f"{tuple(a.shape)} {hashlib.blake2b(raw.data, digest_size=16).hexdigest()}"
        if len(self._digests) > 64:
            self._digests = {k: v for k, v in [*self._digests.items()] if v[0]() is not None}
        self._digests[id(a)] = (weakref.ref(a), version, digest)
        return digest

    # ---- the accounts

    @property
    def costs(self) -> dict[Shape, Cost]:
        """The multiply-accumulates of a call, by sample shape, as far as observed."""
        return self.accounts.costs

    def observe(self, calls: Iterable[Call]) -> None:
        """Count multiply-accumulates on the first call of each sample shape; ends all runs."""
        was = self.model.training
        self.model.eval()
        try:
            for args, kwargs in calls:
                shape = _shape(self._arguments(args, kwargs)[self._sample])
                if shape not in self.costs:
                    self.reset()
                    self.accounts.measure(shape, functools.partial(self.model, *args, **kwargs))
        finally:
            self.model.train(was)
            self.reset()

    def bytes(self) -> int:
        """Return the bytes that are stored now, over all threads and streams."""
        return sum(s.bytes for run in list(self._runs.values()) for s in list(run.streams.values()))

    def report(self) -> dict[str, Any]:
        """Return counts since `attach`: calls, part executions, bytes, multiply-accumulates.

        `macs` and `macs_full` need `observe`; they are missing until every sample shape that was
        run has been observed.
        """
        return {"rule": str(self.rule), "cache_bytes": self.bytes(), **self.accounts.report()}

    # ---- on and off

    def reset(self) -> None:
        """Forget all stored features: the next call begins a new run. Counts stay."""
        self._runs.clear()
        self._now.clear()
        self._clock.reset()

    def detach(self) -> None:
        """Take gates and hooks off."""
        if self.finalized:
            raise RuntimeError("the cache was finalized: it stays on; load the original instead")
        covered = [g.part for g in self.gates if not g.mine()]
        if covered:
            raise RuntimeError(
                f"another transform lies on {covered[0]!r}: detach that one first, then this"
            )
        for gate in self.gates:
            gate.take_off()
        for hook in self._hooks:
            hook.remove()
        self.gates, self._hooks = [], []
        self.reset()

    def finalize(self) -> None:
        """Keep it on for good. The weights were never touched; a plan brings the cache back."""
        self.reset()
        self.finalized = True


# ---- small pieces


def _refuse_pieces(gates: Sequence[Gate]) -> None:
    """Raise `ValueError` where gates would lie on some modules of a row that inherits together."""
    mine = {id(g.module): g.part for g in gates if not isinstance(g, Watch)}
    for gate in gates:
        below = getattr(vars(gate.module).get("forward"), "__self__", None)
        if isinstance(gate, Watch) or not isinstance(below, Gate) or isinstance(below, Watch):
            continue
        row = [g for g in below.cache.gates if g.part == below.part] if below.cache else []
        row = [g for g in row if not isinstance(g, Watch)]
        if len(row) > 1 and any(mine.get(id(g.module)) != gate.part for g in row):
            raise ValueError(
                f"{gate.part!r} is a piece of {below.part!r}, which a cache that is on already "
                "inherits as one: put that cache on last, or take a level of smaller parts for it"
            )


@functools.lru_cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _nested(value: Any, digest: Callable[[Tensor], str]) -> Any:
    if isinstance(value, Tensor):
        return digest(value)
    if isinstance(value, Mapping):
        return tuple((k, _nested(v, digest)) for k, v in value.items() if v is not None)
    if isinstance(value, (tuple, list)):
        return tuple(_nested(v, digest) for v in value)
    return value if isinstance(value, (int, float, str, bool)) else None


def _shape(x: Tensor) -> Shape:
    return tuple(x.shape), x.dtype, x.device


def _spell(shape: Shape) -> str:
    size, dtype, device = shape
    return f"{size} {str(dtype).removeprefix('torch.')} on {device}"
