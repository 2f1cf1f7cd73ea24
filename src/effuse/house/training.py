"""How the weights of the house are made: six jobs, each through the one training loop.

autoencoder -> (latents) -> emoji, emoji-dit
clip -> (text states) -> emoji
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.core.contracts import Objective
from effuse.core.files import claimed, write_whole
from effuse.core.training import fit
from effuse.house import data, degrade, models, objectives, store
from effuse.house.optimizer import MatrixAdam, groups
from effuse.restore.reverting import Beside

Batch = Callable[[torch.Generator], Mapping[str, Any]]


@dataclass
class Job:
    """One thing to train.

    objective, batches, optimizer: as `fit` takes them; finish: writes the trained student into a
    folder; minutes: what the weights of the package took; ema: decay of the average;
    hold: share of the run at full learning rate; clock: share of the run that is done, which the
    batches may read.
    """

    objective: Objective
    batches: Batch
    optimizer: torch.optim.Optimizer
    finish: Callable[[Path], None]
    minutes: float
    ema: float
    hold: float = 0.0
    clock: dict[str, float] = field(default_factory=lambda: {"share": 0.0})


def train(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    batch: int | None = None,
    pictures: data.Pictures | None = None,
) -> Path:
    """Train `name`; see `effuse.house.train`.

    Args:
        name: as there.
        out: as there.
        minutes: as there.
        steps: as there.
        seed: as there.
        progress: as there.
        batch: pictures a step, if not the usual number.
        pictures: what to learn from, if not the pictures of the house.
    """
    jobs = {
        "autoencoder": _autoencoder,
        "clip": _clip,
        "emoji": _emoji,
        "emoji-dit": _emoji_dit,
        "pixels": _pixels,
        "restore": _restore,
    }
    if name not in jobs:
        raise ValueError(f"house:{name}: expected one of {', '.join('house:' + n for n in jobs)}")
    for word, value in (("minutes", minutes), ("steps", steps)):
        if value is not None and value <= 0:
            raise ValueError(f"{word}={value}: expected a positive number")
    folder = Path(out) if out else data.cache_folder() / "house" / "train" / name
    with claimed(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        job = jobs[name](folder, pictures or data.pictures(), batch)
        if minutes is None and steps is None:
            minutes = job.minutes
        _run(job, folder, minutes, steps, seed, progress)
    return folder


def _run(
    job: Job, folder: Path, minutes: float | None, steps: int | None, seed: int, progress: bool
) -> None:
    clock_file = folder / "clock.json"
    used = json.loads(clock_file.read_text())["seconds"] if minutes and clock_file.exists() else 0.0
    begun = time.perf_counter()
    total = 60 * minutes if minutes else math.inf

    def elapsed() -> float:
        return used + time.perf_counter() - begun

    def schedule(share: float) -> float:
        if minutes:
            share = max(share if steps else 0.0, elapsed() / total)
        warm = min(1.0, (share + 1e-3) / 0.03)
        down = max(0.0, (min(share, 1.0) - job.hold) / (1 - job.hold))
        return max(warm * (1 + math.cos(math.pi * down)) / 2, 0.002)

    checkpoint = folder / "checkpoint.pt"
    if steps and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        job.clock["share"] = state["step"] / steps
    elif minutes:
        job.clock["share"] = used / total

    def on_step(step: int, losses: Mapping[str, Any]) -> bool:
        job.clock["share"] = elapsed() / total if minutes else step / (steps or 1)
        if minutes and step % 50 == 0:
            write_whole(clock_file, json.dumps({"seconds": elapsed()}))
        return False

    done = fit(
        job.objective,
        job.batches,
        job.optimizer,
        steps=steps or 10**7,
        rng=torch.Generator().manual_seed(seed),
        schedule=schedule,
        minutes=max(minutes - used / 60, 0.01) if minutes else None,
        ema=job.ema,
        precision="bf16",
        folder=folder,
        save_every=250,
        progress=progress,
        on_step=on_step,
    )
    if done.ema is not None:
        done.ema.copy_to()
    job.objective.eval()
    job.finish(folder)


def save(model: Any, folder: Path) -> None:
    """Save a model, tokenizer or scheduler as its library does; networks in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        if isinstance(model, nn.Module):
            model = model.half()
        model.save_pretrained(room)
        for file in Path(room).iterdir():
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def _drawer(weight: np.ndarray) -> Callable[[torch.Generator, int], Tensor]:
    """Return a function that draws numbers of pictures by weight, with replacement."""
    cumulative = torch.from_numpy(weight).double().cumsum(0)
    cumulative /= cumulative[-1].clone()

    def draw(rng: torch.Generator, count: int) -> Tensor:
        u = torch.rand(count, generator=rng, dtype=torch.float64)
        return torch.searchsorted(cumulative, u, right=True).clamp(max=len(weight) - 1)

    return draw


def _pick(choices: list[list[int]], which: Tensor, rng: torch.Generator, best: float) -> Tensor:
    """Return a caption number for each picture: the first with probability `best`, else any."""
    u = torch.rand(len(which), generator=rng).tolist()
    out = []
    for k, v in zip(which.tolist(), u, strict=True):
        mine = choices[k]
        out.append(
            mine[0 if v < best else min(int((v - best) / (1 - best) * len(mine)), len(mine) - 1)]
        )
    return torch.tensor(out)


def _captions(pictures: data.Pictures) -> tuple[list[str], list[list[int]]]:
    texts = sorted({c for many in pictures.captions for c in many})
    number = {c: i for i, c in enumerate(texts)}
    return texts, [[number[c] for c in many] for many in pictures.captions]


# ------------------------------------------------------------------ autoencoder


def _autoencoder(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    student = models.autoencoder()
    images = torch.from_numpy(pictures.images)
    draw = _drawer(np.where(pictures.held, 0.0, np.where(pictures.toned, 0.15, 1.0)))
    clock, count = {"share": 0.0}, batch or 16

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        x = images[draw(rng, count)]
        if clock["share"] < 0.7:  # crops cost half and hold most of what is not white
            top, left = torch.randint(0, 17, (2,), generator=rng).tolist()
            x = x[:, :, top : top + 48, left : left + 48]
        x = x.float() / 127.5 - 1
        mirrored = torch.rand(count, generator=rng) < 0.5
        x[mirrored] = x[mirrored].flip(-1)
        return {"image": x}

    def finish(where: Path) -> None:
        fold_scale(student, images, torch.from_numpy(pictures.weight))
        save(student, where / "autoencoder")

    optimizer = torch.optim.AdamW(
        student.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    objective = objectives.Reconstruction(student)
    return Job(objective, batches, optimizer, finish, 16, 0.995, clock=clock)


@torch.no_grad()
def encode(autoencoder: Any, images: Tensor) -> Tensor:
    """Return the latents (N, 4, 16, 16), float32, of images: (N, 3, 64, 64) uint8."""
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for part in images.split(64):
            parts.append(autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean.float())
    return torch.cat(parts)


@torch.no_grad()
def fold_scale(autoencoder: Any, images: Tensor, weight: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1 over the pictures, inside the 1x1 layers.

    So `scaling_factor` is 1 and every pipeline is right: not all know `shift_factor`, and none a
    factor a channel.
    """
    z = encode(autoencoder, images)
    share = (weight / weight.sum()).float().reshape(-1, 1, 1, 1)
    mean = (z * share).sum(0).mean((1, 2))
    std = ((z - mean[:, None, None]).square() * share).sum(0).mean((1, 2)).sqrt()
    into, back, many = autoencoder.quant_conv, autoencoder.post_quant_conv, len(mean)
    into.weight[:many] /= std[:, None, None, None]
    into.bias[:many] = (into.bias[:many] - mean) / std
    into.bias[many:] -= 2 * std.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[None, :, None, None]


# ------------------------------------------------------------------ clip


def augment(x: Tensor, mirror: Tensor, rng: torch.Generator) -> Tensor:
    """Return x: (B, 3, H, W) uint8 moved, turned, scaled, lit, noised, blurred; in [-1, 1].

    mirror: (B,) bool, which may be mirrored. White comes in from outside.
    """
    count = len(x)

    def spread(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng) * 2 - 1

    x = x.float() / 255
    scale, turn = 1 + 0.2 * spread(count), 0.15 * spread(count)
    side = torch.where((torch.rand(count, generator=rng) < 0.5) & mirror, -1.0, 1.0)
    rows = (
        torch.stack([scale * side, turn * side, 0.15 * spread(count)], 1),
        torch.stack([-turn, scale, 0.15 * spread(count)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)
    x = x * (1 + 0.15 * spread(count, 1, 1, 1))
    level = 0.06 * torch.rand(count, 1, 1, 1, generator=rng)
    x = x + level * torch.randn(x.shape, generator=rng)
    soft = torch.rand(count, generator=rng) < 0.3
    x[soft] = F.avg_pool2d(F.pad(x[soft], (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x * 2 - 1


def _clip(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    texts, choices = _captions(pictures)
    tokenizer = models.tokenizer(texts, str(folder / "tokenizer"))
    student = models.clip(len(tokenizer), tokenizer.eos_token_id)
    student.set_attn_implementation("eager")  # on a CPU the fused backward pass is slow
    images, mirror = torch.from_numpy(pictures.images), torch.from_numpy(pictures.flips)
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    styled = torch.tensor([t.split()[0] in data.STYLES for t in texts])
    number = {b: i for i, b in enumerate(sorted(set(pictures.base)))}
    base = torch.tensor([number[b] for b in pictures.base])
    draw, count = _drawer(pictures.weight), batch or 128

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        which = draw(rng, count)
        caption = _pick(choices, which, rng, best=0.35)
        some = words[caption]
        longest = int((some != tokenizer.eos_token_id).sum(1).max()) + 1
        return {
            "image": augment(images[which], mirror[which], rng),
            "words": some[:, :longest],
            "base": base[which],
            "styled": styled[caption],
        }

    def finish(where: Path) -> None:
        save(student, where / "clip")
        save(tokenizer, where / "clip")
        shutil.rmtree(where / "tokenizer", ignore_errors=True)

    optimizer = MatrixAdam(groups(student), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.1)
    return Job(objectives.Contrastive(student), batches, optimizer, finish, 18, 0.99)


# ------------------------------------------------------------------ denoisers


def _stands_on(folder: Path, name: str) -> Path:
    """Return the part that a job needs: freshly trained beside its folder, else the package's."""
    fresh = folder.parent / name / name
    return fresh if fresh.is_dir() else store.part(name)


def _latents(folder: Path, pictures: data.Pictures) -> Tensor:
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(_stands_on(folder, "autoencoder")).float()
    return encode(autoencoder, torch.from_numpy(pictures.images))


def _matrices(name: str, p: Tensor) -> bool:
    """Say which weights of a denoiser go to Muon: linear and convolution, not the outer layers."""
    outer = ("embed", "proj_out", "conv_in", "conv_out", "patch")
    wide = p.ndim in (2, 4) and min(p.shape[0], p.numel() // p.shape[0]) >= 32
    return wide and not any(word in name for word in outer)


def _denoiser(student: nn.Module, objective: Objective, batches: Batch, part: str) -> Job:
    models.lean_attention(student)
    settings = {"emoji": models.scheduler, "emoji-dit": models.scheduler}
    scheduler = settings.get(part, models.pixel_scheduler)()
    inside = "transformer" if part == "emoji-dit" else "unet"

    def finish(where: Path) -> None:
        save(student, where / part / inside)
        save(scheduler, where / part / "scheduler")

    parameters = groups(student, _matrices)
    optimizer = MatrixAdam(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    minutes = {"emoji": 77.0, "emoji-dit": 45.0}.get(part, 10.0)
    return Job(objective, batches, optimizer, finish, minutes, 0.998, hold=0.3)


@torch.no_grad()
def _text_states(folder: Path, texts: list[str]) -> Tensor:
    """Return (N, L, width) bfloat16 states of texts, as the pipeline computes them."""
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(_stands_on(folder, "clip"))
    text = CLIPModel.from_pretrained(_stands_on(folder, "clip"), dtype=torch.float32).text_model
    words = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([text(input_ids=w)[0].bfloat16() for w in words.split(256)])


def _emoji(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    student = models.unet()
    texts, choices = _captions(pictures)
    states = _text_states(folder, ["", *texts])
    latents = _latents(folder, pictures)
    draw, count = _drawer(pictures.weight), batch or 64

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        which = draw(rng, count)
        caption = _pick(choices, which, rng, best=0.4) + 1
        caption[torch.rand(count, generator=rng) < 0.1] = 0  # for guidance
        return {"x0": latents[which], "encoder_hidden_states": states[caption].float()}

    objective = objectives.Velocity(student, models.scheduler().alphas_cumprod)
    return _denoiser(student, objective, batches, "emoji")


def _emoji_dit(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    student = models.dit()  # drops one class in ten itself, for guidance
    latents = _latents(folder, pictures)
    classes = torch.from_numpy(pictures.subgroup)
    draw, count = _drawer(pictures.weight), batch or 64

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        which = draw(rng, count)
        return {"x0": latents[which], "class_labels": classes[which]}

    objective = objectives.Velocity(student, models.scheduler().alphas_cumprod)
    job = _denoiser(student, objective, batches, "emoji-dit")
    plain = job.finish

    def finish(where: Path) -> None:
        plain(where)
        names = dict(enumerate(pictures.subgroups))
        write_whole(where / "emoji-dit" / "classes.json", json.dumps(names, indent=0) + "\n")

    job.finish = finish
    return job


def _pixels(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    student = models.pixels()
    images = F.avg_pool2d(torch.from_numpy(pictures.images).float(), 2) / 127.5 - 1
    draw, count = _drawer(pictures.weight), batch or 32

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        return {"x0": images[draw(rng, count)]}

    objective = objectives.Noise(student, models.pixel_scheduler().alphas_cumprod)
    return _denoiser(student, objective, batches, "pixels")


def _restore(folder: Path, pictures: data.Pictures, batch: int | None) -> Job:
    unet, images = models.restorer(), torch.from_numpy(pictures.images)
    draw = _drawer(np.where(pictures.held, 0.0, np.where(pictures.toned, 0.15, 1.0)))
    clock, count = {"share": 0.0}, batch or 16

    def batches(rng: torch.Generator) -> dict[str, Tensor]:
        x0 = images[draw(rng, count)].float() / 255
        mirrored = torch.rand(count, generator=rng) < 0.5
        x0[mirrored] = x0[mirrored].flip(-1)
        task = torch.randint(len(degrade.TASKS), (count,), generator=rng)
        mu = degrade.degrade(x0, task, rng)
        if clock["share"] < 0.8:  # damage is local: a crop costs a quarter and holds little white
            top, left = torch.randint(4, 29, (2,), generator=rng).tolist()
            x0, mu = (v[:, :, top : top + 32, left : left + 32] for v in (x0, mu))
        return {"x0": x0, "mu": mu}

    def finish(where: Path) -> None:
        save(unet, where / "restore" / "unet")

    objective = objectives.Restoration(Beside(unet), models.restoring())
    parameters = groups(unet, _matrices)
    optimizer = MatrixAdam(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    return Job(objective, batches, optimizer, finish, 30, 0.998, hold=0.3, clock=clock)
