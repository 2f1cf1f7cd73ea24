"""edit, upscale, restore: pictures from pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import NAMED, Pipeline, bar, console, load, made, sides_of


def edit(
    pipeline: Pipeline,
    pictures: Annotated[list[Path], typer.Argument(help="picture files")],
    method: Annotated[
        str | None, typer.Option(help=f"confident_ode, sdedit, along, colorize: {NAMED}")
    ] = None,
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
    sides = sides_of(model, size)
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


def upscale(
    pipeline: Pipeline,
    pictures: Annotated[list[Path], typer.Argument(help="picture files")],
    prompt: Annotated[str | None, typer.Option(help="what the pictures show")] = None,
    size: Annotated[int | None, typer.Option(help="side in pixels; twice the pipeline's")] = None,
    depth: Annotated[float, typer.Option(help="share of levels to make up anew, 0 to 1")] = 0.3,
    steps: Annotated[int, typer.Option(help="levels of a whole walk")] = 20,
    guidance: Annotated[float | None, typer.Option(help="scale; 4 with a prompt, else 1")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="feed-forward layers take so many at once, to save memory")
    ] = None,
    white: Annotated[bool, typer.Option(help="lay transparent pictures on white")] = False,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file: plainly enlarged above ours")] = Path(
        "upscaled.png"
    ),
) -> None:
    """Enlarge pictures beyond the size a pipeline was trained for, with detail that it adds.

    Enlarged plainly, spoiled to --depth, sampled back. Time and memory grow with the square of the
    pixels, unless attention was made linear: slim the pipeline with `linfusion` first.
    """
    import torch
    import torch.nn.functional as F

    from effuse.bridge.pipeline import wrap
    from effuse.ops.picture import picture_file, read_picture, save_grid
    from effuse.report.draw import checked
    from effuse.restore.sdedit import SDEdit
    from effuse.restore.upscale import upscale as run
    from effuse.solvers import DDIM

    picture_file(out)
    pipe = load(pipeline)
    model = wrap(pipe)
    small = sides_of(model, None)
    sides = sides_of(model, 2 * max(small) if size is None else size)
    background = (1.0, 1.0, 1.0) if white else None
    before = torch.stack([read_picture(f, small, background=background) for f in pictures])
    what = None if prompt is None else checked(pipe, [prompt])[0]
    with console.status("enlarging"):
        after = run(
            pipe,
            before,
            what,
            sides,
            editor=SDEdit(depth=depth, levels=steps, solver=DDIM()),
            guidance=guidance if guidance is not None else 1.0 if prompt is None else 4.0,
            tokens=tokens,
            rng=torch.Generator().manual_seed(seed),
        )
    plain = F.interpolate(before, sides, mode="bicubic", antialias=True).clamp(0, 1)
    save_grid(torch.cat([plain, after.cpu()]), out, columns=len(before))
    console.print(f"{len(before)} enlarged to {sides[1]} x {sides[0]} in [bold]{out}[/]")


def restore(
    pictures: Annotated[list[Path], typer.Argument(help="picture files")],
    solver: Annotated[str, typer.Option(help=f"mrs, ancestral, ...: {NAMED}")] = "mrs",
    steps: Annotated[int, typer.Option(help="of the solver, a call of the network each")] = 10,
    damage: Annotated[
        str | None, typer.Option(help="spoil the pictures first: noise, blur, rain or holes")
    ] = None,
    size: Annotated[int | None, typer.Option(help="side in pixels; the picture's own")] = None,
    white: Annotated[bool, typer.Option(help="lay transparent pictures on white")] = False,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file: before above after")] = Path("restored.png"),
) -> None:
    """Take grain, blur, rain and holes out of small pictures with house:restore.

    It was trained on 64 by 64 emoji. With --damage the pictures are spoiled first, the truth is the
    top row, and the gain is printed. The solver mrs draws one of the pictures that may be under the
    damage; ancestral draws calmer ones, nearer to their mean.
    """
    import torch

    from effuse import house
    from effuse.core import Solver
    from effuse.core.fields import nearest
    from effuse.house.degrade import TASKS, degrade
    from effuse.ops.picture import picture_file, read_picture, save_grid
    from effuse.ops.stats import psnr

    picture_file(out)
    walker = made(solver, Solver, "solver")
    if damage is not None and damage not in TASKS:
        listed = ", ".join(TASKS)
        raise ValueError(f"damage {damage!r}: expected one of {listed}{nearest(damage, TASKS)}")
    sides = None if size is None else (size, size)
    ground = (1.0, 1.0, 1.0) if white else None
    read = [read_picture(f, sides, background=ground) for f in pictures]
    if len({r.shape for r in read}) > 1:
        raise ValueError("pictures of several sizes in one call: give --size, or a call each")
    before, rng = torch.stack(read), torch.Generator().manual_seed(seed)
    rows = [before]
    if damage is not None:
        task = torch.full((len(before),), TASKS.index(damage))
        rows.append(degrade(before, task, rng))
    model = house.restorer()
    if solver == "mrs":
        walker = None  # its own, set to the levels
    with bar("restoring", steps) as advance:
        after = model.restore(rows[-1], walker, steps=steps, rng=rng, on_step=lambda *_: advance())
    save_grid(torch.cat([*rows, after]), out, columns=len(before))
    console.print(f"{len(before)} restored, {steps} steps, in [bold]{out}[/]")
    if damage is not None:
        spoiled, mended = (float(psnr(x, before).mean()) for x in (rows[-1], after))
        console.print(
            f"PSNR to the truth: {spoiled:.1f} dB spoiled, [bold]{mended:.1f}[/] restored"
        )
