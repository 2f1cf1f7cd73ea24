"""Optimizers against each other: rates tuned on one grid and one seed, judged on other seeds."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from effuse.core.training import warmup_cosine
from effuse.ops.stats import paired

from . import Claim, Scale

Maker = Callable[..., Optimizer]
TUNING = 100
"""Seed of the tuning; what is judged has seeds from 0."""


@dataclass(frozen=True)
class Task:
    """Something to train.

    build(seed) -> network; loss(network, rng) -> scalar of a batch; judge(network, tuning) -> (N,)
    losses of pictures that are never trained on, others for the tuning than for the judging.
    """

    name: str
    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    judge: Callable[[nn.Module, bool], Tensor]
    steps: int


class Patches(nn.Module):
    """A small vision transformer: 16 patches of 7 x 7, two blocks, the mean of the tokens."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.cut = nn.Conv2d(1, width, 7, 7)
        self.place = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        block = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(block(width, 4, 2 * width) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 10) of x: (B, 1, 28, 28)."""
        h = self.cut(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(h).mean(1))


def conv(norms: bool = True) -> nn.Module:
    """Return a net of three convolutions, with BatchNorm after each or with none."""
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 16, 2), (16, 32, 2), (32, 48, 2)):
        layers += [nn.Conv2d(i, o, 3, stride, 1, bias=not norms)]
        layers += [nn.BatchNorm2d(o)] if norms else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 10))


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def clothes(scale: Scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pictures and classes of Fashion-MNIST to train on and to hold out; noise for smoke."""
    if scale.size == "smoke":
        rng = torch.Generator().manual_seed(0)
        x, y = torch.rand(512, 1, 28, 28, generator=rng), torch.randint(10, (512,), generator=rng)
        return x, y, x[:128], y[:128]
    from effuse.house.debian import fashion

    found, count = fashion(), scale.pick(0, 2000, 4000)
    train, test = (x.float() / 255 - 0.3 for x in (found.train[:20000], found.test[:count]))
    return train, found.train_labels[:20000], test, found.test_labels[:count]


def tasks(scale: Scale) -> list[Task]:
    """Return the conv net, the ViT, and house:pixels fine-tuned to draw clothes."""
    x, y, held, labels = clothes(scale)
    half = len(held) // 2

    def loss(model: nn.Module, rng: torch.Generator) -> Tensor:
        some = torch.randint(len(x), (64,), generator=rng)
        return F.cross_entropy(model(x[some]), y[some])

    def judge(model: nn.Module, tuning: bool) -> Tensor:
        part = slice(0, half) if tuning else slice(half, None)
        return F.cross_entropy(model(held[part]), labels[part], reduction="none")

    steps = scale.pick(3, 100, 400)
    out = [
        Task("conv net", partial(_seeded, conv), loss, judge, steps),
        Task("ViT", partial(_seeded, Patches), loss, judge, steps),
    ]
    if scale.size == "smoke":
        return out
    return [*out, denoiser(x, held, scale.pick(0, 20, 120))]


def denoiser(x: Tensor, held: Tensor, steps: int) -> Task:
    """Return the fine-tuning of house:pixels to clothes, by the error of its noise."""
    import effuse

    model = effuse.wrap(effuse.load("house:pixels"))
    start = {k: v.clone() for k, v in model.network.state_dict().items()}
    config = model.network.config
    side, channels = config["sample_size"], config["in_channels"]

    def batch(pictures: Tensor) -> Tensor:
        shown = F.interpolate(pictures + 0.3, size=side, mode="bilinear", antialias=True)
        return (2 * shown - 1).expand(-1, channels, -1, -1)

    def off(net: nn.Module, clean: Tensor, rng: torch.Generator) -> Tensor:
        if net is not model.network:
            raise ValueError("expected the network of the pipeline")
        t = 0.02 + 0.96 * torch.rand(len(clean), generator=rng)
        noise = torch.randn(clean.shape, generator=rng)
        found = model.bare(model.process.corrupt(clean, t, noise), t)
        return (found.noise - noise).square().mean((1, 2, 3))

    def build(seed: int) -> nn.Module:
        model.network.load_state_dict(start)
        model.network.requires_grad_(True)
        return model.network

    def loss(net: nn.Module, rng: torch.Generator) -> Tensor:
        some = torch.randint(len(x), (8,), generator=rng)
        return off(net, batch(x[some]), rng).mean()

    def judge(net: nn.Module, tuning: bool) -> Tensor:
        part = held[:32] if tuning else held[-32:]
        rng = torch.Generator().manual_seed(7)
        return torch.cat([off(net, batch(some), rng) for some in part.split(32)])

    return Task("house:pixels", build, loss, judge, steps)


def train(task: Task, make: Maker, lr: float, seed: int, tuning: bool = False) -> dict[str, Any]:
    """Train once with a cosine; return the losses held out, and what there is to look at."""
    model = task.build(seed)
    names = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    wide = {n: float(p.detach().norm()) for n, p in names if p.ndim > 1}
    optimizer = make([p for _, p in names], lr=lr)
    rng, factor = torch.Generator().manual_seed(1000 + seed), warmup_cosine(0.1)
    fired: list[float] = []
    model.train()
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(step / task.steps)
        optimizer.zero_grad()
        task.loss(model, rng).backward()
        optimizer.step()
        if hasattr(optimizer, "fired"):
            counts = optimizer.fired()
            fired.append(1 - counts["none"] / max(1, sum(counts.values())))
    model.eval()
    with torch.no_grad():
        found = task.judge(model, tuning)
    grown = [float(p.detach().norm()) / wide[n] for n, p in names if p.ndim > 1 and wide[n]]
    return {
        "losses": found.nan_to_num(1e3, 1e3, 1e3).clamp_max(1e3),
        "optimizer": optimizer,
        "model": model,
        "fired": statistics.mean(fired) if fired else None,
        "norm_growth": statistics.geometric_mean(grown),
        "state_bytes": state_bytes(optimizer),
    }


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the state, without the counts of steps."""
    tensors = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    return sum(v.nbytes if torch.is_tensor(v) else 8 for v in tensors)


def compare(
    task: Task, makers: Mapping[str, tuple[Maker, Sequence[float]]], seeds: Iterable[int]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Tune each maker's rate on the tuning seed, then train over `seeds`; rows, and their losses.

    The loss of a seed is the mean over the pictures held out; (seeds,) for each maker.
    """
    rows, losses = [], {}
    for name, (make, grid) in makers.items():
        told = {lr: float(train(task, make, lr, TUNING, True)["losses"].mean()) for lr in grid}
        lr = min(told, key=lambda rate: told[rate])
        runs = [train(task, make, lr, seed) for seed in seeds]
        losses[name] = torch.stack([run["losses"].mean() for run in runs]).double()
        last = runs[-1]
        rows.append(
            {
                "task": task.name,
                "optimizer": name,
                "lr": lr,
                "lr_at_the_edge_of_its_grid": lr in (min(grid), max(grid)),
                "tuning": {f"{rate:g}": loss for rate, loss in told.items()},
                "loss": float(losses[name].mean()),
                "losses": losses[name].tolist(),
                **{k: last[k] for k in ("fired", "norm_growth", "state_bytes")},
            }
        )
    return rows, losses


def close(statement: str, ours: Tensor, theirs: Tensor, task: str, slack: float = 0.05) -> Claim:
    """Claim that our loss is at most (1 + slack) of theirs."""
    a, b = float(ours.mean()), float(theirs.mean())
    _, interval = paired(ours, theirs)
    return Claim(
        f"{task}: {statement}",
        b,
        a,
        "loss held out",
        "lower",
        a <= (1 + slack) * b,
        f"a loss more than {100 * slack:g} % higher",
        interval if math.isfinite(interval[0]) else None,
    )


def small_tensors(count: int = 120) -> list[nn.Parameter]:
    """Return weights and biases as a small network has them: linear, convolution, vector."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((16, 16), (16, 4, 3, 3), (16,))
    out = [nn.Parameter(torch.randn(shapes[i % 3], generator=rng)) for i in range(count)]
    for p in out:
        p.grad = torch.randn(p.shape, generator=rng)
    return out


def speeds(makers: Mapping[str, Callable[..., Any]], rounds: int) -> dict[str, float]:
    """Return milliseconds of a step at 120 small tensors: the 10th percentile, interleaved."""
    optimizers = {name: make(small_tensors()) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds + 3):
        for name, optimizer in optimizers.items():
            begun = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: sorted(found[3:])[rounds // 10] for name, found in times.items()}


def peers(name: str) -> dict[str, Callable[..., Any]]:
    """Return pytorch_optimizer's own of this name, as it comes and with foreach, if installed."""
    if not importlib.util.find_spec("pytorch_optimizer"):
        return {}
    theirs: Any = getattr(importlib.import_module("pytorch_optimizer"), name)
    return {
        f"pytorch_optimizer's {name}": theirs,
        f"pytorch_optimizer's {name} foreach": partial(theirs, foreach=True),
    }


ADAM = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD = (1e-2, 3e-2, 1e-1, 3e-1)
"""Grids of rates; the middle of each is what nets of this size are usually trained at."""


def baselines() -> dict[str, tuple[Maker, Sequence[float]]]:
    """Return AdamW and SGD with momentum, with their grids."""
    return {
        "AdamW": (partial(torch.optim.AdamW, weight_decay=1e-2), ADAM),
        "SGD": (partial(torch.optim.SGD, momentum=0.9), SGD),
    }
