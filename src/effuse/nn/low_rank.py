"""Linear and convolution layers as an ordered product of two, of which the first parts suffice.

    y = U_b (V_b^T x) + bias,    W_b = sum_{i <= b} u_i v_i^T

`down` is V^T (a linear layer or a k x k convolution), `up` is U (a linear layer or a 1 x 1
convolution): two plain layers in a row, which can be exported and quantized like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = 1e-24  # under the root of a tail's norm: at zero its gradient is then zero


class LowRank(nn.Module):
    """A layer whose weight is a product of rank at most r, cut to its first components at will.

    down: V^T, r outputs, no bias. up: U, r inputs. bias: that of the layer, kept apart so that no
    component is left at rank 0.
    kept: components that are not dropped yet. limit: how many run now, `None` for all kept.
    """

    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d

    def __init__(self, rank: int, bias: Tensor | None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)
        self.kept = rank
        self.limit: int | None = None

    @property
    def rank(self) -> int:
        """The number of components that are stored."""
        return int(self.down.weight.shape[0])

    @property
    def left(self) -> Tensor:
        """U: (out, r)."""
        return self.up.weight.flatten(1)

    @property
    def right(self) -> Tensor:
        """V^T: (r, fan in)."""
        return self.down.weight.flatten(1)

    @property
    def runs(self) -> int:
        """How many components a call uses."""
        return self.kept if self.limit is None else min(self.kept, self.limit)

    @property
    def weight(self) -> Tensor:
        """The product, shaped as the weight of the dense layer."""
        b = self.runs
        product = self.left[:, :b] @ self.right[:b]
        return product.view(product.shape[0], *self.down.weight.shape[1:])

    @property
    def per_component(self) -> int:
        """Multiplications a component takes at one output position: m + n."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def dense_cost(self) -> int:
        """Multiplications of the dense layer at one output position: m n."""
        return self.left.shape[0] * self.right.shape[1]

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return U_b (V_b^T x) + bias with the first b = `runs` components."""
        b = self.runs
        if b == self.rank:
            return self._add(self.up(self.down(x)))
        return self._add(self._cut(x, b))

    def _cut(self, x: Tensor, b: int) -> Tensor:
        raise NotImplementedError

    def _add(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def tails(self) -> tuple[Tensor, Tensor]:
        """Return ||U_{b:}|| and ||V_{b:}|| for b = 1..kept, each (kept,), in float32 or better."""
        left, right = self.left[:, : self.kept], self.right[: self.kept]
        each = _wide(left).square().sum(0), _wide(right).square().sum(1)
        u, v = ((e.flip(0).cumsum(0).flip(0) + TINY).sqrt() for e in each)
        return u, v

    @torch.no_grad()
    def importance(self) -> Tensor:
        """Return ||U_{b:}|| ||V_{b:}|| for b = 1..kept, (kept,): never rises with b."""
        u, v = self.tails()
        return u * v

    @torch.no_grad()
    def energies(self) -> Tensor:
        """Return (||u_b|| ||v_b||)^2 of each kept component alone, (kept,)."""
        left, right = _wide(self.left[:, : self.kept]), _wide(self.right[: self.kept])
        return left.square().sum(0) * right.square().sum(1)

    def cut(self, rank: int) -> LowRank:
        """Return a new layer that stores the first `rank` components only."""
        out = _built(self, rank)
        with torch.no_grad():
            out.down.weight.copy_(self.down.weight[:rank])
            out.up.weight.copy_(self.up.weight[:, :rank])
            if self.bias is not None and out.bias is not None:
                out.bias.copy_(self.bias)
        return out.train(self.training)

    def dense(self) -> nn.Linear | nn.Conv2d:
        """Return the plain layer with the product of the kept components as its weight."""
        out = self._plain()
        with torch.no_grad():
            limit, self.limit = self.limit, None
            out.weight.copy_(_product(self))
            self.limit = limit
            if self.bias is not None and out.bias is not None:
                out.bias.copy_(self.bias)
        return out.train(self.training)

    def _plain(self) -> nn.Linear | nn.Conv2d:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what a printed layer says besides."""
        return f"rank={self.rank}, kept={self.kept}"


class LowRankLinear(LowRank):
    """A linear layer of rank r: (*, in) to (*, out). `right` is (r, in), `left` (out, r)."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, like: nn.Linear, rank: int):
        super().__init__(rank, _empty_bias(like))
        where = _where(like)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.down = nn.Linear(like.in_features, rank, bias=False, **where)
        self.up = nn.Linear(rank, like.out_features, bias=False, **where)

    def _cut(self, x: Tensor, b: int) -> Tensor:
        return F.linear(F.linear(x, self.down.weight[:b]), self.up.weight[:, :b])

    def _add(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def _plain(self) -> nn.Linear:
        where = _where(self.down)
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **where)


class LowRankConv2d(LowRank):
    """A convolution of rank r: k x k to r channels, then 1 x 1; stride and padding in the first."""

    down: nn.Conv2d
    up: nn.Conv2d

    def __init__(self, like: nn.Conv2d, rank: int):
        if like.groups != 1:
            raise ValueError(f"groups={like.groups}: expected a convolution of one group")
        super().__init__(rank, _empty_bias(like))
        where = _where(like)
        self.in_channels, self.out_channels = like.in_channels, like.out_channels
        self.kernel_size, self.stride, self.padding = like.kernel_size, like.stride, like.padding
        self.dilation, self.padding_mode, self.groups = like.dilation, like.padding_mode, 1
        self.down = nn.Conv2d(like.in_channels, rank, bias=False, **self._how(), **where)
        self.up = nn.Conv2d(rank, like.out_channels, 1, bias=False, **where)

    def _how(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        return {n: getattr(self, n) for n in names}

    def _cut(self, x: Tensor, b: int) -> Tensor:
        if b == 0:
            return F.conv2d(self.down(x), torch.zeros_like(self.up.weight))
        h = self.down._conv_forward(x, self.down.weight[:b], None)
        return F.conv2d(h, self.up.weight[:, :b])

    def _add(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias[:, None, None]

    def _plain(self) -> nn.Conv2d:
        where = _where(self.down)
        bias = self.bias is not None
        return nn.Conv2d(self.in_channels, self.out_channels, bias=bias, **self._how(), **where)


def can_factor(module: nn.Module) -> bool:
    """Say whether a layer is a plain linear layer, or a convolution of one group."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def full_rank(module: nn.Linear | nn.Conv2d) -> int:
    """Return min(m, n) of the weight as a matrix (out, fan in)."""
    return min(module.weight.flatten(1).shape)


def empty_like(module: nn.Module, rank: int) -> LowRank:
    """Return an untrained low-rank layer in the shape of a plain one.

    Raises:
        TypeError: the layer is neither linear nor a convolution.
        ValueError: the rank is not between 1 and min(m, n), or the convolution has groups.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"{type(module).__name__}: expected a linear or convolution layer")
    if not 0 < rank <= full_rank(module):
        raise ValueError(f"rank={rank}: expected 1 to {full_rank(module)}, min(m, n) of the weight")
    if isinstance(module, nn.Linear):
        return LowRankLinear(module, rank)
    return LowRankConv2d(module, rank)


@torch.no_grad()
def factored(module: nn.Module, rank: int | None = None, inputs: Tensor | None = None) -> LowRank:
    """Return a plain layer split by its SVD, W = A S B^T: U = A S^1/2, V = B S^1/2.

    Decomposed in float64 and rounded once, so half precision loses nothing it had. At full rank
    the outputs are the layer's to rounding; at rank b the weight is off by the root of the sum of
    the squared singular values after b (Eckart-Young).

    With `inputs`, the second moment C = E[x x^T] of what the layer reads, W R = A S B^T is split
    instead, C = R R^T: U = A S^1/2, V^T = S^1/2 B^T R^-1. At rank b the *outputs* are then off by
    the least possible, the sum of the squared singular values after b in the mean.

    Args:
        module: linear, or a convolution of one group.
        rank: components stored; all if None.
        inputs: (fan in, fan in), see `InputMoments`; a thousandth of its mean diagonal is
            added, for what the calls did not hold.

    Raises:
        TypeError: a layer of another kind.
        ValueError: a rank out of range, or weights or inputs that are not finite.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise TypeError(f"{type(module).__name__}: expected a linear or convolution layer")
    out = empty_like(module, full_rank(module) if rank is None else rank)
    matrix = module.weight.flatten(1).double()
    if not torch.isfinite(matrix).all():
        raise ValueError("the weight is not finite: it has no singular values")
    root = None if inputs is None else _root(inputs.to(matrix))
    a, s, b = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
    half, r = s[: out.rank].sqrt(), out.rank
    right = half[:, None] * b[:r]
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    out.up.weight.copy_((a[:, :r] * half).view_as(out.up.weight))
    out.down.weight.copy_(right.view_as(out.down.weight))
    if module.bias is not None and out.bias is not None:
        out.bias.copy_(module.bias)
    return out.train(module.training)


def _root(moment: Tensor) -> Tensor:
    """Return the lower triangular R of R R^T = C + 1e-3 mean(diag C) I."""
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment of the inputs is not finite")
    ridge = 1e-3 * float(moment.diagonal().mean()) or 1.0
    return torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)).to(moment))


class InputMoments:
    """Sums x x^T over all positions that linear layers and convolutions read, while inside.

    `moments` holds the mean, (fan in, fan in) in float64 each; a convolution reads patches.

    Args:
        layers: by name; `nn.Linear`, `nn.Conv2d` or `LowRank`.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self._layers, self._sums, self._counts = dict(layers), {}, {}  # type: ignore[var-annotated]

    @property
    def moments(self) -> dict[str, Tensor]:
        """The mean of x x^T of each layer that was called."""
        return {n: s / self._counts[n] for n, s in self._sums.items()}

    def __enter__(self) -> InputMoments:
        """Begin to listen."""
        self._hooks = [
            m.register_forward_pre_hook(self._listen(n, getattr(m, "down", m)))
            for n, m in self._layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        for hook in self._hooks:
            hook.remove()

    def _listen(self, name: str, reads: Any) -> Any:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].float()
            if isinstance(reads, nn.Conv2d):
                around = reads._reversed_padding_repeated_twice
                mode = "constant" if reads.padding_mode == "zeros" else reads.padding_mode
                x = F.unfold(
                    F.pad(x, around, mode), reads.kernel_size, reads.dilation, 0, reads.stride
                ).mT
            x = x.flatten(0, -2)
            self._sums[name] = self._sums.get(name, 0.0) + (x.T @ x).double()
            self._counts[name] = self._counts.get(name, 0) + len(x)

        return hook


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """Return the low-rank layers of a network by dotted name, each once, in its order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRank)}


@contextmanager
def ranks(model: nn.Module, limits: Mapping[str, int]) -> Iterator[None]:
    """Run the named layers with their first components only, while inside.

    Raises:
        ValueError: a name that is no low-rank layer, or a rank outside 1 to what is kept.
    """
    layers = low_rank_layers(model)
    for name, b in limits.items():
        if name not in layers:
            raise ValueError(f"{name!r}: expected one of the low-rank layers, {', '.join(layers)}")
        if not 0 < b <= layers[name].kept:
            raise ValueError(f"{name}: rank {b}, expected 1 to {layers[name].kept}")
    before = {n: layers[n].limit for n in limits}
    try:
        for name, b in limits.items():
            layers[name].limit = b
        yield
    finally:
        for name, limit in before.items():
            layers[name].limit = limit


def group_lasso(model: nn.Module) -> Tensor:
    """Return sum_i sum_b (||U^i_{b:}|| + ||V^i_{b:}||) over all low-rank layers, ().

    Groups are nested tails, so the last components go to zero first.

    Raises:
        ValueError: the network has no low-rank layer with a component left.
    """
    layers = [layer for layer in low_rank_layers(model).values() if layer.kept]
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no low-rank layer with a component left")
    return torch.stack([torch.stack(layer.tails()).sum() for layer in layers]).sum()


def _built(like: LowRank, rank: int) -> LowRank:
    return empty_like(like._plain(), rank)


def _product(layer: LowRank) -> Tensor:
    left, right = layer.left[:, : layer.kept].double(), layer.right[: layer.kept].double()
    return (left @ right).view(-1, *layer.down.weight.shape[1:]).to(layer.down.weight.dtype)


def _empty_bias(like: nn.Linear | nn.Conv2d) -> Tensor | None:
    return None if like.bias is None else torch.zeros_like(like.bias)


def _where(like: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    return {"device": like.weight.device, "dtype": like.weight.dtype}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
