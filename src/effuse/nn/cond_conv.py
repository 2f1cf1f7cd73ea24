"""A convolution whose kernel is mixed anew for each sample from several kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Router = Literal["sigmoid", "softmax"]


class CondConv2d(nn.Module):
    """Several kernels, one convolution: y = conv(x; sum_e r_e W_e) + sum_e r_e b_e.

    r = act(FC(GAP(x)) + FC_t(time)) + offset, per sample; GAP is the mean over the picture. With
    equal kernels and sum r = 1 it is the plain convolution whatever the router says. Executed
    multiply-accumulates are those of one convolution and E times its weights a sample.

    Source: CondConv (Yang et al. 2019) as used for "multi-expert conditional convolution" in A-SDM.

    Args:
        weight: (E, out, in / groups, k, k) the kernels.
        bias: (E, out) or `None`.
        stride: of the convolution, as are padding, dilation and groups.
        padding: zeros added at each side.
        dilation: spacing of the kernel.
        groups: of channels.
        router: "sigmoid", the paper's, or "softmax".
        offset: (E,) added to the routing weights; `None` for zero.
        time: width of an embedding the router sees too, `None` for none.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        router: Router = "sigmoid",
        offset: Tensor | None = None,
        time: int | None = None,
    ):
        super().__init__()
        if router not in ("sigmoid", "softmax"):
            raise ValueError(f"router={router!r}: expected 'sigmoid' or 'softmax'")
        experts, channels = weight.shape[0], weight.shape[2] * groups
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.router = groups, router
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        device, dtype = weight.device, weight.dtype
        self.gate = nn.Linear(channels, experts, device=device, dtype=dtype)
        self.time_gate = (
            None
            if time is None
            else nn.Linear(time, experts, bias=False, device=device, dtype=dtype)
        )
        for layer in (self.gate, self.time_gate):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.gate.bias)
        start = torch.zeros(experts) if offset is None else offset
        self.offset: Tensor
        self.register_buffer("offset", start.to(device, dtype))

    @classmethod
    def from_convs(
        cls,
        convs: Sequence[nn.Conv2d],
        *,
        router: Router = "sigmoid",
        exact: bool = True,
        time: int | None = None,
    ) -> CondConv2d:
        """Take kernels from convolutions of equal shape; the first is the one that is kept.

        exact: begin as the first convolution, bit for bit, with a router that still learns at full
            rate (its weights are zero and `offset` is one-hot - act(0)); else `offset` is zero.

        Raises:
            ValueError: the convolutions differ in shape or geometry, or pad with something else
                than zeros.
        """
        if not convs:
            raise ValueError("convs is empty: expected the kept convolution first")
        first = convs[0]
        for i, conv in enumerate(convs):
            for name in ("weight", "stride", "padding", "dilation", "groups", "padding_mode"):
                mine, theirs = getattr(first, name), getattr(conv, name)
                if name == "weight":
                    mine, theirs = tuple(mine.shape), tuple(theirs.shape)
                if mine != theirs:
                    raise ValueError(
                        f"convs[{i}]: {name} is {theirs}, expected {mine} as the first"
                    )
            if (conv.bias is None) != (first.bias is None):
                raise ValueError(f"convs[{i}]: one has a bias and the other none")
        if first.padding_mode != "zeros" or isinstance(first.padding, str):
            raise ValueError(
                f"padding {first.padding_mode} {first.padding}: expected zeros, in pixels"
            )
        weight = torch.stack([c.weight.detach() for c in convs])
        biases = [c.bias.detach() for c in convs if c.bias is not None]
        bias = torch.stack(biases) if biases else None
        offset = None
        if exact:
            start = weight.new_zeros(len(convs))
            offset = -(start.sigmoid() if router == "sigmoid" else start.softmax(-1))
            offset[0] += 1
        out = cls(
            weight.clone(),
            bias,
            stride=first.stride,
            padding=first.padding,
            dilation=first.dilation,
            groups=first.groups,
            router=router,
            offset=offset,
            time=time,
        )
        return out.train(first.training)

    def route(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Return r: (B, E) for x: (B, C, H, W) and the embedding time: (B, T), if it is used."""
        z = self.gate(x.mean((2, 3)))
        if self.time_gate is not None:
            if time is None:
                raise ValueError("time is missing: this router was made with a time embedding")
            z = z + self.time_gate(time)
        act = z.sigmoid() if self.router == "sigmoid" else z.softmax(-1)
        return act + self.offset

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Convolve x: (B, C, H, W), each sample with its own kernel."""
        r = self.route(x, time)
        kernels = torch.einsum("be,eoihw->boihw", r, self.weight)
        biases = None if self.bias is None else r @ self.bias
        if x.device.type == "cpu":
            alike = not torch.is_grad_enabled() and bool((r == r[:1]).all())
            if alike:  # a gradient would have to reach each row's own routing weights
                kernel, bias = kernels[0], None if biases is None else biases[0]
                rest = (self.stride, self.padding, self.dilation, self.groups)
                return F.conv2d(x, kernel, bias, *rest)
            return self._one_by_one(x, kernels, biases)
        return self._grouped(x, kernels, biases)

    def _one_by_one(self, x: Tensor, kernels: Tensor, biases: Tensor | None) -> Tensor:
        """Loop over the batch: faster where grouped convolutions are slow."""
        rows = [
            F.conv2d(
                x[i : i + 1],
                kernels[i],
                None if biases is None else biases[i],
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
            )
            for i in range(len(x))
        ]
        return torch.cat(rows)

    def _grouped(self, x: Tensor, kernels: Tensor, biases: Tensor | None) -> Tensor:
        """Convolve the batch at once, its samples as groups of channels."""
        out = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            kernels.flatten(0, 1),
            None if biases is None else biases.flatten(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups * len(x),
        )
        return out.reshape(len(x), -1, *out.shape[2:])

    def extra_repr(self) -> str:
        """Name what `print` shows."""
        experts, out, width, *kernel = self.weight.shape
        return (
            f"{width * self.groups}, {out}, kernel_size={tuple(kernel)}, experts={experts}, "
            f"stride={self.stride}, padding={self.padding}, router={self.router!r}"
        )
