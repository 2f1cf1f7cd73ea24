"""What a pipeline costs: parameters, bytes, multiplications, calls, memory and seconds.

All but the seconds are exact and repeat to the digit; they are counted in a run of their own,
since counting slows. Seconds are taken from several pipelines in turn, in one process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from effuse.ops.stats import bootstrap
from effuse.ops.tensors import narrowest

Draw = Callable[[], Any]
"""Draws one picture; called without arguments, gives the same picture every time."""


@dataclass(frozen=True)
class Cost:
    """What one pipeline costs on one machine, for one picture at its own settings.

    parameters: of all its networks, shared ones once.
    network_parameters: of the denoising network alone.
    bytes_in_memory: of parameters and buffers as they are held.
    bytes_on_disk: of the files of its folder; where it has none, of its weights as `save` would
        write them, each tensor in the narrowest type that holds it exactly.
    folder: whether `bytes_on_disk` was read from a folder.
    network_calls: how often the denoising network runs for one picture.
    evaluations: rows that go through it for one picture; classifier-free guidance in one double
        batch makes two a call.
    macs_per_call: multiply-accumulates of the network, mean over its calls.
    macs_per_image: of the whole picture: text encoder, all calls, decoder.
    peak_bytes: most bytes of tensors held at once while a picture is drawn, above what was held
        before (so without weights); "how" in `peak_how`.
    seconds_per_image: median over rounds. `seconds_interval`: of the median, bootstrap.
    processor_seconds: the same of processor time over all threads of the process, which other
        programs on the machine hardly move. `processor_interval`: likewise.
    ratio: median over rounds of seconds over those of the first pipeline in the same round.
    threads: of the processor that torch used. rounds: how many pictures were timed.
    uncounted: operations that may multiply and have no formula here; empty is what you want.
    """

    parameters: int
    network_parameters: int
    bytes_in_memory: int
    bytes_on_disk: int
    folder: bool
    network_calls: int
    evaluations: int
    macs_per_call: float
    macs_per_image: int
    peak_bytes: int
    peak_how: str
    seconds_per_image: float
    seconds_interval: tuple[float, float]
    processor_seconds: float
    processor_interval: tuple[float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    threads: int
    rounds: int
    device: str
    uncounted: tuple[str, ...] = ()


# Multiply-accumulates of operations that torch's own table does not have, from their arguments.
MacFormula = Callable[..., int]
_FORMULAS: dict[Any, MacFormula] = {}


def macs_of(*names: str) -> Callable[[MacFormula], MacFormula]:
    """Record the decorated function as the count of operations, named as "aten._int_mm".

    The function takes the operation's arguments and returns multiply-accumulates. Operations that
    this torch does not have are passed over.
    """

    def record(formula: MacFormula) -> MacFormula:
        for name in names:
            space, _, op = name.partition(".")
            packet = getattr(getattr(torch.ops, space), op, None)
            if packet is not None:
                _FORMULAS[packet] = formula
        return formula

    return record


@macs_of("aten._int_mm", "aten._scaled_mm")
def _matrix_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * b.shape[1]


@macs_of("aten._weight_int8pack_mm", "aten._weight_int4pack_mm_for_cpu", "aten.linear")
def _weight_product(a: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * weight.shape[0]


@macs_of("aten._dyn_quant_matmul_4bit")
def _packed_product(a: Tensor, _w: Tensor, _block: int, _in: int, out: int) -> int:
    return a.numel() * out


@macs_of("aten._scaled_dot_product_flash_attention_for_cpu")
def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # (B, H, L, E) with (B, H, S, E): one product for scores, one for the sum over values
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    return rows * key.shape[2] * (query.shape[3] + value.shape[3])


@macs_of("aten.mv", "aten.dot", "aten.addmv")
def _vector_product(a: Tensor, *others: Any, **__: Any) -> int:
    return others[0].numel() if len(others) > 1 else a.numel()


_HARMLESS = ("aten", "prim", "prims", "profiler", "_c10d_functional", "inductor")
_PRODUCTS = ("mm", "matmul", "conv", "attention", "linear", "einsum", "_rnn", "lstm", "gru")
_NO_PRODUCT = ("_pack", "qparams")


class CountMacs(TorchDispatchMode):
    """Counts the multiply-accumulates of everything that runs inside `with CountMacs() as count`.

    Matrix products, convolutions and attention, exactly from shapes, by torch's own formulas
    (`torch.utils.flop_counter`, whose flops are twice these) and those recorded with `macs_of`;
    additions, norms and activations are not products and count nothing.

    macs: the sum so far. uncounted: operations outside torch's own, or products, with no formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.uncounted = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and add its products."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in _FORMULAS and packet not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in _FORMULAS:
            self.macs += int(_FORMULAS[packet](*args, **kwargs))
        elif packet in flop_registry:
            self.macs += int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
        elif _suspicious(func):
            self.uncounted.add(str(packet))
        return out


def _suspicious(func: Any) -> bool:
    space, _, name = str(func._overloadpacket).partition(".")
    if space not in _HARMLESS:
        return True
    return any(p in name for p in _PRODUCTS) and not any(p in name for p in _NO_PRODUCT)


@dataclass
class Calls:
    """What a network was asked while `watch` was on it. rows: (calls,) batch size of each."""

    rows: list[int] = field(default_factory=list)
    macs: list[int] = field(default_factory=list)


@contextlib.contextmanager
def watch(network: nn.Module, count: CountMacs | None = None) -> Iterator[Calls]:
    """Note every call of `network`, with its batch size and, given a running count, its MACs."""
    calls, begun = Calls(), [0]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim > 1]
        calls.rows.append(len(tensors[0]) if tensors else 1)
        begun[0] = count.macs if count else 0

    def after(module: nn.Module, args: Any, out: Any) -> None:
        calls.macs.append(count.macs - begun[0] if count else 0)

    hooks = (
        network.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        network.register_forward_hook(after),
    )
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class Peak:
    """The most bytes that tensors held at once above what they held before; `bytes` at the end.

    On a CUDA device what the caching allocator reports as allocated. On a CPU the running sum of
    all allocations and frees of torch's allocator, as the profiler records them: scratch memory
    of kernels that ask that allocator included, Python and libraries' own memory not.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0
        self.how = "device allocator" if device.type == "cuda" else "sum of allocator events"

    def __enter__(self) -> Peak:
        """Begin."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            # otherwise the profiler writes two lines to stderr each time; read when it first runs
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
            return
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler
        recorded = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        events = [(e.start_ns(), e.nbytes()) for e in recorded]
        held = 0
        for _, change in sorted(events, key=lambda event: event[0]):
            held += change
            self.bytes = max(self.bytes, held)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """Return the modules of a pipeline by name."""
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def denoising_network(pipe: Any) -> nn.Module:
    """Return the network that a pipeline calls at every step: its unet or transformer."""
    for name in ("unet", "transformer"):
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    raise TypeError(
        f"{type(pipe).__name__} has neither a unet nor a transformer: expected a diffusers "
        "pipeline with one of them"
    )


def held_tensors(*modules: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of modules, shared ones once."""
    found = {}
    for module in modules:
        for t in (*module.parameters(), *module.buffers()):
            found[id(t)] = t
    return list(found.values())


def bytes_of(*modules: nn.Module) -> int:
    """Return the bytes that parameters and buffers hold; packed tensors by what is inside them."""
    seen: dict[int, int] = {}
    for t in held_tensors(*modules):
        for inner in _inner(t):
            storage = inner.untyped_storage()
            seen[storage.data_ptr() or id(inner)] = storage.nbytes()
    return sum(seen.values())


def stored_bytes(*modules: nn.Module) -> int:
    """Return the bytes of state dicts with each tensor in the narrowest type that is exact."""
    seen: dict[Any, int] = {}
    for module in modules:
        for t in module.state_dict().values():
            for inner in _inner(t):
                seen[inner.data_ptr() or id(inner)] = narrowest(inner).nbytes
    return sum(seen.values())


def _inner(t: Tensor) -> list[Tensor]:
    """Return the plain tensors of which a wrapping tensor (torchao's, for one) is made."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None or type(t) in (Tensor, nn.Parameter):
        return [t]
    return [i for name in flatten()[0] for i in _inner(getattr(t, name))]


def folder_bytes(folder: str | Path) -> int:
    """Return the bytes of all files in a folder."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: expected a saved pipeline")
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_of(
    draws: Mapping[str, Draw],
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Tensor]:
    """Time several draws in turn: A B C, then B C A, ...; what slows the machine slows all.

    Args:
        draws: by name; each draws the same picture every time.
        rounds: how often each is timed.
        warmup: unmeasured draws of each before.
        device: synchronized before the clock is read.
        clock: gives seconds that pass.
        processor: gives seconds of processor time.
        progress: called with a name before each draw.

    Returns:
        Seconds of each and its processor seconds, (2, rounds) float64; column i of all was taken
        in the same round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected a positive integer")
    device = device or torch.device("cpu")
    names = list(draws)
    taken: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
    for i in range(-warmup, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if progress:
                progress(name)
            _synchronize(device)
            begun, worked = clock(), processor()
            draws[name]()
            _synchronize(device)
            if i >= 0:
                taken[name].append((clock() - begun, processor() - worked))
    return {n: torch.tensor(s, dtype=torch.float64).mT for n, s in taken.items()}


def median(seconds: Tensor, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Return the median of seconds: (N,) and its bootstrap interval."""
    return float(seconds.quantile(0.5)), bootstrap(seconds, lambda s: s.quantile(0.5), level=level)


def measure(
    pipes: Mapping[str, Any],
    draws: Mapping[str, Draw],
    *,
    folders: Mapping[str, str | Path | None] | None = None,
    rounds: int = 7,
    warmup: int = 1,
    level: float = 0.95,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Cost]:
    """Measure pipelines side by side; the first is what the others' time is compared with.

    Args:
        pipes: diffusers pipelines by name.
        draws: how each draws one picture, at its own settings, by the same names.
        folders: where each is saved, if it is.
        rounds: how many pictures of each are timed.
        warmup: unmeasured pictures of each before.
        level: of the intervals.
        progress: called with a name before each draw.

    Returns:
        A cost a pipeline.

    Raises:
        ValueError: names differ, or there are none.
        TypeError: a pipeline has no denoising network.
    """
    if not pipes or list(pipes) != list(draws):
        raise ValueError(f"pipelines {list(pipes)} and draws {list(draws)}: expected equal names")
    counted = {}
    for name, pipe in pipes.items():
        if progress:
            progress(name)
        counted[name] = _counted(pipe, draws[name])
    device = held_tensors(denoising_network(next(iter(pipes.values()))))[0].device
    seconds = rounds_of(draws, rounds, warmup=warmup, device=device, progress=progress)
    first = seconds[next(iter(pipes))]
    out = {}
    for name, pipe in pipes.items():
        modules = list(networks(pipe).values())
        folder = (folders or {}).get(name)
        middle, around = median(seconds[name][0], level)
        worked, worked_around = median(seconds[name][1], level)
        ratio, ratio_around = median(seconds[name][0] / first[0], level)
        held = bytes_of(*modules)
        out[name] = Cost(
            parameters=_parameters(modules),
            network_parameters=_parameters([denoising_network(pipe)]),
            bytes_in_memory=held,
            bytes_on_disk=folder_bytes(folder) if folder else stored_bytes(*modules),
            folder=bool(folder),
            seconds_per_image=middle,
            seconds_interval=around,
            processor_seconds=worked,
            processor_interval=worked_around,
            ratio=ratio,
            ratio_interval=ratio_around,
            threads=torch.get_num_threads(),
            rounds=rounds,
            device=device.type,
            **counted[name],
        )
    return out


def _parameters(modules: Sequence[nn.Module]) -> int:
    """Count weights: parameters, and buffers of single bytes with two dimensions or more.

    The latter are how quantized layers hold their weights.
    """
    return sum(
        t.numel()
        for t in held_tensors(*modules)
        if isinstance(t, nn.Parameter) or (t.ndim > 1 and t.dtype in (torch.int8, torch.uint8))
    )


def _counted(pipe: Any, draw: Draw) -> dict[str, Any]:
    network = denoising_network(pipe)
    peak = Peak(held_tensors(network)[0].device)
    with peak:
        draw()
    with CountMacs() as count, watch(network, count) as calls:
        draw()
    if not calls.rows:
        raise RuntimeError(f"{type(pipe).__name__} drew a picture without calling its network")
    return {
        "network_calls": len(calls.rows),
        "evaluations": sum(calls.rows),
        "macs_per_call": sum(calls.macs) / len(calls.macs),
        "macs_per_image": count.macs,
        "peak_bytes": peak.bytes,
        "peak_how": peak.how,
        "uncounted": tuple(sorted(count.uncounted)),
    }
