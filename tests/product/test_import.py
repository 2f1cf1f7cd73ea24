"""What `import effuse` costs, what it brings, and what a saved pipeline finds through it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import effuse
from effuse.bridge import saved

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *args: str | Path) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bare_import_brings_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'numpy'}"
    assert run(f"import sys, effuse; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_bare_import_costs_little_beside_torch():
    code = """
from time import perf_counter
a = perf_counter(); import effuse
b = perf_counter(); import torch
c = perf_counter(); print((b - a) / (c - b))
"""
    ratio = min(float(run(code)) for _ in range(2))
    assert ratio < 0.2, f"import effuse takes {ratio:.0%} of import torch"


@pytest.mark.parametrize("name", sorted(effuse._FACE))
def test_every_name_of_the_face_is_there(name):
    assert callable(getattr(effuse, name))


def test_face_lists_itself_and_refuses_other_names():
    assert set(effuse._FACE) | {"__version__"} == set(effuse.__all__)
    assert set(effuse.__all__) <= set(dir(effuse))
    with pytest.raises(AttributeError, match="no attribute 'slimm'"):
        _ = effuse.slimm


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert version("effuse") == effuse.__version__


SMALL = """
from diffusers import UNet2DModel

class SmallUNet(UNet2DModel):
    __module__ = "effuse.bridge.saved"
"""

LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import effuse
sys.modules["effuse.bridge.saved"]._LAZY["SmallUNet"] = "small_unet"
assert "small_unet" not in sys.modules
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[2])
print(type(pipe.unet).__name__, sys.modules["small_unet"].__name__)
again = DiffusionPipeline.from_pretrained(sys.argv[2], unet=pipe.unet)
assert again.unet is pipe.unet
"""


@pytest.mark.bridge
def test_saved_component_loads_after_a_bare_import(tmp_path, monkeypatch):
    from diffusers import DDPMPipeline, DDPMScheduler

    (tmp_path / "small_unet.py").write_text(SMALL)
    monkeypatch.syspath_prepend(str(tmp_path))
    unet = importlib.import_module("small_unet").SmallUNet(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    monkeypatch.delitem(sys.modules, "small_unet")
    assert '"effuse.bridge.saved"' in (tmp_path / "pipe" / "model_index.json").read_text()
    assert run(LOAD, tmp_path, tmp_path / "pipe") == "SmallUNet small_unet"


@pytest.mark.bridge
@pytest.mark.parametrize("name", sorted(saved._LAZY))
def test_every_saved_class_is_recorded_under_the_light_module(name):
    cls = getattr(saved, name)
    assert (cls.__name__, cls.__module__) == (name, "effuse.bridge.saved")
    assert issubclass(cls, (saved.ModelMixin, saved.SchedulerMixin))


def test_saved_refuses_other_names():
    with pytest.raises(AttributeError, match="no attribute 'Unheard'"):
        _ = saved.Unheard


@pytest.mark.bridge
def test_no_module_brings_torchvision():
    code = """
import importlib, pkgutil, sys, effuse
for info in pkgutil.walk_packages(effuse.__path__, "effuse."):
    if info.name.rpartition(".")[2] == "__main__":
        continue
    try:
        importlib.import_module(info.name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in {"gradio", "ray"} or "effuse[" in str(error):
            continue
        raise
print("torchvision" in sys.modules)
"""
    assert run(code) == "False"


def test_nothing_asks_for_torchvision():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    asked += (ROOT / "constraints.txt").read_text().splitlines()
    assert not [line for line in asked if line.startswith("torchvision")]
    imports = re.compile(r"^\s*(import|from) torchvision\b", re.MULTILINE)
    assert not [p for p in (ROOT / "src").rglob("*.py") if imports.search(p.read_text())]


def test_make_has_the_promised_targets():
    rules = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check", "fix", "prove"):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_torch_is_locked_without_a_local_suffix():
    lock = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lock
    assert not [line for line in lock if "+" in line or "/" in line]
