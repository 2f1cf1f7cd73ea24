"""Oracles of ordered low-rank layers: sheet 34."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tests.tiny import tiny_sd, tiny_unet
from torch import nn

from effuse.bridge import store
from effuse.compress.calibrate import calls_from_pipeline
from effuse.compress.factorize.maestro import (
    Classes,
    Independent,
    LossOverRanks,
    Maestro,
    Numbers,
    OneLayer,
    allocate,
    energy_losses,
    recalibrate,
)
from effuse.compress.units import parameters
from effuse.core.training import fit
from effuse.nn.low_rank import (
    InputMoments,
    LowRank,
    LowRankLinear,
    empty_like,
    factored,
    group_lasso,
    low_rank_layers,
    ranks,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(m, n, *, spectrum=None, seed=0, bias=True):
    layer = nn.Linear(n, m, bias=bias).double()
    w = torch.randn(m, n, generator=rng(seed), dtype=torch.float64)
    if spectrum is not None:
        a, _, b = torch.linalg.svd(w, full_matrices=False)
        w = a * torch.as_tensor(spectrum, dtype=torch.float64) @ b
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias:
            layer.bias.copy_(torch.randn(m, generator=rng(seed + 9)))
    return layer


CONVS = [
    nn.Conv2d(5, 7, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding=(1, 1), bias=False),
    nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(6, 4, 1),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_split_of_a_convolution_is_the_convolution(conv):
    conv = copy.deepcopy(conv).double()
    x = torch.randn(2, conv.in_channels, 9, 8, generator=rng(), dtype=torch.float64)
    low = factored(conv)
    torch.testing.assert_close(low(x), conv(x), rtol=0, atol=1e-12)
    back = low.dense()
    assert type(back) is nn.Conv2d
    torch.testing.assert_close(back(x), conv(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_rank_b_is_off_by_eckart_young(m, n):
    layer = linear(m, n)
    low, s = factored(layer), torch.linalg.svdvals(layer.weight)
    x = torch.randn(4, 3, n, generator=rng(1), dtype=torch.float64)
    net = nn.Sequential(low)
    for b in range(1, 7):
        with ranks(net, {"0": b}):
            off = (low.weight - layer.weight).square().sum().sqrt()
            torch.testing.assert_close(off, s[b:].square().sum().sqrt(), rtol=0, atol=1e-12)
            limited = low(x)
        torch.testing.assert_close(limited, low.cut(b)(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(low(x), layer(x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in low.cut(4).parameters()) == (m + n) * 4 + m


def test_splits_evenly_between_the_factors():
    low, s = factored(linear(5, 7)), torch.linalg.svdvals(linear(5, 7).weight)
    torch.testing.assert_close(low.left.T @ low.left, torch.diag(s))
    torch.testing.assert_close(low.right @ low.right.T, torch.diag(s))


def test_lasso_is_the_sum_of_tail_norms():
    low = factored(linear(5, 7))
    by_hand = sum(
        low.left[:, b:].norm() + low.right[b:].norm() for b in range(5)
    )  # tails b..r, counted from 0
    torch.testing.assert_close(group_lasso(nn.Sequential(low)), by_hand)
    with torch.no_grad():  # components of equal norm c
        low.up.weight.copy_(3.0 * torch.eye(5))
        low.down.weight.copy_(2.0 * torch.eye(5, 7))
    expected = (3.0 + 2.0) * sum(math.sqrt(5 - b + 1) for b in range(1, 6))
    assert float(group_lasso(nn.Sequential(low)).detach()) == pytest.approx(expected)
    one = factored(linear(1, 7))
    expected = one.left.norm() + one.right.norm()
    torch.testing.assert_close(group_lasso(nn.Sequential(one)), expected)


def test_lasso_of_a_zero_tail_has_a_gradient():
    low = factored(linear(5, 7)).float()
    with torch.no_grad():
        low.up.weight[:, 3:] = 0
        low.down.weight[3:] = 0
    group_lasso(nn.Sequential(low)).backward()
    assert low.up.weight.grad.isfinite().all()
    assert low.down.weight.grad.isfinite().all()
    assert (low.up.weight.grad[:, 3:] == 0).all()


def test_importance_falls_and_shrinking_follows_it():
    net = nn.Sequential(factored(linear(6, 6, spectrum=[5, 3, 2, 1, 1e-4, 1e-6])))
    low, goal = net[0], LossOverRanks(net, Numbers())
    assert (low.importance().diff() <= 0).all()
    s = torch.tensor([5, 3, 2, 1, 1e-4, 1e-6], dtype=torch.float64)
    torch.testing.assert_close(low.importance(), s.flip(0).cumsum(0).flip(0))  # = tails of s
    assert goal.shrink(0.0) == {"0": 6}
    assert goal.shrink(0.5) == {"0": 4}
    x = torch.randn(3, 6, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(net(x), low.cut(4)(x))
    assert goal.shrink(float("inf")) == {"0": 0}
    assert torch.equal(net(x), low.bias.expand(3, -1))
    conv = factored(nn.Conv2d(2, 3, 3, stride=2))
    conv.kept = 0
    assert torch.equal(
        conv(torch.ones(1, 2, 7, 7)), conv.bias[None, :, None, None].expand(1, 3, 3, 3)
    )


def test_one_layer_visits_every_rank_once_a_cycle():
    full, state, seen = [3, 1, 4], torch.zeros(9, dtype=torch.int64), []
    g = rng()
    for _ in range(16):
        (pair,) = OneLayer().draw(full, full, state, g).items()
        seen.append(pair)
    every = {(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2), (2, 3), (2, 4)}
    assert set(seen[:8]) == set(seen[8:]) == every
    assert seen[:8] != seen[8:]
    kept = [
        OneLayer().draw(full, [1, 0, 2], state, g) for _ in range(6)
    ]  # what was shrunk stays out
    every = [{0: 1}, {2: 1}, {2: 2}]
    assert all(kept.count(e) == 2 for e in every)
    drawn = [Independent().draw(full, [3, 0, 4], state, g) for _ in range(400)]
    assert all(set(d) == {0, 2} for d in drawn)
    assert {d[0] for d in drawn} == {1, 2, 3}
    assert {d[2] for d in drawn} == {1, 2, 3, 4}


def test_without_sampling_and_lasso_it_is_ordinary_training():
    net = nn.Sequential(factored(linear(4, 5)))
    x, y = (torch.randn(6, k, generator=rng(k), dtype=torch.float64) for k in (5, 4))
    goal = LossOverRanks(net, Numbers(), lasso=0.0, sampling=None)
    loss = goal.loss("student", {"call": ((x,), {}), "target": y})
    assert set(loss.terms) == {"whole"}
    torch.testing.assert_close(loss.total, (net(x).float() - y.float()).square().mean())


def test_whole_pass_teaches_the_cut_one():
    """The cut pass is held against the whole answer; without `whole` against the target."""
    net = nn.Sequential(factored(linear(4, 5).float()))
    x, y = torch.randn(6, 5, generator=rng(1)), torch.tensor([0, 1, 2, 3, 0, 1])
    batch = {"call": ((x,), {}), "target": y}
    for whole in (True, False):
        goal = LossOverRanks(net, Classes(), lasso=0.0, whole=whole)
        loss = goal.loss("student", batch, rng=rng(3))
        again = LossOverRanks(net, Classes(), lasso=0.0)
        drawn = OneLayer().draw([4], [4], again.state, rng(3))
        with ranks(net, {"0": drawn[0]}):
            cut = net(x)
        target = net(x).softmax(-1) if whole else y
        torch.testing.assert_close(loss.terms["cut"], nn.functional.cross_entropy(cut, target))
        assert ("whole" in loss.terms) == whole


def population(low, a):
    """Return the loss at every rank for white inputs, (r,): ||W - W_b||^2."""
    parts = low.left.T[:, :, None] * low.right[:, None, :]
    return (a - parts.cumsum(0)).square().sum((1, 2))


def test_ordered_training_finds_the_svd_and_plain_training_does_not():
    """A linear map with white inputs: at its minimum every rank is Eckart-Young's."""
    a = linear(6, 6, spectrum=[3, 2.4, 1.8, 1.2, 0.8, 0.4], bias=False).weight.detach()
    s = torch.linalg.svdvals(a)
    tails = torch.stack([s[b:].square().sum() for b in range(1, 7)])
    found = {}
    for way in ("ordered", "plain"):
        low = factored(linear(6, 6, seed=4, bias=False))
        with torch.no_grad():
            low.up.weight.mul_(0.3), low.down.weight.mul_(0.3)
        optimizer = torch.optim.LBFGS(low.parameters(), 1.0, 600, line_search_fn="strong_wolfe")

        def step(low=low, way=way, optimizer=optimizer):
            optimizer.zero_grad()
            each = population(low, a)
            loss = each.mean() if way == "ordered" else each[-1]
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(step)
        found[way] = population(low, a).detach()
        if way == "ordered":
            assert float(found[way].mean()) == pytest.approx(float(tails.mean()), rel=1e-4)
    torch.testing.assert_close(found["ordered"][:-1], tails[:-1], rtol=0.01, atol=1e-4)
    assert float(found["plain"][-1]) < 1e-4  # it did learn the map
    assert float((found["plain"][:-1] / tails[:-1]).max()) > 1.14


def test_sampled_loss_is_the_average_over_ranks():
    """A cycle of the sampler through the objective gives the mean of the losses at all ranks."""
    net = nn.Sequential(factored(linear(4, 5, bias=False)))
    a = linear(4, 5, seed=2, bias=False)
    x = torch.eye(5, dtype=torch.float64)
    batch = {"call": ((x,), {}), "target": a(x).detach()}
    goal = LossOverRanks(net, Numbers(), lasso=0.0, whole=False)
    g = rng()
    mean = sum(goal.loss("student", batch, rng=g).total for _ in range(4)) / 4
    expected = population(net[0], a.weight).mean() / 20
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)


def test_allocation_is_the_best_of_all_that_cost_no_more():
    """No choice of ranks and dense layers that costs as much keeps a larger product of energies."""
    import itertools

    energies = [torch.tensor([9.0, 3.0, 1.0, 0.2]), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])]
    losses = [energy_losses(e) for e in energies]
    one, dense, positions = [10, 12], [36, 400], [3, 1]
    whole = sum(p * d for p, d in zip(positions, dense))
    choices = list(itertools.product([1, 2, 3, None], range(1, 6)))

    def spent(ranks):
        cost = [d if b is None else o * b for o, d, b in zip(one, dense, ranks)]
        return sum(p * c for p, c in zip(positions, cost))

    def kept(ranks):
        return math.prod(float(e[:b].sum() / e.sum()) for e, b in zip(energies, ranks))

    seen = set()
    for keep in torch.linspace(spent((1, 1)) / whole + 1e-6, 1, 60).tolist():
        got = allocate(losses, one, dense, positions, keep)
        assert spent(got) <= keep * whole
        best = max(kept(c) for c in choices if spent(c) <= spent(got))
        assert kept(got) == pytest.approx(best)
        seen.add(tuple(got))
    assert len(seen) >= 5
    assert allocate(losses, one, dense, positions, 1.0) == [None, 5]


def test_allocation_at_the_ends():
    """Dense at full budget, whatever fits below, an error under rank 1; none is stripped."""
    even = energy_losses(torch.ones(4))
    torch.testing.assert_close(even.exp(), 4 / torch.arange(1, 5, dtype=torch.float64))
    assert allocate([even], [8], [16], [1], 1.0) == [None]
    assert allocate([even], [8], [16], [1], 0.9) == [1]
    assert allocate([energy_losses(torch.zeros(4))], [2], [16], [1], 0.4) == [3]
    with pytest.raises(ValueError, match="rank 1 everywhere"):
        allocate([even], [8], [16], [1], 0.4)
    flat, steep = energy_losses(torch.ones(100)), energy_losses(0.5 ** torch.arange(100.0))
    got = allocate([flat, steep], [2, 2], [200, 200], [1000, 1], 0.3)
    assert got[0] > 20  # the sum of what is lost would leave it one component
    long = energy_losses(torch.ones(64))
    assert allocate([long, long], [128, 128], [4096, 4096], [1, 1], 0.97)[0] == 30  # fills up


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), *CONVS], ids=str)
def test_moments_give_the_energy_of_the_outputs(layer):
    """E||y - bias||^2 = tr(W C W^T): patches in the order of the weight, padded as the layer is."""
    layer = copy.deepcopy(layer)
    wide = isinstance(layer, nn.Linear)
    parts = [torch.randn(3, 4, 6) if wide else torch.randn(2, layer.in_channels, 9, 8), None]
    parts[1] = 2 * parts[0][:1]
    with InputMoments({"a": layer}) as heard, torch.no_grad():
        outputs = [layer(x) for x in parts]
    layer(parts[0])  # not heard any more
    bias = 0 if layer.bias is None else (layer.bias if wide else layer.bias[:, None, None])
    each = [(y - bias).square().sum(-1 if wide else 1).flatten() for y in outputs]
    w = layer.weight.detach().flatten(1).double()
    torch.testing.assert_close(
        (w @ heard.moments["a"] @ w.T).trace(), torch.cat(each).mean().double(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("like", [0, 1, 2, 3, 4])
def test_a_split_by_inputs_loses_least_of_the_outputs(like):
    """Eckart-Young for W R: the error of the outputs is the tail of its spectrum, and no less."""
    g = rng(like)
    layer = copy.deepcopy([nn.Linear(6, 5), *CONVS][like]).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=g, dtype=torch.float64))
    shape = (400, 6) if like == 0 else (40, layer.in_channels, 9, 8)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    x = x * 0.7 ** torch.arange(shape[1]).view(-1, *(1,) * (len(shape) - 2))
    with InputMoments({"a": layer}) as heard, torch.no_grad():
        y = layer(x)
    moment = heard.moments["a"]
    w = layer.weight.detach().flatten(1)
    tails = torch.linalg.eigvalsh(w @ moment @ w.T).cumsum(0).flip(0).clamp_min(0)
    split, plain = factored(layer, inputs=moment), factored(layer)
    scale = 1 if like == 0 else y[0, 0].numel()
    for b in range(1, split.rank):
        lost = []
        for m in (split, plain):
            with ranks(nn.Sequential(m), {"0": b}), torch.no_grad():
                lost.append(float((m(x) - y).square().sum() / len(x) / scale))
        assert float(tails[b]) * (1 - 1e-5) <= lost[0] <= 1.02 * float(tails[b]) + 1e-9
        assert lost[0] < lost[1]
    with torch.no_grad():
        torch.testing.assert_close(split(x), y)
    with pytest.raises(ValueError, match="inputs is not finite"):
        factored(layer, inputs=moment * math.nan)


def test_judged_losses_are_the_answers_errors():
    """One layer alone: at every size tried, the tail of W R's spectrum over the whole."""
    layer = linear(40, 30, bias=False).float()
    x = torch.randn(64, 30, generator=rng()) * torch.linspace(0.05, 2, 30)
    net = nn.Sequential(copy.deepcopy(layer))
    handle = Maestro(least=4).attach(net)
    assert handle.split([((x,), {})]) == ["0"]
    losses = handle.judge([((x,), {})])["0"]
    energy = torch.linalg.eigvalsh((layer.weight @ x.T @ x @ layer.weight.T).detach().double())
    tails = energy.flip(0).clamp_min(0)[:30].flip(0).cumsum(0).flip(0) / energy.sum()
    for b in (1, 3, 5, 9, 14):  # of 17 that are cheaper than dense
        with ranks(net, {"0": b}), torch.no_grad():
            moved = (net(x) - layer(x)).square().sum() / layer(x).square().sum()
        assert float(losses[b - 1]) == pytest.approx(float(moved), rel=1e-4)
        assert float(losses[b - 1]) == pytest.approx(float(tails[b]), rel=0.05)
    assert (losses[1:] <= losses[:-1]).all()
    middle = (losses[2] * losses[4]).sqrt()
    torch.testing.assert_close(losses[3], middle)  # straight in the logarithm


def test_what_was_trained_keeps_its_order():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    handle = Maestro(keep=0.5, least=4).attach(net)
    with torch.no_grad():
        net[0].up.weight.mul_(1.001)
    trained = net[0]
    assert handle.split([((torch.randn(50, 12, generator=rng()),), {})]) == ["1"]
    assert net[0] is trained


@pytest.mark.parametrize("room", [0, 2**31])
def test_by_answers_is_nearer_than_by_weights(room):
    """Few directions are read, and one layer hardly matters: both are seen from the calls."""
    g = rng(3)
    read = torch.randn(3, 24, generator=g)
    calls = [((torch.randn(32, 3, generator=g) @ read,), {}) for _ in range(5)]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = linear(24, 24).float(), linear(24, 24, seed=1).float()

        def forward(self, x):
            return self.a(x) + 0.01 * self.b(x)

    first = Two().requires_grad_(False)
    lost = {}
    for by in ("weights", "inputs", "answers"):
        net = copy.deepcopy(first)
        handle = Maestro(keep=0.2, of="parameters", by=by, least=4).attach(net)
        if by == "answers":
            handle.count(calls)
            handle.split(calls, room)
            handle.judge(calls)
            handle.extract(0.2)
        else:
            handle.observe(calls)
        kept = sum(p.numel() for n, p in net.named_parameters() if "bias" not in n)
        assert 0.15 * 2 * 576 < kept <= 0.2 * 2 * 576
        lost[by] = sum(float((net(*a) - first(*a)).square().sum().detach()) for a, _ in calls)
    assert lost["answers"] < 1e-3 * lost["inputs"]
    assert lost["inputs"] < lost["weights"]


def test_of_parameters_is_of_the_whole_network():
    """What is not split counts as well."""
    net = nn.Sequential(nn.Embedding(20, 24), linear(24, 24).float(), linear(24, 24).float())
    whole, again = parameters(net), copy.deepcopy(net)
    calls = [((torch.arange(20),), {})]
    Maestro(keep=0.6, of="parameters", least=4).attach(net).observe(calls)
    assert 0.6 * whole - 48 < parameters(net) <= 0.6 * whole
    with pytest.raises(ValueError, match="rank 1 everywhere"):
        Maestro(keep=0.3, of="parameters", least=4).attach(again).observe(calls)


def test_extract_counts_and_keeps_the_share():
    from effuse.evaluate.cost import CountMacs

    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Flatten(), nn.Linear(256, 32),
    )  # fmt: skip
    x = torch.randn(2, 8, 8, 8, generator=rng())
    with CountMacs() as before:
        net(x)
    handle = Maestro(keep=0.4, least=4).attach(net)
    handle.observe([((x,), {})])
    with CountMacs() as after:
        net(x)
    told = handle.report()
    assert after.macs == pytest.approx(told["macs"] * before.macs)
    assert 0.33 * before.macs < after.macs <= 0.4 * before.macs
    assert told["bytes"] < told["bytes_before"]


def test_factors_are_stored_as_their_layer_was(tmp_path):
    """In half precision where that holds the layer's weights, else as they are."""
    for halved in (True, False):
        pipe = tiny_sd()
        pipe.set_progress_bar_config(disable=True)
        if halved:
            pipe.unet.half().float()
        calls = list(calls_from_pipeline(pipe, 1, steps=1, batch=1))
        handle = Maestro(keep=0.6, of="parameters", least=8).attach(pipe.unet)
        handle.observe(calls)
        factors = [p for m in low_rank_layers(pipe.unet).values() for p in m.parameters()]
        assert all(torch.equal(p, p.half().float()) for p in factors) == halved
        store.save(pipe, tmp_path / str(halved), [("unet", handle)])
        size = next((tmp_path / str(halved) / "unet").glob("*.safetensors")).stat().st_size
        whole = sum(p.numel() for p in pipe.unet.parameters())
        assert (size < 2.5 * whole) == halved


def test_keeping_all_is_the_original():
    net = tiny_unet().eval()
    x, t = torch.randn(1, net.config.in_channels, 16, 16, generator=rng()), torch.tensor([3])
    before = net(x, t, return_dict=False)[0]
    handle = Maestro(keep=1.0, least=4).attach(net)
    split = net(x, t, return_dict=False)[0]
    assert not torch.equal(split, before)
    torch.testing.assert_close(split, before, rtol=1e-4, atol=1e-4)
    handle.observe([((x, t), {"return_dict": False})])
    assert not low_rank_layers(net)
    assert torch.equal(net(x, t, return_dict=False)[0], before)


def test_trained_layers_become_dense_with_what_they_learned():
    net = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(7, 6, generator=rng())
    handle = Maestro(keep=1.0, least=2).attach(net)
    with torch.no_grad():
        net[0].up.weight.mul_(1.5)
    after = net(x)
    handle.observe([((x,), {})])
    assert type(net[0]) is nn.Linear
    torch.testing.assert_close(net(x), after)


def test_a_layer_shrunk_away_answers_its_bias_when_cut():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    x = torch.randn(3, 6, generator=rng())
    handle = Maestro(keep=0.5, least=2).attach(net)
    net[0].kept = 0
    handle.count([((x,), {})])
    assert handle.extract(0.5)["0"] == 1
    assert torch.equal(net[0](x), net[0].bias.expand(3, -1))


def test_recalibrate_measures_the_size_as_it_is():
    norm = nn.BatchNorm2d(3)
    net = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    x = 4 + 2 * torch.randn(6, 3, 4, 4, generator=rng())
    assert recalibrate(net, [((half,), {}) for half in x.split(3)]) == 1
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    each = torch.stack([h.var((0, 2, 3)) for h in x.split(3)]).mean(0)
    torch.testing.assert_close(norm.running_var, each)
    assert norm.momentum == 0.1
    assert not any(m.training for m in net.modules())


def test_taken_up_again_gives_the_same(tmp_path):
    def run(folder, stops):
        net = nn.Sequential(factored(linear(4, 5).float()))
        goal = LossOverRanks(net, Numbers())
        optimizer = torch.optim.SGD(net.parameters(), 0.05)

        def batches(g):
            x = torch.randn(3, 5, generator=g)
            return {"call": ((x,), {}), "target": x[:, :4]}

        for steps in stops:
            fit(goal, batches, optimizer, steps=steps, rng=rng(), folder=folder, progress=False)
        return net, goal

    whole, _ = run(tmp_path / "a", (6,))
    parts, goal = run(tmp_path / "b", (3,))
    parts, goal = run(tmp_path / "b", (6,))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
    assert int(goal.state[0]) in range(1, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_smaller_and_loaded(tmp_path, dtype):
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(dtype)
    calls = list(calls_from_pipeline(pipe, 1, steps=1, batch=1)) if dtype == torch.float32 else []
    if not calls:
        x = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=rng()).to(dtype)
        text = torch.randn(1, 4, pipe.unet.config.cross_attention_dim, generator=rng()).to(dtype)
        calls = [((x, torch.tensor([9])), {"encoder_hidden_states": text, "return_dict": False})]
    args, kwargs = calls[0]
    handle = Maestro(keep=0.4, least=8).attach(pipe.unet)
    handle.observe(calls)
    expected = pipe.unet(*args, **kwargs)[0]
    assert expected.isfinite().all()
    store.save(pipe, tmp_path / "small", [("unet", handle)])
    again = store.load(tmp_path / "small")
    assert again.unet.dtype == dtype
    assert torch.equal(again.unet(*args, **kwargs)[0], expected)
    store.save(tiny_sd(), tmp_path / "large")
    sizes = [
        next((tmp_path / n / "unet").glob("*.safetensors")).stat().st_size
        for n in ("small", "large")
    ]
    assert sizes[0] < 0.75 * sizes[1]
    json.dumps(handle.plan())


def test_bad_input():
    with pytest.raises(TypeError, match="expected a linear or convolution"):
        factored(nn.ReLU())
    with pytest.raises(ValueError, match="one group"):
        empty_like(nn.Conv2d(4, 4, 3, groups=2), 2)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        factored(nn.Linear(4, 6), 5)
    broken = nn.Linear(3, 3)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        factored(broken)
    net = nn.Sequential(factored(nn.Linear(4, 4)))
    for wrong, told in (
        ({"1": 1}, "one of the low-rank"),
        ({"0": 0}, "1 to 4"),
        ({"0": 5}, "1 to"),
    ):
        with pytest.raises(ValueError, match=told), ranks(net, wrong):
            pass
    with pytest.raises(ValueError, match="no low-rank layer"):
        LossOverRanks(nn.Sequential(nn.Linear(2, 2)), Numbers())
    with pytest.raises(ValueError, match="`target`"):
        LossOverRanks(net, Numbers()).loss("student", {"call": ((torch.ones(1, 4),), {})})
    assert not Maestro().attach(nn.Sequential(nn.Linear(8, 8))).layers  # smaller than `least`
    with pytest.raises(ValueError, match="fraction"):
        Maestro(keep=1.2)
    with pytest.raises(ValueError, match="'answers', 'inputs', 'weights'"):
        Maestro(by="luck")
    with pytest.raises(ValueError, match="'macs', 'parameters'"):
        Maestro(of="bytes")
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    handle = Maestro(least=4).attach(tied)
    assert set(handle.layers) == {"2"}
    assert isinstance(tied[2], LowRankLinear)
    assert isinstance(tied[2], LowRank)
    with pytest.raises(ValueError, match="not counted"):
        handle.extract(0.5)
