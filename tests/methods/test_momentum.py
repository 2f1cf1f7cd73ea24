"""Momentum samplers and their bases: closed forms, limits, orders, stability, diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from effuse.core import Denoiser, Gaussian, Mixture, Prediction, Process, sample
from effuse.core.fields import build, dump_fields
from effuse.evaluate.magnitude import MagnitudeScore
from effuse.processes import VE, Cosine, Flow, Linear, SubVP, Tabulated, Trailing, Uniform
from effuse.solvers.ddim import DDIM
from effuse.solvers.dpmpp import DPMpp2M
from effuse.solvers.momentum import HeavyBall, Momentum, Nesterov
from effuse.solvers.multistep import weights
from effuse.solvers.plms import PLMS
from effuse.solvers.stability import growth, real_interval, recurrence, stable
from effuse.solvers.unipc import UniPC

BETAS = (1.0, 0.8, 0.5, 0.25)
ORDERS = (1, 2, 3, 4, 5)


class Plain(Process):
    """alpha = 1, sigma = t: the scaled variables are the plain ones."""

    def alpha(self, t):
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))

    def sigma(self, t):
        return torch.as_tensor(t, dtype=torch.float64)


class Field(Denoiser):
    """A noise field given as a function of (x, t)."""

    def __init__(self, function, process=None):
        super().__init__()
        self.function, self.process = function, process or Plain()

    def forward(self, x, t, **cond):
        noise = self.function(x, t)
        p = self.process
        return Prediction((x - p.sigma(t) * noise) / p.alpha(t), noise)


def start(process, count=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return process.prior((count, 2), rng=rng, dtype=torch.float64)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# weights


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("order", ORDERS)
def test_weights_follow_from_the_order_conditions(order, beta):
    """Smoothing polynomials below `order` and weighing them integrates them exactly."""
    lags = np.arange(4000)
    kernel = beta * (1 - beta) ** lags.astype(float)
    powers = range(order)
    smoothed = np.array([[(kernel * (-j - lags + 0.0) ** m).sum() for j in powers] for m in powers])
    exact = np.array([1 / (m + 1) for m in powers])
    found = beta * np.linalg.solve(smoothed, exact)
    np.testing.assert_allclose(weights(order, beta), found, rtol=1e-8)
    assert sum(weights(order, beta)) == pytest.approx(beta, abs=1e-14)


def test_adams_bashforth_weights_are_the_known_ones():
    assert weights(1) == (1,)
    assert weights(2) == (1.5, -0.5)
    np.testing.assert_allclose(weights(3), np.array([23, -16, 5]) / 12)
    np.testing.assert_allclose(weights(4), np.array([55, -59, 37, -9]) / 24)
    np.testing.assert_allclose(weights(5), np.array([1901, -2774, 2616, -1274, 251]) / 720)


def test_plms_equals_an_independent_adams_bashforth():
    process = Linear()
    model = Gaussian(process, 0.4, 0.6)
    x, times = start(process), Uniform()(process, 12)
    for order in (1, 2, 3, 4):
        y, e = x / process.alpha(1.0), []
        for t, s in pairwise(times):
            r_t, r_s = (process.sigma(u) / process.alpha(u) for u in (t, s))
            e.insert(0, model(process.alpha(t) * y, t).noise)
            k = min(order, len(e))
            nodes = np.arange(0, -k, -1.0)
            step = torch.zeros_like(y)
            for j in range(k):  # the integral of the Lagrange polynomial over the coming step
                others = np.delete(nodes, j)
                poly = np.poly1d(others, r=True) / np.prod(nodes[j] - others)
                step += float(poly.integ()(1.0)) * e[j]
            y = y + (r_s - r_t) * step
        close(sample(model, PLMS(order), x, times), process.alpha(0.0) * y, 1e-11)


# limits


@pytest.mark.parametrize("process", [Linear(), Cosine(), Flow(), VE()], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_beta_one_is_the_base(process, order):
    model = Gaussian(process, 0.4, 0.6)
    x, times = start(process), Uniform()(process, 9)
    plain = sample(model, PLMS(order), x, times)
    for solver in (
        Momentum(order, 1.0),
        HeavyBall(1.0, PLMS(order)),
        Nesterov(1.0, PLMS(order)),
    ):
        close(sample(model, solver, x, times), plain, 1e-11)
    if order == 1:
        close(plain, sample(model, DDIM(), x, times), 1e-11)


@pytest.mark.parametrize(
    "base", [DPMpp2M(), UniPC(), UniPC(3), UniPC(2, corrector=False)], ids=repr
)
def test_beta_one_is_the_data_base(base):
    model = Gaussian(Cosine(), 0.4, 0.6)
    x, times = start(Cosine()), Uniform()(Cosine(), 9)
    plain = sample(model, base, x, times)
    for kind in (HeavyBall, Nesterov):
        close(sample(model, kind(1.0, base), x, times), plain)
        assert (sample(model, kind(0.7, base), x, times) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_order_one_is_the_same_for_both(beta):
    model = Gaussian(Flow(), 0.4, 0.6)
    x, times = start(Flow()), Uniform()(Flow(), 9)
    one = sample(model, Momentum(1, beta), x, times)
    close(one, sample(model, HeavyBall(beta, PLMS(1)), x, times))


def test_first_order_unipc_without_corrector_is_ddim():
    model = Gaussian(Flow(), 0.4, 0.6)
    x, times = start(Flow()), Uniform()(Flow(), 9)
    plain = sample(model, DDIM(), x, times)
    close(sample(model, UniPC(1, corrector=False), x, times), plain)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("order", ORDERS)
def test_constant_noise_is_walked_exactly(order, beta):
    e = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    process = Linear()
    model = Field(lambda x, t: e, process)
    x = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    times = torch.tensor([1.0, 0.7, 0.5, 0.45, 0.2, 0.1, 0.0], dtype=torch.float64)
    r = process.sigma(1.0) / process.alpha(1.0)
    for solver in (
        Momentum(order, beta),
        HeavyBall(beta, PLMS(order)),
        Nesterov(beta, PLMS(order)),
    ):
        close(sample(model, solver, x, times), x / process.alpha(1.0) - r * e, 1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_second_order_integrates_a_linear_noise_exactly(beta):
    """With v at its stationary value the lag is undone in every step."""
    h = -0.05
    model = Field(lambda x, t: torch.full_like(x, float(t)))
    x = torch.zeros(1, 1, dtype=torch.float64)
    state = (torch.full_like(x, 1.0 - h - h * (1 - beta) / beta),)
    for n in range(10):
        t, s = 1.0 + n * h, 1.0 + (n + 1) * h
        out = Momentum(2, beta).step(model, x, t, s, state)
        close(out.x - x, torch.full_like(x, (s**2 - t**2) / 2))
        close(out.state[0], torch.full_like(x, t - h * (1 - beta) / beta))
        x, state = out


def test_heavy_ball_is_the_recursion_of_the_paper():
    """HB and NT over PLMS-2, and HB over DPM-Solver++ 2M, written out."""
    process, beta = Linear(), 0.6
    model = Gaussian(process, 0.4, 0.6)
    x, times = start(process), torch.linspace(0.95, 0.05, 9, dtype=torch.float64)
    for look in (False, True):
        y, e, v = x / process.alpha(times[0]), [], None
        for t, s in pairwise(times):
            e.insert(0, model(process.alpha(t) * y, t).noise)
            d = 1.5 * e[0] - 0.5 * e[1] if len(e) > 1 else e[0]
            v = d if v is None else (1 - beta) * v + beta * d
            r_t, r_s = (process.sigma(u) / process.alpha(u) for u in (t, s))
            y = y + (r_s - r_t) * ((1 - beta) * v + beta * d if look else v)
        solver = (Nesterov if look else HeavyBall)(beta, PLMS(2))
        close(sample(model, solver, x, times), y * process.alpha(times[-1]), 1e-10)

    z, past, v = x, None, None
    for t, s in pairwise(times):
        lam_t, lam_s = (process.logsnr(u) / 2 for u in (t, s))
        h, m = lam_s - lam_t, model(z, t).x0
        d = m
        if past is not None:
            d = m + 0.5 * h / past[1] * (m - past[0])
            v = d if v is None else (1 - beta) * v + beta * d
            d = v
        z = process.sigma(s) / process.sigma(t) * z - process.alpha(s) * torch.expm1(-h) * d
        past = (m, h)
    close(sample(model, HeavyBall(beta, DPMpp2M()), x, times), z, 1e-10)


@pytest.mark.parametrize("predictor", [True, False])
def test_heavy_ball_on_unipc_written_out(predictor):
    process, beta = Linear(), 0.6
    model = Gaussian(process, 0.4, 0.6)
    x, times = start(process), torch.linspace(0.95, 0.05, 9, dtype=torch.float64)
    lam = [float(process.logsnr(u) / 2) for u in times]
    m, z, last, v, w = [], x, None, None, None
    for n, (t, s) in enumerate(pairwise(times)):
        m.append(model(z, t).x0)
        if n > 0:  # correct the step from n - 1 to n
            h, a, b = lam[n] - lam[n - 1], times[n - 1], times[n]
            d = m[n - 1] + 0.5 * (m[n] - m[n - 1])
            if n > 1:
                rk = (lam[n - 2] - lam[n - 1]) / h
                p1, p2 = math.expm1(-h) / -h - 1, (math.expm1(-h) / -h - 1) / -h - 0.5
                matrix = np.array([[1, 1], [rk, 1]])
                rho = np.linalg.solve(matrix, np.array([p1, 2 * p2]) / math.expm1(-h))
                d = m[n - 1] + rho[0] * (m[n - 2] - m[n - 1]) / rk + rho[1] * (m[n] - m[n - 1])
                w = d if w is None else (1 - beta) * w + beta * d
                d = w
            keep = process.sigma(b) / process.sigma(a)
            z = keep * last - process.alpha(b) * math.expm1(-h) * d
        last, h = z, lam[n + 1] - lam[n]
        d = m[n]
        if n > 0:
            d = m[n] + 0.5 * h / (lam[n] - lam[n - 1]) * (m[n] - m[n - 1])
            v = d if v is None else (1 - beta) * v + beta * d
            d = v if predictor else d
        keep = process.sigma(s) / process.sigma(t)
        z = keep * z - process.alpha(s) * math.expm1(-h) * d
    solver = HeavyBall(beta, UniPC(), predictor=predictor)
    close(sample(model, solver, x, times), z, 1e-9)


# stability


@pytest.mark.parametrize("beta", BETAS)
def test_real_stability_intervals_have_their_closed_forms(beta):
    for order, bound in zip((1, 2, 3, 4), (2, 1, 6 / 11, 3 / 10), strict=True):
        assert real_interval(PLMS(order)) == pytest.approx(bound, abs=1e-7)
        hb = real_interval(HeavyBall(beta, PLMS(order)))
        assert hb == pytest.approx(bound * (2 - beta) / beta, rel=1e-7)
    assert real_interval(Momentum(2, beta)) == pytest.approx(2 - beta, rel=1e-7)
    assert real_interval(Momentum(3, beta)) == pytest.approx(6 * (2 - beta) / (12 - beta), rel=1e-7)
    assert real_interval(Momentum(4, beta)) == pytest.approx(3 * (2 - beta) / (11 - beta), rel=1e-7)


@pytest.mark.parametrize(
    "solver",
    [PLMS(3), Momentum(2, 0.5), Momentum(4, 0.7), HeavyBall(0.5, PLMS(4)), Nesterov(0.6, PLMS(2))],
    ids=repr,
)
def test_the_solver_grows_as_the_root_condition_says(solver):
    """On y' = lambda y the solver's own steps grow by the largest root, real or rotating."""
    edge = real_interval(solver)
    for z in (-0.9 * edge, -1.1 * edge, -0.3 * edge + 0.4j * edge, -0.8 * edge + 0.9j * edge):
        count = 300
        model = Field(lambda x, t, rate=-z * count: rate * x)
        x = torch.ones(1, 1, dtype=torch.complex128)
        state, norms = None, []
        for n in range(count):
            x, state = solver.step(model, x, 1 - n / count, 1 - (n + 1) / count, state)
            norms.append(float(x.abs()))
        # complex or double roots beat: compare over many steps, by the largest of a few
        seen = math.log(max(norms[-10:]) / max(norms[90:100])) / 200
        said = math.log(float(growth(solver, torch.tensor(z))))
        assert seen == pytest.approx(said, abs=2e-2), z
        if abs(said) > 0.03:
            assert (seen < 0) == bool(stable(solver, torch.tensor(z)))


def test_momentum_widens_and_high_order_narrows():
    assert real_interval(PLMS(4)) < real_interval(Momentum(3.5)) < real_interval(PLMS(2))
    axes = torch.meshgrid(torch.linspace(-3, 0, 40), torch.linspace(0, 2, 40), indexing="ij")
    grid = torch.complex(*axes)
    areas = [stable(s, grid).double().mean() for s in (PLMS(2), Momentum(2, 0.5))]
    assert areas[1] > areas[0]
    assert stable(PLMS(1), torch.tensor([-1.0, -2.1])).tolist() == [True, False]
    with pytest.raises(TypeError, match="expected PLMS, Momentum"):
        recurrence(UniPC())
    with pytest.raises(TypeError, match="expected a base of PLMS"):
        recurrence(HeavyBall(0.8, UniPC()))


# orders


def slope(solver, exact_start=True):
    model = Gaussian(Plain(), 0.4, 0.6)
    x = torch.tensor([[1.3]], dtype=torch.float64)
    errors = []
    for count in (80, 160):
        h, lead = 0.75 / count, 120 if exact_start else 0
        state, y = None, model.transport(x, 1.0, 1.0 + lead * h)
        for n in range(-lead, count):  # levels before 1 only fill the history, on the exact path
            t, s = 1.0 - n * h, 1.0 - (n + 1) * h
            y, state = solver.step(model, y, t, s, state)
            if n < 0:
                y = model.transport(x, 1.0, s)
        errors.append(float((y - model.transport(x, 1.0, 0.25)).abs().max()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("order", ORDERS)
def test_orders_with_exact_start(order):
    assert slope(PLMS(order)) == pytest.approx(order, abs=0.25)
    assert slope(Momentum(order, 0.6)) == pytest.approx(order, abs=0.35)
    assert slope(HeavyBall(0.6, PLMS(order))) == pytest.approx(1, abs=0.15)
    assert slope(Nesterov(0.6, PLMS(order))) == pytest.approx(1, abs=0.15)


def test_a_low_order_start_caps_the_slope_at_two():
    for solver in (Momentum(3, 0.6), Momentum(4, 0.6), PLMS(4)):
        assert slope(solver, exact_start=False) == pytest.approx(2, abs=0.2)
    assert HeavyBall(0.6).order == 1
    assert HeavyBall(1.0, PLMS(3)).order == 3


@pytest.mark.parametrize(("solver", "order"), [(UniPC(2), 2), (UniPC(3), 3), (DPMpp2M(), 2)])
def test_order_of_data_solvers(solver, order):
    model = Gaussian(Cosine(), 0.4, 0.6)
    x = start(Cosine())
    errors = []
    for count in (64, 128):
        times = torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64)
        truth = model.transport(x, times[0], times[-1])
        errors.append(float((sample(model, solver, x, times) - truth).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.25


# heads, ends, batches, precision


def test_noise_velocity_and_data_heads_give_the_same_step():
    class Head(Denoiser):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.exact, self.process = kind, Gaussian(Linear(), 0.4, 0.6), Linear()

        def forward(self, x, t, **cond):
            a, s = self.process.alpha(t), self.process.sigma(t)
            x0, noise = self.exact(x, t)
            if self.kind == "noise":
                return Prediction((x - s * noise) / a, noise)
            if self.kind == "x0":
                return Prediction(x0, (x - a * x0) / s)
            v = a * noise - s * x0
            return Prediction(a * x - s * v, s * x + a * v)

    x, times = start(Linear()), torch.linspace(1, 0.01, 9, dtype=torch.float64)
    for solver in (Momentum(3, 0.7), HeavyBall(0.8), HeavyBall(0.8, UniPC()), Nesterov(0.8)):
        outs = [sample(Head(kind), solver, x, times) for kind in ("noise", "v", "x0")]
        close(outs[0], outs[1], 1e-6)
        close(outs[0], outs[2], 1e-6)


def zero_terminal() -> Tabulated:
    return Tabulated(torch.linspace(0.01, math.pi / 2, 1000, dtype=torch.float64))


ALL = [
    PLMS(4),
    Momentum(2.7),
    Momentum(5, 0.3),
    HeavyBall(0.8, PLMS(4)),
    HeavyBall(0.8, DPMpp2M()),
    HeavyBall(0.8, UniPC(3)),
    HeavyBall(0.8, UniPC(), predictor=False),
    Nesterov(0.8, DPMpp2M()),
    UniPC(3),
    UniPC(1),
]


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_from_pure_noise_to_clean_data(solver):
    for process in (Linear(), Cosine(), VE(), SubVP(), Flow(), zero_terminal()):
        model = Mixture(process, torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.1)
        x = start(process, 16)
        for steps in (1, 2, 5, 20):
            out = sample(model, solver, x, Uniform()(process, steps))
            assert out.isfinite().all()
            if steps == 1:  # one step from pure noise is the DDIM step: the predicted data
                close(out, model(x, 1.0).x0, 1e-6)
        few = sample(model, solver, x.float(), Uniform()(process, 20))
        assert few.dtype == torch.float32
        torch.testing.assert_close(few.double(), out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_times_of_each_row(solver):
    """Rows at levels of their own, one from pure noise, one standing still, as if alone."""
    model = Gaussian(Flow(), 0.4, 0.6)
    x = start(Flow(), 3)
    grid = torch.tensor(
        [[1.0, 0.9, 0.3], [0.7, 0.5, 0.2], [0.5, 0.4, 0.2], [0.3, 0.1, 0.1], [0.0, 0.05, 0.0]],
        dtype=torch.float64,
    )

    def walk(x, rows):
        state = solver.init(x)
        for t, s in pairwise(grid):
            x, state = solver.step(model, x, t[rows], s[rows], state)
        return x

    many = walk(x, torch.arange(3))
    for i in range(3):
        close(many[i : i + 1], walk(x[i : i + 1], torch.tensor([i])), 1e-10)
    assert many.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_history_of_half_precision_is_float32(dtype):
    model = Gaussian(Flow(), 0.4, 0.6)
    x = start(Flow()).to(dtype)
    for solver in (Momentum(3, 0.7), HeavyBall(0.8), HeavyBall(0.8, UniPC())):
        state = None
        for t, s in ((0.9, 0.6), (0.6, 0.4), (0.4, 0.2)):
            step = solver.step(model, x, t, s, state)
            assert step.x.dtype == dtype
            state = step.state
        tensors = (
            state if isinstance(state, tuple) and not hasattr(state, "lag") else (state.lag.v,)
        )
        assert {v.dtype for v in tensors} == {torch.float32}


def test_an_edit_between_steps_survives_the_corrector():
    model = Gaussian(Cosine(), 0.4, 0.6)
    x, times = start(Cosine()), torch.linspace(0.9, 0.2, 8, dtype=torch.float64)
    edit = lambda i, s, step: step.x + 1.0 if i == 6 else None  # noqa: E731
    for solver in (UniPC(), HeavyBall(0.8, UniPC())):
        plain = sample(model, solver, x, times)
        close(sample(model, solver, x, times, on_step=edit), plain + 1.0)
        early = sample(model, solver, x, times, on_step=lambda i, s, step: step.x + 3.0 * (i == 5))
        truth = model.transport(torch.ones_like(x) * 3, times[6], times[7])
        shift = truth - model.transport(torch.zeros_like(x), times[6], times[7])
        torch.testing.assert_close(early - plain, shift, rtol=0.2, atol=0)


# diffusers


def against(scheduler, solver, steps=10, tol=2e-5):
    model = Gaussian(Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod), 0.4, 0.6)
    x = start(model.process)
    scheduler.set_timesteps(steps)
    theirs = x
    for t in scheduler.timesteps:
        noise = model(theirs, (float(t) + 1) / 1000).noise
        theirs = scheduler.step(noise, t, theirs).prev_sample
    ours = sample(model, solver, x, Trailing()(model.process, steps))
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tol, atol=tol)


@pytest.mark.bridge
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_unipc_is_that_of_diffusers(steps):
    from diffusers import UniPCMultistepScheduler

    for order in (1, 2, 3):
        kept = {"solver_order": order, "solver_type": "bh2", "timestep_spacing": "trailing"}
        # their last steps fall to order 2, 1; ours only where the step in log SNR is infinite
        if order == 3:
            kept["lower_order_final"] = False
            scheduler = UniPCMultistepScheduler(**kept, final_sigmas_type="sigma_min")
            scheduler.set_timesteps(steps)
            model = Gaussian(Tabulated.from_alphas_cumprod(scheduler.alphas_cumprod), 0.4, 0.6)
            x = theirs = start(model.process)
            levels = (scheduler.timesteps.double() + 1) / 1000
            for t in scheduler.timesteps[:-1]:
                noise = model(theirs, (float(t) + 1) / 1000).noise
                theirs = scheduler.step(noise, t, theirs).prev_sample
            ours = sample(model, UniPC(3), x, levels)
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        else:
            against(UniPCMultistepScheduler(**kept), UniPC(order), steps)


@pytest.mark.bridge
def test_dpmpp_is_that_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    for steps in (5, 10, 25):
        scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing", euler_at_final=True)
        against(scheduler, DPMpp2M(), steps)
        against(scheduler, HeavyBall(1.0, DPMpp2M()), steps)


@pytest.mark.bridge
def test_as_a_diffusers_scheduler():
    """`effuse.scheduler` runs the same walk, from a stock scheduler's table."""
    made = pytest.importorskip("effuse.bridge.scheduler")
    from diffusers import DDIMScheduler

    from effuse.bridge.pipeline import grid_of

    stock = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    model = Gaussian(Tabulated.from_alphas_cumprod(stock.alphas_cumprod), 0.4, 0.6)
    x = start(model.process)
    for solver in (Momentum(), HeavyBall(0.8, UniPC()), Momentum(2, 1.0)):
        ours = made.scheduler(solver, stock, grid=grid_of(stock))
        ours.set_timesteps(8)
        y = x * ours.init_noise_sigma
        for t in ours.timesteps:
            y = ours.scale_model_input(y, t)
            y = ours.step(model(y, (float(t) + 1) / 1000).noise, t, y).prev_sample
        want = sample(model, solver, x, Trailing()(model.process, 8))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert made.scheduler("momentum", stock) is not None


# face


def test_a_real_order_is_an_order_and_a_damping():
    assert Momentum(2.7) == Momentum(3, 0.7)
    assert Momentum(2.3) == Momentum(3, 0.3)
    assert Momentum(0.7) == Momentum(1, 0.7)
    assert Momentum(3.0) == Momentum(3, 1.0)
    assert Momentum() == Momentum(2, 0.8) == Momentum(order=2, beta=0.8)
    assert isinstance(Momentum(2.7).order, int)


def test_fields_survive_a_file():
    for value in (Momentum(2.7), HeavyBall(0.7, UniPC(3)), HeavyBall(0.7, DPMpp2M()), Nesterov()):
        assert build(type(value), dump_fields(value, "x"), "x") == value


def test_bad_input():
    for order in (0, -1, 5.5, math.nan):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 5\]"):
            Momentum(order)
    for beta in (0.0, -0.5, 1.2):
        with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
            Momentum(2, beta)
        with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
            HeavyBall(beta)
    with pytest.raises(ValueError, match="expected a whole order beside beta"):
        Momentum(2.7, 0.5)
    with pytest.raises(TypeError, match=r"expected PLMS\(...\), DPMpp2M\(\) or UniPC"):
        HeavyBall(0.8, "plms")
    with pytest.raises(ValueError, match="smooths only a corrector"):
        HeavyBall(0.8, PLMS(), predictor=False)
    with pytest.raises(ValueError, match="order=6: expected one of 1, 2, 3, 4, 5"):
        PLMS(6)
    with pytest.raises(ValueError, match="order=4: expected one of 1, 2, 3"):
        UniPC(4)


def test_magnitude_score():
    rng = torch.Generator().manual_seed(0)
    good = torch.randn(64, 4, 8, 8, generator=rng) * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    score = MagnitudeScore.of(good)
    bad = torch.zeros(2, 4, 8, 8)
    bad[0, 1, 0, 0] = float(score.mean[1] + 5 * score.std[1])
    score.update(bad)
    assert score.compute() == pytest.approx((5 - 3) / (4 * 8 * 8) / 2, rel=1e-5)
    score.reset()
    with pytest.raises(ValueError, match="no samples"):
        score.compute()
    # the mean excess of a standard normal over three deviations, 2 (pdf(3) - 3 tail(3))
    normal = MagnitudeScore()
    normal.update(torch.randn(400, 1, 50, 50, generator=rng))
    tail = math.erfc(3 / math.sqrt(2)) / 2
    expected = 2 * (math.exp(-4.5) / math.sqrt(2 * math.pi) - 3 * tail)
    assert normal.compute() == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="std above zero"):
        MagnitudeScore(0.0, 0.0)
    with pytest.raises(ValueError, match="tau"):
        MagnitudeScore(tau=-1)
