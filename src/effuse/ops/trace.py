"""Divergence of a vector field, exact or by Hutchinson's probes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rademacher_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Draw signs, -1 or 1 with equal chance, of the shape, dtype and device of `x` from `rng`."""
    device = x.device if rng is None else rng.device
    return (torch.randint(2, x.shape, generator=rng, device=device) * 2 - 1).to(x)


def divergence(
    field: Callable[[Tensor], Tensor],
    x: Tensor,
    probe: Tensor | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return field(x): (B, *) and its divergence at x, sum_i d field_i / d x_i, as (B,).

    With a probe z: (B, *) or (P, B, *), independent entries of mean zero and variance one, the
    unbiased estimate z' J z (averaged over P); exact for diagonal J if z are signs. Without one it
    is exact, at a backward pass for each of the D values of a row.

    Args:
        field: (B, *) -> (B, *), each row by itself.
        x: (B, *) where; float32 or float64.
        probe: see above; `rademacher_like(x, rng)`.
        create_graph: keep the graph of both, to differentiate them again.

    Raises:
        ValueError: the probe does not fit, or the field gives another shape.
    """
    if probe is not None and probe.shape[-x.ndim :] != x.shape:
        raise ValueError(f"probe of shape {tuple(probe.shape)} for x of {tuple(x.shape)}")
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        out = field(x)
        if out.shape != x.shape:
            raise ValueError(
                f"a field of shape {tuple(out.shape)} on x of {tuple(x.shape)}: expected the same"
            )
        if probe is None:
            probes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
            probes = probes.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        else:
            probes = probe.reshape(-1, *x.shape)
        total = x.new_zeros(len(x))
        if out.requires_grad:  # a constant field has no graph, and no divergence
            for i, z in enumerate(probes):
                keep = create_graph or i + 1 < len(probes)
                (back,) = torch.autograd.grad(
                    out, x, z, retain_graph=keep, create_graph=create_graph, allow_unused=True
                )
                if back is not None:
                    total = total + (back * z).flatten(1).sum(1)
    total = total if probe is None else total / len(probes)
    return (out, total) if create_graph else (out.detach(), total.detach())
