"""DiffGrad: the friction by hand, its limits where it is Adam, and the paper's functions."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.optim import DiffGrad


def weight():
    return torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))


def run(optimizer, w, grads):
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    return w.detach().clone()


def test_two_steps_by_hand():
    w = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = DiffGrad([w], lr=0.1, eps=0)
    w.grad = torch.tensor(1.0, dtype=torch.float64)
    optimizer.step()
    assert float(w) == pytest.approx(-0.1 * 0.7310585786)
    w.grad = torch.tensor(3.0, dtype=torch.float64)
    optimizer.step()
    m = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.81)
    v = (0.999 * 0.001 + 0.001 * 9) / (1 - 0.999**2)
    assert float(w) == pytest.approx(-0.1 * (0.7310585786 + 0.8807970780 * m / math.sqrt(v)))


def test_constant_gradient_is_adam_at_half_the_rate():
    g = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)
    one, two = weight(), weight()
    a, b = DiffGrad([one], lr=0.1), torch.optim.Adam([two], lr=0.05)
    x, y = run(a, one, [g]), run(b, two, [g])
    after = run(a, one, [g] * 5) - x
    torch.testing.assert_close(after, run(b, two, [g] * 5) - y, rtol=1e-10, atol=1e-12)


def test_limits_in_the_scale_of_the_loss():
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(6)]
    for scale, rate in ((1e-7, 0.05), (1e7, 0.1)):
        one, two = weight(), weight()
        found = run(DiffGrad([one], lr=0.1, eps=1e-16), one, [scale * g for g in grads])
        adam = torch.optim.Adam([two], lr=rate, eps=1e-16)
        torch.testing.assert_close(
            found, run(adam, two, [scale * g for g in grads]), rtol=1e-5, atol=1e-6
        )


def test_weight_decay_enters_the_gradient_and_its_difference():
    rng = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(3)]
    one, two = weight(), weight()
    a, b = DiffGrad([one], lr=0.1, weight_decay=0.3), DiffGrad([two], lr=0.1)
    for g in grads:
        one.grad, two.grad = g.clone(), g + 0.3 * two.detach()
        a.step()
        b.step()
        assert torch.equal(one.grad, g), "the gradient is not written to"
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_decoupled_decay_by_hand():
    w = weight()
    before = w.detach().clone()
    optimizer = DiffGrad([w], lr=0.1, weight_decay=0.3, decoupled=True, eps=0)
    run(optimizer, w, [torch.ones(3, 4, dtype=torch.float64)])
    torch.testing.assert_close(w.data, before * (1 - 0.03) - 0.1 / (1 + math.exp(-1)))


def test_zeroing_in_place_is_the_same():
    found = []
    for none in (True, False):
        w = weight()
        optimizer = DiffGrad([w], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=none)
            (w.square() * 3 + w).sum().backward()
            optimizer.step()
        found.append(w.detach().clone())
    assert torch.equal(*found)


def f1(x):
    return torch.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def f2(x):
    return torch.where(x <= -0.9, -40 * x - 35.15, x**3 + x * torch.sin(8 * x) + 0.85)


@pytest.mark.parametrize(("f", "adams", "ours"), [(f1, 0.2, -0.3), (f2, 0.0, -0.643)])
def test_the_papers_functions_and_the_halved_rate(f, adams, ours):
    def end(cls, lr):
        x = torch.nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        optimizer = cls([x], lr=lr, betas=(0.95, 0.999))
        for _ in range(300):
            optimizer.zero_grad()
            f(x).backward()
            optimizer.step()
        return float(x)

    assert end(torch.optim.Adam, 0.1) == pytest.approx(adams, abs=5e-3)
    assert end(DiffGrad, 0.1) == pytest.approx(ours, abs=5e-3)
    assert end(torch.optim.Adam, 0.05) == pytest.approx(ours, abs=5e-3)
