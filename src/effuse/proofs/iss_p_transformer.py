"""Soft shrinkage on Swin2SR of transformers: windowed attention, photographs x2.

The network that the paper prunes is SwinIR-light; Swin2SR is its successor, here two stages of two
layers. The same crops, schedule and rivals as `iss_p`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import Evidence, Scale, proof
from .iss_p import Setting, claims_of, photographed, run


class Upscaler(nn.Module):
    """Swin2SR that adds to the bicubic picture and answers with a tensor."""

    def __init__(self, width: int = 36, depths: tuple[int, ...] = (2, 2)):
        super().__init__()
        from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

        self.net = Swin2SRForImageSuperResolution(
            Swin2SRConfig(
                image_size=24,
                patch_size=1,
                embed_dim=width,
                depths=list(depths),
                num_heads=[6] * len(depths),
                window_size=8,
                mlp_ratio=2.0,
                upscale=2,
                upsampler="pixelshuffledirect",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                drop_path_rate=0.0,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the picture, x: (B, 3, h, w) enlarged."""
        up = F.interpolate(x, scale_factor=2, mode="bicubic")
        out: Tensor = self.net(x).reconstruction
        return up + out - self.net.swin2sr.mean  # the mean color, which it adds in the end


def body(name: str, module: nn.Module) -> bool:
    """Prune attention, feed-forward and convolutions of the stages; head and tail stay dense."""
    return ".stages." in name and "position_bias" not in name


@proof("iss_p_transformer")
def prove(scale: Scale) -> Evidence:
    """Train all variants for equal steps; compare before and after the fine-tuning."""
    data, truth, what = photographed(scale)
    truth = truth[: scale.pick(4, 16, 96)]
    first, second = scale.pick(3, 40, 800), scale.pick(2, 20, 400)
    # of 0.5, 1, 2 and 4 thousandths the best for the dense network, on two of the photographs that
    # are learned from, after 240 steps
    setting = Setting(Upscaler, body, rate=2e-3, rows=scale.pick(2, 4, 4))
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, float], list[Tensor]] = {}
    for seed in range(200, 200 + scale.pick(1, 1, 2)):
        for kind in ("dense", "iss_p", "hard thresholding", "one-shot", "random mask"):
            share = 0.0 if kind == "dense" else 0.95
            row, each = run(kind, share, data, truth, seed, first, second, setting)
            rows.append(row)
            found.setdefault((kind, share), []).append(each)
    return Evidence(
        claims_of(rows, found, (0.95,)),
        rows,
        f"{what}Swin2SR of transformers, two stages of two layers of 36 channels, {first} steps of "
        f"shrinking and {second} of fine-tuning in batches of {setting.rows}; the paper trains "
        "300 000 iterations.",
    )
