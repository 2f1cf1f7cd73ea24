"""The shipped pipelines: they load, they sample, and they are what the card says."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys

import pytest
import torch

from effuse import house
from effuse.house import store

torch.set_num_threads(1)

PARTS = ("autoencoder", "clip", "emoji", "emoji-dit", "pixels", "restore")
LIMIT = 60e6


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_importing_the_house_is_cheap() -> None:
    code = (
        "import sys, effuse.house; effuse.house.names(); effuse.house.prompts();"
        "bad = {'diffusers', 'transformers', 'torchvision', 'torch'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_part_is_here_and_small() -> None:
    for part in PARTS:
        assert list((store.WEIGHTS / part).rglob("*.safetensors")), part
    size = sum(f.stat().st_size for f in store.WEIGHTS.rglob("*") if f.is_file())
    assert size < LIMIT


def test_the_card_lists_every_file_by_hash() -> None:
    listed = house.card()["files"]
    here = {
        str(f.relative_to(store.WEIGHTS).as_posix()): f
        for f in store.WEIGHTS.rglob("*")
        if f.is_file() and f.name != "card.json"
    }
    assert listed.keys() == here.keys()
    for name, file in here.items():
        content = file.read_bytes()
        assert listed[name]["bytes"] == len(content), name
        assert listed[name]["sha256"] == hashlib.sha256(content).hexdigest(), name


def test_the_readme_is_written_from_the_card() -> None:
    from effuse.house import measure

    readme = store.WEIGHTS.parent / "README.md"
    assert readme.read_text() == measure.page(house.card())


def test_the_figures_meet_the_bars() -> None:
    figures = house.card()["figures"]
    assert figures["autoencoder"]["psnr_mean_of_db"] > 28
    assert figures["autoencoder"]["psnr_db_of_mean"] > 28
    assert figures["emoji"]["generated"]["count"] >= 500
    assert figures["emoji"]["ratio_generated_to_real_held_out"] >= 0.6


def test_no_pickle_and_half_precision() -> None:
    from safetensors import safe_open

    kinds = {f.suffix for f in store.WEIGHTS.rglob("*") if f.is_file()}
    assert kinds <= {".safetensors", ".json"}
    for file in store.WEIGHTS.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                # fmt: off
                assert tensors.get_slice(key).get_dtype() in ("F16", "I64", "I32"), (file, key)
                # fmt: on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emoji_samples(dtype: torch.dtype) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = house.load("emoji", dtype)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype
    pictures = pipe(
        ["red apple", "blue heart"],
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=_rng(),
        output_type="pt",
    ).images
    assert pictures.shape == (2, 3, 64, 64)
    assert torch.isfinite(pictures.float()).all()


def test_emoji_is_deterministic_and_prefixed_names_work() -> None:
    def draw() -> torch.Tensor:
        pipe = house.load("house:emoji")
        return pipe("car", num_inference_steps=2, generator=_rng(1), output_type="pt").images

    assert torch.equal(draw(), draw())


def test_emoji_round_trips_through_diffusers(tmp_path) -> None:
    from diffusers import DiffusionPipeline

    pipe = house.load("emoji")
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    a, b = (
        p("fish", num_inference_steps=2, generator=_rng(), output_type="pt").images
        for p in (pipe, again)
    )
    assert torch.equal(a, b)


def test_emoji_dit_samples() -> None:
    from diffusers import DiTPipeline

    pipe = house.load("emoji-dit")
    assert type(pipe) is DiTPipeline
    assert len(pipe.labels) == 99
    labels = pipe.get_label_ids(["food-fruit", "heart"])
    pictures = pipe(labels, num_inference_steps=2, generator=_rng(), output_type="pt").images
    assert pictures.shape == (2, 3, 64, 64)
    assert torch.isfinite(pictures).all()


def test_pixels_samples() -> None:
    from diffusers import DDPMPipeline

    pipe = house.load("pixels")
    assert type(pipe) is DDPMPipeline
    pictures = pipe(batch_size=2, num_inference_steps=2, generator=_rng(), output_type="np").images
    assert pictures.shape == (2, 32, 32, 3)
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_clip_scores_pictures_of_any_size() -> None:
    judge = house.clip()
    images = torch.rand(3, 3, 96, 80, generator=_rng())
    assert judge.image_features(images).shape == (3, 128)
    assert judge.score(images, ["a", "red apple", "blue heart"]).shape == (3,)
    assert judge.image_features(images).norm(dim=-1).sub(1).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        house.prepare(torch.rand(3, 64, 64))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="house:emoji-dit"):
        house.load("emojis")


def test_missing_weights_say_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(store, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="effuse train house:pixels"):
        house.load("pixels")


def test_the_reference_is_of_real_pictures() -> None:
    real = house.reference()
    count = len(real.clip)
    assert real.features.shape == (count, 1280)
    assert real.clip.shape == (count, 128)
    assert len(real.captions) == len(real.subgroups) == count >= 1000
    assert torch.isfinite(real.features).all()
    # the two halves are alike: a floor for every comparison
    a, b = real.features[::2].mean(0), real.features[1::2].mean(0)
    assert (a - b).norm() < 0.2 * real.features.std(0).norm()


def test_nothing_of_the_house_uses_torchvision() -> None:
    from effuse.house import data, models, objectives, optimizer, real, training

    for module in (data, models, objectives, optimizer, real, store, training):
        assert "torchvision" not in inspect.getsource(module)


@pytest.mark.slow
def test_pictures_are_of_what_was_asked_for() -> None:
    """Subgroup retrieval on pictures of the common prompts; the card has the figure on 500."""
    pipe, judge = house.load("emoji"), house.clip()
    asked = [p for p in house.prompts() if not p.held]
    texts = [p.text for p in asked]
    drawn = []
    for seed in range(2):
        rng = [_rng(100 * seed + k) for k in range(len(texts))]
        drawn.append(
            pipe(
                texts, num_inference_steps=20, guidance_scale=4.0, generator=rng, output_type="pt"
            ).images
        )
    hits = real_hits(judge, torch.cat(drawn), [p.subgroup for p in asked] * 2)
    bar = house.card()["figures"]["emoji"]["common_prompts"]["subgroup_top1"]
    assert hits > 0.8 * bar


def real_hits(judge, pictures: torch.Tensor, subgroups: list[str]) -> float:
    """Share of pictures whose nearest name, of all names, is of the right subgroup."""
    from effuse.house.real import retrieval

    return retrieval(judge, pictures, subgroups)["subgroup_top1"]


def test_the_restorer_answers_what_is_said_and_restores(toys) -> None:
    """Shapes it never saw: every task loses at least a third of its squared error."""
    from effuse.house.degrade import TASKS, degrade
    from effuse.solvers import Ancestral

    x0 = torch.from_numpy(toys.images[::6]).float() / 255
    half, full = house.restorer(torch.bfloat16), house.restorer()
    for k in range(len(TASKS)):
        mu = degrade(x0, torch.full((len(x0),), k), _rng(k))
        half.audit(x0, mu, rng=_rng())
        out = half.restore(mu, Ancestral(), steps=5, rng=_rng())
        assert (out - x0).square().mean() < 0.67 * (mu - x0).square().mean(), TASKS[k]
    again = half.restore(mu, Ancestral(), steps=5, rng=_rng())
    assert torch.equal(out, again)
    assert (full.restore(mu, Ancestral(), steps=5, rng=_rng()) - out).abs().mean() < 0.01
    assert full.restore(mu[:, :, :48, :40], steps=2, rng=_rng()).shape == (len(x0), 3, 48, 40)
