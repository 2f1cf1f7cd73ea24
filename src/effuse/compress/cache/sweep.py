"""What each setting of a cache costs and how far it leads astray: the rows of a Pareto plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from effuse.core.contracts import Call, Transform


@dataclass(frozen=True)
class Row:
    """One setting of a sweep: what it costs, how far it leads from the full run.

    error: ||sample - full||^2 / ||full||^2; macs of the run and of the full one; front: whether no
    other row is both cheaper and closer.
    """

    transform: Transform | None
    error: float
    macs: int
    macs_full: int
    calls: int
    key_calls: int
    cache_bytes: int
    front: bool = False


def sweep(
    model: nn.Module, transforms: Iterable[Transform], run: Callable[[], Tensor], call: Call
) -> list[Row]:
    """Run the same sampling under each setting and mark the Pareto front.

    Args:
        model: the network that `run` samples with; left as it was.
        transforms: settings to try.
        run: samples from fixed noise through `model` and returns the result; called once without
            and once with each setting.
        call: one call of the network as `run` makes them, to count multiply-accumulates on.

    Returns:
        One row a setting, in their order, after the row of the full run.
    """
    full = run()
    scale = full.double().square().mean()
    rows: list[Row] = []
    for transform in transforms:
        handle = transform.attach(model)
        try:
            handle.observe([call])
            error = float((run().double() - full.double()).square().mean() / scale)
            r = handle.report()
        finally:
            handle.detach()
        if not rows:
            rows.append(Row(None, 0.0, r["macs_full"], r["macs_full"], r["calls"], r["calls"], 0))
        rows.append(
            Row(
                transform,
                error,
                r["macs"],
                r["macs_full"],
                r["calls"],
                r["key_calls"],
                r["cache_bytes_peak"],
            )
        )
    return marked(rows)


def marked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `front` set: no other is as cheap and as close, and better in one."""

    def beats(a: Row, b: Row) -> bool:
        return a.macs <= b.macs and a.error <= b.error and (a.macs, a.error) != (b.macs, b.error)

    return [replace(row, front=not any(beats(other, row) for other in rows)) for row in rows]
