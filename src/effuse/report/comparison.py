"""Compares pipelines: draws, measures, judges, and writes the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effuse.core.contracts import Metric
from effuse.core.files import claimed, write_whole
from effuse.core.machine import machine, versions
from effuse.evaluate import cost, quality
from effuse.ops.stats import bootstrap

from .draw import STEPS, Condition, Entry, checked, draw_some, kind_of, words

PAGE, RAW, SUMMARY = "index.html", "report.json", "summary.json"


@dataclass(frozen=True)
class Score:
    """One value of one metric, with its interval; `note` says what it rests on."""

    value: float
    interval: tuple[float, float]
    unit: str
    better: Literal["higher", "lower"]
    count: int
    note: str = ""


@dataclass(frozen=True)
class Result:
    """What was found of one pipeline. kept: see `Comparison.compare_kept`."""

    settings: Mapping[str, Any]
    cost: cost.Cost
    scores: Mapping[str, Score]
    kept: Score | None = None


@dataclass(frozen=True)
class Stage:
    """The pipeline as it stood after one step of a recipe, and what was found of it then."""

    name: str
    result: Result


@dataclass(frozen=True)
class Comparison:
    """All that was found, raw; the first pipeline is what the others are compared with.

    pictures: (N, 3, H, W) by name, not in the json. labels, seeds: of each picture.
    stages: the pipeline after each step of the recipe, in order; the last is the last result.
    """

    results: Mapping[str, Result]
    pictures: Mapping[str, Tensor]
    labels: Sequence[str]
    seeds: Sequence[int]
    level: float = 0.95
    recipe: str = ""
    command: str = ""
    reports: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Stage] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def path(self) -> Path:
        """The page."""
        if self.folder is None:
            raise ValueError("nothing was written: compare(..., out=FOLDER)")
        return self.folder / PAGE

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain data."""
        return _plain(
            {
                "format": 1,
                "pipelines": {name: _raw(r) for name, r in self.results.items()},
                "stages": [{"name": s.name, **_raw(s.result)} for s in self.stages],
                **{
                    k: getattr(self, k)
                    for k in ("labels", "seeds", "level", "recipe", "command", "reports")
                },
                **{k: getattr(self, k) for k in ("notes", "versions", "machine")},
            }
        )

    def to_json(self) -> str:
        """Return everything but the pictures as json; what is not finite becomes null."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def summary(self) -> dict[str, dict[str, float | int | None]]:
        """Return the few figures that matter, by pipeline."""
        out = {}
        for name, r in self.results.items():
            scores = {k: s.value for k, s in r.scores.items()}
            scores["text_image_score"] = scores.pop("text_image", math.nan)
            costs = {
                k: getattr(r.cost, k)
                for k in (
                    "macs_per_image",
                    "bytes_on_disk",
                    "seconds_per_image",
                    "network_calls",
                    "parameters",
                    "evaluations",
                    "macs_per_call",
                    "bytes_in_memory",
                    "peak_bytes",
                    "processor_seconds",
                )
            }
            scores.setdefault("frechet", math.nan)
            out[name] = _plain({**costs, **scores})
        return out

    def header(self) -> list[str]:
        """Return the heads of the columns of `rows`."""
        return ["", *self.results]

    def rows(self) -> list[list[str]]:
        """Return a line of text a measure, for a terminal."""
        from .page import table

        return [
            [f"{row.label}", *(" ".join(p for p in (c.value, c.note) if p) for c in row.cells)]
            for row in table(self)
        ]


def _raw(result: Result) -> dict[str, Any]:
    return {
        "settings": result.settings,
        "cost": asdict(result.cost),
        "scores": {k: asdict(s) for k, s in result.scores.items()},
        "kept": result.kept and asdict(result.kept),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def opened(source: Any) -> Entry:
    """Return a pipeline, a name or a folder as an entry."""
    if isinstance(source, Entry):
        return source
    if not isinstance(source, (str, Path)):
        return Entry(source)
    if str(source).startswith("house:"):
        from effuse import house

        return Entry(house.load(str(source)))
    from effuse.bridge import store

    folder = Path(source) if Path(source).is_dir() else None
    return Entry(store.load(source), folder=folder)


def compare(
    entries: Mapping[str, Any] | Sequence[str | Path],
    *,
    prompts: Sequence[Condition] | None = None,
    pictures: int = 48,
    seed: int = 0,
    out: str | Path | None = "report",
    steps: int | None = None,
    guidance: float | None = None,
    rounds: int = 7,
    level: float = 0.95,
    batch: int = 16,
    shown: int = 12,
    features: quality.Features | None = None,
    reference: Tensor | None = None,
    clip: quality.ClipFeatures | None = None,
    recipe: str = "",
    command: str = "",
    reports: Sequence[Mapping[str, Any]] = (),
    stages: Iterable[tuple[str, Any]] = (),
    progress: bool = True,
) -> Comparison:
    """Compare pipelines on the same prompts and seeds, on this machine, and write the page.

    Args:
        entries: by name: an `Entry`, a pipeline, `house:NAME` or a folder; or a list of the latter
            two. The first is what the others are compared with.
        prompts: prompts, or classes; usual ones if None.
        pictures: drawn by each pipeline, prompts in turn; all judged.
        seed: picture i starts from the noise of seed + i.
        out: folder of the page, its raw numbers and summary; new, empty or an older report.
            None writes nothing.
        steps: of entries that do not say; 25 if None.
        guidance: of entries that do not say; the pipeline's own if None.
        rounds: pictures of each that are timed, in turn.
        level: of all intervals.
        batch: pictures drawn at a time for judging.
        shown: pictures on the page.
        features: what judges pictures; EfficientNet-Lite0, or house:clip where its package is not
            installed.
        reference: (M, D) such features of real pictures. By default those of the house for its
            own pipelines; for others, of as many pictures of the first pipeline from other seeds.
        clip: judge of text and picture; house:clip for pipelines of the house, else none.
        recipe: its text, for the page.
        command: how to run this again, for the page.
        reports: what each step of the recipe says it did.
        stages: (step, entry) as the pipeline stood after each step of the recipe, the last step
            first; taken one at a time, so that all may be one pipeline that is being taken apart.
        progress: show a bar.

    Returns:
        All figures; `path` is the page.

    Raises:
        ValueError: bad settings, or a folder that holds something else; before anything is drawn.
    """
    if not isinstance(entries, Mapping):
        entries = {Path(s).name if Path(s).is_dir() else str(s): s for s in entries}
    if not entries:
        raise ValueError("nothing to compare: expected one pipeline or more")
    if pictures < 2:
        raise ValueError(f"pictures={pictures}: expected two or more, intervals need them")
    target = None if out is None else ready(out)
    opened_ = {n: opened(e) for n, e in entries.items()}
    first = next(iter(opened_.values()))
    at_home = of_the_house(first.pipe)
    listed = {
        n: replace(
            e,
            steps=e.steps or steps or STEPS,
            guidance=_guidance(e, guidance, at_home),
        )
        for n, e in opened_.items()
    }
    if len({kind_of(e.pipe) for e in listed.values()}) > 1:
        raise ValueError("pipelines of different kinds: expected all by text, class or neither")
    conditions = checked(first.pipe, prompts)
    asked = [conditions[i % len(conditions)] for i in range(pictures)]
    seeds = [seed + i for i in range(pictures)]
    judges = _judges(at_home, features, reference, clip, kind_of(first.pipe))
    extra = 0 if judges.reference is not None or judges.features is None else pictures
    total = len(listed) * (pictures + 3 + rounds) + extra
    with _Bar(total, progress) as tick:
        drawn = {
            n: draw_some(e, asked, seeds, batch=batch, progress=partial(tick, n))
            for n, e in listed.items()
        }
        if extra:
            others = [s + 1_000_003 for s in seeds]
            judges.renew(
                draw_some(first, asked, others, batch=batch, progress=lambda k: tick("", k))
            )
        draws = {n: _one(e, asked[0], seed) for n, e in listed.items()}
        costs = cost.measure(
            {n: e.pipe for n, e in listed.items()},
            draws,
            folders={n: e.folder for n, e in listed.items()},
            rounds=rounds,
            level=level,
            progress=lambda n: tick(n, 1),
        )
    texts = [words(first.pipe, c) for c in asked]
    scores = _judged(drawn, texts, judges, level)
    results = {
        n: Result(_settings(e), costs[n], scores[n][0], scores[n][1]) for n, e in listed.items()
    }

    def taken_apart() -> Iterator[Stage]:
        start = next(iter(drawn.items()))
        for step, source in stages:
            e = opened(source)
            e = replace(
                e, steps=e.steps or steps or STEPS, guidance=_guidance(e, guidance, at_home)
            )
            with _Bar(pictures, progress) as tick:
                made = draw_some(e, asked, seeds, batch=batch, progress=partial(tick, step))
            spent = cost.measure(
                {step: e.pipe}, {step: _one(e, asked[0], seed)}, rounds=min(rounds, 3), level=level
            )
            judged = _judged({start[0]: start[1], "": made}, texts, judges, level)[""]
            yield Stage(step, Result(_settings(e), spent[step], *judged))

    apart = list(taken_apart())[::-1]
    comparison = Comparison(
        results=results,
        pictures=drawn,
        labels=texts,
        seeds=seeds,
        level=level,
        recipe=recipe.strip(),
        command=command,
        reports=list(reports),
        stages=apart,
        notes=judges.notes,
        versions=versions(),
        machine=machine(),
        folder=target,
    )
    if target is not None:
        _write(comparison, target, shown)
    return comparison


def _one(entry: Entry, condition: Condition, seed: int) -> Callable[[], Tensor]:
    return lambda: draw_some(entry, [condition], [seed])


def _guidance(entry: Entry, guidance: float | None, at_home: bool) -> float | None:
    if entry.guidance is not None or kind_of(entry.pipe) == "none":
        return entry.guidance
    return 4.0 if guidance is None and at_home else guidance


def _settings(entry: Entry) -> dict[str, Any]:
    return {
        "pipeline": type(entry.pipe).__name__,
        "network": type(cost.denoising_network(entry.pipe)).__name__,
        "scheduler": type(entry.pipe.scheduler).__name__,
        "steps": entry.steps,
        "guidance": entry.guidance,
        **entry.call,
    }


def of_the_house(pipe: Any) -> bool:
    """Return whether a pipeline shares its autoencoder, or its whole network, with the house."""
    from effuse.house import store

    for name, folder in (("vae", ("autoencoder",)), ("unet", ("pixels", "unet"))):
        part = getattr(pipe, name, None)
        file = store.WEIGHTS.joinpath(*folder) / "diffusion_pytorch_model.safetensors"
        if part is None or not file.is_file():
            continue
        from safetensors import safe_open

        key = "decoder.conv_out.bias" if name == "vae" else "conv_out.bias"
        own = part.state_dict().get(key)
        with safe_open(file, "pt") as tensors:
            shipped = tensors.get_tensor(key)
        if own is not None and torch.equal(own.cpu().half(), shipped.half()):
            return True
    return False


class Judges:
    """The networks that judge, and the real features they compare with."""

    def __init__(
        self,
        features: quality.Features | None,
        reference: Tensor | None,
        clip: quality.ClipFeatures | None,
        notes: list[str],
    ):
        self.features, self.reference, self.clip, self.notes = features, reference, clip, notes
        self.real = True

    def renew(self, pictures: Tensor) -> None:
        """Take the first pipeline's pictures from other seeds for real ones."""
        assert self.features is not None
        self.reference, self.real = self.features(pictures), False
        self.notes.append(
            "No real pictures are known for this pipeline: distances are to pictures that the "
            "first one drew from other seeds, so its own value is the floor."
        )


def _judges(
    at_home: bool,
    features: quality.Features | None,
    reference: Tensor | None,
    clip: quality.ClipFeatures | None,
    kind: str,
) -> Judges:
    from effuse import house
    from effuse.core.errors import MissingExtra

    notes: list[str] = []
    real = None
    if at_home:
        try:
            if clip is None:
                clip = quality.ClipFeatures(*house.clip())
            real = house.reference()
        except FileNotFoundError as error:
            notes.append(f"Not judged against real pictures: {str(error).split(' (')[0]}.")
    if features is None:
        try:
            size = (real.settings.get("size") if real is not None else None) or 128
            features = quality.EfficientNetFeatures(size)
            if reference is None and real is not None:
                reference = real.features
        except MissingExtra as error:
            if clip is None:
                notes.append(f"Distances between pictures are left out: {error}.")
            else:
                notes.append(f"Pictures are judged by house:clip alone: {error}.")
                features = clip
                if reference is None and real is not None:
                    reference = real.clip
    return Judges(features, reference, clip if kind == "text" else None, notes)


def _judged(
    drawn: Mapping[str, Tensor], texts: Sequence[str], judges: Judges, level: float
) -> dict[str, tuple[dict[str, Score], Score | None]]:
    """Return scores by pipeline, and how much of the first one's quality each has kept."""
    first = next(iter(drawn.values()))
    net, out = judges.features, {}
    seen = {n: net(p) for n, p in drawn.items()} if net is not None else {}
    distinct = list(dict.fromkeys(texts))
    own = torch.tensor([distinct.index(t) for t in texts])
    candidates = judges.clip.text(distinct) if judges.clip is not None else None
    laws = _laws(judges, len(texts))
    first_cosine: Tensor | None = None
    for i, (name, pictures) in enumerate(drawn.items()):
        scores: dict[str, Score] = {}

        def add(
            metric: Metric, *given: Any, note: str = "", scores: dict[str, Score] = scores
        ) -> None:
            metric.update(*given)
            scores[metric.name] = Score(
                metric.compute(),
                metric.interval(level),
                metric.unit,
                metric.better,
                len(given[0]),
                note,
            )

        kept = None
        if judges.clip is not None and candidates is not None:
            vectors = judges.clip(pictures)
            add(quality.TextImage(), vectors, candidates[own])
            if len(distinct) > 1:
                add(quality.Retrieval(candidates), vectors, own, note=f"of {len(distinct)} texts")
            cosine = (vectors * candidates[own]).sum(1).double()
            if first_cosine is None:
                first_cosine = cosine
            kept = _kept(cosine, first_cosine, level)
        for metric, note in laws:
            metric.reset()
            add(metric, seen[name], note=note)
        if i and pictures.shape == first.shape:
            add(quality.Psnr(), pictures, first)
            if min(pictures.shape[-2:]) >= 11:
                add(quality.Ssim(), pictures, first)
        if i and net is not None:
            start = next(iter(seen.values()))
            add(quality.FeatureDistance(), seen[name], start, note=net.name)
        out[name] = scores, kept
    return out


def _laws(judges: Judges, count: int) -> list[tuple[Metric, str]]:
    """Return the metrics that hold `count` pictures against the reference, with their notes."""
    if judges.reference is None or judges.features is None or count < 2:
        return []
    real, what = judges.reference, judges.features.name
    # at most half as many components as pictures, or the fitted covariance is singular
    components = max(1, min(64, count // 2, real.shape[1], len(real) - 1))
    distance = quality.Frechet(real, components)
    note = f"{what}, first {components} principal components"
    if judges.real and count <= len(real) - 2:
        note += f"; as many real pictures: {distance.floor(count):.3g}"
    out: list[tuple[Metric, str]] = [(distance, note), (quality.Kid(real), what)]
    if min(count, len(real)) > 3:
        out += [(quality.Precision(real), what), (quality.Recall(real), what)]
    return out


def _kept(cosine: Tensor, first: Tensor, level: float) -> Score:
    """Return mean over mean of the text-image score, resampled in pairs."""
    pairs = torch.stack([cosine, first], 1)

    def share(p: Tensor) -> Tensor:
        both = p.mean(0)
        return both[0] / both[1]

    around = bootstrap(pairs, share, level=level)
    return Score(float(share(pairs)), around, "fraction", "higher", len(pairs))


class _Bar:
    """A progress bar with the time left; `tick(name, pictures)`."""

    def __init__(self, total: int, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("comparing"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} pictures, {task.fields[name]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not shown,
        )
        self.task = self.progress.add_task("", total=total, name="")

    def __enter__(self) -> Callable[[str, int], None]:
        self.progress.start()
        return lambda name, count: self.progress.update(self.task, advance=count, name=name)

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()


def ready(out: str | Path) -> Path:
    """Return the folder for a report, or complain before anything is drawn."""
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RAW).is_file():
        raise ValueError(f"{folder} holds other things: expected a new or empty folder")
    with claimed(folder):
        return folder


def _write(comparison: Comparison, folder: Path, shown: int) -> None:
    from .page import render

    summary = json.dumps(comparison.summary(), indent=1, allow_nan=False) + "\n"
    files = {RAW: comparison.to_json(), SUMMARY: summary, PAGE: render(comparison, shown)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(folder / name, text)
