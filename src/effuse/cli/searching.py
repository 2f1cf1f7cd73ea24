"""search: the best recipes for a pipeline, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Pipeline, bar, console


def search(
    pipeline: Pipeline,
    out: Annotated[Path, typer.Option(help="folder of trials, front and recipes; resumable")],
    budget: Annotated[
        list[str] | None,
        typer.Option(help='bound on latency, macs, bytes, calls, psnr or score: "latency<0.5x"'),
    ] = None,
    trials: Annotated[int, typer.Option(help="evaluations at most")] = 60,
    pictures: Annotated[int, typer.Option(help="drawn to judge each recipe")] = 16,
    steps: Annotated[int, typer.Option(help="sampling steps of the original")] = 20,
    ray: Annotated[int, typer.Option(help="so many Ray workers; here, in turn, if 0")] = 0,
    seed: Annotated[int, typer.Option(help="of the search and of the pictures")] = 0,
) -> None:
    """Search recipes for what no other beats: solver, steps, layers, bits, inherited features.

    Each is drawn and judged on the same prompts and noise. Bounds with an x are multiples of the
    original. Stopped, the same command goes on from the folder; its recipes are for effuse slim.
    """
    from rich.table import Table

    from effuse.compress.search.base import Budget, Ray
    from effuse.recipe.space import search_recipes

    if trials < 1 or ray < 0:
        raise ValueError(f"--trials {trials} --ray {ray}: expected 1 or more, and 0 or more")
    bounds = [Budget.parse(text) for text in budget or ()]
    workers: Any = Ray(workers=ray) if ray else None
    with bar("recipes", trials) as advance:
        found = search_recipes(
            pipeline,
            bounds,
            out=out,
            budget=trials,
            workers=workers,
            seed=seed,
            pictures=pictures,
            steps=steps,
            on_trial=lambda *_: advance(),
        )
    names = list(found.start)
    table = Table("recipe", *names, box=None, header_style="bold")
    table.add_row("original", *(f"{found.start[n]:.4g}" for n in names))
    for i, trial in enumerate(found.front):
        table.add_row(f"{i:02d}.yaml", *(f"{trial.metrics[n]:.4g}" for n in names))
    console.print(table)
    failed = sum(bool(t.failure) for t in found.trials)
    console.print(f"{found.measured} measured, {failed} failed, in [bold]{out}[/]")
    if not found.front:
        raise ValueError("no recipe keeps every budget: loosen one, or give more --trials")
    console.print("its front: front.json, front.png and recipes/*.yaml")
