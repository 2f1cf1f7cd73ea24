"""LinFusion: self-attention replaced by linear attention and distilled from what it replaces.

from effuse.compress.rewire import linfusion

handle = linfusion.LinearizeAttention().attach(pipe.unet)
linfusion.distill(handle, copy_of_the_unet, batches, steps=500)
handle.save("linear.safetensors")
linfusion.mount(another_unet, "linear.safetensors")      # any variant of equal shapes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effuse.compress.calibrate import to_device
from effuse.compress.swap import Swapped
from effuse.core.contracts import Call, Objective, Transform, Where, everywhere
from effuse.core.errors import StoreError, check_whole
from effuse.core.fields import build, dump_fields
from effuse.core.method import method
from effuse.core.training import Batches, Fit, fit
from effuse.nn.linear_attention import (
    Bidirectional,
    Causal,
    LinearAttention,
    Mixing,
    Normalized,
    Unnormalized,
)

from .selves import self_attentions

__all__ = [
    "Bidirectional",
    "Causal",
    "LinearizeAttention",
    "Linearized",
    "Normalized",
    "Unnormalized",
    "distill",
    "mount",
]


@method(
    "linfusion",
    seed=59,
    paper="LinFusion: 1 GPU, 1 Minute, 16K Image",
    year=2024,
    buys="self-attention whose time and memory grow with the pixels, not with their square",
    missing="Joint attention of text and picture (SD3, FLUX) is refused: the paper has no rule for "
    "it. No released weights are read. Larger canvases: `effuse.restore.upscale`, which has no "
    "noise shift and no dilated convolutions. No fused kernel: plain matrix products.",
    example=lambda: LinearizeAttention(hidden=0.5),
)
@dataclass(frozen=True)
class LinearizeAttention(Transform):
    """Put normalized, non-causal linear attention in the place of every self-attention.

    Q = phi((x + f_q(x)) W_q),  K = phi((x + f_k(x)) W_k),  V = x W_v,  phi(u) = elu(u) + 1
    out_i = Q_i (mean_j K_j^T V_j) / (Q_i . mean_j K_j + 1e-4),  then W_o

    W_q, W_k, W_v, W_o are copies of the layer's own; f_q and f_k begin at zero. Cross-attention
    stays. Before it is distilled (`Linearized.objective`, `distill`) the network is not the
    original: softmax attention is sharper.

    hidden: width of f over the layer's: 1 for SD 1.5 and 2.1, 1/16 for SDXL in the released script;
        0 leaves f out.
    mixing: `Normalized`; or, to see what each part does, `Unnormalized`, `Causal`, `Bidirectional`.
    seed: of the first layers of f.
    where: layers it forbids keep their softmax.
    """

    hidden: float = 1.0
    mixing: Mixing = field(default_factory=Normalized)
    seed: int = 0
    where: Where = everywhere
    kind = "rewire"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.mixing, Mixing):
            raise TypeError(f"mixing={self.mixing!r}: expected an object, such as Normalized()")
        if not 0 <= self.hidden < float("inf"):
            raise ValueError(
                f"hidden={self.hidden!r}: expected a width over the layer's, 0 or more"
            )
        check_whole("seed", self.seed, 0)

    def attach(self, model: nn.Module) -> Linearized:
        """Swap the layers of `model`.

        Raises:
            TypeError: it has no plain self-attention.
            ValueError: `where` allows none.
        """
        names = self_attentions(model, self.where)
        return self.restore(model, {"layers": {n: self._width(model, n) for n in names}})

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Linearized:
        """Swap the layers that `plan` names, each with its width of f."""
        rng = torch.Generator().manual_seed(self.seed)
        layers = {
            name: LinearAttention(model.get_submodule(name), hidden, self.mixing, rng=rng)
            for name, hidden in plan["layers"].items()
        }
        return Linearized(self, model, layers)

    def _width(self, model: nn.Module, name: str) -> int:
        layer: Any = model.get_submodule(name)
        share = self.hidden * layer.to_q.in_features
        return max(1, round(share)) if share else 0


class Linearized(Swapped):
    """A network with linear attention; see `LinearizeAttention`."""

    transform: LinearizeAttention
    layers: dict[str, LinearAttention]  # type: ignore[assignment]

    def __init__(
        self,
        transform: LinearizeAttention,
        model: nn.Module,
        layers: Mapping[str, LinearAttention],
    ):
        super().__init__(transform, model, layers)
        self.least: dict[str, float] = {}
        self._frozen: list[nn.Parameter] = []

    @torch.no_grad()
    def observe(self, calls: Iterable[Call]) -> None:
        """Note each layer's least denominator over the calls, for the report; changes nothing.

        Near the 1e-4 that is added to it, a layer's outputs shrink.
        """

        def listen(name: str) -> Any:
            def hook(layer: Any, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                x = x.flatten(2).mT if x.ndim == 4 else x
                x = x if layer.group_norm is None else layer.group_norm(x.mT).mT
                self.least[name] = min(
                    self.least.get(name, float("inf")), layer.least_denominator(x)
                )

            return hook

        hooks = [
            layer.register_forward_pre_hook(listen(name), with_kwargs=True)
            for name, layer in self.layers.items()
        ]
        device = next(self.model.parameters()).device
        try:
            for call in calls:
                args, kwargs = to_device(call, device)
                self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective:
        """Return the paper's loss, under which only the new layers learn.

        L = L_task + 0.5 L_out + 0.5 mean over layers ||out_S - out_T||^2, means over elements

        L_task wants a `target` in the batch. All else in the network is frozen until `detach` or
        `finalize`.
        """
        from effuse.distill.features import NormalizedFeatureDistillation, Plain

        if not self._frozen:
            own = {id(p) for layer in self.layers.values() for p in layer.parameters()}
            self._frozen = [
                p for p in self.model.parameters() if p.requires_grad and id(p) not in own
            ]
            for p in self._frozen:
                p.requires_grad_(False)
        for layer in self.layers.values():
            layer.requires_grad_(True)
        taps = list(self.layers)
        weights = (1.0, 0.5, 0.5 / len(taps))
        return NormalizedFeatureDistillation(
            teacher, self.model, taps, normalizer=Plain(), weights=weights
        )

    def save(self, file: str | Path) -> Path:
        """Write the new layers alone, projections included, for `mount`; returns the file."""
        from safetensors.torch import save_file

        file = Path(file)
        state = {
            f"{name}.{key}": value.contiguous()
            for name, layer in self.layers.items()
            for key, value in layer.state_dict().items()
        }
        told = {"fields": dump_fields(self.transform, "linfusion", skip=["where"])} | self.plan()
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(file.name + ".draft")
        save_file(state, draft, metadata={"linfusion": json.dumps(told)})
        draft.replace(file)
        return file

    def plan(self) -> dict[str, Any]:
        """Return each layer with the width of its f."""
        widths = {
            name: 0 if layer.f_q is None else layer.f_q[0].out_features
            for name, layer in self.layers.items()
        }
        return {"layers": widths}

    def report(self) -> dict[str, Any]:
        """Return counted bytes, and the least denominator that `observe` saw."""
        seen = {"least_denominator": min(self.least.values())} if self.least else {}
        return {**super().report(), **seen}

    def detach(self) -> None:
        """Put the original layers back."""
        super().detach()
        self._thaw()

    def finalize(self) -> None:
        """Give the original layers up."""
        super().finalize()
        self._thaw()

    def _thaw(self) -> None:
        for p in self._frozen:
            p.requires_grad_(True)
        self._frozen = []


def mount(model: nn.Module, file: str | Path) -> Linearized:
    """Put the layers that `Linearized.save` wrote on `model`, a network of equal shapes.

    Raises:
        StoreError: the file is no such file, or a layer has no place or another shape here; the
            network is left as it was.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {})["linfusion"])
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        made = build(LinearizeAttention, told["fields"], str(file))
        layers = dict(told["layers"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise StoreError(f"{file}: expected a file that Linearized.save wrote: {error}") from error
    here = set(self_attentions(model))
    for name in layers:
        if name not in here:
            raise StoreError(
                f"{file}: no self-attention {name!r} in this {type(model).__name__}: expected a "
                "network of the shape it was distilled for"
            )
    handle = made.restore(model, {"layers": layers})
    try:
        for name, layer in handle.layers.items():
            part = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
            layer.load_state_dict(part)
    except RuntimeError as error:
        handle.detach()
        raise StoreError(f"{file}: the layers do not fit this network: {error}") from error
    return handle


def distill(
    handle: Linearized,
    teacher: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-4,
    rng: torch.Generator | None = None,
    **more: Any,
) -> Fit:
    """Teach the new layers with the paper's loss and optimizer: AdamW, no weight decay.

    Args:
        handle: of a network with linear attention.
        teacher: a copy of the network as it was.
        batches: what `fit` takes: batches with `call`, and perhaps `target` for the task loss.
        steps: of training.
        lr: of AdamW.
        rng: draws batches.
        **more: passed on to `effuse.core.training.fit`.
    """
    goal = handle.objective(teacher)
    optimizer = torch.optim.AdamW(goal.parameters_of("student"), lr=lr, weight_decay=0.0)
    done = fit(goal, batches, optimizer, steps=steps, rng=rng, **more)
    goal.eval()
    return done
