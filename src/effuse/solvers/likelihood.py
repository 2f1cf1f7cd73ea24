"""Likelihood and latent codes by the probability-flow ODE, integrated to a tolerance.

In y = (x - shift) / rho over the angle phi = atan2(sigma, alpha), rho^2 = alpha^2 + sigma^2, it is
dy / dphi = cos(phi) noise - sin(phi) x0: finite from clean data to pure noise for every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effuse.core.contracts import Denoiser, Process
from effuse.core.errors import check_fraction, check_positive
from effuse.ops.tensors import require_finite
from effuse.ops.trace import divergence, rademacher_like
from effuse.processes import Tabulated

START = 1e-5
"""The level taken for clean data where the process is no table: scores are infinite at zero."""
MOST = 64
"""Values of a row up to which the exact divergence is taken without being asked for."""


@dataclass(frozen=True)
class Solved:
    """x: (B, *) at the last level; log_change: (B,) growth of log density, or None; calls."""

    x: Tensor
    log_change: Tensor | None
    calls: int


@dataclass(frozen=True)
class Likelihood:
    """nats: (B,) log density of each row; bits: (B,) bits a value; latents: (B, *); calls."""

    nats: Tensor
    bits: Tensor
    latents: Tensor
    calls: int


def clean_level(process: Process) -> float:
    """Return the cleanest level a network was trained at, 1e-5 where no table says so."""
    return 1 / len(process) if isinstance(process, Tabulated) else START


def solve(
    denoiser: Denoiser,
    x: Tensor,
    start: float,
    end: float,
    *,
    probe: Tensor | None = None,
    density: bool = False,
    rtol: float = 1e-7,
    atol: float = 1e-7,
    on_call: Callable[[], None] | None = None,
) -> Solved:
    """Integrate the probability-flow ODE from level `start` to `end`, up or down.

    Runge-Kutta of order 5(4) with the steps the tolerance asks for; rows share the steps, so they
    agree with rows taken alone to the tolerance.

    Args:
        denoiser: conditions bound.
        x: (B, *) float32 or float64; the integration itself is float64.
        start: level of x, in [0, 1].
        end: the level to go to.
        probe: (B, *) or (P, B, *) signs for Hutchinson's divergence; exact without.
        density: whether to follow the log density too.
        rtol: relative tolerance; 1e-5 is the paper's, 1e-3 does for a network's samples.
        atol: absolute tolerance.
        on_call: called at every call of the denoiser.

    Raises:
        ValueError: half precision, or a level outside [0, 1].
        FloatingPointError: a prediction that is not finite, or an integration that gave up.
    """
    from scipy.integrate import solve_ivp

    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: expected float32 or float64, half is too coarse")
    check_positive("rtol", rtol)
    check_positive("atol", atol)
    for name, end_point in (("start", start), ("end", end)):
        check_fraction(name, end_point, zero=True)
    process, shape, calls = denoiser.process, x.shape, 0
    ends = {_angle(process, t): t for t in (start, end)}
    size = x.numel()

    def level(phi: float) -> float:
        if phi in ends:
            return ends[phi]
        return float(process.time_at(-2 * math.log(math.tan(phi))))

    def rate(phi: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if on_call is not None:
            on_call()
        t = level(phi)
        alpha, sigma, shift = (c.to(x.device) for c in process.coefficients(t))
        rho = math.hypot(float(alpha), float(sigma))
        y = torch.from_numpy(flat[:size]).reshape(shape).to(x.device)

        def flow(y: Tensor) -> Tensor:
            pair = denoiser((rho * y + shift).to(x.dtype), t)
            return math.cos(phi) * pair.noise.to(y.dtype) - math.sin(phi) * pair.x0.to(y.dtype)

        if density:
            out, grown = divergence(flow, y, None if probe is None else probe.to(y))
        else:
            with torch.no_grad():
                out, grown = flow(y), None
        require_finite(out, f"the ODE at level {t:.4g}")
        parts = [out.cpu().double().reshape(-1)]
        parts += [] if grown is None else [grown.cpu().double()]
        return torch.cat(parts).numpy()

    low, high = _angle(process, start), _angle(process, end)
    y = ((x.double() - _shift(process, start)) / _rho(process, start)).cpu().reshape(-1)
    first = torch.cat([y, y.new_zeros(len(x) if density else 0)]).numpy()
    done = solve_ivp(rate, (low, high), first, "RK45", rtol=rtol, atol=atol)
    if not done.success:
        raise FloatingPointError(f"the integrator gave up: {done.message}")
    last = torch.from_numpy(done.y[:, -1])
    x = (last[:size].reshape(shape) * _rho(process, end) + _shift(process, end)).to(x)
    return Solved(x, last[size:] if density else None, calls)


def _angle(process: Process, t: float) -> float:
    alpha, sigma, _ = process.coefficients(t)
    return math.atan2(float(sigma), float(alpha))


def _rho(process: Process, t: float) -> float:
    alpha, sigma, _ = process.coefficients(t)
    return math.hypot(float(alpha), float(sigma))


def _shift(process: Process, t: float) -> Tensor:
    return process.coefficients(t)[2].double()


def encode(denoiser: Denoiser, x: Tensor, *, start: float | None = None, **how: Any) -> Tensor:
    """Return the latent code, (B, *) at pure noise, that the ODE takes x: (B, *) to."""
    start = clean_level(denoiser.process) if start is None else start
    return solve(denoiser, x, start, 1.0, **how).x


def decode(denoiser: Denoiser, latents: Tensor, *, end: float | None = None, **how: Any) -> Tensor:
    """Return the sample, (B, *), of latent codes: (B, *); the inverse of `encode`."""
    end = clean_level(denoiser.process) if end is None else end
    return solve(denoiser, latents, 1.0, end, **how).x


def interpolate(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return the codes `weight` of the way from a to b: (B, *) along the sphere they lie near."""
    check_fraction("weight", weight, zero=True)
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos().unsqueeze(1)
    whole = angle.sin()
    straight = whole < 1e-6
    safe = torch.where(straight, 1.0, whole)
    left = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / safe)
    right = torch.where(straight, weight, (weight * angle).sin() / safe)
    return (left * flat_a + right * flat_b).reshape(a.shape).to(a)


Prior = Callable[[Denoiser, Tensor], Tensor]
"""Log density, (B,), at t = 1 of x: (B, *)."""


def normal_prior(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Return log N(x; shift, sigma^2) at t = 1, as (B,): what is left of the data is neglected."""
    process = denoiser.process
    z = (x.double() - _shift(process, 1.0)).flatten(1)
    sigma = float(process.coefficients(1.0)[1])
    norm = z.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    return -0.5 * (z / sigma).square().sum(1) - norm


def model_prior(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Return the log density at t = 1 that the model's own score there implies, as (B,).

    log p(x) = log p(shift) + the integral of the score along the line from there; the law is nearly
    normal, log p(shift) = -(D log(2 pi sigma^2) + D + sigma^2 (div s + |s|^2)) / 2 with the score s
    at shift, to alpha^4. Exact divergence, so for few values a row.
    """
    process, dtype = denoiser.process, torch.float64
    sigma = float(process.coefficients(1.0)[1])
    off = x.to(dtype) - _shift(process, 1.0)
    center = torch.zeros_like(off) + _shift(process, 1.0)  # a row each: conditions may differ

    def score(at: Tensor) -> Tensor:
        return process.score(1.0, denoiser(at.to(x.dtype), 1.0)).to(dtype)

    middle, div = divergence(score, center)
    size = x[0].numel()
    bend = div + middle.flatten(1).square().sum(1)
    peak = -0.5 * (size * math.log(2 * math.pi * sigma**2) + size + sigma**2 * bend)
    points, weights = np.polynomial.legendre.leggauss(4)
    line = torch.zeros_like(bend)
    with torch.no_grad():
        for p, w in zip(points.tolist(), weights.tolist(), strict=True):
            line += w / 2 * (score(center + (p + 1) / 2 * off) * off).flatten(1).sum(1)
    return peak + line


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    levels: int = 256,
    probes: int | None = None,
    rng: torch.Generator | None = None,
    start: float | None = None,
    prior: Prior | None = None,
    **how: Any,
) -> Likelihood:
    """Return the log density of data under a model, through its probability-flow ODE.

    log p(x) = log p(z) at t = 1, where the ODE takes x, + the integral of the divergence there;
    bits = -log p / (D ln 2) + log2(levels / (high - low)): of values dequantized by uniform noise,
    see `dequantize`, which are a density in units of data_range.

    Args:
        denoiser: conditions bound; networks in float32 or better.
        x: (B, *) float32 or float64, D values a row.
        data_range: ends of the pixel scale in units of x: (-1, 1) adds 7 bits, (0, 1) adds 8.
        levels: of the pixels.
        probes: signs for Hutchinson's divergence, unbiased; 0 is exact, a backward pass a value.
            Left out: exact up to 64 values a row, one probe above.
        rng: draws the probes.
        start: level taken for clean data; that of the first table entry, or 1e-5.
        prior: log density at t = 1. Left out: `model_prior` where the divergence is exact, which
            takes in what is left of the data there; else `normal_prior`, as is usual.
        **how: rtol, atol, on_call of `solve`.

    Raises:
        ValueError: half precision, or a range that is none.
    """
    low, high = data_range
    if not low < high:
        raise ValueError(f"data_range={data_range!r}: expected (low, high) with low < high")
    coarse = [p.dtype for p in denoiser.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    if coarse:
        raise ValueError(
            f"a network in {coarse[0]}: expected float32 for likelihoods, .to(float32)"
        )
    size = x[0].numel()
    probes = (0 if size <= MOST else 1) if probes is None else probes
    probe = None
    if probes:
        probe = torch.stack([rademacher_like(x, rng) for _ in range(probes)])
    process = denoiser.process
    start = clean_level(process) if start is None else start
    done = solve(denoiser, x, start, 1.0, probe=probe, density=True, **how)
    assert done.log_change is not None
    law = prior or (normal_prior if probes else model_prior)
    base = law(denoiser, done.x).cpu()
    # a density of x, not of y: rho is its scale at either end
    scale = size * (math.log(_rho(process, 1.0)) - math.log(_rho(process, start)))
    nats = base + done.log_change + scale
    bits = -nats / (size * math.log(2)) + math.log2(levels / (high - low))
    return Likelihood(nats, bits, done.x, done.calls)


def dequantize(
    pictures: Tensor, *, levels: int = 256, rng: torch.Generator | None = None
) -> Tensor:
    """Return pictures in [0, 1] on `levels` even levels with uniform noise of a level's width.

    (255 x + u) / 256 for 256 levels: a density whose integral over a level is its probability.
    """
    steps = (pictures.double() * (levels - 1)).round()
    noise = torch.rand(pictures.shape, generator=rng, dtype=torch.float64).to(pictures.device)
    return ((steps + noise) / levels).to(pictures.dtype)
