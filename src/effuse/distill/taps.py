"""Which features of a teacher and a student are compared: kinds, places, matching, adapters.

A tap names a module of each network whose outputs mean the same. `pairs` makes taps of a kind for
networks of diffusers that differ in depth: a rule says which block of the teacher the student's
k-th is held against, and a map says which layer of the teacher a layer of the student came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = ("transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True)
class Tap:
    """A module of the teacher, one of the student, and how much their difference counts."""

    teacher: str
    student: str
    weight: float = 1.0


Tapped = str | tuple[str, str] | Tap
"""A name in both, a pair (teacher's, student's), or a `Tap`."""


def tap_of(tapped: Tapped) -> Tap:
    """Return any of the three forms as a `Tap`."""
    if isinstance(tapped, Tap):
        return tapped
    return Tap(tapped, tapped) if isinstance(tapped, str) else Tap(tapped[0], tapped[1])


# ---- which block stands against which


class Match(ABC):
    """Says which of the teacher's blocks a shorter row stands for. A frozen dataclass."""

    @abstractmethod
    def blocks(self, size: int, count: int) -> tuple[int, ...]:
        """Return `count` rising indices below `size`; all where they are equal."""


def _check(size: int, count: int) -> None:
    if not 0 < count <= size:
        raise ValueError(f"{count} blocks of {size}: expected 1 to {size}")


@dataclass(frozen=True)
class First(Match):
    """The first blocks, the bottom: 5 of 10 are 0 to 4."""

    def blocks(self, size: int, count: int) -> tuple[int, ...]:
        """See `Match.blocks`."""
        _check(size, count)
        return tuple(range(count))


@dataclass(frozen=True)
class Even(Match):
    """Evenly spread, the first among them: 5 of 10 are 0, 2, 4, 6, 8."""

    def blocks(self, size: int, count: int) -> tuple[int, ...]:
        """See `Match.blocks`."""
        _check(size, count)
        return tuple(i * size // count for i in range(count))


@dataclass(frozen=True)
class Top(Match):
    """The last blocks, the top: 5 of 10 are 5 to 9."""

    def blocks(self, size: int, count: int) -> tuple[int, ...]:
        """See `Match.blocks`."""
        _check(size, count)
        return tuple(range(size - count, size))


# ---- what is compared


class Kind(ABC):
    """A kind of feature: where it is in a network. A frozen dataclass."""

    @abstractmethod
    def modules(self, model: nn.Module) -> list[str]:
        """Return the dotted names of the modules that give it, in the order of the model."""


def _at(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _blocks(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Give the blocks of all rows of transformer blocks, by dotted name."""
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] and name.split(".")[-2] in ROWS:
            yield name, module


@dataclass(frozen=True)
class SelfAttention(Kind):
    """Outputs of self-attention, after its last projection and before the skip.

    In two-stream blocks the picture's part of the joint attention; single-stream blocks of FLUX
    have one projection for attention and feed-forward and are left out. The attention layers of
    UNet2DModel count.
    """

    def modules(self, model: nn.Module) -> list[str]:
        """See `Kind.modules`."""
        out = []
        for name, module in model.named_modules():
            if getattr(module, "residual_connection", False) and hasattr(module, "to_out"):
                out.append(_at(name, "to_out.0"))
        for name, block in _blocks(model):
            if getattr(block, "attn1", None) is not None:
                out.append(_at(name, "attn1"))
            elif getattr(getattr(block, "attn", None), "to_out", None) is not None:
                out.append(_at(name, "attn.to_out.0"))
        return _ordered(model, out)


@dataclass(frozen=True)
class CrossAttention(Kind):
    """Outputs of cross-attention."""

    def modules(self, model: nn.Module) -> list[str]:
        """See `Kind.modules`."""
        return [_at(n, "attn2") for n, b in _blocks(model) if getattr(b, "attn2", None) is not None]


@dataclass(frozen=True)
class FeedForward(Kind):
    """Outputs of the feed-forward layers."""

    def modules(self, model: nn.Module) -> list[str]:
        """See `Kind.modules`."""
        return [_at(n, "ff") for n, b in _blocks(model) if getattr(b, "ff", None) is not None]


@dataclass(frozen=True)
class Residual(Kind):
    """Outputs of the residual convolution blocks, skip included."""

    def modules(self, model: nn.Module) -> list[str]:
        """See `Kind.modules`."""
        return [n for n, m in model.named_modules() if type(m).__name__ == "ResnetBlock2D"]


@dataclass(frozen=True)
class Last(Kind):
    """Outputs of the stages of a UNet: what BK-SDM compares. Of a transformer, of its blocks.

    bare: only of stages without attention.
    """

    bare: bool = False

    def modules(self, model: nn.Module) -> list[str]:
        """See `Kind.modules`."""
        if not hasattr(model, "down_blocks"):
            return [] if self.bare else [n for n, _ in _blocks(model) if n.count(".") == 1]
        out = []
        for side in ("down_blocks", "mid_block", "up_blocks"):
            owner: Any = getattr(model, side, None)
            named = [(side, owner)] if side == "mid_block" else list(enumerate(owner or ()))
            for i, block in named:
                attentive = any(a is not None for a in getattr(block, "attentions", None) or ())
                if block is not None and not (self.bare and attentive):
                    out.append(side if side == "mid_block" else f"{side}.{i}")
        return out


def _ordered(model: nn.Module, names: Sequence[str]) -> list[str]:
    place = {n: i for i, (n, _) in enumerate(model.named_modules())}
    return sorted(names, key=place.__getitem__)


@dataclass(frozen=True)
class Within:
    """Stages whose name begins with one of these: `("up_blocks",)` for a UNet's decoder; all."""

    stages: tuple[str, ...] = ("",)

    def __call__(self, stage: str) -> bool:
        """Return whether the stage is among them."""
        return stage.startswith(tuple(self.stages))


def stage_of(name: str) -> str:
    """Return the stage in which a module is: `down_blocks.0`, `mid_block`, `transformer_blocks`."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("down_blocks", "up_blocks") else first


def pairs(
    teacher: nn.Module,
    student: nn.Module,
    kind: Kind,
    *,
    match: Match | None = None,
    layers: Mapping[str, Sequence[int]] | None = None,
    where: Callable[[str], bool] = Within(),
    weight: float = 1.0,
) -> list[Tap]:
    """Return the taps of a kind for a student with fewer layers and shallower rows of blocks.

    Args:
        teacher: where the names are looked for.
        student: every module of the kind gets a partner.
        kind: what is compared.
        match: which block of a row in the teacher the k-th of the student's is held against;
            `First` if None.
        layers: indices of the teacher's layers that the student kept, by stage, as in
            `effuse.compress.rewire.stages.Kept`; a stage that is not named has them all.
        where: asked with the student's stage; taps of a stage it forbids are left out.
        weight: of each tap.

    Raises:
        ValueError: there are none, or a partner is missing from the teacher.
    """
    match = match or First()
    known = {n for n, _ in teacher.named_modules()}
    out = []
    for name in kind.modules(student):
        # what was pruned away has no parameters and nothing to say
        if where(stage_of(name)) and any(True for _ in student.get_submodule(name).parameters()):
            partner = _partner(name, teacher, known, student, match, layers or {})
            if partner not in known:
                raise ValueError(
                    f"{name!r} of the student stands for {partner!r}, which the teacher does not "
                    "have: give `layers`, the layers that were kept"
                )
            out.append(Tap(partner, name, weight))
    if not out:
        raise ValueError(
            f"{type(student).__name__} has no feature of kind {type(kind).__name__} that `where` "
            "allows: nothing would be compared"
        )
    return out


def _partner(
    name: str,
    teacher: nn.Module,
    known: Collection[str],
    student: nn.Module,
    match: Match,
    layers: Mapping[str, Sequence[int]],
) -> str:
    stage, parts = stage_of(name), name.split(".")
    depth = stage.count(".") + 1
    kept = layers.get(stage)
    if stage in ROWS:
        if kept is not None:
            return ".".join([stage, str(kept[int(parts[1])]), *parts[2:]])
    elif kept is not None and len(parts) > depth + 1 and stage != "mid_block":
        parts[depth + 1] = str(kept[int(parts[depth + 1])])
    for i, part in enumerate(parts[:-1]):
        if part in ROWS:
            mine = name.split(".")[: i + 1]
            count = len(student.get_submodule(".".join(mine)))  # type: ignore[arg-type]
            theirs = ".".join(parts[: i + 1])
            if theirs not in known:
                return ".".join(parts)
            size = len(teacher.get_submodule(theirs))  # type: ignore[arg-type]
            parts[i + 1] = str(match.blocks(size, count)[int(parts[i + 1])])
    return ".".join(parts)


# ---- where widths differ


class Adapter(nn.Module):
    """Brings a student's features to the width of its teacher's: y = W x + b along channels.

    Channels are axis 1 of (B, C, H, W) and the last axis otherwise: a 1x1 convolution or a linear
    layer. It learns with the student and is no part of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    @classmethod
    @torch.no_grad()
    def fitted(cls, own: Tensor, theirs: Tensor) -> Adapter:
        """Return the least-squares map, of least norm, from one batch of features to the other."""
        x, y = _rows(own).double(), _rows(theirs).double()
        if len(x) != len(y):
            raise ValueError(
                f"features of {tuple(own.shape)} and {tuple(theirs.shape)}: an adapter changes the "
                "number of channels, all else must agree"
            )
        mx, my = x.mean(0), y.mean(0)
        w = (torch.linalg.pinv(x - mx) @ (y - my)).T
        dtype = torch.promote_types(own.dtype, torch.float32)
        return cls(w.to(dtype), (my - w @ mx).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (B, C, H, W) or (B, ..., C)."""
        x = x.to(self.weight.dtype)
        if x.ndim == 4:
            return torch.einsum("oc,bchw->bohw", self.weight, x) + self.bias[:, None, None]
        return nn.functional.linear(x, self.weight, self.bias)


def width(x: Tensor) -> int:
    """Return the number of channels of features."""
    return x.shape[1 if x.ndim == 4 else -1]


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2) if x.ndim == 4 else x.flatten(0, -2)
