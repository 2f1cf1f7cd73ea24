"""ISS-P: sparse networks trained from scratch by shrinking the smallest weights at every step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effuse.compress.swap import Swapped, layers_of
from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_fraction, check_whole
from effuse.core.method import method
from effuse.nn.sparse import Sparse, prunable, sparse

MOST = 0.995
"""Share of a layer's weights that may be zero; a layer without weights passes nothing on."""


class Pattern(ABC):
    """Which weights of a layer are among the smallest."""

    @abstractmethod
    def smallest(self, size: Tensor, sparsity: float, rng: torch.Generator | None) -> Tensor:
        """Return a mask like size: (*) >= 0, magnitudes, true for those to shrink."""


def count_of(sparsity: float, n: int) -> int:
    """Return how many of n weights are shrunk: ceil(p n), at most floor(0.995 n)."""
    return min(math.ceil(sparsity * n - 1e-9), math.floor(MOST * n))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Exactly ceil(p n) of the layer, at most 99.5 %; of equal ones the first."""

    def smallest(self, size: Tensor, sparsity: float, rng: torch.Generator | None) -> Tensor:
        """See `Pattern.smallest`."""
        flat = size.flatten()
        count = count_of(sparsity, len(flat))
        out = torch.zeros_like(flat, dtype=torch.bool)
        if count:
            limit = flat.kthvalue(count).values
            out = flat < limit
            ties = (flat == limit).nonzero().flatten()[: count - int(out.sum())]
            out[ties] = True
        return out.reshape(size.shape)


@dataclass(frozen=True)
class Sampled(Pattern):
    """Those at or below the p-quantile of `count` magnitudes drawn at random: faster, about p n.

    Layers of `count` weights or fewer are taken exactly. The paper's count is 32 400.
    """

    count: int = 32_400

    def __post_init__(self) -> None:
        """Check the count."""
        check_whole("count", self.count, 2)

    def smallest(self, size: Tensor, sparsity: float, rng: torch.Generator | None) -> Tensor:
        """See `Pattern.smallest`."""
        flat = size.flatten()
        if len(flat) <= self.count or not sparsity:
            return Unstructured().smallest(size, sparsity, rng)
        device = flat.device if rng is None else rng.device
        picked = torch.randperm(len(flat), generator=rng, device=device)[: self.count]
        few = flat[picked.to(flat.device)]
        limit = few.kthvalue(count_of(sparsity, len(few))).values
        return (flat <= limit).reshape(size.shape)


@dataclass(frozen=True)
class NofM(Pattern):
    """The n smallest of every m weights that lie together along the inputs; 2 of 4 is hardware's.

    The sparsity is n / m whatever the hook's says. Linear layers in groups along the inputs,
    convolutions along the input channels.

    Raises:
        ValueError: a layer's inputs are not a multiple of m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_whole("n", self.n, 1)
        check_whole("m", self.m, 2)
        if self.n >= self.m:
            raise ValueError(f"n={self.n}, m={self.m}: expected n below m")

    def smallest(self, size: Tensor, sparsity: float, rng: torch.Generator | None) -> Tensor:
        """See `Pattern.smallest`."""
        if size.shape[1] % self.m:
            raise ValueError(
                f"a layer of {size.shape[1]} inputs: expected a multiple of m={self.m}; leave it "
                "out with `where`"
            )
        last = size.movedim(1, -1)
        groups = last.reshape(*last.shape[:-1], -1, self.m)
        rank = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
        return (rank < self.n).reshape(last.shape).movedim(-1, 1)


Sparsity = float | Callable[[int], float]


class SoftShrink:
    """Shrinks the smallest weights of each layer a little, after every step of the optimizer.

    U_k = { j : |w_j| among the ceil(p n) smallest },   w_j <- r w_j  for j in U_k

    U_k is found anew each time: a weight that is driven out of it is dense again, so the structure
    follows the training. Under a steady drive u a weight in U tends to r u / (1 - r). `ratio` 1 is
    the dense training, bit for bit; 0 is iterative hard thresholding. Biases, norms and the
    optimizer's state are left alone.

        shrink = SoftShrink(model, 0.95)
        for batch in first:  loss(batch).backward(); optimizer.step(); shrink.step()
        shrink.fix()                                   # zero the last U; from here on step() masks
        for batch in second: loss(batch).backward(); optimizer.step(); shrink.step()
        Sparsify(0.95).attach(model)                   # store it small

    Call it after `optimizer.step()` and before an average of weights is updated; with automatic
    mixed precision on the float32 weights, and not where the scaler skipped the step. Processes
    that train together shrink alike, with `Sampled` if their generators are.

    Args:
        model: its linear layers and convolutions, each weight once however often it is tied.
        sparsity: p in [0, 1), or a function of the step from 0 giving it.
        ratio: r in [0, 1]; the paper's 0.95.
        where: layers that may be shrunk; the paper leaves out the first and the last.
        pattern: `Unstructured`, `Sampled` or `NofM`.
        rng: draws for `Sampled`.

    Raises:
        ValueError: no such numbers, or no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Sparsity = 0.95,
        ratio: float = 0.95,
        *,
        where: Where = everywhere,
        pattern: Pattern | None = None,
        rng: torch.Generator | None = None,
    ):
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: expected a fraction in [0, 1]")
        if not callable(sparsity) and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity!r}: expected a fraction in [0, 1)")
        self.sparsity, self.ratio = sparsity, ratio
        self.pattern, self.rng = pattern or Unstructured(), rng
        self.weights: dict[str, Tensor] = {}
        seen = set()
        for name, layer in model.named_modules():
            if prunable(layer) and where(name, layer):
                weight: Any = layer.weight
                if id(weight) not in seen:
                    seen.add(id(weight))
                    self.weights[name] = weight
        if not self.weights:
            raise ValueError(
                f"{type(model).__name__} has no linear layer or convolution that `where` allows"
            )
        self.steps, self.masks = 0, dict[str, Tensor]()
        self.last: dict[str, Tensor] = {}
        self.flips = 0

    def now(self) -> float:
        """Return the sparsity of this step."""
        p = float(self.sparsity(self.steps)) if callable(self.sparsity) else self.sparsity
        if not 0 <= p < 1:
            raise ValueError(f"sparsity of step {self.steps}: {p!r}: expected a fraction in [0, 1)")
        return p

    @torch.no_grad()
    def step(self) -> None:
        """Shrink the weights of this step's U, or after `fix` put the zeros back."""
        if self.masks:
            for name, mask in self.masks.items():
                self.weights[name].masked_fill_(mask, 0.0)
            return
        p, self.flips = self.now(), 0
        for name, weight in self.weights.items():
            small = self.pattern.smallest(weight.abs(), p, self.rng)
            before = self.last.get(name)
            if before is not None:
                self.flips += int((small != before).sum())
            self.last[name] = small
            if self.ratio < 1:
                weight.mul_(torch.ones_like(weight).masked_fill_(small, self.ratio))
        self.steps += 1

    def fix(self) -> dict[str, Tensor]:
        """Zero the smallest weights as they are now, for good; returns the masks, true for zero."""
        p = self.now()
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.masks[name] = self.pattern.smallest(weight.abs(), p, None)
                weight.masked_fill_(self.masks[name], 0.0)
        return self.masks

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that is taken up again needs."""
        return {"steps": self.steps, "masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run.

        Raises:
            ValueError: masks of other layers.
        """
        masks = dict(state["masks"])
        if masks and masks.keys() != self.weights.keys():
            raise ValueError("masks of other layers: expected those of the model that was trained")
        self.steps, self.masks = int(state["steps"]), masks

    def gradients(self) -> dict[str, dict[str, float]]:
        """Return norm and variance of each layer's gradient as it stands: is it still trainable?"""
        out = {}
        for name, weight in self.weights.items():
            if weight.grad is not None:
                g = weight.grad.float()
                out[name] = {"norm": float(g.norm()), "variance": float(g.var())}
        return out


@method(
    "iss_p",
    seed=52,
    paper="Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
    year=2023,
    buys="a network trained sparse from scratch, a ninth of the bytes at 95 %",
    missing="speed: unstructured zeros are storage, not time, without kernels for them",
    example=lambda: Sparsify(0.5),
)
@dataclass(frozen=True)
class Sparsify(Transform):
    """Zero the smallest weights of each layer and store the others only.

    w_j <- 0  for the ceil(p n) smallest |w_j| of each layer;   stored: a bit a weight, the others

    After `SoftShrink` they are zero already, and nothing changes but the bytes; on a network that
    was trained dense it is one-shot magnitude pruning. `sparsity` 0 keeps all weights, and stores
    without loss what is zero by itself.

    sparsity: p in [0, 1), of each layer, at most 99.5 %. pattern: see `SoftShrink`. least: layers
    with fewer weights stay dense. where: layers it forbids stay dense too.
    """

    sparsity: float = 0.95
    pattern: Pattern = field(default_factory=Unstructured)
    least: int = 256
    where: Where = everywhere
    kind = "prune"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_fraction("sparsity", self.sparsity, zero=True)
        if self.sparsity == 1:
            raise ValueError("sparsity=1: expected a fraction in [0, 1)")
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"pattern={self.pattern!r}: expected an object, such as NofM(2, 4)")
        check_whole("least", self.least, 0)

    def wants(self, name: str, module: nn.Module) -> bool:
        """Say whether a layer is stored sparse."""
        if not prunable(module) or not self.where(name, module):
            return False
        weight: Any = module.weight
        return weight.numel() >= self.least

    def attach(self, model: nn.Module) -> Zeroed:
        """Swap the layers of `model`; one that has none stays as it is."""
        layers = {}
        for name, layer in layers_of(model, self.wants):
            weight: Any = layer.weight
            zero = self.pattern.smallest(weight.detach().abs(), self.sparsity, None)
            mask = ~zero & weight.detach().ne(0)
            layers[name] = sparse(layer, mask)
        return Zeroed(self, model, layers)

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Zeroed:
        """Swap the layers that `plan` names on a fresh `model`, with room for as many weights."""
        layers = {}
        for name, count in plan["layers"].items():
            layer: Any = model.get_submodule(name)
            mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
            mask[: int(count)] = True
            layers[name] = sparse(layer, mask.reshape(layer.weight.shape).to(layer.weight.device))
        return Zeroed(self, model, layers)


class Zeroed(Swapped):
    """A network whose layers store what is not zero; see `Sparsify`."""

    layers: dict[str, Sparse]  # type: ignore[assignment]

    def plan(self) -> dict[str, Any]:
        """Return the number of weights that each layer stores."""
        return {"layers": {name: layer.nonzero for name, layer in self.layers.items()}}

    def report(self) -> dict[str, Any]:
        """Return counted bytes, and the share of zeros in the layers."""
        every = sum(layer.weight.numel() for layer in self.layers.values())
        kept = sum(layer.nonzero for layer in self.layers.values())
        return {**super().report(), "zeros": 1 - kept / every if every else 0.0}
