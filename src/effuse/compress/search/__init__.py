"""Search for sub-networks or recipes: a space, what is measured of a point, and a tactic."""

from .base import (
    Budget,
    Found,
    Gene,
    Journal,
    Local,
    RandomSearch,
    Ray,
    SearchSpace,
    Study,
    Tactic,
    Trial,
    search,
)

__all__ = [
    "Budget",
    "Found",
    "Gene",
    "Journal",
    "Local",
    "RandomSearch",
    "Ray",
    "SearchSpace",
    "Study",
    "Tactic",
    "Trial",
    "search",
]
