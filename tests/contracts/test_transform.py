"""Every transform card, on real diffusers classes: taken off bit for bit, rebuilt from its plan."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json

import pytest
import torch
from tests.tiny import tiny_dit, tiny_pixart, tiny_unet, tiny_unet_cond
from torch import nn

from effuse.core import Transform, Unsuited, methods
from effuse.recipe import ORDER

TRANSFORMS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Transform)
}
PAIRS = [
    (a, b)
    for a, b in itertools.permutations(TRANSFORMS, 2)
    if ORDER.index(TRANSFORMS[a]().kind) <= ORDER.index(TRANSFORMS[b]().kind)
]
STORED = ("iss_p-Sparsify",)  # leaves no plain layer for others to change
# pairs grow as the square: each on one of two networks in quick runs, on the other in slow ones
PAIRED = [
    pytest.param(*pair, name, marks=[pytest.mark.slow] * ((i + k) % 2), id="-".join((*pair, name)))
    for i, pair in enumerate(PAIRS)
    for k, name in enumerate(("unet_cond", "dit"))
]


def call(name: str, seed: int = 0, step: int = 500):
    """Return one call of a tiny network: arguments as its pipeline gives them."""
    rng = torch.Generator().manual_seed(seed)
    model = MODELS[name]
    size = getattr(model.config, "sample_size", 8)
    x = torch.randn(2, model.config.in_channels, size, size, generator=rng)
    t = torch.full((2,), step)
    if name == "unet":
        return (x, t), {"return_dict": False}
    if name == "unet_cond":
        text = torch.randn(2, 5, model.config.cross_attention_dim, generator=rng)
        return (x, t), {"encoder_hidden_states": text, "return_dict": False}
    if name == "dit":
        labels = torch.tensor([1, 2])
        return (x,), {"timestep": t, "class_labels": labels, "return_dict": False}
    text = torch.randn(2, 5, model.config.caption_channels, generator=rng)
    return (x,), {
        "timestep": t,
        "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


MODELS: dict[str, nn.Module] = {
    "unet": tiny_unet().eval(),
    "unet_cond": tiny_unet_cond().eval(),
    "dit": tiny_dit().eval(),
    "pixart": tiny_pixart().eval(),
}


def run(model: nn.Module, name: str, **kwargs) -> torch.Tensor:
    args, words = call(name, **kwargs)
    with torch.no_grad():
        return model(*args, **words)[0]


def put(made, model: nn.Module, name: str):
    try:
        handle = made().attach(model)
    except Unsuited as none:
        pytest.skip(str(none))
    handle.observe([call(name, seed=k, step=s) for k, s in enumerate((900, 500, 100))])
    handle.reset()
    return handle


@pytest.fixture(params=TRANSFORMS, ids=str)
def made(request):
    return TRANSFORMS[request.param]


@pytest.fixture(params=MODELS, ids=str)
def name(request) -> str:
    return request.param


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_detach_is_bit_exact(made, name):
    model = copy.deepcopy(MODELS[name])
    before, types = run(model, name), [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = put(made, model, name)
    assert run(model, name).isfinite().all()
    handle.detach()
    assert torch.equal(run(model, name), before)
    assert [type(m) for m in model.modules()] == types
    assert hooks(model) == 0
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert all("forward" not in vars(m) for m in model.modules())


def test_plan_rebuilds_on_a_fresh_model(made, name):
    model = copy.deepcopy(MODELS[name])
    handle = put(made, model, name)
    plan = json.loads(json.dumps(handle.plan()))
    json.dumps(handle.report())
    handle.reset()
    expected = run(model, name)
    fresh = copy.deepcopy(MODELS[name])
    made().restore(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(fresh, name), expected, rtol=0, atol=0)


def test_finalize_stays(made, name):
    model = copy.deepcopy(MODELS[name])
    handle = put(made, model, name)
    handle.reset()
    expected = run(model, name)
    handle.reset()
    handle.finalize()
    assert torch.equal(run(model, name), expected)
    with pytest.raises((RuntimeError, ValueError)):
        handle.detach()


def test_where_nothing_is_allowed_nothing_changes(made, name):
    model = copy.deepcopy(MODELS[name])
    before = run(model, name)
    nothing = dataclasses.replace(made(), where=lambda layer, module: False)
    with contextlib.suppress(TypeError, ValueError):  # it may refuse to have nothing to do
        handle = nothing.attach(model)
        handle.observe([call(name)])
        assert torch.equal(run(model, name), before)
        handle.detach()
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize(("first", "second", "name"), PAIRED)
def test_pairs_compose_and_come_off(first, second, name):
    """In the order of a recipe; two of one kind may refuse, and then leave the first as it was."""
    model = copy.deepcopy(MODELS[name])
    before = run(model, name)
    one = put(TRANSFORMS[first], model, name)
    alone = run(model, name)
    one.reset()
    refused = ""
    try:
        two = put(TRANSFORMS[second], model, name)
    except (TypeError, ValueError) as refusal:
        refused = str(refusal) or "no reason"
    if refused:
        alike = one.transform.kind == TRANSFORMS[second]().kind
        assert alike or first in STORED, refused
        assert len(refused) > 20
        assert torch.equal(run(model, name), alone)
        one.detach()
        assert torch.equal(run(model, name), before)
        return
    assert run(model, name).isfinite().all()
    plans = [json.loads(json.dumps(h.plan())) for h in (one, two)]
    two.reset()
    one.reset()
    expected = run(model, name)
    fresh = copy.deepcopy(MODELS[name])
    for made, plan in zip((first, second), plans, strict=True):
        TRANSFORMS[made]().restore(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, name), expected)
    two.detach()
    one.detach()
    assert torch.equal(run(model, name), before)
