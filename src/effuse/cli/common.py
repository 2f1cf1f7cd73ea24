"""What the commands share: the console, how objects are named, tables and bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console()

Pipeline = Annotated[str, typer.Argument(help="house:NAME, a diffusers folder, or a hub id")]
NAMED = "a name, or '{name: {field: value}}' as in a recipe"


def load(name: str) -> Any:
    """Load a pipeline; one that is here already without bars of files and weights."""
    from diffusers.utils import logging as theirs
    from transformers.utils import logging as also

    from effuse.recipe import load as read

    here = name.startswith("house:") or Path(name).is_dir()
    if here:
        theirs.disable_progress_bar()
        also.disable_progress_bar()
    try:
        return read(name)
    finally:
        if here:
            theirs.enable_progress_bar()
            also.enable_progress_bar()


def folder_of(name: str) -> Path | None:
    """Return the folder that a pipeline is, or None if it is none."""
    return Path(name) if Path(name).is_dir() else None


def show_table(page: Any) -> None:
    """Print the table of a page."""
    table = Table(*page.header(), box=None, header_style="bold")
    for row in page.rows():
        table.add_row(*row)
    console.print(table)


def named(text: str, place: str) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the fields that an option says, `NAMED`."""
    import yaml

    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} {text!r}: expected {NAMED}") from error
    if isinstance(said, str):
        return said, {}
    if isinstance(said, Mapping) and len(said) == 1:
        ((name, fields),) = said.items()
        if isinstance(fields or {}, Mapping):
            return str(name), fields or {}
    raise ValueError(f"{place} {text!r}: expected {NAMED}")


def made(text: str, wanted: type, place: str) -> Any:
    """Return the object of a method that an option names, of the class `wanted` or below.

    Raises:
        ValueError: no such method or field (the nearest is named), or a method of another kind.
    """
    from effuse.core.fields import build, nearest
    from effuse.core.method import methods

    name, fields = named(text, place)
    known: dict[str, type] = {}
    for card in methods().values():
        found = [c for c in card.classes if issubclass(c, wanted)]
        known |= {card.name: found[0]} if found else {}
        known |= {f"{card.name}.{c.__name__}": c for c in found[1:]}
    if name not in known:
        listed = ", ".join(known)
        raise ValueError(f"{place} {name!r}: expected one of {listed}{nearest(name, known)}")
    return build(known[name], fields, name)


def sides_of(model: Any, size: int | None) -> tuple[int, int]:
    """Return height and width in pixels: `size`, or what the pipeline draws."""
    if size is not None:
        return size, size
    _, h, w = model.shape
    factor = model.codec.factor
    return h * factor, w * factor


@contextlib.contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar with the time left while inside; calling what it gives advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def counted(pipe: Any, total: int) -> Iterator[None]:
    """Show a bar over the calls of a pipeline's network while inside."""
    from effuse.evaluate.cost import denoising_network

    with bar("sampling", total) as advance:
        hook = denoising_network(pipe).register_forward_hook(lambda *_: advance())
        try:
            yield
        finally:
            hook.remove()
