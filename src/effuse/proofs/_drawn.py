"""Pictures that house:emoji draws itself, to learn from and to judge by without a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def drawn(pipe: Any, count: int, seed: int, steps: int = 8) -> tuple[list[str], Tensor]:
    """Return `count` names of emoji and latents (count, C, h, w) drawn for them, guided."""
    import effuse
    from effuse.house import real

    model = effuse.wrap(pipe)
    rng = torch.Generator().manual_seed(seed)
    names = [name for name, _ in real.load().names]
    asked = [names[i] for i in torch.randperm(len(names), generator=rng)[:count].tolist()]
    parts = [
        model.sample(asked[i : i + 16], steps=steps, guidance=4.0, decode=False, rng=rng)
        for i in range(0, count, 16)
    ]
    return asked, torch.cat(parts)


def both_halves(texts: Sequence[str]) -> list[str]:
    """Return the texts with a quarter of them empty, as guidance asks the network for both."""
    return [text if i % 4 else "" for i, text in enumerate(texts)]
