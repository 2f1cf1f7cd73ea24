"""Write constraints.txt: the versions installed here of all that `effuse[dev,house]` needs."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("dev", "house")
HEAD = "# The lock of effuse[dev,house], written by `make lock`.\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def roots() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    lines, extras = list(project["dependencies"]), list(EXTRAS)
    for extra in extras:
        for line in optional[extra]:
            need = Requirement(line)
            if need.name == project["name"]:
                extras += sorted(need.extras - set(extras))
            else:
                lines.append(line)
    return [Requirement(line) for line in lines]


def closure(needs: list[Requirement]) -> dict[str, str]:
    """Name and public version of every installed package that `needs` leads to."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(need.name, extra) for need in needs for extra in ("", *need.extras)]
    while todo:
        name, extra = todo.pop()
        if (canonical(name), extra) in seen:
            continue
        seen.add((canonical(name), extra))
        package = metadata.distribution(name)
        found[canonical(name)] = Version(package.version).public
        for line in package.requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, inner) for inner in ("", *need.extras)]
    return found


def main() -> None:
    try:
        found = closure(roots())
    except metadata.PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed: run `make test` first, then `make lock`")
    lines = [f"{name}=={version}\n" for name, version in sorted(found.items())]
    (ROOT / "constraints.txt").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
