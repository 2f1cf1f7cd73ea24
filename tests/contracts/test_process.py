"""Every process card: corrupt and advance agree, log SNR falls, time_at inverts, rates match."""

from __future__ import annotations

import pytest
import torch

from effuse.core import Gaussian, Prediction, Process, methods
from effuse.ops import randn_like
from effuse.processes import Cosine, Flow, Linear, SubVP, Tabulated

PROCESSES = {
    f"{card.name}-{made().__class__.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Process)
}


@pytest.fixture(params=PROCESSES, ids=str)
def process(request) -> Process:
    return PROCESSES[request.param]()


def inner(count: int = 33) -> torch.Tensor:
    return torch.linspace(0.02, 0.98, count, dtype=torch.float64)


def test_data_at_zero(process, rng):
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=rng).split(1)
    assert torch.equal(process.corrupt(x0, 0.0, noise), x0)


def test_corrupt_and_advance_agree(process, rng):
    """Along the true pair, advance from t to s is corrupt at s."""
    x0 = torch.randn(5, 3, dtype=torch.float64, generator=rng)
    noise = randn_like(x0, rng)
    t, s = torch.rand(2, 5, dtype=torch.float64, generator=rng)
    x = process.corrupt(x0, t, noise)
    walked = process.advance(x, t, s, Prediction(x0, noise))
    torch.testing.assert_close(walked, process.corrupt(x0, s, noise), rtol=1e-12, atol=1e-12)


def test_logsnr_falls_and_time_at_inverts(process):
    t = inner()
    snr = process.logsnr(t)
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(process.time_at(snr), t, rtol=0, atol=1e-9)


def test_rates_match_finite_differences(process):
    if isinstance(process, Tabulated):
        t = (torch.arange(100, 900, 37, dtype=torch.float64) + 0.37) / len(process)
        h = 1e-5
    else:
        t, h = inner(), 1e-6
    for value, rate in zip(
        zip(process.coefficients(t + h), process.coefficients(t - h), strict=True),
        process.rates(t),
        strict=True,
    ):
        torch.testing.assert_close((value[0] - value[1]) / (2 * h), rate, rtol=2e-5, atol=1e-6)


def test_forward_sde_keeps_the_marginal_variance(process):
    """d(sigma^2) = 2 f sigma^2 + g^2, with f the linear drift: the SDE has the right marginals."""
    t = inner() if not isinstance(process, Tabulated) else inner() + 1e-4
    x = torch.ones(len(t), 1, dtype=torch.float64)
    f = process.drift(x, t).squeeze(1)
    sigma, d_sigma = process.sigma(t), process.rates(t)[1]
    g = process.diffusion(t)
    torch.testing.assert_close(2 * sigma * d_sigma, 2 * f * sigma**2 + g**2, rtol=1e-6, atol=1e-8)


def test_velocity_is_the_derivative_along_the_pair(process, rng):
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64, generator=rng)
    t, h = 0.61804, 1e-6
    slope = (process.corrupt(x0, t + h, noise) - process.corrupt(x0, t - h, noise)) / (2 * h)
    torch.testing.assert_close(
        process.velocity(t, Prediction(x0, noise)), slope, rtol=1e-5, atol=1e-6
    )


def test_prior_has_the_law_at_one(process):
    rng = torch.Generator().manual_seed(1)
    x = process.prior((20000,), rng=rng, dtype=torch.float64)
    scale = float(process.sigma(1.0))
    assert abs(float(x.std()) / scale - 1) < 0.03
    assert abs(float(x.mean())) < 0.03 * scale


def test_batched_levels_equal_single_ones(process, rng):
    x0 = torch.randn(3, 2, 2, generator=rng)
    noise = randn_like(x0, rng)
    t = torch.tensor([0.1, 0.5, 1.0])
    many = process.corrupt(x0, t, noise)
    assert many.dtype == torch.float32
    one = [process.corrupt(x0[i : i + 1], float(t[i]), noise[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(many, torch.cat(one), rtol=1e-5, atol=1e-5)


def test_exact_denoiser_is_consistent(process, rng):
    model = Gaussian(process, 0.3, 0.7)
    x = torch.randn(4, 3, dtype=torch.float64, generator=rng)
    for t in (1e-3, 0.4, 1.0):
        pred = model(x, t)
        torch.testing.assert_close(process.corrupt(pred.x0, t, pred.noise), x, rtol=1e-9, atol=1e-9)


def test_ends():
    assert float(Cosine().alpha(1.0)) == 0
    assert float(Flow(3.0).alpha(1.0)) == 0
    assert float(Flow(3.0).sigma(0.5)) == 0.75
    t = inner()
    vp, sub = Linear(), SubVP()
    torch.testing.assert_close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(sub.sigma(t), vp.sigma(t) ** 2)


def test_table_entries_are_met_exactly(rng):
    abar = torch.rand(50, dtype=torch.float64, generator=rng).sort(descending=True).values
    abar[-1] = 0  # zero terminal SNR is an ordinary entry
    table = Tabulated.from_alphas_cumprod(abar)
    t = table.time_of(torch.arange(50))
    torch.testing.assert_close(table.alpha(t), abar.sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(table.sigma(t), (1 - abar).sqrt(), rtol=0, atol=1e-12)
    assert float(table.alpha(1.0)) == 0
    torch.testing.assert_close(table.index_at(t), torch.arange(50.0).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear(low=-1), "0 <= low"),
        (lambda: Flow(0), "above zero"),
        (lambda: Tabulated(torch.ones(2, 2)), r"expected \(N,\)"),
        (lambda: Tabulated(torch.tensor([2.0, 1.0])), "do not fall"),
        (lambda: Tabulated(torch.tensor([1.0]), "vq"), "expected one of"),
        (lambda: Tabulated.from_alphas_cumprod(torch.tensor([1.0])), r"\[0, 1\)"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_each_half_gives_the_other(process, rng):
    x0 = torch.randn(5, 3, dtype=torch.float64, generator=rng)
    noise, t = randn_like(x0, rng), torch.rand(5, dtype=torch.float64, generator=rng) * 0.9 + 0.05
    x = process.corrupt(x0, t, noise)
    for pair in (process.complete(x, t, x0=x0), process.complete(x, t, noise=noise)):
        torch.testing.assert_close(pair, Prediction(x0, noise), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="expected one of"):
        process.complete(x, t)
    with pytest.raises(ValueError, match="sigma = 0"):
        process.complete(x, 0.0, x0=x0)


def test_score_is_the_gradient_of_the_log_density(process, rng):
    law = Gaussian(process, 0.3, 0.5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=rng)
    torch.testing.assert_close(process.score(0.4, law(x, 0.4)), law.score(x, 0.4))
