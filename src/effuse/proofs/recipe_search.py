"""`effuse search` on a house pipeline: its front beside evolution, chance, and what one would try.

All tactics measure as many recipes on the same pictures; what two of them ask for is measured once.
The front that LINAS found is then measured on other prompts and noise, where nothing was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effuse.compress.search import Budget, RandomSearch, Tactic, search
from effuse.compress.search.base import Trial
from effuse.compress.search.dynas import LINAS
from effuse.compress.search.evolution import NSGA2
from effuse.ops import pareto
from effuse.recipe.space import RecipeBench, RecipeChoices

from . import Claim, Evidence, Scale, proof

Figures = dict[str, float]
BOUND = 0.4


class Measured:
    """A bench that remembers."""

    def __init__(self, bench: RecipeBench):
        self.bench, self.known = bench, dict[str, Figures]()

    def __call__(self, config: dict[str, Any]) -> Figures:
        """Return the metrics of a point."""
        key = json.dumps(config, sort_keys=True)
        if key not in self.known:
            self.known[key] = self.bench(config)
        return self.known[key]


@proof("recipe_search")
def prove(scale: Scale) -> Evidence:
    """Search house:emoji at most at 0.4 of its multiply-accumulates, three ways."""
    from effuse import house

    pipe = house.load("emoji")
    prompts: list[Any] = [p.text for p in house.prompts()]
    count, steps = scale.pick(2, 8, 16), scale.pick(6, 20, 20)
    choices = (
        RecipeChoices(
            solvers=("ddim", "momentum"), steps=(1, 2), keep=(1.0,), factor=(1.0,), every=(1,)
        )
        if scale.size == "smoke"
        else RecipeChoices()
    )
    how: dict[str, Any] = {"pictures": count, "steps": steps, "rounds": 0, "choices": choices}
    asked = RecipeBench(pipe, prompts=prompts[0::2], seed=0, **how)
    other = RecipeBench(pipe, prompts=prompts[1::2], seed=50_000, **(how | {"pictures": 2 * count}))
    start, measured = asked.metrics_at_start, Measured(asked)
    budget = scale.pick(4, 24, 80)
    tactics: dict[str, Tactic] = {
        "linas": LINAS(max(2, budget // 4), scale.pick(50, 2000, 4000)),
        "nsga2": NSGA2(max(2, budget // 4)),
        "random": RandomSearch(),
    }
    seeds = range(scale.pick(1, 1, 3))
    volumes: dict[str, list[list[float]]] = {n: [] for n in tactics}
    fronts: list[Trial] = []
    for seed in seeds:
        for name, tactic in tactics.items():
            found = search(
                choices.space(),
                measured,
                {"psnr": "max", "macs": "min"},
                tactic=tactic,
                budget=budget,
                budgets=[Budget("macs", BOUND * start["macs"])],
                start=start,
                seed=seed,
            )
            volumes[name].append(_covered([t.metrics for t in found.trials], start, budget))
            if name == "linas" and seed == 0:
                fronts = list(found.front)
    rows: list[dict[str, Any]] = [
        {
            "tactic": name,
            **{
                f"covered_after_{n}": sum(c[n - 1] for c in curves) / len(curves)
                for n in sorted({max(1, budget // 4), max(1, budget // 2), budget})
            },
            "each_at_end": [c[-1] for c in curves],
        }
        for name, curves in volumes.items()
    ]
    rows.append({"recipes_measured": len(measured.known), "space": len(choices.space().points())})
    again, plain = _again(other, fronts, choices, start)
    rows += again + plain
    return Evidence(
        _claims(volumes, again, plain, budget),
        rows,
        f"psnr: dB to the pictures of {steps} steps of the original, guidance its own; macs: of a "
        f"picture, decoder and all, at most {BOUND} of the original's. covered: the area of psnr "
        "above 10 dB and of the share of multiply-accumulates saved that is reached. Plain: a "
        "solver in fewer steps, the network untouched; measured, like the front of the first "
        "seed's LINAS, on other prompts and noise than the search saw.",
    )


def _covered(metrics: list[Mapping[str, float]], start: Mapping[str, float], n: int) -> list[float]:
    """Return what area is reached after 1, 2, ..., n measurements."""
    points = [[-m["psnr"], m["macs"] / start["macs"]] for m in metrics]
    reached = pareto.reached(
        torch.tensor(points, dtype=torch.float64), torch.tensor([-10.0, BOUND]).double()
    )
    return (reached + [reached[-1]] * (n - len(reached)))[:n]


def _again(
    bench: RecipeBench, front: list[Trial], choices: RecipeChoices, start: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows of a front, and of plain solvers, on other pictures."""
    off = {"keep": 1.0, "factor": 1.0, "int8": False, "every": 1, "order": choices.order[0]}
    whole = bench.metrics_at_start
    found = [
        {"recipe": "front", **t.config, "searched_psnr": t.metrics["psnr"], **bench(dict(t.config))}
        for t in front
    ]
    plain: list[dict[str, Any]] = []
    for solver in choices.solvers:
        for steps in choices.steps:
            row = bench(off | {"solver": solver, "steps": steps})
            if row["macs"] <= BOUND * whole["macs"]:
                plain.append({"recipe": "plain", "solver": solver, "steps": steps, **row})
    return found, plain


def _claims(
    volumes: Mapping[str, list[list[float]]],
    found: list[dict[str, Any]],
    plain: list[dict[str, Any]],
    budget: int,
) -> list[Claim]:
    ends = {n: torch.tensor([c[-1] for c in v], dtype=torch.float64) for n, v in volumes.items()}
    out = [
        Claim(
            f"after {budget} measurements linas covers more than {rival}, mean over seeds",
            float(ends[rival].mean()),
            float(ends["linas"].mean()),
            "dB times share saved",
            "higher",
            bool(ends["linas"].mean() > ends[rival].mean()),
            "no more",
        )
        for rival in ("nsga2", "random")
    ]
    ahead: list[float] = []
    for row in plain:
        able = [f["psnr"] for f in found if f["macs"] <= row["macs"]]
        ahead.append(max(able, default=0.0) - row["psnr"])
    if ahead:
        share = sum(a >= 0 for a in ahead) / len(ahead)
        out.append(
            Claim(
                "on other pictures some recipe of the front is as near to the original as each "
                "solver in fewer steps, for as many multiply-accumulates or fewer",
                1.0,
                share,
                "share of plain solvers and steps that are matched",
                "higher",
                share == 1,
                "a plain one is nearer",
            )
        )
        best = [
            max(p["psnr"] for p in plain if p["macs"] <= f["macs"])
            for f in found
            if any(p["macs"] <= f["macs"] for p in plain)
        ]
        mine = [f["psnr"] for f in found if any(p["macs"] <= f["macs"] for p in plain)]
        if mine:
            gains = torch.tensor(mine, dtype=torch.float64) - torch.tensor(best).double()
            out.append(
                Claim(
                    "on other pictures the recipes of the front are nearer to the original than "
                    "the best solver in fewer steps at no more multiply-accumulates, on average",
                    float(torch.tensor(best).double().mean()),
                    float(torch.tensor(mine).double().mean()),
                    "dB to the original's pictures",
                    "higher",
                    bool(gains.mean() > 0),
                    "no nearer",
                )
            )
    if len(found) > 2:
        pair = torch.tensor([[f["searched_psnr"], f["psnr"]] for f in found], dtype=torch.float64)
        r = _spearman(pair)
        out.append(
            Claim(
                "recipes of the front keep their order on other pictures",
                0.8,
                r,
                "rank correlation",
                "higher",
                r >= 0.8,
                "the order was chance",
            )
        )
    return out


def _spearman(pair: Tensor) -> float:
    """Return the rank correlation of two columns."""
    ranks = pair.argsort(0).argsort(0).double()
    return float(torch.corrcoef(ranks.T)[0, 1])
