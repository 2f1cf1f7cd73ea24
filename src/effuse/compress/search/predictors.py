"""What a point will measure, learnt from points that were measured: ridge and RBF-SVR.

Fitted on one-hot features x: (N, F) and labels y: (N,), all settings of a grid at once, judged by
cross-validation; the better model of the two is refitted on everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Fitted = Callable[[Tensor], Tensor]
"""(N, F) features to (N, S) predictions, one column a setting."""


def unit_of(y: Tensor) -> float:
    """Return 10^(floor(log10 max|y|) - 1), what labels are divided by; 1 where all are 0.

    75.3 gives 1, 0.42 gives 0.01.
    """
    top = float(y.abs().max()) if len(y) else 0.0
    return 10.0 ** (math.floor(math.log10(top)) - 1) if top > 0 else 1.0


@dataclass(frozen=True)
class Ridge:
    """Linear: min ||y - x w - b||^2 + alpha ||w||^2 for every alpha; b is not shrunk."""

    alphas: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(1, 101))

    def fit(self, x: Tensor, y: Tensor) -> Fitted:
        """Return the predictions of all alphas, by one singular value decomposition."""
        mean, offset = x.mean(0), y.mean()
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        alpha = torch.tensor(self.alphas, dtype=x.dtype)
        shrunk = torch.where(s[:, None] > 1e-12, s[:, None] / (s[:, None] ** 2 + alpha), 0.0)
        w = vh.mT @ (shrunk * (u.mT @ (y - offset))[:, None])
        return lambda new: (new - mean) @ w + offset

    def only(self, index: int) -> Ridge:
        """Return it with one alpha of the grid."""
        return Ridge((self.alphas[index],))


@dataclass(frozen=True)
class SVR:
    """Kernel: f(x) = sum_i b_i exp(-||x - x_i||^2 / F) + b0 with least absolute error.

    The dual without a tube (epsilon 0): min 1/2 b'Kb - y'b, sum b = 0, |b| <= C, solved for every C
    at once by alternating directions: one factorization, then products.
    """

    costs: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    iterations: int = 400

    def fit(self, x: Tensor, y: Tensor) -> Fitted:
        """Return the predictions of all C."""
        n, rho = len(x), 1.0
        k = self._kernel(x, x)
        box = torch.tensor(self.costs, dtype=x.dtype)[None]
        system = x.new_ones(n + 1, n + 1)
        system[:n, :n] = k + rho * torch.eye(n, dtype=x.dtype)
        system[n, n] = 0
        inverse = torch.linalg.inv(system)
        z = x.new_zeros(n, len(self.costs))
        u, b0 = torch.zeros_like(z), x.new_zeros(len(self.costs))
        for _ in range(self.iterations):
            solved = inverse[:, :n] @ (y[:, None] + rho * (z - u))
            b, b0 = solved[:n], solved[n]
            z = (b + u).clamp(-box, box)
            u = u + b - z
        return lambda new: self._kernel(new, x) @ z + b0

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        apart = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.mT
        return torch.exp(-apart.clamp_min(0) / a.shape[1])

    def only(self, index: int) -> SVR:
        """Return it with one C of the grid."""
        return SVR((self.costs[index],), self.iterations)


def error(predicted: Tensor, y: Tensor) -> Tensor:
    """Return the relative error, mean |p - y| / |y|, over the first axis.

    Where some label is under a hundredth of the largest, that says nothing: root mean square then.
    """
    y = y.view(-1, *[1] * (predicted.ndim - 1))
    if float(y.abs().min()) < 0.01 * float(y.abs().max()):
        return (predicted - y).square().mean(0).sqrt()
    return ((predicted - y) / y).abs().mean(0)


@dataclass(frozen=True)
class Predictor:
    """The better of several models, each with the setting that cross-validation likes best."""

    models: tuple[Ridge | SVR, ...] = (Ridge(), SVR())
    folds: int = 5

    def fit(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Return f: (N, F) -> (N,), fitted on all of x: (N, F), y: (N,) float64."""
        offset = float(y.mean()) if len(y) else 0.0
        if len(y) < 3 or float(y.max() - y.min()) <= 1e-12 * max(abs(offset), 1e-300):
            warnings.warn(
                f"{len(y)} labels around {offset:.4g} teach nothing: predicting their mean",
                stacklevel=2,
            )
            return lambda new: torch.full((len(new),), offset, dtype=torch.float64)
        unit = unit_of(y)
        y = y / unit
        folds = min(self.folds, len(y))
        which = torch.arange(len(y)) % folds
        best: tuple[float, Ridge | SVR] | None = None
        for model in self.models:
            out: Tensor | None = None
            for f in range(folds):
                held = model.fit(x[which != f], y[which != f])(x[which == f])
                out = held.new_zeros(len(y), held.shape[1]) if out is None else out
                out[which == f] = held
            assert out is not None
            scores = error(out, y)
            at = int(scores.argmin())
            if best is None or float(scores[at]) < best[0]:
                best = float(scores[at]), model.only(at)
        assert best is not None
        fitted = best[1].fit(x, y)
        return lambda new: fitted(new)[:, 0] * unit


def agreement(
    predicted: Sequence[float] | Tensor, true: Sequence[float] | Tensor
) -> dict[str, float]:
    """Return how good predictions are: mape, rmse, kendall, spearman."""
    from scipy.stats import kendalltau, spearmanr

    p = torch.as_tensor(predicted, dtype=torch.float64)
    y = torch.as_tensor(true, dtype=torch.float64)
    return {
        "mape": float(((p - y) / y).abs().mean()),
        "rmse": float((p - y).square().mean().sqrt()),
        "kendall": float(kendalltau(p, y).statistic),
        "spearman": float(spearmanr(p, y).statistic),
    }
