"""Pictures through an editor, on any pipeline that `wrap` knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effuse.bridge.families import Prompts, Texts
from effuse.bridge.pipeline import Guided, Wrapped
from effuse.core import Denoiser, Prediction, Time

from .editor import Band, Editor, Latents


@dataclass(frozen=True)
class Edited:
    """An edit: pictures (B, 3, H, W) in [0, 1], the sample they were decoded from, and its trace.

    sample: (B, C, h, w). latents: those of every level, if the editor encodes. calls: how often the
    denoiser was called; under guidance a call takes a double batch.
    """

    pictures: Tensor
    sample: Tensor
    latents: Latents | None
    calls: int


class _Counted(Denoiser):
    """A denoiser that tells of each call, which one it is."""

    def __init__(self, base: Denoiser, tell: Callable[[], None]):
        super().__init__()
        self.base, self.tell, self.process = base, tell, base.process

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        self.tell()
        return self.base(x, t, **cond)


def check_pictures(pictures: Tensor) -> None:
    """Raise unless these are floating-point pictures, (B, 3, H, W) in [0, 1]."""
    if not pictures.is_floating_point():
        raise ValueError(
            f"pictures are {pictures.dtype}: expected floating point in [0, 1], divide by 255"
        )
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.numel():
        said = ": lay alpha on a background first" if pictures.shape[1:2] == (4,) else ""
        raise ValueError(f"pictures of shape {tuple(pictures.shape)}: expected (B, 3, H, W){said}")
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"pictures run from {low:g} to {high:g}: expected values in [0, 1]")


@torch.no_grad()
def edit(
    model: Wrapped,
    pictures: Tensor,
    editor: Editor,
    what: Prompts | Sequence[int] | int | None = None,
    *,
    guidance: float = 1.0,
    negative: Prompts | None = None,
    rng: torch.Generator | None = None,
    on_call: Callable[[int, int], None] | None = None,
) -> Edited:
    """Edit pictures.

    Args:
        model: `effuse.wrap(pipeline)`.
        pictures: (B, 3, H, W) in [0, 1], of any size the network takes.
        editor: `CODE(...)`, `SDEdit(...)`.
        what: a prompt or label for all or one a picture. Left out: the empty prompt; nothing for
            an unconditional pipeline.
        guidance: diffusers' scale, 1 for none. An editor that encodes does so unguided, as guided
            inversion does not come back.
        negative: prompts to keep away from, under guidance.
        rng: draws all noise.
        on_call: called after each call of the denoiser with their number so far and in all.

    Raises:
        ValueError: no such pictures; or a band of pixels on latents; or a prompt too many.
    """
    check_pictures(pictures)
    blind = any(isinstance(b, Band) and b.low is None for b in editor.bands)
    if blind and model.codec.vae is not None:
        raise ValueError(
            "a band without a range on a pipeline that works on latents: expected "
            "Band.of(model.codec.encode(pictures)) on pictures that are whole, or low and high"
        )
    height, width = pictures.shape[-2:]
    model = model.at((height, width))
    what = rows_of(model, what, len(pictures))
    guided, told = model.family.guides(model, guidance, True)
    if negative is not None and not guided:
        raise ValueError(f"negative prompts at guidance {guidance:g}: expected a scale above 1")
    cond = model.embed(what, negative, guided=True) if guided else model.embed(what)
    plain = {k: v for k, v in cond.items() if k != "negative"} | told
    done, total = 0, editor.calls(model.process)

    def tell() -> None:
        nonlocal done
        done += 1
        if on_call is not None:
            on_call(done, total)

    bare: Denoiser = model.bare
    if guided:
        denoiser = model.guide(guidance) if editor.clipped else Guided(bare, guidance)
        denoiser = denoiser.given(**plain, negative={**cond["negative"], **told})
    else:
        denoiser = (model.denoiser if editor.clipped else bare).given(**plain)
    encoder = bare.given(**plain)
    x = model.codec.encode(pictures.float().to(model.device))
    out = editor(_Counted(denoiser, tell), x, rng=rng, encoder=_Counted(encoder, tell))
    shown = model.codec.decode(out.x).clamp(0, 1)
    return Edited(shown, out.x, out.latents, done)


def rows_of(model: Wrapped, what: Any, count: int) -> Any:
    """Return the conditions asked for, one a picture."""
    if what is None:
        return [""] * count if isinstance(model.family, Texts) else count
    if isinstance(what, (str, int)):
        return [what] * count
    what = what.tolist() if isinstance(what, Tensor) else list(what)
    if len(what) not in (1, count):
        raise ValueError(f"{len(what)} prompts for {count} pictures: expected one, or as many")
    return what * count if len(what) == 1 else what
