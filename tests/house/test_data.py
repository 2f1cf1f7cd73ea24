"""The loader: captions, what is held out, and a cache that takes only what was published."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from effuse.house import data
from effuse.house.examples import prompts


def _row(unified: str, name: str, short: str, sub: str, category: str, **more: object) -> dict:
    return {
        "unified": unified,
        "name": name,
        "short_names": [short],
        "category": category,
        "subcategory": sub,
        "image": unified.lower() + ".png",
        **more,
    }


ROWS = [
    _row("1F34E", "RED APPLE", "apple", "food-fruit", "Food & Drink"),
    _row("1F697", "AUTOMOBILE", "car", "transport-ground", "Travel & Places"),
    _row(
        "1F44D",
        "THUMBS UP SIGN",
        "+1",
        "hand-fingers-closed",
        "People & Body",
        skin_variations={"1F3FB": {"unified": "1F44D-1F3FB"}},
    ),
    _row("1F1EB-1F1F7", "France Flag", "flag-fr", "country-flag", "Flags"),
    _row("2764-FE0F", "HEAVY BLACK HEART", "heart", "heart", "Smileys & Emotion"),
]


def test_captions_are_lower_case_and_begin_with_the_style() -> None:
    made = {e.points: e for e in data.entries(ROWS)}
    assert made["1f34e"].captions("fluent")[0] == "fluent red apple"
    assert "red apple" in made["1f34e"].captions("noto")
    assert "car" in made["1f697"].captions("noto")
    assert made["1f1eb-1f1f7"].captions("twemoji")[0] == "twemoji flag france"
    assert made["1f44d-1f3fb"].captions("noto")[0].endswith("light skin tone")
    assert made["1f44d-1f3fb"].base == "1f44d"
    assert made["2764"].captions("fluent")[0] == "fluent red heart"  # fe0f is dropped
    every = [c for e in made.values() for s in data.STYLES for c in e.captions(s)]
    assert all(c == c.lower() and c == " ".join(c.split()) for c in every)


def test_every_alias_is_clean_and_of_one_code_point() -> None:
    for points, names in data.ALIASES.items():
        assert "fe0f" not in points
        assert all(n == data._clean(n) or "t-shirt" in n for n in names), names


def test_at_most_one_style_of_an_emoji_is_held_out() -> None:
    points = [f"{n:x}" for n in range(0x1F300, 0x1F700)]
    held = np.array([[data.held_out(p, s) for s in data.STYLES] for p in points])
    assert held.sum(1).max() == 1
    assert abs(held.mean() - data.HELD_OUT) < 0.02
    assert held.tolist() == [[data.held_out(p, s) for s in data.STYLES] for p in points]


def test_the_prompts_held_out_are_held_out() -> None:
    made = prompts()
    assert sum(not p.held for p in made) == 24
    assert sum(p.held for p in made) == 12
    assert all(data.held_out(p.points, p.style) for p in made if p.held)


def _tarball(path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picture(side: int, kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (side, side), (255, 0, 0, 128)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds three tiny tarballs, and sources with their hashes."""
    monkeypatch.setenv("EFFUSE_CACHE", str(tmp_path))
    room = tmp_path / "house"
    room.mkdir()
    files = {
        "fluent": {"package/assets/1f34e.webp": _picture(128, "WEBP")},
        "noto": {
            "package/emoji.json": json.dumps(ROWS).encode(),
            "package/img/google/64/1f34e.png": _picture(64, "PNG"),
        },
        "twemoji": {"package/img/twitter/64/1f697.png": _picture(64, "PNG")},
    }
    made = tuple(replace(s, sha256=_tarball(room / s.file, files[s.style])) for s in data.SOURCES)
    monkeypatch.setattr(data, "SOURCES", made)
    data.pictures.cache_clear()
    yield room
    data.pictures.cache_clear()


def test_pictures_are_on_white_and_of_one_size(cache) -> None:
    got = data.pictures()
    assert got.images.shape == (3, 3, 64, 64)
    assert got.images.dtype == np.uint8
    # half-transparent red on white
    assert np.abs(got.images[:, 0].astype(int) - 255).max() <= 2
    assert np.abs(got.images[:, 1].astype(int) - 127).max() <= 3
    assert [c[0] for c in got.captions] == ["fluent red apple", "noto red apple", "twemoji car"]
    assert got.weight.sum() == pytest.approx(1)
    data.pictures.cache_clear()
    for source in data.SOURCES:  # the second call reads the file
        (cache / source.file).unlink()
    assert (data.pictures().images == got.images).all()


def test_a_tarball_that_is_not_the_published_one_is_refused(cache, monkeypatch) -> None:
    source = data.SOURCES[0]
    (cache / source.file).write_bytes(b"something else")

    def broken(source, part) -> None:
        part.write_bytes(b"half of it")

    monkeypatch.setattr(data, "_download", broken)
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="expected"):
        data.fetch(source)
    assert not (cache / source.file).with_suffix(".part").exists()


def test_no_network_is_a_clear_error(cache, monkeypatch) -> None:
    def dead(source, part) -> None:
        raise OSError("no route")

    monkeypatch.setattr(data, "_download", dead)
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    (cache / data.SOURCES[1].file).unlink()
    with pytest.raises(RuntimeError, match=r"no route.*put the tarball into .* as emoji-data"):
        data.fetch(data.SOURCES[1])


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A home without npm and without settings of it."""
    for name in [n for n in data.os.environ if n.lower().startswith("npm_config")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    real = data.Path.is_file
    monkeypatch.setattr(
        data.Path, "is_file", lambda p: not str(p).endswith("etc/npmrc") and real(p)
    )
    return tmp_path


def test_the_registry_is_the_one_that_npm_is_told_of(bare, monkeypatch) -> None:
    with pytest.raises(RuntimeError, match=r"no package registry is known: .*npm_config_registry"):
        data._registry("left")
    monkeypatch.setenv("PLACE", "example.org")
    (bare / ".npmrc").write_text(
        "; a comment\nfund=false\nregistry = https://${PLACE}/npm/\n"
        "@scope:registry=https://scope.example.org\n"
    )
    assert data._registry("left") == "https://example.org/npm"
    assert data._registry("@scope/left") == "https://scope.example.org"
    assert data._registry("@other/left") == "https://example.org/npm"
    (bare / "other").write_text('registry="http://user.example.org"')
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(bare / "other"))
    monkeypatch.chdir("/")
    assert data._registry("left") == "http://user.example.org"
    monkeypatch.setenv("npm_config_registry", "https://environment.example.org/")
    assert data._registry("left") == "https://environment.example.org"


def test_npm_itself_is_asked(bare, monkeypatch) -> None:
    npm = bare / "npm"
    npm.write_text(
        '#!/bin/sh\ncase "$*" in "config get registry") echo https://asked.example.org/;; '
        "*) echo undefined;; esac\n"
    )
    npm.chmod(0o755)
    monkeypatch.setattr(data.shutil, "which", lambda name: str(npm))
    assert data._registry("@scope/left") == "https://asked.example.org"


@pytest.fixture
def registry(cache, bare, monkeypatch):
    """A registry on this machine that answers ranges: its log of (path, first byte)."""
    asked: list[tuple[str, int]] = []
    source = data.SOURCES[0]
    whole = (cache / source.file).read_bytes()
    (cache / source.file).unlink()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            asked.append((self.path, first))
            self.send_response(206 if 0 < first < len(whole) else 416 if first else 200)
            self.end_headers()
            self.wfile.write(whole[first:])

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("have", ["nothing", "a beginning", "too much"])
def test_a_download_goes_on_where_it_stopped(cache, registry, have) -> None:
    source = data.SOURCES[0]
    part = (cache / source.file).with_suffix(".part")
    path = f"/{source.package}/-/fluent-emoji-3d-{source.version}.tgz"
    expected = [(path, 0)]
    if have == "a beginning":
        data._download(source, part)
        part.write_bytes(part.read_bytes()[:100])
        expected += [(path, 100)]
    elif have == "too much":
        part.write_bytes(bytes(100_000))
        expected = [(path, 100_000), (path, 0)]
    assert data._sha256(data.fetch(source)) == source.sha256
    assert registry == expected
    assert not part.exists()
    assert data.fetch(source).is_file()
    assert registry == expected  # it is asked no more
