from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.ops import pareto


def points(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_ranks_by_hand():
    y = points([[1, 2], [2, 1], [2, 2], [3, 3], [1, 2], [0, 9]])
    assert pareto.ranks(y).tolist() == [0, 0, 1, 2, 0, 0]
    assert pareto.front(y).tolist() == [True, True, False, False, True, True]


def test_a_broken_limit_comes_before_objectives():
    y = points([[0, 0], [1, 1], [2, 2]])
    assert pareto.ranks(y, torch.tensor([2.0, 0.0, 1.0])).tolist() == [2, 0, 1]


def test_crowding_by_hand():
    y = points([[0, 4], [1, 2], [3, 1], [4, 0]])
    room = pareto.crowding(y)
    assert math.isinf(room[0])
    assert math.isinf(room[3])
    assert room[1].item() == pytest.approx(3 / 4 + 3 / 4)
    assert room[2].item() == pytest.approx(3 / 4 + 2 / 4)


def test_hypervolume_by_hand():
    assert pareto.hypervolume(points([[1, 2], [2, 1]]), (3, 3)) == 3
    assert pareto.hypervolume(points([[1, 2], [2, 1], [2, 2], [4, 0]]), (3, 3)) == 3
    assert pareto.hypervolume(points([[1], [2]]), (3,)) == 2
    assert pareto.hypervolume(points([[1, 1, 1]]), (2, 3, 4)) == 6
    assert pareto.hypervolume(points([[0, 0, 1], [1, 1, 0]]), (2, 2, 2)) == 4 + 1
    with pytest.raises(ValueError, match="M of 1, 2 or 3"):
        pareto.hypervolume(torch.zeros(1, 4), (1, 1, 1, 1))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_hypervolume_counts_cells(rows):
    """On a grid of whole numbers the volume is the number of dominated unit cells."""
    y = points(rows)
    cells = torch.cartesian_prod(*[torch.arange(5.0, dtype=torch.float64)] * 3)
    covered = (y[None] <= cells[:, None]).all(2).any(1).sum()
    assert pareto.hypervolume(y, (5, 5, 5)) == pytest.approx(float(covered))
    assert pareto.hypervolume(y[pareto.front(y)], (5, 5, 5)) == pytest.approx(float(covered))


@settings(deadline=None, derandomize=True, max_examples=10)
@given(st.integers(0, 1000))
def test_the_fast_front_is_the_plain_one(seed):
    y = torch.randint(0, 30, (600, 2), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(pareto.front(y), ~pareto.dominates(y).any(0))


def test_volume_never_falls():
    y = torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = pareto.reached(y, (1.0, 1.0))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(found))
    assert found[-1] == pytest.approx(pareto.hypervolume(y, (1.0, 1.0)))
