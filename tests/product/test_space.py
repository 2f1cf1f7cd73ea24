"""The search over recipes: what it measures, writes, and takes up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_dit_pipe

from effuse.compress.search import RandomSearch
from effuse.proofs import recipe_search
from effuse.recipe import Calibration, parse
from effuse.recipe.space import RecipeBench, RecipeChoices, search_recipes

CHOICES = RecipeChoices(
    solvers=("ddim", "momentum"),
    steps=(2, 4),
    keep=(1.0, 0.8),
    factor=(1.0,),
    every=(1, 2),
    order=(0,),
)


def pipeline():
    from diffusers import DDIMScheduler

    return tiny_dit_pipe(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))


HOW = {
    "pictures": 2,
    "steps": 4,
    "prompts": [1, 2],
    "calibration": Calibration(prompts=(1, 2), steps=2, calls=1, batch=2),
}


def test_every_point_is_a_recipe_that_can_be_read():
    space = RecipeChoices().space()
    genes = space.points()
    assert len(genes) == 3 * 8 * 6 * 2 * 2 * (1 + 2 * 2)
    for g in genes[:: len(genes) // 40]:
        recipe = RecipeChoices().recipe(space.decode(g))
        assert parse(recipe.to_dict()) == recipe
        assert recipe.sampler.steps == space.decode(g)["steps"]


def test_the_pipeline_is_as_it_was():
    pipe = pipeline()
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    scheduler = pipe.scheduler
    bench = RecipeBench(pipe, rounds=1, choices=CHOICES, **HOW)
    start = bench.metrics_at_start
    assert start["psnr"] == 99
    assert start["latency"] > 0
    off = {"factor": 1.0, "int8": False, "every": 1, "order": 0}
    config = {**off, "solver": "momentum", "steps": 2, "keep": 0.8, "int8": True}
    first = bench(config)
    assert first["bytes"] < 0.8 * start["bytes"]
    assert first["macs"] < 0.6 * start["macs"]  # half the calls; the decoder stays
    assert first["calls"] == 2
    same = {**off, "solver": "ddim", "steps": 4, "keep": 1.0}
    assert bench(same)["psnr"] > 60  # to rounding: the scheduler's coefficients are its own
    again = bench(config)  # by the plan that was kept
    for name in ("psnr", "macs", "bytes"):
        assert again[name] == first[name]
    assert pipe.scheduler is scheduler
    after = pipe.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], v) for k, v in state.items())


def test_what_calibration_gave_is_kept_with_its_weights(monkeypatch):
    """Factors are not in a plan: measured again without calibration, the pictures are the same."""
    pipe = pipeline()
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    bench = RecipeBench(pipe, rounds=0, choices=CHOICES, **HOW)
    config = {"solver": "ddim", "steps": 4, "keep": 0.8, "factor": 0.7, "int8": True, "every": 2}
    first = [bench({**config, "order": 0, "keep": k}) for k in (0.8, 1.0)]
    assert first[0]["macs"] < first[1]["macs"] < bench.metrics_at_start["macs"]
    assert list(Path(bench.drawer.name).iterdir())
    monkeypatch.setattr(bench, "_calls", lambda _: pytest.fail("calibrated again"))
    assert [bench({**config, "order": 0, "keep": k}) for k in (0.8, 1.0)] == first
    after = pipe.transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    monkeypatch.undo()
    for file in Path(bench.drawer.name).iterdir():
        file.unlink()  # somebody tidied up: learned again, never measured without its weights
    assert bench({**config, "order": 0})["macs"] == first[0]["macs"]
    assert bench({**config, "order": 0})["psnr"] == pytest.approx(first[0]["psnr"], abs=1e-3)


def test_a_search_is_written_and_taken_up_again(tmp_path):
    how = {"choices": CHOICES, "tactic": RandomSearch(), **HOW}
    found = search_recipes(pipeline(), ["macs<0.6x"], out=tmp_path, budget=5, **how)
    assert found.measured == 5
    assert found.objectives == {"psnr": "max", "macs": "min"}
    assert all(t.metrics["macs"] <= 0.6 * found.start["macs"] for t in found.front)
    read = json.loads((tmp_path / "front.json").read_text())
    assert len(read["front"]) == len(list((tmp_path / "recipes").glob("*.yaml")))
    for file in (tmp_path / "recipes").glob("*.yaml"):
        assert parse(file).items
    assert not found.front or (tmp_path / "front.png").stat().st_size > 5000
    more = search_recipes(pipeline(), ["macs<0.6x"], out=tmp_path, budget=7, **how)
    assert more.measured == 2
    with pytest.raises(ValueError, match="did you mean 'macs'"):
        search_recipes(pipeline(), ["mac<0.6x"], budget=1, **how)
    with pytest.raises(ValueError, match="another search"):
        search_recipes(pipeline(), out=tmp_path, budget=1, **{**how, "pictures": 1})


def test_what_a_search_covers_is_an_area():
    start = {"macs": 10.0}
    metrics = [{"psnr": 5.0, "macs": 1.0}, {"psnr": 20.0, "macs": 2.0}, {"psnr": 30.0, "macs": 3.0}]
    found = recipe_search._covered(metrics, start, 5)
    assert found == pytest.approx([0.0, 10 * 0.2, 10 * 0.2 + 10 * 0.1, 3.0, 3.0])


def test_claims_of_the_search_compare_at_no_more_cost():
    plain = [{"psnr": 20.0, "macs": 2.0}, {"psnr": 25.0, "macs": 4.0}]
    front = [
        {"searched_psnr": 22.0, "psnr": 21.0, "macs": 2.0},
        {"searched_psnr": 23.0, "psnr": 20.5, "macs": 3.0},
        {"searched_psnr": 24.0, "psnr": 23.0, "macs": 3.5},
    ]
    volumes = {"linas": [[2.0]], "nsga2": [[1.0]], "random": [[3.0]]}
    claims = recipe_search._claims(volumes, front, plain, 1)
    assert [c.holds for c in claims] == [True, False, False, True, False]
    assert claims[2].measured == 0.5
    assert (claims[3].measured, claims[3].baseline) == (pytest.approx(21.5), 20.0)
    assert claims[4].measured == pytest.approx(0.5)
