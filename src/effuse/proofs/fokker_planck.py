"""The Fokker-Planck penalty against score matching alone: the gap between ODE and SDE, on the line.

Laws are computed, not sampled: the SDE's by its transition densities on a grid, the ODE's by moving
quantiles, so the distances have no Monte Carlo floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from effuse.core import Mixture, Process, fit
from effuse.evaluate.fokker_planck import (
    Box,
    ByVariance,
    FokkerPlanck,
    monitor,
    ode_sde_gap,
    with_fine_end,
)
from effuse.evaluate.residual import (
    Central,
    LogResidual,
    Potential,
    PotentialScore,
    Rademacher,
    ScoreResidual,
)
from effuse.processes import OrnsteinUhlenbeck, Uniform
from effuse.proofs import Claim, Evidence, Scale, proof
from effuse.solvers import DDIM, Ancestral, Heun

HORIZON, START = 3.0, 0.01 / 3.0
WEIGHTS = (0.0, 0.1, 1.0)
SIDE = 3.5


def modes() -> Mixture:
    """Return three modes at -1.5, 0, 1.5 of deviation 0.15, under the paper's process."""
    means = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    return Mixture(OrnsteinUhlenbeck(HORIZON), means, 0.15)


Score = Callable[[Tensor, Tensor], Tensor]


def _quantiles(line: Tensor, mass: Tensor, at: Tensor) -> Tensor:
    """Return the quantiles at `at`: (Q,) of cells at line: (N,) with mass: (N,)."""
    upper = mass.cumsum(0) / mass.sum()
    high = torch.searchsorted(upper, at).clamp_max(len(line) - 1)
    below = torch.where(high > 0, upper[high - 1], 0.0)
    part = (at - below) / (upper[high] - below).clamp_min(1e-300)
    return line[high] + (line[1] - line[0]) * (part.clamp(0, 1) - 0.5)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@torch.no_grad()
def laws(score: Score, process: Process, times: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return quantiles of where ODE and SDE end, both by Euler on `times`, from the prior.

    SDE: x + (g^2 s - f) h + g sqrt(h) z, the last step without noise; its density moves by the
    matrix of transitions. ODE: x + (g^2 s / 2 - f) h.
    """
    at = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    line = torch.linspace(-SIDE, SIDE, cells, dtype=torch.float64)
    spread = float(process.sigma(times[0]))
    x = spread * math.sqrt(2) * torch.erfinv(2 * at - 1)
    mass = (-line.square() / (2 * spread**2)).exp()
    mass = mass / mass.sum()

    def moved(y: Tensor, t: Tensor, h: Tensor, part: float) -> Tensor:
        s = score(y[:, None].float(), t.expand(len(y)).float()).double().squeeze(1)
        f = process.drift(y[:, None], t).squeeze(1)
        return y + h * (part * process.diffusion(t) ** 2 * s - f)

    last, kernel = len(times) - 2, line.new_empty(cells, cells)
    for k, (t, s) in enumerate(pairwise(times)):
        h = t - s
        x = moved(x, t, h, 0.5)
        center = moved(line, t, h, 1.0)
        if k == last:
            order = center.argsort()
            ends, weights = center[order], mass[order].cumsum(0)
            index = torch.searchsorted(weights / weights[-1], at).clamp_max(cells - 1)
            return x, ends[index]
        width = float(process.diffusion(t) * h.sqrt())
        kernel = torch.sub(line, center[:, None], out=kernel)
        kernel = kernel.square_().mul_(-1 / (2 * width**2)).exp_()
        mass = (mass / kernel.sum(1).clamp_min(1e-300)) @ kernel
    raise ValueError("no steps")


def _study(
    score: Score, truth: Tensor, process: Process, times: Tensor, cells: int
) -> dict[str, float]:
    ode, sde = laws(score, process, times, cells)
    return {
        "ode_sde": _distance(ode, sde),
        "ode_data": _distance(ode, truth),
        "sde_data": _distance(sde, truth),
    }


def _train(student: PotentialScore, weight: float, steps: int, seed: int, data: Mixture) -> float:
    objective = FokkerPlanck(
        student,
        weight,
        points=Box(SIDE, 512, 32),
        start=START,
        denoising=ByVariance(),
        equation=ByVariance(2),
    )
    rng = torch.Generator().manual_seed(seed)
    done = fit(
        objective,
        lambda g: {"x0": data.draw(1024, rng=g).float()},
        torch.optim.Adam(student.parameters(), 1e-3),
        steps=steps,
        rng=rng,
        schedule=lambda part: 0.01 + 0.99 * (1 + math.cos(math.pi * min(part, 1.0))) / 2,
        progress=False,
    )
    return done.seconds


def line(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """A: score matching, then the same steps again with and without the penalty."""
    data, process = modes(), OrnsteinUhlenbeck(HORIZON)
    steps, cells = scale.pick(30, 600, 1500), scale.pick(300, 700, 700)
    times = with_fine_end(Uniform(1.0, START)(process, scale.pick(60, 200, 400)), 10, 10)
    at = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    fine = torch.linspace(-SIDE, SIDE, 14_000, dtype=torch.float64)
    truth = _quantiles(fine, data.log_prob(fine[:, None], 0.0).exp(), at)
    exact = _study(lambda x, t: data.score(x.double(), t.double()), truth, process, times, cells)
    rows: list[dict[str, Any]] = [{"part": "line", "arm": "exact score", **exact}]
    found: dict[tuple[float, int], dict[str, float]] = {}
    for seed in scale.seeds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = Potential(1, 64, 3, clock=HORIZON)
        first = PotentialScore(net, process)
        lead = _train(first, 0.0, steps, seed, data)
        begun = {k: v.clone() for k, v in first.state_dict().items()}
        for weight in WEIGHTS:
            student = PotentialScore(Potential(1, 64, 3, clock=HORIZON), process)
            student.load_state_dict(begun)
            seconds = _train(student, weight, steps, 100 + seed, data)
            seen = monitor(
                LogResidual(),
                student,
                data.draw(1000, rng=torch.Generator().manual_seed(9)).float(),
                [t / HORIZON for t in (0.02, 0.1, 0.5, 1.5)],
                weight=ByVariance(2),
                rng=torch.Generator().manual_seed(seed),
            )
            on, off = (
                math.sqrt(sum(r[k] ** 2 for r in seen) / len(seen)) / HORIZON for k in ("on", "off")
            )
            result = _study(student.score, truth, process, times, cells)
            found[weight, seed] = {**result, "residual_on": on, "residual_off": off}
            rows.append(
                {
                    "part": "line",
                    "arm": f"w_R = {weight:g}",
                    "seed": seed,
                    "steps": 2 * steps,
                    "seconds": lead + seconds,
                    **found[weight, seed],
                }
            )

    def mean(weight: float, what: str) -> float:
        return _mean([found[weight, s][what] for s in scale.seeds])

    best = min(WEIGHTS[1:], key=lambda w: mean(w, "ode_sde"))

    def claim(text: str, weight: float, what: str, unit: str, factor: float = 1.0) -> Claim:
        pairs = [(found[0.0, s][what], found[weight, s][what]) for s in scale.seeds]
        return Claim(
            text,
            _mean([a for a, _ in pairs]),
            _mean([b for _, b in pairs]),
            unit,
            "lower",
            all(b < factor * a for a, b in pairs),
            "it does not fall so far on every seed",
        )

    w2 = "Wasserstein-2"
    claims = [
        claim("the gap of ODE and SDE falls at w_R = 0.1, equal steps", 0.1, "ode_sde", w2),
        claim("the gap of ODE and SDE falls at w_R = 1, equal steps", 1.0, "ode_sde", w2),
        claim(f"ODE samples come closer to the data at w_R = {best:g}", best, "ode_data", w2),
        claim("ODE samples do not get worse at w_R = 0.1", 0.1, "ode_data", w2, 1.0 + 1e-9),
        claim(
            "the residual off the data falls fivefold or more at w_R = 1",
            1.0,
            "residual_off",
            "RMS, times the variance",
            0.2,
        ),
    ]
    plain, ours = mean(0.0, "sde_data"), mean(best, "sde_data")
    claims.append(
        Claim(
            f"SDE samples come no closer to the data at w_R = {best:g}, as the paper's tables say",
            plain,
            ours,
            w2,
            "higher",
            ours >= plain,
            "they come closer",
        )
    )
    return claims, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pictures(scale: Scale) -> tuple[list[dict[str, Any]], str]:
    """B: what residual and gap say of house:pixels; a diagnosis, nothing is trained."""
    if scale.size == "smoke":
        return [], "The pipeline part runs from the small size on."
    try:
        from effuse.house import clip, load
        from effuse.house.data import pictures as real

        pipe, judge, every = load("pixels"), clip(), real()
    except (ImportError, FileNotFoundError, RuntimeError) as error:
        return [], f"No pipeline part, as weights or data are missing: {error}"
    from effuse.bridge.pipeline import wrap

    model = wrap(pipe)
    model.network.requires_grad_(False)
    images = torch.from_numpy(every.images[: scale.pick(1, 4, 8)]).float() / 255
    x0 = 2 * torch.nn.functional.avg_pool2d(images, 2) - 1
    rng = torch.Generator().manual_seed(0)
    count = len(model.process)
    levels = [(round(count * t) + 0.5) / count for t in (0.1, 0.3, 0.6)]  # between two entries
    residual = ScoreResidual(Rademacher(), Central(0.5 / count))
    seen = monitor(residual, model.bare, x0, levels, weight=ByVariance(3), rng=rng)
    rows: list[dict[str, Any]] = [{"part": "house:pixels", "weight": "sigma^3", **r} for r in seen]
    steps, rows_each = scale.pick(4, 10, 50), scale.pick(4, 16, 64)
    for name, ode in (("DDIM", DDIM()), ("Heun", Heun())):
        gap = ode_sde_gap(
            model.denoiser,
            ode,
            Ancestral(),
            model.grid(model.process, steps),
            rows_each,
            model.shape,
            features=lambda x: judge.image_features(model.codec.decode(x).clamp(0, 1)),
            batch=32,
            rng=torch.Generator().manual_seed(1),
        )
        rows.append(
            {
                "part": "house:pixels",
                "ode": name,
                "steps": steps,
                "samples": rows_each,
                "gap": gap.ode_sde,
                "floor": gap.floor,
                "unit": "sliced Wasserstein-2 of house:clip features",
            }
        )
    return rows, ""


@proof("fokker_planck")
def prove(scale: Scale) -> Evidence:
    """The penalty lowers residual and gap; what that does to each sampler is in the rows."""
    claims, rows = line(scale)
    more, note = pictures(scale)
    notes = (
        "Three modes on the line; the network is first trained by score matching alone, then every "
        "arm takes as many steps again. Score matching is weighted by the variance, the residual "
        "by its square: a fairly trained baseline. Times and residuals on the clock of the "
        f"process, from 0.01 to {HORIZON:g}. {note}"
    )
    return Evidence(claims, [*rows, *more], notes.strip())
