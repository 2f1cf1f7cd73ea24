"""Pictures as tensors and as files."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image


def to_image(picture: Tensor) -> Image:
    """Return picture: (3, H, W) or (1, H, W) in [0, 1], as a Pillow image; values are cut."""
    from PIL import Image

    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"a picture of shape {tuple(picture.shape)}: expected (3, H, W)")
    levels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    levels = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    return Image.fromarray(levels.numpy(), "RGB")


def read_picture(
    file: str | Path,
    size: tuple[int, int] | None = None,
    *,
    background: tuple[float, float, float] | None = None,
) -> Tensor:
    """Return an image file as a picture, (3, H, W) float32 in [0, 1].

    Args:
        file: anything Pillow reads; its first frame.
        size: (height, width) to resample to with Lanczos, of the same shape; None keeps its own.
        background: color in [0, 1] under what is transparent.

    Raises:
        ValueError: no such picture; sides in another ratio than those of `size`; transparency
            without a background; more than 8 bits a channel.
    """
    import numpy as np
    from PIL import Image

    file = Path(file)
    try:
        image: Image.Image = Image.open(file)
        image.load()
    except FileNotFoundError as error:
        raise ValueError(f"{file}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{file}: not a picture that can be read: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{file}: pixels of mode {image.mode!r}, expected 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            if background is None:
                raise ValueError(
                    f"{file}: partly transparent, give a background or remove the alpha channel"
                )
            color = tuple(round(255 * c) for c in background)
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image)
    image = image.convert("RGB")
    if size is not None and (image.height, image.width) != size:
        if abs(image.width * size[0] / (image.height * size[1]) - 1) > 0.02:
            raise ValueError(
                f"{file}: {image.height} x {image.width} pixels do not fit {size[0]} x {size[1]}: "
                "crop the picture to that ratio, or ask for another size"
            )
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def data_uri(picture: Tensor) -> str:
    """Return picture: (3, H, W) in [0, 1] inside a data URI.

    PNG, which loses nothing, up to 128 x 128; WebP at quality 92 above.
    """
    file = io.BytesIO()
    small = picture.shape[-1] * picture.shape[-2] <= 128 * 128
    if small:
        to_image(picture).save(file, "PNG", optimize=True)
    else:
        to_image(picture).save(file, "WEBP", quality=92)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def grid(pictures: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Return pictures: (B, C, H, W) row by row in one, (C, *, *), white between and around.

    Args:
        pictures: at least one.
        columns: pictures in a row; the last row is filled with white.
        gap: pixels between and around.
    """
    if pictures.ndim != 4 or not len(pictures) or columns < 1:
        raise ValueError(
            f"pictures of shape {tuple(pictures.shape)}, columns={columns}: expected "
            "(B, C, H, W) with one or more of each"
        )
    b, c, h, w = pictures.shape
    rows = -(-b // columns)
    framed = F.pad(pictures, (gap, 0, gap, 0), value=1.0)
    full = torch.cat([framed, framed.new_ones(rows * columns - b, c, h + gap, w + gap)])
    sheet = full.reshape(rows, columns, c, h + gap, w + gap).permute(2, 0, 3, 1, 4)
    return F.pad(sheet.reshape(c, rows * (h + gap), columns * (w + gap)), (0, gap, 0, gap), value=1)


def picture_file(file: str | Path) -> Path:
    """Return the path of an image file to be written, its folder made; or complain in time."""
    file = Path(file)
    if file.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise ValueError(f"{file.name}: expected a name ending in .png, .webp or .jpg")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{file.parent}: cannot be written: {error.strerror}") from error
    return file


def save_grid(pictures: Tensor, file: str | Path, columns: int) -> Path:
    """Write pictures: (B, C, H, W) in [0, 1] into one image file, whole or not at all."""
    file = picture_file(file)
    draft = file.with_name(f".{file.stem}.draft{file.suffix}")
    try:
        to_image(grid(pictures, columns)).save(draft)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return file
