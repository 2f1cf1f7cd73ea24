"""Bootstrap intervals."""

from __future__ import annotations

import math

import pytest
import torch

from effuse.ops.stats import bootstrap, paired


def test_covers_the_mean_about_as_often_as_it_says():
    rng = torch.Generator().manual_seed(0)
    hits = 0
    for k in range(200):
        low, high = bootstrap(torch.randn(60, generator=rng), draws=300, seed=k)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_width_of_the_mean_is_that_of_the_normal():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap(x)
    assert abs((high - low) / (2 * 1.96 * float(x.std()) / math.sqrt(4000)) - 1) < 0.06


def test_statistic_constant_and_few():
    assert bootstrap(torch.full((9,), 2.0)) == (2.0, 2.0)
    assert bootstrap(torch.arange(9.0), lambda v: v.max())[1] == 8.0
    assert all(map(math.isnan, bootstrap(torch.ones(1))))
    assert bootstrap(torch.arange(9.0)) == bootstrap(torch.arange(9.0))
    with pytest.raises(ValueError, match="level=2"):
        bootstrap(torch.ones(3), level=2)


def test_paired_cancels_what_is_common():
    common = 100 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    mean, (low, high) = paired(common + 1, common)
    assert abs(mean - 1) < 1e-3
    assert abs(low - 1) < 1e-3
    assert abs(high - 1) < 1e-3
