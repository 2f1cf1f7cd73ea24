"""Solvers as diffusers schedulers: diffusers' own contract, stock pipelines, equal pictures."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
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
from effuse.bridge.pipeline import grid_of, wrap
from effuse.bridge.scheduler import SolverScheduler
from effuse.core import Solver, Step, methods
from effuse.processes import Karras, Tabulated, Tapered, Uniform
from effuse.solvers import DDIM, Ancestral, DPMpp2M, DPMpp2MSDE, Euler, Heun
from effuse.solvers.momentum import HeavyBall
from effuse.solvers.unipc import UniPC

pytestmark = [
    pytest.mark.bridge,
    # numpy's, on every table that diffusers makes
    pytest.mark.filterwarnings("ignore:__array"),
]

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["a cat", "dog"]
SOLVERS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Solver)
}


@pytest.fixture(params=SOLVERS, ids=str)
def solver(request) -> Solver:
    return SOLVERS[request.param]()


def config(solver: Solver | None = None, **changes) -> dict:
    """Return the arguments from which a scheduler class is made, as diffusers' tests have them."""
    out = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, **changes}
    if solver is not None:
        made = effuse.scheduler(solver, DDIMScheduler(clip_sample=False))
        out |= {"solver": made.config.solver, "like": "DDIMScheduler"}
    return out


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=rng(1))


def first(made: SolverScheduler, x: torch.Tensor) -> torch.Tensor:
    made.set_timesteps(10)
    return made.step(0.1 * x, made.timesteps[0], x, generator=rng()).prev_sample


# The contract that diffusers' SchedulerCommonTest sets


def test_saved_and_loaded_it_steps_the_same(solver, tmp_path):
    made = SolverScheduler(**config(solver))
    made.save_config(tmp_path)
    again = SolverScheduler.from_pretrained(tmp_path)
    assert torch.equal(first(made, picture()), first(again, picture()))
    assert again.solver == solver


@pytest.mark.parametrize("solver", [DDIM(), HeavyBall(0.8, UniPC(3))], ids=repr)
def test_compatible_schedulers_take_the_config_and_give_it_back(solver):
    made = SolverScheduler(**config(solver))
    others = made.compatibles
    assert len(others) > 10
    assert None not in others
    for other in others:
        back = SolverScheduler.from_config(other.from_config(made.config).config)
        assert {k: v for k, v in back.config.items() if k in made.config} == dict(made.config)
        more = {k for k in back.config if k not in made.config}
        assert not more & set(inspect.signature(SolverScheduler.__init__).parameters)


def test_config_survives_save_pretrained(solver, tmp_path):
    made = SolverScheduler(**config(solver))
    made.save_pretrained(tmp_path)
    kept = dict(made.config)
    kept.pop("_use_default_values", None)
    assert kept == SolverScheduler.from_pretrained(tmp_path).config


def test_step_keeps_the_shape(solver):
    made, x = SolverScheduler(**config(solver)), picture()
    made.set_timesteps(50)
    a = made.step(0.1 * x, made.timesteps[0], x).prev_sample
    b = made.step(0.1 * x, made.timesteps[1], x).prev_sample
    assert a.shape == b.shape == x.shape


def test_tuple_and_object_are_the_same(solver):
    made, x = SolverScheduler(**config(solver)), picture()
    made.set_timesteps(50)
    as_object = made.step(0.1 * x, made.timesteps[0], x, generator=rng())
    made.set_timesteps(50)
    as_tuple = made.step(0.1 * x, made.timesteps[0], x, generator=rng(), return_dict=False)
    for a, b in zip(as_tuple, as_object.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_public_interface(solver):
    made = SolverScheduler(**config(solver))
    for name in (
        "init_noise_sigma",
        "scale_model_input",
        "step",
        "set_timesteps",
        "timesteps",
        "sigmas",
        "add_noise",
        "order",
        "betas",
        "set_begin_index",
        "begin_index",
        "step_index",
    ):
        if name != "sigmas":  # a DDIM schedule has none before a run
            assert hasattr(made, name)
    made.set_timesteps(5)
    assert made.sigmas.shape == (6,)
    assert len(made) == 1000
    assert made.scale_model_input(picture(), 0.0).shape == picture().shape
    own = list(inspect.signature(made.step).parameters)
    assert own[:5] == ["model_output", "timestep", "sample", "generator", "return_dict"]


def test_add_noise_at_a_timestep_of_the_run(solver):
    made, x = SolverScheduler(**config(solver)), picture()
    made.set_timesteps(50)
    noise = torch.randn(x.shape, generator=rng())
    t = made.timesteps[5][None]
    noised = made.add_noise(made.scale_model_input(x, 0.0), noise, t)
    ddim = DDIMScheduler(beta_start=0.0001, beta_end=0.02)
    torch.testing.assert_close(noised, ddim.add_noise(x, noise, t.long()), rtol=1e-4, atol=1e-5)


def test_no_swallowed_arguments():
    assert "kwargs" not in inspect.signature(SolverScheduler.__init__).parameters
    assert SolverScheduler._deprecated_kwargs == []


def test_trained_betas(tmp_path):
    made = SolverScheduler(**config(), trained_betas=np.array([0.1, 0.3]))
    made.save_pretrained(tmp_path)
    again = SolverScheduler.from_pretrained(tmp_path)
    assert made.betas.tolist() == again.betas.tolist() == pytest.approx([0.1, 0.3])


def test_attributes_are_found_and_config_entries_warn(caplog):
    made = SolverScheduler(**config())
    made.dummy_attribute = 5
    made.register_to_config(test_attribute=5)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        assert made.dummy_attribute == 5
        assert made.save_pretrained == made.save_pretrained
    assert not caplog.records
    with pytest.warns(FutureWarning):
        assert made.test_attribute == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 500},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"beta_start": 0.001, "beta_end": 0.002},
    ],
)
def test_other_configs_save_and_load(changes, tmp_path):
    made = SolverScheduler(**config(DDIM(), **changes))
    made.save_config(tmp_path)
    again = SolverScheduler.from_pretrained(tmp_path)
    x = picture()
    for one in (made, again):
        one.set_timesteps(50)
    a, b = (one.step(0.1 * x, 0, x).prev_sample for one in (made, again))  # any step may be first
    assert torch.equal(a, b)


def test_unknown_and_missing_entries_of_a_config(caplog, tmp_path):
    logging.getLogger("diffusers").propagate = True
    made = SolverScheduler(**config())
    made.save_config(tmp_path)
    file = tmp_path / "scheduler_config.json"
    saved = json.loads(file.read_text())
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        SolverScheduler.from_config(SolverScheduler.load_config(tmp_path))
        assert not caplog.records
        file.write_text(json.dumps({**saved, "unexpected": True}))
        again = SolverScheduler.from_config(SolverScheduler.load_config(tmp_path))
        assert "unexpected" in caplog.text
    assert type(again) is SolverScheduler
    del saved["beta_end"]
    assert SolverScheduler.from_config(saved).config.beta_end == 0.02


def test_config_of_the_replaced_scheduler_is_honored(caplog):
    """Switching keeps what was chosen, and defaults mean those of the scheduler replaced."""
    logging.getLogger("diffusers").propagate = True
    euler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        made = effuse.scheduler("heun", euler)
        flow = effuse.scheduler("euler", FlowMatchEulerDiscreteScheduler(shift=3.0))
        SolverScheduler.from_config(flow.config)
    assert not caplog.records
    assert made.config.timestep_spacing == "trailing"
    again = effuse.scheduler("ddim", made)
    assert again.config.like == "EulerDiscreteScheduler"
    back = EulerDiscreteScheduler.from_config(again.config)
    assert back.config.timestep_spacing == "trailing"
    assert back.config.beta_schedule == "scaled_linear"
    heun = HeunDiscreteScheduler()  # its default of beta_start is another one
    assert effuse.scheduler("ddim", heun).betas[0] == heun.betas[0]


# In stock pipelines


def build(name: str, like=None):
    return {
        "sd": lambda: tiny_sd(like),
        "sdxl": lambda: tiny_sdxl(like),
        "pixart": lambda: tiny_pixart_pipe(like),
        "sd3": lambda: tiny_sd3(like),
        "flux": lambda: tiny_flux(like),
    }[name]()


EXTRA = {"pixart": {"use_resolution_binning": False}, "flux": {"height": 16, "width": 16}}


def latents(name, pipe, steps, **kwargs):
    out = pipe(
        PROMPTS,
        num_inference_steps=steps,
        generator=rng(3),
        output_type="latent",
        **EXTRA.get(name, {}),
        **kwargs,
    ).images
    return pipe._unpack_latents(out, 16, 16, pipe.vae_scale_factor) if name == "flux" else out


def close(mine, theirs):
    assert mine.shape == theirs.shape
    error = (mine - theirs).abs().max().item()
    assert error < 1e-4 * max(1.0, theirs.abs().max().item()), error


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_a_stock_pipeline_equals_wrap(name, solver):
    """The pipeline with our scheduler gives what our own loop gives, noise included."""
    pipe = build(name)
    size = 16 if name == "flux" else None
    mine = wrap(pipe).sample(PROMPTS, solver, steps=4, rng=rng(3), size=size, decode=False)
    pipe.scheduler = effuse.scheduler(solver, pipe.scheduler)
    if solver.stochastic and name in ("sd3", "flux"):
        # these pipelines hand no generator on: the global seed decides
        torch.manual_seed(2)
        a = latents(name, pipe, 4)
        torch.manual_seed(2)
        assert torch.equal(a, latents(name, pipe, 4))
        return
    close(latents(name, pipe, 4), mine)
    # the scheduler is as good a source as the one it replaced, and nothing is left of a run
    mine = wrap(pipe).sample(PROMPTS, solver, steps=3, rng=rng(3), size=size, decode=False)
    close(latents(name, pipe, 3), mine)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("solver", "make"),
    [
        (DDIM(), lambda **k: DDIMScheduler(**SD, clip_sample=False, **k)),
        (
            DDIM(),
            lambda **k: DDIMScheduler(
                **SD, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False, **k
            ),
        ),
        (Euler(), lambda **k: EulerDiscreteScheduler(**SD, **k)),
        (Euler(), lambda **k: EulerDiscreteScheduler(**SD, timestep_spacing="leading", **k)),
        (Euler(), lambda **k: EulerDiscreteScheduler(**SD, use_karras_sigmas=True, **k)),
        (Euler(), lambda **k: EulerDiscreteScheduler(**SD, use_beta_sigmas=True, **k)),
        (DPMpp2M(), lambda **k: DPMSolverMultistepScheduler(**SD, **k)),
        (DPMpp2M(), lambda **k: DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, **k)),
        (
            DPMpp2M(),
            lambda **k: DPMSolverMultistepScheduler(**SD, use_exponential_sigmas=True, **k),
        ),
    ],
)
def test_it_equals_diffusers_own_scheduler(solver, make, kind):
    # DDIM in diffusers is inconsistent where 1000 is not divisible
    for steps in (4, 10) if kind == "epsilon" else (5,):
        pipe = tiny_sd(make(prediction_type=kind, steps_offset=1))
        theirs = latents("sd", pipe, steps)
        pipe.scheduler = effuse.scheduler(solver, pipe.scheduler)
        close(latents("sd", pipe, steps), theirs)


@pytest.mark.parametrize(
    ("name", "solver", "cls"),
    [
        ("sd3", Euler(), FlowMatchEulerDiscreteScheduler),
        ("flux", Euler(), FlowMatchEulerDiscreteScheduler),
        ("sd3", Heun(), FlowMatchHeunDiscreteScheduler),  # theirs cannot run FLUX
    ],
)
def test_it_equals_diffusers_own_flow_scheduler(name, solver, cls):
    for steps in (3, 10):
        pipe = build(name, cls(shift=3.0))
        theirs = latents(name, pipe, steps)
        pipe.scheduler = effuse.scheduler(solver, pipe.scheduler)
        assert pipe.scheduler.order == solver.evals
        close(latents(name, pipe, steps), theirs)


def test_dynamic_shift_of_flux():
    pipe = tiny_flux()
    theirs = latents("flux", pipe, 5)
    pipe.scheduler = effuse.scheduler("euler", pipe.scheduler)
    close(latents("flux", pipe, 5), theirs)
    with pytest.raises(ValueError, match="mu"):
        pipe.scheduler.set_timesteps(5)


def test_heun_has_the_timesteps_of_diffusers_heun():
    """Its steps differ at third order: ours averages pairs, theirs the noise in x / alpha."""
    theirs = HeunDiscreteScheduler(**SD, steps_offset=1)
    mine = effuse.scheduler("heun", theirs)
    for made in (mine, theirs):
        made.set_timesteps(6)
    torch.testing.assert_close(mine.timesteps, theirs.timesteps.to(mine.timesteps.dtype))
    assert mine.order == theirs.order == 2
    pipe, gaps = tiny_sd(copy.deepcopy(theirs)), []
    for steps in (5, 20):
        pipe.scheduler = copy.deepcopy(theirs)
        a = latents("sd", pipe, steps, guidance_scale=1.0)
        pipe.scheduler = effuse.scheduler("heun", pipe.scheduler)
        gaps.append((latents("sd", pipe, steps, guidance_scale=1.0) - a).abs().mean())
    assert gaps[1] < gaps[0] / 2


@pytest.mark.parametrize("solver", [DDIM(), DPMpp2MSDE(), Heun()], ids=["ddim", "sde", "heun"])
def test_class_conditional_and_pixel_pipelines(solver):
    pipe = tiny_dit_pipe(out_channels=8)
    mine = wrap(pipe).sample([1, 7], solver, steps=4, rng=rng(), guidance=1.0)
    pipe.scheduler = effuse.scheduler(solver, pipe.scheduler)
    # the pipeline hands its generator to the first draw only
    out = pipe([1, 7], 1.0, num_inference_steps=4, generator=rng(), output_type="pt").images
    if not solver.stochastic:
        close(out, mine)
        two = wrap(pipe).sample([1, 7], solver, steps=4, rng=rng(), guidance=4.0)
        close(pipe([1, 7], num_inference_steps=4, generator=rng(), output_type="pt").images, two)
    ddpm = tiny_ddpm(DDPMScheduler())
    mine = wrap(ddpm).sample(2, solver, steps=4, rng=rng())
    ddpm.scheduler = effuse.scheduler(solver, ddpm.scheduler)
    close(ddpm(2, rng(), num_inference_steps=4, output_type="pt").images, mine)


def test_ddim_pipeline_with_its_own_arguments():
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 4, "output_type": "pt", "use_clipped_model_output": True}
    theirs = pipe(2, rng(), **kwargs).images
    pipe.scheduler = effuse.scheduler("ddim", pipe.scheduler)
    close(pipe(2, rng(), **kwargs).images, theirs)
    with pytest.raises(ValueError, match=r"DDIM\(eta=0.5\)"):
        pipe(2, rng(), eta=0.5, **kwargs)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp"])
def test_image_to_image_starts_in_the_middle(name, strength):
    def go(like):
        pipe = tiny_sd(like)
        parts = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        parts.set_progress_bar_config(disable=True)
        calls = []
        parts.unet.register_forward_pre_hook(lambda m, a: calls.append(float(a[1])))
        out = parts(
            "a cat",
            torch.rand(1, 3, 16, 16, generator=rng(5)),
            strength,
            10,
            generator=rng(3),
            output_type="latent",
        ).images
        return out, calls

    like = DDIMScheduler(**SD, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    theirs, calls = go(like)
    mine, my_calls = go(effuse.scheduler(name, like))
    assert my_calls[0] == calls[0]
    assert len(my_calls) == {"heun": 2 * len(calls)}.get(name, len(calls))
    if name == "ddim":
        close(mine, theirs)
    assert mine.isfinite().all()


SDXL_LIKE = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)


def edit(cls, pipe, **kwargs):
    """Call the pipeline class `cls`, made of the parts of `pipe`, on a random picture."""
    own = inspect.signature(cls.__init__).parameters
    flags = {"requires_safety_checker": False, "add_watermarker": False}
    parts = cls(**{k: v for k, v in {**pipe.components, **flags}.items() if k in own})
    parts.set_progress_bar_config(disable=True)
    own = inspect.signature(cls.__call__).parameters
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    given = {
        "image": torch.rand(1, 3, 16, 16, generator=rng(5)),
        "mask_image": mask,
        "height": 16,
        "width": 16,
        "num_inference_steps": 6,
        "generator": rng(3),
        "output_type": "latent",
    }
    return parts("a cat", **{k: v for k, v in {**given, **kwargs}.items() if k in own}).images


@pytest.mark.parametrize(
    ("cls", "make", "like", "strength"),
    [
        # blends the known part in after each step: the sample is taken at its word
        (StableDiffusionInpaintPipeline, tiny_sd, None, 1.0),
        (StableDiffusionInpaintPipeline, tiny_sd, None, 0.7),
        (StableDiffusionXLImg2ImgPipeline, tiny_sdxl, SDXL_LIKE, 0.5),
        (StableDiffusionXLImg2ImgPipeline, tiny_sdxl, SDXL_LIKE, 1.0),
        (StableDiffusionXLInpaintPipeline, tiny_sdxl, SDXL_LIKE, 0.9),
        (StableDiffusion3Img2ImgPipeline, tiny_sd3, None, 0.6),
        (FluxImg2ImgPipeline, tiny_flux, None, 0.6),
        (FluxInpaintPipeline, tiny_flux, None, 0.6),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_pipelines_that_edit(cls, make, like, strength):
    """They add noise by label, start in the middle and step from what they changed."""
    like = make().scheduler if like is None else like
    theirs = edit(cls, make(copy.deepcopy(like)), strength=strength)
    close(edit(cls, make(effuse.scheduler("euler", like)), strength=strength), theirs)
    for name in ("momentum", "unipc", "ancestral"):
        out = edit(cls, make(effuse.scheduler(name, like)), strength=strength)
        assert out.isfinite().all()
        assert (out - theirs).abs().max() > 1e-3


def test_two_experts_share_one_run():
    """SDXL's base stops at 0.6 of the way and its refiner takes over."""

    def go(like):
        first = tiny_sdxl(copy.deepcopy(like))(
            "a cat",
            num_inference_steps=10,
            denoising_end=0.6,
            generator=rng(),
            output_type="latent",
        ).images
        return edit(
            StableDiffusionXLImg2ImgPipeline,
            tiny_sdxl(copy.deepcopy(like)),
            image=first,
            num_inference_steps=10,
            denoising_start=0.6,
        )

    close(go(effuse.scheduler("euler", SDXL_LIKE)), go(SDXL_LIKE))
    assert go(effuse.scheduler("momentum", SDXL_LIKE)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_lose_less_than_with_diffusers(dtype):
    like = DDIMScheduler(**SD, clip_sample=False, steps_offset=1)
    x = torch.randn(2, 4, 8, 8, generator=rng()).to(dtype)

    def go(scheduler, as_type):
        pipe = tiny_sd(scheduler).to(dtype).to(as_type)  # float32 of the same rounded weights
        out = pipe(PROMPTS, num_inference_steps=40, latents=x.to(as_type), output_type="latent")
        assert out.images.dtype == as_type
        return out.images.float()

    exact = go(like, torch.float32)
    theirs, ours = (
        (go(s, dtype) - exact).abs().mean() for s in (like, effuse.scheduler("ddim", like))
    )
    assert ours < 0.7 * theirs


# Runs


def drive(made: SolverScheduler, x, generator=None, dtype=torch.float32):
    x = x.to(dtype)
    for t in made.timesteps:
        x = made.step((0.3 * x + 0.1 * torch.sin(x)).to(dtype), t, x, generator).prev_sample
    return x


def test_every_solver_replays_the_same_noise(solver):
    made = effuse.scheduler(solver, DDIMScheduler(**SD, clip_sample=False))
    outs = []
    for seed in (1, 1, 2):
        made.set_timesteps(6)
        outs.append(drive(made, picture(), rng(seed)))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2]) is not solver.stochastic


def test_a_generator_for_each_row():
    made = effuse.scheduler(Ancestral(), DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(5)
    many = drive(made, picture(), [rng(i) for i in range(4)])
    for i in range(4):
        made.set_timesteps(5)
        one = drive(made, picture()[i : i + 1], rng(i))
        torch.testing.assert_close(many[i : i + 1], one)
    made.set_timesteps(5)
    with pytest.raises(ValueError, match="3 generators for 4 samples"):
        drive(made, picture(), [rng(i) for i in range(3)])


def test_global_seed_decides_without_a_generator():
    made = effuse.scheduler(Ancestral(), DDIMScheduler(**SD))
    outs = []
    for _ in range(2):
        torch.manual_seed(4)
        made.set_timesteps(5)
        outs.append(drive(made, picture()))
    assert torch.equal(*outs)


def test_half_precision_keeps_its_state_in_float32():
    made = effuse.scheduler(DDIM(), DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(200)
    x = picture().bfloat16()
    assert drive(made, x, dtype=torch.bfloat16).dtype == torch.bfloat16
    made.set_timesteps(200)
    still, exact = x, x.double()
    for i, t in enumerate(made.timesteps):
        still = made.step(torch.zeros_like(still), t, still).prev_sample
        a = made.schedule.process.alpha(made._walk.levels[i : i + 2])
        exact = exact * (a[1] / a[0])
    error = ((still.double() - exact) / exact).abs().max()
    assert error < 2**-7  # one rounding, not two hundred


def test_an_interrupted_run_leaves_nothing():
    made = effuse.scheduler(Heun(), DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(4)
    whole = drive(made, picture())
    made.set_timesteps(4)
    made.step(picture(), made.timesteps[0], picture())  # stopped between two evaluations
    made.set_timesteps(4)
    assert torch.equal(drive(made, picture()), whole)


def test_copies_are_independent():
    made = effuse.scheduler(DPMpp2M(), DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(4)
    x = made.step(picture(), made.timesteps[0], picture()).prev_sample
    other = copy.deepcopy(made)
    a = made.step(x, made.timesteps[1], x).prev_sample
    b = other.step(x, other.timesteps[1], x).prev_sample
    assert torch.equal(a, b)


def test_gradients_flow_through_a_step():
    made = effuse.scheduler(Heun(), DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(3)
    weight = torch.tensor(0.5, requires_grad=True)
    x = picture()
    for t in made.timesteps:
        x = made.step(weight * x, t, x).prev_sample
    x.sum().backward()
    assert weight.grad.isfinite()


def test_own_timesteps_sigmas_and_grids():
    like = EulerDiscreteScheduler(**SD)
    made = effuse.scheduler(Euler(), like)
    made.set_timesteps(timesteps=[900, 500, 100])
    assert made.timesteps.tolist() == [900, 500, 100]
    assert made.num_inference_steps == 3
    made.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    torch.testing.assert_close(made.sigmas, torch.tensor([10.0, 2.0, 0.5, 0.0]))
    gridded = effuse.scheduler("dpmpp", like, grid=Karras(rho=5.0))
    again = SolverScheduler.from_config(json.loads(gridded.to_json_string()))
    for one in (gridded, again):
        one.set_timesteps(7)
        process = one.schedule.process
        torch.testing.assert_close(one._walk.levels, Karras(rho=5.0)(process, 7))
    flux = tiny_flux()
    mine = wrap(flux).sample(
        PROMPTS, DPMpp2M(), steps=4, grid=Uniform(1.0, 0.1), rng=rng(3), size=16, decode=False
    )
    flux.scheduler = effuse.scheduler(DPMpp2M(), flux.scheduler, grid=Uniform(1.0, 0.1))
    close(latents("flux", flux, 4), mine)


def test_noise_for_training():
    like = DDPMScheduler(**SD)
    made = effuse.scheduler("ddim", like)
    x, noise = picture(), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0, 17, 500, 999])
    for name in ("add_noise", "get_velocity"):
        torch.testing.assert_close(
            getattr(made, name)(x, noise, t), getattr(like, name)(x, noise, t), rtol=1e-4, atol=1e-5
        )
    flow_like = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = effuse.scheduler("euler", flow_like)
    for one in (flow, flow_like):
        one.set_timesteps(6)
    torch.testing.assert_close(flow.timesteps, flow_like.timesteps)
    torch.testing.assert_close(flow.sigmas, flow_like.sigmas)
    t = flow.timesteps[torch.tensor([0, 2, 3, 5])]
    torch.testing.assert_close(flow.scale_noise(x, t, noise), flow_like.scale_noise(x, t, noise))


def test_the_default_scheduler_of_stable_diffusion():
    pipe = tiny_sd(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1))
    ddim = tiny_sd(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1))
    pipe.scheduler = effuse.scheduler("ddim", pipe.scheduler)
    close(latents("sd", pipe, 5), latents("sd", ddim, 5))


@pytest.mark.slow
def test_a_saved_pipeline_loads_after_a_bare_import(tmp_path):
    pipe = tiny_ddpm(DDIMScheduler(clip_sample=False))
    pipe.scheduler = effuse.scheduler(DPMpp2MSDE(eta=0.5), pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["effuse.bridge.saved", "SolverScheduler"]
    code = (
        "import effuse, sys; assert 'diffusers' not in sys.modules\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(pipe.scheduler.solver)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "DPMpp2MSDE(eta=0.5)", run.stderr
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    a, b = (p(1, rng(), num_inference_steps=3, output_type="pt").images for p in (pipe, again))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_output_that_is_not_finite_names_the_step(dtype):
    made = effuse.scheduler("heun", DDIMScheduler(**SD, clip_sample=False))
    made.set_timesteps(4)
    x = picture().to(dtype)
    for t in made.timesteps[:3]:
        pair = made.step(0.1 * x, t, x, return_dict=False)
        assert {part.dtype for part in pair} == {dtype}
        x = pair[0]
    said = r"step 1 of Heun, timestep 250, the network's output: 2 of 768 values are not finite"
    broken = x.clone()
    broken[0, 0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(FloatingPointError, match=said):
        made.step(broken, made.timesteps[3], x)
    made.set_timesteps(4)
    with pytest.raises(FloatingPointError, match="step 0 of Heun, timestep 750: "):
        made.step(torch.full((4, 3, 8, 8), 3e38), 750, picture())


class Churn(Solver):
    """Asks elsewhere than where it is."""

    evals = 2

    def step(self, denoiser, x, t, s, state=None, *, rng=None):
        return Step(denoiser(x, (t + s) / 2).x0)


def test_bad_arguments():
    like = DDIMScheduler(**SD)
    with pytest.raises(ValueError, match="did you mean 'dpmpp'"):
        effuse.scheduler("dpmp", like)
    with pytest.raises(ValueError, match="expected one of"):
        effuse.scheduler("vp", like)
    with pytest.raises(TypeError, match="expected a Solver"):
        effuse.scheduler(3, like)
    with pytest.raises(TypeError, match="expected a scheduler of diffusers"):
        effuse.scheduler("ddim", object())
    with pytest.raises(TypeError, match="alphas_cumprod"):
        effuse.scheduler("ddim", EDMEulerScheduler())
    with pytest.raises(ValueError, match="no method card"):
        effuse.scheduler(Churn(), like)
    made = effuse.scheduler("ddim", like)
    x = picture()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        made.step(x, 0, x)
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="positive integer"):
            made.set_timesteps(wrong)
    with pytest.raises(ValueError, match="expected num_inference_steps"):
        made.set_timesteps()
    with pytest.raises(ValueError, match="1000"):
        made.set_timesteps(1001)
    with pytest.raises(ValueError, match="fall from noise to data"):
        made.set_timesteps(timesteps=[500, 500, 100])
    made.set_timesteps(4)
    with pytest.raises(ValueError, match=r"none of this run's 4: .*\(750, 500, 250, 0"):
        made.step(x, 3, x)
    made.step(x, 750, x)
    with pytest.raises(ValueError, match=r"750 is repeated or out of order: expected 500"):
        made.step(x, 750, x)
    for t in (500, 250, 0):
        made.step(x, t, x)
    with pytest.raises(ValueError, match="the run is over"):
        made.step(x, 0, x)
    gridded = effuse.scheduler("ddim", like, grid=Karras())
    with pytest.raises(ValueError, match="beside a grid"):
        gridded.set_timesteps(timesteps=[3, 2])
    with pytest.raises(ValueError, match="grid 'Karas'"):
        SolverScheduler(grid={"class": "Karas", "fields": {}}).set_timesteps(3)
    with pytest.raises(ValueError, match="did you mean 'eta'"):
        SolverScheduler(solver={"method": "ddim", "class": "DDIM", "fields": {"ete": 1}})
    driven = SolverScheduler()
    driven.solver = Churn()
    with pytest.raises(ValueError, match="no pipeline can drive it"):
        driven.set_timesteps(3)


def test_solvers_of_ours_take_tapered_levels_and_the_others_those_of_like():
    like = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    process = Tabulated.from_alphas_cumprod(like.alphas_cumprod)
    for name, own in (("momentum", True), ("plms", True), ("ddim", False)):
        made = effuse.scheduler(name, like)
        made.set_timesteps(10)
        levels = Tapered()(process, 10) if own else grid_of(like)(process, 10)
        torch.testing.assert_close(made.timesteps, process.index_at(levels[:-1]).round().long())
        assert not made.timesteps.is_floating_point()
    kept = effuse.scheduler("momentum", like, grid=grid_of(like))
    again = SolverScheduler.from_config(json.loads(kept.to_json_string()))
    for one in (kept, again):
        one.set_timesteps(10)
        assert one.timesteps.tolist() == list(range(901, 0, -100))
    karras = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    theirs = copy.deepcopy(karras)
    theirs.set_timesteps(7)
    made = effuse.scheduler("momentum", karras)
    made.set_timesteps(7)  # the levels were asked for
    assert made.timesteps.tolist() == theirs.timesteps.tolist()
    made = effuse.scheduler("momentum", like)
    made.set_timesteps(timesteps=[900, 400])
    assert made.timesteps.tolist() == [900, 400]
    with pytest.raises(ValueError, match="in place of"):
        effuse.scheduler("momentum", like, grid=grid_of(karras))
