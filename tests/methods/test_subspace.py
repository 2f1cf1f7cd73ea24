"""Subspaces: the closed forms, PCA, K-subspaces, recovery, the Jacobian of real networks."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_sd
from torch import nn

import effuse
from effuse.core import Denoiser, LowRankMixture, Mixture, fit
from effuse.processes import VE, Cosine, Flow, Linear
from effuse.structure import (
    PCA,
    Cells,
    Hard,
    KSubspaces,
    LowRankAutoencoder,
    Soft,
    Subspaces,
    Trained,
    directions,
    flat,
    jacobian,
    jacobian_spectrum,
    min_samples,
    numerical_rank,
    principal,
    random_bases,
    random_start,
    recovery_error,
    snr,
    spectral_start,
    subspace_cluster,
    transition,
)

LOW = (0.005, 0.005)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def sigma_points(n):
    """Noises of mean zero and covariance I: averaging a quadratic over them is exact."""
    eye = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
    return torch.cat([eye, -eye])


def expected(objective, x0, t):
    """The loss of each row, averaged over the noise exactly where it is quadratic in it."""
    points = sigma_points(x0.shape[-1])
    rows = x0.repeat_interleave(len(points), 0)
    error = objective.error(rows, torch.tensor(t).double(), points.repeat(len(x0), 1))
    return error.reshape(len(x0), -1).mean(1)


def projector(bases):
    return bases @ bases.mT


class TestAutoencoder:
    @pytest.mark.parametrize("process", [Linear(), VE(), Flow(), Cosine()], ids=repr)
    def test_predicts_as_the_exact_mixture(self, process):
        bases = random_bases(9, (3, 1, 2), rng=seeded())
        weights = (0.5, 2.0, 1.0)
        model = LowRankAutoencoder(process, bases, weights)
        exact = LowRankMixture(process, bases, weights=torch.tensor(weights))
        x = rand(5, 3, 3)
        flat_x = x.flatten(1)
        for t in (0.02, 0.5, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])):
            mine, theirs = model(x, t), exact(flat_x, t)
            torch.testing.assert_close(mine.x0.flatten(1), theirs.x0, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(mine.noise.flatten(1), theirs.noise, rtol=1e-6, atol=1e-7)
        again = model.exact()
        torch.testing.assert_close(again(flat_x, 0.3).x0, exact(flat_x, 0.3).x0)
        assert again.log_prob(flat_x, 0.3).isfinite().all()

    def test_turning_or_reordering_the_bases_changes_nothing(self):
        bases = random_bases(8, (2, 2, 2), mutual=False, rng=seeded())
        turn = torch.linalg.qr(rand(3, 2, 2)).Q
        x = rand(6, 8)
        plain = LowRankAutoencoder(Linear(), bases)(x, 0.4).x0
        other = LowRankAutoencoder(Linear(), (bases @ turn)[[2, 0, 1]])(x, 0.4).x0
        torch.testing.assert_close(plain, other)

    def test_one_subspace_is_linear(self):
        bases = random_bases(7, (3,), rng=seeded())
        model, t = LowRankAutoencoder(Linear(), bases).requires_grad_(False), 0.3
        alpha, sigma = Linear().alpha(t), Linear().sigma(t)
        matrix = jacobian(model, rand(2, 7), t)
        torch.testing.assert_close(
            matrix, (alpha / (alpha**2 + sigma**2) * projector(bases)).expand(2, 7, 7)
        )
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values[:, :3], values[:, :1].expand(2, 3))
        assert (numerical_rank(values) == 3).all()

    def test_hard_shares_take_the_likeliest_only(self):
        bases = random_bases(6, (2, 2), rng=seeded())
        model = LowRankAutoencoder(Linear(), bases, share=Hard())
        x, t = rand(20, 6), 0.5
        one = [LowRankAutoencoder(Linear(), bases[k : k + 1])(x, t).x0 for k in (0, 1)]
        energy = (x @ bases).square().sum(-1)
        torch.testing.assert_close(
            model(x, t).x0, torch.where((energy[0] > energy[1])[:, None], *one)
        )
        logits, clean = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 2.0]])
        assert Hard()(logits).tolist() == [[0, 1]]
        assert Hard()(logits, clean).tolist() == [[1, 0]]
        assert torch.equal(Soft()(logits, clean), logits.softmax(-1))

    def test_bases_stay_orthonormal_and_models_side_by_side_are_apart(self):
        starts = random_bases(6, (2, 1), mutual=False, stack=(3,), rng=seeded())
        x0 = rand(3, 10, 6, seed=1)
        model = LowRankAutoencoder(Linear(), starts.clone())
        objective = Subspaces(model)
        noise, t = rand(3, 10, 6, seed=2), torch.rand(3, 10, generator=seeded()).double()
        both = objective.error(x0, t, noise)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            objective.error(x0, t, noise).sum().backward()
            optimizer.step()
        for m in range(3):
            one = LowRankAutoencoder(Linear(), starts[m].clone())
            alone = Subspaces(one)
            torch.testing.assert_close(alone.error(x0[m], t[m], noise[m]), both[m])
            single = torch.optim.Adam(one.parameters(), 0.1)
            for _ in range(5):
                single.zero_grad()
                alone.error(x0[m], t[m], noise[m]).sum().backward()
                single.step()
            torch.testing.assert_close(projector(one.bases), projector(model.bases[m]))
            gram = one.bases.mT @ one.bases
            torch.testing.assert_close(gram[0], torch.eye(2).double())
            torch.testing.assert_close(gram[1], torch.diag(torch.tensor([1.0, 0.0])).double())

    def test_refusals(self):
        bases = random_bases(6, (2, 2), rng=seeded())
        with pytest.raises(ValueError, match="expected orthonormal columns"):
            LowRankAutoencoder(Linear(), 1.01 * bases)
        with pytest.raises(ValueError, match="expected \\(K, n, d\\)"):
            LowRankAutoencoder(Linear(), bases[0])
        with pytest.raises(ValueError, match="expected 2 positive numbers"):
            LowRankAutoencoder(Linear(), bases, (1.0,))
        with pytest.raises(ValueError, match="side by side"):
            LowRankAutoencoder(Linear(), bases[None])(rand(2, 6), 0.5)
        with pytest.raises(ValueError, match="expected 0 < low"):
            Subspaces(LowRankAutoencoder(Linear(), bases), (0.0, 1.0))


class TestTheorems:
    @pytest.mark.parametrize("weight", [flat, snr, lambda a, s: a**3])
    @pytest.mark.parametrize("t", [0.05, 0.5])
    def test_one_subspace_the_expected_loss_is_that_of_pca(self, weight, t):
        x0 = rand(12, 6) * torch.tensor([3.0, 2, 1.5, 0.5, 0.4, 0.1]).double()
        bases = random_bases(6, (2,), rng=seeded())
        objective = Subspaces(LowRankAutoencoder(Linear(), bases), weight=weight)
        a, s = Linear().alpha(t), Linear().sigma(t)
        g = a / (a**2 + s**2)
        captured = (x0 @ bases[0]).square().sum(-1)
        closed = x0.square().sum(-1) - (2 * g * a - (g * a) ** 2) * captured + 2 * (g * s) ** 2
        torch.testing.assert_close(
            expected(objective, x0, t), weight(a.expand(12), s.expand(12)) * closed
        )
        best = principal(x0, 2)
        model = LowRankAutoencoder(Linear(), best[None])
        objective = Subspaces(model, weight=weight)
        expected(objective, x0, t).sum().backward()
        assert model.raw.grad.abs().max() < 1e-10 * float(weight(a, s))
        turned = best + 0.05 * rand(6, 2, seed=5)
        worse = LowRankAutoencoder(Linear(), torch.linalg.qr(turned).Q[None])
        least = expected(objective, x0, t).sum()
        assert expected(Subspaces(worse, weight=weight), x0, t).sum() > least

    def test_hard_shares_the_expected_loss_is_that_of_k_subspaces(self):
        x0, t = rand(15, 6), 0.3
        a, s = Linear().alpha(t), Linear().sigma(t)
        g = a / (a**2 + s**2)
        for seed in range(4):
            bases = random_bases(6, (2, 2, 2), mutual=False, rng=seeded(seed))
            model = LowRankAutoencoder(Linear(), bases, share=Hard())
            captured = (x0 @ bases).square().sum(-1).amax(0)
            closed = x0.square().sum(-1) - (2 * g * a - (g * a) ** 2) * captured + 2 * (g * s) ** 2
            torch.testing.assert_close(expected(Subspaces(model), x0, t), closed)

    def test_training_finds_pca(self):
        x0 = rand(30, 8) * torch.tensor([3.0, 2.5, 2, 0.3, 0.2, 0.2, 0.1, 0.1]).double()
        model = LowRankAutoencoder(Linear(), random_bases(8, (3,), rng=seeded()))
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        objective = Subspaces(model)
        begun = recovery_error(model.bases.detach(), principal(x0, 3)[None])
        fit(objective, [{"x0": x0}], optimizer, steps=400, rng=seeded(), progress=False)
        assert begun > 1
        assert recovery_error(model.bases.detach(), principal(x0, 3)[None]) < 0.1

    @pytest.mark.parametrize("share", [Soft(), Hard()])
    def test_training_finds_the_clusters_and_padding_counts_for_nothing(self, share):
        cells = Cells.draw(12, (2, 2), (6,), 4, rng=seeded(3))
        learner = Trained(300, 0.05, restarts=6, levels=(0.02, 0.3), share=share)
        assert cells.errors(learner, seeded()).median() < 0.3
        model = LowRankAutoencoder(Linear(), random_bases(12, (2, 2), rng=seeded()))
        objective = Subspaces(model)
        padded = torch.cat([cells.x[0], torch.zeros(5, 12).double()])
        keep = padded.abs().amax(-1) > 0

        def draws(batch):
            total = [objective.loss("student", batch, rng=seeded(i)).total for i in range(400)]
            return torch.stack(total).mean()

        with torch.no_grad():
            mine, theirs = draws({"x0": padded, "keep": keep}), draws({"x0": cells.x[0]})
        assert mine == pytest.approx(float(theirs), rel=0.05)


class TestClustering:
    def test_random_bases(self):
        bases = random_bases(7, (3, 1, 2), stack=(4,), rng=seeded())
        assert bases.shape == (4, 3, 7, 3)
        every = bases.permute(0, 2, 1, 3).flatten(2)
        gram = torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1, 0])).double()
        torch.testing.assert_close(every.mT @ every, gram.expand(4, 9, 9))
        assert random_bases(3, (2, 2), mutual=False, rng=seeded()).shape == (2, 3, 2)
        with pytest.raises(ValueError, match="sum of ranks at most 3"):
            random_bases(3, (2, 2))

    def test_principal_is_the_svd_and_completes_what_is_missing(self):
        x = rand(3, 9, 5)
        vt = torch.linalg.svd(x).Vh
        torch.testing.assert_close(projector(principal(x, 2)), projector(vt[:, :2].mT))
        x[0, 1:], x[1] = 0, 0  # one point, and none
        found = principal(x, 3)
        torch.testing.assert_close(found.mT @ found, torch.eye(3).double().expand(3, 3, 3))
        first = x[0, :1].T / x[0, 0].norm()
        torch.testing.assert_close(projector(found[0]) @ first, first)
        torch.testing.assert_close(projector(found[2]), projector(vt[2, :3].mT))
        few = principal(rand(2, 5), 4)  # fewer points than directions
        torch.testing.assert_close(projector(few) @ rand(2, 5).T, rand(2, 5).T)

    @pytest.mark.parametrize(("start", "restarts"), [(spectral_start, 60), (random_start, 300)])
    def test_k_subspaces(self, start, restarts):
        cells = Cells.draw(10, (3, 1, 2), (7,), 5, rng=seeded(1))
        options = {"restarts": restarts, "start": start}
        found = subspace_cluster(cells.x, (3, 1, 2), rng=seeded(2), **options)
        truth = cells.x.square().sum((-2, -1))
        torch.testing.assert_close(found.captured, truth)
        assert recovery_error(found.bases, cells.true).max() < 1e-6
        energy = (cells.x.unsqueeze(1) @ found.bases).square().sum(-1)
        assert torch.equal(energy.argmax(1), found.labels)
        alone = subspace_cluster(cells.x[0], (3, 1, 2), rng=seeded(3), **options)
        torch.testing.assert_close(alone.captured, truth[0])

    def test_the_affinity_tells_orthogonal_subspaces_apart_at_once(self):
        cells = Cells.draw(48, (6, 6, 6), (8,), 6, rng=seeded(1))
        start = spectral_start(cells.x, (6, 6, 6), 2, seeded(2))
        assert start.shape == (2, 6, 3, 48, 6)
        assert max(recovery_error(s, cells.true).max() for s in start) < 1e-6
        padded = torch.cat([cells.x, torch.zeros(6, 9, 48).double()], 1)
        again = spectral_start(padded, (6, 6, 6), 2, seeded(2))
        assert max(recovery_error(s, cells.true).max() for s in again) < 1e-6

    def test_steps_and_restarts_only_raise_what_is_captured(self):
        x = rand(40, 6)
        short = [
            float(
                subspace_cluster(
                    x, (2, 2), restarts=1, steps=s, start=random_start, rng=seeded(1)
                ).captured
            )
            for s in (1, 2, 3, 5, 20)
        ]
        assert sorted(short) == short
        assert short[-1] > short[0]
        many = subspace_cluster(x, (2, 2), restarts=30, start=random_start, rng=seeded(1)).captured
        assert many >= short[-1] - 1e-9

    def test_recovery_error(self):
        true = random_bases(8, (2, 2, 2), rng=seeded())
        turn = torch.linalg.qr(rand(3, 2, 2)).Q
        assert recovery_error((true @ turn)[[1, 2, 0]], true) < 1e-6
        found = true.clone()
        found[0, :, 0] = torch.linalg.qr(torch.cat([*true], -1), mode="complete").Q[:, -1]
        assert recovery_error(found, true) == pytest.approx(math.sqrt(2))
        angle = 0.3
        tilted = torch.eye(4, 1).double()[None]
        other = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0], [0]]).double()[None]
        assert recovery_error(tilted, other) == pytest.approx(math.sqrt(2) * math.sin(angle))

    def test_the_best_pairing_is_that_of_the_worst_pair(self):
        """Where the least sum and the least maximum differ, the maximum counts."""
        from effuse.structure.clustering import _bottleneck

        cost = torch.tensor([[0.0, 1.0, 9], [9, 0, 1], [1, 9, 1.8]])
        assert _bottleneck(cost) == 1.0  # the least sum, 1.8, takes the diagonal
        square = rand(5, 4, 4).abs()
        from itertools import permutations

        brute = [
            min(max(float(c[i, p[i]]) for i in range(4)) for p in permutations(range(4)))
            for c in square
        ]
        assert [_bottleneck(c) for c in square] == pytest.approx(brute)

    @pytest.mark.parametrize(("d", "count"), [(4, 1), (4, 3), (6, 4)])
    def test_too_few_samples_miss_at_least_what_they_leave_open(self, d, count):
        cells = Cells.draw(24, (d,), (count,), 6, rng=seeded())
        found = PCA()(cells.x, (d,), seeded(1))
        outside = projector(found[:, 0]) @ cells.true[:, 0] - cells.true[:, 0]
        error = recovery_error(found, cells.true)
        assert (error > math.sqrt(d - count)).all()  # random completion: near sqrt(2 (d - N))
        assert (error <= math.sqrt(2 * (d - count)) + 1e-9).all()
        assert (outside.flatten(1).norm(dim=1) <= math.sqrt(d - count) + 1e-9).all()

    def test_min_samples(self):
        assert min_samples((3, 1, 2)) == 6
        assert min_samples((3, 3), (0.5, 0.5)) == 6
        assert min_samples((3, 3), (0.3, 0.7)) == 10
        with pytest.raises(ValueError, match="positive"):
            min_samples((3,), (0.0,))


class TestSweep:
    def test_transition(self):
        errors = torch.tensor([[1.0, 1], [0, 0], [1, 0.6], [0, 0.4], [0, 0]])
        assert transition((2, 3, 4, 5, 6), errors) == 5
        assert transition((2, 3), torch.ones(2, 3)) is None

    def test_cells_have_the_counts_they_say(self):
        cells = Cells.draw(9, (2, 2), (1, 3), 2, noise=0.0, rng=seeded())
        there = (cells.x.abs().amax(-1) > 0).sum(-1)
        assert there.tolist() == [2, 2, 6, 6]
        shares = (cells.x.unsqueeze(1) @ cells.true).square().sum(-1)
        torch.testing.assert_close(shares.amax(1), cells.x.square().sum(-1))
        loud = Cells.draw(9, (2,), (4000,), 1, noise=0.5, rng=seeded())
        u = loud.true[0, 0]
        cov = loud.x[0].T.cov()
        eye = torch.eye(9).double()
        torch.testing.assert_close(cov, u @ u.T + 0.25 * eye, atol=0.1, rtol=0)

    @pytest.mark.parametrize(
        ("ranks", "learner"),
        [((3,), PCA()), ((3, 3), KSubspaces(20)), ((3,), Trained(300, 0.2, levels=LOW))],
    )
    def test_the_transition_is_at_the_rank(self, ranks, learner):
        counts = (1, 2, 3, 4, 5, 6)
        cells = Cells.draw(16, ranks, counts, 5, rng=seeded())
        errors = cells.errors(learner, seeded())
        assert (errors[:2] > 0.5).all()
        assert transition(counts, errors) in (3, 4)

    def test_pca_of_several(self):
        with pytest.raises(ValueError, match="take KSubspaces"):
            PCA()(rand(1, 4, 5), (2, 2), seeded())


class Net(Denoiser):
    """A small network of 48 inputs."""

    def __init__(self, n=48):
        super().__init__()
        self.process = Linear()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(n, 64), nn.Tanh(), nn.Linear(64, n)).double()
            spread = torch.logspace(0, -3, n).double()
            with torch.no_grad():
                self.body[2].weight.copy_(3 * spread[:, None] * torch.randn(n, 64))

    def forward(self, x, t, **cond):
        return self.process.complete(x, t, x0=self.body(x.flatten(1)).reshape(x.shape))


class TestJacobian:
    def test_power_iteration_matches_the_svd(self):
        net, x = Net(), rand(3, 48)
        by_hand = torch.stack(
            [torch.autograd.functional.jacobian(lambda y: net(y[None], 0.5).x0[0], r) for r in x]
        )
        torch.testing.assert_close(jacobian(net, x, 0.5), by_hand)
        u, s, vt = torch.linalg.svd(by_hand)
        found = jacobian_spectrum(net, x, 0.5, 5)
        torch.testing.assert_close(found.values, s[:, :5])
        for mine, true in ((found.right, vt), (found.left, u.mT)):
            cosine = (mine * true[:, :5]).sum(-1)
            assert (1 - cosine.square()).clamp_min(0).sqrt().max() < 1e-4
        torch.testing.assert_close(
            torch.einsum("bij,brj->bri", by_hand, found.right),
            found.values.unsqueeze(-1) * found.left,
        )
        largest = found.right.gather(-1, found.right.abs().argmax(-1, keepdim=True))
        assert (largest > 0).all()

    def test_rows_are_apart_and_picture_shapes_stay(self):
        net, x = Net(), rand(4, 3, 4, 4)
        t = torch.tensor([0.2, 0.4, 0.6, 0.8])
        both = jacobian_spectrum(net, x, t, 3, steps=4, chunk=2)
        alone = jacobian_spectrum(net, x[2:3], 0.6, 3, steps=4)
        assert both.right.shape == (4, 3, 3, 4, 4)
        torch.testing.assert_close(both.values[2:3], alone.values)
        torch.testing.assert_close(both.right[2:3], alone.right)

    def test_mixture(self):
        """Deep in one component the Jacobian is that of its subspace; a floor adds the rest."""
        bases = random_bases(20, (4, 2), rng=seeded())
        model = LowRankMixture(Linear(), bases, 0.1)
        x0 = model.draw_of(torch.tensor([0]), rng=seeded())
        t = 0.02
        x = Linear().corrupt(x0, t, rand(1, 20))
        alpha, sigma = Linear().alpha(t), Linear().sigma(t)
        found = jacobian_spectrum(model, x, t, 5)
        inside = alpha * 1.01 / (alpha**2 * 1.01 + sigma**2)
        outside = alpha * 0.01 / (alpha**2 * 0.01 + sigma**2)
        assert model.shares(x, t)[0, 0] > 1 - 1e-9
        torch.testing.assert_close(
            found.values[0], torch.stack([inside] * 4 + [outside]), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            projector(found.right[0, :4].T), projector(bases[0]), rtol=1e-4, atol=1e-4
        )

    def test_numerical_rank(self):
        values = torch.tensor([[3.0, 4 / 3, 0.0], [1, 1, 1], [1.0, 0.1, 0.0]])
        assert numerical_rank(values).tolist() == [2, 3, 1]
        assert numerical_rank(values, 0.9).tolist() == [1, 3, 1]
        # the norm counts, not the energy: 0.9 of sqrt(3) is past the second of three
        assert numerical_rank(torch.ones(100), 0.9).item() == 81
        with pytest.raises(ValueError, match="compute more"):
            numerical_rank(torch.ones(3), total=torch.tensor(2.0))
        assert numerical_rank(torch.ones(4), 0.5, total=torch.tensor(4.0)).item() == 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("build", "what"), [(tiny_ddpm, 1), (tiny_sd, ["a b"]), (tiny_dit_pipe, [3])]
    )
    def test_pipelines(self, build, what, dtype):
        """Directions of real networks: J v is the difference quotient, in half precision too."""
        pipe = build()
        model = effuse.wrap(pipe.to(dtype))
        denoiser = model.bare.given(**model.embed(what))
        x, t, h = model.prior(1, rng=seeded()), 0.5, 1e-3
        before = {k: v.clone() for k, v in model.network.state_dict().items()}
        found = jacobian_spectrum(denoiser, x, t, 2, steps=2, extra=2)
        after = model.network.state_dict()
        assert all(torch.equal(v, after[k]) and v.dtype == dtype for k, v in before.items())
        assert all(p.grad is None for p in model.network.parameters())
        model = effuse.wrap(pipe.to(torch.float32))
        wide = model.bare.given(**model.embed(what))
        if dtype == torch.float32:
            v = found.right[:, 0]
            with torch.no_grad():
                slope = (wide(x + h * v, t).x0 - wide(x - h * v, t).x0) / (2 * h)
            expected = found.values[0, 0] * found.left[:, 0]
            assert (slope - expected).norm() < 0.02 * expected.norm()
            assert torch.equal(directions(denoiser, x, t, 2, steps=2, extra=2), found.right)
        else:  # the same weights, widened: the same but for the prompt, embedded in half
            same = jacobian_spectrum(wide, x, t, 2, steps=2, extra=2)
            torch.testing.assert_close(found.values, same.values, rtol=0.02, atol=0)

    def test_refusals(self):
        net = Net()
        with pytest.raises(ValueError, match="expected at most 48"):
            jacobian_spectrum(net, rand(1, 48), 0.5, 49)
        with pytest.raises(ValueError, match="expected float32 or float64"):
            jacobian_spectrum(net, rand(1, 48).half(), 0.5, 2)


def test_an_exact_fixture_is_shared():
    """Sampling the low-rank mixture lands on its subspaces, in their proportions."""
    from effuse.core import sample
    from effuse.processes import Tapered
    from effuse.solvers import Heun

    bases = random_bases(8, (2, 1), rng=seeded())
    model = LowRankMixture(Linear(), bases, weights=torch.tensor([3.0, 1.0]))
    x = Linear().prior((600, 8), rng=seeded(1), dtype=torch.float64)
    out = sample(model, Heun(), x, Tapered()(Linear(), 60))
    energy = (out @ bases).square().sum(-1)  # (K, B)
    whole = out.square().sum(-1)
    assert ((whole - energy.amax(0)) / whole).median() < 1e-3
    first = (energy[0] > energy[1]).double().mean()
    assert first == pytest.approx(0.75, abs=0.06)
    coefficients = (out @ bases[0])[energy[0] > energy[1]]
    torch.testing.assert_close(coefficients.T.cov(), torch.eye(2).double(), atol=0.15, rtol=0)
    assert isinstance(model, Mixture)
