"""likelihood, diagnose: what a network knows, and whether it contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Pipeline, bar, console, load, sides_of


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
    sides = sides_of(model, None)
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


def diagnose(
    pipeline: Pipeline,
    prompt: Annotated[str | None, typer.Argument(help="one prompt or class name")] = None,
    count: Annotated[int, typer.Option(help="samples of each sampler")] = 16,
    steps: Annotated[int, typer.Option(help="of both samplers")] = 25,
    levels: Annotated[str, typer.Option(help="noise levels in (0, 1), with commas")] = (
        "0.1,0.3,0.5,0.7,0.9"
    ),
    seed: Annotated[int, typer.Option(help="of starts, noise and probes")] = 0,
) -> None:
    """Tell whether ODE and SDE samplers of a network can agree, and whether they do.

    The residual of the Fokker-Planck equation in the score, which is zero for the score of any
    law, as a root mean square in units of the noise over one unit of t: on the network's own
    samples, and at random places among them. And the sliced Wasserstein distance between samples
    of ddim and of ancestral, beside that of two draws of ancestral, which is chance. Without
    guidance: a guided network is the score of no law.
    """
    import torch
    from rich.table import Table

    from effuse.bridge.pipeline import wrap
    from effuse.core import sample
    from effuse.evaluate.fokker_planck import ByVariance, monitor, ode_sde_gap
    from effuse.evaluate.residual import Central, ScoreResidual
    from effuse.report.draw import checked, usual
    from effuse.solvers import DDIM, Ancestral

    try:
        where = [float(part) for part in levels.split(",")]
    except ValueError:
        where = []
    if not where or not all(0 < t < 1 for t in where):
        raise ValueError(f"levels {levels!r}: expected numbers in (0, 1) with commas between")
    if count < 2:
        raise ValueError(f"count={count}: expected 2 or more, for a law")
    pipe = load(pipeline)
    model = wrap(pipe)
    rng = torch.Generator().manual_seed(seed)
    one = usual(pipe)[0] if prompt is None else checked(pipe, [prompt])[0]
    rows: Any = count if one is None else [one] * count
    plain = None if one is None else 1.0
    walk = model.walk(rows, DDIM(), steps=steps, guidance=plain, rng=rng)
    with bar("sampling", steps) as advance, torch.no_grad():
        x0 = sample(*walk, rng=rng, on_step=lambda *_: advance())
    residual = ScoreResidual()
    if hasattr(model.process, "__len__"):  # within one entry of a table: its curves bend there
        residual = ScoreResidual(slope=Central(0.5 / len(model.process)))
    table = Table("t", "on its samples", "among them", box=None, header_style="bold")
    with bar("residual", len(where)) as advance:
        for t in where:
            (row,) = monitor(residual, walk.denoiser, x0, [t], weight=ByVariance(), rng=rng)
            table.add_row(f"{t:g}", f"{row['on']:.3g}", f"{row['off']:.3g}")
            advance()
    console.print("Fokker-Planck residual of the score, sigma R:", highlight=False)
    console.print(table)
    with bar("sampling", 3 * steps) as advance:
        hook = walk.denoiser.register_forward_hook(lambda *_: advance())
        gap = ode_sde_gap(
            walk.denoiser, DDIM(), Ancestral(), walk.times, count, model.shape, rng=rng
        )
        hook.remove()
    console.print(
        f"ODE to SDE [bold]{gap.ode_sde:.4g}[/], SDE to SDE {gap.floor:.4g}: sliced Wasserstein "
        f"distance of {count} samples each"
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
