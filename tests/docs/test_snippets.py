"""Python blocks of the README and the guide run as written, one namespace for each file.

A block under a line `<!-- no-run -->` is only compiled.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- no-run -->\n+)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path):
    """Yield (code, runs) for each Python block; its line numbers are those of the page."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        above = text.count("\n", 0, found.start(2))
        yield compile("\n" * above + found[2], str(page), "exec"), found[1] is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for code, runs in blocks(page):
        if runs:
            exec(code, namespace)


def test_blocks_are_found_with_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n```\n\n<!-- no-run -->\n```python\n1 / 0\n```\n")
    (first, runs), (second, skipped) = blocks(page)
    assert (first.co_firstlineno, runs, skipped) == (1, True, False)
    with pytest.raises(ZeroDivisionError) as caught:
        exec(second, {})
    assert caught.tb.tb_next.tb_lineno == 9
