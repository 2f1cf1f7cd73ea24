"""Before and after: same prompts, same seeds, one machine, one page."""

from effuse.ops.picture import save_grid

from .comparison import Comparison, Score, compare
from .draw import Entry, draw

__all__ = ["Comparison", "Entry", "Score", "compare", "draw", "save_grid"]
