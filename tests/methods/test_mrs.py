"""MRS: the sheet's formulas, written out here once more, against the solvers; exact cases; nets."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tests.tiny import tiny_unet

import effuse
from effuse.core import Denoiser, Gaussian, Mixture, Prediction, sample
from effuse.core.clip import Clip, Clipped
from effuse.ops import randn_like
from effuse.processes import (
    Above,
    CosineRate,
    Karras,
    Leading,
    Linear,
    Linspace,
    MeanReverting,
    Power,
    Rising,
    Steady,
    Tapered,
    Trailing,
    Uniform,
    UniformLogSNR,
)
from effuse.restore.reverting import Beside, OfData, OfNoise, OfVelocity, Restorer
from effuse.solvers import DDIM, Ancestral, DPMpp2M
from effuse.solvers.mrs import MRS, MRSSDE, AlongData, AlongNoise, ReverseEuler, bend

FORMS = {"data": AlongData(), "noise": AlongNoise()}
FREE = MeanReverting()
FIRST = 1 / len(FREE)


def f64(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Said(Denoiser):
    """Answers a given half at each level: x0(t) or noise(t), whatever x is."""

    def __init__(self, process, *, x0=None, noise=None):
        super().__init__()
        self.process, self.x0, self.noise = process, x0, noise

    def forward(self, x, t, **cond):
        if self.x0 is not None:
            return self.process.complete(x, t, x0=self.x0(t).expand_as(x).to(x))
        return self.process.complete(x, t, noise=self.noise(t).expand_as(x).to(x))


def lam(process, t) -> float:
    return float(process.logsnr(t)) / 2


# ------------------------------------------------------------------ the process


@pytest.mark.parametrize("rate", [CosineRate(), Rising(), Steady()], ids=repr)
def test_tables(rate):
    """The tables of IR-SDE, entry by entry: alpha_k = exp(-cumsum(theta)_k dt)."""
    process, T, eps, spread = MeanReverting(rate), 100, 0.005, 50 / 255
    k = torch.arange(T + 1, dtype=torch.float64)
    if isinstance(rate, CosineRate):
        n = T + 2
        c = torch.cos((torch.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2).double() ** 2
        theta = torch.stack([1 - c[i + 1] / c[0] for i in range(T + 1)])
    elif isinstance(rate, Rising):
        theta = torch.linspace(1e-4, 0.02, T + 1, dtype=torch.float64)
    else:
        theta = torch.ones(T + 1, dtype=torch.float64)
    dt = -math.log(eps) / theta.sum()
    alpha = (-theta.cumsum(0) * dt).exp()
    t = process.time_of(k)
    torch.testing.assert_close(process.alpha(t), alpha, rtol=1e-5, atol=1e-7)
    sigma = spread * (1 - alpha**2).sqrt()
    torch.testing.assert_close(process.sigma(t), sigma, rtol=2e-3, atol=1e-7)
    assert float(process.alpha(1.0)) == pytest.approx(eps, rel=1e-12)
    assert float(process.sigma(1.0)) == pytest.approx(spread * math.sqrt(1 - eps**2), rel=1e-12)
    if isinstance(rate, CosineRate):
        assert float(process.alpha(t[0])) == pytest.approx(0.99994, abs=1e-5)
        assert lam(process, 1.0) == pytest.approx(-3.67, abs=0.01)
    torch.testing.assert_close(process.index_at(t), k, rtol=0, atol=1e-9)


def test_rates_are_those_of_the_sde():
    """d log alpha = -theta, g^2 = 2 spread^2 theta; at an entry those of the interval below."""
    theta = CosineRate()(101)
    dt = -math.log(0.005) / float(theta.sum())
    for k in (3, 50, 100):
        t = FREE.time_of(k)
        per_t = float(theta[k]) * dt * 101
        d_alpha = FREE.rates(t)[0]
        assert float(d_alpha / FREE.alpha(t)) == pytest.approx(-per_t, rel=1e-9)
        assert float(FREE.diffusion(t)) ** 2 == pytest.approx(2 * (50 / 255) ** 2 * per_t, rel=1e-9)
    mu, x = f64(0, 4, 3), f64(1, 4, 3)
    torch.testing.assert_close(FREE.toward(mu).drift(x, t), per_t * (mu - x), rtol=1e-9, atol=1e-12)


def test_a_bound_process_is_the_equation():
    mu, x0, noise = f64(0, 5, 3, 2, 2), f64(1, 5, 3, 2, 2), f64(2, 5, 3, 2, 2)
    process, levels = FREE.toward(mu), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    for t in (0.3, 1.0, levels):
        a, s = FREE.alpha(t), FREE.sigma(t)
        a, s = (c.reshape(-1, 1, 1, 1) for c in (a, s))
        x = a * x0 + (1 - a) * mu + s * noise
        torch.testing.assert_close(process.corrupt(x0, t, noise), x)
        torch.testing.assert_close(process.complete(x, t, x0=x0).noise, noise)
        torch.testing.assert_close(process.complete(x, t, noise=noise).x0, x0)
    x = process.corrupt(x0, 0.9, noise)
    walked = process.advance(x, 0.9, levels, Prediction(x0, noise))
    torch.testing.assert_close(walked, process.corrupt(x0, levels, noise))
    t, h = 0.61804, 1e-6
    slope = (process.corrupt(x0, t + h, noise) - process.corrupt(x0, t - h, noise)) / (2 * h)
    torch.testing.assert_close(
        process.velocity(t, Prediction(x0, noise)), slope, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(process.corrupt(x0, 0.0, noise), x0)
    near = mu[:1].float()
    many = FREE.toward(near).prior((20_000, 3, 2, 2), rng=torch.Generator().manual_seed(0))
    assert (many.mean(0) - near[0]).abs().max() < 0.006  # mu, not (1 - alpha) mu
    assert abs(float((many - near).std()) / (50 / 255) - 1) < 0.01


def test_what_a_row_reverts_to_is_its_own():
    mu, x = f64(0, 4, 3), f64(1, 4, 3)
    model = Gaussian(FREE.toward(mu), 0.4, 0.2)
    times = Uniform(end=FIRST)(FREE, 6)
    both = sample(model, MRS(), x, times)
    for i in range(4):
        one = Gaussian(FREE.toward(mu[i : i + 1]), 0.4, 0.2)
        alone = sample(one, MRS(), x[i : i + 1], times)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MeanReverting(spread=50), "divide it, 50 / 255"),
        (lambda: MeanReverting(spread=0.0), "deviation in"),
        (lambda: MeanReverting(remains=1.0), "remains=1.0"),
        (lambda: MeanReverting(steps=0), "steps=0"),
        (lambda: MeanReverting(lambda n: torch.zeros(n)), "rates above zero"),
        (lambda: Rising(0.0), "0 < low"),
        (lambda: CosineRate(1.5), "offset"),
        (lambda: FREE.toward(torch.zeros(3)), r"expected floating-point rows \(B, \*\)"),
        (lambda: FREE.toward(torch.zeros(1, 3, dtype=torch.uint8)), "uint8"),
        (lambda: FREE.toward(torch.full((1, 3), torch.nan)), "finite values"),
        (lambda: FREE.toward(torch.zeros(2, 3)).corrupt(*[torch.zeros(4, 3)] * 2), "corrupt"),
        (lambda: FREE.toward(torch.zeros(2, 3)).prior((4, 3)), "does not fit a sample"),
    ],
)
def test_bad_processes(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


# ------------------------------------------------------------------ grids


def test_the_grids_of_the_paper():
    """Linspace, leading, trailing over entries; Karras in sigma / alpha and in t; even lambda."""
    index = FREE.index_at(Uniform(end=FIRST)(FREE, 20))
    torch.testing.assert_close(index, torch.linspace(100, 0, 21, dtype=torch.float64))
    for grid in (Leading(last="first"), Trailing(last="first"), Linspace(last="first")):
        entries = FREE.index_at(grid(FREE, 10))
        torch.testing.assert_close(entries, entries.round(), rtol=0, atol=1e-9)
        assert entries[-1] == pytest.approx(0)
    assert float(FREE.index_at(Trailing()(FREE, 10))[0]) == pytest.approx(100)
    karras = Karras()(FREE, 8)
    ratio = (FREE.sigma(karras[:-1]) / FREE.alpha(karras[:-1])) ** (1 / 7)
    torch.testing.assert_close(ratio.diff(), ratio.diff().mean().expand(7), rtol=1e-6, atol=0)
    power = Power(7.0, end=FIRST)(FREE, 8) ** (1 / 7)
    torch.testing.assert_close(power.diff(), power.diff().mean().expand(8), rtol=1e-9, atol=0)
    assert torch.equal(Power(1.0)(FREE, 5), Uniform()(FREE, 5))
    even = UniformLogSNR(1.0, FIRST)(FREE, 9)
    assert FREE.logsnr(even[:-1]).diff().std() < 1e-6
    assert even[-1] == 0


def test_a_least_lambda_moves_the_start():
    """lambda_min = -5 does nothing to 50 / 255, and clips a process that forgets more."""
    plain = Uniform(end=FIRST)
    assert torch.equal(Above(plain)(FREE, 10), plain(FREE, 10))
    deep = MeanReverting(remains=1e-6)
    times = Above(plain, -5.0)(deep, 10)
    assert lam(deep, times[0]) == pytest.approx(-5)
    assert float(times[-1]) == pytest.approx(FIRST)
    torch.testing.assert_close(times.diff(), times.diff().mean().expand(10))
    with pytest.raises(ValueError, match="at or below its end"):
        Above(plain, 40.0)(deep, 10)
    with pytest.raises(ValueError, match="rho"):
        Power(0.0)


# ------------------------------------------------------------------ formulas


def published(kind: str, form: str, x, mu, a, s, q, d1, z):
    """The sheet's four updates: from (a[0], s[0]) to (a[1], s[1]), q and D1 as there."""
    (a_s, a_t), (sig_s, sig_t) = a, s
    h = math.log(a_t / sig_t) - math.log(a_s / sig_s)
    e, n = math.exp, math.exp(-h)
    if (kind, form) == ("ode", "noise"):
        bent = (e(h) - 1) * q + ((e(h) - 1) / h - 1) * d1
        return a_t / a_s * x + (1 - a_t / a_s) * mu - sig_t * bent
    if (kind, form) == ("ode", "data"):
        r = sig_t / sig_s
        bent = (n - 1) * q - ((n - 1) / h + 1) * d1
        return r * x + (1 - r + r * a_s - a_t) * mu - a_t * bent
    if form == "noise":
        bent = (e(h) - 1) * q + ((e(h) - 1) / h - 1) * d1
        fresh = sig_t * math.sqrt(e(2 * h) - 1)
        return a_t / a_s * x + (1 - a_t / a_s) * mu - 2 * sig_t * bent + fresh * z
    n2 = math.exp(-2 * h)
    return (
        sig_t / sig_s * n * x
        + (1 - a_t / a_s * n2 - a_t * (1 - n2)) * mu
        + a_t * (1 - n2) * q
        + a_t * (1 - (1 - n2) / (2 * h)) * d1
        + sig_t * math.sqrt(1 - n2) * z
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["ode", "sde"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("bound", [True, False], ids=["mu", "vp"])
def test_updates_are_those_of_the_paper(form, kind, order, bound):
    """Two steps of uneven length; with mu = 0 and a VP process these are DPM-Solver's."""
    mu = f64(0, 6, 3) if bound else torch.zeros(6, 3, dtype=torch.float64)
    process = FREE.toward(mu) if bound else Linear()
    model = Mixture(process, torch.tensor([[0.2, 0.1, 0.9], [0.8, 0.5, 0.0]]), 0.1)
    solver = (MRS if kind == "ode" else MRSSDE)(order, FORMS[form])
    x, state, q_before, h_before = mu + 0.2 * f64(1, 6, 3), None, None, None
    rng, twin = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for t, s in pairwise((0.8, 0.55, 0.4, 0.1)):
        a, sig = ([float(c) for c in (f(t), f(s))] for f in (process.alpha, process.sigma))
        h = math.log(a[1] / sig[1]) - math.log(a[0] / sig[0])
        pred = model(x, t)
        q = pred.x0 if form == "data" else pred.noise
        d1 = torch.zeros_like(q)
        if order == 2 and q_before is not None:
            d1 = (q - q_before) / (h_before / h)
        z = randn_like(x, twin)
        want = published(kind, form, x, mu, a, sig, q, d1, z)
        x, state = solver.step(model, x, t, s, state, rng=rng)
        torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-11)
        q_before, h_before = q, h


def test_bend_is_the_integral():
    """k1, k2 of e^(tau - h) by quadrature, on both sides of the series and for both signs."""
    for h in (-6.0, -1.0, -0.06, -0.04, 1e-4, 0.04, 0.06, 1.0, 6.0):
        tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        w = torch.exp(h * (tau - 1))
        k1, k2 = (float(k) for k in bend(torch.tensor(h, dtype=torch.float64)))
        assert k1 == pytest.approx(float((w * tau).sum() / w.sum()), rel=1e-7)
        assert k2 == pytest.approx(float((w * tau**2).sum() / w.sum()) / 2, rel=1e-7)
    assert [float(k) for k in bend(torch.zeros((), dtype=torch.float64))] == pytest.approx(
        [0.5, 1 / 6], rel=1e-14
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_polynomial_in_lambda_is_walked_exactly(form, order):
    """With a true past, any steps: the half of degree order - 1 in lambda leaves no error."""
    mu = 0.5 * torch.ones(1, 2, dtype=torch.float64)
    process = FREE.toward(mu)
    times = torch.tensor([0.9, 0.7, 0.6, 0.3, 0.25], dtype=torch.float64)

    def half(t):
        at = torch.as_tensor(process.logsnr(t) / 6).reshape(-1, 1)
        size = sum(c * at**k for k, c in enumerate((1.0, 0.7, -0.4)[:order]))
        return size * torch.tensor([[0.3, -0.2]], dtype=torch.float64)

    model = Said(process, **{"x0" if form == "data" else "noise": half})
    x = f64(1, 1, 2)
    solver, state = MRS(order, FORMS[form]), None
    for t, s in pairwise(times[:3]):  # to fill the past
        _, state = solver.step(model, x, t, s, state)
    got, _ = solver.step(model, x, times[2], times[3], state)
    fine = torch.linspace(float(times[2]), float(times[3]), 20_001, dtype=torch.float64)
    middle = (fine[1:] + fine[:-1]) / 2
    a_t, a_s = process.alpha(times[2]), process.alpha(times[3])
    sig_t, sig_s = process.sigma(times[2]), process.sigma(times[3])
    values = half(middle)
    if form == "data":  # d(y / sigma) = x0 d(alpha / sigma)
        rise = (process.alpha(fine) / process.sigma(fine)).diff().unsqueeze(1)
        y = sig_s * ((x - (1 - a_t) * mu) / sig_t + (values * rise).sum(0))
    else:  # d(y / alpha) = noise d(sigma / alpha)
        rise = (process.sigma(fine) / process.alpha(fine)).diff().unsqueeze(1)
        y = a_s * ((x - (1 - a_t) * mu) / a_t + (values * rise).sum(0))
    torch.testing.assert_close(got, y + (1 - a_s) * mu, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_the_third_order_needs_the_whole_second_derivative(form):
    """Observed with a true past: 3; with half of the second derivative, as published, 2."""
    process = MeanReverting(spread=1.0).toward(0.3)
    model = Gaussian(process, 0.4, 0.6)
    x = torch.tensor([[1.3]], dtype=torch.float64)

    def error(count: int, half: bool) -> float:
        low, high = process.logsnr(0.9), process.logsnr(0.2)
        rise = (high - low) / count
        logsnr = low + rise * torch.arange(-2, count + 1, dtype=torch.float64)
        times = process.time_at(logsnr)
        solver, state = MRS(3, FORMS[form]), None
        y = model.transport(x, times[2], times[0])
        for n, (t, s) in enumerate(pairwise(times)):
            before = state
            out, state = solver.step(model, y, t, s, state)
            if half and n >= 2:
                second = state[0].half - 2 * before[0].half + before[1].half
                h = lam(process, s) - lam(process, t)
                _, k2 = FORMS[form].bend(torch.tensor(h).double(), noisy=False)
                a, b = (float(f(s)) for f in (process.alpha, process.sigma))
                gain = a * -math.expm1(-h) if form == "data" else -b * math.expm1(h)
                out = out - gain * float(k2) / 2 * second
            y = model.transport(x, times[2], times[n + 1]) if n < 2 else out
        return float((y - model.transport(x, times[2], times[-1])).abs())

    orders = [math.log2(error(320, half) / error(640, half)) for half in (False, True)]
    assert orders[0] == pytest.approx(3, abs=0.15)
    assert orders[1] < 2.7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_a_whole_walk_to_a_picture(form, order):
    """Declared equals observed on the mean-reverting process, Gaussian and mixture data."""
    process = FREE.toward(f64(0, 8, 2))
    x = process.prior((8, 2), dtype=torch.float64, rng=torch.Generator().manual_seed(1))
    solver = MRS(order, FORMS[form])
    exact = Gaussian(process, 0.4, 0.2)
    mixed = Mixture(process, torch.tensor([[0.2, 0.6], [0.8, 0.3]]), 0.2)
    dense = sample(mixed, MRS(3), x, Power(2.0, end=FIRST)(process, 1500))
    for model, truth in ((exact, exact.transport(x, 1.0, FIRST)), (mixed, dense)):
        few, many = (
            float((sample(model, solver, x, Power(2.0, end=FIRST)(process, n)) - truth).abs().max())
            for n in (75, 300)
        )
        found = math.log(few / many, 4)
        assert found > solver.walk_order - 0.25, (few, many)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2])
def test_moments_of_the_stochastic_walk(form, order, monkeypatch):
    """Mean and variance of the walk, exact as it is affine in its noise: first order observed."""
    process = MeanReverting(spread=1.0).toward(0.5)
    model = Gaussian(process, 0.4, 0.6)

    def gap(steps: int) -> float:
        unit = torch.eye(steps + 2, dtype=torch.float64)  # a row a source of noise, and one without
        drawn = iter(range(1, steps + 1))
        monkeypatch.setattr(
            "effuse.solvers.mrs.randn_like", lambda x, rng: unit[:, next(drawn)].unsqueeze(1)
        )
        start = process.shift(1.0) + process.sigma(1.0) * unit[:, :1]
        out = sample(model, MRSSDE(order, FORMS[form]), start, Power(2.0)(process, steps))[:, 0]
        mean, parts = out[-1], out[:-1] - out[-1]
        return abs(float(parts.square().sum()) / 0.36 - 1) + abs(float(mean) - 0.4)

    gaps = [gap(n) for n in (50, 100, 200)]
    assert gaps[1] < 0.65 * gaps[0]
    assert gaps[2] < 0.65 * gaps[1]
    assert gaps[2] < 0.05


# ------------------------------------------------------------------ exact cases


@pytest.mark.parametrize("times", [(1.0, 0.02), (1.0, 0.7, 0.65, 0.1, FIRST), (1.0, 0.5, 0.0)])
def test_a_point_is_found_in_one_step_along_the_data(times):
    x0, mu = f64(0, 4, 3), f64(1, 4, 3)
    process = FREE.toward(mu)
    model = Said(process, x0=lambda t: x0)
    x = process.prior((4, 3), dtype=torch.float64, rng=torch.Generator().manual_seed(2))
    noise = process.complete(x, times[0], x0=x0).noise
    for solver in (MRS(1), MRS(2), MRS(3), MRS(1, AlongNoise())):
        out = sample(model, solver, x, torch.tensor(times, dtype=torch.float64))
        torch.testing.assert_close(out, process.corrupt(x0, times[-1], noise))


def test_constant_noise_is_exact_along_the_noise_and_order_one_of_both_is_one_map():
    mu, noise = f64(0, 4, 3), f64(1, 4, 3)
    process = FREE.toward(mu)
    model = Said(process, noise=lambda t: noise)
    x = f64(2, 4, 3)
    x0 = process.complete(x, 0.9, noise=noise).x0
    for solver in (MRS(1, AlongNoise()), MRS(2, AlongNoise())):
        out = sample(model, solver, x, torch.tensor([0.9, 0.8, 0.3], dtype=torch.float64))
        torch.testing.assert_close(out, process.corrupt(x0, 0.3, noise))
    mixed = Mixture(process, torch.tensor([[0.2, 0.6, 0.1], [0.8, 0.3, 0.4]]), 0.2)
    times = Uniform(end=FIRST)(process, 7)
    a, b = (sample(mixed, MRS(1, form), x, times) for form in FORMS.values())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [MRS, MRSSDE])
def test_moving_everything_moves_the_sample(cls, form):
    """x, mu and x0 by c: the coefficients of x, x0 and mu sum to one."""
    mu, x, c = f64(0, 4, 3), f64(1, 4, 3), 0.37
    times = Uniform(end=FIRST)(FREE, 6)
    out = [
        sample(
            Gaussian(FREE.toward(mu + d), 0.4 + d, 0.2),
            cls(2, FORMS[form]),
            x + d,
            times,
            rng=torch.Generator().manual_seed(3),
        )
        for d in (0.0, c)
    ]
    torch.testing.assert_close(out[1], out[0] + c, rtol=0, atol=1e-10)


def test_the_first_stochastic_order_is_the_posterior():
    """With point data q(x_s | x_t, x0), mean and variance; it is `Ancestral`."""
    mu, x0, x = f64(0, 4, 3), f64(1, 4, 3), f64(2, 4, 3)
    process = FREE.toward(mu)
    model = Said(process, x0=lambda t: x0)
    t, s = 0.8, 0.5
    (a_t, sig_t), (a_s, sig_s) = (
        (float(process.alpha(v)), float(process.sigma(v))) for v in (t, s)
    )
    a_ts = a_t / a_s
    sig_ts = sig_t**2 - (a_ts * sig_s) ** 2  # of x_t given x_s
    off_t, off_0 = x - mu, x0 - mu
    mean = mu + (a_ts * sig_s**2 * off_t + a_s * sig_ts * off_0) / sig_t**2
    deviation = sig_s * math.sqrt(sig_ts) / sig_t
    h = lam(process, s) - lam(process, t)
    assert deviation**2 == pytest.approx(sig_s**2 * (1 - math.exp(-2 * h)))
    z = randn_like(x, torch.Generator().manual_seed(5))
    for solver in (MRSSDE(1), Ancestral()):
        got = solver.step(model, x, t, s, rng=torch.Generator().manual_seed(5)).x
        torch.testing.assert_close(got, mean + deviation * z)


def test_short_walks_lose_order_towards_their_end():
    times = Uniform(end=FIRST)(FREE, 5)
    model = Mixture(FREE.toward(0.5), torch.tensor([[0.2, 0.6], [0.8, 0.3]]), 0.05)
    x = 0.5 + 0.2 * f64(0, 4, 2)
    for order in (2, 3):
        solver = MRS(order).on(times)
        assert solver.falls == tuple(times.flip(0).tolist()[: order - 1])
        state, fall, y = None, None, x
        for n, (t, s) in enumerate(pairwise(times)):
            before, y, state_before = y, None, state
            y, state = solver.step(model, before, t, s, state_before)
            allowed = min(order, 5 - n)
            past = None if state_before is None else state_before[: allowed - 1]
            fall = MRS(allowed).step(model, before, t, s, past).x
            torch.testing.assert_close(y, fall, rtol=0, atol=1e-12)
    long = Uniform(end=FIRST)(FREE, 10)
    assert MRS(3).on(long) == MRS(3)
    assert MRS(3).on(times).on(long) == MRS(3)
    assert MRSSDE().on(times).falls == (float(times[-1]),)


def test_the_last_step_to_clean_data_gives_the_data():
    """Denoise to zero: x0 itself, along the data, of ODE and SDE, and of the SDE along noise."""
    model = Mixture(FREE.toward(0.5), torch.tensor([[0.2, 0.6], [0.8, 0.3]]), 0.05)
    x = 0.5 + 0.2 * f64(0, 4, 2)
    for solver in (MRS(), MRS(3, AlongNoise()), MRSSDE(), MRSSDE(2, AlongNoise())):
        state = solver.step(model, x, 0.5, 0.2, rng=torch.Generator()).state
        out = solver.step(model, x, 0.2, 0.0, state, rng=torch.Generator()).x
        torch.testing.assert_close(out, model(x, 0.2).x0, rtol=0, atol=1e-12)


def test_a_walk_may_start_from_a_noisy_state():
    process = FREE.toward(0.5)
    model = Gaussian(process, 0.4, 0.2)
    x = process.corrupt(0.4 + 0.2 * f64(0, 50, 2), 0.5, f64(1, 50, 2))
    out = sample(model, MRS(), x, Power(2.0, 0.5, FIRST)(process, 100))
    torch.testing.assert_close(out, model.transport(x, 0.5, FIRST), rtol=0, atol=2e-4)


def test_thresholding_is_of_the_data():
    """The reference's dynamic thresholding (0.995, 1.5) by `Clipped`, before the solver sees it."""
    process = FREE.toward(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    wild = 3 * f64(0, 2, 3, 4, 4)
    model = Clipped(Said(process, x0=lambda t: wild), Clip(1.5, 0.995))
    s = torch.quantile(wild.flatten(1).abs(), 0.995, dim=1).clamp(1, 1.5).reshape(2, 1, 1, 1)
    out = sample(model, MRS(), f64(1, 2, 3, 4, 4), Uniform()(process, 4))
    torch.testing.assert_close(out, wild.clamp(-s, s) / s)


def test_euler_is_the_sde_step():
    """x + [theta (mu - x) - g^2 score] dt + g dW backwards, half the score for the ODE."""
    mu, x = f64(0, 4, 3), f64(1, 4, 3)
    process = FREE.toward(mu)
    model = Gaussian(process, 0.4, 0.2)
    t, s = FREE.time_of(60), FREE.time_of(59)
    theta = CosineRate()(101)
    step = float(theta[60]) * -math.log(0.005) / float(theta.sum())
    score = -model(x, t).noise / process.sigma(t)
    g2 = 2 * (50 / 255) ** 2 * step
    z = randn_like(x, torch.Generator().manual_seed(1))
    for eta in (0.0, 1.0):
        want = x - step * (mu - x) + (1 + eta) / 2 * g2 * score + eta * math.sqrt(g2) * z
        got = ReverseEuler(eta).step(model, x, t, s, rng=torch.Generator().manual_seed(1)).x
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    process = MeanReverting(Steady()).toward(mu)  # without jumps of theta
    model = Gaussian(process, 0.4, 0.2)
    truth = model.transport(x, 1.0, 0.1)
    errors = [
        float(
            (sample(model, ReverseEuler(0.0), x, Uniform(end=0.1)(process, n)) - truth).abs().max()
        )
        for n in (200, 800)
    ]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MRS(4), "order=4"),
        (lambda: MRSSDE(3), "order=3"),
        (lambda: MRS(form="data"), r"expected AlongData\(\) or AlongNoise\(\)"),
        (lambda: ReverseEuler(2.0), "eta"),
    ],
)
def test_bad_solvers(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


# ------------------------------------------------------------------ networks


ANSWERS = {"noise": OfNoise(), "data": OfData(), "velocity": OfVelocity()}


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_gives_back_its_pair(answer):
    mu, x0, noise = f64(0, 4, 3, 2, 2), f64(1, 4, 3, 2, 2), f64(2, 4, 3, 2, 2)
    process, kind = FREE.toward(mu), ANSWERS[answer]
    for t in (0.05, 1.0, torch.tensor([0.1, 0.4, 0.9, 1.0]).double()):
        target = kind.target(process, x0, noise, t)
        pair = kind.pair(process, process.corrupt(x0, t, noise), t, target)
        torch.testing.assert_close(pair.x0, x0, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(pair.noise, noise, rtol=1e-8, atol=1e-9)


def test_the_velocity_is_that_of_the_angle():
    """With y = x - mu, y = cos u y0 + sin u (spread noise): v = dy/du."""
    process = FREE.toward(torch.full((1, 2), 0.5, dtype=torch.float64))
    x0, noise, t = f64(0, 1, 2), f64(1, 1, 2), 0.37
    u = torch.acos(process.alpha(t)).item()
    want = -math.sin(u) * (x0 - 0.5) + math.cos(u) * (50 / 255) * noise
    torch.testing.assert_close(OfVelocity().target(process, x0, noise, t), want)


class Oracle(torch.nn.Module):
    """Answers as a perfect network trained for `kind` on one picture."""

    def __init__(self, kind, x0):
        super().__init__()
        self.kind, self.x0, self.asked = kind, x0, []

    def forward(self, x, mu, entry):
        self.asked.append(entry)
        process, t = FREE.toward(mu), FREE.time_of(entry.double())
        noise = process.complete(x, t, x0=self.x0.expand_as(x)).noise
        return self.kind.target(process, self.x0.expand_as(x), noise, t)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_restorer_finds_the_picture_whatever_its_network_answers(answer):
    x0, mu = torch.rand(1, 3, 8, 8).double(), torch.rand(2, 3, 8, 8).double()
    kind = ANSWERS[answer]
    model = Restorer(Oracle(kind, x0), FREE, kind)
    for solver in (None, MRSSDE(), DPMpp2M()):
        rng = torch.Generator().manual_seed(0)
        out = model.restore(mu, solver, steps=6, grid=Uniform(), rng=rng)
        torch.testing.assert_close(out, x0.expand(2, 3, 8, 8), rtol=0, atol=1e-6)
    model.audit(x0, mu[:1], rng=torch.Generator().manual_seed(0))
    for other in ANSWERS.values():
        if other != kind:
            wrong = Restorer(Oracle(kind, x0), FREE, other)
            with pytest.raises(ValueError, match=type(kind).__name__):
                wrong.audit(x0, mu[:1], rng=torch.Generator().manual_seed(0))


def test_what_the_network_is_told():
    mu = torch.rand(1, 3, 4, 4)
    for whole in (False, True):
        oracle = Oracle(OfData(), torch.rand(1, 3, 4, 4))
        model = Restorer(oracle, FREE, OfData(), whole=whole)
        model.restore(mu, steps=8, rng=torch.Generator())
        asked = torch.cat(oracle.asked).double()
        want = torch.linspace(100, -1, 9, dtype=torch.float64)[:-1]
        torch.testing.assert_close(asked, want.round() if whole else want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", [MRS(), MRS(3, AlongNoise()), MRSSDE()], ids=repr)
def test_a_real_network_restores_row_by_row(solver, dtype):
    """UNet2DModel of six channels, its weights in half precision too."""
    unet = tiny_unet(in_channels=6).to(dtype)
    model = Restorer(Beside(unet), FREE, OfVelocity())
    mu = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(rows):
        return model.restore(rows, solver, steps=4, rng=torch.Generator().manual_seed(1))

    out = run(mu)
    assert out.dtype == torch.float32
    assert ((out >= 0) & (out <= 1)).all()
    assert torch.equal(out, run(mu))
    first = run(torch.cat([mu[:1], mu[1:].flip(0)]))[:1]
    torch.testing.assert_close(
        out[:1], first, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
    )
    if dtype == torch.bfloat16:
        full = Restorer(Beside(tiny_unet(in_channels=6)), FREE, OfVelocity())
        near = full.restore(mu, solver, steps=4, rng=torch.Generator().manual_seed(1))
        assert (out - near).square().mean().sqrt() < 0.05


def test_bad_pictures_and_networks():
    model = Restorer(Oracle(OfData(), torch.zeros(1, 3, 4, 4)), FREE, OfData())
    with pytest.raises(ValueError, match=r"expected degraded pictures \(B, C, H, W\) in \[0, 1\]"):
        model.toward(torch.full((1, 3, 4, 4), 128.0))
    with pytest.raises(ValueError, match="degraded pictures"):
        model.toward(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="told of its pictures only"):
        model.toward(torch.zeros(1, 3, 4, 4))(torch.zeros(1, 3, 4, 4), 0.5, label=1)
    short = Restorer(lambda x, mu, k: x[:, :1], FREE, OfData())
    with pytest.raises(ValueError, match="expected the same shape"):
        short.restore(torch.zeros(1, 3, 4, 4), steps=2)


@pytest.mark.parametrize("name", ["emoji", "emoji-dit", "pixels"])
def test_it_draws_with_the_house(name):
    """Any pipeline: there mu is zero. First order is DDIM; second comes nearer to the ODE."""
    model = effuse.wrap(effuse.load(f"house:{name}"))
    what = {"emoji": ["red apple"], "emoji-dit": [3], "pixels": 1}[name]
    noise = model.prior(1, rng=torch.Generator().manual_seed(0))

    def draw(solver, steps):
        return model.sample(
            what,
            solver,
            steps=steps,
            latents=noise,
            decode=False,
            guidance=None if name == "pixels" else 1.0,
            grid=Tapered(),
        )

    truth = draw(DPMpp2M(), 40)
    plain = draw(DDIM(), 10)
    torch.testing.assert_close(draw(MRS(1), 10), plain, rtol=0, atol=2e-3)
    assert (draw(MRS(), 10) - truth).norm() < (plain - truth).norm()
