"""A recipe as a value and as a file: read strictly, written back exactly.

The one place where a name becomes a class. In a file:

    methods: [laptop_diff: {keep: 0.75}, int8, momentum: {order: 2, beta: 0.8, steps: 12}]
    calibration: {prompts: 16, steps: 10}
    healing: {minutes: 5}

A field that takes an object is written as the class and its fields: `keys: {Every: {period: 2}}`.
A second class of a method is written with a dot: `momentum.GHVB: {order: 2.7}`. A transform goes
on the denoising network unless it says otherwise: `int8: {component: text_encoder}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from effuse.compress.healing import Answers, Features, Own, Stages  # noqa: F401 - for files
from effuse.core.contracts import Solver, Transform
from effuse.core.errors import RecipeError, check_positive, check_whole
from effuse.core.fields import build, defaults_of, dump_fields, names_of, nearest
from effuse.core.method import methods
from effuse.processes import grids
from effuse.processes.grids import Grid

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


@dataclass(frozen=True)
class On:
    """A transform on another component than the denoising network: `On("text_encoder", Int8())`.

    What is calibrated or healed learns from calls of the denoising network, so it cannot go here.
    """

    component: str
    transform: Transform

    def __post_init__(self) -> None:
        """Check that the transform can do without calls."""
        if self.transform.calibrated or self.transform.kind in ("prune", "rewire", "cache"):
            raise RecipeError(
                f"component={self.component!r}: {type(self.transform).__name__} is made for the "
                "denoising network; leave `component` out"
            )


Item = Transform | Sampler | On


@dataclass(frozen=True)
class Calibration:
    """What transforms observe: network calls without guidance.

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
    """How the network learns from the original after each method that cuts or replaces its parts.

    On the original's own samples, spoiled to all levels, a tenth of them without their prompt; with
    AdamW, warm-up and a cosine down. Off unless `minutes` or `steps` says otherwise; methods share
    both equally. Pictures are judged before and after: where they clearly fit their texts worse, or
    else come no nearer to the original's, the weights from before stay.

    minutes: by the clock, at most; None leaves the end to `steps`, the same every time. steps: at
    most; 0 leaves the end to `minutes`. prompts: one a sample; how many (for the house, captions by
    which it is not judged), or the prompts or labels. guidance: of the samples, the pipeline's own
    if None, 1 for none. features: what is compared: `Own`, `Stages` or `Answers`. lr: highest
    learning rate. rows: of a batch. judged: pictures.
    """

    minutes: float | None = None
    steps: int = 0
    prompts: int | tuple[str | int, ...] = 192
    guidance: float | None = None
    features: Features = field(default_factory=Own)
    lr: float = 3e-4
    rows: int = 16
    judged: int = 36
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_whole("steps", self.steps, 0)
        check_whole("rows", self.rows, 1)
        check_whole("judged", self.judged, 1)
        check_positive("lr", self.lr)
        if self.minutes is not None and not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes={self.minutes!r}: expected a number, not below zero")
        if not isinstance(self.features, Features):
            raise ValueError(
                f"features={self.features!r}: expected Own(), Stages() or Answers(); in a file "
                "{Stages: {}}"
            )

    @property
    def on(self) -> bool:
        """Whether anything is to be healed."""
        return self.minutes != 0 and bool(self.minutes or self.steps)


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
        return tuple(t for t in map(transform_of, self.items) if t is not None)

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
    transform = transform_of(item)
    return "sample" if transform is None else transform.kind


def transform_of(item: Item) -> Transform | None:
    """Return the transform of an item, if it is one."""
    if isinstance(item, On):
        return item.transform
    return item if isinstance(item, Transform) else None


def label_of(item: Item) -> str:
    """Return the name of an item's method, with the component where it is not the usual one."""
    if isinstance(item, On):
        return f"{name_of(type(item.transform))} on {item.component}"
    return name_of(type(item.solver if isinstance(item, Sampler) else item))


def check_order(items: Sequence[Item]) -> None:
    """Raise `RecipeError` if a kind stands after one it must precede, or two items sample."""
    for item in items:
        if not isinstance(item, (Transform, Sampler, On)):
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


def shipped() -> dict[str, str]:
    """Return the recipes that come with the package: the text of each by its name."""
    folder = files("effuse.recipe").joinpath("shipped")
    found = {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def parse(source: str | Path | Mapping[str, Any] | Iterable[Item] | Recipe) -> Recipe:
    """Read a recipe: a shipped name, a YAML file, its contents, or a list of objects.

    Raises:
        RecipeError: an unknown method, class or field (the nearest name is given), a bad value, or
            an order that cannot work. Names the place.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, (str, Path)):
        source = _read(source)
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


def _read(source: str | Path) -> Mapping[str, Any]:
    import yaml

    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif str(source) in shipped():
        text = shipped()[str(source)]
    else:
        known = ", ".join(shipped())
        raise RecipeError(
            f"{source}: no such recipe file, nor a shipped recipe ({known})"
            f"{nearest(str(source), shipped())}"
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise RecipeError(f"{source}: expected a mapping with `methods`, got {type(data).__name__}")
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
        component = fields.pop("component", None)
        made = _made(cls, fields, f"{place}.{name}")
        return made if component is None else On(str(component), made)
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
    value = item.solver if isinstance(item, Sampler) else transform_of(item)
    fields = _changed(value)
    if isinstance(item, On):
        fields["component"] = item.component
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


def call_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the pipeline arguments a recipe asks for."""
    sampler = recipe.sampler
    out: dict[str, Any] = {}
    if sampler and sampler.steps is not None:
        out["num_inference_steps"] = sampler.steps
    if sampler and sampler.guidance is not None:
        out["guidance_scale"] = sampler.guidance
    return out
