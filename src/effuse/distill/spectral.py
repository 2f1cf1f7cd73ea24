"""Spectral Diffusion: a slim UNet whose changes of resolution are gated by band, and its loss.

from effuse.distill import spectral

student, handle = spectral.slim(teacher, width=0.35)     # a diffusers UNet, with WG blocks
goal = spectral.SpectrumAwareDistillation(teacher, student, spoil=UniformNoise(network))
pipe.unet = student
store.save(pipe, folder, [("unet", handle)])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Applied, Call, Loss, Process, Transform, Where, everywhere
from effuse.core.errors import Unsuited, check_fraction, check_whole
from effuse.core.method import method
from effuse.nn.wavelet import Gates, Heard, WGDown, WGUp
from effuse.ops import expand_as, randn_like
from effuse.ops.bands import inverse_magnitude, radial, resized, spectrum

from .features import FeatureDistillation, Plain, Spoil, answer, listening
from .taps import Adapter, Tapped

__all__ = [
    "SpectrumAwareDistillation",
    "WaveletGating",
    "frequency_error",
    "gates",
    "slim",
    "spectral_term",
]


def spectral_term(theirs: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of w |F theirs - F own|^2, (): orthonormal, so w = 1 is the plain error.

    theirs, own: (B, C, H, W); weights: (B, 1, H, W).
    """
    return (weights * spectrum(theirs - own).abs().square()).mean()


class SpectrumAwareDistillation(FeatureDistillation):
    """Teach a slim student answers and features, with weight on what pictures have little of.

    L = L_task + spatial sum_i ||d_i||^2 + spectral sum_i w_i ||F d_i||^2
    d_i = f_T^i - A_i f_S^i,  w_i = |F x0^i|^exponent

    i runs over the answer (A = 1) and the tapped features, means over elements; F is the
    orthonormal 2-D DFT, x0^i the clean picture at the size of i, |F x0| its mean over channels, at
    least 1e-3 of its largest, w of mean 1 (the paper names no such bounds). Zero weights leave the
    task alone.

    A batch is what `spoil` takes, with `x0`; or `{"call", "target", "x0"}`. Both networks must have
    been made for one process and one kind of prediction, which `spoil` knows.

    Args:
        teacher: frozen here. Another object than the student.
        student: learns in place.
        taps: as in `FeatureDistillation`; the stages if None.
        spatial: l_s, of the plain errors.
        spectral: l_f, of the weighted ones.
        exponent: alpha, of the clean picture's magnitude.
        spoil: makes a call and its target of a batch.
        example: a call; taps of different width get a 1x1 adapter, begun at random: fitted
            to the features of an untrained student its weights would be huge.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        taps: Sequence[Tapped] | None = None,
        *,
        spatial: float = 0.1,
        spectral: float = 0.1,
        exponent: float = -1.0,
        spoil: Spoil | None = None,
        example: Call | None = None,
    ):
        for name, value in (("spatial", spatial), ("spectral", spectral)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: expected a finite number, 0 or more")
        _refuse_other_kind(teacher, student)
        super().__init__(teacher, student, taps, normalizer=Plain(), spoil=spoil, example=example)
        self.spatial, self.spectral, self.exponent = spatial, spectral, exponent
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for adapter in self.adapters.values():
                assert isinstance(adapter, Adapter)
                w = adapter.weight
                w.copy_(torch.randn(w.shape, generator=rng).to(w) / w.shape[1] ** 0.5)
                adapter.bias.zero_()

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the sum, and terms `task`, `spatial` and `spectral`."""
        if "x0" not in batch:
            raise ValueError(f"a batch of {sorted(batch)}: expected `x0`, the clean pictures")
        x0 = batch["x0"]
        (args, kwargs), target = self._call(batch, rng)
        used = bool(self.spatial or self.spectral)
        names = self.taps if used else []
        with listening(self.student, [b for _, b in names]) as own:
            given = answer(self.student(*args, **kwargs))
        terms: dict[str, Tensor] = {}
        if target is not None:
            terms["task"] = (given[:, : target.shape[1]].float() - target.float()).square().mean()
        if used:
            with torch.no_grad(), listening(self.teacher, [a for a, _ in names]) as theirs:
                wanted = answer(self.teacher(*args, **kwargs))
            pairs = [(wanted, given), *(self._pair(i, theirs, own) for i in range(len(names)))]
            weighted = [w for w in (1.0, *(tap.weight for tap in self.matched))]
            plain, waved = [], []
            for (a, b), name in zip(pairs, ("", *(n for n, _ in names)), strict=True):
                if a.ndim != 4:
                    raise ValueError(f"tap {name!r}: {tuple(a.shape)}, expected (B, C, H, W)")
                a, b = a.detach().float(), b.float()
                plain.append((a - b).square().mean())
                size = (a.shape[-2], a.shape[-1])
                w = inverse_magnitude(resized(x0.float(), size), self.exponent)
                waved.append(spectral_term(a, b, w))
            by = plain[0].new_tensor(weighted)
            terms["spatial"] = self.spatial * (by * torch.stack(plain)).sum()
            terms["spectral"] = self.spectral * (by * torch.stack(waved)).sum()
        if not terms:
            raise ValueError("no target and no weights: there is nothing to learn")
        return Loss(torch.stack(list(terms.values())).sum(), terms)


def _refuse_other_kind(teacher: Any, student: Any) -> None:
    """Raise where the networks' own settings say that they answer for different inputs."""
    for name in ("in_channels", "out_channels", "sample_size"):
        a, b = (getattr(getattr(m, "config", None), name, None) for m in (teacher, student))
        if a is not None and b is not None and a != b:
            raise ValueError(f"{name}: teacher {a}, student {b}; expected one data space")


# ---- the student


@method(
    "spectral",
    seed=23,
    paper="Diffusion Probabilistic Model Made Slim",
    year=2023,
    buys="slim UNets that keep high frequencies: gated wavelets and a loss weighted by spectrum",
    missing="Whether the paper's gates see the time embedding is not known: they do by default, "
    "`time=False` takes it away. FFHQ and LSUN figures are not reproduced. There is no official "
    "code.",
    example=lambda: WaveletGating(),
)
@dataclass(frozen=True)
class WaveletGating(Transform):
    """Put wavelet-gated blocks in the place of every halving and doubling of a UNet.

    down: X' = conv(sum_k g_k X_k), X_k the Haar bands;  up: X' = conv(IDWT(g_k X_k)), X_k quarters
    of the channels;  g = sigmoid(FFN(pooled X, time embedding)), one for each band and channel

    The blocks begin untrained: this is for a student that is trained, see `slim`.

    seed: of the first weights. time: gates see the network's time embedding too.
    where: layers it forbids stay as they are.
    """

    seed: int = 0
    time: bool = True
    where: Where = everywhere
    kind = "rewire"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_whole("seed", self.seed, 0)

    def attach(self, model: nn.Module) -> Gated:
        """Swap the layers of `model`.

        Raises:
            Unsuited: it has no layer of diffusers that halves or doubles a picture.
            ValueError: `where` forbids all, or a layer's channels are not a multiple of 4; or gates
                shall see a time embedding that the network has not.
        """
        found = {n: m for n, m in model.named_modules() if _kind(m)}
        if not found:
            raise Unsuited(
                f"{type(model).__name__} changes no resolution: expected a UNet with Downsample2D "
                "and Upsample2D"
            )
        names = [n for n, m in found.items() if self.where(n, m)]
        if not names:
            raise ValueError("`where` forbids every change of resolution: expected some")
        return self.restore(model, {"layers": names})

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Gated:
        """Swap the layers that `plan` names."""
        layers: dict[str, nn.Module] = {}
        width, heard = 0, None
        if self.time:
            embedding = getattr(model, "time_embedding", None)
            width = getattr(getattr(embedding, "linear_2", None), "out_features", 0)
            if not width:
                raise ValueError(
                    f"{type(model).__name__} has no time_embedding of diffusers for the gates: "
                    "give time=False"
                )
            heard = Heard()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name in plan["layers"]:
                old: Any = model.get_submodule(name)
                p = next(model.parameters())
                cls = WGDown if _kind(old) == "down" else WGUp
                made = cls(old.channels, old.out_channels, width)
                made.gates.heard = heard
                layers[name] = made.to(p.device, p.dtype).train(old.training)
        return Gated(self, model, layers, heard)


def _kind(module: nn.Module) -> str:
    """Return "down", "up", or nothing for a layer that is neither."""
    name = type(module).__name__
    return {"Downsample2D": "down", "Upsample2D": "up"}.get(name, "")


class Gated(Applied):
    """A network with wavelet-gated blocks; see `WaveletGating`."""

    def __init__(
        self,
        transform: Transform,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        heard: Heard | None = None,
    ):
        self.transform, self.model, self.layers = transform, model, dict(layers)
        self._hook: Any = None
        if heard is not None:
            embedding: Any = model.time_embedding
            self._hook = embedding.register_forward_hook(heard)
        self._old = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], old)
            for name, old in ((n, model.get_submodule(n)) for n in layers)
        ]
        for (owner, child, _), new in zip(self._old, layers.values(), strict=True):
            setattr(owner, child, new)
        self._final = False

    def plan(self) -> dict[str, Any]:
        """Return the names of the layers that were swapped."""
        return {"layers": list(self.layers)}

    def report(self) -> dict[str, Any]:
        """Return counted parameters of the layers, before and after."""
        before, after = (
            sum(p.numel() for m in some for p in m.parameters())
            for some in ([m for *_, m in self._old], self.layers.values())
        )
        return {"layers": len(self.layers), "parameters_before": before, "parameters": after}

    def detach(self) -> None:
        """Put the original layers back."""
        if self._final:
            raise RuntimeError("the original layers were given up by finalize: load them again")
        for owner, child, module in self._old:
            setattr(owner, child, module)
        if self._hook is not None:
            self._hook.remove()

    def finalize(self) -> None:
        """Give the original layers up."""
        self._old, self._final = [], True


def slim(
    like: Any, width: float = 0.35, *, gated: bool = True, seed: int = 0
) -> tuple[Any, Gated | None]:
    """Return an untrained UNet of a narrower kind and, where `gated`, the handle of its WG blocks.

    Widths are `width` times those of `like`, rounded up to what groups, heads and four bands
    divide; depth, attention and conditions are its own.

    Args:
        like: a UNet2DModel or UNet2DConditionModel of diffusers.
        width: factor on all channel counts, in (0, 1].
        gated: put `WaveletGating` on it.
        seed: of the first weights.

    Raises:
        TypeError: a network of another class.
    """
    check_fraction("width", width)
    config = dict(getattr(like, "config", {}))
    if "block_out_channels" not in config or "up_block_types" not in config:
        raise TypeError(
            f"{type(like).__name__}: expected a UNet2DModel or UNet2DConditionModel of diffusers"
        )
    widths = tuple(config["block_out_channels"])
    groups = min(8, config.get("norm_num_groups") or 8)
    heads = config.get("attention_head_dim")
    conditional = "cross_attention_dim" in config
    if conditional:
        count = heads if isinstance(heads, (tuple, list)) else [heads] * len(widths)
        steps = [math.lcm(groups, 4, int(h or 1)) for h in count]
    else:
        steps = [math.lcm(groups, 4)] * len(widths)
    narrow = tuple(math.ceil(width * c / s - 1e-9) * s for c, s in zip(widths, steps, strict=True))
    config |= {"block_out_channels": narrow, "norm_num_groups": groups}
    if not conditional and heads:
        config["attention_head_dim"] = math.gcd(int(heads), *narrow)
    cls: Any = next(
        c
        for c in type(like).__mro__
        if c.__module__.startswith("diffusers.") and c.__name__.startswith("UNet2D")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    return student, WaveletGating(seed=seed).attach(student) if gated else None


# ---- looking at it


@torch.no_grad()
def gates(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """Return the mean gate of LL, LH, HL and HH, (4,), of every WG block in a call."""
    names = [n for n, m in model.named_modules() if isinstance(m, Gates)]
    args, kwargs = call
    with listening(model, names) as heard:
        model(*args, **kwargs)
    return {n.removesuffix(".gates"): heard[n].mean((0, 2)) for n in names}


@torch.no_grad()
def frequency_error(
    noise_of: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    x0: Tensor,
    times: Sequence[float],
    *,
    bins: int = 8,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Return the power of the error of the predicted noise by level and ring, (T, bins).

    Args:
        noise_of: gives the noise of x: (B, C, H, W) at t: (B,).
        process: how x0 is spoiled.
        x0: (B, C, H, W) clean pictures.
        times: levels in (0, 1].
        bins: rings of frequency; see `effuse.ops.bands.radial`.
        rng: draws the noise.
    """
    out = []
    for t in times:
        noise, level = randn_like(x0, rng), torch.full((len(x0),), float(t))
        alpha, sigma = (expand_as(c(level), x0) for c in (process.alpha, process.sigma))
        off = noise_of(alpha * x0 + sigma * noise, level) - noise
        out.append(radial(spectrum(off).abs().square().mean((0, 1)), bins))
    return torch.stack(out)
