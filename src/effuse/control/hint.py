"""A picture as a condition: a ControlNet beside the network of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.bridge.pipeline import Wrapped


@dataclass(frozen=True, eq=False)
class Hint:
    """A ControlNet and what it is shown.

    controlnet: a diffusers ControlNetModel for the pipeline's UNet2DConditionModel. picture:
    (3, H, W), or (B, 3, H, W) one a sample, in [0, 1]: edges, depth, ..., as it was trained.
    scale: of its residuals; 0 is the plain network.
    """

    controlnet: nn.Module
    picture: Tensor
    scale: float = 1.0

    def on(self, model: Wrapped) -> Wrapped:
        """Return the pipeline with the ControlNet beside its network; nothing is copied.

        Raises:
            TypeError: no UNet2DConditionModel, or no ControlNetModel. ValueError: no such picture.
        """
        from diffusers import ControlNetModel, UNet2DConditionModel

        if not isinstance(model.network, UNet2DConditionModel):
            raise TypeError(
                f"{type(model.network).__name__}: a hint needs a pipeline around a "
                "UNet2DConditionModel, such as Stable Diffusion or house:emoji"
            )
        if not isinstance(self.controlnet, ControlNetModel):
            raise TypeError(f"{type(self.controlnet).__name__}: expected a ControlNetModel")
        shown = self.picture if self.picture.ndim == 4 else self.picture[None]
        if shown.ndim != 4 or shown.shape[1] != 3 or shown.min() < 0 or shown.max() > 1:
            raise ValueError(
                f"a hint of shape {tuple(self.picture.shape)} from {self.picture.min():g} to "
                f"{self.picture.max():g}: expected (3, H, W) in [0, 1]"
            )
        factor = model.codec.factor
        size = [side * factor for side in model.shape[1:]]
        if list(shown.shape[2:]) != size:
            shown = F.interpolate(shown, size, mode="bilinear", antialias=True)
        beside = Hinted(model.network, self.controlnet, shown, self.scale)
        return replace(model, network=beside)


class Hinted(nn.Module):
    """A UNet with the residuals of a ControlNet, called as the UNet is.

    Args:
        unet, controlnet: as in `Hint`. shown: (1, 3, H, W) or (B, 3, H, W). scale: of residuals.
    """

    def __init__(self, unet: Any, controlnet: Any, shown: Tensor, scale: float):
        super().__init__()
        self.unet, self.controlnet, self.scale = unet, controlnet, scale
        self.shown: Tensor
        self.register_buffer("shown", shown, persistent=False)

    @property
    def config(self) -> Any:
        """The network's own config."""
        return self.unet.config

    def forward(self, sample: Tensor, timestep: Any, **told: Any) -> Any:
        """See UNet2DConditionModel.forward."""
        if len(self.shown) not in (1, len(sample)):
            raise ValueError(
                f"{len(self.shown)} hints for {len(sample)} samples: expected one, or as many"
            )
        keys = ("encoder_hidden_states", "class_labels", "added_cond_kwargs")
        like = next(self.controlnet.parameters())
        down, mid = self.controlnet(
            sample.to(like),
            timestep,
            controlnet_cond=self.shown.to(like).expand(len(sample), -1, -1, -1),
            conditioning_scale=self.scale,
            return_dict=False,
            **{k: _as(told[k], like) for k in keys if told.get(k) is not None},
        )
        return self.unet(
            sample,
            timestep,
            down_block_additional_residuals=tuple(d.to(sample) for d in down),
            mid_block_additional_residual=mid.to(sample),
            **told,
        )


def _as(value: Any, like: Tensor) -> Any:
    if isinstance(value, dict):
        return {k: _as(v, like) for k, v in value.items()}
    return value.to(like) if torch.is_floating_point(value) else value
