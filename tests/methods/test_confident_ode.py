"""CODE and SDEdit: closed forms on Gaussian data, bands, corrections, calls, real pipelines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_flux, tiny_sd

from effuse.bridge.pipeline import wrap
from effuse.core import Denoiser, Gaussian, Mixture, Prediction
from effuse.core.clip import Clip
from effuse.core.fields import build, dump_fields
from effuse.processes import VE, Cosine, Flow, Linear, Tabulated
from effuse.restore import CODE, Around, Band, BySigma, Langevin, LogSpaced, SDEdit, edit
from effuse.restore.editor import climb
from effuse.solvers import DDIM


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table(count=1000):
    beta = torch.linspace(1e-4, 0.02, count, dtype=torch.float64)
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


def trip(levels, depth=1.0, **kwargs):
    """Return CODE without correction and input noise."""
    return CODE(levels=levels, depth=depth, corrections=0, noise=0.0, **kwargs)


class Counted(Denoiser):
    """Counts the calls of another, and sums its rows."""

    def __init__(self, base):
        super().__init__()
        self.base, self.process, self.count = base, base.process, 0

    def forward(self, x, t, **cond):
        self.count += 1
        return self.base(x, t, **cond)


# the walk up and down


@pytest.mark.parametrize("process", [Linear(), table(), Flow(), VE()])
def test_round_trip_converges_at_first_order(process):
    model = Mixture(process, torch.tensor([[0.5, -0.2], [-0.6, 0.4]]), 0.3)
    x = rand(16, 2) * 0.5

    def error(levels):
        editor = trip(levels, 0.9)
        return (editor(model, x).x - x).abs().max()

    coarse, fine = error(200), error(400)
    assert fine < 0.1
    assert 1.6 < coarse / fine < 2.6


def test_round_trip_of_a_gaussian_is_the_known_linear_map():
    process, std, mean = Linear(), 0.6, 0.3
    editor = trip(12, 0.8)
    times = climb(process, 12, 0.8)
    x = rand(5, 1)
    factor = torch.ones((), dtype=torch.float64)
    for t, s in pairwise(torch.cat([times, times.flip(0)[1:]])):
        a, v = process.alpha(t), (process.alpha(t) * std) ** 2 + process.sigma(t) ** 2
        gain = (process.alpha(s) - a) * a * std**2 + (process.sigma(s) - process.sigma(t)) * (
            process.sigma(t)
        )
        factor = factor * (1 + gain / v)
        if s == times[-1]:
            deepest = factor.clone()
    # off the moving mean alpha(t) mean, which the step keeps exactly
    latents = editor.encode(Gaussian(process, mean, std), x)
    off = x - process.alpha(times[0]) * mean
    torch.testing.assert_close(latents.x[-1] - process.alpha(times[-1]) * mean, deepest * off)
    out = editor(Gaussian(process, mean, std), x).x
    torch.testing.assert_close(out - process.alpha(times[0]) * mean, factor * off)
    assert abs(float(factor) - 1) > 1e-3  # the map is not the identity at twelve levels


def test_the_flow_of_standard_normal_data_stands_still():
    """The flow is the identity; a discrete step turns the angle by d and shrinks by cos d."""
    x, process = rand(4, 3), table()
    latents = trip(50).encode(Gaussian(process), x)
    assert len(latents.x) == len(latents.times) == 50
    angle = torch.atan2(process.sigma(latents.times), process.alpha(latents.times))
    shrunk = torch.cat([torch.ones(1), angle.diff().cos()]).cumprod(0)
    torch.testing.assert_close(latents.x, shrunk[:, None, None] * x)
    fine = trip(1000).encode(Gaussian(process), x)
    torch.testing.assert_close(fine.x[-1], x, rtol=2e-3, atol=0)


def test_levels():
    process = table()
    times = climb(process, 200, 1.0)
    assert process.index_at(times[0]) == 0
    assert process.index_at(times[-1]) == 999
    assert len(climb(process, 200, 0.1)) == 20
    assert climb(Flow(), 5, 1.0)[0] == 1e-3
    with pytest.raises(ValueError, match="two or more, at least"):
        climb(process, 10, 0.05)
    with pytest.raises(ValueError, match="levels=1"):
        climb(process, 1, 1.0)


def test_latents_tell_their_moments():
    x = torch.cat([rand(1, 3, 8, 8), 3 * rand(1, 3, 8, 8, seed=1)])
    latents = trip(20).encode(Gaussian(table()), x)
    mean, std = latents.moments
    assert mean.shape == std.shape == (20, 2)
    torch.testing.assert_close(std[0], x.flatten(1).std(1))
    torch.testing.assert_close(mean[-1], latents.x[-1].flatten(1).mean(1))
    assert std[-1, 1] > 2  # outside the shell, and one sees it


def test_input_noise_is_of_the_given_deviation():
    x = torch.zeros(1, 200_000, dtype=torch.float64)
    editor = CODE(levels=4, corrections=0, noise=0.01)
    first = editor.encode(Gaussian(Linear()), x, rng=seeded()).x[0]
    assert abs(first.std() - 0.01) < 1e-4
    assert torch.equal(trip(4).encode(Gaussian(Linear()), x).x[0], x)


# Langevin


def test_langevin_is_the_ar1_of_its_closed_form():
    process, std, t = Linear(), 0.5, torch.tensor(0.3)
    alpha, sigma = process.alpha(0.3), process.sigma(0.3)
    v = float((alpha * std) ** 2 + sigma**2)
    eps = 0.5 * v
    model = Gaussian(process, 0.0, std)
    x = torch.full((100_000, 1), 2.0, dtype=torch.float64)
    # mean: contracts by 1 - eps / v a step, and once more in the quiet step
    few = Langevin(eps, 3, stages=1)(model, x, t, rng=seeded())
    expected = 2.0 * (1 - eps / v) ** 4
    assert abs(float(few.mean()) - expected) < 5 * math.sqrt(v / len(x))
    # variance: stationary at v / (1 - eps / (2 v)), then contracted by the quiet step
    long = Langevin(eps, 40, stages=1)(model, x, t, rng=seeded(1))
    stationary = v / (1 - eps / (2 * v)) * (1 - eps / v) ** 2
    assert abs(float(long.var()) / stationary - 1) < 0.02


def test_stages_anneal():
    """Deterministic part: the product of (1 - eps_j / v)^(n_j + 1) over the stages."""
    process, t = Linear(), torch.tensor(0.4)
    v = float(process.alpha(0.4) ** 2 * 0.25 + process.sigma(0.4) ** 2)
    model = Gaussian(process, 0.0, 0.5)
    eps = 0.1 * v
    run = Langevin(eps, 10, stages=4, factor=0.5)
    x = torch.full((200_000, 1), 3.0, dtype=torch.float64)
    expected = 3.0
    for stage, steps in enumerate((3, 3, 2, 2)):
        expected *= (1 - eps * 0.5**stage / v) ** (steps + 1)
    out = run(model, x, t, rng=seeded())
    assert abs(float(out.mean()) - expected) < 5 * math.sqrt(v / len(x))
    assert run.calls == 14


def test_stages_of_factor_one_are_one_stage_but_for_the_quiet_steps():
    model, t = Gaussian(Linear(), 0.0, 0.5), torch.tensor(0.4, dtype=torch.float64)
    x = rand(6, 2)
    eps = 0.01
    one = Langevin(eps, 4, stages=1, factor=1.0)(model, x, t, rng=seeded())
    v = float(model.process.alpha(0.4) ** 2 * 0.25 + model.process.sigma(0.4) ** 2)
    # undo the quiet step of the half-way stage: the walk is linear, so it shifts what came before
    two = Langevin(eps, 4, stages=2, factor=1.0)(model, x, t, rng=seeded())
    half = Langevin(eps, 2, stages=1, factor=1.0)(model, x, t, rng=seeded())
    quiet = half - half / (1 - eps / v)  # what the extra step added
    torch.testing.assert_close(two - one, quiet * (1 - eps / v) ** 3, rtol=1e-9, atol=1e-12)


def test_no_step_is_no_correction():
    model, x = Mixture(table(), rand(3, 4), 0.1), rand(5, 4)
    plain = trip(20)(model, x).x
    editor = CODE(levels=20, noise=0.0, langevin=Langevin(0.0, 8), corrections=2)
    assert torch.equal(editor(model, x, rng=seeded()).x, plain)


def test_norm_guard():
    model, x = Gaussian(Linear(), 0.0, 0.0), rand(2, 4)
    t = torch.tensor(0.05)
    sigma = float(Linear().sigma(0.05))
    Langevin(1.9 * sigma**2, 80, stages=1)(model, x, t, rng=seeded())
    with pytest.raises(FloatingPointError, match=r"below 2 sigma\^2"):
        Langevin(2.5 * sigma**2, 80, stages=1)(model, x, t, rng=seeded())


def test_step_scales():
    process = table()
    times = climb(process, 5, 1.0)
    expected = 10 ** torch.linspace(2, 0, 5, dtype=torch.float64)
    torch.testing.assert_close(LogSpaced(100.0)(process, times), expected)
    torch.testing.assert_close(BySigma()(process, times), process.sigma(1.0) / process.sigma(times))


def test_corrected_levels():
    process = table()
    editor = CODE(levels=200, corrections=3, shallow=0.1)
    found = editor.corrected(process)
    assert list(found) == [199, 110, 20]
    gamma = 100 ** (1 - torch.tensor(list(found)) / 199.0)
    torch.testing.assert_close(torch.tensor(list(found.values())), gamma, rtol=1e-6, atol=0)
    assert list(CODE(corrections=1).corrected(process)) == [199]
    assert list(CODE(corrections=1, depth=0.1, shallow=0.2).corrected(process)) == [19]
    assert list(CODE(corrections=1, deep=0.5).corrected(process)) == [99]
    assert CODE(corrections=0).corrected(process) == {}
    with pytest.raises(ValueError, match=r"shallow=0\.4 is deeper"):
        CODE(depth=0.3, shallow=0.4).corrected(process)


def test_a_correction_acts_at_its_level_and_size():
    """With linear everything: the correction multiplies the mean by (1 - eps gamma / v)^calls."""
    process, std = Linear(), 0.5
    model = Gaussian(process, 0.0, std)
    x = torch.full((100_000, 1), 1.0, dtype=torch.float64)
    run = Langevin(0.002, 4, stages=1, scale=LogSpaced(10.0))
    editor = CODE(levels=30, depth=0.6, deep=0.3, corrections=1, langevin=run, noise=0.0)
    ((k, gamma),) = editor.corrected(process).items()
    t = climb(process, 30, 0.6)[k]
    v = (process.alpha(t) * std) ** 2 + process.sigma(t) ** 2
    plain = trip(30, 0.6)(model, x[:1]).x
    out = editor(model, x, rng=seeded()).x
    expected = float(plain * (1 - 0.002 * gamma / v) ** 5)
    assert abs(expected - float(plain)) > 0.05
    assert abs(float(out.mean()) - expected) < 5 * float(out.std()) / math.sqrt(len(x))


def test_likelihood_rises():
    angle = torch.arange(24, dtype=torch.float64) * (2 * math.pi / 24)
    model = Mixture(table(), torch.stack([angle.cos(), angle.sin()], 1), 0.05)
    x = model.draw(64, rng=seeded()) * 1.4  # off the ring
    run = Langevin(2e-3, 60, scale=LogSpaced(1.0))
    editor = CODE(levels=100, depth=0.1, corrections=1, langevin=run)
    out = editor(model, x, rng=seeded(1)).x
    plain = trip(100, 0.1)(model, x).x
    t = float(editor.times(model.process)[0])
    assert model.log_prob(plain, t).mean() < -5
    assert model.log_prob(out, t).mean() > model.log_prob(plain, t).mean() + 5


def test_seeds_differ_by_langevin_noise_only():
    model = Mixture(table(), rand(3, 4), 0.1)
    x = rand(1, 4).expand(3, 4)
    run = Langevin(1e-3, 8, scale=LogSpaced(1.0))
    editor = CODE(levels=20, noise=0.0, corrections=1, langevin=run)
    out = editor(model, x, rng=seeded()).x
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    latents = editor.encode(model, x, rng=seeded())
    assert torch.equal(latents.x[:, 0], latents.x[:, 1])
    assert torch.equal(out, editor(model, x, rng=seeded()).x)
    assert torch.equal(
        editor(model, x, rng=seeded()).x, editor.decode(model, latents, rng=seeded())
    )


def test_calls_are_counted_right():
    model = Counted(Mixture(table(), rand(3, 4), 0.1))
    editor = CODE(levels=20, langevin=Langevin(1e-5, 10), corrections=2)
    editor(model, rand(2, 4), rng=seeded())
    assert model.count == editor.calls(model.process) == 19 + 2 * 14 + 19
    model.count = 0
    other = SDEdit(depth=0.5, levels=20, repeats=2)
    other(model, rand(2, 4), rng=seeded())
    assert model.count == other.calls(model.process) == 2 * 10


def test_the_encoder_walks_up_and_the_denoiser_down():
    up, down = (Counted(Gaussian(table(), mean)) for mean in (0.0, 2.0))
    editor = CODE(levels=10, corrections=1, langevin=Langevin(1e-5, 4, stages=1))
    editor(down, rand(1, 3), rng=seeded(), encoder=up)
    assert (up.count, down.count) == (9, 9 + 5)


# bands


def test_band_clamps_to_the_formula_and_leaves_the_inside():
    process, t = Linear(), 0.3
    x = 3 * rand(1000, 2)
    alpha, sigma = process.alpha(t), process.sigma(t)
    band = Band(1.5)(x, t, process)
    edge = float(alpha + 1.5 * sigma)
    inside = x.abs() <= edge
    assert 0.2 < inside.double().mean() < 0.9
    assert torch.equal(band[inside], x[inside])
    torch.testing.assert_close(band[~inside].abs(), torch.full_like(band[~inside], edge))
    assert torch.equal(Band(math.inf)(x, t, process), x)
    assert torch.equal(Band(0.0)(x, 0.0, Cosine()), x.clamp(-1, 1))
    assert Band()(x.float(), t, process).dtype == torch.float32


def test_band_of_latents():
    data = torch.stack([rand(400) * 2, rand(400, seed=1) + 9]).T.reshape(100, 4, 2).movedim(2, 1)
    band = Band.of(data, 2.0, tail=0.0)
    for c in (0, 1):
        assert band.low[c] == float(data[:, c].min())
        assert band.high[c] == float(data[:, c].max())
    x = torch.zeros(1, 2, 4, dtype=torch.float64)
    process, t = Linear(), 0.2
    alpha, sigma = process.alpha(t), process.sigma(t)
    out = band(x, t, process)
    low = alpha * band.low[1] - 2 * sigma
    assert low > 0
    torch.testing.assert_close(out[0, 1], low.expand(4))
    assert torch.equal(out[0, 0], x[0, 0])
    cut = Band.of(data, tail=0.1)
    kept = (data[:, 0] >= cut.low[0]).double().mean()
    assert 0.89 < kept < 0.91
    with pytest.raises(ValueError, match="band of 2 channels"):
        band(torch.zeros(1, 3, 4), t, process)
    with pytest.raises(ValueError, match="both or neither"):
        Band(low=-1.0)
    with pytest.raises(ValueError, match="low below high"):
        Band(low=1.0, high=-1.0)
    with pytest.raises(ValueError, match="eta=-1"):
        Band(-1.0)


def test_band_around_a_reference():
    process, t, center = Linear(), 0.3, torch.tensor([0.5, -0.5], dtype=torch.float64)
    x = 3 * rand(50, 2)
    out = Around(center, 1.5)(x, t, process)
    off = (out - process.alpha(t) * center) / process.sigma(t)
    assert float(off.max()) == pytest.approx(1.5)
    assert float(off.min()) == pytest.approx(-1.5)
    inside = (x - process.alpha(t) * center).abs() <= 1.5 * process.sigma(t)
    assert torch.equal(out[inside], x[inside])
    assert torch.equal(Around(center, math.inf)(x, t, process), x)


def test_the_band_holds_every_latent_and_only_where_asked():
    model, process = Gaussian(table(), 0.0, 0.5), table()
    x = torch.tensor([[4.0, 0.1]], dtype=torch.float64)
    clamped = trip(20, band=Band(1.0)).encode(model, x)
    edge = process.alpha(clamped.times) + process.sigma(clamped.times)
    assert (clamped.x.abs().amax((1, 2)) <= edge + 1e-12).all()
    assert (trip(20).encode(model, x).x.abs().amax((1, 2)) > edge).all()
    seen = []

    def spy(x, t, process):
        seen.append(float(t))
        return x

    trip(5, band_decoding=spy)(model, x)
    assert seen == pytest.approx(climb(process, 5, 1.0).flip(0).tolist())
    seen.clear()
    run = Langevin(1e-5, 4, stages=2)
    CODE(levels=5, corrections=1, langevin=run, band_langevin=spy)(model, x, rng=seeded())
    assert seen == [1.0] * 6
    out = SDEdit(0.3, 20, band=Band(0.0))(model, x, rng=seeded())
    assert out.x.abs().max() <= 1


def test_clipping_repairs_outliers():
    """The paper's second claim in one assertion; proofs/confident_ode.py measures it."""
    angle = torch.arange(40, dtype=torch.float64) * (2 * math.pi / 40)
    plane = torch.linalg.qr(rand(16, 2, seed=5)).Q
    ring = 0.8 * 4**0.5 * torch.stack([angle.cos(), angle.sin()], 1) @ plane.T
    model = Mixture(table(), ring, 0.05)
    clean = model.draw(48, rng=seeded())
    broken = clean.clone()
    broken[:, :2] = 3.0
    run = Langevin(1e-3, 60, scale=LogSpaced(1.0))
    gaps = []
    for band in (None, Band(1.7)):
        editor = CODE(levels=100, depth=0.2, corrections=1, langevin=run, band=band)
        gaps.append((editor(model, broken, rng=seeded(1)).x - clean).norm(dim=1).mean())
    assert gaps[1] < 0.8 * gaps[0]


def test_threshold_reaches_ode_and_correction():
    class Far(Denoiser):
        process = table()

        def forward(self, x, t, **cond):
            return self.process.complete(x, t, x0=torch.full_like(x, 5.0))

    x = rand(2, 3)
    editor = trip(10, threshold=Clip(1.3, 0.98))
    expected = trip(10).encode(
        type("One", (Far,), {"forward": lambda s, x, t: s.process.complete(x, t, x0=x * 0 + 1)})(),
        x,
    )
    torch.testing.assert_close(editor.encode(Far(), x).x, expected.x)
    run = Langevin(1e-3, 4, stages=1)
    tied = CODE(levels=10, corrections=1, noise=0.0, langevin=run, threshold=Clip(1.3, 0.98))
    loose = CODE(levels=10, corrections=1, noise=0.0, langevin=run)
    latents = tied.encode(Far(), x)
    gap = tied.decode(Far(), latents, rng=seeded()) - loose.decode(Far(), latents, rng=seeded())
    assert gap.abs().max() > 0.1


# SDEdit


def test_sdedit_at_full_depth_is_a_sample_and_shallow_stays():
    model = Gaussian(Linear(), 0.3, 0.5)
    x = torch.full((20_000, 1), 4.0, dtype=torch.float64)
    deep = SDEdit(1.0, 400)(model, x, rng=seeded()).x
    assert abs(float(deep.mean()) - 0.3) < 0.03
    assert abs(float(deep.std()) - 0.5) < 0.03
    shallow = SDEdit(0.05, 100)(model, x, rng=seeded()).x
    assert shallow.mean() > 3


def test_sdedit_of_a_gaussian_is_the_posterior():
    """y spoiled to level L and drawn back: mean m + g (y - m), g = alpha^2 s^2 / v."""
    process, m, s, depth = Linear(), 0.3, 0.5, 0.4
    editor = SDEdit(depth, 400)
    level = float(editor.times(process)[0])
    alpha2 = float(process.alpha(level) ** 2)
    v = alpha2 * s**2 + float(process.sigma(level) ** 2)
    gain = alpha2 * s**2 / v
    y = torch.full((40_000, 1), 2.0, dtype=torch.float64)
    once = editor(Gaussian(process, m, s), y, rng=seeded()).x
    assert abs(float(once.mean()) - (m + gain * (2 - m))) < 0.02
    twice = SDEdit(depth, 400, repeats=2)(Gaussian(process, m, s), y, rng=seeded()).x
    assert abs(float(twice.mean()) - (m + gain**2 * (2 - m))) < 0.02


def test_sdedit_starts_at_its_depth_and_clamps_at_every_level():
    seen, clamped = [], []

    class Spy(Gaussian):
        def forward(self, x, t, **cond):
            seen.append((x, float(t)))
            return super().forward(x, t)

    def spy(x, t, process):
        clamped.append(float(t))
        return x / 2

    process, x = table(), rand(3, 2)
    SDEdit(0.5, 5, band=spy)(Spy(process), x, rng=seeded())
    first, t = seen[0]
    assert t == clamped[0] == pytest.approx(float(climb(process, 5, 0.5)[-1]))
    expected = process.corrupt(x, t, torch.randn(3, 2, generator=seeded(), dtype=x.dtype))
    torch.testing.assert_close(first, expected / 2)
    assert clamped == [t for _, t in seen] + [0.0]


def test_sdedit_takes_any_solver():
    model = Gaussian(Linear(), 0.0, 0.5)
    x = rand(3, 2)
    a, b = (SDEdit(0.5, 40, solver=s)(model, x, rng=seeded()).x for s in (DDIM(), DDIM(0.5)))
    assert not torch.allclose(a, b)


# doors


def test_values():
    with pytest.raises(ValueError, match=r"deep=0\.9"):
        CODE(depth=0.5, deep=0.9)
    with pytest.raises(ValueError, match="noise=-1"):
        CODE(noise=-1)
    with pytest.raises(ValueError, match="size=-1"):
        Langevin(-1)
    with pytest.raises(ValueError, match="steps=2"):
        Langevin(steps=2, stages=4)
    with pytest.raises(ValueError, match="depth=0"):
        SDEdit(0.0)
    with pytest.raises(ValueError, match="top=0"):
        LogSpaced(0)
    with pytest.raises(ValueError, match="encoded with the same"):
        CODE(levels=9).decode(Gaussian(table()), trip(8).encode(Gaussian(table()), rand(1, 2)))
    value = CODE(band=Band(2.0), threshold=Clip(1.3, 0.98), langevin=Langevin(scale=BySigma()))
    assert build(CODE, dump_fields(value, "code"), "code") == value


def test_non_finite_predictions_name_the_level():
    class Broken(Gaussian):
        def forward(self, x, t, **cond):
            out = super().forward(x, t)
            return out if t < 0.5 else Prediction(out.x0 / 0, out.noise)

    with pytest.raises(FloatingPointError, match=r"encoding, t 0\.5"):
        CODE(levels=11)(Broken(table()), rand(2, 2), rng=seeded())


class TestEdit:
    @staticmethod
    def pictures(count=2, side=16):
        return torch.rand(count, 3, side, side, generator=seeded(3))

    quick = CODE(levels=8, langevin=Langevin(1e-5, 4), corrections=1)

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide by 255"),
            (torch.zeros(1, 4, 16, 16), "alpha"),
            (torch.zeros(3, 16, 16), r"\(B, 3, H, W\)"),
            (-torch.ones(1, 3, 16, 16), r"from -1 to -1: expected values in \[0, 1\]"),
            (torch.full((1, 3, 16, 16), float("nan")), r"\[0, 1\]"),
            (torch.zeros(1, 3, 15, 15), "divisible|size"),
        ],
    )
    def test_bad_pictures(self, bad, words):
        with pytest.raises(ValueError, match=words):
            edit(wrap(tiny_sd()), bad, self.quick)

    def test_bad_arguments(self):
        model = wrap(tiny_sd())
        with pytest.raises(ValueError, match=r"Band\.of"):
            edit(model, self.pictures(), SDEdit(band=Band()))
        with pytest.raises(ValueError, match="3 prompts for 2"):
            edit(model, self.pictures(), self.quick, ["a", "b", "c"])
        with pytest.raises(ValueError, match="scale above 1"):
            edit(model, self.pictures(), self.quick, "a", negative="b")
        with pytest.raises(ValueError, match="no unconditional branch"):
            edit(wrap(tiny_ddpm()), self.pictures(), self.quick, guidance=3.0)

    @pytest.mark.bridge
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("build", [tiny_ddpm, tiny_sd, tiny_dit_pipe, tiny_flux])
    def test_real_pipelines(self, build, dtype):
        pipe = build()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(dtype)
        model, pictures = wrap(pipe), self.pictures()
        what = {"tiny_ddpm": None, "tiny_dit_pipe": [1, 2]}.get(build.__name__, "a b")
        told = []
        out = edit(
            model, pictures, self.quick, what, rng=seeded(), on_call=lambda *n: told.append(n)
        )
        assert out.pictures.shape == pictures.shape
        assert out.pictures.dtype == out.sample.dtype == torch.float32
        assert out.pictures.isfinite().all()
        assert out.calls == len(told) == self.quick.calls(model.process)
        assert told[-1] == (out.calls, out.calls)
        assert out.latents.x.shape == (8, *out.sample.shape)
        # a row does not depend on its neighbors where nothing is drawn
        still = CODE(levels=4, depth=0.5, corrections=0, noise=0.0)
        one = what[:1] if isinstance(what, list) else what
        both = edit(model, pictures, still, what).sample
        alone = edit(model, pictures[:1], still, one).sample
        tol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(alone, both[:1], rtol=tol, atol=tol)

    @pytest.mark.bridge
    def test_round_trip_through_a_network(self):
        model, pictures = wrap(tiny_ddpm()), self.pictures()
        gaps = [
            float((edit(model, pictures, trip(n, 0.3)).pictures - pictures).abs().mean())
            for n in (20, 80)
        ]
        assert gaps[1] < 0.6 * gaps[0]
        assert gaps[1] < 0.05

    @pytest.mark.bridge
    def test_the_clip_of_the_scheduler_is_for_sampling_only(self):
        model, pictures = wrap(tiny_ddpm()), self.pictures()
        assert model.schedule.clip is not None
        out = edit(model, pictures, SDEdit(0.9, 6), rng=seeded())
        assert out.sample.abs().max() <= 1
        loose = SDEdit(0.9, 6)(model.bare, 2 * pictures - 1, rng=seeded()).x
        assert loose.abs().max() > 1
        still = CODE(levels=8, corrections=0, noise=0.0)
        expected = still(model.bare, 2 * pictures - 1).x
        torch.testing.assert_close(edit(model, pictures, still).sample, expected)

    @pytest.mark.bridge
    def test_a_network_of_classes_needs_them(self):
        with pytest.raises(ValueError, match="list of class labels"):
            edit(wrap(tiny_dit_pipe()), self.pictures(), self.quick)

    @pytest.mark.bridge
    def test_guidance_acts_on_the_way_down_only(self):
        model, pictures = wrap(tiny_sd()), self.pictures()
        still = CODE(levels=6, corrections=0, noise=0.0)
        plain = edit(model, pictures, still, "a b")
        strong = edit(model, pictures, still, "a b", guidance=5.0)
        assert torch.equal(plain.latents.x, strong.latents.x)
        assert (plain.sample - strong.sample).abs().max() > 1e-3
        away = edit(model, pictures, still, "a b", guidance=5.0, negative="c d")
        assert (away.sample - strong.sample).abs().max() > 1e-4
        text = edit(model, pictures, SDEdit(0.6, 6), "a b", guidance=5.0, rng=seeded())
        other = edit(model, pictures, SDEdit(0.6, 6), "c d", guidance=5.0, rng=seeded())
        weak = edit(model, pictures, SDEdit(0.6, 6), "a b", guidance=2.0, rng=seeded())
        assert (text.sample - weak.sample).abs().max() > 1e-4
        assert text.latents is None
        assert (text.sample - other.sample).abs().max() > 1e-4

    @pytest.mark.bridge
    def test_latents_with_their_band(self):
        model, pictures = wrap(tiny_sd()), self.pictures()
        band = Band.of(model.codec.encode(pictures).detach(), 1.7)
        editor = CODE(levels=6, corrections=0, band=band, depth=0.5)
        latents = edit(model, pictures, editor, rng=seeded()).latents
        t = latents.times[-1]
        alpha, sigma = model.process.alpha(t), model.process.sigma(t)
        high = alpha * torch.tensor(band.high) + 1.7 * sigma
        assert (latents.x[-1].amax((0, 2, 3)) <= high + 1e-5).all()

    @pytest.mark.bridge
    @pytest.mark.parametrize(
        ("name", "what"), [("emoji", "a cat"), ("emoji-dit", [3]), ("pixels", None)]
    )
    def test_house(self, name, what):
        house = pytest.importorskip("effuse.house")
        try:
            pipe = house.load(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        side = 32 if name == "pixels" else 64
        model, pictures = wrap(pipe), torch.full((1, 3, side, side), 1.0)
        pictures[:, :, side // 4 : -side // 4, side // 4 : -side // 4] = 0.3
        out = edit(model, pictures, trip(12, 0.3), what)
        assert (out.pictures - pictures).square().mean() < 0.02  # a round trip, through its codec
        moved = edit(model, pictures, SDEdit(0.4, 10), what, rng=seeded())
        assert 1e-4 < (moved.pictures - pictures).square().mean() < 0.3
