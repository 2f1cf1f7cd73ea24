"""The trajectory filter against a random one: narrow modes on the line and in the plane, pictures.

The window is chosen on labelled samples of a network of its own seed, which is not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effuse.core import (
    Denoiser,
    Loss,
    Mixture,
    Objective,
    Prediction,
    Process,
    Step,
    Time,
    fit,
    sample,
)
from effuse.evaluate.hallucination import (
    AtRandom,
    ByScore,
    HallucinationFilter,
    Scored,
    Selection,
    auc,
    choose_window,
    generations,
    removed,
    scored,
)
from effuse.evaluate.testbed import OffSupport, lattice, line
from effuse.evaluate.trajectory import Steps, Trajectory, TrajectoryVariance, Window
from effuse.ops.stats import paired
from effuse.ops.tensors import randn_like, weighted_sum
from effuse.processes import Tabulated
from effuse.proofs import Claim, Evidence, Scale, proof
from effuse.solvers import DDIM
from effuse.solvers.ddim import fresh_noise

STEPS, FIRST = 1000, 420  # above step 420 alpha is below 1e-4: pure noise
TUNING, JUDGED = 1000, 100  # the seed that settings were chosen on, the first that is judged


def process() -> Tabulated:
    """Return the paper's schedule: 1000 betas from 0.001 to 0.2."""
    beta = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


def grid(stride: int = 5, dense: int = 60) -> Tensor:
    """Return levels from step 420: every `stride`-th, and all of the last `dense`."""
    index = torch.cat([torch.arange(FIRST, dense, -stride), torch.arange(dense, -1, -1)])
    return index.double() / STEPS


@dataclass(frozen=True)
class Large(DDIM):
    """Ancestral steps whose noise has the variance of the forward step, as in the paper's code."""

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Always."""
        return True

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Time,
        s: Time,
        state: None = None,
        *,
        rng: torch.Generator | None = None,
    ) -> Step:
        """Return the mean of the reverse step, and noise but for the step to clean data."""
        process, pred = denoiser.process, denoiser(x, t)
        kept, _ = fresh_noise(process, t, s, 1.0)
        mean = weighted_sum((process.alpha(s), pred.x0), (kept, pred.noise))
        large = (1 - (process.alpha(t) / process.alpha(s)) ** 2).sqrt()
        return Step(mean if float(s) == 0 else mean + large * randn_like(x, rng))


class Layers(Denoiser):
    """The paper's network: three residual layers that share one set of weights, told the level."""

    def __init__(self, size: int, process: Process, width: int = 128):
        super().__init__()
        self.process = process
        self.enter, self.leave = nn.Linear(size, width), nn.Linear(width, size)
        self.told = nn.Linear(64, width)
        self.layer, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("rates", torch.exp(torch.linspace(0, math.log(1000), 32)))
        self.act = nn.LeakyReLU(0.02)

    rates: Tensor

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Predict; see `Denoiser.forward`."""
        at = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1) * self.rates
        told = self.told(torch.cat([at.sin(), at.cos()], 1))
        h = self.enter(x)
        for _ in range(3):
            h = h + self.act(self.norm(self.layer(h) + told))
        return self.process.complete(x, t, noise=self.leave(h))


class Denoising(Objective):
    """Mean square of the error in the noise, levels up to the start drawn evenly."""

    def __init__(self, student: Layers):
        super().__init__()
        self.student = student

    def loss(self, player: str, batch: Any, *, rng: torch.Generator | None = None) -> Loss:
        """See `Objective.loss`."""
        x0, process = batch["x0"], self.student.process
        t = (torch.randint(FIRST, (len(x0),), generator=rng) + 1).double() / STEPS
        noise = randn_like(x0, rng)
        pred = self.student(process.corrupt(x0, t, noise), t)
        return Loss((pred.noise - noise).square().mean())


def learn(data: Tensor, seed: int, steps: int, batch: int) -> Layers:
    """Train the network on data: (N, D)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = Layers(data.shape[1], process())
    fit(
        Denoising(student),
        lambda g: {"x0": data[torch.randint(len(data), (batch,), generator=g)]},
        torch.optim.Adam(student.parameters(), 1e-3),
        steps=steps,
        rng=torch.Generator().manual_seed(seed),
        schedule=lambda part: 0.02 + 0.98 * (1 + math.cos(math.pi * min(part, 1.0))) / 2,
        progress=False,
    )
    return student


def draw(
    model: Denoiser, count: int, times: Tensor, window: Window, rng: torch.Generator, size: int
) -> Scored:
    """Sample as the paper does, a few thousand at once, with the score of each."""
    parts = []
    for first in range(0, count, 4000):
        x = torch.randn(min(4000, count - first), size, generator=rng)
        parts.append(scored(model, Large(), x, times, window, rng=rng))
    return Scored(*(torch.cat(p) for p in zip(*parts, strict=True)))


def _row(part: str, out: Scored, judge: OffSupport, **more: Any) -> dict[str, Any]:
    strange = judge.strange(out.x)
    judge.reset()
    judge.update(out.x)
    return {
        "part": part,
        "samples": len(out.x),
        "off_support": judge.compute(),
        "off_support_interval": judge.interval(),
        "auc": auc(out.score, strange),
        "removed_at_96_kept": removed(out.score, strange),
        **more,
    }


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(r[key] for r in rows) / len(rows)


def modes(
    name: str, law: Mixture, scale: Scale, seeds: tuple[int, ...]
) -> tuple[list[Claim], list[dict[str, Any]], Window]:
    """A, B: how well the score tells samples off the support of known modes."""
    size = law.means.shape[1]
    # on the tuning seed the plane is off its support in 78, 30 and 2 % after 6, 20 and 40 thousand
    steps = scale.pick(60, 3000 if size == 1 else 500, 5000 if size == 1 else 40_000)
    batch = 512 if size == 1 else 1024
    count, points = scale.pick(200, 4000, 16_000), 20_000 if size == 1 else 100_000
    times, std = grid(*scale.pick((60, 12), (10, 60), (5, 60))), float(law.std[0])
    judge = OffSupport(law.means, (4 if size == 1 else 5) * std)
    data = law.draw(points, rng=torch.Generator().manual_seed(56)).float()

    tuning = learn(data, TUNING, steps, batch)
    path, rng = Trajectory(tuning), torch.Generator().manual_seed(TUNING)
    few = min(count, 4000)
    x = torch.randn(few, size, generator=rng)
    strange = judge.strange(sample(path, Large(), x, times, rng=rng))
    rows: list[dict[str, Any]] = []
    window = Steps(-10)
    if strange.any() and not strange.all():
        found = choose_window(path.x0, strange)
        window = found.window
        for tried, area, share in found.tried:
            if tried.stop is None:
                rows.append(
                    {
                        "part": f"{name}: windows, tuning seed",
                        "last_steps": -(tried.start or 0),
                        "auc": area,
                        "removed_at_96_kept": share,
                    }
                )
    ratios = window.ratios(law.process, times)
    said = f"steps {window.start} to {window.stop}, ratios {ratios.low:.3g} to {ratios.high:.3g}"
    trained, exact, chance = [], [], []
    for seed in seeds:
        model, rng = learn(data, seed, steps, batch), torch.Generator().manual_seed(seed)
        out = draw(model, count, times, window, rng, size)
        trained.append(_row(f"{name}: network", out, judge, seed=seed, window=said))
        fair = torch.rand(len(out.x), generator=rng)
        chance.append(_row(f"{name}: random score", Scored(out.x, fair), judge, seed=seed))
        out = draw(law, count, times, window, rng, size)
        exact.append(_row(f"{name}: exact score", out, judge, seed=seed))
        x = torch.randn(min(count, 4000), size, generator=rng)
        out = scored(model, DDIM(), x, times, ratios, rng=rng)
        rows.append(_row(f"{name}: network, DDIM", out, judge, seed=seed))
    rows += [*trained, *chance, *exact]
    return (
        [
            Claim(
                f"{name}: the filter removes 80 % or more of the samples off the support, 96 % "
                "of the others kept (the paper: 95 %)",
                _mean(chance, "removed_at_96_kept"),
                _mean(trained, "removed_at_96_kept"),
                "share removed, against a random score",
                "higher",
                _mean(trained, "removed_at_96_kept") >= 0.8,
                "it removes fewer",
            ),
            Claim(
                f"{name}: the score tells them with an area under the curve above 0.75",
                _mean(chance, "auc"),
                _mean(trained, "auc"),
                "AUC, against a random score",
                "higher",
                _mean(trained, "auc") > 0.75,
                "the area is smaller",
            ),
            Claim(
                f"{name}: sampling with the exact score leaves the support a tenth as often",
                _mean(trained, "off_support"),
                _mean(exact, "off_support"),
                "share of samples",
                "lower",
                _mean(exact, "off_support") <= 0.1 * _mean(trained, "off_support"),
                "more often than that",
            ),
        ],
        rows,
        window,
    )


def recursion(law: Mixture, window: Window, scale: Scale) -> tuple[list[Claim], list[Any]]:
    """C: models trained on the samples of models, filtered by score or at random."""
    times = grid(*scale.pick((60, 12), (10, 60), (5, 60)))
    steps, count = scale.pick(60, 2000, 5000), scale.pick(200, 4000, 10_000)
    judge = OffSupport(law.means, 4 * float(law.std[0]))
    seeds = [seed + JUDGED for seed in scale.seeds[: scale.pick(1, 1, 2)]]
    last: dict[str, list[float]] = {}
    rows = []
    for seed in seeds:
        data = law.draw(count, rng=torch.Generator().manual_seed(seed)).float()
        first: dict[int, Denoiser] = {}

        def begin(x: Tensor, index: int, seed: int = seed, first: Any = first) -> Denoiser:
            if index == 0 and first:
                return first[0]
            model = learn(x, 10 * seed + index, steps, 512)
            return first.setdefault(index, model) if index == 0 else model

        choices: dict[str, Selection] = {"random filter": AtRandom(), "by score": ByScore()}
        for name, select in choices.items():
            path = generations(
                data,
                begin,
                lambda m, n, g: draw(m, n, times, window, g, 1),
                select,
                scale.pick(2, 3, 3),
                rng=torch.Generator().manual_seed(seed),
            )
            for index, (learned, drawn) in enumerate(path):
                nearest = torch.cdist(drawn.x.double(), law.means).argmin(1)
                near = [drawn.x[nearest == k] for k in range(len(law.means))]
                rows.append(
                    {
                        "part": "generations",
                        "filter": name,
                        "seed": seed,
                        "generation": index,
                        "off_support_of_data": _off(judge, learned),
                        "off_support_of_samples": _off(judge, drawn.x),
                        "mode_std": sum(float(x.std()) for x in near if len(x) > 1) / len(near),
                    }
                )
            last.setdefault(name, []).append(_off(judge, path[-1][0]))
    plain, ours = (sum(last[n]) / len(last[n]) for n in ("random filter", "by score"))
    claim = Claim(
        "after two generations the data to learn from, kept by score, lie off the support less "
        "than half as often as those kept at random",
        plain,
        ours,
        "share of samples",
        "lower",
        ours < 0.5 * plain,
        "half as often or more",
    )
    return [claim], rows


def _off(judge: OffSupport, x: Tensor) -> float:
    return float(judge.strange(x).double().mean())


def pictures(scale: Scale) -> tuple[list[Claim], list[dict[str, Any]], str]:
    """D: on house:emoji under guidance, do kept pictures fit their prompt better?"""
    if scale.size == "smoke":
        return [], [], "The pipeline part runs from the small size on."
    try:
        from effuse.house import clip, load

        pipe, judge = load("emoji"), clip()
    except (ImportError, FileNotFoundError, RuntimeError) as error:
        return [], [], f"No pipeline part, as weights are missing: {error}"
    from effuse.bridge.pipeline import wrap

    model = wrap(pipe)
    model.network.requires_grad_(False)
    prompts = ("a red apple", "smiling face", "dog face", "a yellow star")
    each, steps, guidance = scale.pick(2, 8, 25), scale.pick(4, 15, 25), 5.0
    some = HallucinationFilter(keep=0.8)
    rows: list[dict[str, Any]] = []
    gaps: dict[str, list[Tensor]] = {"the last 10": [], "the middle 10": []}
    for seed in scale.seeds:
        what = [p for p in prompts for _ in range(some.drawn(each))]
        groups = torch.arange(len(prompts)).repeat_interleave(some.drawn(each))
        rng = torch.Generator().manual_seed(seed)
        cond, times = model.embed(what, guided=True), model.grid(model.process, steps)
        x = model.schedule.walk(steps).start * model.prior(len(what), rng=rng)
        windows = {
            "the last 10": Steps(-10),
            "the middle 10": Steps(steps // 2 - 5, steps // 2 + 5),
        }
        late = TrajectoryVariance(
            model.guide(guidance), *windows["the last 10"].span(model.process, times)
        )
        both = TrajectoryVariance(late, *windows["the middle 10"].span(model.process, times))
        out = model.codec.decode(sample(both.given(**cond), DDIM(), x, times)).clamp(0, 1)
        fits = (judge.image_features(out) * judge.text_features(what)).sum(1)
        for name, score in (("the last 10", late.score()), ("the middle 10", both.score())):
            for group, prompt in enumerate(prompts):
                mine, own = score[groups == group], fits[groups == group]
                rank = mine.argsort(stable=True)
                kept, left = own[rank[:each]].mean(), own[rank[each:]].mean()
                gaps[name].append(torch.stack([kept, own.mean()]))
                rows.append(
                    {
                        "part": "house:emoji",
                        "window": name,
                        "seed": seed,
                        "prompt": prompt,
                        "drawn": len(mine),
                        "fit_kept": float(kept),
                        "fit_left_out": float(left),
                        "fit_of_all": float(own.mean()),
                    }
                )
    claims = []
    for name, found in gaps.items():
        kept, every = torch.stack(found).unbind(1)
        difference, interval = paired(kept, every)
        claims.append(
            Claim(
                f"house:emoji, guidance {guidance:g}: the four fifths kept by the variance over "
                f"{name} steps fit their prompt better than a random choice",
                float(every.mean()),
                float(kept.mean()),
                "cosine of house:clip",
                "higher",
                difference > 0 and interval[0] > 0,
                "the mean is not higher, or the interval of the difference holds zero",
                interval,
            )
        )
    return claims, rows, ""


@proof("hallucination")
def prove(scale: Scale) -> Evidence:
    """The score finds what lies between the modes; what that is worth on pictures."""
    law = line(process())
    seeds = tuple(seed + JUDGED for seed in scale.seeds)
    claims, rows, window = modes("three modes on the line", law, scale, seeds)
    more, found, _ = modes("25 modes in the plane", lattice(process()), scale, seeds[:1])
    claims, rows = [*claims, *more], [*rows, *found]
    more, found = recursion(law, window, scale)
    claims, rows = [*claims, *more], [*rows, *found]
    more, found, note = pictures(scale)
    notes = (
        "Off the support: further than four deviations from every mode, five in the plane. The "
        "paper's schedule, network and noise variance; of its 1000 steps the last 60 and every "
        "fifth before, from step 420 on, as above it all is noise; thousands of samples where it "
        "takes millions. Rows of DDIM take the same window in noise to signal, on the same "
        f"levels. {note}"
    )
    return Evidence([*claims, *more], [*rows, *found], notes.strip())
