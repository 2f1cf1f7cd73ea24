"""Superposition: the estimator, the rules and their closed forms, the ODE, pipelines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tests.tiny import tiny_dit_pipe, tiny_sd

import effuse
from effuse.control import (
    AND,
    OR,
    Fixed,
    Guide,
    Maruyama,
    Reverse,
    Several,
    SigmaEuler,
    Superdiff,
    Superposition,
    SuperpositionODE,
    control_named,
    controlled,
)
from effuse.core import Denoiser, Gaussian, Mixture, Prediction, Process, sample
from effuse.ops.tensors import randn_like
from effuse.ops.trace import divergence
from effuse.processes import VE, Cosine, Linear, Uniform
from effuse.solvers import DDIM, Ancestral

PROCESS = Linear()


class Plain(Process):
    """alpha = 1, sigma = t."""

    def alpha(self, t):
        return torch.ones_like(torch.as_tensor(t, dtype=torch.float64))

    def sigma(self, t):
        return torch.as_tensor(t, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def modes(*centers, process=PROCESS, std=0.4):
    return Mixture(process, torch.tensor(centers), std)


UPPER = modes((-1.5, 1.5), (1.5, 1.5))
LOWER = modes((-1.5, -1.5), (1.5, -1.5))
RIGHT = modes((1.5, 1.5), (1.5, -1.5))


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def start(count=16, process=PROCESS, seed=0):
    return process.prior((count, 2), rng=seeded(seed), dtype=torch.float64)


def scores(members, x, t):
    return torch.stack([m.process.score(t, m(x, t)) for m in members], 1)


def walk(model, solver, x, times, seed=1):
    """Return the samples at every level and the states after every step."""
    xs, states = [x], []

    def keep(index, level, step):
        xs.append(step.x)
        states.append(step.state)

    sample(model, solver, x, times, rng=seeded(seed), on_step=keep)
    return xs, states


def apart(states):
    return torch.stack([s.log_q[:, 0] - s.log_q[:, 1] for s in states])


TRANSITIONS = (Reverse(), SigmaEuler(), Maruyama())


@pytest.mark.parametrize("transition", TRANSITIONS, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_and_keeps_densities_equal_at_any_step_size(transition, scale):
    """A discrete identity: also in ten steps, also under guidance, also for three models."""
    members = [UPPER, RIGHT, modes((0.0, 1.0), std=0.7)]
    empty = None if scale == 1 else modes((0.0, 0.0), std=2.0)
    model = Several(members, empty, scale)
    x = start()
    for steps in (10, 100):
        times = Uniform(0.9, 0.1)(PROCESS, steps)
        _, states = walk(model, Superposition(AND(), transition), x, times)
        log_q = torch.stack([s.log_q for s in states])
        size = log_q.abs().max()
        assert (log_q - log_q[..., :1]).abs().max() < 1e-9 * size
        close(states[-1].kappa.sum(1), torch.ones(16, dtype=torch.float64))
        _, loose = walk(model, Superposition(Fixed(), transition), x, times)
        assert (loose[-1].log_q - loose[-1].log_q[:, :1]).abs().max() > 0.1


def test_and_of_two_is_the_projected_noise():
    """dx = -f r + g^2 r (s1 + s2) / 2 + g sqrt(r) (I - d d' / |d|^2) eps."""
    t, s = torch.tensor(0.6).double(), torch.tensor(0.55).double()
    x = start()
    step = Superposition(AND(), Maruyama()).step(Several([UPPER, RIGHT]), x, t, s, rng=seeded(3))
    s1, s2 = scores([UPPER, RIGHT], x, t).unbind(1)
    d, eps, r = s1 - s2, randn_like(x, seeded(3)), t - s
    g = PROCESS.diffusion(t)
    unit = d / d.norm(dim=1, keepdim=True)
    injected = eps - (eps * unit).sum(1, keepdim=True) * unit
    close((injected * d).sum(1), torch.zeros(16).double())
    dx = -PROCESS.drift(x, t) * r + g**2 * r * (s1 + s2) / 2 + g * r.sqrt() * injected
    close(step.x, x + dx)
    square = d.square().sum(1)
    kappa = 0.5 - (eps * d).sum(1) / (g * r.sqrt() * square)
    close(step.state.kappa[:, 0], kappa)


def test_and_with_guidance_and_lift_is_the_closed_form():
    t, s, w, lift = 0.6, 0.55, 2.5, 0.3
    empty, x = modes((0.0, 0.0), std=2.0), start()
    model = Several([UPPER, RIGHT], empty, w)
    step = Superposition(AND((lift, 0.0)), Maruyama()).step(model, x, t, s, rng=seeded(3))
    (a, b), u = scores([UPPER, RIGHT], x, t).unbind(1), scores([empty], x, t)[:, 0]
    d, eps, r, g = a - b, randn_like(x, seeded(3)), t - s, PROCESS.diffusion(t)
    gr = g**2 * r
    top = 0.5 * gr * (a.square().sum(1) - b.square().sum(1))
    top = top - ((gr * (u + w * (b - u)) + g * math.sqrt(r) * eps) * d).sum(1) + lift
    close(step.state.kappa[:, 0], top / (w * gr * d.square().sum(1)), 1e-8)
    gained = step.state.log_q
    close(gained[:, 0] - gained[:, 1], torch.full((16,), lift, dtype=torch.float64), 1e-9)
    dx = -PROCESS.drift(x, t) * r + g * math.sqrt(r) * eps
    dx = dx + gr * (u + w * ((b - u) + step.state.kappa[:, :1] * d))
    close(step.x, x + dx, 1e-9)


def test_average_weight_is_one_half():
    x = start(1).expand(40_000, 2)
    step = Superposition(AND(), Maruyama()).step(Several([UPPER, RIGHT]), x, 0.6, 0.5, rng=seeded())
    kappa = step.state.kappa[:, 0]
    assert abs(kappa.mean() - 0.5) < 4 * kappa.std() / 200


def test_gains_are_ito_of_the_step_taken():
    """d log q_i = <dx, s_i> + (<f, s_i> - g^2 / 2 |s_i|^2) r, for weights of any kind."""
    t, s, x = 0.5, 0.45, start()
    for rule in (OR(), Fixed((0.7, 0.3)), AND()):
        step = Superposition(rule, Maruyama()).step(Several([UPPER, LOWER]), x, t, s, rng=seeded())
        each, r = scores([UPPER, LOWER], x, t), t - s
        dx, f, g = step.x - x, PROCESS.drift(x, t), PROCESS.diffusion(t)
        told = ((dx + f * r).unsqueeze(1) * each).sum(-1) - 0.5 * g**2 * r * each.square().sum(-1)
        close(step.state.log_q, told, 1e-9)


def test_sigma_form_is_the_general_one():
    """With sigma = t, both are dx = 2 dsig v + sqrt(2 |dsig| sigma) eps, d log q as published."""
    a, b = (modes((-1.5, 1.5), (1.5, 1.5), process=Plain()), modes((1.5, -1.0), process=Plain()))
    t, s, x = 0.8, 0.7, start(process=Plain())
    sigma, general = (
        Superposition(OR(), how).step(Several([a, b]), x, t, s, rng=seeded())
        for how in (SigmaEuler(), Maruyama())
    )
    close(sigma.x, general.x)
    close(sigma.state.log_q, general.state.log_q)
    dsig, eps = s - t, randn_like(x, seeded())
    va, vb = a(x, t).noise, b(x, t).noise
    dx = 2 * dsig * (va + vb) / 2 + math.sqrt(2 * -dsig * t) * eps
    close(sigma.x, x + dx)
    told = torch.stack([(dsig / t * v**2 - dx * v / t).sum(1) for v in (va, vb)], 1)
    close(sigma.state.log_q, told)


@pytest.mark.parametrize("transition", TRANSITIONS, ids=repr)
def test_estimate_converges_to_the_exact_density(transition):
    """Along its own reverse SDE, for one normal: |Ito - exact| falls at least as sqrt(step)."""
    model = Gaussian(PROCESS, 0.3, 0.5)
    first, last, x = 0.9, 0.2, start(256)

    def exact(x, t):
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        var = (alpha * 0.5) ** 2 + sigma**2
        y_var = var / alpha**2  # the density of x / alpha
        off = x / alpha - 0.3
        return (-off.square() / (2 * y_var) - 0.5 * (2 * math.pi * y_var).log()).sum(1)

    errors = []
    for steps in (25, 100, 400):
        times = Uniform(first, last)(PROCESS, steps)
        xs, states = walk(model, Superposition(OR(), transition), x, times)
        gain = exact(xs[-1], times[-1]) - exact(xs[0], times[0])
        errors.append(float((states[-1].log_q[:, 0] - gain).abs().median()))
    assert errors[2] < errors[0] / 3, errors
    assert errors[2] < 0.4, errors


def test_estimate_of_a_mixture_and_of_the_ode():
    model, x = Several([UPPER, LOWER]), start(128)
    for solver, steps, tol in (
        (Superposition(OR()), 1000, 0.6),
        (SuperpositionODE(OR(), probes=0), 200, 0.6),
    ):
        times = Uniform(0.95, 0.05)(PROCESS, steps)
        xs, states = walk(model, solver, x, times)

        def exact(x, t):
            return UPPER.log_prob(x, t) - LOWER.log_prob(x, t)

        gain = exact(xs[-1], times[-1]) - exact(xs[0], times[0])
        error = (apart(states)[-1] - gain).abs().median()
        assert error < tol
        assert gain.abs().median() > 5


def test_ode_weights_are_the_closed_form():
    """kappa_1 = (div s1 - div s2 + <s1, d>) / |d|^2, and then the densities stay equal."""
    t, x = 0.5, start()
    model = Several([UPPER, RIGHT])
    step = SuperpositionODE(AND(), probes=0).step(model, x, t, 0.45)
    jac = [
        torch.func.vmap(torch.func.jacrev(lambda y, m=m: scores([m], y[None], t)[0, 0]))(x)
        for m in (UPPER, RIGHT)
    ]
    div = [j.diagonal(dim1=1, dim2=2).sum(1) for j in jac]
    s1, s2 = scores([UPPER, RIGHT], x, t).unbind(1)
    d = s1 - s2
    kappa = (div[0] - div[1] + (s1 * d).sum(1)) / d.square().sum(1)
    close(step.state.kappa[:, 0], kappa, 1e-8)
    gained = step.state.log_q
    assert ((gained[:, 0] - gained[:, 1]).abs() < 1e-9 * (1 + gained.abs().amax(1))).all()
    mixed = kappa[:, None] * UPPER(x, t).x0 + (1 - kappa[:, None]) * RIGHT(x, t).x0
    noise = kappa[:, None] * UPPER(x, t).noise + (1 - kappa[:, None]) * RIGHT(x, t).noise
    close(step.x, PROCESS.advance(x, t, 0.45, Prediction(mixed, noise)), 1e-8)


def test_guided_ode_gains_are_those_of_the_step_taken():
    """d log q_i = h (<n_i, m - n_i> + sigma div n_i) with the guided m, here got from the step."""
    t, s, w, x, empty = 0.5, 0.45, 2.5, start(), modes((0.0, 0.0), std=2.0)
    members = [UPPER, RIGHT]
    for rule in (AND(), Fixed((0.8, 0.2))):
        step = SuperpositionODE(rule, probes=0).step(Several(members, empty, w), x, t, s)
        r = {c: PROCESS.sigma(c) / PROCESS.alpha(c) for c in (t, s)}
        m = (step.x / PROCESS.alpha(s) - x / PROCESS.alpha(t)) / (r[s] - r[t])
        told = []
        for member in members:
            n, div = divergence(lambda y, member=member: member(y, t).noise, x)
            told.append((1 - r[s] / r[t]) * ((n * (m - n)).sum(1) + PROCESS.sigma(t) * div))
        close(step.state.log_q, torch.stack(told, 1), 1e-7)


def test_probes_are_shared_and_unbiased():
    x, model = start(1).expand(4000, 2), Several([UPPER, RIGHT])
    told = SuperpositionODE(OR(), probes=0).step(model, x[:1], 0.5, 0.4).state.log_q
    seen = SuperpositionODE(OR(), probes=4).step(model, x, 0.5, 0.4, rng=seeded()).state.log_q
    assert ((seen.mean(0) - told).abs() < 4 * seen.std(0) / 4000**0.5 + 1e-9).all()
    same = Several([UPPER, UPPER])
    seen = SuperpositionODE(OR(), probes=1).step(same, x, 0.5, 0.4, rng=seeded()).state.log_q
    assert torch.equal(seen[:, 0], seen[:, 1])


@pytest.mark.parametrize(
    "solver", [Superposition(AND()), Superposition(OR()), SuperpositionODE(AND())], ids=repr
)
@pytest.mark.parametrize("count", [2, 3])
def test_identical_models_are_the_single_one_bit_for_bit(solver, count):
    x, times = start().float(), Uniform()(PROCESS, 20)
    many, states = walk(Several([UPPER] * count), solver, x, times)
    one, _ = walk(UPPER, solver, x, times)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))
    for state in states:
        assert (state.kappa - 1 / count).abs().max() < 1e-15
    single = DDIM() if isinstance(solver, SuperpositionODE) else Ancestral()
    if not solver.stochastic or isinstance(solver, Superposition):
        close(one[-1], sample(UPPER, single, x, times, rng=seeded(1)), 1e-5)


def test_limits_of_or():
    x, times, model = start(), Uniform(0.9, 0.1)(PROCESS, 50), Several([UPPER, LOWER])
    cold, average = (
        walk(model, Superposition(rule), x, times) for rule in (OR(temperature=0), Fixed())
    )
    close(cold[0][-1], average[0][-1])
    hot, almost = (walk(model, Superposition(OR(temperature=t)), x, times) for t in (math.inf, 1e9))
    close(hot[0][-1], almost[0][-1], 1e-6)
    for before, after in pairwise(hot[1]):
        best = before.log_q.argmax(1)
        assert (after.kappa.gather(1, best[:, None]) == 1).all()
    for temperature in (1.0, math.inf):
        gone = walk(model, Superposition(OR(temperature, (0.0, -math.inf))), x, times)
        close(gone[0][-1], walk(UPPER, Superposition(), x, times)[0][-1])
        close(gone[0][-1], walk(model, Superposition(Fixed((1, 0))), x, times)[0][-1])


def test_or_shares_are_those_of_the_mixture():
    """A prior share of 1 : 3 by bias; four modes, none lost, hardly anything between."""
    x, times = start(4000), Uniform(1.0, 0.001)(PROCESS, 150)
    bias = (math.log(0.25), math.log(0.75))
    out = walk(Several([UPPER, LOWER]), Superposition(OR(bias=bias)), x, times)[0][-1]
    near = (out.abs() - 1.5).abs().amax(1) < 1.2
    assert near.double().mean() > 0.97
    upper = (out[:, 1] > 0).double()
    assert abs(upper.mean() - 0.25) < 0.05
    assert abs((out[:, 0] > 0).double().mean() - 0.5) < 0.04


def test_rows_and_precision():
    """A row does not depend on its neighbors; float32 keeps its type, densities are float64."""
    model, times = Several([UPPER, RIGHT]), Uniform(0.9, 0.1)(PROCESS, 20)

    def run(rows):
        x, z = start()[rows], torch.randn(20, 16, 2, generator=seeded(2)).double()[:, rows]
        state, solver = None, Superposition(AND())
        for k, (t, s) in enumerate(pairwise(times)):
            parts = model.parts(x, t)
            assert parts.empty is None
            state = state or solver.init(x)
            step = _with_noise(solver, model, x, t, s, state, z[k])
            x, state = step
        return x

    close(run(slice(None))[3:5], run(slice(3, 5)), 1e-8)
    step = Superposition().step(model, start().float(), 0.5, 0.4, rng=seeded())
    assert step.x.dtype == torch.float32
    assert step.state.log_q.dtype == torch.float64


def _with_noise(solver, model, x, t, s, state, z):
    import effuse.control.superdiff as module

    kept = module.randn_like
    try:
        module.randn_like = lambda like, rng: z
        return solver.step(model, x, t, s, state)
    finally:
        module.randn_like = kept


def test_limit_shrinks_weights():
    model, x = Several([UPPER, RIGHT]), start()
    free, held = (
        Superposition(AND(limit=c)).step(model, x, 0.5, 0.49, rng=seeded()).state.kappa
        for c in (None, 0.2)
    )
    assert (free - 0.5).abs().max() > 1
    off = (free - 0.5).abs().amax(1, keepdim=True).clamp_min(0.2)
    close(held, 0.5 + (free - 0.5) * 0.2 / off)


class Wide(Denoiser):
    process = PROCESS

    def forward(self, x, t, **cond):
        return Prediction(x.repeat(1, 2), x.repeat(1, 2))


def test_refusals():
    with pytest.raises(ValueError, match="denoiser 1 has another noise schedule"):
        Several([UPPER, modes((0.0, 0.0), process=Cosine())])
    with pytest.raises(ValueError, match="another noise schedule"):
        Several([UPPER], modes((0.0, 0.0), process=VE()), 2.0)
    with pytest.raises(ValueError, match="no denoisers"):
        Several([])
    with pytest.raises(ValueError, match="give `empty`"):
        Several([UPPER], scale=2.0)
    with pytest.raises(ValueError, match="sum to one"):
        Fixed((1.0, 1.0))
    with pytest.raises(ValueError, match="3 numbers for 2 models"):
        Superposition(OR(bias=(0.0, 0.0, 0.0))).step(Several([UPPER, LOWER]), start(), 0.5, 0.4)
    with pytest.raises(ValueError, match="start below pure noise"):
        Superposition(OR(), SigmaEuler()).step(Gaussian(Cosine()), start(), 1.0, 0.9)
    with pytest.raises(ValueError, match="one latent space"):
        Several([UPPER, Wide()]).parts(start(), 0.5)


def test_guide_skips_the_weak_pass():
    calls = []

    class Counted(Mixture):
        def forward(self, x, t, **cond):
            calls.append(1)
            return super().forward(x, t, **cond)

    weak, x = Counted(PROCESS, torch.tensor([[0.0, 0.0]]), 2.0), start()
    assert torch.equal(Guide(UPPER, weak, 1.0)(x, 0.5).x0, UPPER(x, 0.5).x0)
    assert not calls
    assert torch.equal(Guide(UPPER, weak, 0.0)(x, 0.5).x0, weak(x, 0.5).x0)
    w = weak(x, 0.5).noise
    close(Guide(UPPER, weak, 3.0)(x, 0.5).noise, w + 3 * (UPPER(x, 0.5).noise - w))
    with pytest.raises(ValueError, match="scale=nan"):
        Guide(UPPER, weak, math.nan)


# Pipelines.

few = pytest.mark.filterwarnings("ignore:.*is noisy below")


@few
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", [tiny_sd, tiny_dit_pipe])
def test_pipelines(make, half):
    pipe = make()
    if half:
        pipe.to(torch.bfloat16)
    model, what = effuse.wrap(pipe), ["a dog", "an apple"] if make is tiny_sd else [1, 2]
    for solver in (Superposition(AND()), Superposition(OR()), SuperpositionODE(AND())):
        states = []
        run = controlled(model, Superdiff(solver), what, count=2, steps=4, guidance=3.0)

        def keep(index, level, step, into=states):
            into.append(step.state)

        a, b = (run.sample(rng=seeded(), on_step=keep) for _ in range(2))
        assert torch.equal(a, b)
        assert a.shape == (2, 3, 16, 16)
        assert 0 <= a.min() <= a.max() <= 1
        if isinstance(solver.rule, AND):
            gap = (states[3].log_q[:, 0] - states[3].log_q[:, 1]).abs().max()
            assert gap < 1e-6 * states[3].log_q.abs().max()


@few
def test_one_prompt_is_guided_ancestral_sampling():
    model = effuse.wrap(tiny_sd())
    run = controlled(model, Superdiff(), ["a dog"], steps=5, guidance=3.0)
    cond = model.embed(["a dog"], guided=True)
    x = run.start * model.prior(1, rng=seeded())
    told = sample(model.guide(3.0).given(**cond), Ancestral(), x, run.times, rng=seeded(1))
    mine = sample(run.denoiser, run.solver, x, run.times, rng=seeded(1))
    torch.testing.assert_close(mine, told, rtol=1e-4, atol=1e-4)


@few
def test_two_pipelines_are_two_members():
    a, b = effuse.wrap(tiny_sd()), effuse.wrap(tiny_sd())
    with torch.no_grad():
        for p in b.network.parameters():
            p.mul_(1.05)
    run = controlled(a, Superdiff(others=(b,)), ["a dog"], steps=4, guidance=1.0)
    assert len(run.denoiser.members) == 2
    assert run.sample(rng=seeded()).isfinite().all()
    other = effuse.wrap(tiny_sd())
    other.pipe.vae.register_to_config(scaling_factor=1.0)
    with pytest.raises(ValueError, match="one latent space"):
        controlled(a, Superdiff(others=(other,)), ["a dog"], steps=4)


def test_names():
    assert isinstance(control_named("superdiff"), Superdiff)
    assert control_named("superdiff").steps == 200
    assert Superdiff(SuperpositionODE()).steps is None
    with pytest.warns(UserWarning, match="100 steps: Superdiff is noisy below 200"):
        controlled(effuse.wrap(tiny_sd()), "superdiff", ["a", "b"], steps=100)
    with pytest.raises(ValueError, match="superdiff"):
        control_named("superdif")


@few
def test_house():
    for name, what in (("emoji", ["dog face", "red apple"]), ("emoji-dit", [1, 2])):
        model = effuse.wrap(effuse.load(f"house:{name}"))
        run = controlled(model, "superdiff", what, steps=4, guidance=4.0)
        assert run.sample(rng=seeded()).shape == (1, 3, 64, 64)
    pixels, other = (effuse.wrap(effuse.load("house:pixels")) for _ in range(2))
    run = controlled(pixels, Superdiff(others=(other,)), 2, steps=3)
    alone = controlled(pixels, Superdiff(), 2, steps=3)
    assert torch.equal(*(r.sample(rng=seeded()) for r in (run, alone)))
