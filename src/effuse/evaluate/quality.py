"""How good pictures are: distances between laws, text and picture, and pairs, with intervals.

Distances between laws take features, (B, D); see `features`. None of them is "FID": that name
belongs to one network, which is not here. Every value has a confidence interval that holds the
reference fixed: it says how far the value would move with other samples of the same pipeline. Only
that of recall, which is a fraction of the reference, holds the samples fixed instead.

    Frechet   |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))         law against law, 0 is equal
    Kid       unbiased squared MMD, k(x, y) = (x.y / D + 1)^3    likewise, small samples too
    Precision, Recall    k-nearest-neighbor manifolds            fidelity, coverage
    TextImage, Retrieval            cosine of picture and text; right text found first
    Psnr, Ssim, FeatureDistance     the same noise through two pipelines
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core.contracts import Metric
from effuse.core.errors import check_positive
from effuse.evaluate.features import ClipFeatures, EfficientNetFeatures, Features
from effuse.ops.stats import bootstrap

__all__ = [
    "ClipFeatures",
    "EfficientNetFeatures",
    "FeatureDistance",
    "Features",
    "Frechet",
    "Kid",
    "Precision",
    "Psnr",
    "Recall",
    "Retrieval",
    "Ssim",
    "TextImage",
    "frechet",
    "moments",
    "root",
    "ssim",
    "wilson",
]


def _features(x: Tensor, what: str, width: int | None = None) -> Tensor:
    """Return features (N, D) as float64, or complain."""
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        want = "D" if width is None else str(width)
        raise ValueError(f"{what} of shape {tuple(x.shape)}: expected (N, {want})")
    if not torch.isfinite(x).all():
        raise ValueError(f"{what}: {int((~torch.isfinite(x)).sum())} values are not finite")
    return x.detach().double()


class _Rows(Metric):
    """Keeps what it is given, row by row."""

    least = 1

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        """Return the number of samples."""
        return sum(len(r) for r in self._rows)

    @property
    def rows(self) -> Tensor:
        """All that was taken in, (N, *)."""
        if len(self) < self.least:
            raise ValueError(
                f"{len(self)} samples: {type(self).__name__} needs {self.least} or more, "
                "call update before compute"
            )
        return torch.cat(self._rows)


class _Mean(_Rows):
    """The mean of one number a sample, with a bootstrap interval."""

    def compute(self) -> float:
        """Return the mean."""
        return float(self.rows.mean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile bootstrap interval of the mean; see `ops.stats.bootstrap`."""
        return bootstrap(self.rows, level=level)


class _Law(_Rows):
    """Compares the law of features with that of a reference given once, reference: (M, D)."""

    least = 2

    def __init__(self, reference: Tensor):
        self.reference = _features(reference, "reference")
        if len(self.reference) < 2:
            raise ValueError(f"{len(self.reference)} reference rows: expected two or more")
        super().__init__()

    def update(self, samples: Tensor, reference: object = None) -> None:
        """Take in features of samples: (B, D)."""
        if reference is not None:
            raise ValueError("the reference is given once, to the constructor")
        self._rows.append(_features(samples, "samples", self.reference.shape[1]))

    def _normal(self, value: float, influence: Tensor, level: float) -> tuple[float, float]:
        """Return the interval of a statistic from its influence at each sample: (N,)."""
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a fraction in (0, 1)")
        half = NormalDist().inv_cdf((1 + level) / 2)
        error = float(influence.std() / math.sqrt(len(influence)))
        return value - half * error, value + half * error


def root(matrix: Tensor, power: float = 0.5) -> Tensor:
    """Return a power of a symmetric positive semi-definite matrix: (D, D), by eigenvalues.

    Eigenvalues below D times the rounding error of the largest count as zero, and stay zero under
    a negative power (the pseudo-inverse).
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    zero = values <= values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    scaled = torch.where(zero, 0.0, values.clamp_min(torch.finfo(values.dtype).tiny) ** power)
    return (vectors * scaled) @ vectors.mT


def frechet(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians, in float64.

    |mu - mu'|^2 + tr S + tr S' - 2 tr (S^(1/2) S' S^(1/2))^(1/2)

    Args:
        mean: (D,) of the one.
        cov: (D, D) its covariance.
        other_mean: (D,) of the other.
        other_cov: (D, D) its covariance.

    The last trace is taken from the eigenvalues of a symmetric matrix, so singular covariances are
    nothing special; rounding below zero is cut. Source: Dowson & Landau 1982.
    """
    mean, cov, other_mean, other_cov = (a.double() for a in (mean, cov, other_mean, other_cov))
    half = root(cov)
    middle = half @ other_cov @ half
    cross = torch.linalg.eigvalsh((middle + middle.mT) / 2).clamp_min(0).sqrt().sum()
    gap = (mean - other_mean).square().sum()
    return max(float(gap + cov.trace() + other_cov.trace() - 2 * cross), 0.0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features: (N, D), in float64."""
    x = features.double()
    return x.mean(0), torch.cov(x.mT).reshape(x.shape[1], x.shape[1])


class Frechet(_Law):
    """Squared Fréchet distance between Gaussians fitted to features, exact in float64.

    Biased upwards by about D / N: compare values only at equal N, against `floor`.

    The interval is value +- z std(influence) / sqrt(N); at sample x, with d = x - mu and the
    optimal map T = S^(-1/2) (S^(1/2) S' S^(1/2))^(1/2) S^(-1/2) from samples to reference, the
    influence is 2 d.(mu - mu') + d.(I - T) d - tr((I - T) S).

    Args:
        reference: (M, D) features of real pictures.
        components: keep so many principal components of the reference, fitted on it alone; None
            keeps all. With fewer samples than D the fitted covariance is singular: use this.
    """

    name, unit, better = "frechet", "squared feature distance", "lower"

    def __init__(self, reference: Tensor, components: int | None = None):
        super().__init__(reference)
        self.basis = torch.eye(self.reference.shape[1], dtype=torch.float64)
        most = min(self.reference.shape[1], len(self.reference) - 1)
        if components is not None:
            if not 1 <= components <= most:
                raise ValueError(f"components={components}: expected 1 to {most}")
            centered = self.reference - self.reference.mean(0)
            self.basis = torch.linalg.eigh(centered.mT @ centered).eigenvectors[:, -components:]
        self.basis = self.basis.to(self.reference.device)
        self._real = moments(self.reference @ self.basis)

    def compute(self) -> float:
        """Return the distance."""
        return frechet(*moments(self.rows @ self.basis), *self._real)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval by influence, cut at zero."""
        x = self.rows @ self.basis
        (mean, cov), (real_mean, real_cov) = moments(x), self._real
        half, back = root(cov), root(cov, -0.5)
        pull = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
        pull = pull - back @ root(half @ real_cov @ half) @ back
        d = x - mean
        influence = 2 * d @ (mean - real_mean) + ((d @ pull) * d).sum(1)
        low, high = self._normal(self.compute(), influence, level)
        return max(low, 0.0), high

    def floor(self, size: int, seed: int = 0) -> float:
        """Return what `size` real pictures would score: drawn from the reference, against the rest.

        Raises:
            ValueError: the reference is too small to be split.
        """
        if not 2 <= size <= len(self.reference) - 2:
            raise ValueError(f"size={size}: expected 2 to {len(self.reference) - 2}")
        order = torch.randperm(
            len(self.reference), generator=torch.Generator().manual_seed(seed)
        ).to(self.reference.device)
        x = self.reference[order] @ self.basis
        return frechet(*moments(x[:size]), *moments(x[size:]))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT / a.shape[1] + 1) ** 3


class Kid(_Law):
    """Unbiased squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Unbiased at any N, so it may be below zero when laws are equal. Over all pairs at once, not
    over subsets. The interval is value +- z std(influence) / sqrt(N), with the influence
    2 (mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j)). Source: Binkowski et al. 2018.

    Args:
        reference: (M, D) features of real pictures.
    """

    name, unit, better = "kid", "squared kernel distance", "lower"

    def compute(self) -> float:
        """Return the discrepancy."""
        x, y = self.rows, self.reference
        own, real = (_off_diagonal(_kernel(a, a)).mean() for a in (x, y))
        return float(own + real - 2 * _kernel(x, y).mean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval by influence; it may reach below zero."""
        x, y = self.rows, self.reference
        influence = 2 * (_off_diagonal(_kernel(x, x)) - _kernel(x, y).mean(1))
        return self._normal(self.compute(), influence, level)


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the mean of each row of matrix: (N, N) without its diagonal, (N,)."""
    return (matrix.sum(1) - matrix.diagonal()) / (len(matrix) - 1)


def _radii(x: Tensor, neighbors: int) -> Tensor:
    """Return the distance of each row of x: (N, D) to its k-th nearest other row, (N,)."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.kthvalue(neighbors + 1, dim=1).values


def _covered(points: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    """Return for each of points: (N, D) whether a ball holds it, (N,) as 0 or 1."""
    distance = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance <= radii).any(1).double()


class _Manifold(_Law):
    """One manifold's share within the other; balls reach to the k-th nearest neighbor."""

    def __init__(self, reference: Tensor, neighbors: int = 3):
        check_positive("neighbors", neighbors)
        super().__init__(reference)
        self.neighbors, self.least = neighbors, neighbors + 1
        if len(self.reference) <= neighbors:
            raise ValueError(
                f"{len(self.reference)} reference rows: expected more than neighbors={neighbors}"
            )

    def inside(self) -> Tensor:
        """Return 0 or 1 a row."""
        raise NotImplementedError

    def compute(self) -> float:
        """Return the fraction that lies inside."""
        return float(self.inside().mean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval of the fraction: the balls stay, what lies in them is drawn."""
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: expected a fraction in (0, 1)")
        inside = self.inside()
        return wilson(float(inside.mean()), len(inside), level)


def wilson(fraction: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a fraction seen in `count` trials; never empty at 0 or 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    spread = fraction * (1 - fraction) / count + z * z / (4 * count * count)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


class Precision(_Manifold):
    """Fraction of samples inside the real manifold: how many look real.

    Source: Kynkäänniemi et al. 2019.

    Args:
        reference: (M, D) features of real pictures.
        neighbors: k of the nearest-neighbor balls.
    """

    name, unit, better = "precision", "fraction", "higher"
    _reach: Tensor | None = None

    def inside(self) -> Tensor:
        """Return 1 for each sample inside the real manifold, (N,)."""
        if self._reach is None:
            self._reach = _radii(self.reference, self.neighbors)
        return _covered(self.rows, self.reference, self._reach)


class Recall(_Manifold):
    """Fraction of real pictures inside the manifold of the samples: how much is covered.

    Grows with the number of samples: compare at equal N. Source: Kynkäänniemi et al. 2019.

    Args:
        reference: (M, D) features of real pictures.
        neighbors: k of the nearest-neighbor balls.
    """

    name, unit, better = "recall", "fraction", "higher"

    def inside(self) -> Tensor:
        """Return 1 for each real picture inside the samples' manifold, (M,)."""
        return _covered(self.reference, self.rows, _radii(self.rows, self.neighbors))


class TextImage(_Mean):
    """Mean cosine between each picture and its own text, in the space of one CLIP model."""

    name, unit, better = "text_image", "cosine", "higher"

    def update(self, samples: Tensor, reference: Tensor | None = None) -> None:
        """Take in picture vectors: (B, D), with text vectors: (B, D) as `reference`."""
        self._rows.append(F.cosine_similarity(*_pair(samples, reference), dim=1))


class Retrieval(_Mean):
    """Fraction of pictures whose own text is the nearest of all candidates.

    Args:
        candidates: (C, D) vectors of all texts.
        groups: (C,) integers; a text of the right group counts as right. By default each its own.
    """

    name, unit, better = "retrieval", "fraction", "higher"

    def __init__(self, candidates: Tensor, groups: Tensor | None = None):
        self.candidates = F.normalize(_features(candidates, "candidates"), dim=1)
        self.groups = torch.arange(len(candidates)) if groups is None else torch.as_tensor(groups)
        if len(self.groups) != len(self.candidates):
            raise ValueError(
                f"{len(self.groups)} groups for {len(self.candidates)} candidates: expected as many"
            )
        super().__init__()

    def update(self, samples: Tensor, reference: Tensor | None = None) -> None:
        """Take in picture vectors: (B, D), with the index of the right text: (B,)."""
        if reference is None or reference.shape != samples.shape[:1]:
            raise ValueError("expected the index of each picture's own text, (B,)")
        vectors = _features(samples, "samples", self.candidates.shape[1])
        found = (vectors @ self.candidates.mT).argmax(1).to(self.groups.device)
        own = reference.to(self.groups.device)
        self._rows.append((self.groups[found] == self.groups[own]).double())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval."""
        return wilson(self.compute(), len(self), level)


def _pair(samples: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    if reference is None or samples.shape != reference.shape:
        got = None if reference is None else tuple(reference.shape)
        raise ValueError(
            f"samples of shape {tuple(samples.shape)} beside {got}: expected pairs of one shape"
        )
    return samples.detach().double(), reference.detach().double()


class Psnr(_Rows):
    """Peak signal-to-noise ratio of pairs: -10 log10 of the mean squared error over all pairs.

    Infinite where all pairs are equal. The interval is the bootstrap interval of the mean squared
    error, carried through the logarithm.
    """

    name, unit, better = "psnr", "dB", "higher"

    def update(self, samples: Tensor, reference: Tensor | None = None) -> None:
        """Take in pictures: (B, C, H, W) in [0, 1], with their partners as `reference`."""
        a, b = _pair(samples, reference)
        self._rows.append((a - b).square().flatten(1).mean(1))

    def compute(self) -> float:
        """Return the ratio in decibel."""
        return _decibel(float(self.rows.mean()))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the bootstrap interval in decibel."""
        low, high = bootstrap(self.rows, level=level)
        return _decibel(high), _decibel(low)


def _decibel(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)


class Ssim(_Mean):
    """Mean structural similarity of pairs, Gaussian window of sigma 1.5 over 11 x 11 pixels.

    (2 m m' + c1)(2 v_ab + c2) / ((m^2 + m'^2 + c1)(v_a + v_b + c2)), c1 = 0.01^2, c2 = 0.03^2,
    over whole windows and channels, for pictures in [0, 1]. Source: Wang et al. 2004.
    """

    name, unit, better = "ssim", "index", "higher"

    def update(self, samples: Tensor, reference: Tensor | None = None) -> None:
        """Take in pictures: (B, C, H, W) in [0, 1], H, W >= 11, with their partners."""
        self._rows.append(ssim(*_pair(samples, reference)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (B,) of pictures a, b: (B, C, H, W) in [0, 1]."""
    if a.ndim != 4 or min(a.shape[-2:]) < 11:
        raise ValueError(f"pictures of shape {tuple(a.shape)}: expected (B, C, H, W), H, W >= 11")
    at = torch.arange(-5, 6, dtype=a.dtype, device=a.device)
    line = torch.exp(-at.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        x = x.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(x, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))

    mean_a, mean_b = blur(a), blur(b)
    cross, square = mean_a * mean_b, mean_a.square() + mean_b.square()
    shared, own = blur(a * b) - cross, blur(a * a) + blur(b * b) - square
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * cross + c1) * (2 * shared + c2) / ((square + c1) * (own + c2))
    return index.reshape(len(a), -1).mean(1)


class FeatureDistance(_Mean):
    """Mean of 1 - cosine between the features of pairs: how differently a network sees them."""

    name, unit, better = "feature_distance", "1 - cosine", "lower"

    def update(self, samples: Tensor, reference: Tensor | None = None) -> None:
        """Take in features: (B, D), with those of their partners as `reference`."""
        a, b = (F.normalize(x, dim=1) for x in _pair(samples, reference))
        self._rows.append((a - b).square().sum(1) / 2)
