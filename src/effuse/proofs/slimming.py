"""Every way to make a network cheaper, at equal shares removed, in one table.

What is removed: parameters of the network for those that prune it, a picture's multiply-accumulates
for caches, factors and fewer steps. A table, not a race: both are measured of all. Two processes
share the parts of both pipelines and note in the user's cache what they have measured: broken off
and called again with the same code, the proof goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from effuse.compress.calibrate import uniform_calls
from effuse.evaluate import cost
from effuse.recipe import parse, slim
from effuse.solvers import DDIM
from effuse.solvers.momentum import Momentum

from . import Claim, Evidence, Scale, proof
from ._slimming import CACHES, WAYS, Bench, Cheaper, Row, Way

SHARES = (0.1, 0.2, 0.3, 0.5)
HEALED = (0.3,)
PARTS = ("ways", "recipe", "samplers")
STEPS = 600
"""Of the recipe's healing: less than 15 minutes of two cores, by steps so that it repeats."""
QUICK = ("fewer steps, ddim", "inherit all blocks, order 1", "laptop_diff")
RECIPE = "lean"
FINAL = f"recipe {RECIPE}"
TIMES = 5
"""As many pictures judge the recipe as the table's ways."""


def bench_of(name: str, scale: Scale) -> Bench:
    """Return a house pipeline with what it is asked and who judges; calibration asks other names.

    The diffusion transformer knows classes, few of them: there, what is told shares their names
    with what is asked, and only the noise is other.
    """
    from effuse import house
    from effuse.core.errors import MissingExtra
    from effuse.evaluate.features import EfficientNetFeatures
    from effuse.house import real

    count, pipe = scale.pick(2, 16, 36), house.load(name)
    if name == "emoji":
        asked: list[Any] = [p.text for p in house.prompts()]
        texts = asked = asked[:count]
        taken = {_bare(p.text) for p in house.prompts()}
        told: list[Any] = [c for c in dict.fromkeys(real.load().captions) if _bare(c) not in taken]
    else:
        labels = list(pipe.labels.items())
        some = [labels[i * 7 % len(labels)] for i in range(count)]
        texts, asked = [n for n, _ in some], [i for _, i in some]
        told = [labels[i * 5 % len(labels)][1] for i in range(256)]
    bench = Bench(
        f"house:{name}",
        lambda: house.load(name),
        asked,
        texts,
        list(range(2000, 2000 + count)),
        scale.pick(6, 10, 20),
        scale,
        told[: scale.pick(2, 24, 192)],
        judge=house.clip(),
        pipe=pipe,
    )
    try:
        reference = house.reference()
        bench.features = EfficientNetFeatures(reference.settings.get("size") or 128)
        bench.reference = reference.features
    except (MissingExtra, FileNotFoundError):
        pass
    bench.calls = list(
        uniform_calls(
            pipe,
            bench.told[: scale.pick(2, 24, 48)],
            count=scale.pick(2, 8, 24),
            batch=scale.pick(2, 8, 8),
            steps=scale.pick(2, 8, 12),
            seed=50,
        )
    )
    return bench


def _bare(text: str) -> str:
    return " ".join(w for w in text.split() if w not in ("fluent", "noto", "twemoji"))


def notes_of(name: str, size: str) -> Path:
    """Return where the rows of a pipeline are noted: another file for another state of the code."""
    import effuse
    from effuse.house.data import cache_folder

    code = hashlib.sha256()
    for file in sorted(Path(effuse.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    return cache_folder() / "proofs" / f"slimming-{name}-{size}-{code.hexdigest()[:12]}.jsonl"


def table(
    bench: Bench, ways: Sequence[Way], shares: Sequence[float], noted: Path | None = None
) -> list[Row]:
    """Return a row for the original, then for every way and share; refusals say why.

    noted: file of rows that are there already, to which the others are added, one list a line.
    """
    done: dict[tuple[str, str, float], list[Row]] = {}
    if noted is not None and noted.is_file():
        whole = noted.read_text().rpartition("\n")[0]
        noted.write_text(whole + "\n" * bool(whole))  # without a line that was broken off
        for line in whole.splitlines():
            network, variant, at, known = json.loads(line)
            done[network, variant, at] = known
    rows = [bench.row("original", "", 0.0, bench.pipe, Cheaper(bench.solver, bench.steps))]
    todo = [(w, s) for w in ways for s in (shares[:1] if w.once else shares)]
    log = Console(stderr=True).log
    for way, share in todo:
        if (bench.name, way.name, share) in done:
            rows += done[bench.name, way.name, share]
            continue
        log(f"{bench.name}: {way.name}, {share:.0%}")
        pipe = bench.load()
        cost.denoising_network(pipe).requires_grad_(True)
        found: list[Row] = []
        try:
            how = way.make(bench, pipe, share)
            found = [bench.row(way.name, way.of, share, pipe, how)]
            if way.heals and (way.once or share in HEALED):
                spent = bench.heal(pipe, how, bench.scale.pick(1, 10, 120))
                name = f"{way.name}, healed"
                found.append(bench.row(name, way.of, share, pipe, how, found[0]))
                found[-1]["healing_minutes"] = spent
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            head = {"network": bench.name, "variant": way.name, "share_of": way.of, "share": share}
            found.append({**head, "note": f"refused: {error}"})
        for row in found if way.once else ():
            if "score" in row:
                row["share"] = 1 - row[way.of] / rows[0][way.of]
        rows += found
        if noted is not None:
            noted.parent.mkdir(parents=True, exist_ok=True)
            with noted.open("a") as file:
                file.write(json.dumps([bench.name, way.name, share, found]) + "\n")
    return rows


def final(bench: Bench, recipe: str = RECIPE) -> list[Row]:
    """Return what a shipped recipe gives without its healing and with it, on noise of its own.

    Healed by steps. Where its judge turns the healed weights down, both rows are of the same ones.
    """
    plan = parse(recipe)
    plan = replace(
        plan,
        calibration=replace(plan.calibration, prompts=tuple(bench.told[:48])),
        healing=replace(plan.healing, minutes=None, steps=0),
    )
    learning = replace(plan.healing, steps=bench.scale.pick(1, 20, STEPS))
    fresh = replace(
        bench,
        asked=bench.asked * TIMES,
        texts=bench.texts * TIMES,
        seeds=list(range(9000, 9000 + TIMES * len(bench.asked))),
        first=None,
    )
    whole = Cheaper(bench.solver, bench.steps)
    out = [fresh.row("original, on other pictures", "", 0.0, bench.pipe, whole)]
    for name, each in (
        (f"{FINAL} without its healing, on other pictures", plan),
        (f"{FINAL}, on other pictures", replace(plan, healing=learning)),
    ):
        made = slim(bench.load(), each, keep_original=False, progress=False)
        how = replace(whole, handle=made.applied[-1][1])
        out.append(fresh.row(name, "parameters", 0.3, made.pipe, how))
        told = next((r for r in made.reports() if "judged_by" in r), None)
        if told is not None:
            out[-1]["healing_minutes"] = told["minutes"]
            out[-1]["note"] = (
                f"{told['steps']} steps, {told['kept']} weights by {told['judged_by']}"
            )
    return out


def measured(part: str, name: str, size: str, threads: int) -> tuple[list[Row], list[Claim]]:
    """Return rows and claims of one of `PARTS` of a house pipeline."""
    torch.set_num_threads(threads)
    scale = Scale(size)  # type: ignore[arg-type]
    bench = bench_of(name, scale)
    noted = notes_of(f"{name}-{part}", size) if scale.size == "proof" else None
    if part == "ways":
        ways = [w for w in WAYS if scale.size != "smoke" or w.name in QUICK]
        rows = table(bench, ways, scale.pick((0.5,), (0.3, 0.5), SHARES), noted)
        return rows, _calls(bench.name, rows)
    if part == "recipe":
        rows = final(bench)
        return rows, _parameters(bench.name, rows)
    rows, claims = [], []
    for solver, steps in ((DDIM(), 50), (Momentum(), 20)):
        other = replace(bench, solver=solver, steps=steps, first=None)
        other.name = f"{bench.name}, {type(solver).__name__} in {steps} steps"
        found = table(other, CACHES, (0.5,), noted)
        rows += found
        claims += _calls(other.name, found)
    return rows, claims


@proof("slimming")
def prove(scale: Scale) -> Evidence:
    """Measure all ways side by side; say which of the round's bars they reach."""
    names, threads = ("emoji", "emoji-dit"), torch.get_num_threads()
    if scale.size == "smoke":
        parts = [measured("ways", "emoji", scale.size, threads)]
    else:
        jobs = [(p, n) for p in scale.pick((), PARTS[:2], PARTS) for n in names]
        with ProcessPoolExecutor(len(names), multiprocessing.get_context("spawn")) as pool:
            share = max(1, threads // len(names))
            runs = {j: pool.submit(measured, *j, scale.size, share) for j in jobs}
            parts = [runs[p, n].result() for n in names for p in PARTS if (p, n) in runs]
        for p, n in jobs:
            notes_of(f"{n}-{p}", scale.size).unlink(missing_ok=True)
    return Evidence(
        [c for _, claims in parts for c in claims],
        [r for rows, _ in parts for r in rows],
        "The original: DDIM, guidance 4, unless it is named. share: of the network's parameters, "
        "or of a picture's multiply-accumulates. score: cosine of picture and text in house:clip, "
        "score_kept its ratio to the original's; psnr_db and feature_distance: to the original's "
        "pictures from the same noise; frechet: 16 components of EfficientNet-Lite0 features to "
        "real pictures, biased upwards by few pictures, alike in all rows; time_ratio: of one "
        "picture, median, interleaved, one thread. Healing: on the original's own guided samples "
        "of prompts that are not judged, minutes of one core (of the recipe: by the clock; "
        f"it is judged on {TIMES} times as many pictures). "
        "spectral is no way to remove a share (a student of its own) and asdm_assembly's switching "
        "has its own proof.",
    )


def _parameters(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """At 30 % fewer parameters the recipe stays within 2 % of the original's text-image score."""
    return [
        Claim(
            f"{name}: recipe {RECIPE}, 30 % fewer parameters, keeps 98 % of the text-image score",
            0.98,
            r["score_kept"],
            "share of the original's score",
            "higher",
            r["score_kept"] >= 0.98 and r["parameters"] <= 0.7 * rows[0]["parameters"],
            "it keeps less, or has more parameters",
            (_kept(r, "low"), _kept(r, "high")),
        )
        for r in rows
        if r["variant"] == f"{FINAL}, on other pictures"
    ]


def _kept(row: Mapping[str, Any], end: str) -> float:
    """Return an end of the paired interval as a share of the original's score."""
    first = row["score"] / row["score_kept"]
    return float(1 + row[f"score_change_{end}"] / first)


def _calls(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """At half the multiply-accumulates the best way is 30 % nearer than fewer steps.

    The best, on the pictures that it is judged by, of those that cost no more.
    """
    mine = [r for r in rows if r["share_of"] == "macs" and r["share"] == 0.5 and "psnr_db" in r]
    plain = [r for r in mine if r["variant"].startswith("fewer steps")]
    if not plain:
        return []
    rival = min(plain, key=lambda r: r["squared_error"])
    able = [r for r in mine if r not in plain and r["macs"] <= 1.02 * rival["macs"]]
    if not able:
        return []
    best = min(able, key=lambda r: r["squared_error"])
    return [
        Claim(
            f"{name}: the best way at half the multiply-accumulates ({best['variant']}) is at "
            f"least 30 % nearer to the original's pictures than {rival['variant']}",
            rival["squared_error"],
            best["squared_error"],
            "mean squared error of pictures",
            "lower",
            best["squared_error"] <= 0.7 * rival["squared_error"],
            "it is less than 30 % nearer",
        )
    ]
