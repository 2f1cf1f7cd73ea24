"""Wasserstein distances against closed forms."""

from __future__ import annotations

import pytest
import torch

from effuse.ops.transport import binned_wasserstein2, sliced_wasserstein2, wasserstein2


def test_of_a_shift_and_of_two_normals():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(1000, generator=rng, dtype=torch.float64)
    assert wasserstein2(a, a[torch.randperm(1000)] + 0.7) == pytest.approx(0.7)
    b = 2 * torch.randn(200_000, generator=rng, dtype=torch.float64) + 3
    a = torch.randn(100_000, generator=rng, dtype=torch.float64)
    assert wasserstein2(a, b) == pytest.approx((3**2 + 1) ** 0.5, rel=0.01)
    assert wasserstein2(b, a) == pytest.approx(wasserstein2(a, b), rel=1e-12)


def test_copies_of_each_row_change_nothing_to_speak_of():
    a, b = torch.rand(50).double(), torch.rand(50).double()
    assert wasserstein2(a.repeat(2), b.repeat(2)) == pytest.approx(wasserstein2(a, b))
    assert wasserstein2(a.repeat(40), a) < 0.02


def test_sliced_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    a = torch.randn(64, 3, 4, dtype=torch.float64)
    shift = torch.ones(3, 4, dtype=torch.float64)
    found = sliced_wasserstein2(a, a + shift, directions=20_000)
    assert found == pytest.approx((12 / 12) ** 0.5, rel=0.02)
    line = torch.randn(64, 1, dtype=torch.float64)
    assert sliced_wasserstein2(line, line + 0.3) == pytest.approx(0.3)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        wasserstein2(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        sliced_wasserstein2(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected one"):
        wasserstein2(torch.zeros(2, 3), torch.zeros(2, 3))


def test_binned_is_optimal_assignment_where_the_points_are_cell_centers():
    from scipy.optimize import linear_sum_assignment

    rng = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [7.0, 7.0]], dtype=torch.float64)
    a, b = (torch.randint(8, (30, 2), generator=rng).double() for _ in range(2))
    a, b = torch.cat([a, corners]), torch.cat([b, corners])
    cost = torch.cdist(a, b).square()
    i, j = linear_sum_assignment(cost.numpy())
    expected = cost[i, j].mean().sqrt() * 7 / 8  # eight cells over a box of side seven
    assert binned_wasserstein2(a, b, bins=8) == pytest.approx(float(expected), rel=1e-9)


def test_binned_of_a_shift_is_its_length_and_of_unequal_counts_a_mean():
    a = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[3.0, 0.0], [3.0, 1.0], [3.0, 0.0], [3.0, 1.0]])
    assert binned_wasserstein2(a, b, bins=300) == pytest.approx(3 * 299 / 300, abs=1e-6)
    assert binned_wasserstein2(a, a.flip(0)) == 0
    with pytest.raises(ValueError, match="occupied cells"):
        binned_wasserstein2(torch.rand(2000, 2), torch.rand(2000, 2), bins=100)
