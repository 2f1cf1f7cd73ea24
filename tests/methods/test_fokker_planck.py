"""The Fokker-Planck residual on closed forms, its penalty, and the gap of two samplers."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_sd
from torch import nn

from effuse.bridge.pipeline import wrap
from effuse.core import Denoiser, Gaussian, Mixture, fit, sample
from effuse.evaluate.fokker_planck import (
    Box,
    ByDiffusion,
    ByVariance,
    FokkerPlanck,
    OnData,
    Unweighted,
    monitor,
    ode_sde_gap,
    with_fine_end,
)
from effuse.evaluate.residual import (
    Autograd,
    Central,
    Exact,
    LogResidual,
    Potential,
    PotentialScore,
    Rademacher,
    ScoreResidual,
)
from effuse.processes import VE, Cosine, Flow, Linear, OrnsteinUhlenbeck, Uniform
from effuse.solvers import DDIM, Ancestral, Heun

PROCESSES = [OrnsteinUhlenbeck(3.0), Linear(), Cosine(), VE(), Flow()]
MEANS = torch.tensor([[1.0, -0.5], [-0.8, 0.3], [0.2, 1.1]], dtype=torch.float64)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inner(count=24):
    """Levels inside (0, 1), a row each."""
    return torch.linspace(0.05, 0.9, count, dtype=torch.float64)


def mixture(process):
    return Mixture(process, MEANS, torch.tensor([0.3, 0.2, 0.5]), torch.tensor([1.0, 2.0, 1.0]))


def potential_of(model):
    return PotentialScore(lambda x, t: model.log_prob(x, t), model.process)


def net(activation=None, size=2, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Potential(size, 16, 2, activation, **kwargs).double()


# the process


def test_the_process_is_the_papers():
    """Mean x0 e^-u, variance (1 - e^-2u) / 2, drift -x and diffusion 1 in u = horizon t."""
    ou, t = OrnsteinUhlenbeck(10.0), torch.tensor([0.01, 0.1, 0.7], dtype=torch.float64)
    u, x = 10 * t, rand(3, 2)
    torch.testing.assert_close(ou.alpha(t), (-u).exp())
    torch.testing.assert_close(ou.sigma(t) ** 2, (1 - (-2 * u).exp()) / 2)
    torch.testing.assert_close(ou.drift(x, t), -10 * x)
    torch.testing.assert_close(ou.diffusion(t) ** 2, torch.full_like(t, 10.0))
    vp, same = Linear(6.0, 6.0), OrnsteinUhlenbeck(3.0, math.sqrt(2))
    torch.testing.assert_close(vp.sigma(t), same.sigma(t))
    torch.testing.assert_close(vp.alpha(t), same.alpha(t))
    with pytest.raises(ValueError, match="horizon=0"):
        OrnsteinUhlenbeck(0)


# the residual of the log density


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_log_residual_of_a_mixture_is_zero(process):
    x, t = 1.5 * rand(24, 2), inner()
    with torch.no_grad():
        r = LogResidual()(potential_of(mixture(process)), x, t)
    assert r.shape == (24,)
    assert r.abs().max() < 1e-8


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_score_residual_of_a_mixture_is_zero(process):
    x, t = 1.5 * rand(24, 2), inner()
    with torch.no_grad():
        exact = ScoreResidual(Exact(), Autograd())(mixture(process), x, t)
        near = ScoreResidual(Exact(), Central(1e-5))(mixture(process), x, t)
    assert exact.abs().max() < 1e-7
    assert near.abs().max() < 1e-4


def test_log_residual_of_a_gaussian_with_the_papers_potential():
    ou, mean, c = OrnsteinUhlenbeck(10.0), torch.tensor([0.4, -0.7]).double(), 0.3

    def phi(x, t):
        v = c**2 * (-20 * t).exp() + (1 - (-20 * t).exp()) / 2
        off = x - mean * (-10 * t).exp()[:, None]
        return -off.square().sum(1) / (2 * v) - v.log()

    x, t = rand(24, 2), inner()
    assert LogResidual()(PotentialScore(phi, ou), x, t).abs().max() < 1e-8


@pytest.mark.parametrize("a", [2.0, 1.0, 3.0])
def test_log_residual_of_a_wrong_constant_is_the_one_by_hand(a):
    """phi = -a |x|^2 / 2, horizon 1: R = -d + a |x|^2 - a^2 |x|^2 / 2 + a d / 2; zero for a = 2."""
    wrong = PotentialScore(lambda x, t: -a * x.square().sum(1) / 2, OrnsteinUhlenbeck(1.0))
    x, t = rand(24, 3), inner()
    n = x.square().sum(1)
    r = LogResidual()(wrong, x, t)
    torch.testing.assert_close(r, -3 + a * n - a**2 * n / 2 + 1.5 * a)
    r = ScoreResidual(Exact(), Autograd())(wrong, x, t)
    torch.testing.assert_close(r, (2 * a - a**2) * x)
    if a == 2.0:
        assert r.abs().max() < 1e-12


def test_the_stationary_potential_stands_still_and_keeps_its_law():
    still = PotentialScore(lambda x, t: -x.square().sum(1), OrnsteinUhlenbeck(3.0))
    x, t = rand(24, 2), inner()
    process = still.process
    torch.testing.assert_close(process.velocity(t, still(x, t)), torch.zeros_like(x))
    times = Uniform(1.0, 1e-4)(process, 200)
    walked = sample(still, Heun(), x, times)
    torch.testing.assert_close(walked, x, atol=2e-3, rtol=0)
    start = process.prior((20_000, 1), rng=seeded(), dtype=torch.float64)
    fine = Uniform(1.0, 1e-4)(process, 800)
    noisy = sample(still, Ancestral(), start, fine, rng=seeded(1))
    assert float(noisy.var()) == pytest.approx(0.5, rel=0.05)  # first order in the steps


def test_a_function_of_time_shifts_the_log_residual_by_its_slope_and_nothing_else():
    process, x, t = Linear(), rand(24, 2), inner()
    base = potential_of(mixture(process))
    moved = PotentialScore(lambda y, s: base.phi(y, s) + torch.sin(3 * s), process)
    torch.testing.assert_close(moved.score(x, t), base.score(x, t))
    r = LogResidual()(moved, x, t) - LogResidual()(base, x, t)
    torch.testing.assert_close(r, 3 * torch.cos(3 * t), atol=1e-8, rtol=0)
    both = (ScoreResidual(Exact(), Autograd())(p, x, t) for p in (moved, base))
    torch.testing.assert_close(*both, atol=1e-8, rtol=0)


def test_score_residual_is_the_gradient_of_that_of_the_log():
    """For a network that solves nothing, so that every term and sign counts."""
    student = PotentialScore(net(nn.Tanh()), Linear())
    x, t = rand(6, 2).requires_grad_(), inner(6)
    (expected,) = torch.autograd.grad(LogResidual()(student, x, t).sum(), x)
    found = ScoreResidual(Exact(), Autograd())(student, x.detach(), t)
    torch.testing.assert_close(found, expected)
    near = ScoreResidual(Exact(), Central(1e-4))(student, x.detach(), t)
    torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-5)


def test_log_residual_term_by_term():
    """Against finite differences in x and t of the potential."""
    student, h = PotentialScore(net(), Linear()), 1e-4
    x, t = rand(6, 2), inner(6)
    phi = student.potential
    with torch.no_grad():
        d_t = (phi(x, t + h) - phi(x, t - h)) / (2 * h)
        g, lap = torch.zeros_like(x), torch.zeros(6).double()
        for i in range(2):
            e = h * torch.eye(2).double()[i]
            g[:, i] = (phi(x + e, t) - phi(x - e, t)) / (2 * h)
            lap += (phi(x + e, t) - 2 * phi(x, t) + phi(x - e, t)) / h**2
    beta = 0.1 + t * 19.9
    expected = d_t - beta - beta / 2 * (x * g).sum(1) - beta / 2 * (lap + g.square().sum(1))
    torch.testing.assert_close(LogResidual()(student, x, t), expected, rtol=1e-5, atol=1e-5)


def test_signs_are_unbiased_and_exact_on_a_diagonal():
    student, x, t = PotentialScore(net(), Linear()), rand(4, 2), inner(4)
    exact = LogResidual()(student, x, t).detach()
    many = LogResidual(Rademacher(4000))(student, x, t, rng=seeded()).detach()
    torch.testing.assert_close(many, exact, rtol=0.03, atol=0.03)
    wide = PotentialScore(lambda y, s: -(y**4).sum(1), Linear())  # a diagonal Hessian
    once = LogResidual(Rademacher())(wide, x, t, rng=seeded())
    torch.testing.assert_close(once, LogResidual()(wide, x, t))


def test_rows_do_not_meet():
    student, x, t = PotentialScore(net(), Linear()), rand(4, 2), inner(4)
    for residual in (LogResidual(), ScoreResidual(Exact(), Central(1e-3))):
        both = residual(student, x, t).detach()
        torch.testing.assert_close(both[1:2], residual(student, x[1:2], t[1:2]).detach())


def test_potential_score_is_a_consistent_denoiser():
    model = mixture(Linear())
    x = rand(8, 2)
    with torch.no_grad():
        for t in (0.3, inner(8)):
            a, b = potential_of(model)(x, t), model(x, t)
            torch.testing.assert_close(a.x0, b.x0)
            torch.testing.assert_close(a.noise, b.noise)
            assert not a.noise.requires_grad


# what cannot work is refused


def test_piecewise_linear_networks_are_refused():
    with pytest.raises(ValueError, match="ReLU, whose second derivative"):
        net(nn.ReLU())
    hidden = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Linear(8, 1)).double()
    with pytest.raises(ValueError, match="1 is LeakyReLU"):
        PotentialScore(hidden, Linear())
    unseen = PotentialScore(lambda x, t: (x.relu() + (x - 0.3).relu()).sum(1), Linear())
    with pytest.raises(ValueError, match="piecewise linear"):
        LogResidual()(unseen, rand(16, 2), 0.5)


def test_bad_input():
    student, x = PotentialScore(net(), Linear()), rand(4, 2)
    with pytest.raises(TypeError, match="float32 or float64"):
        LogResidual()(student, x.half(), 0.5)
    with pytest.raises(TypeError, match="has no scalar potential"):
        LogResidual()(mixture(Linear()), x, 0.5)
    with pytest.raises(ValueError, match="no finite drift"):
        LogResidual()(student, x, 0.0)
    with pytest.raises(ValueError, match="no finite drift"):
        LogResidual()(PotentialScore(net(), Flow()), x, 1.0)
    with pytest.raises(ValueError, match="at least a step inside"):
        ScoreResidual(Exact(), Central(0.1))(student, x, 0.05)
    with pytest.raises(ValueError, match="at most 64"):
        LogResidual()(PotentialScore(net(size=65), Linear()), rand(2, 65), 0.5)
    with pytest.raises(ValueError, match="one a row"):
        PotentialScore(lambda y, t: y.sum(), Linear()).potential(x, 0.5)
    for wrong in ({"weight": -1.0}, {"start": 0.0}, {"walls": math.nan}, {"power": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FokkerPlanck(student, **wrong)
    with pytest.raises(TypeError, match="needs a PotentialScore"):
        FokkerPlanck(mixture(Linear()), residual=LogResidual())


# the training


def gradient(objective, batch, seed=3):
    objective.zero_grad()
    loss = objective.loss("student", batch, rng=seeded(seed))
    loss.total.backward()
    # a constant on phi, the last bias, meets no term but the walls
    grads = [p.grad for p in objective.parameters()]
    return loss, [torch.zeros(()) if g is None else g.clone() for g in grads]


def test_weight_zero_is_denoising_score_matching_draw_for_draw():
    ou, x0 = OrnsteinUhlenbeck(3.0), rand(32, 2)
    student = PotentialScore(net(clock=3.0), ou)
    _, found = gradient(FokkerPlanck(student, 0.0, start=0.01), {"x0": x0})
    rng = seeded(3)
    t = 0.01 + 0.99 * (1 - torch.rand(32, generator=rng, dtype=torch.float64).sqrt())
    noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    student.zero_grad()
    x = ou.corrupt(x0, t, noise)
    target = -(x - ou.alpha(t)[:, None] * x0) / ou.sigma(t)[:, None] ** 2
    (student.score(x, t) - target).square().sum(1).mean().backward()
    for a, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(a, torch.zeros(()) if p.grad is None else p.grad)


def test_the_levels_of_the_denoising_term_follow_the_beta_law():
    seen = []

    class Spy(Unweighted):
        def __call__(self, process, t):
            seen.append(t)
            return super().__call__(process, t)

    student = PotentialScore(net(), Linear())
    for power in (1.0, 2.0):
        FokkerPlanck(student, 0.0, start=0.1, power=power, denoising=Spy()).loss(
            "student", {"x0": rand(4000, 2)}, rng=seeded()
        )
    for t, mean in zip(seen, (0.55, 0.4), strict=True):  # 0.1 + 0.9 / (1 + power)
        assert float(t.mean()) == pytest.approx(mean, abs=0.01)
        assert float(t.min()) >= 0.1


def test_penalty_is_the_weighted_square_of_the_residual_and_of_the_walls():
    student, x0 = PotentialScore(net(), Linear()), rand(16, 2)
    box = Box(2.0, 40, 5)
    objective = FokkerPlanck(student, 0.3, points=box, walls=0.7, start=0.1, equation=ByVariance(2))
    loss, _ = gradient(objective, {"x0": x0})
    rng = seeded(3)
    t = 0.1 + 0.9 * (1 - torch.rand(16, generator=rng, dtype=torch.float64).sqrt())
    torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    where, at = box(x0, t, 0.1, 1.0, rng)
    square = (Linear().sigma(at) ** 2 * LogResidual()(student, where, at)).square().mean()
    where, at = box.boundary(x0, t, 0.1, 1.0, rng)
    walls = (2 * student.potential(where, at)).exp().mean()
    torch.testing.assert_close(loss.terms["residual"], square)
    torch.testing.assert_close(loss.terms["walls"], walls)
    total = loss.terms["denoising"] + 0.3 * (square + 0.7 * walls)
    torch.testing.assert_close(loss.total, total)


def test_the_box_has_every_face():
    x, t = rand(3, 2, 2), inner(3)
    where, at = Box(2.5, 7, 3).boundary(x, t, 0.2, 0.6, seeded())
    flat = where.flatten(1)
    assert flat.shape == (24, 4)
    assert (flat.abs() <= 2.5).all()
    assert ((flat == 2.5).sum(0) == 3).all()
    assert ((flat == -2.5).sum(0) == 3).all()
    assert ((at >= 0.2) & (at <= 0.6)).all()
    inside, _ = Box(2.5, 4000, 3)(x, t, 0.2, 0.6, seeded())
    assert float(inside.std()) == pytest.approx(5 / math.sqrt(12), rel=0.02)


def test_the_law_itself_is_a_minimum():
    """At the exact potential the penalty has no gradient, and the score-matching term none but
    noise: parameters that move away from it raise the residual."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.0).double())
            self.exact = mixture(OrnsteinUhlenbeck(3.0))

        def forward(self, x, t):
            return self.a * self.exact.log_prob(x, t)

    phi = Scaled()
    student = PotentialScore(phi, phi.exact.process)
    objective = FokkerPlanck(student, 1.0, points=Box(2.0, 200), walls=0.0, start=0.05)
    loss, (slope,) = gradient(objective, {"x0": phi.exact.draw(64, rng=seeded())})
    assert loss.terms["residual"] < 1e-16
    alone = FokkerPlanck(student, 0.0, start=0.05)
    _, (plain,) = gradient(alone, {"x0": phi.exact.draw(64, rng=seeded())})
    torch.testing.assert_close(slope, plain, atol=1e-6, rtol=0)
    with torch.no_grad():
        phi.a.fill_(1.1)
    loss, _ = gradient(objective, {"x0": phi.exact.draw(64, rng=seeded())})
    assert loss.terms["residual"] > 0.01


def test_training_lowers_the_residual_and_the_score_variant_runs_on_vector_nets():
    ou = OrnsteinUhlenbeck(3.0)
    student = PotentialScore(net(clock=3.0).float(), ou)
    data = mixture(ou).draw(512, rng=seeded()).float()
    objective = FokkerPlanck(
        student,
        0.1,
        points=Box(2.5, 64, 4),
        start=0.01,
        denoising=ByVariance(),
        equation=ByVariance(2),
    )
    done = fit(
        objective,
        lambda g: {"x0": data[torch.randint(512, (64,), generator=g)]},
        torch.optim.Adam(student.parameters(), 1e-2),
        steps=60,
        rng=seeded(1),
        log_every=1,
        progress=False,
    )
    first, last = (
        sum(r["residual"] for r in rows) for rows in (done.history[:10], done.history[-10:])
    )
    assert last < 0.5 * first


@pytest.mark.parametrize("weight", [ByDiffusion(), ByVariance(3)])
def test_the_penalty_on_a_diffusers_network(weight):
    model = wrap(tiny_ddpm())
    objective = FokkerPlanck(
        model.bare,
        0.01,
        residual=ScoreResidual(slope=Central(5e-4)),
        points=OnData(),
        start=0.1,
        end=0.9,
        denoising=ByVariance(),
        equation=weight,
    )
    x0 = rand(2, *model.shape, dtype=torch.float32)
    loss, grads = gradient(objective, {"x0": x0})
    assert loss.terms["residual"] > 0
    _, plain = gradient(
        FokkerPlanck(model.bare, 0.0, start=0.1, end=0.9, denoising=ByVariance()), {"x0": x0}
    )
    assert all(g.isfinite().all() for g in grads)
    assert any(not torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


# the diagnostics


def test_the_gap_of_an_exact_law_is_that_of_sampling():
    model = mixture(OrnsteinUhlenbeck(3.0))
    times = Uniform(1.0, 1e-4)(model.process, 150)
    data = model.draw(2000, rng=seeded(5))
    exact = ode_sde_gap(model, DDIM(), Ancestral(), times, 2000, (2,), data=data, rng=seeded())
    assert exact.ode_sde < 2.5 * exact.floor
    assert max(exact.ode_data, exact.sde_data) < 3 * exact.floor

    class Weak(Mixture):
        """Its score is 20 percent too small, which ODE and SDE bear differently."""

        def forward(self, x, t, **cond):
            noise = 0.8 * super().forward(x, t).noise
            return self.process.complete(x, t, noise=noise)

    weak = Weak(model.process, MEANS, torch.tensor([0.3, 0.2, 0.5]), torch.tensor([1.0, 2, 1]))
    found = ode_sde_gap(weak, DDIM(), Ancestral(), times, 2000, (2,), data=data, rng=seeded())
    assert found.ode_sde > 3 * exact.ode_sde


def test_the_gap_of_a_scaled_gaussian_score_is_known():
    """Stationary law, score times c: the SDE settles at variance 1 / (2 (2c - 1)) times
    (1 - q) plus q, q = e^-2(2c-1)u, the ODE multiplies deviations by e^((1-c) u)."""
    c, u = 1.2, 1.0
    process = OrnsteinUhlenbeck(u)
    wrong = PotentialScore(lambda x, t: -c * x.square().sum(1), process)
    times = Uniform(1.0, 1e-5)(process, 500)
    x = math.sqrt(0.5) * rand(20_000, 1)
    ode = sample(wrong, Heun(), x, times)
    torch.testing.assert_close(ode, x * math.exp((1 - c) * u), rtol=1e-3, atol=1e-4)
    sde = sample(wrong, Ancestral(), x, times, rng=seeded(2))
    q = math.exp(-2 * (2 * c - 1) * u)
    assert float(sde.var()) == pytest.approx(q * 0.5 + (1 - q) / (2 * (2 * c - 1)), rel=0.04)


def test_gap_needs_one_of_each():
    model = Gaussian(Linear())
    with pytest.raises(ValueError, match="a deterministic and a stochastic"):
        ode_sde_gap(model, DDIM(), DDIM(), Uniform()(Linear(), 4), 8, (2,))
    found = ode_sde_gap(model, DDIM(), Ancestral(), Uniform()(Linear(), 4), 8, (2,), rng=seeded())
    assert found.ode_data is None
    assert found.sde_data is None


def test_the_fine_end_splits_the_last_steps():
    times = Uniform(1.0, 0.0)(Linear(), 20)
    fine = with_fine_end(times, 2, 4)
    assert len(fine) == 18 + 8 + 1
    torch.testing.assert_close(fine[:19], times[:19])
    torch.testing.assert_close(fine[-9:], torch.linspace(0.1, 0, 9).double())
    with pytest.raises(ValueError, match="fewer than the 20"):
        with_fine_end(times, 21)


def test_the_monitor_looks_on_and_off_the_data():
    model = mixture(OrnsteinUhlenbeck(3.0))

    class Near(nn.Module):
        """The true potential near the data, and not far from it."""

        def forward(self, x, t):
            far = (model.log_prob(x, t) < -6).to(x)
            return model.log_prob(x, t) - far * x.square().sum(1)

    x0 = 0.05 * rand(400, 2) + MEANS[torch.arange(400) % 2]
    student = PotentialScore(Near(), model.process)
    rows = monitor(LogResidual(), student, x0, (0.01, 0.5), rng=seeded())
    assert [r["t"] for r in rows] == [0.01, 0.5]
    assert rows[0]["on"] < 1e-3 * rows[0]["off"]
    double = monitor(LogResidual(), student, x0, (0.01,), weight=ByVariance(2), rng=seeded())
    expected = rows[0]["off"] * float(model.process.sigma(0.01)) ** 2
    assert double[0]["off"] == pytest.approx(expected)


@pytest.mark.parametrize("make", [tiny_ddpm, tiny_sd])
def test_diagnosis_of_a_pipeline(make):
    model = wrap(make())
    cond = model.embed(2) if make is tiny_ddpm else model.embed(["a red apple"] * 2)
    residual = ScoreResidual(slope=Central(5e-4))
    x0 = rand(2, *model.shape, dtype=torch.float32)
    rows = monitor(residual, model.bare, x0, (0.3005,), rng=seeded(), **cond)
    assert rows[0]["on"] > 0
    one = residual(model.bare, x0, 0.3005, rng=seeded(), **cond)
    assert one.shape == x0.shape
    single = {k: v[:1] for k, v in cond.items()}
    first = residual(model.bare, x0[:1], 0.3005, rng=seeded(), **single)
    assert first.shape == x0[:1].shape
    times = model.grid(model.process, 3)
    gap = ode_sde_gap(
        model.denoiser.given(**cond), DDIM(), Ancestral(), times, 2, model.shape, rng=seeded()
    )
    assert gap.ode_sde > 0
    assert gap.floor > 0


def test_diagnosis_of_house_pixels():
    import effuse

    model = effuse.wrap(effuse.load("house:pixels"))
    count = len(model.process)
    residual = ScoreResidual(slope=Central(0.5 / count))
    x0 = rand(1, *model.shape, dtype=torch.float32).clamp(-1, 1)
    t = (count // 2 + 0.5) / count
    x = model.process.corrupt(x0, t, rand(*x0.shape, seed=1, dtype=torch.float32))
    with torch.no_grad():
        r = residual(model.bare, x, t, rng=seeded())
        wrong = residual(_Scaled(model.bare), x, t, rng=seeded())
    assert r.isfinite().all()
    assert wrong.square().mean() > 1.5 * r.square().mean()


class _Scaled(Denoiser):
    """Another denoiser with half its noise."""

    def __init__(self, base):
        super().__init__()
        self.base, self.process = base, base.process

    def forward(self, x, t, **cond):
        return self.process.complete(x, t, noise=0.5 * self.base(x, t, **cond).noise)
