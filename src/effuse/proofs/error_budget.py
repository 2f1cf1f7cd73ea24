"""A cache set by an allowed error: half the cost against fewer steps, and the promise kept."""

from __future__ import annotations

import math
from typing import Any

import torch

from effuse.compress.cache.error_budget import Budgeted, off
from effuse.compress.cache.keys import Uniform
from effuse.ops.stats import bootstrap

from . import Claim, Evidence, Scale, proof
from ._caches import SHARE, Case, below, best_where_tuned, budgeted, cases, plain, table


@proof("error_budget")
@torch.no_grad()
def prove(scale: Scale) -> Evidence:
    """Spend half of the multiply-accumulates by a measured route, and within allowed errors."""
    claims: list[Claim] = []
    rows: list[Any] = []
    for case in cases(scale):
        name, others = case.study.name, plain(case)
        ours, handle = budgeted(case, scale)
        steps = best_where_tuned(others[:2])
        by_name = {t.name: t for t in others}
        rows += table(case, [*others, ours])
        claims += [
            below(
                name,
                ours,
                steps,
                f"at {SHARE:.0%} of the cost the route's error is at least 30 % below that of "
                f"{steps.name}",
                "fewer steps come within 30 %",
                0.7,
            ),
            below(
                name,
                ours,
                by_name["inherit, order 1"],
                "the measured route errs less than the best evenly or densely spaced key steps",
                "key steps need no measurement",
            ),
            below(
                name,
                ours,
                by_name["DeepCache"],
                "the measured route errs less than DeepCache",
                "DeepCache is as good",
            ),
            below(
                name,
                ours,
                by_name["first-block"],
                "the measured route errs less than the first-block cache",
                "a threshold on the first block is as good",
            ),
        ]
        found, more = promises(case, handle, scale)
        claims += found
        rows += more
    notes = (
        "Full runs are DDIM in 16 steps. Settings are chosen on the noise of seed 1000 and judged "
        "on other noise; routes are measured on other prompts too. The error is squared and "
        "relative; budgets are its root."
    )
    if scale.size == "smoke":
        notes += " Random weights: whether the claims hold here means nothing."
    return Evidence(claims, rows, notes)


def promises(
    case: Case, handle: Budgeted, scale: Scale
) -> tuple[list[Claim], list[dict[str, Any]]]:
    """Judge what the calibrator allows for several budgets on prompts and noise of its own."""
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    again = handle.transform.restore(case.study.network, {"parts": handle.parts, "route": None})
    walks = [case.draw(torch.Generator().manual_seed(900 + k)) for k in range(scale.pick(2, 4, 8))]
    full = [again.run(walk, Uniform(1)) for walk in walks]
    again.observe([case.study.call()])
    cost = next(iter(again.costs.values()))
    for m in handle.tried:
        got = torch.cat([off(again.run(w, m.route), x) for w, x in zip(walks, full, strict=True)])
        low, high = bootstrap(got)
        rows.append(
            {
                "network": case.study.name,
                "variant": "route by share",
                "macs_share": m.share,
                "predicted": m.predicted,
                "measured_in_calibration": m.error,
                "held_out": math.sqrt(float(got.mean())),
                "held_out_low": math.sqrt(max(low, 0.0)),
                "held_out_high": math.sqrt(max(high, 0.0)),
            }
        )
    for budget in (0.05, 0.1, 0.2):
        route = handle.within(budget)
        got = torch.cat([off(again.run(w, route), x) for w, x in zip(walks, full, strict=True)])
        low, high = bootstrap(got)
        share = 1 - route.saved(cost.saved) / (route.steps * cost.full)
        error = math.sqrt(float(got.mean()))
        claims.append(
            Claim(
                f"{case.study.name}: allowed an error of {budget:g}, the route (at {share:.0%} of "
                "the cost) keeps it on other noise",
                budget,
                error,
                "root of the mean relative squared error of the final latent",
                "lower",
                error <= budget,
                "the error on other noise is above the budget",
                (math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))),
            )
        )
    again.detach()
    return claims, rows
