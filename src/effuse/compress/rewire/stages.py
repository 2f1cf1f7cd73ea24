"""Stages of a denoiser and the surgery of assembly: keep some layers of each, drop the rest.

A stage is a block of a UNet (`down_blocks.0`, `mid_block`, `up_blocks.1`), whose layers are pairs
of residual block and attention, or the row of blocks of a transformer. The attention of a layer of
a UNet is a row of transformer blocks itself, as deep in all layers of a stage. What comes out is a
plain diffusers network whose config says how many layers each stage has and how deep they are: it
saves and loads anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from effuse.compress.units import Nothing, Pass
from effuse.core.errors import Unsuited

Kept = Mapping[str, tuple[int, ...]]
"""Indices of the layers that stay, by stage; a stage that is not named stays whole."""

ROWS = ("transformer_blocks", "single_transformer_blocks")
_COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def stage_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of layers of each stage, in the order in which they run."""
    sizes = {row: len(getattr(model, row)) for row in ROWS if hasattr(model, row)}
    if sizes:
        return sizes
    if not hasattr(model, "down_blocks") or not hasattr(model, "up_blocks"):
        raise Unsuited(
            f"{type(model).__name__} has neither down_blocks nor transformer_blocks: expected a "
            "diffusers UNet or transformer"
        )
    for side in ("down_blocks", "mid_block", "up_blocks"):
        if side == "mid_block":
            if getattr(model, side, None) is not None:
                sizes[side] = 1
            continue
        for i, block in enumerate(getattr(model, side)):
            sizes[f"{side}.{i}"] = len(block.resnets)
    return sizes


def stage_depths(model: nn.Module) -> dict[str, int]:
    """Return how many transformer blocks each layer of a UNet's stage has, where it has any."""
    depths: dict[str, int] = {}
    for name in stage_sizes(model):
        for attention in getattr(model.get_submodule(name), "attentions", None) or ():
            row = getattr(attention, ROWS[0], None)
            if row is not None:
                depths[name] = len(row)
    return depths


def even_plan(model: nn.Module, keep: float, middle: bool = True) -> dict[str, tuple[int, ...]]:
    """Keep the share `keep` of each stage, evenly spread and the first always among them.

    A decoder stage keeps as many as its encoder stage and its last layer, which takes the skip from
    the stage above: half of two and three layers is BK-SDM's choice, (0,) and (0, 2). A last block
    that is made for its place (SD3's drops the text) stays as well.
    """
    sizes = stage_sizes(model)
    plan: dict[str, tuple[int, ...]] = {}
    depth = sum(name.startswith("down_blocks") for name in sizes)
    for name, size in sizes.items():
        if name == "mid_block":
            plan[name] = (0,) if middle else ()
        elif name.startswith("up_blocks"):
            mirror = depth - 1 - int(name.rpartition(".")[2])
            plan[name] = (*_spread(size - 1, len(plan[f"down_blocks.{mirror}"])), size - 1)
        else:
            plan[name] = _spread(size, max(1, math.ceil(keep * size - 1e-9)))
            if name in ROWS and _ends_there(getattr(model, name)):
                plan[name] = (*plan[name][:-1], size - 1)
    return plan


def _ends_there(row: Any) -> bool:
    return bool(getattr(row[-1], "context_pre_only", False))


def _spread(size: int, count: int) -> tuple[int, ...]:
    return tuple(i * size // count for i in range(count))


def groups(model: nn.Module, kept: Kept) -> list[dict[str, tuple[int, ...]]]:
    """Split a plan into parts that can be cut one after another: mirrored stages, the middle.

    A transformer gives one part for each row of dropped blocks, the last row first, so that the
    indices of the parts to come stay valid.
    """
    sizes = stage_sizes(model)
    out: list[dict[str, tuple[int, ...]]] = []
    rows = [name for name in sizes if name in ROWS and name in kept]
    for name in rows:
        size, stays = sizes[name], set(kept[name])
        dropped = [i for i in range(size) if i not in stays]
        while dropped:
            run = [dropped.pop()]
            while dropped and dropped[-1] == run[-1] - 1:
                run.append(dropped.pop())
            now = tuple(i for i in range(size) if i not in run)
            size = len(now)
            out.append({name: now})
    if rows:
        return out
    depth = sum(name.startswith("down_blocks") for name in sizes)
    for i in range(depth):
        pair = (f"down_blocks.{i}", f"up_blocks.{depth - 1 - i}")
        part = {n: kept[n] for n in pair if n in kept and len(kept[n]) < sizes[n]}
        if part:
            out.append(part)
    if "mid_block" in kept and not kept["mid_block"] and "mid_block" in sizes:
        out.append({"mid_block": ()})
    return out


def taps(sizes: Mapping[str, int], kept: Kept) -> list[tuple[str, str]]:
    """Pair modules of the teacher and of the student whose outputs mean the same.

    Stages of a UNet have the same names in both. A kept transformer block stands for itself and
    the dropped ones behind it.

    Args:
        sizes: layers of each stage of the teacher, from `stage_sizes`.
        kept: what the student keeps.
    """
    out: list[tuple[str, str]] = []
    for name, size in sizes.items():
        if name not in ROWS:
            out += [(name, name)] if kept.get(name, (0,)) else []
            continue
        layers = tuple(kept.get(name, range(size)))
        ends = [*layers[1:], size]
        out += [(f"{name}.{end - 1}", f"{name}.{i}") for i, end in enumerate(ends)]
    return out


def check_plan(model: Any, kept: Kept) -> None:
    """Raise `ValueError` unless the layers kept in `kept` fit together."""
    sizes = stage_sizes(model)
    for name, layers in kept.items():
        if name not in sizes:
            raise ValueError(f"no stage {name!r}: expected one of {', '.join(sizes)}")
        if list(layers) != sorted(set(layers)) or not all(0 <= i < sizes[name] for i in layers):
            raise ValueError(
                f"{name}: layers {layers} of {sizes[name]}: expected rising indices within it"
            )
        if not layers and name != "mid_block":
            raise ValueError(f"{name}: expected at least one layer to stay")
    if any(row in sizes for row in ROWS):
        first = getattr(model, ROWS[0])[0]
        own = getattr(getattr(first, "norm1", None), "emb", None) is not None
        if own and 0 not in kept.get(ROWS[0], (0,)):
            raise ValueError(
                f"{ROWS[0]}: expected block 0 to stay, the output layer takes its embedding"
            )
        for name in ROWS:
            if name in kept and _ends_there(getattr(model, name)):
                last = sizes[name] - 1
                if last not in kept[name]:
                    raise ValueError(
                        f"{name}: expected block {last} to stay, the only one that gives no text"
                    )
        return
    _check_skips(model, {n: tuple(kept.get(n, range(size))) for n, size in sizes.items()})


def _check_skips(model: Any, kept: Kept) -> None:
    """Follow the channels through the encoder's kept layers and the decoder's."""
    flow = model.conv_in.out_channels
    skips = [flow]
    for i, block in enumerate(model.down_blocks):
        name = f"down_blocks.{i}"
        for j in kept[name]:
            _fits(name, j, block.resnets[j].in_channels, flow)
            flow = block.resnets[j].out_channels
            skips.append(flow)
        for sampler in block.downsamplers or ():
            flow = sampler.out_channels
            skips.append(flow)
    depth = len(model.down_blocks)
    for i, block in enumerate(model.up_blocks):
        name, mirror = f"up_blocks.{i}", f"down_blocks.{depth - 1 - i}"
        if len(kept[name]) != len(kept[mirror]) + 1:
            raise ValueError(
                f"{name} keeps {len(kept[name])} layers and {mirror} {len(kept[mirror])}: expected "
                "one more than in its mirror image, each takes a skip"
            )
        for j in kept[name]:
            _fits(name, j, block.resnets[j].in_channels, flow + skips.pop())
            flow = block.resnets[j].out_channels


def _fits(stage: str, layer: int, takes: int, comes: int) -> None:
    if takes != comes:
        raise ValueError(
            f"{stage}: layer {layer} takes {takes} channels where {comes} come; keep the first and "
            "the last layer of a stage, whose widths differ from the others"
        )


def check_depths(model: Any, blocks: Kept) -> None:
    """Raise `ValueError` unless every layer of a stage can be cut down to these blocks."""
    depths = stage_depths(model)
    for name, which in blocks.items():
        if name not in depths:
            raise ValueError(
                f"{name!r} has no transformer blocks: expected one of {', '.join(depths) or 'none'}"
            )
        size = depths[name]
        if not which or list(which) != sorted(set(which)) or not 0 <= which[0] <= which[-1] < size:
            raise ValueError(
                f"{name}: blocks {tuple(which)} of {size}: expected rising indices within it"
            )


def _check_whole(model: Any) -> None:
    """Raise where units are gone: a short config would be built again without knowing of it."""
    text = model.config.get("cross_attention_dim", None) is not None
    for name, module in model.named_modules():
        lost = text and type(module).__name__ == "BasicTransformerBlock" and module.attn2 is None
        if lost or isinstance(module, (Nothing, Pass)):
            raise ValueError(
                f"{name}: a unit was removed there before, by a name that cutting layers changes: "
                "cut layers first, then remove units"
            )


def origin(name: str, kept: Kept, blocks: Kept) -> str:
    """Return what a module or tensor of the cut network was called before the cut.

    One to one: two names of the cut network never come from one.
    """
    parts = name.split(".")
    if parts[0] in ROWS:
        if len(parts) > 1 and parts[0] in kept:
            parts[1] = str(kept[parts[0]][int(parts[1])])
        return ".".join(parts)
    first = 1 if parts[0] == "mid_block" else 2
    stage = ".".join(parts[:first])
    if len(parts) <= first + 1:
        return name
    if stage in kept and first == 2 and parts[first] in ("resnets", "attentions"):
        parts[first + 1] = str(kept[stage][int(parts[first + 1])])
    if stage in blocks and ROWS[0] in parts[:-1]:
        at = parts.index(ROWS[0]) + 1
        parts[at] = str(blocks[stage][int(parts[at])])
    return ".".join(parts)


def cut(model: Any, kept: Kept, blocks: Kept | None = None) -> list[tuple[Any, str, Any]]:
    """Drop all other layers, in place, config included; return what `uncut` puts back.

    Args:
        model: a diffusers UNet or transformer, no units removed.
        kept: layers that stay, by stage.
        blocks: transformer blocks that stay in every layer of a UNet's stage, by stage.
    """
    check_plan(model, kept)
    check_depths(model, blocks or {})
    if any(len(k) < stage_sizes(model)[n] for n, k in kept.items()) or blocks:
        _check_whole(model)
    old: list[tuple[Any, str, Any]] = [(model, "_internal_dict", model._internal_dict)]

    def put(owner: Any, name: str, value: Any) -> None:
        old.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for name, which in (blocks or {}).items():
        for attention in model.get_submodule(name).attentions:
            row = attention.transformer_blocks
            if len(which) < len(row):
                put(attention, ROWS[0], nn.ModuleList([row[i] for i in which]))
    for name, layers in kept.items():
        if name == "mid_block":
            if not layers:
                put(model, name, None)
            continue
        owner = model if name in ROWS else model.get_submodule(name)
        for rows in (name,) if name in ROWS else ("resnets", "attentions"):
            row = getattr(owner, rows, None)
            if row is not None and len(layers) < len(row):
                put(owner, rows, nn.ModuleList([row[i] for i in layers]))
    try:
        counts = _counts(model) | _indices(model, kept)
        left = [n for n in model.config.get("_use_default_values", ()) if n not in counts]
        model.register_to_config(**counts, _use_default_values=left)
    except ValueError:
        uncut(old)
        raise
    return old


def _counts(model: Any) -> dict[str, Any]:
    """Return the config entries that say how many layers there are."""
    sizes = stage_sizes(model)
    if any(row in sizes for row in ROWS):
        return {_COUNTS[row]: sizes[row] for row in ROWS if row in sizes}
    layers = tuple(n for name, n in sizes.items() if name.startswith("down_blocks"))
    out = _depths(model)
    if len(set(layers)) == 1:
        out["layers_per_block"] = layers[0]
    elif isinstance(model.config.get("cross_attention_dim", None), (int, tuple, list)):
        out["layers_per_block"] = layers
    else:
        raise ValueError(
            f"{layers} layers a stage: the config of a {type(model).__name__} knows one number for "
            "all stages; keep as many in each"
        )
    if "mid_block" not in sizes:
        out["mid_block_type"] = None
    return out


def _depths(model: Any) -> dict[str, Any]:
    """Return the config entries that say how deep the attention of each stage is.

    One number a down block; that of the last is also the middle's; up blocks mirror them, or are
    listed in `reverse_transformer_layers_per_block`.
    """
    was = model.config.get("transformer_layers_per_block", None)
    depths = stage_depths(model)
    if was is None or not depths:
        return {}
    count = len(model.down_blocks)
    listed = [was] * count if isinstance(was, int) else list(was)
    now = [depths.get(f"down_blocks.{i}", listed[i]) for i in range(count)]
    middle = depths.get("mid_block", now[-1])
    if middle != now[-1]:
        if f"down_blocks.{count - 1}" in depths:
            raise ValueError(
                f"{middle} blocks in the middle and {now[-1]} in down_blocks.{count - 1}: the "
                "config has one number for both; keep as many in each, or drop the middle"
            )
        now[-1] = middle
    backwards = model.config.get("reverse_transformer_layers_per_block", None)
    up = list(backwards) if backwards is not None else now[::-1]
    up = [depths.get(f"up_blocks.{i}", up[i]) for i in range(count)]
    out: dict[str, Any] = {}
    if now != listed:
        out["transformer_layers_per_block"] = tuple(now)
    if up != now[::-1] or backwards is not None:
        out["reverse_transformer_layers_per_block"] = tuple(up)
    return out


def _indices(model: Any, kept: Kept) -> dict[str, Any]:
    """Return the config entries that name blocks by number, with the numbers they have now."""
    dual = model.config.get("dual_attention_layers", None)
    if not dual or ROWS[0] not in kept:
        return {}
    return {"dual_attention_layers": tuple(i for i, was in enumerate(kept[ROWS[0]]) if was in dual)}


def uncut(old: list[tuple[Any, str, Any]]) -> None:
    """Put back what `cut` took, last first."""
    for owner, name, value in reversed(old):
        setattr(owner, name, value)
