"""Divergence, exact and by probes."""

from __future__ import annotations

import pytest
import torch

from effuse.ops.trace import divergence, rademacher_like


def test_exact_divergence_of_a_linear_and_of_a_bent_field():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    out, div = divergence(lambda x: x @ a.T, x)
    assert torch.equal(out, x @ a.T)
    assert torch.allclose(div, torch.full((5,), 5.0, dtype=torch.float64))
    _, div = divergence(lambda x: x.pow(3), x)
    assert torch.allclose(div, 3 * x.square().sum(1))


def test_one_sign_probe_is_exact_for_a_diagonal_and_unbiased_otherwise():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    _, div = divergence(torch.sin, x, rademacher_like(x, rng))
    assert torch.allclose(div, x.cos().flatten(1).sum(1))
    a = torch.randn(2, 2, generator=rng, dtype=torch.float64)
    x = torch.zeros(1, 2, dtype=torch.float64)
    probes = torch.stack([rademacher_like(x, rng) for _ in range(4000)])
    assert probes.unique().tolist() == [-1, 1]
    _, div = divergence(lambda x: x @ a.T, x, probes)
    assert abs(float(div) - float(a.trace())) < 0.1


def test_a_constant_field_has_none_and_the_graph_is_kept_on_request():
    x = torch.randn(3, 2)
    assert torch.equal(divergence(lambda x: torch.ones(3, 2), x)[1], torch.zeros(3))
    w = torch.tensor(2.0, requires_grad=True)
    _, div = divergence(lambda x: w * x, x, create_graph=True)
    div.sum().backward()
    assert float(w.grad) == 6.0
    assert not divergence(lambda x: w * x, x)[1].requires_grad


def test_refuses_what_does_not_fit():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"probe of shape \(3, 3\)"):
        divergence(lambda x: x, x, torch.ones(3, 3))
    with pytest.raises(ValueError, match="expected the same"):
        divergence(lambda x: x.sum(1), x)
