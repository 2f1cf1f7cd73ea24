"""HarmoniCa: learn which sub-layers to recompute at which step, on whole trajectories, no images.

handle = Harmonica(penalty=Share(0.5)).attach(pipe.transformer)
handle.learn(walks(pipe, steps=20))          # or: route = learn_cache(pipe, steps=20)
pipe(..., num_inference_steps=20)            # half of it is inherited now
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effuse.bridge.pipeline import Walk
from effuse.compress.calibrate import walks
from effuse.core import Denoiser, Loss, Objective, Prediction, Time
from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_choice, check_fraction, check_positive, check_whole
from effuse.core.method import method
from effuse.core.training import fit

from .base import Mixture
from .inherited import Routed
from .keys import Keys, Route, Uniform
from .levels import Blocks, Group, Layers, Level, Named, Rest, Units

__all__ = [
    "Blocks",
    "Cumulative",
    "Drawn",
    "Even",
    "Fixed",
    "Group",
    "Harmonica",
    "Harmonized",
    "Keyed",
    "Layers",
    "Named",
    "Rest",
    "Router",
    "Share",
    "Single",
    "Start",
    "StepwiseDenoising",
    "Units",
    "learn_cache",
]

Draw = Callable[[torch.Generator], Walk]
"""Draws what to sample: conditions and noise, on the same levels each time."""


class Start(ABC):
    """Logits that learning begins with. A frozen dataclass."""

    @abstractmethod
    def logits(self, steps: int, parts: int, rng: torch.Generator | None) -> Tensor:
        """Return w, (steps - 1, parts), of the steps after the first."""


@dataclass(frozen=True)
class Drawn(Start):
    """N(0, 1): the paper's. Needs many iterations before what was drawn is forgotten."""

    def logits(self, steps: int, parts: int, rng: torch.Generator | None) -> Tensor:
        """See `Start.logits`."""
        return torch.randn(steps - 1, parts, generator=rng)


@dataclass(frozen=True)
class Keyed(Start):
    """The cache that computes all parts at `keys`: +size there and -size elsewhere. Ours to add.

    Learning then changes a plain cache where it pays to, and begins no worse. `Uniform(2)` with
    `order` 1 is hard to beat at half the cost.

    keys: key steps, of `effuse.compress.cache.keys`. size: above 0, up to 5, where logits are
    clamped; below 2.2 what is blended at the other steps replaces what is kept (r > tau).
    """

    keys: Keys = field(default_factory=lambda: Uniform(2))
    size: float = 3.0

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.keys, Keys):
            raise TypeError(f"keys={self.keys!r}: expected key steps, a Keys")
        if not 0 < self.size <= 5:
            raise ValueError(f"size={self.size!r}: expected above 0, at most 5")

    def logits(self, steps: int, parts: int, rng: torch.Generator | None) -> Tensor:
        """See `Start.logits`."""
        keyed = set(self.keys.of(steps))
        signs = torch.tensor([1.0 if i in keyed else -1.0 for i in range(1, steps)])
        return (self.size * signs)[:, None].repeat(1, parts)


class Router(nn.Module, Mixture):
    """Logits w (steps - 1, parts), r = sigmoid(w) in (0, 1): how much of a part is computed.

    One parameter a step, so that a step moves by its own gradients only. The first step always
    computes and has none. tau: what is computed at r > tau replaces what is kept. start: the
    logits at first.
    """

    limit = 5.0

    def __init__(
        self,
        steps: int,
        parts: Sequence[str],
        tau: float = 0.1,
        rng: torch.Generator | None = None,
        start: Start | None = None,
    ):
        super().__init__()
        self.parts, self.tau = {part: k for k, part in enumerate(parts)}, tau
        begun = (start or Drawn()).logits(steps, len(self.parts), rng)
        self.rows = nn.ParameterList([nn.Parameter(w.clamp(-5, 5)) for w in begun])

    def weight(self, step: int, part: str) -> Tensor | None:
        """See `Mixture.weight`."""
        return self.row(step)[self.parts[part]] if step else None

    def row(self, step: int) -> Tensor:
        """Return r of a step >= 1, (parts,)."""
        return self.rows[step - 1].sigmoid()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the logits back into [-5, 5]."""
        for w in self.rows:
            w.clamp_(-self.limit, self.limit)

    @torch.no_grad()
    def table(self) -> Tensor:
        """Return r, (steps, parts), ones at the first step."""
        rows = [w.sigmoid() for w in self.rows]
        return torch.stack([torch.ones(len(self.parts)), *(r.cpu() for r in rows)])

    def route(self, inherits: Tensor, levels: tuple[float, ...] = ()) -> Route:
        """Return the route of a table (steps, parts) of booleans: where a part inherits."""
        table = {p: tuple(inherits[:, k].nonzero()[:, 0].tolist()) for p, k in self.parts.items()}
        return Route(len(inherits), table, levels)


# ---- how much reuse is wanted


class Penalty(ABC):
    """What computing costs the router: beta_now * sum_i c_i r_i. A frozen dataclass."""

    beta: float

    @abstractmethod
    def costs(self, saved: Tensor) -> Tensor:
        """Return c, (parts,), from what each part saves when it inherits."""

    @abstractmethod
    def next(self, beta: float, table: Tensor, saved: Tensor) -> float:
        """Return beta for the next trajectory, from r now, (steps, parts)."""

    @abstractmethod
    def inherits(self, table: Tensor, saved: Tensor, tau: float) -> Tensor:
        """Return which (step, part) pairs inherit in the end, booleans."""


@dataclass(frozen=True)
class Fixed(Penalty):
    """beta times the number of computed parts, and r <= tau inherits: the paper's.

    beta: 7e-8 is the paper's for DiT-XL/2 in 10 steps; more gives more reuse.
    """

    beta: float = 7e-8

    def __post_init__(self) -> None:
        """Check beta."""
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: expected at least 0")

    def costs(self, saved: Tensor) -> Tensor:
        """See `Penalty.costs`."""
        return torch.ones_like(saved)

    def next(self, beta: float, table: Tensor, saved: Tensor) -> float:
        """See `Penalty.next`."""
        return beta

    def inherits(self, table: Tensor, saved: Tensor, tau: float) -> Tensor:
        """See `Penalty.inherits`."""
        return table <= tau


@dataclass(frozen=True)
class Share(Penalty):
    """Inherit the share `reuse` of what can be inherited, in multiply-accumulates. Ours to add.

    beta follows the share that r asks for: beta <- beta exp(rate (computed - (1 - reuse))), a dual
    ascent; parts cost as they save. In the end the pairs of lowest r inherit until the share is
    reached.

    reuse: in [0, 1). beta: to begin with. rate: at least 0.
    """

    reuse: float = 0.5
    beta: float = 1e-3
    rate: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_fraction("reuse", self.reuse, zero=True, one=False)
        check_positive("beta", self.beta)
        if self.rate < 0:
            raise ValueError(f"rate={self.rate}: expected at least 0")

    def costs(self, saved: Tensor) -> Tensor:
        """See `Penalty.costs`."""
        return saved / saved.mean()

    def next(self, beta: float, table: Tensor, saved: Tensor) -> float:
        """See `Penalty.next`."""
        computed = float((table * saved).sum() / (len(table) * saved.sum()))
        return beta * float(torch.tensor(self.rate * (computed - 1 + self.reuse)).exp())

    def inherits(self, table: Tensor, saved: Tensor, tau: float) -> Tensor:
        """See `Penalty.inherits`."""
        each = saved.expand_as(table)[1:].flatten()
        order = table[1:].flatten().argsort(stable=True)
        before = each[order].cumsum(0) - each[order]
        out = torch.zeros(table.shape, dtype=torch.bool)
        # an item counts while those before it have not reached the share
        chosen = order[before < self.reuse * len(table) * saved.sum() * (1 - 1e-9)]
        out[1:].view(-1)[chosen] = True
        return out


# ---- what an error at a step does to the picture


class Proxy(ABC):
    """Weights lambda_t of the steps' errors. A frozen dataclass."""

    @abstractmethod
    def weights(self, run: Callable[[Route], Tensor], route: Route) -> Tensor | None:
        """Return lambda, (steps,); None for all ones. run: samples by a route, (B, *)."""


@dataclass(frozen=True)
class Even(Proxy):
    """All steps count alike: step-wise denoising training without the image error."""

    def weights(self, run: Callable[[Route], Tensor], route: Route) -> None:
        """See `Proxy.weights`."""
        return None


@dataclass(frozen=True)
class Single(Proxy):
    """lambda_t = ||x_0 - x_0^(t)||_F^2, a mean over the batch: the route acts at step t alone.

    What is kept then comes from step t - 1, so errors of features that have aged longer are not
    seen; and a step at which all compute weighs nothing until the next computation of lambda.
    """

    def weights(self, run: Callable[[Route], Tensor], route: Route) -> Tensor:
        """See `Proxy.weights`; a step at which all compute has exactly 0, without a run."""
        full, out = run(route.only(())), torch.zeros(route.steps, dtype=torch.float64)
        for t in range(1, route.steps):
            alone = route.only((t,))
            if alone.count():
                out[t] = (run(alone) - full).double().square().flatten(1).sum(1).mean()
        return out


@dataclass(frozen=True)
class Cumulative(Proxy):
    """lambda_t = mean (x_0^(<= t) - x_0^(< t))^2: steps take up the route one after another."""

    def weights(self, run: Callable[[Route], Tensor], route: Route) -> Tensor:
        """See `Proxy.weights`."""
        before, out = run(route.only(())), torch.zeros(route.steps, dtype=torch.float64)
        for t in range(1, route.steps):
            if route.only((t,)).count():
                now = run(route.only(range(t + 1)))
                out[t], before = (now - before).double().square().mean(), now
        return out


# ---- the objective


class _Held(Denoiser):
    """Gives a prediction that was already made, for one step of a solver."""

    def __init__(self, process: Any, pred: Prediction):
        super().__init__()
        self.process, self.pred = process, pred

    def forward(self, x: Tensor, t: Time, **cond: Any) -> Prediction:
        """Return it."""
        return self.pred


class StepwiseDenoising(Objective):
    """Learns a router on the trajectory that the caching network itself walks.

    L_t = lambda_t mean (noise - noise~)^2 + beta sum_i c_i r_{t,i}

    noise: what the network in full predicts at x_t; noise~: what it predicts with every part
    blended, o~ = r o_new + (1 - r) kept; x_{t-1} is a solver's step along noise~, nothing flows
    back through it. `loss` takes the next step each time, and begins a new trajectory after the
    last. Both are those of the denoiser that samples: under guidance, the guided ones.

    Args:
        handle: the gates; the network is in them, and must be in `eval()`.
        draw: draws a trajectory to walk.
        router: what is learnt.
        saved: what each part saves, (parts,).
        penalty, proxy: see there. refresh: steps between two computations of lambda.
        normalized: divide lambda by its mean over the steps that inherit; not the paper's.
    """

    players = ("router",)

    def __init__(
        self,
        handle: Routed,
        draw: Draw,
        router: Router,
        saved: Tensor,
        *,
        penalty: Penalty | None = None,
        proxy: Proxy | None = None,
        refresh: int = 500,
        normalized: bool = False,
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        self.router = router
        self._handle, self._draw, self._saved = handle, draw, saved
        self.penalty, self.proxy = penalty or Fixed(), proxy or Single()
        self.beta = self.penalty.beta
        self.refresh, self.normalized = refresh, normalized
        self._rng = rng if rng is not None else torch.Generator().manual_seed(0)
        self._steps = len(router.rows) + 1
        self.weights = torch.ones(self._steps, dtype=torch.float64)
        self._walk: Walk | None = None
        self._at, self._x, self._state = 0, torch.empty(0), None
        self._done = self._fresh = 0

    def loss(
        self, player: str, batch: Mapping[str, Any], *, rng: torch.Generator | None = None
    ) -> Loss:
        """Return the loss at the next step of the trajectory; see the class."""
        self.router.clamp()
        if self._walk is None or self._at == self._steps:
            self._begin(rng or self._rng)
        assert self._walk is not None
        denoiser, step = self._walk.denoiser, self._at
        t = self._walk.times[step]
        with torch.no_grad(), self._handle.paused():
            full = denoiser(self._x, t)
        with torch.enable_grad():
            mixed = denoiser(self._x, t)
            error = (full.noise - mixed.noise).square().mean()
            r = self.router.row(step)
            usage = (r * self.penalty.costs(self._saved).to(r)).sum()
            total = float(self.weights[step]) * error + self.beta * usage
        self._done += 1
        self._follow(full, mixed, rng)
        return Loss(total, {"error": error, "usage": usage})

    def _follow(self, full: Prediction, mixed: Prediction, rng: torch.Generator | None) -> None:
        """Go on along the caching network's own prediction."""
        self._advance(mixed, rng)

    @torch.no_grad()
    def _begin(self, rng: torch.Generator) -> None:
        if self._done - self._fresh >= self.refresh:
            self._fresh = self._done
            self.refreshed(rng)
        if self._done:
            self.beta = self.penalty.next(self.beta, self.router.table(), self._saved)
        self._walk, self._at = self._draw(rng), 0
        self._x, self._state = self._walk.x, self._walk.solver.init(self._walk.x)
        self._handle.reset()
        self._advance(self._walk.denoiser(self._x, self._walk.times[0]), rng)

    @torch.no_grad()
    def refreshed(self, rng: torch.Generator) -> None:
        """Compute lambda anew, on a trajectory of its own."""
        walk = self._draw(rng)
        table = self.router.table()
        route = self.router.route(self.penalty.inherits(table, self._saved, self.router.tau))
        found = self.proxy.weights(lambda by: self._handle.run(walk, by), route)
        if found is None:
            return
        if self.normalized and bool((found > 0).any()):
            found = found / found[found > 0].mean()
        self.weights = found

    @torch.no_grad()
    def _advance(self, pred: Prediction, rng: torch.Generator | None) -> None:
        assert self._walk is not None
        walk, i = self._walk, self._at
        held = _Held(walk.denoiser.process, Prediction(pred.x0.detach(), pred.noise.detach()))
        self._x, self._state = walk.solver.step(
            held, self._x, walk.times[i], walk.times[i + 1], self._state, rng=rng
        )
        self._at += 1


# ---- the transform


@method(
    "harmonica",
    seed=9,
    paper="HarmoniCa: Harmonizing Training and Inference for Better Feature Cache in Diffusion "
    "Transformer Acceleration",
    year=2024,
    buys="fewer multiply-accumulates a picture; learns which parts to reuse at which step, no data",
    missing="Which of the two image-error proxies made the paper's tables is not known: both are "
    "here. The error is taken on the guided prediction that the sampler uses, not on the raw "
    "output. Solvers with one call of the network a step only. The guidance and the schedule of "
    "learning are those of sampling; the paper learns at a lower guidance.",
)
@dataclass(frozen=True)
class Harmonica(Transform):
    """Learn a table of which sub-layer computes at which step, by sampling and no images.

    learning: o~ = r o_new + (1 - r) kept,  kept <- o~ where r > tau,  r = sigmoid(w) in (0, 1)
    after:    o = o_new where the table computes, else kept

    o is the value of a sub-layer before its gate of adaLN; the gate is always fresh. Until it has
    learned, everything computes: the original bit for bit.

    On the house pipelines a plain cache, `Inherit` at even key steps, errs less at the same cost
    (evidence/harmonica.json). From the middle of a walk on, errors of parts that are reused
    together partly cancel: on house:emoji-dit, at steps 8, 11 and 14 of 16, those of single parts
    summed to 2.5, 2.3 and 1.5 times that of all.

    level: the parts. `Units(deep=None)` are attention and feed-forward of each block, and the
        convolution branches of a UNet.
    tau: threshold in [0, 1); below 0 nothing would inherit. lr: of AdamW on the logits.
    iterations: steps of learning, each one step of a trajectory. refresh: of those, between two
        computations of lambda, which cost a trajectory for each step.
    penalty: `Fixed(beta)`, the paper's, or `Share(reuse)`, which reaches a share.
    proxy: `Single()`, `Cumulative()` or `Even()`. normalized: divide lambda by its mean, so that
        beta does not depend on its scale; not the paper's.
    order: 0 keeps the last value, the paper's; 1 the line through the last two.
    start: `Drawn()`, the paper's, or `Keyed(keys)`, a plain cache to improve on.
    where: parts that it forbids always compute.
    """

    level: Level = field(default_factory=lambda: Units(deep=None))
    tau: float = 0.1
    lr: float = 0.01
    iterations: int = 20_000
    refresh: int = 500
    penalty: Penalty = field(default_factory=Fixed)
    proxy: Proxy = field(default_factory=Single)
    normalized: bool = False
    order: int = 0
    start: Start = field(default_factory=Drawn)
    where: Where = everywhere
    kind = "cache"
    walked = True

    def __post_init__(self) -> None:
        """Check the fields."""
        kinds = {"level": Level, "penalty": Penalty, "proxy": Proxy, "start": Start}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name}={getattr(self, name)!r}: expected an object, a {kind.__name__}"
                )
        check_fraction("tau", self.tau, zero=True, one=False)
        check_positive("lr", self.lr)
        check_whole("iterations", self.iterations, 1)
        check_whole("refresh", self.refresh, 1)
        check_choice("order", self.order, (0, 1))

    def attach(self, model: nn.Module) -> Harmonized:
        """Put gates on `model`; `learn` on the handle finds the table."""
        return Harmonized(self, model)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Harmonized:
        """Put gates on a fresh `model` and follow the table in `plan`."""
        return Harmonized(self, model, plan)


class Harmonized(Routed):
    """A network that learns what to inherit, and inherits it; see `Harmonica`."""

    transform: Harmonica
    learned: Mapping[str, Any] | None = None

    def learn(
        self,
        draw: Draw,
        *,
        rng: torch.Generator | None = None,
        progress: bool = True,
        folder: str | Path | None = None,
        goal: type[StepwiseDenoising] | None = None,
    ) -> Route:
        """Learn a table on trajectories, follow it from now on and return it.

        Args:
            draw: gives a trajectory to walk, see `effuse.compress.calibrate.walks`; all of them on
                the same levels, which the table is then good for.
            rng: of the logits and all noise.
            progress: show a bar.
            folder: for checkpoints; a stopped run goes on with a new trajectory.
            goal: another objective of the same arguments, to compare with.
        """
        how = self.transform
        rng = rng if rng is not None else torch.Generator().manual_seed(0)
        walk = draw(rng)
        _, levels, cost = self.survey(walk)
        saved = torch.tensor([float(cost.saved[p]) for p in self.parts])
        if len(levels) < 2:
            raise ValueError("a trajectory of one step: expected at least two, to inherit from")
        router = Router(len(levels), self.parts, how.tau, rng, how.start).to(walk.x.device)
        wanted = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        objective = (goal or StepwiseDenoising)(
            self,
            draw,
            router,
            saved,
            penalty=how.penalty,
            proxy=how.proxy,
            refresh=how.refresh,
            normalized=how.normalized,
            rng=rng,
        )
        try:
            self.mixture = router
            done = fit(
                objective,
                lambda rng: {},
                torch.optim.AdamW(router.parameters(), lr=how.lr, weight_decay=0.0),
                steps=how.iterations,
                rng=rng,
                clip=None,
                progress=progress,
                folder=folder,
            )
        finally:
            self.mixture = None
            for name, p in self.model.named_parameters():
                p.requires_grad_(wanted[name])
        router.clamp()
        table = router.table()
        route = router.route(how.penalty.inherits(table, saved, how.tau), levels)
        self.follow(route)
        self.restart()
        self.learned = {
            "iterations": done.step,
            "seconds": round(done.seconds, 1),
            "beta": objective.beta,
            "lambda": objective.weights.tolist(),
            "loss": done.history[-1]["loss"] if done.history else None,
            "r_by_step": [round(v, 4) for v in table.mean(1).tolist()],
        }
        return route

    def report(self) -> dict[str, Any]:
        """Return `Routed.report`, and after learning: beta, lambda by step, mean r by step."""
        out = super().report()
        return out | {"learned": dict(self.learned)} if self.learned is not None else out


def learn_cache(
    pipe: Any,
    what: int | Sequence[str | int] = 16,
    *,
    steps: int = 20,
    guidance: float | None = None,
    batch: int = 4,
    seed: int = 0,
    how: Harmonica | None = None,
    progress: bool = True,
) -> Harmonized:
    """Put a learned cache on the network of a pipeline and return its handle.

    Args:
        pipe: what `effuse.wrap` takes.
        what: prompts or labels to learn on, or how many; see `effuse.compress.calibrate`.
        steps: of the sampling that the table is for.
        guidance: of that sampling; the pipeline's own if None.
        batch: pictures at a time.
        seed: of everything drawn.
        how: by default half of the cost is inherited, at a learning rate of 0.1 for 2,000 steps.
        progress: show a bar.
    """
    from effuse.compress.calibrate import network_of

    how = how or Harmonica(penalty=Share(0.5), lr=0.1, iterations=2000, normalized=True)
    handle = how.attach(network_of(pipe))
    try:
        handle.learn(
            walks(pipe, what, steps=steps, guidance=guidance, batch=batch),
            rng=torch.Generator().manual_seed(seed),
            progress=progress,
        )
    except BaseException:
        handle.detach()
        raise
    return handle
