"""Granularities of inheritance: which modules make up a part, and what of them is kept.

- `Blocks`: everything deeper than a chosen depth, as one part: its up-sampled deep feature is kept
  and the shallow skip path stays fresh (DeepCache). In a transformer, what the inner blocks add.
- `Layers`: each residual block, attention layer or transformer block is a part.
- `Units`: each self-attention, cross-attention, feed-forward or convolution branch is a part.

Layers and units keep their *branch*, out = skip(in) + branch, so that the fresh trunk still flows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from effuse.core.contracts import Where
from effuse.core.errors import Unsuited, check_choice

from .gates import (
    Branch,
    Delta,
    Gate,
    Silent,
    Watch,
    join_attention,
    join_resnet,
    join_transformer,
)

Store = Literal["branch", "output"]

DOWN = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
)
UP = tuple(n.replace("Downsample", "Upsample").replace("Down", "Up") for n in DOWN)


class Level(ABC):
    """Finds the parts of a model. A frozen dataclass."""

    @abstractmethod
    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """Return gates for the parts that `where` allows, not yet put on."""

    def drops(self, gates: Sequence[Gate]) -> list[str]:
        """Return parts that lose residuals of side networks while they inherit."""
        return [g.part for g in gates if type(g) in (Gate, Silent)]


# ---- granularities


@dataclass(frozen=True)
class Blocks(Level):
    """Everything deeper than a depth, as one part.

    In a UNet, `fresh` counts layers of the encoder behind the first convolution that still run,
    with their mirror images in the decoder: 0 leaves the two ends, the number of all layers leaves
    only the middle to inherit. The feature that enters the first fresh decoder layer is kept.

    In a transformer, `fresh` blocks at either end run and what the others add is kept.
    """

    fresh: int = 1

    def __post_init__(self) -> None:
        """Check the depth."""
        if self.fresh < 0:
            raise ValueError(f"fresh={self.fresh}: expected a number of layers, at least 0")

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        blocks = transformer_blocks(model)
        if not blocks:
            return self._unet(model, where)
        if 2 * self.fresh >= len(blocks):
            raise ValueError(
                f"fresh={self.fresh}: expected less than half of the {len(blocks)} blocks"
            )
        return Group(self.fresh, len(blocks) - self.fresh).gates(model, where)

    def drops(self, gates: Sequence[Gate]) -> list[str]:
        """See `Level.drops`."""
        return [g.part for g in gates]

    def _unet(self, model: nn.Module, where: Where) -> list[Gate]:
        down, middle, up = unet_layers(model)
        if len(down) + 1 != len(up):
            raise TypeError(
                f"{type(model).__name__}: {len(down) + 1} skips for {len(up)} decoder layers; "
                "use Layers or Units"
            )
        if self.fresh > len(down):
            raise ValueError(f"fresh={self.fresh}: expected 0 to {len(down)} for this network")
        row = [m for layer in down[self.fresh :] for m in layer] + middle
        row += [m for layer in up[: len(down) - self.fresh] for m in layer]
        if not row or not all(where(name, m) for name, m in row):
            return []
        part = f"deeper than {self.fresh}"
        *silent, (_, source) = row
        return [Silent(part, m, name) for name, m in silent] + [Gate(part, source)]


@dataclass(frozen=True)
class Group(Level):
    """The transformer blocks `start` <= i < `stop`, as one part: what they add is kept."""

    start: int = 1
    stop: int = 2

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        blocks = transformer_blocks(model)
        if not 0 <= self.start < self.stop <= len(blocks):
            raise ValueError(
                f"blocks {self.start} to {self.stop}: expected a row within the {len(blocks)} "
                f"transformer blocks of {type(model).__name__}"
            )
        row = blocks[self.start : self.stop]
        if not all(where(name, m) for name, m in row):
            return []
        part = f"blocks {self.start} to {self.stop}"
        return [
            Delta(part, m, _flow(m), first=i == 0, last=i == len(row) - 1)
            for i, (_, m) in enumerate(row)
        ]

    def drops(self, gates: Sequence[Gate]) -> list[str]:
        """See `Level.drops`."""
        return [g.part for g in gates]


@dataclass(frozen=True)
class Rest(Level):
    """Everything behind the first `fresh` blocks, as one part; the last of those is watched.

    What it adds to its input is the feature whose change `Adaptive` judges (first-block cache). In
    a transformer all other blocks inherit together what they add; a UNet keeps the mirror images
    of its fresh layers too, as in `Blocks`.
    """

    fresh: int = 1

    def __post_init__(self) -> None:
        """Check the number."""
        if self.fresh < 1:
            raise ValueError(f"fresh={self.fresh}: expected at least one block to watch")

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        blocks = transformer_blocks(model)
        if blocks and self.fresh >= len(blocks):
            raise ValueError(f"fresh={self.fresh}: expected less than the {len(blocks)} blocks")
        level: Level = Group(self.fresh, len(blocks)) if blocks else Blocks(self.fresh)
        first = blocks or [layer[-1] for layer in unet_layers(model)[0]]
        gates = level.gates(model, where)
        return [Watch(gates[0].part, first[self.fresh - 1][1]), *gates] if gates else []

    def drops(self, gates: Sequence[Gate]) -> list[str]:
        """See `Level.drops`."""
        return [g.part for g in gates]


@dataclass(frozen=True)
class Layers(Level):
    """Each residual block, attention layer or transformer block, by itself.

    deep: in a UNet, the deepest resolutions whose layers inherit, the middle always among them;
        `None` for all. A transformer has one resolution: all its blocks.
    store: "branch" keeps what the layer adds; "output" keeps what it gives, and the fresh trunk
        ends there (for comparison).
    """

    deep: int | None = 2
    store: Store = "branch"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("store", self.store, ("branch", "output"))
        _check_deep(self.deep)

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        if blocks := transformer_blocks(model):
            made: list[Gate] = [
                Gate(name, m)
                if self.store == "output"
                else Delta(name, m, _flow(m), first=True, last=True)
                for name, m in blocks
                if where(name, m)
            ]
            return made
        out = []
        for name, module in deep_modules(model, self.deep):
            gate = branch_gate(name, module)
            if gate is not None and where(name, module):
                out.append(Gate(name, module) if self.store == "output" else gate)
        return out


@dataclass(frozen=True)
class Units(Level):
    """Each sub-layer that adds to a trunk, by itself: what it adds, before any gate of adaLN.

    kinds: of "attn1" (self-attention), "attn2" (cross-attention), "ff", "conv" (the branch of a
        residual block). deep: as in `Layers`.
    """

    kinds: tuple[str, ...] = ("attn1", "attn2", "ff", "conv")
    deep: int | None = 2

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for kind in self.kinds:
            check_choice("kinds", kind, ("attn1", "attn2", "ff", "conv"))
        _check_deep(self.deep)

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        if blocks := transformer_blocks(model):
            found = [(f"{n}.{k}", m) for n, block in blocks for k, m in block.named_modules() if k]
        else:
            found = deep_modules(model, self.deep)
        out: list[Gate] = []
        for name, module in found:
            gate = branch_gate(name, module)
            if hasattr(module, "transformer_blocks"):
                continue
            kind = _KINDS.get(name.rpartition(".")[2])
            if gate is not None:
                kind = "conv" if hasattr(module, "conv2") else "attn1"
            if kind in self.kinds and where(name, module):
                out.append(gate or Gate(name, module))
        return out

    def drops(self, gates: Sequence[Gate]) -> list[str]:
        """See `Level.drops`: a branch leaves the trunk alone."""
        return []


@dataclass(frozen=True)
class Named(Level):
    """The modules of these dotted names, each with its whole output: for a network of your own."""

    names: tuple[str, ...] = ()

    def gates(self, model: nn.Module, where: Where) -> list[Gate]:
        """See `Level.gates`."""
        known = dict(model.named_modules())
        for name in self.names:
            if name not in known or not name:
                raise ValueError(f"names: no module {name!r} in {type(model).__name__}")
        return [Gate(n, known[n]) for n in self.names if where(n, known[n])]


# ---- what a model is made of

_KINDS = {
    "attn1": "attn1",
    "attn": "attn1",
    "attn2": "attn2",
    "ff": "ff",
    "ff_context": "ff",
}
_FLOWS = {
    "BasicTransformerBlock": ("hidden_states",),
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
}
Found = list[tuple[str, nn.Module]]


def _flow(block: nn.Module) -> tuple[str, ...]:
    for cls in type(block).__mro__:
        if cls.__name__ in _FLOWS:
            return _FLOWS[cls.__name__]
    raise TypeError(
        f"{type(block).__name__}: expected one of {', '.join(_FLOWS)}, whose in- and outputs are "
        "known; use Units"
    )


def transformer_blocks(model: nn.Module) -> Found:
    """Return the blocks of a transformer in the order in which they run; none for a UNet."""
    return [
        (f"{row}.{i}", block)
        for row in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(model, row, ()))
    ]


def unet_layers(model: nn.Module) -> tuple[list[Found], Found, list[Found]]:
    """Return the layers of a UNet: those that give a skip, the middle, those that take one.

    A layer is one or two modules, in the order in which they run; an up-sampler belongs to the
    layer before it.
    """
    down: list[Found] = []
    up: list[Found] = []
    for side, known, layers in (("down_blocks", DOWN, down), ("up_blocks", UP, up)):
        blocks = getattr(model, side, None)
        if blocks is None:
            raise Unsuited(
                f"{type(model).__name__} has neither {side} nor transformer_blocks: expected a "
                "diffusers UNet or transformer, or Named(...) for a network of your own"
            )
        for i, block in enumerate(blocks):
            if not any(c.__name__ in known for c in type(block).__mro__):
                raise TypeError(
                    f"{side}.{i} is a {type(block).__name__}: expected one of {', '.join(known)}; "
                    "use Layers or Units"
                )
            name = f"{side}.{i}"
            attentions = getattr(block, "attentions", None)
            for j, resnet in enumerate(block.resnets):
                layer = [(f"{name}.resnets.{j}", resnet)]
                if attentions is not None:
                    layer.append((f"{name}.attentions.{j}", attentions[j]))
                layers.append(layer)
            for j, m in enumerate(getattr(block, "downsamplers", None) or ()):
                layers.append([(f"{name}.downsamplers.{j}", m)])
            for j, m in enumerate(getattr(block, "upsamplers", None) or ()):
                layers[-1].append((f"{name}.upsamplers.{j}", m))
    middle = getattr(model, "mid_block", None)
    return down, [] if middle is None else [("mid_block", middle)], up


def deep_modules(model: nn.Module, deep: int | None) -> Found:
    """Return all modules of the `deep` deepest resolutions of a UNet and its middle, in order."""
    blocks = [len(getattr(model, side, ())) for side in ("down_blocks", "up_blocks")]
    if not any(blocks):
        raise Unsuited(
            f"{type(model).__name__} has neither down_blocks nor transformer_blocks: expected a "
            "diffusers UNet or transformer, or Named(...) for a network of your own"
        )
    first = 0 if deep is None else max(blocks[0] - deep, 0)
    last = blocks[1] if deep is None else deep
    rows = [f"down_blocks.{i}" for i in range(first, blocks[0])] + ["mid_block"]
    rows += [f"up_blocks.{i}" for i in range(min(last, blocks[1]))]
    out: Found = []
    for row in rows:
        root = model.get_submodule(row) if getattr(model, row.split(".")[0], None) else None
        if root is not None:
            out += [(f"{row}.{name}", m) for name, m in root.named_modules() if name]
    return out


def branch_gate(name: str, module: nn.Module) -> Branch | None:
    """Return the gate that keeps the branch of a residual layer of diffusers, if it is one."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if isinstance(module, ResnetBlock2D):
        return Branch(name, module, "conv2", join_resnet)
    if isinstance(module, Transformer2DModel) and module.is_input_continuous:
        return Branch(name, module, "proj_out", join_transformer)
    if isinstance(module, Attention) and module.residual_connection:
        return Branch(name, module, "to_out.1", join_attention)
    return None


def _check_deep(deep: int | None) -> None:
    if deep is not None and deep < 0:
        raise ValueError(f"deep={deep}: expected a number of resolutions, or None for all")
