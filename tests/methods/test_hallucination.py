"""The trajectory score in closed form, the filter, its windows, test beds, pipelines."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_sd

from effuse.bridge.pipeline import wrap
from effuse.core import Denoiser, Gaussian, Mixture, Prediction, sample
from effuse.evaluate.hallucination import (
    AtRandom,
    ByScore,
    HallucinationFilter,
    auc,
    choose_window,
    filter_samples,
    generations,
    lowest,
    removed,
    scored,
    threshold,
)
from effuse.evaluate.testbed import (
    KINDS,
    OffSupport,
    count_shapes,
    lattice,
    line,
    shapes,
    templates,
)
from effuse.evaluate.trajectory import (
    NoiseToSignal,
    Scored,
    Steps,
    Trajectory,
    TrajectoryVariance,
)
from effuse.processes import VE, Cosine, Linear, Tabulated, Uniform
from effuse.solvers import DDIM, Ancestral, DPMpp2M, Heun

LAST = Steps(-4)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def papers():
    beta = torch.linspace(1e-3, 0.2, 1000, dtype=torch.float64)
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


# the score


@pytest.mark.parametrize("solver", [DDIM(), Ancestral(), DPMpp2M()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("window", [LAST, Steps(2, 5), Steps(None, None), Steps(-1)], ids=str)
def test_streaming_variance_is_that_of_the_stored_walk(solver, window):
    model = Mixture(Linear(), rand(3, 2, 2), 0.3)
    x, times = rand(5, 2, 2, seed=1), Uniform()(Linear(), 8)
    path = Trajectory(model)
    out = sample(path, solver, x, times, rng=seeded())
    seen = path.x0.numpy()[window.start : window.stop]
    expected = seen.var(0).reshape(5, -1).mean(1)
    found = scored(model, solver, x, times, window, rng=seeded())
    np.testing.assert_allclose(found.score, expected, rtol=1e-10, atol=1e-15)
    assert torch.equal(found.x, out)
    assert torch.equal(path.levels, times[:-1])
    if window == Steps(-1):
        assert not found.score.any()


def test_a_level_asked_for_twice_counts_once_with_the_last_answer():
    model = Mixture(Linear(), rand(3, 2), 0.3)
    x, times = rand(5, 2, seed=1), Uniform(1.0, 0.1)(Linear(), 6)
    answers = {}

    class Spy(Denoiser):
        process = Linear()

        def forward(self, y, t, **cond):
            pred = model(y, t)
            answers[float(t)] = pred.x0
            return pred

    path = Trajectory(Spy())
    sample(path, Heun(), x, times)
    levels = times[1:-1]  # Heun looks at every level between twice, at the last once
    expected = torch.stack([answers[float(t)] for t in levels]).var(0, correction=0).mean(1)
    follow = TrajectoryVariance(model, float(levels.min()), float(levels.max()))
    sample(follow, Heun(), x, times)
    torch.testing.assert_close(follow.score(), expected)
    torch.testing.assert_close(path.levels, times)
    torch.testing.assert_close(path.x0[1:-1].var(0, correction=0).mean(1), expected)


def test_score_of_a_gaussian_walk_is_the_linear_recursion():
    process, std, mean = Linear(), 0.4, torch.tensor([0.3, -0.2]).double()
    model, times = Gaussian(process, mean, std), Uniform()(Linear(), 12)
    x = rand(6, 2)
    gain, path = torch.ones(2).double(), []  # off the mean, x = gain x_T
    offset = process.alpha(1.0) * mean
    for t, s in pairwise(times):
        a, b = process.alpha(t), process.sigma(t)
        v = (a * std) ** 2 + b**2
        path.append(a * std**2 / v * gain)
        gain = gain * (1 + ((process.alpha(s) - a) * a * std**2 + (process.sigma(s) - b) * b) / v)
    expected = ((x - offset) ** 2).mean(1) * torch.stack(path)[-4:, 0].var(correction=0)
    torch.testing.assert_close(scored(model, DDIM(), x, times, LAST).score, expected)
    still = scored(Gaussian(process, mean, 0.0), DDIM(), x, times, LAST)
    assert still.score.max() < 1e-30


def test_shift_of_the_data_changes_nothing_and_scale_enters_squared():
    process, means = VE(0.01, 5.0), rand(4, 2)
    x, times = rand(6, 2, seed=1), Uniform()(process, 10)

    def score(scale=1.0, shift=0.0):
        data = Mixture(VE(0.01 * scale, 5.0 * scale), scale * means + shift, 0.2 * scale)
        return scored(data, DDIM(), scale * x * 5 + shift, times, LAST).score

    torch.testing.assert_close(score(shift=3.0), score(), rtol=1e-7, atol=0)
    torch.testing.assert_close(score(scale=2.5), 2.5**2 * score(), rtol=1e-7, atol=0)


def test_slope_between_two_modes_grows_as_the_noise_falls():
    """Why samples between modes move: d x0 / dx = ((b - a) / 2)^2 alpha / sigma^2 at the middle."""
    process, a, b = papers(), 1.0, 2.0
    two = Mixture(process, torch.tensor([[a], [b]]), 0.0)
    for t in (0.005, 0.05, 0.2):
        x = (process.alpha(t) * (a + b) / 2).reshape(1, 1).requires_grad_()
        (slope,) = torch.autograd.grad(two(x, t).x0, x)
        expected = ((b - a) / 2) ** 2 * process.alpha(t) / process.sigma(t) ** 2
        torch.testing.assert_close(slope[0, 0], expected)


def test_a_smoothed_transition_leaves_samples_between_and_they_score_high():
    """A prediction that cannot sharpen any more, as a network of bounded slope."""
    process = papers()
    law = line(process)

    class Smooth(Denoiser):
        """The exact prediction, at no less noise than sigma / alpha = 0.35."""

        def __init__(self):
            super().__init__()
            self.process, self.least = process, float(process.time_at(-2 * math.log(0.35)))

        def forward(self, x, t, **cond):
            level = max(float(t), self.least)
            x0 = law(x * process.alpha(level) / process.alpha(t), level).x0
            return process.complete(x, t, x0=x0)

    index = torch.cat([torch.arange(420, 60, -10), torch.arange(60, -1, -1)])
    times, x = index.double() / 1000, rand(3000, 1)
    judge = OffSupport(law.means, 0.25)
    out = scored(Smooth(), Ancestral(), x, times, Steps(-10), rng=seeded())
    strange = judge.strange(out.x)
    assert 10 < strange.sum() < 200
    assert auc(out.score, strange) > 0.75
    exact = scored(law, Ancestral(), x, times, Steps(-10), rng=seeded())
    assert not judge.strange(exact.x).any()


def test_rows_do_not_meet_and_may_stand_at_levels_of_their_own():
    model = Mixture(Linear(), rand(3, 2), 0.3)
    x, times = rand(5, 2, seed=1), Uniform()(Linear(), 8)
    every = scored(model, DDIM(), x, times, LAST).score
    torch.testing.assert_close(scored(model, DDIM(), x[2:3], times, LAST).score, every[2:3])
    low, high = LAST.span(Linear(), times)
    follow = TrajectoryVariance(model, low, high)
    twice = torch.cat([x[:1], x[:1]])
    for k in range(9):  # the second row is one step behind
        at = [k, k - 1]
        levels = torch.stack([times[min(max(i, 0), 7)] for i in at])
        follow(twice, levels)
    one = TrajectoryVariance(model, low, high)
    for k in range(8):
        one(x[:1], times[k])
    torch.testing.assert_close(follow.score(), one.score().expand(2))


def test_half_precision_is_summed_in_single():
    x0 = (1 + 1e-3 * rand(6, 3, 8, dtype=torch.float32)).half()

    class Said(Denoiser):
        process = Linear()
        at = 0

        def forward(self, x, t, **cond):
            self.at += 1
            return Prediction(x0[self.at - 1], x)

    follow = TrajectoryVariance(Said(), 0.0, 1.0)
    for t in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        follow(torch.zeros(3, 8).half(), t)
    expected = x0.double().var(0, correction=0).mean(1)
    torch.testing.assert_close(follow.score().double(), expected, rtol=1e-3, atol=0)
    assert follow.score().dtype == torch.float32


# windows


def test_windows():
    process = papers()
    times = torch.arange(1000, -1, -1).double() / 1000
    low, high = Steps(-10).span(process, times)
    assert (low, high) == (0.001, 0.010)
    ratios = Steps(-10).ratios(process, times)
    assert ratios.low == pytest.approx(0.0316, abs=1e-3)  # as the sheet computes them
    assert ratios.high == pytest.approx(0.14, abs=5e-3)
    assert ratios.span(process, times) == (low, high)
    other = Linear()
    t = Uniform(1.0, 0.0)(other, 400)
    low, high = ratios.span(other, t)
    r = other.sigma(t[:-1]) / other.alpha(t[:-1])
    assert low == float(t[:-1][r >= ratios.low].min())
    assert high == float(t[:-1][r <= ratios.high].max())
    assert Steps(0, 1).span(process, times) == (1.0, 1.0)
    with pytest.raises(ValueError, match="only 4 steps"):
        Steps(-10).span(process, times[::250])
    with pytest.raises(ValueError, match="no step among"):
        Steps(3, 2).span(process, times)
    with pytest.raises(ValueError, match="none inside"):
        NoiseToSignal(1e-5, 1e-4).span(process, times)
    with pytest.raises(ValueError, match="expected 0 <= low <= high"):
        NoiseToSignal(0.3, 0.1)
    start_of_cosine = NoiseToSignal(0.5, math.inf).span(Cosine(), Uniform()(Cosine(), 10))
    assert start_of_cosine[1] == 1.0


def test_window_is_found_where_the_difference_lies():
    x0 = 0.01 * rand(40, 300, 2)
    strange = torch.arange(300) % 10 == 0
    x0[20:25, strange] += rand(5, 30, 2, seed=1)
    path = x0 + 100.0  # far from zero, where squares cancel
    found = choose_window(path, strange, [Steps(a, a + 5) for a in range(0, 40, 5)])
    assert found.window == Steps(20, 25)
    assert found.auc == 1.0
    assert found.removed == 1.0
    score = path[20:25].var(0, correction=0).mean(1)
    assert auc(score, strange) == found.auc
    default = choose_window(path, strange)
    assert default.auc == 1.0
    last = dict((w, a) for w, a, _ in default.tried)[Steps(-10)]
    assert last == pytest.approx(auc(path[-10:].var(0, correction=0).mean(1), strange))
    assert last < 0.7
    with pytest.raises(ValueError, match="all alike"):
        choose_window(path, torch.zeros(300, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected \(S, B"):
        choose_window(path, strange[:5])


# the filter


def test_lowest_of_known_numbers():
    score = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.5])
    assert lowest(score, 1).tolist() == [4]
    assert lowest(score, 2).tolist() == [1, 4]  # of the two equal ones the first
    assert lowest(score, 4).tolist() == [1, 2, 3, 4]
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert lowest(score, 1, groups).tolist() == [1, 4]
    assert lowest(score, 2, groups).tolist() == [1, 2, 3, 4]
    samples = torch.arange(5)
    assert torch.equal(filter_samples(samples, score, 1.0), samples)
    assert filter_samples(samples, score, 0.6).tolist() == [1, 3, 4]
    assert filter_samples(samples, score, 0.01).tolist() == [4]
    assert threshold(torch.arange(101.0), 0.96) == 96


def test_figures_of_known_numbers():
    score = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0, 9.0])
    strange = torch.tensor([False, False, False, False, True, True])
    assert auc(score, strange) == pytest.approx((1.5 / 4 + 1) / 2)
    assert removed(score, strange, 1.0) == 0.5
    assert removed(score, strange, 0.25) == 1.0
    assert removed(score, strange, 0.5) == 0.5
    assert math.isnan(auc(score, torch.zeros(6, dtype=torch.bool)))
    from scipy.stats import mannwhitneyu

    s, y = rand(200).round(decimals=1), rand(200, seed=1) > 0.5
    expected = mannwhitneyu(s[y].numpy(), s[~y].numpy()).statistic / (y.sum() * (~y).sum())
    assert auc(s, y) == pytest.approx(float(expected))


def test_filter_draws_more_and_keeps_the_lowest_in_order():
    model, times = Mixture(Linear(), rand(3, 2), 0.3), Uniform()(Linear(), 8)
    some = HallucinationFilter(LAST, keep=0.8)
    assert [some.drawn(n) for n in (1, 4, 8, 100)] == [2, 5, 10, 125]
    assert HallucinationFilter().drawn(96) == 100
    assert HallucinationFilter(keep=1).drawn(7) == 7
    x = rand(some.drawn(8), 2, seed=1)
    full = scored(model, Ancestral(), x, times, LAST, rng=seeded())
    out, rows = some(model, Ancestral(), x, times, 8, rng=seeded())
    assert rows.tolist() == sorted(full.score.argsort()[:8].tolist())
    assert torch.equal(out.x, full.x[rows])
    assert torch.equal(out.score, full.score[rows])
    groups = torch.arange(2).repeat_interleave(5)
    _, rows = some(model, Ancestral(), x, times, 4, groups=groups, rng=seeded())
    assert (rows < 5).sum() == 4
    left = set(range(10)) - set(rows.tolist())
    assert left == {int(full.score[:5].argmax()), 5 + int(full.score[5:].argmax())}


def test_bad_input():
    model, times = Gaussian(Linear()), Uniform()(Linear(), 8)
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="keep="):
            HallucinationFilter(keep=keep)
        with pytest.raises(ValueError, match="keep="):
            filter_samples(rand(3, 1), rand(3), keep)
    with pytest.raises(TypeError, match="Steps"):
        HallucinationFilter(window=(-10, None))
    with pytest.raises(ValueError, match="at most as many"):
        HallucinationFilter(LAST)(model, DDIM(), rand(3, 1), times, 4)
    with pytest.raises(ValueError, match="at least one"):
        filter_samples(rand(0, 1), rand(0), 0.9)
    with pytest.raises(ValueError, match="as many"):
        filter_samples(rand(3, 1), rand(2), 0.9)
    with pytest.raises(ValueError, match="no prediction between"):
        TrajectoryVariance(model, 0.1, 0.2).score()
    follow = TrajectoryVariance(model, 0.0, 1.0)
    follow(rand(3, 1), 0.5)
    with pytest.raises(ValueError, match="2 rows after 3"):
        follow(rand(2, 1), 0.4)
    with pytest.raises(ValueError, match="nothing was predicted"):
        _ = Trajectory(model).x0


# the test beds


def test_lines_and_lattices():
    law = line(papers(), (1.0, 2.0, 4.0, 5.0))
    x = law.draw(4000, rng=seeded())
    judge = OffSupport(law.means, 0.25)
    judge.update(x)
    assert judge.compute() < 1e-3
    judge.reset()
    judge.update(torch.tensor([[1.0], [1.5], [3.0], [4.1]]))
    assert judge.strange(torch.tensor([[1.0], [1.5], [3.0], [4.1]])).tolist() == [0, 1, 1, 0]
    assert judge.compute() == 0.5
    low, high = judge.interval()
    assert low < 0.5 < high
    grid = lattice(papers())
    assert len(grid.means) == 25
    x = grid.draw(100_000, rng=seeded())
    torch.testing.assert_close(x.std(0), torch.ones(2).double(), atol=0.01, rtol=0)
    near = torch.cdist(grid.means, grid.means).fill_diagonal_(9).min(1).values
    torch.testing.assert_close(near, torch.full((25,), 2 / math.sqrt(8.0025)).double())
    turned = lattice(papers(), angle=math.pi / 6)
    torch.testing.assert_close(turned.means.norm(dim=1), grid.means.norm(dim=1))
    assert float(turned.means[-1] @ grid.means[-1]) == pytest.approx(
        math.cos(math.pi / 6) * float(grid.means[-1].square().sum())
    )


def test_shapes_stand_once_in_their_own_column():
    x = shapes(300, rng=seeded())
    assert x.shape == (300, 1, 64, 64)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    areas = [int(t.sum()) for t in templates()]
    assert areas[1] == 64
    assert all(abs(a - 60) <= 4 for a in areas)
    ink = torch.stack([x[..., 21 * c : 21 * c + 21].flatten(1).sum(1) for c in range(3)], 1)
    there = ink > 0
    assert torch.equal(ink, there * torch.tensor(areas).float())  # each whole, none twice
    assert not x[..., 63:].any()
    assert not x[..., 63:, :].any()
    assert there.any(1).all()
    assert float(there.double().mean()) == pytest.approx(0.5 * 8 / 7, abs=0.06)
    found = count_shapes(x)
    assert torch.equal(found.counts.diagonal(dim1=1, dim2=2), there.long())
    assert not found.strange.any()
    assert not found.ink.any()


def put(*what):
    x = torch.zeros(1, 1, 64, 64)
    for kind, top, left in what:
        shape = templates()[KINDS.index(kind)]
        h, w = shape.shape
        x[0, 0, top : top + h, left : left + w] = shape
    return x


def test_counting_finds_what_is_twice_and_what_is_elsewhere():
    twice = put(("square", 5, 25), ("square", 40, 30), ("triangle", 20, 3))
    counted = count_shapes(twice)
    assert counted.counts[0].tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
    elsewhere = put(("pentagon", 10, 2))
    assert count_shapes(elsewhere).counts[0].tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    fine = put(("triangle", 0, 0), ("square", 0, 34), ("pentagon", 54, 53))
    both = count_shapes(torch.cat([twice, elsewhere, fine]))
    assert both.strange.tolist() == [True, True, False]
    gray = (fine * 0.8 + 0.1 * torch.rand(1, 1, 64, 64, generator=seeded())).clamp(0, 1)
    assert torch.equal(count_shapes(gray).counts, count_shapes(fine).counts)
    blob = fine.clone()
    blob[0, 0, 40:45, 5:10] = 1
    assert count_shapes(blob).ink.tolist() == [25.0]
    with pytest.raises(ValueError, match=r"\(B, 1, 64, 64\)"):
        count_shapes(torch.zeros(1, 3, 64, 64))


def test_generations_pass_on_what_was_kept():
    law = line(papers())
    learned = []

    def learn(data, index):
        learned.append(data)
        return Mixture(papers(), data[:5].double(), 0.05)

    def draw(model, count, rng):
        x = model.draw(count, rng=rng)
        return Scored(x, (x - 2).abs().squeeze(1))

    data = law.draw(24, rng=seeded())
    out = generations(data, learn, draw, ByScore(), 3, keep=0.8, rng=seeded(1))
    assert [len(s.x) for _, s in out] == [30, 30, 30]
    assert torch.equal(out[0][0], data)
    for (_, drawn), later in zip(out, learned[1:], strict=False):
        assert torch.equal(later, drawn.x[lowest(drawn.score, 24)])
    rows = AtRandom()(torch.zeros(30), 24, seeded())
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == 24


# pipelines


@pytest.mark.parametrize("make", [tiny_ddpm, tiny_sd, tiny_dit_pipe])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pipelines(make, dtype):
    pipe = make()
    pipe = pipe.to(dtype)
    model = wrap(pipe)
    some, steps = HallucinationFilter(Steps(-3), keep=0.75), 5
    what = {tiny_ddpm: 4, tiny_sd: ["a red apple"] * 4, tiny_dit_pipe: [1] * 4}[make]
    guided = make is not tiny_ddpm
    base = model.guide(3.0) if guided else model.denoiser
    denoiser = base.given(**model.embed(what, guided=guided))
    times = model.grid(model.process, steps)
    x = model.prior(4, rng=seeded())
    out, rows = some(denoiser, DDIM(), x, times, 3, rng=seeded())
    assert out.x.shape == (3, *model.shape)
    assert len(rows) == 3
    path = Trajectory(denoiser)  # the guided prediction is the one that is followed
    plain = sample(path, DDIM(), x, times)
    assert torch.equal(out.x, plain[rows])
    expected = path.x0[-3:].double().var(0, correction=0).flatten(1).mean(1)
    torch.testing.assert_close(out.score.double(), expected[rows], rtol=1e-3, atol=1e-12)
    dropped = (set(range(4)) - set(rows.tolist())).pop()
    assert dropped == int(expected.argmax())


@pytest.mark.parametrize("name", ["emoji", "emoji-dit", "pixels"])
def test_house(name):
    import effuse

    model, count = effuse.wrap(effuse.load(f"house:{name}")), 2
    some = HallucinationFilter(Steps(-3), keep=0.7)
    n = some.drawn(count)
    what = {"emoji": ["dog face"] * n, "emoji-dit": [3] * n, "pixels": n}[name]
    guided = name != "pixels"
    base = model.guide(4.0) if guided else model.denoiser
    denoiser = base.given(**model.embed(what, guided=guided))
    x, times = model.prior(n, rng=seeded()), model.grid(model.process, 6)
    out, rows = some(denoiser, DDIM(), x, times, count)
    pictures = model.codec.decode(out.x)
    assert pictures.shape == (count, 3, *pictures.shape[2:])
    every = scored(denoiser, DDIM(), x, times, Steps(-3)).score
    assert rows.tolist() == sorted(every.argsort(stable=True)[:count].tolist())
    assert every.std() > 0
