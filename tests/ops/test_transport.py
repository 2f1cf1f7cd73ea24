"""Wasserstein distances against closed forms."""

from __future__ import annotations

import pytest
import torch

from effuse.ops.transport import sliced_wasserstein2, wasserstein2


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
