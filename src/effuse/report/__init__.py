"""Before and after: same prompts, same seeds, one machine, one page."""

from effuse.ops.picture import picture_file, save_grid

from .comparison import Comparison, Score, compare, ready
from .draw import Entry, draw

__all__ = ["Comparison", "Entry", "Score", "compare", "draw", "picture_file", "ready", "save_grid"]
