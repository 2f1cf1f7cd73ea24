"""Do narrow sub-spaces teach better students than one wide space, and does the loss choose well?

A teacher, six blocks of BERT over bytes, fills in masked bytes of Python's own documentation. Two
sub-spaces of sizes learn its attention relations for some steps each; one merged space for as many
in all. Then students are cut out, and those of one seed taught the task itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.compress.search.autodistil import (
    AttentionRelationLoss,
    ElasticTransformer,
    Sandwich,
    SubSpace,
    held_out_loss,
    targets_of,
)
from effuse.compress.search.elastic import Size
from effuse.compress.search.predictors import agreement
from effuse.core.training import fit, warmup_cosine

from . import Claim, Evidence, Scale, proof

MASK, BYTES = 128, 129
SMALL = SubSpace((2, 3), (32, 40), (2, 3), (2.0, 3.0))
LARGE = SubSpace((4, 5), (56, 64), (4, 5), (2.0, 3.0))
MERGED = SubSpace((2, 3, 4, 5), (32, 40, 56, 64), (2, 3, 4, 5), (2.0, 3.0))
LOSS = AttentionRelationLoss(8)


@dataclass
class Text:
    """Bytes to read, and rows of them."""

    train: Tensor
    held: Tensor
    length: int = 48

    def batch(self, rng: torch.Generator, rows: int, held: bool = False) -> dict[str, Any]:
        """Return rows of bytes of which one in seven is hidden, and what they were."""
        source = self.held if held else self.train
        first = torch.randint(len(source) - self.length, (rows, 1), generator=rng)
        whole = source[first + torch.arange(self.length)]
        hidden = torch.rand(whole.shape, generator=rng) < 1 / 7
        shown = whole.masked_fill(hidden, MASK)
        return {"call": ((shown,), {}), "whole": whole, "hidden": hidden}


def text() -> Text:
    """Return Python's help topics as bytes below 128, the last tenth held out."""
    import pydoc_data.topics

    joined = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    data = torch.tensor(list(joined.encode("ascii", "ignore")[:400_000]))
    cut = len(data) * 9 // 10
    return Text(data[:cut], data[cut:])


class Filler(nn.Module):
    """An encoder and a layer that names the hidden bytes."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 128)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of the hidden bytes, in nats."""
        (args, kwargs), hidden = batch["call"], batch["hidden"]
        seen = self.encoder(*args, **kwargs)[0][hidden]
        return F.cross_entropy(self.head(seen), batch["whole"][hidden])


def learned(model: Filler, data: Text, steps: int, rows: int, lr: float, seed: int) -> Filler:
    """Train on the task."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(0.1)(i / steps)
        loss = model.train().loss(data.batch(rng, rows))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def task_loss(model: Filler, data: Text, count: int) -> float:
    """Return the loss on held-out text."""
    rng = torch.Generator().manual_seed(999)
    values = [model.loss(data.batch(rng, 32, held=True)) for _ in range(count)]
    return float(torch.stack(values).double().mean())


def teacher_of(data: Text, steps: int) -> Filler:
    """Return the trained teacher."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=BYTES,
            hidden_size=96,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=288,
            max_position_embeddings=data.length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        made = Filler(BertModel(config, add_pooling_layer=False), 96)
    return learned(made, data, steps, 24, 1e-3, 0)


def taught(
    data: Text, teacher: nn.Module, space: SubSpace, steps: int, seed: int, alone: bool = False
) -> ElasticTransformer:
    """Return a super-network after some steps of the sandwich; `alone`: of its largest size."""
    student = ElasticTransformer.from_pretrained_dense(teacher, space)
    sizes = (lambda rng: [space.largest]) if alone else None
    fit(
        Sandwich(teacher, student, LOSS, seed=seed, sizes=sizes),
        lambda rng: data.batch(rng, 8),
        torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01),
        steps=steps,
        rng=torch.Generator().manual_seed(seed),
        schedule=warmup_cosine(0.1),
        progress=False,
    )
    return student


def tuned(student: nn.Module, size: Size, data: Text, steps: int) -> Filler:
    """Return a student taught the task for some steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Filler(copy.deepcopy(student).requires_grad_(True), size.hidden)
    return learned(made, data, steps, 8, 1e-3, 7)


@proof("autodistil")
def prove(scale: Scale) -> Evidence:
    """Teach both ways, compare the same students, then see what the loss says of the task."""
    data = text()
    teacher = teacher_of(data, scale.pick(3, 150, 600)).requires_grad_(False)
    steps, few = scale.pick(2, 40, 600), scale.pick(1, 4, 8)
    rng = torch.Generator().manual_seed(5)
    batches = [data.batch(rng, 16, held=True) for _ in range(scale.pick(1, 2, 4))]
    targets = targets_of(teacher.encoder, batches, LOSS)
    lost = lambda net, size: held_out_loss(  # noqa: E731
        net, size, teacher.encoder, batches, LOSS, targets
    )
    rows: list[dict[str, Any]] = [
        {"variant": "teacher", "task_loss": task_loss(teacher, data, few)}
    ]
    merged_all: list[list[float]] = []
    parted_all: list[list[float]] = []
    chosen_from: dict[str, list[tuple[float, float]]] = {}
    for seed in range(scale.pick(1, 2, 2)):
        merged = taught(data, teacher.encoder, MERGED, 2 * steps, seed)
        for name, space in (("small", SMALL), ("large", LARGE)):
            part = taught(data, teacher.encoder, space, steps, seed)
            students = space.sizes()[:: scale.pick(8, 1, 1)]
            ours, theirs = ([lost(net, z) for z in students] for net in (part, merged))
            parted_all.append(ours)
            merged_all.append(theirs)
            for z, a, b in zip(students, ours, theirs, strict=True):
                row = {"variant": name, "seed": seed, **vars(z)}
                row |= {"parameters": part.parameters_at(z), "loss": a, "loss_merged": b}
                if seed == 0:
                    made = tuned(part.extract(z), z, data, scale.pick(1, 20, 100))
                    row["task_loss"] = task_loss(made, data, few)
                    chosen_from.setdefault(name, []).append((a, row["task_loss"]))
                rows.append(row)
            if seed == 0:
                shared = lost(part, space.largest)
    net = taught(data, teacher.encoder, LARGE, steps, 0, alone=True)
    alone = lost(net, LARGE.largest)
    rows.append({"variant": "largest, taught alone", "loss": alone})
    claims = _claims(parted_all, merged_all, chosen_from, shared, alone)
    return Evidence(claims, rows, NOTES)


NOTES = (
    "Sub-spaces of 16 sizes, 600 steps of 8 rows each at proof size; one merged space of 128 for "
    "1200; two seeds. loss: KL of relations, 8 heads, held-out text. task_loss: nats a hidden byte "
    "after 100 steps of 8 rows on the task, all students of the first seed. What is taught alone "
    "has as many steps as the shared network, a fourth of its passes of students. The paper's "
    "spaces have 256 sizes and its teacher is BERT base."
)


def _claims(
    parted: Sequence[Sequence[float]],
    merged: Sequence[Sequence[float]],
    chosen_from: Mapping[str, Sequence[tuple[float, float]]],
    shared: float,
    single: float,
) -> list[Claim]:
    a, b = torch.tensor(parted).double(), torch.tensor(merged).double()
    out = [
        Claim(
            "students of two sub-spaces end closer to the teacher than the same of one merged "
            "space, for equal steps",
            float(b.mean()),
            float(a.mean()),
            "loss of relations",
            "lower",
            bool(a.mean() < b.mean()),
            "the merged space is as close",
        ),
        Claim(
            "so does the smallest of each",
            float(b[:, 0].mean()),
            float(a[:, 0].mean()),
            "loss of relations",
            "lower",
            bool(a[:, 0].mean() < b[:, 0].mean()),
            "the merged space is as close",
        ),
    ]
    both = [pair for pairs in chosen_from.values() for pair in pairs]
    groups: dict[str, Sequence[tuple[float, float]]] = {"both sub-spaces": both}
    groups |= {f"the {name} sub-space alone": pairs for name, pairs in chosen_from.items()}
    for name, pairs in groups.items():
        losses, task = zip(*pairs, strict=True)
        tie = agreement(losses, task)["spearman"]
        out.append(
            Claim(
                f"held-out loss ranks the students of {name} as the task does, once they are "
                "taught it",
                0.7,
                tie if tie == tie else 0.0,
                "Spearman correlation",
                "higher",
                tie > 0.7,
                "below 0.4 the loss chooses no better than chance",
            )
        )
    for name, pairs in groups.items():
        chosen, best = min(pairs)[1], min(t for _, t in pairs)
        out.append(
            Claim(
                f"of {name}, the student that the loss chooses is within 3 % of the best on the "
                "task",
                1.03 * best,
                chosen,
                "nats a hidden byte",
                "lower",
                chosen <= 1.03 * best,
                "it is worse",
            )
        )
    out.append(
        Claim(
            "the largest student of a shared network is within 5 % of the same taught alone for "
            "equal steps",
            1.05 * single,
            shared,
            "loss of relations",
            "lower",
            shared <= 1.05 * single,
            "sharing costs more",
        )
    )
    return out
