"""Image files to pictures: exact values, transparency, sizes, damaged files."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from effuse.ops.picture import read_picture, to_image


def test_reads_what_was_written(tmp_path):
    picture = torch.randint(256, (3, 5, 7), generator=torch.Generator().manual_seed(0)) / 255
    to_image(picture).save(tmp_path / "a.png")
    torch.testing.assert_close(read_picture(tmp_path / "a.png"), picture)


def test_gray_and_palette_become_rgb(tmp_path):
    Image.new("L", (4, 4), 51).save(tmp_path / "gray.png")
    assert torch.equal(read_picture(tmp_path / "gray.png"), torch.full((3, 4, 4), 51) / 255)
    Image.new("RGB", (4, 4), (255, 0, 0)).convert("P").save(tmp_path / "p.png")
    assert read_picture(tmp_path / "p.png")[:, 0, 0].tolist() == [1, 0, 0]


def test_transparency_needs_a_background(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match="give a background"):
        read_picture(tmp_path / "clear.png")
    shown = read_picture(tmp_path / "clear.png", background=(0.0, 0.0, 1.0))
    assert shown[:, 1, 1].tolist() == [0, 0, 1]
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "full.png")
    assert read_picture(tmp_path / "full.png")[:, 1, 1].tolist() == [1, 0, 0]


def test_size(tmp_path):
    wide = torch.zeros(3, 20, 40)
    wide[:, :, 20:] = 1
    to_image(wide).save(tmp_path / "wide.png")
    small = read_picture(tmp_path / "wide.png", (10, 20))
    assert small.shape == (3, 10, 20)
    assert small[:, :, :8].max() < 0.1
    assert small[:, :, 12:].min() > 0.9
    with pytest.raises(ValueError, match="20 x 40 pixels do not fit 10 x 10"):
        read_picture(tmp_path / "wide.png", (10, 10))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="not a picture"):
        read_picture(tmp_path / "text.png")
    Image.new("I;16", (4, 4), 5000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="8 bits a channel"):
        read_picture(tmp_path / "deep.png")
