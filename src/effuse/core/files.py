"""Folders and files that are written whole or not at all, by one run at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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

    The lock is the system's own, on a file within: it goes when the run does, however it ends.

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
        file = lock.open("a+")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written: {error.strerror}") from error
    with file:
        if not _locked(file):
            raise ValueError(f"{folder}: another run is at work in it; give another folder")
        try:
            yield target
        finally:
            lock.unlink(missing_ok=True)
            if made and target.is_dir() and not any(target.iterdir()):
                target.rmdir()


def _locked(file: IO[str]) -> bool:
    """Take the system's lock on an open file; say whether it was free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
