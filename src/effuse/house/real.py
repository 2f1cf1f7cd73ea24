"""What real pictures look like to two networks, shipped so that measuring needs no data set."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effuse.house import store

if TYPE_CHECKING:
    from pathlib import Path

    from effuse.house.data import Pictures

COUNT = 1500
"""Real pictures in the reference."""


@dataclass(frozen=True)
class Reference:
    """Features of real pictures, drawn once by their weight in training, without skin tones.

    features: (N, 1280) float32, EfficientNet-Lite0, of pictures 64 x 64 as `settings` says;
    clip: (N, 128) float32, unit vectors of the image tower of house:clip;
    captions, subgroups: N each; names: (name, subgroup) of every emoji, for `retrieval`.
    Even rows against odd rows give the floor of a distance between real and real.
    """

    features: Tensor
    clip: Tensor
    captions: list[str]
    subgroups: list[str]
    names: list[tuple[str, str]]
    settings: dict[str, Any]

    def moments(self, of: str = "features") -> tuple[Tensor, Tensor]:
        """Return mean (D,) and covariance (D, D), float64, of "features" or "clip"."""
        x = getattr(self, of).double()
        return x.mean(0), x.T.cov()

    def basis(self, size: int = 64, of: str = "features") -> tuple[Tensor, Tensor]:
        """Return mean (D,) and the first `size` principal axes (D, size), float64.

        Under some thousands of samples a covariance in 1280 dimensions is singular: project first.
        """
        mean, covariance = self.moments(of)
        return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :size]


@lru_cache(maxsize=1)
def load() -> Reference:
    """Return the reference of the package."""
    from safetensors.torch import load_file

    folder = store.part("reference")
    told = json.loads((folder / "reference.json").read_text())
    tensors = load_file(folder / "reference.safetensors")
    return Reference(
        tensors["features"].float(),
        tensors["clip"].float(),
        told["captions"],
        told["subgroups"],
        [(a, b) for a, b in told["names"]],
        told["settings"],
    )


def build(
    pictures: Pictures,
    features: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    folder: Path,
    count: int = COUNT,
) -> None:
    """Write the reference.

    Args:
        pictures: the real ones.
        features: from (B, 3, 64, 64) in [0, 1] to (B, 1280).
        settings: how `features` works, for the record.
        folder: where the files go.
        count: how many pictures.
    """
    from safetensors.torch import save_file

    weight = torch.from_numpy(pictures.weight) * ~torch.from_numpy(pictures.toned)
    rng = torch.Generator().manual_seed(0)
    some = torch.multinomial(weight, count, generator=rng).tolist()
    images = torch.from_numpy(pictures.images[some]).float() / 255
    with torch.no_grad():
        seen = torch.cat([features(part) for part in images.split(50)])
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"features": seen.half(), "clip": store.image_text().image_features(images).half()}
    draft = folder / "reference.draft"
    save_file(tensors, draft)
    draft.chmod(0o644)
    os.replace(draft, folder / "reference.safetensors")
    told = {
        "settings": settings,
        "captions": [pictures.captions[k][0] for k in some],
        "subgroups": [pictures.subgroups[pictures.subgroup[k]] for k in some],
        "names": every_name(pictures),
    }
    draft.write_text(json.dumps(told) + "\n")
    os.replace(draft, folder / "reference.json")


def every_name(pictures: Pictures) -> list[tuple[str, str]]:
    """Return (best name, subgroup) of every emoji, each name once."""
    out: dict[str, str] = {}
    for k, toned in enumerate(pictures.toned):
        if not toned:
            name = pictures.captions[k][0].split(" ", 1)[1]
            out.setdefault(name, pictures.subgroups[pictures.subgroup[k]])
    return sorted(out.items())


def retrieval(
    judge: store.ImageText,
    images: Tensor,
    subgroups: Sequence[str],
    names: Sequence[tuple[str, str]] | None = None,
) -> dict[str, float]:
    """Return how often the nearest of all names is of the right subgroup, with its 95 % interval.

    Args:
        judge: house:clip.
        images: (B, 3, H, W) in [0, 1].
        subgroups: B true ones.
        names: (name, subgroup) to choose from; by default those of the reference.
    """
    names = names if names is not None else load().names
    score = judge.image_features(images) @ judge.text_features([n for n, _ in names]).T
    nearest = [names[k][1] for k in score.argmax(1).tolist()]
    hit = sum(a == b for a, b in zip(nearest, subgroups, strict=True)) / len(subgroups)
    spread = 1.96 * math.sqrt(max(hit * (1 - hit), 1e-9) / len(subgroups))
    return {"subgroup_top1": hit, "half_width": spread, "count": len(subgroups)}
