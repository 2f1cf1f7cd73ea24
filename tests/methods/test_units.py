"""Removable units on real classes: removal is masking, counts are exact, the way back is too."""

from __future__ import annotations

import copy
import random
import time

import pytest
import torch
from tests.tiny import (
    tiny_dit,
    tiny_dit_pipe,
    tiny_flux,
    tiny_pixart,
    tiny_pixart_pipe,
    tiny_sd,
    tiny_sd3,
    tiny_unet,
    tiny_unet_cond,
)
from torch import nn

import effuse
from effuse.bridge.table import answer_for, predict
from effuse.compress.calibrate import (
    PROMPTS,
    Recording,
    calls_from_pipeline,
    network_of,
    record,
    uniform_calls,
)
from effuse.compress.units import (
    branches,
    freed,
    macs,
    parameters,
    remove,
    unit_macs,
    unit_milliseconds,
    units,
    without,
)
from effuse.nn.residual import Residual
from effuse.processes import Cosine, Flow


def _call(name):
    rng = torch.Generator().manual_seed(1)
    t = torch.tensor([100, 700])
    if name == "unet":
        return (torch.randn(2, 3, 16, 16, generator=rng), t), {}
    x = torch.randn(2, 4, 8, 8, generator=rng)
    if name == "unet_cond":
        return (x, t), {"encoder_hidden_states": torch.randn(2, 5, 32, generator=rng)}
    if name == "dit":
        return (x,), {"timestep": t, "class_labels": torch.tensor([1, 2])}
    return (x,), {
        "timestep": t,
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=rng),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _recorded(make):
    pipe = make()
    with record(pipe.transformer, limit=1) as calls:
        pipe("ab", num_inference_steps=1, height=16, width=16, output_type="latent")
    return pipe.transformer, calls[0]


NETS = {
    "unet": lambda: (tiny_unet(), _call("unet")),
    "unet_cond": lambda: (tiny_unet_cond(), _call("unet_cond")),
    "dit": lambda: (tiny_dit(), _call("dit")),
    "pixart": lambda: (tiny_pixart(), _call("pixart")),
    "sd3": lambda: _recorded(tiny_sd3),
    "flux": lambda: _recorded(tiny_flux),
}


@pytest.fixture(scope="module", params=NETS)
def net(request):
    model, call = NETS[request.param]()
    return request.param, model.eval().double(), _double(call)


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(v) for v in value)
    return value


@torch.no_grad()
def run(model, call):
    out = model(*call[0], **call[1])
    return out[0]


def subsets(found, count=6):
    for k in range(count):
        draw = random.Random(k)
        yield draw.sample(found, draw.randint(1, len(found)))
    yield found


def test_removal_equals_a_masked_branch(net):
    _, model, call = net
    for some in subsets(units(model)):
        with branches(model, some, lambda name, value: torch.zeros_like(value)):
            masked = run(model, call)
        with without(model, [u.name for u in some]):
            torch.testing.assert_close(run(model, call), masked, rtol=1e-5, atol=1e-6)


def test_parameters_drop_by_exactly_the_sum(net):
    name, model, _ = net
    before = parameters(model)
    for some in subsets(units(model)):
        listed = [u.name for u in some]
        told = freed(model, listed)
        with without(model, listed):
            assert before - parameters(model) == told
        own = 0
        if name == "dit":  # the embedding of a block without units goes too, but the first's
            gone = [u.block for u in some]
            own = sum(
                parameters(model.get_submodule(f"{b}.norm1.emb"))
                for b in set(gone)
                if gone.count(b) == 2 and not b.endswith(".0")
            )
        assert told == sum(u.params for u in some) + own
        assert all(u.params > 0 for u in some)


def test_no_dead_parameters_remain(net):
    _, model, call = net
    model = copy.deepcopy(model).requires_grad_(True)
    out = model(*call[0], **call[1])[0]
    out.square().sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    model.zero_grad(set_to_none=True)
    found = units(model)
    remove(model, [u.name for u in found[::2]])
    out = model(*call[0], **call[1])[0]
    out.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} <= unused


def test_undo_is_bit_exact(net):
    _, model, call = net
    expected, keys = run(model, call), list(model.state_dict())
    for some in subsets(units(model), 3):
        removal = remove(model, [u.name for u in some])
        removal.undo()
    assert torch.equal(run(model, call), expected)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())


def test_computing_stops_too(net):
    _, model, call = net
    found = units(model)
    whole, saved = macs(model, call), unit_macs(model, found, call)
    assert all(s > 0 for s in saved)
    with without(model, [u.name for u in found]):
        left = macs(model, call)
    assert left <= whole - sum(saved)
    assert left > 0


def test_units_shrink_as_they_go(net):
    _, model, _ = net
    found = units(model)
    with without(model, [found[0].name]):
        assert [u.name for u in units(model)] == [u.name for u in found[1:]]
        with pytest.raises(ValueError, match="no unit"):
            remove(model, [found[0].name])


def test_recorded_values_replace_themselves(net):
    _, model, call = net
    found = units(model)
    expected, kept = run(model, call), {}

    def keep(name, value):
        kept.setdefault(name, []).append(value.clone())

    with branches(model, found, keep):
        run(model, call)
    assert set(kept) == {u.name for u in found}
    stream = {n: iter(v) for n, v in kept.items()}
    with branches(model, found, lambda name, value: next(stream[name])):
        assert torch.equal(run(model, call), expected)
    with branches(model, found, lambda name, value: 2 * value):
        assert not torch.equal(run(model, call), expected)


def test_kinds_are_found_by_type():
    assert {u.kind for u in units(tiny_unet())} == {"conv", "attn1"}
    found = units(tiny_unet_cond())
    assert {u.kind for u in found} == {"conv", "attn1", "attn2", "ff"}
    assert not any("conv_in" in u.name or "sampler" in u.name for u in found)
    only = units(tiny_unet_cond(), lambda name, module: name.endswith("attn2"))
    assert {u.kind for u in only} == {"attn2"}


@pytest.mark.parametrize("scale", [2.0, 0.5**0.5])
def test_blocks_that_scale_their_sum(scale):
    """Both parts of (skip + branch) / scale are scaled: what stays still is."""
    model = tiny_unet(mid_block_scale_factor=scale)
    call, found = _call("unet"), [u for u in units(model) if "mid_block" in u.name]
    assert {u.kind for u in found} == {"conv", "attn1"}
    with branches(model, found, lambda name, value: torch.zeros_like(value)):
        masked = run(model, call)
    with without(model, [u.name for u in found]):
        torch.testing.assert_close(run(model, call), masked, rtol=1e-5, atol=1e-5)


def test_resampling_residual_blocks():
    model = tiny_unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    call, found = _call("unet"), units(model)
    with branches(model, found, lambda name, value: torch.zeros_like(value)):
        masked = run(model, call)
    with without(model, [u.name for u in found]):
        torch.testing.assert_close(run(model, call), masked, rtol=1e-5, atol=1e-5)


def test_a_network_of_your_own():
    model = nn.Sequential(Residual(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    found = units(model)
    assert [(u.name, u.kind, u.params) for u in found] == [
        ("0.branches.0", "branch", 20),
        ("0.branches.1", "branch", 20),
    ]
    x = torch.randn(3, 4)
    with torch.no_grad(), without(model, [u.name for u in found]):
        torch.testing.assert_close(model(x), model[1](x))


class Sleep(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def test_measured_time_is_what_a_unit_takes():
    model = Residual(Sleep(2, 2), nn.Linear(2, 2))
    call = ((torch.ones(1, 2),), {})
    slow, fast = unit_milliseconds(model, units(model), call, repeats=3)
    assert 15 < slow < 200
    assert 0 <= fast < 15


# ---- calibration


@pytest.mark.parametrize(
    ("make", "more"),
    [(tiny_sd, {}), (tiny_dit_pipe, {}), (tiny_pixart_pipe, {"use_resolution_binning": False})],
)
def test_calls_replay(make, more):
    pipe = make()
    calls = calls_from_pipeline(pipe, 2, steps=2, batch=2, **more)
    assert len(calls) == calls.seen == 2
    network = network_of(pipe)
    for args, kwargs in calls:
        x = args[0] if args else kwargs["hidden_states"]
        assert len(x) == 4  # both halves of guidance
        with torch.no_grad():
            assert network(*args, **kwargs)[0].isfinite().all()
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    lone = calls_from_pipeline(pipe, 2, steps=2, batch=2, guidance=1.0, **more)
    assert len(lone[0][0][0] if lone[0][0] else lone[0][1]["hidden_states"]) == 2


def test_reservoir_is_seeded_and_streams(tmp_path):
    pipe = tiny_sd()
    one = calls_from_pipeline(pipe, 4, steps=3, batch=1, limit=5, seed=2)
    two = calls_from_pipeline(pipe, 4, steps=3, batch=1, limit=5, seed=2, folder=tmp_path)
    assert one.seen == 12
    assert len(one) == len(two) == len(list(tmp_path.glob("0*.safetensors"))) == 5
    for (a, ka), (b, kb) in zip(one, two, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(ka["encoder_hidden_states"], kb["encoder_hidden_states"])
        assert ka.keys() == kb.keys()
    times = [int(a[1]) for a, _ in one]
    assert len(set(times)) > 1


def test_every_call_is_as_likely_to_be_kept():
    counts = torch.zeros(12)
    for seed in range(600):
        kept = Recording(limit=3, seed=seed)
        for i in range(12):
            kept.add((i,), {})
        counts[[args[0] for args, _ in kept]] += 1
    # 3 of 12 is a quarter; five standard deviations of a count of 600
    assert (counts / 600 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 600) ** 0.5


def test_uniform_calls_cover_the_range_and_know_the_target():
    pipe = tiny_sd()
    made = uniform_calls(pipe, ["a", "b"], clean=torch.randn(2, 4, 8, 8), count=4, batch=8)
    t = torch.cat([b["call"][1]["timestep"] for b in made])
    assert t.min() < 150
    assert t.max() > 850
    assert abs(float(t.float().mean()) - 500) < 60
    x = made[0]["call"][0][0]
    late = t[:8] > 800
    close = (x - made[0]["target"])[late].square().mean()  # nearly pure noise there
    assert close < 0.5
    with pytest.raises(ValueError, match="expected one each"):
        uniform_calls(pipe, ["a"], clean=torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_target_is_the_answer_that_gives_both_parts_back(kind):
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    process = Flow() if kind == "flow_prediction" else Cosine()
    x = process.corrupt(x0, t, noise)
    pair = predict(kind, answer_for(kind, x0, noise, t, process), x, t, process)
    torch.testing.assert_close(pair.x0, x0)
    torch.testing.assert_close(pair.noise, noise)


@pytest.mark.parametrize("make", [tiny_sd, tiny_pixart_pipe, tiny_sd3, tiny_flux])
def test_targets_have_the_shape_of_answers(make):
    """Tokens for FLUX; channels of a learned variance aside."""
    pipe = make()
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (batch,) = uniform_calls(pipe, ["a", "b"], clean=clean, count=1, batch=3)
    args, kwargs = batch["call"]
    with torch.no_grad():
        out = network_of(pipe)(*args, **kwargs)[0]
    target = batch["target"]
    assert out[:, : target.shape[1]].shape == target.shape
    x, model = args[0].double(), effuse.wrap(pipe)
    if make is tiny_flux:  # x - sigma (noise - x0) is a clean sample, packed
        sigma = kwargs["timestep"].double().reshape(-1, 1, 1)
        packed = model.bare.packed(clean)
        found = x - sigma * target.double()
        for row in found:
            assert (row - packed.double()).abs().amax((1, 2)).min() < 1e-3
        assert torch.equal(model.bare.unpacked(packed, clean), clean)


@pytest.mark.parametrize(
    ("what", "words"), [(0, "positive"), ([], "at least one"), ([3], "takes text")]
)
def test_bad_requests(what, words):
    with pytest.raises(ValueError, match=words):
        calls_from_pipeline(tiny_sd(), what, steps=1)


def test_bad_values_name_layer_and_step():
    pipe = tiny_sd()
    layer = pipe.unet.up_blocks[0].resnets[0].conv1
    with torch.no_grad():
        layer.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"call 0 \(timestep \d+\).*up_blocks.0.resnets.0"):
        calls_from_pipeline(pipe, PROMPTS[:1], steps=1)
    assert not pipe.unet._forward_hooks
