"""Routes from an error budget: the sums, the exact choice, the check, and recordings on disk."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tests.tiny import tiny_dit, tiny_dit_pipe, tiny_sd, tiny_unet
from torch import nn

from effuse.bridge import store
from effuse.bridge.pipeline import Walk
from effuse.compress.cache.error_budget import (
    Blocks,
    ErrorBudget,
    Frontier,
    Layers,
    Named,
    Units,
    carried_errors,
    chains,
    grams,
    off,
)
from effuse.compress.cache.keys import Route, Uniform
from effuse.compress.calibrate import Recording, calls_from_pipeline, walks
from effuse.core import Denoiser, sample
from effuse.ops import randn_like
from effuse.processes.vp import Linear
from effuse.solvers import DDIM, Ancestral

LEVELS = (900.0, 700.0, 450.0, 300.0, 100.0)


def values(parts=2, steps=5, width=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(parts, steps, width, generator=rng, dtype=torch.float64).cumsum(1)


def spent(o, steps, order, gain):
    """The error of one part that inherits at `steps`, straight from its values."""
    keys, total = [], 0.0
    for t in range(len(o)):
        if t not in steps:
            keys = [t, *keys][:2]
            continue
        guess = o[keys[0]]
        if order == 1 and len(keys) == 2:
            slope = (LEVELS[t] - LEVELS[keys[0]]) / (LEVELS[keys[0]] - LEVELS[keys[1]])
            guess = guess + slope * (o[keys[0]] - o[keys[1]])
        total += float(gain[t] * (o[t] - guess).square().sum())
    return total


def table(o, order, gain):
    gram = o @ o.transpose(1, 2)
    return carried_errors(gram, torch.tensor(LEVELS), order) * gain[:, None, None, :]


@pytest.mark.parametrize("order", [0, 1])
def test_least_error_of_each_number_of_steps_is_that_of_all_sets(order):
    o = values()
    gain = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    least, steps = chains(table(o, order, gain))
    for p, n in itertools.product(range(2), range(5)):
        every = itertools.combinations(range(1, 5), n)
        want = min(spent(o[p], set(some), order, gain[p]) for some in every)
        assert float(least[p, n]) == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert spent(o[p], set(steps[p, n]), order, gain[p]) == pytest.approx(want, abs=1e-12)
        assert len(steps[p, n]) == n


def test_values_on_a_line_are_carried_without_error():
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    o = torch.tensor(LEVELS, dtype=torch.float64)[None, :, None] * slope
    gram = o @ o.transpose(1, 2)
    on_line = carried_errors(gram, torch.tensor(LEVELS), 1)
    assert float(on_line[0, 1:3, 2, 3:].max()) < 1e-6 * float(gram.max())
    # with no second key step the last value is all there is
    assert float(on_line[0, 0, 0, 1]) == pytest.approx(5 * 200.0**2)
    assert float(carried_errors(gram, torch.tensor(LEVELS), 0)[0, 2, 2, 4]) == pytest.approx(
        5 * 350.0**2
    )


@pytest.mark.parametrize("order", [0, 1])
def test_the_frontier_is_the_best_of_all_routes_at_every_cost(order):
    o, gain = values(seed=3), torch.rand(2, 5, dtype=torch.float64) * 0 + 1
    saved, full = (3, 5), 100
    front = Frontier.of(table(o, order, gain), ("a", "b"), LEVELS, saved, full)
    sets = [s for n in range(5) for s in itertools.combinations(range(1, 5), n)]
    routes = []
    for a, b in itertools.product(sets, sets):
        error = spent(o[0], set(a), order, gain[0]) + spent(o[1], set(b), order, gain[1])
        routes.append((full - 3 * len(a) - 5 * len(b), error))
    errors = []
    for share in (1.0, 0.97, 0.9, 0.85, 0.8, 0.75, 0.7, front.least):
        route, predicted = front.at(share)
        cost = full - route.saved({"a": 3, "b": 5})
        assert cost <= share * full + 1e-9
        want = min(error for c, error in routes if c <= share * full + 1e-9)
        assert predicted**2 == pytest.approx(want, rel=1e-9, abs=1e-12)
        errors.append(predicted)
    assert errors == sorted(errors)
    assert errors[0] == 0
    with pytest.raises(ValueError, match="costs so little"):
        front.at(front.least - 0.01)


def test_inner_products_of_recorded_values():
    o = values()
    rec = Recording()
    for t in range(5):
        rec.add((), {"a": o[0, t].reshape(7, 1), "b": (o[1, t, :3], None, o[1, t, 3:])})
    torch.testing.assert_close(grams(rec, ("a", "b")), o @ o.transpose(1, 2))


# ---- on a network that can be worked out


class Part(nn.Module):
    """What a part gives at a timestep."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        """Give it."""
        return self.function(x, t)


class Toy(nn.Module):
    """Part a writes the first two coordinates, part b the others; each by its own linear layer."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = Part(a), Part(b)
        self.eval()

    def forward(self, sample, timestep):
        """Predict noise."""
        t = float(torch.as_tensor(timestep).reshape(-1)[0])
        return (torch.cat([self.a(sample[:, :2], t), self.b(sample[:, 2:], t)], 1),)


class ToyDenoiser(Denoiser):
    """The toy as a denoiser; its timestep is 1000 t."""

    def __init__(self, network):
        super().__init__()
        self.network, self.process = network, Linear()

    def forward(self, x, t, **cond):
        """Predict."""
        return self.process.complete(x, t, noise=self.network(x, float(t) * 1000)[0])


GRID = torch.linspace(0.9, 0.1, 7, dtype=torch.float64)
WEIGHT = torch.eye(2, dtype=torch.float64)


def matmul(x):
    return x @ WEIGHT  # something to count


def draw_of(network, rows=4):
    def draw(rng):
        x = randn_like(torch.empty(rows, 4, dtype=torch.float64), rng)
        return Walk(ToyDenoiser(network), DDIM(), x, GRID)

    return draw


def timed():
    """A network that does not look at the sample: errors of coordinates do not meet."""
    return Toy(
        lambda x, t: matmul(torch.full_like(x, math.sin(t / 200))),
        lambda x, t: matmul(torch.full_like(x, math.cos(t / 300))),
    )


def coupled():
    return Toy(
        lambda x, t: matmul(torch.tanh(x + t / 500)), lambda x, t: matmul(t / 2000 * torch.sin(x))
    )


def test_prediction_is_exact_where_errors_do_not_meet():
    """One inherited step of each part, on coordinates of their own, in a linear sampler."""
    network = timed()
    how = ErrorBudget(level=Named(("a", "b")), order=0, trajectories=1)
    handle = how.attach(network)
    draw = draw_of(network)
    handle.learn(draw, rng=torch.Generator().manual_seed(2), progress=False)
    walk = draw(torch.Generator().manual_seed(2))  # the one that was measured
    full = handle.run(walk, Uniform(1))
    front = handle.frontier
    for k, part in enumerate(("a", "b")):
        (step,) = front.steps[k, 1]
        route = Route(6, {part: (step,)}, front.levels)
        got = float(off(handle.run(walk, route), full).mean())
        assert float(front.errors[k, 1]) == pytest.approx(got, rel=1e-6)
    both = Route(6, {"a": front.steps[0, 1], "b": front.steps[1, 1]}, front.levels)
    got = float(off(handle.run(walk, both), full).mean())
    assert float(front.errors[:, 1].sum()) == pytest.approx(got, rel=1e-6)


@pytest.mark.parametrize("order", [0, 1])
def test_the_cheapest_route_within_the_budget_is_followed_and_keeps_it_on_other_noise(order):
    network = coupled()
    how = ErrorBudget(error=0.03, level=Named(("a", "b")), order=order, trajectories=8)
    handle = how.attach(network)
    draw = draw_of(network, rows=16)
    route = handle.learn(draw, progress=False)
    assert handle.route == route
    assert 0 < route.count() < 12
    inside = [m for m in handle.tried if m.high <= 0.03]
    assert route == min(inside, key=lambda m: m.share).route
    assert all(m.low <= m.error <= m.high for m in handle.tried)
    fresh = draw(torch.Generator().manual_seed(77))
    error = off(sample(*fresh), handle.run(fresh, Uniform(1))).mean().sqrt()
    assert float(error) <= 0.03
    report = handle.report()
    assert report["budget"] == 0.03
    assert len(report["tried"]) == 12
    json.dumps(report)
    # more error allowed is never dearer, and what is allowed is what was measured
    shares = []
    for error in (1e-9, 0.01, 0.02, 0.05, 0.1, 1e9):
        shares.append(1 - handle.within(error).count() / 12)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert shares[-1] < 0.2


def test_a_tiny_budget_is_the_original_bit_for_bit():
    network = coupled()
    walk = draw_of(network)(torch.Generator().manual_seed(5))
    before = sample(*walk)
    handle = ErrorBudget(error=1e-12, level=Named(("a", "b")), trajectories=1).attach(network)
    assert handle.learn(draw_of(network), progress=False).count() == 0
    assert torch.equal(sample(*walk), before)


def test_values_on_disk_give_the_same_route(tmp_path):
    network = coupled()
    routes, told = [], []
    for folder in (None, tmp_path, tmp_path):
        handle = ErrorBudget(level=Named(("a", "b"))).attach(network)
        routes.append(handle.learn(draw_of(network), progress=False, folder=folder))
        told.append(handle.report()["tried"])
        handle.detach()
    assert routes[0] == routes[1] == routes[2]
    assert told[0] == told[1] == told[2]
    assert len(list(tmp_path.glob("0001/*.safetensors"))) == 6
    handle = ErrorBudget(level=Named(("a", "b"))).attach(network)
    rng = torch.Generator().manual_seed(8)
    with pytest.raises(ValueError, match="another recording"):
        handle.learn(draw_of(network), rng=rng, progress=False, folder=tmp_path)


# ---- pipelines


def pictures(pipe, what, steps=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    out = pipe(what, num_inference_steps=steps, generator=rng, output_type="latent")
    return torch.as_tensor(out.images)


@pytest.mark.parametrize(
    ("make", "what", "level"),
    [
        (tiny_dit_pipe, [1, 2], Units(deep=None)),
        (tiny_sd, ["a cat", "a dog"], Layers(deep=None)),
        (tiny_sd, ["a cat", "a dog"], Blocks(0)),
    ],
    ids=["dit", "sd-layers", "sd-blocks"],
)
def test_on_a_pipeline_with_guidance_it_saves_and_comes_back(make, what, level, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = make()
    plain = pictures(pipe, what)
    name = "transformer" if make is tiny_dit_pipe else "unet"
    how = ErrorBudget(error=0.2, level=level, trajectories=1, tried=5)
    handle = how.attach(getattr(pipe, name))
    route = handle.learn(walks(pipe, what, steps=4, batch=2), progress=False)
    handle.follow(handle.frontier.at((1 + handle.frontier.least) / 2)[0])
    out = pictures(pipe, what)
    assert not torch.equal(out, plain)
    store.save(pipe, tmp_path, [(name, handle)])
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(pictures(again, what), out)
    with pytest.raises(ValueError, match="route was made for"):
        pictures(pipe, what, steps=3)
    handle.follow(route)
    error = off(pictures(pipe, what, seed=1), pictures(make(), what, seed=1))
    assert float(error.mean().sqrt()) <= 0.2
    handle.detach()
    assert torch.equal(pictures(pipe, what), plain)


def test_a_solver_that_draws_noise_is_refused():
    network = coupled()
    handle = ErrorBudget(level=Named(("a", "b"))).attach(network)
    draw = draw_of(network)
    with pytest.raises(ValueError, match="draws noise"):
        handle.learn(lambda rng: draw(rng)._replace(solver=Ancestral()), progress=False)


def test_a_network_without_such_parts_is_refused():
    with pytest.raises(ValueError, match="no such part"):
        ErrorBudget(level=Units(("attn2",), deep=None)).attach(tiny_dit())
    assert ErrorBudget().attach(tiny_unet()).route is None


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: ErrorBudget(error=0.0), ValueError, "error=0"),
        (lambda: ErrorBudget(level="units"), TypeError, "level='units'"),
        (lambda: ErrorBudget(order=2), ValueError, "order=2"),
        (lambda: ErrorBudget(confidence=1.0), ValueError, "confidence=1"),
        (lambda: ErrorBudget().attach(tiny_dit()).within(0.1), ValueError, "nothing measured"),
    ],
)
def test_bad_input_says_what_was_expected(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


# ---- recordings on disk


def same(one, two):
    assert len(one) == len(two)
    for (a, x), (b, y) in zip(one, two, strict=True):
        assert len(a) == len(b)
        assert x.keys() == y.keys()
        assert all(map(torch.equal, tensors((a, x)), tensors((b, y))))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "values"):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("limit", [None, 3])
def test_a_recording_in_a_folder_goes_on_where_it_was_broken_off(limit, tmp_path):
    whole = Recording(limit, seed=4)
    for k in range(9):
        whole.add((torch.full((2,), k),), {"step": k})
    first = Recording(limit, seed=4, folder=tmp_path)
    for k in range(5):
        first.add((torch.full((2,), k),), {"step": k})
    again = Recording(limit, seed=4, folder=tmp_path)
    assert again.known == 5
    for k in range(9):  # made again from the start
        again.add((torch.full((2,), k),), {"step": k})
    same(again, whole)
    same(Recording(limit, seed=4, folder=tmp_path), whole)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(whole)
    with pytest.raises(ValueError, match=r"differs in limit|differs in seed"):
        Recording(limit, seed=5, folder=tmp_path)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="is missing"):
        Recording(limit, seed=4, folder=tmp_path)


def test_sampling_for_a_recording_goes_on_at_the_run_where_it_stopped(tmp_path):
    how = {"steps": 2, "batch": 1, "guidance": 1.0, "limit": 4}
    whole = calls_from_pipeline(tiny_dit_pipe(), [1, 2, 3], **how)
    pipe = tiny_dit_pipe()
    calls = 0

    def stop(module, args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        calls_from_pipeline(pipe, [1, 2, 3], **how, folder=tmp_path)
    hook.remove()
    counted = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args: counted.append(1))
    again = calls_from_pipeline(pipe, [1, 2, 3], **how, folder=tmp_path)
    assert len(counted) == 4  # the first run of two calls was not made again
    same(again, whole)
    with pytest.raises(ValueError, match="differs in asked"):
        calls_from_pipeline(pipe, [1, 2, 4], **how, folder=tmp_path)
