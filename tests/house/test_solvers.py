"""Every solver drives the house pipelines, in float32 and in half precision."""

from __future__ import annotations

import copy

import pytest
import torch

import effuse
from effuse.core import Solver, methods
from effuse.report.draw import draw

SOLVERS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Solver)
}
ASKED = {"emoji": "red apple", "emoji-dit": 3, "pixels": None}


@pytest.fixture(scope="module", params=ASKED, ids=str)
def pipes(request):
    """A house pipeline in float32, and in half precision."""
    pipe = effuse.load(f"house:{request.param}")
    parts = {n: copy.deepcopy(c) for n, c in pipe.components.items() if n != "scheduler"}
    half = type(pipe)(**parts, scheduler=pipe.scheduler)
    # diffusers' DDPMPipeline cannot give bfloat16 pictures out
    half.to(torch.float16 if request.param == "pixels" else torch.bfloat16)
    return ASKED[request.param], pipe, half


@pytest.mark.parametrize("name", SOLVERS)
def test_half_precision_draws_nearly_the_same(pipes, name):
    asked, *both = pipes
    pictures = []
    for pipe in both:
        like = pipe.scheduler
        solver = SOLVERS[name]()
        try:
            made = effuse.scheduler(solver, like)
            made.set_timesteps(3)
        except (TypeError, ValueError, NotImplementedError) as error:
            pytest.skip(f"no pipeline can drive it: {error}")
        pipe.register_modules(scheduler=made)
        try:
            pictures.append(draw(pipe, [asked], steps=3, seed=1))
        finally:
            pipe.register_modules(scheduler=like)
    full, half = pictures
    assert full.isfinite().all()
    assert half.isfinite().all()
    assert min(full.std(), half.std()) > 0.02  # not a flat nothing
    # the start is drawn in the pipeline's type, and leaves the generator elsewhere
    assert solver.stochastic or (full - half).square().mean().sqrt() < 0.1
