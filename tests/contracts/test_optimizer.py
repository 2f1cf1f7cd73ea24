"""Every optimizer: state in torch's format, exact resume, one formula on every path and dtype."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from effuse.optim import SGDP, AdamP, AdamR, DiffGrad, SGDSaI

MAKERS = {
    "sgd_sai": lambda p, **k: SGDSaI(p, lr=1e-2, **k),
    "adamp": lambda p, **k: AdamP(p, lr=1e-2, weight_decay=0.1, **k),
    "adamp-nesterov": lambda p, **k: AdamP(p, lr=1e-2, delta=5.0, nesterov=True, **k),
    "sgdp": lambda p, **k: SGDP(p, lr=1e-2, momentum=0.9, weight_decay=0.01, nesterov=True, **k),
    "diffgrad": lambda p, **k: DiffGrad(p, lr=1e-2, weight_decay=0.1, **k),
    "diffgrad-decoupled": lambda p, **k: DiffGrad(
        p, lr=1e-2, weight_decay=0.1, decoupled=True, **k
    ),
    "adam_r": lambda p, **k: AdamR(p, lr=1e-2, weight_decay=0.1, **k),
    "adam_r-l1": lambda p, **k: AdamR(p, lr=1e-2, weight_decay=0.1, penalty="l1", **k),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameters(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (6, 5), (4, 3, 3, 3), (7,), (), (1,))
    draws = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    return [torch.nn.Parameter(d.to(dtype)) for d in draws]


def walk(optimizer, params, steps, seed=1, sign=1.0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.grad = (sign * g).to(p.dtype)
        optimizer.step()


@every
def test_resume_is_exact_through_a_file(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, 4)
    file = io.BytesIO()
    torch.save([[p.data for p in params], optimizer.state_dict()], file)
    walk(optimizer, params, 3, seed=2)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(w) for w in weights]
    resumed = make(again)
    resumed.load_state_dict(state)
    walk(resumed, again, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_state_through_resume(make, dtype):
    params = parameters(dtype)
    optimizer = make(params)
    walk(optimizer, params, 3)
    assert all(p.dtype == dtype and p.isfinite().all() for p in params)
    again = copy.deepcopy(params)
    resumed = make(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = [v for s in resumed.state.values() for v in s.values() if torch.is_tensor(v)]
    assert all(v.dtype == torch.float32 for v in kept)
    walk(optimizer, params, 2, seed=2)
    walk(resumed, again, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@every
def test_half_precision_is_float32_rounded_each_step(make):
    low, full = parameters(torch.bfloat16), parameters(torch.bfloat16)
    full = [torch.nn.Parameter(p.data.float()) for p in full]
    a, b = make(low), make(full)
    for seed in range(3):
        walk(a, low, 1, seed)
        rng = torch.Generator().manual_seed(seed)
        for p in full:
            g = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.grad = g.bfloat16().float()
        b.step()
        for p in full:
            p.data.copy_(p.data.bfloat16().float())
    assert all(torch.equal(p.float(), q) for p, q in zip(low, full, strict=True))


@every
def test_one_at_a_time_is_the_same(make):
    together, single = parameters(), parameters()
    walk(make(together, foreach=True), together, 5)
    walk(make(single, foreach=False), single, 5)
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@every
def test_maximize_walks_against_the_gradient(make):
    up, down = parameters(), parameters()
    if "weight_decay" in make(up).param_groups[0]:
        walk(make(up, maximize=True), up, 4, sign=-1.0)
        walk(make(down), down, 4)
        assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@every
def test_complex_parameters_are_pairs_of_real_ones(make):
    rng = torch.Generator().manual_seed(0)
    pairs = torch.randn(4, 3, 2, generator=rng)
    z = torch.nn.Parameter(torch.view_as_complex(pairs.clone()))
    r = torch.nn.Parameter(pairs.clone())
    a, b = make([z]), make([r])
    for _ in range(3):
        g = torch.randn(4, 3, 2, generator=rng)
        z.grad, r.grad = torch.view_as_complex(g.clone()), g
        a.step()
        b.step()
    torch.testing.assert_close(torch.view_as_real(z.data), r.data)


@every
def test_zero_gradient_moves_nothing_and_freezes_nothing(make):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(optimizer, params, 3)
    assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every
def test_a_quadratic_is_solved(make):
    target = torch.tensor([1.0, -2.0, 0.5])
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = make([x])
    for group in optimizer.param_groups:
        group["weight_decay"], group["lr"] = 0, 0.05
    for _ in range(600):
        optimizer.zero_grad()
        (x - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(x.data, target, atol=2e-3, rtol=0)


@every
def test_closure_groups_schedules_and_refusals(make):
    params = parameters()
    calls = []
    optimizer = make([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}])
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-2]

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert len(calls) == 1
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="capturable"):
        make(params, capturable=True)
    table = torch.nn.Embedding(4, 3, sparse=True)
    sparse = make(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        sparse.step()


@every
def test_parameters_without_a_gradient_are_left_alone(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, 1)
    kept = params[0].detach().clone()
    state = {k: copy.deepcopy(v) for k, v in optimizer.state[params[0]].items()}
    params[0].grad = None
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(kept, params[0])
    for name, value in state.items():
        now = optimizer.state[params[0]][name]
        assert torch.equal(now, value) if torch.is_tensor(value) else now == value


@pytest.mark.parametrize("cls", [SGDSaI, AdamP, DiffGrad, AdamR])
@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}])
def test_options_out_of_range(cls, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        cls(parameters(), **bad)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_stacks_follow_what_happens_to_their_parameters(make, dtype):
    rng = torch.Generator().manual_seed(0)
    shapes = [(6, 5)] * 7 + [(5, 6)] * 2 + [(4, 3, 2)] * 3 + [(3,)] * 4
    first = [torch.randn(s, generator=rng, dtype=dtype) for s in shapes]
    sides = [[torch.nn.Parameter(x.clone()) for x in first] for _ in range(2)]
    optimizers = [make(p, foreach=f) for p, f in zip(sides, (None, False), strict=True)]

    def steps(count, absent=0.0):
        for _ in range(count):
            for one, other in zip(*sides, strict=True):
                g = torch.randn(one.shape, generator=rng, dtype=dtype)
                gone = float(torch.rand((), generator=rng)) < absent
                one.grad, other.grad = (None, None) if gone else (g, g.clone())
            for optimizer in optimizers:
                optimizer.step()
        for one, other in zip(*sides, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    steps(3)
    steps(4, absent=0.3)  # from here on the counts of steps differ
    steps(2)
    for i, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        name = next(iter(optimizer.kept))
        optimizer.state[sides[i][1]][name] = torch.zeros_like(sides[i][1])  # put in by hand
    steps(2)
    with torch.no_grad():
        for params in sides:
            params[0].mul_(2)
            params[1].data = params[1].data.t().contiguous().t()
    steps(2)
    for optimizer in optimizers:
        optimizer.add_param_group({"params": [torch.nn.Parameter(first[0].clone())]})
    sides = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    steps(2)


@every
def test_a_copy_steps_on_its_own(make):
    params = parameters() + parameters()
    optimizer = make(params)
    walk(optimizer, params, 3)
    (copied,), theirs = pickle.loads(pickle.dumps([[optimizer], params]))
    before = [p.detach().clone() for p in params]
    walk(copied, theirs, 2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    walk(optimizer, params, 2, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
