"""Every solver card, on exact Gaussian data in float64, from t = 1 to 0."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp

from effuse.core import Gaussian, Mixture, Solver, methods, sample
from effuse.processes import VE, Cosine, Flow, Linear, SubVP, Tabulated, Uniform
from effuse.solvers.momentum import HeavyBall, Momentum
from effuse.solvers.plms import PLMS
from effuse.solvers.unipc import UniPC

SOLVERS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Solver)
}


FIXED = [name for name, made in SOLVERS.items() if not made().stochastic]
RANDOM = [name for name in SOLVERS if name not in FIXED]


@pytest.fixture(params=SOLVERS, ids=str)
def solver(request) -> Solver:
    return SOLVERS[request.param]()


@pytest.fixture(params=FIXED, ids=str)
def fixed(request) -> Solver:
    return SOLVERS[request.param]()


@pytest.fixture(params=RANDOM, ids=str)
def random(request) -> Solver:
    return SOLVERS[request.param]()


def table() -> Tabulated:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


PROCESSES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "ve": VE(),
    "sub_vp": SubVP(),
    "flow": Flow(),
    "table": table(),
}


def even(process, steps: int) -> torch.Tensor:
    """Return levels from 1 to 0 along which sigma starts linearly, as order theory wants it."""
    t = Uniform()(process, steps)
    return t if isinstance(process, (Flow, Cosine, SubVP)) else t**2


# Orders other than those of the examples.
MORE = [
    *(PLMS(k) for k in (1, 3, 4, 5)),
    *(Momentum(k, 0.7) for k in (1, 3, 5)),
    UniPC(1, corrector=False),
    UniPC(2, corrector=False),
    UniPC(3),
    UniPC(3, corrector=False),
    HeavyBall(1.0, PLMS(3)),
    HeavyBall(0.7, UniPC(3)),
]


def slope(solver, process, *counts: int) -> tuple[float, list[float]]:
    """Return the order measured from t = 1 to 0, and the errors: every start and end included."""
    model = Gaussian(process, 0.4, 0.6)
    x = process.prior((16, 2), dtype=torch.float64, rng=torch.Generator().manual_seed(0))
    truth = model.transport(x, 1.0, 0.0)
    errors = [
        (sample(model, solver, x, even(process, n)) - truth).abs().max().item() for n in counts
    ]
    return math.log(errors[0] / errors[1], counts[1] / counts[0]), errors


@pytest.mark.parametrize("name", ["cosine", "flow", "linear", "ve"])
def test_order(fixed, name):
    """The declared order, from t = 1 to 0: halving the steps divides the error by 2^order."""
    # Multistep loses a logarithm where the log SNR is infinite at an end; it dies out later where
    # the errors of third order are still above it.
    found, errors = slope(
        fixed, PROCESSES[name], *((128, 1024) if fixed.order < 3 else (1024, 4096))
    )
    assert found > fixed.walk_order - 0.3, (errors, found)


@pytest.fixture(scope="module")
def bent():
    """A mixture, noise, and where its ODE takes it, by an integrator of order eight."""
    process = Flow()
    model = Mixture(process, torch.tensor([[-1.0, 0.5], [0.8, -0.3], [0.2, 1.1]]), 0.5)
    x = process.prior((8, 2), dtype=torch.float64, rng=torch.Generator().manual_seed(1))

    def velocity(t, y):
        at = torch.from_numpy(y).reshape(x.shape)
        return process.velocity(float(t), model(at, float(t))).numpy().ravel()

    done = solve_ivp(velocity, (1.0, 0.0), x.numpy().ravel(), "DOP853", rtol=1e-12, atol=1e-13)
    return model, x, torch.from_numpy(done.y[:, -1]).reshape(x.shape)


def test_order_on_a_mixture(fixed, bent):
    """The declared order where the paths bend, full interval."""
    model, x, truth = bent
    counts = (128, 1024) if fixed.order < 3 else (1024, 4096)
    errors = [
        (sample(model, fixed, x, even(model.process, n)) - truth).abs().max().item() for n in counts
    ]
    found = math.log(errors[0] / errors[1], counts[1] / counts[0])
    assert found > fixed.walk_order - 0.3, (errors, found)


@pytest.mark.parametrize("solver", MORE, ids=repr)
def test_order_of_a_whole_walk(solver):
    assert solver.walk_order == min(solver.order, 2)
    for name in ("flow", "linear"):
        found, errors = slope(solver, PROCESSES[name], 96, 384)
        assert found > solver.walk_order - 0.3, (name, errors, found)


def test_moments(random):
    """A stochastic solver ends in the data law: mean and deviation, from t = 1 to 0."""
    solver = random
    mean, std, count = 0.4, 0.6, 40_000
    model = Gaussian(Cosine(), mean, std)
    gaps = []
    for steps in (16, 64):
        rng = torch.Generator().manual_seed(1)
        x = Cosine().prior((count, 1), dtype=torch.float64, rng=rng)
        out = sample(model, solver, x, Uniform()(Cosine(), steps), rng=rng)
        gaps.append((abs(out.mean().item() - mean), abs(out.std().item() / std - 1)))
    noise = 4 / math.sqrt(count)
    assert gaps[1][0] < noise * std + 0.01
    assert gaps[1][1] < noise + 0.03
    assert gaps[1][1] < gaps[0][1] + noise


@pytest.mark.parametrize("name", PROCESSES)
def test_finite_from_one_to_zero(solver, name):
    process = PROCESSES[name]
    model = Mixture(process, torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.1)
    rng = torch.Generator().manual_seed(0)
    x = process.prior((16, 2), dtype=torch.float64, rng=rng)
    for steps in (1, 2, 5):
        out = sample(model, solver, x, Uniform()(process, steps), rng=rng)
        assert out.isfinite().all()
        assert out.shape == x.shape


@pytest.mark.parametrize("name", PROCESSES)
def test_identity_from_t_to_t(solver, name):
    """Also at pure noise and at clean data, where ratios of the coefficients are 0 / 0."""
    process = PROCESSES[name]
    model = Gaussian(process, 0.4, 0.6)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.5, 1.0, torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64)):
        state = solver.init(x)
        for _ in range(2):
            out, state = solver.step(model, x, t, t, state, rng=torch.Generator())
            torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


def test_batched_times_equal_single_ones(fixed):
    solver = fixed
    model = Gaussian(Cosine(), 0.4, 0.6)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[0.9, 0.6, 0.2], [0.7, 0.5, 0.1], [0.4, 0.3, 0.0]], dtype=torch.float64)

    def walk(x, rows):
        state = solver.init(x)
        for t, s in pairwise(grid):
            x, state = solver.step(model, x, t[rows], s[rows], state)
        return x

    many = walk(x, torch.arange(3))
    for i in range(3):
        torch.testing.assert_close(many[i : i + 1], walk(x[i : i + 1], torch.tensor([i])))


def test_same_rng_same_sample(solver):
    model = Gaussian(Flow(), 0.4, 0.6)
    x = Flow().prior((8, 2), rng=torch.Generator().manual_seed(0))
    a, b, c = (
        sample(model, solver, x, Uniform()(Flow(), 4), rng=torch.Generator().manual_seed(k))
        for k in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert torch.equal(a, c) is not solver.stochastic
    assert a.dtype == torch.float32


def test_state_is_a_value(solver):
    """A step does not change the state it was given: it can be taken again."""
    model = Gaussian(Cosine(), 0.4, 0.6)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = solver.init(x)
    for t, s in ((0.9, 0.7), (0.7, 0.5), (0.5, 0.4)):
        first = solver.step(model, x, t, s, state, rng=torch.Generator().manual_seed(5))
        again = solver.step(model, x, t, s, state, rng=torch.Generator().manual_seed(5))
        assert torch.equal(first.x, again.x)
        x, state = first


def test_calls_a_step(solver):
    calls = []

    class Counted(Gaussian):
        def forward(self, x, t, **cond):
            calls.append(t)
            return super().forward(x, t)

    model = Counted(Cosine(), 0.0, 1.0)
    x = torch.randn(2, 2, dtype=torch.float64)
    sample(model, solver, x, torch.tensor([0.9, 0.6, 0.3]), rng=torch.Generator())
    assert len(calls) == 2 * solver.evals
