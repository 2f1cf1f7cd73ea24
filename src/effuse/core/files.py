"""Folders and files that are written whole or not at all, by one run at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LOCK = ".effuse.lock"


def alive(pid: str) -> bool:
    """Say whether a process of this machine still runs; what is no number counts as running."""
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def claimed(folder: str | Path) -> Iterator[Path]:
    """Make a folder, check that it can be written, and keep other runs out of it meanwhile.

    The lock is a file with the number of the process; one left by a killed run is taken over.

    Raises:
        ValueError: it is a file, cannot be written, or another run is at work in it.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder")
    made = not target.exists()
    lock = target / LOCK
    try:
        target.mkdir(parents=True, exist_ok=True)
        if lock.is_file() and not alive(lock.read_text().strip()):
            lock.unlink()
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        raise ValueError(
            f"{folder}: process {lock.read_text().strip() or '?'} is at work in it; give another "
            f"folder, or remove {lock} if that is no run of effuse"
        ) from None
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        yield target
    finally:
        lock.unlink(missing_ok=True)
        if made and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def require_room(folder: str | Path, size: int) -> None:
    """Raise `ValueError` if the disk of an existing folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"{folder}: {free / 1e6:.0f} MB free on its disk, {size / 1e6:.0f} MB needed; make "
            "room or give another folder"
        )


def write_whole(file: Path, data: str | bytes) -> None:
    """Write a file beside its place and move it there: a reader sees the old one or the new one."""
    draft = file.with_name(f".{file.name}.draft-{os.getpid()}")
    try:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
