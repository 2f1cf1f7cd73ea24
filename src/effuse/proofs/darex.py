"""Ways to prune a fine-tune's change: DARE, DAREx-q, magnitude, AdamR before them; same seeds.

A net trained on Fashion-MNIST is fine-tuned, at a large rate, to the same clothes on their side and
inverted; its change is pruned to a tenth, a twentieth, a hundredth.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.compress.prune.darex import Delta
from effuse.compress.prune.rescale import find_q
from effuse.ops.stats import paired
from effuse.optim import AdamR

from . import Claim, Evidence, Scale, proof
from ._optimizers import _seeded, clothes

RATES = (0.9, 0.95, 0.99)


def network() -> nn.Module:
    """Return a net of three linear layers."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def turned(x: Tensor) -> Tensor:
    """Return the pictures on their side and inverted."""
    return 0.4 - x.transpose(2, 3)


def learn(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int, seed: int) -> None:
    """Train on batches of 64."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(x), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()


@proof("darex")
def prove(scale: Scale) -> Evidence:
    """Train, fine-tune with Adam and with AdamR, prune, judge on pictures held out."""
    x, y, held, labels = clothes(scale)
    new, judged = turned(x), turned(held)
    steps = scale.pick(5, 300, 1000)
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, float], list[float]] = {}
    sizes: dict[str, list[float]] = {"Adam": [], "AdamR": []}
    for seed in range(scale.pick(1, 3, 5)):
        base = _seeded(network, seed)
        learn(base, torch.optim.Adam(base.parameters(), 1e-3), x, y, steps, seed)
        calls: list[Any] = [((new[1000 * seed : 1000 * seed + 64],), {})]  # without labels
        for name in ("Adam", "AdamR"):
            tuned = copy.deepcopy(base)
            optimizer = (
                torch.optim.Adam(tuned.parameters(), 3e-3)
                if name == "Adam"
                else AdamR(tuned.parameters(), lr=3e-3, weight_decay=1e-2)
            )
            learn(tuned, optimizer, new, y, steps, 50 + seed)
            delta = Delta.between(tuned, base)
            sizes[name].append(
                float(torch.cat([d.flatten() for _, d in delta.items()]).abs().mean())
            )

            def score(weights: Any, net: nn.Module = base) -> float:
                with torch.no_grad():
                    out = torch.func.functional_call(net, dict(weights), (judged,))
                return 100 * float((out.argmax(1) == labels).double().mean())

            scores.setdefault((f"{name}, whole", 0.0), []).append(score(tuned.state_dict()))
            scores.setdefault(("base", 1.0), []).append(score(base.state_dict()))
            for p in RATES:
                dare = delta.prune(p, seed=seed)
                found = find_q(dare, base, base, tuned, calls)
                rows.append({"seed": seed, "training": name, "p": p, "q": found.q, "dare_q": dare.q,
                             "bytes": dare.bytes})  # fmt: skip
                for way, pruned in (
                    ("DARE", dare),
                    ("DAREx-q", found),
                    ("magnitude", delta.prune(p, "magnitude")),
                ):
                    kept = score(pruned.apply(base))
                    scores.setdefault((f"{name}, {way}", p), []).append(kept)
    rows += [
        {"way": way, "p": p, "accuracy": sum(v) / len(v), "each": v}
        for (way, p), v in scores.items()
    ]
    rows.append({"mean_size_of_the_change": {k: sum(v) / len(v) for k, v in sizes.items()}})

    def against(text: str, ours: str, theirs: str, p: float, margin: float = 0.0) -> Claim:
        a, b = (torch.tensor(scores[way, p]).double() for way in (ours, theirs))
        difference, interval = paired(a, b)
        return Claim(
            text,
            float(b.mean()),
            float(a.mean()),
            "% right, held out",
            "higher",
            difference > margin,
            f"no more than {margin:g} points better",
            interval,
        )

    claims = [
        against("99 % dropped: DAREx-q keeps 10 points more than DARE", "Adam, DAREx-q",
                "Adam, DARE", 0.99, 10.0),
        against("99 % dropped: DAREx-q beats keeping the largest", "Adam, DAREx-q",
                "Adam, magnitude", 0.99),
        against("90 % dropped: DAREx-q beats keeping the largest", "Adam, DAREx-q",
                "Adam, magnitude", 0.9),
        against("90 % dropped: DAREx-q beats DARE", "Adam, DAREx-q", "Adam, DARE", 0.9),
        against("99 % dropped: AdamR and DARE beat Adam and DARE", "AdamR, DARE", "Adam, DARE",
                0.99),
    ]  # fmt: skip
    a, b = (torch.tensor(sizes[k]).double() for k in ("AdamR", "Adam"))
    claims.append(
        Claim("AdamR makes the change smaller", float(b.mean()), float(a.mean()),
              "mean |change| of a weight", "lower", bool(a.mean() < b.mean()), "no smaller",
              paired(a, b)[1])
    )  # fmt: skip
    return Evidence(
        claims,
        rows,
        "q is found on 64 pictures without labels, of the training part. AdamR's decay is 0.01 and "
        "was not tuned. Whole fine-tunes and the base alone are among the rows.",
    )
