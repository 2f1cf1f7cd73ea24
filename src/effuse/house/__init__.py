"""The house: small pipelines of real diffusers classes, trained by this project, in the package.

    pipe = effuse.house.load("emoji")                  # a stock StableDiffusionPipeline
    model, tokenizer = effuse.house.clip()             # the image-text model behind it
    effuse.house.train("emoji", minutes=80)            # how the weights came about

Importing this costs nothing: diffusers and transformers are imported when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effuse.house.examples import Prompt, prompts

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline

    from effuse.house.real import Reference
    from effuse.house.store import ImageText
    from effuse.restore.reverting import Restorer

__all__ = [
    "Prompt",
    "card",
    "clip",
    "load",
    "names",
    "prepare",
    "prompts",
    "reference",
    "restorer",
    "train",
]


def names() -> tuple[str, ...]:
    """Return what `train` knows; `load` knows the three that draw pictures."""
    return ("autoencoder", "clip", "emoji", "emoji-dit", "pixels", "restore")


def load(name: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Return a house pipeline, fresh, on the CPU.

    Args:
        name: "emoji" (StableDiffusionPipeline), "emoji-dit" (DiTPipeline) or "pixels"
            (DDPMPipeline), with or without "house:" before it.
        dtype: of the weights, float32 by default; they are stored in float16.

    Raises:
        ValueError: there is no pipeline of this name.
        FileNotFoundError: its weights are not in this installation.
    """
    from effuse.house.store import pipeline

    return pipeline(name.removeprefix("house:"), dtype)


def clip(dtype: torch.dtype | None = None) -> ImageText:
    """Return (CLIPModel, CLIPTokenizer), also as `.model` and `.tokenizer`, with scoring."""
    from effuse.house.store import image_text

    return image_text(dtype)


def restorer(dtype: torch.dtype | None = None) -> Restorer:
    """Return house:restore: it takes grain, blur, rain and holes out of pictures in [0, 1].

    `restorer().restore(pictures, steps=10, rng=rng)`; see `effuse.restore.reverting.Restorer`.

    Raises:
        FileNotFoundError: its weights are not in this installation.
    """
    from effuse.house.store import restorer as _restorer

    return _restorer(dtype)


def prepare(images: torch.Tensor) -> torch.Tensor:
    """Return pictures as `clip` wants them: (B, 3, H, W) in [0, 1] to (B, 3, 64, 64) in [-1, 1]."""
    from effuse.house.store import prepare as _prepare

    return _prepare(images)


def reference() -> Reference:
    """Return features of real pictures, so that measuring needs no data set."""
    from effuse.house.real import load as _load

    return _load()


def card() -> dict[str, Any]:
    """Return the measured figures, licenses and hashes of the weights."""
    from effuse.house.store import card as _card

    return _card()


def train(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Train one of `names`, resuming where an earlier run in the same folder stopped.

    Args:
        name: with or without "house:". "emoji" and "emoji-dit" stand on "autoencoder", "emoji"
            on "clip" too: those of the package are taken, or those in the folder beside `out`.
        out: where checkpoint, log.jsonl and the finished weights go; by default in the user's
            cache.
        minutes: how long; the learning rate follows the clock. If neither this nor `steps` is
            given: as long as the weights of the package were trained.
        steps: how long, in steps; such a run is deterministic.
        seed: of weights, batches and noise.
        progress: show a bar.

    Returns:
        The folder with the finished weights, float16, as diffusers saves them.
    """
    from effuse.house.training import train as _train

    return _train(
        name.removeprefix("house:"),
        out=out,
        minutes=minutes,
        steps=steps,
        seed=seed,
        progress=progress,
    )
