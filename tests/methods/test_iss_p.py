"""Soft shrinkage: what a step does to each weight, its limits, and what is stored in the end."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effuse.compress.prune.iss_p import (
    NofM,
    Sampled,
    SoftShrink,
    Sparsify,
    Unstructured,
    count_of,
)
from effuse.nn.sparse import pack_bits, sparse, unpack_bits


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def train(steps: int, make, hook=None, optimizer=torch.optim.Adam, model=None):
    """Train on fixed data; `make` builds what is called after each step, or None."""
    model = net() if model is None else model
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=rng, dtype=torch.float64)
    y = torch.randn(32, 4, generator=rng, dtype=torch.float64)
    opt, shrink = optimizer(model.parameters(), lr=1e-2), make(model) if make else None
    for _ in range(steps):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        if shrink is not None:
            shrink.step()
        if hook is not None:
            hook(model, shrink)
    return model, shrink


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_ratio_one_and_sparsity_zero_are_the_dense_training(optimizer):
    dense, _ = train(20, None, optimizer=optimizer)
    assert same(train(20, lambda m: SoftShrink(m, 0.7, 1.0), optimizer=optimizer)[0], dense)
    assert same(train(20, lambda m: SoftShrink(m, 0.0, 0.5), optimizer=optimizer)[0], dense)
    other, _ = train(20, lambda m: SoftShrink(m, 0.7, 0.9), optimizer=optimizer)
    assert not same(other, dense)


def test_ratio_zero_is_hard_thresholding():
    class Hard:
        def __init__(self, model):
            self.weights = [m.weight for m in model if isinstance(m, nn.Linear)]

        def step(self):
            with torch.no_grad():
                for w in self.weights:
                    flat = w.view(-1)
                    flat[flat.abs().argsort(stable=True)[: math.ceil(0.7 * len(flat))]] = 0

    ours, _ = train(15, lambda m: SoftShrink(m, 0.7, 0.0))
    assert same(ours, train(15, Hard)[0])


def test_without_training_small_weights_decay_geometrically():
    model = net()
    before = [m.weight.clone() for m in (model[0], model[2])]
    bias = model[0].bias.clone()
    shrink = SoftShrink(model, 0.6, 0.9)
    for _ in range(7):
        shrink.step()
    for w, layer in zip(before, (model[0], model[2]), strict=True):
        count = math.ceil(0.6 * w.numel())
        small = torch.zeros(w.numel(), dtype=torch.bool)
        small[w.abs().flatten().argsort()[:count]] = True
        small = small.reshape(w.shape)
        torch.testing.assert_close(layer.weight[small], 0.9**7 * w[small], rtol=1e-12, atol=0)
        assert torch.equal(layer.weight[~small], w[~small])
    assert shrink.flips == 0
    assert torch.equal(model[0].bias, bias)


def test_a_steady_drive_leads_to_its_fixed_point():
    """w <- r (w + u) held in U tends to r u / (1 - r), the distance falling by r a step."""
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = torch.tensor([[0.0, 5.0, 6.0, 7.0]], dtype=torch.float64)
    shrink, r, u, gaps = SoftShrink(layer, 0.25, 0.8), 0.8, 0.1, []
    for _ in range(30):
        with torch.no_grad():
            layer.weight[0, 0] += u
        shrink.step()
        gaps.append(float(layer.weight[0, 0]) - r * u / (1 - r))
    torch.testing.assert_close(torch.tensor(gaps[1:]), r * torch.tensor(gaps[:-1]))
    assert abs(gaps[-1]) < 1e-3


@given(st.integers(1, 300), st.floats(0, 0.999))
def test_exact_count(n, p):
    rng = torch.Generator().manual_seed(n)
    size = torch.rand(n, generator=rng)
    out = Unstructured().smallest(size, p, None)
    count = min(math.ceil(p * n - 1e-9), math.floor(0.995 * n))
    assert int(out.sum()) == count == count_of(p, n)
    if 0 < count < n:
        assert size[out].max() <= size[~out].min()
    again = Unstructured().smallest(3.7 * size, p, None)
    assert torch.equal(out, again)


def test_ties_keep_the_count():
    out = Unstructured().smallest(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]), 0.5, None)
    assert out.tolist() == [True, True, True, False, False, False]


def test_after_fix_zeros_stay_zeros():
    model, shrink = train(10, lambda m: SoftShrink(m, 0.8, 0.95))
    masks = {k: v.clone() for k, v in shrink.fix().items()}
    counts = [int(m.sum()) for m in masks.values()]
    assert counts == [math.ceil(0.8 * 128), math.ceil(0.8 * 64)]

    def zeros(model, shrink):
        assert [int(model[i].weight.eq(0).sum()) for i in (0, 2)] == counts

    moved = model[0].weight.clone()
    train(25, lambda m: shrink, zeros, model=model)
    assert not torch.equal(model[0].weight, moved)
    assert all(torch.equal(shrink.masks[k], masks[k]) for k in masks)


@pytest.mark.parametrize("shape", [(6, 8), (5, 8, 3, 3)])
def test_n_of_m(shape):
    size = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    out = NofM(2, 4).smallest(size, 0.9, None).movedim(1, -1)
    groups = out.reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    own = size.movedim(1, -1).reshape(-1, 4)
    assert (own.masked_fill(~groups, -1).amax(1) <= own.masked_fill(groups, 2).amin(1)).all()
    with pytest.raises(ValueError, match="8 inputs: expected a multiple of m=3"):
        NofM(1, 3).smallest(size, 0.5, None)


def test_sampled_tends_to_exact():
    rng = torch.Generator().manual_seed(0)
    size = torch.rand(20_000, generator=rng)
    exact, wrong = Unstructured().smallest(size, 0.9, None), []
    for count in (200, 2000, 19_000):
        found = [Sampled(count).smallest(size, 0.9, rng) for _ in range(8)]
        wrong.append(sum(float((f != exact).float().mean()) for f in found) / 8)
    assert wrong[0] > 2 * wrong[1] > 4 * wrong[2]
    assert torch.equal(Sampled(20_000).smallest(size, 0.9, rng), exact)


def test_schedule_resume_and_ties_of_weights():
    model = net()
    shrink = SoftShrink(model, lambda k: 0.1 * k, 0.5)
    for k in range(4):
        assert shrink.now() == pytest.approx(0.1 * k)
        shrink.step()
    other = SoftShrink(model, lambda k: 0.1 * k, 0.5)
    other.load_state_dict(shrink.state_dict())
    assert other.now() == shrink.now()
    shrink.fix()
    other.load_state_dict(shrink.state_dict())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    other.step()
    assert int(model[0].weight.eq(0).sum()) == math.ceil(0.4 * 128)
    with pytest.raises(ValueError, match="masks of other layers"):
        SoftShrink(model, where=lambda n, m: n == "0").load_state_dict(shrink.state_dict())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    start = tied[0].weight.detach().clone()
    SoftShrink(tied, 0.5, 0.5).step()
    small = Unstructured().smallest(start.abs(), 0.5, None)
    assert torch.equal(tied[0].weight[small], 0.5 * start[small])


def test_gradients_are_told():
    model, shrink = train(1, lambda m: SoftShrink(m, 0.5))
    told = shrink.gradients()["0"]
    assert told["norm"] == pytest.approx(float(model[0].weight.grad.norm()))
    assert told["variance"] == pytest.approx(float(model[0].weight.grad.var()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0: expected a fraction"),
        ({"ratio": 1.5}, "ratio=1.5: expected a fraction"),
        ({"where": lambda n, m: False}, "no linear layer or convolution"),
    ],
)
def test_bad_input(words, said):
    with pytest.raises(ValueError, match=said):
        SoftShrink(net(), **words)


@given(st.integers(1, 100))
def test_bits_come_back(n):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack_bits(mask)
    assert len(packed) == -(-n // 8)
    assert torch.equal(unpack_bits(packed, n), mask)


def test_stored_layers_are_the_dense_ones_and_small():
    model, shrink = train(5, lambda m: SoftShrink(m, 0.9, 0.9))
    shrink.fix()
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    handle = Sparsify(0.9, least=0).attach(model)
    assert torch.equal(model(x), expected)
    report = handle.report()
    stored = sum(128 // 8 * (n // 128) for n in (128,)) + 64 // 8  # bits
    stored += 8 * (12 + 6) + 8 * (16 + 4)  # what is not zero, and biases
    assert report["layer_bytes"] == stored
    assert report["zeros"] == pytest.approx(1 - 18 / 192)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    y = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sparse(conv)(y), conv(y))
    with pytest.raises(TypeError, match="Tanh: expected"):
        sparse(nn.Tanh())


def test_sparsify_is_one_shot_magnitude_and_zero_keeps_all():
    model = net()
    w = model[0].weight.detach().clone()
    kept = Sparsify(0.0, least=0).attach(model)
    assert torch.equal(model[0].weight, w)
    kept.detach()
    handle = Sparsify(0.5, least=100).attach(model)
    assert type(model[2]) is nn.Linear
    assert torch.equal(model[0].weight.eq(0), Unstructured().smallest(w.abs(), 0.5, None))
    handle.detach()
    assert torch.equal(model[0].weight, w)
