"""Inpainting and colorization keep what was measured, on exact models and real pipelines."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_sd

import effuse
from effuse.core import Gaussian
from effuse.operators import Mix, colors
from effuse.processes import Linear
from effuse.restore import Colorize, Inpaint, edit


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_what_was_measured_is_kept_and_the_rest_has_its_law():
    model = Gaussian(Linear(), 0.2, 0.3)
    x = torch.randn(200, 3, 8, 8, generator=generator(), dtype=torch.float64)
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    out = Inpaint(mask, levels=60)(model, x, rng=generator()).x
    torch.testing.assert_close(out[..., :4], x[..., :4])
    free = out[..., 4:]
    assert abs(float(free.mean()) - 0.2) < 0.02
    assert abs(float(free.std()) / 0.3 - 1) < 0.15
    out = Colorize(levels=60)(model, x, rng=generator()).x
    gray = Mix(colors()[:1])
    torch.testing.assert_close(gray(out), gray(x))
    others = Mix(colors()[1:])(out)
    assert abs(float(others.mean())) < 0.02
    assert abs(float(others.std()) / 0.3 - 1) < 0.15


def test_on_real_pipelines():
    pixels, latents = effuse.wrap(tiny_ddpm()), effuse.wrap(tiny_sd())
    side = pixels.shape[1]
    picture = torch.rand(1, 3, side, side, generator=generator())
    mask = torch.ones(side, side)
    mask[: side // 2] = 0
    out = edit(pixels, picture, Inpaint(mask, levels=3), rng=generator())
    torch.testing.assert_close(out.pictures[..., side // 2 :, :], picture[..., side // 2 :, :])
    assert out.calls == Inpaint(mask, levels=3).calls(pixels.process)
    side = latents.shape[1] * latents.codec.factor
    picture = torch.rand(1, 3, side, side, generator=generator())
    mask = torch.ones(side, side)
    mask[0, 0] = 0
    out = edit(latents, picture, Inpaint(mask, levels=2), "red apple", rng=generator())
    whole = latents.codec.encode(picture)
    torch.testing.assert_close(out.sample[..., 1:, 1:], whole[..., 1:, 1:])
    assert (out.sample[..., 0, 0] - whole[..., 0, 0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs a pipeline on pixels"):
        edit(latents, picture, Colorize(levels=2), rng=generator())


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="ones and zeros"):
        Inpaint(torch.full((4, 4), 0.3))
    with pytest.raises(ValueError, match="no multiple"):
        Inpaint(torch.ones(5, 5)).operator(torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="levels"):
        Colorize(levels=0)
