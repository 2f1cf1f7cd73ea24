"""Recorded calls of a network: what transforms are calibrated on and what healing learns from.

Three sources, all giving arguments exactly as the network's forward takes them:

- `record(network)`: every call made inside a `with` block.
- `calls_from_pipeline`: while a pipeline samples; both halves of guidance are in each call.
- `uniform_calls`: (x_t, t, c) with t uniform over the training range and no guidance, on clean
  samples of your own or drawn from the pipeline: the setting in which the criteria of pruning
  papers are defined.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Call, Solver
from effuse.core.files import write_whole
from effuse.ops import randn_like

if TYPE_CHECKING:
    from effuse.bridge.pipeline import Walk

What = int | Sequence[str | int]
"""Prompts, class labels, or how many of a list of our own."""

PROMPTS = tuple(
    f"a {look}{thing}"
    for look in ("red ", "blue ", "green ", "small ", "")
    for thing in ("apple", "car", "heart", "house", "fish", "flower", "cat", "star", "tree", "hat")
)
"""Used where a count is given instead of prompts."""


class Recording(Sequence[Call]):
    """Calls kept while recording, in the order of the calls. In memory, or in a folder.

    A folder takes each call as it comes, one safetensors file, read when asked for: memory holds
    one at a time. Opened again, it goes on: calls that were seen before are passed over, so the
    same recording, made again after it was broken off, writes what is missing and nothing else.

    Args:
        limit: keep a uniform random choice of this many of all calls (a reservoir); None keeps all.
        seed: of that choice.
        folder: where calls go; None keeps them in memory.
        about: what is recorded, as plain data; a folder that says otherwise is refused.

    Raises:
        ValueError: the folder holds another recording, or lacks a call that it should have.
    """

    def __init__(
        self,
        limit: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit!r}: expected a positive number of calls, or None")
        self.limit, self.seen, self.known = limit, 0, 0
        self.folder = None if folder is None else Path(folder)
        self._about = {"limit": limit, "seed": seed, **(about or {})}
        self._rng = torch.Generator().manual_seed(seed)
        self._kept: list[tuple[int, Any]] = []
        if self.folder is not None and (self.folder / "index.json").exists():
            self._reopen(self.folder)

    def _reopen(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        here = json.loads(json.dumps(self._about))
        if index["about"] != here:
            odd = sorted(
                k for k in {*index["about"], *here} if index["about"].get(k) != here.get(k)
            )
            raise ValueError(
                f"{folder}: holds another recording (differs in {', '.join(odd)}); give another "
                "folder or remove this one"
            )
        for k in range(index["seen"]):
            slot = self._slot(k)
            if slot is not None:
                self._kept[slot:] = [*self._kept[slot + 1 :], (k, self._file(k))]
        self.known = index["seen"]
        if missing := [file for _, file in self._kept if not file.exists()]:
            raise ValueError(f"{missing[0]}: is missing; remove {folder} and record again")

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:06d}.safetensors"

    def _slot(self, index: int) -> int | None:
        """Return the place that call `index` takes, the end if none has to go; None: not kept."""
        if self.limit is None or len(self._kept) < self.limit:
            return len(self._kept)
        slot = int(torch.randint(index + 1, (), generator=self._rng))
        return slot if slot < self.limit else None

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take in one call: copied, off the graph, on the CPU."""
        index, self.seen = self.seen, self.seen + 1
        if index < self.known:
            return
        slot = self._slot(index)
        if slot is not None:
            call: Any = (tuple(_copy(a) for a in args), {k: _copy(v) for k, v in kwargs.items()})
            if self.folder is not None:
                call = write_call(call, self._file(index))
            gone = self._kept[slot : slot + 1]
            self._kept[slot:] = [*self._kept[slot + 1 :], (index, call)]
        self.known = self.seen
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            said = json.dumps({"about": self._about, "seen": self.seen})
            write_whole(self.folder / "index.json", said)
            if slot is not None:
                for _, old in gone:
                    old.unlink()

    def mark(self, runs: int, rng: torch.Generator) -> None:
        """Note that this many runs are recorded, and where the noise of the next one begins."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        draft = self.folder / "runs.draft"
        said = {"runs": str(runs), "seen": str(self.seen)}
        save_file({"rng": rng.get_state()}, draft, metadata=said)
        draft.replace(self.folder / "runs.safetensors")

    def resume(self, rng: torch.Generator) -> int:
        """Return how many runs are recorded already, and set `rng` to where the next one begins."""
        file = None if self.folder is None else self.folder / "runs.safetensors"
        if file is None or not file.exists() or not self.known:
            return 0
        from safetensors import safe_open

        with safe_open(file, framework="pt") as f:
            said = f.metadata()
            rng.set_state(f.get_tensor("rng"))
        self.seen = int(said["seen"])
        return int(said["runs"])

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        kept = self._kept[index][1]
        return read_call(kept) if isinstance(kept, Path) else kept


@contextlib.contextmanager
def record(
    network: nn.Module,
    *,
    limit: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> Iterator[Recording]:
    """Collect the calls of `network` made inside the `with` block; see `Recording`.

    Raises:
        FloatingPointError: an argument or the output of a call is not finite; names the call, its
            timestep and the argument, or the first layer that gave such values.
    """
    kept = Recording(limit, seed, folder, about)
    busy = False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if busy:
            return
        if not (_finite(args) and _finite(kwargs)):
            raise not_finite(module, (args, kwargs), kept.seen)
        kept.add(args, kwargs)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        nonlocal busy
        if busy or _finite(out):
            return
        busy = True
        try:
            raise not_finite(module, (args, kwargs), kept.seen - 1)
        finally:
            busy = False

    hooks = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield kept
    finally:
        for h in hooks:
            h.remove()


def not_finite(network: nn.Module, call: Call, index: int) -> FloatingPointError:
    """Return the error for call `index`: names its timestep and the bad argument or first layer."""
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    named = dict(zip(names, call[0], strict=False)) | call[1]
    t = named.get("timestep")
    at = "" if t is None else f" (timestep {float(torch.as_tensor(t).reshape(-1)[0]):g})"
    for name, value in named.items():
        if not _finite(value):
            return FloatingPointError(f"call {index}{at}: argument {name} is not finite")
    return FloatingPointError(
        f"call {index}{at}: the output is not finite, first at {first_bad_layer(network, call)}; "
        "use a wider dtype or look at that layer's weights"
    )


@torch.no_grad()
def first_bad_layer(network: nn.Module, call: Call) -> str:
    """Return the dotted name of the first innermost layer whose output is not finite, or ""."""
    bad: list[str] = []

    def listen(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if not bad and not _finite(out):
                bad.append(name)

        return hook

    hooks = [m.register_forward_hook(listen(n)) for n, m in network.named_modules() if n]
    try:
        network(*call[0], **call[1])
    finally:
        for h in hooks:
            h.remove()
    return bad[0] if bad else ""


# ---- while a pipeline samples


def calls_from_pipeline(
    pipe: Any,
    what: What = 16,
    *,
    steps: int = 10,
    guidance: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 4,
    folder: str | Path | None = None,
    **more: Any,
) -> Recording:
    """Record the network's calls while a diffusers pipeline samples.

    Args:
        pipe: any classic pipeline: of prompts, of class labels, or unconditional.
        what: prompts or labels, or how many of `PROMPTS`, of the classes, or of samples.
        steps: of each sampling.
        guidance: the pipeline's own scale if None; 1 for none.
        limit: calls kept, a uniform choice; None keeps all.
        seed: of the noise and of that choice.
        batch: pictures sampled at once.
        folder: where to stream calls to; None keeps them in memory. A folder in which the same
            recording was broken off is taken up at the run where it stopped.
        **more: passed on to the pipeline, such as `height` and `width`.

    Raises:
        ValueError: nothing to sample, or not what this pipeline takes.
        FloatingPointError: see `record`.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    key = next((k for k in ("prompt", "class_labels") if k in takes), "batch_size")
    asked = asked_of(pipe, what, key)
    given: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent", **more}
    if key == "batch_size":
        given["output_type"] = "np"
    if guidance is not None and "guidance_scale" in takes:
        given["guidance_scale"] = guidance
    about = {"asked": asked, "batch": batch, **{k: str(v) for k, v in given.items()}}
    rng = torch.Generator().manual_seed(seed)
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        network = network_of(pipe)
        with record(network, limit=limit, seed=seed, folder=folder, about=about) as kept:
            done = kept.resume(rng)
            for run in range(done, math.ceil(len(asked) / batch)):
                part: Any = asked[run * batch : (run + 1) * batch]
                if key == "batch_size":
                    part = len(part)
                pipe(**{key: part}, generator=rng, **given)
                kept.mark(run + 1, rng)
    finally:
        pipe._progress_bar_config = shown
    return kept


def network_of(pipe: Any) -> nn.Module:
    """Return the UNet or transformer of a pipeline."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return getattr(pipe, name)
    raise TypeError(f"{type(pipe).__name__} has neither unet nor transformer")


def asked_of(pipe: Any, what: What, key: str) -> list[Any]:
    """Return prompts, labels or numbers: those given, or as many as asked for.

    Args:
        pipe: a diffusers pipeline.
        what: prompts or labels, or how many of `PROMPTS`, of the classes, or of samples.
        key: what the pipeline takes: "prompt", "class_labels" or "batch_size".

    Raises:
        ValueError: nothing to sample, or not what this pipeline takes.
    """
    if isinstance(what, bool) or (isinstance(what, int) and what < 1):
        raise ValueError(f"{what!r} prompts: expected a positive number, or prompts or labels")
    if isinstance(what, str):
        what = [what]
    if not isinstance(what, int):
        if not what:
            raise ValueError("no prompts: expected at least one, or a number of them")
        if key == "batch_size":
            return list(range(len(what)))
        words = sum(isinstance(w, str) for w in what)
        if key == "prompt" and words < len(what):
            raise ValueError(f"{what!r}: expected prompts, a {type(pipe).__name__} takes text")
        if key == "class_labels" and words:
            return [pipe.labels[w] if isinstance(w, str) else w for w in what]
        return list(what)
    if key == "prompt":
        return [PROMPTS[i * 7 % len(PROMPTS)] for i in range(what)]
    if key == "class_labels":
        config: Any = network_of(pipe).config
        names = getattr(pipe, "labels", None) or {}
        known = sorted(set(names.values())) or list(range(config.num_embeds_ada_norm))
        return [known[i * len(known) // what % len(known)] for i in range(what)]
    return list(range(what))


def walks(
    pipe: Any,
    what: What = 16,
    *,
    steps: int = 20,
    guidance: float | None = None,
    batch: int = 4,
    solver: Solver | None = None,
    size: int | tuple[int, int] | None = None,
) -> Callable[[torch.Generator], Walk]:
    """Return a function that draws a trajectory to sample: `effuse.sample(*draw(rng))`.

    Each has `batch` of the prompts or labels, at random, noise of its own, and the same levels. The
    arguments are those of `calls_from_pipeline`; solver: DDIM if None; size: (height, width) in
    pixels, the pipeline's own if None.
    """
    from effuse.bridge.pipeline import wrap

    model: Any = wrap(pipe)
    takes = inspect.signature(type(pipe).__call__).parameters
    key = next((k for k in ("prompt", "class_labels") if k in takes), "batch_size")
    asked = asked_of(pipe, what, key)

    def draw(rng: torch.Generator) -> Walk:
        pick = torch.randint(len(asked), (batch,), generator=rng).tolist()
        some: Any = batch if key == "batch_size" else [asked[i] for i in pick]
        return model.walk(some, solver, steps=steps, guidance=guidance, rng=rng, size=size)

    return draw


# ---- uniform in t, without guidance


@torch.no_grad()
def uniform_calls(
    pipe: Any,
    what: What = 16,
    *,
    clean: Tensor | None = None,
    count: int = 8,
    batch: int = 8,
    steps: int = 10,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return batches of one `call` and its `target`, with t uniform over the training range.

    x_t = alpha x0 + sigma noise, and the target is what the network was trained to answer: noise,
    x0, alpha noise - sigma x0 or noise - x0, in the shape in which it answers (FLUX: tokens).
    Guidance is not used, and the network is not run on what is made.

    Args:
        pipe: what `effuse.wrap` takes.
        what: prompts or labels, one a clean sample; or a number, without `clean`.
        clean: (N, C, h, w) samples as the network sees them (latents); None lets the pipeline
            draw them, so that no data are needed.
        count: batches.
        batch: samples of each.
        steps: of the pipeline's own sampling, where it draws.
        seed: of everything that is drawn.
    """
    from effuse.bridge.pipeline import wrap

    model: Any = wrap(pipe)
    rng = torch.Generator().manual_seed(seed)
    takes = inspect.signature(type(pipe).__call__).parameters
    key = next((k for k in ("prompt", "class_labels") if k in takes), "batch_size")
    asked = asked_of(pipe, what, key)
    if clean is None:
        parts = [asked[i : i + batch] for i in range(0, len(asked), batch)]
        drawn = [
            model.sample(len(p) if key == "batch_size" else p, steps=steps, rng=rng, decode=False)
            for p in parts
        ]
        clean = torch.cat(drawn)
    if len(clean) != len(asked):
        raise ValueError(
            f"{len(clean)} clean samples for {len(asked)} conditions: expected one each"
        )
    made = []
    for _ in range(count):
        pick = torch.randint(len(clean), (batch,), generator=rng)
        x0 = clean[pick].float()
        cond = {}
        if key != "batch_size":
            cond = model.embed([asked[int(i)] for i in pick])
        even = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        t = even[torch.randperm(batch, generator=rng)].to(x0.device)
        noise = randn_like(x0, rng)
        x = model.process.corrupt(x0, t, noise)
        call = model.bare.call(x, t, **cond)
        made.append({"call": _copy(call), "target": _copy(model.bare.target(x0, noise, t))})
    return made


# ---- calls as values


def to_device(call: Any, device: torch.device | str) -> Any:
    """Return a call, or any nest of tensors, on `device`."""
    return _mapped(call, lambda a: a.to(device))


def write_call(call: Call, file: str | Path) -> Path:
    """Write one call as safetensors: tensors by place, everything else as json beside them."""
    from safetensors.torch import save_file

    file = Path(file)
    tensors: dict[str, Tensor] = {}
    shape = _flatten(list(call), tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    save_file(tensors, draft, metadata={"call": json.dumps(shape)})
    draft.replace(file)
    return file


def read_call(file: str | Path) -> Call:
    """Read what `write_call` wrote."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as f:
        shape = json.loads(f.metadata()["call"])
        args, kwargs = _unflatten(shape, {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
    return tuple(args), kwargs


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):04d}"
        tensors[name] = value.contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": {str(k): _flatten(v, tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{value!r}: expected tensors, numbers, text and nests of them in a call")


def _unflatten(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(shape, Mapping):
        return shape
    ((kind, value),) = shape.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {k: _unflatten(v, tensors) for k, v in value.items()}
    items = [_unflatten(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items


def _mapped(value: Any, f: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {k: _mapped(v, f) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, f) for v in value)
    return value


def _copy(value: Any) -> Any:
    return _mapped(value, lambda a: a.detach().to("cpu", copy=True))


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(v) for v in value)
    return True
