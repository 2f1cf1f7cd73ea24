"""Diffusers in: a pipeline's network as a denoiser, with its codec and its conditions.

In one call, `effuse.wrap(pipe).sample(["a red apple"], steps=25)`; by hand:

    model = effuse.wrap(pipe)
    cond = model.embed(["a red apple"], guided=True)
    times = model.grid(model.process, 25)
    x = effuse.sample(model.guide(7.5).given(**cond), DDIM(), model.prior(1, rng=rng), times)
    pictures = model.codec.decode(x)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effuse.core import Denoiser, Prediction, Solver, Time, sample
from effuse.core.clip import Clipped
from effuse.core.contracts import Call
from effuse.ops import randn_like
from effuse.processes import Grid

from .families import FAMILIES, Family, Pixels, Prompts, Texts, TextsXL, default_of, listed
from .table import AsScheduler, Schedule, answer_for, grid_of, predict, solver_named

__all__ = ["Codec", "Guided", "Network", "Walk", "Wrapped", "grid_of", "wrap"]

# Conditions that are the same for every row and have no batch dimension.
_SHARED = ("txt_ids", "img_ids")


class Walk(NamedTuple):
    """The arguments of `effuse.sample`: `effuse.sample(*walk, rng=rng)`.

    denoiser: conditions bound, guided if the pipeline is. x: (B, C, h, w) the start.
    times: (steps + 1,) levels.
    """

    denoiser: Denoiser
    solver: Solver
    x: Tensor
    times: Tensor


class Network(Denoiser):
    """A diffusers UNet or transformer as a denoiser.

    Conditions are the keyword arguments of the network's own forward. The network runs in its own
    dtype; x and the coefficients stay as they are, so give x in float32 or better.

    Args:
        network: the module.
        schedule: how it was trained.
    """

    def __init__(self, network: nn.Module, schedule: Schedule):
        super().__init__()
        self.network, self.schedule, self.process = network, schedule, schedule.process

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict from x: (B, C, H, W); see `Denoiser.forward`."""
        if "negative" in cond:
            raise ValueError(
                "conditions with a negative half: expected a guided denoiser, as Wrapped.guide "
                "gives, or embed(..., guided=False)"
            )
        args, kwargs = self.call(x, t, **cond)
        output = self.unpacked(self.network(*args, **kwargs)[0], x)
        return predict(self.schedule.kind, output, x, t, self.process)

    def call(self, x: Tensor, t: Time, **cond: Any) -> Call:
        """Return the arguments with which the network is called on x: (B, C, H, W) at level t."""
        label = torch.as_tensor(self.schedule.label(t), device=x.device).float().expand(len(x))
        dtype = next(self.network.parameters()).dtype
        return self.arguments(x.to(dtype), label, cond)

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return what the network was trained to answer, without a learned variance."""
        return self.packed(answer_for(self.schedule.kind, x0, noise, t, self.process))

    def arguments(self, x: Tensor, label: Tensor, cond: Mapping[str, Any]) -> Call:
        """Return the arguments for x in the network's own dtype, with its time labels, (B,)."""
        return (self.packed(x),), {"timestep": label, "return_dict": False, **cond}

    def packed(self, x: Tensor) -> Tensor:
        """Return x: (B, C, H, W) in the shape the network takes."""
        return x

    def unpacked(self, out: Tensor, like: Tensor) -> Tensor:
        """Return what the network gave in the shape of `like`: (B, C, H, W)."""
        return out


class Packed(Network):
    """FLUX: latents go in as tokens of 2 x 2, (B, HW / 4, 4C), labels as sigma in [0, 1]."""

    def arguments(self, x: Tensor, label: Tensor, cond: Mapping[str, Any]) -> Call:
        """See `Network.arguments`."""
        h, w = x.shape[2] // 2, x.shape[3] // 2
        grid = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros(h, w), *grid], -1).reshape(-1, 3).to(x)
        label = (label / self.schedule.count).to(x.dtype)
        return super().arguments(x, label, {"img_ids": ids, **cond})

    def packed(self, x: Tensor) -> Tensor:
        """See `Network.packed`."""
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return tokens.reshape(b, h * w // 4, 4 * c)

    def unpacked(self, out: Tensor, like: Tensor) -> Tensor:
        """See `Network.unpacked`."""
        b, c, h, w = like.shape
        out = out.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, c, h, w)


class Guided(Denoiser):
    """Classifier-free guidance in one call of the double batch.

    negative + scale (positive - negative), on the pair: diffusers' meaning of the scale, so 1 is
    the conditional prediction. Takes the conditions with a dict `negative` among them, of the same
    keys and shapes.
    """

    def __init__(self, base: Denoiser, scale: float):
        super().__init__()
        self.base, self.scale, self.process = base, scale, base.process

    def forward(
        self, x: Tensor, t: Time, *, negative: Mapping[str, Any] | None = None, **cond: Any
    ) -> Prediction:
        """Predict; see `Denoiser.forward`."""
        if negative is None:
            raise ValueError(
                f"guidance {self.scale:g} without an unconditional branch: expected conditions "
                "from embed(..., guided=True)"
            )
        both = _joined(negative, cond, len(x))
        if isinstance(t, Tensor) and t.ndim:
            t = torch.cat([t, t]) if len(t) > 1 else t
        pair = self.base(torch.cat([x, x]), t, **both)
        (x0, x0_), (noise, noise_) = pair.x0.chunk(2), pair.noise.chunk(2)
        return Prediction(x0, noise).mix(Prediction(x0_, noise_), self.scale)


def _joined(a: Mapping[str, Any], b: Mapping[str, Any], rows: int) -> dict[str, Any]:
    if a.keys() != b.keys():
        raise ValueError(
            f"negative conditions {sorted(a)} beside {sorted(b)}: expected the same keys"
        )
    out: dict[str, Any] = {}
    for key, value in b.items():
        if isinstance(value, Mapping):
            out[key] = _joined(a[key], value, rows)
        elif isinstance(value, Tensor) and value.ndim and key not in _SHARED:
            out[key] = torch.cat([_rows(a[key], rows, key), _rows(value, rows, key)])
        else:
            out[key] = value
    return out


def _rows(value: Tensor, rows: int, key: str) -> Tensor:
    if len(value) not in (1, rows):
        raise ValueError(f"condition {key} has {len(value)} rows for {rows} samples")
    return value.expand(rows, *value.shape[1:])


@dataclass(frozen=True)
class Codec:
    """Pictures to latents and back; the identity but for the range where there is no autoencoder.

    z = ((vae(2 picture - 1) - shift) scale, pictures in [0, 1]; with latents_mean and latents_std,
    z = (vae(...) - mean) scale / std.

    vae: the autoencoder, or None. factor: pixels to a latent, along each side.
    """

    vae: nn.Module | None
    factor: int = 1

    def encode(self, pictures: Tensor, *, rng: torch.Generator | None = None) -> Tensor:
        """Return latents (B, C, h, w) of pictures: (B, 3, H, W) in [0, 1].

        The mean of the code by default; a draw from it with `rng`.

        Raises:
            ValueError: no such pictures, or a side that the factor does not divide.
        """
        if pictures.ndim != 4 or any(side % self.factor for side in pictures.shape[-2:]):
            raise ValueError(
                f"pictures of shape {tuple(pictures.shape)}: expected (B, 3, H, W) with sides "
                f"divisible by {self.factor}"
            )
        x = 2 * pictures - 1
        if self.vae is None:
            return x
        with self._full() as vae:
            law = vae.encode(x.to(vae.dtype)).latent_dist
            z = law.mean if rng is None else law.mean + law.std * randn_like(law.mean, rng)
        z = z.to(pictures.dtype)
        mean, scale = self._affine(z)
        return (z - mean) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (B, 3, H, W), in [0, 1] up to overshoot, of latents: (B, C, h, w)."""
        if self.vae is None:
            return latents / 2 + 0.5
        mean, scale = self._affine(latents)
        z = latents / scale + mean
        with self._full() as vae:
            x = vae.decode(z.to(vae.dtype), return_dict=False)[0]
        return x.to(latents.dtype) / 2 + 0.5

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config: Any = self.vae.config  # type: ignore[union-attr]
        scale = torch.as_tensor(config.scaling_factor).to(like)
        mean, std = (getattr(config, k, None) for k in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            mean, std = (torch.tensor(c).view(1, -1, 1, 1).to(like) for c in (mean, std))
            return mean, scale / std
        return torch.as_tensor(getattr(config, "shift_factor", None) or 0.0).to(like), scale

    @contextlib.contextmanager
    def _full(self) -> Iterator[Any]:
        """Lend the autoencoder, in float32 where half precision is known to overflow."""
        vae: Any = self.vae
        if not (vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)):
            yield vae
            return
        vae.to(torch.float32)
        try:
            yield vae
        finally:
            vae.to(torch.float16)


@dataclass(frozen=True)
class Wrapped:
    """A diffusers pipeline in our words; it shares the pipeline's modules, nothing is copied.

    pipe: the pipeline. network: its UNet or transformer. schedule: how that was trained.
    denoiser: the network as a denoiser, unguided. codec: pictures to samples and back.
    shape: (C, h, w) of one sample. grid: the levels the pipeline's own scheduler would take.
    """

    pipe: Any
    network: nn.Module
    schedule: Schedule
    codec: Codec
    shape: tuple[int, int, int]
    family: Family

    @property
    def config(self) -> Any:
        """The network's own config."""
        return self.network.config

    @property
    def process(self) -> Any:
        """What spoiled the data that the network was trained on."""
        return self.schedule.process

    @property
    def grid(self) -> Grid:
        """The levels the pipeline's own scheduler would take."""
        return AsScheduler(self.schedule)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def denoiser(self) -> Denoiser:
        """The network as a denoiser; takes what `embed` gives."""
        return self._clipped(self.bare)

    def guide(self, scale: float) -> Denoiser:
        """Return the denoiser under classifier-free guidance; takes `embed(..., guided=True)`."""
        return self._clipped(Guided(self.bare, scale))

    @property
    def bare(self) -> Network:
        """The network as a denoiser whose x0 is not clipped, which knows its calls and targets."""
        return (Packed if self.family.packed else Network)(self.network, self.schedule)

    def _clipped(self, base: Denoiser) -> Denoiser:
        # after guidance, as diffusers does it
        return base if self.schedule.clip is None else Clipped(base, self.schedule.clip)

    def at(self, size: int | tuple[int, int] | None) -> Wrapped:
        """Return the same for pictures of another size, (height, width) in pixels.

        Raises:
            ValueError: a side that the codec's factor (twice that for FLUX) does not divide.
        """
        if size is None:
            return self
        sides = (size, size) if isinstance(size, int) else size
        unit = self.codec.factor * self.family.patch
        if any(side < unit or side % unit for side in sides):
            raise ValueError(f"size={size}: expected sides in pixels divisible by {unit}")
        h, w = (side // self.codec.factor for side in sides)
        out = replace(self, shape=(self.shape[0], h, w))
        return replace(out, schedule=_schedule(self.pipe, self.family, out.shape))

    def prior(self, count: int, *, rng: torch.Generator | None = None) -> Tensor:
        """Draw standard normal noise of `count` samples; (count, C, h, w) float32."""
        like = torch.empty(count, *self.shape, device=self.device)
        return randn_like(like, rng)

    def embed(
        self,
        what: Prompts | Sequence[int] | int,
        negative: Prompts | None = None,
        *,
        guided: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """Return the conditions that the denoiser takes.

        Args:
            what: prompts; or class labels (numbers or names); or a count for an unconditional one.
            negative: prompts to keep away from, one or one a prompt; implies `guided`.
            guided: add the unconditional half under "negative", with the pipeline's own empty
                prompt if none is given.
            **more: passed on to the pipeline's `encode_prompt` (clip_skip, prompt_2, ...).

        Raises:
            ValueError: no prompts, or guidance where the pipeline has no unconditional branch.
        """
        what = listed(what)
        return self.family.embed(self, what, negative, guided or negative is not None, **more)

    def walk(
        self,
        what: Prompts | Sequence[int] | int = 1,
        solver: Solver | None = None,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        guidance: float | None = None,
        negative: Prompts | None = None,
        rng: torch.Generator | None = None,
        size: int | tuple[int, int] | None = None,
        latents: Tensor | None = None,
    ) -> Walk:
        """Return what `effuse.sample` takes, to wrap, score or watch: see `sample`."""
        model, what = self.at(size), listed(what)
        count = what if isinstance(what, int) else len(what)
        steps = default_of(self.pipe, "num_inference_steps", 50) if steps is None else steps
        scale = default_of(self.pipe, "guidance_scale", 1.0) if guidance is None else guidance
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: expected a positive integer")
        x = model.prior(count, rng=rng) if latents is None else latents.float().to(self.device)
        if x.shape != (count, *model.shape):
            raise ValueError(f"latents of shape {tuple(x.shape)}: expected {(count, *model.shape)}")
        guided, told = model.family.guides(model, scale, guidance is not None)
        with torch.no_grad():
            cond = model.embed(what, negative, guided=True) if guided else model.embed(what)
        cond |= told
        if guided:
            cond["negative"] |= told
        denoiser = (model.guide(scale) if guided else model.denoiser).given(**cond)
        own = model.schedule.walk(steps)
        solver = solver_named("ddim") if solver is None else solver
        grid = model.schedule.grid_for(solver) if grid is None else grid
        times = own.levels if grid is None else grid(model.process, steps)
        return Walk(denoiser, solver, own.start * x, times)

    @torch.no_grad()
    def sample(
        self,
        what: Prompts | Sequence[int] | int = 1,
        solver: Solver | None = None,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        guidance: float | None = None,
        negative: Prompts | None = None,
        rng: torch.Generator | None = None,
        size: int | tuple[int, int] | None = None,
        latents: Tensor | None = None,
        on_step: Callable[..., Tensor | None] | None = None,
        decode: bool = True,
    ) -> Tensor:
        """Sample pictures.

        Args:
            what: prompts, class labels, or a count; see `embed`.
            solver: deterministic DDIM by default.
            steps: the pipeline's own default if not given.
            grid: where the steps are. Left out, as `effuse.scheduler` has it: the pipeline's own
                for a solver that diffusers has too, `Tapered` for the others.
            guidance: diffusers' scale; the pipeline's own default if not given, 1 for none.
            negative: prompts to keep away from.
            rng: draws the start and all noise.
            size: (height, width) in pixels; the pipeline's own default if not given.
            latents: (B, C, h, w) standard normal noise to start from, instead of a draw.
            on_step: see `effuse.sample`.
            decode: whether to decode; else the sample itself is given.

        Returns:
            (B, 3, H, W) pictures in [0, 1], or (B, C, h, w).

        Raises:
            ValueError: an argument that makes no sense for this pipeline.
        """
        walk = self.walk(
            what,
            solver,
            steps=steps,
            grid=grid,
            guidance=guidance,
            negative=negative,
            rng=rng,
            size=size,
            latents=latents,
        )
        out = sample(*walk, rng=rng, on_step=on_step)
        return self.codec.decode(out).clamp(0, 1) if decode else out


def wrap(pipe: Any) -> Wrapped:
    """Return a diffusers pipeline in our words.

    Known by their network: DDPM and DDIM pipelines (UNet2DModel), Stable Diffusion 1.x, 2.x and XL
    (UNet2DConditionModel), DiT, PixArt Alpha and Sigma, Stable Diffusion 3, FLUX; image-to-image
    and inpainting variants of the same components too.

    Raises:
        TypeError: it is no such pipeline.
        ValueError: a component is missing, or the network wants more than a noisy sample.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    names = [c.__name__ for c in type(network).__mro__]
    family = next((FAMILIES[n] for n in names if n in FAMILIES), None)
    if network is None or family is None:
        raise TypeError(
            f"{type(pipe).__name__} with a {names[0]}: expected a diffusers pipeline with one of "
            f"{', '.join(FAMILIES)} as its unet or transformer"
        )
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no scheduler: load the pipeline whole")
    config: Any = network.config
    if isinstance(family, Texts) and getattr(config, "addition_embed_type", None) == "text_time":
        family = TextsXL()
    vae = getattr(pipe, "vae", None)
    if vae is None and not isinstance(family, Pixels):
        raise ValueError(f"{type(pipe).__name__} has no vae: load the pipeline whole")
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    channels = config.in_channels // (4 if family.packed else 1)
    if vae is not None and channels != vae.config.latent_channels:
        raise ValueError(
            f"the network takes {channels} channels beside {vae.config.latent_channels} of a "
            "latent: networks that also take a mask or a picture are not supported, wrap a "
            "pipeline with the plain network"
        )
    side = family.side(pipe, network)
    h, w = (side, side) if isinstance(side, int) else side
    shape = (channels, h, w)
    return Wrapped(pipe, network, _schedule(pipe, family, shape), Codec(vae, factor), shape, family)


def _schedule(pipe: Any, family: Family, shape: tuple[int, int, int]) -> Schedule:
    """Read the scheduler; a dynamic shift follows the sample's size, as in the pipelines."""
    schedule = Schedule(pipe.scheduler, even=family.packed)
    c = schedule.config
    if not c.get("use_dynamic_shifting"):
        return schedule
    tokens = shape[1] * shape[2] // family.patch**2
    low, high = c.get("base_shift", 0.5), c.get("max_shift", 1.15)
    few, many = c.get("base_image_seq_len", 256), c.get("max_image_seq_len", 4096)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return Schedule(pipe.scheduler, mu, even=family.packed)
