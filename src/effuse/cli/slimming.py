"""slim, recipes, compare, train: pipelines that become others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Pipeline, console, folder_of, load, show_table


def slim(
    pipeline: Pipeline,
    recipe: Annotated[str, typer.Option(help="YAML file, or a shipped name: effuse recipes")],
    out: Annotated[Path, typer.Option(help="folder for the slimmed pipeline and its report")],
    pictures: Annotated[int, typer.Option(help="pictures for the quality figures")] = 48,
    steps: Annotated[int | None, typer.Option(help="sampling steps of the original")] = None,
    seed: Annotated[int, typer.Option(help="first seed of the pictures")] = 0,
    report: Annotated[bool, typer.Option(help="measure before and after")] = True,
    heal: Annotated[
        float | None, typer.Option(help="minutes to learn from the original; 0 is none")
    ] = None,
) -> None:
    """Apply a recipe, save the pipeline, measure before and after, write the report page.

    What is measured as "after" is the saved folder, loaded again. Stopped while healing, the same
    command goes on where it was.
    """
    from effuse.bridge import store
    from effuse.core.files import claimed, require_room
    from effuse.recipe import parse
    from effuse.recipe import slim as apply
    from effuse.report import ready

    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    if pictures < 2:
        raise ValueError(f"pictures={pictures}: expected two or more, intervals need them")
    plan = parse(recipe)
    if heal is not None:
        plan = replace(plan, healing=replace(plan.healing, minutes=heal))
    with claimed(out):
        if _holds_other_things(out):
            raise ValueError(f"{out}: holds other things, expected a new or empty folder")
        folder = store.ready(out / "pipeline")
        page_folder = ready(out / "report") if report else None
        pipe = load(pipeline)
        require_room(out, 2 * store.size_of(pipe))
        names = " -> ".join(next(iter(i)) for i in plan.to_dict()["methods"])
        console.print(f"[bold]{pipeline}[/]: {names}")
        result = apply(pipe, plan, work=out / ".work")
        for row in result.reports():
            console.print(_short(row))
        result.save(folder)
        console.print(f"saved [bold]{folder}[/]")
        if page_folder is not None:
            page = result.report(
                page_folder,
                saved=folder,
                source=folder_of(pipeline),
                pictures=pictures,
                seed=seed,
                steps=steps,
                command=f"effuse slim {pipeline} --recipe {Path(recipe).name} --out {out.name}"
                + (f" --heal {heal:g}" if heal is not None else ""),
            )
            show_table(page)
            console.print(f"report [bold]{page.path}[/]")


def recipes(
    name: Annotated[str | None, typer.Argument(help="one recipe in full")] = None,
) -> None:
    """List the shipped recipes, or print one, to start your own from."""
    from effuse.recipe import shipped

    known = shipped()
    if name is None:
        for one, text in known.items():
            console.print(f"[bold]{one}[/]: {text.lstrip('# ').partition(chr(10))[0]}")
        return
    if name not in known:
        from effuse.core.fields import nearest

        raise ValueError(f"no shipped recipe {name!r}{nearest(name, known)}")
    console.print(known[name], markup=False, highlight=False, end="")


def compare(
    pipelines: Annotated[
        list[str], typer.Argument(help="two or more pipelines; the first is 'before'")
    ],
    out: Annotated[Path, typer.Option(help="folder of the page")] = Path("report"),
    pictures: Annotated[int, typer.Option(help="pictures for the quality figures")] = 48,
    steps: Annotated[int | None, typer.Option(help="steps where a folder has no recipe")] = None,
    seed: Annotated[int, typer.Option(help="first seed")] = 0,
) -> None:
    """Compare pipelines: same prompts, same seeds, one machine, one page."""
    from effuse.recipe import call_settings, parse
    from effuse.report import Entry
    from effuse.report import compare as page

    if len(pipelines) < 2:
        raise ValueError("one pipeline: expected two or more to compare")
    entries = {}
    for name in pipelines:
        file = Path(name) / "recipe.yaml"
        settings = call_settings(parse(file)) if file.is_file() else {}
        entries[name] = Entry(
            load(name),
            steps=settings.get("num_inference_steps", steps),
            guidance=settings.get("guidance_scale"),
            folder=folder_of(name),
        )
    command = f"effuse compare {' '.join(pipelines)}"
    result = page(entries, out=out, pictures=pictures, seed=seed, command=command)
    show_table(result)
    console.print(f"report [bold]{result.path}[/]")


def train(
    name: Annotated[str, typer.Argument(help="house:NAME")],
    out: Annotated[Path | None, typer.Option(help="folder for checkpoints and weights")] = None,
    minutes: Annotated[float | None, typer.Option(help="stop after so long")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    seed: Annotated[int, typer.Option(help="of data order, noise and initial weights")] = 0,
) -> None:
    """Train a house pipeline from the real pictures; resumes where it was stopped."""
    from effuse import house

    if not name.startswith("house:"):
        known = ", ".join(f"house:{n}" for n in house.names())
        raise ValueError(f"{name!r}: expected one of {known}")
    house.train(name.removeprefix("house:"), out=out, minutes=minutes, steps=steps, seed=seed)


def _holds_other_things(out: Path) -> bool:
    """Say whether a folder has something in it and is not what `slim` left there before."""
    ours = (out / "pipeline").exists() or (out / ".work").exists()
    return not ours and any(not f.name.startswith(".effuse") for f in out.iterdir())


def _short(row: dict[str, Any]) -> str:
    parts = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in row.items()
        if isinstance(v, (int, float, str)) and v and k not in ("method", "component")
    ]
    return f"  [bold]{row['method']}[/]: {', '.join(parts)}"
