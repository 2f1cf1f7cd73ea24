"""Layers of a network swapped for others that hold less, and back; for all that swap layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from effuse.core.contracts import Applied, Transform


def layers_of(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that `wanted` accepts, each once, under its first dotted name."""
    for name, module in model.named_modules():
        if name and wanted(name, module):
            yield name, module


def owners(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every (module, attribute) under which `layer` stands in `model`."""
    return [
        (parent, child)
        for parent in model.modules()
        for child, module in parent._modules.items()
        if module is layer
    ]


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of what the module saves: its state dict, shared tensors once."""
    state = {t.data_ptr(): t for t in module.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in state.values())


class Changes:
    """Entries that were set in dictionaries of modules (parameters, children, numbers), in order.

    A module's own dictionaries are written, not its attributes, so that order and names stay.
    """

    def __init__(self) -> None:
        self._old: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, owner: dict[str, Any], key: str, value: Any) -> None:
        """Set owner[key] and remember what was there."""
        self._old.append((owner, key, owner[key]))
        owner[key] = value

    def resize(self, layer: nn.Module) -> None:
        """Let a layer of torch say the sizes its weight has, after that was cut."""
        for kind, names in _SIZES.items():
            if isinstance(layer, kind):
                for name, size in zip(names, layer.weight.shape, strict=False):
                    if name:
                        self.put(vars(layer), name, size)

    def undo(self) -> None:
        """Put everything back as it was, last first."""
        while self._old:
            owner, key, value = self._old.pop()
            owner[key] = value

    def forget(self) -> None:
        """Give up the way back, and with it the memory of what was taken away."""
        self._old.clear()


_SIZES: dict[Any, tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.GroupNorm: ("num_channels",),
    nn.Embedding: ("", "embedding_dim"),
}
"""By the type of a layer, the names of its sizes, in the order of its weight's axes."""


class Swapped(Applied):
    """New layers in the place of the original ones, which are kept until `finalize`.

    Args:
        transform: what made it.
        model: changed in place.
        layers: new layers by the dotted name of those they replace.
    """

    def __init__(self, transform: Transform, model: nn.Module, layers: Mapping[str, nn.Module]):
        self.transform, self.model, self.layers = transform, model, dict(layers)
        self.before = bytes_of(model)
        old = {name: model.get_submodule(name) for name in layers}
        self.replaced = sum(bytes_of(m) for m in old.values())
        places = [(name, place) for name, m in old.items() for place in owners(model, m)]
        self._old = [(*place, old[name]) for name, place in places]
        for name, (owner, child) in places:
            setattr(owner, child, self.layers[name])
        self.finalized = False

    def report(self) -> dict[str, Any]:
        """Return counted bytes of the layers and of the network, before and after."""
        return {
            "layers": len(self.layers),
            "layer_bytes_before": self.replaced,
            "layer_bytes": sum(bytes_of(m) for m in self.layers.values()),
            "bytes_before": self.before,
            "bytes": bytes_of(self.model),
        }

    def detach(self) -> None:
        """Put the original layers back."""
        if self.finalized:
            raise RuntimeError("the original layers were given up by finalize: load them again")
        for owner, child, module in self._old:
            setattr(owner, child, module)

    def finalize(self) -> None:
        """Give the original layers up, and with them their memory."""
        self._old, self.finalized = [], True
