"""Data with known modes, where what a sampler invents can be counted: lines, lattices, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.core.contracts import Metric, Process
from effuse.core.errors import check_positive, check_whole
from effuse.core.exact import Mixture

from .quality import wilson


def line(process: Process, modes: Sequence[float] = (1.0, 2.0, 3.0), std: float = 0.05) -> Mixture:
    """Return narrow normals on the line: the data law, `draw`, and the exact denoiser in one."""
    return Mixture(process, torch.tensor(modes, dtype=torch.float64)[:, None], std)


def lattice(
    process: Process, side: int = 5, spacing: float = 2.0, std: float = 0.05, angle: float = 0.0
) -> Mixture:
    """Return side^2 narrow normals in the plane, turned by `angle` radians, at deviation one.

    Means and `std` are divided by sqrt(std^2 + spacing^2 (side^2 - 1) / 12), the deviation of a
    coordinate: sqrt(0.05^2 + 8) by default.
    """
    check_whole("side", side, 1)
    at = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    spread = math.sqrt(std**2 + spacing**2 * (side**2 - 1) / 12)
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    return Mixture(process, torch.cartesian_prod(at, at) @ turn.T / spread, std / spread)


class OffSupport(Metric):
    """Share of samples further than `reach` from every center: between the modes, or nowhere.

    Args:
        centers: (K, *) of the modes.
        reach: distance, above zero; four to six deviations of a mode.
    """

    name, unit, better = "off_support", "fraction", "lower"

    def __init__(self, centers: Tensor, reach: float):
        check_positive("reach", reach)
        self.centers, self.reach = centers.flatten(1).double(), reach
        self.found, self.count = 0, 0

    def strange(self, samples: Tensor) -> Tensor:
        """Return for each row of samples: (B, *) whether it is off, (B,) bool."""
        rows = samples.flatten(1).double()
        if rows.shape[1] != self.centers.shape[1]:
            raise ValueError(
                f"samples of {rows.shape[1]} values, centers of {self.centers.shape[1]}"
            )
        return torch.cdist(rows, self.centers.to(rows)).min(1).values > self.reach

    def update(self, samples: Tensor, reference: object = None) -> None:
        """Take in samples: (B, *)."""
        self.found += int(self.strange(samples).sum())
        self.count += len(samples)

    def compute(self) -> float:
        """Return the share."""
        if not self.count:
            raise ValueError("no samples: call update before compute")
        return self.found / self.count

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return Wilson's interval."""
        return wilson(self.compute(), self.count, level)

    def reset(self) -> None:
        """Forget all samples."""
        self.found, self.count = 0, 0


KINDS = ("triangle", "square", "pentagon")
SIDE, COLUMN = 64, 21


def templates() -> list[Tensor]:
    """Return the three shapes as 0 and 1, about 60 pixels each: (11, 11), (8, 8), (9, 10)."""
    rows = torch.arange(11)
    across = torch.arange(11) - 5
    triangle = across.abs() <= rows[:, None] // 2
    corner = 2 * math.pi * torch.arange(5) / 5
    normal = torch.stack([torch.sin(corner + math.pi / 5), -torch.cos(corner + math.pi / 5)], 1)
    at = torch.arange(10) - 4.5
    where = torch.stack(torch.meshgrid(at + 0.4, at, indexing="ij")[::-1], -1)
    pentagon = (where @ normal.T <= 5.05 * math.cos(math.pi / 5)).all(-1)
    return [triangle.float(), torch.ones(8, 8), pentagon[pentagon.any(1)].float()]


def shapes(count: int, *, rng: torch.Generator | None = None) -> Tensor:
    """Draw (count, 1, 64, 64) pictures of 0 and 1: each shape at most once, in its own column.

    Triangle, square and pentagon have a column of 21 pixels each; every one is there with a chance
    of a half, anywhere within its column; empty pictures are drawn again.
    """
    check_whole("count", count, 0)
    there = torch.rand(count, 3, generator=rng) < 0.5
    while (empty := ~there.any(1)).any():
        there[empty] = torch.rand(int(empty.sum()), 3, generator=rng) < 0.5
    out = torch.zeros(count, SIDE, SIDE)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for kind, shape in enumerate(templates()):
        h, w = shape.shape
        top, left = (
            torch.randint(room, (count, 1, 1), generator=rng)
            for room in (3 * COLUMN - h + 1, COLUMN - w + 1)
        )
        i, j = y - top, x - left - kind * COLUMN
        inside = (i >= 0) & (i < h) & (j >= 0) & (j < w) & there[:, kind, None, None]
        out = torch.where(inside, shape[i.clamp(0, h - 1), j.clamp(0, w - 1)].maximum(out), out)
    return out.unsqueeze(1)


class Counted(NamedTuple):
    """How many of each kind stand in each column, (B, 3, 3), and the ink no shape explains, (B,).

    Kinds are the rows. `ink` is in pixels.
    """

    counts: Tensor
    ink: Tensor

    @property
    def strange(self) -> Tensor:
        """(B,) bool: a shape twice, or in a column that is not its own."""
        own = torch.eye(3, dtype=torch.bool, device=self.counts.device)
        return (self.counts.sum(2) > 1).any(1) | (self.counts * ~own).flatten(1).any(1)


def count_shapes(pictures: Tensor, *, overlap: float = 0.8) -> Counted:
    """Find the shapes in pictures: (B, 1, 64, 64), dark 0 and bright 1, by their templates.

    A shape is where the intersection over union with its template, within the template's box and a
    border of one, is above `overlap` and above that of every template whose middle is nearer than
    six pixels.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (1, SIDE, SIDE):
        raise ValueError(f"pictures of shape {tuple(pictures.shape)}: expected (B, 1, 64, 64)")
    bright = (pictures > 0.5).float()
    maps = []
    size = 13  # the largest template and its border, all on one grid of middles
    for shape in templates():
        h, w = shape.shape
        up, left = (size - h) // 2, (size - w) // 2
        kernel = F.pad(shape, (left, size - w - left, up, size - h - up)).to(bright)
        box = F.pad(
            torch.ones(h + 2, w + 2),
            (left - 1, size - w - left - 1, up - 1, size - h - up - 1),
        ).to(bright)
        field = F.pad(bright, (size // 2,) * 4)
        both, seen = F.conv2d(field, torch.stack([kernel, box])[:, None]).split(1, 1)
        maps.append(both / (seen + kernel.sum() - both))
    found = torch.cat(maps, 1)  # (B, 3, 64, 64)
    # a tiny slope breaks ties, so that of equal neighbors or kinds one stands out
    ranked = found + 1e-7 * torch.arange(3 * SIDE**2).to(found).reshape(3, SIDE, SIDE)
    top = F.max_pool2d(ranked.amax(1, keepdim=True), 11, 1, 5)
    peak = (ranked == top) & (found > overlap)
    column = (torch.arange(SIDE, device=found.device) // COLUMN).clamp_max(2)
    per = peak.sum(2)  # (B, 3, 64)
    counts = torch.stack([per[..., column == c].sum(-1) for c in range(3)], -1)
    areas = torch.tensor([float(s.sum()) for s in templates()], device=found.device)
    ink = bright.flatten(1).sum(1) - (counts.sum(2) * areas).sum(1)
    return Counted(counts, ink)
