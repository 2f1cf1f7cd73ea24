"""Ways to prune a fine-tune's change: DARE, DAREx-q, magnitude, AdamR before them; same seeds.

A net trained on Fashion-MNIST is fine-tuned, at a large rate, to the same clothes on their side and
inverted; its change is pruned to a tenth, a twentieth, a hundredth. And house:emoji is fine-tuned
to draw in gray, in all its weights and as a LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effuse
from effuse.compress.prune.darex import Delta
from effuse.compress.prune.rescale import find_q
from effuse.core.training import warmup_cosine
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
    if scale.size != "smoke":
        drawn, made = _pictures(scale)
        rows += drawn
        claims += made
    return Evidence(
        claims,
        rows,
        "q is found on 64 pictures without labels, of the training part. AdamR's decay is 0.01 and "
        "was not tuned. Whole fine-tunes and the base alone are among the rows. house:emoji in "
        "gray: errors are of pictures to the whole fine-tune's, from the same noise, on prompts "
        "that it was not tuned on, over the same error of the base alone (1: nothing is left of "
        "the fine-tune); q is found on network calls of the prompts it was tuned on.",
    )


# ---- a diffusion model


def _pictures(scale: Scale) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Fine-tune house:emoji to gray in three ways; prune each, and draw."""
    from effuse import house
    from effuse.compress.healing import own_samples

    pipe = house.load("emoji")
    model: Any = effuse.wrap(pipe)
    prompts = [p.text for p in house.prompts()]
    told, asked = prompts[0::2], prompts[1::2][: scale.pick(2, 6, 16)]
    drawn = own_samples(pipe, told, steps=scale.pick(2, 6, 10), seed=3)
    with torch.no_grad():
        shown = torch.cat([model.codec.decode(z) for z in drawn.clean.split(32)])
        gray = shown.clamp(0, 1).mean(1, keepdim=True).expand_as(shown)
        latents = torch.cat([model.codec.encode(x) for x in gray.split(32)])
    batches = replace(drawn, clean=latents)
    network = pipe.unet
    base = {k: v.detach().clone() for k, v in network.state_dict().items()}
    rng = torch.Generator().manual_seed(9)
    calls = [replace(batches, rows=8)(rng)["call"] for _ in range(scale.pick(1, 2, 3))]

    def draw(weights: Mapping[str, Tensor]) -> Tensor:
        network.load_state_dict({**base, **weights})
        noise = model.prior(len(asked), rng=torch.Generator().manual_seed(4))
        with torch.no_grad():
            found: Tensor = model.sample(asked, steps=10, latents=noise)
        return found

    rows: list[dict[str, Any]] = []
    errors: dict[tuple[str, str, float], Tensor] = {}
    first = draw({})
    for how, tuned, delta, size in _tunings(pipe, base, batches, scale):
        whole = draw(tuned)
        lost = (first - whole).square().mean((1, 2, 3)).double()
        head = {"fine_tune": f"house:emoji in gray, {how}"}
        rows.append(
            {**head, "way": "whole", "color": _color(whole), "color_of_the_base": _color(first)}
        )
        for p in (0.9, 0.99):
            dare = delta.prune(p, seed=1)
            ways = {
                "DARE": dare,
                "DAREx-q": find_q(dare, network, base, {**base, **tuned}, calls),
                "magnitude": delta.prune(p, "magnitude"),
            }
            for way, pruned in ways.items():
                x = draw(pruned.apply(base))
                errors[how, way, p] = (x - whole).square().mean((1, 2, 3)).double() / lost.mean()
                rows.append(
                    {
                        **head,
                        "way": way,
                        "p": p,
                        "q": pruned.q,
                        "bytes": pruned.bytes,
                        "bytes_of_the_fine_tune": size,
                        "error": float(errors[how, way, p].mean()),
                        "color": _color(x),
                    }
                )
        network.load_state_dict(base)
    claims = []
    for how, p in dict.fromkeys((how, p) for how, _, p in errors):
        ours = errors[how, "DAREx-q", p]
        for rival in ("DARE", "magnitude"):
            gain, interval = paired(errors[how, rival, p], ours)
            claims.append(
                Claim(
                    f"house:emoji in gray, {how}, {p:.0%} dropped: DAREx-q draws closer to the "
                    f"fine-tune than {rival}",
                    float(errors[how, rival, p].mean()),
                    float(ours.mean()),
                    "squared error over the base's",
                    "lower",
                    gain > 0 and interval[0] > 0,
                    "no closer, or by chance",
                    interval,
                )
            )
    return rows, claims


def _color(x: Tensor) -> float:
    """Return the mean difference of a pixel's largest and smallest channel."""
    return float((x.amax(1) - x.amin(1)).mean())


def _tunings(
    pipe: Any, base: Mapping[str, Tensor], batches: Any, scale: Scale
) -> Iterator[tuple[str, dict[str, Tensor], Delta, int]]:
    """Yield name, weights, change and bytes of a fine-tune with Adam, AdamR, and a LoRA."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    network, steps = pipe.unet, scale.pick(1, 60, 200)

    def tune(optimizer: Any) -> None:
        rng = torch.Generator().manual_seed(5)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("most", group["lr"]) * warmup_cosine()(step / steps)
            batch = batches(rng)
            args, kwargs = batch["call"]
            optimizer.zero_grad()
            F.mse_loss(network(*args, **kwargs)[0], batch["target"]).backward()
            optimizer.step()

    makers: dict[str, Any] = {
        "all weights with Adam": lambda p: torch.optim.Adam(p, 3e-4),
        "all weights with AdamR": lambda p: AdamR(p, lr=3e-4, weight_decay=1e-2),
    }
    for name, make in makers.items():
        network.load_state_dict(base)
        network.requires_grad_(True).train()
        tune(make(list(network.parameters())))
        network.eval().requires_grad_(False)
        tuned = {k: v.detach().clone() for k, v in network.state_dict().items()}
        yield name, tuned, Delta.between(tuned, base), sum(t.nbytes for t in tuned.values())
    network.load_state_dict(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        network.add_adapter(
            LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0",
                                                            "conv1", "conv2", "conv_out"])
        )  # fmt: skip
    tune(torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 3e-3))
    adapter = get_peft_model_state_dict(network)
    delta = Delta.of_lora(adapter)
    network.delete_adapters("default")
    pipe.unload_lora_weights()
    network.load_state_dict(base)
    tuned = {n: base[n] + d.float() for n, d in delta.items()}
    yield "a LoRA", tuned, delta, sum(t.nbytes for t in adapter.values())
