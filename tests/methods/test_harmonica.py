"""The learned cache: soft, full and hard modes, step-wise denoising, image error, penalty."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from tests.tiny import (
    tiny_ddpm,
    tiny_dit,
    tiny_dit_pipe,
    tiny_flux,
    tiny_pixart_pipe,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_unet,
)
from torch import nn

from effuse.bridge import store
from effuse.bridge.pipeline import Walk
from effuse.compress.cache.base import Mixture
from effuse.compress.cache.harmonica import (
    Cumulative,
    Even,
    Fixed,
    Harmonica,
    Keyed,
    Layers,
    Named,
    Router,
    Share,
    Single,
    StepwiseDenoising,
    Units,
    learn_cache,
)
from effuse.compress.cache.keys import Route, Uniform
from effuse.compress.calibrate import network_of, walks
from effuse.core import Denoiser, sample
from effuse.evaluate.cost import CountMacs
from effuse.ops import randn_like
from effuse.processes.vp import Cosine as VP
from effuse.solvers import DDIM, Heun

LABELS = torch.tensor([1, 2])
TIMES = (900, 700, 500, 300, 100)


def noise(seed, shape=(2, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dit_run(model, seeds=range(5), times=TIMES):
    with torch.no_grad():
        return [
            model(noise(k), timestep=torch.full((2,), t), class_labels=LABELS, return_dict=False)[0]
            for k, t in zip(seeds, times, strict=True)
        ]


def everything(handle, steps, levels=()):
    return Route(steps, {part: tuple(range(1, steps)) for part in handle.parts}, levels)


class Weights(Mixture):
    """The same weight everywhere."""

    def __init__(self, value, tau=0.1):
        self.value, self.tau = torch.as_tensor(value), tau

    def weight(self, step, part):
        """Give it."""
        return self.value if step else None


# ---- hard mode


def test_everything_inherited_keeps_first_values_under_fresh_gates_and_runs_each_part_once():
    model = tiny_dit()
    kept: dict[str, torch.Tensor] = {}
    parts = [f"transformer_blocks.{i}.{k}" for i in range(3) for k in ("attn1", "ff")]

    def listen(name):
        def hook(module, args, out):
            kept[name] = out

        return hook

    probe = copy.deepcopy(model)
    for name in parts:
        probe.get_submodule(name).register_forward_hook(listen(name))
    dit_run(probe, [0], [900])
    # the network in which each sub-layer gives what it gave first, and nothing else is changed
    frozen = copy.deepcopy(model)
    for name in parts:
        frozen.get_submodule(name).forward = lambda *a, value=kept[name], **k: value
    handle = Harmonica().attach(model)
    assert list(handle.parts) == parts
    handle.follow(everything(handle, 5))
    ours, theirs = dit_run(model), dit_run(frozen)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ours[1], ours[2])  # gates move with time
    assert handle.report()["parts_computed"] == 2 * 3
    assert handle.report()["parts_inherited"] == 6 * 4


def test_executed_parts_are_those_of_the_table():
    model = tiny_dit()
    handle = Harmonica().attach(model)
    rng = torch.Generator().manual_seed(0)
    table = torch.rand(5, 6, generator=rng) < 0.5
    table[0] = False
    route = Router(5, handle.parts).route(table)
    assert route.count() == int(table.sum())
    handle.follow(route)
    handle.observe([((noise(0),), call_of(900))])
    with CountMacs() as count:
        dit_run(model)
    report = handle.report()
    assert report["parts_inherited"] == int(table.sum())
    assert report["parts_computed"] == int((~table).sum())
    assert handle.expected(5)["macs"] == count.macs == report["macs"]
    assert report["macs_share"] == pytest.approx(count.macs / report["macs_full"])


def call_of(t):
    return {"timestep": torch.full((2,), t), "class_labels": LABELS, "return_dict": False}


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_all_computed_is_the_original_bit_for_bit(make):
    model = make()
    x = noise(3, (2, model.config.in_channels, 8, 8))

    def run():
        more = {"class_labels": LABELS} if make is tiny_dit else {}
        with torch.no_grad():
            levels = [torch.full((2,), t) for t in (900, 500, 100)]
            return [model(x, timestep=t, return_dict=False, **more)[0] for t in levels]

    before = run()
    handle = Harmonica().attach(model)
    assert all(map(torch.equal, before, run()))
    handle.follow(Route(3, {}))
    assert all(map(torch.equal, before, run()))


# ---- soft mode


@pytest.mark.parametrize("level", [Units(deep=None), Layers(deep=None)])
@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_soft_is_full_at_one_and_hard_reuse_at_zero(make, level):
    model = make()
    xs = [noise(k, (2, model.config.in_channels, 8, 8)) for k in range(3)]
    more = {"class_labels": LABELS} if make is tiny_dit else {}

    def run():
        with torch.no_grad():
            pairs = zip(xs, [torch.full((2,), t) for t in (900, 500, 100)], strict=True)
            return [model(x, timestep=t, return_dict=False, **more)[0] for x, t in pairs]

    full = run()
    handle = Harmonica(level=level).attach(model)
    handle.mixture = Weights(1.0)
    for a, b in zip(full, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    handle.mixture = Weights(0.0)
    handle.reset()
    soft = run()
    handle.mixture = None
    handle.follow(everything(handle, 3))
    for a, b in zip(soft, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_blended_is_kept_above_tau_only():
    """o~ = r o + (1 - r) kept, twice over: by hand, for a part that gives its timestep."""

    def walk(r, tau):
        model = Toy(lambda x, t: torch.full_like(x, float(t)))
        handle = Harmonica(level=Named(("a",))).attach(model)
        handle.mixture = Weights(r, tau)
        return [float(model(torch.zeros(1, 1), t)[0]) for t in (8.0, 4.0, 2.0)]

    assert walk(0.25, 0.1) == [8.0, 0.25 * 4 + 0.75 * 8, 0.25 * 2 + 0.75 * 7]
    assert walk(0.25, 0.3) == [8.0, 7.0, 0.25 * 2 + 0.75 * 8]


def test_blending_in_half_precision_accumulates_in_single():
    model = Toy(lambda x, t: torch.full_like(x, 1.0 if t > 5 else 1.0009765625).half())
    handle = Harmonica(level=Named(("a",))).attach(model)
    handle.mixture = Weights(torch.tensor(0.3))
    model(torch.zeros(1, 1).half(), 8.0)
    out = model(torch.zeros(1, 1).half(), 4.0)[0]
    want = (torch.tensor(0.3) * 1.0009765625 + torch.tensor(0.7) * 1.0).half()
    assert out.dtype == torch.float16
    assert torch.equal(out, want.reshape(1, 1))


def test_paused_is_the_teacher_and_leaves_the_store_alone():
    model = tiny_dit()
    full = dit_run(copy.deepcopy(model))
    handle = Harmonica().attach(model)
    handle.follow(everything(handle, 5))
    inherited = dit_run(model)
    handle.reset()
    for k, t in enumerate(TIMES):
        with handle.paused():
            assert torch.equal(dit_run(model, [k], [t])[0], full[k])
        assert torch.equal(dit_run(model, [k], [t])[0], inherited[k])


# ---- learning, on networks that can be worked out by hand


class Part(nn.Module):
    """A part: any function of the sample and the timestep."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        """Give it."""
        return self.function(x, t)


class Toy(nn.Module):
    """The sum of parts a and b, of which b may be missing."""

    def __init__(self, a, b=None):
        super().__init__()
        self.a = Part(a)
        self.b = None if b is None else Part(b)
        self.scale = nn.Parameter(torch.ones(()))  # there is something to freeze
        self.eval()

    def forward(self, sample, timestep):
        """Predict noise."""
        t = float(torch.as_tensor(timestep).reshape(-1)[0])
        out = self.a(sample, t)
        return ((out if self.b is None else out + self.b(sample, t)),)


class ToyDenoiser(Denoiser):
    """The toy as a denoiser; its timestep is 1000 t."""

    def __init__(self, network):
        super().__init__()
        self.network, self.process = network, VP()

    def forward(self, x, t, **cond):
        """Predict."""
        out = self.network(x, float(t) * 1000)[0]
        return self.process.complete(x, t, noise=out)


GRID = torch.linspace(0.9, 0.1, 6, dtype=torch.float64)


def toy_draw(network, solver=None, rows=2):
    def draw(rng):
        x = randn_like(torch.empty(rows, 3, dtype=torch.float64), rng)
        return Walk(ToyDenoiser(network), solver or DDIM(), x, GRID)

    return draw


def goal_of(network, names=("a", "b"), **kwargs):
    handle = Harmonica(level=Named(names)).attach(network)
    draw = toy_draw(network)
    handle.survey(draw(torch.Generator()))
    router = Router(5, handle.parts, rng=torch.Generator().manual_seed(1))
    handle.mixture = router
    saved = torch.ones(len(names))
    return handle, router, StepwiseDenoising(handle, draw, router, saved, **kwargs)


def moving(x, t):
    return (t / 1000) * x


def still(x, t):
    return torch.full_like(x, 0.3)


def test_loss_and_own_trajectory_by_hand():
    """Follow the recurrences of the paper with plain arithmetic, beside the objective."""
    network = Toy(moving, lambda x, t: (t / 1000) ** 2 * x)
    _, router, goal = goal_of(network, penalty=Fixed(0.01), proxy=Even())
    goal.weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rng = torch.Generator().manual_seed(4)
    x = toy_draw(network)(torch.Generator().manual_seed(4)).x
    process, kept = VP(), None
    for i, (t, s) in enumerate(itertools.pairwise(GRID)):
        new = [float(t) * x, float(t) ** 2 * x]
        full = new[0] + new[1]
        if i == 0:
            kept, mixed = new, full
        else:
            r = router.row(i).detach().double()
            blend = [r[k] * new[k] + (1 - r[k]) * kept[k] for k in range(2)]
            kept = [blend[k] if float(r[k]) > 0.1 else kept[k] for k in range(2)]
            mixed = blend[0] + blend[1]
            want = (i + 1) * (full - mixed).square().mean() + 0.01 * r.sum()
            got = goal.loss("router", {}, rng=rng).total
            torch.testing.assert_close(got.detach().double(), want, rtol=1e-6, atol=1e-8)
        a, b = process.alpha(t), process.sigma(t)
        x0 = (x - b * mixed) / a
        x = process.alpha(s) * x0 + process.sigma(s) * mixed
        if i:
            torch.testing.assert_close(goal._x.double(), x, rtol=1e-6, atol=1e-8)


def test_gradient_is_slope_of_sigmoid_times_what_the_new_value_changes():
    """d error / dw = sigmoid'(w) <d error / do, o_new - kept>, for one part of two."""
    network = Toy(moving, still)
    _, router, goal = goal_of(network, penalty=Fixed(0.0), proxy=Even())
    rng = torch.Generator().manual_seed(4)
    x0 = toy_draw(network)(torch.Generator().manual_seed(4)).x
    loss = goal.loss("router", {}, rng=rng)
    loss.total.backward()
    p = VP()
    first = ToyDenoiser(network)(x0, GRID[0])
    x1 = p.advance(x0, GRID[0], GRID[1], first)
    new, kept = float(GRID[1]) * x1, float(GRID[0]) * x0
    r = router.row(1).detach().double()
    off = (r[0] - 1) * (new - kept)  # noise~ - noise: part b did not move
    by_output = 2 * off / off.numel()
    want = r[0] * (1 - r[0]) * (by_output * (new - kept)).sum()
    got = router.rows[0].grad
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=1e-9)
    assert got[1] == 0  # what was kept equals what is new: exactly no gradient


def test_parts_that_never_change_are_given_up_by_the_penalty_alone():
    network = Toy(still, still)
    handle = Harmonica(
        level=Named(("a", "b")), penalty=Fixed(1e-3), lr=0.5, iterations=120, refresh=40
    ).attach(network)
    route = handle.learn(toy_draw(network), progress=False)
    assert route.count() == 2 * 4  # all after the first step
    assert handle.learned["lambda"][1:] == [0.0] * 4
    walk = toy_draw(network)(torch.Generator().manual_seed(9))
    assert torch.equal(handle.run(walk, route), handle.run(walk, Uniform(1)))
    assert network.scale.requires_grad


def test_what_changes_least_is_inherited_at_a_share():
    costly = nn.Linear(3, 3, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.eye_(costly.weight)
    network = Toy(lambda x, t: moving(costly(x), t), lambda x, t: still(costly(x), t))
    handle = Harmonica(
        level=Named(("a", "b")), penalty=Share(0.4), lr=0.2, iterations=160, proxy=Even()
    ).attach(network)
    route = handle.learn(toy_draw(network), progress=False)
    assert route.inherits == {"a": (), "b": (1, 2, 3, 4)}
    assert handle.report()["macs_share"] == pytest.approx(0.6)


def test_learning_needs_one_call_a_step():
    network = Toy(moving)
    handle = Harmonica(level=Named(("a",))).attach(network)
    with pytest.raises(ValueError, match="one call a step"):
        handle.learn(toy_draw(network, Heun()), progress=False)


# ---- the image error


def test_proxies_by_hand():
    """A picture that moves by 10^t where step t inherits."""

    def run(route):
        moved = {t for at in route.inherits.values() for t in at}
        return torch.full((2, 3), sum(10.0**t for t in moved), dtype=torch.float64)

    route = Route(4, {"a": (1, 3), "b": (3,)})
    assert Single().weights(run, route).tolist() == [0, 3 * 10.0**2, 0, 3 * 10.0**6]
    assert Cumulative().weights(run, route).tolist() == [0, 10.0**2, 0, 10.0**6]
    assert Even().weights(run, route) is None
    nothing = Route(4, {})
    assert not Single().weights(run, nothing).any()
    assert not Cumulative().weights(run, nothing).any()


def test_lambda_is_the_change_of_the_final_sample():
    network = Toy(moving)
    handle, router, goal = goal_of(network, ("a",), penalty=Fixed(0.0))
    for w in router.rows:
        w.data.fill_(-4.0)
    router.rows[1].data.fill_(4.0)  # step 2 computes
    goal.refreshed(torch.Generator().manual_seed(3))
    walk = toy_draw(network)(torch.Generator().manual_seed(3))
    with handle.paused():
        full = sample(*walk)
    assert goal.weights[[0, 2]].tolist() == [0, 0]
    for t in (1, 3, 4):
        x = walk.x
        outs = []
        for i, (a, b) in enumerate(itertools.pairwise(GRID)):
            eps = float(a) * x if i != t else outs[-1]
            outs.append(eps)
            x = VP().advance(x, a, b, VP().complete(x, a, noise=eps))
        want = (x - full).square().sum(1).mean()
        assert float(goal.weights[t]) == pytest.approx(float(want), rel=1e-6)
    assert handle.mixture is router


# ---- the penalty


def test_share_turns_beta_up_while_too_much_is_computed_and_reaches_the_share():
    saved = torch.tensor([1.0, 3.0])
    share = Share(0.5, beta=0.1, rate=2.0)
    assert share.costs(saved).tolist() == [0.5, 1.5]
    table = torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    # (1 + 3 + 0.5 + 3) / 8 computed, half of it is too much
    assert share.next(0.1, table, saved) == pytest.approx(0.1 * 2.718281828459045 ** (0.875))
    assert share.next(0.1, 0 * table, saved) < 0.1
    r = torch.tensor([[1.0, 1.0], [0.4, 0.2], [0.3, 0.9]])
    out = Share(0.3).inherits(r, saved, 0.1)  # 3.6 of 12: 0.2 saves 3, 0.3 the fourth
    assert out.tolist() == [[False, False], [False, True], [True, False]]
    assert not Share(0.0).inherits(r, saved, 0.1).any()
    assert Fixed().inherits(r, saved, 0.3).tolist() == [[False] * 2, [False, True], [True, False]]


def test_learning_can_begin_with_a_plain_cache():
    router = Router(6, ["a", "b"], start=Keyed(Uniform(2), 3.0))
    assert [row.tolist() for row in router.rows] == [[s * 3.0] * 2 for s in (-1, 1, -1, 1, -1)]
    with torch.no_grad():
        assert float(router.weight(1, "a")) < router.tau < float(router.weight(2, "b"))
    drawn = Router(6, ["a", "b"], rng=torch.Generator().manual_seed(0))
    assert len({float(w) for row in drawn.rows for w in row}) == 10
    with pytest.raises(ValueError, match=r"size=6"):
        Keyed(size=6)
    with pytest.raises(TypeError, match="a Keys"):
        Keyed(keys=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Start"):
        Harmonica(start=1.0)  # type: ignore[arg-type]


def test_logits_stay_within_five():
    router = Router(3, ["a"])
    router.rows[0].data.fill_(40.0)
    router.rows[1].data.fill_(-40.0)
    router.clamp()
    assert [w.item() for w in router.rows] == [5.0, -5.0]
    assert router.weight(0, "a") is None
    assert router.weight(2, "a").item() == pytest.approx(1 / (1 + 2.718281828459045**5))


# ---- pipelines


def pictures(pipe, what, steps=4, seed=0, **kwargs):
    rng = torch.Generator().manual_seed(seed)
    kwargs |= {"num_inference_steps": steps, "generator": rng, "output_type": "latent"}
    return torch.as_tensor(pipe(what, **kwargs).images)


def learned(pipe, what, **kwargs):
    how = Harmonica(penalty=Share(0.5), iterations=9, lr=0.5, refresh=6, **kwargs)
    return learn_cache(pipe, what, steps=4, batch=1, how=how, progress=False)


@pytest.mark.parametrize(
    ("make", "what"), [(tiny_dit_pipe, [1, 2]), (tiny_sd, ["a cat", "a dog"])], ids=["dit", "sd"]
)
def test_on_a_pipeline_with_guidance_it_saves_and_comes_back(make, what, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = make()
    plain = pictures(pipe, what)
    handle = learned(pipe, what)
    report = handle.report()
    assert 0 < report["macs_share"] < 1
    assert report["calls"] == 0  # learning is not counted
    out = pictures(pipe, what)
    assert not torch.equal(out, plain)
    one = pictures(pipe, what[:1], seed=3)  # another batch size is another run
    report = handle.report()
    route = handle.route
    assert report["parts_inherited"] == 2 * route.count()
    assert handle.report()["calls"] == 2 * 4  # both halves of guidance in one call
    store.save(pipe, tmp_path, [("transformer" if make is tiny_dit_pipe else "unet", handle)])
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(pictures(again, what), out)
    assert torch.equal(pictures(again, what[:1], seed=3), one)
    with pytest.raises(ValueError, match="route was made for"):
        pictures(pipe, what, steps=3)
    handle.detach()
    assert torch.equal(pictures(pipe, what), plain)


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path):
    pipe = tiny_dit_pipe()
    handle = learned(pipe, [1, 2])
    want = pictures(pipe, [1, 2])
    store.save(pipe, tmp_path / "pipe", [("transformer", handle)])
    torch.save(want, tmp_path / "want.pt")
    code = (
        "import sys, torch, effuse\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + '/pipe')\n"
        "out = pipe([1, 2], num_inference_steps=4, output_type='latent',\n"
        "           generator=torch.Generator().manual_seed(0)).images\n"
        "assert torch.equal(torch.as_tensor(out), torch.load(sys.argv[1] + '/want.pt'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)


def test_trajectories_of_a_pipeline_share_levels_and_differ_in_noise():
    draw = walks(tiny_dit_pipe(), [1, 2, 3], steps=4, batch=2)
    rng = torch.Generator().manual_seed(0)
    one, two = draw(rng), draw(rng)
    assert torch.equal(one.times, two.times)
    assert len(one.times) == 5
    assert one.x.shape == two.x.shape == (2, 4, 8, 8)
    assert not torch.equal(one.x, two.x)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Harmonica(tau=1.0), ValueError, "tau=1.0"),
        (lambda: Harmonica(lr=0.0), ValueError, "lr=0"),
        (lambda: Harmonica(penalty=0.5), TypeError, "penalty=0.5"),
        (lambda: Harmonica(proxy="single"), TypeError, "proxy='single'"),
        (lambda: Share(1.0), ValueError, "reuse=1.0"),
        (lambda: Fixed(-1.0), ValueError, "beta=-1"),
        (lambda: Route(3, {"a": (0, 1)}), ValueError, "a inherits at steps"),
        (lambda: Route(3, {"a": (3,)}), ValueError, "1 to 2"),
        (lambda: Route(3, {}, (1.0,)), ValueError, "1 levels"),
        (lambda: Harmonica().attach(tiny_dit()).follow(Route(3, {"x": (1,)})), ValueError, "'x'"),
        (lambda: Harmonica().attach(nn.Linear(2, 2)), TypeError, "Linear"),
    ],
)
def test_bad_input_says_what_was_expected(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "what", "more"),
    [
        (tiny_sdxl, ["a cat"], {}),
        (tiny_sd3, ["a cat"], {}),
        (tiny_flux, ["a cat"], {"height": 16, "width": 16}),
        (tiny_pixart_pipe, ["a cat"], {"use_resolution_binning": False}),
        (tiny_ddpm, 1, {}),
    ],
    ids=["sdxl", "sd3", "flux", "pixart", "ddpm"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_learns_on_every_family_in_single_and_half_precision(make, what, more, dtype):
    if dtype == torch.bfloat16 and make is not tiny_sd3:
        pytest.skip("one family shows it")
    pipe = make()
    pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    handle = Harmonica(penalty=Share(0.3), iterations=4, lr=0.5, refresh=2).attach(network_of(pipe))
    size = 16 if "height" in more else None
    route = handle.learn(walks(pipe, what, steps=3, batch=1, size=size), progress=False)
    assert route.count() > 0
    # the stock pipeline, with its own scheduler, is on the same schedule and follows the route
    asked = {"batch_size": what} if what == 1 else {"prompt": what}
    rng = torch.Generator().manual_seed(0)
    form = "np" if what == 1 else "latent"
    out = pipe(**asked, num_inference_steps=3, generator=rng, output_type=form, **more).images
    assert torch.as_tensor(out).isfinite().all()
    assert handle.report()["parts_inherited"] == route.count()
    handle.detach()


def test_a_stopped_learning_leaves_the_network_as_it_was():
    pipe = tiny_dit_pipe()
    plain = pictures(pipe, [1])
    how = Harmonica(penalty=Share(0.5), iterations=3)
    with pytest.raises(ValueError, match="one step"):
        learn_cache(pipe, [1], steps=1, batch=1, how=how, progress=False)
    assert torch.equal(pictures(pipe, [1]), plain)
    assert all(p.requires_grad for p in pipe.transformer.parameters())
