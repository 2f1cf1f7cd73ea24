"""The classes that effuse writes into a pipeline's `model_index.json`, each imported on first use.

Diffusers resolves a component from outside its own libraries as `getattr(sys.modules[module],
name)` and never imports the module itself. `import effuse` imports this one, which costs nothing,
so every folder that effuse saved loads with `DiffusionPipeline.from_pretrained` after it.

A class that can be saved has two lines to add: its name and module in `_LAZY`, and
`__module__ = "effuse.bridge.saved"` first in its body, which is what `save_pretrained` writes down.
The class derives from `ModelMixin` or `SchedulerMixin`, whichever tells diffusers how to load it.
A network with transforms on it is a `Slim...` of its own class, made by `effuse.bridge.slimmed`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY: dict[str, str] = {
    "SolverScheduler": "effuse.bridge.scheduler",
    "Switched": "effuse.compress.rewire.switched",
}

# Diffusers looks for the base class in the same module, to learn the name of its load method.
_BASES = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "PreTrainedModel": "transformers",
}


def __getattr__(name: str) -> Any:
    if name.startswith("Slim"):
        return _slim(name)
    module = _LAZY.get(name) or _BASES.get(name)
    if module is None:
        raise AttributeError(f"module 'effuse.bridge.saved' has no attribute {name!r}")
    return getattr(import_module(module), name)


def _slim(name: str) -> Any:
    from effuse.bridge.slimmed import slim_class
    from effuse.core.errors import StoreError

    try:
        return slim_class(name.removeprefix("Slim"))
    except StoreError as error:
        raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_BASES})
