"""sample: pictures from pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import NAMED, Pipeline, bar, console, counted, load, made, named


def sample(
    pipeline: Pipeline,
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts or class names")] = None,
    solver: Annotated[str | None, typer.Option(help=f"{NAMED}: effuse methods")] = None,
    grid: Annotated[str | None, typer.Option(help=f"where the steps are: {NAMED}")] = None,
    control: Annotated[str | None, typer.Option(help=f"superdiff, w2sd: {NAMED}")] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            "--filter", help=f"draw more, leave the strangest out: hallucination: {NAMED}"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="sampling steps; 25, or the control's")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale")] = None,
    count: Annotated[int, typer.Option(help="pictures a prompt")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the first picture")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file")] = Path("grid.png"),
) -> None:
    """Sample pictures into one PNG, a row a prompt.

    Under a control that takes several prompts into one picture, a row has them all.
    """
    from effuse.core import Solver
    from effuse.report import draw, picture_file, save_grid

    picture_file(out)
    if grid is not None and solver is None:
        raise ValueError("a grid without a solver: name the solver too, such as --solver ddim")
    walker = None if solver is None else made(solver, Solver, "solver")
    levels = None if grid is None else _grid(grid)
    if control is not None and drop is not None:
        raise ValueError("--filter beside --control: expected one of them")
    if control is not None:
        if walker is not None:
            raise ValueError("--solver beside --control: a control walks with a solver of its own")
        pictures = _controlled(pipeline, control, prompt, count, steps, guidance, seed)
        save_grid(pictures, out, columns=count)
        console.print(f"{len(pictures)} pictures in [bold]{out}[/]")
        return
    steps = 25 if steps is None else steps
    pipe = load(pipeline)
    if drop is not None:
        pictures = _filtered(pipe, drop, prompt, walker, levels, count, steps, guidance, seed)
        save_grid(pictures, out, columns=count)
        console.print(f"{len(pictures)} pictures in [bold]{out}[/]")
        return
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


def _controlled(
    pipeline: str,
    control: str,
    prompt: list[str] | None,
    count: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
) -> Any:
    """Return pictures (N, 3, H, W) sampled under a control."""
    import torch

    from effuse.bridge.pipeline import wrap
    from effuse.control.base import Control, controlled
    from effuse.report.draw import checked, usual

    steering = made(control, Control, "control")
    pipe = load(pipeline)
    asked = checked(pipe, prompt) if prompt else usual(pipe)[:2]
    drawing = controlled(wrap(pipe), steering, asked, count=count, steps=steps, guidance=guidance)
    with bar("sampling", len(drawing.times) - 1) as advance:
        return drawing.sample(
            rng=torch.Generator().manual_seed(seed), on_step=lambda *_: advance()
        ).cpu()


def _filtered(
    pipe: Any,
    drop: str,
    prompt: list[str] | None,
    solver: Any,
    grid: Any,
    count: int,
    steps: int,
    guidance: float | None,
    seed: int,
) -> Any:
    """Return pictures (N, 3, H, W): `count` kept of those drawn for each prompt."""
    from dataclasses import replace

    import torch

    from effuse.bridge.pipeline import wrap
    from effuse.evaluate.hallucination import HallucinationFilter, Steps
    from effuse.report.draw import checked, usual

    screen = made(drop, HallucinationFilter, "filter")
    if steps < 10 and screen.window == Steps():  # the last ten steps are more than there are
        screen = replace(screen, window=Steps(-max(steps // 2, min(steps, 2))))
    model, kept = wrap(pipe), []
    asked = checked(pipe, prompt) if prompt else usual(pipe)[:4]
    drawn = screen.drawn(count)
    rng = torch.Generator().manual_seed(seed)
    with bar("prompts", len(asked)) as advance, torch.no_grad():
        for one in asked:
            rows: Any = drawn if one is None else [one] * drawn
            walk = model.walk(rows, solver, steps=steps, grid=grid, guidance=guidance, rng=rng)
            found, _ = screen(*walk, count, rng=rng)
            kept.append(model.codec.decode(found.x).clamp(0, 1).cpu())
            advance()
    console.print(f"{drawn} drawn a prompt, the {count} kept whose predictions moved least")
    return torch.cat(kept)


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
