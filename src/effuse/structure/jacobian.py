"""The Jacobian of a denoiser: its leading singular vectors, its numerical rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from effuse.core.contracts import Denoiser, Time
from effuse.core.errors import check_fraction, check_whole

_HALF = (torch.float16, torch.bfloat16)


class Spectrum(NamedTuple):
    """Leading singular values and vectors of J = d x0 / d x_t, of every row by itself.

    values: (B, r) falling; left, right: (B, r, *) of norm one, J right = values left. The largest
    entry of each right vector is positive.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def _wide(value: Any) -> Any:
    """Return arguments in float32 where they are in half precision."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if isinstance(value, Mapping):
        return {k: _wide(v) for k, v in value.items()}
    return type(value)(map(_wide, value)) if isinstance(value, (tuple, list)) else value


def _networks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Give what the denoisers within a denoiser call."""
    for child in denoiser.children():
        if isinstance(child, Denoiser):
            yield from _networks(child)
        else:
            yield child


@contextmanager
def _linearized(
    denoiser: Denoiser, x: Tensor, t: Time, cond: dict[str, Any]
) -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """Lend v -> J v and u -> J' u at x: (B, *), for blocks (q, B, *).

    Attention takes its plain form and half precision is widened, as neither fused kernels nor short
    numbers survive this. J v is the derivative of J' u by u: forward-mode differentiation fails in
    some layers of diffusers. Grad mode stays on, without which others refuse to be batched; the
    parameters are detached, so nothing is recorded for them.
    """
    state = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    half = any(v.dtype in _HALF for v in state.values())
    state = {k: _wide(v.detach()) for k, v in state.items()}

    def clean(x: Tensor) -> Tensor:
        return functional_call(denoiser, state, (x, t), cond).x0

    hooks = [  # conditions may be bound at any depth, and are in half precision too
        network.register_forward_pre_hook(
            lambda m, args, kwargs: (_wide(args), _wide(kwargs)), with_kwargs=True
        )
        for network in (_networks(denoiser) if half else ())
    ]
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            out, pull, *_ = vjp(clean, x.detach())
            _, push, *_ = vjp(lambda u: pull(u)[0], torch.zeros_like(out))
            yield (lambda v: push(v)[0].detach()), (lambda u: pull(u)[0].detach())
    finally:
        for hook in hooks:
            hook.remove()


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: expected float32 or float64")


def _frames(block: Tensor) -> Tensor:
    """Return a block of vectors, (q, B, *), orthonormal in every row."""
    q = torch.linalg.qr(block.flatten(2).permute(1, 2, 0)).Q  # (B, n, q)
    return q.permute(2, 0, 1).reshape(block.shape)


def jacobian_spectrum(
    denoiser: Denoiser,
    x: Tensor,
    t: Time,
    rank: int,
    *,
    steps: int = 20,
    extra: int = 4,
    chunk: int = 16,
    rng: torch.Generator | None = None,
    **cond: Any,
) -> Spectrum:
    """Return the `rank` leading singular values and vectors of d x0 / d x_t, without the matrix.

    Block power iteration: V <- qr(J' J V), `steps` times, at 2 (rank + extra) passes each. It
    converges as (S_{rank + extra + 1} / S_i)^(2 steps).

    Args:
        denoiser: predicts; half precision is computed in float32.
        x: (B, *) at level `t`, float32 or float64. A row knows nothing of its neighbors.
        t: () or (B,).
        rank: r, from 1 to the values of a row.
        steps: at least one.
        extra: further vectors carried along, for faster convergence of the last ones.
        chunk: vectors at once: memory against time.
        rng: draws the start, one for all rows; seed 0 by default.
        **cond: conditions.
    """
    _check(x)
    n = x[0].numel()
    check_whole("rank", rank, 1)
    check_whole("steps", steps, 1)
    check_whole("extra", extra, 0)
    check_whole("chunk", chunk, 1)
    if rank > n:
        raise ValueError(f"rank={rank} of {n} values a row: expected at most {n}")
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    size = (min(rank + extra, n), 1, *x.shape[1:])
    start = torch.randn(size, generator=rng, dtype=x.dtype, device=rng.device).to(x.device)
    block = _frames(start.expand(-1, *x.shape))
    with _linearized(denoiser, x, t, cond) as (push, pull):
        both = vmap(lambda v: pull(push(v)), chunk_size=chunk)
        for _ in range(steps):
            block = _frames(both(block))
        image = vmap(push, chunk_size=chunk)(block)
    columns = image.flatten(2).permute(1, 2, 0)  # (B, n, q)
    left, values, turn = torch.linalg.svd(columns, full_matrices=False)
    right = block.flatten(2).permute(1, 2, 0) @ turn.mT
    sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    left, right = ((side * sign).mT[:, :rank] for side in (left, right))
    shape = (len(x), rank, *x.shape[1:])
    return Spectrum(values[:, :rank], left.reshape(shape), right.reshape(shape))


def directions(denoiser: Denoiser, x: Tensor, t: Time, rank: int, **options: Any) -> Tensor:
    """Return the (B, rank, *) orthonormal directions in which x0 answers most to x: (B, *).

    The right singular vectors of `jacobian_spectrum`, which takes the `options`. Moving
    x_t <- x_t + a v and walking on edits what the picture has most freedom in at this level.
    """
    return jacobian_spectrum(denoiser, x, t, rank, **options).right


def jacobian(denoiser: Denoiser, x: Tensor, t: Time, *, chunk: int = 16, **cond: Any) -> Tensor:
    """Return the whole d x0 / d x_t of x: (B, *) as (B, n, n), at n backward passes."""
    _check(x)
    n = x[0].numel()
    eye = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, 1, *x.shape[1:])
    with _linearized(denoiser, x, t, cond) as (_, pull):
        rows = vmap(pull, chunk_size=chunk)(eye.expand(n, *x.shape))
    return rows.flatten(2).permute(1, 0, 2)


def numerical_rank(values: Tensor, share: float = 0.99, total: Tensor | None = None) -> Tensor:
    """Return the least r with sqrt(sum_{i <= r} S_i^2) >= share sqrt(sum_i S_i^2), (...).

    Mind that it is the norm that is to reach `share`: 98 % of the energy at the default.

    Args:
        values: (..., m) falling singular values, all of them or the leading ones.
        share: in (0, 1].
        total: (...) ||J||_F where `values` are only the leading ones.

    Raises:
        ValueError: the values given do not reach that far.
    """
    check_fraction("share", share)
    energy = values.double().square().cumsum(-1)
    whole = energy[..., -1] if total is None else total.double().square()
    reached = energy >= (share**2 * whole).unsqueeze(-1) * (1 - 1e-12)
    if not reached[..., -1].all():
        raise ValueError(
            f"{values.shape[-1]} values do not hold {share:g} of the norm: compute more of them"
        )
    return reached.long().argmax(-1) + 1
