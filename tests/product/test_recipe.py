"""Recipes: strict reading, exact writing, order of kinds, apply, undo, save and load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from tests.tiny import tiny_dit_pipe, tiny_sd

import effuse
from effuse.compress import healing
from effuse.core.errors import RecipeError
from effuse.recipe import On, Recipe, Sampler, healed, parse, shipped, slim
from effuse.solvers import Heun

FOUR = {
    "methods": [
        {"laptop_diff": {"keep": 0.9}},
        {"int8": {}},
        {"asdm_assembly": {}},
        {"momentum": {"order": 2, "beta": 0.8, "steps": 3}},
    ],
    "calibration": {"prompts": ["red apple", "blue heart"], "steps": 2, "calls": 2, "batch": 2},
}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": []}, "unknown field 'method'; did you mean 'methods'"),
        ({"methods": [{"laptop_dif": {}}]}, "did you mean 'laptop_diff'"),
        ({"methods": [{"laptop_diff": {"keeep": 0.5}}]}, "did you mean 'keep'"),
        ({"methods": [{"laptop_diff": {"keep": 1.3}}]}, r"keep=1.3"),
        ({"methods": [{"momentum": {"stepz": 3}}]}, "stepz"),
        ({"methods": [{"momentum": {"steps": 0}}]}, "positive integer"),
        ({"methods": [{"momentum.HevyBall": {}}]}, "did you mean 'HeavyBall'"),
        ({"methods": [{"int8": {}, "ddim": {}}]}, "expected one method"),
        ({"methods": [{"cosine": {}}]}, "no method 'cosine'"),
        ({"methods": [{"flow": {}}]}, "nothing to apply"),
        ({"methods": [{"int8": {}}, {"laptop_diff": {}}]}, "expected the order"),
        ({"methods": [{"ddim": {"steps": 2}}, {"euler": {"steps": 2}}]}, "at most one"),
        ({"methods": [{"ddim": {"grid": {"Karas": {}}}}]}, "did you mean 'Karras'"),
        ({"methods": [{"laptop_diff": {"component": "vae"}}]}, "made for the denoising network"),
        ({"methods": [], "healing": {"step": 4}}, "did you mean 'steps'"),
        ("missing.yaml", "no such recipe"),
    ],
)
def test_mistakes_are_named(recipe, words):
    with pytest.raises(RecipeError, match=words):
        parse(recipe)


def test_reads_and_writes_the_same(tmp_path):
    source = {
        "methods": [
            *FOUR["methods"][:3],
            {"momentum": {"order": 2, "beta": 0.8, "steps": 3, "grid": {"Karras": {"rho": 5.0}}}},
        ],
        "healing": {"steps": 2},
    }
    first = parse(source)
    file = tmp_path / "recipe.yaml"
    file.write_text(first.to_yaml())
    assert parse(file) == first
    assert yaml.safe_load(first.to_yaml())["healing"] == {"steps": 2}
    assert first.sampler.steps == 3
    assert first.sampler.grid.rho == 5.0


def test_the_shipped_recipes_are_valid_and_say_what_they_are():
    assert {"fast", "small", "balanced", "lean"} <= set(shipped())
    for name, text in shipped().items():
        assert isinstance(parse(name), Recipe)
        assert text.startswith("# ")
    with pytest.raises(RecipeError, match="did you mean 'balanced'"):
        parse("balancd")


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit_pipe])
def test_lean_takes_a_third_of_the_multiplications_and_heals(make):
    """On a UNet and a transformer; as much less as it says, for as long as it says."""
    plan = parse("lean")
    assert plan.healing.minutes == 15
    plan = replace(plan, items=(replace(plan.items[0], least=4),))  # tiny layers count too
    calibration = replace(plan.calibration, prompts=2, steps=2, calls=1, batch=2)
    healing = replace(plan.healing, minutes=None, steps=2, prompts=2, rows=2, judged=2)
    first, *_ = (
        r
        for r in slim(
            make(), replace(plan, calibration=calibration, healing=healing), progress=False
        ).reports()
    )
    assert first["macs"] <= 0.68
    assert first["bytes"] < first["bytes_before"]


def pictures(pipe, **settings):
    rng = [torch.Generator().manual_seed(k) for k in (1, 2)]
    settings = {"num_inference_steps": 3, **settings}
    out = pipe(["red apple", "blue heart"], generator=rng, output_type="np", **settings)
    return out.images


def test_undo_is_bit_exact():
    pipe = tiny_sd()
    before = pictures(pipe)
    result = slim(pipe, FOUR)
    assert len(result.applied) == 3
    changed = pictures(pipe, **result.settings)
    assert np.abs(changed - before).max() > 0
    np.testing.assert_array_equal(pictures(result.before), before)
    np.testing.assert_array_equal(pictures(result.undo()), before)


def test_failure_leaves_the_pipeline_as_it_was():
    pipe = tiny_sd()
    before = pictures(pipe)
    recipe = parse(FOUR)
    with pytest.raises(ValueError, match="prompts"):
        slim(pipe, {**recipe.to_dict(), "calibration": {"prompts": 0}})
    np.testing.assert_array_equal(pictures(pipe), before)


def test_stages_take_off_one_step_at_a_time_and_put_all_back():
    pipe = tiny_sd()
    before = pictures(pipe)
    result = slim(pipe, FOUR)
    whole = pictures(pipe, **result.settings)
    pruned = slim(tiny_sd(), {**FOUR, "methods": FOUR["methods"][:1]})
    seen = []
    for name, how in result.stages():
        seen.append(name)
        if name == "laptop_diff":
            np.testing.assert_array_equal(pictures(pipe, **how), pictures(pruned.pipe))
    assert seen == ["momentum", "asdm_assembly", "int8", "laptop_diff"]
    np.testing.assert_array_equal(pictures(pipe, **result.settings), whole)
    next(iter(stages := result.stages()))
    stages.close()  # left early
    np.testing.assert_array_equal(pictures(pipe, **result.settings), whole)
    np.testing.assert_array_equal(pictures(result.undo()), before)


def test_a_transform_goes_on_another_component():
    pipe = tiny_sd()
    before = pictures(pipe)
    recipe = {"methods": [{"int8": {"component": "text_encoder", "least": 4}}]}
    result = slim(pipe, recipe)
    assert result.recipe.to_dict() == recipe
    assert [name for name, _ in result.applied] == ["text_encoder"]
    assert result.reports()[0]["bytes"] < result.reports()[0]["bytes_before"]
    assert np.abs(pictures(pipe) - before).max() > 0
    np.testing.assert_array_equal(pictures(result.before), before)
    np.testing.assert_array_equal(pictures(result.undo()), before)
    with pytest.raises(RecipeError, match="expected one of vae, text_encoder, unet"):
        slim(pipe, [On("text_encoder_2", result.recipe.items[0].transform)])


HEALED = {
    **FOUR,
    "methods": FOUR["methods"][:1],
    "healing": {"steps": 6, "prompts": ["green leaf", "dog"], "judged": 2, "rows": 2, "lr": 1e-2},
}


def broken_off(monkeypatch, after):
    """Stop healing after so many steps; return the list of steps that were made."""
    real, made = healing.fit, []

    def stopped(*args, **kwargs):
        def stop(step, losses):
            made.append(step)
            if len(made) == after:
                raise KeyboardInterrupt

        return real(*args, **{**kwargs, "on_step": stop, "save_every": 2})

    monkeypatch.setattr(healing, "fit", stopped)
    return made


def judged_as(monkeypatch, *levels):
    """Let the judge say these dB, one after the other, whatever the pictures."""
    said = iter(levels * 4)
    monkeypatch.setattr(healed.Judge, "__call__", lambda *_: verdict(None, next(said)))


def verdict(score, db):
    """Eight pictures, scores spread by 0.1 about their mean."""
    spread = torch.linspace(-0.1, 0.1, 8).double()
    return healed.Verdict(None if score is None else score + spread, db + spread)


def test_interrupted_healing_goes_on_where_it_was(tmp_path, monkeypatch):
    judged_as(monkeypatch, 1.0, 2.0)
    whole = pictures(slim(tiny_sd(), HEALED, progress=False).pipe)
    steps = broken_off(monkeypatch, after=4)
    judged_as(monkeypatch, 1.0)
    pipe = tiny_sd()
    before = pictures(pipe)
    with pytest.raises(KeyboardInterrupt):
        slim(pipe, HEALED, progress=False, work=tmp_path / "work")
    np.testing.assert_array_equal(pictures(pipe), before)
    judged_as(monkeypatch, 1.0, 2.0)
    again = slim(pipe, HEALED, progress=False, work=tmp_path / "work")
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6]
    np.testing.assert_array_equal(pictures(again.pipe), whole)
    assert not (tmp_path / "work").exists()
    np.testing.assert_array_equal(pictures(again.undo()), before)


def test_after_an_interruption_one_can_do_without_healing(tmp_path, monkeypatch):
    """What was put on before is there: nothing is chosen anew."""
    plain = {k: v for k, v in HEALED.items() if k != "healing"}
    wanted = pictures(slim(tiny_sd(), plain).pipe)
    broken_off(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        slim(tiny_sd(), HEALED, progress=False, work=tmp_path / "work")
    chosen = type(parse(plain).transforms[0])
    pipe = tiny_sd()
    before = pictures(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(chosen, "attach", lambda *_: pytest.fail("chosen anew"))
        found = slim(pipe, plain, work=tmp_path / "work")
    np.testing.assert_array_equal(pictures(found.pipe), wanted)
    assert found.reports()[0]["method"] == "laptop_diff"
    np.testing.assert_array_equal(pictures(found.undo()), before)


@pytest.mark.parametrize(("levels", "kept"), [((2.0, 1.0), "unhealed"), ((1.0, 2.0), "healed")])
def test_healing_stays_only_where_pictures_get_no_worse(monkeypatch, levels, kept):
    plain = {k: v for k, v in HEALED.items() if k != "healing"}
    unhealed = pictures(slim(tiny_sd(), plain).pipe)
    judged_as(monkeypatch, *levels)
    found = slim(tiny_sd(), HEALED, progress=False)
    told = found.reports()[1]
    assert (told["method"], told["kept"], told["steps"]) == ("healing of laptop_diff", kept, 6)
    assert np.array_equal(pictures(found.pipe), unhealed) == (kept == "unhealed")
    assert (told["db_unhealed"], told["db_healed"]) == pytest.approx(levels)
    assert told["judged_by"] == "dB to the original"


def test_a_verdict_goes_by_scores_where_they_differ_clearly_else_by_nearness():
    """Worse beyond doubt outweighs nearer; within doubt, nearer decides, either way."""
    before = verdict(0.5, 20.0)
    assert verdict(0.4, 30.0).better_than(before) == (False, "text-image score")
    assert verdict(0.6, 10.0).better_than(before) == (True, "text-image score")
    mixed = torch.tensor([0.2, -0.2] * 4).double()
    for shift in (-0.01, 0.01):
        doubtful = before.scores + mixed + shift
        nearer, further = (healed.Verdict(doubtful, before.db + d) for d in (1, -1))
        assert nearer.better_than(before) == (True, "dB to the original")
        assert further.better_than(before) == (False, "dB to the original")
    lost = float("nan")
    assert verdict(lost, lost).better_than(before)[0] is False
    assert verdict(None, lost).better_than(verdict(None, 20.0))[0] is False
    assert verdict(0.5, 20.0).better_than(before)[0] is True  # nothing learned, nothing lost


def test_a_house_pipeline_is_judged_by_texts_too():
    pipe = effuse.load("house:emoji")
    judge = healed.Judge(pipe, 2, 2)
    told = judge(pipe)
    torch.testing.assert_close(told.scores, judge.whole.scores)
    assert (told.db == 100).all()
    assert set(told.told("healed")) == {"score_healed", "db_healed"}
    assert set(told.told("original")) == {"score_original"}


def test_each_method_heals_with_its_share_of_the_steps():
    methods = [{"laptop_diff": {"keep": 0.9}}, {"maestro": {"keep": 0.9}}, {"int8": {}}]
    found = slim(tiny_sd(), {**HEALED, "methods": methods}, progress=False)
    told = {r["method"]: r.get("steps") for r in found.reports()}
    assert told["healing of laptop_diff"] == told["healing of maestro"] == 3
    assert "healing of int8" not in told


def test_healing_needs_something_to_heal():
    with pytest.raises(RecipeError, match="nothing to heal"):
        slim(tiny_sd(), {"methods": [{"int8": {}}], "healing": {"minutes": 1}})
    with pytest.raises(RecipeError, match="minutes=-1"):
        parse({"methods": [{"int8": {}}], "healing": {"minutes": -1}})
    with pytest.raises(RecipeError, match=r"Own\(\), Stages\(\) or Answers\(\)"):
        parse({"methods": [{"int8": {}}], "healing": {"features": 3}})


def test_a_bare_solver_is_a_sampler():
    pipe = tiny_sd()
    result = slim(pipe, [Heun()])
    assert result.recipe.items == (Sampler(Heun()),)
    assert np.isfinite(pictures(pipe)).all()


def test_members_are_ranked_on_walks_of_the_recipes_own_sampler(tmp_path):
    how = {"choice": {"PerKind": {"keep": 0.5}}, "by": {"Curvature": {"draws": 2}}}
    plan = parse(
        {
            "methods": [{"ecodiff": how}, {"ddim": {"steps": 3}}],
            "calibration": {"prompts": 2, "steps": 2, "calls": 1, "batch": 2},
        }
    )
    assert parse(plan.to_dict()) == plan
    made = slim(tiny_sd(), plan, progress=False)
    assert made.reports()[0]["kept"] < 1
    ((_, handle),) = made.applied
    assert handle.logits
    assert all((score >= 0).all() for score in handle.logits.values())
    expected = pictures(made.pipe)
    again = effuse.load(made.save(tmp_path / "saved"))
    np.testing.assert_allclose(pictures(again), expected, atol=1e-5)


@pytest.mark.bridge
def test_four_kinds_survive_save_and_a_fresh_process(tmp_path):
    result = slim(tiny_sd(), FOUR)
    folder = result.save(tmp_path / "slim")
    expected = pictures(result.pipe, **result.settings)
    np.save(tmp_path / "expected.npy", expected)
    again = effuse.load(folder)
    np.testing.assert_allclose(pictures(again, **result.settings), expected, atol=1e-5)
    code = f"""
import numpy as np, torch, effuse
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
rng = [torch.Generator().manual_seed(k) for k in (1, 2)]
out = pipe(["red apple", "blue heart"], generator=rng, output_type="np", num_inference_steps=3)
np.testing.assert_allclose(out.images, np.load({str(tmp_path / "expected.npy")!r}), atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert parse(folder / "recipe.yaml") == result.recipe


def test_a_cache_that_learns_walks_with_the_recipes_own_sampler(tmp_path):
    """Its route is for that solver's levels; saved, it comes back; other levels are refused."""
    plan = parse(
        {
            "methods": [
                {"error_budget": {"error": 10.0, "trajectories": 1, "tried": 2}},
                {"ddim": {"steps": 3}},
            ],
            "calibration": {"prompts": 2, "steps": 2, "calls": 1, "batch": 2},
        }
    )
    made = effuse.slim(tiny_sd(), plan, progress=False)
    (report,) = made.reports()
    assert report["macs_share"] < 0.9
    assert report["tried"]

    def picture(pipe, steps=3):
        pipe.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        out = pipe("a cat", num_inference_steps=steps, generator=rng, output_type="np")
        return torch.as_tensor(out.images)

    expected = picture(made.pipe)
    again = effuse.load(made.save(tmp_path / "saved"))
    assert torch.equal(picture(again), expected)
    with pytest.raises(ValueError, match="sample on that schedule, or make a route"):
        picture(again, steps=5)
    with pytest.raises(RecipeError, match="leave the grid out"):
        effuse.slim(
            tiny_sd(),
            parse({"methods": [{"error_budget": {}}, {"ddim": {"steps": 3, "grid": "Trailing"}}]}),
            progress=False,
        )
