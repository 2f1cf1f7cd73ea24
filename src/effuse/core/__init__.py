"""The eight contracts, the two loops, the cards and the errors."""

from .contracts import (
    Applied,
    Call,
    Denoiser,
    Given,
    Loss,
    Metric,
    Objective,
    Operator,
    Prediction,
    Process,
    Solver,
    Step,
    Time,
    Transform,
    Where,
    everywhere,
)
from .errors import MissingExtra, RecipeError, StoreError, Unsuited
from .exact import Empirical, Gaussian, LowRankMixture, Mixture
from .method import Card, method, methods
from .sampling import sample
from .training import fit

__all__ = [
    "Applied",
    "Call",
    "Card",
    "Denoiser",
    "Empirical",
    "Gaussian",
    "Given",
    "Loss",
    "LowRankMixture",
    "Metric",
    "MissingExtra",
    "Mixture",
    "Objective",
    "Operator",
    "Prediction",
    "Process",
    "RecipeError",
    "Solver",
    "Step",
    "StoreError",
    "Time",
    "Transform",
    "Unsuited",
    "Where",
    "everywhere",
    "fit",
    "method",
    "methods",
    "sample",
]
