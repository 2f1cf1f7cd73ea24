"""Search over recipes: which methods, how strong, which solver, how many steps, within a budget.

    found = search_recipes("house:emoji", ["latency<0.5x"], out="found/")
    found.front          # measured, each with its recipe; out/recipes/*.yaml are for `effuse slim`

A folder that holds the same search's trials is gone on with; nothing is measured twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effuse.compress.search import Budget, Found, Journal, SearchSpace, Tactic, Trial, search
from effuse.compress.search.base import Config, Goal, Workers
from effuse.core.contracts import Applied, Transform
from effuse.core.files import claimed, write_whole
from effuse.core.machine import machine, versions
from effuse.evaluate import cost
from effuse.evaluate.quality import Psnr
from effuse.report.draw import Condition, Entry, checked, draw_some, kind_of, words

from .applied import _parts, load, network_name
from .written import Calibration, Recipe, Sampler, call_settings, parse, transform_of

OBJECTIVES: dict[str, Goal] = {"score": "max", "macs": "min"}
"""Fit to the text where house:clip can tell, else `psnr`; multiply-accumulates of a picture."""


@dataclass(frozen=True)
class RecipeChoices:
    """What a searched recipe may hold; each is one choice of the space.

    solvers: names of methods. steps: of sampling. keep: share of the network's parameters that
    stays when whole layers go (laptop_diff). factor: share of its layers' multiply-accumulates
    that stays when they become thin products (maestro). int8: 8-bit weights or not. every: features
    are computed in full at every so-manieth step and inherited between. order: 0 inherits the last
    feature, 1 the line through two.

    Each pair of keep and factor is learnt once: on house:emoji, two cores, 25 s for keep alone and
    125 s with a factor, where a measurement of 16 pictures takes 3 to 5 s. So factors are few.
    evidence/recipe_search.json is of the space without them.
    """

    solvers: tuple[str, ...] = ("ddim", "momentum", "dpmpp")
    steps: tuple[int, ...] = (4, 5, 6, 8, 10, 12, 15, 20)
    keep: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
    factor: tuple[float, ...] = (1.0, 0.8)
    int8: tuple[bool, ...] = (False, True)
    every: tuple[int, ...] = (1, 2, 3)
    order: tuple[int, ...] = (0, 1)

    def space(self) -> SearchSpace:
        """Return the space; the order of what is not inherited changes nothing."""
        return SearchSpace(
            {
                "solver": self.solvers,
                "steps": self.steps,
                "keep": self.keep,
                "factor": self.factor,
                "int8": self.int8,
                "every": self.every,
                "order": self.order,
            },
            silent=lambda c: ["order"] if c["every"] == 1 else [],
        )

    def recipe(self, config: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a point."""
        methods: list[dict[str, Any]] = []
        if config["keep"] < 1:
            methods.append({"laptop_diff": {"keep": config["keep"]}})
        if config["factor"] < 1:
            methods.append({"maestro": {"keep": config["factor"]}})
        if config["int8"]:
            methods.append({"int8": {}})
        if config["every"] > 1:
            keys = {"Uniform": {"every": config["every"]}}
            methods.append({"asdm_assembly": {"keys": keys, "order": config["order"]}})
        methods.append({config["solver"]: {"steps": config["steps"]}})
        return parse({"methods": methods})


class RecipeBench:
    """Measures recipes on one pipeline, always on the same prompts and noise.

    score: mean cosine of picture and text in house:clip, where the pipeline is of the house and
    takes text. psnr: dB to the pictures of the pipeline as it was. macs: multiply-accumulates of
    one picture. bytes: of the denoising network as it is stored. calls: of it for one picture.
    latency: seconds of one picture: the median over rounds of the ratio to the original, drawn in
    turn, times the original's seconds; rounds=0 leaves it out.

    What a method learns from calibration is learnt once for each setting.

    Args:
        source: what `effuse.load` takes, or a pipeline, which is put back as it was each time.
        prompts: those of the house if None.
        steps, guidance: of the original.
        seed: picture i starts from the noise of seed + i.
        rounds: of timing.
        calibration: what calibrated methods learn from.
    """

    def __init__(
        self,
        source: Any,
        *,
        prompts: Sequence[Condition] | None = None,
        pictures: int = 16,
        steps: int = 20,
        guidance: float | None = None,
        seed: int = 0,
        rounds: int = 3,
        calibration: Calibration | None = None,
        choices: RecipeChoices | None = None,
    ):
        self.source, self.given, self.pictures = source, prompts, pictures
        self.steps, self.guidance, self.seed, self.rounds = steps, guidance, seed, rounds
        self.calibration = calibration or Calibration()
        self.choices = choices or RecipeChoices()
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker as settings: each loads the pipeline and its judge itself."""
        names = ("source", "given", "pictures", "steps", "guidance", "seed", "rounds")
        more = ("calibration", "choices")
        return {n: getattr(self, n) for n in names + more} | {"_ready": False}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the settings."""
        self.__dict__.update(state)

    def about(self) -> dict[str, Any]:
        """Return what the figures depend on, for the journal."""
        named = self.source if isinstance(self.source, (str, Path)) else type(self.source).__name__
        return {
            "pipeline": str(named),
            "prompts": list(self.given) if self.given is not None else None,
            "pictures": self.pictures,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "rounds": self.rounds,
            "calibration": vars(self.calibration),
            **({"machine": machine()} if self.rounds else {}),
        }

    def _prepare(self) -> None:
        self.pipe = load(self.source) if isinstance(self.source, (str, Path)) else self.source
        self.name = network_name(self.pipe)
        self.network = getattr(self.pipe, self.name)
        self.first_scheduler = self.pipe.scheduler
        listed = checked(self.pipe, self.given)
        if kind_of(self.pipe) == "none":
            listed = listed * self.pictures
        self.asked = (listed * math.ceil(self.pictures / len(listed)))[: self.pictures]
        self.seeds = [self.seed + i for i in range(len(self.asked))]
        house = isinstance(self.source, str) and self.source.startswith("house:")
        self.judge: Callable[[Tensor], Tensor] | None = None
        if house and kind_of(self.pipe) in ("text", "class"):
            from effuse import house as home

            clip = home.store.image_text()
            texts = [words(self.pipe, c) for c in self.asked]
            self.judge = lambda x: clip.score(x, texts)
        self.plans: dict[str, dict[str, Any]] = {}
        self.weighed: set[str] = set()  # whose plans need weights, in the drawer
        self.drawer = tempfile.TemporaryDirectory(prefix="effuse-")
        self.batches: list[dict[str, Any]] = []
        self.original = type(self.pipe)(**_parts(self.pipe))
        self.original.register_modules(**{self.name: _copy(self.network)})
        self._ready = True
        self.whole = self._draw(Entry(self.original, self.steps, self.guidance))
        self.start = self._figures(self.original, self.steps, self.whole)

    @property
    def metrics_at_start(self) -> dict[str, float]:
        """The original's metrics; its `psnr` is 99 by convention, not infinite."""
        if not self._ready:
            self._prepare()
        return dict(self.start)

    def _draw(self, entry: Entry, count: int | None = None) -> Tensor:
        return draw_some(entry, self.asked[:count], self.seeds[:count])

    def _figures(self, pipe: Any, steps: int, pictures: Tensor) -> dict[str, float]:
        entry = Entry(pipe, steps, self.guidance)
        network = cost.denoising_network(pipe)
        with cost.CountMacs() as count, cost.watch(network, count) as calls:
            self._draw(entry, 1)
        psnr = Psnr()
        psnr.update(pictures, self.whole)
        out = {
            "psnr": min(psnr.compute(), 99.0),
            "macs": float(count.macs),
            "calls": float(len(calls.rows)),
            "bytes": float(cost.stored_bytes(network)),
        }
        if self.judge is not None:
            out["score"] = float(self.judge(pictures).double().mean())
        if self.rounds:
            old = Entry(self.original, self.steps, self.guidance)
            seconds = cost.rounds_of(
                {"old": lambda: self._draw(old, 1), "new": lambda: self._draw(entry, 1)},
                self.rounds,
            )
            ratio = float((seconds["new"][0] / seconds["old"][0]).quantile(0.5))
            usual = getattr(self, "start", {}).get("latency")
            out["latency"] = ratio * (usual or float(seconds["old"][0].quantile(0.5)))
        return out

    def __call__(self, config: Config) -> dict[str, float]:
        """Return the metrics of a point."""
        if not self._ready:
            self._prepare()
        recipe = self.choices.recipe(config)
        with self._with(recipe):
            steps = call_settings(recipe)["num_inference_steps"]
            pictures = self._draw(Entry(self.pipe, steps, self.guidance))
            return self._figures(self.pipe, steps, pictures)

    @contextlib.contextmanager
    def _with(self, recipe: Recipe) -> Iterator[None]:
        """Put a recipe on the pipeline while inside."""
        from effuse.bridge.scheduler import scheduler

        handles: list[Any] = []
        put_on = ""
        try:
            for item in recipe.items:
                transform = transform_of(item)
                if transform is None:
                    assert isinstance(item, Sampler)
                    made = scheduler(item.solver, self.first_scheduler, grid=item.grid)
                    self.pipe.register_modules(scheduler=made)
                    continue
                put_on = f"{put_on} {transform!r}"
                handles.append(self._attach(transform, put_on))
            for handle in handles:
                handle.reset()
            yield
        finally:
            for handle in reversed(handles):
                handle.detach()
            self.pipe.register_modules(scheduler=self.first_scheduler)

    def _attach(self, transform: Transform, key: str) -> Applied:
        """Attach, and learn from calibration the first time; after that, by plan and weights.

        Not where weights of the network were changed in place, or would fill the disk.

        key: says what is on the network with it.
        """
        from safetensors.torch import load_file, save_file

        file = Path(self.drawer.name) / hashlib.sha256(key.encode()).hexdigest()
        if key in self.plans and (file.is_file() or key not in self.weighed):
            weights = load_file(file) if key in self.weighed else {}
            handle = transform.restore(self.network, self.plans[key])
            self.network.load_state_dict(weights, strict=False)
            return handle
        before = {k: (v, v._version) for k, v in self.network.state_dict().items()}
        handle = transform.attach(self.network)
        if not transform.calibrated:
            return handle
        try:
            handle.observe(self._calls(transform.targeted))
            after = self.network.state_dict()
            same = [k for k, v in after.items() if k in before and v.is_set_to(before[k][0])]
            new = {k: v.clone().contiguous() for k, v in after.items() if k not in set(same)}
            size = sum(v.nbytes for v in new.values())
            fits = 4 * size < shutil.disk_usage(self.drawer.name).free
            if fits and all(after[k]._version == before[k][1] for k in same):
                if new:
                    save_file(new, file)
                    self.weighed.add(key)
                self.plans[key] = json.loads(json.dumps(handle.plan()))
        except BaseException:
            handle.detach()
            raise
        return handle

    def _calls(self, targeted: bool) -> list[Any]:
        if not self.batches:
            from effuse.compress.calibrate import uniform_calls

            how = self.calibration
            self.batches = uniform_calls(
                self.original,
                how.prompts,
                count=how.calls,
                batch=how.batch,
                steps=how.steps,
                seed=how.seed,
            )
        return self.batches if targeted else [b["call"] for b in self.batches]


def _copy(network: Any) -> Any:
    import copy

    return copy.deepcopy(network)


def search_recipes(
    source: Any,
    budgets: Sequence[Budget | str] = (),
    *,
    out: str | Path | None = None,
    objectives: Mapping[str, Goal] | None = None,
    tactic: Tactic | None = None,
    budget: int = 100,
    choices: RecipeChoices | None = None,
    bench: RecipeBench | None = None,
    workers: Workers | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial, int], None] | None = None,
    **settings: Any,
) -> Found:
    """Return the measured recipes for a pipeline that no other measured one beats.

    Args:
        source: what `effuse.load` takes, or a pipeline.
        budgets: bounds, such as "latency<0.5x" (of the original) or "bytes<2e6".
        out: folder: trials/, front.json, front.png, recipes/*.yaml; resumable. None writes nothing.
        objectives: `OBJECTIVES` if None, with `psnr` where nothing can tell how texts fit; a metric
            with a budget takes the place of `macs`.
        tactic: LINAS with 20 points a loop if None.
        budget: evaluations.
        choices: what recipes may hold.
        bench: measures; made of `source` and `settings` (see `RecipeBench`) if None.
        workers: see `effuse.compress.search.search`. Seconds need `Local`.
        seed: of the tactic.
        on_trial: called after each evaluation.
        settings: of `RecipeBench`.

    Raises:
        ValueError: a budget or objective on what is not measured; the folder is another search's.
    """
    from effuse.compress.search.dynas import LINAS

    choices = choices or RecipeChoices()
    bounds = [Budget.parse(b) if isinstance(b, str) else b for b in budgets]
    timed = any(b.metric == "latency" for b in bounds) or "latency" in (objectives or {})
    if bench is None:
        bench = RecipeBench(source, choices=choices, **{"rounds": 3 if timed else 0, **settings})
    start = bench.metrics_at_start
    if objectives is None:
        second = bounds[0].metric if bounds and not bounds[0].above else "macs"
        first = "score" if "score" in start else "psnr"
        objectives = {first: "max", second: "min"}
    how: dict[str, Any] = {
        "tactic": tactic or LINAS(20, 4000),
        "budget": budget,
        "budgets": [b.at(start) for b in bounds],
        "start": start,
        "workers": workers,
        "seed": seed,
        "on_trial": on_trial,
    }
    space = choices.space()
    if out is None:
        return search(space, bench, objectives, **how)
    with claimed(out) as folder:
        journal = Journal(folder, bench.about())
        found = search(space, bench, objectives, journal=journal, **how)
        write(found, folder, choices)
    return found


def write(found: Found, folder: Path, choices: RecipeChoices) -> None:
    """Write the front: front.json, front.png, and a recipe file for each of its points."""
    plain = found.to_dict() | {"versions": versions(), "machine": machine()}
    write_whole(folder / "front.json", json.dumps(plain, indent=1, default=repr) + "\n")
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    for old in recipes.glob("*.yaml"):
        old.unlink()
    for i, trial in enumerate(found.front):
        told = ", ".join(f"{n} {v:.4g}" for n, v in trial.metrics.items())
        text = f"# Measured: {told}\n" + choices.recipe(trial.config).to_yaml()
        write_whole(recipes / f"{i:02d}.yaml", text)
    if len(found.objectives) > 1 and found.front:
        plot(found, folder / "front.png")


def plot(found: Found, file: Path) -> None:
    """Draw all trials by the first two objectives, the front as a line, the original as a cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    y, x = list(found.objectives)[:2]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    good = [t.metrics for t in found.trials if not t.failure]
    axes.scatter([m[x] for m in good], [m[y] for m in good], s=14, c="#9aa5b1", label="measured")
    line = sorted((t.metrics[x], t.metrics[y]) for t in found.front)
    axes.plot(*zip(*line, strict=True), "o-", ms=4, c="#c2410c", label="front")
    if x in found.start and y in found.start:
        axes.plot(found.start[x], found.start[y], "x", ms=9, mew=2, c="black", label="original")
    for b in found.budgets:
        if b.metric == x:
            axes.axvline(b.bound, ls=":", c="black", lw=1)
        elif b.metric == y:
            axes.axhline(b.bound, ls=":", c="black", lw=1)
    axes.set(xlabel=x, ylabel=y)
    if min(m[x] for m in good) > 0 and max(m[x] for m in good) > 10 * min(m[x] for m in good):
        axes.set_xscale("log")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    draft = file.with_name(f".{file.name}.draft.png")
    figure.savefig(draft, dpi=150)
    draft.replace(file)
