"""Healing within a recipe: what it learns on, who judges it, and what is on disk meanwhile.

The network learns from the original on the original's own samples; pictures are judged before and
after, from noise that nothing else uses. Where healing makes them clearly worse, or takes them no
nearer to the original's, the weights as they were stay. With a folder, what was put on before is
kept beside the checkpoint: a run that was broken off goes on where it was, and without healing it
gives what was there before.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effuse.compress.healing import Spoiled, heal, own_samples
from effuse.core.contracts import Applied
from effuse.core.files import write_whole
from effuse.ops.stats import paired, psnr
from effuse.report.draw import Condition, Entry, draw_some, usual, words
from effuse.report.draw import kind_of as asked_by

from .written import Healing, Item, On, Recipe, kind_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAKERS = ("fluent", "noto", "twemoji")  # in a caption of the house, who drew the picture
SCORE, NEARNESS = "text-image score", "dB to the original"
SEED = 7000  # of the judged pictures: picture i starts from the noise of SEED + i


@dataclass
class Healer:
    """Heals one network of a pipeline as a recipe says, after each method that needs it.

    teacher: the network as it was. rounds: how many methods share the minutes and steps. folder:
    where samples and checkpoints go, None for nowhere.
    """

    pipe: DiffusionPipeline
    plan: Recipe
    teacher: nn.Module
    rounds: int
    folder: Path | None = None
    progress: bool = True
    _samples: Spoiled | None = field(default=None, repr=False)
    _judge: Judge | None = field(default=None, repr=False)

    def __call__(self, handle: Applied, number: int) -> dict[str, Any] | None:
        """Heal what item `number` changed; return what it took and gave, None if nothing can heal.

        The report's `kept` says which weights stayed, "healed" or "unhealed".
        """
        how, network = self.plan.healing, handle.model
        limit = None if how.minutes is None else how.minutes / self.rounds
        steps = max(1, how.steps // self.rounds) if how.steps else 1_000_000
        goal = how.features.goal(handle, self.teacher, steps if limit is None else None)
        if goal is None:
            return None
        batches = self._batches()
        judge = self._judge = self._judge or self._judged()
        unhealed = {k: v.detach().clone() for k, v in network.state_dict().items()}
        before = judge(self.pipe)
        folder = None
        if self.folder is not None:
            key = json.dumps([key_of(self.plan, number, self.teacher), repr(how)])
            folder = self.folder / f"heal-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        done = heal(
            self.pipe,
            handle,
            self.teacher,
            batches,
            objective=goal,
            minutes=limit,
            steps=steps,
            lr=how.lr,
            seed=how.seed,
            progress=self.progress,
            folder=folder,
        )
        after = judge(self.pipe)
        better, by = after.better_than(before)
        if not better:
            network.load_state_dict(unhealed)
        return {
            "judged_by": by,
            "kept": "healed" if better else "unhealed",
            **judge.whole.told("original"),
            **before.told("unhealed"),
            **after.told("healed"),
            "pictures": len(judge.asked),
            "steps": done.step,
            "minutes": done.seconds / 60,
            "prompts": len(batches.clean),
        }

    def _judged(self) -> Judge:
        """Return who judges, with the original's pictures."""
        name = next(n for n in ("unet", "transformer") if getattr(self.pipe, n, None) is not None)
        network = getattr(self.pipe, name)
        self.pipe.register_modules(**{name: self.teacher})
        try:
            return Judge(self.pipe, self.plan.healing.judged, self.plan.calibration.steps)
        finally:
            self.pipe.register_modules(**{name: network})

    def _batches(self) -> Spoiled:
        """Return the original's samples, drawn once, or read from the folder."""
        if self._samples is not None:
            return self._samples
        from safetensors.torch import load_file, save_file

        how = self.plan.healing
        asked = learned(self.pipe, how.prompts)
        clean, file = None, None
        if self.folder is not None:
            about = json.dumps([mark(self.teacher), repr(asked), how.guidance, how.seed])
            about += str(self.plan.calibration.steps)
            key = hashlib.sha256(about.encode()).hexdigest()[:12]
            file = self.folder / f"samples-{key}.safetensors"
            clean = load_file(file)["clean"] if file.is_file() else None
        self._samples = own_samples(
            self.pipe,
            asked,
            teacher=self.teacher,
            clean=clean,
            guidance=how.guidance,
            steps=self.plan.calibration.steps,
            rows=how.rows,
            seed=how.seed + 500,
        )
        if file is not None and clean is None:
            draft = file.with_suffix(".draft")
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"clean": self._samples.clean.contiguous()}, draft)
            draft.replace(file)
        return self._samples


@dataclass(frozen=True)
class Verdict:
    """How pictures fit their texts, (N,), None if nobody can tell, and their dB to the original."""

    scores: Tensor | None
    db: Tensor

    def better_than(self, other: Verdict) -> tuple[bool, str]:
        """Return whether these pictures are to be preferred, and by what.

        By the text-image score where the 95 % interval of its paired difference leaves out zero;
        else by the mean dB to the original's pictures. Never where that is no number.
        """
        if self.scores is not None and other.scores is not None:
            low, high = paired(self.scores, other.scores)[1]
            if low > 0 or high < 0:
                return low > 0, SCORE
        return bool(self.db.mean() >= other.db.mean()), NEARNESS

    def told(self, whose: str) -> dict[str, float]:
        """Return means for a report, their names ending in `whose`."""
        scores = {} if self.scores is None else {f"score_{whose}": float(self.scores.mean())}
        return scores if whose == "original" else {**scores, f"db_{whose}": float(self.db.mean())}


class Judge:
    """Judges pictures beside the original's from the same noise; texts are for house pipelines."""

    def __init__(self, pipe: Any, pictures: int, steps: int):
        from effuse.report.comparison import of_the_house

        listed = usual(pipe)
        self.asked: list[Condition] = [listed[i % len(listed)] for i in range(pictures)]
        self.steps = steps
        self.clip: Any = None
        self.texts = [words(pipe, c) for c in self.asked]
        if of_the_house(pipe) and asked_by(pipe) in ("text", "class"):
            from effuse.house import store

            self.clip = store.image_text()
        self.first = self._draw(pipe)
        self.whole = self._judge(self.first)

    def __call__(self, pipe: Any) -> Verdict:
        """Return the verdict on a pipeline."""
        return self._judge(self._draw(pipe))

    def _draw(self, pipe: Any) -> Tensor:
        seeds = [SEED + i for i in range(len(self.asked))]
        return draw_some(Entry(pipe, self.steps), self.asked, seeds)

    def _judge(self, pictures: Tensor) -> Verdict:
        scores = None if self.clip is None else self.clip.score(pictures, self.texts).double()
        return Verdict(scores, psnr(pictures, self.first))


def heals(item: Item) -> bool:
    """Return whether an item may need healing: it takes away or replaces parts of the network."""
    return not isinstance(item, On) and kind_of(item) in ("prune", "factorize", "rewire")


def learned(pipe: Any, what: int | tuple[str | int, ...]) -> Any:
    """Return prompts to learn on: what is given, but captions in place of a number for the house.

    None of them shares its name with a prompt by which pictures are judged.
    """
    from effuse.report.comparison import of_the_house

    if not isinstance(what, int) or asked_by(pipe) != "text" or not of_the_house(pipe):
        return what
    from effuse.house import real

    taken = {_bare(str(c)) for c in usual(pipe)}
    known = [c for c in dict.fromkeys(real.load().captions) if _bare(c) not in taken]
    return known[:what]


def _bare(caption: str) -> str:
    return " ".join(w for w in caption.split() if w not in MAKERS)


# ---- what is on disk while healing runs


def mark(network: nn.Module) -> str:
    """Return a digest of a few weights of every parameter: another network, another one."""
    found = hashlib.sha256()
    for name, p in network.named_parameters():
        found.update(name.encode())
        found.update(p.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def key_of(plan: Recipe, number: int, teacher: nn.Module) -> str:
    """Return the name of what is on a network after items 0 to `number`, the last not yet healed.

    The same for every way to heal where nothing was healed before.
    """
    items = plan.items[: number + 1]
    how = plan.healing if any(heals(i) for i in items[:-1]) else Healing()
    text = Recipe(items, plan.calibration, how).to_yaml() + mark(teacher)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def keep(folder: Path, key: str, handle: Applied, report: dict[str, Any]) -> None:
    """Write what an item gave, before it is healed: its plan, its report, and the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{key}.draft"
    save_file(
        {k: v.detach().clone().contiguous() for k, v in handle.model.state_dict().items()}, draft
    )
    draft.replace(folder / f"{key}.safetensors")
    write_whole(folder / f"{key}.json", json.dumps({"plan": handle.plan(), "report": report}))


def kept(folder: Path | None, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return what `keep` wrote, (plan and report, weights), if it is there."""
    if folder is None or not (folder / f"{key}.json").is_file():
        return None
    from safetensors.torch import load_file

    noted = json.loads((folder / f"{key}.json").read_text())
    return noted, load_file(folder / f"{key}.safetensors")
