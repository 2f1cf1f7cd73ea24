"""The page: figures as words, plots as inline SVG, one self-contained HTML file."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from effuse.ops.picture import data_uri

if TYPE_CHECKING:
    from .comparison import Comparison, Result, Score


@dataclass(frozen=True)
class Cell:
    """A figure, its interval or a remark, and how it stands to the first pipeline's."""

    value: str
    note: str = ""
    relative: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """A measure over all pipelines; `about` explains it, `group` is the heading it stands under."""

    group: str
    label: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Headline:
    """A large figure: what it is, and the interval or the two values behind it."""

    figure: str
    label: str
    detail: str
    tone: str


def figures(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits and no exponent for usual sizes."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", "−")


def scaled(value: float, unit: str) -> str:
    """Return a count with a decimal prefix: 1.23 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{figures(value / size)} {prefix}{unit}"
    return f"{figures(value)} {unit}".strip()


def duration(seconds: float) -> str:
    """Return seconds, or milliseconds under one."""
    return f"{figures(seconds)} s" if seconds >= 1 else f"{figures(seconds * 1e3)} ms"


def between(low: float, high: float, show: Callable[[float], str] = figures) -> str:
    """Return an interval in words; nothing where there is none."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{show(low)} to {show(high)}"


def _factor(ratio: float) -> str:
    return f"{figures(ratio, 2 if ratio < 10 else 3)}×"


_COSTS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    (
        "macs_per_image",
        "MACs per picture",
        "multiply-accumulates of text encoder, all network calls and decoder; exact",
        lambda v: scaled(v, ""),
    ),
    (
        "macs_per_call",
        "MACs per network call",
        "mean over the calls of one picture; exact",
        lambda v: scaled(v, ""),
    ),
    ("network_calls", "network calls", "per picture; exact", str),
    (
        "evaluations",
        "rows evaluated",
        "per picture: guidance in a double batch makes two a call; exact",
        str,
    ),
    ("parameters", "parameters", "of all networks, shared ones once", lambda v: scaled(v, "")),
    ("bytes_on_disk", "size on disk", "", lambda v: scaled(v, "B")),
    (
        "bytes_in_memory",
        "weights in memory",
        "parameters and buffers as held",
        lambda v: scaled(v, "B"),
    ),
    (
        "peak_bytes",
        "peak memory beside weights",
        "most bytes of tensors held at once while one picture is drawn",
        lambda v: scaled(v, "B"),
    ),
    ("seconds_per_image", "seconds per picture", "", duration),
    (
        "processor_seconds",
        "processor time per picture",
        "over all threads; other programs on the machine hardly move it",
        duration,
    ),
)

_SCORES: tuple[tuple[str, str, str, str], ...] = (
    ("text_image", "text-image score", "mean cosine of picture and prompt, house:clip", ""),
    ("retrieval", "own prompt found first", "fraction of pictures nearest to their prompt", ""),
    ("frechet", "Fréchet distance", "squared, between Gaussians fitted to features", ""),
    ("kid", "KID", "unbiased kernel distance; below zero means equal within chance", ""),
    ("precision", "precision", "fraction of pictures inside the reference manifold", ""),
    ("recall", "recall", "fraction of the reference inside the pictures' manifold", ""),
    ("psnr", "PSNR to the first", "the same noise through both", " dB"),
    ("ssim", "SSIM to the first", "the same noise through both", ""),
    ("feature_distance", "feature distance to the first", "1 − cosine, the same noise", ""),
)


def table(found: Comparison) -> list[Row]:
    """Return every measure that at least one pipeline has."""
    rows, results = [], list(found.results.values())
    first = results[0].cost
    for key, label, about, show in _COSTS:
        cells = []
        for r in results:
            value, note, relative, tone = getattr(r.cost, key), "", "", ""
            start = getattr(first, key)
            if key == "seconds_per_image":
                note = between(*r.cost.seconds_interval, duration)
                about = f"median of {r.cost.rounds}, taken in turn, {_threads(r)}"
            if key == "processor_seconds":
                note = between(*r.cost.processor_interval, duration)
            if key == "bytes_on_disk":
                saved = r.cost.folder
                note = "files of its folder" if saved else "weights alone, as they would be saved"
            if r is not results[0] and start > 0 and value > 0:
                ratio = r.cost.ratio if key == "seconds_per_image" else value / start
                relative = "equal" if value == start else f"{figures(ratio)} of it"
                tone = "good" if ratio < 0.995 else "bad" if ratio > 1.005 else ""
            cells.append(Cell(show(value), note, relative, tone))
        rows.append(Row("Cost", label, about, tuple(cells)))
    for key, label, about, unit in _SCORES:
        scores = [r.scores.get(key) for r in results]
        if any(scores):
            note = next(s.note for s in scores if s)
            rows.append(
                Row(
                    "Quality",
                    label,
                    "; ".join(p for p in (about, note) if p),
                    tuple(_cell(s, scores[0], unit) for s in scores),
                )
            )
    return rows


_STEPS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("macs_per_image", "MACs per picture", lambda v: scaled(v, "")),
    ("network_calls", "calls", str),
    ("parameters", "parameters", lambda v: scaled(v, "")),
    ("bytes_in_memory", "weights in memory", lambda v: scaled(v, "B")),
    ("processor_seconds", "processor time", duration),
)


def ablation(found: Comparison) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Return the heads and the rows of the table of steps: each held against the one before."""
    if not found.stages:
        return [], []
    results = list(found.results.items())
    rows = [(results[0][0], results[0][1]), *((s.name, s.result) for s in found.stages)]
    known = [row for row in _SCORES if any(row[0] in s.result.scores for s in found.stages)]
    heads = [label for _, label, _ in _STEPS]
    kept = any(s.result.kept for s in found.stages)
    heads += ["text-image score kept"] if kept else []
    heads += [label for key, label, _, _ in known if key in ("frechet", "psnr")]
    out: list[tuple[str, list[Cell]]] = []
    before: Result | None = None
    for name, r in rows:
        cells = []
        for key, _, show in _STEPS:
            value, relative, tone = getattr(r.cost, key), "", ""
            last = getattr(before.cost, key) if before is not None else 0
            if last and value != last:
                change = figures(100 * (value / last - 1), 2)
                relative = f"{'' if value < last else '+'}{change}%"
                tone = "good" if value < last else "bad"
            cells.append(Cell(show(value), "", relative, tone))
        if kept:
            share = r.kept
            cells.append(
                Cell(f"{share.value:.1%}", _percents(share)) if share else Cell("100%", "")
            )
        for key, _, _, unit in known:
            if key in ("frechet", "psnr"):
                score = r.scores.get(key)
                cells.append(
                    Cell(figures(score.value) + unit, between(*score.interval))
                    if score
                    else Cell("–")
                )
        out.append((name if before is None else f"+ {name}", cells))
        before = r
    return heads, out


def _percents(score: Score) -> str:
    return between(*score.interval, lambda v: f"{v:.1%}")


def _threads(result: Result) -> str:
    n = result.cost.threads
    where = "" if result.cost.device == "cpu" else f" on {result.cost.device}"
    return f"{n} thread{'s' if n > 1 else ''}{where}"


def _cell(score: Score | None, first: Score | None, unit: str) -> Cell:
    if score is None:
        return Cell("–", "held against itself")
    tone = ""
    if first is not None and score is not first:
        apart = (
            score.interval[0] > first.interval[1]
            if score.better == "higher"
            else score.interval[1] < first.interval[0]
        )
        worse = (
            score.interval[1] < first.interval[0]
            if score.better == "higher"
            else score.interval[0] > first.interval[1]
        )
        tone = "good" if apart else "bad" if worse else ""
    return Cell(figures(score.value) + unit, between(*score.interval), "", tone)


def _versus(ratio: float, less: str, more: str) -> tuple[str, str, str]:
    """Return figure, word and tone of a cost that became `ratio` times what it was."""
    if 0.995 <= ratio <= 1.005:
        return "1×", f"the same {more.removeprefix('more ')}", ""
    if ratio < 1:
        return _factor(1 / ratio), less, "good"
    return _factor(ratio), more, "bad"


def headlines(found: Comparison) -> list[Headline]:
    """Return what a reader must see first: the last pipeline against the first."""
    results = list(found.results.values())
    if len(results) < 2:
        c = results[0].cost
        return [
            Headline(
                scaled(c.macs_per_image, ""), "MACs per picture", f"{c.network_calls} calls", ""
            ),
            Headline(
                scaled(c.bytes_on_disk, "B"),
                "on disk",
                f"{scaled(c.parameters, '')} parameters",
                "",
            ),
            Headline(
                duration(c.seconds_per_image),
                "per picture",
                between(*c.seconds_interval, duration),
                "",
            ),
        ]
    a, b = results[0].cost, results[-1].cost
    out = []
    for before, after, show, less, more in (
        (a.macs_per_image, b.macs_per_image, lambda v: scaled(v, ""), "fewer MACs", "more MACs"),
        (a.bytes_on_disk, b.bytes_on_disk, lambda v: scaled(v, "B"), "smaller", "larger"),
    ):
        figure, word, tone = _versus(after / before, less, more)
        word = "the same size" if word == "the same larger" else word
        out.append(Headline(figure, word, f"{show(before)} → {show(after)}, exact", tone))
    figure, word, tone = _versus(b.ratio, "faster", "slower")
    word = "the same speed" if word.startswith("the same") else word
    low, high = b.ratio_interval
    if low < 1 < high:
        tone = ""
    ends = (1 / high, 1 / low) if b.ratio < 1 else (low, high)
    around = between(*ends, _factor)
    pair = f"{duration(a.seconds_per_image)} → {duration(b.seconds_per_image)}"
    out.append(Headline(figure, word, f"{around}; {pair}" if around else pair, tone))
    out.append(_quality(results))
    return out


def _quality(results: list[Result]) -> Headline:
    """Return how much of the quality was kept, by the best measure at hand."""
    last = results[-1]
    if last.kept is not None and last.kept.value > 0 and math.isfinite(last.kept.value):
        low, high = (f"{v:.1%}" for v in last.kept.interval)
        tone = "bad" if last.kept.interval[1] < 0.97 else "good" if last.kept.value >= 0.97 else ""
        return Headline(
            f"{last.kept.value:.1%}", "of the text-image score", f"{low} to {high}", tone
        )
    for key, label, unit in (
        ("feature_distance", "feature distance to the original", ""),
        ("psnr", "PSNR to the original", " dB"),
    ):
        if key in last.scores:
            s = last.scores[key]
            return Headline(figures(s.value) + unit, label, between(*s.interval), "")
    return Headline("–", "quality not judged", "no feature network at hand", "")


# Colors that matplotlib is told, and what they become: the page's own, so plots follow the theme.
_INK = {"#010203": "var(--ink)", "#010204": "var(--muted)", "#010205": "var(--line)"}
_MARK = {"#010206": "var(--accent)", "#010207": "var(--first)"}


def plots(found: Comparison) -> list[tuple[str, str]]:
    """Return (description, SVG) of quality against each cost; the better corner is upper left."""
    results = found.results
    choices = {
        "text_image": "text-image score",
        "frechet": "Fréchet distance",
        "psnr": "PSNR to the first",
    }
    known = [k for k in choices if all(k in r.scores for r in results.values())]
    if len(results) < 2 or not known:
        return []
    label = choices[known[0]]
    scores = {n: r.scores[known[0]] for n, r in results.items()}
    macs, macs_scale = _unit(max(r.cost.macs_per_image for r in results.values()))
    size, size_scale = _unit(max(r.cost.bytes_on_disk for r in results.values()))
    axes = (
        ("macs_per_image", f"{macs}MACs per picture", macs_scale, None),
        ("seconds_per_image", "seconds per picture", 1.0, "seconds_interval"),
        ("bytes_on_disk", f"{size}B on disk", size_scale, None),
    )
    return [
        (
            f"{label} against {name}: "
            + "; ".join(
                f"{n} {figures(scores[n].value)} at {figures(getattr(r.cost, cost) * scale)}"
                for n, r in results.items()
            ),
            _pareto(results, scores, label, cost, name, scale, interval, f"p{i}"),
        )
        for i, (cost, name, scale, interval) in enumerate(axes)
    ]


def _unit(most: float) -> tuple[str, float]:
    """Return the decimal prefix that suits a largest value, and what to multiply by."""
    return next((u for u in (("G", 1e-9), ("M", 1e-6), ("k", 1e-3)) if most * u[1] >= 1), ("", 1.0))


def _pareto(
    results: Mapping[str, Result],
    scores: Mapping[str, Score],
    label: str,
    cost: str,
    name: str,
    scale: float,
    interval: str | None,
    prefix: str,
) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, muted, line = _INK
    accent, start = _MARK
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": ink,
        "axes.labelcolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "axes.edgecolor": line,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.7, 2.9), layout="constrained")
        axes = figure.add_subplot()
        front = _front(results, scores, cost)
        at = {n: getattr(r.cost, cost) * scale for n, r in results.items()}
        ends_at: dict[str, float] = {}
        if len(front) > 1:
            axes.plot(
                [at[n] for n in front],
                [scores[n].value for n in front],
                color=line,
                lw=1.5,
                zorder=1,
            )
        for i, (n, r) in enumerate(results.items()):
            s, color = scores[n], start if i == 0 else accent
            low, high = s.interval
            up = None if math.isnan(low) else [[max(s.value - low, 0)], [max(high - s.value, 0)]]
            across = None
            if interval:
                ends = getattr(r.cost, interval)
                if not math.isnan(ends[0]):
                    across = [[max(at[n] - ends[0] * scale, 0)], [max(ends[1] * scale - at[n], 0)]]
            axes.errorbar(
                at[n], s.value, yerr=up, xerr=across, fmt="o", ms=7, color=color, lw=1.4, zorder=2
            )
            ends_at[n] = at[n] + (across[1][0] if across else 0)
            right = at[n] > 0.6 * max(at.values())
            # labels of points that (nearly) coincide go one under the other
            near = [m for m in list(at)[:i] if abs(at[m] - at[n]) < 0.1 * max(at.values())]
            axes.annotate(
                n,
                (at[n], s.value),
                xytext=(-9 if right else 9, 7 - 14 * len(near)),
                textcoords="offset points",
                ha="right" if right else "left",
                color=ink,
                zorder=3,
            )
        axes.set_xlim(0, max(ends_at.values()) * 1.08)
        axes.margins(y=0.22)
        axes.set_xlabel(name)
        axes.set_ylabel(label)
        if next(iter(scores.values())).better == "lower":
            axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3)
        axes.locator_params(nbins=5)
        axes.grid(axis="y", color=line, lw=0.6)
        axes.set_axisbelow(True)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), prefix)


def _front(results: Mapping[str, Result], scores: Mapping[str, Score], cost: str) -> list[str]:
    """Return the names that no other beats in both, by rising cost."""
    sign = 1 if next(iter(scores.values())).better == "higher" else -1
    best, out = -math.inf, []
    for n in sorted(
        results, key=lambda n: (getattr(results[n].cost, cost), -sign * scores[n].value)
    ):
        if sign * scores[n].value > best:
            best = sign * scores[n].value
            out.append(n)
    return out


def _inline(svg: str, prefix: str) -> str:
    """Return a matplotlib SVG fit for a page: no namespaces or metadata, own ids, theme colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg
    )
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for color, name in (_INK | _MARK).items():
        svg = svg.replace(color, name)
    return svg.strip()


def cards(found: Comparison, shown: int) -> list[dict[str, Any]]:
    """Return the pictures to show: each prompt once, then again with other seeds."""
    first_seen: dict[str, int] = {}
    for i, label in enumerate(found.labels):
        first_seen.setdefault(label, i)
    once = list(first_seen.values())
    order = [*once, *(i for i in range(len(found.labels)) if i not in set(once))]
    return [
        {
            "label": found.labels[i],
            "seed": found.seeds[i],
            "pictures": [
                {"name": n, "uri": data_uri(p[i]), "alt": f"{found.labels[i]}, drawn by {n}"}
                for n, p in found.pictures.items()
            ],
        }
        for i in order[:shown]
    ]


def _reports(found: Comparison) -> list[dict[str, Any]]:
    out = []
    for report in found.reports:
        plain = {
            k.replace("_", " "): figures(v, 4) if isinstance(v, float) else str(v)
            for k, v in report.items()
            if isinstance(v, (int, float, str)) and k not in ("method", "component")
        }
        out.append(
            {
                "method": report.get("method", "step"),
                "component": report.get("component", ""),
                "facts": plain,
            }
        )
    return out


def render(found: Comparison, shown: int = 12) -> str:
    """Return the page as the text of one HTML file that asks for nothing from outside."""
    from jinja2 import Environment, StrictUndefined

    names = list(found.results)
    uncounted = sorted({u for r in found.results.values() for u in r.cost.uncounted})
    sizes = next(iter(found.pictures.values())).shape
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("effuse.report").joinpath("template.html").read_text(encoding="utf-8")
    )
    groups: dict[str, list[Row]] = {}
    for row in table(found):
        groups.setdefault(row.group, []).append(row)
    return template.render(
        names=names,
        title=" and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others",
        headlines=headlines(found),
        cards=cards(found, shown),
        side=sizes[-1],
        groups=groups,
        plots=plots(found),
        settings={n: r.settings for n, r in found.results.items()},
        found=found,
        count=len(found.labels),
        reports=_reports(found),
        steps=ablation(found),
        level=f"{found.level:.0%}",
        uncounted=uncounted,
    )
