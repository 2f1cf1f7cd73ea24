"""Edits along singular vectors: the round trip, the size and way of a move, real pipelines."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_sd

import effuse
from effuse.core import Gaussian, LowRankMixture
from effuse.processes import Linear
from effuse.restore import Along, edit
from effuse.structure import random_bases

STD = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
MODEL = Gaussian(Linear(), 0.0, STD)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_without_a_move_it_is_a_round_trip():
    x = STD * rand(5, 4)
    gap = [(Along(0.0, levels=n, steps=1)(MODEL, x).x - x).abs().max() for n in (50, 200)]
    assert gap[1] < 0.1
    assert gap[1] < 0.4 * gap[0]


@pytest.mark.parametrize(("direction", "std"), [(0, 2.0), (1, 1.0), (2, 0.5)])
def test_a_move_on_gaussian_data_is_what_the_ode_makes_of_it(direction, std):
    """The Jacobian is diagonal and the flow scales each coordinate: the edit is closed form."""
    level, amount, x = 0.4, -0.3, STD * rand(3, 4)
    editor = Along(amount, direction, level, levels=1000, steps=40)
    out, still = editor(MODEL, x).x, dataclasses.replace(editor, amount=0.0)(MODEL, x).x
    sigma, alpha = Linear().sigma(level), Linear().alpha(level)
    times = editor.encode(MODEL, x).times
    assert float(times[-1]) == pytest.approx(level, abs=1e-3)
    t0, t1 = times[0], times[-1]
    shrink = [((Linear().alpha(t) * std) ** 2 + Linear().sigma(t) ** 2).sqrt() for t in (t0, t1)]
    expected = torch.zeros(3, 4).double()
    expected[:, direction] = amount * Linear().sigma(t1) * math.sqrt(4) * shrink[0] / shrink[1]
    torch.testing.assert_close(out - still, expected, rtol=1e-2, atol=2e-4)
    assert alpha < 1
    assert sigma > 0


def test_a_mixture_is_edited_within_its_subspace():
    bases = random_bases(12, (3, 3), rng=seeded())
    model = LowRankMixture(Linear(), bases)
    x = model.draw_of(torch.tensor([0, 1]), rng=seeded(1))
    editor = Along(0.4, level=0.2, levels=400, steps=30)
    latents = editor.encode(model, x)
    v = editor.directions(model, latents)
    assert v.shape == (2, 1, 12)
    out = editor.move(model, latents, v[:, 0], [-0.4, 0.0, 0.4])
    assert out.shape == (3, 2, 12)
    for row, basis in enumerate(bases):
        kept = (out[:, row] @ basis).square().sum(-1) / out[:, row].square().sum(-1)
        assert (kept > 0.999).all()
    torch.testing.assert_close(out[1], x, rtol=0, atol=0.05)
    assert (out[2] - out[0]).norm(dim=1).min() > 0.3
    torch.testing.assert_close(out[2], editor(model, x).x)


def test_calls_are_told():
    editor = Along(0.1, level=0.5, levels=21)
    latents = editor.encode(MODEL, rand(1, 4))
    assert editor.calls(Linear()) == 2 * (len(latents.times) - 1) + 1


def test_refusals():
    for fields, match in (
        ({"amount": math.nan}, "amount"),
        ({"direction": -1}, "direction"),
        ({"level": 0.0}, "level"),
        ({"levels": 1}, "levels"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=match):
            Along(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("build", [tiny_ddpm, tiny_sd, tiny_dit_pipe])
def test_pipelines(build, dtype):
    model = effuse.wrap(build().to(dtype))
    pictures = torch.rand(2, 3, 16, 16, generator=seeded())
    editor = Along(0.3, 1, 0.5, levels=5, steps=2, extra=0)
    what = {"tiny_ddpm": None, "tiny_sd": "a b", "tiny_dit_pipe": 3}[build.__name__]
    tell = []
    out = edit(model, pictures, editor, what, on_call=lambda k, n: tell.append((k, n)))
    assert out.pictures.isfinite().all()
    assert len(tell) == out.calls == editor.calls(model.process) == tell[-1][1]
    still = edit(model, pictures, dataclasses.replace(editor, amount=0.0), what)
    assert (out.sample - still.sample).abs().max() > 1e-3
    alone = edit(model, pictures[1:], editor, what)
    tight = 1e-3 if dtype == torch.float32 else 0.2
    assert (alone.sample - out.sample[1:]).abs().max() < tight * out.sample.abs().max()
