"""The one training loop, through accelerate: one CPU, one GPU, many."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from effuse.core.contracts import Loss, Objective
from effuse.core.errors import check_choice, check_fraction

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = Callable[[torch.Generator], Mapping[str, Any]] | Iterable[Mapping[str, Any]]


class Ema:
    """Exponential moving average of parameters, in float32, with a warm-up of the decay.

    shadow <- d shadow + (1 - d) parameter,  d = min(decay, (1 + n) / (10 + n)) at step n.

    Args:
        parameters: what to follow; the list is kept.
        decay: in (0, 1); 0.999 averages over about a thousand steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.999):
        check_fraction("decay", decay, one=False)
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the parameters by one step."""
        d = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        now = [p.detach().to(s) for p, s in zip(self.parameters, self.shadow, strict=True)]
        torch._foreach_lerp_(self.shadow, now, 1 - d)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters for the length of a `with` block."""
        kept = [p.detach().clone() for p in self.parameters]
        self.copy_to()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), kept)

    @torch.no_grad()
    def copy_to(self) -> None:
        """Put the average into the parameters for good."""
        for p, s in zip(self.parameters, self.shadow, strict=True):
            p.copy_(s)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the step count."""
        return {"shadow": self.shadow, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up an average saved with `state_dict`."""
        self.count = int(state["count"])
        for mine, theirs in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(theirs)


@dataclass
class Fit:
    """What a finished (or stopped) training gives back.

    step, seconds: in all, those before a resume counted in; history: one row a logged step;
    ema: the average, if one was asked for: `ema.copy_to()` puts it in place.
    """

    step: int
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)
    ema: Ema | None = None


def warmup_cosine(warmup: float = 0.02, floor: float = 0.02) -> Callable[[float], float]:
    """Return a schedule: linear up over the share `warmup` of the run, cosine down to `floor`."""
    check_fraction("warmup", warmup, zero=True, one=False)

    def factor(progress: float) -> float:
        if progress < warmup:
            return (progress + 1e-3) / (warmup + 1e-3)
        import math

        down = (progress - warmup) / (1 - warmup)
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(down, 1.0))) / 2

    return factor


def fit(
    objective: Objective,
    batches: Batches,
    optimizers: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
    *,
    steps: int,
    rng: torch.Generator | None = None,
    on_step: Callable[[int, Mapping[str, Loss]], bool | None] | None = None,
    schedule: Callable[[float], float] | None = None,
    clip: float | None = 1.0,
    ema: float | None = None,
    precision: Literal["no", "bf16", "fp16"] = "no",
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    log_every: int = 20,
    minutes: float | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Fit:
    """Train every player of `objective` in turn for `steps` steps.

    Args:
        objective: gives each player's loss. Its parameters are trained in place.
        batches: `batches(rng)` draws a batch (exact resume costs nothing), or an iterable of
            batches, begun again when it ends (on resume the batches already seen are skipped).
        optimizers: one a player, or the one of the only player.
        steps: in all, those before a resume counted in.
        rng: draws batches and noise. Its state is in the checkpoint.
        on_step: called after each step with its number (from 1) and each player's loss; returning
            `True` stops the run, with a checkpoint.
        schedule: factor on every learning rate as a function of the share of the run done.
        clip: largest gradient norm; `None` leaves gradients alone.
        ema: decay of the moving average of the first player's parameters; `None` keeps none.
        precision: of automatic mixed precision. "no" leaves what `accelerate launch` was told;
            "fp16" needs a GPU, and holds for the rest of the process.
        folder: where checkpoint and `log.jsonl` go, and from where an earlier run is taken up:
            a run that was killed and resumed gives the same weights as one that was not.
        save_every: steps between checkpoints.
        log_every: steps between log rows.
        minutes: if given, the schedule and the end follow the clock instead, whichever of `steps`
            and `minutes` comes first, those before a resume counted in; such a run is not
            deterministic.
        progress: show a progress bar with the time left.
        accelerator: bring your own; by default one is made.

    Returns:
        What was done; see `Fit`.

    Raises:
        FloatingPointError: a loss term or a gradient norm is not finite; names the step, the
            player and the term. The checkpoint on disk is from before.
        ValueError: optimizers and players do not match, or the checkpoint is of another model.
    """
    from accelerate import Accelerator

    check_choice("precision", precision, ("no", "bf16", "fp16"))
    players = objective.players
    if isinstance(optimizers, torch.optim.Optimizer):
        optimizers = dict.fromkeys(players[:1], optimizers)
    if set(optimizers) != set(players):
        raise ValueError(f"optimizers for {sorted(optimizers)}: expected one for each of {players}")
    # accelerate fixes one precision for the whole process; bfloat16 needs nothing of it
    engine = accelerator or Accelerator(
        mixed_precision="fp16" if precision == "fp16" else None, cpu=not torch.cuda.is_available()
    )
    half = torch.autocast(engine.device.type, torch.bfloat16)
    rng = rng if rng is not None else torch.Generator().manual_seed(0)
    bases = {n: [g["lr"] for g in o.param_groups] for n, o in optimizers.items()}
    average = Ema(objective.parameters_of(players[0]), ema) if ema is not None else None
    store = _Store(Path(folder), objective, optimizers, average, rng) if folder else None
    first = store.load() if store else 0
    model = engine.prepare(objective)
    tuned = {n: engine.prepare(o) for n, o in optimizers.items()}
    draw = _source(batches, rng, first)
    owned = {n: objective.parameters_of(n) for n in players}
    spent = store.seconds if store else 0.0
    begun, done = time.perf_counter() - spent, first
    out = Fit(first, spent, [], average)
    objective.train()

    def share() -> float:
        """Return how much of the run is behind, by its steps or its clock."""
        if done >= steps or (minutes is not None and minutes <= 0):
            return 1.0
        by_clock = 0.0 if minutes is None else (time.perf_counter() - begun) / (60 * minutes)
        return max(done / steps, by_clock)

    with _bar(share(), progress and engine.is_main_process) as tick:
        while (part := share()) < 1:
            batch = _to(draw(), engine.device)
            losses: dict[str, Loss] = {}
            for name in players:
                optimizer = tuned[name]
                factor = schedule(part) if schedule else 1.0
                for group, lr in zip(optimizer.param_groups, bases[name], strict=True):
                    group["lr"] = lr * factor
                with half if precision == "bf16" else engine.autocast():
                    loss = model(name, batch, rng=rng)
                _require_finite_loss(loss, name, done + 1)
                optimizer.zero_grad(set_to_none=True)
                engine.backward(loss.total)
                _drop_foreign(objective, owned[name])
                if clip is not None and engine.sync_gradients:
                    norm = engine.clip_grad_norm_(owned[name], clip)
                    if norm is not None and precision != "fp16" and not torch.isfinite(norm):
                        raise FloatingPointError(
                            f"step {done + 1}, player {name!r}: the gradient norm is {norm}"
                        )
                optimizer.step()
                losses[name] = Loss(
                    loss.total.detach(), {k: v.detach() for k, v in loss.terms.items()}
                )
            if average is not None:
                average.update()
            done += 1
            out.step, out.seconds = done, time.perf_counter() - begun
            if done % log_every == 0 or done == steps:
                row = _row(done, out.seconds, losses)
                out.history.append(row)
                if store and engine.is_main_process:
                    store.log(row)
                tick(share(), done, row)
            stop = bool(on_step(done, losses)) if on_step else False
            if store and engine.is_main_process and (stop or done % save_every == 0):
                store.save(done, out.seconds)
            if stop:
                break
    if store and engine.is_main_process:
        store.save(done, out.seconds)
    return out


def _drop_foreign(objective: Objective, owned: Sequence[nn.Parameter]) -> None:
    """Clear gradients that a player's loss left on parameters of others."""
    mine = {id(p) for p in owned}
    for p in objective.parameters():
        if p.grad is not None and id(p) not in mine:
            p.grad = None


def _require_finite_loss(loss: Loss, player: str, step: int) -> None:
    for term, value in {**loss.terms, "total": loss.total}.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(
                f"step {step}, player {player!r}, term {term!r} is {value.detach().cpu()}: "
                "lower the learning rate or look at the batch"
            )


def _source(batches: Batches, rng: torch.Generator, skip: int) -> Callable[[], Any]:
    if callable(batches):
        return lambda: batches(rng)

    def stream() -> Iterator[Any]:
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ValueError(
                    "batches gave nothing: an iterator cannot be begun again, pass a list"
                )

    endless = stream()
    for _ in range(skip):
        next(endless)
    return lambda: next(endless)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(v, device) for v in batch)
    return batch


def _row(step: int, seconds: float, losses: Mapping[str, Loss]) -> dict[str, float]:
    row: dict[str, float] = {"step": step, "seconds": round(seconds, 2)}
    for name, loss in losses.items():
        prefix = "" if len(losses) == 1 else f"{name}."
        row[f"{prefix}loss"] = float(loss.total)
        row |= {f"{prefix}{k}": float(v) for k, v in loss.terms.items()}
    return row


@contextlib.contextmanager
def _bar(first: float, shown: bool) -> Iterator[Callable[[float, int, dict[str, float]], None]]:
    if not shown:
        yield lambda share, done, row: None
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("fit", total=100, completed=round(100 * first))
        yield lambda share, done, row: bar.update(
            task,
            completed=100 * min(share, 1.0),
            description=f"step {done}, loss {row.get('loss', float('nan')):.4g}",
        )


class _Store:
    """Checkpoint and log of one run, in one folder; written whole or not at all."""

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        optimizers: Mapping[str, torch.optim.Optimizer],
        average: Ema | None,
        rng: torch.Generator,
    ):
        self.folder, self.file, self.seconds = folder, folder / "checkpoint.pt", 0.0
        self.objective, self.optimizers, self.average, self.rng = (
            objective,
            dict(optimizers),
            average,
            rng,
        )

    def _trained(self) -> dict[str, Tensor]:
        """Everything a run changes: trainable parameters, and all buffers of the players."""
        moving = {n: p for n, p in self.objective.named_parameters() if p.requires_grad}
        return moving | dict(self.objective.named_buffers())

    def save(self, step: int, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "seconds": seconds,
            "weights": {n: p.detach() for n, p in self._trained().items()},
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            "ema": self.average.state_dict() if self.average else None,
            "rng": self.rng.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        draft = self.file.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.file)

    def load(self) -> int:
        if not self.file.exists():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        mine = self._trained()
        theirs = state["weights"]
        if mine.keys() != theirs.keys() or any(mine[n].shape != theirs[n].shape for n in mine):
            odd = sorted(mine.keys() ^ theirs.keys())[:3]
            raise ValueError(
                f"{self.folder}: the checkpoint is of another model (first differences: {odd}); "
                "give another folder or remove this one"
            )
        with torch.no_grad():
            for name, value in theirs.items():
                mine[name].copy_(value)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.average and state["ema"]:
            self.average.load_state_dict(state["ema"])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.seconds = float(state.get("seconds", 0.0))
        return int(state["step"])

    def log(self, row: Mapping[str, float]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
