"""What a step costs beside the network: no more than a step of diffusers' DDIM."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from diffusers import DDIMScheduler

import effuse
from effuse.bridge.table import Schedule, predict
from effuse.core import Denoiser, sample
from effuse.evaluate.cost import Peak
from effuse.solvers import DDIM, DPMpp2M

LIKE = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
STEPS = 40


class Fixed(Denoiser):
    """A network that costs nothing."""

    def __init__(self, noise):
        super().__init__()
        self.noise, self.process = noise, Schedule(LIKE).process

    def forward(self, x, t, **cond):
        """Return what is always predicted."""
        return predict("epsilon", self.noise, x, t, self.process)


@pytest.fixture
def one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # or processor time counts threads that wait
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", [1, 64])
def test_a_step_costs_no_more_than_that_of_diffusers_ddim(count):
    """Interleaved, medians of many runs, set-up apart."""
    rng = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, count, 4, 32, 32, generator=rng)
    model, times = Fixed(noise), Schedule(LIKE).walk(STEPS).levels
    theirs, ours = DDIMScheduler.from_config(LIKE.config), effuse.scheduler("ddim", LIKE)

    def drive(made):
        y = x
        for t in made.timesteps:
            y = made.step(noise, t, made.scale_model_input(y, t)).prev_sample

    runs = {
        "theirs": lambda: drive(theirs),
        "exported": lambda: drive(ours),
        "sample": lambda: sample(model, DDIM(), x, times),
    }
    spent = {name: [] for name in runs}
    for _ in range(15):
        for name, run in runs.items():
            theirs.set_timesteps(STEPS)
            ours.set_timesteps(STEPS)
            begun = time.process_time()
            run()
            spent[name].append(time.process_time() - begun)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    assert medians["sample"] <= medians["theirs"], medians
    assert medians["exported"] <= medians["theirs"], medians


@pytest.mark.parametrize("solver", [DDIM(), DPMpp2M()], ids=repr)
def test_memory_does_not_grow_with_the_steps(solver):
    x, noise = torch.randn(2, 8, 4, 16, 16)
    model = Fixed(noise)
    peaks = []
    for steps in (5, 50, 200):
        times = Schedule(LIKE).walk(steps).levels
        sample(model, solver, x, times)  # the coefficients are remembered: a few numbers a level
        with Peak(x.device) as peak:
            sample(model, solver, x, times)
        peaks.append(peak.bytes)
    assert max(peaks) - min(peaks) < 0.1 * x.numel() * 4, peaks
