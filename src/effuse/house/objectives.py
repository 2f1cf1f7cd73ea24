"""What each house network learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.core.contracts import Loss, Objective
from effuse.processes import MeanReverting
from effuse.restore.reverting import OfVelocity


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


class Reconstruction(Objective):
    """An autoencoder gives its picture back: L1, squared error, L1 of gradients, a little KL.

    batch["image"]: (B, 3, H, W) in [-1, 1].
    """

    student: Any

    def __init__(self, student: nn.Module, kl: float = 2e-4):
        super().__init__()
        self.student, self.kl = student, kl

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the loss and its parts; `mse` is of pictures in [0, 1]."""
        x = batch["image"]
        latent = self.student.encode(x).latent_dist
        z = latent.sample(generator=rng)
        y = self.student.decode(z).sample.float()
        mean, logvar = latent.mean.float(), latent.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        l1, l2 = (y - x).abs().mean(), (y - x).square().mean()
        pairs = zip(_gradient(y), _gradient(x), strict=True)
        edges = torch.stack([(a - b).abs().mean() for a, b in pairs]).sum()
        total = l1 + 3 * l2 + 0.5 * edges + self.kl * kl
        return Loss(total, {"l1": l1, "mse": l2 / 4, "edges": edges, "kl": kl})


class Contrastive(Objective):
    """Pictures find their captions and captions their pictures, among those of the batch.

    batch["image"]: (B, 3, 64, 64), normalized; batch["words"]: (B, L) token numbers;
    batch["base"]: (B,) number of the emoji; batch["styled"]: (B,) bool, caption names its style.
    Pairs of one emoji that a caption without style cannot tell apart are not counted as wrong.
    """

    student: Any

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the symmetric cross-entropy and the accuracy within the batch."""
        out = self.student(input_ids=batch["words"], pixel_values=batch["image"])
        a = F.normalize(out.image_embeds.float(), dim=-1)
        b = F.normalize(out.text_embeds.float(), dim=-1)
        scale = self.student.logit_scale.float().clamp(max=4.6).exp()
        logits = scale * a @ b.T
        same = batch["base"][:, None] == batch["base"][None, :]
        same &= ~torch.eye(len(a), dtype=torch.bool)
        # column j is the caption; the row is the picture
        logits = logits.masked_fill(same & ~batch["styled"][None, :], -30.0)
        target = torch.arange(len(a))
        total = (
            F.cross_entropy(logits, target, label_smoothing=0.05)
            + F.cross_entropy(logits.T, target, label_smoothing=0.05)
        ) / 2
        hit = (logits.argmax(1) == target).float().mean()
        return Loss(total, {"hit": hit.detach(), "scale": scale.detach()})


class Velocity(Objective):
    """A network learns the velocity alpha noise - sigma x0 at levels spread over the batch.

    batch["x0"]: (B, *); all else in the batch goes to the network by name. The weight is
    min(1 + snr, cap) / (1 + snr): squared error of x0 times min(1 + snr, cap).

    Args:
        student: a diffusers network, called as `student(x, t, **rest).sample`.
        cumulative: (T,) cumulative alphas of the noise schedule. cap: of the weight.
    """

    student: Any
    cumulative: Tensor

    def __init__(self, student: nn.Module, cumulative: Tensor, cap: float = 6.0):
        super().__init__()
        self.student, self.cap = student, cap
        self.register_buffer("cumulative", cumulative.float(), persistent=False)

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the weighted loss, and the plain one as `velocity`."""
        x, t, a, noise = self.corrupt(batch["x0"], rng)
        target = a.sqrt() * noise - (1 - a).sqrt() * batch["x0"]
        each = self.errors(x, t, target, batch)
        weight = (self.cap * (1 - a)).clamp(max=1.0).flatten()
        return Loss((weight * each).mean(), {"velocity": each.mean().detach()})

    def corrupt(
        self, x0: Tensor, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return spoiled x0: (B, *), its level (B,), cumulative alpha (B, 1, ...) and the noise."""
        count, levels = len(x0), len(self.cumulative)
        spread = torch.arange(count) + torch.rand(count, generator=rng)
        t = (spread / count * levels).long().clamp(max=levels - 1)
        a = self.cumulative[t].reshape(-1, *[1] * (x0.ndim - 1))
        noise = torch.randn(x0.shape, generator=rng)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise, t, a, noise

    def errors(self, x: Tensor, t: Tensor, target: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean squared error (B,) of the network's answer."""
        rest = {k: v for k, v in batch.items() if k != "x0"}
        out = self.student(x, t, **rest).sample.float()
        return (out - target).square().flatten(1).mean(1)


class Noise(Velocity):
    """A network learns the noise, every level weighing the same: DDPM's simple loss."""

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the mean squared error of the noise."""
        x, t, _, noise = self.corrupt(batch["x0"], rng)
        total = self.errors(x, t, noise, batch).mean()
        return Loss(total, {"noise": total.detach()})


class Restoration(Objective):
    """A network learns the velocity of a mean-reverting process at entries spread over the batch.

    batch["x0"], batch["mu"]: (B, 3, H, W) in [0, 1], clean and degraded. The squared error of the
    velocity, in units of the spread, weighs as the house weighs it elsewhere: that of x0 times
    min(1 + snr, cap), snr = alpha^2 spread^2 / sigma^2.

    Args:
        student: what `Restorer` calls. process: what spoils. cap: of the weight.
    """

    student: Any

    def __init__(self, student: nn.Module, process: MeanReverting, cap: float = 6.0):
        super().__init__()
        self.student, self.process, self.cap = student, process, cap

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the weighted loss, and the plain one as `velocity`."""
        x0, mu = batch["x0"], batch["mu"]
        count, process = len(x0), self.process.toward(mu)
        spread = torch.arange(count) + torch.rand(count, generator=rng)
        entry = (1 + spread / count * self.process.steps).floor().clamp(max=self.process.steps)
        t = self.process.time_of(entry)
        noise = torch.randn(x0.shape, generator=rng)
        target = OfVelocity().target(process, x0, noise, t)
        out = self.student(process.corrupt(x0, t, noise), mu, entry.float()).float()
        each = (out - target).square().flatten(1).mean(1) / self.process.spread**2
        weight = (self.cap * (1 - process.alpha(t).square())).clamp(max=1.0).float()
        return Loss((weight * each).mean(), {"velocity": each.mean().detach()})
