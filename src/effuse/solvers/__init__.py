"""Solvers: walk from noise to data."""

from .ancestral import Ancestral
from .ddim import DDIM
from .dpmpp import DPMpp2M, DPMpp2MSDE
from .euler import Euler
from .heun import Heun

__all__ = ["DDIM", "Ancestral", "DPMpp2M", "DPMpp2MSDE", "Euler", "Heun"]
