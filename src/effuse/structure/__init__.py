"""Structure in data and in what denoisers learned of it: subspaces, ranks, directions."""

from .clustering import (
    Clustering,
    min_samples,
    principal,
    random_bases,
    random_start,
    recovery_error,
    spectral_start,
    subspace_cluster,
)
from .jacobian import Spectrum, directions, jacobian, jacobian_spectrum, numerical_rank
from .subspace import Hard, LowRankAutoencoder, Soft, Subspaces, flat, snr
from .sweep import PCA, Cells, KSubspaces, Learner, Trained, transition

__all__ = [
    "PCA",
    "Cells",
    "Clustering",
    "Hard",
    "KSubspaces",
    "Learner",
    "LowRankAutoencoder",
    "Soft",
    "Spectrum",
    "Subspaces",
    "Trained",
    "directions",
    "flat",
    "jacobian",
    "jacobian_spectrum",
    "min_samples",
    "numerical_rank",
    "principal",
    "random_bases",
    "random_start",
    "recovery_error",
    "snr",
    "spectral_start",
    "subspace_cluster",
    "transition",
]
