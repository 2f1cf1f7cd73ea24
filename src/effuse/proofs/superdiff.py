"""SuperDiff: mixtures and intersections of models, the density estimator, two prompts."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from effuse.control import (
    AND,
    OR,
    Fixed,
    Several,
    Superdiff,
    Superposition,
    SuperpositionODE,
    Trace,
    controlled,
)
from effuse.core import Mixture, Solver, sample
from effuse.ops.stats import bootstrap, paired
from effuse.ops.transport import sliced_wasserstein2
from effuse.processes import Linear, Uniform
from effuse.proofs import Claim, Evidence, Scale, proof

STD = 0.4
RULES: dict[str, Solver] = {
    "OR": Superposition(OR()),
    "AND": Superposition(AND()),
    "average": Superposition(Fixed()),
    "first alone": Superposition(Fixed((1, 0))),
    "second alone": Superposition(Fixed((0, 1))),
    "OR along the ODE": SuperpositionODE(OR(), probes=0),
    "AND along the ODE": SuperpositionODE(AND(), probes=0),
}
PAIRS = (
    ("dog face", "red apple"),
    ("full moon", "cat face"),
    ("blue heart", "pizza"),
    ("tulip", "sailboat"),
)


def _modes(*centers: tuple[float, float]) -> Mixture:
    return Mixture(Linear(), torch.tensor(centers), STD)


UPPER = ((-1.5, 1.5), (1.5, 1.5))
LOWER = ((-1.5, -1.5), (1.5, -1.5))
RIGHT = ((1.5, 1.5), (1.5, -1.5))


def shares(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """A: four modes in the plane, two models that know two each, exact scores."""
    count, steps = scale.pick(500, 1000, 2000), scale.pick(100, 200, 500)
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str, str], list[float]] = {}
    for case, second in (("apart", LOWER), ("overlap", RIGHT)):
        a, b = _modes(*UPPER), _modes(*second)
        union = _modes(*dict.fromkeys(UPPER + second))
        weights = [1.0] * len(union.means)
        if case == "overlap":  # the mode that both know has the share of two
            weights = [2.0 if tuple(c) == (1.5, 1.5) else 1.0 for c in union.means.tolist()]
        truth = Mixture(Linear(), union.means, STD, torch.tensor(weights))
        for name, solver in RULES.items():
            few = steps // 5 if isinstance(solver, SuperpositionODE) else steps
            for seed in scale.seeds:
                rng = torch.Generator().manual_seed(seed)
                x = Linear().prior((count, 2), rng=rng, dtype=torch.float64)
                last: list[Trace] = []

                def keep(index: int, level: Tensor, step: Any, into: list[Trace] = last) -> None:
                    into[:] = [step.state]

                times = Uniform(1.0, 0.001)(Linear(), few)
                out = sample(Several([a, b]), solver, x, times, rng=rng, on_step=keep)
                off = torch.cdist(out, union.means)
                near, which = off.min(1)
                inside = near < 3 * STD
                part = [float((inside & (which == k)).double().mean()) for k in range(len(weights))]
                common = (out - out.new_tensor([1.5, 1.5])).norm(dim=1) < 3 * STD
                reference = truth.draw(count, rng=torch.Generator().manual_seed(1000 + seed))
                gap = last[0].log_q[:, 0] - last[0].log_q[:, 1]
                exact = a.log_prob(out, times[-1]) - b.log_prob(out, times[-1])
                first = a.log_prob(x, times[0]) - b.log_prob(x, times[0])
                row = {
                    "part": f"four modes, {case}",
                    "rule": name,
                    "seed": seed,
                    "steps": few,
                    "evals": 2 * few,
                    "shares": part,
                    "off_modes": float((~inside).double().mean()),
                    "common_mode": float(common.double().mean()),
                    "sliced_w2_to_union": sliced_wasserstein2(out, reference),
                    "log_q_gap_spread": float(gap.std()),
                    "exact_gap_spread": float((exact - first).std()),
                    "estimator_error_median": float((gap - exact + first).abs().median()),
                }
                rows.append(row)
                for key, value in row.items():
                    if isinstance(value, float):
                        found.setdefault((case, name, key), []).append(value)

    def mean(case: str, name: str, key: str) -> float:
        return sum(found[case, name, key]) / len(found[case, name, key])

    w2 = {n: mean("apart", n, "sliced_w2_to_union") for n in RULES}
    common = {n: mean("overlap", n, "common_mode") for n in RULES}
    others = min(w2["average"], w2["first alone"], w2["second alone"])
    drift = {n: mean("apart", n, "log_q_gap_spread") for n in ("AND", "average")}
    told = {n: mean("overlap", n, "exact_gap_spread") for n in ("AND", "average")}
    claims = [
        Claim(
            "OR comes closer to the union of two models than half of the best of averaging and "
            "either model alone",
            others,
            w2["OR"],
            "sliced W2",
            "lower",
            w2["OR"] < 0.5 * others,
            "it is not below half",
        ),
        Claim(
            "AND puts a larger share into the mode that both models know than averaging does",
            common["average"],
            common["AND"],
            "share of samples",
            "higher",
            common["AND"] > common["average"],
            "the share is not larger",
        ),
        Claim(
            "AND keeps the estimated log densities equal, 1e-4 nat a dimension; averaging does not",
            drift["average"],
            drift["AND"],
            "spread of log q1 - log q2 at the end, nat",
            "lower",
            drift["AND"] < 2e-4 and drift["average"] > 1,
            "AND drifts by more, or averaging by less than one nat",
        ),
        Claim(
            "AND keeps the exact log densities nearer to each other than averaging, overlap",
            told["average"],
            told["AND"],
            "spread of the exact difference gained, nat",
            "lower",
            told["AND"] < told["average"],
            "the spread is not lower",
        ),
    ]
    return claims, rows


def estimator(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """B: error of the density along the walk against the number of steps, and its cost."""
    a, b = _modes(*UPPER), _modes(*LOWER)
    counts = scale.pick((50, 200), (100, 400, 1600), (100, 400, 1600))
    rows, errors = [], {}
    for name, solver in (
        ("Ito", Superposition(OR())),
        ("one probe", SuperpositionODE(OR(), probes=1)),
        ("exact divergence", SuperpositionODE(OR(), probes=0)),
    ):
        for steps in counts if name == "Ito" else counts[:2]:
            rng = torch.Generator().manual_seed(0)
            x = Linear().prior((500, 2), rng=rng, dtype=torch.float64)
            last: list[Trace] = []

            def keep(index: int, level: Tensor, step: Any, into: list[Trace] = last) -> None:
                into[:] = [step.state]

            times = Uniform(0.95, 0.05)(Linear(), steps)
            out = sample(Several([a, b]), solver, x, times, rng=rng, on_step=keep)
            exact = [
                a.log_prob(y, t) - b.log_prob(y, t) for y, t in ((x, times[0]), (out, times[-1]))
            ]
            gap = last[0].log_q[:, 0] - last[0].log_q[:, 1] - exact[1] + exact[0]
            errors[name, steps] = float(gap.abs().median())
            rows.append(
                {
                    "part": "estimator",
                    "by": name,
                    "steps": steps,
                    "error_median": errors[name, steps],
                    "error_interval": bootstrap(gap.abs(), lambda v: v.median(), draws=300),
                    "size_median": float((exact[1] - exact[0]).abs().median()),
                }
            )
    low, high = counts[0], counts[-1]
    slope = math.log(errors["Ito", low] / errors["Ito", high]) / math.log(high / low)
    claims = [
        Claim(
            "the error of the Ito estimate falls at least as the root of the step",
            0.5,
            slope,
            f"slope of log error, {low} to {high} steps",
            "higher",
            slope > 0.4,
            "a slope of 0.4 or below",
        )
    ]
    return claims, rows


def prompts(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]], str]:
    """C: two prompts of house:emoji in one picture, judged by house:clip's lower score."""
    if scale.size == "smoke":
        return [], [], "The pictures run from the small size on."
    try:
        from effuse.bridge.pipeline import wrap
        from effuse.house import clip, load

        model, judge = wrap(load("emoji")), clip()
    except (ImportError, FileNotFoundError, RuntimeError) as error:
        return [], [], f"No pictures, as weights are missing: {error}"
    model.network.requires_grad_(False)
    count, steps = scale.pick(1, 2, 2), scale.pick(10, 50, 100)
    pairs, rows = PAIRS[: scale.pick(1, 2, 4)], []
    lows: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    variants: dict[str, tuple[Solver, bool, int]] = {
        "AND": (Superposition(AND()), False, steps),
        "average": (Superposition(Fixed()), False, steps),
        "joint prompt, equal calls": (Superposition(Fixed()), True, 3 * steps // 2),
    }
    for name, (solver, joint, n) in variants.items():
        for pair in pairs:
            what = [f"{pair[0]} and {pair[1]}"] if joint else list(pair)
            run = controlled(model, Superdiff(solver), what, count=count, steps=n, guidance=4.0)  # type: ignore[arg-type]
            begun = time.perf_counter()
            out = run.sample(rng=torch.Generator().manual_seed(0))
            seconds[name] = (time.perf_counter() - begun) / (n * count)
            score = torch.stack([judge.score(out, [p] * count) for p in pair])
            lows.setdefault(name, []).append(score.amin(0))
            rows.append(
                {
                    "part": "prompts",
                    "rule": name,
                    "prompts": pair,
                    "steps": n,
                    "evals": (2 if joint else 3) * n,
                    "score_low": float(score.amin(0).mean()),
                    "score_first": float(score[0].mean()),
                    "score_second": float(score[1].mean()),
                }
            )
    run = controlled(
        model,
        Superdiff(SuperpositionODE(AND())),
        list(PAIRS[0]),
        count=count,
        steps=5,
        guidance=4.0,
    )
    begun = time.perf_counter()
    run.sample(rng=torch.Generator().manual_seed(0))
    probe = (time.perf_counter() - begun) / (5 * count)
    low = {n: torch.cat(v) for n, v in lows.items()}
    claims = []
    for name in ("average", "joint prompt, equal calls"):
        _, interval = paired(low["AND"], low[name])
        claims.append(
            Claim(
                f"house:emoji, {len(pairs)} pairs of prompts, guidance 4, {steps} steps: the lower "
                f"of the two scores is higher with AND than with: {name}",
                float(low[name].mean()),
                float(low["AND"].mean()),
                "cosine of house:clip",
                "higher",
                bool(low["AND"].mean() > low[name].mean()) and interval[0] > 0,
                "it is not higher, or the interval of the difference holds zero",
                interval,
            )
        )
    claims.append(
        Claim(
            "densities by a Hutchinson probe cost twice the time a step or more, house:emoji",
            seconds["AND"],
            probe,
            "seconds a step and picture",
            "higher",
            probe >= 2 * seconds["AND"],
            "less than twice",
        )
    )
    return claims, rows, f"Pictures: {count} a pair."


@proof("superdiff")
def prove(scale: Scale) -> Evidence:
    """OR samples the union, AND the intersection, the estimate is right; AND of two prompts."""
    claims, rows = shares(scale)
    more, found = estimator(scale)
    claims, rows = [*claims, *more], [*rows, *found]
    seen, pictured, note = prompts(scale)
    notes = (
        "Four modes of deviation 0.4 at (+-1.5, +-1.5), linear VP schedule, float64; near a mode "
        "means within three deviations. ODE rows take a fifth of the steps and the exact "
        f"divergence. {note}"
    )
    return Evidence([*claims, *seen], [*rows, *pictured], notes)
