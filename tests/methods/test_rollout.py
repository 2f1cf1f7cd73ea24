"""Rollouts: the same walk as `sample`, the gradients of plain backward, the memory of one step."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from effuse.core import Denoiser, Solver, Step, sample
from effuse.core.rollout import Rollout, tensors_of
from effuse.processes import Cosine
from effuse.solvers import DDIM
from effuse.solvers.dpmpp import DPMpp2M, DPMpp2MSDE
from effuse.solvers.heun import Heun
from effuse.solvers.momentum import Momentum
from effuse.solvers.unipc import UniPC


class Little(Denoiser):
    """Predicts the noise with two layers, in float64."""

    def __init__(self, width=6, hidden=8):
        super().__init__()
        self.process = Cosine()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(width + 1, hidden), nn.Tanh(), nn.Linear(hidden, width)
            ).double()

    def forward(self, x, t, **cond):
        level = torch.as_tensor(t, dtype=x.dtype).expand(len(x), 1)
        return self.process.complete(x, t, noise=self.net(torch.cat([x, level], 1)))


SOLVERS = [
    DDIM(),
    DDIM(eta=0.7),
    Momentum(),
    DPMpp2M(),
    DPMpp2MSDE(),
    UniPC(),
    Heun(),
]
TIMES = torch.linspace(0.95, 0.02, 7, dtype=torch.float64)
NOISE = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rng():
    return torch.Generator().manual_seed(5)


def plain(denoiser, solver, x):
    """Walk with the whole graph alive."""
    state, draw = solver.init(x), rng()
    for t, s in itertools.pairwise(TIMES):
        x, state = solver.step(denoiser, x, t, s, state, rng=draw)
    return x


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_are_those_of_plain_backward(solver):
    denoiser, x = Little(), NOISE.clone().requires_grad_()
    parameters = list(denoiser.parameters())
    weight = torch.linspace(-1, 2, 18, dtype=torch.float64).reshape(3, 6)
    loss = (plain(denoiser, solver, x) * weight).square().sum()
    expected = torch.autograd.grad(loss, [x, *parameters])
    rollout = Rollout(denoiser, solver, TIMES)
    out = rollout.run(x, parameters, rng=rng())
    found = torch.autograd.grad((out * weight).square().sum(), [x, *parameters])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-12 * b.norm()
    assert torch.equal(out.detach(), sample(denoiser, solver, x.detach(), TIMES, rng=rng()))


def test_the_generator_is_left_where_sampling_leaves_it():
    denoiser, one, two = Little(), rng(), rng()
    sample(denoiser, DDIM(eta=1.0), NOISE, TIMES, rng=one)
    x = Rollout(denoiser, DDIM(eta=1.0), TIMES).run(NOISE.clone().requires_grad_(), rng=two)
    assert torch.equal(one.get_state(), two.get_state())
    x.sum().backward()
    assert torch.equal(one.get_state(), two.get_state())


@dataclass(frozen=True)
class Scaling(Solver):
    """z <- a m z, with m of the denoiser."""

    a: float = 0.9

    def step(self, denoiser, x, t, s, state=None, *, rng=None):
        return Step(self.a * denoiser.m * x)


def test_scalar_chain():
    """z_0 = (a m)^T z_T and dz_0/dm = T a^T m^(T - 1) z_T."""
    denoiser = Little()
    denoiser.m = m = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    z, steps = torch.tensor([[2.0]], dtype=torch.float64), 9
    out = Rollout(denoiser, Scaling(), torch.linspace(1, 0, steps + 1)).run(z, [m])
    assert float(out.detach()) == pytest.approx((0.9 * 1.3) ** steps * 2, rel=1e-13)
    out.sum().backward()
    assert float(m.grad) == pytest.approx(steps * 0.9**steps * 1.3 ** (steps - 1) * 2, rel=1e-13)


def test_parameters_may_be_computed():
    """A mask from a logit: the gradient goes on to what the parameter was made of."""
    denoiser = Little()
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    denoiser.m = torch.sigmoid(logit)
    Rollout(denoiser, Scaling(1.0), TIMES).run(torch.ones(1, 1).double(), [denoiser.m]).backward()
    m = float(torch.sigmoid(logit.detach()))
    assert float(logit.grad) == pytest.approx(6 * m**5 * m * (1 - m), rel=1e-12)


class Count:
    """Counts the most bytes that graphs keep for backward at one time."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, t):
        held = [t]
        size = t.numel() * t.element_size()
        self.now += size
        self.most = max(self.most, self.now)

        class Held:
            pass

        out = Held()
        out.value = held
        weakref.finalize(out, self.drop, size)
        return out

    def drop(self, size):
        self.now -= size


def most_kept(run):
    count = Count()
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda held: held.value[0]):
        run().square().sum().backward()
    return count.most


def test_activation_memory_does_not_grow_with_steps():
    denoiser = Little(hidden=512)
    parameters = list(denoiser.parameters())

    def both(steps):
        times = torch.linspace(0.95, 0.02, steps + 1, dtype=torch.float64)

        def whole():
            x = NOISE
            for t, s in itertools.pairwise(times):
                x = DDIM().step(denoiser, x, t, s).x
            return x

        rollout = Rollout(denoiser, DDIM(), times)
        return most_kept(whole), most_kept(lambda: rollout.run(NOISE, parameters))

    few, many = both(4), both(32)
    assert many[0] > 7 * few[0]
    assert many[1] == few[1] < 0.3 * few[0]


def test_hooks_are_there_in_both_passes():
    denoiser, entered = Little(), []

    @contextlib.contextmanager
    def within():
        entered.append(1)
        yield

    x = NOISE.clone().requires_grad_()
    rollout = Rollout(denoiser, Heun(), TIMES, within)
    out = rollout.run(x)
    assert len(entered) == 6 == len(rollout)
    out.sum().backward()
    assert len(entered) == 12


def test_parts_make_the_whole():
    rollout = Rollout(Little(), DPMpp2M(), TIMES)
    point = rollout.prepare(NOISE)
    with torch.no_grad():
        for index in range(len(rollout)):
            point = rollout.step(index, point)
    assert torch.equal(rollout.finish(point), rollout.run(NOISE))
    assert tensors_of(point)[0] is point.x
    assert len(tensors_of(point)) > 1
    seen = []
    rollout.run(NOISE, watch=seen.extend)
    assert len(seen) == 7
    assert torch.equal(seen[-1].x, point.x)


def test_what_is_not_finite_is_named():
    denoiser = Little()
    denoiser.m = torch.tensor(float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 0 of Scaling, t 0\.95"):
        Rollout(denoiser, Scaling(), TIMES).run(NOISE)
    with pytest.raises(ValueError, match="two or more"):
        Rollout(denoiser, Scaling(), TIMES[:1])
