"""sample, edit: pictures from pipelines."""

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
    if control is not None:
        if walker is not None:
            raise ValueError("--solver beside --control: a control walks with a solver of its own")
        pictures = _controlled(pipeline, control, prompt, count, steps, guidance, seed)
        save_grid(pictures, out, columns=count)
        console.print(f"{len(pictures)} pictures in [bold]{out}[/]")
        return
    steps = 25 if steps is None else steps
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


def edit(
    pipeline: Pipeline,
    pictures: Annotated[list[Path], typer.Argument(help="picture files")],
    method: Annotated[str | None, typer.Option(help=f"confident_ode or sdedit: {NAMED}")] = None,
    prompt: Annotated[str | None, typer.Option(help="what it is to become")] = None,
    guidance: Annotated[float | None, typer.Option(help="scale; 4 with a prompt, else 1")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="inpaint: picture, white where to paint, black is kept")
    ] = None,
    size: Annotated[int | None, typer.Option(help="side in pixels; the pipeline's own")] = None,
    white: Annotated[bool, typer.Option(help="lay transparent pictures on white")] = False,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file: before above after")] = Path("edited.png"),
) -> None:
    """Edit pictures with a pipeline that was not trained for it.

    With a prompt towards it, encoded and decoded in 25 levels; without one towards what the
    pipeline knows, by Langevin steps between.
    """
    import torch

    from effuse.bridge.pipeline import wrap
    from effuse.ops.picture import picture_file, read_picture, save_grid
    from effuse.report.draw import checked
    from effuse.restore import CODE, Colorize, Inpaint
    from effuse.restore import edit as run
    from effuse.restore.editor import Editor

    picture_file(out)
    if mask is not None and method is not None:
        raise ValueError(f"--mask beside --method {method}: a mask is for inpainting alone")
    editor: Editor | None = None
    if method is not None:
        editor = Colorize() if method == "colorize" else made(method, Editor, "method")
    if guidance is None:
        guidance = 1.0 if prompt is None else 4.0
    pipe = load(pipeline)
    model = wrap(pipe)
    sides = _sides(model, size)
    if mask is not None:
        editor = Inpaint((read_picture(mask, sides).mean(0) < 0.5).float())
    elif editor is None:
        editor = CODE(25, 0.8, corrections=0) if prompt is not None else CODE(40, 0.5)
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


def likelihood(
    pipeline: Pipeline,
    pictures: Annotated[list[Path] | None, typer.Argument(help="picture files")] = None,
    held_out: Annotated[int, typer.Option(help="so many house pictures kept from training")] = 0,
    label: Annotated[
        str | None, typer.Option(help="class of the pictures, if it takes one")
    ] = None,
    probes: Annotated[int, typer.Option(help="of the divergence, a picture")] = 1,
    tolerance: Annotated[float, typer.Option(help="of the integration")] = 1e-3,
    white: Annotated[bool, typer.Option(help="lay transparent pictures on white")] = False,
    seed: Annotated[int, typer.Option(help="of probes and dequantization")] = 0,
) -> None:
    """Bits a value that a pixel pipeline needs for pictures, by its probability-flow ODE."""
    import torch

    from effuse.bridge.pipeline import wrap
    from effuse.ops.picture import read_picture
    from effuse.ops.stats import bootstrap
    from effuse.report.draw import checked
    from effuse.solvers.likelihood import dequantize, log_likelihood

    if bool(pictures) == bool(held_out):
        raise ValueError("expected picture files, or --held-out N")
    pipe = load(pipeline)
    model = wrap(pipe)
    if model.codec.vae is not None:
        raise ValueError(
            f"{pipeline} works on latents, whose density says nothing of pixels: expected a "
            "pipeline on pixels, such as house:pixels"
        )
    sides = _sides(model, None)
    if held_out:
        shown, names = _held_out(held_out, sides)
    else:
        ground = (1.0, 1.0, 1.0) if white else None
        files = pictures or []
        shown = torch.stack([read_picture(f, sides, background=ground) for f in files])
        names = [f.name for f in files]
    cond: dict[str, Any] = {}
    if label is not None:
        asked: Any = checked(pipe, [label]) * len(shown)
        cond = model.embed(asked)
    rng = torch.Generator().manual_seed(seed)
    with bar("integrating") as advance:
        found = log_likelihood(
            model.bare.given(**cond),
            model.codec.encode(dequantize(shown, rng=rng)),
            probes=probes,
            rng=rng,
            rtol=tolerance,
            atol=tolerance,
            on_call=advance,
        )
    if not held_out:
        for name, bits in zip(names, found.bits.tolist(), strict=True):
            console.print(f"{name}: {bits:.3f} bits a value")
    low, high = bootstrap(found.bits)
    console.print(
        f"{len(shown)} pictures: [bold]{float(found.bits.mean()):.3f}[/] bits a value, 95 % "
        f"{low:.3f} to {high:.3f}; {found.calls} calls"
    )


def _held_out(count: int, sides: tuple[int, int]) -> tuple[Any, list[str]]:
    """Return house pictures that no house pipeline was trained on, evenly among them."""
    import numpy as np
    import torch

    from effuse.house import data

    known = data.pictures()
    kept = np.flatnonzero(known.held & ~known.toned)
    some = kept[np.linspace(0, len(kept) - 1, min(count, len(kept))).astype(int)]
    shown = torch.from_numpy(known.images[some]).float() / 255
    small = torch.nn.functional.interpolate(shown, size=sides, mode="area")
    return small, [str(i) for i in some]


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
