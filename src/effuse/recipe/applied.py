"""A recipe on a pipeline: put on, looked at step by step, saved, measured, taken off again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effuse.core.contracts import Applied
from effuse.core.errors import RecipeError

from .healed import Healer, heals, keep, kept, key_of
from .written import (
    Item,
    On,
    Recipe,
    Sampler,
    call_settings,
    label_of,
    parse,
    transform_of,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


@dataclass
class Slim:
    """A pipeline with a recipe on it; the pipeline stays a diffusers pipeline.

    pipe: changed in place. before: the pipeline as it was, sharing all untouched parts; None if
    it was not kept. applied: (component, handle) in the order of application; noted: their reports,
    and those of healing. taken_up: originals of networks whose run was broken off before.
    """

    pipe: DiffusionPipeline
    recipe: Recipe
    applied: list[tuple[str, Applied]]
    before: DiffusionPipeline | None
    scheduler: Any
    noted: list[dict[str, Any]] = field(default_factory=list)
    taken_up: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """How the recipe wants the pipeline called: steps and guidance, where it says so."""
        return call_settings(self.recipe)

    def reports(self) -> list[dict[str, Any]]:
        """Return what each transform said it did, in numbers, when it had been put on."""
        return list(self.noted)

    def undo(self) -> DiffusionPipeline:
        """Take everything off again, last first: the original back, bit for bit."""
        for _, handle in reversed(self.applied):
            handle.detach()
        for name, original in self.taken_up.items():  # their handles saw other weights
            getattr(self.pipe, name).load_state_dict(original.state_dict())
        self.applied, self.noted, self.taken_up = [], [], {}
        self.pipe.register_modules(scheduler=self.scheduler)
        return self.pipe

    def stages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (method, call settings) with `pipe` as it stood after each item, the last first.

        Afterwards, and if the loop is left early, everything is on again as it was.
        """
        items, taken = list(self.recipe.items), list[tuple[str, Applied, dict[str, Any]]]()
        state = {name: _copied(getattr(self.pipe, name)) for name in dict(self.applied)}
        scheduler = self.pipe.scheduler
        try:
            while items:
                yield label_of(items[-1]), call_settings(Recipe(tuple(items)))
                if transform_of(items.pop()) is None:
                    self.pipe.register_modules(scheduler=self.scheduler)
                elif items:  # the state before the first item is `before`
                    name, handle = self.applied.pop()
                    taken.append((name, handle, handle.plan()))
                    handle.detach()
        finally:
            for name, handle, plan in reversed(taken):
                network = handle.model
                self.applied.append((name, handle.transform.restore(network, plan)))
            for name in {name for name, _, _ in taken}:
                getattr(self.pipe, name).load_state_dict(state[name])
            self.pipe.register_modules(scheduler=scheduler)

    def save(self, folder: str | Path) -> Path:
        """Write the pipeline, whole or not at all; `effuse.load(folder)` brings it back."""
        from effuse.bridge import store

        return store.save(
            self.pipe, folder, self.applied, extra={"recipe.yaml": self.recipe.to_yaml()}
        )

    def report(
        self,
        out: str | Path,
        *,
        saved: str | Path | None = None,
        source: str | Path | None = None,
        **settings: Any,
    ) -> Any:
        """Measure before and after on the same prompts and seeds and write the page to `out`.

        Args:
            out: folder of the page.
            saved: where `save` wrote it: "after" is then what that folder gives, loaded again.
            source: the folder of the original, for its bytes on disk.
            settings: further arguments of `effuse.compare`: pictures, seed, steps of the original.

        Returns:
            All figures; see `effuse.report.Comparison`.
        """
        from effuse.report import Entry, compare

        if self.before is None:
            raise ValueError("the original was not kept: slim(..., keep_original=True)")
        usual = settings.get("steps")

        def entry(pipe: Any, how: Mapping[str, Any], folder: str | Path | None = None) -> Any:
            steps = how.get("num_inference_steps", usual)
            return Entry(pipe, steps=steps, guidance=how.get("guidance_scale"), folder=folder)

        def between() -> Iterator[tuple[str, Any]]:
            for name, how in self.stages():
                yield name, entry(self.pipe, how)

        after = self.pipe if saved is None else load(saved)
        return compare(
            {
                "before": Entry(self.before, folder=source),
                "after": entry(after, self.settings, saved),
            },
            out=out,
            recipe=self.recipe.to_yaml(),
            reports=self.reports(),
            stages=between(),
            **settings,
        )


def _copied(network: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def network_name(pipe: DiffusionPipeline) -> str:
    """Return the name of the denoising network's component: "unet" or "transformer"."""
    for name in ("unet", "transformer"):
        if getattr(pipe, name, None) is not None:
            return name
    raise TypeError(
        f"{type(pipe).__name__} has neither a unet nor a transformer: expected a classic pipeline"
    )


def load(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline: `house:NAME`, a folder saved by effuse, a diffusers folder or a hub id.

    Further arguments go to `DiffusionPipeline.from_pretrained`.
    """
    name = str(source)
    if name.startswith("house:"):
        from effuse import house

        return house.load(name.removeprefix("house:"), **kwargs)
    from effuse.bridge import store

    return store.load(source, **kwargs)


def slim(
    pipe: DiffusionPipeline | str | Path,
    recipe: str | Path | Mapping[str, Any] | Iterable[Item] | Recipe,
    *,
    keep_original: bool = True,
    progress: bool = True,
    work: str | Path | None = None,
) -> Slim:
    """Apply a recipe to a pipeline, in place.

    Args:
        pipe: a diffusers pipeline, or what `load` takes.
        recipe: what `parse` takes: a shipped name, a file, a mapping, or a list of transforms and
            samplers.
        keep_original: keep a copy of the networks that change, to compare with and to heal from.
        progress: show progress bars.
        work: folder for what healing may take up: run again after an interruption, it goes on where
            it was, or without healing gives what there was before. Removed at the end.

    Returns:
        The pipeline with its handles; `save`, `report` or `undo` it.

    Raises:
        RecipeError: the recipe is wrong, or not for this pipeline; nothing has been touched.
    """
    import torch

    plan = parse(recipe)
    if isinstance(pipe, (str, Path)):
        pipe = load(pipe)
    main = network_name(pipe)
    parts = [_component(pipe, item, main) for item in plan.items]
    healed = [n for n, item in enumerate(plan.items) if plan.healing.on and heals(item)]
    if plan.healing.on and not healed:
        raise RecipeError(
            "healing: none of the methods takes away or replaces parts of the network, so there "
            "is nothing to heal; leave it out"
        )
    changed = {p for p in parts if p and (keep_original or (healed and p == main))}
    originals = {name: copy.deepcopy(getattr(pipe, name)) for name in changed}
    out = Slim(pipe, plan, [], None, pipe.scheduler)
    if keep_original:
        out.before = type(pipe)(**{**_parts(pipe), **originals})
    folder = None if work is None else Path(work)
    healer = None
    if healed:
        teacher = originals[main]
        healer = Healer(pipe, plan, teacher, len(healed), folder, progress)
    drawn: list[dict[str, Any]] = []

    def batches() -> list[dict[str, Any]]:
        if not drawn:
            drawn.extend(_batches(out.before or pipe, plan))
        return drawn

    try:
        for number, (item, part) in enumerate(zip(plan.items, parts, strict=True)):
            if isinstance(item, Sampler):
                _set_scheduler(pipe, item)
                continue
            transform = transform_of(item)
            assert transform is not None
            network = getattr(pipe, part)
            key = key_of(plan, number, originals[part]) if heals(item) and originals else ""
            found = kept(folder, key) if key else None
            if found is not None:
                noted, weights = found
                handle = transform.restore(network, noted["plan"])
                out.applied.append((part, handle))
                out.taken_up[part] = originals[part]
                network.load_state_dict(weights)
            else:
                handle = transform.attach(network)
                out.applied.append((part, handle))
                if transform.calibrated:
                    seen: Any = batches()[: plan.calibration.calls]
                    handle.observe(seen if transform.targeted else [b["call"] for b in seen])
                if transform.walked:
                    learning: Any = handle
                    learning.learn(
                        _walks(pipe, plan),
                        rng=torch.Generator().manual_seed(plan.calibration.seed),
                        progress=progress,
                    )
                noted = {"report": handle.report()}
                if number in healed and folder is not None:
                    keep(folder, key, handle, noted["report"])
            out.noted.append({"method": label_of(item), "component": part, **noted["report"]})
            if healer is not None and number in healed:
                told = healer(handle, number)
                if told is not None:
                    name = f"healing of {label_of(item)}"
                    out.noted.append({"method": name, "component": part, **told})
    except BaseException:
        out.undo()
        raise
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _component(pipe: DiffusionPipeline, item: Item, main: str) -> str:
    """Return which component an item changes; "" for a sampler."""
    if isinstance(item, Sampler):
        return ""
    if not isinstance(item, On):
        return main
    from torch import nn

    networks = [n for n, part in pipe.components.items() if isinstance(part, nn.Module)]
    if item.component not in networks:
        raise RecipeError(
            f"{label_of(item)}: {type(pipe).__name__} has no network of that name, expected one of "
            f"{', '.join(networks)}"
        )
    return item.component


def _parts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the constructor arguments that make a second pipeline of the same parts."""
    return {
        n: getattr(pipe, n) for n in pipe._get_signature_keys(type(pipe))[0] if n in pipe.config
    } | {n: v for n, v in pipe.config.items() if n in pipe._get_signature_keys(type(pipe))[1]}


def _set_scheduler(pipe: DiffusionPipeline, item: Sampler) -> None:
    from effuse.bridge.scheduler import scheduler

    pipe.register_modules(scheduler=scheduler(item.solver, pipe.scheduler, grid=item.grid))


def _batches(pipe: DiffusionPipeline, plan: Recipe) -> list[dict[str, Any]]:
    """Return network calls with their targets, to observe."""
    from effuse.compress.calibrate import uniform_calls

    how = plan.calibration
    return uniform_calls(
        pipe,
        how.prompts,
        count=how.calls,
        batch=how.batch,
        steps=how.steps,
        seed=how.seed,
    )


def _walks(pipe: DiffusionPipeline, plan: Recipe) -> Any:
    """Return what draws whole walks of the recipe's own sampler, or of `calibration.steps`."""
    from effuse.compress.calibrate import walks

    samplers = [i for i in plan.items if isinstance(i, Sampler)]
    how = samplers[-1] if samplers else None
    if how is not None and how.grid is not None:
        raise RecipeError(
            "a cache that learns on whole walks takes the levels of the solver's own grid: leave "
            "the grid out"
        )
    return walks(
        pipe,
        plan.calibration.prompts,
        steps=(how.steps if how is not None else None) or plan.calibration.steps,
        guidance=None if how is None else how.guidance,
        solver=None if how is None else how.solver,
    )
