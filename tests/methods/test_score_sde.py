"""Predictors and correctors: the paper's formulas, limits, and what they leave of a known law."""

from __future__ import annotations

import math

import pytest
import torch

import effuse
from effuse.core import Gaussian, Prediction, sample
from effuse.operators import Known, Mix, colors
from effuse.processes import VE, Cosine, Linear, SubVP, Tabulated, Tapered, Uniform
from effuse.solvers import Ancestral
from effuse.solvers.langevin import Annealed, Langevin, langevin_step
from effuse.solvers.score_sde import (
    AncestralSampling,
    EulerMaruyama,
    Imposed,
    PredictorCorrector,
    ReverseDiffusion,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def ddpm() -> tuple[torch.Tensor, Tabulated]:
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return beta, Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


@pytest.mark.parametrize("i", [1, 500, 999])
def test_the_discrete_steps_of_vp_are_the_papers(i):
    """f = (sqrt(1 - beta) - 1) x, G = sqrt(beta); ancestral (x + beta s) / sqrt(1 - beta)."""
    beta, process = ddpm()
    x, noise, z = rows(3, 4, 5)
    t, s, b = process.time_of(i), process.time_of(i - 1), beta[i]
    pred = process.complete(x, t, noise=noise)
    score = -noise / process.sigma(t)
    moved = ReverseDiffusion()(process, x, t, s, pred, z)
    mean = x - ((1 - b).sqrt() - 1) * x + b * score
    torch.testing.assert_close(moved.mean, mean)
    torch.testing.assert_close(moved.x, mean + b.sqrt() * z)
    moved = AncestralSampling(posterior=False)(process, x, t, s, pred, z)
    mean = (x + b * score) / (1 - b).sqrt()
    torch.testing.assert_close(moved.mean, mean)
    torch.testing.assert_close(moved.x, mean + b.sqrt() * z)


def test_the_discrete_steps_of_ve_are_the_papers():
    process = VE()
    x, noise, z = rows(3, 4, 5)
    t, s = 0.61, 0.6
    high, low = process.sigma(t) ** 2, process.sigma(s) ** 2
    pred, score = process.complete(x, t, noise=noise), -noise / process.sigma(t)
    mean = x + (high - low) * score
    moved = ReverseDiffusion()(process, x, t, s, pred, z)
    torch.testing.assert_close(moved.x, mean + (high - low).sqrt() * z)
    moved = AncestralSampling()(process, x, t, s, pred, z)
    torch.testing.assert_close(moved.x, mean + (low * (high - low) / high).sqrt() * z)
    with pytest.raises(TypeError, match="sub-VP"):
        AncestralSampling()(SubVP(), x, t, s, pred, z)


def test_euler_maruyama_is_its_formula():
    process = Linear()
    x, noise, z = rows(3, 4, 5)
    t, s = 0.5, 0.49
    beta = 0.1 + 0.5 * 19.9
    slope = -beta / 2 * x + beta * noise / process.sigma(t)
    moved = EulerMaruyama()(process, x, t, s, Prediction(x, noise), z)
    torch.testing.assert_close(moved.mean, x - 0.01 * slope)
    torch.testing.assert_close(moved.x, moved.mean + (beta * 0.01) ** 0.5 * z)


def test_the_posterior_ancestral_step_is_ddim_with_all_its_noise():
    process = Linear()
    model = Gaussian(process, 0.3, 0.5)
    x, times = rows(6, 2), Uniform()(process, 8)
    ours = PredictorCorrector(AncestralSampling(), end=-1.0)
    a = sample(model, ours, x, times, rng=generator(1))
    torch.testing.assert_close(a, sample(model, Ancestral(), x, times, rng=generator(1)))


def test_nothing_is_the_identity():
    model = Gaussian(Linear(), 0.3, 0.5)
    x, times = rows(6, 2), Uniform()(model.process, 4)
    for solver in (PredictorCorrector(None), PredictorCorrector(None, Langevin(0.0))):
        assert torch.equal(sample(model, solver, x, times, rng=generator()), x)


def test_langevin_steps_keep_the_papers_ratio():
    """eta = 2 kept^2 (snr |z| / |g|)^2, by rows or by the mean over the batch."""
    process = Linear()
    model, t, x = Gaussian(process, 0.0, 0.5), 0.5, rows(5, 7)
    score = model.score(x, t)
    z = torch.randn(x.shape, generator=generator(2), dtype=x.dtype)
    for together in (False, True):
        norms = [a.norm(dim=1) for a in (z, score)]
        if together:
            norms = [n.mean() for n in norms]
        eta = (2 * (0.9 * 0.16 * norms[0] / norms[1]) ** 2).reshape(-1, 1)
        moved = Langevin(0.16, together=together)(model, x, t, 0.9, rng=generator(2))
        torch.testing.assert_close(moved, x + eta * score + (2 * eta).sqrt() * z)
    eta = 2 * (0.16 * float(process.sigma(t))) ** 2
    moved = Annealed(0.16)(model, x, t, rng=generator(2))
    torch.testing.assert_close(moved, x + eta * score + math.sqrt(2 * eta) * z)


def test_the_stationary_variance_of_langevin_is_the_closed_form():
    size, var = 0.3, 0.25
    x, rng = rows(200_000), generator(3)
    for _ in range(60):
        x = langevin_step(x, -x / var, size * var, rng)
    assert float(x.var()) == pytest.approx(var / (1 - size / 2), rel=0.02)


def test_norms_of_each_row_settle_at_a_wider_law():
    """For normal data of D values, ((D + 2) / D)^2 times the variance."""
    model, t, d = Gaussian(Linear(), 0.0, 0.5), 0.5, 6
    x, rng = rows(40_000, d), generator(4)
    scale = math.hypot(float(model.process.alpha(t)) * 0.5, float(model.process.sigma(t)))
    x = x * scale
    for _ in range(400):
        x = Langevin(0.1)(model, x, t, rng=rng)
    assert float(x.var()) / scale**2 == pytest.approx(((d + 2) / d) ** 2, rel=0.05)


@pytest.mark.parametrize(
    "process", [Linear(), VE(high=10.0), SubVP()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize(
    "solver",
    [
        PredictorCorrector(),
        PredictorCorrector(EulerMaruyama()),
        PredictorCorrector(corrector=Langevin(0.05, together=True)),
        PredictorCorrector(corrector=Annealed(0.1)),
    ],
    ids=repr,
)
def test_all_end_in_the_law(solver, process):
    model = Gaussian(process, 0.4, 0.6)
    x = process.prior((1_000, 32), rng=generator(), dtype=torch.float64)
    times = Uniform(1.0, 1e-3)(process, 400)
    out = sample(model, solver, x, times, rng=generator(1))
    assert abs(float(out.mean()) - 0.4) < 0.02
    assert abs(float(out.std()) / 0.6 - 1) < 0.03


def test_what_is_known_stays_and_what_is_not_is_free():
    process = Linear()
    model = Gaussian(process, 0.2, 0.4)
    x, truth = rows(3, 3, 4, 4), 0.3 * rows(1, 3, 4, 4, seed=5)
    times = Tapered()(process, 12)
    base = PredictorCorrector(corrector=Langevin(0.1))
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    out = sample(model, Imposed(base, Known(mask), mask * truth), x, times, rng=generator())
    torch.testing.assert_close(out[..., :2], truth.expand_as(out)[..., :2])
    assert out[..., 2:].std() > 0.1
    everything = sample(
        model, Imposed(base, Known(torch.ones(4, 4)), truth), x, times, rng=generator()
    )
    torch.testing.assert_close(everything, truth.expand_as(out))
    nothing = Imposed(base, None, None)
    assert torch.equal(
        sample(model, nothing, x, times, rng=generator()),
        sample(model, base, x, times, rng=generator()),
    )
    gray = Mix(colors()[:1])
    colored = sample(model, Imposed(base, gray, gray(truth)), x, times, rng=generator())
    torch.testing.assert_close(gray(colored), gray(truth).expand(3, -1, -1, -1))
    assert (colored - truth).abs().max() > 0.1


@pytest.mark.parametrize("process", [Linear(), VE(high=10.0), SubVP()], ids=repr)
def test_what_is_known_ends_as_its_mean_where_the_walk_ends_above_clean_data(process):
    """Everything known gives alpha(eps) y, as the mean of the rest has no fresh noise either."""
    model, truth, end = Gaussian(process, 0.2, 0.4), rows(1, 3, 4, 4, seed=5), 1e-2
    base = PredictorCorrector(corrector=Langevin(0.1), end=end)
    everything = Imposed(base, Known(torch.ones(4, 4)), truth)
    x = process.prior((2, 3, 4, 4), rng=generator(), dtype=torch.float64)
    out = sample(model, everything, x, Uniform(1.0, end)(process, 20), rng=generator(1))
    torch.testing.assert_close(out, (process.alpha(end) * truth).expand_as(out))


def test_on_a_house_pipeline_inpainting_keeps_the_known_half():
    model = effuse.wrap(effuse.load("house:pixels"))
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    picture = torch.rand(1, 3, 32, 32, generator=generator()) * 2 - 1
    solver = Imposed(PredictorCorrector(), Known(mask), mask * picture)
    out = model.sample(2, solver, steps=4, rng=generator(), decode=False)
    torch.testing.assert_close(out[..., :16], picture.expand_as(out)[..., :16])
    assert out.isfinite().all()


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="snr=-1"):
        Langevin(-1.0)
    with pytest.raises(ValueError, match="steps"):
        Annealed(0.1, 0)
    model, times = Gaussian(Cosine(), 0.0, 0.5), torch.tensor([1.0, 0.5])
    with pytest.raises(FloatingPointError, match="drift"):
        sample(model, PredictorCorrector(EulerMaruyama()), rows(2, 2), times)
