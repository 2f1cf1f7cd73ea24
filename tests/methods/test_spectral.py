"""Oracles of wavelet gating and of the loss weighted by spectrum: sheet 23."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_dit, tiny_sd, tiny_unet, tiny_unet_cond

from effuse.bridge import store
from effuse.distill.spectral import (
    SpectrumAwareDistillation,
    WaveletGating,
    frequency_error,
    gates,
    slim,
    spectral_term,
)
from effuse.nn.wavelet import Gates, WGDown, WGUp
from effuse.ops.bands import haar, inverse_magnitude
from effuse.processes import Cosine


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_down_with_half_of_the_low_band_is_pooling():
    x = noise(2, 3, 8, 6, dtype=torch.float64)
    g = torch.zeros(2, 4, 3, dtype=torch.float64)
    g[:, 0] = 0.5
    torch.testing.assert_close(WGDown.gated(x, g), F.avg_pool2d(x, 2), rtol=0, atol=1e-12)


def test_up_with_open_gates_undoes_the_transform():
    x = noise(2, 3, 8, 6, dtype=torch.float64)
    quarters = haar(x).flatten(1, 2)
    ones = torch.ones(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(WGUp.gated(quarters, ones), x, rtol=0, atol=1e-12)
    ones[:, 3] = 0  # without HH
    again = haar(WGUp.gated(quarters, ones))
    torch.testing.assert_close(again[:, :3], haar(x)[:, :3], rtol=0, atol=1e-12)
    assert float(again[:, 3].abs().max()) < 1e-12


def test_gates_are_a_sigmoid_of_pooled_features_and_time():
    layer = Gates(4, 3, 5, time=2)
    x, temb = noise(2, 4, 6, 6), noise(2, 2, seed=1)
    h = F.silu(torch.cat([x.mean((2, 3)), temb], 1) @ layer.one.weight.T + layer.one.bias)
    expected = (1 / (1 + (-(h @ layer.two.weight.T + layer.two.bias)).exp())).view(2, 4, 3)
    torch.testing.assert_close(layer(x, temb), expected)
    with pytest.raises(ValueError, match="width 2"):
        layer(x)


def pair():
    teacher, student = tiny_unet().eval(), tiny_unet()
    with torch.no_grad():
        for k, p in enumerate(student.parameters()):
            p.add_(0.02 * noise(*p.shape, seed=k))
    return teacher, student


def batch():
    x0, target = noise(2, 3, 16, 16, seed=2), noise(2, 3, 16, 16, seed=3)
    call = ((noise(2, 3, 16, 16, seed=4), torch.tensor([10, 900])), {"return_dict": False})
    return {"call": call, "x0": x0, "target": target}


def test_exponent_zero_is_the_plain_error_at_every_scale():
    goal = SpectrumAwareDistillation(*pair(), spatial=0.3, spectral=0.3, exponent=0.0)
    terms = goal.loss("student", batch()).terms
    torch.testing.assert_close(terms["spatial"], terms["spectral"], rtol=1e-5, atol=0)


def test_terms_are_the_formula():
    teacher, student = pair()
    goal = SpectrumAwareDistillation(teacher, student, ["mid_block"], spatial=0.1, spectral=0.2)
    given = batch()
    terms = goal.loss("student", given).terms
    heard = []
    for net in (teacher, student):
        hook = net.mid_block.register_forward_hook(lambda m, a, out: heard.append(out))
        heard.append(net(*given["call"][0], return_dict=False)[0])
        hook.remove()
    ft, out_t, fs, out_s = heard
    plain = waved = 0.0
    for a, b in ((out_t, out_s), (ft, fs)):
        x0 = F.avg_pool2d(given["x0"], 16 // a.shape[-1])
        magnitude = torch.fft.fft2(x0).abs().mean(1, keepdim=True)
        magnitude = magnitude.maximum(1e-3 * magnitude.amax((2, 3), keepdim=True))
        w = (1 / magnitude) / (1 / magnitude).mean((2, 3), keepdim=True)
        off = torch.fft.fft2(a - b).abs().square() / a.shape[-1] ** 2
        plain = plain + (a - b).square().mean()
        waved = waved + (w * off).mean()
    torch.testing.assert_close(terms["spatial"], 0.1 * plain)
    torch.testing.assert_close(terms["spectral"], 0.2 * waved)
    torch.testing.assert_close(terms["task"], (out_s - given["target"]).square().mean())


def test_zero_for_the_teacher_itself_and_plain_without_weights():
    teacher = tiny_unet().eval()
    terms = (
        SpectrumAwareDistillation(teacher, copy.deepcopy(teacher)).loss("student", batch()).terms
    )
    assert float(terms["spatial"]) == float(terms["spectral"]) == 0
    loss = SpectrumAwareDistillation(*pair(), spatial=0, spectral=0).loss("student", batch())
    assert set(loss.terms) == {"task"}


def test_high_frequencies_weigh_more_where_pictures_have_few():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16) + torch.linspace(-1, 1, 16)[:, None]
    w = inverse_magnitude(ramp)
    at = torch.arange(16) / 16
    low, high = (torch.cos(2 * torch.pi * k * at).expand(1, 1, 16, 16) for k in (1, 7))
    nothing = torch.zeros_like(low)
    assert float(spectral_term(high, nothing, w)) > 3 * float(spectral_term(low, nothing, w))


@pytest.mark.parametrize("made", [tiny_unet, tiny_unet_cond])
@pytest.mark.parametrize("gated", [True, False])
def test_slim_student_learns_with_adapters(made, gated):
    teacher = made(block_out_channels=(32, 64)).eval()
    student, handle = slim(teacher, 0.5, gated=gated)
    assert student.config.block_out_channels == (16, 32)
    assert (handle is not None) == gated
    size, channels = teacher.config.sample_size, teacher.config.in_channels
    x = noise(2, channels, size, size)
    words = {"return_dict": False}
    if made is tiny_unet_cond:
        words["encoder_hidden_states"] = noise(2, 4, 32)
    call = ((x, torch.tensor([10, 900])), words)
    goal = SpectrumAwareDistillation(teacher, student, example=call)
    assert len(goal.adapters) == len(goal.taps)
    given = {"call": call, "x0": x, "target": x}
    optimizer = torch.optim.Adam(goal.parameters_of("student"), 1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = goal.loss("student", given)
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < losses[0]
    if gated:
        found = gates(student, call)
        assert len(found) == 2  # one halving, one doubling
        assert all(((g > 0) & (g < 1)).all() for g in found.values())
        assert all(p.grad is not None for m in handle.layers.values() for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slim_student_is_saved_and_loaded(tmp_path, dtype):
    pipe = tiny_sd()
    pipe.unet, handle = slim(pipe.unet, 0.5)
    pipe.unet.to(dtype).eval()
    config = pipe.unet.config
    x = noise(1, config.in_channels, 8, 8).to(dtype)
    words = {"encoder_hidden_states": noise(1, 4, config.cross_attention_dim).to(dtype)}
    before = pipe.unet(x, 5, **words, return_dict=False)[0]
    store.save(pipe, tmp_path / "slim", [("unet", handle)])
    again = store.load(tmp_path / "slim")
    assert torch.equal(again.unet(x, 5, **words, return_dict=False)[0], before)


def test_gates_hear_the_time_of_their_own_network_and_thread():
    student, handle = slim(tiny_unet(block_out_channels=(32, 64)).eval(), 0.5)
    student.eval()
    name = next(n for n in handle.layers if "down" in n)
    x = noise(2, student.config.in_channels, 8, 8)
    times = torch.tensor([10, 900])
    seen = {}

    def draw(net, t):
        gate = net.get_submodule(f"{name}.gates")
        hook = gate.register_forward_hook(lambda m, given, out: seen.update(x=given[0], g=out))
        with torch.no_grad():
            out = net(x, t, return_dict=False)[0]
            temb = net.time_embedding(net.time_proj(t))
            assert torch.equal(gate(seen["x"], temb), seen["g"])
        hook.remove()
        return out

    first = draw(student, times)
    assert not torch.allclose(seen["g"][0], seen["g"][1], atol=1e-4)
    blind = copy.deepcopy(student)
    for m in blind.modules():
        if isinstance(m, Gates):
            m.one.weight.data[:, -m.time :] = 0
    assert not torch.allclose(draw(blind, times), first, atol=1e-4)
    other = copy.deepcopy(student)
    for p in other.time_embedding.parameters():
        p.data.mul_(2)
    draw(other, times)  # by its own embedding, which is not the first's
    torch.testing.assert_close(draw(student, times), first, rtol=0, atol=0)
    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(student, x, t) for t in (times, 1000 - times) for _ in range(4)]
        with torch.no_grad():
            alone = [student(x, t).sample for t in (times, 1000 - times)]
        for i, out in enumerate(together):
            torch.testing.assert_close(out.result().sample.detach(), alone[i // 4])
    handle.detach()
    assert not student.time_embedding._forward_hooks
    bare, quiet = slim(tiny_unet(), 0.5, gated=False)
    assert quiet is None
    without = WaveletGating(time=False).attach(bare)
    assert all(m.gates.time == 0 for m in without.layers.values())


def test_frequency_error_of_knowing_nothing_is_white():
    x0 = noise(64, 3, 16, 16)
    rng = torch.Generator().manual_seed(0)
    off = frequency_error(
        lambda x, t: torch.zeros_like(x), Cosine(), x0, (0.2, 0.8), bins=4, rng=rng
    )
    torch.testing.assert_close(off, torch.ones(2, 4), rtol=0.05, atol=0)
    process = Cosine()

    def wiener_of_white(x, t):  # S = 1: H = sigma, the error alpha^2
        return process.sigma(t)[:, None, None, None].float() * x

    off = frequency_error(wiener_of_white, process, x0, (0.3,), bins=4, rng=rng)
    expected = float(process.alpha(0.3)) ** 2
    torch.testing.assert_close(off, torch.full((1, 4), expected), rtol=0.05, atol=0)


def test_bad_input():
    with pytest.raises(TypeError, match="no resolution"):
        WaveletGating().attach(tiny_dit())
    with pytest.raises(TypeError, match="UNet2DModel"):
        slim(tiny_dit())
    with pytest.raises(ValueError, match="multiple of 4"):
        WGUp(6)
    with pytest.raises(ValueError, match="twice"):
        WGUp(4)(torch.ones(1, 4, 2, 2), (5, 4))
    with pytest.raises(ValueError, match="even height"):
        WGDown(2)(torch.ones(1, 2, 3, 4))
    teacher, student = pair()
    with pytest.raises(ValueError, match="spectral=-1"):
        SpectrumAwareDistillation(teacher, student, spectral=-1.0)
    with pytest.raises(ValueError, match="`x0`"):
        SpectrumAwareDistillation(teacher, student).loss("student", {"call": ((), {})})
    with pytest.raises(ValueError, match="in_channels"):
        SpectrumAwareDistillation(tiny_unet(in_channels=4), student)
