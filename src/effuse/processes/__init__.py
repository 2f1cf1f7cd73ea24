"""What spoils data, and at which levels to look at it: processes and time grids."""

from .flow import Flow
from .grids import (
    Above,
    Beta,
    Grid,
    Karras,
    Leading,
    Levels,
    Linspace,
    Power,
    Tapered,
    Trailing,
    Uniform,
    UniformLogSNR,
)
from .mean_reverting import CosineRate, MeanReverting, Rising, Steady, Toward
from .ornstein_uhlenbeck import OrnsteinUhlenbeck
from .sub_vp import SubVP
from .tabulated import Tabulated
from .ve import VE
from .vp import Cosine, Linear

__all__ = [
    "VE",
    "Above",
    "Beta",
    "Cosine",
    "CosineRate",
    "Flow",
    "Grid",
    "Karras",
    "Leading",
    "Levels",
    "Linear",
    "Linspace",
    "MeanReverting",
    "OrnsteinUhlenbeck",
    "Power",
    "Rising",
    "Steady",
    "SubVP",
    "Tabulated",
    "Tapered",
    "Toward",
    "Trailing",
    "Uniform",
    "UniformLogSNR",
]
