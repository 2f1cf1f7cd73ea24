"""sample, edit: pictures from pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import NAMED, Pipeline, bar, console, counted, made, named


def sample(
    pipeline: Pipeline,
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts or class names")] = None,
    solver: Annotated[str | None, typer.Option(help=f"{NAMED}: effuse methods")] = None,
    grid: Annotated[str | None, typer.Option(help=f"where the steps are: {NAMED}")] = None,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 25,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    count: Annotated[int, typer.Option(help="pictures a prompt")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the first picture")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("grid.png"),
) -> None:
    """Sample pictures into one PNG, a row a prompt."""
    from effuse.core import Solver
    from effuse.recipe import load
    from effuse.report import draw, picture_file, save_grid

    picture_file(out)
    if grid is not None and solver is None:
        raise ValueError("a grid without a solver: name the solver too, such as --solver ddim")
    walker = None if solver is None else made(solver, Solver, "solver")
    levels = None if grid is None else _grid(grid)
    pipe = load(pipeline)
    if walker is not None:
        from effuse.bridge.scheduler import scheduler

        pipe.register_modules(scheduler=scheduler(walker, pipe.scheduler, grid=levels))
    evals = 1 if walker is None else walker.evals
    rows = -(-count * len(prompt or [""] * 4) // 16)
    with counted(pipe, rows * steps * evals):
        pictures = draw(
            pipe, prompt or None, count=count, steps=steps, guidance=guidance, seed=seed
        )
    save_grid(pictures, out, columns=count)
    console.print(f"{len(pictures)} pictures in [bold]{out}[/]")


def edit(
    pipeline: Pipeline,
    pictures: Annotated[list[Path], typer.Argument(help="picture files")],
    method: Annotated[str, typer.Option(help=f"confident_ode, sdedit: {NAMED}")] = "confident_ode",
    prompt: Annotated[str | None, typer.Option(help="prompt or class; none if left out")] = None,
    guidance: Annotated[float, typer.Option(help="guidance scale, 1 for none")] = 1.0,
    size: Annotated[int | None, typer.Option(help="side in pixels; the pipeline's own")] = None,
    white: Annotated[bool, typer.Option(help="lay transparent pictures on white")] = False,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file: before above after")] = Path("edited.png"),
) -> None:
    """Repair or edit pictures with a pipeline that was trained for neither."""
    import torch

    from effuse.bridge.pipeline import wrap
    from effuse.ops.picture import picture_file, read_picture, save_grid
    from effuse.recipe import load
    from effuse.report.draw import checked
    from effuse.restore import edit as run
    from effuse.restore.editor import Editor

    picture_file(out)
    editor = made(method, Editor, "method")
    pipe = load(pipeline)
    model = wrap(pipe)
    sides = _sides(model, size)
    background = (1.0, 1.0, 1.0) if white else None
    before = torch.stack([read_picture(f, sides, background=background) for f in pictures])
    what = None if prompt is None else checked(pipe, [prompt])[0]
    with bar("editing", editor.calls(model.process)) as advance:
        edited = run(
            model,
            before,
            editor,
            what,
            guidance=guidance,
            rng=torch.Generator().manual_seed(seed),
            on_call=lambda done, total: advance(),
        )
    save_grid(torch.cat([before, edited.pictures.cpu()]), out, columns=len(before))
    console.print(f"{len(before)} edited, {edited.calls} calls each, in [bold]{out}[/]")


def _sides(model: Any, size: int | None) -> tuple[int, int]:
    """Return height and width in pixels."""
    if size is not None:
        return size, size
    _, h, w = model.shape
    factor = model.codec.factor
    return h * factor, w * factor


def _grid(text: str) -> Any:
    """Return the grid that an option names."""
    from effuse import processes
    from effuse.core.fields import build, nearest
    from effuse.processes import Grid

    name, fields = named(text, "grid")
    known = {
        n: c
        for n, c in vars(processes).items()
        if isinstance(c, type) and issubclass(c, Grid) and c is not Grid
    }
    if name not in known:
        raise ValueError(f"grid {name!r}: expected one of {', '.join(known)}{nearest(name, known)}")
    return build(known[name], fields, name)
