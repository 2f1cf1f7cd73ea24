"""Larger pictures from a pipeline trained on small ones: enlarge, spoil to some depth, sample back.

pictures = effuse.wrap(pipe).sample(prompts)
LinearizeAttention... on pipe.unet, where the canvas is large
large = upscale(pipe, pictures, prompts, 4 * 64, guidance=4.0)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.bridge.pipeline import wrap
from effuse.control.guide import Guide
from effuse.core import Denoiser
from effuse.core.clip import Clipped
from effuse.core.errors import check_whole
from effuse.solvers import DDIM

from .edit import rows_of
from .editor import Editor
from .sdedit import SDEdit


@torch.no_grad()
def upscale(
    pipe: Any,
    pictures: Tensor,
    what: str | Sequence[str] | Sequence[int] | int | None,
    size: int | tuple[int, int],
    *,
    editor: Editor | None = None,
    guidance: float = 1.0,
    negative: str | Sequence[str] | None = None,
    tokens: int | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Return pictures of another size, (B, 3, H, W) in [0, 1], with detail the pipeline adds.

    x = alpha_L encode(bicubic(pictures)) + sigma_L z, sampled to clean data: SDEdit. The level L
    keeps what is where; the deeper it is, the more the pipeline makes up, and the more it repeats
    objects, since it was trained on small pictures.

    Args:
        pipe: what `effuse.wrap` takes.
        pictures: (B, 3, h, w) in [0, 1].
        what: a prompt or label for all or one a picture; None the empty prompt.
        size: (height, width) in pixels.
        editor: SDEdit of depth 0.5 with deterministic steps, 20 levels of a whole walk, if not
            given.
        guidance: diffusers' scale, 1 for none. Its two halves run one after the other, which takes
            half the memory of a double batch.
        negative: prompts to keep away from; the empty one where guidance asks for some.
        tokens: feed-forward layers take so many at once, see `chunked`; None takes all.
        rng: of the noise.

    Raises:
        ValueError: pictures of another shape, or a size that the pipeline cannot make.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures of shape {tuple(pictures.shape)}: expected (B, 3, h, w)")
    model = wrap(pipe).at(size)
    editor = SDEdit(depth=0.5, levels=20, solver=DDIM()) if editor is None else editor
    sides = (size, size) if isinstance(size, int) else size
    large = F.interpolate(pictures.float(), sides, mode="bicubic", antialias=True).clamp(0, 1)
    latents = model.codec.encode(large.to(model.device))
    cond = model.embed(rows_of(model, what, len(pictures)), negative, guided=guidance != 1)
    denoiser: Denoiser
    if guidance == 1:
        denoiser = model.denoiser.given(**cond)
    else:
        weak = cond.pop("negative")
        denoiser = Guide(model.bare.given(**cond), model.bare.given(**weak), guidance)
        if model.schedule.clip is not None:
            denoiser = Clipped(denoiser, model.schedule.clip)
    with contextlib.nullcontext() if tokens is None else chunked(model.network, tokens):
        x = editor(denoiser, latents, rng=rng).x
    return model.codec.decode(x).clamp(0, 1)


@contextlib.contextmanager
def chunked(network: nn.Module, tokens: int) -> Iterator[None]:
    """Let the feed-forward layers of a diffusers network take `tokens` at once while inside.

    They look at each token alone, so the answer is the same but for rounding, and the memory of
    their inner layer, the widest of a block, stays that of `tokens`.
    """
    check_whole("tokens", tokens, 1)
    layers: list[Any] = [m for m in network.modules() if type(m).__name__ == "FeedForward"]

    def split(whole: Any) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = hidden_states.split(tokens, dim=-2)
            return torch.cat([whole(part, *args, **kwargs) for part in parts], dim=-2)

        return forward

    for layer in layers:
        layer.forward = split(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
