"""Grids in closed form: error bounds, fixed points, exact levels, bit packing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effuse.ops.grid import (
    Grid,
    PerChannel,
    PerGroup,
    PerTensor,
    Stochastic,
    pack,
    quantize_rows,
    unpack,
)

GRIDS = [
    Grid(bits, symmetric, granularity, whole)
    for bits, symmetric, granularity, whole in itertools.product(
        (2, 3, 4, 8), (True, False), (PerTensor(), PerChannel(), PerGroup(4)), (False, True)
    )
] + [Grid(1, False)]


def weights(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None, None]
    return (torch.randn(6, 4, 2, generator=rng, dtype=torch.float64) * scale + 0.1).to(dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_entry_moves_by_more_than_half_a_step(grid, seed):
    w = weights(seed)
    scale, zero = grid.fit(w)
    q = grid.quantize(w, scale, zero)
    assert q.dtype == grid.dtype
    assert q.shape == w.shape
    assert grid.low <= int(q.min())
    assert int(q.max()) <= grid.high
    moved = grid.granularity.rows((grid.dequantize(q, scale, zero) - w).abs())
    assert (moved <= scale / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_lies_on_the_grid_stays_exactly(grid):
    w = weights()
    scale, zero = grid.fit(w)
    scale = 2.0 ** scale.log2().round()  # so that products are exact
    zero = zero.round()
    q = grid.quantize(w, scale, zero)
    on = grid.dequantize(q, scale, zero)
    assert torch.equal(grid.quantize(on, scale, zero), q)
    assert torch.equal(grid.dequantize(grid.quantize(on, scale, zero), scale, zero), on)


def test_all_levels_of_a_symmetric_grid_are_reached():
    grid = Grid(4, granularity=PerTensor())
    levels = torch.arange(-7, 8).double() * 0.25
    scale, zero = grid.fit(levels)
    assert float(scale) == 0.25
    assert torch.equal(grid.quantize(levels, scale, zero), torch.arange(-7, 8, dtype=torch.int8))
    assert torch.equal(grid.round_trip(levels), levels)


def test_extremes_are_levels_of_an_asymmetric_grid():
    w = torch.tensor([[-0.3, 0.1, 1.9]], dtype=torch.float64)
    torch.testing.assert_close(Grid(2, False).round_trip(w)[0, [0, 2]], w[0, [0, 2]])
    assert torch.equal(
        Grid(8, False, whole_zero=True).round_trip(torch.zeros(1, 3)), torch.zeros(1, 3)
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("value", [0.0, -1.25, 3.0])
def test_constant_rows_are_exact(grid, value):
    w = torch.full((2, 8), value, dtype=torch.float64)
    torch.testing.assert_close(grid.round_trip(w), w, rtol=1e-14, atol=0)


def test_finer_granularity_has_finer_steps():
    w = weights()
    steps = [
        Grid(4, granularity=g).fit(w)[0].repeat_interleave(w.numel() // r)
        for g, r in ((PerTensor(), 1), (PerChannel(), 6), (PerGroup(4), 12), (PerGroup(2), 24))
    ]
    for coarse, fine in itertools.pairwise(steps):
        assert (fine <= coarse).all()
        assert (fine < coarse).any()


def test_permuting_channels_permutes_the_result():
    w, order = weights(), torch.tensor([3, 1, 5, 0, 2, 4])
    grid = Grid(4)
    assert torch.equal(grid.round_trip(w[order]), grid.round_trip(w)[order])
    assert torch.equal(grid.round_trip(4 * w), 4 * grid.round_trip(w))


def test_stochastic_rounding_keeps_the_mean():
    grid, n = Grid(4, granularity=PerTensor()), 200_000
    w = torch.cat([torch.full((n,), 0.3), torch.tensor([7.0])]).double()
    scale, zero = grid.fit(w)
    q = grid.quantize(w, scale, zero, Stochastic(torch.Generator().manual_seed(0)))
    assert set(q[:n].tolist()) == {0, 1}
    assert abs(float(q[:n].double().mean()) - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


def test_rows_of_activations(rng):
    x = torch.randn(5, 7, generator=rng) * torch.tensor([1e-6, 1, 1e4, 3, 0])[:, None]
    rows = quantize_rows(x)
    moved = (rows.q * rows.scale - x).abs()
    assert (moved <= rows.scale / 2 * (1 + 1e-5)).all()
    assert torch.equal(rows.q[4], torch.zeros(7, dtype=torch.int8))
    assert (rows.q.abs().amax(1)[:4] == 127).all()
    # a row knows nothing of its batch
    assert torch.equal(quantize_rows(x[1:2]).q, rows.q[1:2])


@given(
    bits=st.integers(1, 8), signed=st.booleans(), count=st.integers(0, 40), seed=st.integers(0, 99)
)
def test_packing_is_exact_and_tight(bits, signed, count, seed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    rng = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if signed else torch.uint8
    q = torch.randint(low, high, (count,), generator=rng).to(dtype)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, (count,), dtype), q)


def test_packing_order_is_lowest_bit_first():
    q = torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
    assert pack(q, 2).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([-1, 1], dtype=torch.int8), 4).tolist() == [0b0001_1111]


def test_bad_input():
    with pytest.raises(ValueError, match=r"bits=1: expected 2 to 8"):
        Grid(1)
    with pytest.raises(ValueError, match=r"bits=9: expected 1 to 8"):
        Grid(9, symmetric=False)
    with pytest.raises(ValueError, match="groups of 3 do not fit into the 8 entries"):
        Grid(4, granularity=PerGroup(3)).fit(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="size=0"):
        PerGroup(0)
    with pytest.raises(FloatingPointError, match="NaN"):
        Grid().fit(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="do not fit into 2 bits: expected -2 to 1"):
        pack(torch.tensor([3], dtype=torch.int8), 2)
    with pytest.raises(ValueError, match="2 bytes: expected 1 for 2 numbers of 4 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, (2,), torch.uint8)
