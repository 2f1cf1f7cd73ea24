from __future__ import annotations

import time

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_dit, tiny_sd, tiny_unet_cond
from torch import nn
from torch.nn import functional as F

from effuse.compress.quantize.int8 import Dynamic, Int8
from effuse.evaluate.cost import (
    CountMacs,
    Peak,
    bytes_of,
    folder_bytes,
    measure,
    median,
    rounds_of,
    watch,
)


def count(run) -> int:
    with torch.no_grad(), CountMacs() as counted:
        run()
    assert not counted.uncounted
    return counted.macs


def test_macs_of_products_are_exact():
    x = torch.randn(3, 5, 7)
    assert count(lambda: x @ torch.randn(7, 11)) == 3 * 5 * 7 * 11
    assert count(lambda: nn.Linear(7, 11)(x)) == 3 * 5 * 7 * 11
    picture = torch.randn(2, 4, 9, 9)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert count(lambda: conv(picture)) == 2 * 6 * 9 * 9 * 2 * 9
    assert count(lambda: picture.exp() * 2 + 1) == 0


@pytest.mark.parametrize("inference", [False, True])
def test_macs_of_attention_are_two_products(inference):
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 6, 8)
    with torch.inference_mode(inference), torch.no_grad(), CountMacs() as counted:
        F.scaled_dot_product_attention(q, k, k)
    assert counted.macs == 2 * 3 * 10 * 6 * (8 + 8)
    assert not counted.uncounted


@pytest.mark.parametrize("n", [8, 16])
def test_macs_of_integer_products(n):
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, n, dtype=torch.int8)
    assert count(lambda: torch._int_mm(a, b)) == 32 * 16 * n


@pytest.mark.parametrize("n", [32, 64])
def test_macs_of_four_bit_products(n):
    x, q = torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(n, 64, dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    both = torch.ones(2, n, 2, dtype=torch.bfloat16)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    assert count(lambda: run(x, packed, 32, both)) == 3 * 64 * n


def test_macs_of_strided_grouped_and_transposed_convolutions():
    x = torch.randn(2, 4, 9, 9)
    assert count(lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2)(x)) == 2 * 6 * 3 * 3 * 4 * 9
    assert count(lambda: nn.Conv2d(4, 4, 3, groups=4)(x)) == 2 * 4 * 7 * 7 * 9
    up = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert count(lambda: up(x)) == 2 * 4 * 9 * 9 * 6 * 4  # from each position of the input


def test_a_product_without_a_formula_is_named():
    @torch.library.custom_op("effuse_test::product", mutates_args=())
    def product(a: torch.Tensor) -> torch.Tensor:
        return a @ a

    with CountMacs() as counted:
        product(torch.eye(3))
    assert counted.uncounted == {"effuse_test.product"}


def test_what_was_counted_before_an_error_stays_and_nothing_is_warned_of(recwarn):
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(6, 7))
    with CountMacs() as counted, pytest.raises(RuntimeError, match="shapes"):
        net(torch.randn(2, 4))
    assert counted.macs == 2 * 4 * 5
    assert not recwarn.list


def test_watch_notes_calls_rows_and_macs():
    net = nn.Linear(4, 5)
    with CountMacs() as counted, watch(net, counted) as calls:
        net(torch.randn(2, 4))
        net(torch.randn(6, 4))
    assert calls.rows == [2, 6]
    assert calls.macs == [40, 120]
    assert not net._forward_hooks


def test_peak_is_what_is_held_at_once():
    with Peak(torch.device("cpu")) as peak:
        for _ in range(3):
            a = torch.empty(1000, 100)
            b = torch.empty(1000, 200)
            del a, b
    assert 1_200_000 <= peak.bytes < 1_210_000


def test_rounds_take_turns_and_keep_pairs():
    order: list[str] = []
    now = [0.0]

    def draw(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    taken = rounds_of(
        {"a": draw("a", 2.0), "b": draw("b", 1.0)},
        3,
        warmup=1,
        clock=lambda: now[0],
        processor=lambda: 0.0,
    )
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert taken["a"].tolist() == [[2, 2, 2], [0, 0, 0]]
    assert median(taken["b"][0] / taken["a"][0]) == (0.5, (0.5, 0.5))


def test_bytes_count_shared_storage_once():
    a, b = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    assert bytes_of(a, b) == 800
    b.weight = a.weight
    assert bytes_of(a, b) == 400
    assert bytes_of(a.half()) == 200


@pytest.mark.bridge
def test_a_pipeline_with_and_without_guidance(tmp_path):
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "pipe")

    def draw(steps, scale, idle=0.0):
        def run():
            time.sleep(idle)
            pipe(
                "ab",
                num_inference_steps=steps,
                guidance_scale=scale,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            )

        return run

    costs = measure(
        {"guided": pipe, "plain": pipe},
        {"guided": draw(4, 5.0, idle=0.1), "plain": draw(3, 1.0)},
        folders={"guided": tmp_path / "pipe"},
        rounds=2,
    )
    guided, plain = costs["guided"], costs["plain"]
    assert (guided.network_calls, guided.evaluations) == (4, 8)
    assert (plain.network_calls, plain.evaluations) == (3, 3)
    assert guided.macs_per_call == 2 * plain.macs_per_call > 0
    text_and_decoder = plain.macs_per_image - 3 * plain.macs_per_call
    assert text_and_decoder > 0
    assert guided.macs_per_image > 4 * guided.macs_per_call + text_and_decoder
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert guided.parameters == sum(p.numel() for m in parts for p in m.parameters())
    assert guided.network_parameters == sum(p.numel() for p in pipe.unet.parameters())
    assert guided.bytes_on_disk == folder_bytes(tmp_path / "pipe")
    assert guided.bytes_on_disk > guided.bytes_in_memory
    assert guided.folder
    assert not plain.folder
    assert guided.peak_bytes > plain.peak_bytes > 0
    assert guided.ratio == 1 > plain.ratio
    low, high = plain.ratio_interval
    assert low <= plain.ratio <= high < 1
    assert 0 < guided.processor_seconds < guided.seconds_per_image - 0.05  # it slept
    assert guided.uncounted == ()


@pytest.mark.bridge
def test_macs_agree_with_torch_on_a_unet():
    from torch.utils.flop_counter import FlopCounterMode

    unet = tiny_ddpm().unet
    for module in unet.modules():  # torch's counter does not know attention on a CPU
        if hasattr(module, "set_processor"):
            from diffusers.models.attention_processor import AttnProcessor

            module.set_processor(AttnProcessor())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        unet(x, 5)
    assert count(lambda: unet(x, 5)) * 2 == theirs.get_total_flops()


def by_hand(network: nn.Module, run, monkeypatch) -> int:
    """Count a call layer by layer: positions times weights, and two products an attention."""
    total = [0]

    def layer(module, args, out):
        positions = out.numel() // module.weight.shape[0]
        total[0] += positions * module.weight.numel()

    real = F.scaled_dot_product_attention

    def attention(q, k, v, *args, **kwargs):
        total[0] += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return real(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [m.register_forward_hook(layer) for m in layers]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    monkeypatch.undo()
    return total[0]


@pytest.mark.bridge
def test_macs_of_a_unet_and_of_a_transformer_are_those_of_their_layers(monkeypatch):
    t = torch.tensor([3, 4])
    unet, dit = tiny_unet_cond().eval(), tiny_dit().eval()
    x = torch.randn(2, unet.config.in_channels, 8, 8)
    text = torch.randn(2, 5, unet.config.cross_attention_dim)
    runs = {
        unet: lambda: unet(x, t, text),
        dit: lambda: dit(x, timestep=t, class_labels=torch.tensor([1, 2])),
    }
    for network, run in runs.items():
        assert count(run) == by_hand(network, run, monkeypatch) > 0
        plain = count(run)
        handle = Int8(Dynamic(8, 8), least=8).attach(network)
        assert any(layer.kind == "integer" for layer in handle.layers.values())
        assert count(run) == plain  # whole numbers are multiplied as often
        handle.detach()


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match="expected equal names"):
        measure({"a": None}, {"b": None})
    with pytest.raises(ValueError, match="rounds=0"):
        rounds_of({"a": lambda: None}, 0)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        folder_bytes("/nowhere/at/all")
