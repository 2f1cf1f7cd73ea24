"""SlimSAM: widths, importance, staged distillation, against what is known exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from tests.tiny import tiny_dit, tiny_dit_pipe, tiny_pixart, tiny_unet, tiny_unet_cond, wake
from torch import nn

from effuse.compress.prune.importance import change, choose, exhaustive, taylor
from effuse.compress.prune.slimsam import (
    AlignedDistillation,
    DisturbedTaylor,
    Fade,
    Gaussian,
    Half,
    Magnitude,
    Mean,
    Random,
    Slimmed,
    SlimSAM,
    Taylor,
    alternate,
    blocks,
    heal,
    inner,
    packed,
    unpacked,
)
from effuse.compress.prune.vit_groups import Slot, Width, narrow, split, widths
from effuse.compress.quantize.int8 import Int8
from effuse.compress.units import parameters
from effuse.ops.tensors import randn_like


def seeded(build):
    def made():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build()
            wake(model)
        return model.eval()

    return made


@seeded
def sam():
    from transformers import SamVisionConfig, SamVisionModel

    return SamVisionModel(
        SamVisionConfig(
            hidden_size=32,
            output_channels=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
            window_size=3,  # 8 tokens a side: the last windows are padded
            global_attn_indexes=[1],
            mlp_dim=64,
            num_pos_feats=8,
            initializer_range=0.1,
        )
    )


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


@seeded
def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL))


@seeded
def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**SMALL))


def call_of(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if name in ("SamVisionModel", "ViTModel", "CLIPVisionModel"):
        side = 32 if name == "SamVisionModel" else 16
        return (torch.randn(2, 3, side, side, generator=rng),), {}
    size = model.config.sample_size
    x = torch.randn(2, model.config.in_channels, size, size, generator=rng)
    t = torch.full((2,), 300)
    if name == "DiTTransformer2DModel":
        return (x,), {"timestep": t, "class_labels": torch.tensor([1, 2])}
    text = torch.randn(2, 5, 16 if "PixArt" in name else 32, generator=rng)
    if "PixArt" in name:
        return (x,), {"timestep": t, "encoder_hidden_states": text}
    return (x, t), {"encoder_hidden_states": text} if "Condition" in name else {}


@torch.no_grad()
def answer(model, seed=0):
    args, kwargs = call_of(model, seed)
    return model(*args, **kwargs)[0]


BUILDERS = {
    "sam": sam,
    "vit": vit,
    "clip": clip,
    "dit": tiny_dit,
    "pixart": tiny_pixart,
    "unet": tiny_unet,
    "unet_cond": tiny_unet_cond,
}
STREAMED = ("sam", "vit", "clip", "dit", "pixart")


@pytest.fixture(params=BUILDERS)
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture(params=STREAMED)
def streamed(request):
    return BUILDERS[request.param]()


# ---- widths


def some(width, count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randperm(width.size, generator=rng)[:count].sort().values


def test_bottlenecks_without_channels_are_as_with_zeros(model):
    """Narrowing q, k, v and hidden layers equals zeroing what makes those channels."""
    split(model)
    found = [w for w in widths(model) if w.kind != "embed"]
    assert {w.kind for w in found} >= {"qk", "v"}
    keep = {w.name: some(w, w.size // 2, seed=len(w.path)) for w in found}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for w in found:
            gone = torch.tensor([i for i in range(w.size) if i not in set(keep[w.name].tolist())])
            for slot in w.slots:
                if slot.dim == 0:
                    tensor = getattr(zeroed.get_submodule(slot.path), slot.name)
                    tensor[slot.places(gone, w.size)] = 0
    before = answer(model)
    narrowed = narrow(model, found, keep)
    assert parameters(model) < parameters(zeroed)
    torch.testing.assert_close(answer(model), answer(zeroed), rtol=1e-4, atol=1e-5)
    assert (answer(model) - before).abs().max() > 1e-3
    narrowed.undo()
    assert torch.equal(answer(model), before)


def test_narrowed_attention_is_one_function_under_both_processors():
    """One divides by the square root of the head's width, the other uses the module's scale."""
    from diffusers.models.attention_processor import AttnProcessor

    model = tiny_dit()
    found = [w for w in widths(model) if w.kind in ("qk", "v")]
    narrow(model, found, {w.name: some(w, w.size // 2) for w in found})
    fused = answer(model)
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    torch.testing.assert_close(answer(model), fused, rtol=1e-4, atol=1e-5)


def test_channels_that_are_zero_can_go(model):
    """A pruned channel of which all weights are zero leaves the function as it was."""
    split(model)
    found = [w for w in widths(model) if w.kind != "embed"]
    keep = {w.name: some(w, w.size - 2) for w in found}
    with torch.no_grad():
        for w in found:
            gone = torch.tensor([i for i in range(w.size) if i not in set(keep[w.name].tolist())])
            for slot in w.slots:
                tensor = getattr(model.get_submodule(slot.path), slot.name)
                tensor.index_fill_(slot.dim, slot.places(gone, w.size), 0.0)
    before = answer(model)
    narrow(model, found, keep)
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)


def test_stream_has_one_width_and_one_set_of_channels(streamed):
    (stream,) = [w for w in widths(streamed) if w.kind == "embed"]
    keep = some(stream, stream.size // 2)
    before = {s: getattr(streamed.get_submodule(s.path), s.name) for s in stream.slots}
    narrow(streamed, [stream], {stream.name: keep})
    for slot in stream.slots:
        whole = before[slot]
        n = whole.shape[slot.dim] // slot.repeats
        assert n == stream.size
        here = getattr(streamed.get_submodule(slot.path), slot.name)
        parts = whole.movedim(slot.dim, 0).reshape(slot.repeats, n, -1)[:, keep]
        if sum(s.path == slot.path and s.name == slot.name for s in stream.slots) == 1:
            got = here.movedim(slot.dim, 0).reshape(slot.repeats, len(keep), -1)
            assert torch.equal(got, parts)
        assert here.shape[slot.dim] == slot.repeats * len(keep)
    seen = {}

    def listen(name):
        def hook(module, given, out):
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = out.shape[-1]

        return hook

    names = blocks(streamed)["blocks"]
    assert len(names) == len(streamed.get_submodule(stream.blocks)) - stream.widen
    for name in names:
        streamed.get_submodule(name).register_forward_hook(listen(name))
    with torch.no_grad():
        args, kwargs = call_of(streamed)
        out = streamed(*args, **kwargs)[0]
    assert set(seen.values()) == {len(keep)}
    assert out.isfinite().all()


def test_stream_finder_misses_nothing(streamed):
    """A stream written down incompletely would not run; one with a stray axis would not either."""
    (stream,) = [w for w in widths(streamed) if w.kind == "embed"]
    shape = answer(streamed).shape
    narrow(streamed, [stream], {stream.name: some(stream, 6)})
    assert answer(streamed).shape == shape


def test_sam_split_is_the_same_function():
    model = sam()
    before = answer(model)
    removal = split(model)
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)
    assert type(model.vision_encoder.layers[0].attn).__name__ == "SplitAttention"
    removal.undo()
    assert torch.equal(answer(model), before)


def test_sam_split_attention_interpolates_tables_as_the_original():
    model = sam()
    model.vision_encoder.layers[0].attn.rel_pos_h = nn.Parameter(torch.randn(9, 16))
    before = answer(model)
    split(model)
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)


def test_tables_begin_anew_or_keep_the_queries_channels():
    for reset in (True, False):
        model = sam()
        handle = SlimSAM(embed=0.0, bottleneck=0.5, reset_tables=reset, least=0.5).attach(model)
        table = model.vision_encoder.layers[1].attn.rel_pos_h.clone()
        handle.observe([call_of(model)])
        attention = model.vision_encoder.layers[1].attn
        keep = handle.kept["bottleneck"]["vision_encoder.layers.1.attn:qk"]
        assert len(keep) < 16
        wanted = torch.zeros(len(table), len(keep)) if reset else table[:, keep]
        assert torch.equal(attention.rel_pos_h, wanted)


def test_positions_of_another_size_are_sliced_too():
    model = tiny_dit()
    (stream,) = [w for w in widths(model) if w.kind == "embed"]
    keep = some(stream, 16)
    x = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for size in (8, 12):
            whole = tiny_dit().pos_embed(x[..., :size, :size])
            narrowed = narrow(model, [stream], {stream.name: keep})
            part = model.pos_embed(x[..., :size, :size])
            narrowed.undo()
            torch.testing.assert_close(part, whole[..., keep])


def test_twins_must_agree_and_channels_must_be_there():
    model = vit()
    found = widths(model)
    qk = next(w for w in found if w.kind == "qk")
    with pytest.raises(ValueError, match="must keep as many"):
        narrow(model, found, {qk.name: torch.arange(4), qk.twin: torch.arange(5)})
    with pytest.raises(ValueError, match="different channels"):
        narrow(model, found, {qk.name: torch.tensor([1, 99])})


def test_packed_round_trip():
    keep = torch.tensor([0, 3, 5, 12])
    assert packed(keep, 13) == "13:1029"
    assert torch.equal(unpacked("13:1029"), keep)


# ---- importance


class One(nn.Module):
    """S = W x: (B, 5) to (B, 3)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3, bias=False).double()
        rng = torch.Generator().manual_seed(0)
        nn.init.normal_(self.layer.weight, generator=rng)

    def forward(self, x):
        return self.layer(x)


INPUTS = Width(":in", "mlp", 5, (Slot("layer", "weight", 1),))


def rows(count=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            "call": ((torch.randn(4, 5, generator=rng, dtype=torch.float64),), {}),
            "target": torch.randn(4, 3, generator=rng, dtype=torch.float64),
        }
        for _ in range(count)
    ]


def test_without_noise_every_importance_is_zero(model):
    def undisturbed(given, batch):
        return (given.detach() - given).square().sum(), given.numel()

    found = widths(model)
    scores = taylor(model, found, [{"call": call_of(model)}], undisturbed)
    assert scores
    assert all((s == 0).all() for s in scores.values())


@pytest.mark.parametrize("each", [False, True])
def test_disturbed_gradient_is_the_noise_times_the_jacobian(each):
    """dL/dw_kj = -(2 / N) sum_b n_bk x_bj on a linear layer, where the Jacobian is the input."""
    model, batches, rng = One(), rows(), torch.Generator().manual_seed(7)
    w, total = model.layer.weight.detach(), torch.zeros(3, 5, dtype=torch.float64)
    for batch in batches:
        x = batch["call"][0][0]
        n = 0.3 * randn_like(torch.zeros(4, 3, dtype=torch.float64), rng)
        g = -(2 / 12) * n.T @ x
        total += (w * g).abs() if each else g
    wanted = (total if each else (w * total).abs()).sum(0)
    got = DisturbedTaylor(0.3, each=each, seed=7).scores(model, [INPUTS], batches)[":in"]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_disturbed_gradient_obeys_its_law():
    """E |dL/dw| = (2 sigma / N) ||J|| sqrt(2 / pi), over 1000 draws of the noise."""
    model, (batch,) = One(), rows(1)
    sigma, x = 0.01, batch["call"][0][0]
    w = model.layer.weight.detach().abs()
    seen = torch.stack(
        [
            DisturbedTaylor(sigma, seed=s).scores(model, [INPUTS], [batch])[":in"]
            for s in range(1000)
        ]
    ).mean(0)
    # each output row k has J_kj = x_bj for every b: norm over the batch
    law = (2 * sigma / 12) * x.norm(dim=0) * (2 / torch.pi) ** 0.5 * w.sum(0)
    torch.testing.assert_close(seen, law, rtol=0.06, atol=0)


def test_ranking_does_not_depend_on_sigma():
    model = vit()
    found, batch = widths(model), [{"call": call_of(model)}]
    small, large = (DisturbedTaylor(s).scores(model, found, batch) for s in (1e-3, 1e-1))
    for k, s in small.items():
        torch.testing.assert_close(100 * s, large[k], rtol=2e-3, atol=1e-9)


def test_taylor_uses_the_target():
    """dL/dw_kj = -(2 / N) sum_b (t - s)_bk x_bj."""
    model, batches = One(), rows()
    w, total = model.layer.weight.detach(), torch.zeros(3, 5, dtype=torch.float64)
    for batch in batches:
        x = batch["call"][0][0]
        total += -(2 / 12) * (batch["target"] - x @ w.T).T @ x
    got = Taylor().scores(model, [INPUTS], batches)[":in"]
    torch.testing.assert_close(got, (w * total).abs().sum(0), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="target"):
        Taylor().scores(model, [INPUTS], [{"call": batches[0]["call"]}])


def test_heads_and_tensors_are_pooled():
    """Positions are summed over heads, then averaged over tensors."""
    model = vit()
    v = next(w for w in widths(model) if w.kind == "v")
    attention = model.get_submodule(v.path)
    got = Magnitude().scores(model, [v], [])[v.name]
    rows = attention.v_proj.weight.detach().double().abs().sum(1).view(2, 16).sum(0)
    bias = attention.v_proj.bias.detach().double().abs().view(2, 16).sum(0)
    out = attention.o_proj.weight.detach().double().abs().sum(0).view(2, 16).sum(0)
    torch.testing.assert_close(got, (rows + bias + out) / 3)


def test_dead_channels_are_found_as_exhaustive_search_finds_them():
    """Large weights into a hidden unit of no effect: magnitude keeps it, disturbed Taylor not."""
    from transformers import ViTConfig, ViTModel

    dead = [1, 4]
    model = seeded(lambda: ViTModel(ViTConfig(**SMALL | {"intermediate_size": 10})))()
    with torch.no_grad():
        mlp = model.layers[0].mlp
        mlp.fc1.weight[dead] *= 20
        mlp.fc2.weight[:, dead] = 0
    (width,) = [w for w in widths(model) if w.name == "layers.0.mlp:mlp"]
    batch = [{"call": call_of(model)}]
    few = exhaustive(model, width, 8, batch)
    assert few[1] < 1e-10
    assert set(range(10)) - set(few[0].tolist()) == set(dead)
    for criterion, right in ((DisturbedTaylor(), True), (Magnitude(), False)):
        keep = criterion.scores(model, [width], batch)[width.name].argsort(descending=True)[:8]
        assert (change(model, [width], {width.name: keep}, batch) < 1e-10) is right


def test_model_is_left_as_it_was_by_scoring():
    model = sam().train()
    model.vision_encoder.neck.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    for criterion in (DisturbedTaylor(), Magnitude(), Random(3)):
        criterion.scores(model, widths(model), [{"call": call_of(model)}])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.vision_encoder.neck.conv1.weight.requires_grad
    assert model.training


def test_half_precision_scores_do_not_vanish():
    model = vit()
    found = widths(model)
    batch = {"call": call_of(model)}
    wide = DisturbedTaylor().scores(model, found, [batch])
    (x,), _ = call_of(model)
    half = DisturbedTaylor().scores(model.bfloat16(), found, [{"call": ((x.bfloat16(),), {})}])
    for k, s in half.items():
        assert (s > 0).float().mean() > 0.9
        assert 0.1 < float(s.mean() / wide[k].mean()) < 10


# ---- who stays


def width(name, size, **more):
    return Width(name, "mlp", size, (), **more)


def test_normalizers():
    s = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(Mean().normal(s), s / 3)
    torch.testing.assert_close(Gaussian().normal(s), (s - 3) / (14 / 4) ** 0.5)
    assert torch.equal(Gaussian().normal(torch.ones(3)), torch.zeros(3))
    assert torch.equal(Mean().normal(torch.zeros(3)), torch.zeros(3))


def test_layers_compete_and_none_is_emptied():
    found = [width("a", 4), width("b", 4)]
    scores = {"a": torch.tensor([10.0, 11, 12, 13]), "b": torch.tensor([0.0, 1, 1, 20])}
    kept = choose(found, scores, 0.5, Mean(), together=True)
    # a: 10/11.5 .87 .96 1.04 1.13; b: 0 .18 .18 3.6: the best four are three of a and one of b
    assert kept["a"].tolist() == [1, 2, 3]
    assert kept["b"].tolist() == [3]
    wide = {"a": torch.tensor([10.0, 11, 12, 13]), "b": torch.tensor([0.0, 1, 2, 3]) / 1000}
    flat = Flat()
    assert choose(found, wide, 0.5, flat, together=True)["b"].tolist() == [3]
    assert choose(found, wide, 0.5, flat, together=True, least=0.5)["b"].tolist() == [2, 3]
    assert choose(found, wide, 0.5, flat, together=False)["b"].tolist() == [2, 3]


class Flat(Mean):
    def normal(self, scores):
        return scores


def test_twins_keep_as_many_and_steps_must_divide():
    found = [width("a", 4, twin="b"), width("b", 4, twin="a")]
    scores = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([1.0, 2, 3, 10])}
    kept = choose(found, scores, 0.5, Flat(), together=True)
    assert kept["a"].tolist() == [0, 1]
    assert kept["b"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="round_to"):
        choose([width("a", 10)], {"a": torch.rand(10)}, 0.5, Mean(), together=False, step=4)
    kept = choose([width("a", 12)], {"a": torch.rand(12)}, 0.5, Mean(), together=False, step=4)
    assert len(kept["a"]) == 8  # 6 is halfway; a multiple of 4, even


# ---- distillation


def test_dynamic_weights():
    assert Fade().of(0) == 10 / 11
    assert Fade().of(9) == pytest.approx(1 / 11)
    assert Fade().of(10) == Fade().of(19) == 0
    assert Fade().weight(0.05) == Fade().of(1)
    assert Fade().weight(1.0) == 0
    assert [Half().weight(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0.5, 0.5, 0.0, 0.0]


def test_all_terms_are_zero_where_nothing_was_pruned():
    student = sam()
    for aligned in (inner(student), blocks(student)):
        objective = AlignedDistillation(
            sam(), student, aligned, previous=sam(), dynamic=Fade(), steps=10
        )
        with torch.no_grad():  # the same kernels on both sides
            loss = objective.loss("student", {"call": call_of(student)})
        assert loss.terms.keys() == {"output", "previous", *(f"aligned/{k}" for k in aligned)}
        assert all(float(v) == 0 for v in loss.terms.values())


def test_loss_of_the_second_step_is_its_formula():
    teacher, previous, student = sam(), sam(), sam()
    with torch.no_grad():
        for i, m in enumerate((previous, student)):
            for p in m.parameters():
                p.add_(0.02 * (i + 1) * torch.sign(p))
    names = blocks(student)
    objective = AlignedDistillation(
        teacher, student, names, previous=previous, dynamic=Fade(), steps=20
    ).train()
    call = call_of(student)
    felt = {}

    def heard(model):
        out = []
        hooks = [
            model.get_submodule(n).register_forward_hook(lambda m, g, o: out.append(o))
            for n in names["blocks"]
        ]
        with torch.no_grad():
            felt[id(model)] = model(*call[0])[0]
        [h.remove() for h in hooks]
        return out

    apart = [(a - b).square().mean() for a, b in zip(heard(previous), heard(student), strict=True)]
    heard(teacher)
    t, p, s = (felt[id(m)] for m in (teacher, previous, student))
    student.requires_grad_(True)
    for epoch in (0, 1, 2):
        a = (10 - epoch) / 11
        wanted = (1 - a) * (s - t).square().mean() + a * (s - p).square().mean()
        wanted = wanted + a * torch.stack(apart).mean()
        loss = objective.loss("student", {"call": call})
        torch.testing.assert_close(loss.total.detach(), wanted, rtol=1e-4, atol=1e-7)


def test_first_step_aligns_bottlenecks_for_half_of_the_run():
    model = sam()
    handle = SlimSAM(embed=0.5, steps=2).attach(model)
    handle.prune([call_of(model)], "embed")
    objective = handle.objective(sam())
    batch = {"call": call_of(model)}
    first = objective.train().loss("student", batch)
    assert {k for k in first.terms} == {"output", "aligned/attn", "aligned/mlp"}
    second = objective.loss("student", batch)
    assert {k for k in second.terms} == {"output"}
    torch.testing.assert_close(second.total, 2 * first.terms["output"])
    told = handle.objective(sam(), 4).train()  # a healing of another length
    assert ["aligned/mlp" in told.loss("student", batch).terms for _ in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    named = inner(model)
    assert named["attn"] == [f"vision_encoder.layers.{i}.attn.qkv" for i in range(3)]
    assert named["mlp"] == [f"vision_encoder.layers.{i}.mlp.lin1" for i in range(3)]


def test_a_run_taken_up_again_goes_on():
    one = AlignedDistillation(sam(), sam(), {}, steps=10).train()
    one.loss("student", {"call": call_of(sam())})
    two = AlignedDistillation(sam(), sam(), {}, steps=10)
    two.load_state_dict(one.state_dict())
    assert int(two.done) == 1
    two.eval().loss("student", {"call": call_of(sam())})
    assert int(two.done) == 1


def test_teacher_and_student_must_be_apart():
    model = sam()
    with pytest.raises(ValueError, match="share parameters"):
        AlignedDistillation(model, model, {})
    with pytest.raises(ValueError, match="call"):
        AlignedDistillation(sam(), sam(), {}).loss("student", {"x0": 1})


# ---- the transform


def test_neutral_setting_changes_nothing(model):
    before, types = answer(model), [type(m) for m in model.modules()]
    handle = SlimSAM(embed=0.0, bottleneck=0.0).attach(model)
    handle.observe([call_of(model)])
    assert torch.equal(answer(model), before)
    assert [type(m) for m in model.modules()] == types
    assert handle.objective(copy.deepcopy(model)) is None


def test_alternate_heals_comes_off_and_is_rebuilt(model):
    teacher, before = copy.deepcopy(model), answer(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.requires_grad_(True)
    handle = SlimSAM(steps=15).attach(model)
    call = call_of(model)
    handle.observe([call])
    raw = float((answer(model) - before).square().mean())
    kept = handle.report()["kept"]
    handle.detach()
    assert torch.equal(answer(model), before)
    handle = SlimSAM(steps=15).attach(model)
    lr = 1e-3 if handle.widths("embed") else 2e-4  # without a stream there is less to heal
    rng = torch.Generator().manual_seed(0)
    alternate(handle, [call], [{"call": call}], teacher, lr=lr, rng=rng, progress=False)
    assert float((answer(model) - before).square().mean()) < raw
    assert handle.report()["kept"] == pytest.approx(kept, abs=0.05)
    assert handle.report()["parameters"] == parameters(model) < 0.96 * parameters(teacher)
    fresh = copy.deepcopy(teacher)
    SlimSAM(steps=15).restore(fresh, json.loads(json.dumps(handle.plan())))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answer(fresh), answer(model))
    handle.detach()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(answer(model), before)


def test_two_items_are_one_alternation():
    """A recipe that lists both halves, healing after each, does what `alternate` does."""
    call = call_of(sam())
    whole = SlimSAM(embed=0.5, bottleneck=0.5, steps=3).attach(sam().requires_grad_(True))
    alternate(
        whole, [call], [{"call": call}], sam(), rng=torch.Generator().manual_seed(0), progress=False
    )
    model = sam().requires_grad_(True)
    for halves in ((0.5, 0.0), (0.0, 0.5)):
        handle = SlimSAM(*halves, steps=3).attach(model)
        handle.observe([call])
        heal(
            handle,
            [{"call": call}],
            sam(),
            rng=torch.Generator().manual_seed(0),
            progress=False,
        )
    assert torch.equal(answer(whole.model), answer(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny_dit().to(dtype)
    (x,), words = call_of(model)
    with torch.no_grad():
        before = model(x.to(dtype), **words)[0]
    handle = SlimSAM().attach(model)
    handle.observe([((x.to(dtype),), words)])
    with torch.no_grad():
        assert model(x.to(dtype), **words)[0].isfinite().all()
        assert {p.dtype for p in model.parameters()} == {dtype}
        handle.detach()
        assert torch.equal(model(x.to(dtype), **words)[0], before)


def test_a_unet_has_bottlenecks_only_and_says_so():
    model = tiny_unet_cond()
    handle = SlimSAM().attach(model)
    handle.observe([call_of(model)])
    assert handle.report()["not_there"] == ["embed"]
    with pytest.raises(ValueError, match="no embed width"):
        SlimSAM(bottleneck=0.0).attach(tiny_unet_cond())


def test_what_it_refuses():
    with pytest.raises(ValueError, match="no embed or bottleneck"):
        SlimSAM().attach(nn.Linear(3, 3))
    for bad in ({"embed": 1.0}, {"bottleneck": -0.1}, {"steps": 0}, {"round_to": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SlimSAM(**bad)
    with pytest.raises(TypeError, match="importance"):
        SlimSAM(importance="taylor")
    with pytest.raises(ValueError, match="sigma"):
        DisturbedTaylor(0.0)
    model = tiny_dit()
    Int8().attach(model)
    with pytest.raises(ValueError, match="before"):
        SlimSAM().attach(model)
    model = sam()
    handle = SlimSAM().attach(model)
    with pytest.raises(ValueError, match="no calls"):
        handle.observe([])
    (x,), _ = call_of(model)
    with pytest.raises(FloatingPointError, match="pixel_values"):
        handle.observe([((x * torch.nan,), {})])
    target = answer(model) * torch.nan
    with pytest.raises(FloatingPointError, match="target"):
        SlimSAM(importance=Taylor()).attach(model).observe([{"call": ((x,), {}), "target": target}])
    done = SlimSAM().attach(sam())
    done.prune([((x,), {})], "embed")
    with pytest.raises(ValueError, match="not done yet"):
        done.prune([((x,), {})], "embed")
    done.finalize()
    with pytest.raises(RuntimeError, match="original"):
        done.detach()


def test_widths_are_multiples_of_round_to():
    model = tiny_dit()
    handle = SlimSAM(embed=0.3, bottleneck=0.3, round_to=8).attach(model)
    handle.observe([call_of(model)])
    for name, (_, now) in handle.report()["widths"].items():
        if name.endswith((":embed", ":mlp")):
            assert now % 8 == 0
    assert isinstance(handle, Slimmed)


@pytest.mark.slow
def test_loads_in_a_fresh_process_and_is_smaller_on_disk(tmp_path):
    from effuse.bridge import store

    pipe = tiny_dit_pipe()
    pipe.save_pretrained(tmp_path / "whole")
    handle = SlimSAM().attach(pipe.transformer)
    handle.observe([call_of(pipe.transformer)])
    rng = torch.Generator().manual_seed(0)
    picture = pipe([1], num_inference_steps=2, generator=rng, output_type="np").images
    store.save(pipe, tmp_path / "slim", [("transformer", handle)])

    def size(folder):
        return sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors"))

    assert size(tmp_path / "slim") < 0.8 * size(tmp_path / "whole")
    code = (
        "import effuse, torch, numpy as np; from diffusers import DiffusionPipeline;"
        f"p = DiffusionPipeline.from_pretrained({str(tmp_path / 'slim')!r});"
        "x = p([1], num_inference_steps=2, generator=torch.Generator().manual_seed(0),"
        f" output_type='np').images; np.save({str(tmp_path / 'x.npy')!r}, x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    import numpy as np

    assert np.array_equal(np.load(tmp_path / "x.npy"), picture)
