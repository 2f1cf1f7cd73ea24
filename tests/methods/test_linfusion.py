"""LinFusion: the closed forms of normalized linear attention, the swap, the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_dit, tiny_flux, tiny_sd, tiny_sd3, tiny_unet, tiny_unet_cond

import effuse
from effuse.compress.rewire import linfusion
from effuse.compress.rewire.linfusion import LinearizeAttention
from effuse.core.errors import StoreError
from effuse.evaluate.cost import CountMacs
from effuse.nn.linear_attention import (
    Bidirectional,
    Causal,
    LinearAttention,
    Normalized,
    Unnormalized,
    positive,
)

ARMS = (Normalized(), Unnormalized(), Causal(chunk=3), Bidirectional(chunk=3))


def features(n=7, seed=0, d=3, e=4):
    rng = torch.Generator().manual_seed(seed)
    q, k = (positive(torch.randn(2, 2, n, d, generator=rng, dtype=torch.float64)) for _ in "qk")
    return q, k, torch.randn(2, 2, n, e, generator=rng, dtype=torch.float64)


def attention(seed=0, **kwargs):
    from diffusers.models.attention_processor import Attention

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(6, heads=2, dim_head=3, **kwargs).double().eval()


def tokens(n=7, seed=1, d=6):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=rng, dtype=torch.float64)


def call(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=rng)
    text = torch.randn(2, 5, 32, generator=rng)
    t = torch.tensor([300, 700])
    return (x, t), {"encoder_hidden_states": text, "return_dict": False}


def run(model, seed=0):
    args, kwargs = call(model, seed)
    with torch.no_grad():
        return model(*args, **kwargs)[0]


# ---- the rule between tokens


def test_positive_is_elu_plus_one():
    u = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    assert torch.allclose(positive(u), torch.tensor([-2.0, 0.0, 0.0]).double().exp() + u.relu())


def test_equals_its_quadratic_reference():
    q, k, v = features()
    weights = q @ k.mT
    reference = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(Normalized(0.0)(q, k, v), reference, rtol=1e-12, atol=0)
    n = k.shape[-2]
    eps = weights @ v / (weights.sum(-1, keepdim=True) + 1e-4 * n)
    torch.testing.assert_close(Normalized()(q, k, v), eps, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(Unnormalized()(q, k, v), weights @ v / n, rtol=1e-12, atol=1e-15)


@given(n=st.integers(1, 11), chunk=st.integers(1, 5))
def test_scans_equal_their_quadratic_reference(n, chunk):
    q, k, v = features(n)
    weights = (q @ k.mT).tril()
    forwards = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(Causal(0.0, chunk)(q, k, v), forwards, rtol=1e-10, atol=1e-12)
    back = (q @ k.mT).triu()
    backwards = back @ v / back.sum(-1, keepdim=True)
    both = Bidirectional(0.0, chunk)(q, k, v)
    torch.testing.assert_close(both, (forwards + backwards) / 2, rtol=1e-10, atol=1e-12)


def test_constant_values_come_out_as_they_are():
    q, k, v = features()
    ones = torch.ones_like(v)
    a = (q * k.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    torch.testing.assert_close(Normalized()(q, k, ones), (a / (a + 1e-4)).expand_as(ones))
    row = v[..., :1, :].expand_as(v)
    torch.testing.assert_close(Normalized(0.0)(q, k, row), row, rtol=1e-12, atol=0)
    assert not torch.allclose(Unnormalized()(q, k, row), row, rtol=0.1)


def test_one_token_gives_its_own_value():
    q, k, v = features(1)
    for rule in (Normalized(0.0), Causal(0.0), Bidirectional(0.0)):
        torch.testing.assert_close(rule(q, k, v), v, rtol=1e-12, atol=0)


@given(times=st.integers(2, 5))
def test_only_the_mean_over_tokens_counts(times):
    q, k, v = features()
    more = [a.repeat_interleave(times, -2) for a in (k, v)]
    for rule in (Normalized(), Unnormalized()):
        torch.testing.assert_close(rule(q, *more), rule(q, k, v), rtol=1e-12, atol=1e-14)


def test_order_of_tokens_does_not_matter_but_to_scans():
    q, k, v = features()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for rule in ARMS:
        alike = torch.allclose(rule(q, k[..., order, :], v[..., order, :]), rule(q, k, v))
        assert alike == isinstance(rule, (Normalized, Unnormalized))
    mixed = Normalized()(*(a[..., order, :] for a in (q, k, v)))
    torch.testing.assert_close(mixed, Normalized()(q, k, v)[..., order, :])


def test_rank_is_that_of_a_head():
    q, k, _ = features(9)
    eye = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    assert (torch.linalg.matrix_rank(Normalized()(q, k, eye)) == 3).all()


@pytest.mark.parametrize("n", [64, 256])
def test_products_double_with_the_tokens(n):
    layer = LinearAttention(attention(), 3)
    counts = []
    for m in (n, 2 * n):
        with CountMacs() as count, torch.no_grad():
            layer(torch.randn(1, m, 6, dtype=torch.float64))
        counts.append(count.macs)
    projections, f, mixed, weights = 4 * 6 * 6, 2 * 2 * 6 * 3, 2 * 2 * 3 * 3, 2 * 3
    assert counts == [n * (projections + f + mixed + weights), 2 * counts[0]]


# ---- the layer


def test_layer_inherits_projections_and_begins_without_f():
    old = attention(bias=True)
    x = tokens()
    q, k, v = (getattr(old, f"to_{c}")(x).unflatten(-1, (2, 3)).transpose(1, 2) for c in "qkv")
    weights = positive(q) @ positive(k).mT
    mixed = weights @ v / (weights.sum(-1, keepdim=True) + 7e-4)
    expected = old.to_out[0](mixed.transpose(1, 2).flatten(-2))
    for hidden in (0, 6):
        torch.testing.assert_close(LinearAttention(old, hidden)(x), expected)
    layer = LinearAttention(old, 6)
    for name, weight in old.state_dict().items():
        assert torch.equal(layer.state_dict()[name], weight)
    assert layer.to_q.weight.data_ptr() != old.to_q.weight.data_ptr()


def test_f_is_a_residual_on_what_queries_and_keys_see():
    layer = LinearAttention(attention(), 4)
    x = tokens()
    with torch.no_grad():
        for f in (layer.f_q, layer.f_k):
            f[3].weight.normal_(generator=torch.Generator().manual_seed(len(f)))
    q, k = layer.features(x)
    f = layer.f_q
    hidden = torch.nn.functional.layer_norm(
        x @ f[0].weight.mT + f[0].bias, (4,), f[1].weight, f[1].bias
    )
    seen = x + torch.nn.functional.leaky_relu(hidden, 0.01) @ f[3].weight.mT + f[3].bias
    torch.testing.assert_close(q, positive(layer.split(layer.to_q(seen))))
    torch.testing.assert_close(k, positive(layer.split(layer.to_k(x + layer.f_k(x)))))


def test_pictures_keep_norm_residual_and_factor():
    old = attention(norm_num_groups=2, residual_connection=True, rescale_output_factor=2.0)
    x = tokens(12).mT.reshape(2, 6, 3, 4)
    plain = LinearAttention(attention(), 0)
    plain.load_state_dict({k: v for k, v in old.state_dict().items() if "group_norm" not in k})
    flat = old.group_norm(x.flatten(2)).mT
    expected = (plain(flat).mT.reshape(2, 6, 3, 4) + x) / 2
    torch.testing.assert_close(LinearAttention(old, 0)(x), expected)


def test_refuses_masks_and_other_tokens():
    layer = LinearAttention(attention(), 0)
    with pytest.raises(ValueError, match="attention mask"):
        layer(tokens(), attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="other tokens"):
        layer(tokens(), encoder_hidden_states=tokens(3))


def test_half_precision_holds_many_tokens():
    layer = LinearAttention(attention(), 6)
    x = 30 + 10 * tokens(20_000)
    out = copy.deepcopy(layer).half()(x.half())
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), layer(x), rtol=0.02, atol=0.2)


# ---- on networks


def test_only_self_attention_is_replaced_and_comes_back():
    model = tiny_unet_cond()
    before, state = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = LinearizeAttention().attach(model)
    assert all(n.endswith("attn1") for n in handle.layers)
    assert len(handle.layers) == 4
    assert not torch.equal(run(model), before)
    goal = handle.objective(tiny_unet_cond())
    optimizer = torch.optim.SGD(goal.parameters_of("student"), lr=0.1)
    goal.loss("student", {"call": call(model)}).total.backward()
    optimizer.step()
    handle.detach()
    assert torch.equal(run(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_loss_is_the_papers():
    teacher, student = tiny_unet_cond(), tiny_unet_cond()
    handle = LinearizeAttention().attach(student)
    heard: dict[str, list[torch.Tensor]] = {}
    hooks = [
        m.get_submodule(n).register_forward_hook(
            lambda module, given, out, n=n: heard.setdefault(n, []).append(out)
        )
        for m in (teacher, student)
        for n in handle.layers
    ]
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs, mine = run(teacher), run(student)
    for hook in hooks:
        hook.remove()
    layers = torch.stack([(a - b).square().mean() for a, b in heard.values()]).mean()
    expected = (mine - target).square().mean()
    expected = expected + 0.5 * (mine - theirs).square().mean() + 0.5 * layers
    goal = handle.objective(teacher)
    found = goal.loss("student", {"call": call(student), "target": target})
    torch.testing.assert_close(found.total, expected)
    learning = {
        n.rpartition(".attn1.")[0] for n, p in student.named_parameters() if p.requires_grad
    }
    assert learning == {n.removesuffix(".attn1") for n in handle.layers}


def test_loss_is_zero_where_the_student_is_the_teacher():
    student = tiny_unet_cond()
    handle = LinearizeAttention().attach(student)
    goal = handle.objective(copy.deepcopy(student))
    loss = goal.loss("student", {"call": call(student), "target": run(student)})
    assert all(v == 0 for v in loss.terms.values())


def test_distilling_brings_the_answer_back():
    teacher, student = tiny_unet_cond(), tiny_unet_cond()
    handle = LinearizeAttention(hidden=0.25).attach(student)
    whole = run(teacher)
    before = (run(student) - whole).square().mean()
    batches = [{"call": call(student, seed)} for seed in range(4)]
    linfusion.distill(handle, teacher, batches, steps=30, lr=3e-3, progress=False)
    assert (run(student) - whole).square().mean() < 0.5 * before


def test_saved_apart_and_mounted_on_a_variant(tmp_path):
    student = tiny_unet_cond()
    handle = LinearizeAttention(mixing=Causal(chunk=8)).attach(student)
    for layer in handle.layers.values():
        torch.nn.init.ones_(layer.f_q[3].weight)
    file = handle.save(tmp_path / "linear.safetensors")
    other = tiny_unet_cond()
    again = linfusion.mount(other, file)
    assert torch.equal(run(other), run(student))
    assert again.transform == handle.transform
    again.detach()
    assert torch.equal(run(other), run(tiny_unet_cond()))
    wide = tiny_unet_cond(block_out_channels=(32, 32))
    before = run(wide)
    with pytest.raises(StoreError, match="do not fit"):
        linfusion.mount(wide, file)
    assert torch.equal(run(wide), before)
    with pytest.raises(StoreError, match="no self-attention"):
        linfusion.mount(tiny_dit(), file)
    (tmp_path / "odd").write_text("no")
    with pytest.raises(StoreError, match=r"Linearized\.save"):
        linfusion.mount(other, tmp_path / "odd")


def test_joint_attention_is_refused_with_the_reason():
    for build in (tiny_sd3, tiny_flux):
        with pytest.raises(TypeError, match="jointly"):
            LinearizeAttention().attach(build().transformer)
    model = tiny_unet()
    LinearizeAttention().attach(model)
    with pytest.raises(TypeError, match="LinearAttention already"):
        LinearizeAttention().attach(model)
    with pytest.raises(ValueError, match="allows none of the 3"):
        LinearizeAttention(where=lambda name, module: False).attach(tiny_dit())
    with pytest.raises(ValueError, match="hidden"):
        LinearizeAttention(hidden=-1)
    with pytest.raises(TypeError, match="Normalized"):
        LinearizeAttention(mixing="causal")  # type: ignore[arg-type]


def test_report_tells_the_least_denominator():
    model = tiny_unet()
    handle = LinearizeAttention().attach(model)
    seen = []
    for layer in handle.layers.values():
        layer.mixing = Spy(seen)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    handle.observe([((x, 5), {})])
    assert handle.report()["least_denominator"] == pytest.approx(min(seen), rel=1e-5)


class Spy(Normalized):
    def __init__(self, seen):
        object.__setattr__(self, "seen", seen)
        super().__init__()

    def __call__(self, q, k, v):
        self.seen.append(float(self.denominator(q, k).min()))
        return super().__call__(q, k, v)


def test_lora_on_inherited_projections():
    from peft import LoraConfig

    pipe = tiny_sd()
    LinearizeAttention().attach(pipe.unet)
    before = run(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert hasattr(layer.to_q, "lora_A")
    assert not torch.allclose(run(pipe.unet), before)


# ---- larger pictures


def test_chunks_and_halves_change_nothing_but_memory():
    from effuse.evaluate.cost import Peak
    from effuse.restore.sdedit import SDEdit
    from effuse.restore.upscale import chunked, upscale
    from effuse.solvers import DDIM

    pipe = tiny_sd()
    x = torch.randn(1, 4096, 32)
    ff = pipe.unet.mid_block.attentions[0].transformer_blocks[0].ff
    peaks = []
    with torch.no_grad():
        whole = ff(x)
        with chunked(pipe.unet, 300):
            torch.testing.assert_close(ff(x), whole)
            with Peak(x.device) as peak:
                ff(x)
            peaks.append(peak.bytes)
        with Peak(x.device) as peak:
            ff(x)
        peaks.append(peak.bytes)
    assert peaks[0] < 0.4 * peaks[1]
    assert "forward" not in vars(ff)
    small = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    editor = SDEdit(depth=0.5, levels=4, solver=DDIM())
    made = [
        upscale(
            pipe,
            small,
            ["a cat"],
            (16, 32),
            editor=editor,
            guidance=3.0,
            tokens=tokens,
            rng=torch.Generator().manual_seed(1),
        )
        for tokens in (None, 7)
    ]
    torch.testing.assert_close(*made)
    model = effuse.wrap(pipe).at((16, 32))
    with torch.no_grad():
        cond = model.embed(["a cat"], guided=True)
        large = torch.nn.functional.interpolate(small, (16, 32), mode="bicubic", antialias=True)
        z = model.codec.encode(large.clamp(0, 1))
        walked = editor(model.guide(3.0).given(**cond), z, rng=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            made[0], model.codec.decode(walked.x).clamp(0, 1), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_stay_half(dtype):
    model, wide = tiny_unet_cond().to(dtype), tiny_unet_cond()
    for m in (model, wide):
        LinearizeAttention().attach(m)
    assert {p.dtype for p in model.parameters()} == {dtype}
    args, kwargs = call(model)
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].to(dtype)
    with torch.no_grad():
        out = model(args[0].to(dtype), args[1], **kwargs)[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), run(wide), rtol=0.1, atol=0.1)
