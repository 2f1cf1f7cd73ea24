"""8-bit weights and activations: bytes, closeness of pictures, and speed, against real baselines.

Closeness is to the pictures of the float32 network from the same noise. Times are processor time
of one thread, taken in turn within one process, so that other work on the machine weighs little.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.quantize.int8 import Int8, WeightOnly
from effuse.nn.quantized import Dequantized, Integer, quantizable, quantized
from effuse.ops.grid import Grid, PerChannel, PerTensor
from effuse.ops.stats import bootstrap, paired, psnr

from . import Claim, Evidence, Scale, proof
from ._study import small_pixels

Make = Callable[[nn.Module], nn.Module]


@dataclass
class Study:
    """A pipeline, the calls of its network while it samples, and how to sample."""

    pipe: Any
    network: nn.Module
    asked: Any
    steps: int
    seeds: int
    calls: list[Any]
    note: str
    trained: bool

    def pictures(self, network: nn.Module, steps: int) -> Tensor:
        """Return pictures (N, 3, H, W) in [0, 1] of a network, from the same noise always."""
        import effuse

        model = replace(effuse.wrap(self.pipe), network=network)
        parts = [
            model.sample(self.asked, steps=steps, rng=torch.Generator().manual_seed(seed))
            for seed in range(self.seeds)
        ]
        return torch.cat(parts).float()


@dataclass
class Variant:
    """A way to make the network smaller. bits: of a stored weight where nothing else counts it."""

    name: str
    make: Make
    bits: int | None = None
    timed: bool = True


@proof("int8")
def prove(scale: Scale) -> Evidence:
    """Quarter the bytes, stay closer than cruder roundings and fewer steps, and be faster."""
    with _one_thread(), torch.inference_mode():
        study = _random() if scale.size == "smoke" else _house(scale)
        rows = [*_variants(study, scale)]
        claims = [*_claims(study, {r["variant"]: r for r in rows})]
        layers = _layers(study, scale)
        claims.append(_rule(layers))
        rows += layers
    for row in rows:
        row.pop("_psnr", None)
    return Evidence(claims, rows, study.note)


# ---- whole networks


def _variants(study: Study, scale: Scale) -> Iterator[dict[str, Any]]:
    variants = [
        Variant("float32", lambda m: m),
        Variant("float16 storage", _cast_storage, bits=16, timed=False),
        Variant("bfloat16", _bfloat),
        Variant("int8", lambda m: _put(Int8(), m)),
        Variant("int8, weights only", lambda m: _put(Int8(WeightOnly()), m)),
        Variant("int8, ends too", lambda m: _put(Int8(least=1), m), timed=False),
        Variant("int8 per tensor, weights only", _rounded(8, False), bits=8, timed=False),
        Variant("int4 per channel, weights only", _rounded(4, True), bits=4, timed=False),
    ]
    with contextlib.suppress(ImportError):
        variants += _torchao()
    whole = [_answer(study.network, call) for call in study.calls]
    pictures = study.pictures(study.network, study.steps)
    made = {v.name: v.make(copy.deepcopy(study.network)).eval() for v in variants}
    seconds = _race(
        {v.name: made[v.name] for v in variants if v.timed}, study.calls, scale.pick(7, 15, 41)
    )
    base = seconds["float32"]
    for v in variants:
        network = made[v.name]
        off = [
            float((_answer(network, call) - y).norm() / y.norm())
            for call, y in zip(study.calls, whole, strict=True)
        ]
        near = psnr(study.pictures(network, study.steps), pictures)
        row: dict[str, Any] = {
            "part": "network",
            "variant": v.name,
            "bytes": _stored(network, v.bits),
            "output_error": sum(off) / len(off),
            "psnr": float(near.mean()),
            "psnr_interval": bootstrap(near),
            "_psnr": near,
        }
        if v.timed:
            ratio = seconds[v.name] / base
            row["seconds_a_call"] = float(seconds[v.name].median())
            row["time_ratio"] = float(ratio.median())
            row["time_ratio_interval"] = bootstrap(ratio, torch.median)
        yield row
    share = float((seconds["int8"] / base).median())
    fewer = max(1, round(study.steps * min(share, 1.0)))
    near = psnr(study.pictures(study.network, fewer), pictures)
    yield {
        "part": "network",
        "variant": "float32, fewer steps",
        "steps": fewer,
        "bytes": _stored(study.network, None),
        "psnr": float(near.mean()),
        "psnr_interval": bootstrap(near),
        "_psnr": near,
    }


def _claims(study: Study, row: dict[str, Any]) -> Iterator[Claim]:
    ours, weights = row["int8"], row["int8, weights only"]
    full, half = row["float32"], row["float16 storage"]
    yield Claim(
        "stored bytes of the network are near a quarter of float32: below 0.3",
        full["bytes"],
        ours["bytes"],
        "bytes",
        "lower",
        ours["bytes"] < 0.3 * full["bytes"],
        "above 0.3 of float32",
    )
    yield Claim(
        "and near half of float16: below 0.6",
        half["bytes"],
        ours["bytes"],
        "bytes",
        "lower",
        ours["bytes"] < 0.6 * half["bytes"],
    )
    for other in ("int8 per tensor, weights only", "int4 per channel, weights only"):
        yield Claim(
            f"answers are closer to float32 than with {other.removesuffix(', weights only')}",
            row[other]["output_error"],
            weights["output_error"],
            "relative error",
            "lower",
            weights["output_error"] < row[other]["output_error"],
        )
    if study.trained:
        yield Claim(
            "leaving the first and the last layer alone brings answers closer",
            row["int8, ends too"]["output_error"],
            ours["output_error"],
            "relative error",
            "lower",
            ours["output_error"] < row["int8, ends too"]["output_error"],
        )
    yield Claim(
        "a call takes less time than in float32",
        1.0,
        ours["time_ratio"],
        "of float32's time",
        "lower",
        ours["time_ratio_interval"][1] < 1,
        "an interval that reaches 1",
        ours["time_ratio_interval"],
    )
    if study.trained:
        fewer = row["float32, fewer steps"]
        gain, interval = paired(ours["_psnr"], fewer["_psnr"])
        yield Claim(
            "pictures are closer than those of float32 in as much time, in "
            f"{fewer['steps']} instead of {study.steps} steps",
            fewer["psnr"],
            ours["psnr"],
            "dB to float32",
            "higher",
            gain > 0 and fewer["steps"] < study.steps,
            "a gain whose interval reaches 0; or no step to save",
            interval,
        )
    if "torchao int8" in row:
        yield Claim(
            "smaller than torchao's int8, which knows no convolutions",
            row["torchao int8"]["bytes"],
            ours["bytes"],
            "bytes",
            "lower",
            ours["bytes"] < row["torchao int8"]["bytes"],
        )
        yield Claim(
            "faster than torchao's dynamic int8",
            row["torchao int8"]["time_ratio"],
            ours["time_ratio"],
            "of float32's time",
            "lower",
            ours["time_ratio"] < row["torchao int8"]["time_ratio"],
        )


def _put(transform: Int8, model: nn.Module) -> nn.Module:
    transform.attach(model).finalize()
    return model


def _bfloat(model: nn.Module) -> nn.Module:
    """Compute in bfloat16, whatever comes in."""

    def cast(a: Any) -> Any:
        return a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model.to(torch.bfloat16)


def _cast_storage(model: nn.Module) -> nn.Module:
    """Round every weight to float16 and compute in float32."""
    for p in model.parameters():
        p.data = p.data.half().float()
    return model


def _rounded(bits: int, channels: bool) -> Make:
    """Round the weights of the layers that `Int8` stores, to the nearest; no faster."""

    def make(model: nn.Module) -> nn.Module:
        grid, rule = Grid(bits, granularity=PerChannel() if channels else PerTensor()), Int8()
        for name, module in model.named_modules():
            if rule.wants(name, module):
                weight: Any = module.weight
                weight.data = grid.round_trip(weight.data)
        return model

    return make


def _torchao() -> list[Variant]:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    def make(config: Any) -> Make:
        def run(model: nn.Module) -> nn.Module:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantize_(model, config)
            return model

        return run

    return [
        Variant("torchao int8", make(Int8DynamicActivationInt8WeightConfig())),
        Variant("torchao int8, weights only", make(Int8WeightOnlyConfig())),
    ]


def _stored(network: nn.Module, bits: int | None) -> int:
    """Return bytes of the state; with `bits`, weights of two or more dimensions at that many."""
    total = 0
    for t in network.state_dict().values():
        parts = [t]
        if hasattr(t, "__tensor_flatten__"):
            parts = [getattr(t, n) for n in t.__tensor_flatten__()[0]]
        for part in parts:
            fewer = bits == 16 or (part.ndim > 1 and min(part.shape[:2]) > 31)
            total += part.numel() * bits // 8 if bits and fewer else part.nbytes
    return total


def _answer(network: nn.Module, call: Any) -> Tensor:
    args, kwargs = call
    out = network(*args, **kwargs)
    first: Tensor = out[0]
    return first.float()


def _race(networks: dict[str, nn.Module], calls: Sequence[Any], rounds: int) -> dict[str, Tensor]:
    """Return processor seconds (rounds,) of a call of each network, taken in turn."""
    out: dict[str, list[float]] = {name: [] for name in networks}
    for i in range(rounds + 2):
        call = calls[i % len(calls)]
        for name, network in networks.items():
            begun = time.thread_time()
            _answer(network, call)
            if i >= 2:
                out[name].append(time.thread_time() - begun)
    return {name: torch.tensor(s) for name, s in out.items()}


# ---- single layers


def _layers(study: Study, scale: Scale) -> list[dict[str, Any]]:
    """Time each kind of layer of the network on the inputs it really gets, three ways."""
    seen: dict[Any, tuple[str, nn.Module, Tensor]] = {}
    hooks = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            weight: Any = module.weight
            key = (tuple(weight.shape), tuple(args[0].shape))
            seen.setdefault(key, (name, module, args[0].clone()))

        return hook

    rule = Int8()
    for name, module in study.network.named_modules():
        if quantizable(module) and rule.wants(name, module):
            hooks.append(module.register_forward_pre_hook(note(name)))
    _answer(study.network, study.calls[0])
    for hook in hooks:
        hook.remove()
    rows = []
    rounds = scale.pick(5, 11, 31)
    largest = sorted(seen.values(), key=lambda s: _products(s[1], s[2]), reverse=True)
    for name, module, x in largest[: scale.pick(6, 40, 200)]:
        ways: dict[str, nn.Module] = {
            "float32": module,
            "integer": quantized(module, Integer()),
            "dequantized": quantized(module, Dequantized()),
        }
        took: dict[str, list[float]] = {w: [] for w in ways}
        for i in range(rounds + 2):
            for way, layer in ways.items():
                begun = time.thread_time()
                layer(x)
                if i >= 2:
                    took[way].append(time.thread_time() - begun)
        median = {w: float(torch.tensor(t).median()) for w, t in took.items()}
        weight: Any = module.weight
        rows.append(
            {
                "part": "layer",
                "variant": name,
                "weight": list(weight.shape),
                "input": list(x.shape),
                "chosen": rule.choice.of(module),
                "float32_us": 1e6 * median["float32"],
                "integer_ratio": median["integer"] / median["float32"],
                "dequantized_ratio": median["dequantized"] / median["float32"],
            }
        )
    return rows


def _rule(layers: Sequence[dict[str, Any]]) -> Claim:
    ways = ("integer", "dequantized")
    best = sum(r["float32_us"] * min(r[f"{w}_ratio"] for w in ways) for r in layers)
    ours = sum(r["float32_us"] * r[f"{r['chosen']}_ratio"] for r in layers)
    return Claim(
        "a way chosen by shape costs hardly more than the faster one by measurement: at most 1.1",
        best / 1000,
        ours / 1000,
        "ms over one layer of each kind",
        "lower",
        ours <= 1.1 * best,
    )


def _products(module: nn.Module, x: Tensor) -> int:
    """Return multiply-accumulates of a layer on x, up to its stride."""
    weight: Any = module.weight
    return int(weight.numel() * x.numel() // x.shape[1 if weight.ndim == 4 else -1])


# ---- what it is shown on


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _recorded(study: Study, limit: int) -> Study:
    """Fill in the calls that the network gets while the pipeline samples."""
    calls: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, {**kwargs, "return_dict": False}))

    hook = study.network.register_forward_pre_hook(note, with_kwargs=True)
    study.pictures(study.network, study.steps)
    hook.remove()
    study.calls = calls[:: max(1, len(calls) // limit)][:limit]
    return study


def _house(scale: Scale) -> Study:
    from effuse import house

    pipe: Any = house.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    asked = [p.text for p in house.prompts()[: scale.pick(2, 4, 12)]]
    study = Study(
        pipe,
        pipe.unet,
        asked,
        steps=scale.pick(4, 12, 20),
        seeds=scale.pick(1, 1, 3),
        calls=[],
        note=f"house:emoji, {len(asked)} prompts, guided; processor time of one thread",
        trained=True,
    )
    return _recorded(study, 4)


def _random() -> Study:
    pipe = small_pixels(block_out_channels=(64, 128), attention_head_dim=32, norm_num_groups=16)
    note = "a pixel network with random weights, which says nothing of pictures"
    return _recorded(Study(pipe, pipe.unet, 2, 4, 1, [], note, trained=False), 2)
