"""methods, prove: what there is, and what it is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import console


def methods(
    name: Annotated[str | None, typer.Argument(help="one method in full")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the methods, or show one: what it is, paper, what it buys, evidence."""
    from effuse.core.method import methods as cards
    from effuse.docs import evidence_of, facts

    known = cards()
    if name is None:
        if as_json:
            console.print_json(json.dumps([facts(c) for c in known.values()]))
            return
        table = Table("method", "family", "what it is", "evidence", box=None, header_style="bold")
        for card in known.values():
            table.add_row(card.name, card.family, card.summary, evidence_of(card))
        console.print(table)
        return
    if name not in known:
        from effuse.core.fields import nearest

        raise ValueError(f"no method {name!r}{nearest(name, known)}")
    card = known[name]
    if as_json:
        console.print_json(json.dumps(facts(card)))
        return
    for key, value in facts(card).items():
        if value:
            console.print(f"[bold]{key}[/]: {value}", highlight=False)
    for cls in card.classes:
        console.rule(cls.__name__)
        console.print(cls.__doc__, markup=False, highlight=False)


def prove(
    name: Annotated[str | None, typer.Argument(help="a method with a proof")] = None,
    size: Annotated[str, typer.Option(help="smoke, small or proof")] = "small",
    everything: Annotated[bool, typer.Option("--all", help="every proof")] = False,
    out: Annotated[Path, typer.Option(help="folder of NAME.json")] = Path("evidence"),
) -> None:
    """Run a method's claim against its baseline, here and now, and write the evidence."""
    from effuse import proofs

    if (name is None) == (not everything):
        raise ValueError("expected one method's name, or --all")
    for one in proofs.names() if name is None else [name]:
        evidence = proofs.prove(one, size=size, out=out)
        console.print(evidence.summary())
