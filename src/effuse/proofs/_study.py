"""A network in its pipeline, sampled from fixed noise: what the proofs of transforms look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core import Denoiser, Solver, sample
from effuse.solvers import DDIM


@dataclass
class Study:
    """A network in its pipeline, with a way to sample from fixed noise.

    draw(seed) -> start (B, C, H, W) and the guided denoiser; times(steps) -> levels.
    """

    name: str
    network: nn.Module
    draw: Callable[[int], tuple[Tensor, Denoiser]]
    times: Callable[[int], Tensor]
    steps: int

    def run(self, seed: int, solver: Solver | None = None, steps: int | None = None) -> Tensor:
        """Sample with DDIM in the study's own number of steps unless told otherwise."""
        x, denoiser = self.draw(seed)
        times = self.times(steps or self.steps)
        return sample(denoiser, solver or DDIM(), x, times)

    def call(self) -> Any:
        """Return one call of the network as sampling makes them."""
        with recording(self.network) as calls:
            self.run(0, steps=1)
        return calls[0]


@contextmanager
def recording(network: nn.Module) -> Iterator[list[Any]]:
    """Keep the arguments of all calls of a network while inside."""
    calls: list[Any] = []
    hook = network.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def off(x: Tensor, full: Tensor) -> Tensor:
    """Return ||x - full||^2 / ||full||^2 of each picture, (B,)."""
    x, full = x.double().flatten(1), full.double().flatten(1)
    return (x - full).square().sum(1) / full.square().sum(1)


@contextmanager
def in_place_of(study: Study, other: nn.Module) -> Iterator[None]:
    """Let the study's denoiser call another network."""
    kept = study.draw

    def draw(seed: int) -> tuple[Tensor, Denoiser]:
        x, denoiser = kept(seed)
        for module in list(denoiser.modules()):
            if getattr(module, "network", None) is study.network:
                module.network = other
        return x, denoiser

    study.draw = draw
    try:
        yield
    finally:
        study.draw = kept


def of_pipeline(name: str, pipe: Any, prompts: Sequence[Any], scale: float, steps: int) -> Study:
    """Study a diffusers pipeline, guided, from noise that a seed fixes."""
    from effuse.bridge.pipeline import wrap

    model = wrap(pipe)
    model.network.requires_grad_(False)
    cond = model.embed(list(prompts), guided=True)

    def draw(seed: int) -> tuple[Tensor, Denoiser]:
        rng = torch.Generator().manual_seed(seed)
        return model.prior(len(prompts), rng=rng), model.guide(scale).given(**cond)

    return Study(name, model.network, draw, lambda n: model.grid(model.process, n), steps)


@torch.no_grad()
def answers(network: nn.Module, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Return what the network says to each batch, in double precision."""
    out = []
    for b in batches:
        args, kwargs = b["call"]
        out.append(network(*args, **{**kwargs, "return_dict": False})[0].double())
    return out


def error(network: nn.Module, batches: Sequence[dict[str, Any]], wanted: Sequence[Tensor]) -> float:
    """Return the squared error of the network's answers, as a share of what was wanted."""
    given = answers(network, batches)
    off = sum(float((a - b).square().sum()) for a, b in zip(given, wanted, strict=True))
    return off / sum(float(b.square().sum()) for b in wanted)


def small_unet(**changes: Any) -> nn.Module:
    """Return a UNet of 8 x 8 pixels with random weights, the same each time."""
    from diffusers import UNet2DModel

    kinds = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**kinds, **changes}).eval()


def small_pixels(**changes: Any) -> Any:
    """Return a DDPM pipeline around `small_unet`."""
    from diffusers import DDIMScheduler, DDPMPipeline

    return DDPMPipeline(small_unet(**changes), DDIMScheduler(clip_sample=False))


def tiny() -> Study:
    """Study random weights: shows that everything runs and counts, and nothing else."""
    from diffusers import DDIMScheduler

    from effuse.bridge.pipeline import Network
    from effuse.bridge.table import Schedule

    net = small_unet(in_channels=2, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4)
    net.requires_grad_(False)

    schedule = Schedule(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    base = Network(net, schedule)

    def draw(seed: int) -> tuple[Tensor, Denoiser]:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(2, 2, 8, 8, generator=rng), Network(net, schedule)

    from effuse.processes.grids import Trailing

    return Study("tiny", net, draw, lambda n: Trailing()(base.process, n), 8)
