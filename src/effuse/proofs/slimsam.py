"""Alternate slimming against pruning everything at once, and its criterion against others.

The encoder is SAM's (windows, relative positions, neck), small, trained here as a segmenter of
clothes: canvases of four pictures of Fashion-MNIST, a class for every pixel. What is slimmed is
the encoder; the head stays as it is and judges, as SAM's mask decoder would. Slimming sees canvases
without their labels, and is judged on others, made of test pictures.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.compress.prune.criteria import Batch, answer_to
from effuse.compress.prune.importance import (
    DisturbedTaylor,
    Importance,
    Magnitude,
    Random,
    taylor,
)
from effuse.compress.prune.slimsam import Slimmed, SlimSAM, alternate, heal
from effuse.compress.prune.vit_groups import Width
from effuse.compress.units import macs, parameters
from effuse.core.training import warmup_cosine

from . import Claim, Evidence, Scale, proof

SIDE, PATCH, CLASSES = 56, 7, 11  # pixels, pixels, ten kinds of clothes and nothing


@dataclass(frozen=True)
class Sizes:
    """How much a size of the proof does."""

    width: int
    blocks: int
    training: int
    steps: int
    pool: int
    seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    rates: tuple[float, ...]


@dataclass
class Study:
    """A trained encoder with its head, calls to slim with, and canvases to judge on."""

    encoder: nn.Module
    head: nn.Module
    canvases: Tensor
    labels: Tensor
    judged: Tensor
    truth: Tensor
    sizes: Sizes

    def __post_init__(self) -> None:
        """Remember what the original answers."""
        self.features = self.answers(self.encoder)
        self.power = float(self.features.var())

    @torch.no_grad()
    def answers(self, encoder: nn.Module) -> Tensor:
        """Return the features (N, C, h, w) of the canvases judged on."""
        parts = [answer_to(encoder, {"call": ((x,), {})}) for x in self.judged.split(64)]
        return torch.cat(parts)

    def error(self, encoder: nn.Module) -> float:
        """Return the mean square change of features over their variance."""
        return float((self.answers(encoder) - self.features).square().mean()) / self.power

    def iou(self, encoder: nn.Module) -> float:
        """Return the mean over classes of intersection over union, the head as it was."""
        with torch.no_grad():
            guess = self.head(self.answers(encoder)).argmax(1)
        both = self.truth * CLASSES + guess
        table = both.flatten().bincount(minlength=CLASSES**2).view(CLASSES, CLASSES).double()
        hit = table.diagonal()
        union = table.sum(0) + table.sum(1) - hit
        return float((hit / union)[union > 0].mean())

    def pool(self, seed: int) -> Tensor:
        """Return the unlabeled canvases of a seed, as indices."""
        rng = torch.Generator().manual_seed(1000 + seed)
        return torch.randperm(len(self.canvases), generator=rng)[: self.sizes.pool]

    def calls(self, seed: int) -> list[dict[str, Any]]:
        """Return what importance is measured on: a quarter of the pool, one by one."""
        some = self.pool(seed)[: self.sizes.pool // 4].split(1)
        return [{"call": ((self.canvases[i],), {}), "truth": self.labels[i]} for i in some]


@dataclass(frozen=True)
class Labels(Importance):
    """Plain Taylor on the ground truth: cross-entropy behind the head."""

    study: Any

    def scores(
        self, model: nn.Module, found: Sequence[Width], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """See `Importance.scores`; batches hold the classes of pixels as `truth`."""

        def loss(given: Tensor, batch: Batch) -> tuple[Tensor, float]:
            value = F.cross_entropy(self.study.head(given), batch["truth"], reduction="sum")
            return value, batch["truth"].numel()

        return taylor(model, found, batches, loss)


@proof("slimsam")
def prove(scale: Scale) -> Evidence:
    """Compare ways to the same size, at the same number of healing steps, on the same canvases."""
    sizes = scale.pick(
        Sizes(16, 2, 20, 3, 16, (0,), (0.5,), (3e-3,)),
        Sizes(64, 4, 250, 20, 128, (0,), (0.5, 0.77), (3e-3,)),
        Sizes(64, 4, 800, 50, 256, (0, 1, 2), (0.5, 0.77), (1e-3, 3e-3)),
    )
    study = trained(scale, sizes)
    rows: list[dict[str, Any]] = [
        {"part": "original", "iou": study.iou(study.encoder)}
        | {"parameters": parameters(study.encoder), "macs": cost(study.encoder)}
    ]
    lr = tuned(study, rows)
    table: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for ratio in sizes.ratios:
        for seed in sizes.seeds:
            for name, row in compared(study, ratio, seed, lr).items():
                table.setdefault((ratio, name), []).append(row)
                rows.append({"part": "slimmed", "variant": name, "ratio": ratio, "seed": seed})
                rows[-1] |= row
    return Evidence(claims_of(table, sizes), rows, notes(sizes, lr))


def compared(
    study: Study, ratio: float, seed: int, lr: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return a row for each way to prune `ratio` of every width, with the same data and steps."""
    ways: dict[str, Importance] = {
        "alternate, disturbed Taylor": DisturbedTaylor(seed=seed),
        "alternate, Taylor on labels": Labels(study),
        "alternate, magnitude": Magnitude(),
        "alternate, random": Random(seed),
        "at once, disturbed Taylor": DisturbedTaylor(seed=seed),
    }
    out = {}
    for name, importance in ways.items():
        how = name.split(",")[0]
        slim, unhealed = slimmed(study, how, importance, ratio, seed, lr[how])
        out[name] = measured(study, slim) | {"unhealed_error": unhealed}
        if name == "alternate, disturbed Taylor":
            fresh = scratch(study, slim, seed, lr["scratch"])
            out["from scratch, distilled"] = measured(study, fresh)
    return out


def slimmed(
    study: Study, how: str, importance: Importance, ratio: float, seed: int, lr: float
) -> tuple[nn.Module, float]:
    """Return the slimmed encoder, and its error when everything is pruned and nothing healed."""
    steps, pool = study.sizes.steps, study.pool(seed)
    teacher, model = copy.deepcopy(study.encoder), copy.deepcopy(study.encoder)
    model.requires_grad_(True)
    whole = SlimSAM(embed=ratio, bottleneck=ratio, importance=importance, steps=2 * steps)
    calls = [{"call": ((study.canvases[i],), {}), "truth": study.labels[i]} for i in pool.split(1)]
    once = Slimmed(whole, model)
    once.observe(calls)
    unhealed = study.error(model)
    options: dict[str, Any] = {
        "lr": lr,
        "rng": torch.Generator().manual_seed(seed),
        "schedule": warmup_cosine(),
        "progress": False,
    }
    if how == "at once":
        heal(once, drawing(study, pool), teacher, **options)
        return model.eval(), unhealed
    once.detach()
    handle = replace(whole, steps=steps).attach(model)
    alternate(handle, calls, drawing(study, pool), teacher, **options)
    return model.eval(), unhealed


def scratch(study: Study, slim: nn.Module, seed: int, lr: float) -> nn.Module:
    """Return a network of the same sizes, new weights, distilled for as many steps in all."""
    model = copy.deepcopy(slim).train().requires_grad_(True)
    fresh(model, seed)
    whole = SlimSAM(embed=0.5, bottleneck=0.5, steps=2 * study.sizes.steps)
    handle = Slimmed(whole, model)
    handle.kept = {"embed": {}, "bottleneck": {}}  # answers only: nothing to align with
    heal(
        handle,
        drawing(study, study.pool(seed)),
        copy.deepcopy(study.encoder),
        lr=lr,
        rng=torch.Generator().manual_seed(seed),
        schedule=warmup_cosine(),
        progress=False,
    )
    return model.eval()


@torch.no_grad()
def fresh(model: nn.Module, seed: int) -> None:
    """Draw the weights of layers anew: uniform within 1 / sqrt(inputs), norms one and zero."""
    rng = torch.Generator().manual_seed(seed)
    for m in model.modules():
        weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
        if isinstance(m, nn.LayerNorm) and weight is not None and bias is not None:
            weight.fill_(1), bias.fill_(0)
        elif weight is not None:
            bound = weight[0].numel() ** -0.5
            weight.uniform_(-bound, bound, generator=rng)
            if bias is not None:
                bias.fill_(0)
    for name, p in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            p.fill_(0)


def drawing(study: Study, pool: Tensor) -> Any:
    """Return what draws batches of 16 of the unlabeled canvases."""

    def draw(rng: torch.Generator) -> dict[str, Any]:
        picked = pool[torch.randint(len(pool), (16,), generator=rng)]
        return {"call": ((study.canvases[picked],), {})}

    return draw


def measured(study: Study, model: nn.Module) -> dict[str, Any]:
    """Return errors and costs of a slimmed encoder."""
    out = {"error": study.error(model), "iou": study.iou(model)}
    return out | {"parameters": parameters(model), "macs": cost(model)}


def cost(model: nn.Module) -> int:
    """Return multiply-accumulates of one canvas."""
    return macs(model, ((torch.zeros(1, 1, SIDE, SIDE),), {}))


def tuned(study: Study, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return a learning rate a way, the best of a few on a seed that nothing is judged by."""
    out, ratio, seed = {}, study.sizes.ratios[-1], 100
    for how in ("alternate", "at once", "scratch"):
        errors = {}
        for lr in study.sizes.rates:
            if len(study.sizes.rates) == 1:
                errors[lr] = 0.0
                continue
            if how == "scratch":
                slim = copy.deepcopy(study.encoder)
                SlimSAM(ratio, ratio).attach(slim).observe(study.calls(seed))
                model = scratch(study, slim, seed, lr)
            else:
                model, _ = slimmed(study, how, DisturbedTaylor(seed=seed), ratio, seed, lr)
            errors[lr] = study.error(model)
            rows.append({"part": "tuning", "variant": how, "lr": lr, "error": errors[lr]})
        out[how] = min(errors, key=lambda rate: errors[rate])
    return out


def claims_of(
    table: Mapping[tuple[float, str], Sequence[Mapping[str, Any]]], sizes: Sizes
) -> list[Claim]:
    """Return the claims: orderings of mean errors, and of what is left of segmentation."""

    def mean(ratio: float, name: str, what: str = "error") -> float:
        return statistics.fmean(r[what] for r in table[ratio, name])

    def wins(ratio: float, rival: str) -> str:
        pairs = zip(table[ratio, ours], table[ratio, rival], strict=True)
        return f"{sum(a['error'] < b['error'] for a, b in pairs)} of {len(sizes.seeds)} seeds"

    ours, out = "alternate, disturbed Taylor", []
    for ratio in sizes.ratios:
        rivals = [name for share, name in table if share == ratio and name != ours]
        for rival in rivals:
            a, b = mean(ratio, ours), mean(ratio, rival)
            out.append(
                Claim(
                    f"{ratio:.0%} of every width pruned, {ours} leaves a lower error than {rival} "
                    f"({wins(ratio, rival)})",
                    b,
                    a,
                    "mean squared change of features over their variance",
                    "lower",
                    a < b,
                    "not lower in the mean over seeds",
                )
            )
        rival = "at once, disturbed Taylor"
        a, b = mean(ratio, ours, "iou"), mean(ratio, rival, "iou")
        statement = f"{ratio:.0%} of every width pruned, {ours} segments better than {rival}"
        out.append(Claim(statement, b, a, "mean IoU", "higher", a > b))
        for rival in ("alternate, magnitude", "alternate, random"):
            a, b = mean(ratio, ours, "unhealed_error"), mean(ratio, rival, "unhealed_error")
            out.append(
                Claim(
                    f"{ratio:.0%} of every width pruned at once and not healed, disturbed Taylor "
                    f"leaves a lower error than {rival.removeprefix('alternate, ')}",
                    b,
                    a,
                    "mean squared change of features over their variance",
                    "lower",
                    a < b,
                )
            )
    if len(sizes.ratios) > 1:
        low, high = (
            mean(r, "at once, disturbed Taylor") - mean(r, ours)
            for r in (sizes.ratios[0], sizes.ratios[-1])
        )
        statement = "what alternating gains over pruning at once grows with the share pruned"
        unit = "difference of errors, at the larger and the smaller share"
        out.append(Claim(statement, low, high, unit, "higher", high > low))
    return out


def notes(sizes: Sizes, lr: Mapping[str, float]) -> str:
    """Return what a reader must know of the figures."""
    rates = ", ".join(f"{how} {rate:g}" for how, rate in lr.items())
    return (
        f"SamVisionEncoder, {sizes.blocks} blocks of width {sizes.width}, trained for "
        f"{sizes.training} steps on canvases of Fashion-MNIST (of rectangles in the smoke size); "
        f"{sizes.pool} unlabeled canvases, a quarter to score on, {2 * sizes.steps} healing "
        f"steps of 16 in all for every way; learning rates of a seed of its own: {rates}. "
        "Mean IoU is of pixel classes, "
        "with the head of the original."
    )


# ---- the encoder and its canvases


def trained(scale: Scale, sizes: Sizes) -> Study:
    """Return a trained encoder; seconds, a minute, three minutes."""
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    count = scale.pick(64, 2000, 4000)
    if scale.size == "smoke":
        canvases, labels = rectangles(count, 0)
        judged, truth = rectangles(32, 1)
    else:
        from effuse.house.debian import fashion

        data = fashion()
        canvases, labels = mosaic(data.train, data.train_labels, count, 0)
        judged, truth = mosaic(data.test, data.test_labels, 256, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SamVisionEncoder(
            SamVisionConfig(
                hidden_size=sizes.width,
                output_channels=32,
                num_hidden_layers=sizes.blocks,
                num_attention_heads=4,
                num_channels=1,
                image_size=SIDE,
                patch_size=PATCH,
                window_size=3,
                global_attn_indexes=list(range(1, sizes.blocks, 2)),
                mlp_dim=4 * sizes.width,
                num_pos_feats=8,
                initializer_range=0.05,
            )
        )
        head = nn.Sequential(
            nn.GELU(), nn.Conv2d(32, CLASSES * PATCH**2, 1), nn.PixelShuffle(PATCH)
        )
    rng = torch.Generator().manual_seed(0)
    both = nn.ModuleList([encoder, head])
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=sizes.training)
    for _ in range(sizes.training):
        picked = torch.randint(count, (32,), generator=rng)
        loss = F.cross_entropy(head(encoder(canvases[picked])[0]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    both.eval().requires_grad_(False)
    return Study(encoder, head, canvases, labels, judged, truth, sizes)


def mosaic(pictures: Tensor, kinds: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return canvases (N, 1, 56, 56) of four pictures each, mirrored at random, and classes."""
    rng = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(pictures), (count, 4), generator=rng)
    x = pictures[picked][:, :, 0].float() / 255  # (N, 4, 28, 28)
    flip = torch.rand(count, 4, 1, 1, generator=rng) < 0.5
    x = torch.where(flip, x.flip(-1), x)
    y = torch.where(x > 0.1, kinds[picked][:, :, None, None] + 1, 0)

    def joined(t: Tensor) -> Tensor:
        return torch.cat([torch.cat([t[:, 0], t[:, 1]], -1), torch.cat([t[:, 2], t[:, 3]], -1)], -2)

    return (joined(x)[:, None] - 0.3) / 0.35, joined(y)


def rectangles(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return canvases (N, 1, 56, 56) with a rectangle each, and classes by its brightness."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.randint(4, SIDE // 2, (count, 4), generator=rng)
    kinds = torch.randint(1, CLASSES, (count,), generator=rng)
    at = torch.arange(SIDE)
    rows = (at >= ends[:, :1]) & (at < ends[:, :1] + ends[:, 2:3])
    columns = (at >= ends[:, 1:2]) & (at < ends[:, 1:2] + ends[:, 3:])
    y = kinds[:, None, None] * (rows[:, :, None] & columns[:, None])
    return (y.float() / CLASSES)[:, None], y
