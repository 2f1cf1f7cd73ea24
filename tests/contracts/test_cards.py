"""Every card is complete and stands where its name says."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from effuse.core import Process, methods

CARDS = methods()


@pytest.mark.parametrize("name", CARDS)
def test_card(name):
    card = CARDS[name]
    assert card.module.rpartition(".")[2] == name, "the file is called as the method"
    assert card.summary.endswith((".", ":")) or card.summary
    if card.seed is not None:
        assert card.paper
        assert card.year
        assert card.buys
        assert importlib.util.find_spec(f"effuse.proofs.{name}"), "a method has a proof"


@pytest.mark.parametrize("name", CARDS)
def test_classes_are_documented_values(name):
    card = CARDS[name]
    for cls, made in zip(card.classes, card.examples, strict=True):
        assert cls.__doc__
        value = made()
        assert isinstance(value, cls)
        if not issubclass(cls, Process) and dataclasses.is_dataclass(cls):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(
                    value, dataclasses.fields(cls)[0].name if dataclasses.fields(cls) else "x", 0
                )


def test_one_name_one_file():
    from effuse.core import method

    with pytest.raises(ValueError, match="one name, one file"):

        @method("ddim")
        class Other:
            """Another."""


def test_seeds_are_unique():
    seeds = [c.seed for c in CARDS.values() if c.seed is not None]
    assert len(seeds) == len(set(seeds))
