"""A-SDM assembly and inheritance: the oracles of its sheet, on real diffusers networks."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tests.tiny import (
    tiny_dit,
    tiny_flux,
    tiny_pixart,
    tiny_sd,
    tiny_sd3,
    tiny_unet,
    tiny_unet_cond,
)
from torch import nn

from effuse.compress.cache.levels import Level
from effuse.compress.cache.sweep import sweep
from effuse.compress.rewire.asdm_assembly import (
    Assemble,
    Blocks,
    Copies,
    Explicit,
    FrontDense,
    Group,
    Inherit,
    Layers,
    Named,
    Removed,
    Uniform,
    Units,
    assemble,
)
from effuse.compress.rewire.choose import choose, schedules
from effuse.compress.rewire.incubation import incubate
from effuse.compress.rewire.stages import even_plan, stage_sizes, taps
from effuse.compress.rewire.switched import AtSteps, BelowTimesteps, Interleaved, Switched
from effuse.core.training import fit
from effuse.distill.features import NormalizedFeatureDistillation
from effuse.nn.cond_conv import CondConv2d

LEVELS: list[Level] = [
    Blocks(0),
    Blocks(1),
    Layers(),
    Layers(deep=None),
    Layers(deep=1, store="output"),
    Units(deep=None),
    Units(kinds=("ff",)),
]
TIMES = (900, 700, 500, 300, 100)


def deep_unet_cond(**kwargs):
    return tiny_unet_cond(
        **{
            "layers_per_block": 2,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **kwargs,
        }
    )


CUT = {"down_blocks.1": (0,), "up_blocks.1": (0, 2)}
MODELS = {
    "unet": tiny_unet(),
    "unet_cond": deep_unet_cond(),
    "dit": tiny_dit(num_layers=4),
    "pixart": tiny_pixart(num_layers=4),
}


def inputs(name, count=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shape = (2, 3, 16, 16) if name == "unet" else (2, 4, 8, 8)
    return [torch.randn(shape, generator=rng) for _ in range(count)]


def call_of(name, x, t):
    if name == "unet":
        return (x, t), {"return_dict": False}
    if name == "unet_cond":
        return (x, t, torch.full((2, 5, 32), 0.3)), {"return_dict": False}
    t = torch.full((len(x),), t)
    if name == "dit":
        return (x,), {"timestep": t, "class_labels": torch.tensor([1, 2]), "return_dict": False}
    return (x,), {
        "timestep": t,
        "encoder_hidden_states": torch.full((2, 5, 16), 0.3),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def walk(model, name, xs=None, times=TIMES):
    xs = inputs(name) if xs is None else xs
    with torch.no_grad():
        out = []
        for x, t in zip(xs, times, strict=True):
            args, kwargs = call_of(name, x, t)
            out.append(model(*args, **kwargs)[0])
    return out


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


# ---- inheritance: exactness


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_all_keys_or_no_parts_is_the_original_bit_for_bit(name, level):
    model = MODELS[name]
    plain = walk(model, name)
    if not level.gates(model, lambda n, m: True):
        assert isinstance(level, Units)
        with pytest.raises(ValueError, match="has no such part to inherit"):
            Inherit(level, Uniform(1)).attach(model)
        return
    with Inherit(level, Uniform(1)).attach(model) as handle:
        assert handle.parts
        assert same(walk(model, name), plain)
    with Inherit(level, Uniform(2), where=lambda n, m: False).attach(model) as handle:
        assert handle.parts == ()
        assert same(walk(model, name), plain)
    assert same(walk(model, name), plain)
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("level", LEVELS[:-1], ids=str)
def test_inheriting_changes_only_the_steps_between(name, level):
    model = MODELS[name]
    plain = walk(model, name)
    with Inherit(level, Uniform(2)).attach(model):
        out = walk(model, name)
        assert same(out[::2], plain[::2])
        assert not any(torch.equal(a, b) for a, b in zip(out[1::2], plain[1::2], strict=True))
        assert same(walk(model, name), out)  # the next run begins anew by itself


@pytest.mark.parametrize("level", LEVELS[:-1], ids=str)
def test_a_network_without_time_inherits_exactly(name, level):
    """Same x, and a time embedding that says nothing: what is stored is what would be computed."""
    model = copy.deepcopy(MODELS[name])
    mute(model)
    xs = inputs(name, 1) * 3
    with Inherit(level, Explicit((0,))).attach(model):
        first, *rest = walk(model, name, xs, (900, 500, 100))
    for out in rest:
        torch.testing.assert_close(out, first, rtol=1e-5, atol=2e-6)
    if name.startswith("unet"):
        assert same(rest, [first, first])


def test_layers_that_resample_inherit_exactly_too():
    model = tiny_unet(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    mute(model)
    xs = inputs("unet", 1) * 2
    for level in (Blocks(1), Layers(deep=None), Units(deep=None)):
        with Inherit(level, Explicit((0,))).attach(model) as handle:
            first, second = walk(model, "unet", xs, (900, 500))
            assert any("samplers.0" in p for p in handle.parts) or isinstance(level, Blocks)
        assert torch.equal(first, second)


def mute(model):
    """Take the time out of a network."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (
            path.endswith(("timestep_embedder.linear_2", "time_embedding.linear_2"))
        ):
            nn.init.zeros_(module.weight)


@pytest.mark.parametrize("name", ["unet", "unet_cond"])
def test_residual_layer_adds_its_old_branch_to_its_new_skip(name):
    """out' = (shortcut(x') + branch) / scale: sign and skip, against the module's own pieces."""
    make = {"unet": tiny_unet, "unet_cond": deep_unet_cond}[name]
    model = make(mid_block_scale_factor=2.0)
    seen = {}

    def spy(key):
        def hook(module, args, out):
            seen.setdefault(key, []).append((args[0], out[0] if isinstance(out, tuple) else out))

        return hook

    names = ["up_blocks.0.resnets.0", "mid_block.resnets.1", "mid_block.attentions.0"]
    layers = {n: model.get_submodule(n) for n in names}
    xs = inputs(name, 2)
    with Inherit(Layers(), Explicit((0,))).attach(model) as handle:
        assert set(names) <= set(handle.parts)
        hooks = [m.register_forward_hook(spy(n)) for n, m in layers.items()]
        walk(model, name, xs, (900, 500))
        for hook in hooks:
            hook.remove()
    for n, m in layers.items():
        (x, out), (x_new, out_new) = seen[n]
        scale = getattr(m, "output_scale_factor", getattr(m, "rescale_output_factor", 1.0))
        assert scale == (2.0 if "mid" in n and not hasattr(m, "proj_out") else 1.0)
        skip = getattr(m, "conv_shortcut", None) or (lambda a: a)
        branch = scale * out - skip(x)
        assert not torch.equal(x, x_new)
        torch.testing.assert_close(out_new, (skip(x_new) + branch) / scale, rtol=1e-4, atol=1e-5)


def test_raw_output_is_inherited_whole():
    model = MODELS["unet_cond"]
    seen = []
    layer = model.mid_block.resnets[0]
    with Inherit(Layers(deep=0, store="output"), Explicit((0,))).attach(model) as handle:
        assert all(p.startswith("mid_block") for p in handle.parts)
        hook = layer.register_forward_hook(lambda m, a, out: seen.append(out))
        walk(model, "unet_cond", inputs("unet_cond", 2), (900, 500))
        hook.remove()
    assert torch.equal(*seen)


def test_order_one_follows_the_line_of_what_a_row_of_blocks_adds(name):
    model, xs = MODELS[name], inputs(name)
    with Inherit(Layers(deep=None), Explicit((0, 1)), order=1).attach(model) as handle:
        out = walk(model, name, xs[:3], (900, 700, 600))
        (run,) = handle._runs.values()
        (stream,) = run.streams.values()
        part = handle.parts[-1]
        (_, new), (_, old) = stream.kept[part]
    new, old = (v[0] if isinstance(v, tuple) else v for v in (new, old))
    line = new + 0.5 * (new - old)  # 600 is half a gap behind 700

    kept = []
    gate_type = type(Layers(deep=None).gates(model, lambda n, m: True)[-1])
    before = gate_type.inherit

    def spy(self, now, *args, **kwargs):
        if self.part == part:
            value = now.kept(part)
            kept.append(value[0] if isinstance(value, tuple) else value)
        return before(self, now, *args, **kwargs)

    gate_type.inherit = spy
    try:
        with Inherit(Layers(deep=None), Explicit((0, 1)), order=1).attach(model):
            again = walk(model, name, xs[:3], (900, 700, 600))
    finally:
        gate_type.inherit = before
    assert same(out, again)
    torch.testing.assert_close(kept[-1], line, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_blocks_of_a_transformer_add_what_they_added(name):
    model, seen = MODELS[name], []
    first, last = model.transformer_blocks[1], model.transformer_blocks[2]
    hooks = [
        first.register_forward_hook(
            lambda m, a, k, out: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
        last.register_forward_hook(lambda m, a, out: seen.append(out)),
    ]
    with Inherit(Group(1, 3), Explicit((0,))).attach(model):
        walk(model, name, inputs(name, 2), (900, 500))
    for hook in hooks:
        hook.remove()
    x, out, x_new, out_new = seen
    assert not torch.equal(x, x_new)
    torch.testing.assert_close(out_new - x_new, out - x, rtol=1e-4, atol=1e-5)


def test_units_keep_the_branch_before_the_gate_of_adaln():
    """A DiT block multiplies what a unit gives by a gate that depends on time: it must be fresh."""
    model, gates = MODELS["dit"], []
    block = model.transformer_blocks[0]
    hook = block.norm1.register_forward_hook(lambda m, a, out: gates.append(out[1]))
    outs = []
    spy = block.attn1.register_forward_hook(lambda m, a, out: outs.append(out))
    with Inherit(Units(), Explicit((0,))).attach(model):
        walk(model, "dit", inputs("dit", 2), (900, 100))
    hook.remove()
    spy.remove()
    assert torch.equal(*outs)
    assert not torch.equal(*gates)


@pytest.mark.parametrize("fresh", [0, 1, 3, 8])
def test_blocks_skip_everything_deeper(fresh):
    """At an inheriting step only the shallow convolutions run, and the depth says which."""
    model, ran = MODELS["unet_cond"], []
    hooks = [
        m.register_forward_hook(lambda m, a, o, n=n: ran.append(n))
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    with Inherit(Blocks(fresh), Explicit((0,))).attach(model):
        walk(model, "unet_cond", inputs("unet_cond", 1), (900,))
        ran.clear()
        walk(model, "unet_cond", inputs("unet_cond", 1), (500,))
    for hook in hooks:
        hook.remove()
    down = [n for n in ran if n.startswith("down_blocks")]
    up = [n for n in ran if n.startswith("up_blocks") and n.endswith("conv1")]
    assert not any(n.startswith("mid_block") for n in ran)
    layers = {".".join(n.split(".")[:4]) for n in down if ".resnets." in n or "samplers" in n}
    assert len(layers) == fresh
    assert len(up) == fresh + 1
    assert {"conv_in", "conv_out"} <= set(ran)


def test_whole_output_inheritance_of_a_linear_denoiser_in_closed_form():
    """eps = a(t) x and DDIM: between key steps x is a known multiple of x at the key step."""

    class Net(nn.Module):
        def forward(self, sample, timestep):
            return (0.3 + 0.001 * timestep) * sample

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, sample, timestep):
            return self.net(sample, timestep)

    times = [900.0, 780.0, 610.0, 420.0, 260.0, 90.0, 0.0]
    alpha = [math.cos(math.pi / 2 * t / 1000) for t in times]
    sigma = [math.sin(math.pi / 2 * t / 1000) for t in times]
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    model, start = Model(), x
    with Inherit(Named(("net",)), Uniform(3)).attach(model.eval()):
        for i in range(6):
            eps = model(x, times[i])
            keep = alpha[i + 1] / alpha[i]
            x = keep * x + (sigma[i + 1] - keep * sigma[i]) * eps
    product = 1.0
    for key in (0, 3):
        slope, factor = 0.3 + 0.001 * times[key], 1.0
        for i in range(key, key + 3):
            keep = alpha[i + 1] / alpha[i]
            factor = keep * factor + (sigma[i + 1] - keep * sigma[i]) * slope
        product *= factor
    torch.testing.assert_close(x, product * start, rtol=1e-12, atol=0)


# ---- inheritance: in pipelines, stacked, saved


def sample(pipe, steps=5, seed=0, **kwargs):
    rng = torch.Generator().manual_seed(seed)
    return pipe(
        "abc", num_inference_steps=steps, generator=rng, output_type="latent", **kwargs
    ).images


@pytest.mark.bridge
def test_a_stable_diffusion_pipeline_with_guidance():
    pipe = tiny_sd()
    plain = sample(pipe, guidance_scale=5.0)
    with Inherit(Layers(), Uniform(1)).attach(pipe.unet):
        assert torch.equal(sample(pipe, guidance_scale=5.0), plain)
    with Inherit(Layers(), Uniform(2)).attach(pipe.unet) as handle:
        one = sample(pipe, guidance_scale=5.0)
        assert handle.report()["key_calls"] == 3
        assert torch.equal(sample(pipe, guidance_scale=5.0), one)
        assert handle.report()["runs"] == 2
    assert not torch.equal(one, plain)
    assert torch.equal(sample(pipe, guidance_scale=5.0), plain)


@pytest.mark.bridge
def test_heun_and_a_start_in_the_middle():
    from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline

    pipe = tiny_sd()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with Inherit(Layers(), Uniform(2)).attach(pipe.unet) as handle:
        assert sample(pipe).isfinite().all()
        report = handle.report()
        assert report["calls"] == 9
        # levels 0 to 4, the first called once: key are levels 0, 2 and 4, and the first call that
        # is the second one of its level
        assert report["key_calls"] == 6
    pipe = tiny_sd()
    half = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    half.set_progress_bar_config(disable=True)
    with Inherit(Layers(), Explicit((0, 2))).attach(pipe.unet) as handle:
        half("abc", image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=8)
        assert handle.report()["calls"] == 4
        assert handle.report()["key_calls"] == 2


@pytest.mark.bridge
@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("level", [Group(0, 1), Layers(), Units()], ids=str)
def test_other_transformers_of_diffusers(make, level):
    pipe = make()
    model = pipe.transformer
    calls = []
    hook = model.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    size = {"height": 16, "width": 16}
    rng = torch.manual_seed(0)
    pipe("abc", num_inference_steps=3, output_type="latent", generator=rng, **size)
    hook.remove()

    def run():
        with torch.no_grad():
            return [model(*a, **k)[0] for a, k in calls]

    plain = run()
    with Inherit(level, Uniform(1)).attach(model):
        assert same(run(), plain)
    with Inherit(level, Uniform(2)).attach(model) as handle:
        out = run()
        assert handle.report()["parts_inherited"] > 0
    assert torch.equal(out[0], plain[0])
    assert not torch.equal(out[1], plain[1])
    assert same(run(), plain)


class Int8(nn.Module):
    """A linear layer that stores bytes, as a quantizer leaves it behind."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.abs().amax() / 127
        self.register_buffer("bytes", (layer.weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.bytes * self.scale, self.bias)


def to_int8(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and "emb" not in name and "norm" not in name:
                setattr(module, name, Int8(child))
    return model


@pytest.mark.parametrize("level", LEVELS[:4], ids=str)
def test_stacked_on_a_shortened_or_quantized_network(name, level):
    model = copy.deepcopy(MODELS[name])
    plain = walk(model, name)
    cut = Assemble(keep=0.7).attach(model)
    short = walk(model, name)
    with Inherit(level, Uniform(2)).attach(model):
        out = walk(model, name)
    assert same(out[::2], short[::2])
    assert not torch.equal(out[1], short[1])
    cut.detach()
    assert same(walk(model, name), plain)
    with torch.no_grad():
        to_int8(model)
    rough = walk(model, name)
    with Inherit(level, Uniform(2)).attach(model):
        out = walk(model, name)
    assert same(out[::2], rough[::2])
    assert not torch.equal(out[1], rough[1])


def test_two_caches_stack_and_come_off_in_order(name):
    model = MODELS[name]
    plain = walk(model, name)
    one = Inherit(Units(kinds=("attn1",), deep=None), Uniform(2)).attach(model)
    two = Inherit(Layers(), Uniform(4)).attach(model)
    out = walk(model, name)
    assert torch.equal(out[0], plain[0])
    assert not torch.equal(out[1], plain[1])
    two.detach()
    one.detach()
    assert same(walk(model, name), plain)


@pytest.mark.parametrize("level", LEVELS[:5], ids=str)
def test_a_plan_brings_the_cache_back(name, level):
    model = copy.deepcopy(MODELS[name])
    transform = Inherit(level, Uniform(2), where=lambda n, m: "blocks.0" not in n)
    if isinstance(level, (Blocks, Group)):
        transform = Inherit(level, Uniform(2))
    handle = transform.attach(model)
    want = walk(model, name)
    plan = json.loads(json.dumps(handle.plan()))
    handle.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        handle.detach()
    fresh = copy.deepcopy(MODELS[name])
    again = Inherit(level, Uniform(2)).restore(fresh, plan)
    assert again.parts == handle.parts
    assert same(walk(fresh, name), want)
    assert list(fresh.state_dict()) == list(MODELS[name].state_dict())


@pytest.mark.bridge
@pytest.mark.parametrize(
    ("transforms", "plain"),
    [
        ([Inherit(Blocks(0), Uniform(2), order=1)], False),
        ([Assemble(kept={"mid_block": ()}), Inherit(Layers(), FrontDense(5, 2))], False),
        ([Assemble(experts=Removed())], False),
        ([Assemble()], True),
    ],
)
def test_saved_pipelines_come_back_bit_for_bit(transforms, plain, tmp_path):
    from diffusers import DiffusionPipeline

    import effuse
    from effuse.bridge import store

    pipe = tiny_sd(layers_per_block=2)
    before = sample(pipe)
    handles = [t.attach(pipe.unet) for t in transforms]
    want = sample(pipe)
    store.save(pipe, tmp_path / "out", [("unet", h) for h in handles])
    for load in (effuse.load, DiffusionPipeline.from_pretrained):
        again = load(tmp_path / "out")
        again.set_progress_bar_config(disable=True)
        assert (type(again.unet) is type(pipe.unet)) == plain
        assert torch.equal(sample(again), want)
        assert torch.equal(sample(again), want)
    for handle in reversed(handles):
        handle.detach()
    assert torch.equal(sample(pipe), before)


@pytest.mark.parametrize("level", [Blocks(0), Layers(deep=None), Units(deep=None)], ids=str)
def test_removed_units_and_inheritance_go_together(name, level):
    """What `effuse.compress.units` took away stays away, and the rest inherits."""
    from effuse.compress.units import remove, units

    model = copy.deepcopy(MODELS[name])
    gone = [u.name for u in units(model)][::3]
    remove(model, gone)
    plain = walk(model, name)
    with Inherit(level, Uniform(2)).attach(model):
        out = walk(model, name)
    assert same(out[::2], plain[::2])
    assert not torch.equal(out[1], plain[1])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda m: Inherit("layer"), TypeError, "expected an object"),
        (lambda m: Inherit(Layers(), 3), TypeError, "Uniform"),
        (lambda m: Inherit(Blocks(99)).attach(m), ValueError, "expected 0 to 8"),
        (lambda m: Blocks(-1), ValueError, "at least 0"),
        (lambda m: Assemble(experts="removed"), TypeError, "such as Removed"),
        (lambda m: Assemble(kept={"down_blocks.0": 1}), TypeError, "layers by stage"),
        (lambda m: Assemble(keep=1.5), ValueError, "keep=1.5"),
        (lambda m: incubate(m, [], {"down_block.1": (0,)}), ValueError, "no stage 'down_block.1'"),
        (lambda m: incubate(m, [], steps=-1), ValueError, "steps=-1"),
        (lambda m: Layers(store="delta"), ValueError, "'branch', 'output'"),
        (lambda m: Layers(deep=-1), ValueError, "resolutions"),
        (lambda m: Units(kinds=("attn3",)), ValueError, "'attn1'"),
        (lambda m: Inherit(Named(("nowhere",))).attach(m), ValueError, "no module 'nowhere'"),
        (lambda m: Inherit(Group(0, 9)).attach(m), ValueError, "within the 0"),
        (lambda m: Inherit(Layers()).attach(nn.Linear(2, 2)), TypeError, "UNet or transformer"),
        (lambda m: Inherit().restore(m, {"parts": ["x"]}), ValueError, "the part 'x'"),
    ],
)
def test_bad_input_says_what_was_expected(make, kind, message):
    with pytest.raises(kind, match=message):
        make(MODELS["unet_cond"])
    assert all("forward" not in vars(m) for m in MODELS["unet_cond"].modules())


def test_expected_needs_known_keys():
    from effuse.compress.rewire.asdm_assembly import Adaptive

    with (
        Inherit(Layers(), Adaptive(0.1)).attach(MODELS["unet"]) as handle,
        pytest.raises(ValueError, match="known only after"),
    ):
        handle.expected(5)


def test_sweep_gives_rows_and_their_front():
    model = MODELS["unet"]
    xs = inputs("unet")
    settings = [
        Inherit(Layers(), Uniform(2)),
        Inherit(Layers(), Uniform(5)),
        Inherit(Layers(), Uniform(1)),
    ]
    rows = sweep(
        model, settings, lambda: torch.stack(walk(model, "unet", xs)), call_of("unet", xs[0], 9)
    )
    assert [r.transform for r in rows] == [None, *settings]
    assert rows[0].error == rows[3].error == 0
    assert rows[0].macs == rows[3].macs == rows[0].macs_full
    assert rows[2].macs < rows[1].macs < rows[0].macs
    assert rows[1].error > 0
    beaten = [
        any(
            (o.macs <= r.macs and o.error < r.error) or (o.macs < r.macs and o.error <= r.error)
            for o in rows
        )
        for r in rows
    ]
    assert [r.front for r in rows] == [not b for b in beaten]
    assert all("forward" not in vars(m) for m in model.modules())


# ---- switching


def test_schedules():
    assert [AtSteps((0, 2, 4), (1, 0, 1)).pick(i, 0) for i in range(6)] == [1, 1, 0, 0, 1, 1]
    assert [BelowTimesteps((500, 200)).pick(0, t) for t in (900, 500, 499, 200, 10)] == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert [Interleaved(3).pick(i, 0) for i in range(6)] == [0, 1, 1, 0, 1, 1]
    assert AtSteps((0, 3)).cost([9, 8, 7, 6], [10, 1]) == 31


@pytest.mark.bridge
def test_a_constant_schedule_is_the_single_network_and_twins_never_differ():
    big = deep_unet_cond()
    small = assemble(big, 0.5)
    for schedule, alone in ((AtSteps((0,), (0,)), big), (AtSteps((0,), (1,)), small)):
        model = Switched([big, small], schedule)
        assert same(walk(model, "unet_cond"), walk(alone, "unet_cond"))
    twin = copy.deepcopy(big)
    for schedule in (AtSteps((0, 2)), BelowTimesteps((600,)), Interleaved(2)):
        model = Switched([big, twin], schedule)
        assert same(walk(model, "unet_cond"), walk(big, "unet_cond"))


@pytest.mark.bridge
def test_each_step_calls_the_network_whose_turn_it_is():
    big = deep_unet_cond()
    small = assemble(big, 0.5)
    one, two = walk(big, "unet_cond"), walk(small, "unet_cond")
    model = Switched.at({0: big, 2: small, 4: big})
    assert len(model.models) == 2
    for _ in range(2):  # a new run is seen by the rise of the timestep
        assert same(walk(model, "unet_cond"), [one[0], one[1], two[2], two[3], one[4]])
    model = Switched([big, small], BelowTimesteps((400,)))
    assert same(walk(model, "unet_cond"), [*one[:3], *two[3:]])
    assert model.config is big.config
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.time_embedding is big.time_embedding


@pytest.mark.bridge
def test_switching_refuses_what_does_not_fit():
    big = deep_unet_cond()
    with pytest.raises(ValueError, match="in_channels 5"):
        Switched([big, deep_unet_cond(in_channels=5)], AtSteps((0, 1)))
    with pytest.raises(ValueError, match="needs 2"):
        Switched([big], AtSteps((0, 1)))
    with pytest.raises(TypeError, match="AtSteps"):
        Switched([big, big], {0: 1})
    with pytest.raises(ValueError, match="0 first"):
        AtSteps((1, 2))
    with pytest.raises(ValueError, match="falling"):
        BelowTimesteps((100, 500))
    from diffusers import DDIMScheduler

    one = tiny_sd()
    for change, message in (
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ({"beta_end": 0.02}, "noise table"),
    ):
        other = DDIMScheduler.from_config(one.scheduler.config, **change)
        with pytest.raises(ValueError, match=message):
            Switched.of([one, tiny_sd(other)], AtSteps((0, 1)))
    two = tiny_sd()
    two.vae.register_to_config(scaling_factor=0.9)
    with pytest.raises(ValueError, match=r"vae.scaling_factor 0.9"):
        Switched.of([one, two], AtSteps((0, 1)))
    assert len(Switched.of([one, tiny_sd()], AtSteps((0, 1))).models) == 2


@pytest.mark.bridge
def test_a_pipeline_with_a_switched_network_saves_and_loads(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = tiny_sd()
    small = assemble(pipe.unet, {"mid_block": ()})
    pipe.register_modules(unet=Switched([pipe.unet, small], Interleaved(2)))
    want = sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet).__name__ == "Switched"
    assert again.unet.schedule == Interleaved(2)
    assert Switched.from_pretrained(tmp_path, subfolder="unet").schedule == Interleaved(2)
    assert torch.equal(sample(again), want)


@pytest.mark.bridge
def test_transforms_on_the_networks_of_a_switch_are_saved_or_refused(tmp_path):
    from diffusers import DiffusionPipeline

    import effuse
    from effuse.bridge import store
    from effuse.core.errors import StoreError

    pipe = tiny_sd(layers_per_block=2)
    big, small = pipe.unet, copy.deepcopy(pipe.unet)
    cut = Assemble(experts=Removed()).attach(small)
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, CondConv2d):
                wild(module)
    slow = Inherit(Layers(), Uniform(2)).attach(small)
    for named in ([], [slow]):
        pipe.register_modules(unet=Switched([big, small], AtSteps((0, 2)), named))
        with pytest.raises(StoreError, match=r"applied=|do not rebuild"):
            pipe.save_pretrained(tmp_path / "no")
    pipe.register_modules(unet=Switched([big, small], AtSteps((0, 2)), [cut, slow]))
    want = sample(pipe)
    pipe.save_pretrained(tmp_path / "one")
    store.save(pipe, tmp_path / "two")
    once = effuse.load(tmp_path / "two")
    store.save(once, tmp_path / "three")  # what was loaded saves again without being told
    again = [DiffusionPipeline.from_pretrained(tmp_path / "one"), once]
    again += [effuse.load(tmp_path / "three")]
    for other in again:
        other.set_progress_bar_config(disable=True)
        assert torch.equal(sample(other), want)
        assert torch.equal(sample(other), want)
    with pytest.raises(ValueError, match="none of the networks"):
        Switched([big, big], AtSteps((0, 2)), [slow])


@pytest.mark.bridge
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"schedule": {"Interleave": {}}}, "did you mean 'Interleaved'"),
        ({"schedule": {"Interleaved": {"evry": 2}}}, "did you mean 'every'"),
        ({"schedule": {"Interleaved": {"every": 0}}}, "at least 1"),
        ({"networks": None}, "expected the plan"),
    ],
)
def test_a_damaged_switch_is_refused(change, message, tmp_path):
    from effuse.core.errors import StoreError

    big = tiny_unet()
    Switched([big, big], Interleaved(2)).save_pretrained(tmp_path)
    plan = json.loads((tmp_path / "switched.json").read_text())
    (tmp_path / "switched.json").write_text(json.dumps(plan | change))
    with pytest.raises(StoreError, match=message):
        Switched.from_pretrained(tmp_path)
    (tmp_path / "switched.json").write_text("{}")
    with pytest.raises(StoreError, match="'format' is missing"):
        Switched.from_pretrained(tmp_path)


def test_all_schedules_with_few_switches_are_tried():
    assert [(s.starts, s.then) for s in schedules(3, 2, 1)] == [
        ((0,), (0,)),
        ((0,), (1,)),
        ((0, 1), (0, 1)),
        ((0, 1), (1, 0)),
        ((0, 2), (0, 1)),
        ((0, 2), (1, 0)),
    ]
    found = list(schedules(8, 3, 3, every=2))  # sum over p of C(3, p) 3 2^p
    assert len(found) == len(set(found)) == 3 * (1 + 3 * 2 + 3 * 4 + 8)
    with pytest.raises(ValueError, match="at most 3"):
        list(schedules(8, points=4))


def test_the_closest_schedule_within_the_budget_is_chosen():
    """Scalar networks eps = a x, so that each run is a product of factors known by hand."""

    class Scalar(nn.Module):
        def __init__(self, a, width):
            super().__init__()
            self.a = a
            self.config = {"in_channels": 1}
            self.work = nn.Linear(width, width)

        def forward(self, sample, timestep):
            self.work(torch.ones(1, self.work.in_features))
            return self.a * sample

    big, small = Scalar(0.5, 8), Scalar(0.25, 4)
    x, weights = torch.ones(1, 1, dtype=torch.float64), (0.1, 0.9, 0.5, 0.2)

    def run(model):
        y = x
        for t, w in zip((9, 7, 5, 3), weights, strict=True):
            y = y - w * model(y, t)
        return y

    trials = choose([big, small], run, ((x, 9), {}), 4, budget=0.7, points=2)
    want = {}
    for s in schedules(4, 2, 2):
        which = [s.pick(i, 0) for i in range(4)]
        cost = sum((64, 16)[k] for k in which)
        if cost <= 0.7 * 4 * 64:
            end = math.prod(1 - w * (0.5, 0.25)[k] for w, k in zip(weights, which, strict=True))
            full = math.prod(1 - 0.5 * w for w in weights)
            want[s] = (end / full - 1) ** 2, cost
    assert {t.schedule for t in trials} == set(want)
    for t in trials:
        error, cost = want[t.schedule]
        assert t.error == pytest.approx(error, rel=1e-9)
        assert t.macs == cost
    assert trials[0].schedule == AtSteps((0, 1, 3), (1, 0, 1))  # true where the steps are large
    with pytest.raises(ValueError, match=r"cheapest of 14 schedules costs 0\.25"):
        choose([big, small], run, ((x, 9), {}), 4, budget=0.2, points=2)


# ---- assembly


@pytest.mark.parametrize("keep", [0.5, 0.7, 1.0])
def test_an_assembled_network_is_a_plain_one(name, keep):
    """Its config alone builds it: strict load into a stock class, same answers."""
    teacher = MODELS[name]
    student = assemble(teacher, keep)
    plain = type(teacher).from_config(json.loads(json.dumps(dict(student.config)))).eval()
    plain.load_state_dict(student.state_dict(), strict=True)
    assert same(walk(plain, name), walk(student, name))
    if keep == 1.0:
        assert same(walk(student, name), walk(teacher, name))
    old = teacher.state_dict()
    if name == "unet_cond" and keep == 0.5:
        assert even_plan(teacher, 0.5)["up_blocks.0"] == (0, 2)
        mine = student.state_dict()
        assert student.config.layers_per_block == 1
        for new, was in (("resnets.0", "resnets.0"), ("resnets.1", "resnets.2")):
            key = "up_blocks.1.{}.conv1.weight"
            assert torch.equal(mine[key.format(new)], old[key.format(was)])


def test_stages_may_differ_and_the_middle_may_go():
    teacher = MODELS["unet_cond"]
    kept = {"down_blocks.2": (0,), "up_blocks.0": (0, 2), "mid_block": ()}
    student = assemble(teacher, kept)
    assert student.config.layers_per_block == (2, 2, 1)
    plain = type(teacher).from_config(student.config).eval()
    plain.load_state_dict(student.state_dict(), strict=True)
    assert same(walk(plain, "unet_cond"), walk(student, "unet_cond"))


def test_taking_an_assembly_off_gives_the_original_back_even_after_healing(name):
    model = copy.deepcopy(MODELS[name])
    before, config = walk(model, name), dict(model.config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = Assemble(keep=0.6, experts=Removed()).attach(model)
    goal = handle.objective(copy.deepcopy(MODELS[name]))
    batch = {"call": call_of(name, inputs(name)[0], 500)}
    optimizer = torch.optim.SGD(goal.parameters_of("student"), lr=1e-2)
    fit(goal, [batch], optimizer, steps=2, progress=False)
    model.eval()
    handle.detach()
    assert same(walk(model, name), before)
    assert dict(model.config) == config
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())


@pytest.mark.parametrize("experts", [None, Removed(), Copies(2, router="softmax")])
def test_a_plan_rebuilds_an_assembly(experts):
    transform = Assemble(keep=0.5, experts=experts)
    model = copy.deepcopy(MODELS["unet_cond"])
    handle = transform.attach(model)
    plan = json.loads(json.dumps(handle.plan()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    want = walk(model, "unet_cond")
    whole = copy.deepcopy(MODELS["unet_cond"])
    short = type(model).from_config(model.config).eval()
    for fresh in (whole, short):
        transform.restore(fresh, plan)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert same(walk(fresh.eval(), "unet_cond"), want)
    report = handle.report()
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert (report["conditional_convolutions"] > 0) == (experts is not None)


def test_only_shortened_stages_get_experts():
    mixed = assemble(MODELS["unet_cond"], {"down_blocks.0": (0, 1), **CUT}, experts=Copies(2))
    names = {n for n, m in mixed.named_modules() if isinstance(m, CondConv2d)}
    assert {".".join(n.split(".")[:2]) for n in names} == set(CUT)


@pytest.mark.parametrize("experts", [Removed(), Copies(3), Removed(router="softmax")])
def test_experts_begin_as_the_kept_kernels(experts):
    plain, mixed = (assemble(MODELS["unet_cond"], 0.5, experts=e) for e in (None, experts))
    assert same(walk(mixed, "unet_cond"), walk(plain, "unet_cond"))
    convs = [m for m in mixed.modules() if isinstance(m, CondConv2d)]
    assert convs
    if isinstance(experts, Removed):
        removed = MODELS["unet_cond"].down_blocks[0].resnets[1].conv2.weight
        assert torch.equal(mixed.down_blocks[0].resnets[0].conv2.weight[1], removed)


def test_copies_differ_by_noise_of_the_size_that_was_asked_for():
    first = nn.Conv2d(16, 32, 3)
    kept, one, two = Copies(3, noise=0.1, seed=4).convs(first, ())
    assert kept is first
    for other in (one, two):
        off = (other.weight - first.weight) / first.weight.std()
        assert off.mean().abs() < 0.01  # 4,608 numbers: standard error 0.0015
        assert 0.095 < off.std() < 0.105
    assert not torch.equal(one.weight, two.weight)
    assert torch.equal(Copies(3, noise=0.1, seed=4).convs(first, ())[1].weight, one.weight)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"down_blocks.9": (0,)}, "no stage"),
        ({"down_blocks.0": (0, 5)}, "rising indices"),
        ({"down_blocks.0": ()}, "at least one"),
        ({"down_blocks.0": (0,)}, "one more than in its mirror"),
        ({"down_blocks.1": (1,), "up_blocks.1": (0, 2)}, "layer 1 takes 32 channels where 16"),
        ({"down_blocks.0": (0,), "up_blocks.2": (1, 2)}, "where 48 come"),
    ],
)
def test_layers_that_do_not_fit_are_named(kept, message):
    model = copy.deepcopy(MODELS["unet_cond"])
    before = walk(model, "unet_cond")
    with pytest.raises(ValueError, match=message):
        Assemble(kept=kept).attach(model)
    assert same(walk(model, "unet_cond"), before)


def test_a_dit_keeps_the_block_whose_embedding_its_end_needs():
    with pytest.raises(ValueError, match="block 0"):
        assemble(MODELS["dit"], {"transformer_blocks": (1, 2)})


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (tiny_sd3, {"num_layers": 4}),
        (tiny_sd3, {"num_layers": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}),
        (tiny_flux, {"num_layers": 2, "num_single_layers": 4}),
    ],
)
def test_two_streams_assemble_to_plain_networks(make, layers):
    """SD3's last block gives no text, and some blocks are of another kind, by number."""
    teacher = make(**layers).transformer
    student = assemble(teacher, 0.5)
    assert student.config.num_layers == teacher.config.num_layers // 2
    plain = type(teacher).from_config(json.loads(json.dumps(dict(student.config))))
    plain.load_state_dict(student.state_dict(), strict=True)
    if make is tiny_sd3:
        with pytest.raises(ValueError, match="block 3 to stay"):
            assemble(teacher, {"transformer_blocks": (0, 1)})


def test_one_number_of_layers_is_all_a_plain_unet_can_say():
    model = tiny_unet(layers_per_block=2)
    state = list(model.state_dict())
    with pytest.raises(ValueError, match="one number for all stages"):
        Assemble(kept={"down_blocks.1": (0,), "up_blocks.0": (0, 2)}).attach(model)
    assert list(model.state_dict()) == state


# ---- incubation


def test_a_network_that_keeps_all_costs_nothing(name):
    model = copy.deepcopy(MODELS[name])
    goal = Assemble(keep=1.0).attach(model).objective(copy.deepcopy(MODELS[name]))
    loss = goal("student", {"call": call_of(name, inputs(name)[0], 500)})
    assert loss.total == 0
    assert len(loss.terms) > 1


def test_a_kept_block_stands_for_the_dropped_ones_behind_it():
    row = "transformer_blocks"
    pairs = taps({row: 6}, {row: (0, 1, 4)})
    assert pairs == [(f"{row}.0", f"{row}.0"), (f"{row}.3", f"{row}.1"), (f"{row}.5", f"{row}.2")]
    assert taps({"down_blocks.0": 2, "mid_block": 1}, {"mid_block": ()}) == [
        ("down_blocks.0", "down_blocks.0")
    ]


def test_each_part_learns_alone_inside_the_teacher():
    teacher = deep_unet_cond()
    state = copy.deepcopy(teacher.state_dict())
    batch = {"call": call_of("unet_cond", inputs("unet_cond")[0], 500)}
    kept = {"down_blocks.1": (0,), "up_blocks.1": (0, 2)}
    student, log = incubate(teacher, [batch], kept, steps=2, joint=0, lr=1e-2, progress=False)
    assert [entry["stages"] for entry in log] == [list(kept)]
    raw = assemble(teacher, kept).state_dict()
    for key, value in student.state_dict().items():
        part = key.startswith(("down_blocks.1.", "up_blocks.1."))
        assert part or torch.equal(value, raw[key]), key
    key = "down_blocks.1.resnets.0.conv1.weight"
    assert not torch.equal(student.state_dict()[key], raw[key])
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("experts", [None, Removed()])
@pytest.mark.parametrize(("name", "parts"), [("unet_cond", 2), ("pixart", 2)])
def test_incubation_learns_part_by_part(name, parts, experts):
    teacher = {"unet_cond": tiny_unet_cond, "pixart": tiny_pixart}[name](
        **{"layers_per_block": 2} if name == "unet_cond" else {"num_layers": 4}
    )
    before = walk(teacher, name)
    calls = [{"call": call_of(name, x, t)} for x, t in zip(inputs(name), TIMES, strict=True)]
    student, log = incubate(
        teacher, calls, 0.5, steps=3, joint=6, lr=1e-3, experts=experts, progress=False
    )
    assert [entry["steps"] for entry in log] == [3] * parts + [6]
    assert same(walk(teacher, name), before)

    def loss(model):
        pairs = taps(stage_sizes(teacher), even_plan(teacher, 0.5))
        goal = NormalizedFeatureDistillation(teacher, model.eval(), pairs)
        with torch.no_grad():
            return float(sum(goal("student", call).total for call in calls))

    assert loss(student) < loss(assemble(teacher, 0.5))


# ---- the conditional convolution


def conv(seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(4, 6, 3, **{"padding": 1, **kwargs}).double()


def x64(batch=3):
    rng = torch.Generator().manual_seed(5)
    return torch.randn(batch, 4, 7, 7, generator=rng, dtype=torch.float64)


def wild(module):
    """Give a router something to say."""
    rng = torch.Generator().manual_seed(1)
    for layer in (module.gate, module.time_gate):
        if layer is not None:
            layer.weight.data.normal_(0, 2, generator=rng)
    return module


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}])
def test_one_kernel_or_a_new_router_is_the_plain_convolution(geometry):
    first, x = conv(**geometry), x64()
    with torch.no_grad():
        for convs in ([first], [first, conv(1, **geometry)]):
            for router in ("sigmoid", "softmax"):
                made = CondConv2d.from_convs(convs, router=router)
                assert torch.equal(made(x), first(x))


def test_equal_kernels_and_weights_that_sum_to_one_are_the_plain_convolution():
    first = conv()
    for exact in (True, False):
        mixed = wild(CondConv2d.from_convs([first] * 3, router="softmax", exact=exact))
        assert mixed.route(x64()).std(0).max() > 0.01
        torch.testing.assert_close(mixed(x64()), first(x64()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_mixing_kernels_equals_mixing_outputs(router):
    convs, x = [conv(i) for i in range(3)], x64()
    mixed = wild(CondConv2d.from_convs(convs, router=router, exact=False))
    z = x.mean((2, 3)) @ mixed.gate.weight.T + mixed.gate.bias
    r = z.sigmoid() if router == "sigmoid" else z.softmax(-1)
    want = sum(r[:, e, None, None, None] * c(x) for e, c in enumerate(convs))
    torch.testing.assert_close(mixed(x), want, rtol=1e-10, atol=1e-12)
    kernels = torch.einsum("be,eoihw->boihw", r, mixed.weight)
    grouped = mixed._grouped(x, kernels, r @ mixed.bias)
    torch.testing.assert_close(grouped, want, rtol=1e-10, atol=1e-12)


def test_the_embedding_of_time_adds_to_what_the_router_sees():
    convs, x = [conv(i) for i in range(3)], x64()
    time = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed = wild(CondConv2d.from_convs(convs, exact=False, time=5))
    z = x.mean((2, 3)) @ mixed.gate.weight.T + time @ mixed.time_gate.weight.T
    torch.testing.assert_close(mixed.route(x, time), z.sigmoid(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_router_gives_one_and_zeros_in_any_precision(dtype):
    for count in range(1, 8):
        for router in ("sigmoid", "softmax"):
            convs = [conv(i).to(dtype) for i in range(count)]
            r = CondConv2d.from_convs(convs, router=router).route(x64().to(dtype))
            assert torch.equal(r, torch.eye(count, dtype=dtype)[:1].expand(3, -1)), (count, router)


def test_rows_do_not_see_each_other_and_time_can_be_seen():
    mixed = wild(CondConv2d.from_convs([conv(), conv(1)], time=5))
    x, time = x64(), torch.randn(3, 5, dtype=torch.float64)
    out = mixed(x, time)
    torch.testing.assert_close(out[1:2], mixed(x[1:2], time[1:2]), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(out, mixed(x, time + 1))
    with pytest.raises(ValueError, match="time is missing"):
        mixed(x)


def test_the_router_learns_from_the_start():
    mixed = CondConv2d.from_convs([conv(), conv(1)])
    mixed(x64()).square().mean().backward()
    assert mixed.gate.weight.grad.abs().max() > 1e-6


def test_kernels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="weight is"):
        CondConv2d.from_convs([conv(), nn.Conv2d(4, 8, 3, padding=1).double()])
    with pytest.raises(ValueError, match="stride"):
        CondConv2d.from_convs([conv(), conv(stride=2)])
    with pytest.raises(ValueError, match="zeros"):
        CondConv2d.from_convs([conv(padding_mode="circular")])
    with pytest.raises(ValueError, match="empty"):
        CondConv2d.from_convs([])


def test_a_handle_on_a_network_inside_is_given_to_the_inside(tmp_path):
    from effuse.bridge import store
    from effuse.core import StoreError

    one, two = tiny_sd(), tiny_sd()
    handle = Inherit(Layers(), Uniform(2)).attach(two.unet)
    pipe = tiny_sd()
    pipe.register_modules(unet=Switched.of([one, two], AtSteps((0, 1))))
    with pytest.raises(StoreError, match=r"inside 'unet': give its handle"):
        store.save(pipe, tmp_path / "out", [("unet", handle)])
    assert not (tmp_path / "out").exists()
