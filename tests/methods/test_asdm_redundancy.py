"""A-SDM-style redundancy removal: probe, kernels that stay on, incubation, regions, meaning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_dit_pipe, tiny_flux, tiny_sd, tiny_unet, tiny_unet_cond

import effuse
from effuse.compress.rewire.asdm_redundancy import (
    DropRedundant,
    GlobalRegional,
    Macs,
    Removed,
    incubate,
    latencies,
    parts_of,
    probe,
)
from effuse.compress.units import macs, units, without
from effuse.distill.features import NormalizedFeatureDistillation
from effuse.distill.semantic import Middle, SemanticSupervision
from effuse.evaluate.cost import CountMacs
from effuse.nn.cond_conv import CondConv2d
from effuse.nn.regional_attention import Canvas, RegionalAttention, pooled, windows


def call(model, seed=0, side=8):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, side, side, generator=rng)
    text = torch.randn(2, 5, 32, generator=rng)
    t = torch.tensor([300, 700])
    return (x, t), {"encoder_hidden_states": text, "return_dict": False}


def run(model, seed=0, side=8):
    args, kwargs = call(model, seed, side)
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def attention(seed=0, **kwargs):
    from diffusers.models.attention_processor import Attention

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(8, heads=2, dim_head=4, **kwargs).double().eval()


def tokens(n, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 8, generator=rng, dtype=torch.float64)


# ---- attention by regions


def test_whole_window_or_every_token_pooled_is_standard_attention():
    old, x = attention(), tokens(36)
    expected = old(x)
    torch.testing.assert_close(RegionalAttention(old, 6, 0)(x), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(RegionalAttention(old, 0, 1)(x), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(RegionalAttention(old, 3, 0)(x), expected)


@pytest.mark.parametrize(("h", "w"), [(6, 6), (4, 6), (5, 7)])
@pytest.mark.parametrize("interactive", [False, True])
def test_regions_equal_a_loop_over_tokens(h, w, interactive):
    old, x, side, patch = attention(), tokens(h * w), 3, 2
    canvas = Canvas()
    canvas.look(None, (torch.zeros(1, 4, h, w),), {})
    layer = RegionalAttention(old, side, patch, interactive=interactive, canvas=canvas)
    q, k, v = (getattr(old, f"to_{c}")(x).unflatten(-1, (2, 4)).transpose(1, 2) for c in "qkv")
    place = [(i, j) for i in range(h) for j in range(w)]

    def group(size):
        out: dict[tuple[int, int], list[int]] = {}
        for n, (i, j) in enumerate(place):
            out.setdefault((i // size, j // size), []).append(n)
        return out

    def attend(ask, keys, values):
        return torch.softmax(ask @ keys.mT / 2, -1) @ values

    own, patches = group(side), group(patch).values()
    far = {
        n: torch.stack([a[:, :, p].mean(2) for p in patches], 2)
        for n, a in zip("qkv", (q, k, v), strict=True)
    }
    if interactive:
        local = torch.empty_like(v)
        for members in own.values():
            local[:, :, members] = attend(q[:, :, members], k[:, :, members], v[:, :, members])
        far["v"] = attend(far["q"], k, local)
    out = torch.empty_like(v)
    for members in own.values():
        keys = torch.cat([k[:, :, members], far["k"]], 2)
        values = torch.cat([v[:, :, members], far["v"]], 2)
        out[:, :, members] = attend(q[:, :, members], keys, values)
    expected = old.to_out[0](out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_windows_change_places_with_their_outputs():
    layer, x = RegionalAttention(attention(), 4, 4), tokens(64)
    pieces = windows(x[:, None], 8, 8, (4, 4)).unflatten(0, (2, 4))
    order = torch.tensor([2, 0, 3, 1])
    moved = layer._together(pieces[:, order].flatten(0, 1), 8, 8, (4, 4), 2)[:, 0]
    out = windows(layer(x)[:, None], 8, 8, (4, 4)).unflatten(0, (2, 4))
    again = windows(layer(moved)[:, None], 8, 8, (4, 4)).unflatten(0, (2, 4))
    torch.testing.assert_close(again, out[:, order], rtol=1e-10, atol=1e-12)


def test_products_are_n_times_window_and_pool():
    old, n, w = attention().float(), 256, 4
    x = torch.randn(1, n, 8)
    counts = []
    for layer in (old, RegionalAttention(old, w, w), RegionalAttention(old, w, 8)):
        with CountMacs() as count, torch.no_grad():
            layer(x)
        counts.append(count.macs - 4 * n * 64)
    assert counts == [2 * n * n * 8, 2 * n * (w * w + n // w**2) * 8, 2 * n * (w * w + n // 64) * 8]


def test_pooled_counts_rests_as_what_they_are():
    x = torch.arange(15.0).reshape(1, 1, 15, 1)
    assert pooled(x, 3, 5, 2).flatten().tolist() == [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]


def test_swaps_the_largest_resolution_on_any_canvas():
    model = tiny_unet_cond(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2
    )
    before, wide = run(model), (call(model)[0][0].repeat(1, 1, 1, 2), torch.tensor([3, 9]))
    handle = GlobalRegional(window=4).attach(model)
    assert {n.split(".")[0] + n.split(".")[1] for n in handle.layers} == {
        "down_blocks0",
        "up_blocks1",
    }
    assert run(model).isfinite().all()
    copied = copy.deepcopy(model)
    kwargs = call(model)[1]
    with torch.no_grad():
        assert torch.equal(copied(*wide, **kwargs)[0], model(*wide, **kwargs)[0])
    handle.detach()
    assert torch.equal(run(model), before)
    neutral = GlobalRegional(window=64, pool=0, every=True).attach(model)
    assert len(neutral.layers) > len(handle.layers)
    torch.testing.assert_close(run(model), before)
    with pytest.raises(ValueError, match="every level"):
        Canvas().grid(7 * 11 * 13 + 2)
    with pytest.raises(TypeError, match="jointly"):
        GlobalRegional().attach(tiny_flux().transformer)
    with pytest.raises(ValueError, match="attend to"):
        GlobalRegional(window=0, pool=0)


# ---- probe and drop


def test_probe_ranks_by_error_over_cost():
    model = tiny_unet_cond()
    batches = [{"call": call(model, s)} for s in range(2)]
    rows = probe(model, batches, Macs())
    assert [p.worth for p in rows] == sorted(p.worth for p in rows)
    assert len(rows) == len(units(model))
    some = rows[1]
    whole = [run(model, s) for s in range(2)]
    spent = macs(model, batches[0]["call"])
    with without(model, [some.unit.name]):
        off = [(run(model, s) - whole[s]).double().square().mean() for s in range(2)]
        assert some.cost == spent - macs(model, batches[0]["call"])
    assert some.error == pytest.approx(float(sum(off) / 2), rel=1e-6)


def test_drops_the_least_worth_until_the_cost_is_met():
    model = tiny_unet_cond()
    batches = [{"call": call(model)}]
    order = [p.unit.name for p in probe(model, batches, Macs())]
    spent = macs(model, batches[0]["call"])
    handle = DropRedundant(keep=0.7, cost=Macs()).attach(model)
    handle.observe(batches)
    assert macs(model, batches[0]["call"]) <= 0.7 * spent
    assert order[0] in handle.removed
    assert order[-1] not in handle.removed


def deep():
    return tiny_unet_cond(layers_per_block=2)


def test_dropped_kernels_stay_on_and_change_nothing_at_first():
    plain, mixed = deep(), deep()
    names = ["down_blocks.1.resnets.1", "up_blocks.0.resnets.2"]
    for model, experts in ((plain, None), (mixed, Removed())):
        handle = DropRedundant(cost=Macs(), experts=experts).attach(model)
        handle.remove(names)
    assert torch.equal(run(plain), run(mixed))
    # equal shapes only: down 1.0 takes 16 channels, 1.1 takes 32; up 0.1 takes what 0.2 does not
    assert handle.experts["down_blocks.1.resnets.0.conv2"] == 2
    conv = mixed.down_blocks[1].resnets[0].conv2
    assert isinstance(conv, CondConv2d)
    assert torch.equal(conv.weight[1], deep().down_blocks[1].resnets[1].conv2.weight)
    assert macs(mixed, call(mixed)) - macs(plain, call(plain)) < 0.03 * macs(plain, call(plain))
    assert "down_blocks.1.resnets.0.conv1" not in handle.experts
    fresh = deep()
    again = DropRedundant(cost=Macs(), experts=Removed()).restore(fresh, handle.plan())
    fresh.load_state_dict(mixed.state_dict())
    assert torch.equal(run(fresh), run(mixed))
    for h, model in ((again, fresh), (handle, mixed)):
        h.detach()
        assert torch.equal(run(model), run(deep()))


# ---- incubation


def test_incubating_what_is_dropped_from_nothing_changes_nothing():
    teacher = tiny_unet_cond()
    batches = [{"call": call(teacher)}]
    student, log = incubate(teacher, [], batches, joint=1, progress=False)
    assert log[0]["first"] == 0
    assert torch.equal(run(student), run(teacher))


@pytest.mark.parametrize("hybrid", [True, False])
def test_only_the_stage_in_turn_learns(hybrid):
    teacher = tiny_unet_cond()
    names = ["up_blocks.1.resnets.0", "mid_block.resnets.0", "up_blocks.1.resnets.1"]
    assert parts_of(names) == {"up_blocks.1": [names[0], names[2]], "mid_block": [names[1]]}
    batches = [{"call": call(teacher, s)} for s in range(2)]
    student, log = incubate(
        teacher, names, batches, steps=3, joint=0, hybrid=hybrid, lr=1e-2, progress=False
    )
    assert [row["stage"] for row in log] == ["up_blocks.1", "mid_block"]
    state = teacher.state_dict()
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, state[k])}
    assert changed
    assert all(k.startswith(("up_blocks.1.", "mid_block.")) for k in changed)
    assert {k.split(".")[0] for k in changed} == {"up_blocks", "mid_block"}
    assert torch.equal(run(teacher), run(tiny_unet_cond()))


def test_first_loss_is_the_stage_and_the_output():
    teacher = tiny_unet_cond()
    names = ["up_blocks.1.resnets.0"]
    heard = []
    hook = teacher.up_blocks[1].register_forward_hook(lambda m, given, out: heard.append(out))
    whole = run(teacher)
    with without(teacher, names):
        less = run(teacher)
    hook.remove()
    expected = (heard[0] - heard[1]).square().mean() + (whole - less).square().mean()
    batches = [{"call": call(teacher)}]
    _, log = incubate(teacher, names, batches, steps=1, joint=0, progress=False)
    assert log[0]["first"] == pytest.approx(float(expected), rel=1e-5)


# ---- supervision by meaning


@pytest.mark.parametrize("build", [tiny_sd, tiny_dit_pipe])
def test_semantic_term_is_the_angle_of_both_clean_pictures(build):
    model = effuse.wrap(build())
    teacher, student = model.network, copy.deepcopy(model.network)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.1)
    goal = SemanticSupervision(NormalizedFeatureDistillation(teacher, student), model.bare)
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([0.3, 0.8])
    cond = model.embed(["a", "b"] if build is tiny_sd else [1, 2])
    batch = {"call": model.bare.call(x, t, **cond)}
    loss = goal.loss("student", batch)
    encoder = Middle(teacher)
    with torch.no_grad():
        clean = [
            type(model.bare)(net, model.schedule)(x, t, **cond).x0 for net in (teacher, student)
        ]
        a, b = (encoder(c, batch["call"]) for c in clean)
    angle = 1 - F.cosine_similarity(a, b).mean()
    torch.testing.assert_close(loss.terms["semantic"], 0.1 * angle, rtol=1e-3, atol=1e-6)
    assert loss.terms["semantic"] > 0
    assert all(not p.requires_grad for p in teacher.parameters())
    loss.terms["semantic"].backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    same = SemanticSupervision(
        NormalizedFeatureDistillation(teacher, copy.deepcopy(teacher)), model.bare
    )
    assert same.loss("student", batch).terms["semantic"].abs() < 1e-6


def test_semantic_supervision_refuses_what_it_cannot_read():
    model = effuse.wrap(tiny_flux())
    base = NormalizedFeatureDistillation(model.network, copy.deepcopy(model.network))
    with pytest.raises(ValueError, match="noise levels"):
        SemanticSupervision(base, model.bare)
    with pytest.raises(TypeError, match="tap"):
        Middle(torch.nn.Linear(1, 1))


def test_latencies_time_networks_and_pipelines():
    model = tiny_unet()
    x = torch.randn(1, 3, 16, 16)
    found = latencies(
        {"once": lambda: model(x, 5), "thrice": lambda: [model(x, 5) for _ in range(3)]},
        {"once": lambda: None},
        rounds=5,
    )
    assert 1.5 < found["thrice"]["network_ms"] / found["once"]["network_ms"] < 6
    assert found["once"]["pipeline_ms"] < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_stay_half(dtype):
    model, wide = deep().to(dtype), deep()
    for m in (model, wide):
        handle = DropRedundant(cost=Macs(), experts=Removed()).attach(m)
        handle.remove(["down_blocks.1.resnets.1", "up_blocks.0.resnets.2"])
        GlobalRegional(window=4).attach(m)
    assert {p.dtype for p in model.parameters()} == {dtype}
    args, kwargs = call(model)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].to(dtype)
    with torch.no_grad():
        out = model(args[0].to(dtype), args[1], **kwargs)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), run(wide), rtol=0.1, atol=0.1)
