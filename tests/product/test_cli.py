"""The command line, on tiny pipelines in folders: what a user types, sees and gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.tiny import tiny_sd
from typer.testing import CliRunner

from effuse.cli import app, main
from effuse.core import methods
from effuse.core.files import claimed

runner = CliRunner()


def run(*args: object) -> str:
    done = runner.invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


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


def test_slim_saves_measures_and_reports(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "methods:\n  - laptop_diff: {keep: 0.9}\n  - int8: {}\n  - momentum: {steps: 2}\n"
        "calibration: {prompts: [red apple], steps: 2, calls: 2, batch: 2}\n"
        "healing: {prompts: [red apple], judged: 2, rows: 2}\n"
    )
    out = tmp_path / "out"
    args = ("slim", folder, "--recipe", recipe, "--out", out, "--pictures", 4, "--steps", 4)
    shown = run(*args, "--heal", 0.01)
    assert "laptop_diff" in shown
    assert "healing of laptop_diff" in shown
    assert "judged_by dB to the original" in " ".join(shown.split())
    assert (out / "pipeline" / "model_index.json").is_file()
    page = (out / "report" / "index.html").read_text()
    assert "laptop_diff" in page
    assert "Step by step" in page
    raw = json.loads((out / "report" / "report.json").read_text())
    assert [s["name"] for s in raw["stages"]] == ["laptop_diff", "int8", "momentum"]
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert set(summary) == {"before", "after"}
    for name, most in (("macs_per_image", 0.6), ("network_calls", 0.5), ("bytes_on_disk", 0.99)):
        assert 0 < summary["after"][name] <= most * summary["before"][name]
    for name in ("seconds_per_image", "parameters", "text_image_score", "frechet"):
        assert {name} <= set(summary["before"]) & set(summary["after"])
    assert not (out / ".work").exists()
    again = run("compare", folder, out / "pipeline", "--out", tmp_path / "page", "--pictures", 4)
    assert "report" in again


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["methods", "momentun"], "did you mean 'momentum'"),
        (["train", "emoji"], "expected one of house:autoencoder"),
        (["recipes", "balancd"], "did you mean 'balanced'"),
        (["sample", "house:nope"], "expected one of house:emoji"),
        (["sample", "house:emoji", "x", "--out", "x.txt"], "expected a name ending in .png"),
        (["sample", "house:emoji", "x", "--solver", "momentun"], "did you mean 'momentum'"),
        (["sample", "house:emoji", "x", "--steps", "0"], "steps=0"),
        (["sample", "house:pixels", "--guidance", "4"], "has no guidance_scale"),
        (["sample", "house:pixels", "cat"], "takes no prompts"),
        (["sample", "house:emoji-dit", "--", "fodd"], "no class 'fodd'"),
        (["slim", "house:emoji", "--recipe", "fast", "--out", "x", "--steps", "0"], "steps=0"),
        (["slim", "house:emoji", "--recipe", "fast", "--out", "x", "--pictures", "1"], "two or mo"),
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


def fails(capsys, monkeypatch, *args: object) -> str:
    """Run a command that ends in one line of complaint; return the line."""
    monkeypatch.setattr(sys, "argv", ["effuse", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return " ".join(shown.split())


@pytest.fixture
def broken(folder, tmp_path):
    """Give a copy of the pipeline's folder to break."""
    return shutil.copytree(folder, tmp_path / "broken")


def test_a_broken_folder_is_named(broken, capsys, monkeypatch):
    shutil.rmtree(broken / "unet")
    assert "unet (UNet2DConditionModel) is missing" in fails(capsys, monkeypatch, "sample", broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "Other"}))
    assert "'Other' is no pipeline" in fails(capsys, monkeypatch, "sample", broken)
    (broken / "model_index.json").unlink()
    assert "no model_index.json" in fails(capsys, monkeypatch, "sample", broken)


def test_slim_keeps_out_of_what_is_not_its_own(broken, tmp_path, capsys, monkeypatch):
    def refused(out: Path) -> str:
        return fails(capsys, monkeypatch, "slim", broken, "--recipe", "fast", "--out", out)

    assert "holds other things" in refused(broken)
    (tmp_path / "file").touch()
    assert "is a file" in refused(tmp_path / "file")
    assert "cannot be written" in refused(Path("/proc/effuse"))
    with claimed(tmp_path / "busy"):
        assert "is at work in it" in refused(tmp_path / "busy")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "make room" in refused(tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_a_full_disk_leaves_the_earlier_result(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ("slim", folder, "--recipe", "fast", "--out", out, "--no-report")
    run(*args)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effuse.bridge.store._flush", full)
    assert "No space left on device" in fails(capsys, monkeypatch, *args)
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "effuse", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for command in ("slim", "recipes", "sample", "compare", "train", "methods", "prove"):
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


def test_sample_takes_fields_and_a_grid(folder, tmp_path):
    from PIL import Image, ImageChops

    files = {}
    for grid in ("Tapered", "{Karras: {rho: 5}}"):
        out = files[grid] = tmp_path / f"{grid[:3]}.png"
        solver = "{momentum: {order: 2.7}}"
        shown = run(
            *("sample", folder, "red apple", "--solver", solver, "--grid", grid),
            *("--steps", 3, "--count", 1, "--out", out),
        )
        assert "1 pictures in" in shown
    a, b = (Image.open(f) for f in files.values())
    assert ImageChops.difference(a, b).getbbox() is not None


def test_edit_writes_before_and_after(folder, tmp_path):
    import torch
    from PIL import Image

    from effuse.ops.picture import to_image

    picture = tmp_path / "in.png"
    to_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))).save(picture)
    out = tmp_path / "edited.png"
    method = (
        "{confident_ode: {levels: 6, depth: 0.5, langevin: {Langevin: {size: 1.0e-4, steps: 4}}}}"
    )
    shown = run("edit", folder, picture, "--method", method, "--out", out)
    assert "calls each" in shown
    assert Image.open(out).height > 32  # before above after
    run("edit", folder, picture, "--method", "{sdedit: {levels: 4}}", "--prompt", "x", "--out", out)
    for words, said in (
        (("--method", "sdedid"), "did you mean 'sdedit'"),
        (("--method", "{sdedit: {dept: 1}}"), "did you mean 'depth'"),
        (("--method", "[sdedit]"), "expected a name, or"),
    ):
        with pytest.raises(ValueError, match=said):
            run("edit", folder, picture, *words, "--out", out)
    with pytest.raises(ValueError, match="there is no such file"):
        run("edit", folder, tmp_path / "none.png", "--out", out)


def test_upscale_enlarges_beyond_the_pipelines_size(folder, tmp_path):
    import torch
    from PIL import Image

    from effuse.ops.picture import to_image

    picture, out = tmp_path / "in.png", tmp_path / "large.png"
    to_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))).save(picture)
    words = ("upscale", folder, picture, "--steps", 8, "--out", out)
    assert "enlarged to 32 x 32" in run(*words, "--prompt", "red apple", "--tokens", 7)
    assert Image.open(out).height > 64  # plain above ours
    run(*words)
    with pytest.raises(ValueError, match=r"depth=1\.5"):
        run(*words, "--depth", 1.5)


def test_sample_under_a_control(folder, tmp_path):
    from PIL import Image

    out = tmp_path / "grid.png"
    words = ("sample", folder, "red apple", "blue heart", "--count", 2, "--out", out)
    assert "4 pictures in" in run(*words, "--control", "w2sd", "--steps", 2)
    assert "2 pictures in" in run(*words, "--control", "superdiff", "--steps", 3)
    assert Image.open(out).width >= 32
    with pytest.raises(ValueError, match="a control walks with a solver of its own"):
        run(*words, "--control", "w2sd", "--solver", "ddim")
    with pytest.raises(ValueError, match="did you mean 'w2sd'"):
        run(*words, "--control", "w2d")


def test_likelihood_of_pictures(folder, tmp_path):
    import torch
    from tests.tiny import tiny_ddpm

    from effuse.ops.picture import to_image

    pixels, files = tmp_path / "pixels", []
    tiny_ddpm().save_pretrained(pixels)
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        side = tiny_ddpm().unet.config.sample_size
        to_image(torch.rand(3, side, side)).save(files[-1])
    shown = run("likelihood", pixels, *files, "--tolerance", 0.05)
    assert "0.png: " in shown
    assert "2 pictures: " in shown
    with pytest.raises(ValueError, match="works on latents"):
        run("likelihood", folder, files[0])
    with pytest.raises(ValueError, match="or --held-out N"):
        run("likelihood", pixels)


def test_sample_leaves_the_strangest_out(folder, tmp_path, capsys, monkeypatch):
    from PIL import Image

    out = tmp_path / "kept.png"
    said = run(
        "sample", folder, "red apple", "dog", "--filter", "hallucination: {keep: 0.5}",
        "--steps", 3, "--count", 2, "--out", out,
    )  # fmt: skip
    assert "4 drawn a prompt" in said
    w, h = Image.open(out).size
    assert w == h  # two columns, two prompts
    monkeypatch.setattr(
        sys, "argv", ["effuse", "sample", str(folder), "dog", "--filter", "superdiff"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "expected one of hallucination" in capsys.readouterr().err


def test_restore_mends_pictures_of_any_size(tmp_path):
    import torch

    from effuse.ops.picture import read_picture, save_grid, to_image

    flat = torch.full((3, 30, 42), 0.8)
    flat[:, 10:20, 12:30] = 0.2
    to_image(flat).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    said = run("restore", tmp_path / "a.png", "--damage", "noise", "--steps", 4, "--out", out)
    spoiled = float(said.split(" dB")[0].split()[-1])
    mended = float(said.split("spoiled, ")[1].split()[0])
    assert mended > spoiled + 3
    assert read_picture(out).shape == (3, 3 * 32 + 2, 46)
    save_grid(flat[None], tmp_path / "b.png", 1)
    wrong = runner.invoke(app, ["restore", str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert "several sizes" in str(wrong.exception)


def test_diagnose_prints_residual_and_gap(folder):
    said = run("diagnose", folder, "dog", "--count", 2, "--steps", 2, "--levels", "0.3,0.7")
    assert "0.3" in said
    assert "ODE to SDE" in said
    wrong = runner.invoke(app, ["diagnose", str(folder), "--levels", "0.3,2"])
    assert "expected numbers in (0, 1)" in str(wrong.exception)


def test_search_writes_its_front_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "found"
    words = ("search", folder, "--out", out, "--trials", 2, "--pictures", 2, "--steps", 2)
    said = run(*words, "--budget", "macs<50x")
    assert "original" in said
    front = json.loads((out / "front.json").read_text())
    assert front["measured"] == 2
    assert len(list((out / "recipes").glob("*.yaml"))) == len(front["front"]) >= 1
    said = run(*words, "--budget", "macs<50x")
    assert "0 measured" in said
    assert "front.png" in said
    monkeypatch.setattr(sys, "argv", ["effuse", *map(str, words), "--budget", "size=3"])
    with pytest.raises(SystemExit):
        main()
    assert "expected a metric, < or >" in capsys.readouterr().err


def test_stopped_by_the_keyboard_says_that_it_can_go_on(capsys):
    def stopped():
        raise SystemExit(130)

    with pytest.raises(SystemExit) as end:
        main(stopped)
    assert end.value.code == 130
    assert "give the command again" in capsys.readouterr().err


def test_a_fine_tune_is_kept_as_a_change_and_comes_back(folder, tmp_path, capsys, monkeypatch):
    import torch
    from safetensors.torch import load_file, save_file

    base = next((folder / "unet").glob("*.safetensors"))
    tuned = {k: v.clone() for k, v in load_file(base).items()}
    rng = torch.Generator().manual_seed(0)
    for v in tuned.values():
        v += 0.01 * torch.randn(v.shape, generator=rng)
    save_file(tuned, tmp_path / "tuned.safetensors")
    run(
        "delta",
        tmp_path / "tuned.safetensors",
        folder / "unet",
        "--keep",
        1,
        "--out",
        tmp_path / "d",
    )
    run("merge", folder / "unet", tmp_path / "d", "--out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for name, v in tuned.items():
        torch.testing.assert_close(back[name], v, rtol=1e-6, atol=1e-7)
    said = run(
        "delta", tmp_path / "tuned.safetensors", base, "--keep", 0.1, "--out", tmp_path / "small"
    )
    share = float(said.split("%")[0].split()[-1])
    assert abs(share - 90) < 2
    small = (tmp_path / "small" / "delta.safetensors").stat().st_size
    assert small < 0.25 * (tmp_path / "tuned.safetensors").stat().st_size
    args = ("delta", tmp_path / "tuned.safetensors", base, "--keep", 0.1, "--judge", folder)
    said = run(*args, "--out", tmp_path / "q")
    assert float(said.partition("q ")[2].split(":")[0]) > 0.1
    said = run(*args, "--method", "best", "--out", tmp_path / "best")
    assert all(f"{name} " in said for name in ("DARE", "DAREx-q", "magnitude", "base"))
    with pytest.raises(ValueError, match="other weights than the base, such as"):
        run(*args[:2], tmp_path / "tuned.safetensors", *args[3:-1], "house:pixels", "--out", "x")
    monkeypatch.setattr(
        sys, "argv", ["effuse", "merge", str(base), str(tmp_path), "--out", "a.bin"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "ending in .safetensors" in capsys.readouterr().err
