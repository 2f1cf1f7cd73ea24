"""The table of all ways: equal shares, refusals that are rows, claims with the right sign."""

import pytest
import torch
from tests.tiny import tiny_dit_pipe

from effuse.compress.calibrate import uniform_calls
from effuse.compress.prune.laptop_diff import Magnitude
from effuse.evaluate import cost
from effuse.proofs import Scale
from effuse.proofs._slimming import CACHES, Bench, Cheaper, Way, fewer, layers, transformed
from effuse.proofs.slimming import FINAL, _calls, _parameters, final, table
from effuse.solvers import DDIM


class Brightness:
    """Scores a picture by its mean."""

    def score(self, pictures, texts):
        return pictures.flatten(1).mean(1)


def bench():
    """Return a bench of a tiny diffusion transformer."""
    out = Bench(
        "tiny",
        tiny_dit_pipe,
        [0, 1],
        ["a", "b"],
        [5, 6],
        8,
        Scale("smoke"),
        [1, 2],
        judge=Brightness(),
        pipe=tiny_dit_pipe(),
    )
    return out


def test_caches_spend_what_fewer_steps_spend():
    """All caches cost at most 2 % more than half the steps; the original is itself."""
    rows = table(bench(), CACHES, (0.5,))
    first, rest = rows[0], rows[1:]
    assert first["squared_error"] == 0
    assert first["score_kept"] == 1
    assert first["steps"] == 8
    plain = next(r for r in rest if r["variant"] == "fewer steps, ddim")
    assert plain["steps"] == 4
    assert plain["squared_error"] > 0
    able = [r for r in rest if "score" in r]
    assert [r["variant"] for r in rest if r not in able] == ["deep_cache, even steps"]
    assert all(r["macs"] <= 1.03 * plain["macs"] for r in able)


def test_refusals_are_rows():
    """A way that refuses has a row with its reason and no figures."""

    def refuse(bench, pipe, share):
        raise ValueError("too small for this")

    _, row = table(bench(), [Way("never", "macs", refuse)], (0.3,))
    assert row["note"] == "refused: too small for this"
    assert "score" not in row


def test_healing_comes_after_and_brings_nearer():
    """A way that heals has a second row, nearer to the original's answers."""
    b = bench()
    b.scale = Scale("small")
    b.guidance = 1.0

    def half(bench, pipe, share):
        network = cost.denoising_network(pipe)
        with torch.no_grad():
            for block in network.transformer_blocks:
                block.attn1.to_out[0].weight.mul_(0.5)
        return Cheaper(DDIM(), 8, transformed(layers(Magnitude()))(bench, pipe, share).handle)

    b.calls = list(uniform_calls(b.pipe, [0, 1], count=2, batch=2, steps=2, seed=0))
    rows = table(b, [Way("half", "parameters", half, heals=True)], (0.3,))
    _, before, after = rows
    assert after["variant"] == "half, healed"
    assert after["healing_minutes"] > 0
    assert after["parameters"] == before["parameters"] < rows[0]["parameters"]
    assert after["squared_error"] < before["squared_error"]


def test_claims_have_the_right_sign():
    """98 % of the score is kept or not; 30 % nearer than the nearest fewer steps or not."""

    def row(variant, of, **more):
        return {"variant": variant, "share_of": of, **more}

    for kept, parameters, holds in [(0.97, 70, False), (0.99, 70, True), (0.99, 80, False)]:
        ends = {"score_change_low": (kept - 1.02) * 0.5, "score_change_high": (kept - 0.96) * 0.5}
        change = {"score": kept * 0.5, **ends}
        rows = [
            row("original", "", share=0.0, parameters=100),
            row("a", "parameters", share=0.3, score_kept=1.0, parameters=60),
            row(f"{FINAL} without its healing, on other pictures", "parameters"),
            row(
                f"{FINAL}, on other pictures",
                "parameters",
                share=0.3,
                score_kept=kept,
                parameters=parameters,
                **change,
            ),
        ]
        (claim,) = _parameters("n", rows)
        assert claim.holds == holds
        assert claim.interval == pytest.approx((kept - 0.02, kept + 0.04))
    seen = {"share": 0.5, "psnr_db": 1.0, "macs": 100}
    for error, holds in [(0.3, True), (0.4, False)]:
        rows = [
            row("fewer steps, ddim", "macs", squared_error=1.0, **seen),
            row("fewer steps, momentum", "macs", squared_error=0.5, **seen),
            row("near", "macs", squared_error=error, **seen),
            row("less near", "macs", squared_error=0.45, **seen),
            row("costly", "macs", squared_error=0.1, **(seen | {"macs": 110})),
        ]
        (claim,) = _calls("n", rows)
        assert (claim.holds, claim.baseline, claim.measured) == (holds, 0.5, error)


def test_the_recipe_is_judged_on_other_noise(tmp_path):
    """Without its healing and healed by steps, with fewer parameters, on five times as many."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "methods: [{maestro: {keep: 0.8, of: parameters, least: 4}}]\n"
        "calibration: {prompts: 2, steps: 2, calls: 1, batch: 2}\n"
        "healing: {minutes: 9, prompts: 2, rows: 2, judged: 2}\n"
    )
    first, before, last = final(bench(), str(recipe))
    assert (before["note"], before["healing_minutes"]) == ("", 0.0)
    assert last["note"].startswith("1 steps, ")
    assert last["note"].endswith("weights by dB to the original")
    assert last["parameters"] == before["parameters"] <= 0.8 * first["parameters"]
    assert (first["squared_error"], last["squared_error"] > 0) == (0, True)
    assert (last["squared_error"] == before["squared_error"]) == ("unhealed" in last["note"])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_fewer_steps(share):
    """Steps that stay are rounded."""
    assert fewer(DDIM())(bench(), None, share).steps == round(8 * (1 - share))
