"""The pictures of the guide, drawn from the code itself: `python -m effuse.figures`.

Paths of solvers on a ring of modes, stability regions, and the error against calls that
`effuse prove schedulers` measured. Written into docs/figures as SVG.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effuse.core import Mixture, Solver, sample
from effuse.core.files import write_whole
from effuse.processes import Linear, Tapered, Uniform
from effuse.solvers import DDIM, Ancestral
from effuse.solvers.momentum import HeavyBall, Momentum
from effuse.solvers.plms import PLMS
from effuse.solvers.stability import Linear as Multistep
from effuse.solvers.stability import growth

INK, RULE = "#4a4a4a", "#d9d9d9"
COLORS = ("#b5541c", "#00706a", "#5a4fcf", "#8a6d00")


def _axes(columns: int, width: float = 3.1, height: float = 3.1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "effuse",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False
    )
    return figure, axes[0]


def trajectories() -> Any:
    """Draw the paths of four solvers from the same noise, in eight steps, beside the true ones."""
    angle = torch.arange(8) * torch.pi / 4
    process = Linear()
    model = Mixture(process, torch.stack([angle.cos(), angle.sin()], 1), 0.08)
    noise = process.prior((24, 2), rng=torch.Generator().manual_seed(3), dtype=torch.float64)

    def path(solver: Solver, times: torch.Tensor) -> np.ndarray:
        out = [noise]
        rng = torch.Generator().manual_seed(0)
        sample(model, solver, noise, times, rng=rng, on_step=lambda i, s, step: out.append(step.x))
        return torch.stack(out).numpy()

    true = path(PLMS(4), Tapered()(process, 400))
    figure, axes = _axes(4)
    shown: dict[str, tuple[Solver, torch.Tensor]] = {
        "DDIM, even levels": (DDIM(), Uniform()(process, 8)),
        "DDIM, tapered": (DDIM(), Tapered()(process, 8)),
        "PLMS, tapered": (PLMS(), Tapered()(process, 8)),
        "ancestral, tapered": (Ancestral(), Tapered()(process, 8)),
    }
    for axis, (name, (solver, times)), color in zip(axes, shown.items(), COLORS, strict=True):
        taken = path(solver, times)
        axis.plot(true[..., 0], true[..., 1], color=RULE, lw=1)
        axis.plot(taken[..., 0], taken[..., 1], color=color, lw=0.8, marker=".", ms=3)
        axis.scatter(*model.means.T.numpy(), s=60, facecolors="none", edgecolors=INK, lw=0.8)
        axis.set(title=name, aspect="equal", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    return figure


def stability() -> Any:
    """Draw where a step of y' = l y stays bounded, |roots| <= 1, in the plane of h l."""
    re, im = np.meshgrid(np.linspace(-4.5, 0.5, 240), np.linspace(-2.5, 2.5, 240))
    figure, axes = _axes(3, height=2.9)
    families: tuple[tuple[str, tuple[tuple[str, Multistep], ...]], ...] = (
        ("PLMS", tuple((f"order {k}", PLMS(k)) for k in (1, 2, 3, 4))),
        ("momentum, order 2", tuple((f"beta {b:g}", Momentum(2, b)) for b in (1.0, 0.8, 0.5))),
        (
            "heavy ball on PLMS 2",
            tuple((f"beta {b:g}", HeavyBall(b, PLMS(2))) for b in (1.0, 0.8, 0.6)),
        ),
    )
    for axis, (title, members) in zip(axes, families, strict=True):
        for (name, solver), color in zip(members, COLORS, strict=False):
            roots = growth(solver, torch.as_tensor(re + 1j * im)).numpy()
            axis.contour(re, im, roots, levels=[1.0], colors=[color], linewidths=1.4)
            axis.plot([], [], color=color, label=name)
        axis.axhline(0, color=RULE, lw=0.6, zorder=0)
        axis.axvline(0, color=RULE, lw=0.6, zorder=0)
        axis.set(title=title, xlabel="Re h l", ylabel="Im h l" if axis is axes[0] else None)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def error_against_calls() -> Any:
    """Draw the error of the deviation and W2 on the ring against calls, theirs beside ours."""
    rows = json.loads(Path("evidence/schedulers.json").read_text())["rows"]
    board = [r for r in rows if r["part"] == "board"]
    chosen = (
        ("diffusers", "DDIMScheduler", "DDIM, diffusers", COLORS[0], "--"),
        ("diffusers", "DPMSolverMultistepScheduler", "DPM++ 2M, diffusers", COLORS[1], "--"),
        ("diffusers", "UniPCMultistepScheduler", "UniPC, diffusers", COLORS[2], "--"),
        ("effuse, tapered", "DDIM", "DDIM, tapered", COLORS[0], "-"),
        ("effuse, tapered", "DPMpp2M", "DPM++ 2M, tapered", COLORS[1], "-"),
        ("effuse, tapered", "UniPC", "UniPC, tapered", COLORS[2], "-"),
        ("effuse", "PLMS", "PLMS, tapered", COLORS[3], "-"),
    )
    figure, axes = _axes(2, width=4.6)
    for of, name, label, color, line in chosen:
        mine = [r for r in board if r["of"] == of and r["scheduler"] == name]
        calls = [r["calls"] for r in mine]
        axes[0].plot(calls, [abs(r["std_error"]) for r in mine], line, color=color, label=label)
        axes[1].plot(calls, [r["ring_w2"] for r in mine], line, color=color)
    for axis, title in zip(
        axes, ("Gaussian data: error of the deviation", "ring of modes: sliced W2"), strict=True
    ):
        axis.set(title=title, xlabel="calls of the network", xscale="log", yscale="log")
        axis.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
        axis.minorticks_off()
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "trajectories": trajectories,
    "stability": stability,
    "calls": error_against_calls,
}


def main(folder: Path = Path("docs/figures")) -> int:
    """Draw all of them into `folder`."""
    import io

    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        file = io.StringIO()
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        write_whole(folder / f"{name}.svg", file.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
