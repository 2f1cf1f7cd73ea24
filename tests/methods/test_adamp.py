"""AdamP and SGDP: the bases where nothing is projected, the projection, which weights fire."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from effuse.optim import SGDP, AdamP
from effuse.optim.adamp import project

SHAPES = ((6, 5), (4, 3, 3, 3), (7,))


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    draws = [torch.randn(s, generator=rng, dtype=torch.float64) for s in SHAPES]
    return [torch.nn.Parameter(d) for d in draws]


def both(a, b, one, two, steps=5, tangential=False):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, q in zip(one, two, strict=True):
            g = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
    for p, q in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_delta_zero_is_adamw():
    one, two = weights(), weights()
    kwargs = {"lr": 1e-2, "weight_decay": 0.1}
    both(AdamP(one, delta=0, **kwargs), torch.optim.AdamW(two, **kwargs), one, two)


@pytest.mark.parametrize("nesterov", [False, True])
def test_delta_zero_is_sgd(nesterov):
    one, two = weights(), weights()
    kwargs = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov}
    both(SGDP(one, delta=0, **kwargs), torch.optim.SGD(two, **kwargs), one, two)


def plain(p, g, state, *, lr, betas, eps, wd, delta, ratio, nesterov, t):
    """The published step of one tensor, written down from the paper's algorithm."""
    b1, b2 = betas
    state["m"] = b1 * state["m"] + (1 - b1) * g
    state["v"] = b2 * state["v"] + (1 - b2) * g * g
    above = b1 * state["m"] + (1 - b1) * g if nesterov else state["m"]
    u = above / (state["v"].sqrt() / math.sqrt(1 - b2**t) + eps)
    r = 1.0
    if p.ndim > 1:
        for shape in ((p.shape[0], -1), (1, -1)):
            pv, gv, uv = p.reshape(shape), g.reshape(shape), u.reshape(shape)
            cos = F.cosine_similarity(gv, pv, dim=1, eps=eps).abs()
            if cos.max() < delta / math.sqrt(pv.shape[1]):
                n = pv / (pv.norm(dim=1, keepdim=True) + eps)
                u, r = (uv - n * (n * uv).sum(1, keepdim=True)).reshape(p.shape), ratio
                break
    return p * (1 - lr * wd * r) - lr / (1 - b1**t) * u


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("delta", [0.1, 0.5, 2.0])
def test_is_the_published_step(nesterov, delta):
    ours = weights()
    theirs = [p.detach().clone() for p in ours]
    states = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in theirs]
    optimizer = AdamP(ours, lr=0.1, weight_decay=0.2, delta=delta, nesterov=nesterov)
    rng = torch.Generator().manual_seed(2)
    fired = set()
    for t in range(1, 7):
        for i, p in enumerate(ours):
            g = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            if t % 3 == 0 and p.ndim > 1:  # orthogonal to the whole, or to each row
                w = theirs[i].flatten() if t == 3 else theirs[i].flatten(1)
                f = g.reshape(w.shape)
                g = f - w * (f * w).sum(-1, keepdim=True) / w.square().sum(-1, keepdim=True)
            p.grad = g.reshape(p.shape).clone()
        theirs = [
            plain(q, p.grad, s, lr=0.1, betas=(0.9, 0.999), eps=1e-8, wd=0.2, delta=delta,
                  ratio=0.1, nesterov=nesterov, t=t)
            for p, q, s in zip(ours, theirs, states, strict=True)
        ]  # fmt: skip
        optimizer.step()
        fired |= {name for name, count in optimizer.fired().items() if count}
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.data, q, rtol=1e-9, atol=1e-10)
    assert {"channel", "layer"} <= fired


def test_always_projected_steps_add_up_by_pythagoras():
    w = torch.nn.Parameter(weights()[0].data)
    optimizer = SGDP([w], lr=0.3, momentum=0, delta=math.inf, eps=0)
    w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(3), dtype=w.dtype)
    before, g = w.detach().clone(), w.grad.clone()
    optimizer.step()
    u = before / before.norm(dim=1, keepdim=True)
    p = g - u * (u * g).sum(1, keepdim=True)
    assert (p * before).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(
        w.data.square().sum(1), before.square().sum(1) + 0.09 * p.square().sum(1)
    )
    assert optimizer.fired() == {"channel": 1, "layer": 0, "none": 0}


def test_projection_is_idempotent_and_leaves_the_rest_alone():
    rng = torch.Generator().manual_seed(0)
    w, g, p = (torch.randn(4, 9, generator=rng, dtype=torch.float64) for _ in range(3))
    once = p.clone()
    kwargs = {"delta": math.inf, "wd_ratio": 0.1, "eps": 0.0}
    ratios, fired = project([once], [w], [g], **kwargs)
    assert (ratios, fired) == ([0.1], ["channel"])
    twice = once.clone()
    project([twice], [w], [g], **kwargs)
    torch.testing.assert_close(once, twice)
    same = p.clone()
    assert project([same], [w], [w], delta=0.1, wd_ratio=0.1, eps=1e-8) == ([1.0], [""])
    assert torch.equal(same, p)


@pytest.mark.parametrize(("norm", "view"), [("batch", "channel"), ("layer", "layer"), ("", "none")])
def test_what_a_normalization_follows_fires(norm, view):
    rng = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(16, 64, generator=rng, dtype=torch.float64))
    y = torch.randn(128, 16, generator=rng, dtype=torch.float64)
    h = torch.randn(128, 64, generator=rng, dtype=torch.float64) @ w.T
    h = F.batch_norm(h, None, None, training=True) if norm == "batch" else h
    h = F.layer_norm(h, (16,)) if norm == "layer" else h
    (h - y).square().mean().backward()
    optimizer = AdamP([w])
    optimizer.step()
    assert optimizer.fired()[view] == 1


def test_a_group_can_force_its_view():
    found = {}
    for view in ("channel", "layer", "off"):
        w = torch.nn.Parameter(torch.ones(3, 4))
        w.grad = torch.arange(12.0).reshape(3, 4)
        optimizer = SGDP([{"params": [w], "projection": view}], lr=1.0)
        optimizer.step()
        found[view] = 1 - w.data
    g = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close(found["channel"], g - g.mean(1, keepdim=True))
    torch.testing.assert_close(found["layer"], g - g.mean())
    torch.testing.assert_close(found["off"], g)
    with pytest.raises(ValueError, match="projection"):
        AdamP([{"params": [w], "projection": "rows"}])


def test_weight_decay_of_projected_and_of_free():
    w = torch.nn.Parameter(torch.ones(2, 4, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    SGDP([w], lr=0.1, momentum=0.9, weight_decay=0.01).step()
    torch.testing.assert_close(w.data, torch.full_like(w, 1 - 0.1 * 0.01 * 0.1 / 0.1))
    free = torch.nn.Parameter(torch.ones(2, 4, dtype=torch.float64))
    free.grad = torch.zeros_like(free)
    SGDP([{"params": [free], "projection": "off"}], lr=0.1, momentum=0.9, weight_decay=0.01).step()
    torch.testing.assert_close(free.data, torch.full_like(free, 1 - 0.1 * 0.01 / 0.1))


@pytest.mark.slow
def test_norms_grow_by_the_law():
    ends = {}
    for name in ("sgd", "sgdm", "sgdp"):
        rng = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(1, 50, generator=rng, dtype=torch.float64))
        w.data /= w.data.norm()
        mu = 0.0 if name == "sgd" else 0.9
        optimizer = SGDP([w], lr=0.02, momentum=mu, delta=0.1 if name == "sgdp" else 0.0)
        for _ in range(3000):
            n, c = w.data.norm(), torch.randn(1, 50, generator=rng, dtype=torch.float64)
            u = w.data / n
            w.grad = (c - u * (u * c).sum()) / n
            optimizer.step()
        ends[name] = float(w.data.norm()) ** 4
    assert ends["sgdm"] / ends["sgdp"] == pytest.approx(19, rel=0.2)
    assert ends["sgdp"] / ends["sgd"] == pytest.approx(1 / (1 - 0.81), rel=0.2)
