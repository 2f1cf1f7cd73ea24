"""Subspaces of data: random ones, PCA, K-subspaces, and how far found ones are from the true."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effuse.core.errors import check_whole
from effuse.core.exact import ranks_of

COMPLETION = 0x5EED
"""Seed of what data leave open."""


def random_bases(
    dim: int,
    ranks: Sequence[int],
    *,
    mutual: bool = True,
    stack: Sequence[int] = (),
    rng: torch.Generator | None = None,
) -> Tensor:
    """Draw orthonormal bases (*stack, K, dim, max rank), float64, of uniformly random subspaces.

    Args:
        dim: n, of the space.
        ranks: d_k of each; bases of a lower rank than the highest end in columns of zeros.
        mutual: whether the subspaces are orthogonal to each other too.
        stack: how many sets.
        rng: draws them.

    Raises:
        ValueError: they do not fit into the space.
    """
    ranks = [int(r) for r in ranks]
    need = sum(ranks) if mutual else max(ranks)
    if not ranks or min(ranks) < 0 or need > dim:
        how = "orthogonal to each other, sum of ranks" if mutual else "largest rank"
        raise ValueError(f"ranks={ranks} in {dim} dimensions: expected {how} at most {dim}")
    if mutual:
        noise = torch.randn(*stack, dim, need, generator=rng, dtype=torch.float64)
        parts = list(torch.linalg.qr(noise).Q.split(ranks, -1))
    else:
        noise = torch.randn(len(ranks), *stack, dim, need, generator=rng, dtype=torch.float64)
        parts = [q[..., :r] for q, r in zip(torch.linalg.qr(noise).Q, ranks, strict=True)]
    widest = max(ranks)
    return torch.stack([nn.functional.pad(p, (0, widest - p.shape[-1])) for p in parts], -3)


def principal(x: Tensor, rank: int, *, rng: torch.Generator | None = None) -> Tensor:
    """Return the basis (..., n, rank) that captures most of x: (..., N, n), PCA without a mean.

    max_U sum_i ||U' x_i||^2: the leading right singular vectors. Data of a lower rank leave the
    last ones open; they are completed at random from `rng`, one of its own by default: of the seed
    that drew the data it would give the answer away.
    """
    n = x.shape[-1]
    if rank > n:
        raise ValueError(f"rank={rank} in {n} dimensions: expected at most {n}")
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    found = vt.mT[..., :rank]
    kept = min(rank, s.shape[-1])
    floor = torch.finfo(x.dtype).eps * max(x.shape[-2:]) * s[..., :1]
    alive = torch.zeros(*x.shape[:-2], rank, dtype=torch.bool, device=x.device)
    alive[..., :kept] = s[..., :kept] > floor
    if alive.all():
        return found
    found = nn.functional.pad(found, (0, rank - kept))
    rng = torch.Generator().manual_seed(COMPLETION) if rng is None else rng
    other = torch.randn(found.shape, generator=rng, dtype=x.dtype, device=rng.device).to(x.device)
    # in this order, so the first columns stay what they are
    return torch.linalg.qr(torch.where(alive.unsqueeze(-2), found, other)).Q


@dataclass(frozen=True)
class Clustering:
    """What K-subspaces found.

    bases: (*M, K, n, d); labels: (*M, N) the subspace that captures a point best;
    captured: (*M,) sum_i max_k ||U_k' x_i||^2, of the best restart.
    """

    bases: Tensor
    labels: Tensor
    captured: Tensor


def _captured(x: Tensor, bases: Tensor) -> Tensor:
    """Return ||U_k' x_i||^2, (..., N, K), of x: (..., N, n) and bases: (..., K, n, d)."""
    return (x.unsqueeze(-3) @ bases).square().sum(-1).mT


Start = Callable[[Tensor, Sequence[int], int, torch.Generator | None], Tensor]
"""Takes x: (*M, N, n), ranks, restarts and rng; returns bases (restarts, *M, K, n, d)."""


def random_start(
    x: Tensor, ranks: Sequence[int], restarts: int, rng: torch.Generator | None = None
) -> Tensor:
    """Begin with uniformly random subspaces."""
    stack = (restarts, *x.shape[:-2])
    return random_bases(x.shape[-1], ranks, mutual=False, stack=stack, rng=rng).to(x)


def spectral_start(
    x: Tensor, ranks: Sequence[int], restarts: int, rng: torch.Generator | None = None
) -> Tensor:
    """Begin with the clusters of the leading eigenvectors of the affinity cos(x_i, x_j)^2.

    Its K eigenvectors, weighed by degree, place each point on a sphere; points join the nearest of
    K pivots: a random one first, then always the one furthest from those before. Each restart is
    another draw of the first pivot, and of which cluster has which rank.
    """
    count = len(ranks)
    unit = nn.functional.normalize(x, dim=-1)
    affinity = (unit @ unit.mT).square()
    root = affinity.sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    vectors = torch.linalg.eigh(root * affinity * root.mT).eigenvectors[..., -count:]
    there = (x.abs().amax(-1) > 0).to(x)  # (*M, N)
    place = nn.functional.normalize(vectors, dim=-1) * there.unsqueeze(-1)
    place = place.expand(restarts, *place.shape)
    chances = (there.cpu() + 1e-9).expand(restarts, *there.shape).flatten(0, -2)
    pivot = torch.multinomial(chances, 1, generator=rng).to(x.device)
    pivot = pivot.reshape(*place.shape[:-2], 1, 1)
    nearness: list[Tensor] = []
    for _ in ranks:
        chosen = place.gather(-2, pivot.expand(*pivot.shape[:-1], count))
        nearness.append((place @ chosen.mT).squeeze(-1))
        taken = torch.stack(nearness).amax(0) + 2 * (1 - there)  # rows of zeros are no pivots
        pivot = taken.argmin(-1)[..., None, None]
    turn = torch.rand(*place.shape[:-2], count, generator=rng).argsort(-1).to(x.device)
    labels = turn.gather(-1, torch.stack(nearness, -1).argmax(-1))
    return _fitted(x.expand(restarts, *x.shape), labels, ranks, rng)


def _fitted(x: Tensor, labels: Tensor, ranks: Sequence[int], rng: torch.Generator | None) -> Tensor:
    """Return the best bases (..., K, n, d) of the points x: (..., N, n) of each label: (..., N)."""
    count, most = len(ranks), max(ranks)
    own = labels.unsqueeze(-2) == torch.arange(count, device=x.device).unsqueeze(-1)
    bases = principal(x.unsqueeze(-3) * own.unsqueeze(-1), most, rng=rng)
    limit = torch.tensor(list(ranks), device=x.device).unsqueeze(-1)
    return bases * (torch.arange(most, device=x.device) < limit).unsqueeze(-2)


@torch.no_grad()
def subspace_cluster(
    x: Tensor,
    ranks: Sequence[int],
    *,
    restarts: int = 20,
    steps: int = 100,
    start: Start = spectral_start,
    rng: torch.Generator | None = None,
) -> Clustering:
    """Cluster x: (*M, N, n) into len(ranks) subspaces through the origin, by K-subspaces.

    Assign each point to argmax_k ||U_k' x||; U_k = leading singular vectors of its points; repeat
    until nothing moves. Both halves raise sum_i max_k ||U_k' x_i||^2, to a local optimum, so it is
    begun `restarts` times and the best is kept. Rows of zeros count for nothing.

    Args:
        x: the points, one set or many of one size side by side.
        ranks: d_k of each subspace.
        restarts: at least one.
        steps: at most.
        start: where to begin, `spectral_start` or `random_start`.
        rng: draws the starts.
    """
    check_whole("restarts", restarts, 1)
    check_whole("steps", steps, 1)
    stack, count = x.shape[:-2], x.shape[-2]
    bases = start(x, ranks, restarts, rng)
    flat = bases.flatten(0, -4)  # (R * M, K, n, d)
    points = x.expand(restarts, *x.shape).reshape(-1, *x.shape[-2:])
    labels = torch.full((len(flat), count), -1, device=x.device)
    moving = torch.arange(len(flat), device=x.device)
    for _ in range(steps):
        now = _captured(points[moving], flat[moving]).argmax(-1)
        moved = (now != labels[moving]).any(-1)
        labels[moving] = now
        moving = moving[moved]
        if not len(moving):
            break
        flat[moving] = _fitted(points[moving], labels[moving], ranks, rng)
    energy, labels = _captured(points, flat).max(-1)
    total = energy.sum(-1).reshape(restarts, -1)
    best = total.argmax(0)
    sets = torch.arange(total.shape[1], device=x.device)
    return Clustering(
        flat.reshape(restarts, -1, *flat.shape[1:])[best, sets].reshape(*stack, *flat.shape[1:]),
        labels.reshape(restarts, -1, count)[best, sets].reshape(*stack, count),
        total[best, sets].reshape(stack),
    )


def recovery_error(found: Tensor, true: Tensor) -> Tensor:
    """Return how far subspaces are from the true ones, (*M,): 0 if they are the same.

    min over permutations p of max_k ||U_p(k) U_p(k)' - V_k V_k'||_F, exactly, as the smallest bound
    within which all can be paired. One direction of a subspace missed costs sqrt(2).

    Args:
        found: (*M, K, n, d) orthonormal bases; columns of zeros for a lower rank.
        true: (*M, K, n, d') the same.
    """
    if found.shape[:-1] != true.shape[:-1]:
        raise ValueError(
            f"bases of {tuple(found.shape)} beside {tuple(true.shape)}: expected as many subspaces "
            "of one space"
        )
    true = true.to(found)
    overlap = (found.unsqueeze(-3).mT @ true.unsqueeze(-4)).square().sum((-2, -1))  # (*M, K, K)
    ranks = ranks_of(found).unsqueeze(-1) + ranks_of(true).unsqueeze(-2)
    gap = (ranks - 2 * overlap).clamp_min(0).sqrt()
    each = [_bottleneck(g) for g in gap.reshape(-1, *gap.shape[-2:])]
    return torch.tensor(each, dtype=found.dtype).reshape(gap.shape[:-2])


def _bottleneck(cost: Tensor) -> float:
    """Return the smallest bound such that rows and columns pair off within it."""
    from scipy.optimize import linear_sum_assignment

    bounds = cost.flatten().unique()
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        beyond = (cost > bounds[middle]).long().numpy()
        rows, columns = linear_sum_assignment(beyond)
        if beyond[rows, columns].any():
            low = middle + 1
        else:
            high = middle
    return float(bounds[low])


def min_samples(ranks: Sequence[int], weights: Sequence[float] | None = None) -> int:
    """Return how many samples the subspaces need: N_k >= d_k of each.

    sum d_k where the classes come in that proportion; with `weights` pi_k, the expected counts
    pi_k N have to reach d_k: N = ceil(max d_k / pi_k).
    """
    if weights is None:
        return sum(ranks)
    if len(weights) != len(ranks) or min(weights) <= 0:
        raise ValueError(f"weights={list(weights)}: expected {len(ranks)} positive numbers")
    total = sum(weights)
    need = max(d * total / w for d, w in zip(ranks, weights, strict=True))
    return math.ceil(need - 1e-9)
