"""Oracles of 8-bit layers: exact whole-number products, error bounds, counted bytes, the store."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_dit, tiny_pixart, tiny_sd, tiny_unet
from torch import nn

from effuse.bridge import store
from effuse.compress.quantize.int8 import Dynamic, Int8, WeightOnly
from effuse.nn import quantized as layers
from effuse.nn.quantized import (
    EXACT,
    Dequantized,
    Integer,
    QuantizedConv2d,
    QuantizedLinear,
    quantize_samples,
    quantized,
)
from effuse.ops.grid import quantize_rows

whole = pytest.mark.skipif(not EXACT, reason="this processor cannot sum products of int8")
CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (2, 3), "padding": (0, 2), "dilation": (1, 2), "bias": False},
    {"kernel_size": 2, "stride": 2},
]


def linear(rng: torch.Generator, bias: bool = True, k: int = 24, n: int = 10) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias)
    layer.weight.data = torch.randn(n, k, generator=rng)
    return layer


@whole
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_exact_product_of_whole_numbers(rng, bias):
    layer = quantized(linear(rng, bias), Integer())
    x = torch.randn(3, 5, 24, generator=rng)
    rows = quantize_rows(x)
    expected = rows.q.double() @ layer.q.double().T * layer.scale.double() * rows.scale.double()
    if bias:
        expected += layer.bias.detach().double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)
    sums = torch._int_mm(rows.q.reshape(15, 24), layer.q.t())
    exact = rows.q.reshape(15, 24).double() @ layer.q.double().T
    assert torch.equal(sums.double(), exact)


@whole
@pytest.mark.parametrize("how", CONVS, ids=str)
def test_conv_is_the_exact_sum_of_whole_numbers(rng, how):
    base = nn.Conv2d(5, 7, **how)
    layer = quantized(base, Integer())
    x = torch.randn(2, 5, 9, 8, generator=rng)
    if base.kernel_size == (1, 1) and base.stride == (1, 1):
        codes, step = quantize_rows(x, (1,))
        zero = torch.zeros(())
    else:
        codes, step, zero = quantize_samples(x)
    whole = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
    sums = torch.nn.functional.conv2d(codes.double() - zero.double(), layer.q.double(), **whole)
    expected = sums * layer.scale.double().view(-1, 1, 1) * step.double()
    if base.bias is not None:
        expected += base.bias.detach().double().view(-1, 1, 1)
    with torch.no_grad():
        out = layer(x)
    assert out.shape == base(x).shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=2e-6)


def test_whole_numbers_in_give_the_original_out(rng):
    """Weights and activations on the grid: nothing is lost."""
    base = nn.Linear(16, 8)
    base.weight.data = torch.randint(-127, 128, (8, 16), generator=rng).float() / 64
    base.weight.data[:, 0] = 127 / 64
    base.bias.data = torch.randint(-9, 9, (8,), generator=rng).float()
    x = torch.randint(-127, 128, (6, 16), generator=rng).float() / 32
    x[:, 3] = 127 / 32
    with torch.no_grad():
        for compute in (Integer(), Dequantized()):
            layer = quantized(base, compute)
            assert torch.equal(layer.weight, base.weight)
            torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), lambda: nn.Conv2d(8, 6, 3)])
def test_no_weight_moves_by_more_than_half_a_step(make):
    base = make()
    layer = quantized(base, Integer())
    moved = (layer.weight - base.weight).abs().flatten(1).amax(1)
    assert (moved <= layer.scale / 2 * (1 + 1e-5)).all()
    torch.testing.assert_close(layer.scale, base.weight.abs().flatten(1).amax(1) / 127)


def test_output_error_is_within_its_bound(rng):
    """|y - y_hat| <= sum_k (|x| s_w / 2 + |w| s_x / 2 + s_x s_w / 4)."""
    base = linear(rng)
    layer = quantized(base, Integer())
    x = torch.randn(50, 24, generator=rng)
    s_x = quantize_rows(x).scale
    s_w = layer.scale
    bound = x.abs().sum(1, keepdim=True) * s_w / 2 + s_x * base.weight.abs().sum(1) / 2
    bound += 24 * s_x * s_w / 4
    with torch.no_grad():
        assert ((layer(x) - base(x)).abs() <= bound * (1 + 1e-4)).all()


def test_a_row_does_not_depend_on_its_batch(rng):
    x = (
        torch.randn(4, 6, 8, 8, generator=rng)
        * torch.tensor([1, 100, 1e-3, 0])[:, None, None, None]
    )
    layer = quantized(nn.Conv2d(6, 5, 3, padding=1), Integer())
    with torch.no_grad():
        whole = layer(x)
        for i in range(4):
            assert torch.equal(layer(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("low", [-1.0, -0.01, 0.5, 0.0])
def test_samples_of_activations(rng, low):
    x = torch.rand(4, 2, 3, 3, generator=rng) * (3 - low) + low
    x[1] *= 1e4
    x[2] = 0
    x[3] *= -1
    q, step, zero = quantize_samples(x)
    assert torch.equal(zero, zero.round())
    assert ((zero >= -128) & (zero <= 127)).all()  # 0 is a level
    moved = (step * (q.double() - zero.double()) - x.double()).abs()
    assert (moved <= step / 2 * (1 + 1e-5) + 1e-30).all()
    assert torch.equal(quantize_samples(x[1:2])[0], q[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("choice", [Dynamic(8, 8), WeightOnly()], ids=str)
def test_dtypes(dtype, choice):
    model = tiny_dit().to(dtype)
    before = model.state_dict()
    handle = Int8(choice, least=8).attach(model)
    assert model.dtype == dtype
    layer = model.transformer_blocks[0].attn1.to_q
    assert layer.weight.dtype == dtype
    assert layer.scale.dtype == torch.float32
    x, t = torch.randn(2, 4, 8, 8).to(dtype), torch.tensor([3, 4])
    with torch.no_grad():
        out = model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample
        assert out.dtype == dtype
        model.to(torch.float64)
        assert model.dtype == layer.weight.dtype == torch.float64
        assert layer.scale.dtype == torch.float32
        model.to(dtype)
    handle.detach()
    after = model.state_dict()
    assert all(torch.equal(after[n], v) for n, v in before.items())


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit, tiny_pixart])
def test_report_is_counted(make):
    model = make()
    handle = Int8(least=8).attach(model)
    report = handle.report()
    state = model.state_dict()
    assert report["bytes"] == sum(t.numel() * t.element_size() for t in state.values())
    plain = make().state_dict()
    assert report["bytes_before"] == sum(t.numel() * t.element_size() for t in plain.values())
    stored = [m for m in model.modules() if isinstance(m, (QuantizedLinear, QuantizedConv2d))]
    assert report["layers"] == len(stored) > 0
    saved = sum(3 * m.q.numel() - 4 * m.scale.numel() for m in stored)
    assert report["bytes_before"] - report["bytes"] == saved


def test_ends_stay_and_where_is_heard():
    unet = tiny_unet()
    handle = Int8(least=8, where=lambda name, m: "mid_block" not in name).attach(unet)
    assert type(unet.conv_in) is nn.Conv2d
    assert type(unet.conv_out) is nn.Conv2d
    assert not any("mid_block" in name for name in handle.layers)
    assert any("down_blocks" in name for name in handle.layers)


def test_shapes_decide_who_computes_in_whole_numbers():
    convs = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 128, 1), nn.Conv2d(64, 64, 3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32), *convs, nn.ReLU())
    plan = Int8().attach(copy.deepcopy(model)).plan()["layers"]
    assert [n for n, how in plan.items() if how == "integer"] == ["0", "3", "4"]
    assert len(plan) == 5
    plan = Int8(WeightOnly()).attach(model).plan()["layers"]
    assert set(plan.values()) == {"dequantized"}


def test_shared_layer_stays_shared():
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    handle = Int8().attach(model)
    assert model["a"] is model["b"][0]
    assert handle.report()["layers"] == 1
    handle.detach()
    assert model["a"] is model["b"][0] is layer


@whole
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 10), lambda: nn.Conv2d(24, 10, 3)])
def test_gradient_reaches_the_bias_and_numbers_stay(rng, make):
    layer = quantized(make(), Integer())
    x = torch.randn((5, 24) if layer.q.ndim == 2 else (5, 24, 6, 6), generator=rng)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    out.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((10,), out.numel() / 10))


def test_what_is_not_a_number_shows():
    x = torch.randn(3, 8, 4, 4)
    x[1, 2, 3, 0] = float("nan")
    for base in (nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)):
        with torch.no_grad():
            bad = quantized(base, Integer())(x).isnan().flatten(1).any(1)
        assert bad.tolist() == [False, True, False]


def answers() -> dict[str, torch.Tensor]:
    """Answer as integer and as float layers, on numbers that saturate sums of 16 bits."""
    torch.manual_seed(0)
    x = torch.rand(4, 64, 6, 6) + 1
    out = {}
    for name, base, given in (
        ("linear", nn.Linear(64, 64), x[..., 0, 0]),
        ("conv", nn.Conv2d(64, 64, 3), x),
    ):
        base.weight.data.abs_()
        with torch.no_grad():
            for compute in (Integer(), Dequantized()):
                out[f"{name} {compute.name}"] = quantized(base, compute)(given)
    return out


@whole
def test_whole_numbers_are_close_to_floats():
    out = answers()
    for kind in ("linear", "conv"):
        one, two = out[f"{kind} integer"], out[f"{kind} dequantized"]
        assert not torch.equal(one, two)
        assert (one - two).norm() < 0.01 * two.norm()


def test_too_long_sums_and_processors_without_them_are_left_to_floats(monkeypatch):
    long = nn.Linear(2**17, 8)
    x = torch.ones(1, 2**17)
    with torch.no_grad():
        ways = [quantized(long, compute)(x) for compute in (Integer(), Dequantized())]
        assert torch.equal(*ways)
    monkeypatch.setattr(layers, "EXACT", False)
    out = answers()
    assert torch.equal(out["linear integer"], out["linear dequantized"])
    assert torch.equal(out["conv integer"], out["conv dequantized"])


@pytest.mark.slow
def test_a_processor_that_saturates_is_found_out():
    """An x86 processor without VNNI, as oneDNN plays it."""
    code = (
        "import torch, tests.methods.test_int8 as t; from effuse.nn import quantized as q;"
        "out = t.answers(); assert not q.EXACT;"
        "assert torch.equal(out['linear integer'], out['linear dequantized'])"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gradient_reaches_the_input():
    layer = quantized(nn.Linear(64, 64), Integer())
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def test_bad_input():
    with pytest.raises(TypeError, match=r"choice='fast': expected an object, such as Dynamic\(\)"):
        Int8("fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="least=0"):
        Int8(least=0)
    with pytest.raises(ValueError, match="least_1x1=-1"):
        Dynamic(least_1x1=-1)
    with pytest.raises(TypeError, match="expected a Linear, or a Conv2d of one group"):
        quantized(nn.Conv2d(4, 4, 3, groups=2), Integer())
    handle = Int8().attach(nn.Sequential(nn.Linear(32, 32)))
    handle.finalize()
    with pytest.raises(RuntimeError, match="given up by finalize"):
        handle.detach()


@pytest.mark.bridge
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_folder_is_small_and_comes_back(tmp_path, dtype):
    pipe = tiny_sd()
    pipe.unet.to(dtype)
    x, t = torch.randn(1, 4, 8, 8).to(dtype), torch.tensor(500)
    text = torch.randn(1, 5, 32).to(dtype)
    full = store.save(pipe, tmp_path / "full")
    handle = Int8(Dynamic(8, 8), least=8).attach(pipe.unet)
    with torch.no_grad():
        expected = pipe.unet(x, t, text).sample
    handle.finalize()
    small = store.save(pipe, tmp_path / "small", [("unet", handle)])
    name = "unet/diffusion_pytorch_model.safetensors"
    saved = (full / name).stat().st_size - (small / name).stat().st_size
    report = handle.report()
    header = 40_000
    assert abs(saved - (report["bytes_before"] - report["bytes"])) < header
    back = store.load(small)
    with torch.no_grad():
        assert torch.equal(back.unet(x, t, text).sample, expected)
    assert back.unet.dtype == dtype
    assert store.applied(back)[0][1].report()["bytes"] == report["bytes"]
