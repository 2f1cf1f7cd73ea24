"""LAPTOP-Diff: one-shot scores, selection, surgery and healing against what is known exactly."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from tests.tiny import (
    tiny_ddpm,
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

from effuse.bridge import store
from effuse.compress.calibrate import network_of, record, uniform_calls
from effuse.compress.prune.laptop_diff import (
    BlockInfluence,
    CostVector,
    Exact,
    Exhaustive,
    Given,
    Greedy,
    LaptopDiff,
    Macs,
    Magnitude,
    OutputError,
    Random,
    TaskLoss,
    Taylor,
    TextScoreDrop,
)
from effuse.compress.prune.study import Additivity, additivity, sweep
from effuse.compress.units import macs, parameters, units, without
from effuse.core import fit
from effuse.distill.features import (
    Matched,
    NormalizedFeatureDistillation,
    PerBatch,
    Plain,
    Running,
    UniformNoise,
    stages,
)
from effuse.nn.residual import Residual
from effuse.recipe import slim


def calls_of(model, count=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    size, out = model.config.sample_size, []
    for _ in range(count):
        x = torch.randn(2, model.config.in_channels, size, size, generator=rng)
        t = torch.randint(0, 1000, (2,), generator=rng)
        if "DiT" in type(model).__name__:
            out.append(((x,), {"timestep": t, "class_labels": torch.tensor([1, 2])}))
        elif "PixArt" in type(model).__name__:
            text = torch.randn(2, 5, 16, generator=rng)
            added = {"resolution": None, "aspect_ratio": None}
            more = {"encoder_hidden_states": text, "added_cond_kwargs": added}
            out.append(((x,), {"timestep": t, **more}))
        elif "Condition" in type(model).__name__:
            text = torch.randn(2, 5, 32, generator=rng)
            out.append(((x, t), {"encoder_hidden_states": text}))
        else:
            out.append(((x, t), {}))
    return out


@torch.no_grad()
def run(model, call):
    return model(*call[0], **call[1])[0]


class Constant(nn.Module):
    """A branch that ignores its weights but for its scale: g(x) = scale * x[:, perm]."""

    def __init__(self, scale, roll):
        super().__init__()
        self.scale, self.roll = nn.Parameter(torch.tensor(scale, dtype=torch.float64)), roll

    def forward(self, x):
        return self.scale * x.roll(self.roll, 1)


def parallel(scales, same=False):
    """Branches in parallel; on white input, rolls by different amounts are uncorrelated."""
    net = Residual(*(Constant(s, 1 if same else i + 1) for i, s in enumerate(scales)))
    return net.double()


def white(rows=16):
    """Rows whose second moment is exactly the identity, so that rolls are exactly orthogonal."""
    return torch.eye(rows, dtype=torch.float64) * rows**0.5


# ---- scores


def test_parallel_uncorrelated_branches_add_exactly():
    net, calls = parallel([0.1, 0.2, 0.3, 0.5]), [((white(),), {})]
    found = units(net)
    scores = OutputError().scores(net, found, [{"call": calls[0]}])
    assert scores == pytest.approx([0.01, 0.04, 0.09, 0.25], rel=1e-12)
    named = dict(zip((u.name for u in found), scores, strict=True))
    sets = [[u.name for i, u in enumerate(found) if mask >> i & 1] for mask in range(1, 16)]
    study = additivity(net, named, calls, sets)
    torch.testing.assert_close(study.measured, study.predicted, rtol=1e-12, atol=0)
    assert study.pearson == pytest.approx(1)
    assert study.spearman == pytest.approx(1)
    assert study.slope == pytest.approx(1)


def test_two_identical_branches_are_the_known_failure():
    net, calls = parallel([0.3, 0.3], same=True), [((white(),), {})]
    found = units(net)
    scores = OutputError().scores(net, found, [{"call": calls[0]}])
    named = dict(zip((u.name for u in found), scores, strict=True))
    study = additivity(net, named, calls, [list(named)])
    assert float(study.predicted) == pytest.approx(2 * 0.09)
    assert float(study.measured) == pytest.approx(4 * 0.09)
    assert study.slope == pytest.approx(2)


def test_correlations_are_those_of_scipy():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(40, generator=rng, dtype=torch.float64).mul(2).round() / 2  # with ties
    b = a + torch.randn(40, generator=rng, dtype=torch.float64)
    study = Additivity(a, b)
    assert study.pearson == pytest.approx(stats.pearsonr(a, b).statistic)
    assert study.spearman == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("solver", [Exact(), Greedy()])
def test_a_branch_worth_nothing_goes_first(solver):
    net = parallel([0.2, 0.0, 0.1, 0.3])
    handle = LaptopDiff(keep=0.99, solver=solver).attach(net)
    handle.observe([((white(),), {})])
    assert handle.removed == ["branches.1"]
    assert handle.report()["measured_error"] == 0
    handle.detach()
    handle = LaptopDiff(keep=0.5, solver=solver).attach(net)
    handle.observe([((white(),), {})])
    assert handle.removed == ["branches.1", "branches.2"]


def test_ties_go_to_the_lower_index():
    net = parallel([0.2, 0.2, 0.2, 0.2])
    handle = LaptopDiff(keep=0.5).attach(net)
    handle.observe([((white(),), {})])
    assert handle.removed == ["branches.2", "branches.3"]


class Blur(nn.Module):
    """y = x + 0.5 x shifted; the target is x, so the branch only does harm."""

    def __init__(self):
        super().__init__()
        self.body = Residual(Constant(0.5, 1), Constant(0.1, 2))

    def forward(self, x):
        return (self.body(x),)


def test_task_loss_and_taylor_know_a_harmful_branch():
    net, x = Blur().double(), white()
    batch = {"call": ((x,), {}), "target": x + 0.1 * x.roll(2, 1)}
    found = units(net)
    task = TaskLoss().scores(net, found, [batch])
    assert task == [0.0, pytest.approx(0.01)]  # without the first it is perfect: no rise
    taylor = Taylor().scores(net, found, [batch])
    # L = mean (0.5 m roll1 + (0.1 m - 0.1) roll2)^2: dL/dm = (2 * 0.25, 0) at m = 1
    assert taylor == pytest.approx([0.5, 0.0], abs=1e-12)
    # with c roll1 in the target dL/dm = 0.5 - c: at c = 1 it is as steep the other way
    other = {"call": ((x,), {}), "target": x + x.roll(1, 1) + 0.1 * x.roll(2, 1)}
    assert Taylor().scores(net, found, [other]) == pytest.approx([0.5, 0.0], abs=1e-12)
    assert Taylor().scores(net, found, [batch, other]) == pytest.approx([0.5, 0.0], abs=1e-12)
    with pytest.raises(ValueError, match="uniform_calls"):
        Taylor().scores(net, found, [{"call": ((x,), {})}])
    with pytest.raises(ValueError, match="uniform_calls"):
        TaskLoss().scores(net, found, [{"call": ((x,), {})}])


def test_other_criteria_in_closed_form():
    net, x = parallel([0.5, 2.0]), white()
    found, rows = units(net), [{"call": ((x,), {})}]
    assert Magnitude().scores(net, found, rows) == pytest.approx([0.5, 2.0])
    line = Residual(nn.Linear(1, 2))
    with torch.no_grad():
        (
            line.branches[0].weight.copy_(torch.tensor([[1.0], [-2.0]])),
            line.branches[0].bias.fill_(-1),
        )
    assert Magnitude().scores(line, units(line), []) == [5.0]
    # the block's out is x + .5 roll1 + 2 roll2, norms^2 5.25; without the first 5, inner product 5
    cos = [5 / (5.25 * 5) ** 0.5, 1.25 / (5.25 * 1.25) ** 0.5]
    got = BlockInfluence().scores(net, found, rows)
    assert got == pytest.approx([1 - c for c in cos])
    assert Random(3).scores(net, found, rows) == Random(3).scores(net, found, rows)
    assert Random(3).scores(net, found, rows) != Random(4).scores(net, found, rows)

    def scorer(model):
        return float(model(x).detach().square().mean())

    assert TextScoreDrop(scorer).scores(net, found, rows) == pytest.approx([0.25, 4.0])
    with pytest.raises(ValueError, match="no score for"):
        Given({"branches.0": 1.0}).scores(net, found, rows)


@pytest.mark.parametrize("make", [tiny_unet, tiny_unet_cond, tiny_dit, tiny_pixart])
def test_every_criterion_on_real_classes(make):
    model = make()
    found = units(model)
    calls = calls_of(model, 1)
    target = torch.randn(2, model.config.in_channels, *calls[0][0][0].shape[2:])
    rows = [{"call": calls[0], "target": target}]
    for criterion in (OutputError(), Magnitude(), Taylor(), TaskLoss(), BlockInfluence()):
        scores = criterion.scores(model, found, rows)
        assert len(scores) == len(found)
        assert all(s >= 0 for s in scores)
        assert max(scores) > 0
    assert not any(m._forward_hooks for m in model.modules())


def test_scores_need_no_gradient_and_leave_the_mode():
    model = tiny_unet().train()
    handle = LaptopDiff(keep=0.8).attach(model)
    handle.observe(calls_of(model, 1))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# ---- selection and surgery


def test_exhaustive_beats_or_equals_the_surrogate():
    torch.manual_seed(0)
    net = nn.Sequential(*(Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(7)))
    calls = [((torch.randn(64, 6),), {})]
    errors = {}
    for solver in (Exhaustive(), Exact(), Greedy()):
        handle = LaptopDiff(keep=0.5, solver=solver).attach(net)
        handle.observe(calls)
        errors[type(solver)] = handle.report()["measured_error"]
        assert handle.report()["kept"] <= 0.5
        handle.detach()
    assert errors[Exhaustive] <= errors[Exact] + 1e-12
    assert errors[Exhaustive] <= errors[Greedy] + 1e-12


@pytest.mark.parametrize("make", [tiny_unet, tiny_unet_cond, tiny_dit, tiny_pixart])
def test_budget_holds_and_counts_are_exact(make):
    model = make()
    total, calls = parameters(model), calls_of(model, 1)
    before = run(model, calls[0])
    for keep in (0.9, 0.7, 0.55):
        handle = LaptopDiff(keep=keep).attach(model)
        handle.observe(calls)
        report = handle.report()
        assert report["parameters"] == parameters(model) <= keep * total
        assert report["parameters_before"] == total
        for back in handle.removed:  # nothing has gone that could have stayed
            handle.detach()
            with without(model, [n for n in report["removed"] if n != back]):
                assert parameters(model) > keep * total
            handle.remove(report["removed"])
        assert report["measured_error"] == pytest.approx(
            float((run(model, calls[0]).double() - before.double()).square().mean()), rel=1e-6
        )
        json.dumps(report)
        handle.detach()
        assert torch.equal(run(model, calls[0]), before)


def test_keep_one_removes_nothing():
    model = tiny_dit()
    handle = LaptopDiff(keep=1).attach(model)
    before = run(model, calls_of(model)[0])
    handle.observe(calls_of(model))
    assert handle.removed == []
    assert torch.equal(run(model, calls_of(model)[0]), before)
    assert handle.report()["measured_error"] == 0
    assert handle.objective(copy.deepcopy(model)) is None


def test_what_goes_needlessly_is_put_back_best_first():
    """Blocks 1 and 2 are worth least; without all of either its label embedding goes too."""
    model = tiny_dit()
    first, *rest = (f"transformer_blocks.{i}" for i in range(3))
    values = {f"{first}.attn1": 100.0, f"{first}.ff": 100.0}
    for i, block in enumerate(rest):
        values |= {f"{block}.attn1": 1.0 + i, f"{block}.ff": 3.0 + i}
    drop = sum(u.params for u in units(model) if u.block in rest)
    handle = LaptopDiff(keep=1 - drop / parameters(model), criterion=Given(values)).attach(model)
    handle.observe(calls_of(model, 1))
    # one embedding pays for one attention layer: the better one stays
    assert handle.removed == [f"{rest[0]}.attn1", f"{rest[0]}.ff", f"{rest[1]}.ff"]
    assert handle.report()["predicted_error"] == 1 + 3 + 4
    assert handle.report()["parameters_before"] - handle.report()["parameters"] >= drop


def test_error_grows_as_less_is_kept():
    model = tiny_unet_cond()
    rows = sweep(model, calls_of(model), [1.0, 0.9, 0.7, 0.5, 0.01])
    predicted = [r["predicted_error"] for r in rows[:4]]
    assert predicted == sorted(predicted)
    assert predicted[0] == 0
    cost = [r["macs"] for r in rows[:4]]
    assert cost == sorted(cost, reverse=True)
    assert "most" in rows[4]["refused"]
    assert len(units(model)) == 20


def test_floors_keep_cross_attention():
    model = tiny_unet_cond()
    everything = {u.name for u in units(model) if u.kind == "attn2"}
    values = {u.name: 0.0 if u.kind == "attn2" else 1.0 for u in units(model)}
    bare = LaptopDiff(keep=0.9, criterion=Given(values)).attach(model)
    bare.observe(calls_of(model, 1))
    assert everything <= set(bare.removed)
    bare.detach()
    handle = LaptopDiff(keep=0.9, criterion=Given(values), floors={"attn2": 0.5}).attach(model)
    handle.observe(calls_of(model, 1))
    assert len(everything & set(handle.removed)) == len(everything) // 2


def test_cost_in_macs_or_any_vector():
    model = tiny_unet_cond()
    calls = calls_of(model, 1)
    whole = macs(model, calls[0])
    handle = LaptopDiff(keep=0.6, cost=Macs()).attach(model)
    handle.observe(calls)
    assert macs(model, calls[0]) <= 0.6 * whole
    handle.detach()
    costs = {u.name: 1.0 for u in units(model)}
    handle = LaptopDiff(keep=0.75, cost=CostVector(costs)).attach(model)
    handle.observe(calls)
    assert len(handle.removed) == 5  # of 20
    with pytest.raises(ValueError, match="no cost for"):
        LaptopDiff(keep=0.5, cost=CostVector({})).attach(tiny_dit()).observe(calls_of(tiny_dit()))


def test_plan_rebuilds_on_a_fresh_network():
    model = tiny_dit()
    handle = LaptopDiff(keep=0.6).attach(model)
    handle.observe(calls_of(model))
    plan = json.loads(json.dumps(handle.plan()))
    fresh = tiny_dit()
    back = LaptopDiff(keep=0.6).restore(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, calls_of(model)[0]), run(model, calls_of(model)[0]))
    assert back.report()["parameters"] == handle.report()["parameters"]
    with pytest.raises(ValueError, match="no unit"):
        LaptopDiff().restore(tiny_unet(), plan)


def test_saved_pipeline_comes_back_smaller_and_bit_for_bit(tmp_path):
    pipe = tiny_sd()
    store.save(pipe, tmp_path / "before")
    calls = uniform_calls(pipe, ["ab", "cd"], count=1, batch=2, steps=1)
    # floors and objects in fields have to be written down too
    made = LaptopDiff(keep=0.6, cost=Macs(), solver=Greedy(), floors={"attn2": 0.5})
    handle = made.attach(pipe.unet)
    handle.observe(calls)
    store.save(pipe, tmp_path / "after", [("unet", handle)])

    def picture(p):
        p.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        return p("ab", num_inference_steps=2, generator=rng, output_type="np").images

    back = store.load(tmp_path / "after")
    assert (picture(back) == picture(pipe)).all()
    size = {
        k: (tmp_path / k / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        for k in ("before", "after")
    }
    assert size["after"] < 0.75 * size["before"]


def test_detach_after_healing_and_finalize():
    model = tiny_unet()
    calls, teacher = calls_of(model), copy.deepcopy(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = LaptopDiff(keep=0.7).attach(model)
    handle.observe(calls)
    objective = handle.objective(teacher)
    step = torch.optim.SGD(objective.parameters_of("student"), lr=1e-2)
    fit(objective, [{"call": c} for c in calls], step, steps=2, progress=False)
    with pytest.raises(ValueError, match="healed already"):
        handle.observe(calls)
    handle.detach()
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    handle = LaptopDiff(keep=0.7).attach(model)
    handle.observe(calls)
    handle.finalize()
    with pytest.raises(RuntimeError, match="finalized"):
        handle.detach()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.3}, "keep=1.3"),
        ({"floors": {"attn2": 2.0}}, "attn2"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(ValueError, match=words):
        LaptopDiff(**fields)


def test_bad_use():
    model = tiny_dit()
    with pytest.raises(ValueError, match="is the most that its 6 removable units allow"):
        LaptopDiff(keep=0.05).attach(model)
    with pytest.raises(ValueError, match="expected one of attn1, ff"):
        LaptopDiff(floors={"attn2": 0.5}).attach(model)
    with pytest.raises(ValueError, match="no calls"):
        LaptopDiff().attach(model).observe([])
    handle = LaptopDiff(solver=Exhaustive()).attach(tiny_unet_cond())
    with pytest.raises(ValueError, match="at most 16"):
        handle.observe(calls_of(tiny_unet_cond(), 1))


def test_what_is_not_finite_is_named():
    model = tiny_dit()
    ((x,), named), good = calls_of(model)
    bad = ((torch.full_like(x, float("inf")),), named)
    for criterion in (OutputError(), Magnitude(), Random()):
        with pytest.raises(FloatingPointError, match=r"call 1 \(timestep.*hidden_states is not"):
            LaptopDiff(criterion=criterion).attach(model).observe([good, bad])
    values = dict.fromkeys((u.name for u in units(model)), float("nan"))
    with pytest.raises(FloatingPointError, match=r"unit transformer_blocks.0.attn1: its score"):
        LaptopDiff(criterion=Given(values)).attach(model).observe([good])
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[0].proj.weight[0] = float("nan")
    for criterion in (OutputError(), Magnitude(), Taylor()):
        with pytest.raises(
            FloatingPointError, match=r"first at transformer_blocks.1.ff.net.0.proj"
        ):
            LaptopDiff(criterion=criterion).attach(model).observe([good])
    assert len(units(model)) == 6


def test_scores_and_costs_below_zero_are_named():
    model = tiny_dit()
    values = dict.fromkeys((u.name for u in units(model)), 1.0) | {"transformer_blocks.2.ff": -1.0}
    with pytest.raises(ValueError, match=r"unit transformer_blocks.2.ff: its score is -1"):
        LaptopDiff(criterion=Given(values)).attach(model).observe(calls_of(model))
    with pytest.raises(ValueError, match=r"cost of 'transformer_blocks.2.ff' is -1"):
        LaptopDiff(cost=CostVector(values)).attach(model).observe(calls_of(model))


@pytest.mark.parametrize("transform", [LaptopDiff(keep=0.9), LaptopDiff(keep=0.9, cost=Macs())])
def test_a_network_without_units(transform):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match="Sequential has no removable units"):
        transform.attach(model)
    with pytest.raises(ValueError, match="no removable units that `where` allows"):
        dataclasses.replace(transform, where=lambda n, m: False).attach(tiny_dit())
    call = ((torch.ones(1, 3),), {})
    handle = LaptopDiff(keep=1.0).attach(model)
    handle.observe([call])
    assert handle.removed == []


@pytest.mark.parametrize("solver", [Exact(), Greedy(), Exhaustive()])
def test_the_least_it_names_can_be_had(solver):
    """To the last digit printed, and to the last digit there is."""
    model = tiny_dit()
    with pytest.raises(ValueError, match="at least") as told:
        LaptopDiff(keep=1e-3).attach(model)
    floors = {"ff": 1.0}
    spare = sum(u.params for u in units(model) if u.kind == "attn1")
    least = [float(str(told.value).split("at least ")[1][:6]), 1 - spare / parameters(model)]
    for keep, fixed in zip(least, ({}, floors), strict=True):
        handle = LaptopDiff(keep=keep, solver=solver, floors=fixed).attach(model)
        handle.observe(calls_of(model, 1))
        gone = {u.name for u in handle.units if not fixed or u.kind == "attn1"}
        assert set(handle.removed) == gone
        handle.detach()


def test_floors_are_not_refused_before_scores_are_known():
    """The first units are dear, but nothing says that they are the ones to stay."""
    net = Residual(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8)))
    handle = LaptopDiff(keep=0.3, floors={"branch": 0.5}).attach(net)
    with torch.no_grad():
        net.branches[0].weight.zero_(), net.branches[0].bias.zero_()
    handle.observe([((torch.randn(4, 8),), {})])
    assert handle.removed == ["branches.0"]


def test_costs_are_counted_where_the_network_is():
    """Calls are kept on the CPU; the network may be elsewhere."""
    model = tiny_dit().to("meta")
    total, mine = Macs().price(model, units(model), [{"call": calls_of(model)[0]}])
    assert total > sum(mine) > 0


def test_a_sweep_leaves_every_module_as_it_was():
    model = tiny_dit().train()
    model.transformer_blocks[1].eval()
    modes = [m.training for m in model.modules()]
    sweep(model, calls_of(model, 1), [0.9])
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="no score for"):
        sweep(model, calls_of(model, 1), [0.9], LaptopDiff(criterion=Given({})))
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="no calls"):
        sweep(model, [], [0.9])


def test_recipes_know_the_target_of_each_call():
    """Criteria that look at the task loss work in a recipe, on targets of the pipeline's own."""
    pipe = tiny_dit_pipe()
    calls = {"prompts": [1, 2], "steps": 1, "calls": 1, "batch": 2}
    taylor = {"laptop_diff": {"keep": 0.7, "criterion": {"Taylor": {}}}}
    made = slim(pipe, {"methods": [taylor], "calibration": calls}, progress=False)
    ((_, handle),) = made.applied
    same = uniform_calls(made.before, [1, 2], count=1, batch=2, steps=1)
    other = LaptopDiff(keep=0.7, criterion=Taylor()).attach(made.before.transformer)
    other.observe(same)
    assert handle.scores == other.scores
    assert handle.removed == other.removed != []


# ---- on disk

SIZE = {"height": 16, "width": 16}
PIPES = {
    "ddpm": (tiny_ddpm, {}, 0.8),
    "sd": (tiny_sd, {"prompt": "ab"}, 0.6),
    "dit": (tiny_dit_pipe, {"class_labels": [1]}, 0.6),
    "pixart": (tiny_pixart_pipe, {"prompt": "ab", "use_resolution_binning": False}, 0.7),
    "sd3": (tiny_sd3, {"prompt": "ab", **SIZE}, 0.7),
    "flux": (tiny_flux, {"prompt": "ab", **SIZE}, 0.7),
}
READ = """
import json, sys
from pathlib import Path
import numpy, torch
import effuse
from diffusers import DiffusionPipeline

for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if (p / "expected.npy").exists()):
    given = json.loads((folder / "given").read_text())
    expected = numpy.load(folder / "expected.npy")
    for load in (effuse.load, DiffusionPipeline.from_pretrained):
        pipe = load(folder / "after")
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        picture = pipe(**given, num_inference_steps=2, output_type="np", generator=rng).images
        assert (picture == expected).all(), (folder.name, load)
"""


def weights_of(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def put_down(folder, pipe, given):
    """Write what a fresh process should draw beside what it should draw it with."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    picture = pipe(**given, num_inference_steps=2, output_type="np", generator=rng).images
    np.save(folder / "expected.npy", picture)
    (folder / "given").write_text(json.dumps(given))


@pytest.mark.slow
def test_all_classes_come_back_in_a_fresh_process(tmp_path):
    """Smaller by what is gone, and bit for bit: by effuse, and by diffusers once it is imported."""
    for name, (make, given, keep) in PIPES.items():
        pipe, folder = make(), tmp_path / name
        network = network_of(pipe)
        part = next(n for n, m in pipe.components.items() if m is network)
        store.save(pipe, folder / "before")
        with record(network, limit=1) as calls:
            pipe(**given, num_inference_steps=2, output_type="np")
        handle = LaptopDiff(keep=keep).attach(network)
        handle.observe(calls)
        store.save(pipe, folder / "after", [(part, handle)])
        before, after = (weights_of(folder / k / part) for k in ("before", "after"))
        report = handle.report()
        freed = 4 * (report["parameters_before"] - report["parameters"])
        assert freed > 0
        assert before - after >= freed  # names of what is gone are gone from the header too
        assert before - after < freed + 200 * len(network.state_dict())
        put_down(folder, pipe, given)
    pipe, folder = tiny_sd(), tmp_path / "composed"
    made = slim(
        pipe,
        {
            "methods": [{"laptop_diff": {"keep": 0.7}}, {"int8": {}}, {"asdm_assembly": {}}],
            "calibration": {"prompts": ["a", "b"], "steps": 1, "calls": 1, "batch": 2},
        },
        progress=False,
    )
    folder.mkdir()
    made.save(folder / "after")
    put_down(folder, pipe, {"prompt": "ab"})
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, timeout=300)


# ---- healing


class Stage(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def forward(self, x):
        return self.gain * x


def staged(*gains):
    return nn.Sequential(*(Stage(g) for g in gains))


X = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def terms_of(objective):
    loss = objective.loss("student", {"call": ((X,), {})})
    return {k: float(v.detach()) for k, v in loss.terms.items()}, loss


def test_terms_are_one_where_the_student_is_silent():
    objective = NormalizedFeatureDistillation(staged(2, 30, 0.1), staged(0, 1, 1), ["0", "1", "2"])
    terms, _ = terms_of(objective)
    assert [terms[f"feature/{i}"] for i in range(3)] == pytest.approx([1, 1, 1], rel=1e-6)


def test_zero_where_student_and_teacher_agree():
    objective = NormalizedFeatureDistillation(staged(2, 3), staged(2, 3), ["0", "1"])
    terms, loss = terms_of(objective)
    assert set(terms.values()) == {0.0}
    loss.total.backward()
    assert all(float(p.grad) == 0 for p in objective.student.parameters())


@pytest.mark.parametrize("k", [1e-3, 7.0, 1e4])
def test_rescaling_a_stage_of_both_leaves_its_term(k):
    def term(a, b, normalizer):
        objective = NormalizedFeatureDistillation(
            staged(a, 1), staged(b, 1), ["0"], normalizer=normalizer
        )
        return terms_of(objective)[0]["feature/0"]

    assert term(2 * k, 3 * k, PerBatch()) == pytest.approx(term(2, 3, PerBatch()), rel=1e-5)
    assert term(2, 3, PerBatch()) == pytest.approx(0.25, rel=1e-5)
    assert term(2 * k, 3 * k, Plain()) == pytest.approx(k**2 * term(2, 3, Plain()), rel=1e-5)


def test_the_normalizer_has_no_gradient_and_learning_goes_towards_the_teacher():
    objective = NormalizedFeatureDistillation(staged(2), staged(1), ["0"], weights=(0, 0, 1))
    _, loss = terms_of(objective)
    loss.total.backward()
    # a (2 - g)^2 E x^2 with a = 1 / (4 E x^2): d/dg = -2 (2 - g) / 4 = -0.5 at g = 1
    assert float(objective.student[0].gain.grad) == pytest.approx(-0.5, rel=1e-5)
    assert objective.teacher[0].gain.grad is None
    assert not objective.teacher[0].gain.requires_grad


def test_running_normalizer_is_the_moving_average():
    rule = Running(decay=0.5, tiny=0)
    a, kept = rule.weights(torch.tensor([4.0]), None)
    assert float(a) == 0.25
    a, kept = rule.weights(torch.tensor([8.0]), kept)
    assert float(kept) == 6.0
    assert float(a) == pytest.approx(1 / 6)


def test_matched_terms_sum_to_the_output_term():
    teacher, student = staged(2, 30, 0.1), staged(1, 20, 0.6)
    objective = NormalizedFeatureDistillation(
        teacher, student, ["0", "1", "2"], normalizer=Matched(scale=2.0)
    )
    terms, _ = terms_of(objective)
    parts = [terms[f"feature/{i}"] for i in range(3)]
    assert sum(parts) == pytest.approx(2 * terms["output"], rel=1e-5)
    # their ratios stay those of PerBatch: features 1 : 20 : 12 against 2 : 60 : 6
    assert parts[1] / parts[0] == pytest.approx((2 / 3) ** 2 / 0.5**2, rel=1e-5)


def test_task_and_output_terms():
    objective = NormalizedFeatureDistillation(staged(2), staged(1), [], weights=(3, 5, 1))
    loss = objective.loss("student", {"call": ((X,), {}), "target": -X})
    power = float(X.square().mean())
    terms = {k: float(v.detach()) for k, v in loss.terms.items()}
    assert terms == pytest.approx({"task": 3 * 4 * power, "output": 5 * power})
    assert float(loss.total.detach()) == pytest.approx(17 * power)
    with pytest.raises(ValueError, match="recorded `call`"):
        objective.loss("student", {"x0": X})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_terms_do_not_overflow_in_half_precision(dtype):
    teacher, student = staged(2, 300).to(dtype), staged(1, 300).to(dtype)
    objective = NormalizedFeatureDistillation(teacher, student, ["0", "1"])
    loss = objective.loss("student", {"call": ((X.to(dtype),), {}), "target": X.to(dtype)})
    # the answers are 600 x and 300 x: squares are beyond what float16 holds
    assert float(loss.terms["output"]) == pytest.approx(300**2 * float(X.square().mean()), rel=1e-2)
    assert float(loss.terms["feature/1"]) == pytest.approx(0.25, rel=1e-2)
    assert loss.total.isfinite()
    assert loss.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_run_taken_up_again_has_the_same_average(tmp_path):
    batches = [{"call": ((X * k,), {})} for k in (1.0, 5.0, 0.2, 3.0)]

    def train(steps, folder):
        objective = NormalizedFeatureDistillation(
            staged(2, 3), staged(1, 1), ["0", "1"], normalizer=Running(decay=0.5)
        )
        step = torch.optim.SGD(objective.parameters_of("student"), lr=1e-3)
        fit(objective, batches, step, steps=steps, folder=folder, progress=False)
        return [float(p) for p in objective.student.parameters()], objective.remembered.tolist()

    train(2, tmp_path / "a")
    assert train(4, tmp_path / "a") == train(4, tmp_path / "b")


def test_taps_that_do_not_match_are_named():
    def net(width):
        return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))

    objective = NormalizedFeatureDistillation(net(3), net(4), ["0"])
    with pytest.raises(ValueError, match=r"tap '0'.*\(2, 3\), '0' of the student \(2, 4\)"):
        objective.loss("student", {"call": ((X,), {})})
    student = Blur()
    student.idle = nn.Linear(2, 2)
    objective = NormalizedFeatureDistillation(net(3), student.float(), [("1", "idle")])
    with pytest.raises(ValueError, match=r"'idle' was not called by the student"):
        objective.loss("student", {"call": ((X,), {})})


def test_a_tap_is_never_compared_with_itself():
    net = staged(1, 2)
    with pytest.raises(ValueError, match="compared with itself"):
        NormalizedFeatureDistillation(net, net, ["0"])
    with pytest.raises(ValueError, match="compared with itself"):
        NormalizedFeatureDistillation(nn.Sequential(net[0], Stage(1)), net, ["0"])
    with pytest.raises(TypeError, match="give `taps`"):
        NormalizedFeatureDistillation(staged(1), staged(1))


def test_stages_are_found_by_structure():
    assert stages(tiny_unet_cond()) == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert stages(tiny_dit()) == [f"transformer_blocks.{i}" for i in range(3)]
    assert stages(tiny_dit(num_layers=6), groups=2) == [
        "transformer_blocks.2",
        "transformer_blocks.5",
    ]


@pytest.mark.parametrize("make", [tiny_unet, tiny_unet_cond, tiny_dit, tiny_pixart])
def test_healing_lowers_the_loss_and_leaves_the_teacher(make):
    model = make()
    teacher, calls = copy.deepcopy(model), calls_of(model)
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    handle = LaptopDiff(keep=0.55).attach(model)
    handle.observe(calls)
    objective = handle.objective(teacher)
    batches = [{"call": c} for c in calls]
    with torch.no_grad():
        first = sum(float(objective.loss("student", b).total) for b in batches)
    optimizer = torch.optim.Adam(objective.parameters_of("student"), lr=1e-3)
    fit(objective, batches, optimizer, steps=12, progress=False)
    with torch.no_grad():
        last = sum(float(objective.loss("student", b).total) for b in batches)
    assert last < 0.9 * first
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks for m in teacher.modules())


def test_fresh_noise_is_what_the_network_should_answer():
    import effuse

    spoil = UniformNoise(effuse.wrap(tiny_sd()).bare)
    text = torch.randn(64, 5, 32)
    batch = {"x0": torch.zeros(64, 4, 8, 8), "encoder_hidden_states": text}
    (args, kwargs), noise = spoil(batch, torch.Generator().manual_seed(0))
    assert kwargs["encoder_hidden_states"] is text
    t = kwargs["timestep"]
    assert t.min() < 60
    assert t.max() > 940
    # of nothing there is left sigma noise, and sigma rises with t
    sigma = (args[0] * noise).flatten(1).sum(1) / noise.square().flatten(1).sum(1)
    torch.testing.assert_close(args[0], sigma.reshape(-1, 1, 1, 1) * noise)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert (sigma[t.argsort()].diff() >= 0).all()


def test_healing_from_clean_samples():
    import effuse

    pipe = tiny_sd()
    student = copy.deepcopy(pipe.unet)
    spoil = UniformNoise(effuse.wrap(pipe).bare)
    objective = NormalizedFeatureDistillation(pipe.unet, student, spoil=spoil)
    batch = {"x0": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 32)}
    loss = objective.loss("student", batch, rng=torch.Generator().manual_seed(0))
    assert float(loss.terms["output"]) == 0
    assert float(loss.terms["task"]) > 0.5  # an untrained network against unit noise


def test_the_transform_is_a_value():
    assert LaptopDiff() == LaptopDiff()
    assert dataclasses.replace(LaptopDiff(), keep=0.5).keep == 0.5
