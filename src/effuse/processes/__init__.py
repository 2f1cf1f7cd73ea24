"""What spoils data, and at which levels to look at it: processes and time grids."""

from .flow import Flow
from .grids import (
    Beta,
    Grid,
    Karras,
    Leading,
    Levels,
    Linspace,
    Tapered,
    Trailing,
    Uniform,
    UniformLogSNR,
)
from .ornstein_uhlenbeck import OrnsteinUhlenbeck
from .sub_vp import SubVP
from .tabulated import Tabulated
from .ve import VE
from .vp import Cosine, Linear

__all__ = [
    "VE",
    "Beta",
    "Cosine",
    "Flow",
    "Grid",
    "Karras",
    "Leading",
    "Levels",
    "Linear",
    "Linspace",
    "OrnsteinUhlenbeck",
    "SubVP",
    "Tabulated",
    "Tapered",
    "Trailing",
    "Uniform",
    "UniformLogSNR",
]
