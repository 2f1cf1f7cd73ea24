"""The caching engine: key steps, clock, streams, gates and accounts."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_dit, tiny_unet, tiny_unet_cond
from torch import nn

from effuse.compress.cache.clock import Clock, level_of
from effuse.compress.cache.keys import (
    Adaptive,
    BackDense,
    Explicit,
    FrontDense,
    Uniform,
    Window,
)
from effuse.compress.rewire.asdm_assembly import Blocks, Inherit, Layers, Named, Units
from effuse.evaluate.cost import CountMacs

# ---- key steps


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 60))
def test_uniform_has_ceil_t_over_k_keys(every, steps):
    keys = Uniform(every).of(steps)
    assert len(keys) == math.ceil(steps / every)
    assert keys[0] == 0
    assert set(b - a for a, b in itertools.pairwise(keys)) <= {every}


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.integers(1, 60), st.data(), st.floats(0.3, 4))
def test_dense_keys_are_exactly_as_many_and_begin_at_zero(steps, data, power):
    count = data.draw(st.integers(1, steps))
    for kind in (FrontDense, BackDense):
        keys = kind(steps, count, power).of(steps)
        assert len(keys) == count
        assert keys[0] == 0


def test_front_is_dense_in_front_and_back_at_the_back():
    front, back = FrontDense(30, 6, 2.0).of(30), BackDense(30, 6, 2.0).of(30)
    gaps = [b - a for a, b in itertools.pairwise(front)]
    assert gaps == sorted(gaps)
    assert gaps[0] < gaps[-1]
    gaps = [b - a for a, b in itertools.pairwise(back)]
    assert gaps == sorted(gaps, reverse=True)
    assert FrontDense(30, 6, 1.0).of(30) == BackDense(30, 6, 1.0).of(30)
    # i_j = (j / n)^g (T - 1), by hand for steps that do not meet
    assert FrontDense(100, 4, 2.0).of(100) == (0, 6, 25, 56)


def test_window_inherits_only_inside():
    assert Window(2, 6, every=0).of(8) == (0, 1, 6, 7)
    assert Window(2, 6, every=2).of(8) == (0, 1, 3, 5, 6, 7)
    assert Window(3, 3).of(5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "every=0"),
        (lambda: Uniform(2.0), "every=2.0"),
        (lambda: Explicit((1, 2)), "expected 0 among them"),
        (lambda: Window(0, 4), "start=0"),
        (lambda: Window(4, 2), "stop=2"),
        (lambda: FrontDense(5, 6), "at most steps=5"),
        (lambda: Adaptive(0.0), "tau"),
        (lambda: FrontDense(5, 3).of(6), "steps=6"),
    ],
)
def test_bad_keys_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the clock


def test_clock_follows_levels_not_calls():
    clock = Clock()
    walk = [900, 700, 700, 500, 500, 500, 100, 999, 998]
    steps = [clock.step(level) for level in walk]
    assert [s for s, _ in steps] == [0, 1, 1, 2, 2, 2, 3, 0, 1]
    assert [b for _, b in steps] == [True, *[False] * 6, True, False]
    clock.reset()
    assert clock.step(5) == (0, True)


def test_level_refuses_rows_at_different_steps():
    assert level_of(torch.full((4,), 7)) == 7.0
    assert level_of(torch.tensor(3.5)) == 3.5
    assert level_of(12) == 12.0
    with pytest.raises(ValueError, match="3 to 9"):
        level_of(torch.tensor([3, 9]))


# ---- on real networks

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def unet_run(model, xs, ts, **kwargs):
    with torch.no_grad():
        return [model(x, t, return_dict=False, **kwargs)[0] for x, t in zip(xs, ts, strict=True)]


def noises(count, shape=(2, 3, 16, 16), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(count)]


def test_key_steps_are_bit_exact_and_others_are_not():
    model, xs, ts = tiny_unet(), noises(5), (900, 700, 500, 300, 100)
    plain = unet_run(model, xs, ts)
    with Inherit(Layers(), Uniform(2)).attach(model):
        out = unet_run(model, xs, ts)
    assert [torch.equal(a, b) for a, b in zip(plain, out, strict=True)] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_two_calls_at_a_level_are_one_step():
    """Heun calls twice at each level in the middle of a walk."""
    model = tiny_unet()
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        unet_run(model, noises(6), (900, 600, 600, 300, 300, 0))
        report = handle.report()
    # levels 900, 600, 300, 0 are steps 0 to 3; calls at 900 and 300 are key, and the second one
    # at 600, whose turn comes for the first time
    assert report["key_calls"] == 4
    assert report["calls"] == 6


def test_a_rise_begins_a_run_and_reset_does_too():
    model, xs = tiny_unet(), noises(3)
    plain = unet_run(model, xs, (400, 800, 300))
    with Inherit(Layers(), Explicit((0,))).attach(model) as handle:
        out = unet_run(model, xs[:2], (400, 800))
        handle.reset()
        out += unet_run(model, xs[2:], (300,))
        assert handle.report()["runs"] == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, out, strict=True))


def test_sequential_guidance_halves_do_not_mix():
    model = tiny_unet_cond()
    rng = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 5, 32, generator=rng) for _ in range(2))
    xs = noises(4, (2, 4, 8, 8))

    def walk(order):
        out = []
        with torch.no_grad():
            for x, t in zip(xs, (900, 700, 500, 300), strict=True):
                out.append({id(c): model(x, t, c, return_dict=False)[0] for c in order})
        return out

    with Inherit(Layers(), Uniform(2)).attach(model):
        both = walk([one, two])
    with Inherit(Layers(), Uniform(2)).attach(model):
        alone = walk([one])
    with Inherit(Layers(), Uniform(2)).attach(model):
        # equal content in a new tensor at each call is the same stream
        fresh = []
        with torch.no_grad():
            for x, t in zip(xs, (900, 700, 500, 300), strict=True):
                fresh.append(model(x, t, one.clone(), return_dict=False)[0])
    for a, b, c in zip(both, alone, fresh, strict=True):
        assert torch.equal(a[id(one)], b[id(one)])
        assert torch.equal(c, b[id(one)])


def test_windows_called_one_after_another_do_not_mix():
    """A canvas calls once a window at each step, under the same conditions."""
    model, ts = tiny_unet(), (900, 700, 500, 300)
    windows = [noises(4, seed=s) for s in (1, 2, 3)]
    alone = []
    for xs in windows:
        with Inherit(Layers(), Uniform(2)).attach(model):
            alone.append(unet_run(model, xs, ts))
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        turns = [unet_run(model, xs, (t,) * 3) for *xs, t in zip(*windows, ts, strict=True)]
        assert handle.report()["key_calls"] == 6
    for one, both in zip(alone, zip(*turns, strict=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, both, strict=True))


def test_calls_without_end_at_one_level_compute_and_hold_little(monkeypatch):
    monkeypatch.setattr("effuse.compress.cache.base.TURNS", 3)
    model, xs = tiny_unet(), noises(5)
    plain = unet_run(model, xs, (500,) * 5)
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        once = None
        for x, want in zip(xs, plain, strict=True):
            assert torch.equal(unet_run(model, [x], (500,))[0], want)
            once = once or handle.bytes()
        assert handle.bytes() == 3 * once
        later = unet_run(model, xs, (400,) * 5)
        assert handle.report()["key_calls"] == 7
    fresh = unet_run(model, xs, (400,) * 5)
    assert [torch.equal(a, b) for a, b in zip(later, fresh, strict=True)] == [False] * 3 + [
        True
    ] * 2


def test_conditions_that_change_at_each_step_compute_and_are_forgotten():
    model, xs = tiny_unet_cond(), noises(5, (2, 4, 8, 8))
    with torch.no_grad(), Inherit(Layers(), Explicit((0,))).attach(model) as handle:
        held = []
        for i, x in enumerate(xs):
            model(x, 900 - i, torch.full((2, 5, 32), float(i)))
            held.append(handle.bytes())
        assert handle.report()["key_calls"] == 5
    assert held == [held[0], *[2 * held[0]] * 4]


def test_a_stream_that_was_away_for_a_step_computes():
    """Guidance in two intervals: what is stored is older than the key step it missed."""
    model, xs = tiny_unet_cond(), noises(5, (2, 4, 8, 8))
    one, two = torch.zeros(2, 5, 32), torch.ones(2, 5, 32)
    with torch.no_grad():
        plain = model(xs[4], 300, two, return_dict=False)[0]
        with Inherit(Layers(), Explicit((0, 2))).attach(model):
            for i, (x, t) in enumerate(zip(xs, (900, 700, 600, 500, 300), strict=True)):
                model(x, t, one)
                if i in (0, 1, 4):
                    out = model(x, t, two, return_dict=False)[0]
    assert torch.equal(out, plain)


def test_conditions_changed_in_place_are_another_stream():
    model, xs = tiny_unet_cond(), noises(2, (2, 4, 8, 8))
    text = torch.zeros(2, 5, 32)
    with torch.no_grad(), Inherit(Layers(), Explicit((0,))).attach(model):
        model(xs[0], 900, text)
        text += 1
        out = model(xs[1], 500, text, return_dict=False)[0]
    with torch.no_grad():
        assert torch.equal(out, model(xs[1], 500, text, return_dict=False)[0])


def test_a_stream_that_appears_late_computes_first():
    model, xs = tiny_unet_cond(), noises(3, (2, 4, 8, 8))
    one, two = torch.zeros(2, 5, 32), torch.ones(2, 5, 32)
    with torch.no_grad():
        plain = model(xs[1], 700, two, return_dict=False)[0]
        with Inherit(Layers(), Explicit((0,))).attach(model) as handle:
            model(xs[0], 900, one)
            assert torch.equal(model(xs[1], 700, two, return_dict=False)[0], plain)
            model(xs[2], 500, two)
            assert handle.report()["key_calls"] == 2


def test_change_of_shape_within_a_run_is_an_error():
    model = tiny_unet()
    with Inherit(Layers(), Uniform(2)).attach(model):
        unet_run(model, [X], (900,))
        with pytest.raises(ValueError, match=r"from \(2, 3, 16, 16\).* to \(4, 3, 16, 16\)"):
            unet_run(model, [torch.cat([X, X])], (700,))
        unet_run(model, [torch.cat([X, X])], (999,))  # a new run may have any shape
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        unet_run(model, [X], (900,))
        handle.reset()
        unet_run(model, [X[:1]], (700,))


def test_too_many_steps_for_a_plan_is_an_error():
    model = tiny_unet()
    with (
        Inherit(Layers(), FrontDense(2, 1)).attach(model),
        pytest.raises(ValueError, match="made for 2 steps"),
    ):
        unet_run(model, noises(3), (900, 700, 500))


def test_rows_at_different_steps_are_refused_but_training_is_let_through():
    model = tiny_unet()
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        with pytest.raises(ValueError, match="one call"):
            unet_run(model, [X], (torch.tensor([3, 900]),))
        model.train()
        model(X, torch.tensor([3, 900]))[0].square().mean().backward()
        model.eval()
        assert handle.report()["calls"] == 0
    assert all(p.grad is not None for p in model.parameters())


def test_an_exception_ends_the_run():
    model = tiny_unet()
    with Inherit(Layers(), Explicit((0,))).attach(model) as handle:
        unet_run(model, [X], (900,))
        with pytest.raises(RuntimeError):
            unet_run(model, [X[:, :2]], (950,))  # two channels where three are expected
        out = unet_run(model, [X], (500,))[0]
        assert handle.report()["runs"] == 3
    assert torch.equal(out, unet_run(model, [X], (500,))[0])


def test_two_threads_share_nothing():
    model, ts = tiny_unet(), (900, 700, 500, 300)
    walks = [noises(4, seed=s) for s in (1, 2)]
    want = []
    for xs in walks:
        with Inherit(Layers(), Uniform(2)).attach(model):
            want.append(unet_run(model, xs, ts))
    got: dict[int, list[torch.Tensor]] = {}
    turn = [threading.Event(), threading.Event()]
    with Inherit(Layers(), Uniform(2)).attach(model):

        def work(i):
            got[i] = []
            for x, t in zip(walks[i], ts, strict=True):
                turn[i].wait(20)
                turn[i].clear()
                got[i] += unet_run(model, [x], (t,))
                turn[1 - i].set()

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        turn[0].set()
        for thread in threads:
            thread.join(60)
    for i in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(got[i], want[i], strict=True))


def test_threads_that_run_at_once_share_nothing():
    model, ts = tiny_unet_cond(), tuple(range(990, 0, -66))
    text = [torch.full((1, 5, 32), float(i)) for i in range(3)]
    walks = [noises(len(ts), (1, 4, 8, 8), seed=s) for s in range(3)]

    def walk(i):
        with torch.no_grad():
            pairs = zip(walks[i], ts, strict=True)
            return [model(x, t, text[i].clone(), return_dict=False)[0] for x, t in pairs]

    with Inherit(Layers(), Uniform(3)).attach(model) as handle:
        want = [walk(i) for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(walk, range(3)))
        assert handle.report()["runs"] == 6
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("level", [Blocks(3), Layers(deep=0, store="output")], ids=str)
def test_what_is_stored_is_safe_from_writers(level):
    """FreeU and T2I adapters write into features in place; that must not reach the store."""
    model, xs, ts = tiny_unet_cond(), noises(4, (2, 4, 8, 8)), (900, 700, 500, 300)
    text = torch.zeros(2, 5, 32)

    def walk(**kwargs):
        with torch.no_grad():
            pairs = zip(xs, ts, strict=True)
            return [model(x, t, text, return_dict=False, **kwargs)[0] for x, t in pairs]

    def out_of_place(module, args, kwargs):
        return tuple(a.clone() if torch.is_tensor(a) else a for a in args), {
            k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs.items()
        }

    def writes(module, args, kwargs):
        (args[0] if args else kwargs["hidden_states"]).mul_(1.1)

    with Inherit(level, Explicit((0,))).attach(model):
        outs = []
        for protect in (True, False):
            hooks = []
            for block in model.up_blocks:
                if protect:
                    hooks.append(block.register_forward_pre_hook(out_of_place, with_kwargs=True))
                hooks.append(block.register_forward_pre_hook(writes, with_kwargs=True))
            outs.append(walk())
            for hook in hooks:
                hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_an_inner_cache_makes_up_for_a_key_step_that_an_outer_one_skipped():
    """Outer keys 0 and 3, inner 0 and 2: at 3 the inner one must not give what it kept at 0."""
    model, xs, ts = tiny_unet(), noises(4), (900, 700, 500, 300)
    plain = unet_run(model, xs, ts)
    inside = Inherit(Units(deep=None), Explicit((0, 2)), where=lambda n, m: n[:3] in ("mid", "dow"))
    inner = inside.attach(model)
    with Inherit(Blocks(0), Explicit((0, 3))).attach(model):
        out = unet_run(model, xs, ts)
    inner.detach()
    assert [torch.equal(a, b) for a, b in zip(out, plain, strict=True)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_copy_of_a_cached_network_has_its_own_cache():
    model, xs = tiny_unet(), noises(4)
    with Inherit(Layers(), Uniform(2)).attach(model):
        want = unet_run(model, xs, (900, 700, 500, 300))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0)
        unet_run(twin, xs[:1], (900,))
        again = unet_run(model, xs, (900, 700, 500, 300))
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))
    assert unet_run(twin, xs[:1], (800,))[0].abs().max() == 0


# ---- adaptive


def test_adaptive_follows_the_watched_feature():
    """Named watches its own input: the sample; the change is computed by hand."""
    model = Linear(0.0).eval()
    x = torch.ones(2, 3)
    far = torch.tensor([[1.0], [1.5]])  # the worst row moved by half
    with Inherit(Named(("net",)), Adaptive(0.49)).attach(model) as handle, torch.no_grad():
        for t, x_t in ((9, x), (8, x * 1.4), (7, x * far), (6, x * far * 1.1)):
            model(x_t, t)
        assert handle.report()["key_calls"] == 2
        assert handle.report()["parts_inherited"] == 2


def test_adaptive_ends():
    model, xs, ts = tiny_dit(), noises(4, (2, 4, 8, 8)), (900, 700, 500, 300)
    labels = torch.tensor([1, 2])

    def run(tau):
        with torch.no_grad(), Inherit(Layers(), Adaptive(tau)).attach(model) as handle:
            for x, t in zip(xs, ts, strict=True):
                model(x, timestep=torch.full((2,), t), class_labels=labels)
            return handle.report()["key_calls"]

    assert run(1e-9) == 4
    assert run(1e9) == 1


def test_adaptive_compares_a_feature_with_itself_only():
    """An outer cache hides the first part: what the second one sees has nothing to compare with."""
    model = Two().eval()
    x = torch.ones(1, 3)
    inner = Inherit(Named(("one", "two")), Adaptive(0.1)).attach(model)
    with torch.no_grad(), Inherit(Named(("one",)), Explicit((0,))).attach(model):
        model(x, 9)
        model(x, 8)
        assert inner.report()["parts_computed"] == 3
        model(x, 7)
        assert inner.report()["parts_inherited"] == 1
    inner.detach()


# ---- the line through two key steps


class Ramp(nn.Module):
    """Gives a + b t whatever comes in, in a child of its own."""

    class Net(nn.Module):
        def forward(self, sample, timestep):
            return torch.full_like(sample, 5.0 - 0.25 * timestep)

    def __init__(self):
        super().__init__()
        self.net = self.Net()

    def forward(self, sample, timestep):
        return self.net(sample, timestep)


def test_order_one_is_exact_for_features_that_move_on_a_line():
    model, x = Ramp().eval(), torch.zeros(2, 3, dtype=torch.float64)
    times = (40.0, 37.0, 30.0, 21.0, 11.0, 2.0)
    out = {}
    for order in (0, 1):
        transform = Inherit(Named(("net",)), Explicit((0, 2)), order=order)
        with transform.attach(model):
            out[order] = [float(model(x, t)[0, 0]) for t in times]
    truth = [5.0 - 0.25 * t for t in times]
    # one key step gives no line yet; after two the line goes on
    assert out[1] == pytest.approx([truth[0], truth[0], *truth[2:]], abs=1e-12)
    assert out[0] == pytest.approx([truth[0], truth[0], *[truth[2]] * 4], abs=1e-12)


def test_order_one_takes_two_key_levels_not_two_calls():
    """Heun's second call at a level replaces the value; the line still spans two levels."""
    model, x = Ramp().eval(), torch.zeros(1, 1, dtype=torch.float64)
    with Inherit(Named(("net",)), Explicit((0, 1)), order=1).attach(model) as handle:
        for t in (40.0, 30.0, 30.0):
            model(x, t)
        assert float(model(x, 10.0)) == pytest.approx(2.5, abs=1e-12)
        assert handle.report()["key_calls"] == 3


@pytest.mark.parametrize("level", [Blocks(0), Layers(), Units(deep=None)], ids=str)
def test_order_one_on_a_network(level):
    model, xs, ts = tiny_unet(), noises(5), (900, 700, 500, 300, 100)
    plain = unet_run(model, xs, ts)
    with Inherit(level, Explicit((0, 2)), order=0).attach(model) as handle:
        held = unet_run(model, xs, ts)
        once = handle.report()["cache_bytes"]
    with Inherit(level, Explicit((0, 2)), order=1).attach(model) as handle:
        line = unet_run(model, xs, ts)
        twice = handle.report()["cache_bytes"]
    assert twice == 2 * once
    for i in (0, 2):
        assert torch.equal(line[i], plain[i])
    assert torch.equal(line[1], held[1])
    assert not torch.equal(line[3], held[3])
    with Inherit(level, Uniform(1), order=1).attach(model):
        assert all(torch.equal(a, b) for a, b in zip(unet_run(model, xs, ts), plain, strict=True))


def test_order_is_zero_or_one():
    with pytest.raises(ValueError, match="order=2"):
        Inherit(order=2)


# ---- accounts


class Linear(nn.Module):
    """eps = a(t) x, a child of its own for a gate to stand on."""

    class Net(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = slope

        def forward(self, sample, timestep):
            return (1 + self.slope * timestep) * sample

    def __init__(self, slope):
        super().__init__()
        self.net = self.Net(slope)

    def forward(self, sample, timestep):
        return self.net(sample, timestep)


class Two(nn.Module):
    """Two layers in a row that change nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, sample, timestep):
        return self.two(self.one(sample))


def test_whole_numbers_are_counted_too():
    """Int8 layers run products that torch's own counter does not know."""
    from effuse.compress.quantize.int8 import Int8

    model, labels = tiny_dit(), torch.tensor([1, 2])
    x, t = noises(1, (2, 4, 8, 8))[0], torch.full((2,), 500)
    call = (x,), {"timestep": t, "class_labels": labels}
    Int8().attach(model)
    with CountMacs() as counter, torch.no_grad():
        model(*call[0], **call[1])
    with Inherit(Layers(), Uniform(2)).attach(model) as handle:
        handle.observe([call])
        (cost,) = handle.costs.values()
    assert cost.full == counter.macs
    assert 0 < cost.inherited < cost.full / 2


@pytest.mark.parametrize("level", [Blocks(0), Blocks(1), Layers(), Units(deep=None)], ids=str)
@pytest.mark.parametrize("keys", [Uniform(3), Window(1, 4), FrontDense(5, 2)], ids=str)
def test_accounts_equal_what_a_counter_counts(level, keys):
    model, xs, ts = tiny_unet(), noises(5), (900, 700, 500, 300, 100)
    with Inherit(level, keys).attach(model) as handle:
        handle.observe([((X, 500), {})])
        with CountMacs() as counter:
            unet_run(model, xs, ts)
        report, expected = handle.report(), handle.expected(5)
    assert report["macs"] == counter.macs == expected["macs"]
    with CountMacs() as counter:
        unet_run(model, xs, ts)
    assert report["macs_full"] == counter.macs == expected["macs_full"]
    assert report["macs"] < report["macs_full"]
    keys_run = len(keys.of(5))
    n = report["parts"]
    assert report["key_calls"] == keys_run == expected["key_calls"]
    assert report["parts_computed"] == keys_run * n + (5 - keys_run) * (n - n)
    assert report["parts_computed"] == expected["parts_computed"]
    assert report["parts_inherited"] == (5 - keys_run) * n


def test_calls_of_modules_are_counted_independently():
    """|K| n_all + (T - |K|) (n_all - n_parts), counted by hooks on the convolutions."""
    model, xs, ts = tiny_unet(), noises(5), (900, 700, 500, 300, 100)
    ran = []
    for module in model.modules():
        if hasattr(module, "conv2"):
            module.conv2.register_forward_hook(lambda m, i, o: ran.append(m))
    some = "mid_block"
    level = Units(kinds=("conv",), deep=None)
    where = lambda name, module: name.startswith(some)  # noqa: E731
    with Inherit(level, Uniform(2), where=where).attach(model) as handle:
        n_parts = len(handle.parts)
        unet_run(model, xs, ts)
    n_all = sum(hasattr(m, "conv2") for m in model.modules())
    assert 0 < n_parts < n_all
    assert len(ran) == 3 * n_all + 2 * (n_all - n_parts)


def test_bytes_are_those_of_the_tensors():
    model = tiny_unet()
    with Inherit(Blocks(0), Uniform(2)).attach(model) as handle:
        unet_run(model, [X], (900,))
        # what enters the last decoder layer: 16 channels at full resolution, of two pictures
        assert handle.report()["cache_bytes"] == 2 * 16 * 16 * 16 * 4
        handle.reset()
        assert handle.report()["cache_bytes"] == 0
        assert handle.report()["cache_bytes_peak"] == 2 * 16 * 16 * 16 * 4


def test_side_network_residuals_warn_where_they_are_dropped():
    model = tiny_unet_cond()
    x, text = noises(1, (2, 4, 8, 8))[0], torch.zeros(2, 5, 32)
    down = []
    hooks = [b.register_forward_hook(lambda m, i, o: down.extend(o[1])) for b in model.down_blocks]
    with torch.no_grad():
        model(x, 900, text)
    for hook in hooks:
        hook.remove()
    control = {
        "down_block_additional_residuals": tuple(
            torch.ones_like(r) for r in (torch.zeros(2, 16, 8, 8), *down)
        ),
        "mid_block_additional_residual": torch.ones(2, 32, 4, 4),
    }
    with torch.no_grad(), Inherit(Blocks(0), Uniform(2)).attach(model):
        model(x, 900, text, **control)
        with pytest.warns(UserWarning, match="ControlNet"):
            model(x, 800, text, **control)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with Inherit(Layers(), Uniform(2)).attach(model):
            model(x, 900, text, **control)
            with_control = model(x, 800, text, return_dict=False, **control)[0]
            without = model(x, 800, text, return_dict=False)[0]
    assert not torch.equal(with_control, without)  # they reach the fresh trunk


def test_no_timestep_is_refused():
    with pytest.raises(TypeError, match="timestep"):
        Inherit(Named(("0",))).attach(nn.Sequential(nn.Linear(3, 3)))


def test_covered_gates_must_come_off_first():
    model = tiny_unet()
    one = Inherit(Layers(), Uniform(2)).attach(model)
    two = Inherit(Units(deep=None), Uniform(3)).attach(model)
    with pytest.raises(RuntimeError, match="detach that one first"):
        one.detach()
    two.detach()
    one.detach()
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
