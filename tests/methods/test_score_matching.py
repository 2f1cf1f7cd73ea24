"""Denoising score matching: its least value, and what the likelihood weight bounds, in nats."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.bridge.pipeline import wrap
from effuse.core import Empirical, Gaussian
from effuse.distill.score_matching import ScoreMatching, likelihood, variance
from effuse.processes import VE, Linear, SubVP, Tabulated


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model: Gaussian, count: int, width: int = 2) -> torch.Tensor:
    shape = (count, width)
    return model.mean + model.std * torch.randn(shape, generator=generator(9), dtype=torch.float64)


def divergence(p: Gaussian, q: Gaussian, t: float, width: int = 2) -> float:
    """Return KL(p || q) at level t of normal laws with `width` independent values."""
    alpha, sigma, _ = (float(c) for c in p.process.coefficients(t))
    a, b = ((alpha * float(m.std)) ** 2 + sigma**2 for m in (p, q))
    gap = alpha * float(p.mean - q.mean)
    return width * 0.5 * (a / b - 1 - math.log(a / b) + gap**2 / b)


@pytest.mark.parametrize(
    "process", [Linear(), VE(high=10.0), SubVP()], ids=lambda p: type(p).__name__
)
def test_the_likelihood_weight_measures_the_divergence_in_nats(process):
    """Loss of q less loss of the truth is KL(p || q) at the clean end less that at t = 1."""
    p, q, first = Gaussian(process, 0.3, 0.6), Gaussian(process, -0.2, 0.9), 1e-3
    batch = {"x0": draw(p, 200_000)}
    nats = [
        float(
            ScoreMatching(m, likelihood, first)
            .loss("student", batch, rng=generator())
            .terms["nats"]
        )
        for m in (p, q)
    ]
    expected = divergence(p, q, first) - divergence(p, q, 1.0)
    assert expected > 0.3
    assert nats[1] - nats[0] == pytest.approx(expected, rel=0.03)


def test_the_least_loss_is_what_no_one_can_know_of_the_noise():
    """Of normal data, E |noise - E noise|^2 = alpha^2 std^2 / (alpha^2 std^2 + sigma^2) a value."""
    process = Linear()
    model = Gaussian(process, 0.3, 0.6)
    t = torch.linspace(1e-5, 1, 20_001, dtype=torch.float64)
    signal, sigma2 = (process.alpha(t) * 0.6).square(), process.sigma(t).square()
    least = torch.trapezoid(signal / (signal + sigma2), t)
    loss = ScoreMatching(model).loss("student", {"x0": draw(model, 200_000)}, rng=generator())
    assert float(loss.total) == pytest.approx(float(least) / 2, rel=0.01)
    assert float(loss.terms["noise"]) == pytest.approx(float(least), rel=0.01)
    assert float(loss.terms["nats"]) == pytest.approx(2 * float(loss.total), rel=1e-4)
    wrong = Gaussian(process, 0.3, 0.9)
    worse = ScoreMatching(wrong).loss("student", {"x0": draw(model, 200_000)}, rng=generator())
    assert worse.total > loss.total


@pytest.mark.parametrize("weight", [variance, likelihood])
def test_one_point_of_data_is_learned_without_error(weight):
    point = torch.tensor([[0.4, -0.2, 0.7]], dtype=torch.float64)
    objective = ScoreMatching(Empirical(Linear(), point), weight, 1e-3)
    loss = objective.loss("student", {"x0": point.expand(64, -1)}, rng=generator())
    assert float(loss.total) < 1e-18


def test_weights_are_the_papers():
    process, t = Linear(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(variance(process, t), process.sigma(t) ** 2)
    torch.testing.assert_close(likelihood(process, t), 0.1 + 19.9 * t)  # g^2 = beta
    low = 2 * math.log(50 / 0.01) * (0.01 * (50 / 0.01) ** t) ** 2
    torch.testing.assert_close(likelihood(VE(), t), low)


def test_a_table_is_learned_at_its_entries():
    beta = torch.linspace(1e-4, 0.02, 10, dtype=torch.float64)
    process = Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))
    levels = ScoreMatching(Gaussian(process, 0.0, 1.0)).levels(2_000, generator())
    counts = (levels * 10).round().long().bincount(minlength=11)
    torch.testing.assert_close(levels, (levels * 10).round() / 10)
    assert counts[0] == 0
    assert ((counts[1:] - 200).abs() <= 2).all()


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_real_networks_learn_from_it(name):
    from tests.tiny import tiny_ddpm, tiny_dit_pipe

    model = wrap({"unet": tiny_ddpm, "dit": tiny_dit_pipe}[name]())
    cond = {k: v for k, v in model.embed([1, 2]).items()} if name == "dit" else {}
    x0 = torch.randn(2, *model.shape, generator=generator())
    objective = ScoreMatching(model.bare, likelihood)
    loss = objective.loss("student", {"x0": x0, **cond}, rng=generator())
    loss.total.backward()
    grads = [p.grad for p in objective.parameters_of("student")]
    assert all(g is None or g.isfinite().all() for g in grads)
    assert sum(g is not None and bool(g.any()) for g in grads) > 0.8 * len(grads)


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="first=0"):
        ScoreMatching(Gaussian(Linear(), 0.0, 1.0), first=0.0)
