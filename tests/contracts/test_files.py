"""Folders and files: one run at a time, whole or not at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from effuse.core.files import LOCK, claimed, require_room, write_whole


def test_one_run_at_a_time_and_nothing_left_behind(tmp_path):
    with claimed(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        with pytest.raises(ValueError, match="another run is at work"), claimed(folder):
            pass
        assert (folder / LOCK).exists()
    assert not folder.exists()
    with claimed(folder):
        (folder / "result").touch()
    assert [f.name for f in folder.iterdir()] == ["result"]


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"""
import os
from effuse.core.files import claimed
with claimed({str(tmp_path)!r}):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / LOCK).exists()
    with claimed(tmp_path):
        pass


def test_a_failure_gives_the_folder_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "new"):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"), claimed(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="cannot be written"), claimed("/proc/effuse"):
        pass
    require_room(tmp_path, 1)
    with pytest.raises(ValueError, match="make room"):
        require_room(tmp_path, 10**18)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
