"""A recipe: an ordered list of methods, applied to a pipeline, undone, saved.

The one place where a name becomes a class. In a file:

Methods:
      - laptop_diff: {keep: 0.75}
      - int8: {}
      - momentum: {order: 2, beta: 0.8, steps: 12}
    calibration: {prompts: 16, steps: 10}
    healing: {steps: 200}

A field that takes an object is written as the class and its fields: `keys: {Every: {period: 2}}`.
A second class of a method is written with a dot: `momentum.GHVB: {order: 2.7}`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effuse.core.contracts import Applied, Objective, Solver, Transform
from effuse.core.errors import RecipeError
from effuse.core.fields import build, defaults_of, dump_fields, names_of, nearest
from effuse.core.method import methods
from effuse.processes import grids
from effuse.processes.grids import Grid

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

ORDER = ("prune", "factorize", "rewire", "quantize", "cache", "sample")
"""In which order kinds may stand: what changes shapes first, what runs per step last."""


@dataclass(frozen=True)
class Sampler:
    """How to walk: the solver, how many steps, on which grid, at which guidance scale.

    `grid` None keeps the spacing of the scheduler that is replaced; `guidance` None keeps the
    pipeline's own.
    """

    solver: Solver
    steps: int | None = None
    grid: Grid | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.steps is not None and self.steps < 1:
            raise RecipeError(f"steps={self.steps}: expected a positive integer")


Item = Transform | Sampler


@dataclass(frozen=True)
class Calibration:
    """What transforms observe and healing learns from: network calls without guidance.

    The pipeline samples `prompts` clean samples in `steps` steps each; every call spoils `batch` of
    them to levels spread evenly over the training range. No data are needed.

    prompts: how many of our own list, or the prompts (class labels) themselves; calls: of the
    network, for observing.
    """

    prompts: int | tuple[str | int, ...] = 32
    steps: int = 20
    calls: int = 8
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Healing:
    """How a pruned network learns from the original: AdamW for `steps` steps, 0 is none.

    lr: highest learning rate; ema: decay of the average that is kept, None for no average.
    """

    steps: int = 0
    lr: float = 2e-4
    ema: float | None = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """Methods in order, what they are calibrated on, and how long healing may take."""

    items: tuple[Item, ...]
    calibration: Calibration = field(default_factory=Calibration)
    healing: Healing = field(default_factory=Healing)

    def __post_init__(self) -> None:
        """Check that kinds stand in an order that can work."""
        check_order(self.items)

    @property
    def sampler(self) -> Sampler | None:
        """The last item that samples, if any."""
        found = [i for i in self.items if isinstance(i, Sampler)]
        return found[-1] if found else None

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The items that change the network."""
        return tuple(i for i in self.items if isinstance(i, Transform))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `parse` reads back into an equal recipe."""
        out: dict[str, Any] = {"methods": [_dump_item(i) for i in self.items]}
        for name, value in (("calibration", self.calibration), ("healing", self.healing)):
            changed = _changed(value)
            if changed:
                out[name] = changed
        return out

    def to_yaml(self) -> str:
        """Return the recipe as the text of a file."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def kind_of(item: Item) -> str:
    """Return the kind of an item, one of `ORDER`."""
    return "sample" if isinstance(item, Sampler) else item.kind


def check_order(items: Sequence[Item]) -> None:
    """Raise `RecipeError` if a kind stands after one it must precede, or two items sample."""
    for item in items:
        if not isinstance(item, (Transform, Sampler)):
            raise RecipeError(
                f"{item!r}: expected a Transform or a Sampler(solver, steps=...); a bare solver "
                "needs its steps"
            )
    ranks = [ORDER.index(kind_of(i)) for i in items]
    for a, b, before, after in zip(ranks, ranks[1:], items, items[1:], strict=False):
        if b < a:
            raise RecipeError(
                f"{type(after).__name__} ({kind_of(after)}) stands after {type(before).__name__} "
                f"({kind_of(before)}): expected the order {' < '.join(ORDER)}"
            )
    if ranks.count(ORDER.index("sample")) > 1:
        raise RecipeError("two solvers: expected at most one")


def parse(source: str | Path | Mapping[str, Any] | Iterable[Item] | Recipe) -> Recipe:
    """Read a recipe from a YAML file, its text as a mapping, or a list of objects.

    Raises:
        RecipeError: an unknown method, class or field (the nearest name is given), a bad value, or
            an order that cannot work. Names the place.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, (str, Path)):
        source = _read(Path(source))
    if not isinstance(source, Mapping):
        items = tuple(Sampler(i) if isinstance(i, Solver) else i for i in source)
        return Recipe(items)
    for name in source:
        if name not in ("methods", "calibration", "healing"):
            near = nearest(str(name), ("methods", "calibration", "healing"))
            raise RecipeError(f"recipe: unknown field {name!r}{near}")
    listed = source.get("methods") or []
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise RecipeError(f"methods: expected a list of one-key mappings, got {listed!r}")
    items = tuple(_item(entry, f"methods[{i}]") for i, entry in enumerate(listed))
    parts = {
        name: _made(cls, source.get(name) or {}, name)
        for name, cls in (("calibration", Calibration), ("healing", Healing))
    }
    return Recipe(items, **parts)


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise RecipeError(f"{path}: expected a mapping with `methods`, got {type(data).__name__}")
    return data


def _item(entry: Any, place: str) -> Item:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RecipeError(f"{place}: expected one method with its fields, got {entry!r}")
    ((name, fields),) = entry.items()
    cls = class_of(name, place)
    fields = dict(fields or {})
    if issubclass(cls, Transform):
        return _made(cls, fields, f"{place}.{name}")
    outer = {n: fields.pop(n) for n in ("steps", "grid", "guidance") if n in fields}
    outer["solver"] = _made(cls, fields, f"{place}.{name}")
    return _made(Sampler, outer, f"{place}.{name}", grids)


def class_of(name: str, place: str = "") -> type:
    """Return the class of a method's name, `name` or `name.Class`.

    Raises:
        RecipeError: no such method, or it is none that a recipe can apply; gives the nearest name.
    """
    cards = methods()
    base, _, second = name.partition(".")
    if base not in cards:
        raise RecipeError(f"{place}: no method {base!r}{nearest(base, cards)}")
    found = {c.__name__: c for c in cards[base].classes}
    if second and second not in found:
        raise RecipeError(f"{place}: {base} has no class {second!r}{nearest(second, found)}")
    cls = found[second] if second else cards[base].classes[0]
    if not issubclass(cls, (Transform, Solver)):
        raise RecipeError(f"{place}: {name} is a {cls.__mro__[1].__name__}, nothing to apply")
    return cls


def _made(cls: type, fields: Any, place: str, module: Any = None) -> Any:
    try:
        return build(cls, fields, place, module)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _changed(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, as plain data."""
    usual = defaults_of(type(value))
    same = [n for n in names_of(type(value)) if n in usual and getattr(value, n) == usual[n]]
    try:
        return dump_fields(value, type(value).__name__, skip=same)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _dump_item(item: Item) -> dict[str, Any]:
    value = item.solver if isinstance(item, Sampler) else item
    fields = _changed(value)
    if isinstance(item, Sampler):
        rest = _changed(item)
        rest.pop("solver", None)
        fields |= rest
    return {name_of(type(value)): fields}


def name_of(cls: type) -> str:
    """Return the name under which a recipe finds a class."""
    for card in methods().values():
        if cls in card.classes:
            first = card.classes[0] is cls
            return card.name if first else f"{card.name}.{cls.__name__}"
    raise RecipeError(f"{cls.__name__} has no card: decorate it with @method")


@dataclass
class Slim:
    """A pipeline with a recipe on it; the pipeline stays a diffusers pipeline.

    pipe: changed in place. before: the pipeline as it was, sharing all untouched parts; None if
    it was not kept. applied: (component, handle) in the order of application; noted: their reports.
    """

    pipe: DiffusionPipeline
    recipe: Recipe
    applied: list[tuple[str, Applied]]
    before: DiffusionPipeline | None
    scheduler: Any
    noted: list[dict[str, Any]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """How the recipe wants the pipeline called: steps and guidance, where it says so."""
        return call_settings(self.recipe)

    def reports(self) -> list[dict[str, Any]]:
        """Return what each transform said it did, in numbers, when it had been put on."""
        return list(self.noted)

    def undo(self) -> DiffusionPipeline:
        """Take everything off again, last first: the original back, bit for bit."""
        for _, handle in reversed(self.applied):
            handle.detach()
        self.applied, self.noted = [], []
        self.pipe.register_modules(scheduler=self.scheduler)
        return self.pipe

    def save(self, folder: str | Path) -> Path:
        """Write the pipeline, whole or not at all; `effuse.load(folder)` brings it back."""
        from effuse.bridge import store

        return store.save(
            self.pipe, folder, self.applied, extra={"recipe.yaml": self.recipe.to_yaml()}
        )

    def report(self, out: str | Path, **settings: Any) -> Any:
        """Measure before and after on the same prompts and seeds and write the page to `out`."""
        from effuse.report import Entry, compare

        if self.before is None:
            raise ValueError("the original was not kept: slim(..., keep_original=True)")
        entries = {
            "before": Entry(self.before),
            "after": Entry(
                self.pipe,
                steps=self.settings.get("num_inference_steps"),
                guidance=self.settings.get("guidance_scale"),
            ),
        }
        return compare(
            entries, out=out, recipe=self.recipe.to_yaml(), reports=self.reports(), **settings
        )


def call_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the pipeline arguments a recipe asks for."""
    sampler = recipe.sampler
    out: dict[str, Any] = {}
    if sampler and sampler.steps is not None:
        out["num_inference_steps"] = sampler.steps
    if sampler and sampler.guidance is not None:
        out["guidance_scale"] = sampler.guidance
    return out


def network_name(pipe: DiffusionPipeline) -> str:
    """Return the name of the denoising network's component: "unet" or "transformer"."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise TypeError(
        f"{type(pipe).__name__} has neither a unet nor a transformer: expected a classic pipeline"
    )


def load(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline: `house:NAME`, a folder saved by effuse, a diffusers folder or a hub id.

    Further arguments go to `DiffusionPipeline.from_pretrained`.
    """
    name = str(source)
    if name.startswith("house:"):
        from effuse import house

        return house.load(name.removeprefix("house:"), **kwargs)
    from effuse.bridge import store

    return store.load(source, **kwargs)


def slim(
    pipe: DiffusionPipeline | str | Path,
    recipe: str | Path | Mapping[str, Any] | Iterable[Item] | Recipe,
    *,
    keep_original: bool = True,
    progress: bool = True,
) -> Slim:
    """Apply a recipe to a pipeline, in place.

    Args:
        pipe: a diffusers pipeline, or what `load` takes.
        recipe: what `parse` takes: a file, a mapping, or a list of transforms and samplers.
        keep_original: keep a copy of the network, to compare with and to heal from.
        progress: show progress bars.

    Returns:
        The pipeline with its handles; `save`, `report` or `undo` it.

    Raises:
        RecipeError: the recipe is wrong; nothing has been touched.
    """
    plan = parse(recipe)
    if isinstance(pipe, (str, Path)):
        pipe = load(pipe)
    part = network_name(pipe)
    network: nn.Module = getattr(pipe, part)
    needs_teacher = plan.healing.steps > 0 and any(t.calibrated for t in plan.transforms)
    original = copy.deepcopy(network) if keep_original or needs_teacher else None
    out = Slim(pipe, plan, [], None, pipe.scheduler)
    if keep_original:
        out.before = type(pipe)(**{**_parts(pipe), part: original})
    drawn: list[dict[str, Any]] = []

    def batches() -> list[dict[str, Any]]:
        if not drawn:
            drawn.extend(_batches(out.before or pipe, plan))
        return drawn

    try:
        for item in plan.items:
            if isinstance(item, Sampler):
                _set_scheduler(pipe, item)
                continue
            handle = item.attach(getattr(pipe, part))
            out.applied.append((part, handle))
            if item.calibrated:
                handle.observe([b["call"] for b in batches()[: plan.calibration.calls]])
            if plan.healing.steps and original is not None:
                objective = handle.objective(original)
                if objective is not None:
                    heal(objective, batches(), plan.healing, progress=progress)
            out.noted.append({"method": name_of(type(item)), "component": part, **handle.report()})
    except BaseException:
        out.undo()
        raise
    return out


def _parts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the constructor arguments that make a second pipeline of the same parts."""
    return {
        n: getattr(pipe, n) for n in pipe._get_signature_keys(type(pipe))[0] if n in pipe.config
    } | {n: v for n, v in pipe.config.items() if n in pipe._get_signature_keys(type(pipe))[1]}


def _set_scheduler(pipe: DiffusionPipeline, item: Sampler) -> None:
    from effuse.bridge.scheduler import scheduler

    pipe.register_modules(scheduler=scheduler(item.solver, pipe.scheduler, grid=item.grid))


def _batches(pipe: DiffusionPipeline, plan: Recipe) -> list[dict[str, Any]]:
    """Return network calls with their targets: those to observe first, more to heal on."""
    from effuse.compress.calibrate import uniform_calls

    how = plan.calibration
    return uniform_calls(
        pipe,
        how.prompts,
        count=max(how.calls, min(plan.healing.steps, 512)),
        batch=how.batch,
        steps=how.steps,
        seed=how.seed,
    )


def heal(
    objective: Objective, batches: Sequence[Any], how: Healing, *, progress: bool = True
) -> None:
    """Train a pruned network on the original's answers to recorded calls."""
    import torch

    from effuse.core.training import fit, warmup_cosine

    (player,) = objective.players
    done = fit(
        objective,
        batches,
        torch.optim.AdamW(objective.parameters_of(player), lr=how.lr, weight_decay=0.0),
        steps=how.steps,
        rng=torch.Generator().manual_seed(how.seed),
        schedule=warmup_cosine(),
        ema=how.ema,
        progress=progress,
    )
    if done.ema is not None:
        done.ema.copy_to()
    objective.eval()
