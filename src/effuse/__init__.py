"""Makes a diffusion pipeline small, fast and controllable, with the measurements beside it.

The names below are the face; each is imported when first used, so that `import effuse` itself
imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Diffusers loads a saved component only from a module that is already imported: this is the one.
from effuse.bridge import saved as _saved  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

    load: Callable[..., Any]
    wrap: Callable[..., Any]
    slim: Callable[..., Any]
    sample: Callable[..., Any]
    compare: Callable[..., Any]
    methods: Callable[..., Any]
    prove: Callable[..., Any]
    scheduler: Callable[..., Any]

__version__ = "0.1.0"

_FACE = {
    "load": "effuse.recipe",
    "wrap": "effuse.bridge.pipeline",
    "slim": "effuse.recipe",
    "sample": "effuse.core.sampling",
    "compare": "effuse.report",
    "methods": "effuse.core.method",
    "prove": "effuse.proofs",
    "scheduler": "effuse.bridge.scheduler",
}

__all__ = [
    "__version__",
    "compare",
    "load",
    "methods",
    "prove",
    "sample",
    "scheduler",
    "slim",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'effuse' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_FACE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
