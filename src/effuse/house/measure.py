"""Measures the shipped weights and writes card.json: `python -m effuse.house.measure`.

Needs the real pictures; everything in the card is computed here, nothing is typed in but where
the data come from and how long the training took.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effuse.core.files import write_whole
from effuse.house import data, real, store
from effuse.house.examples import prompts

GUIDANCE, STEPS = 4.0, 20


def network() -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Return the feature function (B, 3, 64, 64) in [0, 1] to (B, 1280), and its settings."""
    from effuse.evaluate.features import EfficientNetFeatures

    extractor = EfficientNetFeatures()
    told = {"network": extractor.name, "class": "effuse.evaluate.features.EfficientNetFeatures"}
    return extractor, told | {"size": extractor.size}


def autoencoder(pictures: data.Pictures) -> dict[str, float]:
    """Return the reconstruction of held-out pictures: mean of dB a picture, and dB of the mean."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(store.part("autoencoder")).float().eval()
    some = pictures.held & ~pictures.toned
    x = torch.from_numpy(pictures.images[some]).float() / 127.5 - 1
    with torch.no_grad():
        y = torch.cat([model(part).sample for part in x.split(32)]).clamp(-1, 1)
    error = ((y - x) / 2).square().mean((1, 2, 3)).double()
    return {
        "psnr_mean_of_db": float(-10 * error.log10().mean()),
        "psnr_db_of_mean": float(-10 * error.mean().log10()),
        "count": int(some.sum()),
    }


def draw(pipe: Any, texts: Sequence[str], seed: int, **more: Any) -> Tensor:
    """Return pictures (B, 3, 64, 64) of texts; the noise of each depends on seed and place."""
    out = []
    for first in range(0, len(texts), 50):
        part = list(texts[first : first + 50])
        rng = [torch.Generator().manual_seed(seed + first + k) for k in range(len(part))]
        out.append(
            pipe(
                part,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=rng,
                output_type="pt",
                **more,
            ).images
        )
    return torch.cat(out)


def emoji(pictures: data.Pictures, count: int) -> dict[str, Any]:
    """Return retrieval on real held-out pictures and on generated ones, and the ratio."""
    judge, pipe = store.image_text(), store.pipeline("emoji")
    names = real.every_name(pictures)

    def group(which: Sequence[int]) -> list[str]:
        return [pictures.subgroups[pictures.subgroup[k]] for k in which]

    held = [k for k in range(len(pictures)) if pictures.held[k] and not pictures.toned[k]]
    weight = torch.from_numpy(pictures.weight) * ~torch.from_numpy(pictures.toned)
    rng = torch.Generator().manual_seed(1)
    seen = torch.multinomial(weight, count, generator=rng).tolist()

    def truth(which: list[int]) -> dict[str, Any]:
        x = torch.from_numpy(pictures.images[which]).float() / 255
        texts = [pictures.captions[k][0] for k in which]
        score = float(judge.score(x, texts).mean())
        return real.retrieval(judge, x, group(which), names) | {"score": score}

    def made(which: list[int], seed: int) -> dict[str, Any]:
        texts = [pictures.captions[k][0] for k in which]
        x = draw(pipe, texts, seed)
        score = float(judge.score(x, texts).mean())
        return real.retrieval(judge, x, group(which), names) | {"score": score}

    common = [p for p in prompts() if not p.held]
    texts = [p.text for p in common] * 4
    x = draw(pipe, texts, 7000)
    out: dict[str, Any] = {
        "guidance": GUIDANCE,
        "steps": STEPS,
        "real_held_out": truth(held),
        "real_seen": truth(seen),
        "generated": made(seen, 1000),
        "generated_held_out": made(held, 5000),
        "common_prompts": real.retrieval(judge, x, [p.subgroup for p in common] * 4, names)
        | {"score": float(judge.score(x, texts).mean())},
    }
    top = "subgroup_top1"
    out["ratio_generated_to_real_held_out"] = out["generated"][top] / out["real_held_out"][top]
    out["ratio_generated_to_real_seen"] = out["generated"][top] / out["real_seen"][top]
    out["ratio_held_out_to_real_held_out"] = (
        out["generated_held_out"][top] / out["real_held_out"][top]
    )
    return out


def emoji_dit(pictures: data.Pictures, count: int) -> dict[str, Any]:
    """Return retrieval on pictures of the DiT pipeline, classes drawn as in training."""
    judge, pipe = store.image_text(), store.pipeline("emoji-dit")
    share = torch.zeros(len(pictures.subgroups), dtype=torch.float64)
    share.index_add_(0, torch.from_numpy(pictures.subgroup), torch.from_numpy(pictures.weight))
    rng = torch.Generator().manual_seed(2)
    labels = torch.multinomial(share, count, replacement=True, generator=rng).tolist()
    x = draw(pipe, labels, 9000)
    groups = [pictures.subgroups[k] for k in labels]
    found = real.retrieval(judge, x, groups, real.every_name(pictures))
    return {"guidance": GUIDANCE, "steps": STEPS, "generated": found}


@torch.no_grad()
def restorer(pictures: data.Pictures, calls: int = 10) -> dict[str, Any]:
    """Return the PSNR of held-out pictures, degraded and restored, by task; mean of dB a picture.

    restored_db: as `Restorer.restore` does it by default; calm_db: by the posterior sampler.
    """
    from effuse.house.degrade import TASKS, degrade
    from effuse.solvers import Ancestral

    model = store.restorer(torch.bfloat16)
    x0 = torch.from_numpy(pictures.images[pictures.held & ~pictures.toned]).float() / 255
    out: dict[str, Any] = {"calls": calls, "count": len(x0)}
    for k, task in enumerate(TASKS):
        rng = torch.Generator().manual_seed(k)
        mu = degrade(x0, torch.full((len(x0),), k), rng)
        found = {"degraded_db": mu}
        for name, solver in (("restored_db", None), ("calm_db", Ancestral())):
            parts = [model.restore(m, solver, steps=calls, rng=rng) for m in mu.split(16)]
            found[name] = torch.cat(parts)
        out[task] = {
            name: float(-10 * (y - x0).square().mean((1, 2, 3)).double().log10().mean())
            for name, y in found.items()
        }
    return out


def files() -> dict[str, dict[str, Any]]:
    """Return size and hash of each shipped file."""
    out = {}
    for file in sorted(store.WEIGHTS.rglob("*")):
        if file.is_file() and file.name != "card.json":
            content = file.read_bytes()
            name = file.relative_to(store.WEIGHTS).as_posix()
            out[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return out


def parameters() -> dict[str, int]:
    """Return the number of weights of each part."""
    from safetensors import safe_open

    out: dict[str, int] = {}
    for file in sorted(store.WEIGHTS.rglob("*.safetensors")):
        part = file.relative_to(store.WEIGHTS).parts[0]
        if part != "reference":
            with safe_open(file, "pt") as tensors:
                for key in list(tensors.keys()):
                    shape = tensors.get_slice(key).get_shape()
                    out[part] = out.get(part, 0) + torch.Size(shape).numel()
    return out


def _percent(found: dict[str, Any]) -> str:
    top, half = 100 * found["subgroup_top1"], 100 * found["half_width"]
    return f"{top:.1f} +- {half:.1f} % (n = {found['count']})"


def page(card: dict[str, Any]) -> str:
    """Return the model cards as Markdown; every figure comes from the card."""
    figures, training, weights = card["figures"], card["training"], card["parameters"]
    psnr, drawn, dit = figures["autoencoder"], figures["emoji"], figures["emoji-dit"]
    size = sum(f["bytes"] for f in card["files"].values()) / 1e6
    rows = [
        ("house:clip", "CLIPModel", "clip"),
        ("(autoencoder)", "AutoencoderKL", "autoencoder"),
        ("house:emoji", "StableDiffusionPipeline, UNet2DConditionModel", "emoji"),
        ("house:emoji-dit", "DiTPipeline, DiTTransformer2DModel", "emoji-dit"),
        ("house:pixels", "DDPMPipeline, UNet2DModel", "pixels"),
        ("house:restore", "UNet2DModel in a Restorer", "restore"),
    ]
    table = [
        f"| {name} | {kind} | {weights[part] / 1e6:.2f}M | {training[part]['steps']} x "
        f"{training[part]['batch']} | {training[part]['minutes']:.0f} | {training[part]['note']} |"
        for name, kind, part in rows
    ]
    restored = figures["restore"]
    tasks = [
        f"| house:restore, {name}, held-out pictures (n = {restored['count']}), PSNR before, after "
        f"{restored['calls']} calls of MRS, of the posterior sampler | {f['degraded_db']:.1f}, "
        f"{f['restored_db']:.1f}, {f['calm_db']:.1f} dB |"
        for name, f in restored.items()
        if isinstance(f, dict)
    ]
    sources = [
        f"| {d['style']} | `{d['package']}` | {d['license']} | {d['credit']} |"
        for d in card["data"]
    ]
    lines = [
        "# The house pipelines",
        "",
        "Written by `python -m effuse.house.measure` from `weights/card.json`; do not edit.",
        "",
        f"Weights in half precision, {size:.1f} MB in all with the reference. Trained on two CPU",
        "cores, one core a run, shared with other work: minutes are of the clock.",
        "",
        "| pipeline | classes | weights | steps x batch | minutes | note |",
        "| --- | --- | --- | --- | --- | --- |",
        *table,
        "",
        "Pictures are 64 x 64 (house:pixels 32 x 32). The scheduler is DDIM with linear noise,",
        "v-prediction and trailing steps (house:pixels: DDPM, epsilon). Autoencoder factor 4;",
        "latents have mean 0 and deviation 1 a channel, folded into its 1x1 layers, so",
        "`scaling_factor` is 1. house:restore answers the velocity of the mean-reverting process,",
        "and takes any size divisible by 4; `effuse.house.restorer()` loads it.",
        "",
        "## Measured",
        "",
        "Retrieval: the name nearest to the picture, of all "
        f"{len(real.load().names)} names, is of the right one of 99 subgroups.",
        f"Pictures are drawn with {drawn['steps']} DDIM steps and guidance {drawn['guidance']:g}.",
        "",
        "| what | figure |",
        "| --- | --- |",
        f"| autoencoder, held-out pictures (n = {psnr['count']}), mean of the pictures' PSNR "
        f"| {psnr['psnr_mean_of_db']:.1f} dB |",
        f"| the same, PSNR of the mean squared error | {psnr['psnr_db_of_mean']:.1f} dB |",
        f"| retrieval, real held-out pictures | {_percent(drawn['real_held_out'])} |",
        f"| retrieval, real pictures seen in training | {_percent(drawn['real_seen'])} |",
        "| retrieval, house:emoji on the captions of those seen "
        f"| {_percent(drawn['generated'])} |",
        "| retrieval, house:emoji on held-out recombinations "
        f"| {_percent(drawn['generated_held_out'])} |",
        f"| retrieval, house:emoji on common prompts | {_percent(drawn['common_prompts'])} |",
        f"| retrieval, house:emoji-dit | {_percent(dit['generated'])} |",
        f"| ratio, generated to real held-out | {drawn['ratio_generated_to_real_held_out']:.2f} |",
        "| ratio, generated to real seen (the same captions) "
        f"| {drawn['ratio_generated_to_real_seen']:.2f} |",
        "| ratio, generated held-out recombinations to real held-out "
        f"| {drawn['ratio_held_out_to_real_held_out']:.2f} |",
        *tasks,
        "",
        "house:clip both conditions the pipeline and judges it here, and it knows the pictures it",
        "was trained on better than those held out. So a ratio above one does not mean that drawn",
        "pictures beat real ones; the ratio on the same captions is the strict one.",
        "",
        "## Data",
        "",
        "Fetched into the user's cache, checked by hash; no picture is part of this package.",
        "",
        "| style | package | license of the art | credit |",
        "| --- | --- | --- | --- |",
        *sources,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the reference and the card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=500, help="generated pictures")
    parser.add_argument("--training", type=Path, help="json of how the weights were trained")
    parser.add_argument(
        "--only", choices=["reference", "files", "restore"], help="do just this part"
    )
    asked = parser.parse_args()
    pictures = data.pictures()
    file = store.WEIGHTS / "card.json"
    card = json.loads(file.read_text()) if file.exists() else {}
    if asked.only in (None, "reference"):
        features, settings = network()
        real.build(pictures, features, settings, store.WEIGHTS / "reference")
    if asked.only is None:
        begun = time.perf_counter()
        card["figures"] = {
            "autoencoder": autoencoder(pictures),
            "emoji": emoji(pictures, asked.count),
            "emoji-dit": emoji_dit(pictures, asked.count),
            "restore": restorer(pictures),
        }
        card["measured"] = {
            "seconds": round(time.perf_counter() - begun, 1),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
    if asked.only == "restore":
        card["figures"]["restore"] = restorer(pictures)
    if asked.training:
        card["training"] = json.loads(asked.training.read_text())
    card["data"] = [
        {
            "style": s.style,
            "package": f"{s.package}@{s.version}",
            "sha256": s.sha256,
            "license": s.license,
            "credit": s.credit,
        }
        for s in data.SOURCES
    ]
    card["parameters"], card["files"] = parameters(), files()
    write_whole(file, json.dumps(card, indent=1) + "\n")
    if "figures" in card and "training" in card:
        write_whole(Path(__file__).parent / "README.md", page(card))


if __name__ == "__main__":
    main()
