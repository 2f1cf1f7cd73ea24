"""Predictor and corrector at equal calls, the ODE's calls, and likelihoods against exact ones."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core import Denoiser, Mixture, Prediction, Solver, Time, fit, sample
from effuse.core.training import warmup_cosine
from effuse.distill.score_matching import ScoreMatching
from effuse.ops.stats import bootstrap
from effuse.ops.transport import sliced_wasserstein2
from effuse.processes import Linear, Uniform
from effuse.solvers import DDIM
from effuse.solvers.langevin import Langevin
from effuse.solvers.likelihood import log_likelihood, solve
from effuse.solvers.score_sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion

from . import Claim, Evidence, Scale, proof

SNR = (0.05, 0.1, 0.16, 0.25)


class Bent(Denoiser):
    """A denoiser with a smooth error: noise + size sin(3 x), as a network's would be."""

    def __init__(self, base: Denoiser, size: float):
        super().__init__()
        self.base, self.size, self.process = base, size, base.process

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict, a little wrong."""
        noise = self.base(x, t).noise + self.size * (3 * x).sin()
        return self.process.complete(x, t, noise=noise)


class Learned(Denoiser):
    """Three layers of 128 that are told x, alpha, sigma and log snr, and answer the noise."""

    def __init__(self, width: int = 2, hidden: int = 128):
        super().__init__()
        self.process = Linear()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = [width + 3, hidden, hidden, hidden]
            layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
            self.net = nn.Sequential(*layers, nn.Linear(hidden, width))

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict from x: (B, width)."""
        alpha, sigma, _ = self.process.coefficients(t)
        told = [alpha, sigma, 0.1 * self.process.logsnr(t)]
        level = torch.stack([c.to(x).expand(len(x)) for c in told], 1)
        noise = self.net(torch.cat([x, level], 1))
        return self.process.complete(x, t, noise=noise)


def ring(planes: int = 8) -> Mixture:
    """Return eight modes of deviation 0.1 on a circle of radius one, repeated in each plane."""
    angle = torch.arange(8) * math.tau / 8
    plane = torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(Linear(), plane.repeat(1, planes), 0.1)


@torch.enable_grad()
def learned(exact: Mixture, steps: int) -> Learned:
    """Return a network trained on draws of the mixture, in one plane."""
    student = Learned()
    fit(
        ScoreMatching(student),
        lambda rng: {"x0": exact.draw(512, rng=rng).float()},
        torch.optim.Adam(student.parameters(), 2e-3),
        steps=steps,
        rng=torch.Generator().manual_seed(3),
        schedule=warmup_cosine(),
        progress=False,
    )
    return student.eval().requires_grad_(False)


def at_equal_calls(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """Compare 2 N predictor steps with N of predictor and corrector, and 2 N of the corrector."""
    exact, count = ring(), scale.pick(200, 2_000, 5_000)
    model, calls = Bent(exact, 0.1), scale.pick(20, 200, 200)
    process = exact.process
    tuned: dict[str, Solver] = {}
    rows, found = [], {}
    seeds = (*range(scale.pick(1, 3, 5)),)

    def run(solver: Solver, steps: int, seed: int) -> float:
        rng = torch.Generator().manual_seed(seed)
        x = process.prior((count, 16), rng=rng, dtype=torch.float64)
        out = sample(model, solver, x, Uniform(1.0, 1e-3)(process, steps), rng=rng)
        return sliced_wasserstein2(out, exact.draw(count, rng=rng))

    for name, predictor in (("corrector alone", None), ("both", ReverseDiffusion())):
        steps = calls if predictor is None else calls // 2
        tried = {
            snr: run(PredictorCorrector(predictor, Langevin(snr), end=1e-3), steps, 1000)
            for snr in SNR
        }
        tuned[name] = PredictorCorrector(
            predictor, Langevin(min(tried, key=lambda k: tried[k])), end=1e-3
        )
    tuned["predictor alone"] = PredictorCorrector(ReverseDiffusion(), end=1e-3)
    for name, solver in tuned.items():
        steps = calls // 2 if name == "both" else calls
        values = [run(solver, steps, seed) for seed in seeds]
        found[name] = sum(values) / len(values)
        low, high = bootstrap(torch.tensor(values))
        row = {"part": "equal calls", "solver": name, "calls": calls, "w2": found[name]}
        rows.append({**row, "low": low, "high": high, "setting": repr(solver)})
    said = f"at {calls} calls with a score that is smoothly wrong"
    return [
        Claim(
            f"predictor and corrector end nearer to the data than the predictor alone, {said}",
            found["predictor alone"],
            found["both"],
            "sliced W2",
            "lower",
            found["both"] <= found["predictor alone"],
            "twice the predictor steps come nearer",
        ),
        Claim(
            f"both come nearer than the corrector alone, {said}",
            found["corrector alone"],
            max(found["both"], found["predictor alone"]),
            "sliced W2",
            "lower",
            max(found["both"], found["predictor alone"]) <= found["corrector alone"],
            "the corrector alone is as near",
        ),
    ], rows


def by_the_ode(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """Compare the calls of the adaptive ODE with those of Euler-Maruyama at no worse a distance."""
    exact, count = ring(), scale.pick(200, 2_000, 10_000)
    rng = torch.Generator().manual_seed(0)
    truth = exact.draw(count, rng=rng)
    x = exact.process.prior((count, 16), rng=rng, dtype=torch.float64)
    floor = sliced_wasserstein2(exact.draw(count, rng=rng), truth)
    ode = solve(exact, x, 1.0, 1e-5, rtol=1e-5, atol=1e-5)
    rows = [{"part": "ode", "solver": "adaptive", "calls": ode.calls}]
    rows[0]["w2"] = near = sliced_wasserstein2(ode.x, truth)
    calls = 0
    few = (50, 60, 70, 80, 90, 100)
    for steps in scale.pick((50, 100), (*few, 200, 500, 1000), (*few, 200, 500, 1000, 2000)):
        for name, solver in (
            ("Euler-Maruyama", PredictorCorrector(EulerMaruyama(), end=1e-3)),
            ("DDIM", DDIM()),
        ):
            times = Uniform(1.0, 1e-3 if name != "DDIM" else 0.0)(exact.process, steps)
            out = sample(exact, solver, x, times, rng=torch.Generator().manual_seed(1))
            w2 = sliced_wasserstein2(out, truth)
            rows.append({"part": "ode", "solver": name, "calls": steps, "w2": w2})
            if name == "Euler-Maruyama" and not calls and w2 <= max(near, 1.2 * floor):
                calls = steps
    calls = calls or steps
    return [
        Claim(
            "the adaptive ODE takes fewer calls than Euler-Maruyama steps as near to the data need "
            f"(W2 {near:.4f}, two draws {floor:.4f})",
            float(calls),
            float(ode.calls),
            "calls",
            "lower",
            ode.calls < calls,
            "as few Euler-Maruyama steps are as near",
        )
    ], rows


def likelihoods(scale: Scale) -> list[Claim]:
    """Compare likelihoods with the exact ones, on tight and on usual tolerance."""
    exact = ring()
    x = exact.draw(scale.pick(4, 50, 200), rng=torch.Generator().manual_seed(2))
    found = log_likelihood(exact, x)
    gap = float((found.nats - exact.log_prob(x, 1e-5)).abs().max())
    plane, first = ring(1), 1e-3
    rows = plane.draw(scale.pick(8, 200, 500), rng=torch.Generator().manual_seed(4))
    network = learned(plane, scale.pick(20, 1_000, 3_000))
    own = log_likelihood(network, rows.float(), start=first, rtol=1e-5, atol=1e-5)
    off = (own.nats - plane.log_prob(rows, first)).abs()
    low, high = bootstrap(off)
    return [
        Claim(
            "log densities of a network of three layers of 128 are those of its data, in the mean "
            f"of {len(rows)} held-out draws in the plane",
            0.1,
            float(off.mean()),
            "nat, mean absolute error",
            "lower",
            float(off.mean()) < 0.1,
            "further off than 0.1",
            (low, high),
        ),
        Claim(
            "log densities by the ODE are those of the model, default tolerance, 16 dimensions",
            1e-3,
            gap,
            "nat, the largest error",
            "lower",
            gap < 1e-3,
            "one is further off",
        ),
    ]


@proof("score_sde")
@torch.no_grad()
def prove(scale: Scale) -> Evidence:
    """Correct what a wrong score does, and take few calls where it is right."""
    equal, rows = at_equal_calls(scale)
    ode, more = by_the_ode(scale)
    notes = (
        "Eight modes of deviation 0.1 in eight planes, linear VP. The corrector's ratio is chosen "
        "among four on another seed. The network that learns the plane is off in its noise near "
        "t = 0.05, where the modes are sharp; the likelihood of the exact model is not. FID of the "
        "paper's networks is not reproduced."
    )
    return Evidence([*equal, *ode, *likelihoods(scale)], [*rows, *more], notes)
