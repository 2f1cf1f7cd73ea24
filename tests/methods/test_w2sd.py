"""Reflection: closed forms of the two maps, what it moves, pairs of a pipeline."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny import tiny_dit_pipe, tiny_sd, tiny_sd3

import effuse
from effuse.control import (
    W2SD,
    Branch,
    Guide,
    Hint,
    Pair,
    Reflect,
    Source,
    Superdiff,
    SuperpositionODE,
    Target,
    controlled,
    guidance_pair,
    hint_pair,
    lora_pair,
    model_pair,
    prompt_pair,
)
from effuse.control.w2sd import Scaled, back
from effuse.core import Denoiser, Gaussian, Mixture, Prediction, sample
from effuse.processes import VE, Cosine, Flow, Linear, Uniform
from effuse.solvers import DDIM, DPMpp2M, Euler, Heun

PROCESS = Linear()
LABELS = (Target(), Source())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def start(process=PROCESS, count=16):
    return process.prior((count, 2), rng=seeded(), dtype=torch.float64)


class Constant(Denoiser):
    """The same noise everywhere."""

    def __init__(self, noise, process=PROCESS):
        super().__init__()
        self.noise, self.process = torch.tensor(noise, dtype=torch.float64), process

    def forward(self, x, t, **cond):
        return self.process.complete(x, t, noise=self.noise.expand_as(x))


class Velocity(Denoiser):
    """The same noise - x0 everywhere, on straight lines."""

    def __init__(self, v):
        super().__init__()
        self.v, self.process = torch.tensor(v, dtype=torch.float64), Flow()

    def forward(self, x, t, **cond):
        sigma = self.process.sigma(t)
        return Prediction(x - sigma * self.v, x + (1 - sigma) * self.v)


class Counted(Gaussian):
    """Counts its calls and the levels it is told."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = []

    def forward(self, x, t, **cond):
        self.told.append(float(t))
        return super().forward(x, t)


@pytest.mark.parametrize("label", LABELS, ids=repr)
@pytest.mark.parametrize("process", [Linear(), Cosine(), VE()], ids=lambda p: type(p).__name__)
def test_constant_noise(process, label):
    """(sigma_t - alpha_t / alpha_s sigma_s)(b - a), and nothing where strong is weak."""
    x, t, s = start(process), 0.7, 0.6
    a, b = Constant((0.3, -1.0), process), Constant((1.1, 0.4), process)
    solver = Reflect(label=label)
    close(solver.reflected(Pair(a, a), x, t, s), x)
    moved = solver.reflected(Pair(a, b), x, t, s) - x
    gap = process.sigma(t) - process.alpha(t) / process.alpha(s) * process.sigma(s)
    assert gap > 0
    close(moved, (gap * (b.noise - a.noise)).expand_as(x))


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_constant_velocity(label):
    """On a flow the way back is an Euler step: exact for a constant velocity."""
    x = start(Flow())
    a, b = Velocity((0.3, -1.0)), Velocity((1.1, 0.4))
    solver = Reflect(label=label)
    close(solver.reflected(Pair(a, a), x, 0.7, 0.6), x)
    close(solver.reflected(Pair(a, b), x, 0.7, 0.6) - x, (0.1 * (b.v - a.v)).expand_as(x))


@pytest.mark.parametrize("process", [Linear(), Flow(), VE()], ids=lambda p: type(p).__name__)
def test_back_undoes_advance(process):
    """For a prediction that is consistent at both levels, of any noise; batched levels too."""
    x, noise = start(process), torch.randn(16, 2, generator=seeded(1)).double()
    t, s = torch.linspace(0.3, 0.9, 16).double(), torch.linspace(0.2, 0.5, 16).double()
    pred = process.complete(x, t, noise=noise)
    close(back(process, process.advance(x, t, s, pred), s, t, pred), x, 1e-9)


def test_moves_up_the_gap_of_the_scores():
    """To first order const (score_strong - score_weak), const > 0; the rest falls as the square."""
    strong, weak, x = Gaussian(PROCESS, 0.5, 0.4), Gaussian(PROCESS, -0.5, 0.9), start()
    t, rests = 0.5, []
    for h in (0.02, 0.01, 0.005):
        s = t - h
        gap = PROCESS.sigma(t) - PROCESS.alpha(t) / PROCESS.alpha(s) * PROCESS.sigma(s)
        moved = Reflect().reflected(Pair(strong, weak), x, t, s) - x
        told = gap * PROCESS.sigma(t) * (strong.score(x, t) - weak.score(x, t))
        assert ((moved * told).sum(1) > 0).all()
        rests.append((moved - told).abs().max())
    assert 3.4 < rests[0] / rests[1] < 4.6
    assert 3.4 < rests[1] / rests[2] < 4.6


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_strong_is_weak_moves_by_the_square_of_the_step(label):
    model, x = Mixture(PROCESS, torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.4), start()
    moved = [
        (Reflect(label=label).reflected(Pair(model, model), x, 0.5, 0.5 - h) - x).abs().max()
        for h in (0.04, 0.02, 0.01)
    ]
    assert 3.3 < moved[0] / moved[1] < 4.7
    assert 3.3 < moved[1] / moved[2] < 4.7


@pytest.mark.parametrize("label", LABELS, ids=repr)
def test_two_steps_of_normal_data_are_a_matrix_product(label):
    """x_s = P_0 B P_s x + ...: the affine maps, multiplied out by hand."""
    strong, weak, plain = (Gaussian(PROCESS, 0.0, s) for s in (0.4, 0.9, 0.6))

    def alpha(t):
        return PROCESS.alpha(t)

    def sigma(t):
        return PROCESS.sigma(t)

    def noise(std, t):  # the noise is this times x
        return sigma(t) / ((alpha(t) * std) ** 2 + sigma(t) ** 2)

    def phi(p, q, n):  # from (x, e) to x at q, as a row
        ratio = alpha(q) / alpha(p)
        return torch.stack([ratio, sigma(q) - ratio * sigma(p)]) @ torch.stack(
            [torch.ones_like(n), n]
        )

    total = torch.ones((), dtype=torch.float64)
    for t, s in ((0.8, 0.5), (0.5, 0.3)):
        told = t if isinstance(label, Target) else s
        down, up = phi(t, s, noise(0.4, t)), phi(s, t, noise(0.9, told))
        total = phi(t, s, noise(0.6, t)) * up * down * total
    x = start()
    out = sample(
        Pair(strong, weak, plain), Reflect(label=label), x, torch.tensor([0.8, 0.5, 0.3]).double()
    )
    close(out, total * x, 1e-6)


def test_off_is_the_base_bit_for_bit():
    strong, weak, x = Gaussian(PROCESS, 0.5, 0.4), Gaussian(PROCESS, -0.5, 0.9), start()
    times, pair = Uniform()(PROCESS, 8), Pair(strong, weak)
    for base in (DDIM(), Euler(), Heun()):
        plain = sample(strong, base, x, times)
        assert torch.equal(sample(pair, Reflect(base, start=0.0), x, times), plain)
        assert torch.equal(sample(pair, Reflect(base, end=1.0), x, times), plain)
        assert not torch.allclose(sample(pair, Reflect(base), x, times), plain)
    one = Uniform()(PROCESS, 1)
    assert torch.equal(sample(pair, Reflect(), x, one), sample(strong, DDIM(), x, one))
    assert torch.equal(sample(pair, DDIM(), x, times), sample(strong, DDIM(), x, times))


def test_calls_and_labels():
    """3N - 2 calls; the weak model is told t_i or t_{i+1}; a range reflects only within."""
    strong, weak, plain = (Counted(PROCESS, 0.0, s) for s in (0.4, 0.9, 0.6))
    times, n = Uniform()(PROCESS, 10), 10
    sample(Pair(strong, weak, plain), Reflect(), start(), times)
    assert len(strong.told) + len(weak.told) + len(plain.told) == 3 * n - 2
    assert weak.told == times[:-2].tolist()
    weak.told.clear()
    sample(Pair(strong, weak, plain), Reflect(label=Source()), start(), times)
    assert weak.told == times[1:-1].tolist()
    weak.told.clear()
    sample(Pair(strong, weak, plain), Reflect(start=0.75, end=0.35), start(), times)
    torch.testing.assert_close(weak.told, [0.7, 0.6, 0.5])


def test_per_row_range():
    strong, weak, x = Gaussian(PROCESS, 0.5, 0.4), Gaussian(PROCESS, -0.5, 0.9), start(count=2)
    t, s = torch.tensor([0.9, 0.4]).double(), torch.tensor([0.8, 0.3]).double()
    solver, pair = Reflect(start=0.5), Pair(strong, weak)
    out = solver.step(pair, x, t, s).x
    for i in range(2):
        close(out[i : i + 1], solver.step(pair, x[i : i + 1], t[i], s[i]).x)
    close(out[:1], DDIM().step(strong, x[:1], t[0], s[0]).x)


def test_balance_of_modes():
    """Strong .8 : .2, weak .95 : .05, the truth even: W2SD is nearer, swapped is further."""
    modes = torch.tensor([[-1.0], [1.0]])
    strong, weak = (Mixture(PROCESS, modes, 0.2, torch.tensor([1 - w, w])) for w in (0.2, 0.05))
    x = PROCESS.prior((4000, 1), rng=seeded(), dtype=torch.float64)
    times = Uniform(1.0, 0.0)(PROCESS, 50)

    def share(model, solver):
        return float((sample(model, solver, x, times) > 0).double().mean())

    plain = share(strong, DDIM())
    ours, swapped = share(Pair(strong, weak), Reflect()), share(Pair(weak, strong), Reflect())
    assert 0.17 < plain < 0.23
    assert 0.29 < ours < 0.5
    assert swapped < 0.03


def test_refusals():
    with pytest.raises(ValueError, match="deterministic"):
        Reflect(DDIM(eta=1.0))
    with pytest.raises(ValueError, match="one-step"):
        sample(Gaussian(PROCESS), Reflect(DPMpp2M()), start(), Uniform()(PROCESS, 3))
    with pytest.raises(TypeError, match="expected Target"):
        Reflect(label="target")
    with pytest.raises(ValueError, match="another noise schedule"):
        Pair(Gaussian(PROCESS), Gaussian(Cosine()))
    with pytest.raises(ValueError, match="expected a fraction"):
        Reflect(start=1.5)


# Pipelines.


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", [tiny_sd, tiny_dit_pipe, tiny_sd3])
def test_pipelines(make, half):
    pipe = make()
    if half:
        pipe.to(torch.bfloat16)
    model = effuse.wrap(pipe)
    what = [1, 2] if make is tiny_dit_pipe else ["a dog", "an apple"]
    run = controlled(model, "w2sd", what, steps=4, guidance=3.0)
    calls = []
    hook = model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    a = run.sample(rng=seeded())
    hook.remove()
    assert a.shape == (2, 3, 16, 16)
    assert a.isfinite().all()
    assert len(calls) == 2 * 4 + 3 * 2 + 3 * 1  # guided passes are two, the weak one is one
    assert torch.equal(a, run.sample(rng=seeded()))
    off = W2SD(solver=Reflect(start=0.0))
    plain = controlled(model, off, what, steps=4, guidance=3.0).sample(rng=seeded())
    assert not torch.allclose(a, plain)
    if not half:
        told = model.sample(what, steps=4, guidance=3.0, rng=seeded(), grid=_same(run.times))
        torch.testing.assert_close(plain, told, rtol=1e-4, atol=1e-4)


def _same(times):
    return lambda process, steps: times


def test_pairs():
    model, x = effuse.wrap(tiny_sd()), effuse.wrap(tiny_sd()).prior(1, rng=seeded())
    guided = controlled(model, guidance_pair(4.0, 1.5), ["a dog"], steps=3).denoiser
    assert isinstance(guided.strong, Guide)
    assert (guided.strong.scale, guided.weak.scale, guided.plain.scale) == (4.0, 1.5, 4.0)
    pair = controlled(model, prompt_pair("an apple"), ["a dog", "a cat"], steps=3, guidance=1.0)
    told = model.bare.given(**model.embed(["an apple"] * 2))
    two = x.expand(2, -1, -1, -1)
    torch.testing.assert_close(pair.denoiser.weak(two, 0.5).x0, told(two, 0.5).x0)
    assert not torch.allclose(pair.denoiser.strong(two, 0.5).x0, told(two, 0.5).x0)
    other = effuse.wrap(tiny_sd())
    with torch.no_grad():
        for p in other.network.parameters():
            p.mul_(1.05)
    pair = controlled(model, model_pair(other), ["a dog"], steps=3, guidance=1.0).denoiser
    told = other.bare.given(**other.embed(["a dog"]))
    torch.testing.assert_close(pair.weak(x, 0.5).x0, told(x, 0.5).x0)
    flow = effuse.wrap(tiny_sd3())
    with pytest.raises(ValueError, match="another noise schedule"):
        controlled(model, model_pair(flow), ["a dog"], steps=3)
    with pytest.raises(ValueError, match="the same, guidance 1"):
        controlled(model, "w2sd", ["a dog"], steps=3, guidance=1.0)
    with pytest.raises(ValueError, match="negative"):
        controlled(
            model, Superdiff(SuperpositionODE()), ["a dog"], guidance=1.0, negative="a cat", steps=3
        )


def lora(pipe, alpha=4):
    from peft import LoraConfig

    pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"]), adapter_name="style"
    )
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3, generator=seeded(5))
    return effuse.wrap(pipe)


def test_lora_scales():
    """Scales of a real adapter: 0 is the base, -1 the mirror image to first order; put back."""
    base, model = effuse.wrap(tiny_sd()), lora(tiny_sd())
    x = base.prior(1, rng=seeded())
    cond = base.embed(["a dog"])
    plain = base.bare.given(**cond)(x, 0.5).noise
    told = model.bare.given(**cond)
    with torch.no_grad():
        assert torch.allclose(Scaled(told, model.network, "style", 0.0)(x, 0.5).noise, plain)
        own = told(x, 0.5).noise
        assert not torch.allclose(own, plain, atol=1e-4)
        assert torch.equal(Scaled(told, model.network, "style", 1.0)(x, 0.5).noise, own)
        small, minus = (
            Scaled(told, model.network, "style", c)(x, 0.5).noise - plain for c in (0.01, -0.01)
        )
        assert (small + minus).norm() < 0.1 * small.norm()
        assert torch.equal(told(x, 0.5).noise, own)
    run = controlled(model, lora_pair("style"), ["a dog"], steps=3, guidance=1.0)
    pair = run.denoiser
    assert [d.scale for d in (pair.strong, pair.weak, pair.plain)] == [1.5, -1.5, 0.8]
    assert run.sample(rng=seeded()).isfinite().all()
    both = W2SD(Branch(5.5, 1.5), Branch(1.0, -1.5), Branch(5.5, 0.8), "style")
    pair = controlled(model, both, ["a dog"], steps=3).denoiser
    assert isinstance(pair.strong.base, Guide)
    assert not isinstance(pair.weak.base, Guide)
    with pytest.raises(ValueError, match=r"no LoRA adapter 'other': the network has \['style'\]"):
        controlled(model, lora_pair("other"), ["a dog"], steps=3)
    with pytest.raises(ValueError, match="has none"):
        controlled(base, lora_pair("style"), ["a dog"], steps=3)
    model.network.fuse_lora()
    with pytest.raises(ValueError, match="is merged"):
        controlled(model, lora_pair("style"), ["a dog"], steps=3)


def test_house():
    """The shipped pipelines; without conditions the gap is one of models."""
    emoji = effuse.wrap(effuse.load("house:emoji"))
    run = controlled(emoji, "w2sd", ["dog face"], count=2, steps=3, guidance=4.0)
    assert run.sample(rng=seeded()).shape == (2, 3, 64, 64)
    dit = effuse.wrap(effuse.load("house:emoji-dit"))
    assert controlled(dit, "w2sd", [1], steps=3, guidance=4.0).sample(rng=seeded()).isfinite().all()
    pixels, other = (effuse.wrap(effuse.load("house:pixels")) for _ in range(2))
    with torch.no_grad():
        for p in other.network.parameters():
            p.mul_(1.01)
    run = controlled(pixels, model_pair(other), 2, steps=3, guidance=1.0)
    assert run.sample(rng=seeded()).shape[:2] == (2, 3)
    with pytest.raises(ValueError, match="the same"):
        controlled(pixels, "w2sd", 2, steps=3)


def controlnet(pipe):
    from diffusers import ControlNetModel

    depth = int(math.log2(effuse.wrap(pipe).codec.factor)) + 1
    torch.manual_seed(7)
    net = ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(4, 8, 8, 8)[:depth]
    )
    for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # zeros as built
        torch.nn.init.normal_(part.weight, std=0.1)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.5)
    return net


def test_a_hint_is_diffusers_own_controlnet():
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    pipe = tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    net = controlnet(pipe)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    theirs = StableDiffusionControlNetPipeline(
        **parts, controlnet=net, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    model = effuse.wrap(pipe)
    side = model.shape[1] * model.codec.factor
    picture = torch.rand(3, side, side, generator=seeded())
    start = model.prior(1, rng=seeded())
    wanted = theirs(
        "a cat", image=picture[None], num_inference_steps=3, guidance_scale=1.0,
        controlnet_conditioning_scale=0.7, latents=start.clone(), output_type="latent",
        height=side, width=side,
    ).images  # fmt: skip
    hinted = Hint(net, picture, 0.7).on(model)
    found = hinted.sample(["a cat"], steps=3, guidance=1.0, latents=start, decode=False)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    plain = model.sample(["a cat"], steps=3, guidance=1.0, latents=start, decode=False)
    assert (plain - wanted).abs().max() > 1e-2
    off = Hint(net, picture, 0.0).on(model)
    assert torch.equal(
        off.sample(["a cat"], steps=3, guidance=1.0, latents=start, decode=False), plain
    )


def test_a_hint_is_a_gap():
    pipe = tiny_sd()
    model = effuse.wrap(pipe)
    picture = torch.rand(3, 32, 32, generator=seeded())
    control = hint_pair(Hint(controlnet(pipe), picture))
    drawing = controlled(model, control, ["a cat"], count=2, steps=3, guidance=1.0)
    pair = drawing.denoiser
    x = model.prior(2, rng=seeded())
    assert torch.equal(pair.strong(x, 0.5).x0, pair.plain(x, 0.5).x0)
    assert not torch.equal(pair.strong(x, 0.5).x0, pair.weak(x, 0.5).x0)
    assert drawing.sample(rng=seeded()).isfinite().all()
    with pytest.raises(ValueError, match="expected \\(3, H, W\\) in"):
        Hint(controlnet(pipe), picture * 2).on(model)
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        Hint(controlnet(pipe), picture).on(effuse.wrap(tiny_dit_pipe()))
    three = Hint(controlnet(pipe), picture.expand(3, -1, -1, -1)).on(model)
    with pytest.raises(ValueError, match="3 hints for 2"):
        three.sample(["a", "b"], steps=1, guidance=1.0)
