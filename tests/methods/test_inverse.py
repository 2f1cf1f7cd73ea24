"""Inpainting and colorization: what is measured stays, what is free has the law it should."""

from __future__ import annotations

import pytest
import torch

import effuse
from effuse.core import Gaussian, LowRankMixture
from effuse.operators import Average, Blur, Known, Mix, colors
from effuse.processes import VE, Linear, SubVP, Uniform
from effuse.solvers import DDIM
from effuse.solvers.inverse import agreeing, colorize, inpaint
from effuse.solvers.langevin import Langevin
from effuse.solvers.score_sde import Imposed, PredictorCorrector


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("process", [Linear(), VE(high=10.0), SubVP()], ids=repr)
def test_free_pixels_that_are_independent_keep_their_law(process):
    model = Gaussian(process, 0.3, 0.5)
    truth = torch.full((4_000, 1, 2, 2), 0.9, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    solver = PredictorCorrector(corrector=Langevin(0.05, together=True))
    grid = Uniform(1.0, 1e-3)
    out = inpaint(model, truth, mask, solver=solver, steps=300, grid=grid, rng=generator())
    free = out[..., mask == 0]
    assert abs(float(free.mean()) - 0.3) < 0.03
    assert abs(float(free.std()) - 0.5) < 0.03
    exact = inpaint(model, truth, mask, solver=solver, steps=20, rng=generator())
    torch.testing.assert_close(exact[..., mask == 1], truth[..., mask == 1])


@pytest.mark.parametrize("process", [Linear(), VE(high=10.0), SubVP()], ids=repr)
@pytest.mark.parametrize("base", [PredictorCorrector(), DDIM()], ids=repr)
def test_what_is_known_is_spoiled_to_its_level(process, base):
    """In the middle of a walk: alpha_s y + sigma_s z, fresh z."""
    model, y = Gaussian(process, 0.3, 0.5), torch.full((20_000, 1, 1, 2), 0.9).double()
    x = torch.randn(y.shape, generator=generator(2), dtype=y.dtype)
    imposed = Imposed(base, Known(torch.ones(1, 2)), y)
    out = imposed.step(model, x, 0.6, 0.5, rng=generator()).x
    alpha, sigma, _ = (float(c) for c in process.coefficients(0.5))
    assert float(out.mean()) == pytest.approx(alpha * 0.9, abs=0.02 * sigma)
    assert float(out.std()) == pytest.approx(sigma, rel=0.02)


def test_what_is_free_follows_what_is_known():
    """Two values of correlation 0.9: the free one has the mean and deviation of its condition."""
    line = torch.tensor([[[[1.0, 1.0]]]], dtype=torch.float64).reshape(1, 1, 1, 2, 1) / 2**0.5
    std = (1 / 18) ** 0.5  # (1 / 2) / (1 / 2 + std^2) = 0.9
    model = LowRankMixture(Linear(), line, std)
    known = torch.full((4_000, 1, 1, 2), 0.8, dtype=torch.float64)
    solver = PredictorCorrector(corrector=Langevin(0.2, steps=4, together=True))
    out = inpaint(
        model, known, torch.tensor([[1.0, 0.0]]), solver=solver, steps=200, rng=generator()
    )
    free = out[..., 1]
    whole = 0.5 + std**2
    assert float(free.mean()) == pytest.approx(0.9 * 0.8, abs=0.05)
    assert float(free.std()) == pytest.approx((whole * (1 - 0.9**2)) ** 0.5, abs=0.05)


def test_any_linear_measurement_is_met():
    model = Gaussian(Linear(), 0.2, 0.4)
    truth = 0.2 + 0.4 * torch.randn(2, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    row = torch.tensor([0.25, 0.5, 0.25])
    for operator in (Average(4), Blur(row.outer(row)), Mix(colors()[:2]), Known(torch.eye(8))):
        y = operator(truth)
        for solver in (None, DDIM()):
            out = agreeing(model, operator, y, solver=solver, steps=8, rng=generator())
            torch.testing.assert_close(operator(out), y)
            assert (out - truth).abs().max() > 0.1


def test_colors_have_the_gray_they_were_given():
    model = Gaussian(Linear(), 0.1, 0.5)
    gray = 0.3 * torch.randn(2, 1, 4, 4, generator=generator(1), dtype=torch.float64)
    out = colorize(model, gray, steps=8, rng=generator())
    torch.testing.assert_close(out.mean(1, keepdim=True), gray)
    assert (out - gray).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_house_pipeline(dtype):
    model = effuse.wrap(effuse.load("house:pixels").to(dtype))
    pictures = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    mask = torch.ones(32, 32)
    mask[8:24, 8:24] = 0
    told = []
    out = inpaint(
        model.bare, pictures, mask, steps=3, rng=generator(), on_step=lambda *a: told.append(a[0])
    )
    torch.testing.assert_close(mask * out, mask * pictures)
    assert out.isfinite().all()
    assert told == [0, 1, 2]
    gray = pictures.mean(1, keepdim=True)
    out = colorize(model.bare, gray, steps=2, rng=generator())
    torch.testing.assert_close(out.mean(1, keepdim=True), gray, rtol=1e-4, atol=1e-5)


def test_refuses_nonsense():
    model = Gaussian(Linear(), 0.2, 0.4)
    x = torch.randn(1, 3, 4, 4, generator=generator())
    with pytest.raises(ValueError, match="nothing has it under Known"):
        agreeing(model, Known(torch.eye(4)), x)
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        colorize(model, x)
    with pytest.raises(ValueError, match="floating point"):
        agreeing(model, Known(torch.eye(4)), torch.ones(1, 3, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="steps"):
        inpaint(model, x, torch.eye(4), steps=0)
