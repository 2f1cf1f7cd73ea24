"""delta, merge: fine-tunes as small changes of a base, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import console, load

if TYPE_CHECKING:
    from effuse.compress.prune.darex import Delta


def delta(
    finetuned: Annotated[Path, typer.Argument(help=".safetensors file, or a component's folder")],
    base: Annotated[Path, typer.Argument(help="what it was tuned from, likewise")],
    out: Annotated[Path, typer.Option(help="folder of delta.safetensors")],
    keep: Annotated[float, typer.Option(help="share of the changes kept, (0, 1]")] = 0.1,
    method: Annotated[
        str, typer.Option(help="random (DARE), magnitude; with --judge also best")
    ] = "random",
    structure: Annotated[
        str, typer.Option(help="of random: element, column, row, or head:N, N channels a head")
    ] = "element",
    rescale: Annotated[
        float | None, typer.Option(help="q: kept changes are divided by it; DARE's is keep")
    ] = None,
    dense: Annotated[
        list[str] | None, typer.Option(help="names that begin so are kept whole")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the random mask")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(help="pipeline of the base: finds q by what its network then answers"),
    ] = None,
) -> None:
    """Keep a fine-tune as a sparse change of the weights it came from.

    A random mask is stored as its seed. At high drop rates a larger --rescale than keep trades a
    bias for less noise (DAREx-q); --judge PIPELINE finds it, and with --method best takes the way
    whose answers are nearest to the fine-tune's. Magnitude keeps the largest changes as they are.
    """
    from effuse.compress.prune.darex import Delta, Source
    from effuse.compress.prune.rescale import find_q, select
    from effuse.core.errors import check_choice

    if not 0 < keep <= 1:
        raise ValueError(f"--keep {keep}: expected a share in (0, 1]")
    check_choice("method", method, ("random", "magnitude", *(["best"] if judge else [])))
    if judge is not None and rescale is not None:
        raise ValueError("--judge and --rescale: expected one of them, --judge finds q itself")
    change = Delta.between(finetuned, base, dense=tuple(dense or ()))
    if method != "best":
        small = change.prune(1 - keep, method, seed=seed, structure=structure)
    if judge is not None and method != "magnitude":
        asked = _asked(judge, change)
        if method == "best":
            found = select(change, 1 - keep, *asked, seed=seed)
            small = found.pruned
            told = ", ".join(f"{n} {v:.3g}" for n, v in found.losses.items())
            console.print(f"change of the answers: {told}; [bold]{found.name}[/]: {found.advice}")
        else:
            small = find_q(small, *asked)
    elif rescale is not None:
        small = small.rescale(rescale)
    file = small.save(out)
    source = Source(finetuned)
    whole = sum(source[name].nbytes for name in source.names())
    console.print(
        f"{small.sparsity:.1%} dropped, q {small.q:g}: {file.stat().st_size:,} bytes beside the "
        f"fine-tune's {whole:,}, in [bold]{file}[/]"
    )


def _asked(judge: str, change: Delta) -> tuple[Any, Any, Any, list[Any]]:
    """Return a pipeline's network, the base's and the fine-tune's weights, and network calls."""
    from effuse.compress.calibrate import network_of, uniform_calls

    pipe = load(judge)
    network = network_of(pipe)
    odd = set(network.state_dict()) ^ set(change.base.names())
    if odd:
        raise ValueError(
            f"--judge {judge}: its {type(network).__name__} has other weights than the base, such "
            f"as {sorted(odd)[0]!r}; expected the pipeline whose network the base is"
        )
    calls = [b["call"] for b in uniform_calls(pipe, 16, count=3)]
    base, tuned = ({n: w[n] for n in w.names()} for w in (change.base, change.finetuned))
    return network, base, tuned, calls


def merge(
    base: Annotated[Path, typer.Argument(help=".safetensors file, or a component's folder")],
    changes: Annotated[list[Path], typer.Argument(help="folders that effuse delta wrote")],
    out: Annotated[Path, typer.Option(help=".safetensors file")],
    weight: Annotated[
        list[float] | None, typer.Option(help="of each change, in order; 1 if not given")
    ] = None,
) -> None:
    """Add one or several changes to a base, tensor by tensor, and write the weights."""
    from effuse.compress.prune.darex import Pruned, merge_files

    if out.suffix != ".safetensors":
        raise ValueError(f"{out.name}: expected a name ending in .safetensors")
    lost = [c for c in changes if not (c / "delta.safetensors").is_file()]
    if lost:
        raise ValueError(f"{lost[0]}: has no delta.safetensors; effuse delta writes one")
    out.parent.mkdir(parents=True, exist_ok=True)
    merge_files(base, [Pruned.load(c) for c in changes], out, weight or None)
    console.print(f"{len(changes)} merged, {out.stat().st_size:,} bytes in [bold]{out}[/]")
