"""Errors with a name of their own, and the sentence every one of them follows.

What came, what was expected, what to do: `ValueError("keep=1.3: expected a fraction in (0, 1]")`.
"""

from __future__ import annotations


class StoreError(ValueError):
    """A saved folder is damaged, incomplete, of a foreign version, or names an unknown method."""


class RecipeError(ValueError):
    """A recipe names an unknown method or field, or orders its kinds in a way that cannot work."""


class Unsuited(TypeError):
    """A model has nothing that a transform, set as it is, could work on; says what it lacks.

    A composition or a search may pass such a pair over; any other error is a mistake.
    """


class MissingExtra(ImportError):
    """An optional package is not installed.

    Args:
        package: the import name that failed.
        extra: the extra of effuse that brings it.
    """

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed: pip install 'effuse[{extra}]'")


def check_fraction(name: str, value: float, *, zero: bool = False, one: bool = True) -> None:
    """Raise `ValueError` unless `value` lies in (0, 1), with the ends as asked for."""
    low = value >= 0 if zero else value > 0
    high = value <= 1 if one else value < 1
    if not (low and high):
        ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name}={value!r}: expected a fraction in {ends}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name}={value!r}: expected one of {listed}")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is finite and greater than zero."""
    if not (0 < value < float("inf")):
        raise ValueError(f"{name}={value!r}: expected a finite number above zero")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `ValueError` unless value is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number, at least {least}")
