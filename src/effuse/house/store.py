"""From the files of the package to pipelines: what they share is stored once."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import CLIPModel, CLIPTokenizer

    from effuse.restore.reverting import Restorer

WEIGHTS = Path(__file__).parent / "weights"
"""One folder a part: autoencoder, clip, emoji, emoji-dit, pixels, restore; card.json; reference."""


def part(name: str, *inside: str) -> Path:
    """Return the folder of a part's weights, or complain with what to do."""
    folder = WEIGHTS.joinpath(name, *inside)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the weights of house:{name} are not in this installation ({folder}); "
            f"train them with: effuse train house:{name}"
        )
    return folder


def card() -> dict[str, Any]:
    """Return card.json: measured figures, licenses, and size and hash of each file."""
    return json.loads((WEIGHTS / "card.json").read_text())


class ImageText(NamedTuple):
    """house:clip: the model, its tokenizer, and scores from plain tensors."""

    model: CLIPModel
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, 128) of images: (B, 3, H, W) in [0, 1]."""
        x = prepare(images).to(self.model.dtype)
        parts = [self.model.get_image_features(pixel_values=some) for some in x.split(64)]
        return F.normalize(torch.cat([_pooled(p) for p in parts]).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Return unit vectors (B, 128) of texts."""
        words = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        parts = [self.model.get_text_features(input_ids=w) for w in words.input_ids.split(256)]
        return F.normalize(torch.cat([_pooled(p) for p in parts]).float(), dim=-1)

    def score(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return the cosine (B,) of each picture with its own text."""
        return (self.image_features(images) * self.text_features(texts)).sum(-1)


def _pooled(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output


def prepare(images: Tensor) -> Tensor:
    """Return (B, 3, 64, 64) in [-1, 1] of images: (B, 3, H, W) in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) in [0, 1]")
    x = images.float()
    if x.shape[-2:] != (64, 64):
        x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    return x * 2 - 1


def image_text(dtype: torch.dtype | None = None) -> ImageText:
    """Return house:clip, ready to judge."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = part("clip")
    model = CLIPModel.from_pretrained(folder, dtype=dtype or torch.float32).eval()
    return ImageText(model, CLIPTokenizer.from_pretrained(folder))


@lru_cache(maxsize=1)
def _classes() -> dict[int, str]:
    return {
        int(k): v for k, v in json.loads((part("emoji-dit") / "classes.json").read_text()).items()
    }


def pipeline(name: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Return a house pipeline; see `effuse.house.load`."""
    dtype = dtype or torch.float32
    makers = {"emoji": _emoji, "emoji-dit": _emoji_dit, "pixels": _pixels}
    if name not in makers:
        raise ValueError(f"house:{name}: expected one of {', '.join('house:' + n for n in makers)}")
    pipe = makers[name](dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _autoencoder(dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(part("autoencoder"), torch_dtype=dtype)


def _emoji(dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTokenizer

    unet = UNet2DConditionModel.from_pretrained(part("emoji", "unet"), torch_dtype=dtype)
    return StableDiffusionPipeline(
        vae=_autoencoder(dtype),
        text_encoder=CLIPModel.from_pretrained(part("clip"), dtype=dtype).text_model,
        tokenizer=CLIPTokenizer.from_pretrained(part("clip")),
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(part("emoji", "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _emoji_dit(dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    folder = part("emoji-dit", "transformer")
    return DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(folder, torch_dtype=dtype),
        vae=_autoencoder(dtype),
        scheduler=DDIMScheduler.from_pretrained(part("emoji-dit", "scheduler")),
        id2label=_classes(),
    )


def _pixels(dtype: torch.dtype) -> DiffusionPipeline:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    return DDPMPipeline(
        unet=UNet2DModel.from_pretrained(part("pixels", "unet"), torch_dtype=dtype),
        scheduler=DDPMScheduler.from_pretrained(part("pixels", "scheduler")),
    )


def restorer(dtype: torch.dtype | None = None) -> Restorer:
    """Return house:restore; see `effuse.house.restorer`."""
    from diffusers import UNet2DModel

    from effuse.house import models
    from effuse.restore.reverting import Beside, OfVelocity, Restorer

    folder = part("restore", "unet")
    unet = UNet2DModel.from_pretrained(folder, torch_dtype=dtype or torch.float32)
    return Restorer(Beside(unet.eval()), models.restoring(), OfVelocity())
