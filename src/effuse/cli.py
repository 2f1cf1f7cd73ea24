"""The commands: slim, recipes, sample, compare, train, methods, prove."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="effuse",
    help="Make a diffusion pipeline small, fast and controllable. Lighter gases effuse faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Pipeline = Annotated[str, typer.Argument(help="house:NAME, a diffusers folder, or a hub id")]


@app.command()
def slim(
    pipeline: Pipeline,
    recipe: Annotated[str, typer.Option(help="YAML file, or a shipped name: effuse recipes")],
    out: Annotated[Path, typer.Option(help="folder for the slimmed pipeline and its report")],
    pictures: Annotated[int, typer.Option(help="pictures for the quality figures")] = 48,
    steps: Annotated[int | None, typer.Option(help="sampling steps of the original")] = None,
    seed: Annotated[int, typer.Option(help="first seed of the pictures")] = 0,
    report: Annotated[bool, typer.Option(help="measure before and after")] = True,
) -> None:
    """Apply a recipe, save the pipeline, measure before and after, write the report page.

    What is measured as "after" is the saved folder, loaded again. Stopped while healing, the same
    command goes on where it was.
    """
    from effuse.bridge import store
    from effuse.core.files import claimed, require_room
    from effuse.recipe import load, parse
    from effuse.recipe import slim as apply
    from effuse.report import ready

    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    if pictures < 2:
        raise ValueError(f"pictures={pictures}: expected two or more, intervals need them")
    plan = parse(recipe)
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
                source=_folder(pipeline),
                pictures=pictures,
                seed=seed,
                steps=steps,
                command=f"effuse slim {pipeline} --recipe {Path(recipe).name} --out {out.name}",
            )
            _table(page)
            console.print(f"report [bold]{page.path}[/]")


@app.command()
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


@app.command()
def sample(
    pipeline: Pipeline,
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts or class names")] = None,
    solver: Annotated[str | None, typer.Option(help="a solver's name: effuse methods")] = None,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 25,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    count: Annotated[int, typer.Option(help="pictures a prompt")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the first picture")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("grid.png"),
) -> None:
    """Sample pictures into one PNG, a row a prompt."""
    from effuse.recipe import load
    from effuse.report import draw, picture_file, save_grid

    picture_file(out)
    pipe = load(pipeline)
    if solver is not None:
        from effuse.bridge.scheduler import scheduler

        pipe.register_modules(scheduler=scheduler(solver, pipe.scheduler))
    pictures = draw(pipe, prompt or None, count=count, steps=steps, guidance=guidance, seed=seed)
    save_grid(pictures, out, columns=count)
    console.print(f"{len(pictures)} pictures in [bold]{out}[/]")


@app.command()
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
    from effuse.recipe import call_settings, load, parse
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
            folder=_folder(name),
        )
    command = f"effuse compare {' '.join(pipelines)}"
    result = page(entries, out=out, pictures=pictures, seed=seed, command=command)
    _table(result)
    console.print(f"report [bold]{result.path}[/]")


@app.command()
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


@app.command()
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
            table.add_row(card.name, card.family, card.summary, evidence_of(card.name))
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


@app.command()
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


def _holds_other_things(out: Path) -> bool:
    """Say whether a folder has something in it and is not what `slim` left there before."""
    ours = (out / "pipeline").exists() or (out / ".work").exists()
    return not ours and any(not f.name.startswith(".effuse") for f in out.iterdir())


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


def _short(row: dict[str, Any]) -> str:
    parts = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        for k, v in row.items()
        if isinstance(v, (int, float, str)) and v and k not in ("method", "component")
    ]
    return f"  [bold]{row['method']}[/]: {', '.join(parts)}"


def _table(page: Any) -> None:
    table = Table(*page.header(), box=None, header_style="bold")
    for row in page.rows():
        table.add_row(*row)
    console.print(table)


# Importing diffusers tries torchao, if it is there, which warns of its kernels for other machines.
_CHATTER = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
# Read when these are imported: transformers tells of its optional packages, torch of its profiler.
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def main(run: Callable[[], None] = app) -> None:
    """Run the command line; an error a user can mend is one line, not a traceback."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, quiet in _QUIET.items():
        os.environ.setdefault(name, quiet)
    try:
        run()
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("EFFUSE_DEBUG"):
            raise
        message = escape(str(error))
        Console(stderr=True).print(f"[bold red]error[/]: {message}", highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
