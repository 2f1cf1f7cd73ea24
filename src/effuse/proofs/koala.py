"""Which feature heals a shortened UNet best: self-attention or another, all on one budget.

A teacher is trained on little pictures of one shape, color and place each, told by three words.
Students have one layer of two a stage, two transformer blocks of four at the bottom, no middle, and
the teacher's weights; they differ in what they are compared by.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.rewire.koala import (
    CrossAttention,
    Even,
    FeedForward,
    Koala,
    Last,
    Residual,
    Top,
)
from effuse.compress.units import macs
from effuse.core import sample
from effuse.core.contracts import Denoiser, Prediction
from effuse.core.training import fit, warmup_cosine
from effuse.ops import expand_as
from effuse.ops.stats import paired
from effuse.ops.transport import sliced_wasserstein2
from effuse.processes import Cosine
from effuse.solvers import DDIM

from . import Claim, Evidence, Scale, proof

SIDE = 16
SHAPES, COLORS, PLACES = 3, 3, 4
WIDTH = 32


def scenes() -> tuple[Tensor, Tensor]:
    """Return all pictures (N, 3, 16, 16) in [-1, 1] and their words (N, 3): shape, color, place."""
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    pictures, words = [], []
    for shape in range(SHAPES):
        for color in range(COLORS):
            for place in range(PLACES):
                dy, dx = y - (4.5 + 7 * (place // 2)), x - (4.5 + 7 * (place % 2))
                inside = (
                    (dx.square() + dy.square() < 3.2**2, (dx.abs() < 3) & (dy.abs() < 3))[shape]
                    if shape < 2
                    else (dx.abs() < 1.2) | (dy.abs() < 1.2)
                )
                inside &= (dx.abs() < 3.5) & (dy.abs() < 3.5)
                picture = torch.full((3, SIDE, SIDE), -1.0)
                picture[color][inside] = 1.0
                pictures.append(picture)
                words.append([shape, SHAPES + color, SHAPES + COLORS + place])
    return torch.stack(pictures), torch.tensor(words)


def network(rng: torch.Generator) -> Any:
    """Return a UNet in SDXL's layout: three stages of two layers, attention 0, 2 and 4 deep."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        return UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=3,
            out_channels=3,
            layers_per_block=2,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        )


@dataclass
class World:
    """The pictures, how words are told, and the process."""

    pictures: Tensor
    words: Tensor
    book: Tensor
    process: Cosine

    def batch(self, rng: torch.Generator, rows: int) -> dict[str, Any]:
        """Return a call at levels spread over the range, and the noise it should answer."""
        which = torch.randint(len(self.pictures), (rows,), generator=rng)
        t = (torch.arange(rows) + torch.rand(rows, generator=rng)) / rows
        noise = torch.randn(self.pictures[which].shape, generator=rng)
        x = self.process.corrupt(self.pictures[which], t, noise)
        text = self.book[self.words[which]]
        return {
            "call": ((x, 1000 * t), {"encoder_hidden_states": text}),
            "target": noise,
        }

    @torch.no_grad()
    def samples(self, model: nn.Module, scale: Scale) -> tuple[Tensor, Tensor]:
        """Return pictures of every scene from noise that depends on nothing else, and the words."""
        rng, steps = torch.Generator().manual_seed(77), scale.pick(1, 6, 8)
        words = self.words[:: scale.pick(6, 1, 1)]
        x = torch.randn(len(words), 3, SIDE, SIDE, generator=rng)
        denoiser = Answers(model, self.process, self.book[words])
        times = torch.linspace(0.995, 0.0, steps + 1, dtype=torch.float64)
        return sample(denoiser, DDIM(), x, times), words


class Answers(Denoiser):
    """The network as a denoiser of one batch of words."""

    def __init__(self, model: nn.Module, process: Cosine, text: Tensor):
        super().__init__()
        self.model, self.process, self.text = model, process, text

    def forward(self, x: Tensor, t: Any, **cond: Any) -> Prediction:
        """See `Denoiser.forward`."""
        level = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        noise = self.model(x.float(), 1000 * level, encoder_hidden_states=self.text).sample
        alpha, sigma = (expand_as(c(level), x) for c in (self.process.alpha, self.process.sigma))
        x0 = ((x - sigma * noise) / alpha).clamp(-1, 1)
        return Prediction(x0, (x - alpha * x0) / sigma)


def world() -> World:
    """Return the pictures with a vector of its own for every word."""
    pictures, words = scenes()
    rng = torch.Generator().manual_seed(1)
    book = torch.randn(SHAPES + COLORS + PLACES, WIDTH, generator=rng)
    return World(pictures, words, book, Cosine())


def taught(of: World, steps: int) -> nn.Module:
    """Train the teacher."""
    rng = torch.Generator().manual_seed(0)
    model = network(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    factor = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: warmup_cosine(0.05)(i / max(steps, 1))
    )
    for _ in range(steps):
        made = of.batch(rng, 16)
        args, words = made["call"]
        loss = (model(*args, **words).sample - made["target"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        factor.step()
    return model.eval().requires_grad_(False)


VARIANTS: dict[str, Koala] = {
    "no features": Koala(features=()),
    "last": Koala(features=(Last(),)),
    "residual": Koala(features=(Residual(),)),
    "cross-attention": Koala(features=(CrossAttention(),)),
    "feed-forward": Koala(features=(FeedForward(),)),
    "self-attention": Koala(),
    "self-attention, top blocks": Koala(copy=Top(), match=Top()),
    "self-attention, even blocks": Koala(copy=Even(), match=Even()),
}
"""What is compared; `Koala()` keeps and matches the first blocks."""


def figures(
    of: World, model: nn.Module, teacher: nn.Module, whole: Tensor, scale: Scale
) -> dict[str, Any]:
    """Return the error to the teacher on unseen noise, and how samples compare."""
    rng, errors = torch.Generator().manual_seed(12345), []
    for _ in range(scale.pick(1, 4, 6)):
        args, words = of.batch(rng, scale.pick(4, 36, 36))["call"]
        with torch.no_grad():
            apart = model(*args, **words).sample - teacher(*args, **words).sample
        errors.append(apart.square().flatten(1).mean(1))
    x, words = of.samples(model, scale)
    nearest = torch.cdist(x.flatten(1), of.pictures.flatten(1)).argmin(1)
    right = (of.words[nearest] == words).float()
    return {
        "errors": torch.cat(errors).double(),
        "attributes": float(right.mean()),
        "all_three": float(right.prod(1).mean()),
        "sliced_w2": sliced_wasserstein2(x.double(), whole.double()),
        "sample_error": float((x - whole).square().mean()),
    }


def healed(of: World, teacher: nn.Module, how: Koala, seed: int, steps: int) -> nn.Module:
    """Shorten a copy of the teacher and teach it."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    goal = how.attach(student).objective(copy.deepcopy(teacher))
    assert goal is not None
    fit(
        goal,
        lambda rng: of.batch(rng, 16),
        torch.optim.AdamW(goal.parameters_of("student"), lr=1e-3, weight_decay=0.0),
        steps=steps,
        rng=torch.Generator().manual_seed(seed),
        schedule=warmup_cosine(),
        progress=False,
    )
    return student.eval()


@proof("koala")
def prove(scale: Scale) -> Evidence:
    """Teach students by each kind of feature, as long and on the same batches."""
    of = world()
    teacher = taught(of, scale.pick(2, 60, 240))
    whole, _ = of.samples(teacher, scale)
    rows: list[dict[str, Any]] = []
    first = figures(of, teacher, teacher, whole, scale)
    rows.append({"variant": "teacher", **_plain(first)})
    errors: dict[str, list[Tensor]] = {}
    for what, how in VARIANTS.items():
        if scale.size == "smoke" and what not in ("no features", "last", "self-attention"):
            continue
        for seed in scale.seeds[:2]:
            student = healed(of, teacher, how, seed, scale.pick(1, 8, 25))
            found = figures(of, student, teacher, whole, scale)
            errors.setdefault(what, []).append(found["errors"])
            rows.append({"variant": what, "seed": seed, **_plain(found)})
    call = of.batch(torch.Generator().manual_seed(0), 1)["call"]
    small = copy.deepcopy(teacher)
    handle = Koala().attach(small)
    rows.append(
        {
            "variant": "unhealed",
            **_plain(figures(of, small, teacher, whole, scale)),
            "parameters_kept": handle.report()["kept"],
            "macs_kept": macs(small, call) / macs(teacher, call),
        }
    )
    kinds = ("last", "residual", "cross-attention", "feed-forward")
    compared = [("self-attention", rival) for rival in ("no features", *kinds)]
    compared += [(what, "no features") for what in kinds]
    compared += [("self-attention", f"self-attention, {other} blocks") for other in ("top", "even")]
    claims = [_claim(a, b, errors) for a, b in compared if a in errors and b in errors]
    return Evidence(
        claims,
        rows,
        "A UNet2DConditionModel in SDXL's layout, three stages of two layers, attention 0, 2 and 4 "
        "blocks deep; students keep one layer, two blocks at most and no middle. All learn for as "
        "many steps on the same batches, at one rate. errors are of the answer, to the teacher's, "
        "on unseen noise; "
        "attributes are those of the nearest of all pictures. A network this small need not tell "
        "kinds of features apart as SDXL does. Healing house:emoji is in the evidence of healing.",
    )


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "errors": float(found["errors"].mean())}


def _claim(ours: str, theirs: str, errors: Mapping[str, Sequence[Tensor]]) -> Claim:
    """Ours is lower: by the interval over rows of the mean over seeds, paired."""
    a, b = (torch.stack(list(errors[k])).mean(0) for k in (ours, theirs))
    _, interval = paired(a, b)
    return Claim(
        f"taught by {ours} a student ends closer to its teacher than by {theirs}",
        float(b.mean()),
        float(a.mean()),
        "mean squared difference of answers",
        "lower",
        interval[1] < 0,
        f"{theirs} is as close",
        interval,
    )
