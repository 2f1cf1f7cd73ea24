"""A tiny stand-in for the emoji sets, so that no test needs a download."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effuse.house import data

torch.set_num_threads(1)


@pytest.fixture
def toys() -> data.Pictures:
    """Two dozen discs and squares in eight colors, captioned, two of them held out."""
    colors = {
        "red": (220, 30, 30),
        "green": (30, 160, 60),
        "blue": (40, 80, 220),
        "yellow": (250, 210, 50),
    }
    y, x = np.mgrid[:64, :64]
    shapes = {
        "disc": (x - 32) ** 2 + (y - 32) ** 2 < 400,
        "square": (abs(x - 32) < 18) & (abs(y - 32) < 18),
    }
    images, captions, style, subgroup, points = [], [], [], [], []
    for s, word in enumerate(data.STYLES):
        for color, rgb in colors.items():
            for kind, (shape, mask) in enumerate(shapes.items()):
                image = np.full((3, 64, 64), 255, np.uint8)
                image[:, mask] = (np.array(rgb)[:, None] * (1 - 0.2 * s)).astype(np.uint8)
                images.append(image)
                name = f"{color} {shape}"
                captions.append([f"{word} {name}", f"{word} {shape}", name])
                style.append(s)
                subgroup.append(kind)
                points.append(name.replace(" ", "-"))
    held = np.zeros(len(images), bool)
    held[[3, 17]] = True
    weight = np.where(held, 0.0, 1.0)
    return data.Pictures(
        np.stack(images),
        captions,
        np.array(style),
        np.array(subgroup),
        ("disc", "square"),
        weight / weight.sum(),
        held,
        np.zeros(len(images), bool),
        np.ones(len(images), bool),
        points,
        points,
    )
