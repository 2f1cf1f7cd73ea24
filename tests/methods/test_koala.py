"""KOALA and the taps it stands on: the oracles of its sheet, on real diffusers networks."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.tiny import tiny_dit, tiny_sdxl, tiny_unet, tiny_unet_cond
from torch import nn

import effuse
from effuse.bridge import store
from effuse.compress.rewire.koala import (
    CrossAttention,
    Even,
    FeedForward,
    First,
    Koala,
    Last,
    Plain,
    Residual,
    SelfAttention,
    Top,
    UNetPlan,
    Within,
)
from effuse.compress.rewire.stages import stage_depths, stage_sizes
from effuse.compress.units import remove
from effuse.core import Unsuited
from effuse.distill.features import FeatureDistillation, PerBatch, listening
from effuse.distill.taps import Adapter, Tap, pairs


def deep(**kwargs):
    """A UNet in the layout of SDXL: two layers a stage, the deepest attention at the bottom."""
    return tiny_unet_cond(
        **{
            "layers_per_block": 2,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 5),
            **kwargs,
        }
    )


WHOLE = deep()


def call(rows=2, seed=0, step=500):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=rng)
    text = torch.randn(rows, 5, 32, generator=rng)
    return (x, torch.full((rows,), step)), {"encoder_hidden_states": text}


@torch.no_grad()
def run(model, given=None):
    args, kwargs = given or call()
    return model(*args, **kwargs).sample


def shortened(**kwargs):
    student = copy.deepcopy(WHOLE)
    return student, Koala(**kwargs).attach(student)


def sdxl():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            transformer_layers_per_block=(1, 2, 10),
            projection_class_embeddings_input_dim=2816,
        )


# ---- the plan


def test_sizes_of_the_paper():
    """2,567 million parameters become 1,161 and 782, each the sum of the modules that stay."""
    for given, published in ((Koala(depth=0.6, middle=True), 1161), (Koala(), 782)):
        model = sdxl()
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        assert round(sum(sizes.values()) / 1e6) == 2567
        handle = given.attach(model)
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e6 - published) < 1
        assert count == sum(sizes[b] for b in handle.origins().values())
        assert handle.report()["kept"] == count / sum(sizes.values())
        with torch.device("meta"):
            built = type(model).from_config(model.config)
        assert {n: p.shape for n, p in built.state_dict().items()} == {
            n: p.shape for n, p in model.state_dict().items()
        }


def test_middle_of_three_goes_and_the_first_blocks_stay():
    _, handle = shortened(middle=True)
    assert handle.plan_.layers == {
        "down_blocks.0": (0,),
        "down_blocks.1": (0,),
        "down_blocks.2": (0,),
        "mid_block": (0,),
        "up_blocks.0": (0, 2),
        "up_blocks.1": (0, 2),
        "up_blocks.2": (0, 2),
    }
    bottom = (0, 1, 2)
    assert handle.plan_.blocks == {
        "down_blocks.2": bottom,
        "mid_block": bottom,
        "up_blocks.0": bottom,
    }


@pytest.mark.parametrize("rule", [First(), Even(), Top()], ids=str)
@pytest.mark.parametrize("middle", [True, False])
def test_every_tensor_comes_from_one_of_the_original(rule, middle):
    student, handle = shortened(copy=rule, middle=middle, depth=0.6)
    theirs, names = WHOLE.state_dict(), handle.origins()
    assert len(set(names.values())) == len(names)
    for mine, value in student.state_dict().items():
        assert torch.equal(value, theirs[names[mine]])
    # and the config alone builds it
    built = type(student).from_config(student.config)
    built.load_state_dict(student.state_dict())
    torch.testing.assert_close(run(built.eval()), run(student), rtol=0, atol=0)
    kept = {"up_blocks.0.attentions.1.transformer_blocks.2.attn1.to_q.weight"}
    last = rule.blocks(5, 3)[2]
    assert kept <= set(names)
    (name,) = kept
    moved = f"up_blocks.0.attentions.2.transformer_blocks.{last}.attn1.to_q.weight"
    assert names[name] == moved


def test_whole_plan_is_the_original():
    student, handle = shortened(keep=1, depth=1, middle=True)
    assert torch.equal(run(student), run(WHOLE))
    assert handle.origins() == {n: n for n in WHOLE.state_dict()}
    loss = handle.objective(copy.deepcopy(WHOLE)).loss("student", {"call": call()})
    assert float(loss.total.detach()) == 0
    assert len([n for n in loss.terms if n.startswith("feature/")]) > 5


def test_depth_of_the_middle_follows_the_config():
    bottom = {"down_blocks.2": (0, 1)}
    with pytest.raises(ValueError, match="one number for both"):
        Koala(plan=UNetPlan({}, bottom)).attach(copy.deepcopy(WHOLE))
    # below a stage without attention the middle has a number of its own; so has the way up
    model = tiny_unet_cond(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), transformer_layers_per_block=3
    )
    blocks = {"mid_block": (1,), "up_blocks.1": (0, 2)}
    Koala(plan=UNetPlan({}, blocks)).attach(model)
    assert stage_depths(model) == {"down_blocks.0": 3, "mid_block": 1, "up_blocks.1": 2}
    built = type(model).from_config(model.config)
    built.load_state_dict(model.state_dict())
    assert torch.equal(run(built.eval()), run(model))


def test_up_stages_need_the_skips_of_their_mirror():
    with pytest.raises(ValueError, match="each takes a skip"):
        Koala(plan=UNetPlan({"down_blocks.1": (0,)}, {})).attach(copy.deepcopy(WHOLE))
    plan = UNetPlan({"down_blocks.1": (1,), "up_blocks.1": (0, 2)}, {})
    with pytest.raises(ValueError, match="channels"):
        Koala(plan=plan).attach(copy.deepcopy(WHOLE))


def test_refusals():
    with pytest.raises(Unsuited, match="nothing can go"):
        Koala(middle=True).attach(tiny_unet_cond())
    with pytest.raises(TypeError, match="neither"):
        Koala().attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no transformer blocks"):
        Koala(plan=UNetPlan({}, {"down_blocks.0": (0,)})).attach(copy.deepcopy(WHOLE))
    with pytest.raises(ValueError, match="rising indices"):
        Koala(plan=UNetPlan({}, {"down_blocks.2": (1, 0)})).attach(copy.deepcopy(WHOLE))
    with pytest.raises(TypeError, match="expected a Match"):
        Koala(match="first")
    _, handle = shortened()
    with pytest.raises(ValueError, match="a teacher with layers"):
        handle.objective(tiny_unet_cond())
    pruned = copy.deepcopy(WHOLE)
    gone = remove(pruned, ["down_blocks.1.attentions.0.transformer_blocks.0.attn2"])
    alone = run(pruned)
    with pytest.raises(ValueError, match="cut layers first"):
        Koala().attach(pruned)
    assert torch.equal(run(pruned), alone)
    gone.undo()
    assert torch.equal(run(pruned), run(WHOLE))


# ---- the losses


def by_hand(teacher, student, taps, given, target, weights=(1.0, 1.0, 1.0)):
    with listening(teacher, [a for a, _ in taps]) as theirs:
        wanted = run(teacher, given)
    with listening(student, [b for _, b in taps]) as mine:
        out = run(student, given)
    feature = sum((theirs[a] - mine[b]).pow(2).mean() for a, b in taps)
    task, output, third = weights
    parts = task * (out - target).pow(2).mean() + output * (out - wanted).pow(2).mean()
    return parts + third * feature


TAPS = [
    *(
        (f"{s}.attentions.{t}.transformer_blocks.{k}.attn1",) * 2
        if s != "up_blocks.0" and s != "up_blocks.1"
        else (
            f"{s}.attentions.{t}.transformer_blocks.{k}.attn1",
            f"{s}.attentions.{t // 2}.transformer_blocks.{k}.attn1",
        )
        for s, layers, n in (
            ("down_blocks.1", (0,), 2),
            ("down_blocks.2", (0,), 3),
            ("up_blocks.0", (0, 2), 3),
            ("up_blocks.1", (0, 2), 2),
        )
        for t in layers
        for k in range(n)
    ),
    ("down_blocks.0", "down_blocks.0"),
    ("up_blocks.2", "up_blocks.2"),
]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25), (1.0, 1.0, 0.0)], ids=str)
def test_loss_is_the_sum_of_the_paper(weights):
    student, handle = shortened(weights=weights)
    given, target = call(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    goal = handle.objective(copy.deepcopy(WHOLE))
    assert sorted(goal.taps) == sorted(TAPS)
    loss = goal.loss("student", {"call": given, "target": target})
    expected = by_hand(WHOLE, student, TAPS, given, target, weights)
    torch.testing.assert_close(loss.total.detach(), expected)
    assert any(n.startswith("feature") for n in loss.terms) == (weights[2] > 0)


def test_mean_over_a_batch_is_the_mean_of_its_halves():
    _, handle = shortened()
    goal, whole = handle.objective(copy.deepcopy(WHOLE)), call(4)
    (x, t), words = whole
    halves = [
        (
            (x[i : i + 2], t[:2]),
            {"encoder_hidden_states": words["encoder_hidden_states"][i : i + 2]},
        )
        for i in (0, 2)
    ]
    total, *parts = (goal.loss("student", {"call": c}).total.detach() for c in (whole, *halves))
    torch.testing.assert_close(total, sum(parts) / 2)


def test_which_blocks_are_matched():
    assert First().blocks(10, 5) == (0, 1, 2, 3, 4)
    assert Even().blocks(10, 5) == (0, 2, 4, 6, 8)
    assert Top().blocks(10, 5) == (5, 6, 7, 8, 9)
    assert all(m.blocks(7, 7) == tuple(range(7)) for m in (First(), Even(), Top()))
    with pytest.raises(ValueError, match="expected 1 to 3"):
        First().blocks(3, 4)
    _, handle = shortened(match=Top())
    third = {t.teacher for t in handle.taps(WHOLE) if t.student.startswith("down_blocks.2")}
    assert third == {f"down_blocks.2.attentions.0.transformer_blocks.{k}.attn1" for k in (2, 3, 4)}


def test_kinds_and_places():
    student, handle = shortened()
    layers = handle.plan_.layers
    for kind, count in (
        (CrossAttention(), 2 + 3 + 6 + 4),
        (FeedForward(), 2 + 3 + 6 + 4),
        (Residual(), 3 + 6),
        (Last(), 6),
        (Last(bare=True), 2),
    ):
        assert len(pairs(WHOLE, student, kind, layers=layers)) == count
    some = pairs(WHOLE, student, SelfAttention(), layers=layers, where=Within(("up_blocks.1",)))
    assert [t.student.split(".")[1] for t in some] == ["1"] * 4
    residual = pairs(WHOLE, student, Residual(), layers=layers, weight=0.5)
    assert Tap("up_blocks.2.resnets.2", "up_blocks.2.resnets.1", 0.5) in residual
    with pytest.raises(ValueError, match="nothing would be compared"):
        pairs(WHOLE, student, SelfAttention(), where=Within(("mid_block",)))
    with pytest.raises(ValueError, match="give `layers`"):
        pairs(student, WHOLE, SelfAttention())
    with pytest.raises(ValueError, match="features=\\(\\)"):
        shortened(within=Within(("mid_block",)))[1].objective(copy.deepcopy(WHOLE))
    assert shortened(features=())[1].objective(copy.deepcopy(WHOLE)).taps == []


def test_weights_of_taps_count_and_each_term_is_normalized():
    student, _ = shortened()
    taps = [Tap("down_blocks.0", "down_blocks.0", 3.0), Tap("up_blocks.2", "up_blocks.2")]
    goal = FeatureDistillation(copy.deepcopy(WHOLE), student, taps, normalizer=PerBatch())
    terms = goal.loss("student", {"call": call()}).terms
    with listening(WHOLE, ["down_blocks.0"]) as a, listening(student, ["down_blocks.0"]) as b:
        run(WHOLE), run(student)
    x, y = a["down_blocks.0"], b["down_blocks.0"]
    expected = 3 * (x - y).square().mean() / x.square().mean()
    torch.testing.assert_close(terms["feature/down_blocks.0"].detach(), expected)
    assert isinstance(FeatureDistillation(copy.deepcopy(WHOLE), student).normalizer, Plain)


def test_another_teacher_of_the_same_layout():
    """A few-step teacher: its weights can be taken over, and it may teach."""
    other = deep()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    student, handle = shortened()
    original = {k: v.clone() for k, v in student.state_dict().items()}
    handle.copy_from(other)
    for name, value in student.state_dict().items():
        assert torch.equal(value, original[name] * 0.5)
    goal = handle.objective(other)
    assert float(goal.loss("student", {"call": call()}).terms["output"].detach()) > 0
    with pytest.raises(ValueError, match="original's layout"):
        handle.copy_from(tiny_unet_cond())


def test_a_teacher_in_half_precision_teaches_a_full_student():
    student, handle = shortened()
    half = copy.deepcopy(WHOLE).to(torch.bfloat16)
    terms = handle.objective(half).loss("student", {"call": call()}).terms
    exact = handle.objective(copy.deepcopy(WHOLE)).loss("student", {"call": call()}).terms
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, exact[name], rtol=0.1, atol=1e-3)
    assert student.dtype == torch.float32


# ---- adapters


def test_adapter_is_the_least_squares_map():
    rng = torch.Generator().manual_seed(0)
    own = torch.randn(4, 3, 6, 6, generator=rng, dtype=torch.float64)
    w = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    theirs = torch.einsum("oc,bchw->bohw", w, own) - 0.7
    adapter = Adapter.fitted(own, theirs)
    torch.testing.assert_close(adapter.weight.detach(), w)
    torch.testing.assert_close(adapter(own).detach(), theirs)
    tokens = Adapter.fitted(own.flatten(2).mT, theirs.flatten(2).mT)
    torch.testing.assert_close(tokens(own.flatten(2).mT).detach(), theirs.flatten(2).mT)
    with pytest.raises(ValueError, match="number of channels"):
        Adapter.fitted(own[:2], theirs)


def test_adapters_where_widths_differ():
    teacher, student = tiny_unet(), tiny_unet(block_out_channels=(8, 16))
    rng = torch.Generator().manual_seed(1)
    given = (torch.randn(2, 3, 16, 16, generator=rng), 500), {}
    with pytest.raises(ValueError, match="an `example` call"):
        FeatureDistillation(teacher, student).loss("student", {"call": given})
    goal = FeatureDistillation(teacher, student, example=given)
    assert len(goal.adapters) == 5
    mine = goal.parameters_of("student")
    assert len(mine) == len(list(student.parameters())) + 10
    first = goal.loss("student", {"call": given}).terms["feature/mid_block"]
    power = FeatureDistillation(teacher, student, [], example=given)
    assert power.taps == []
    with listening(teacher, ["mid_block"]) as heard, torch.no_grad():
        teacher(*given[0])
    assert float(first.detach()) < float(heard["mid_block"].var())
    goal.loss("student", {"call": given}).total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in goal.adapters.parameters())
    assert not any("adapters" in n for n in student.state_dict())


# ---- on and off, saved and loaded


def test_healing_is_taken_off_too():
    student = copy.deepcopy(WHOLE)
    config = dict(student.config)
    handle = Koala().attach(student)
    assert stage_sizes(student)["up_blocks.0"] == 2
    assert "mid_block" not in stage_sizes(student)
    handle.objective(copy.deepcopy(WHOLE))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    handle.detach()
    assert torch.equal(run(student), run(WHOLE))
    assert dict(student.config) == config


def test_sdxl_pipeline_is_saved_smaller_and_teaches_after_loading(tmp_path):
    def pipeline():
        return tiny_sdxl(
            layers_per_block=2,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 5),
        )

    def picture(pipe):
        rng = torch.Generator().manual_seed(0)
        out = pipe("a cat", num_inference_steps=2, generator=rng, output_type="np")
        return torch.as_tensor(out.images)

    pipe, whole = pipeline(), pipeline()
    store.save(pipe, tmp_path / "whole", [])
    handle = Koala(depth=0.6).attach(pipe.unet)
    changed = picture(pipe)
    store.save(pipe, tmp_path / "small", [("unet", handle)])
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / n / "unet").glob("*.safetensors"))
        for n in ("whole", "small")
    ]
    assert sizes[1] < 0.65 * sizes[0]
    again = store.load(tmp_path / "small")
    assert torch.equal(picture(again), changed)
    (loaded,) = effuse.bridge.slimmed.applied_of(again.unet)
    assert json.loads(json.dumps(loaded.plan())) == json.loads(json.dumps(handle.plan()))
    assert loaded.taps(whole.unet) == handle.taps(whole.unet)
    assert loaded.report()["parameters_before"] == handle.report()["parameters_before"]


def test_a_transformer_keeps_evenly_spread_blocks():
    model = tiny_dit(num_layers=6)
    whole = copy.deepcopy(model)
    handle = Koala(keep=0.5).attach(model)
    assert handle.plan_.layers == {"transformer_blocks": (0, 2, 4)}
    got = [(t.teacher, t.student) for t in handle.taps(whole)]
    assert got == [
        (f"transformer_blocks.{2 * k}.attn1", f"transformer_blocks.{k}.attn1") for k in range(3)
    ]
