from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_ddpm, tiny_sd
from torch import nn
from torch.nn import functional as F

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


def test_macs_of_integer_products():
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    assert count(lambda: torch._int_mm(a, b)) == 32 * 16 * 8


def test_a_module_declares_its_macs_and_its_inside_counts_no_more():
    class Secret(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x)

        def macs(self, x):
            return 1000 * len(x)

    net = nn.Sequential(nn.Linear(4, 4), Secret())
    assert count(lambda: net(torch.randn(3, 4))) == 3 * 16 + 3000


def test_a_product_without_a_formula_is_named():
    @torch.library.custom_op("effuse_test::product", mutates_args=())
    def product(a: torch.Tensor) -> torch.Tensor:
        return a @ a

    with CountMacs() as counted:
        product(torch.eye(3))
    assert counted.uncounted == {"effuse_test.product"}


def test_counting_leaves_no_hook_behind():
    before = len(torch.nn.modules.module._global_forward_hooks)
    with pytest.raises(ZeroDivisionError), CountMacs():
        1 / 0
    assert len(torch.nn.modules.module._global_forward_hooks) == before


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

    def draw(steps, scale):
        return lambda: pipe(
            "ab",
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )

    costs = measure(
        {"guided": pipe, "plain": pipe},
        {"guided": draw(4, 5.0), "plain": draw(3, 1.0)},
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
    assert guided.ratio == 1
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


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match="expected equal names"):
        measure({"a": None}, {"b": None})
    with pytest.raises(ValueError, match="rounds=0"):
        rounds_of({"a": lambda: None}, 0)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        folder_bytes("/nowhere/at/all")
