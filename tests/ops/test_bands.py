"""Haar bands, spectra and the Wiener oracle, to float64 accuracy."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.ops.bands import (
    haar,
    inverse_magnitude,
    log_gap,
    power_by_radius,
    radial,
    radii,
    spectrum,
    unhaar,
    wiener,
    wiener_error,
)


def noise(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_haar_is_orthonormal_and_comes_back():
    x = noise(2, 3, 6, 10)
    bands = haar(x)
    assert bands.shape == (2, 4, 3, 3, 5)
    torch.testing.assert_close(unhaar(bands), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(bands.square().sum(), x.square().sum(), rtol=1e-12, atol=0)
    bands = noise(1, 4, 2, 3, 3)
    torch.testing.assert_close(haar(unhaar(bands)), bands, rtol=0, atol=1e-12)


def test_each_band_holds_its_pattern():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    sign_x, sign_y = 1 - 2 * (x % 2), 1 - 2 * (y % 2)
    patterns = [torch.ones(4, 6), sign_x, sign_y, sign_x * sign_y]
    for k, pattern in enumerate(patterns):
        bands = haar(3.0 * pattern[None].double())
        expected = torch.zeros(4, 1, 2, 3, dtype=torch.float64)
        expected[k] = 6.0
        assert torch.equal(bands, expected)


def test_spectrum_keeps_energy_and_rings_hold_a_wave():
    x = noise(2, 3, 8, 8)
    energy = spectrum(x).abs().square().sum()
    torch.testing.assert_close(energy, x.square().sum(), rtol=1e-12, atol=0)
    wave = torch.cos(2 * math.pi * 3 * torch.arange(16, dtype=torch.float64) / 16)
    power = power_by_radius(wave.expand(1, 1, 16, 16), 8)  # 3 / 16 cycles: ring 3 of 8
    assert int(power.argmax()) == 3
    assert float(power[3] / power.sum()) == pytest.approx(1.0)
    ones = radial(torch.ones(12, 12), 6)
    assert torch.equal(ones, torch.ones(6))
    assert float(radii(8, 8).max()) == pytest.approx(math.sqrt(0.5))


def test_log_gap_is_the_gain_in_decibel():
    x = noise(4, 3, 16, 16)
    torch.testing.assert_close(log_gap(2 * x, x), torch.full((3,), 20 * math.log10(2)).double())
    assert torch.equal(log_gap(x, x), torch.zeros(3, dtype=torch.float64))


def test_weights_are_inverse_magnitudes_of_mean_one():
    x = noise(2, 1, 8, 8)
    w, size = inverse_magnitude(x), spectrum(x).abs()
    torch.testing.assert_close(w.mean((-2, -1)), torch.ones(2, 1, dtype=torch.float64))
    big = size > 1e-3 * size.amax((-2, -1), keepdim=True)
    ratio = (w * size)[big].unflatten(0, (2, -1)) if big.all() else None
    assert ratio is not None
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    torch.testing.assert_close(inverse_magnitude(x, 0.0), torch.ones_like(x))
    spot = torch.zeros(1, 1, 8, 8)
    spot[..., 2, 3] = 5.0  # |F| is constant
    torch.testing.assert_close(inverse_magnitude(spot), torch.ones(1, 1, 8, 8))
    flat = inverse_magnitude(torch.ones(1, 1, 8, 8))  # only frequency zero: the others at the floor
    assert float(flat[0, 0, 1, 1] / flat[0, 0, 0, 0]) == pytest.approx(1000)
    assert inverse_magnitude(torch.zeros(1, 1, 4, 4)).isfinite().all()


@pytest.mark.parametrize("alpha", [0.1, 0.6, 0.95])
def test_wiener_is_the_best_linear_filter(alpha):
    """Closed form against the moments of x = alpha x0 + sigma noise, and no filter is better."""
    sigma, s = math.sqrt(1 - alpha**2), torch.tensor([0.01, 0.5, 1.0, 30.0], dtype=torch.float64)
    h, g = wiener(s, alpha, sigma)
    of_noise, of_x0 = wiener_error(s, alpha, sigma)

    def errors(h, g):  # E|h x - noise|^2 and E|g x - x0|^2
        return (
            (h * alpha) ** 2 * s + (h * sigma - 1) ** 2,
            (g * alpha - 1) ** 2 * s + (g * sigma) ** 2,
        )

    for found, expected in zip(errors(h, g), (of_noise, of_x0)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for off in (-1e-3, 1e-3):
        worse = errors(h + off, g + off)
        assert (worse[0] > of_noise).all()
        assert (worse[1] > of_x0).all()


def test_wiener_at_the_ends():
    s = torch.tensor([0.5, 4.0], dtype=torch.float64)
    h, g = wiener(s, 0.0, 1.0)
    assert torch.equal(h, torch.ones(2).double())
    assert torch.equal(g, torch.zeros(2).double())
    _, g = wiener(s, 1.0, 0.0)
    assert torch.equal(g, torch.ones(2).double())


def test_bad_input():
    with pytest.raises(ValueError, match="even height"):
        haar(torch.ones(1, 3, 5, 4))
    with pytest.raises(ValueError, match="expected"):
        unhaar(torch.ones(1, 3, 2, 2))
