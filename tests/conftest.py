"""Settings that every test runs under: no network, few threads, the same examples each time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

settings.register_profile("effuse", deadline=None, derandomize=True, database=None)
settings.load_profile("effuse")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
