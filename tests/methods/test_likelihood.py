"""Likelihoods and latent codes by the ODE: equal to the exact ones where there are exact ones."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.core import Gaussian, Mixture
from effuse.processes import VE, Cosine, Flow, Linear, SubVP, Tabulated
from effuse.solvers.likelihood import (
    decode,
    dequantize,
    encode,
    interpolate,
    log_likelihood,
    model_prior,
    normal_prior,
    solve,
)


def table() -> Tabulated:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


PROCESSES = [Linear(), Cosine(), VE(), SubVP(), Flow(), table()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two(process) -> Mixture:
    return Mixture(process, torch.tensor([[-1.0, 0.5], [0.8, -0.3]]), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_of_a_mixture_is_exact(process):
    model = two(process)
    x = model.draw(40, rng=generator())
    found = log_likelihood(model, x, rtol=1e-7, atol=1e-7, start=1e-3)
    assert (found.nats - model.log_prob(x, 1e-3)).abs().max() < 1e-4
    # and with what one gets by default
    found = log_likelihood(model, x)
    start = 1 / len(process) if isinstance(process, Tabulated) else 1e-5
    assert (found.nats - model.log_prob(x, start)).abs().max() < 1e-3
    assert found.calls < 200
    torch.testing.assert_close(found.bits, -found.nats / (2 * math.log(2)) + 7)
    shifted = log_likelihood(model, x, data_range=(0.0, 1.0))
    torch.testing.assert_close(shifted.bits, found.bits + 1)


def test_what_is_left_of_the_data_at_the_end_is_taken_in():
    """Stable Diffusion's table leaves 0.068 of it: a normal prior misses that, the model's not."""
    model = two(table())
    x = model.draw(40, rng=generator())
    exact = model.log_prob(x, 1e-3)
    plain = log_likelihood(model, x, prior=normal_prior, rtol=1e-7, atol=1e-7)
    ours = log_likelihood(model, x, prior=model_prior, rtol=1e-7, atol=1e-7)
    assert (plain.nats - exact).abs().max() > 0.01
    assert (ours.nats - exact).abs().max() < 1e-4


@pytest.mark.parametrize("process", [Linear(), VE(), Flow()], ids=lambda p: type(p).__name__)
def test_codes_of_normal_data_are_the_closed_form(process):
    model = Gaussian(process, torch.tensor([0.4, -1.0, 0.2]), torch.tensor([0.5, 1.0, 0.1]))
    x = model.mean + model.std * torch.randn(8, 3, generator=generator(), dtype=torch.float64)
    how = {"rtol": 1e-8, "atol": 1e-8}
    code = encode(model, x, start=1e-4, **how)
    torch.testing.assert_close(code, model.transport(x, 1e-4, 1.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(model, code, end=1e-4, **how), x, rtol=0, atol=1e-5)


def test_one_probe_is_exact_for_independent_values_and_unbiased_for_others():
    model = Gaussian(Linear(), 0.0, torch.tensor([0.5, 1.0, 0.2, 2.0]))
    x = torch.randn(6, 4, generator=generator(), dtype=torch.float64)
    exact = log_likelihood(model, x, probes=0, prior=normal_prior)
    one = log_likelihood(model, x, probes=1, rng=generator(3), prior=normal_prior)
    torch.testing.assert_close(one.nats, exact.nats, rtol=0, atol=1e-4)
    mixed = two(Cosine())
    x = mixed.draw(1, rng=generator())
    exact = log_likelihood(mixed, x, probes=0)
    guess = log_likelihood(mixed, x, probes=400, rng=generator(4))
    assert abs(float(guess.nats - exact.nats)) < 0.1


def test_normal_data_of_deviation_one_stays_where_it_is():
    """VP on its own stationary law: the ODE is the identity, at any tolerance."""
    model = Gaussian(Linear(), 0.0, 1.0)
    x = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(encode(model, x), x)
    done = solve(model, x, 0.2, 0.9)
    torch.testing.assert_close(done.x, x)
    assert done.log_change is None


def test_between_codes_along_the_sphere():
    a, b = torch.randn(2, 4, 3, 8, 8, generator=generator(), dtype=torch.float64)
    assert torch.allclose(interpolate(a, b, 0.0), a)
    assert torch.allclose(interpolate(a, b, 1.0), b)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    norm = interpolate(a, b, 0.3).flatten(1).norm(dim=1)
    torch.testing.assert_close(norm, a.flatten(1).norm(dim=1))
    torch.testing.assert_close(interpolate(a, a, 0.4), a)


def test_dequantized_pictures_keep_their_level():
    pictures = torch.arange(256).reshape(1, 1, 16, 16) / 255
    found = dequantize(pictures, rng=generator())
    assert torch.equal((found * 256).floor().long(), torch.arange(256).reshape(1, 1, 16, 16))
    assert found.unique().numel() == 256


def test_refuses_half_precision_and_nonsense():
    model = two(Linear())
    x = model.draw(2, rng=generator())
    with pytest.raises(ValueError, match="half is too coarse"):
        log_likelihood(model, x.half())
    with pytest.raises(ValueError, match="low < high"):
        log_likelihood(model, x, data_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="weight=2"):
        interpolate(x, x, 2.0)
    model.net = torch.nn.Linear(2, 2).to(torch.float16)
    with pytest.raises(ValueError, match="expected float32 for likelihoods"):
        log_likelihood(model, x)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_on_real_networks(name):
    from tests.tiny import tiny_ddpm, tiny_dit_pipe

    from effuse.bridge.pipeline import wrap

    pipe = {"unet": tiny_ddpm, "dit": tiny_dit_pipe}[name]()
    model = wrap(pipe)
    cond = model.embed([1, 2]) if name == "dit" else {}
    x = torch.randn(2, *model.shape, generator=generator()) * 0.5
    told = []
    found = log_likelihood(
        model.bare.given(**cond),
        x,
        rng=generator(),
        rtol=1e-2,
        probes=1,
        atol=1e-2,
        on_call=lambda: told.append(1),
    )
    assert found.nats.isfinite().all()
    assert found.latents.shape == x.shape
    assert len(told) == found.calls
