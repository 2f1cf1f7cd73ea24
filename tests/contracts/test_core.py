"""The exact denoisers, the sampling loop, Prediction, Operator and the training loop."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from effuse.core import (
    Empirical,
    Gaussian,
    Loss,
    LowRankMixture,
    Mixture,
    Objective,
    Operator,
    Prediction,
    fit,
    sample,
)
from effuse.core.training import Ema, warmup_cosine
from effuse.processes import (
    VE,
    Beta,
    Cosine,
    Flow,
    Karras,
    Leading,
    Levels,
    Linear,
    Linspace,
    Tabulated,
    Tapered,
    Trailing,
    Uniform,
    UniformLogSNR,
)
from effuse.solvers import DDIM, Heun


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class TestExact:
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64)

    @pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
    def test_one_component_is_the_gaussian(self, t):
        x = rand(6, 2)
        a = Mixture(Linear(), self.means[:1], 0.3)(x, t)
        b = Gaussian(Linear(), self.means[0], 0.3)(x, t)
        torch.testing.assert_close(a.x0, b.x0)
        torch.testing.assert_close(a.noise, b.noise)

    @pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
    def test_score_is_the_gradient_of_log_prob(self, t):
        model = Mixture(
            Linear(), self.means, torch.tensor([0.2, 0.5, 0.1]), torch.tensor([1.0, 2, 3])
        )
        x = rand(6, 2).requires_grad_()
        (grad,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
        torch.testing.assert_close(model.score(x.detach(), t), grad)

    def test_density_integrates_to_one(self):
        model = Mixture(Linear(), self.means, 0.3)
        line = torch.linspace(-8, 8, 321, dtype=torch.float64)
        grid = torch.cartesian_prod(line, line)
        mass = model.log_prob(grid, 0.3).exp().sum() * (line[1] - line[0]) ** 2
        assert abs(mass.item() - 1) < 1e-6

    @pytest.mark.parametrize("std", [0.0, 0.3])
    def test_prediction_is_consistent(self, std):
        model, x = Mixture(Cosine(), self.means, std), rand(6, 2)
        for t in (1e-3, 0.5, 1.0):
            p = model(x, t)
            torch.testing.assert_close(Cosine().corrupt(p.x0, t, p.noise), x, atol=1e-9, rtol=1e-9)

    def test_labels(self):
        model = Mixture(Linear(), self.means, 0.3, labels=torch.tensor([0, 0, 1]))
        x = rand(4, 2)
        only = Mixture(Linear(), self.means[2:], 0.3)(x, 0.4)
        torch.testing.assert_close(model(x, 0.4, label=1).x0, only.x0)
        mixed = model(x, 0.4, label=torch.tensor([1, -1, 1, -1])).x0
        torch.testing.assert_close(mixed[::2], only.x0[::2])
        torch.testing.assert_close(mixed[1::2], model(x, 0.4).x0[1::2])
        own = Mixture(Linear(), self.means[:2], 0.3).log_prob(x, 0.4)
        torch.testing.assert_close(model.log_prob(x, 0.4, label=0), own)
        with pytest.raises(ValueError, match="no component"):
            model(x, 0.4, label=7)

    def test_empirical_walks_to_a_data_point(self):
        points = rand(5, 2, seed=3)
        model = Empirical(Flow(), points)
        out = sample(model, DDIM(), rand(40, 2), Uniform()(Flow(), 50))
        assert torch.cdist(out, points).min(1).values.max() < 1e-6

    def test_picture_shapes_and_batched_levels(self):
        model = Mixture(Cosine(), rand(3, 2, 4, 4), 0.2)
        x, t = rand(2, 2, 4, 4, seed=1), torch.tensor([0.2, 0.9])
        both = model(x, t).x0
        torch.testing.assert_close(both[1:], model(x[1:], 0.9).x0, rtol=1e-6, atol=1e-6)

    def test_draw(self):
        model = Mixture(Linear(), self.means, 0.1, weights=torch.tensor([0.7, 0.2, 0.1]))
        x = model.draw(20_000, rng=torch.Generator().manual_seed(0))
        expected = (torch.tensor([0.7, 0.2, 0.1])[:, None] * self.means).sum(0)
        torch.testing.assert_close(x.mean(0), expected, atol=0.03, rtol=0)

    def test_given_binds_and_later_wins(self):
        model = Mixture(Linear(), self.means, 0.3)
        x = rand(2, 2)
        bound = model.given(label=1)
        assert torch.equal(bound(x, 0.5).x0, model(x, 0.5, label=1).x0)
        assert torch.equal(bound(x, 0.5, label=2).x0, model(x, 0.5, label=2).x0)


class TestLowRankMixture:
    """Subspaces of ranks 3, 1 and 2 in five dimensions, not orthogonal to each other."""

    means = torch.tensor([[0.3, -0.2, 0, 0, 0.1], [0.0] * 5, [-0.5, 0, 0.4, 0, 0]])
    weights = torch.tensor([1.0, 2.0, 0.5])

    def bases(self):
        return [torch.linalg.qr(rand(5, r, seed=r)).Q for r in (3, 1, 2)]

    def make(self, process, std=0.0):
        return LowRankMixture(process, self.bases(), std, self.weights, self.means)

    def law(self, process, t, std):
        """The same mixture at level t, of full covariances, from torch.distributions."""
        a, v = float(process.alpha(t)), float(process.sigma(t)) ** 2
        std = torch.as_tensor(std, dtype=torch.float64).expand(3)
        eye = torch.eye(5, dtype=torch.float64)
        cov = torch.stack(
            [
                a**2 * (u @ u.T + s**2 * eye) + v * eye
                for u, s in zip(self.bases(), std, strict=True)
            ]
        )
        each = torch.distributions.MultivariateNormal(a * self.means.double(), cov)
        pick = torch.distributions.Categorical(self.weights.double())
        return torch.distributions.MixtureSameFamily(pick, each)

    @pytest.mark.parametrize("std", [0.0, 0.3, (0.0, 0.2, 0.5)])
    @pytest.mark.parametrize("process", [Linear(), VE(), Flow()], ids=repr)
    def test_density_score_and_tweedie(self, process, std):
        std = torch.tensor(std)
        model, x = self.make(process, std), rand(7, 5)
        for t in (0.1, 0.6, 0.95):
            law, at = self.law(process, t, std), x.clone().requires_grad_()
            log_prob = law.log_prob(at)
            (score,) = torch.autograd.grad(log_prob.sum(), at)
            torch.testing.assert_close(model.log_prob(x, t), log_prob.detach())
            torch.testing.assert_close(model.score(x, t), score)
            alpha, sigma = process.alpha(t), process.sigma(t)
            torch.testing.assert_close(model(x, t).x0, (x + sigma**2 * score) / alpha)

    def test_posterior_mean_by_importance_sampling(self):
        model, x, t = self.make(Linear(), 0.2), rand(3, 5, seed=4), 0.5
        x0 = model.draw(400_000, rng=torch.Generator().manual_seed(0))
        alpha, sigma = Linear().alpha(t), Linear().sigma(t)
        share = (-(x[:, None] - alpha * x0).square().sum(-1) / (2 * sigma**2)).softmax(-1)
        spread = (share @ x0.square() - (share @ x0).square()).sqrt()
        off = (model(x, t).x0 - share @ x0).abs()
        assert (off < 5 * spread * share.square().sum(-1, keepdim=True).sqrt()).all()

    def test_shares_sharpen_on_their_own_subspace_and_fade_in_noise(self):
        model = LowRankMixture(VE(), self.bases(), weights=self.weights)
        which = torch.tensor([0, 1, 2, 0])
        x0 = model.draw_of(which, rng=torch.Generator().manual_seed(1))
        near = VE().time_at(2 * torch.tensor(1e4).log())
        sharp = model.shares(x0, near)
        torch.testing.assert_close(sharp, torch.eye(3).double()[which], atol=1e-6, rtol=0)
        wide = LowRankMixture(VE(high=1e8), self.bases(), weights=self.weights)
        torch.testing.assert_close(
            wide.shares(x0, 1.0), (self.weights / 3.5).double().expand(4, 3), atol=1e-6, rtol=0
        )
        assert wide(x0, 1.0).x0.abs().max() < 1e-6

    def test_rank_zero_is_the_mixture_and_full_rank_the_gaussian(self):
        x = rand(4, 5)
        flat = LowRankMixture(Linear(), torch.zeros(3, 5, 0), 0.4, self.weights, self.means)
        plain = Mixture(Linear(), self.means, 0.4, self.weights)
        full = LowRankMixture(Linear(), torch.linalg.qr(rand(5, 5)).Q[None], 0.5)
        round_ = Gaussian(Linear(), 0.0, 1.25**0.5)
        for a, b in ((flat, plain), (full, round_)):
            for t in (0.05, 1.0):
                for mine, theirs in zip(a(x, t), b(x, t), strict=True):
                    torch.testing.assert_close(mine, theirs)
                torch.testing.assert_close(a.score(x, t), b.score(x, t))
        torch.testing.assert_close(flat.log_prob(x, 0.3), plain.log_prob(x, 0.3))

    def test_only_the_span_and_the_order_matter(self):
        turned = [u @ torch.linalg.qr(rand(u.shape[1], u.shape[1], seed=9)).Q for u in self.bases()]
        x, order = rand(4, 5), [2, 0, 1]
        plain = self.make(Linear(), 0.1)
        other = LowRankMixture(
            Linear(), [turned[k] for k in order], 0.1, self.weights[order], self.means[order]
        )
        torch.testing.assert_close(plain(x, 0.3).x0, other(x, 0.3).x0)
        torch.testing.assert_close(plain.log_prob(x, 0.3), other.log_prob(x, 0.3))

    def test_draw(self):
        model = self.make(Linear(), (0.1, 0.2, 0.3))
        x = model.draw_of(torch.full((60_000,), 2), rng=torch.Generator().manual_seed(0))
        u = self.bases()[2]
        torch.testing.assert_close(
            x.T.cov(), u @ u.T + 0.09 * torch.eye(5).double(), atol=0.03, rtol=0
        )
        torch.testing.assert_close(x.mean(0), self.means[2].double(), atol=0.02, rtol=0)
        exact = self.make(Linear()).draw_of(torch.zeros(50, dtype=torch.long))
        assert torch.linalg.matrix_rank(exact - self.means[0]) == 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_pictures_labels_dtype_and_both_ends(self, dtype):
        u = torch.linalg.qr(rand(2, 12, 3)).Q.reshape(2, 3, 2, 2, 3)
        model = LowRankMixture(Cosine(), u, labels=torch.tensor([4, 7]))
        x = rand(4, 3, 2, 2).to(dtype)
        for t in (0.0, 1e-3, 0.5, torch.tensor([0.2, 0.4, 0.6, 1.0])):
            p = model(x, t)
            assert p.x0.dtype == dtype
            assert p.x0.isfinite().all()
            torch.testing.assert_close(Cosine().corrupt(p.x0, t, p.noise), x, atol=1e-4, rtol=1e-4)
        alone = LowRankMixture(Cosine(), u[1:])
        torch.testing.assert_close(model(x, 0.4, label=7).x0, alone(x, 0.4).x0)
        torch.testing.assert_close(model.log_prob(x, 0.4, label=7), alone.log_prob(x, 0.4))
        torch.testing.assert_close(model(x, 0.4).x0[2:3], model(x[2:3], 0.4).x0)

    def test_float32_keeps_up_near_the_data(self):
        model = LowRankMixture(Linear(), self.bases())
        x0 = model.draw(64, rng=torch.Generator().manual_seed(0))
        t = 1e-4
        x = Linear().corrupt(x0, t, rand(64, 5, seed=2))
        torch.testing.assert_close(
            model.log_prob(x.float(), t).double(), model.log_prob(x, t), atol=1e-2, rtol=1e-4
        )

    def test_refusals(self):
        with pytest.raises(ValueError, match="expected orthonormal columns"):
            LowRankMixture(Linear(), 2 * torch.eye(3)[None])
        with pytest.raises(ValueError, match="rank 4 in 3 dimensions"):
            LowRankMixture(Linear(), torch.eye(3, 4)[None])
        with pytest.raises(ValueError, match="means of shape"):
            LowRankMixture(Linear(), torch.eye(3)[None], means=torch.zeros(2, 3))


def test_mix_is_guidance():
    a, b = (Prediction(rand(2, 3, seed=i), rand(2, 3, seed=9 + i)) for i in (0, 1))
    out = a.mix(b, 3.0)
    torch.testing.assert_close(out.x0, a.x0 + 3 * (b.x0 - a.x0))
    assert torch.equal(a.mix(b, 0.0).noise, a.noise)
    rows = a.mix(b, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(rows.x0, torch.stack([a.x0[0], b.x0[1]]))


class TestSample:
    model = Gaussian(Cosine(), 0.0, 1.0)

    @pytest.mark.parametrize(
        ("times", "words"),
        [
            (torch.tensor([1.0]), "two or more"),
            (torch.tensor([1, 0]), "floating-point"),
            (torch.tensor([1.5, 0.0]), r"\[0, 1\]"),
            (torch.tensor([1.0, 0.2, 0.6]), "one direction"),
            (torch.tensor([float("nan"), 0.2]), r"\[0, 1\]"),
        ],
    )
    def test_bad_times(self, times, words):
        with pytest.raises(ValueError, match=words):
            sample(self.model, DDIM(), rand(2, 2), times)

    def test_non_finite_names_the_step(self):
        class Broken(Gaussian):
            def forward(self, x, t, **cond):
                out = super().forward(x, t)
                return out._replace(x0=out.x0 / 0) if t < 0.6 else out

        with pytest.raises(FloatingPointError, match="step 2 of DDIM"):
            sample(Broken(Cosine()), DDIM(), rand(2, 2), Uniform()(Cosine(), 4))

    def test_on_step_may_replace(self):
        seen = []

        def hook(index, s, step):
            seen.append((index, float(s)))
            return step.x.clamp(-0.1, 0.1)

        out = sample(self.model, DDIM(), rand(8, 2), Uniform()(Cosine(), 4), on_step=hook)
        assert [i for i, _ in seen] == [0, 1, 2, 3]
        assert seen[-1][1] == 0
        assert out.abs().max() <= 0.1

    def test_inversion_comes_back(self):
        model = Mixture(Cosine(), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.4)
        x, times = rand(8, 2), Uniform(0.95, 0.02)(Cosine(), 400)
        down = sample(model, Heun(), x, times)
        torch.testing.assert_close(sample(model, Heun(), down, times.flip(0)), x, atol=2e-3, rtol=0)


def table(n=1000):
    beta = torch.linspace(1e-4, 0.02, n, dtype=torch.float64)
    return Tabulated.from_alphas_cumprod((1 - beta).cumprod(0))


class TestGrids:
    @pytest.mark.parametrize("grid", [Uniform(), UniformLogSNR(), Karras(), Beta(), Tapered()])
    @pytest.mark.parametrize("process", [Linear(), VE(), table()])
    @pytest.mark.parametrize("steps", [1, 2, 7])
    def test_fall_to_clean(self, grid, process, steps):
        times = grid(process, steps)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert times[-1] == 0

    def test_log_snr_steps_are_even(self):
        snr = Linear().logsnr(UniformLogSNR(0.9, 0.1)(Linear(), 9)[:-1])
        torch.testing.assert_close(snr.diff(), snr.diff()[:1].expand(8), rtol=1e-6, atol=0)

    def test_karras_formula(self):
        times = Karras(rho=7, start=1.0, end=0.01)(VE(), 6)
        sigma = VE().sigma(times[:-1])
        low, high = sigma[-1] ** (1 / 7), sigma[0] ** (1 / 7)
        expected = (high + torch.linspace(0, 1, 6, dtype=torch.float64) * (low - high)) ** 7
        torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=0)
        assert abs(float(times[-2]) - 0.01) < 1e-9

    def test_tapered_steps_shorten_by_rule_and_never_repeat(self):
        times = Tapered(0.4, 1.3)(Linear(), 5)
        left = torch.tensor([4.4, 3.4, 2.4, 1.4, 0.4], dtype=torch.float64)
        torch.testing.assert_close(times[:-1], (left / 4.4) ** 1.3)
        assert times[-1] == 0
        long = table(1000)
        for steps in (1, 7, 333, 1000):
            assert torch.equal(Tapered(1.0, 1.0)(long, steps), Trailing()(long, steps))
            index = long.index_at(Tapered()(long, steps))
            torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-6)
            assert (index.diff() < -0.5).all()
            assert index[0].round() == 999
        with pytest.raises(ValueError, match="tail=0"):
            Tapered(tail=0)

    @pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
    @pytest.mark.parametrize("steps", [3, 7, 10, 50])
    def test_spacings_are_those_of_diffusers(self, spacing, steps):
        from diffusers import DDIMScheduler

        theirs = DDIMScheduler(
            timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0
        )
        theirs.set_timesteps(steps)
        grid = {"trailing": Trailing(), "leading": Leading(1), "linspace": Linspace()}[spacing]
        process = table()
        index = process.index_at(grid(process, steps)[:-1]).round().long()
        assert index.tolist() == theirs.timesteps.tolist()

    @pytest.mark.parametrize(("name", "grid"), [("karras", Karras()), ("beta", Beta())])
    @pytest.mark.parametrize("steps", [2, 5, 20])
    def test_sigma_spacings_are_those_of_diffusers(self, name, grid, steps):
        from diffusers import EulerDiscreteScheduler

        theirs = EulerDiscreteScheduler(beta_end=0.02, **{f"use_{name}_sigmas": True})
        theirs.set_timesteps(steps)
        process = table()
        t = grid(process, steps)
        torch.testing.assert_close(
            process.sigma(t) / process.alpha(t), theirs.sigmas.double(), rtol=1e-4, atol=1e-6
        )

    def test_last(self):
        process = table(100)
        assert Leading(last="clean")(process, 10)[-1] == 0
        assert Leading(last="first")(process, 10)[-1] == 0.01

    def test_bad(self):
        with pytest.raises(ValueError, match="positive integer"):
            Uniform()(Linear(), 0)
        with pytest.raises(ValueError, match="table entries"):
            Trailing()(Linear(), 4)
        with pytest.raises(ValueError, match="only 10"):
            Trailing()(table(10), 11)
        with pytest.raises(ValueError, match="expected 4"):
            Levels((1.0, 0.0))(Linear(), 3)
        for start, end in ((1.0, 0.1), (0.9, 0.0)):
            with pytest.raises(ValueError, match="infinite"):
                UniformLogSNR(start, end)(Cosine(), 4)
        for grid in (Uniform, UniformLogSNR, Karras, Beta):
            for start, end in ((1.5, 0.1), (0.3, 0.4), (0.9, -0.1), (float("nan"), 0.1)):
                with pytest.raises(ValueError, match="expected 0 <= end < start <= 1"):
                    grid(start=start, end=end)
        for times in ((1.2, 0.0), (1.0, 0.5, 0.5), (1.0,), (0.5, float("nan"))):
            with pytest.raises(ValueError, match="falling levels"):
                Levels(times)
        with pytest.raises(ValueError, match="rho=0"):
            Karras(rho=0)
        with pytest.raises(ValueError, match="b=-1"):
            Beta(b=-1)
        with pytest.raises(ValueError, match="above zero"):
            Karras()(Cosine(), 4)  # pure noise has no finite sigma / alpha

    def test_bad_deviations(self):
        for std in (-0.1, float("nan"), [0.1, -0.2]):
            with pytest.raises(ValueError, match="deviations, zero or above"):
                Gaussian(Linear(), 0.0, std)
        with pytest.raises(ValueError, match="deviations, zero or above"):
            Mixture(Linear(), torch.zeros(2, 2), -0.1)


class Half(Operator):
    """Mean of neighbours."""

    def forward(self, x):
        return (x[:, ::2] + x[:, 1::2]) / 2


def test_operator_adjoint_by_default():
    a, x, y = Half(), rand(3, 8), rand(3, 4, seed=1)
    torch.testing.assert_close((a(x) * y).sum(), (x * a.adjoint(y, x)).sum())
    with pytest.raises(NotImplementedError, match="pseudo-inverse"):
        a.pinv(y)


class Regression(Objective):
    """Two players: one fits a line, the other fits the first one's answer."""

    players = ("student", "critic")

    def __init__(self, broken_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.critic = nn.Linear(3, 1)
        self.broken_at, self.count = broken_at, 0

    def loss(self, player, batch, *, rng=None):
        self.count += player == "student"
        guess = self.student(batch["x"])
        if player == "student":
            term = (guess - batch["y"]).square().mean()
            if self.count == self.broken_at:
                term = term * float("nan")
        else:
            term = (self.critic(batch["x"]) - guess).square().mean()
        return Loss(term, {"square": term})


PLAYERS = Regression.players


def batches(rng):
    x = torch.randn(16, 3, generator=rng)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def run(folder=None, *, steps=60, stop=None, broken_at=None, data=batches):
    objective = Regression(broken_at)
    torch.manual_seed(1)
    optimizers = {p: torch.optim.AdamW(objective.parameters_of(p), 1e-2) for p in objective.players}
    done = fit(
        objective,
        data,
        optimizers,
        steps=steps,
        rng=torch.Generator().manual_seed(2),
        schedule=warmup_cosine(0.1),
        ema=0.9,
        folder=folder,
        save_every=25,
        log_every=10,
        progress=False,
        on_step=(lambda i, losses: i == stop) if stop else None,
    )
    return objective, done


class TestFit:
    @pytest.mark.parametrize("order", [("no", "bf16", "no"), ("bf16", "no", "bf16")])
    def test_every_run_has_its_own_precision(self, order):
        types = {"no": torch.float32, "bf16": torch.bfloat16}
        for precision in order:
            objective, seen = Regression(), []
            objective.student.register_forward_hook(lambda m, a, out, s=seen: s.append(out.dtype))
            optimizers = {p: torch.optim.SGD(objective.parameters_of(p), 1e-2) for p in PLAYERS}
            fit(objective, batches, optimizers, steps=1, precision=precision, progress=False)
            assert set(seen) == {types[precision]}
            assert all(p.dtype == torch.float32 for p in objective.parameters())

    def test_learns(self):
        _, done = run(steps=200)
        assert done.history[-1]["student.loss"] < 0.3 * done.history[0]["student.loss"]

    def test_resume_is_exact(self, tmp_path):
        whole, a = run(tmp_path / "a")
        run(tmp_path / "b", stop=33)
        torch.manual_seed(77)
        resumed, b = run(tmp_path / "b")
        assert b.step == 60
        for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q)
        for p, q in zip(a.ema.shadow, b.ema.shadow, strict=True):
            assert torch.equal(p, q)
        rows = [json.loads(r) for r in (tmp_path / "b/log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows] == [10, 20, 30, 40, 50, 60]

    def test_resume_with_a_list_skips_what_was_seen(self, tmp_path):
        rng = torch.Generator().manual_seed(5)
        data = [batches(rng) for _ in range(7)]
        whole, _ = run(data=data)
        run(tmp_path, data=data, stop=20)
        resumed, _ = run(tmp_path, data=data)
        for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_non_finite_loss_names_step_player_term(self, tmp_path):
        with pytest.raises(FloatingPointError, match="step 31, player 'student', term 'square'"):
            run(tmp_path, broken_at=31)
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 25

    def test_players_keep_to_themselves(self):
        """The critic's loss leaves a gradient on the student; it must not be used or clipped."""
        objective = Regression()
        before = [p.detach().clone() for p in objective.student.parameters()]
        optimizers = {
            "student": torch.optim.SGD(objective.parameters_of("student"), 0.0),
            "critic": torch.optim.SGD(objective.parameters_of("critic"), 0.1),
        }
        fit(objective, batches, optimizers, steps=3, progress=False)
        for p, q in zip(objective.student.parameters(), before, strict=True):
            assert torch.equal(p, q)
            assert p.grad is None

    def test_checkpoint_of_another_model(self, tmp_path):
        run(tmp_path, steps=5)
        other = Regression()
        other.critic = nn.Linear(3, 2)
        opts = {p: torch.optim.SGD(other.parameters_of(p), 0.1) for p in other.players}
        with pytest.raises(ValueError, match="another model"):
            fit(other, batches, opts, steps=5, folder=tmp_path, progress=False)

    def test_bad_optimizers(self):
        objective = Regression()
        with pytest.raises(ValueError, match="expected one for each"):
            fit(objective, batches, torch.optim.SGD(objective.parameters(), 0.1), steps=1)

    def test_empty_batches(self):
        objective = Regression()
        opts = {p: torch.optim.SGD(objective.parameters_of(p), 0.1) for p in objective.players}
        with pytest.raises(ValueError, match="gave nothing"):
            fit(objective, [], opts, steps=1, progress=False)

    def test_ema_formula(self):
        p = nn.Parameter(torch.zeros(2))
        ema = Ema([p], 0.5)
        with torch.no_grad():
            p.fill_(1.0)
        ema.update()  # decay min(0.5, 1/10)
        torch.testing.assert_close(ema.shadow[0], torch.full((2,), 0.9))
        with ema.applied():
            torch.testing.assert_close(p.data, torch.full((2,), 0.9))
        assert torch.equal(p.data, torch.ones(2))


def test_no_minutes_left_is_no_step():
    objective = Regression()
    opts = {p: torch.optim.SGD(objective.parameters_of(p), 0.1) for p in objective.players}
    assert fit(objective, batches, opts, steps=5, minutes=-1.0, progress=False).step == 0


@pytest.mark.parametrize(("steps", "minutes"), [(40, None), (10**9, 0.005), (40, 60.0)])
def test_progress_follows_what_ends_the_run(monkeypatch, steps, minutes):
    from rich.progress import Progress

    shown, objective = [], Regression()
    monkeypatch.setattr(Progress, "update", lambda *a, completed, **k: shown.append(completed))
    opts = {p: torch.optim.SGD(objective.parameters_of(p), 0.1) for p in objective.players}
    done = fit(objective, batches, opts, steps=steps, minutes=minutes, log_every=1)
    assert done.step == len(shown) > 1
    assert shown == sorted(shown)
    assert 0 < shown[0] < 80 < shown[-1] <= 100
