"""What a slimmed pipeline heals on: levels, targets and both halves, on tiny real pipelines."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

import effuse
from effuse.compress.healing import heal, own_samples, round_as
from effuse.compress.rewire.koala import Koala
from effuse.distill.features import FeatureDistillation, answer


def rng():
    return torch.Generator().manual_seed(5)


def test_batches_are_spoiled_samples_some_without_their_prompt():
    pipe = tiny_sd()
    model = effuse.wrap(pipe)
    clean, rows = torch.randn(3, 4, 8, 8, generator=rng()), 40
    prompts = ["a cat", "a dog", "a hat"]
    batch = own_samples(pipe, prompts, clean=clean, guidance=4.0, rows=rows, empty=0.25)(rng())
    (x,), words = batch["call"]
    # the same draws again
    again = rng()
    pick = torch.randint(3, (rows,), generator=again)
    t = (torch.arange(rows) + torch.rand(rows, generator=again)) / rows
    noise = torch.randn(rows, 4, 8, 8, generator=again)
    bare = torch.rand(rows, generator=again) < 0.25
    alpha, sigma = (
        c(t).float().view(-1, 1, 1, 1) for c in (model.process.alpha, model.process.sigma)
    )
    torch.testing.assert_close(alpha * clean[pick] + sigma * noise, x)
    torch.testing.assert_close(batch["target"], noise)  # what this network was trained to answer
    torch.testing.assert_close(words["timestep"].float(), model.bare.call(x, t)[1]["timestep"])
    text, known = words["encoder_hidden_states"], model.embed(prompts)["encoder_hidden_states"]
    empty = model.embed([""])["encoder_hidden_states"]
    assert 0 < int(bare.sum()) < rows
    torch.testing.assert_close(text[bare], empty.expand(int(bare.sum()), -1, -1))
    torch.testing.assert_close(text[~bare], known[pick][~bare])
    plain = own_samples(pipe, prompts, clean=clean, guidance=1.0, rows=rows)(rng())
    torch.testing.assert_close(plain["call"][1]["encoder_hidden_states"], known[pick])
    with pytest.raises(ValueError, match="empty"):
        own_samples(pipe, prompts, clean=clean, empty=1.5)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (tiny_ddpm, 2),
        (tiny_dit_pipe, [1, 2]),
        (tiny_sdxl, ["a cat", "a dog"]),
        (tiny_sd3, ["a cat", "a dog"]),
        (tiny_flux, ["a cat", "a dog"]),
    ],
    ids=["ddpm", "dit", "sdxl", "sd3", "flux"],
)
def test_batches_run_on_every_kind_of_pipeline(make, what):
    pipe = make()
    model = effuse.wrap(pipe)
    clean = torch.randn(2, *model.shape, generator=rng())
    guidance = None if make is tiny_ddpm else 3.0
    batch = own_samples(pipe, what, clean=clean, guidance=guidance, rows=2)(rng())
    args, words = batch["call"]
    out = answer(model.network(*args, **words))
    assert out[:, : batch["target"].shape[1]].shape == batch["target"].shape
    with pytest.raises(ValueError, match="expected one each"):
        own_samples(pipe, what, clean=clean[:1])


def test_healing_brings_a_network_back_to_its_teacher():
    pipe = tiny_sd()
    teacher = copy.deepcopy(pipe.unet)
    handle = Koala().attach(pipe.unet)
    with torch.no_grad():  # a mistake that can be learned away
        pipe.unet.conv_out.bias.add_(0.3)
    batches = own_samples(pipe, ["a cat", "a dog"], teacher=teacher, guidance=3.0, steps=2, rows=2)
    again = own_samples(pipe, ["a cat", "a dog"], teacher=teacher, guidance=3.0, steps=2, rows=2)
    assert torch.equal(batches.clean, again.clean)
    held = batches(torch.Generator().manual_seed(99))
    goal = FeatureDistillation(teacher, pipe.unet, [], weights=(0.0, 1.0, 0.0))

    def error():
        with torch.no_grad():
            return float(goal.loss("student", held).total)

    pipe.unet.requires_grad_(False)
    before = error()
    done = heal(
        pipe,
        handle,
        teacher,
        batches,
        objective=goal,
        minutes=None,
        steps=40,
        lr=1e-2,
        progress=False,
    )
    assert done.step == 40
    assert error() < 0.7 * before
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    handle.detach()
    now, was = pipe.unet.state_dict(), teacher.state_dict()
    assert all(torch.equal(now[k], v) for k, v in was.items() if k != "conv_out.bias")
    torch.testing.assert_close(now["conv_out.bias"], was["conv_out.bias"] + 0.3)


def test_what_was_in_half_precision_is_healed_into_it():
    """So it is stored in two bytes a weight, as before; float32 weights stay as they learned."""
    rng = torch.Generator().manual_seed(0)
    teacher = torch.nn.Linear(4, 4)
    student = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for p in (*teacher.parameters(), *student.parameters()):
            p.copy_(torch.randn(p.shape, generator=rng))
    learned = student.weight.clone()
    round_as(student, teacher)
    assert torch.equal(student.weight, learned)
    teacher.half().float()
    round_as(student, teacher)
    assert torch.equal(student.weight, learned.half().float())
    assert not torch.equal(student.weight, learned)


@pytest.mark.parametrize("drawn", [True, False])
def test_targets_are_learned_only_if_asked(drawn):
    """Without `task` nothing changes where the answers are the teacher's, whatever the target."""

    class Pipe:
        unet = torch.nn.Linear(3, 3)

    class Handle:
        model = Pipe.unet

        def objective(self, teacher, steps=None):
            return FeatureDistillation(teacher, self.model, [])

    teacher = copy.deepcopy(Pipe.unet)
    batch = {"call": ((torch.ones(2, 3),), {}), "target": torch.full((2, 3), 9.0)}
    batches = (lambda rng: batch) if drawn else [batch]
    for task in (False, True):
        heal(Pipe(), Handle(), teacher, batches, minutes=None, steps=3, task=task, progress=False)
        assert torch.equal(Pipe.unet.weight, teacher.weight) is not task
