"""Networks that restore pictures: what they answer, and the pictures they give.

model = effuse.house.restorer()
pictures = model.restore(degraded, steps=10, rng=rng)          # or, by hand:
bound = model.toward(degraded)                                 # a denoiser like any other
x = effuse.sample(bound, MRS(), bound.process.prior(degraded.shape, rng=rng), times)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.core import Denoiser, Prediction, Solver, Time, sample
from effuse.core.contracts import Step
from effuse.ops.tensors import expand_as, randn_like, weighted_sum
from effuse.processes import Grid, MeanReverting, Toward, Uniform
from effuse.solvers.mrs import MRS


class Answer(ABC):
    """What a network was trained to answer under a process that reverts to mu."""

    @abstractmethod
    def target(self, process: Toward, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return the answer that is right for x0: (B, *) and noise at level `t`."""

    @abstractmethod
    def pair(self, process: Toward, x: Tensor, t: Time, output: Tensor) -> Prediction:
        """Return both parts of x: (B, *) at level `t` of which the network answered `output`."""


@dataclass(frozen=True)
class OfNoise(Answer):
    """The noise: x0 = (x - (1 - alpha) mu - sigma output) / alpha."""

    def target(self, process: Toward, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """See `Answer.target`."""
        return noise

    def pair(self, process: Toward, x: Tensor, t: Time, output: Tensor) -> Prediction:
        """See `Answer.pair`."""
        return process.complete(x, t, noise=output)


@dataclass(frozen=True)
class OfData(Answer):
    """The clean picture: noise = (x - (1 - alpha) mu - alpha output) / sigma."""

    def target(self, process: Toward, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """See `Answer.target`."""
        return x0

    def pair(self, process: Toward, x: Tensor, t: Time, output: Tensor) -> Prediction:
        """See `Answer.pair`."""
        return process.complete(x, t, x0=output)


@dataclass(frozen=True)
class OfVelocity(Answer):
    """The velocity v = alpha spread noise - c (x0 - mu), c = sigma / spread = sqrt(1 - alpha^2).

    x0 = alpha x - c v + (1 - alpha) mu,   noise = (alpha v + c (x - mu)) / spread:
    (spread noise, x0 - mu) turned by an angle. No division by alpha or sigma: fit at all levels.
    """

    def target(self, process: Toward, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """See `Answer.target`."""
        alpha, sigma, spread = process.alpha(t), process.sigma(t), process.free.spread
        off = x0 - expand_as(process.mu, x0).to(x0)
        return weighted_sum((alpha * spread, noise), (-sigma / spread, off))

    def pair(self, process: Toward, x: Tensor, t: Time, output: Tensor) -> Prediction:
        """See `Answer.pair`."""
        alpha, sigma, spread = process.alpha(t), process.sigma(t), process.free.spread
        mu = expand_as(process.mu, x).to(x).expand_as(x)
        c = sigma / spread
        x0 = weighted_sum((alpha, x), (-c, output), (1 - alpha, mu))
        return Prediction(x0, weighted_sum((alpha / spread, output), (c / spread, x - mu)))


class Beside(nn.Module):
    """A diffusers UNet2DModel of 6 channels that sees x - mu and mu beside each other."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet
        self.multiple: int = 2 ** (len(unet.config.block_out_channels) - 1)

    def forward(self, x: Tensor, mu: Tensor, entry: Tensor) -> Tensor:
        """Return the answer on x, mu: (B, C, H, W) at `entry`: (B,), in the network's own dtype."""
        dtype = next(self.unet.parameters()).dtype
        both = torch.cat([x - mu, mu], 1).to(dtype)
        output: Tensor = self.unet(both, entry, return_dict=False)[0]
        return output


class Restorer(nn.Module):
    """A network that restores pictures, in our words.

    Args:
        network: called as network(x, mu, entry) with x, mu: (B, C, H, W) and the entry of the
            process's table, (B,) float32; returns (B, C, H, W). `Beside(unet)` is one.
        process: what spoiled the pictures in training.
        answer: what the network answers.
        whole: the network knows whole entries only: those in between are rounded, for it alone.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Tensor], Tensor],
        process: MeanReverting,
        answer: Answer,
        *,
        whole: bool = False,
    ):
        super().__init__()
        self.network, self.process, self.answer, self.whole = network, process, answer, whole

    def entry(self, t: Time) -> Tensor:
        """Return what the network is told of the level `t`: its entry, entry 0 below that."""
        entry = self.process.index_at(t).clamp_min(0)
        return entry.round() if self.whole else entry

    def toward(self, mu: Tensor) -> Bound:
        """Return the denoiser for the degraded pictures mu: (B, C, H, W) in [0, 1], or (1, ...).

        Raises:
            ValueError: no such pictures. Noise may carry them a little out of range.
        """
        if mu.ndim != 4 or mu.min() < -0.5 or mu.max() > 1.5:
            raise ValueError(
                f"mu of shape {tuple(mu.shape)} from {mu.min():g} to {mu.max():g}: expected "
                "degraded pictures (B, C, H, W) in [0, 1]"
            )
        return Bound(self, mu)

    @torch.no_grad()
    def restore(
        self,
        mu: Tensor,
        solver: Solver | None = None,
        *,
        steps: int = 20,
        grid: Grid | None = None,
        rng: torch.Generator | None = None,
        on_step: Callable[[int, Tensor, Step], Tensor | None] | None = None,
    ) -> Tensor:
        """Return pictures (B, C, H, W) in [0, 1] from degraded ones, mu: the same.

        Args:
            mu: what to restore; sides that the network cannot halve are filled up meanwhile.
            solver: `MRS()` by default, which draws one of the pictures that may be under the
                damage. `Ancestral()` in 5 to 10 steps draws calmer ones, nearer to their mean.
            steps: of the solver.
            grid: where they are; by default equal steps from pure noise to clean data.
            rng: draws the start and all noise.
            on_step: see `effuse.sample`.
        """
        h, w = mu.shape[-2:]
        many = getattr(self.network, "multiple", 1)
        mu = F.pad(mu, (0, -w % many, 0, -h % many), mode="replicate")
        bound = self.toward(mu)
        grid = Uniform() if grid is None else grid
        times = grid(bound.process, steps)
        solver = MRS().on(times) if solver is None else solver
        x = bound.process.prior(mu.shape, rng=rng, dtype=mu.dtype, device=mu.device)
        out = sample(bound, solver, x, times, rng=rng, on_step=on_step)
        return out[..., :h, :w].clamp(0, 1)

    @torch.no_grad()
    def audit(self, x0: Tensor, mu: Tensor, *, rng: torch.Generator | None = None) -> None:
        """Check on clean pictures x0 and degraded mu that the network answers what is said.

        Every kind of answer is tried on pictures spoiled half-way in log(alpha / sigma). A wrong
        one still gives pairs that fit x, and pictures that are ruined silently.

        Raises:
            ValueError: another kind of answer gives an x0 nearer to the truth; names it.
        """
        process = self.toward(mu).process
        ends = process.logsnr(1.0), process.logsnr(1 / len(process))
        t = float(process.time_at((ends[0] + ends[1]) / 2))
        x = process.corrupt(x0, t, randn_like(x0, rng))
        output = self.ask(x, mu, t)
        kinds = (self.answer, OfNoise(), OfData(), OfVelocity())
        off = [float((k.pair(process, x, t, output).x0 - x0).square().mean()) for k in kinds]
        best = kinds[off.index(min(off))]
        if best != self.answer:
            raise ValueError(
                f"answer={self.answer!r} gives x0 with a mean squared error of {off[0]:.3g}, "
                f"{best!r} of {min(off):.3g}: expected what the network was trained to answer"
            )

    def ask(self, x: Tensor, mu: Tensor, t: Time) -> Tensor:
        """Return the network's answer on x, mu: (B, C, H, W) at level `t`, in the dtype of x."""
        entry = self.entry(t).to(x.device).float().expand(len(x))
        output: Tensor = self.network(x, mu.to(x).expand_as(x), entry)
        if output.shape != x.shape:
            raise ValueError(
                f"the network gave {tuple(output.shape)} for a sample of {tuple(x.shape)}: "
                "expected the same shape"
            )
        return output.to(x.dtype)


class Bound(Denoiser):
    """A `Restorer` bound to its pictures: its process reverts to them."""

    process: Toward

    def __init__(self, restorer: Restorer, mu: Tensor):
        super().__init__()
        self.restorer, self.mu = restorer, mu
        self.process = restorer.process.toward(mu)

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict from x: (B, C, H, W); see `Denoiser.forward`."""
        if cond:
            raise ValueError(f"conditions {sorted(cond)}: a restorer is told of its pictures only")
        return self.restorer.answer.pair(self.process, x, t, self.restorer.ask(x, self.mu, t))
