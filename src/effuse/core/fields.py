"""A method's object as plain data, and back: {"Every": {"period": 2}} is an object of that class.

Numbers, text, lists (tuples on the way back), `None`, mappings and dataclasses; nothing else, so
that what is written is json or YAML and what is read runs no code but constructors of classes that
the method's own module knows by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest of `choices`, or nothing if none is close."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def names_of(cls: type) -> list[str]:
    """Return the names of the fields that a constructor of `cls` takes."""
    return [f.name for f in dataclasses.fields(cls) if f.init]


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the fields of `cls` that have a default, with it."""
    out = {}
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            out[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            out[f.name] = f.default
    return out


def dump(value: Any, place: str) -> Any:
    """Return `value` as plain data.

    Raises:
        ValueError: it holds something that is none of the above; names the place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: dump_fields(value, place)}
    if isinstance(value, (list, tuple)):
        return [dump(v, f"{place}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(k): dump(v, f"{place}.{k}") for k, v in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ValueError(
        f"{place}={value!r} cannot be written down: expected numbers, text, lists or dataclasses"
    )


def dump_fields(value: Any, place: str, *, skip: Iterable[str] = ()) -> dict[str, Any]:
    """Return all constructor fields of a dataclass as plain data, but those named in `skip`."""
    left_out = set(skip)
    return {
        name: dump(getattr(value, name), f"{place}.{name}")
        for name in names_of(type(value))
        if name not in left_out
    }


def build(cls: type, fields: Mapping[str, Any], place: str, module: Any = None) -> Any:
    """Make an object of `cls`; classes named within `fields` are looked up in `module`.

    Args:
        cls: a dataclass.
        fields: plain data, as `dump_fields` gives.
        place: where it stands, for messages.
        module: by default the module of `cls`.

    Raises:
        ValueError: an unknown field or class (the nearest name is given), or a bad value.
    """
    module = sys.modules[cls.__module__] if module is None else module
    if not isinstance(fields, Mapping):
        raise ValueError(f"{place}: expected fields as a mapping, got {fields!r}")
    known = names_of(cls)
    for name in fields:
        if name not in known:
            raise ValueError(
                f"{place}: unknown field {name!r}{nearest(str(name), known)} "
                f"(fields: {', '.join(known) or 'none'})"
            )
    values = {n: _value(v, f"{place}.{n}", module) for n, v in fields.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _value(value: Any, place: str, module: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(v, f"{place}[{i}]", module) for i, v in enumerate(value))
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, fields),) = value.items()
        cls = getattr(module, str(name), None)
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            return build(cls, fields or {}, f"{place}.{name}", sys.modules[cls.__module__])
        if isinstance(name, str) and name[:1].isupper():
            known = [n for n, _ in inspect.getmembers(module, dataclasses.is_dataclass)]
            raise ValueError(f"{place}: no class {name!r}{nearest(name, known)}")
    return value
