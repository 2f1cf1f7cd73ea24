"""The networks that `wrap` knows: what each is told besides the sample and the level."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pipeline import Wrapped

Prompts = str | Sequence[str]


def listed(what: Any) -> Any:
    """Return prompts or labels as a list, a count as it is; none of them is an error."""
    if isinstance(what, bool) or (isinstance(what, int) and what < 1):
        raise ValueError(f"{what!r} samples: expected a positive count")
    if isinstance(what, int):
        return what
    if isinstance(what, str):
        return [what]
    out = what.tolist() if isinstance(what, Tensor) else list(what)
    if not out:
        raise ValueError("no prompts: expected at least one prompt or label")
    return out


def default_of(pipe: Any, name: str, otherwise: Any) -> Any:
    """Return the pipeline's own default of an argument, or `otherwise` if it has none such."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return otherwise if parameter is None else parameter.default


class Family:
    """What differs between the networks: conditions, guidance, the start of a sample's shape."""

    packed, patch = False, 1

    def embed(self, model: Wrapped, what: Any, negative: Any, guided: bool) -> dict[str, Any]:
        """Return the conditions; see `Wrapped.embed`."""
        raise NotImplementedError

    def guides(self, model: Wrapped, scale: float, asked: bool) -> tuple[bool, dict[str, Any]]:
        """Return whether a scale means two branches, and what the network is told of it."""
        return scale > 1, {}

    def side(self, pipe: Any, network: Any) -> Any:
        """Return the default side, or sides, of a sample."""
        return network.config.sample_size


class Pixels(Family):
    """UNet2DModel: unconditional, or with class labels."""

    def embed(self, model: Wrapped, what: Any, negative: Any, guided: bool) -> dict[str, Any]:
        """Return class labels, if the network has them."""
        if guided:
            raise ValueError(
                f"{type(model.pipe).__name__} has no unconditional branch: expected guidance=1 or "
                "None, and no negative prompt"
            )
        classes = model.config.num_class_embeds
        if classes is None:
            if not isinstance(what, int):
                raise ValueError(f"{what!r}: this pipeline is unconditional, expected a count")
            return {}
        return {"class_labels": _labels(what, classes, {}, model.device)}

    def guides(self, model: Wrapped, scale: float, asked: bool) -> tuple[bool, dict[str, Any]]:
        """Refuse any scale but one."""
        return scale != 1, {}


def _labels(what: Any, classes: int, names: Mapping[str, int], device: Any) -> Tensor:
    if isinstance(what, int):
        raise ValueError(f"{what} samples: expected a list of class labels in [0, {classes})")
    out = []
    for label in what:
        number = names.get(label, label)
        if not isinstance(number, int) or not 0 <= number < classes:
            known = f" or one of {list(names)[:5]} ..." if names else ""
            raise ValueError(f"label {label!r}: expected a number in [0, {classes}){known}")
        out.append(number)
    return torch.tensor(out, device=device)


class Classes(Family):
    """DiTTransformer2DModel: class labels, the one past the last is none."""

    patch = 2

    def embed(self, model: Wrapped, what: Any, negative: Any, guided: bool) -> dict[str, Any]:
        """Return class labels."""
        if negative is not None:
            raise ValueError("negative prompts: this pipeline knows class labels only")
        classes = model.config.num_embeds_ada_norm
        labels = _labels(what, classes, getattr(model.pipe, "labels", {}), model.device)
        out: dict[str, Any] = {"class_labels": labels}
        if guided:
            out["negative"] = {"class_labels": torch.full_like(labels, classes)}
        return out


class Texts(Family):
    """Prompts, through the pipeline's own `encode_prompt`."""

    def embed(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> dict[str, Any]:
        """Return what the network is told of the prompts."""
        if isinstance(what, int) or not all(isinstance(p, str) for p in what):
            raise ValueError(f"{what!r}: expected prompts, a string or a list of strings")
        if isinstance(negative, str):
            negative = [negative] * len(what)
        if negative is not None and len(negative) != len(what):
            raise ValueError(
                f"{len(negative)} negative prompts for {len(what)}: expected one, or as many"
            )
        missing = [n for n in ("text_encoder", "tokenizer") if getattr(model.pipe, n, None) is None]
        if missing:
            raise ValueError(
                f"the pipeline has no {' and no '.join(missing)}: load it whole, or make the "
                "conditions yourself"
            )
        with torch.no_grad():
            own, other = self.encode(model, what, negative, guided, **more)
        return {**own, "negative": other} if guided else own

    def encode(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the conditions of the prompts and of what to keep away from."""
        out = model.pipe.encode_prompt(what, model.device, 1, guided, negative, **more)
        return {"encoder_hidden_states": out[0]}, {"encoder_hidden_states": out[1]}

    def guides(self, model: Wrapped, scale: float, asked: bool) -> tuple[bool, dict[str, Any]]:
        """Tell a network with guidance distilled in; two branches for the others."""
        width = getattr(model.config, "time_cond_proj_dim", None)
        if width is None:
            return scale > 1, {}
        w = torch.tensor([float(scale) - 1])
        told = model.pipe.get_guidance_scale_embedding(w, embedding_dim=width)
        dtype = next(model.network.parameters()).dtype
        return False, {"timestep_cond": told.to(model.device, dtype)}


class TextsXL(Texts):
    """SDXL: pooled text and six numbers of size and crop besides."""

    def encode(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the conditions; see `Texts.encode`."""
        out = model.pipe.encode_prompt(
            prompt=what,
            device=model.device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            **more,
        )
        size = [side * model.codec.factor for side in model.shape[1:]]
        ids = torch.tensor([[*size, 0, 0, *size]] * len(what)).to(out[0])
        mine, other = (
            {
                "encoder_hidden_states": text,
                "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids},
            }
            for text, pooled in ((out[0], out[2]), (out[1], out[3]))
        )
        return mine, other


class TextsPixArt(Texts):
    """PixArt: masked T5 text, and the resolution for the 1024 pixel models."""

    patch = 2

    def encode(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the conditions; see `Texts.encode`."""
        text, mask, text_, mask_ = model.pipe.encode_prompt(
            what, guided, "" if negative is None else negative, device=model.device, **more
        )
        h, w = (side * model.codec.factor for side in model.shape[1:])
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.config.sample_size == 128:
            added["resolution"] = torch.tensor([[h, w]] * len(what)).to(text)
            added["aspect_ratio"] = torch.tensor([[h / w]] * len(what)).to(text)
        mine, other = (
            {
                "encoder_hidden_states": a,
                "encoder_attention_mask": b,
                "added_cond_kwargs": added,
            }
            for a, b in ((text, mask), (text_, mask_))
        )
        return mine, other


class TextsSD3(Texts):
    """SD3: three encoders and the pooled text of two."""

    patch = 2

    def encode(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the conditions; see `Texts.encode`."""
        more = {"prompt_2": None, "prompt_3": None, **more}
        text, text_, pooled, pooled_ = model.pipe.encode_prompt(
            what,
            device=model.device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            **more,
        )
        mine, other = (
            {"encoder_hidden_states": a, "pooled_projections": b}
            for a, b in ((text, pooled), (text_, pooled_))
        )
        return mine, other


class TextsFlux(Texts):
    """FLUX: the scale is told to the network; a negative prompt adds a true second branch."""

    packed, patch = True, 2

    def encode(
        self, model: Wrapped, what: Any, negative: Any, guided: bool, **more: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the conditions; see `Texts.encode`."""

        def one(prompts: Any) -> dict[str, Any]:
            text, pooled, ids = model.pipe.encode_prompt(
                prompts, more.get("prompt_2"), device=model.device, **_rest(more)
            )
            told = {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}
            if model.config.guidance_embeds:
                scale = default_of(model.pipe, "guidance_scale", 3.5)
                told["guidance"] = torch.full((len(prompts),), float(scale), device=model.device)
            return told

        return one(what), one(negative or [""] * len(what)) if guided else {}

    def guides(self, model: Wrapped, scale: float, asked: bool) -> tuple[bool, dict[str, Any]]:
        """Tell the network the scale."""
        if model.config.guidance_embeds:
            return False, {"guidance": torch.tensor([float(scale)], device=model.device)}
        # the pipeline's default belongs to the embedding: without one it means no guidance
        return asked and scale > 1, {}

    def side(self, pipe: Any, network: Any) -> Any:
        """Return the pipeline's own, the network has none."""
        return pipe.default_sample_size


def _rest(more: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in more.items() if k != "prompt_2"}


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Pixels(),
    "UNet2DConditionModel": Texts(),
    "DiTTransformer2DModel": Classes(),
    "PixArtTransformer2DModel": TextsPixArt(),
    "SD3Transformer2DModel": TextsSD3(),
    "FluxTransformer2DModel": TextsFlux(),
}
