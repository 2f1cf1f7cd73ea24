"""Set a cache by the error you allow: measured on trajectories, chosen exactly, checked.

handle = ErrorBudget(error=0.05).attach(pipe.unet)
handle.learn(walks(pipe, steps=20))     # measure, choose, check
pipe(..., num_inference_steps=20)       # within 5 % of the full picture, as cheap as can be
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effuse.bridge.pipeline import Walk
from effuse.compress.calibrate import Recording
from effuse.core import sample
from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_choice, check_positive, check_whole
from effuse.core.method import method
from effuse.ops.budget import choices
from effuse.ops.stats import bootstrap

from .gates import mapped
from .inherited import Routed
from .keys import Route, Uniform
from .levels import Blocks, Group, Layers, Level, Named, Rest, Units

__all__ = [
    "Blocks",
    "Budgeted",
    "ErrorBudget",
    "Frontier",
    "Group",
    "Layers",
    "Measured",
    "Named",
    "Rest",
    "Units",
]

CELLS = 20_000
"""Into how many units the multiply-accumulates of a run are divided when routes are chosen."""


@method(
    "error_budget",
    buys="as few multiply-accumulates as an error that you allow lets through, without training",
    missing="The error is that of the final sample against the full run, a mean over pictures like "
    "those measured; not of each picture. Solvers with one call of the network a step only.",
)
@dataclass(frozen=True)
class ErrorBudget(Transform):
    """Inherit as much as an allowed error lets through: a route instead of thresholds.

    E(route) = sum over parts p and inherited steps t of  g_pt^2 |o_t - carried(o_k1, o_k0)|^2

    o: the values of a part on full trajectories, carried: what it would inherit from its last key
    steps; g_pt: how much that moves the final sample, measured one step at a time. Of all routes
    those of least E for each number of multiply-accumulates are found exactly. E only ranks them:
    errors of parts and steps are taken to add up as if they had nothing to do with each other.
    Then routes are run, and the cheapest is taken whose measured error, at the upper end of its
    interval, is within the budget.

    error: of the final sample, root of the mean over pictures of ||x - full||^2 / ||full||^2; > 0.
        Tiny: everything computes, the original bit for bit.
    level: the parts; any level that can be recorded. order: as in `Inherit`.
    trajectories: to measure on. tried: routes to run, evenly spread over their cost.
    confidence: of the interval, in (0, 1). where: parts that it forbids always compute.
    """

    error: float = 0.05
    level: Level = field(default_factory=lambda: Units(deep=None))
    order: int = 1
    trajectories: int = 2
    tried: int = 12
    confidence: float = 0.95
    where: Where = everywhere
    kind = "cache"
    walked = True

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.level, Level):
            raise TypeError(f"level={self.level!r}: expected an object, such as Layers(deep=2)")
        check_positive("error", self.error)
        check_choice("order", self.order, (0, 1))
        check_whole("trajectories", self.trajectories, 1)
        check_whole("tried", self.tried, 1)
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: expected a fraction in (0, 1)")

    def attach(self, model: nn.Module) -> Budgeted:
        """Put gates on `model`; `learn` on the handle finds the route."""
        return Budgeted(self, model)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Budgeted:
        """Put gates on a fresh `model` and follow the route in `plan`."""
        return Budgeted(self, model, plan)


class Measured(NamedTuple):
    """What a route that was run did: predicted and measured error, its interval, and its cost.

    errors are roots of means of squared relative errors; share: of the full multiply-accumulates.
    """

    route: Route
    share: float
    predicted: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Frontier:
    """The routes of least predicted error at each cost.

    parts: their names. levels: timesteps of the steps. saved: (parts,) multiply-accumulates that a
    part saves at a step; full: those of a run. errors: (parts, T) the least squared error of each
    part at n inherited steps, and `steps` which these are. best, taken: of `ops.budget.choices`,
    in units of `unit` multiply-accumulates.
    """

    parts: tuple[str, ...]
    levels: tuple[float, ...]
    saved: tuple[int, ...]
    full: int
    errors: Tensor
    steps: Mapping[tuple[int, int], tuple[int, ...]]
    best: Tensor
    taken: Tensor
    unit: float

    @classmethod
    def of(
        cls,
        errors: Tensor,
        parts: tuple[str, ...],
        levels: tuple[float, ...],
        saved: tuple[int, ...],
        full: int,
    ) -> Frontier:
        """Find them. errors: (parts, T + 1, T, T), of `carried_errors`."""
        each, steps = chains(errors)
        total = sum(saved) * (len(levels) - 1)
        unit = max(1.0, total / CELLS)
        best, taken = choices(each, [int(s / unit) for s in saved])
        return cls(parts, levels, saved, full, each, steps, best, taken, unit)

    def at(self, share: float) -> tuple[Route, float]:
        """Return the route that costs at most `share` of a full run, and its predicted error.

        Raises:
            ValueError: not even the cheapest route costs so little.
        """
        saved = dict(zip(self.parts, self.saved, strict=True))
        wanted = (1 - share - 1e-6) * self.full
        last = int(self.best.isfinite().sum()) - 1
        # a unit holds a little more than it says: begin below, and take more where that is short
        first = math.floor(wanted / self.unit) - len(self.parts) * len(self.levels)
        low, high = min(max(first, 0), last), last
        if self._route(last).saved(saved) < wanted:
            raise ValueError(f"share={share:g}: not even inheriting everything costs so little")
        while low < high:
            middle = (low + high) // 2
            if self._route(middle).saved(saved) >= wanted:
                high = middle
            else:
                low = middle + 1
        return self._route(low), math.sqrt(float(self.best[low]))

    @property
    def least(self) -> float:
        """The share that is left when everything inherits after the first step."""
        return 1 - sum(self.saved) * (len(self.levels) - 1) / self.full

    def _route(self, cell: int) -> Route:
        taken = self.taken[:, cell].tolist()
        pairs = zip(self.parts, taken, strict=True)
        table = {part: self.steps[k, n] for k, (part, n) in enumerate(pairs)}
        return Route(len(self.levels), table, self.levels)


class Budgeted(Routed):
    """A network that inherits within an error; see `ErrorBudget`."""

    transform: ErrorBudget
    frontier: Frontier | None = None
    tried: tuple[Measured, ...] = ()

    def learn(
        self,
        draw: Callable[[torch.Generator], Walk],
        *,
        rng: torch.Generator | None = None,
        progress: bool = True,
        folder: str | Path | None = None,
    ) -> Route:
        """Measure, choose and check a route, follow it from now on and return it.

        Args:
            draw: gives a trajectory to measure on, see `effuse.compress.calibrate.walks`; all of
                them on the same levels, which the route is then good for.
            rng: of all noise.
            progress: show a bar.
            folder: where the values of parts are streamed to, so that memory does not grow with
                the number of steps; None keeps one trajectory in memory.
        """
        how = self.transform
        rng = rng if rng is not None else torch.Generator().manual_seed(0)
        some = [draw(rng) for _ in range(how.trajectories)]
        if some[0].solver.stochastic:
            raise ValueError(
                f"{type(some[0].solver).__name__} draws noise at each step: expected a solver "
                "without, such as DDIM; the route is then good for any of the same levels"
            )
        with _bar(how.trajectories + how.tried, progress) as tick:
            frontier, full = self._measure(some, folder, tick)
            ends = torch.linspace(1, frontier.least, how.tried + 1, dtype=torch.float64)
            shares = ends[1:].tolist()
            rows = []
            for share in shares:
                rows.append(self.check(some, full, *frontier.at(share), how.confidence))
                tick("checked")
        self.frontier, self.tried = frontier, tuple(rows)
        route = self.within(how.error)
        self.follow(route)
        self.restart()
        return route

    def within(self, error: float) -> Route:
        """Return the cheapest route that was run whose error is within `error`, with confidence."""
        if self.frontier is None:
            raise ValueError("nothing measured: expected a call of learn before")
        fit = [m for m in self.tried if m.high <= error]
        if not fit:
            return Route(len(self.frontier.levels), {}, self.frontier.levels)
        return min(fit, key=lambda m: m.share).route

    def check(
        self,
        some: list[Walk],
        full: list[Tensor],
        route: Route,
        predicted: float,
        confidence: float = 0.95,
    ) -> Measured:
        """Run a route on trajectories and compare with their full samples."""
        squares = torch.cat([off(self.run(w, route), x) for w, x in zip(some, full, strict=True)])
        low, high = bootstrap(squares, level=confidence)
        cost = next(iter(self.costs.values()))
        share = 1 - route.saved(cost.saved) / (route.steps * cost.full)
        mean = float(squares.mean())
        roots = [math.sqrt(v) if math.isfinite(v) else math.sqrt(mean) for v in (mean, low, high)]
        return Measured(route, share, predicted, *roots)

    def report(self) -> dict[str, Any]:
        """Return `Routed.report`, and after learning the rows that were run."""
        out = super().report()
        if self.tried:
            out["budget"] = self.transform.error
            out["tried"] = [
                {k: round(v, 6) for k, v in m._asdict().items() if k != "route"} for m in self.tried
            ]
        return out

    # ---- measuring

    @torch.no_grad()
    def _measure(
        self, some: list[Walk], folder: str | Path | None, tick: Callable[[str], None]
    ) -> tuple[Frontier, list[Tensor]]:
        total: Tensor | None = None
        ends = []
        for number, walk in enumerate(some):
            where = None if folder is None else Path(folder) / f"{number:04d}"
            points: list[_Point] = []
            full, levels, cost = self.survey(walk)
            digest = hashlib.blake2b(full.cpu().numpy().tobytes(), digest_size=16).hexdigest()
            values = Recording(folder=where, about={"sample": digest, "parts": list(self.parts)})
            self._listen(walk, values, points)
            gram = grams(values, self.parts)
            ends.append(full)
            gains = self._gains(walk, full, gram, points)
            error = carried_errors(gram, torch.tensor(levels), self.transform.order)
            error = error * gains[:, None, None, :]
            total = error if total is None else total + error
            tick("measured")
        assert total is not None
        saved = tuple(cost.saved[p] for p in self.parts)
        whole = cost.full * len(levels)
        return Frontier.of(total / len(some), self.parts, levels, saved, whole), ends

    def _listen(self, walk: Walk, values: Recording, points: list[_Point]) -> None:
        """Sample in full; note the values of parts, and where each step began and what it heard."""
        now: dict[str, Any] = {}
        states = [walk.solver.init(walk.x)]

        def hear(step: int, level: float, part: str, value: Any) -> None:
            now[part] = mapped(value, lambda a: a.detach().clone())

        def after(module: nn.Module, args: Any, out: Any) -> None:
            values.add((), dict(now))
            points.append(_Point(args[0].clone(), args[1], states[-1], out.noise))
            now.clear()

        def stepped(index: int, s: Tensor, step: Any) -> None:
            states.append(step.state)

        hook = walk.denoiser.register_forward_hook(after)
        with self.following(Uniform(1)):
            self.heard = hear
            try:
                sample(*walk, on_step=stepped)
            finally:
                self.heard = None
                hook.remove()

    def _gains(self, walk: Walk, full: Tensor, gram: Tensor, points: list[_Point]) -> Tensor:
        """Return g, (parts, steps): squared move of the final sample a squared error of the part.

        g_pt = (final error / error of the prediction)_t, with all parts one step old, times
        (error of the prediction / error of the part)_pt, with part p alone one step old.
        """
        steps = len(points)
        gains = torch.zeros(len(self.parts), steps, dtype=torch.float64)
        for t in range(1, steps):
            moved, end = self._moved(walk, points, t, self.parts), self._end(walk, points, t)
            far = float(off(end, full).mean())
            for k, part in enumerate(self.parts):
                drift = gram[k, t, t] - 2 * gram[k, t, t - 1] + gram[k, t - 1, t - 1]
                if moved > 0 and float(drift) > 1e-12 * float(gram[k, t, t]):
                    alone = self._moved(walk, points, t, (part,))
                    gains[k, t] = far / moved * alone / float(drift)
        return gains

    def _moved(self, walk: Walk, points: list[_Point], t: int, parts: tuple[str, ...]) -> float:
        """Return the squared error of the prediction at step t where parts are one step old."""
        with self.following(Route(2, dict.fromkeys(parts, (1,)))):
            walk.denoiser(points[t - 1].x, points[t - 1].t)
            out = walk.denoiser(points[t].x, points[t].t).noise
        return float((out - points[t].noise).double().square().sum())

    def _end(self, walk: Walk, points: list[_Point], t: int) -> Tensor:
        """Return the final sample where all parts are one step old at step t, and only there."""
        x, state = points[t].x, points[t].state
        with self.following(Route(len(points) - t + 1, dict.fromkeys(self.parts, (1,)))):
            walk.denoiser(points[t - 1].x, points[t - 1].t)
            for now, then in pairwise(walk.times[t:]):
                x, state = walk.solver.step(walk.denoiser, x, now, then, state)
        return x


class _Point(NamedTuple):
    """Where a step of a full trajectory began, and the noise that was predicted there."""

    x: Tensor
    t: Any
    state: Any
    noise: Tensor


# ---- the sums that routes are chosen by


def off(x: Tensor, full: Tensor) -> Tensor:
    """Return ||x - full||^2 / ||full||^2 of each picture, (B,)."""
    x, full = x.double().flatten(1), full.double().flatten(1)
    return (x - full).square().sum(1) / full.square().sum(1)


def grams(values: Recording, parts: tuple[str, ...]) -> Tensor:
    """Return <o_s, o_t> of each part, (parts, steps, steps), from its values by step.

    values: one entry a step, its keyword arguments the values by part; read two at a time.
    """
    steps = len(values)
    out = torch.zeros(len(parts), steps, steps, dtype=torch.float64)

    def read(step: int) -> list[Tensor]:
        kept: Mapping[str, Any] = values[step][1]
        rows: list[Tensor] = []
        for part in parts:
            some: list[Tensor] = []
            mapped(kept[part], some.append)
            rows.append(torch.cat([a.double().flatten() for a in some]))
        return rows

    for s in range(steps):
        ours = read(s)
        for t in range(s + 1):
            theirs = ours if t == s else read(t)
            row = torch.stack([a @ b for a, b in zip(ours, theirs, strict=True)])
            out[:, s, t] = out[:, t, s] = row
    return out


def carried_errors(gram: Tensor, levels: Tensor, order: int) -> Tensor:
    """Return |o_t - carried|^2, (parts, T, T, T) by [part, k0 + 1, k1, t], k0 = -1 for no k0.

    carried = o_k1 + gain (o_k1 - o_k0), gain = (l_t - l_k1) / (l_k1 - l_k0) with order 1, where
    there is a k0; else 0. Of triples that are not in order k0 < k1 < t it says nothing.

    Args:
        gram: (parts, T, T) inner products of the values.
        levels: (T,) timesteps.
        order: 0 or 1.
    """
    steps = len(levels)
    level = levels.double()
    k0 = torch.arange(-1, steps - 1)
    gain = torch.zeros(steps, steps, steps, dtype=torch.float64)
    if order == 1:
        top = level[None, None, :] - level[None, :, None]
        below = level[None, :, None] - level[k0.clamp_min(0)][:, None, None]
        known = (k0[:, None, None] >= 0) & (below != 0)
        gain = torch.where(known, top / torch.where(below == 0, 1.0, below), gain)
    own = gram.diagonal(dim1=1, dim2=2)
    older = gram[:, k0.clamp_min(0)]  # (parts, k0, other)
    out = own[:, None, None, :] + (1 + gain) ** 2 * own[:, None, :, None]
    out = out + gain**2 * own[:, k0.clamp_min(0)][:, :, None, None]
    out = out - 2 * (1 + gain) * gram[:, None] + 2 * gain * older[:, :, None, :]
    out = out - 2 * gain * (1 + gain) * older[:, :, :, None]
    return out.clamp_min(0)


def chains(errors: Tensor) -> tuple[Tensor, dict[tuple[int, int], tuple[int, ...]]]:
    """Return the least error of each part at each number of inherited steps, and the steps.

    Dynamic programming over the last two key steps: exact, O(T^4) numbers a part.

    Args:
        errors: (parts, T, T, T) by [part, k0 + 1, k1, t], as `carried_errors` gives.

    Returns:
        (parts, T) least errors at n = 0 .. T - 1 inherited steps; and by (part, n) the steps.
    """
    parts, steps = errors.shape[0], errors.shape[-1]
    inf = math.inf
    best = torch.full((parts, steps, steps, steps), inf, dtype=torch.float64)  # part, k0, k1, n
    best[:, 0, 0, 0] = 0
    back = torch.zeros(parts, steps, steps + 1, steps, dtype=torch.int16)  # part, k1, k2, n
    end = torch.full((parts, steps, steps), inf, dtype=torch.float64)  # part, k1, n
    for k1 in range(steps):
        for k2 in range(k1 + 1, steps + 1):
            m = k2 - k1 - 1
            spent = errors[:, :, k1, k1 + 1 : k2].sum(-1)
            low, arg = (best[:, :, k1, : steps - m] + spent[..., None]).min(1)
            back[:, k1, k2, m:] = arg.to(torch.int16)
            if k2 < steps:
                best[:, k1 + 1, k2, m:] = low
            else:
                end[:, k1, m:] = low
    least, last = end.min(1)
    chosen = {}
    for p in range(parts):
        for n in range(steps):
            key, then, left, out = int(last[p, n]), steps, n, list[int]()
            while True:
                out += range(key + 1, then)
                before = int(back[p, key, then, left])
                left -= then - key - 1
                if before == 0:
                    break
                key, then = before - 1, key
            chosen[p, n] = tuple(sorted(out))
    return least, chosen


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar over measurements; give a function that moves it on."""
    if not shown:
        yield lambda said: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda said: bar.update(task, advance=1, description=said)
