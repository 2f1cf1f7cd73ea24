"""SGD-SaI: the scale's identities, the update, what it keeps, and late gradients."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.optim import SGDSaI
from effuse.optim.sgd_sai import signal_to_noise


def grad(shape=(6, 5), mean=0.3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64) + mean


def test_scale_identities():
    g = grad()
    n, mean, std = g.numel(), float(g.mean()), float(g.std())
    found = signal_to_noise(g)
    assert found == pytest.approx(math.sqrt(n - 1 + n * (mean / std) ** 2), rel=1e-6)
    assert signal_to_noise(-g) == found
    assert signal_to_noise(1e3 * g, eps=0) == pytest.approx(signal_to_noise(g, eps=0), rel=1e-12)
    assert signal_to_noise(g - g.mean()) == pytest.approx(math.sqrt(n - 1), rel=1e-6)
    assert signal_to_noise(g, eps=0.5) == pytest.approx(float(g.norm()) / (std + 0.5))


@pytest.mark.parametrize("shape", [(), (1,), (4, 4)])
def test_scale_where_the_deviation_is_not_defined(shape):
    g = torch.full(shape, 0.1)
    assert signal_to_noise(g) == pytest.approx(math.sqrt(g.numel()))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_no_scale_of_zero_or_not_finite(value):
    assert signal_to_noise(torch.full((3,), value)) is None


def test_steps_by_hand():
    w = torch.nn.Parameter(torch.full((6, 5), 2.0, dtype=torch.float64))
    optimizer = SGDSaI([w], lr=0.01, momentum=0.8, weight_decay=0.5)
    one, two = grad(seed=1), grad(seed=2)
    scale = float(one.norm() / (one.std() + 1e-8))
    w.grad = one.clone()
    optimizer.step()
    first = 2.0 * (1 - 0.005) - 0.01 * scale * one
    torch.testing.assert_close(w.data, first)
    w.grad = two.clone()
    optimizer.step()
    m = 0.8 * one + 0.2 * two
    torch.testing.assert_close(w.data, first * (1 - 0.005) - 0.01 * scale * m)
    assert optimizer.scales() == {"0": pytest.approx(scale)}


def test_without_momentum_and_decay():
    w = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = SGDSaI([w], lr=0.1, momentum=0, weight_decay=0)
    for seed in (1, 2):
        w.grad, before = grad(seed=seed), w.detach().clone()
        optimizer.step()
        torch.testing.assert_close(w.data, before - 0.1 * optimizer.scales()["0"] * grad(seed=seed))


def test_scale_of_one_is_torch_sgd_with_dampening():
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2))
    a = SGDSaI([ours], lr=0.1, momentum=0.9, weight_decay=0, max_scale=1.0)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, dampening=0.9)
    for seed in range(4):
        ours.grad = theirs.grad = grad(seed=seed)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_lora_starts():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=rng), torch.randn(16, 4, generator=rng)
    a = torch.nn.Parameter(torch.randn(2, 6, generator=rng))
    b = torch.nn.Parameter(torch.zeros(4, 2))
    before = a.detach().clone()
    optimizer = SGDSaI([("a", a), ("b", b)], lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        ((x @ a.T) @ b.T - y).square().mean().backward()
        optimizer.step()
        if step == 0:
            assert optimizer.scales()["a"] is None
            assert torch.equal(a, before), "neither moved nor decayed"
    assert 0 < optimizer.scales()["a"] < 100
    assert not torch.equal(a, before)


def test_an_overflow_at_first_does_not_set_the_scale():
    w = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = SGDSaI([w], weight_decay=0)
    w.grad = torch.full((6, 5), math.inf)
    optimizer.step()
    assert torch.equal(w, torch.ones(6, 5))
    w.grad = grad().float()
    optimizer.step()
    kept = optimizer.scales()
    assert kept["0"] == pytest.approx(signal_to_noise(grad().float()))
    w.grad = 100 + grad().float()
    optimizer.step()
    assert optimizer.scales() == kept


def test_state_is_half_of_adamw():
    def state(cls, **kwargs):
        w = torch.nn.Parameter(torch.ones(100, 100))
        w.grad = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
        optimizer = cls([w], **kwargs)
        optimizer.step()
        values = optimizer.state[w].values()
        return sum(v.nbytes for v in values if torch.is_tensor(v) and v.ndim)

    assert state(SGDSaI) * 2 == state(torch.optim.AdamW)


def test_calibrated_on_one_batch_is_the_first_gradient_s_scale():
    a, b = (torch.nn.Parameter(torch.ones(6, 5, dtype=torch.float64)) for _ in range(2))
    one, two = SGDSaI([a]), SGDSaI([b])

    def closure():
        a.grad = grad(seed=3)

    assert one.calibrate(closure, 1) == {"0": pytest.approx(signal_to_noise(grad(seed=3)))}
    assert a.grad is None
    assert torch.equal(a, torch.ones_like(a)), "nothing moved"
    for seed in (3, 4, 5):
        a.grad = b.grad = grad(seed=seed)
        one.step()
        two.step()
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_calibrated_on_many_batches_noise_cancels():
    w = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.float64))
    late = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGDSaI([("w", w), ("late", late)], weight_decay=0)
    given = iter([grad(seed=1), grad(seed=2), grad(seed=3), grad(seed=4)])

    def closure():
        w.grad, late.grad = next(given), torch.zeros(3)

    found = optimizer.calibrate(closure, 4)
    every = torch.stack([grad(seed=s) for s in (1, 2, 3, 4)])
    spread = torch.stack([g.std() for g in every]).mean()
    assert found == {"w": pytest.approx(float(every.mean(0).norm() / spread)), "late": None}
    copy = SGDSaI([("w", w), ("late", late)], weight_decay=0)
    copy.load_state_dict(optimizer.state_dict())
    w.grad, before = grad(seed=5), w.detach().clone()
    copy.step()
    torch.testing.assert_close(w.data, before - 0.01 * found["w"] * grad(seed=5))
    assert copy.scales()["w"] == found["w"]
    with pytest.raises(RuntimeError, match="steps were made already"):
        copy.calibrate(closure, 1)


def test_calibrate_refuses_an_overflow_whole():
    w = torch.nn.Parameter(torch.ones(3))

    def closure():
        w.grad = torch.full((3,), math.nan)

    optimizer = SGDSaI([w])
    with pytest.raises(ValueError, match="not finite"):
        optimizer.calibrate(closure)
    assert optimizer.scales() == {"0": None}
