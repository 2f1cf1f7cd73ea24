"""The command line, on tiny pipelines in folders: what a user types, sees and gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import tiny_sd
from typer.testing import CliRunner

from effuse.cli import app, main
from effuse.core import methods

runner = CliRunner()


def run(*args: object) -> str:
    done = runner.invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pipe") / "tiny"
    tiny_sd().save_pretrained(out)
    return out


def test_methods_lists_every_card():
    listed = json.loads(run("methods", "--json"))
    assert [m["name"] for m in listed] == list(methods())
    assert "momentum" in run("methods")
    shown = run("methods", "laptop_diff")
    assert "2024" in shown
    assert "LaptopDiff" in shown


def test_sample_writes_a_picture(folder, tmp_path):
    from PIL import Image

    out = tmp_path / "grid.png"
    run("sample", folder, "red apple", "--steps", 2, "--count", 3, "--out", out)
    assert Image.open(out).size[0] >= 48


def test_sample_with_a_solver(folder, tmp_path):
    out = tmp_path / "grid.png"
    run("sample", folder, "red apple", "--solver", "heun", "--steps", 2, "--count", 1, "--out", out)
    assert out.is_file()


@pytest.mark.slow
def test_slim_saves_measures_and_reports(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "methods:\n  - laptop_diff: {keep: 0.9}\n  - int8: {}\n  - momentum: {steps: 2}\n"
        "calibration: {prompts: [red apple], steps: 2, calls: 2, batch: 2}\n"
    )
    out = tmp_path / "out"
    shown = run("slim", folder, "--recipe", recipe, "--out", out, "--pictures", 4, "--steps", 4)
    assert "laptop_diff" in shown
    assert (out / "pipeline" / "model_index.json").is_file()
    page = (out / "report" / "index.html").read_text()
    assert "laptop_diff" in page
    again = run("compare", folder, out / "pipeline", "--out", tmp_path / "page", "--pictures", 4)
    assert "report" in again


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["methods", "momentun"], "did you mean 'momentum'"),
        (["train", "emoji"], "expected house:NAME"),
        (["prove"], "one method's name"),
        (["compare", "house:emoji"], "two or more"),
        (["slim", "house:emoji", "--recipe", "none.yaml", "--out", "x"], "no such recipe"),
    ],
)
def test_a_mistake_is_one_line(args, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["effuse", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert words in shown
    assert "Traceback" not in shown


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "effuse.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for command in ("slim", "sample", "compare", "train", "methods", "prove"):
        assert command in done.stdout
    assert " torch\n" not in done.stderr
    assert " diffusers\n" not in done.stderr


@pytest.mark.slow
def test_importing_diffusers_says_nothing_and_warnings_of_others_stay():
    code = (
        "import logging; from effuse.cli import main\n"
        "def run():\n"
        "    from diffusers import DiffusionPipeline\n"
        "    logging.getLogger('diffusers.pipelines').warning('of use')\n"
        "main(run)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line] == ["of use"]
