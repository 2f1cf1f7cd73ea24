"""CODE against SDEdit: outliers and clipping, image damage and a learned network, the round trip.

Settings are tuned, for every method alike, on samples other than those that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core import Denoiser, Mixture
from effuse.core.clip import Clip
from effuse.ops.stats import bootstrap, paired
from effuse.ops.tensors import randn_like
from effuse.processes import Tabulated
from effuse.proofs import Claim, Evidence, Scale, proof
from effuse.restore import CODE, Band, Editor, Langevin, LogSpaced, SDEdit

ETA = 1.7
Settings = Sequence[tuple[str, Editor]]
Editors = Mapping[str, Settings]
"""Methods, and the settings of each that are tried."""


# The exact curve: a ring of 40 narrow normals in 16 dimensions.


def ring() -> Mixture:
    """Return a closed curve within [-0.8, 0.8]^16, two turns to one, and its exact score."""
    rng = torch.Generator().manual_seed(57)
    phase = 2 * math.pi * torch.rand(16, generator=rng, dtype=torch.float64)
    turns = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(8)
    angle = 2 * math.pi * torch.arange(40, dtype=torch.float64) / 40
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    process = Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))
    return Mixture(process, 0.8 * torch.cos(angle[:, None] * turns + phase), 0.05)


def outliers(x: Tensor) -> Tensor:
    """Return x: (B, 16) with two coordinates at 3.0."""
    out = x.clone()
    out[:, :2] = 3.0
    return out


def shift(x: Tensor) -> Tensor:
    """Return x: (B, 16) with 0.15 added to four coordinates."""
    out = x.clone()
    out[:, :4] += 0.15
    return out


def _toy_editors(scale: Scale) -> Editors:
    depths = scale.pick((0.05, 0.2), (0.025, 0.05, 0.1, 0.2), (0.025, 0.05, 0.1, 0.2, 0.4))
    sizes = scale.pick((1e-3,), (1e-4, 1e-3), (1e-5, 1e-4, 1e-3, 3e-3))
    steps = scale.pick(24, 120, 240)

    def code(band: Band | None) -> Settings:
        return [
            (
                f"depth {d:g}, eps {s:g}",
                CODE(
                    depth=d,
                    corrections=1,
                    langevin=Langevin(s, steps, scale=LogSpaced(1.0)),
                    band=band,
                ),
            )
            for d in depths
            for s in sizes
        ]

    def sdedit(band: Band | None) -> Settings:
        return [
            (f"depth {d:g}, {r} times", SDEdit(d, repeats=r, band=band))
            for d in depths
            for r in (1, 3)
        ]

    trip: list[tuple[str, Editor]] = [
        (f"depth {d:g}", CODE(depth=d, corrections=0)) for d in depths[-2:]
    ]
    return {
        "round trip": trip,
        "SDEdit": sdedit(None),
        "SDEdit + CBC": sdedit(Band(ETA)),
        "CODE": code(None),
        "CODE + CBC": code(Band(ETA)),
    }


def curve(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """A: distance to the clean point on the exact curve, damaged two ways."""
    model = ring()
    seeds = range(scale.pick(1, 3, 5))
    count, rows, claims = scale.pick(16, 32, 64), [], []
    tune = model.draw(count, rng=torch.Generator().manual_seed(1000))
    test = torch.cat([model.draw(count, rng=torch.Generator().manual_seed(s)) for s in seeds])
    editors = dict(_toy_editors(scale))
    for damage in (outliers, shift):
        gaps: dict[str, Tensor] = {}
        tries = dict(editors)
        if damage is outliers:  # the plain way to be rid of them
            tries |= {f"{n}, input clamped": editors[n] for n in ("SDEdit", "CODE")}
        for name, settings in tries.items():
            ahead = (lambda y: y.clamp(-1, 1)) if name.endswith("clamped") else (lambda y: y)
            found = [_gap(model, e, ahead(damage(tune)), tune, 999)[0].mean() for _, e in settings]
            said, editor = settings[int(torch.stack(found).argmin())]
            y = damage(test)
            gap, moved, likely = _gap(model, editor, ahead(y), test, 0, y)
            gaps[name] = gap
            rows.append(
                {
                    "part": "curve",
                    "damage": damage.__name__,
                    "method": name,
                    "setting": said,
                    "settings_tried": len(settings),
                    "calls": editor.calls(model.process),
                    "to_clean": float(gap.mean()),
                    "to_clean_interval": bootstrap(gap),
                    "to_input": float(moved.mean()),
                    "log_likelihood": float(likely.mean()),
                }
            )
        rows.append(
            {
                "part": "curve",
                "damage": damage.__name__,
                "method": "input itself",
                "to_clean": float((damage(test) - test).norm(dim=1).mean()),
                "log_likelihood": float(model.log_prob(damage(test), 1e-3).mean()),
            }
        )
        if damage is outliers:
            for name in ("CODE", "SDEdit"):
                claims.append(
                    _lower(
                        f"clipping to the band lowers the distance of {name} to the clean point by "
                        "a fifth or more, two of 16 coordinates at 3.0",
                        gaps[name],
                        gaps[f"{name} + CBC"],
                        0.8,
                    )
                )
            claims.append(
                _lower(
                    "CODE with the band comes closer than SDEdit with the band, same damage",
                    gaps["SDEdit + CBC"],
                    gaps["CODE + CBC"],
                )
            )
            claims.append(
                _lower(
                    "the band brings CODE closer than clamping the input to [-1, 1] alone",
                    gaps["CODE, input clamped"],
                    gaps["CODE + CBC"],
                )
            )
        else:
            claims.append(
                _lower(
                    "CODE comes closer to the clean point than SDEdit, four coordinates shifted "
                    "by 0.15, exact score",
                    gaps["SDEdit"],
                    gaps["CODE"],
                )
            )
    return claims, rows


def _gap(
    model: Mixture, editor: Editor, y: Tensor, clean: Tensor, seed: int, shown: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return distance to clean and input and the log likelihood, (B,) each; infinite if diverged.

    The likelihood is that of the first noisy level, where CODE ends.
    """
    try:
        out = editor(model, y, rng=torch.Generator().manual_seed(seed)).x
    except FloatingPointError:
        out = torch.full_like(y, torch.inf)
    shown = y if shown is None else shown
    gap, moved = (out - clean).norm(dim=1), (out - shown).norm(dim=1)
    likely = model.log_prob(out.nan_to_num(posinf=1e3), 1e-3)
    return gap, moved, likely


def _lower(
    statement: str, base: Tensor, ours: Tensor, factor: float = 1.0, unit: str = "distance"
) -> Claim:
    """Return the claim that the mean of `ours` is below `factor` times that of `base`, paired."""
    _, interval = paired(ours, base)
    b, m = float(base.mean()), float(ours.mean())
    sure = math.isnan(interval[1]) or interval[1] < 0
    want = "the mean is not lower" if factor == 1 else f"the mean is above {factor:g} of it"
    return Claim(
        statement,
        b,
        m,
        unit,
        "lower",
        m < factor * b and sure,
        f"{want}, or the interval of the difference holds zero",
        interval,
    )


# Damage to pictures, (B, 3, H, W) in [0, 1].


def _smooth(x: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    line = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-(line**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (reach,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(x, kernel.unsqueeze(3), groups=x.shape[1])


def fog(x: Tensor, rng: torch.Generator) -> Tensor:
    """Lay a gray, cloudy veil over it: 55 to 85 percent."""
    cloud = _smooth(torch.randn(len(x), 1, *x.shape[2:], generator=rng), 4.0)
    cloud = cloud / cloud.flatten(1).std(1)[:, None, None, None]
    veil = (0.7 + 0.08 * cloud).clamp(0.55, 0.85)
    return (1 - veil) * x + veil * 0.75


def contrast(x: Tensor, rng: torch.Generator) -> Tensor:
    """Keep a quarter of the contrast around the mean of the picture."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + 0.25 * (x - mean)


def blur(x: Tensor, rng: torch.Generator) -> Tensor:
    """Blur by a Gaussian of 1.5 pixels."""
    return _smooth(x, 1.5)


def occlusion(x: Tensor, rng: torch.Generator) -> Tensor:
    """Put a black block of a third of the side somewhere inside."""
    out, side = x.clone(), x.shape[-1] // 3
    for row in out:
        i, j = torch.randint(side // 2, x.shape[-1] - 3 * side // 2, (2,), generator=rng).tolist()
        row[:, i : i + side, j : j + side] = 0
    return out


def saturation(x: Tensor, rng: torch.Generator) -> Tensor:
    """Overdrive colors threefold and lighten; what leaves the range is cut."""
    gray = x.mean(1, keepdim=True)
    return (gray + 3 * (x - gray) + 0.15).clamp(0, 1)


def noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Add Gaussian noise of deviation 0.2; what leaves the range is cut."""
    return (x + 0.2 * randn_like(x, rng)).clamp(0, 1)


def hot(x: Tensor, rng: torch.Generator) -> Tensor:
    """Put 4 percent of the pixels at twice the range: 2.0 in [0, 1], 3.0 in [-1, 1]."""
    struck = torch.rand(len(x), 1, *x.shape[2:], generator=rng) < 0.04
    return torch.where(struck, 2.0, x)


def white(x: Tensor, rng: torch.Generator) -> Tensor:
    """Put 4 percent of the pixels at white: `hot` after clamping the input."""
    return hot(x, rng).clamp(0, 1)


DAMAGES: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    fog,
    contrast,
    blur,
    occlusion,
    saturation,
    noise,
    hot,
    white,
)


def _picture_editors(scale: Scale) -> Editors:
    levels, even = 40, LogSpaced(1.0)

    def code(band: Band | None) -> Settings:
        out: list[tuple[str, Editor]] = []
        for depth in (0.2, 0.5):
            for size in scale.pick((5e-3,), (1e-3, 1e-2), (1e-3, 5e-3, 2e-2)):
                run = Langevin(size, 16, 2, scale=even)
                one = CODE(levels, depth, run, corrections=1, band=band)
                out.append((f"depth {depth:g}, eps {size:g}", one))
        if scale.size == "proof":
            run = Langevin(5e-3, 16, 2, scale=even)
            tied = CODE(levels, 0.5, run, corrections=1, band=band, threshold=Clip(1.3, 0.98))
            out.append(("depth 0.5, eps 0.005, dynamic threshold", tied))
            run = Langevin(1e-4, 16, 2)
            both = CODE(levels, 1.0, run, corrections=2, shallow=0.2, band=band)
            out.append(("depth 1, eps 0.0001 to 0.01, two levels", both))
        return out

    def sdedit(band: Band | None) -> Settings:
        # (depth, levels, times): about the calls of CODE, which a walk three times as fine needs
        tries = scale.pick(
            ((0.2, 40, 1),),
            ((0.05, 120, 1), (0.1, 120, 1), (0.3, 40, 1)),
            (
                (0.05, 120, 1),
                (0.1, 120, 1),
                (0.2, 120, 1),
                (0.3, 120, 1),
                (0.45, 60, 1),
                (0.6, 60, 1),
                (0.1, 80, 3),
                (0.2, 40, 3),
            ),
        )
        return [(f"depth {d:g}, {r} times", SDEdit(d, n, r, band=band)) for d, n, r in tries]

    return {
        "SDEdit": sdedit(None),
        "SDEdit + CBC": sdedit(Band(ETA)),
        "CODE": code(None),
        "CODE + CBC": code(Band(ETA)),
    }


class Bench:
    """house:pixels, real pictures that it never saw, and the features that judge."""

    def __init__(self, scale: Scale):
        from effuse.bridge.pipeline import wrap
        from effuse.house import clip, load
        from effuse.house.data import pictures

        self.model = wrap(load("pixels"))
        self.model.network.requires_grad_(False)
        self.judge = clip()
        every = pictures()
        whole = ~torch.from_numpy(every.toned)
        unseen = (torch.from_numpy(every.held) & whole).nonzero().flatten()
        seen = (~torch.from_numpy(every.held) & whole).nonzero().flatten()
        rng = torch.Generator().manual_seed(0)
        unseen = unseen[torch.randperm(len(unseen), generator=rng)]
        seen = seen[torch.randperm(len(seen), generator=rng)[: scale.pick(20, 200, 500)]]
        images = torch.from_numpy(every.images)
        self.clean, self.real = (
            F.avg_pool2d(images[some].float() / 255, 2)
            for some in (unseen[: scale.pick(1, 2, 5)], seen)
        )

    def features(self, pictures: Tensor) -> Tensor:
        """Return unit vectors of house:clip, (B, 128)."""
        return self.judge.image_features(pictures)

    def run(self, editor: Editor, y: Tensor, seed: int) -> Tensor:
        """Return pictures edited from y: (B, 3, H, W), about [0, 1]."""
        denoiser: Denoiser = self.model.denoiser if editor.clipped else self.model.bare
        out = editor(denoiser, 2 * y - 1, rng=torch.Generator().manual_seed(seed)).x
        return (out / 2 + 0.5).clamp(0, 1)


class Judged(NamedTuple):
    """Edits of D damages to n pictures, judged: (D, n), and features (D, n, 128)."""

    said: str
    calls: int
    gap: Tensor
    error: Tensor
    moved: Tensor
    features: Tensor


def photographs(bench: Bench, scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """B: eight damages to real pictures, a small network that never saw them."""
    clean, process = bench.clean, bench.model.process
    count, names = len(clean), [d.__name__ for d in DAMAGES]
    rng = torch.Generator().manual_seed(7)
    damaged = torch.cat([d(clean, rng.manual_seed(7)) for d in DAMAGES])
    truth = clean.repeat(len(DAMAGES), 1, 1, 1)

    def judge(said: str, calls: int, out: Tensor) -> Judged:
        found = bench.features(out)
        gap = 1 - (found * bench.features(truth)).sum(1)
        moved = _rmse(out, damaged.clamp(0, 1))
        gap, error, moved = (p.reshape(-1, count) for p in (gap, _rmse(out, truth), moved))
        return Judged(said, calls, gap, error, moved, found.reshape(*gap.shape, -1))

    rows: list[dict[str, Any]] = []
    tried: dict[str, list[Judged]] = {
        "input itself": [judge("", 0, damaged.clamp(0, 1))],
    }
    for name, settings in _picture_editors(scale).items():
        tried[name] = []
        for said, editor in settings:
            # all damages in one batch: a setting costs the calls of one picture
            try:
                out = bench.run(editor, damaged, 0)
            except FloatingPointError:
                rows.append({"part": "pictures", "method": name, "setting": said, "failed": True})
                continue
            tried[name].append(judge(said, editor.calls(process), out))
    for name, judged in tried.items():
        for j in judged:
            for k, d in enumerate(names):
                rows.append(
                    {
                        "part": "pictures",
                        "damage": d,
                        "method": name,
                        "setting": j.said,
                        "calls": j.calls,
                        "features_to_clean": float(j.gap[k].mean()),
                        "to_clean": float(j.error[k].mean()),
                        "to_input": float(j.moved[k].mean()),
                    }
                )
    plain, ours = (tried[n] + tried[f"{n} + CBC"] for n in ("SDEdit", "CODE"))
    chosen = {
        "input itself": tried["input itself"][0].gap,
        "SDEdit": _left_out([j.gap for j in plain]),
        "CODE": _left_out([j.gap for j in ours]),
    }
    for name, gap in chosen.items():
        for k, d in enumerate(names):
            rows.append(
                {
                    "part": "chosen on other pictures",
                    "damage": d,
                    "method": name,
                    "features_to_clean": float(gap[k].mean()),
                }
            )
    where = f"{len(names)} damages to {count} held-out pictures, house:pixels"
    unit = "cosine distance of features"
    claims = [
        _lower(
            f"CODE comes closer to the clean picture than SDEdit: {where}",
            chosen["SDEdit"].flatten(),
            chosen["CODE"].flatten(),
            unit=unit,
        ),
        _lower(
            "CODE comes closer to the clean picture than the input itself, same pictures",
            chosen["input itself"].flatten(),
            chosen["CODE"].flatten(),
            unit=unit,
        ),
        _trade(bench, tried["input itself"][0], plain, ours, rows),
    ]
    struck, alone = names.index("hot"), names.index("white")
    errors = {
        (n, k): _left_out([j.error[k : k + 1] for j in tried[n]]).flatten()
        for n in tried
        for k in (struck, alone)
    }
    for name in ("CODE", "SDEdit"):
        claims.append(
            _lower(
                f"clipping to the band lowers the error of {name} by a fifth or more on pictures "
                "with 4 % of the pixels at twice the range",
                errors[name, struck],
                errors[f"{name} + CBC", struck],
                0.8,
                unit="RMS to the clean picture",
            )
        )
        claims.append(
            _lower(
                f"the band helps {name} more than clamping those pixels to white alone",
                errors[name, alone],
                errors[f"{name} + CBC", struck],
                unit="RMS to the clean picture",
            )
        )
    return claims, rows


def _left_out(tried: Sequence[Tensor]) -> Tensor:
    """Return for each picture the value of the setting that is best on the others.

    tried: (D, n) a setting, to be low; returns (D, n). A damage at a time.
    """
    every = torch.stack(list(tried))  # (S, D, n)
    others = every.sum(-1, keepdim=True) - every
    return every.gather(0, others.argmin(0, keepdim=True))[0]


def _trade(
    bench: Bench,
    start: Judged,
    plain: Sequence[Judged],
    ours: Sequence[Judged],
    rows: list[dict[str, Any]],
) -> Claim:
    """Return the claim on realism at equal distance to the input, which is the paper's own.

    Realism of a setting: kernel distance, over all damages, to other real pictures. The curve of a
    method at distance r: the best of its settings that stay within r, or the input itself. Compared
    is the mean of the curve from 0 to the largest r that both reach.
    """
    from effuse.evaluate.quality import Kid

    real, count = bench.features(bench.real), start.gap.shape[1]

    def realism(j: Judged, keep: list[int]) -> float:
        kid = Kid(real)
        kid.update(j.features[:, keep].flatten(0, 1))
        return kid.compute()

    def area(keep: list[int]) -> tuple[float, float]:
        curves = [
            [(float(j.moved[:, keep].mean()), realism(j, keep)) for j in some]
            for some in (plain, ours)
        ]
        floor = realism(start, keep)
        reach = min(max(r for r, _ in c) for c in curves)
        at = torch.linspace(0, reach, 200).tolist()
        best = [[min([floor, *(v for r, v in c if r <= limit)]) for limit in at] for c in curves]
        if len(keep) == count:
            for name, some, curve in zip(("SDEdit", "CODE"), (plain, ours), curves, strict=True):
                for j, (r, v) in zip(some, curve, strict=True):
                    rows.append(
                        {
                            "part": "trade-off",
                            "method": name,
                            "setting": j.said,
                            "calls": j.calls,
                            "to_input": r,
                            "kid": v,
                        }
                    )
            rows.append(
                {"part": "trade-off", "method": "input itself", "to_input": 0, "kid": floor}
            )
        return sum(best[0]) / len(at), sum(best[1]) / len(at)

    b, m = area(list(range(count)))
    interval = None
    if count > 2:  # the jackknife over pictures
        left = torch.tensor(
            [
                (lambda pair: pair[1] - pair[0])(area([i for i in range(count) if i != k]))
                for k in range(count)
            ]
        )
        error = float(((count - 1) * left.var(unbiased=False)).sqrt())
        interval = (m - b - 1.96 * error, m - b + 1.96 * error)
    return Claim(
        "CODE is more realistic than SDEdit at equal distance to the input, mean along the curve "
        "of all settings",
        b,
        m,
        "squared kernel distance to real pictures",
        "lower",
        m < b and (interval is None or interval[1] < 0),
        "the mean is not lower, or the interval of the difference holds zero",
        interval,
    )


def _rmse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).square().mean(1).sqrt()


def round_trip(bench: Bench | None, scale: Scale) -> tuple[list[Claim], list[dict[str, Any]]]:
    """C: how far encoding and decoding alone are from the input, against the number of levels."""
    model, rows = ring(), []
    x = model.draw(32, rng=torch.Generator().manual_seed(3))
    counts, errors = (50, 100, 200, 400), []
    for levels in counts:
        out = CODE(levels, corrections=0, noise=0.0)(model, x).x
        errors.append(float((out - x).square().mean().sqrt()))
        rows.append({"part": "round trip", "on": "curve", "levels": levels, "error": errors[-1]})
    slope = math.log(errors[1] / errors[-1]) / math.log(counts[-1] / counts[1])
    claims = [
        Claim(
            "the error of the round trip falls at first order in the number of levels, exact score",
            1.0,
            slope,
            "slope of log error, 100 to 400 levels",
            "higher",
            0.8 < slope < 1.3,
            "the slope is not within 0.8 to 1.3",
        )
    ]
    if bench is not None:
        pictures = bench.clean
        for levels in scale.pick((10, 20), (10, 20, 50), (10, 20, 50, 100)):
            for depth in (0.5, 1.0):
                trip = CODE(levels, depth, corrections=0, noise=0.0)
                error = _rmse(bench.run(trip, pictures, 0), pictures)
                rows.append(
                    {
                        "part": "round trip",
                        "on": "house:pixels",
                        "levels": levels,
                        "depth": depth,
                        "calls": trip.calls(bench.model.process),
                        "error": float(error.mean()),
                        "error_interval": bootstrap(error),
                    }
                )
    return claims, rows


@proof("confident_ode")
def prove(scale: Scale) -> Evidence:
    """Clipping repairs outliers; CODE against tuned SDEdit on a curve and on real pictures."""
    claims, rows = curve(scale)
    bench, notes = None, ""
    if scale.size == "smoke":
        notes = "The pictures run from the small size on."
    else:
        try:
            bench = Bench(scale)
        except (ImportError, FileNotFoundError, RuntimeError) as error:
            notes = f"No pictures, as weights or data are missing: {error}"
    more, found = round_trip(bench, scale)
    claims, rows = [*claims, *more], [*rows, *found]
    if bench is not None:
        more, found = photographs(bench, scale)
        claims, rows = [*claims, *more], [*rows, *found]
        notes = (
            "Calls are of the denoiser, a picture. Which setting a method takes for a damage was "
            "chosen on the other pictures, by the distance of house:clip's features to the clean "
            "one. SDEdit may repeat itself three times and keeps the scheduler's clip; both may "
            "take the band. The interval of the trade-off is a jackknife over pictures."
        )
    return Evidence(claims, rows, notes)
