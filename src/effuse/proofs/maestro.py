"""Ordered low-rank training against SVD truncation and plain low-rank training, on real pictures.

A small convolutional net on Fashion-MNIST, every way with the same number of passes; and the
transformer of house:emoji-dit, cut by its SVD, healed with and without ordering.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effuse.compress.factorize.maestro import (
    Classes,
    Factored,
    LossOverRanks,
    Maestro,
    Numbers,
    recalibrate,
)
from effuse.compress.units import macs
from effuse.core.contracts import Loss, Objective
from effuse.core.training import fit, warmup_cosine
from effuse.ops.stats import paired

from . import Claim, Evidence, Scale, proof

SIZES = (0.5, 0.25, 0.1)
TUNING = 100  # seed of the tuning; 3 000 training pictures are set aside to judge by meanwhile
LEAST = 24
WAYS = ("SVD", "SVD, healed", "ordered, healed", "by answers", "by answers, healed")


def network(seed: int) -> nn.Sequential:
    """Return an untrained net: three convolutions with BatchNorm, two linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, 1, 1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(48, 96, 3, 1, 1), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(864, 128), nn.ReLU(), nn.Linear(128, 10)),
        )


class Clothes:
    """Pictures (N, 1, 28, 28) and classes; called with a generator, a batch for `fit`."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __call__(self, rng: torch.Generator) -> dict[str, Any]:
        """Draw a batch of 64."""
        some = torch.randint(len(self.x), (64,), generator=rng)
        return {"call": ((self.x[some],), {}), "target": self.y[some]}

    @torch.no_grad()
    def wrong(self, model: nn.Module) -> Tensor:
        """Return 1 where the class is told wrongly, (N,)."""
        model.eval()
        out = torch.cat([model(part) for part in self.x.split(500)])
        return (out.argmax(1) != self.y).double()

    def calls(self) -> list[Any]:
        """Return calls of 2 000 pictures."""
        return [((part,), {}) for part in self.x[:2000].split(250)]


class Plain(Objective):
    """Cross entropy of the network as it is."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def loss(self, player: str, batch: Any, *, rng: torch.Generator | None = None) -> Loss:
        """See `Objective.loss`."""
        args, kwargs = batch["call"]
        return Loss(F.cross_entropy(self.student(*args, **kwargs), batch["target"]))


def train(objective: Objective, data: Clothes, steps: int, lr: float, seed: int) -> None:
    """Train as all variants are: SGD with momentum, warm-up and cosine."""
    optimizer = torch.optim.SGD(
        objective.parameters_of("student"), lr, momentum=0.9, weight_decay=1e-4
    )
    rng = torch.Generator().manual_seed(seed)
    schedule = warmup_cosine(0.05)
    fit(objective, data, optimizer, steps=steps, rng=rng, schedule=schedule, progress=False)


def split(model: nn.Module, data: Clothes) -> Factored:
    """Return the handle of the network at full rank, its multiplications counted."""
    handle = Maestro(by="weights", least=LEAST).attach(model)
    model.eval()
    handle.count(data.calls()[:1])
    return handle


def sized(handle: Factored, keep: float, data: Clothes) -> Factored:
    """Return a copy cut to a size, with BatchNorm measured anew."""
    out = copy.deepcopy(handle)
    out.extract(keep)
    recalibrate(out.model, data.calls())
    return out


def dense(data: Clothes, steps: int, lr: float, seed: int) -> nn.Module:
    """Train the plain network."""
    model = network(seed)
    train(Plain(model), data, steps, lr, seed)
    return model


def ordered(
    data: Clothes, passes: int, lr: float, lasso: float, whole: bool, seed: int
) -> Factored:
    """Train with ordered dropout; with a whole pass in each step, half as many steps."""
    handle = split(network(seed), data)
    goal = handle.training(Classes(), lasso=lasso, whole=whole)
    train(goal, data, passes // (1 + whole), lr, seed)
    return handle


def unordered(data: Clothes, passes: int, lr: float, seed: int) -> Factored:
    """Train the factors without ordering."""
    handle = split(network(seed), data)
    train(handle.training(Classes(), lasso=0.0, sampling=None), data, passes, lr, seed)
    return handle


def scratch(data: Clothes, keep: float, passes: int, lr: float, seed: int) -> nn.Module:
    """Train a network that is small from the start."""
    model = sized(split(network(seed), data), keep, data).model
    train(Plain(model), data, passes, lr, seed)
    return model


def best(settings: list[Any], judge: Callable[[Any], float]) -> tuple[Any, dict[str, float]]:
    """Return the setting of the lowest error, and all errors."""
    found = {str(s): round(judge(s), 4) for s in settings}
    return min(settings, key=lambda s: found[str(s)]), found


def clothes(scale: Scale) -> tuple[Clothes, Clothes, Clothes, str]:
    """Return what is learned from, what tuning is judged by, what the result is judged by."""
    if scale.size == "smoke":
        rng = torch.Generator().manual_seed(0)
        made = [
            Clothes(
                torch.rand(256, 1, 28, 28, generator=rng),
                torch.randint(10, (256,), generator=rng),
            )
            for _ in range(3)
        ]
        return made[0], made[1], made[2], "Noise in the place of pictures: shows that it runs. "
    from effuse.house.debian import fashion

    found = fashion()
    x = found.train.float() / 255 - 0.3
    test = found.test.float() / 255 - 0.3
    count = scale.pick(0, 2000, 10000)
    return (
        Clothes(x[:-3000], found.train_labels[:-3000]),
        Clothes(x[-3000:], found.train_labels[-3000:]),
        Clothes(test[:count], found.test_labels[:count]),
        "",
    )


def tuned(
    data: Clothes, tuning: Clothes, passes: int, count: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of each way that is trained, and the errors they were chosen by."""

    def wrong(handle: Factored) -> float:
        return sum(float(tuning.wrong(sized(handle, k, data).model).mean()) for k in SIZES)

    def lost(s: tuple[float, float, bool]) -> float:
        return wrong(ordered(data, passes, *s, TUNING))

    rates = [0.1, 0.2, 0.4][:count]
    chosen: dict[str, Any] = {}
    told: dict[str, Any] = {}
    chosen["dense"], told["dense"] = best(
        rates, lambda lr: float(tuning.wrong(dense(data, passes, lr, TUNING)).mean())
    )
    chosen["factors"], told["factors"] = best(
        rates, lambda lr: wrong(unordered(data, passes, lr, TUNING))
    )
    chosen["scratch"], told["scratch"] = best(
        rates, lambda lr: float(tuning.wrong(scratch(data, SIZES[1], passes, lr, TUNING)).mean())
    )
    ways = [(lr, 0.0, both) for both in (True, False) for lr in rates]
    (lr, _, both), first = best(ways, lost)
    ways = [(lr, lasso, both) for lasso in (1e-6, 1e-5, 1e-4)[:count]]
    _, second = best(ways, lost)
    told["ordered"] = first | second
    chosen["ordered"] = min([(lr, 0.0, both), *ways], key=lambda s: told["ordered"][str(s)])
    told["chosen"] = {k: str(v) for k, v in chosen.items()}
    return chosen, told


@proof("maestro")
def prove(scale: Scale) -> Evidence:
    """Train, cut to three sizes, compare; then the transformer."""
    data, tuning, judged, note = clothes(scale)
    passes, healing = scale.pick(4, 200, 1200), scale.pick(2, 60, 300)
    chosen, told = tuned(data, tuning, passes // 2, scale.pick(1, 3, 3))
    rows: list[dict[str, Any]] = []
    errors: dict[tuple[str, float], list[Tensor]] = {}

    def note_down(way: str, keep: float, seed: int, model: nn.Module) -> None:
        each = judged.wrong(model)
        errors.setdefault((way, keep), []).append(each)
        call: Any = ((judged.x[:1],), {})
        with torch.no_grad():
            cost = macs(model, call)
        row = {"way": way, "keep": keep, "seed": seed, "error": float(each.mean()), "macs": cost}
        rows.append(row)

    for seed in scale.seeds:
        whole = dense(data, passes, chosen["dense"], seed)
        note_down("dense", 1.0, seed, whole)
        lr, lasso, both = chosen["ordered"]
        ours = ordered(data, passes, lr, lasso, both, seed)
        ways = {
            "ordered": ours,
            "dense, then SVD": split(copy.deepcopy(whole), data),
            "factors without order": unordered(data, passes, chosen["factors"], seed),
        }
        note_down("ordered", 1.0, seed, ours.model)
        rates = {"ordered": lr / 2, "dense, then SVD": chosen["dense"] / 2}
        for keep in SIZES:
            for way, handle in ways.items():
                small = sized(handle, keep, data)
                note_down(way, keep, seed, small.model)
                if way in rates:
                    train(Plain(small.model), data, healing, rates[way], seed + 50)
                    note_down(f"{way}, tuned", keep, seed, small.model)
            model = scratch(data, keep, passes + healing, chosen["scratch"], seed)
            note_down("low rank from scratch", keep, seed, model)
    claims = []
    pairs = (
        ("ordered", "dense, then SVD"),
        ("ordered", "factors without order"),
        ("ordered, tuned", "dense, then SVD, tuned"),
        ("ordered, tuned", "low rank from scratch"),
    )
    for keep in SIZES:
        for way, rival in pairs:
            a, b = (torch.stack(errors[w, keep]).mean(0) for w in (way, rival))
            _, interval = paired(a, b)
            claims.append(
                Claim(
                    f"{keep:.0%} of the factored products, {way}: fewer errors than {rival}",
                    float(b.mean()),
                    float(a.mean()),
                    "share of clothes told wrongly",
                    "lower",
                    interval[1] < 0,
                    "more, or the interval over pictures holds zero",
                    interval,
                )
            )
    claims += transformer(scale, rows)
    note += (
        f"Equal passes through the network, forward and backward: {passes}, and {healing} of "
        f"tuning where it says so, at half the rate. Settings of each way, chosen with seed "
        f"{TUNING} and half the passes on 3 000 training pictures, with their errors, of factors "
        f"summed over sizes, from scratch at {SIZES[1]:.0%}: {told}; ordered: rate, lasso, and "
        "whether each step passes the whole network too. "
        "Sizes are shares of the multiplications of the layers of at least "
        f"{LEAST} in- and outputs; `macs` counts the whole net. The paper trains 300 epochs."
    )
    return Evidence(claims, rows, note)


def heal(objective: Objective, calls: list[Any], steps: int) -> None:
    """Train on recorded calls; Adam at one rate."""
    optimizer = torch.optim.Adam(objective.parameters_of("student"), 2e-4)
    fit(
        objective,
        [{"call": c} for c in calls],
        optimizer,
        steps=steps,
        schedule=warmup_cosine(0.05),
        progress=False,
    )


def transformer(scale: Scale, rows: list[dict[str, Any]]) -> list[Claim]:
    """Cut house:emoji-dit; judge its answers on calls that nothing was learned from."""
    if scale.size == "smoke":
        return []
    import effuse
    from effuse.compress.calibrate import uniform_calls

    pipe = effuse.load("house:emoji-dit")
    passes = scale.pick(0, 24, 240)
    learned, held = (
        [b["call"] for b in uniform_calls(pipe, n, count=n, batch=8, steps=8, seed=seed)]
        for n, seed in ((scale.pick(0, 16, 128), 1), (scale.pick(0, 16, 32), 2))
    )
    original = pipe.transformer.eval()

    @torch.no_grad()
    def error(model: nn.Module) -> Tensor:
        out = []
        for args, kwargs in held:
            a, b = (m(*args, **kwargs)[0].double().flatten(1) for m in (model, original))
            out.append((a - b).square().sum(1) / b.square().sum(1))
        return torch.cat(out)

    with torch.no_grad():
        before = macs(original, held[0])
    claims = []
    whole = Maestro(by="answers").attach(copy.deepcopy(original))
    whole.count(learned[:24])
    whole.split(learned[:24])
    whole.judge(learned[:24])
    for keep in scale.pick((0.6,), (0.6,), (0.8, 0.6)):
        found: dict[str, Tensor] = {}
        for way in WAYS:
            teacher = copy.deepcopy(original)
            if "answers" in way:
                handle = copy.deepcopy(whole)
            else:
                handle = Maestro(by="weights").attach(copy.deepcopy(original))
            model, left = handle.model, passes if "healed" in way else 0
            if way == "ordered, healed":  # two passes a step
                heal(
                    LossOverRanks(model, Numbers(), lasso=0.0, teacher=teacher), learned, left // 4
                )
                left -= 2 * (left // 4)
            if "answers" not in way:
                handle.count(learned[:24])
            handle.extract(keep)
            if left:
                heal(handle.objective(teacher), learned, left)
            found[way] = error(model.eval())
            with torch.no_grad():
                cost = macs(model, held[0]) / before
            told = handle.report()
            rows.append(
                {
                    "way": f"house:emoji-dit, {way}",
                    "keep": keep,
                    "error": float(found[way].mean()),
                    "macs_share": cost,
                    "bytes_share": told["bytes"] / told["bytes_before"],
                }
            )
        for way, rival in (
            ("SVD, healed", "SVD"),
            ("ordered, healed", "SVD, healed"),
            ("by answers", "SVD"),
            ("by answers, healed", "SVD, healed"),
            ("by answers, healed", "ordered, healed"),
        ):
            _, interval = paired(found[way], found[rival])
            claims.append(
                Claim(
                    f"house:emoji-dit at {keep:.0%} of the factored products: {way} is nearer to "
                    f"the original than {rival}",
                    float(found[rival].mean()),
                    float(found[way].mean()),
                    "relative squared error of an answer, own samples not learned from",
                    "lower",
                    interval[1] < 0,
                    "it is not, or the interval over calls holds zero",
                    interval,
                )
            )
    return claims
