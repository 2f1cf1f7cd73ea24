"""Saved folders: they come back bit for bit, are smaller, and say what is wrong with them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from tests.tiny import tiny_ddpm, tiny_dit_pipe, tiny_sd
from torch import nn

import effuse
from effuse.bridge import saved, slimmed, store
from effuse.compress.quantize.int8 import Int8
from effuse.core import Applied, StoreError, Transform, Where, everywhere, method
from effuse.core.method import _CARDS

pytestmark = pytest.mark.bridge
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Rank:
    """An object within the fields."""

    by: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Narrow(Transform):
    """Keep the first hidden units of each feed-forward layer: a structural prune."""

    keep: float = 0.5
    rank: Rank = Rank()
    where: Where = everywhere
    kind = "prune"

    def attach(self, model: nn.Module) -> Narrowed:
        return self.restore(model, {"keep": self.keep})

    def restore(self, model: nn.Module, plan: Mapping[str, Any]) -> Narrowed:
        return Narrowed(self, model, plan["keep"])


class Narrowed(Applied):
    def __init__(self, transform: Narrow, model: nn.Module, keep: float):
        self.transform, self.model, self.keep = transform, model, keep
        self.old: list[tuple[nn.Module, str, Any]] = []
        for name, m in list(model.named_modules()):
            if name.endswith("ff.net.0") and transform.where(name, m):
                first, last = m.proj, model.get_submodule(name[:-1] + "2")
                n = int(last.in_features * keep)
                parts = first.out_features // last.in_features
                rows = torch.cat([torch.arange(n) + i * last.in_features for i in range(parts)])
                self.put(m, "proj", first.weight[rows], first.bias[rows])
                owner = model.get_submodule(name[:-2])
                self.put(owner, "2", last.weight[:, :n], last.bias)

    def put(self, owner: nn.Module, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        layer.weight.data, layer.bias.data = weight.data.clone(), bias.data.clone()
        self.old.append((owner, name, getattr(owner, name)))
        setattr(owner, name, layer)

    def plan(self) -> dict[str, Any]:
        return {"keep": self.keep}

    def detach(self) -> None:
        for owner, name, layer in self.old:
            setattr(owner, name, layer)

    def finalize(self) -> None:
        self.old = []


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    for name in ("test_store_narrow", "test_store_round"):
        monkeypatch.setitem(_CARDS, name, None)  # so that it is taken away again
        del _CARDS[name]
    method("test_store_narrow")(Narrow)
    method("test_store_round")(Round)


def picture(pipe: Any, steps: int = 2, **kwargs: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    first = {"prompt": "ab"} if hasattr(pipe, "text_encoder") else {}
    if hasattr(pipe, "labels"):
        first = {"class_labels": [1]}
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        out = pipe(**first, num_inference_steps=steps, generator=rng, output_type="np", **kwargs)
    return torch.as_tensor(out.images)


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


PIPES = {"sd": (tiny_sd, "unet"), "dit": (tiny_dit_pipe, "transformer")}


@pytest.mark.parametrize("kind", PIPES)
def test_pruned_pipeline_comes_back_bit_for_bit(tmp_path, kind):
    make, part = PIPES[kind]
    pipe = make()
    original = picture(pipe)
    store.save(pipe, tmp_path / "before")
    handle = Narrow(rank=Rank((0.5, 0.25))).attach(getattr(pipe, part))
    expected = picture(pipe)
    types = [type(m) for m in getattr(pipe, part).modules()]
    assert store.save(pipe, tmp_path / "after", [(part, handle)]) == tmp_path / "after"

    for back in (store.load(tmp_path / "after"), effuse.load(tmp_path / "after")):
        assert torch.equal(picture(back), expected)
        model = getattr(back, part)
        assert isinstance(model, type(getattr(pipe, part)))
        assert type(model).__name__ == "Slim" + type(getattr(pipe, part)).__name__
    plain = DiffusionPipeline.from_pretrained(tmp_path / "after")
    assert torch.equal(picture(plain), expected)
    assert size(tmp_path / "after" / part) < size(tmp_path / "before" / part)

    ((name, loaded),) = store.applied(back)
    assert name == part
    assert loaded.transform == handle.transform
    with pytest.raises(ValueError, match="does not hold the original"):
        loaded.detach()
    # saving changed nothing on the live pipeline, and the transform still comes off
    assert [type(m) for m in getattr(pipe, part).modules()] == types
    handle.detach()
    assert torch.equal(picture(pipe), original)


def test_saved_again_from_what_was_loaded(tmp_path):
    pipe = tiny_sd()
    handle = Narrow().attach(pipe.unet)
    expected = picture(pipe)
    store.save(pipe, tmp_path / "a", [("unet", handle)])
    back = store.load(tmp_path / "a")
    store.save(back, tmp_path / "b", store.applied(back))  # known ones are not listed twice
    assert torch.equal(picture(store.load(tmp_path / "b")), expected)
    assert len(store.applied(store.load(tmp_path / "b"))) == 1
    back.save_pretrained(tmp_path / "c")  # diffusers' own method
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(tmp_path / "c")), expected)
    again = Narrow(keep=0.5).attach(back.unet)
    store.save(back, tmp_path / "d", [("unet", again)])
    end = store.load(tmp_path / "d")
    assert torch.equal(picture(end), picture(back))
    assert len(store.applied(end)) == 2
    assert torch.equal(picture(copy.deepcopy(end)), picture(end))


FRESH = """
import os, sys, effuse, torch
from diffusers import DiffusionPipeline
assert "torchvision" not in sys.modules
torch.set_num_threads(1)
for name in ("plain", "ours"):
    if os.fork() == 0:  # neither finds what the other imported
        load = DiffusionPipeline.from_pretrained if name == "plain" else effuse.load
        pipe = load(sys.argv[1])
        pipe.set_progress_bar_config(disable=True)
        out = pipe("ab", num_inference_steps=2, generator=torch.Generator().manual_seed(3),
                   output_type="np").images
        torch.save(torch.as_tensor(out), f"{name}.pt")
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.mark.slow
def test_loads_in_a_fresh_process(tmp_path):
    from effuse.compress.cache.keys import Uniform
    from effuse.compress.cache.levels import Layers
    from effuse.compress.rewire.asdm_assembly import Assemble, Copies, Inherit

    pipe = tiny_sd(layers_per_block=2)
    one = Assemble(keep=0.5, experts=Copies(2)).attach(pipe.unet)
    two = Inherit(Layers(deep=1), Uniform(2)).attach(pipe.unet)
    store.save(pipe, tmp_path / "s", [("unet", one), ("unet", two)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as over there: sums are split by threads, so the last bits differ
    expected = picture(pipe)
    torch.set_num_threads(threads)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("plain", "ours"):
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected), name
    back = store.load(tmp_path / "s")
    assert [type(h.transform).__name__ for _, h in store.applied(back)] == ["Assemble", "Inherit"]
    cached = store.applied(back)[1][1]
    cached.detach()  # a cache keeps no weights, so it still comes off


def test_prune_then_int8_then_cache_in_order(tmp_path):
    from effuse.compress.cache.keys import Uniform
    from effuse.compress.cache.levels import Layers
    from effuse.compress.quantize.int8 import Dynamic, Int8
    from effuse.compress.rewire.asdm_assembly import Inherit

    pipe = tiny_sd()
    pipe.scheduler = effuse.scheduler("dpmpp", pipe.scheduler)
    original = picture(pipe)
    made = (Narrow(), Int8(Dynamic(8, 8), least=8), Inherit(Layers(deep=1), Uniform(2)))
    handles = [("unet", t.attach(pipe.unet)) for t in made]
    expected = picture(pipe)
    store.save(pipe, tmp_path / "s", handles)
    store.save(pipe, tmp_path / "s", handles)  # over itself
    for load in (store.load, DiffusionPipeline.from_pretrained):
        back = load(tmp_path / "s")
        assert torch.equal(picture(back), expected)
        assert type(back.scheduler).__name__ == "SolverScheduler"
        assert [h.transform for _, h in store.applied(back)] == list(made)
    store.save(back, tmp_path / "again")
    assert torch.equal(picture(store.load(tmp_path / "again")), expected)
    manifest = json.loads((tmp_path / "s" / "effuse.json").read_text())
    assert manifest["components"]["unet"]["transforms"] == ["Narrow", "Int8", "Inherit"]
    for _, handle in reversed(handles):
        handle.detach()
    assert torch.equal(picture(pipe), original)


def test_plain_result_needs_no_effuse(tmp_path):
    from effuse.compress.rewire.asdm_assembly import Assemble

    pipe = tiny_sd(layers_per_block=2)
    handle = Assemble(keep=0.5).attach(pipe.unet)
    handle.finalize()
    store.save(pipe, tmp_path / "s", [("unet", handle)])
    index = json.loads((tmp_path / "s" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    back = DiffusionPipeline.from_pretrained(tmp_path / "s")
    assert type(back.unet) is UNet2DConditionModel
    assert torch.equal(picture(back), picture(pipe))


def test_a_scaled_weight_is_plain_and_a_hooked_model_is_not():
    unet = tiny_sd().unet
    assert store.is_plain(unet)
    unet.conv_in.weight.data *= 2
    assert store.is_plain(unet)
    hook = unet.conv_in.register_forward_hook(lambda *a: None)
    assert not store.is_plain(unet)
    hook.remove()
    unet.mid_block.attentions[0].forward = lambda x, *a, **k: (x,)
    assert not store.is_plain(unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_stay(tmp_path, dtype):
    pipe = tiny_ddpm()
    full = store.save(pipe, tmp_path / "full")
    pipe.unet.to(dtype)
    half = store.save(pipe, tmp_path / "half")
    assert size(half / "unet") < 0.6 * size(full / "unet")
    assert store.load(half).unet.dtype == dtype
    assert store.load(half, dtype=torch.float32).unet.dtype == torch.float32

    sd = tiny_sd()
    handle = Narrow().attach(sd.unet)
    sd.unet.to(dtype)
    sd.unet.conv_norm_out.float()  # a mixture stays a mixture
    store.save(sd, tmp_path / "mixed", [("unet", handle)])
    back = store.load(tmp_path / "mixed")
    for name, value in sd.unet.state_dict().items():
        other = back.unet.state_dict()[name]
        assert other.dtype == value.dtype
        assert torch.equal(other, value)
    cast = DiffusionPipeline.from_pretrained(tmp_path / "mixed", dtype=torch.float32)
    assert {p.dtype for p in cast.unet.parameters()} == {torch.float32}


def test_text_encoder_of_transformers(tmp_path):
    """Components of transformers are slimmed in the same way."""

    pipe = tiny_sd()
    handle = Rounded.of(pipe.text_encoder)
    expected = picture(pipe)
    store.save(pipe, tmp_path / "s", [("text_encoder", handle)])
    back = store.load(tmp_path / "s")
    assert type(back.text_encoder).__name__ == "SlimCLIPTextModel"
    assert torch.equal(picture(back), expected)
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(tmp_path / "s")), expected)


@dataclass(frozen=True)
class Round(Transform):
    """Keep the first layer's weight as integers."""

    kind = "quantize"

    def attach(self, model: nn.Module) -> Rounded:
        return Rounded(self, model)


class Whole(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        scale = base.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        whole = (base.weight.detach() / scale.clamp_min(1e-9)).round().to(torch.int8)
        self.register_buffer("whole", whole)
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.whole.to(x.dtype) * self.scale, self.bias)


class Rounded(Applied):
    def __init__(self, transform: Round, model: nn.Module):
        self.transform, self.model = transform, model
        name, layer = next((n, m) for n, m in model.named_modules() if type(m) is nn.Linear)
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, Whole(layer))

    @classmethod
    def of(cls, model: nn.Module) -> Rounded:
        return Round().attach(model)

    def detach(self) -> None:
        raise NotImplementedError

    def finalize(self) -> None: ...


# ---- errors


@pytest.fixture(scope="module")
def _whole(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def folder(tmp_path, _whole):
    """A saved folder to damage; written once."""
    if not (_whole / "s").exists():
        pipe = tiny_sd()
        handle = Narrow().attach(pipe.unet)
        store.save(pipe, _whole / "s", [("unet", handle)])
    return Path(shutil.copytree(_whole / "s", tmp_path / "s"))


def rehash(folder: Path) -> None:
    """Make the manifest agree with what is there, so that later checks are reached."""
    manifest = json.loads((folder / "effuse.json").read_text())
    for name, noted in manifest["files"].items():
        file = folder / name
        noted.update(bytes=file.stat().st_size, sha256=slimmed.sha256(file))
    (folder / "effuse.json").write_text(json.dumps(manifest))


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_truncated_weights(folder):
    os.truncate(folder / WEIGHTS, 1000)
    with pytest.raises(StoreError, match=r"1000 bytes, expected .* truncated"):
        store.load(folder)
    with pytest.raises(StoreError, match="truncated"):
        DiffusionPipeline.from_pretrained(folder)


def test_one_flipped_bit(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(StoreError, match="damaged: its SHA-256"):
        store.load(folder)
    with pytest.raises(StoreError, match="damaged"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "vae/config.json", "model_index.json", "effuse.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"{Path(name).name}.* is missing"):
        store.load(folder)


def test_damaged_manifest(folder):
    (folder / "effuse.json").write_text("{")
    with pytest.raises(StoreError, match=r"effuse.json: damaged"):
        store.load(folder)


def test_foreign_format(folder):
    edit(folder / "effuse.json", lambda d: d.update(format=99, effuse="7.0"))
    with pytest.raises(StoreError, match=r"format 99, this version of effuse reads 1.*effuse 7.0"):
        store.load(folder)
    edit(folder / "unet/config.json", lambda d: d["effuse"].update(format=98))
    with pytest.raises(StoreError, match="format 98"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("components", "unet", "dtype"), "fnoat32", "unet: dtype 'fnoat32' is no floating point"),
        (("components", "unet"), 3, "unet: expected an object, got 3"),
        (("components", "vae", "dtype"), None, "vae: 'dtype' is None, expected a str"),
        (("files",), [], r"'files' is \[\], expected a dict"),
        (("files", "model_index.json"), {}, "model_index.json: 'bytes' is missing"),
    ],
    ids=str,
)
def test_manifest_of_other_things(folder, path, value, message):
    manifest = json.loads((folder / "effuse.json").read_text())
    place = manifest
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "effuse.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=message):
        store.load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "int8", "dtype 'int8' is no floating point type"),
        ("buffers", {"pos": 16}, "dtype 16 is no floating point type"),
        ("tied", None, "'tied' is None, expected a dict"),
        ("transforms", [3], "transform 0: expected an object, got 3"),
        ("weights", "none", "'weights' is 'none', expected a dict"),
    ],
    ids=str,
)
def test_config_of_other_things(folder, name, value, message):
    edit(folder / "unet/config.json", lambda d: d["effuse"].update({name: value}))
    rehash(folder)
    for load in (store.load, DiffusionPipeline.from_pretrained):
        with pytest.raises(StoreError, match=message):
            load(folder)


CHANGES = {
    "unknown method 'asdm_asembly'; did you mean 'asdm_assembly'": {
        "method": "asdm_asembly",
        "module": "effuse.compress.rewire.asdm_asembly",
    },
    "unknown method 'x'.*import someone.else first": {"method": "x", "module": "someone.else"},
    "no class 'Narow'; did you mean 'Narrow'": {"class": "Narow"},
    "unknown field 'kep'; did you mean 'keep'": {"fields": {"kep": 1}},
    "no class 'Rnk'; did you mean 'Rank'": {"fields": {"rank": {"Rnk": {}}}},
    "cannot be put on a fresh UNet2DConditionModel: KeyError": {"plan": {}},
    "weights and transforms do not fit|expected \\(": {"plan": {"keep": 0.25}},
    "no transform": {"method": "ddim", "class": "DDIM", "module": "effuse.solvers.ddim"},
}


@pytest.mark.parametrize("message", CHANGES)
def test_wrong_transform(folder, message):
    config = folder / "unet/config.json"
    edit(config, lambda d: d["effuse"]["transforms"][0].update(CHANGES[message]))
    with pytest.raises(StoreError, match=r"damaged|changed"):
        store.load(folder)
    rehash(folder)
    with pytest.raises(StoreError, match=message):
        store.load(folder)


@pytest.mark.parametrize("need", ["method", "fields", "plan", "path"])
def test_missing_entry(folder, need):
    edit(folder / "unet/config.json", lambda d: d["effuse"]["transforms"][0].pop(need))
    rehash(folder)
    with pytest.raises(StoreError, match=f"'{need}' is missing"):
        store.load(folder)


def test_no_foreign_code_is_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    change = {"method": "harm", "module": "harmful"}
    edit(folder / "unet/config.json", lambda d: d["effuse"]["transforms"][0].update(change))
    rehash(folder)
    with pytest.raises(StoreError, match="unknown method 'harm'"):
        store.load(folder)
    assert "harmful" not in sys.modules


def test_nothing_is_pickled(folder):
    kinds = {f.suffix for f in folder.rglob("*") if f.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt"}


def test_refuses_what_cannot_come_back(tmp_path):
    pipe = tiny_sd()
    out = tmp_path / "s"

    @dataclass(frozen=True)
    class Bare(Narrow):
        pass

    with pytest.raises(StoreError, match="Bare has no card"):
        store.save(pipe, out, [("unet", Bare().attach(pipe.unet))])
    handle = Narrow(rank=lambda: 3).attach(tiny_sd().unet)  # type: ignore[arg-type]
    handle.model = pipe.unet
    with pytest.raises(StoreError, match="cannot be written down"):
        store.save(pipe, out, [("unet", handle)])
    with pytest.raises(StoreError, match="another network"):
        store.save(pipe, out, [("unet", Narrow().attach(tiny_sd().unet))])
    with pytest.raises(StoreError, match="expected one of the networks"):
        store.save(pipe, out, [("unett", Narrow().attach(pipe.unet))])
    odd = Narrow().attach(pipe.unet)
    odd.keep = 0.1  # a plan that does not lead to this network
    with pytest.raises(StoreError, match="do not rebuild the network"):
        store.save(pipe, out, [("unet", odd)])
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="did not save"):
        store.save(tiny_ddpm(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    mixed = store.save(tiny_ddpm(), tmp_path / "mixed")
    (mixed / "unet" / "notes.txt").write_text("by hand")
    with pytest.raises(StoreError, match=r"holds unet.notes.txt, which effuse did not save"):
        store.save(tiny_ddpm(), mixed)
    assert (mixed / "unet" / "notes.txt").read_text() == "by hand"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        store.save(tiny_ddpm(), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    store.save(tiny_ddpm(), tmp_path / "empty", extra={"recipe.yaml": "methods: []\n"})
    assert (tmp_path / "empty" / "recipe.yaml").read_text() == "methods: []\n"
    assert store.load(tmp_path / "empty").unet.config.sample_size == 16


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from tests.tiny import tiny_ddpm
from effuse.bridge import store
torch.set_num_threads(1)
pipe = tiny_ddpm()
pipe.unet.conv_in.bias.data.fill_(7)
def dying(real, when):
    count = [0]
    def call(*args, **kwargs):
        count[0] += 1
        return os._exit(9) if count[0] == when else real(*args, **kwargs)
    return call
for folder, owner, name, when in (
    ("flushing", os, "fsync", 1),
    ("swap", store.Path, "rename", 1),
    ("between", store.Path, "rename", 2),
):
    if os.fork() == 0:
        setattr(owner, name, dying(getattr(owner, name), when))
        store.save(pipe, folder + "/s")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, folder
"""


@pytest.mark.slow
def test_killed_save_leaves_the_old_folder(tmp_path):
    """Killed while it is flushed, before it is put in place, and between the two renames."""
    pipe = tiny_ddpm()
    for name in ("flushing", "swap", "between"):
        store.save(pipe, tmp_path / name / "s")
    command = [sys.executable, "-c", KILLED, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("flushing", "swap", "between"):
        room = tmp_path / name
        assert len(list(room.iterdir())) > 1, "the killed save left its draft"
        assert (room / "s").exists() == (name != "between")
        back = store.load(room / "s")
        assert torch.equal(back.unet.conv_in.bias, pipe.unet.conv_in.bias)
        assert [p.name for p in room.iterdir()] == ["s"]
    pipe.unet.conv_in.bias.data.fill_(5)
    store.save(pipe, room / "s")
    assert store.load(room / "s").unet.conv_in.bias.detach().max() == 5


def test_old_folder_comes_back_though_its_number_is_in_use_again(tmp_path):
    out = store.save(tiny_ddpm(), tmp_path / "s")
    out.rename(tmp_path / f".s.old-{os.getpid()}")
    assert store.load(out).unet.config.sample_size == 16
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_compiled_network_is_saved_with_its_transforms(tmp_path):
    pipe = tiny_sd()
    handle = Narrow().attach(pipe.unet)
    expected = picture(pipe)
    store.save(pipe, tmp_path / "a", [("unet", handle)])
    back = store.load(tmp_path / "a")
    back.unet = torch.compile(back.unet)
    assert len(store.applied(back)) == 1
    store.save(back, tmp_path / "b")
    again = store.load(tmp_path / "b")
    assert torch.equal(picture(again), expected)
    assert [h.transform for _, h in store.applied(again)] == [handle.transform]


def test_failed_save_leaves_no_trace(tmp_path, monkeypatch):
    pipe = tiny_ddpm()
    out = store.save(pipe, tmp_path / "s")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for owner, name in ((type(pipe.unet), "save_pretrained"), (store, "_flush")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space"):
                store.save(pipe, out)
        assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_tied_tensors_are_written_once(tmp_path):
    pipe = tiny_ddpm()
    attention = pipe.unet.mid_block.attentions[0]
    attention.to_q.weight = attention.to_k.weight
    handle = Rounded.of(pipe.unet)
    folder = store.save(pipe, tmp_path / "s", [("unet", handle)])
    tied = json.loads((folder / "unet" / "config.json").read_text())["effuse"]["tied"]
    assert set(tied.values()) < set(dict(pipe.unet.named_parameters(remove_duplicate=False)))
    assert len(tied) == 1
    back = store.load(folder)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[name], value), name


def test_slim_classes_are_found_and_others_are_not():
    cls = saved.SlimUNet2DConditionModel
    assert issubclass(cls, UNet2DConditionModel)
    assert cls.__module__ == "effuse.bridge.saved"
    assert cls is saved.SlimUNet2DConditionModel
    with pytest.raises(AttributeError, match="no model class"):
        saved.SlimNothing
    with pytest.raises(AttributeError, match="no model class"):
        saved.SlimDDIMScheduler


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_half_precision_holds_is_written_in_it_and_read_as_it_was(tmp_path, half):
    pipe = tiny_sd()
    plain = folder_size(store.save(pipe, tmp_path / "full"))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(half).float()
    expected = {n: getattr(pipe, n).state_dict() for n in ("unet", "vae", "text_encoder")}
    narrow = store.save(pipe, tmp_path / "narrow")
    assert folder_size(narrow) < 0.6 * plain
    handle = Int8(least=8).attach(pipe.unet)
    after = {n: getattr(pipe, n).state_dict() for n in expected}
    small = store.save(pipe, tmp_path / "slim", [("unet", handle)])
    assert folder_size(small) < folder_size(narrow)
    for folder, states in ((narrow, expected), (small, after)):
        for load in (store.load, DiffusionPipeline.from_pretrained):
            again = load(folder)
            for name, state in states.items():
                found = getattr(again, name).state_dict()
                assert found.keys() == state.keys()
                for key, value in state.items():
                    assert found[key].dtype == value.dtype
                    assert torch.equal(found[key], value), key


def folder_size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
