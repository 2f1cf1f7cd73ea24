"""Where a multistep solver is stable: the root condition on y' = lambda y, z = h lambda.

A solver in y = x / alpha over r = sigma / alpha with equal steps h is the recurrence
rho(q) y = z sigma(q) y in the shift q; its answer decays if every root of rho - z sigma lies within
the unit circle.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .ddim import DDIM
from .euler import Euler
from .momentum import HeavyBall, Momentum, Nesterov
from .multistep import weights
from .plms import PLMS

Linear = PLMS | Momentum | HeavyBall | Euler | DDIM


def recurrence(solver: Linear) -> tuple[np.ndarray, np.ndarray]:
    """Return the polynomials (rho, sigma), highest power first, of equal length.

    Raises:
        TypeError: the solver is not linear with constant coefficients in r: `DPMpp2M`, `UniPC`.
    """
    if isinstance(solver, HeavyBall):
        if not isinstance(solver.base, PLMS):
            raise TypeError(f"{solver!r}: expected a base of PLMS, whose steps are even in r")
        c, beta = np.array(weights(solver.base.order)), solver.beta
        ahead = np.array([2 - beta, beta - 1]) if isinstance(solver, Nesterov) else np.array([1.0])
        front = beta * np.convolve(c, ahead)
    elif isinstance(solver, Momentum):
        beta = solver.damping
        front = np.array(weights(int(solver.order), beta))
    elif isinstance(solver, PLMS):
        front, beta = np.array(weights(solver.order)), 1.0
    elif isinstance(solver, Euler) or (isinstance(solver, DDIM) and solver.eta == 0):
        front, beta = np.array([1.0]), 1.0
    else:
        raise TypeError(f"{solver!r}: expected PLMS, Momentum, HeavyBall, Nesterov, Euler or DDIM")
    rho = np.convolve([1.0, -1.0], [1.0, beta - 1.0])  # (q - 1)(q - (1 - beta))
    size = max(len(rho), len(front) + 1)
    return np.pad(rho, (0, size - len(rho))), np.pad(front, (1, size - len(front) - 1))


def growth(solver: Linear, z: Tensor) -> Tensor:
    """Return the largest root's modulus, the factor a step, at z: any shape, real or complex."""
    rho, sigma = recurrence(solver)
    points = z.detach().to("cpu", torch.complex128).numpy()
    p = rho - points.reshape(-1, 1) * sigma  # (Z, degree + 1), leading coefficient one
    size = p.shape[1] - 1
    companion = np.zeros((len(p), size, size), dtype=complex)
    companion[:, 0] = -p[:, 1:]
    companion[:, range(1, size), range(size - 1)] = 1
    found = np.abs(np.linalg.eigvals(companion)).max(-1)
    return torch.from_numpy(found.reshape(points.shape))


def stable(solver: Linear, z: Tensor) -> Tensor:
    """Return where |every root| <= 1 at z, as bool of its shape: the (complex) stability region."""
    return growth(solver, z) <= 1 + 1e-9


def real_interval(solver: Linear) -> float:
    """Return I: stable for -I < z < 0. HB on PLMS-k: I_k (2 - beta) / beta, I = 2 1 6/11 3/10."""
    low, high = 0.0, 1e-3
    while bool(stable(solver, torch.tensor(-high))):
        low, high = high, high * 1.02
        if high > 1e9:
            return float("inf")
    for _ in range(60):
        middle = (low + high) / 2
        inside = bool(stable(solver, torch.tensor(-middle, dtype=torch.float64)))
        low, high = (middle, high) if inside else (low, middle)
    return (low + high) / 2
