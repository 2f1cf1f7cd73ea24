"""A slimmed pipeline on disk: a diffusers folder that is smaller where the pipeline is smaller.

    effuse.json        format, versions, and size and SHA-256 of every file
    model_index.json   as diffusers writes it; a slimmed component is of class `Slim...`
    unet/ vae/ ...     as diffusers writes them; a slimmed component as in `bridge.slimmed`

It loads with `load`, and with `DiffusionPipeline.from_pretrained` after `import effuse`. A
component whose transforms left nothing but a plain network is written as the plain class, for
which not even that import is needed.

Values that half precision holds exactly are written in half precision and read as they were: a
pipeline that was published so and loaded in float32 does not double on its way back.

A folder is written whole or not at all: into a sibling, flushed to the disk, then renamed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effuse.core.contracts import Applied
from effuse.core.errors import StoreError
from effuse.core.files import alive
from effuse.ops.tensors import narrowest

from . import slimmed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MANIFEST = "effuse.json"


def applied(pipe: DiffusionPipeline) -> list[tuple[str, Applied]]:
    """Return (component, handle) of all transforms with which a pipeline was loaded, in order."""
    return [
        (name, handle)
        for name, part in _networks(pipe).items()
        for handle in slimmed.applied_of(part)
    ]


def save(
    pipe: DiffusionPipeline,
    folder: str | Path,
    applied: Iterable[tuple[str, Applied]] = (),
    *,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a pipeline and the transforms that are on it; the pipeline itself is not changed.

    Args:
        pipe: of any diffusers class.
        folder: new, empty, or one that `save` wrote, which is replaced as a whole.
        applied: (component, handle) in the order in which they were put on. Those with which a
            component was loaded come first and need not be given.
        extra: further text files by name, such as the recipe.

    Returns:
        The folder.

    Raises:
        StoreError: the folder holds something else, or a transform cannot be written down or
            rebuilt; nothing has been changed on disk.
    """
    target = ready(folder)
    listed = _by_component(pipe, applied)
    shadow = copy.copy(pipe)
    notes: dict[str, Any] = {}
    for name, part in _networks(pipe).items():
        handles = listed.get(name, [])
        note: dict[str, Any] = {"dtype": str(slimmed.dtype_of(part)).removeprefix("torch.")}
        if handles:
            note["transforms"] = [_brief(h) for h in handles]
            note["plain"] = is_plain(part, handles)
            _replace(
                shadow, name, _plain_view(part) if note["plain"] else view_to_save(part, handles)
            )
        notes[name] = note
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shadow.save_pretrained(draft, safe_serialization=True)
        for name, note in notes.items():
            if not note.get("transforms") or note["plain"]:
                _narrow(draft / name)
        for name, text in (extra or {}).items():
            (draft / name).write_text(text)
        manifest = {
            "format": slimmed.FORMAT,
            **_versions(),
            "pipeline": type(pipe).__name__,
            "components": notes,
            "files": {
                str(f.relative_to(draft)): {"bytes": f.stat().st_size, "sha256": slimmed.sha256(f)}
                for f in sorted(draft.rglob("*"))
                if f.is_file()
            },
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _flush(draft)
        _swap(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Path(folder)


def ready(folder: str | Path) -> Path:
    """Return the absolute folder, once it is sure that `save` may write or replace it.

    Raises:
        StoreError: it holds something that `save` did not write.
    """
    target = Path(folder).absolute()
    if target.is_symlink():
        target = target.resolve()
    recover(target)
    _check_ours(target)
    return target


def size_of(pipe: DiffusionPipeline) -> int:
    """Return the bytes of all networks of a pipeline as they are held, shared ones once."""
    held = {
        t.data_ptr(): t.numel() * t.element_size()
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for t in part.state_dict().values()
    }
    return sum(held.values())


def load(source: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Load a pipeline; components have the dtype in which they were saved.

    Args:
        source: a folder written by `save`; or any other diffusers folder or hub id, which goes to
            `DiffusionPipeline.from_pretrained` as it is.
        kwargs: passed on to `DiffusionPipeline.from_pretrained`.

    Raises:
        StoreError: a file is missing, damaged, of a foreign format or version, or names a method
            or field that this version does not know.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    recover(folder.absolute())
    if not (folder / MANIFEST).is_file():
        if folder.exists():
            _check_foreign(folder)
        return DiffusionPipeline.from_pretrained(str(source), **kwargs)
    manifest = verify(folder)
    components = manifest["components"]
    if kwargs.get("torch_dtype") is None and kwargs.get("dtype") is None:
        kwargs["dtype"] = {
            n: slimmed.dtype_named(c["dtype"], f"{folder / MANIFEST}: {n}")
            for n, c in components.items()
        } | {"default": torch.float32}
        for name, note in components.items():
            if note.get("transforms") and not note.get("plain") and name not in kwargs:
                kwargs[name] = slimmed.read(folder / name)
    return DiffusionPipeline.from_pretrained(str(source), **kwargs)


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every file of a saved folder against its manifest and return the manifest.

    Raises:
        StoreError: a file is missing, truncated or damaged, or the format is not ours.
    """
    folder = Path(folder)
    manifest = slimmed.read_json(folder / MANIFEST)
    slimmed.check_format(manifest, folder / MANIFEST)
    slimmed.checked(manifest, {"components": dict, "files": dict}, str(folder / MANIFEST))
    for name, noted in manifest["components"].items():
        slimmed.checked(noted, {"dtype": str}, f"{folder / MANIFEST}: {name}")
    for name, noted in manifest["files"].items():
        slimmed.checked(noted, {"bytes": int, "sha256": str}, f"{folder / MANIFEST}: {name}")
        slimmed.check_file(folder / name, noted)
    return manifest


# ---- components


def _networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks of a pipeline, without what torch.compile wraps around them."""
    return {
        name: getattr(part, "_orig_mod", part)
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }


def _by_component(
    pipe: DiffusionPipeline, given: Iterable[tuple[str, Applied]]
) -> dict[str, list[Applied]]:
    listed = {name: slimmed.applied_of(part) for name, part in _networks(pipe).items()}
    for name, handle in given:
        if name not in listed:
            raise StoreError(
                f"{type(handle.transform).__name__} is on {name!r}: expected one of the networks "
                f"of {type(pipe).__name__}, {', '.join(listed)}"
            )
        part = getattr(pipe, name)
        if handle.model is not part and any(handle.model is m for m in part.modules()):
            raise StoreError(
                f"{type(handle.transform).__name__} is on a network inside {name!r}: give its "
                f"handle to that one, {type(part).__name__}(..., applied=[handle])"
            )
        if all(handle is not h for h in listed[name]):
            listed[name].append(handle)
    return listed


def _brief(handle: Applied) -> str:
    return type(handle.transform).__name__


def _replace(shadow: Any, name: str, part: nn.Module) -> None:
    """Put another component into a copy of a pipeline, without its constructor."""
    shadow.register_modules(**{name: part})


def view_to_save(part: nn.Module, handles: list[Applied]) -> nn.Module:
    """Return the view that is saved, after making sure that it can be rebuilt."""
    entry = slimmed.entry_of(part, handles)
    config = slimmed.config_of(part) | {"_class_name": slimmed._plain_name(part)}
    made = [slimmed._transform(line, "transform") for line in entry["transforms"]]
    fresh, _ = slimmed.rebuild(config, entry, made, "check before saving")
    mine, theirs = part.state_dict(), fresh.state_dict()
    odd = sorted(mine.keys() ^ theirs.keys())
    odd += [n for n in mine.keys() & theirs.keys() if mine[n].shape != theirs[n].shape]
    if odd:
        raise StoreError(
            f"the plans of {', '.join(map(_brief, handles))} do not rebuild the network: "
            f"{len(odd)} tensors differ, first {odd[:3]}"
        )
    return slimmed.view_of(part, handles)


def is_plain(part: nn.Module, handles: Iterable[Applied] = ()) -> bool:
    """Say whether the network is nothing but what its class builds from its config.

    Same modules of the same classes, tensors of the same shapes, the same simple attributes, no
    hooks and no replaced methods: then the plain class loads it.
    """
    config = slimmed.config_of(part) | {"_class_name": slimmed._plain_name(part)}
    try:
        with torch.device("meta"):
            fresh = slimmed.empty(config)
    except (NotImplementedError, RuntimeError):  # builds what cannot be on the meta device
        fresh = slimmed.empty(config)
    mine, theirs = dict(part.named_modules()), dict(fresh.named_modules())
    if mine.keys() != theirs.keys():
        return False
    kept, made = part.state_dict(), fresh.state_dict()
    if kept.keys() != made.keys() or any(kept[n].shape != made[n].shape for n in kept):
        return False
    if len({t.dtype for t in kept.values() if t.is_floating_point()}) > 1:
        return False
    return all(
        (not name or type(module) is type(theirs[name]))
        and _traits(module) == _traits(theirs[name])
        for name, module in mine.items()
    )


_OWN = {"_internal_dict", "_effuse_applied", "config", "training", "name_or_path"}


def _traits(module: nn.Module) -> dict[str, Any]:
    """Return what of a module is neither tensor nor child: settings, hooks, replaced methods."""
    out: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _OWN or name in ("_parameters", "_buffers", "_modules"):
            continue
        out[name] = _trait(value)
    return out


def _trait(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_trait(v) for v in value]
    return len(value) if isinstance(value, (dict, set)) else type(value).__name__


def _plain_view(part: nn.Module) -> nn.Module:
    """Return the network under its plain class; shares every tensor."""
    cls: Any = slimmed.base_class(slimmed._plain_name(part))
    if type(part) is cls:
        return part
    view: nn.Module = cls.__new__(cls)
    view.__dict__.update(vars(part))
    return view


def _versions() -> dict[str, str]:
    import diffusers

    from effuse import __version__

    return {"effuse": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def _narrow(folder: Path) -> None:
    """Rewrite the weights of a plain component, each tensor in the narrowest type that is exact.

    Diffusers and transformers widen them again to the type they are asked for.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        small = {name: narrowest(value) for name, value in state.items()}
        if all(small[name] is value for name, value in state.items()):
            continue
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(small, file, metadata=metadata)


# ---- folders


def recover(target: Path) -> None:
    """Put right what a killed `save` left beside `target`: the old folder back, drafts away."""
    if not target.parent.is_dir():
        return
    for kind in ("old", "draft"):
        for left in target.parent.glob(f".{target.name}.{kind}-*"):
            if kind == "old" and not target.exists():
                left.rename(target)  # whatever its number says: another process may have it now
            elif not alive(left.name.rpartition("-")[2]):
                shutil.rmtree(left, ignore_errors=True)


def _check_ours(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target}: is a file, expected a folder")
    file = target / MANIFEST
    ours = {MANIFEST, *(slimmed.read_json(file).get("files", ()) if file.is_file() else ())}
    for found in sorted(target.rglob("[!.]*")):
        if found.is_file() and str(found.relative_to(target)) not in ours:
            raise StoreError(
                f"{target}: holds {found.relative_to(target)}, which effuse did not save; give a "
                "new folder or empty this one"
            )


def _check_foreign(folder: Path) -> None:
    """Complain of a folder that plain diffusers could only fail on, or load wrongly."""
    import diffusers

    if not (folder / "model_index.json").is_file():
        raise StoreError(f"{folder}: has no model_index.json; expected the folder of a pipeline")
    index = slimmed.read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if isinstance(kind, str) and getattr(diffusers, kind, None) is None:
        raise StoreError(
            f"{folder}: {kind!r} is no pipeline of diffusers {diffusers.__version__}; the folder "
            "needs another version of it, or its own code"
        )
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or not all(value[:2]):
            continue
        if value[0] == "effuse.bridge.saved" and str(value[1]).startswith(slimmed.PREFIX):
            raise StoreError(
                f"{folder}: {MANIFEST} is missing although {name} was saved by effuse; copy "
                "the folder again, or load it with DiffusionPipeline.from_pretrained"
            )
        if not (folder / name).is_dir():
            raise StoreError(f"{folder}: {name} ({value[1]}) is missing; copy the folder again")


def _flush(folder: Path) -> None:
    """Wait until every file and folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(draft: Path, target: Path) -> None:
    """Put `draft` in the place of `target`; between the two renames `recover` puts it right."""
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        try:
            draft.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
