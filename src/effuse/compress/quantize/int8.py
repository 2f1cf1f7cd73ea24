"""8-bit weights, and 8-bit activations where whole numbers are multiplied faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from effuse.compress.swap import Swapped, layers_of
from effuse.core.contracts import Transform, Where, everywhere
from effuse.core.errors import check_positive
from effuse.core.method import method
from effuse.nn.quantized import COMPUTES, Quantized, quantizable, quantized


class Choice(ABC):
    """How each layer computes: gives a name of `effuse.nn.quantized.COMPUTES`. Frozen dataclass."""

    @abstractmethod
    def of(self, module: nn.Module) -> str:
        """Return the way for a linear or convolution layer, from its shape alone."""


@dataclass(frozen=True)
class WeightOnly(Choice):
    """Every layer makes its weight anew at each call: smaller, activations exact, never faster."""

    def of(self, module: nn.Module) -> str:
        """See `Choice.of`."""
        return "dequantized"


@dataclass(frozen=True)
class Dynamic(Choice):
    """Layers of at least `least` in- and output channels compute in whole numbers, others do not.

    What is saved grows with their product, what is spent on the activations with their sum. A 1x1
    convolution, which brings its activations into another order for nothing but one product, needs
    `least_1x1` output channels. The defaults are where the two met on a processor with AVX-512
    VNNI; the proof measures it again. By shape alone, so that results do not depend on a clock;
    a processor that cannot (`effuse.nn.quantized.EXACT`) computes all layers as `WeightOnly` does.
    """

    least: int = 64
    least_1x1: int = 128

    def __post_init__(self) -> None:
        """Check the fields."""
        check_positive("least", self.least)
        check_positive("least_1x1", self.least_1x1)

    def of(self, module: nn.Module) -> str:
        """See `Choice.of`."""
        weight: Any = module.weight
        position = weight.ndim == 4 and weight[0, 0].numel() == 1
        wide = weight.shape[0] >= (self.least_1x1 if position else self.least)
        return "integer" if wide and weight.shape[1] >= self.least else "dequantized"


@method(
    "int8",
    buys="a quarter of the bytes of float32, half of those of float16; integer speed on CPU",
    missing="static activation scales; integer kernels of accelerators were not measured",
    example=lambda: Int8(least=8, choice=Dynamic(16, 16)),
)
@dataclass(frozen=True)
class Int8(Transform):
    """Store weights of linear and convolution layers as int8; multiply whole numbers.

    w_n ~ s_n q_n,  s_n = max |w_n| / 127,  q_n = round(w_n / s_n)        for output channel n
    y_mn = s_m s_n sum_k q^x_mk q_nk + bias_n,  s_m = max |x_m| / 127      `Dynamic`

    No weight moves by more than s_n / 2. Scales s_m are found at each call, for each row (linear)
    or sample (convolution, which has a zero too): no calibration, and no row depends on its batch.
    Sums of products are exact in int32. Bias, norms and all other parameters stay.

    choice: `Dynamic` activations or `WeightOnly`.
    least: layers with fewer in- or output channels stay as they are: the first and the last one of
        a network, which are the most sensitive and hold next to nothing.
    where: layers it forbids stay as well.
    """

    choice: Choice = field(default_factory=Dynamic)
    least: int = 32
    where: Where = everywhere
    kind = "quantize"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.choice, Choice):
            raise TypeError(f"choice={self.choice!r}: expected an object, such as Dynamic()")
        check_positive("least", self.least)

    def wants(self, name: str, module: nn.Module) -> bool:
        """Say whether a layer is stored as int8."""
        if not quantizable(module):
            return False
        weight: Any = module.weight
        return min(weight.shape[:2]) >= self.least and self.where(name, module)

    def attach(self, model: nn.Module) -> Eight:
        """Swap the layers of `model`; one that has none stays as it is."""
        found = {n: self.choice.of(m) for n, m in layers_of(model, self.wants)}
        return self.restore(model, {"layers": found})

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Eight:
        """Swap the layers that `plan` names, each with the way it computes."""
        layers = {
            name: quantized(model.get_submodule(name), COMPUTES[how])
            for name, how in plan["layers"].items()
        }
        return Eight(self, model, layers)


class Eight(Swapped):
    """A network with int8 layers; see `Int8`."""

    layers: dict[str, Quantized]  # type: ignore[assignment]

    def plan(self) -> dict[str, Any]:
        """Return each layer with the way it computes."""
        return {"layers": {name: layer.kind for name, layer in self.layers.items()}}

    def report(self) -> dict[str, Any]:
        """Return counted bytes, and how many layers compute in whole numbers."""
        whole = sum(layer.kind == "integer" for layer in self.layers.values())
        return {**super().report(), "integer_layers": whole}
