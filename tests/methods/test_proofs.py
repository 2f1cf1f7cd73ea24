"""Every proof runs at its smallest size; the evidence it writes can be read."""

from __future__ import annotations

import json
import math

import pytest
import torch

from effuse.core.method import methods
from effuse.proofs import Claim, Evidence, Scale, names, prove, write


@pytest.mark.parametrize("name", names())
def test_smoke(name, tmp_path):
    evidence = prove(name, "smoke", tmp_path)
    read = json.loads((tmp_path / f"{name}.json").read_text())
    assert read["method"] == name
    assert read["size"] == "smoke"
    assert evidence.claims
    for claim in evidence.claims:
        assert math.isfinite(claim.measured), claim
        assert math.isfinite(claim.baseline), claim
        assert claim.statement
    assert evidence.rows
    assert read["machine"]["cores"] >= 1
    assert read["versions"]["torch"] == torch.__version__


def test_committed_evidence_is_of_small_or_proof_size(request):
    for file in (request.config.rootpath / "evidence").glob("*.json"):
        assert json.loads(file.read_text())["size"] in ("small", "proof"), file.name


def test_unknown():
    with pytest.raises(ValueError, match="no proof of 'nothing'"):
        prove("nothing", "smoke", None)
    with pytest.raises(ValueError, match="measured beside others, run `effuse prove slimming`"):
        prove("deep_cache", "smoke", None)
    with pytest.raises(ValueError, match="size='big'"):
        Scale("big")


def test_a_claim_that_does_not_hold_is_written_down(tmp_path):
    claim = Claim("ours is better", 1.0, float("nan"), "error", "lower", holds=False)
    evidence = Evidence([claim], method="x")
    read = json.loads(write(evidence, tmp_path).read_text())
    assert read["holds"] is False
    assert read["claims"][0]["measured"] is None
    assert "does not hold" in evidence.summary()


def test_pick():
    assert [Scale(s).pick(1, 2, 3) for s in ("smoke", "small", "proof")] == [1, 2, 3]


def test_methods_without_a_proof_name_one_that_measures_them():
    cards, known = methods(), names()
    for card in cards.values():
        if card.measured_in:
            assert card.name not in known, card.name
            assert card.measured_in in known, card.name
        elif card.buys or card.seed is not None:
            assert card.name in known, card.name
