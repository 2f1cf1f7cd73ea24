"""Training of the house: same seed, same weights; killed and resumed, same weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from effuse.house import degrade, models, objectives, store, training
from effuse.house.optimizer import MatrixAdam, groups, orthogonalize
from effuse.restore.reverting import OfVelocity

STEPS = 3


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(folder.rglob("*.safetensors")):
        out |= {f"{file.parent.name}/{k}": v for k, v in load_file(file).items()}
    assert out
    return out


def _train(name: str, out: Path, toys, seed: int = 0) -> dict[str, torch.Tensor]:
    training.train(name, out=out, steps=STEPS, seed=seed, progress=False, batch=4, pictures=toys)
    return _weights(out / name)


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["autoencoder", "clip", "pixels", "restore"])
def test_a_seed_fixes_the_weights(name: str, tmp_path, toys) -> None:
    first = _train(name, tmp_path / "a" / name, toys)
    assert _same(first, _train(name, tmp_path / "b" / name, toys))
    assert not _same(first, _train(name, tmp_path / "c" / name, toys, seed=1))


@pytest.mark.parametrize("name", ["autoencoder", "pixels", "restore"])
def test_killed_and_resumed_equals_uninterrupted(name: str, tmp_path, toys, monkeypatch) -> None:
    whole = _train(name, tmp_path / "whole" / name, toys)

    def dying(*args, fit=training.fit, on_step, **more):
        def stop(step, losses):
            on_step(step, losses)
            if step == 2:
                raise KeyboardInterrupt

        return fit(*args, on_step=stop, **(more | {"save_every": 1}))

    out = tmp_path / "killed" / name
    monkeypatch.setattr(training, "fit", functools.partial(dying, fit=training.fit))
    with pytest.raises(KeyboardInterrupt):
        _train(name, out, toys)
    monkeypatch.undo()
    assert _same(whole, _train(name, out, toys))


def test_bad_names_and_lengths_are_refused(tmp_path, toys) -> None:
    with pytest.raises(ValueError, match="house:emoji"):
        training.train("emojis", out=tmp_path, pictures=toys)
    with pytest.raises(ValueError, match="minutes=-1"):
        training.train("pixels", out=tmp_path, minutes=-1, pictures=toys)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_lean_attention_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = getattr(models, kind)().eval()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 700])
    more = (
        {"encoder_hidden_states": torch.randn(2, 24, models.TEXT_WIDTH)}
        if kind == "unet"
        else {"class_labels": torch.tensor([1, 2])}
    )
    for p in model.parameters():  # a DiT begins at zero
        nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        stock = model(x, t, **more).sample
        models.lean_attention(model)
        lean = model(x, t, **more).sample
    assert (stock - lean).abs().max() < 1e-4 * stock.abs().max()


def test_fold_scale_normalizes_and_keeps_pictures(toys) -> None:
    torch.manual_seed(0)
    model = models.autoencoder().eval()
    images = torch.from_numpy(toys.images)
    weight = torch.from_numpy(toys.weight)
    with torch.no_grad():
        before = model(images[:4].float() / 127.5 - 1).sample
        training.fold_scale(model, images, weight)
        after = model(images[:4].float() / 127.5 - 1).sample
    assert (before - after).abs().max() < 1e-3
    z = training.encode(model, images)
    share = weight.float().reshape(-1, 1, 1, 1)
    mean = (z * share).sum(0).mean((1, 2))
    assert mean.abs().max() < 0.05
    assert ((z.square() * share).sum(0).mean((1, 2)) - 1).abs().max() < 0.05


def test_velocity_is_zero_at_the_true_answer() -> None:
    cumulative = models.scheduler().alphas_cumprod

    class Oracle(nn.Module):
        """Knows the data: a single picture."""

        def forward(self, x, t):
            a = cumulative[t].reshape(-1, 1, 1, 1)
            noise = (x - a.sqrt() * 0.5) / (1 - a).sqrt()

            class Out:
                sample = a.sqrt() * noise - (1 - a).sqrt() * 0.5

            return Out

    objective = objectives.Velocity(Oracle(), cumulative)
    loss = objective.loss("student", {"x0": torch.full((16, 4, 8, 8), 0.5)})
    assert loss.total < 1e-6


def test_orthogonalize_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in [(3, 32, 96), (2, 96, 32)]:
        s = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert s.min() > 0.4
        assert s.max() < 1.4


def test_the_optimizer_lowers_a_quadratic_and_resumes() -> None:
    torch.manual_seed(0)
    model, target = nn.Linear(8, 8), torch.randn(8, 8)

    def loss() -> torch.Tensor:
        return (model.weight - target).square().sum() + model.bias.square().sum()

    optimizer = MatrixAdam(groups(model), lr=0.03, weight_decay=0.0)
    first = float(loss().detach())
    for _ in range(600):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.05 * first
    twin = MatrixAdam(groups(model), lr=0.03, weight_decay=0.0)
    twin.load_state_dict(optimizer.state_dict())
    assert [g.get("count") for g in twin.param_groups] == [
        g.get("count") for g in optimizer.param_groups
    ]


def test_latent_jobs_stand_on_the_package(tmp_path, toys) -> None:
    if not (store.WEIGHTS / "emoji").is_dir():
        pytest.skip("the weights of the house are not here")
    for name in ("emoji", "emoji-dit"):
        assert _train(name, tmp_path / name, toys)


def test_restoration_is_zero_at_the_true_answer() -> None:
    """Clean and degraded known, the velocity can be told from x; its sign matters."""
    process, x0 = models.restoring(), torch.full((1, 3, 8, 8), 0.3)

    class Oracle(nn.Module):
        sign = 1.0

        def forward(self, x, mu, entry):
            bound, t = process.toward(mu), process.time_of(entry.double())
            noise = bound.complete(x, t, x0=x0.expand_as(x)).noise
            return self.sign * OfVelocity().target(bound, x0.expand_as(x), noise, t)

    batch = {"x0": x0.expand(16, -1, -1, -1), "mu": torch.rand(16, 3, 8, 8)}
    objective = objectives.Restoration(Oracle(), process)
    assert objective.loss("student", batch).total < 1e-4
    objective.student.sign = -1.0
    assert objective.loss("student", batch).total > 1


@pytest.mark.parametrize("task", range(4))
def test_each_task_spoils_in_its_own_way(task: int, toys) -> None:
    x = torch.from_numpy(toys.images[:8]).float() / 255

    def run(rows, seed=0):
        rng = torch.Generator().manual_seed(seed)
        return degrade.degrade(rows, torch.full((len(rows),), task), rng)

    y = run(x)
    assert y.shape == x.shape
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.equal(y, run(x))
    assert not torch.equal(y, run(x, 1))
    off = (y - x).flatten(1)
    assert ((off.square().mean(1) > 1e-4) & (off.square().mean(1) < 0.05)).all()
    name = degrade.TASKS[task]
    if name in ("rain", "holes"):  # somewhere, not everywhere
        hit = (off != 0).float().mean(1)
        assert ((hit > 0.02) & (hit < 0.6)).all()
    if name == "holes":
        assert (y[(y != x)] == 0.5).all()
    if name == "blur":  # edges are gone: differences of neighbors shrink
        assert (y[..., 1:] - y[..., :-1]).abs().amax() < 0.6 * (
            x[..., 1:] - x[..., :-1]
        ).abs().amax()
    only = torch.tensor([task, -1] * 4)
    mixed = degrade.degrade(x, only, torch.Generator().manual_seed(0))
    assert torch.equal(mixed[1::2], x[1::2])
