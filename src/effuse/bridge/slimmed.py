"""One slimmed network on disk: its config with the list of transforms, and its final weights.

    config.json     the original config, and under "effuse" the transforms, each as method, fields
                    and plan, in the order in which they were put on
    *.safetensors   the state dict as it is now: removed units are absent, int8 is int8, and what
                    half precision holds exactly is written in half precision

Reading builds the original network from the config, calls `Transform.restore` with each plan, and
loads the weights into what that gives; every key and shape must fit. Nothing is pickled, and no
code is imported but that of effuse and of modules that are already imported.

The class of such a component is `Slim` + the name of its diffusers (or transformers) class, made
on demand and found as `effuse.bridge.saved.SlimUNet2DConditionModel`. It derives from that class,
so pipelines, `isinstance`, `config`, `dtype` and `to` see nothing new.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effuse.core.contracts import Applied, Call, Objective, Transform
from effuse.core.errors import StoreError
from effuse.core.fields import build, defaults_of, dump_fields, nearest
from effuse.core.method import _CARDS, Card, methods
from effuse.ops.tensors import narrowest

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT = 1
_ENTRY = {"dtype": str, "buffers": dict, "transforms": list, "tied": dict, "weights": dict}
_LINE = {"method": str, "class": str, "module": str, "path": str, "fields": dict, "plan": dict}
PREFIX = "Slim"
_LIBRARIES = {
    "diffusers": ("ModelMixin", "diffusion_pytorch_model.safetensors"),
    "transformers": ("PreTrainedModel", "model.safetensors"),
}
# arguments of from_pretrained that change how plain weights are read, not what comes out
_NO_MATTER = {
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "use_safetensors",
    "use_flashpack",
    "disable_mmap",
    "local_files_only",
    "token",
    "cache_dir",
    "revision",
}


# ---- handles


def applied_of(model: nn.Module) -> list[Applied]:
    """Return the handles of the transforms with which `model` was loaded, in their order."""
    return list(vars(model).get("_effuse_applied", ()))


class Loaded(Applied):
    """A transform as it came out of a folder. The original weights are not there to go back to."""

    def __init__(self, handle: Applied):
        self.handle, self.transform, self.model = handle, handle.transform, handle.model

    def __getattr__(self, name: str) -> Any:
        if name == "handle":  # not yet there while being copied
            raise AttributeError(name)
        return getattr(self.handle, name)

    def observe(self, calls: Iterable[Call]) -> None:
        """See `Applied.observe`."""
        self.handle.observe(calls)

    def objective(self, teacher: nn.Module, steps: int | None = None) -> Objective | None:
        """See `Applied.objective`."""
        return self.handle.objective(teacher, steps)

    def reset(self) -> None:
        """See `Applied.reset`."""
        self.handle.reset()

    def report(self) -> dict[str, Any]:
        """See `Applied.report`."""
        return self.handle.report()

    def plan(self) -> dict[str, Any]:
        """See `Applied.plan`."""
        return self.handle.plan()

    def detach(self) -> None:
        """Raise: what was taken away was not saved."""
        raise ValueError(
            f"{type(self.transform).__name__} was loaded from a folder, which does not hold the "
            "original weights: load the original pipeline instead"
        )

    def finalize(self) -> None:
        """See `Applied.finalize`."""
        self.handle.finalize()


# ---- classes


def base_class(name: str) -> type:
    """Return the diffusers or transformers class of a model's name.

    Raises:
        StoreError: neither library has a model of this name.
    """
    for library, (root, _) in _LIBRARIES.items():
        module = importlib.import_module(library)
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, getattr(module, root)):
            return cls
    raise StoreError(
        f"{name!r} is no model class of diffusers or transformers: this folder needs other "
        "versions of them, or holds a network of another kind"
    )


def library_of(model: nn.Module | type) -> str | None:
    """Return which library loads `model`: "diffusers", "transformers", or None."""
    cls = model if isinstance(model, type) else type(model)
    for library, (root, _) in _LIBRARIES.items():
        module = sys.modules.get(library)
        if module is not None and issubclass(cls, getattr(module, root)):
            return library
    return None


@functools.cache
def slim_class(name: str) -> type:
    """Return the class `Slim...` of the model class so named, without the prefix."""
    base = base_class(name)
    return type(
        PREFIX + name,
        (Slimmed, base),
        {"__module__": "effuse.bridge.saved", "__doc__": f"A {name} with transforms on it."},
    )


def _plain_name(model: nn.Module) -> str:
    for cls in type(model).__mro__:
        if cls.__module__.split(".")[0] in _LIBRARIES:
            return cls.__name__
    raise StoreError(
        f"{type(model).__name__} is no diffusers or transformers model: only those can be saved "
        "within a pipeline"
    )


class Slimmed:
    """Saves and loads a network with its transforms; see the module."""

    def save_pretrained(
        self, save_directory: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Write config and weights into a folder; always safetensors."""
        if kwargs.get("variant") is not None:
            raise StoreError(f"variant={kwargs['variant']!r}: expected none; give another folder")
        write(self, save_directory, applied_of(self))  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a local folder.
            kwargs: those of diffusers; `torch_dtype` (or `dtype`) casts what is floating point,
                `device_map` may name one device.
        """
        folder = Path(pretrained_model_name_or_path)
        if kwargs.get("subfolder"):
            folder = folder / kwargs["subfolder"]
        given = {k for k, v in kwargs.items() if v is not None}
        odd = given - _NO_MATTER - {"subfolder", "torch_dtype", "dtype", "device_map"}
        if odd:
            raise TypeError(f"{cls.__name__}.from_pretrained takes no {', '.join(sorted(odd))}")
        device = kwargs.get("device_map")
        if isinstance(device, Mapping):
            if set(device) != {""}:
                raise ValueError(f"device_map={device}: expected one device for a slimmed network")
            device = device[""]
        model = read(folder)
        expected = cls.__name__.removeprefix(PREFIX)
        if _plain_name(model) != expected:
            raise StoreError(f"{folder}: holds a {_plain_name(model)}, expected a {expected}")
        return model.to(device=device, dtype=kwargs.get("dtype") or kwargs.get("torch_dtype"))


# ---- writing


def view_of(model: nn.Module, applied: Sequence[Applied]) -> nn.Module:
    """Return a second face of `model` that saves with its transforms; shares every tensor."""
    cls: Any = slim_class(_plain_name(model))
    view: nn.Module = cls.__new__(cls)
    view.__dict__.update(vars(model))
    view.__dict__["_effuse_applied"] = list(applied)
    return view


def write(model: nn.Module, folder: str | Path, applied: Sequence[Applied]) -> None:
    """Write the network with its transforms into `folder`.

    Raises:
        StoreError: a transform cannot be written down, or the network has what no tensor is.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(model)
    entry = entry_of(model, applied)
    state, entry["tied"] = _untied(model)
    small = {name: narrowest(value) for name, value in state.items()}
    entry["widened"] = {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in state.items()
        if small[name].dtype != value.dtype
    }
    file = folder / _LIBRARIES[library_of(model) or "diffusers"][1]
    save_file(small, file, metadata={"format": "pt"})
    entry["weights"] = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
    config["_class_name"] = PREFIX + _plain_name(model)
    config["effuse"] = entry
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def config_of(model: Any) -> dict[str, Any]:
    """Return the config of a diffusers or transformers model as plain data."""
    if library_of(model) == "diffusers":
        config = json.loads(model.to_json_string())
    else:
        config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "effuse"):
        config.pop(name, None)
    return config


def entry_of(model: nn.Module, applied: Sequence[Applied]) -> dict[str, Any]:
    """Return what is written under "effuse" in the config, without the weights."""
    names = {id(m): name for name, m in model.named_modules(remove_duplicate=False)}
    dtype = dtype_of(model)
    kept = set(model.state_dict())
    odd = {
        name: str(b.dtype).removeprefix("torch.")
        for name, b in model.named_buffers()
        if name not in kept and b.is_floating_point() and b.dtype != dtype
    }
    return {
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "buffers": odd,
        "transforms": [_dump_handle(h, names, model) for h in applied],
    }


def _dump_handle(handle: Applied, names: Mapping[int, str], model: nn.Module) -> dict[str, Any]:
    transform = handle.transform
    cls = type(transform)
    card = _card_of(cls)
    place = f"{card.name}.{cls.__name__}"
    path = names.get(id(handle.model))
    if path is None and vars(handle.model)["_modules"] is vars(model)["_modules"]:
        path = ""  # `model` is a view of that network
    if path is None:
        raise StoreError(f"{place}: is on another network than the {type(model).__name__} saved")
    where = getattr(transform, "where", None)
    if cls.restore is Transform.restore and where is not defaults_of(cls).get("where"):
        raise StoreError(f"{place}: rebuilds nothing from a plan, so `where` cannot be saved")
    try:
        fields = dump_fields(transform, place, skip=("where",))
        if build(cls, fields, place) != _anywhere(transform):
            raise ValueError(f"{place}: fields do not come back as they were")
        plan = json.loads(json.dumps(handle.plan()))
    except (TypeError, ValueError) as error:
        raise StoreError(f"cannot be saved: {error}") from error
    return {
        "method": card.name,
        "class": cls.__name__,
        "module": cls.__module__,
        "path": path,
        "fields": fields,
        "plan": plan,
    }


def _anywhere(transform: Any) -> Any:
    usual = defaults_of(type(transform))
    return dataclasses.replace(transform, where=usual["where"]) if "where" in usual else transform


def _card_of(cls: type) -> Card:
    for card in methods().values():
        if cls in card.classes:
            return card
    raise StoreError(f"{cls.__name__} has no card, so nobody could find it: add @method to it")


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict with each tensor once, and which names mean the same tensor."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise StoreError(f"{name}: holds a {type(value).__name__}, only tensors can be saved")
        if value.is_meta:
            raise StoreError(f"{name}: is on the meta device and has no values to save")
        value = value.detach()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        mine = value.cpu().contiguous()
        whole = mine.numel() * mine.element_size() == mine.untyped_storage().nbytes()
        state[name] = mine if whole else mine.clone()
    return state, tied


# ---- reading


def read(folder: str | Path) -> Any:
    """Read a network with its transforms; `applied_of` gives the handles.

    Raises:
        StoreError: a file is missing, damaged, of a foreign format, or names what is not there.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    entry = checked(config.pop("effuse", None), {}, f"{folder / 'config.json'}: effuse")
    check_format(entry, folder / "config.json")
    checked(entry, _ENTRY, f"{folder / 'config.json'}: effuse")
    name = str(config.get("_class_name", ""))
    if not name.startswith(PREFIX):
        raise StoreError(f"{folder}: class {name!r}, expected one that begins with {PREFIX!r}")
    state = _read_weights(folder, entry["weights"])
    for key, dtype in entry["widened"].items():
        if key not in state:
            raise StoreError(f"{folder}: {key} is missing from its weights")
        state[key] = state[key].to(dtype_named(dtype, f"{folder}: {key}"))
    for alias, source in entry["tied"].items():
        if source not in state:
            raise StoreError(f"{folder}: {alias} is tied to {source}, which is not there")
        state[alias] = state[source]
    config["_class_name"] = name.removeprefix(PREFIX)
    made = [_transform(e, f"{folder}: transform {i}") for i, e in enumerate(entry["transforms"])]
    model, handles = rebuild(config, entry, made, str(folder))
    _fill(model, state, folder)
    model.__class__ = slim_class(config["_class_name"])
    keep = [h if h.transform.kind == "cache" else Loaded(h) for h in handles]
    vars(model)["_effuse_applied"] = keep
    return model.eval()


def rebuild(
    config: Mapping[str, Any],
    entry: Mapping[str, Any],
    made: Sequence[Transform],
    place: str,
) -> tuple[nn.Module, list[Applied]]:
    """Build the network of `config` without weights and put the transforms on it, by plan."""
    model = empty(config)
    dtype = dtype_named(entry["dtype"], place)
    kept = set(model.state_dict())
    odd = {name: dtype_named(d, place) for name, d in entry["buffers"].items()}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point():
            t.data = t.data.to(dtype if name in kept or name not in odd else t.dtype)
    handles = []
    for i, (transform, line) in enumerate(zip(made, entry["transforms"], strict=True)):
        try:
            root = model.get_submodule(line["path"])
            handle = transform.restore(root, line["plan"])
        except Exception as error:
            raise StoreError(
                f"{place}: transform {i} ({line['method']}) cannot be put on a fresh "
                f"{type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        handles.append(handle)
    for name, b in model.named_buffers():
        if name in odd:
            b.data = b.data.to(odd[name])
    return model, handles


def empty(config: Mapping[str, Any]) -> Any:
    """Build the plain network of a config with all parameters zero; buffers as they are made."""
    cls: Any = base_class(str(config["_class_name"]))
    with _no_init():
        if library_of(cls) == "diffusers":
            model = cls.from_config({k: v for k, v in config.items() if k != "_class_name"})
        else:
            fields = {k: v for k, v in config.items() if k not in ("_class_name", "dtype")}
            model = cls(cls.config_class.from_dict(fields))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


@contextmanager
def _no_init() -> Iterator[None]:
    from diffusers.models.modeling_utils import no_init_weights

    with torch.random.fork_rng(devices=[]), no_init_weights():
        yield


def _transform(line: Mapping[str, Any], place: str) -> Transform:
    checked(line, _LINE, place)
    cls = _find(line["method"], line["class"], line["module"], place)
    try:
        made: Transform = build(cls, line["fields"], f"{place}: {line['method']}")
    except ValueError as error:
        raise StoreError(str(error)) from error
    return made


def _find(name: str, kind: str, module: str, place: str) -> type:
    """Return a transform class by its card, importing nothing that is not effuse's own."""
    card = _CARDS.get(name)
    if card is None and module.split(".")[0] == "effuse":
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
        card = _CARDS.get(name)
    if card is None:
        known = methods()
        if name not in known:
            other = "" if module.startswith("effuse.") else f": import {module} first"
            raise StoreError(
                f"{place}: unknown method {name!r}{other or nearest(name, known)}; "
                "it may be of another version of effuse"
            )
        card = known[name]
    found = {c.__name__: c for c in card.classes}
    if kind not in found:
        raise StoreError(f"{place}: {name} has no class {kind!r}{nearest(kind, found)}")
    if not issubclass(found[kind], Transform):
        raise StoreError(f"{place}: {name} is no transform")
    return found[kind]


def _read_weights(folder: Path, noted: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / str(noted.get("file"))
    check_file(file, noted)
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise StoreError(f"{file}: damaged: {error}") from error


def _fill(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Load weights into the network; every key and shape must fit, floating dtypes follow."""
    mine = model.state_dict()
    missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    if missing or extra:
        raise StoreError(
            f"{folder}: weights and transforms do not fit: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} unknown {extra[:3]}"
        )
    holders: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    holders |= dict(model.named_buffers(remove_duplicate=False))
    for name, value in state.items():
        here = mine[name]
        if here.shape != value.shape or here.is_floating_point() != value.is_floating_point():
            raise StoreError(
                f"{folder}: {name} is {tuple(value.shape)} {value.dtype}, "
                f"expected {tuple(here.shape)} {here.dtype}"
            )
        if here.dtype != value.dtype and name in holders:
            holders[name].data = holders[name].data.to(value.dtype)
    model.load_state_dict(state)


# ---- small things


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating point parameter or buffer; float32 if none."""
    for t in [*model.parameters(), *model.buffers()]:
        if t.is_floating_point():
            return t.dtype
    return torch.float32


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def dtype_named(name: Any, place: str) -> torch.dtype:
    """Return the floating point dtype of a name such as "float16"; raise `StoreError` if none."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise StoreError(f"{place}: dtype {name!r} is no floating point type of torch")
    return found


def checked(data: Any, kinds: Mapping[str, type], place: str) -> dict[str, Any]:
    """Return `data`; raise `StoreError` unless it is an object with entries of these kinds."""
    if not isinstance(data, dict):
        raise StoreError(f"{place}: expected an object, got {data!r:.40}")
    for name, kind in kinds.items():
        if name not in data:
            raise StoreError(f"{place}: {name!r} is missing")
        if not isinstance(data[name], kind):
            raise StoreError(
                f"{place}: {name!r} is {data[name]!r:.40}, expected a {kind.__name__}: damaged"
            )
    return data


def check_file(file: Path, noted: Mapping[str, Any]) -> None:
    """Raise `StoreError` unless a file is there with the noted size and hash."""
    if not file.is_file():
        raise StoreError(f"{file}: is missing; the folder is not complete, save or copy it again")
    size = file.stat().st_size
    if size != noted.get("bytes"):
        raise StoreError(
            f"{file}: {size} bytes, expected {noted.get('bytes')}: truncated or changed"
        )
    if sha256(file) != noted.get("sha256"):
        raise StoreError(f"{file}: damaged: its SHA-256 is not the one that was noted")


def check_format(noted: Mapping[str, Any], file: Path) -> None:
    """Raise `StoreError` unless `noted` is of the format that this version reads."""
    if noted.get("format") != FORMAT:
        raise StoreError(
            f"{file}: format {noted.get('format')!r}, this version of effuse reads {FORMAT}; "
            f"it was written by effuse {noted.get('effuse', 'of another version')}"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a json object; raise `StoreError` if it is missing or damaged."""
    if not file.is_file():
        raise StoreError(f"{file}: is missing")
    try:
        data = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{file}: damaged: {error}") from error
    return checked(data, {}, str(file))
