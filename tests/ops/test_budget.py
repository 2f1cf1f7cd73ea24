"""The knapsack against brute force, its budget, its ties and its floors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.ops import budget
from effuse.ops.budget import choices

items = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), min_size=1, max_size=11)


@settings(max_examples=40)
@given(items, st.integers(0, 200))
def test_exact_equals_brute_force(rows, capacity):
    values, costs = [float(v) for v, _ in rows], [float(c) for _, c in rows]
    mine = budget.exact(values, costs, capacity)
    best = budget.exhaustive(values, costs, capacity)
    assert sum(costs[i] for i in mine) <= capacity
    assert sum(values[i] for i in mine) == sum(values[i] for i in best)


@settings(max_examples=40)
@given(items, st.integers(0, 200), st.floats(0.5, 20))
def test_budget_holds_in_exact_costs_whatever_the_unit(rows, capacity, unit):
    values, costs = [float(v) for v, _ in rows], [float(c) for _, c in rows]
    for kept in (
        budget.exact(values, costs, capacity, unit=unit),
        budget.greedy(values, costs, capacity),
    ):
        assert sum(costs[i] for i in kept) <= capacity + 1e-6
        assert kept == sorted(set(kept))


@settings(max_examples=30)
@given(items)
def test_more_room_is_never_worse(rows):
    values, costs = [float(v) for v, _ in rows], [float(c) for _, c in rows]
    got = [sum(values[i] for i in budget.exact(values, costs, c)) for c in range(0, 120, 10)]
    assert got == sorted(got)


@settings(max_examples=40)
@given(items, st.integers(0, 200))
def test_greedy_reaches_half_of_the_optimum(rows, capacity):
    values, costs = [float(v) for v, _ in rows], [float(c) for _, c in rows]
    best = sum(values[i] for i in budget.exact(values, costs, capacity))
    assert sum(values[i] for i in budget.greedy(values, costs, capacity)) >= best / 2


def test_where_greedy_fails_exact_does_not():
    values, costs = [6.0, 5.0, 5.0], [6.0, 5.0, 5.0]
    values[0] += 0.1
    assert budget.greedy(values, costs, 10) == [0]
    assert budget.exact(values, costs, 10) == [1, 2]


@pytest.mark.parametrize("solve", [budget.exact, budget.greedy])
def test_ties_stay_with_the_lower_index(solve):
    assert solve([1.0] * 4, [2.0] * 4, 4.0) == [0, 1]


def test_an_item_worth_nothing_goes_first():
    assert budget.exact([0.0, 1.0, 1.0], [1.0, 5.0, 5.0], 10) == [1, 2]
    assert budget.greedy([0.0, 1.0, 1.0], [1.0, 5.0, 5.0], 10) == [1, 2]


def test_required_items_stay_and_count():
    assert budget.exact([0.1, 5.0, 4.0], [3.0, 3.0, 3.0], 6.0, required=[0]) == [0, 1]
    assert budget.greedy([0.1, 5.0, 4.0], [3.0, 3.0, 3.0], 6.0, required=[0]) == [0, 1]
    with pytest.raises(ValueError, match="must stay"):
        budget.exact([1.0, 1.0], [3.0, 3.0], 5.0, required=[0, 1])


def test_floors_take_the_best_of_each_kind():
    values, kinds = [1.0, 3.0, 2.0, 9.0], ["a", "a", "a", "b"]
    assert budget.floors(values, kinds, {"a": 0.5}) == [1, 2]
    assert budget.floors(values, kinds, {"a": 0.0}) == []
    with pytest.raises(ValueError, match="expected one of a, b"):
        budget.floors(values, kinds, {"c": 0.5})


def test_large_costs_are_solved_within_the_table():
    costs = [float(10_000_019 + 7 * i) for i in range(60)]
    values = [float(1 + i % 7) for i in range(60)]
    kept = budget.exact(values, costs, sum(costs) / 2)
    assert sum(costs[i] for i in kept) <= sum(costs) / 2
    assert len(kept) == 29 or len(kept) == 30


@pytest.mark.parametrize(
    ("values", "costs", "words"),
    [
        ([1.0, 2.0], [1.0], "expected one each"),
        ([float("nan")], [1.0], r"values\[0\]"),
        ([1.0], [-1.0], r"costs\[0\]"),
    ],
)
def test_bad_input_is_named(values, costs, words):
    with pytest.raises(ValueError, match=words):
        budget.exact(values, costs, 1.0)


def test_choices_are_the_best_of_all():
    rng = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 4, generator=rng).double().cumsum(1)
    errors[:, 0] = 0
    errors[1, 2] = float("inf")
    gains = [2, 0, 5]
    best, taken = choices(errors, gains)
    assert len(best) == 7 * 3 + 1
    everything = list(itertools.product(range(4), repeat=3))
    for g in range(len(best)):
        able = [n for n in everything if sum(k * c for k, c in zip(n, gains, strict=True)) >= g]
        want = min(sum(float(errors[i, k]) for i, k in enumerate(n)) for n in able)
        assert float(best[g]) == pytest.approx(want)
        mine = taken[:, g].tolist()
        assert sum(k * c for k, c in zip(mine, gains, strict=True)) >= g
        assert sum(float(errors[i, k]) for i, k in enumerate(mine)) == pytest.approx(want)
    assert bool((best.diff() >= 0).all())
    with pytest.raises(ValueError, match="whole numbers"):
        choices(errors, [1, 2, -1])
