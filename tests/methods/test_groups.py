"""Dependency groups on real classes: slicing is masking, sizes are kept right, the way back too."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import (
    tiny_ddpm,
    tiny_dit_pipe,
    tiny_flux,
    tiny_pixart_pipe,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)
from torch import nn

from effuse.compress.calibrate import network_of, record
from effuse.compress.groups import (
    Bias,
    Group,
    groups,
    masked,
    member_macs,
    member_params,
    narrow,
)
from effuse.compress.units import macs, parameters, units, without

SIZE = {"height": 16, "width": 16}
PIPES = {
    "ddpm": (tiny_ddpm, {}, {"heads", "channels"}),
    "sd": (tiny_sd, {"prompt": "ab"}, {"heads", "neurons", "channels"}),
    "sdxl": (tiny_sdxl, {"prompt": "ab", **SIZE}, {"heads", "neurons", "channels"}),
    "dit": (tiny_dit_pipe, {"class_labels": [1]}, {"heads", "neurons"}),
    "pixart": (tiny_pixart_pipe, {"prompt": "ab"}, {"heads", "neurons"}),
    "sd3": (tiny_sd3, {"prompt": "ab", **SIZE}, {"heads", "neurons"}),
    "flux": (tiny_flux, {"prompt": "ab", **SIZE}, {"heads", "neurons"}),
}
_MADE = {}


def made(name):
    """Return a network in float64 and one call of it as its pipeline makes it."""
    if name not in _MADE:
        make, given, _ = PIPES[name]
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        network = network_of(pipe)
        if name == "pixart":
            given = {**given, "use_resolution_binning": False}
        with record(network, limit=1) as calls:
            pipe(**given, num_inference_steps=2, output_type="np")
        args, kwargs = calls[0]

        def wide(value):
            if isinstance(value, torch.Tensor):
                return value.double() if value.is_floating_point() else value
            if isinstance(value, dict):
                return {k: wide(v) for k, v in value.items()}
            return value

        call = tuple(map(wide, args)), {k: wide(v) for k, v in kwargs.items()}
        _MADE[name] = network.double().eval(), call
    network, call = _MADE[name]
    return copy.deepcopy(network), call


def run(model, call):
    args, kwargs = call
    with torch.no_grad():
        return model(*args, **{**kwargs, "return_dict": False})[0]


def drawn(model, seed, share=0.5):
    rng = torch.Generator().manual_seed(seed)
    return {
        g.name: (torch.rand(g.size, generator=rng) < share).nonzero().flatten().tolist()
        for g in groups(model)
    }


def masks_of(model, kept):
    return {
        g.name: torch.tensor([float(i in kept[g.name]) for i in range(g.size)]).double()
        for g in groups(model)
        if g.name in kept
    }


@pytest.mark.parametrize("name", PIPES)
def test_slicing_is_masking_and_comes_back(name):
    model, call = made(name)
    assert {g.kind for g in groups(model)} == PIPES[name][2]
    before = run(model, call)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    books = sizes(model)
    for seed, share in enumerate((0.5, 0.2)):
        kept = drawn(model, seed, share)
        with masked(model, masks_of(model, kept)):
            expected = run(model, call)
        narrowing = narrow(model, kept)
        torch.testing.assert_close(run(model, call), expected, rtol=1e-9, atol=1e-11)
        assert (expected - before).abs().max() > 1e-4
        assert narrowing.freed > 0.1 * sum(v.numel() for v in state.values()) * (1 - share)
        for m in model.modules():
            if isinstance(m, nn.Linear):
                assert (m.out_features, m.in_features) == tuple(m.weight.shape)
            if type(m).__name__ == "Attention":
                assert m.to_q.out_features == m.inner_dim
        narrowing.undo()
        assert torch.equal(run(model, call), before)
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[k], v) for k, v in state.items())
        assert sizes(model) == books


def sizes(model):
    """Return every number and list of numbers that modules keep."""
    return [
        {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (int, list))}
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", PIPES)
def test_a_branch_that_is_narrowed_to_nothing_leaves_the_bias_of_its_output(name):
    model, call = made(name)
    kept = {g.name: [] for g in groups(model)}
    with masked(model, masks_of(model, kept)):
        expected = run(model, call)
    narrowing = narrow(model, kept)
    torch.testing.assert_close(run(model, call), expected, rtol=1e-9, atol=1e-11)
    assert groups(model) == [] or name == "flux"  # there the layer keeps a width of zero
    narrowing.undo()
    if name == "dit":  # without that bias it is the residual alone: the removal of the unit
        g = next(g for g in groups(model) if g.kind == "heads")
        with torch.no_grad():
            model.get_submodule(g.name).to_out[0].bias.zero_()
        narrow(model, {g.name: []})
        model_, _ = made(name)
        with torch.no_grad():
            model_.get_submodule(g.name).to_out[0].bias.zero_()
        u = next(u for u in units(model_) if u.name == g.name)
        with without(model_, [u.name]):
            torch.testing.assert_close(run(model, call), run(model_, call), rtol=0, atol=0)


@pytest.mark.parametrize("name", PIPES)
def test_masks_of_ones_change_nothing(name):
    model, call = made(name)
    ones = {g.name: torch.ones(g.size) for g in groups(model)}
    before = run(model, call)
    with masked(model, ones):
        # to the last bit but in SD3, whose layers take views: a product is contiguous
        torch.testing.assert_close(run(model, call), before, rtol=1e-13, atol=1e-14)
    assert torch.equal(run(model, call), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["sd", "flux", "sd3"])
def test_costs_are_what_goes(name):
    model, call = made(name)
    whole = macs(model, call)
    for g, each in zip(groups(model), member_macs(model, groups(model), call), strict=True):
        if g.size < 3:
            continue
        narrowing = narrow(model, {g.name: range(1, g.size)})
        assert narrowing.freed == member_params(model, g)
        assert whole - macs(model, call) == each > 0
        narrowing.undo()
    assert macs(model, call) == whole


def test_rows_of_value_and_gate_move_together():
    """Permuting the hidden units, value and gate alike, keeps kept ones what they were."""
    model, call = made("sd")
    g = next(g for g in groups(model) if g.kind == "neurons")
    first, last = (model.get_submodule(f"{g.name}.net.{p}") for p in ("0.proj", "2"))
    assert [s.offset for s in g.slots if s.param == "weight" and s.dim == 0] == [0, g.size]
    kept = [5, 0, 17]
    whole = first.weight.detach().clone(), last.weight.detach().clone()
    narrow(model, {g.name: kept})
    value, gate = first.weight.chunk(2)
    assert torch.equal(value, whole[0][[0, 5, 17]])
    assert torch.equal(gate, whole[0][[g.size, g.size + 5, g.size + 17]])
    assert torch.equal(last.weight, whole[1][:, [0, 5, 17]])
    assert run(model, call).isfinite().all()


def test_masks_carry_gradients():
    """The derivative by a mask is the finite difference of the narrowed network's answer."""
    model, (args, kwargs) = made("sd3")
    model.requires_grad_(False)
    g = next(g for g in groups(model) if g.kind == "heads")
    mask = torch.ones(g.size, dtype=torch.float64, requires_grad=True)

    def answer(m):
        with masked(model, {g.name: m}):
            return model(*args, **{**kwargs, "return_dict": False})[0].square().sum()

    (grad,) = torch.autograd.grad(answer(mask), mask)
    step = torch.tensor([1e-5, 0], dtype=torch.float64)
    with torch.no_grad():
        slope = (answer(mask + step) - answer(mask - step)) / 2e-5
    assert float(grad[0]) == pytest.approx(float(slope), rel=1e-6)


def test_narrowing_twice_is_narrowing_once():
    model, call = made("flux")
    kept = {g.name: list(range(g.size)) for g in groups(model)}
    heads = next(
        g.name for g in groups(model) if g.name.endswith("single_transformer_blocks.0.attn")
    )
    mlp = heads.replace("attn", "proj_mlp")
    once = copy.deepcopy(model)
    narrow(once, {heads: [1], mlp: [3, 4, 9]})
    narrow(model, {heads: [1]})
    narrow(model, {mlp: [3, 4, 9]})
    assert torch.equal(run(model, call), run(once, call))
    assert parameters(model) == parameters(once) < sum(len(k) for k in kept.values()) * 1e6
    block = model.get_submodule(heads.rpartition(".")[0])
    assert block.proj_out._tp_packed_row_blocks == [16, 3]


def test_stacks_of_linear_layers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Dropout(), nn.Linear(4, 2)
    )
    net = net.double().eval()
    x = torch.randn(7, 3, dtype=torch.float64)
    first, second = groups(net)
    assert (first.name, first.size, second.name, second.size) == ("0", 5, "2", 4)
    kept = {"0": [1, 4], "2": [0, 3]}
    with masked(net, masks_of(net, kept)):
        expected = net(x)
    narrowing = narrow(net, kept)
    assert net[2].weight.shape == (2, 2)
    torch.testing.assert_close(net(x), expected)
    narrowing.undo()
    narrow(net, {"0": [], "2": [0]})
    assert net(x).shape == (7, 2)
    assert groups(nn.Sequential(nn.Linear(3, 5), nn.Softmax(-1), nn.Linear(5, 2))) == []


def test_what_cannot_be_cut_is_no_group():
    model, _ = made("dit")
    count = len(groups(model))
    block = model.transformer_blocks[0]
    block.ff.net[2] = nn.utils.parametrizations.weight_norm(block.ff.net[2])
    assert len(groups(model)) == count - 1
    block.attn1.fuse_projections()
    assert len(groups(model)) == count - 2
    model.transformer_blocks[1].ff.net[0].proj.weight = (
        model.transformer_blocks[2].ff.net[0].proj.weight
    )
    assert len(groups(model)) == count - 4
    from diffusers.models.attention_processor import Attention

    across = Attention(32, heads=2, dim_head=16, kv_heads=2, qk_norm="rms_norm_across_heads")
    fewer = Attention(32, heads=4, dim_head=8, kv_heads=2)
    single = Attention(32, heads=2, dim_head=16, qk_norm="rms_norm")
    assert [len(groups(a)) for a in (across, fewer, single)] == [0, 0, 1]
    assert groups(model, lambda name, module: False) == []


def test_odd_requests_are_refused_and_change_nothing():
    model, call = made("dit")
    g, before = groups(model)[0], run(model, call)
    assert isinstance(g, Group)
    for bad, message in (
        ({g.name: [0, 0]}, "each once"),
        ({g.name: [g.size]}, f"between 0 and {g.size - 1}"),
        ({"nowhere": [0]}, "no group 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            narrow(model, bad)
    with (
        pytest.raises(ValueError, match=r"a mask of shape \(9,\)"),
        masked(model, {g.name: torch.ones(9)}),
    ):
        pass
    assert torch.equal(run(model, call), before)


def test_an_empty_branch_is_its_bias():
    bias = torch.tensor([1.0, -2.0])
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(Bias([bias], skip=True, scale=2.0)(x), (x + bias[:, None, None]) / 2)
    both = Bias([bias, None])(torch.randn(3, 5, 2))
    assert torch.equal(both[0], bias.reshape(1, 1, 2))
    assert torch.equal(both[1], torch.zeros(1, 1, 1))
