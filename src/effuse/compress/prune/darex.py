"""Fine-tunes kept as a base and a sparse change: DARE, DAREx-q, importance, merging, files.

delta = Delta.between(finetuned, base)                  # state dicts, networks, or files
small = delta.prune(0.99)                               # keeps one weight in a hundred
small = rescale.find_q(small, network, base, finetuned, calls)  # by what outputs need
weights = small.apply(base)
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.errors import check_choice
from effuse.core.method import method

Weights = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
METHODS = ("random", "magnitude", "wanda")
STRUCTURES = ("element", "column", "row")


class Source:
    """Weights by name, read one at a time: of a mapping, a network, a file, or a folder of files.

    Raises:
        ValueError: no safetensors file there, or a name in two files.
    """

    def __init__(self, weights: Weights):
        self._files: dict[str, Path] = {}
        self._kept: Mapping[str, Tensor] = {}
        if isinstance(weights, nn.Module):
            self._kept = weights.state_dict()
        elif isinstance(weights, Mapping):
            self._kept = weights
        else:
            path = Path(weights)
            files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            files = [f for f in files if f.is_file() and f.suffix == ".safetensors"]
            if not files:
                raise ValueError(f"{path}: expected a .safetensors file, or a folder with some")
            from safetensors import safe_open

            for file in files:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                        if name in self._files:
                            raise ValueError(f"{name!r} is in {file} and {self._files[name]}")
                        self._files[name] = file

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return sorted(self._files or self._kept)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        if name not in self._files:
            return self._kept[name].detach()
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as tensors:
            return tensors.get_tensor(name)


def sub_gaussian(p: float) -> float:
    """Return (1 - 2p) / log((1 - p) / p) of a drop rate p in (0, 1); 1/2 at p = 1/2."""
    if not 0 < p < 1:
        raise ValueError(f"p must be in (0, 1), got {p}")
    if abs(p - 0.5) < 1e-6:
        return 0.5
    return (1 - 2 * p) / math.log((1 - p) / p)


def error_moments(c: Tensor, p: float, q: float) -> tuple[Tensor, Tensor]:
    """Return mean and variance of sum_j c_j (1 - keep_j / q), keep_j one with probability 1 - p.

    mean = (1 - (1 - p) / q) S1, variance = p (1 - p) / q^2 S2, with S1 = sum_j c_j and
    S2 = sum_j c_j^2 over the last axis of c: (..., d).
    """
    return (1 - (1 - p) / q) * c.sum(-1), p * (1 - p) / q**2 * c.square().sum(-1)


def closed_q(p: float, s1: Tensor, s2: Tensor) -> float:
    """Return the q of least expected squared error, (1 - p) + p E[S2] / E[S1^2], at most 1."""
    power = float(s1.double().square().mean())
    share = float(s2.double().mean()) / power if power > 0 else math.inf
    return min(1.0, (1 - p) + p * share)


def analytical_q(
    s1: Tensor, s2: Tensor, p: float, *, eta: float, gamma: float = 0.95, step: float = 1e-3
) -> float:
    """Return DAREx-q's q of a layer: the mean over rows of what balances bias and spread.

    For each row the least |eta (1 - (1 - p)/q) S1 + eta^2 phi(p) S2 / (4 q^2) + log(2/(1 - gamma))|
    over q in [1 - p, 0.999]; the rows past the first 80 % by their q are outliers and left out.

    Args:
        s1: (m,) sums of the contributions of a row's weights, dW_ij x_j.
        s2: (m,) sums of their squares.
        p: drop rate.
        eta: balances the two, tuned on held-out data.
        gamma: the probability that the bound is to hold with.
        step: of the grid over q.
    """
    q = torch.arange(1 - p, 0.999 + step / 2, step, dtype=torch.float64)
    bias = eta * (1 - (1 - p) / q) * s1.double()[:, None]
    spread = eta**2 * sub_gaussian(p) * s2.double()[:, None] / (4 * q**2)
    best = q[(bias + spread + math.log(2 / (1 - gamma))).abs().argmin(1)].sort().values
    return float(best[: max(1, math.ceil(0.8 * len(best)))].mean())


def _rng(seed: int, name: str) -> torch.Generator:
    # the generator takes 32 bits of a seed: both go into them
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def random_keep(shape: Sequence[int], p: float, structure: str, seed: int, name: str) -> Tensor:
    """Return which weights stay, bool of `shape`: the same for the same seed and name.

    structure: "element"; "column" keeps or drops all weights of one input (axis 1) together,
    "row" all of one output (axis 0); "head:N" whole attention heads of N channels, the same ones in
    the queries, keys, values and output of a layer. A tensor of one axis, but for biases of heads,
    is dropped by element, and with heads so is all that is no attention projection.
    """
    drawn = list(shape)
    if structure.startswith("head:"):
        part, width = _head(name), int(structure[5:])
        if part is not None:
            owner, axis = part
            if shape[axis] % width:
                raise ValueError(f"{name}: {shape[axis]} channels are not heads of {width}")
            heads = torch.rand(shape[axis] // width, generator=_rng(seed, owner)) >= p
            drawn = [n if i == axis else 1 for i, n in enumerate(shape)]
            return heads.repeat_interleave(width).reshape(drawn).expand(*shape)
    elif len(drawn) > 1 and structure != "element":
        axis = 1 if structure == "column" else 0
        drawn = [n if i == axis else 1 for i, n in enumerate(drawn)]
    return (torch.rand(drawn, generator=_rng(seed, name)) >= p).expand(*shape)


_PROJECTION = re.compile(r"(.*)\.(?:to_[qkv]|[qkv]_proj|query|key|value)\.(?:weight|bias)")
_OUTPUT = re.compile(r"(.*)\.(?:to_out\.0|out_proj|o_proj)\.weight")


def _head(name: str) -> tuple[str, int] | None:
    """Return the attention layer a weight belongs to and its axis of heads, or None."""
    for pattern, axis in ((_PROJECTION, 0), (_OUTPUT, 1)):
        if found := pattern.fullmatch(name):
            return found[1], axis
    return None


@dataclass(frozen=True)
class Part:
    """What is kept of one tensor's change: values (n,), and where.

    where: flat places (n,) int64; None where a seed tells, or where all is kept.
    """

    values: Tensor
    shape: tuple[int, ...]
    where: Tensor | None = None
    dense: bool = False


@dataclass(frozen=True)
class Pruned:
    """A pruned change: w = base + kept / q; the mask of a random one is its seed, no bytes.

    q is one number, `layer_q` those of single tensors. What `dense` names is kept whole, at q = 1.
    """

    parts: Mapping[str, Part]
    p: float
    method: str = "random"
    structure: str = "element"
    seed: int = 0
    q: float = 1.0
    layer_q: Mapping[str, float] = field(default_factory=dict)

    def rescale(self, q: float | Mapping[str, float]) -> Pruned:
        """Return it with another q, in [1 - p, 1]; a mapping sets those of single tensors."""
        for value in q.values() if isinstance(q, Mapping) else [q]:
            if not 1 - self.p - 1e-9 <= value <= 1:
                raise ValueError(f"q must be in [1 - p, 1] = [{1 - self.p:g}, 1], got {value}")
        if isinstance(q, Mapping):
            return replace(self, layer_q={**self.layer_q, **q})
        return replace(self, q=float(q), layer_q={})

    def change(self, name: str) -> Tensor:
        """Return the change of one tensor, after rescaling; float64."""
        part = self.parts[name]
        values = part.values.double()
        if part.dense or self.p == 0:
            return values.reshape(part.shape)
        out = torch.zeros(math.prod(part.shape), dtype=torch.float64)
        where = part.where
        if where is None:
            keep = random_keep(part.shape, self.p, self.structure, self.seed, name)
            where = keep.flatten().nonzero().flatten()
        out[where] = values / self.layer_q.get(name, self.q)
        return out.reshape(part.shape)

    def added(self, name: str, weight: Tensor) -> Tensor:
        """Return one tensor of the base with its change added, in its own dtype."""
        if name not in self.parts:
            return weight.clone()
        return (weight.double() + self.change(name).to(weight.device)).to(weight.dtype)

    def apply(self, base: Weights) -> dict[str, Tensor]:
        """Return the weights: those of the base with the change added."""
        return merge(base, [self])

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is gone."""
        some = [part for part in self.parts.values() if not part.dense]
        all_ = sum(math.prod(part.shape) for part in some)
        return 1 - sum(part.values.numel() for part in some) / max(1, all_)

    @property
    def bytes(self) -> int:
        """Bytes of values and places."""
        parts = self.parts.values()
        return sum(p.values.nbytes + (0 if p.where is None else p.where.nbytes) for p in parts)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `delta.safetensors` into a folder and return its path."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        about = {
            key: getattr(self, key) for key in ("p", "method", "structure", "seed", "q", "layer_q")
        }
        about["shapes"] = {k: [list(v.shape), v.dense] for k, v in self.parts.items()}
        tensors = {f"values.{k}": v.values.contiguous() for k, v in self.parts.items()}
        tensors |= {f"where.{k}": v.where for k, v in self.parts.items() if v.where is not None}
        draft = path / "delta.safetensors.part"
        save_file(tensors, draft, metadata={"effuse_delta": json.dumps(about)})
        draft.replace(path / "delta.safetensors")
        return path / "delta.safetensors"

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Pruned:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(Path(folder) / "delta.safetensors", "pt") as file:
            about = json.loads((file.metadata() or {})["effuse_delta"])
            held = set(file.keys())
            parts = {
                name: Part(
                    file.get_tensor(f"values.{name}"),
                    tuple(shape),
                    file.get_tensor(f"where.{name}") if f"where.{name}" in held else None,
                    dense,
                )
                for name, (shape, dense) in about.pop("shapes").items()
            }
        return Pruned(parts, **about)


@method(
    "darex",
    seed=74,
    paper="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models",
    year=2024,
    buys="fine-tunes in a hundredth of their bytes beside the base they came from",
    missing="language models and their benchmarks: judged on small classifiers and house:emoji",
    example=lambda: Delta.between({"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)}),
)
@dataclass(frozen=True)
class Delta:
    """The change of every weight from a base to a fine-tune, computed a tensor at a time.

    dense: beginnings of names kept whole, such as a head trained from scratch. Tensors that are
    not floating, and running statistics of norms, are kept whole too.
    """

    finetuned: Source
    base: Source
    dense: tuple[str, ...] = ()

    @classmethod
    def between(cls, finetuned: Weights, base: Weights, *, dense: Iterable[str] = ()) -> Delta:
        """Return the change from `base` to `finetuned`: of one architecture, any two checkpoints.

        Raises:
            ValueError: names that only one has, or another shape; says which.
        """
        a, b = Source(finetuned), Source(base)
        odd = sorted(set(a.names()) ^ set(b.names()))
        if odd:
            raise ValueError(
                f"{len(odd)} names are in one checkpoint only, such as {odd[0]!r}: expected two of "
                "one architecture; for a LoRA file take Delta.of_lora"
            )
        return cls(a, b, tuple(dense))

    @classmethod
    def of_lora(cls, file: Weights, *, scale: float = 1.0, prefix: str = "") -> Delta:
        """Return the change that a LoRA in peft's or diffusers' format makes: scale B A a layer.

        Names `PREFIX.lora_A.weight` and `PREFIX.lora_B.weight` give the change of `PREFIX.weight`;
        a leading "base_model.model." goes. A `PREFIX.alpha` multiplies by alpha over the rank.

        Args:
            file: as in `Source`.
            scale: of all layers, the adapter's alpha over its rank where the file has no alphas.
            prefix: only names that begin so are read, and lose it: "unet." or "transformer." in
                a file of diffusers, which has a beginning for every component.
        """
        source = Source(file)
        names = set(source.names())
        found = {}
        for name in sorted(names):
            if ".lora_A." not in name or not name.startswith(prefix):
                continue
            down, up = source[name].double(), source[name.replace(".lora_A.", ".lora_B.")].double()
            change = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
            layer = name.partition(".lora_A.")[0]
            size = scale
            if f"{layer}.alpha" in names:
                size *= float(source[f"{layer}.alpha"]) / len(down)
            key = layer.removeprefix(prefix).removeprefix("base_model.model.") + ".weight"
            found[key] = (size * change).float()
        if not found:
            raise ValueError(
                f"no lora_A and lora_B of {prefix or 'anything'!r} in it: expected a LoRA in "
                "peft's or diffusers' format"
            )
        return cls(Source(found), Source({k: torch.zeros_like(v) for k, v in found.items()}))

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor's change, float64."""
        a, b = self.finetuned[name], self.base[name]
        if a.shape != b.shape:
            raise ValueError(f"{name}: shape {tuple(a.shape)} and {tuple(b.shape)} in the base")
        return a.double() - b.to(a.device).double()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Go through names and changes; one is in memory at a time."""
        return ((name, self[name]) for name in self.finetuned.names())

    def prune(
        self,
        p: float,
        method: str = "random",
        *,
        seed: int = 0,
        structure: str = "element",
        norms: Mapping[str, Tensor] | None = None,
    ) -> Pruned:
        """Return what is left at drop rate p in [0, 1), tensor by tensor.

        Args:
            p: share dropped.
            method: "random" is DARE's, with q = 1 - p to begin with; "magnitude" keeps the
                largest; "wanda" those of largest |change| ||x||, by row; both at q = 1.
            seed: of the random mask.
            structure: of a random mask: "element", "column" (an input), "row" (an output),
                "head:N" (whole attention heads of N channels).
            norms: for "wanda", ||x_j|| (d,) of the inputs of each weight, by its name.
        """
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p}")
        check_choice("method", method, METHODS)
        if not re.fullmatch(r"head:[1-9]\d*", structure):
            check_choice("structure", structure, (*STRUCTURES, "head:N"))
        if method == "wanda" and norms is None:
            raise ValueError("wanda needs norms: the norm of each input of each weight")
        parts = {}
        for name, d in self.items():
            kept_whole = name.startswith(self.dense) if self.dense else False
            statistics = "running_" in name or not self.finetuned[name].is_floating_point()
            if kept_whole or statistics or p == 0:
                parts[name] = Part(d.flatten(), tuple(d.shape), None, kept_whole or statistics)
                continue
            where = None
            if method == "random":
                keep = random_keep(d.shape, p, structure, seed, name).flatten()
                values = d.flatten()[keep]
            else:
                where = _largest(d, p, (norms or {}).get(name) if method == "wanda" else None)
                values = d.flatten()[where]
            parts[name] = Part(values.float(), tuple(d.shape), where)
        q = 1 - p if method == "random" else 1.0
        return Pruned(parts, p, method, structure if method == "random" else "element", seed, q)


def _largest(d: Tensor, p: float, norms: Tensor | None) -> Tensor:
    """Return the flat places of the largest changes: of all, or of each row where inputs weigh."""
    if norms is None or d.ndim < 2:
        count = max(1, round((1 - p) * d.numel()))
        return d.flatten().abs().topk(count).indices.sort().values
    shape = (1, -1, *([1] * (d.ndim - 2)))
    rows = (d.abs() * norms.double().reshape(shape)).flatten(1)
    count = max(1, round((1 - p) * rows.shape[1]))
    picked = rows.topk(count, 1).indices + rows.shape[1] * torch.arange(len(rows))[:, None]
    return picked.flatten().sort().values


def merge(
    base: Weights, changes: Sequence[Pruned], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Return the base with several pruned changes added, each times its weight (1 by default)."""
    return dict(merged(Source(base), changes, weights))


def merged(
    base: Source, changes: Sequence[Pruned], weights: Sequence[float] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors of `merge`; one is in memory at a time."""
    times = [1.0] * len(changes) if weights is None else list(weights)
    if len(times) != len(changes):
        raise ValueError(f"{len(changes)} changes and {len(times)} weights: expected one each")
    names = set(base.names())
    for change in changes:
        lost = sorted(set(change.parts) - names)
        if lost:
            raise ValueError(f"the base has no {lost[0]!r}: expected the base it was made from")
    for name in base.names():
        weight = base[name]
        mine = [(t, c) for t, c in zip(times, changes, strict=True) if name in c.parts]
        if mine:
            total = weight.double()
            for t, c in mine:
                total = total + t * c.change(name).to(weight.device)
            weight = (
                total.to(weight.dtype)
                if weight.is_floating_point()
                else total.round().to(weight.dtype)
            )
        yield name, weight.clone() if not mine else weight


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def merge_files(
    base: Weights,
    changes: Sequence[Pruned],
    file: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
) -> Path:
    """Write `merge` to a safetensors file tensor by tensor: memory holds one tensor of the base."""
    source, out = Source(base), Path(file)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in source.names():
        w = source[name]
        header[name] = {
            "dtype": _DTYPES[w.dtype],
            "shape": list(w.shape),
            "data_offsets": [place, place + w.nbytes],
        }
        place += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draft = out.with_name(out.name + ".part")
    with ExitStack() as stack:
        handle = stack.enter_context(draft.open("wb"))
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for _, w in merged(source, changes, weights):
            flat = w.cpu().contiguous().flatten().view(torch.uint8)
            handle.write(flat.numpy().tobytes())
    draft.replace(out)
    return out
