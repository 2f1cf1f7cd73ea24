"""The caching engine: clock, store and gates. It decides nothing; a `Rule` does.

    call of a model -> clock (its timestep) -> stream (its conditions) -> gates (compute | inherit)

**Clock.** Read from the model's own `timestep` argument: a lower one is the next step, an equal
one the same step (both halves of Heun, both halves of guidance), a higher one a new run. Nothing
counts calls. A run that was broken off between two calls, followed by one that starts lower with
the same conditions, cannot be told apart: call `reset()`.

**Stream.** Calls with the same conditions (text, labels, masks: by content, not by object) in the
same thread share a store; guidance halves called one after another therefore have one each. A
stream that first appears in the middle of a run computes once before it inherits. A stream whose
batch, resolution or dtype changes within a run is an error.

**Gate.** Stands in for `forward` of one module as an attribute of that instance: keys of the state
dict, types and children stay as they are. When it computes, it calls the original forward, so a
key step is bit-exact. Stored values are detached.

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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from effuse.core.contracts import Applied, Call, Transform

from .clock import Clock, forget_ended, level_of
from .gates import Gate, paired, tensor_bytes
from .keys import Keys, Rule

CONTROLS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "block_controlnet_hidden_states",
)
"""Arguments that change from step to step and are no condition: residuals of side networks."""

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one call: all of it, and what each part saves when it inherits."""

    full: int
    saved: Mapping[str, int]

    @property
    def inherited(self) -> int:
        """Return the cost of a call in which every part inherits."""
        return self.full - sum(self.saved.values())


@dataclass(frozen=True)
class Plan:
    """Key steps times parts: what a run of `steps` calls will execute, before it is run."""

    keys: Keys
    parts: tuple[str, ...]

    def runs(self, steps: int, parts: int) -> int:
        """Return executions: |K| n_all + (T - |K|) (n_all - n_parts), of `parts` = n_all parts."""
        key = len(self.keys.of(steps))
        return key * parts + (steps - key) * (parts - len(self.parts))

    def macs(self, steps: int, cost: Cost) -> int:
        """Return multiply-accumulates of a run of `steps` calls."""
        key = len(self.keys.of(steps))
        saved = sum(cost.saved[p] for p in self.parts)
        return key * cost.full + (steps - key) * (cost.full - saved)


@dataclass
class Stream:
    """What calls under the same conditions remember: a value a part, and the watched feature."""

    shape: tuple[Any, ...]
    store: dict[str, Any] = field(default_factory=dict)
    older: dict[str, tuple[float, Any, float]] = field(default_factory=dict)
    watched: Tensor | None = None


class Now:
    """One call of the model while it runs: the decision of each part, made once."""

    def __init__(
        self,
        cache: Cached,
        step: int,
        level: float,
        stream: Stream,
        new: bool,
        controlled: bool,
    ):
        self.cache, self.step, self.level, self.stream = cache, step, level, stream
        self.new, self.controlled = new, controlled
        self.fresh: dict[str, bool] = {}
        self.held: dict[str, Any] = {}  # what one gate leaves for another within the call
        self._change: float | None = None
        self._first: Tensor | None = None

    def computes(self, part: str, x: Tensor | None) -> bool:
        """Say whether `part` computes in this call; x: the input of the gate that asks first."""
        if part not in self.fresh:
            rule, forced = self.cache.rule, self.cache.forced
            if not self.fresh and rule.watches:
                self._first = None if x is None else x.detach().clone()
            fresh = self.new or part not in self.stream.store
            if not fresh:
                fresh = rule.fresh(self.step, part, self._moved) if forced is None else forced
            if fresh and self._first is not None:
                self.stream.watched = self._first
            self.fresh[part] = fresh
        return self.fresh[part]

    def keep(self, part: str, value: Any) -> None:
        """Store what later steps inherit; with `order` 1 the value before it stays too."""
        if self.cache.order:
            at, then, before = self.stream.older.get(part, (math.inf, None, math.inf))
            if at > self.level:  # not the second call of one step
                then, before = self.stream.store.get(part), at
            self.stream.older[part] = self.level, then, before
        self.stream.store[part] = value

    def kept(self, part: str) -> Any:
        """Return what was stored, carried on to this level if the cache is of order 1.

        b(t) = b_1 + (t - t_1) / (t_1 - t_0) (b_1 - b_0), 0 and 1 the last two key steps.
        """
        value = self.stream.store[part]
        if not self.cache.order:
            return value
        at, then, before = self.stream.older[part]
        if then is None or not math.isfinite(before):
            return value
        gain = (self.level - at) / (at - before)
        return paired(value, then, lambda new, old: new + gain * (new - old))

    def _moved(self) -> float:
        if self._change is None:
            x, then = self._first, self.stream.watched
            if x is None or then is None or x.shape != then.shape:
                self._change = math.inf
            else:
                norm = then.flatten(1).float().norm(dim=1)
                off = (x - then).flatten(1).float().norm(dim=1) / norm.clamp_min(1e-12)
                self._change = float(off.max())
        return self._change


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
                "is read from it; expected a diffusers UNet or transformer"
            )
        self._sample = names[0]
        self.forced: bool | None = None
        self.finalized = False
        self.costs: dict[tuple[Any, ...], Cost] = {}
        self._counter: Any = None
        self._spent: dict[bool, Counter[str]] = {}
        self._digests: dict[int, tuple[Any, int, str]] = {}
        self._clock = Clock()
        self._streams: dict[int, dict[Key, Stream]] = {}
        self._now: dict[int, Now] = {}
        self._warned = False
        self._clear_tally()
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

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        me = threading.get_ident()
        self._now.pop(me, None)
        if model.training or not self.gates:
            return
        given = self._arguments(args, kwargs)
        x = given[self._sample]
        level = level_of(given.get("timestep"))
        step, begins = self._clock.step(level)
        if begins:
            forget_ended(self._streams)
            self._streams[me] = {}
            self._tally["runs"] += self.forced is None
        limit = self.rule.limit
        if limit is not None and step >= limit:
            raise ValueError(
                f"step {step + 1} of a run, at timestep {level:g}: {self.rule} was made for "
                f"{limit} steps; give it the number of steps you sample with"
            )
        streams = self._streams[me]
        shape = (tuple(x.shape), x.dtype, x.device)
        key = self._conditions(given)
        stream, new = streams.get(key), False
        if stream is None:
            stream, new = Stream(shape), True
            streams[key] = stream
        elif stream.shape != shape:
            raise ValueError(
                f"the sample went from {_spell(stream.shape)} to {_spell(shape)} within a run "
                f"(step {step}, timestep {level:g}): the stored features do not fit; call "
                "reset() before a new picture"
            )
        controlled = any(given.get(name) is not None for name in CONTROLS)
        self._now[me] = Now(self, step, level, stream, new, controlled)

    def _leave(self, model: nn.Module, args: Any, out: Any) -> None:
        me = threading.get_ident()
        now = self._now.pop(me, None)
        if now is None:
            return
        if out is None:  # it raised: what was stored belongs to no whole call
            self._clock.reset(me)
            self._streams.pop(me, None)
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
        if self.forced is None:
            self._count(now, inherited)

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
            self._digests = {k: v for k, v in self._digests.items() if v[0]() is not None}
        self._digests[id(a)] = (weakref.ref(a), version, digest)
        return digest

    # ---- the accounts

    def _clear_tally(self) -> None:
        self._tally: Counter[str] = Counter()
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._inherits: Counter[tuple[tuple[Any, ...], str]] = Counter()
        self._peak = 0

    def _count(self, now: Now, inherited: Sequence[str]) -> None:
        self._calls[now.stream.shape] += 1
        self._tally["key_calls"] += not inherited
        self._tally["computed"] += len(now.fresh) - len(inherited)
        self._tally["inherited"] += len(inherited)
        for part in inherited:
            self._inherits[now.stream.shape, part] += 1
        self._peak = max(self._peak, self.bytes())

    @contextlib.contextmanager
    def counted(self, part: str, fresh: bool) -> Iterator[None]:
        """Charge multiply-accumulates spent inside to `part`, while a counter runs."""
        if self._counter is None:
            yield
            return
        start = self._counter.get_total_flops()
        yield
        self._spent[fresh][part] += (self._counter.get_total_flops() - start) // 2

    def observe(self, calls: Iterable[Call]) -> None:
        """Count multiply-accumulates on the first call of each sample shape; ends all runs."""
        was = self.model.training
        self.model.eval()
        try:
            for args, kwargs in calls:
                x = self._arguments(args, kwargs)[self._sample]
                shape = (tuple(x.shape), x.dtype, x.device)
                if shape not in self.costs:
                    self.costs[shape] = self._measure(args, kwargs)
        finally:
            self.model.train(was)
            self.reset()

    @torch.no_grad()
    def _measure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
        self.reset()
        totals = {}
        try:
            for fresh in (True, False):
                self.forced, self._spent[fresh] = fresh, Counter()
                with flop_counter() as self._counter:
                    self.model(*args, **kwargs)
                totals[fresh] = self._counter.get_total_flops() // 2
                self._counter = None
        finally:
            self.forced, self._counter = None, None
            self.reset()
        spent = self._spent
        saved = {p: spent[True][p] - spent[False][p] for p in self.parts}
        return Cost(totals[True], saved)

    def bytes(self) -> int:
        """Return the bytes that are stored now, over all threads and streams."""
        return sum(
            tensor_bytes(v)
            for streams in list(self._streams.values())
            for stream in list(streams.values())
            for v in [*stream.store.values(), *stream.older.values(), stream.watched]
        )

    def report(self) -> dict[str, Any]:
        """Return counts since `attach`: calls, part executions, bytes, multiply-accumulates.

        `macs` and `macs_full` need `observe`; they are missing until every sample shape that was
        run has been observed.
        """
        calls = sum(self._calls.values())
        out: dict[str, Any] = {
            "rule": str(self.rule),
            "parts": len(self.parts),
            "runs": self._tally["runs"],
            "calls": calls,
            "key_calls": self._tally["key_calls"],
            "parts_computed": self._tally["computed"],
            "parts_inherited": self._tally["inherited"],
            "cache_bytes": self.bytes(),
            "cache_bytes_peak": self._peak,
        }
        if self.costs:
            cost = next(iter(self.costs.values()))
            out |= {"macs_key_call": cost.full, "macs_inherited_call": cost.inherited}
        if calls and all(shape in self.costs for shape in self._calls):
            full = sum(n * self.costs[s].full for s, n in self._calls.items())
            saved = sum(n * self.costs[s].saved[p] for (s, p), n in self._inherits.items())
            out |= {"macs": full - saved, "macs_full": full}
        return out

    # ---- on and off

    def reset(self) -> None:
        """Forget all stored features: the next call begins a new run. Counts stay."""
        self._clock.reset()
        self._streams.clear()
        self._now.clear()

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


def _spell(shape: tuple[Any, ...]) -> str:
    size, dtype, device = shape
    return f"{size} {str(dtype).removeprefix('torch.')} on {device}"


def flop_counter() -> Any:
    """Return torch's FlopCounterMode, with the attention kernel of the CPU counted too."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})
