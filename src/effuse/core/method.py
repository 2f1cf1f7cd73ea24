"""Cards: what each method is, found by walking the package, never built from a name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

_CARDS: dict[str, Card] = {}


@dataclass(frozen=True)
class Card:
    """What a reader, the CLI and the contract tests need to know of one method.

    `classes` are the public classes of the method, the first is the one a recipe names by the
    method's name. `missing` says plainly what of the paper is not here, and why. `measured_in` is
    the proof that measures a method without one of its own.
    """

    name: str
    family: str
    summary: str
    classes: tuple[type, ...]
    seed: int | None = None
    paper: str = ""
    year: int | None = None
    buys: str = ""
    missing: str = ""
    measured_in: str = ""
    examples: tuple[Callable[[], Any], ...] = ()

    @property
    def module(self) -> str:
        """The module of the method's main class."""
        return self.classes[0].__module__


def method(
    name: str,
    *,
    seed: int | None = None,
    paper: str = "",
    year: int | None = None,
    buys: str = "",
    missing: str = "",
    measured_in: str = "",
    example: Callable[[], Any] | None = None,
) -> Callable[[type[T]], type[T]]:
    """Record a card for the decorated class; a second class under one name joins its card.

    Args:
        name: the method's one name: file, test, proof, evidence and command are called so.
        seed: its number among the 75, `None` for what the methods stand on.
        paper: title of the paper.
        year: of the paper's first publication.
        buys: what a user gets from it, in a few words.
        missing: what of the paper is not here, and why.
        measured_in: the proof that measures it beside others, if it has none of its own.
        example: makes a tiny instance for the contract tests; default is the class itself,
            called without arguments.
    """

    def register(cls: type[T]) -> type[T]:
        family = cls.__module__.removeprefix("effuse.").rpartition(".")[0] or cls.__module__
        made: Callable[[], Any] = example if example is not None else cls
        old = _CARDS.get(name)
        if old is None:
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            _CARDS[name] = Card(
                name,
                family,
                summary,
                (cls,),
                seed,
                paper,
                year,
                buys,
                missing,
                measured_in,
                (made,),
            )
        elif old.module != cls.__module__:
            raise ValueError(
                f"method {name!r} is already in {old.module}: one name, one file, got another "
                f"in {cls.__module__}"
            )
        else:
            _CARDS[name] = replace(old, classes=(*old.classes, cls), examples=(*old.examples, made))
        return cls

    return register


_FAMILIES = (
    "processes",
    "operators",
    "solvers",
    "structure",
    "optim",
    "evaluate",
    "control",
    "distill",
    "compress",
    "autoregress",
    "restore",
    "canvas",
    "scene",
    "policy",
    "data",
)


def methods() -> dict[str, Card]:
    """Import every module where a method can live and return all cards by name, sorted."""
    import effuse

    for family in _FAMILIES:
        try:
            package = importlib.import_module(f"effuse.{family}")
        except ModuleNotFoundError as error:
            if error.name != f"effuse.{family}":
                raise
            continue
        for info in pkgutil.walk_packages(package.__path__, f"effuse.{family}."):
            importlib.import_module(info.name)
    del effuse
    return dict(sorted(_CARDS.items()))
