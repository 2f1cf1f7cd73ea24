"""Debian packages as data: an archive made here is read, what is not right is refused."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest

from effuse.house import debian


def package(tmp_path, files: dict[str, bytes]) -> debian.Package:
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    out = io.BytesIO()
    out.write(b"!<arch>\n")
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", room.getvalue())):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out.write(head + content + b"\n" * (len(content) % 2))
    data = out.getvalue()
    (tmp_path / "some_1.deb").write_bytes(data)
    return debian.Package("some", "1", hashlib.sha256(data).hexdigest(), "MIT", "made here")


def test_members_are_read(tmp_path, monkeypatch):
    files = {"usr/share/a.txt": b"one", "usr/b.bin": bytes(range(256))}
    made = package(tmp_path, files)
    monkeypatch.setattr(debian, "fetch", lambda p: tmp_path / "some_1.deb")
    assert dict(debian.members(made)) == files


def test_what_does_not_come_is_said(tmp_path, monkeypatch):
    made = package(tmp_path, {"a": b"1"})
    assert debian.fetch(made, tmp_path) == tmp_path / "some_1.deb"
    (tmp_path / "some_1.deb").write_bytes(b"something else")
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"apt-get is not installed. Put the package's .deb"):
        debian.fetch(made, tmp_path)
