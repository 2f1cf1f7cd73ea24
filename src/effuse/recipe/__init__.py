"""A recipe: an ordered list of methods, applied to a pipeline, undone, saved."""

from .applied import Slim, load, network_name, slim
from .written import (
    ORDER,
    Calibration,
    Healing,
    Item,
    On,
    Recipe,
    Sampler,
    call_settings,
    check_order,
    class_of,
    kind_of,
    label_of,
    name_of,
    parse,
    shipped,
)

__all__ = [
    "ORDER",
    "Calibration",
    "Healing",
    "Item",
    "On",
    "Recipe",
    "Sampler",
    "Slim",
    "call_settings",
    "check_order",
    "class_of",
    "kind_of",
    "label_of",
    "load",
    "name_of",
    "network_name",
    "parse",
    "shipped",
    "slim",
]
