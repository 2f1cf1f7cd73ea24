"""Every transform on whole pipelines of five shapes: on and off bit for bit, saved, loaded."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tests.tiny import tiny_flux, tiny_pixart_pipe, tiny_sd, tiny_sd3, tiny_sdxl

from effuse.bridge import store
from effuse.compress.calibrate import calls_from_pipeline, network_of, uniform_calls
from effuse.core import Transform, Unsuited, methods

TRANSFORMS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Transform)
}
SHAPES = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "pixart": tiny_pixart_pipe,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}
OWN = {
    "pixart": {"use_resolution_binning": False},  # its bins begin at 256 pixels
    "flux": {"height": 16, "width": 16},  # for 256
}


@functools.cache
def ready(shape: str):
    """Return a pipeline of a shape, its calibration and a picture; copy before changing it."""
    pipe = SHAPES[shape]()
    pipe.set_progress_bar_config(disable=True)
    if shape == "flux":
        pipe.default_sample_size = 8
    torch.manual_seed(0)
    runs = list(calls_from_pipeline(pipe, 2, steps=2, batch=2, **OWN.get(shape, {})))
    spread = uniform_calls(pipe, 2, count=2, batch=2, steps=2)
    return pipe, runs, spread, picture(pipe, shape)


def picture(pipe, shape):
    with torch.no_grad():
        out = pipe(
            "a cat",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
            **OWN.get(shape, {}),
        )
    return torch.as_tensor(out.images)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_on_off_saved_and_loaded(name, shape, tmp_path):
    original, runs, spread, before = ready(shape)
    pipe = copy.deepcopy(original)
    pipe.set_progress_bar_config(disable=True)
    network, transform = network_of(pipe), TRANSFORMS[name]()
    try:
        handle = transform.attach(network)
    except Unsuited as why:
        takes_unets = name != "autodistil-Slice"  # every other method does
        if (shape in ("sd", "sdxl") and takes_unets) or len(str(why)) < 20:
            raise
        assert torch.equal(picture(pipe, shape), before)
        pytest.skip(str(why))
    seen = spread if transform.targeted else [b["call"] for b in spread]
    seen = seen if transform.calibrated else runs
    handle.observe(seen)
    handle.reset()
    changed = picture(pipe, shape)
    handle.detach()
    assert torch.equal(picture(pipe, shape), before)
    handle = TRANSFORMS[name]().attach(network)
    handle.observe(seen)
    handle.reset()
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    store.save(pipe, tmp_path / "saved", [(part, handle)])
    again = store.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, shape), changed)
    handle.reset()
    handle.finalize()
    assert torch.equal(picture(pipe, shape), changed)
