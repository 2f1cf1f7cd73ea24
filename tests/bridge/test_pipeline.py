"""Pipelines in our words: sampling them equals the pipeline's own scheduler."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.tiny import (
    tiny_ddpm,
    tiny_dit_pipe,
    tiny_flux,
    tiny_pixart_pipe,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
)

import effuse
from effuse.bridge.pipeline import Guided, Network, wrap
from effuse.bridge.table import Schedule, grid_of, predict, solver_named
from effuse.core import Denoiser, Prediction, sample
from effuse.core.clip import Clip, Clipped
from effuse.processes import Flow, Karras, Leading, Linspace, Tabulated, Trailing, Uniform
from effuse.solvers import DDIM, DPMpp2M, Euler

pytestmark = pytest.mark.bridge
warnings.filterwarnings("ignore", message=".*Beautiful Soup.*")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["a cat", "dog"]


def made(name: str, **kwargs):
    import diffusers

    return getattr(diffusers, name)(**{**SD, **kwargs})


SCHEDULERS = {
    "ddim": (
        lambda **k: made(
            "DDIMScheduler", clip_sample=False, set_alpha_to_one=False, steps_offset=1, **k
        ),
        DDIM(),
    ),
    "ddim-trailing": (
        lambda **k: made("DDIMScheduler", clip_sample=False, timestep_spacing="trailing", **k),
        DDIM(),
    ),
    "euler": (lambda **k: made("EulerDiscreteScheduler", **k), Euler()),
    "euler-leading": (
        lambda **k: made("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1, **k),
        Euler(),
    ),
    "euler-karras": (
        lambda **k: made("EulerDiscreteScheduler", use_karras_sigmas=True, **k),
        Euler(),
    ),
    "euler-beta": (lambda **k: made("EulerDiscreteScheduler", use_beta_sigmas=True, **k), Euler()),
    "dpm": (lambda **k: made("DPMSolverMultistepScheduler", **k), DPMpp2M()),
    "dpm-karras": (
        lambda **k: made("DPMSolverMultistepScheduler", use_karras_sigmas=True, **k),
        DPMpp2M(),
    ),
    "dpm-trailing": (
        lambda **k: made("DPMSolverMultistepScheduler", timestep_spacing="trailing", **k),
        DPMpp2M(),
    ),
}


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def close(mine, theirs):
    """Equal to 1e-4, of the largest value where random weights let samples grow beyond one."""
    assert mine.shape == theirs.shape
    error = (mine - theirs).abs().max().item()
    assert error < 1e-4 * max(1.0, theirs.abs().max().item()), error


def latents(pipe, steps, what=None, **kwargs):
    out = pipe(
        what or PROMPTS, num_inference_steps=steps, generator=rng(), output_type="latent", **kwargs
    )
    return out.images


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_equals_its_own_scheduler(name, kind):
    make, solver = SCHEDULERS[name]
    pipe = tiny_sd(make(prediction_type=kind))
    for steps in (2, 4, 10):
        mine = wrap(pipe).sample(PROMPTS, solver, steps=steps, rng=rng(), decode=False)
        close(mine, latents(pipe, steps))


@pytest.mark.parametrize("name", ["ddim", "euler-leading", "dpm"])
@pytest.mark.parametrize(
    "build", [tiny_sdxl, tiny_pixart_pipe, lambda s: tiny_pixart_pipe(s, True)]
)
def test_sdxl_and_pixart_equal_their_own_scheduler(name, build):
    make, solver = SCHEDULERS[name]
    pipe = build(make())
    extra = {} if "XL" in type(pipe).__name__ else {"use_resolution_binning": False}
    for steps in (3, 10):
        mine = wrap(pipe).sample(PROMPTS, solver, steps=steps, rng=rng(), decode=False)
        close(mine, latents(pipe, steps, **extra))


@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("learned", [False, True])
def test_dit_equals_its_own_scheduler(name, learned):
    """Without Euler: DiTPipeline forgets init_noise_sigma, so it is wrong there in diffusers."""
    make, solver = SCHEDULERS[name]
    pipe = tiny_dit_pipe(make(), out_channels=8 if learned else 4)
    for steps, scale in ((4, 4.0), (10, 1.0)):
        theirs = pipe(
            [1, 7], scale, num_inference_steps=steps, generator=rng(), output_type="pt"
        ).images
        mine = wrap(pipe).sample([1, 7], solver, steps=steps, guidance=scale, rng=rng())
        close(mine, theirs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_pipeline_equals_its_own_scheduler(kind, clip):
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler(prediction_type=kind, clip_sample=clip))
    pipe.set_progress_bar_config(disable=True)
    for steps in (4, 10):
        theirs = pipe(
            2,
            rng(),
            num_inference_steps=steps,
            use_clipped_model_output=True,
            output_type="pt",
        ).images
        close(wrap(pipe).sample(2, DDIM(), steps=steps, rng=rng()), theirs)


def test_thresholding_is_read_from_the_scheduler():
    make = SCHEDULERS["dpm"][0]
    pipe = tiny_sd(make(thresholding=True, sample_max_value=3.0, steps_offset=1))
    mine = wrap(pipe).sample(PROMPTS, DPMpp2M(), steps=5, rng=rng(), decode=False)
    close(mine, latents(pipe, 5))


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_flow_pipelines_equal_their_own_scheduler(steps):
    sd3, flux = tiny_sd3(), tiny_flux()
    mine = wrap(sd3).sample(PROMPTS, Euler(), steps=steps, rng=rng(), decode=False)
    close(mine, latents(sd3, steps))
    mine = wrap(flux).sample(PROMPTS, Euler(), steps=steps, rng=rng(), size=16, decode=False)
    theirs = latents(flux, steps, height=16, width=16)
    close(mine, flux._unpack_latents(theirs, 16, 16, flux.vae_scale_factor))


def test_flux_with_a_negative_prompt_has_two_true_branches():
    flux = tiny_flux(guidance_embeds=False)
    theirs = latents(flux, 3, height=16, width=16, true_cfg_scale=3.0, negative_prompt=["b", "b"])
    mine = wrap(flux).sample(
        PROMPTS, Euler(), steps=3, rng=rng(), size=16, decode=False, guidance=3.0, negative="b"
    )
    close(mine, flux._unpack_latents(theirs, 16, 16, flux.vae_scale_factor))


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        ({"steps_offset": 1, "set_alpha_to_one": False}, Leading(1, "first")),
        ({}, Leading()),
        ({"timestep_spacing": "trailing"}, Trailing()),
        ({"timestep_spacing": "linspace", "set_alpha_to_one": False}, Linspace(True, "first")),
    ],
)
def test_grid_of_a_scheduler_is_the_grid_of_its_name(config, grid):
    scheduler = made("DDIMScheduler", **config)
    process = Schedule(scheduler).process
    for steps in (1, 3, 10, 50):
        torch.testing.assert_close(grid_of(scheduler)(process, steps), grid(process, steps))


def test_grid_of_the_default_scheduler_of_stable_diffusion():
    """PNDM repeats a timestep for its warm-up: the grid does not."""
    pndm = made("PNDMScheduler", skip_prk_steps=True, steps_offset=1)
    ddim = made("DDIMScheduler", steps_offset=1, set_alpha_to_one=False)
    process = Schedule(pndm).process
    assert torch.equal(grid_of(pndm)(process, 20), grid_of(ddim)(process, 20))
    assert Schedule(pndm).clip is None
    heun = made("HeunDiscreteScheduler")
    assert len(grid_of(heun)(process, 20)) == 21


def test_grid_of_karras_sigmas():
    scheduler = made("EulerDiscreteScheduler", use_karras_sigmas=True)
    process = Schedule(scheduler).process
    torch.testing.assert_close(
        grid_of(scheduler)(process, 10), Karras()(process, 10), rtol=1e-5, atol=1e-6
    )


def test_grid_belongs_to_its_process():
    with pytest.raises(ValueError, match="process read from the same scheduler"):
        grid_of(made("DDIMScheduler"))(Flow(), 5)


def test_any_grid_and_solver_give_a_picture():
    model = effuse.wrap(tiny_sd())
    out = model.sample("cat", DPMpp2M(), steps=3, grid=Uniform(), guidance=1.0, rng=rng())
    assert out.shape == (1, 3, 16, 16)
    assert out.min() >= 0
    assert out.max() <= 1
    wide = model.sample(["cat"], steps=2, size=(16, 24), rng=rng())
    assert wide.shape == (1, 3, 16, 24)


def test_the_denoiser_is_consistent():
    for model in (wrap(tiny_sd()), wrap(tiny_sd3()), wrap(tiny_ddpm())):
        if isinstance(model.process, Tabulated):
            assert len(model.process) == 1000
        x = model.prior(2, rng=rng()).double()
        cond = model.embed(2 if model.shape[0] == 3 else PROMPTS)
        denoiser = model.denoiser.given(**cond)
        for t in (0.5, torch.tensor([0.3, 0.9], dtype=torch.float64)):
            pair = denoiser(x, t)
            assert pair.x0.dtype == torch.float64
            torch.testing.assert_close(model.process.corrupt(pair.x0, t, pair.noise), x)


def test_half_precision_network_keeps_a_float_state():
    pipe = tiny_sd()
    pipe.unet.to(torch.bfloat16)
    model = wrap(pipe)
    x = model.prior(2, rng=rng())
    cond = {k: v.to(torch.bfloat16) for k, v in model.embed(PROMPTS).items()}
    pair = model.denoiser(x, 0.5, **cond)
    assert pair.x0.dtype == torch.float32


def test_guidance_is_one_call_of_the_double_batch():
    model = wrap(tiny_sd())
    cond = model.embed(PROMPTS, "ugly")
    negative = cond["negative"]
    positive = {k: v for k, v in cond.items() if k != "negative"}
    calls = []
    hook = model.network.register_forward_pre_hook(lambda m, a: calls.append(len(a[0])))
    x, t = model.prior(2, rng=rng()), torch.tensor([0.2, 0.7])
    out = model.guide(3.0)(x, t, **cond)
    hook.remove()
    assert calls == [4]
    weak, strong = (model.denoiser(x, t, **c) for c in (negative, positive))
    torch.testing.assert_close(out.noise, weak.mix(strong, 3.0).noise, rtol=1e-4, atol=1e-4)
    one = model.guide(1.0)(x, t, **cond)
    torch.testing.assert_close(one.noise, strong.noise, rtol=1e-4, atol=1e-5)


def test_singular_levels_are_errors():
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"epsilon prediction at alpha = 0.*zero terminal SNR"):
        predict("epsilon", x, x, 1.0, Flow())
    with pytest.raises(ValueError, match="at sigma = 0"):
        predict("sample", x, x, 0.0, Flow())
    with pytest.raises(ValueError, match="expected one of"):
        predict("noise", x, x, 0.5, Flow())
    with pytest.raises(ValueError, match="twice the channels"):
        predict("sample", x[:, :2], x, 0.5, Flow())
    zero = made("DDIMScheduler", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="needs v_prediction or sample"):
        wrap(tiny_sd(zero)).sample("cat", steps=2, rng=rng())


def test_zero_terminal_snr_with_v_prediction():
    zero = made(
        "DDIMScheduler",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    pipe = tiny_sd(zero)
    mine = wrap(pipe).sample(PROMPTS, DDIM(), steps=4, rng=rng(), decode=False)
    close(mine, latents(pipe, 4))


def test_codec_is_that_of_the_pipeline():
    pipe = tiny_sd3()
    codec = wrap(pipe).codec
    pictures = torch.rand(2, 3, 16, 16)
    z = codec.encode(pictures)
    config = pipe.vae.config
    with torch.no_grad():
        mean = pipe.vae.encode(2 * pictures - 1).latent_dist.mean
    torch.testing.assert_close(z, (mean - config.shift_factor) * config.scaling_factor)
    with torch.no_grad():
        theirs = pipe.vae.decode(mean).sample / 2 + 0.5
    torch.testing.assert_close(codec.decode(z), theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(codec.encode(pictures, rng=rng()), z)
    with pytest.raises(ValueError, match="divisible by 2"):
        codec.encode(torch.rand(1, 3, 15, 16))
    pixels = wrap(tiny_ddpm()).codec
    torch.testing.assert_close(pixels.decode(pixels.encode(pictures)), pictures)


def test_codec_with_statistics_of_the_latents():
    pipe = tiny_sdxl()
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    pictures = wrap(pipe).sample(PROMPTS, Euler(), steps=3, rng=rng())
    theirs = pipe(PROMPTS, num_inference_steps=3, generator=rng(), output_type="pt").images
    close(pictures, theirs)


def test_variants_of_a_pipeline_are_known_by_their_components():
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny_sd()
    variant = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    a, b = (wrap(p).sample(PROMPTS, steps=2, guidance=5, rng=rng()) for p in (pipe, variant))
    assert torch.equal(a, b)


def test_class_conditional_pixels():
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(tiny_unet(num_class_embeds=5), DDIMScheduler())
    out = wrap(pipe).sample([0, 4], steps=2, rng=rng())
    assert out.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"label 5: expected a number in \[0, 5\)"):
        wrap(pipe).sample([5], steps=2)


def test_bad_arguments():
    from diffusers import DDIMScheduler, EDMEulerScheduler

    with pytest.raises(TypeError, match=r"expected a diffusers pipeline with one of UNet2DModel"):
        wrap(torch.nn.Linear(2, 2))
    sd, ddpm, dit = wrap(tiny_sd()), wrap(tiny_ddpm()), wrap(tiny_dit_pipe())
    with pytest.raises(ValueError, match="no prompts"):
        sd.sample([])
    with pytest.raises(ValueError, match="expected prompts"):
        sd.sample(3)
    with pytest.raises(ValueError, match="steps=0"):
        sd.sample("cat", steps=0)
    with pytest.raises(ValueError, match="divisible by 2"):
        sd.sample("cat", steps=1, size=15)
    with pytest.raises(ValueError, match="2 negative prompts for 1"):
        sd.embed(["cat"], ["a", "b"])
    with pytest.raises(ValueError, match="no unconditional branch"):
        ddpm.sample(1, guidance=3.0, steps=1)
    with pytest.raises(ValueError, match="positive count"):
        ddpm.sample(0)
    with pytest.raises(ValueError, match="class labels only"):
        dit.embed([1], "ugly")
    with pytest.raises(ValueError, match="latents of shape"):
        sd.sample("cat", steps=1, latents=torch.zeros(1, 4, 7, 7))
    with pytest.raises(ValueError, match=r"guidance 2 without an unconditional branch"):
        sd.guide(2.0)(sd.prior(1), 0.5, **sd.embed("cat"))
    with pytest.raises(ValueError, match="negative half"):
        sd.denoiser(sd.prior(1), 0.5, **sd.embed("cat", guided=True))
    with pytest.raises(TypeError, match="alphas_cumprod"):
        Schedule(EDMEulerScheduler())
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        solver_named("huen")
    bare = tiny_sd()
    bare.text_encoder = None
    with pytest.raises(ValueError, match="no text_encoder"):
        wrap(bare).embed("cat")
    bare.vae = None
    with pytest.raises(ValueError, match="no vae"):
        wrap(bare)
    with pytest.raises(ValueError, match="take a mask"):
        wrap(tiny_sd(DDIMScheduler(), in_channels=9))


class Wild(Denoiser):
    process = Flow()

    def forward(self, x, t, **cond):
        return Prediction(5 * x, x)


def test_clip_keeps_the_pair_consistent():
    x = torch.randn(2, 3, 4, 4)
    pair = Clipped(Wild(), Clip(0.5))(x, 0.7)
    assert pair.x0.abs().max() <= 0.5
    torch.testing.assert_close(Flow().corrupt(pair.x0, 0.7, pair.noise), x)
    assert Clip(9.0, 0.9)(5 * x).abs().max() <= 1


def test_embedding_by_hand_equals_sample():
    model = wrap(tiny_sd())
    cond = model.embed(PROMPTS, guided=True)
    times = model.grid(model.process, 3)
    x = sample(model.guide(7.5).given(**cond), DDIM(), model.prior(2, rng=rng()), times)
    close(x, model.sample(PROMPTS, steps=3, rng=rng(), decode=False))
    assert isinstance(model.denoiser, Network)
    assert isinstance(model.guide(2.0), Guided)
