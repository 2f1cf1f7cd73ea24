"""Control: wrap denoisers, steer the walk."""

from .base import Control, Controlled, control_named, controlled
from .classifier import Classified, NoisyClasses
from .densities import AND, OR, Fixed, Rule
from .guide import Guide
from .hint import Hint
from .superdiff import (
    Maruyama,
    Reverse,
    Several,
    SigmaEuler,
    Superdiff,
    Superposition,
    SuperpositionODE,
    Trace,
)
from .w2sd import (
    W2SD,
    Branch,
    Pair,
    Reflect,
    Source,
    Target,
    guidance_pair,
    hint_pair,
    lora_pair,
    model_pair,
    prompt_pair,
)

__all__ = [
    "AND",
    "OR",
    "W2SD",
    "Branch",
    "Classified",
    "Control",
    "Controlled",
    "Fixed",
    "Guide",
    "Hint",
    "Maruyama",
    "NoisyClasses",
    "Pair",
    "Reflect",
    "Reverse",
    "Rule",
    "Several",
    "SigmaEuler",
    "Source",
    "Superdiff",
    "Superposition",
    "SuperpositionODE",
    "Target",
    "Trace",
    "control_named",
    "controlled",
    "guidance_pair",
    "hint_pair",
    "lora_pair",
    "model_pair",
    "prompt_pair",
]
