"""EcoDiff: gates in closed form, gradients through whole walks, the right members go, on disk."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
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
)

import effuse
from effuse.bridge import store
from effuse.compress.calibrate import network_of, uniform_calls, walks
from effuse.compress.groups import groups, masked, member_params
from effuse.compress.prune.ecodiff import (
    L0,
    L1,
    L2,
    Binary,
    BoundedL1,
    Budget,
    Curvature,
    EcoDiff,
    EndToEnd,
    HardConcrete,
    PerKind,
    PerLayer,
    Soft,
    Threshold,
    _example,
)
from effuse.compress.prune.members import Magnitude, Random, Taylor
from effuse.compress.units import parameters
from effuse.core import sample
from effuse.core.training import fit
from effuse.solvers import DDIM

QUICK = EcoDiff(PerLayer(0.5), samples=2, steps=2, accumulate=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- gates


def test_gate_by_hand():
    gate = HardConcrete(temperature=0.5, gamma=-0.2, zeta=1.3, smoothing=0.5)
    u, logit = 0.7, -0.4
    s = 1 / (1 + math.exp(-(math.log(1.2) - math.log(0.8) - 0.4) / 0.5))
    drawn = gate.draw(*(torch.tensor([v], dtype=torch.float64) for v in (logit, u)))
    assert float(drawn) == pytest.approx(1.5 * s - 0.2, rel=1e-12)
    assert float(gate.median(torch.tensor(0.0))) == pytest.approx(0.55)
    # the noise is bounded by log((1 + e) / e)
    ends = gate.draw(torch.zeros(2).double(), torch.tensor([0.0, 1.0]).double())
    low = 1.5 / (1 + 3**2) - 0.2
    assert ends.tolist() == pytest.approx([max(low, 0), min(1.5 - 0.2 - (low + 0.2), 1)])


@pytest.mark.parametrize("logit", [-1.5, 0.3, 2.0])
def test_gate_probabilities_are_those_of_a_monte_carlo(logit):
    gate, n = HardConcrete(smoothing=0.0), 400_000
    drawn = gate.draw(torch.tensor(logit), torch.rand(n, generator=seeded(3)))
    for count, p in (((drawn > 0), gate.open), ((drawn == 1), gate.full)):
        expected = float(p(torch.tensor(logit)))
        assert float(count.double().mean()) == pytest.approx(expected, abs=4 * 0.5 / n**0.5)
    assert float(gate.open(torch.tensor(logit))) == pytest.approx(
        1 / (1 + math.exp(-(logit - 0.83 * math.log(0.1 / 1.1)))), rel=1e-6
    )


def test_other_gates():
    x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    assert torch.equal(Soft().draw(x, x), torch.sigmoid(x))
    hard = Binary(at=0.5).draw(x, x)
    assert hard.tolist() == [0.0, 0.0, 1.0]
    hard.sum().backward()
    s = torch.sigmoid(x.detach() - 0.5)
    torch.testing.assert_close(x.grad, s * (1 - s))
    for bad in ({"temperature": 0}, {"gamma": 0.1}, {"zeta": 1.0}, {"smoothing": -1}):
        with pytest.raises(ValueError, match="expected"):
            HardConcrete(**bad)


def test_penalties_by_hand():
    """The mean over layers, not over members: small layers count as much as large ones."""
    logits = [torch.tensor([1.0, -3.0]), torch.tensor([4.0])]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    assert float(L1().of(logits)) == pytest.approx((2 + 4) / 2)
    assert float(L2().of(logits)) == pytest.approx((5 + 16) / 2)
    bounded = ((sigmoid(1.4) + sigmoid(-0.2)) / 2 + sigmoid(2.6)) / 2
    assert float(BoundedL1().of(logits)) == pytest.approx(bounded)
    b = 0.83 * math.log(0.1 / 1.1)
    opened = ((sigmoid(1 - b) + sigmoid(-3 - b)) / 2 + sigmoid(4 - b)) / 2
    assert float(L0().of(logits)) == pytest.approx(opened)


# ---- the loss


def example_of(pipe, rng, **kwargs):
    return _example(walks(pipe, **{"steps": 3, "batch": 2, **kwargs})(rng), rng)


def test_the_gradient_is_that_of_plain_backward_through_all_steps():
    """In float64, for fixed noise of the masks, through guidance and a transformer."""
    pipe = tiny_dit_pipe()
    pipe.transformer.double().requires_grad_(False).eval()
    e = example_of(pipe, seeded(), guidance=3.0)
    e = e._replace(x=e.x.double(), target=torch.zeros_like(e.target).double())
    goal = EndToEnd(QUICK.attach(pipe.transformer), [e]).double()
    goal.loss("masks", {"index": torch.tensor([0])}, rng=seeded(7)).total.backward()
    found = [p.grad.clone() for p in goal.masks]
    goal.zero_grad()
    masks, x = goal.drawn(seeded(7)), e.x
    with masked(pipe.transformer, masks):
        for t, s in zip(e.times[:-1], e.times[1:], strict=True):
            x = e.solver.step(e.denoiser, x, t, s).x
    (x.square().mean() + QUICK.beta * L1().of(list(goal.masks))).backward()
    apart = torch.cat(found) - torch.cat([p.grad for p in goal.masks])
    assert apart.norm() < 1e-10 * torch.cat(found).norm()
    # far above what the penalty alone gives: the walk's own gradient is really there
    assert torch.cat(found).std() > 1e-7


def test_open_masks_lose_nothing_and_have_no_gradient():
    pipe = tiny_sd()
    network = network_of(pipe).requires_grad_(False)
    how = dataclasses.replace(QUICK, start=torch.inf, beta=0.0)
    e = example_of(pipe, seeded(), what=["a", "b"])
    goal = EndToEnd(how.attach(network), [e])
    loss = goal.lost(0, goal.drawn(seeded()))
    loss.backward()
    assert float(loss.detach()) < 1e-12
    assert all(not p.grad.any() for p in goal.masks)
    # and the target is what sampling gives, from the noise that was there
    denoiser, solver, x, times = walks(pipe, ["a", "b"], steps=3, batch=2)(seeded())
    torch.testing.assert_close(e.target, sample(denoiser, solver, x, times), rtol=0, atol=0)


def test_stochastic_samplers_end_where_they_ended():
    """The same noise in the masked walk: open masks still lose nothing."""
    pipe = tiny_sd()
    network_of(pipe).requires_grad_(False)
    e = example_of(pipe, seeded(), what=["a", "b"], solver=DDIM(eta=1.0))
    goal = EndToEnd(dataclasses.replace(QUICK, start=torch.inf).attach(pipe.unet), [e])
    assert float(goal.lost(0, goal.drawn(seeded())).detach()) < 1e-12


def test_curvature_is_the_length_of_the_jacobian():
    """By differences of the end, member by member, in float64."""
    pipe = tiny_dit_pipe()
    pipe.transformer.double().requires_grad_(False).eval()
    e = example_of(pipe, seeded(), guidance=3.0, batch=1)
    e = e._replace(x=e.x.double(), target=e.target.double())
    goal = EndToEnd(QUICK.attach(pipe.transformer), [e]).double()
    found = Curvature(200).scores(goal, seeded(5))
    whole = {g.name: torch.ones(g.size, dtype=torch.float64) for g in goal.groups}
    mine, exact = [], []
    for g in goal.groups[:4]:
        for i in range(min(g.size, 6)):
            ends = []
            for sign in (1, -1):
                moved = whole | {g.name: whole[g.name].clone()}
                moved[g.name][i] += sign * 1e-4
                with torch.no_grad():
                    ends.append(goal.end(0, moved))
            exact.append(float((ends[0] - ends[1]).norm() / 2e-4))
            mine.append(float(found[g.name][i]))
    ratio = torch.tensor(mine) / torch.tensor(exact)
    assert 0.6 < ratio.min() <= ratio.max() < 1.5
    assert ratio.mean() == pytest.approx(1, abs=0.1)


# ---- learning


@torch.no_grad()
def dead(model, share=7 / 8, seed=0):
    """Cut a share of the neurons off by weights of zero; return their names and numbers."""
    out = {}
    for g in groups(model):
        if g.kind == "neurons":
            gone = torch.randperm(g.size, generator=seeded(seed))[: int(share * g.size)]
            weight = model.get_submodule(g.taps[0].module).weight
            weight *= 30  # against the gates of a network that was never trained
            weight[:, gone] = 0
            out[g.name] = sorted(set(range(g.size)) - set(gone.tolist()))
    return out


@pytest.mark.parametrize("end_to_end", [True, False])
@pytest.mark.parametrize("by", [None, Curvature(4)])
def test_what_the_sample_does_not_need_goes(end_to_end, by):
    """Seven of eight neurons are dead: exactly they are cut, and the answer stays."""
    pipe = tiny_dit_pipe()
    network = network_of(pipe)
    alive = dead(network)
    # half open at first: who matters opens, and only the penalty pulls at a dead neuron
    how = EcoDiff(PerLayer(1 / 8), ("neurons",), beta=1e-6, start=0.5, samples=2, steps=60)
    quiet = HardConcrete(smoothing=10)
    handle = dataclasses.replace(how, accumulate=1, gate=quiet, by=by).attach(network)
    wanted = [p.requires_grad for p in network.parameters()]
    model = effuse.wrap(pipe)
    x = model.prior(2, rng=seeded(1))
    before = model.sample([1, 2], steps=3, latents=x, decode=False)
    if end_to_end:
        handle.learn(walks(pipe, [1, 2, 3], steps=2, batch=2, guidance=1.0), progress=False)
    else:
        handle.observe([b["call"] for b in uniform_calls(pipe, 4, count=3, steps=2)])
    assert handle.kept == alive
    after = model.sample([1, 2], steps=3, latents=x, decode=False)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert [p.requires_grad for p in network.parameters()] == wanted
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_a_stopped_run_goes_on(tmp_path):
    draw = walks(tiny_dit_pipe(), [1, 2], steps=2, batch=1)
    how = dataclasses.replace(QUICK, steps=4)

    def learn(how, folder):
        pipe = tiny_dit_pipe()
        draw = walks(pipe, [1, 2], steps=2, batch=1)
        return how.attach(pipe.transformer).learn(
            draw, rng=seeded(3), progress=False, folder=folder
        )

    learn(dataclasses.replace(how, steps=2), tmp_path / "a")
    resumed, whole = learn(how, tmp_path / "a"), learn(how, tmp_path / "b")
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)
    del draw


# ---- who stays


def test_counts_are_floors_and_ties_go_to_the_first():
    model = tiny_dit()
    found = [g for g in groups(model) if g.kind == "neurons"]
    n = found[0].size
    level = {g.name: torch.zeros(n) for g in found}
    kept = PerLayer(0.35).choose(model, found, level)
    assert all(k == list(range(math.floor(0.35 * n))) for k in kept.values())
    level[found[1].name] += 1
    kept = PerKind(0.5).choose(model, found, level)
    assert [len(kept[g.name]) for g in found] == [n // 2, n, 0]
    assert all(len(k) == n for k in PerKind(1).choose(model, found, level).values())
    assert not any(PerLayer(0).choose(model, found, level).values())
    assert [len(k) for k in Threshold(0.5).choose(model, found, level).values()] == [0, n, 0]
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="expected a fraction"):
            PerKind(bad)


def test_kinds_do_not_compete():
    model = tiny_dit()
    found = groups(model)
    scores = {g.name: torch.full((g.size,), float(g.kind == "heads")) for g in found}
    kept = PerKind(0.5).choose(model, found, scores)
    for kind in ("heads", "neurons"):
        mine = [g for g in found if g.kind == kind]
        assert sum(len(kept[g.name]) for g in mine) == sum(g.size for g in mine) // 2


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.7])
def test_a_budget_is_met_and_not_missed_by_a_member(keep):
    model = tiny_dit()
    total, found = parameters(model), groups(model)
    handle = EcoDiff(Budget(keep)).attach(model)
    handle.logits = Random(1).scores(model, found, [])
    handle.cut()
    most = max(member_params(tiny_dit(), g) for g in found)
    assert keep * total - most <= parameters(model) <= keep * total + 1e-6
    assert handle.report()["kept"] <= keep + 1e-9
    with pytest.raises(ValueError, match=r"expected at least 0\.[0-9]+; .* is the most"):
        handle.cut(Budget(0.01))


def test_rivals_know_dead_neurons():
    pipe = tiny_dit_pipe()
    network = network_of(pipe)
    alive = dead(network)
    found = [g for g in groups(network) if g.kind == "neurons"]
    batches = uniform_calls(pipe, 2, count=2, steps=2)
    for worth in (Taylor(),):
        scores = worth.scores(network, found, batches)
        for g in found:
            assert not scores[g.name][[i not in alive[g.name] for i in range(g.size)]].any()
            assert (scores[g.name][alive[g.name]] > 0).all()
    scores = Magnitude().scores(network, found, [])
    g = found[0]
    first, last = (network.get_submodule(f"{g.name}.net.{p}") for p in ("0.proj", "2"))
    mine = torch.cat([first.weight[3], first.bias[3:4], last.weight[:, 3]]).detach().double()
    assert float(scores[g.name][3]) == pytest.approx(float(mine.square().mean().sqrt()))
    with pytest.raises(ValueError, match="target"):
        Taylor().scores(network, found, [{"call": ((), {})}])


# ---- taken off, kept, refused


def test_another_share_begins_from_the_whole_and_healing_comes_off():
    pipe = tiny_sd()
    network = network_of(pipe)
    teacher = copy.deepcopy(network)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    handle = QUICK.attach(network)
    handle.learn(walks(pipe, ["a", "b"], steps=2, batch=1), progress=False)
    half = parameters(network)
    handle.cut(PerLayer(0.75))
    assert half < parameters(network) < handle.total
    handle.cut(PerLayer(1.0))
    assert handle.kept == {}
    assert handle.objective(teacher) is None
    assert parameters(network) == handle.total
    handle.cut(PerLayer(0.5))
    objective = handle.objective(teacher)
    calls = uniform_calls(pipe, ["a", "b"], count=2, batch=2, steps=2)
    with torch.no_grad():
        first = float(objective.loss("student", calls[0]).total)
    optimizer = torch.optim.Adam(objective.parameters_of("student"), lr=1e-3)
    fit(objective, calls, optimizer, steps=10, progress=False)
    with torch.no_grad():
        assert float(objective.loss("student", calls[0]).total) < 0.9 * first
    with pytest.raises(ValueError, match="healed already"):
        handle.cut(PerLayer(0.75))
    handle.detach()
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pipe = tiny_dit_pipe()
    pipe.transformer.to(dtype)
    handle = QUICK.attach(pipe.transformer)
    logits = handle.learn(walks(pipe, [1, 2], steps=2, batch=1), progress=False)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in logits.values())
    assert {p.dtype for p in pipe.transformer.parameters()} == {dtype}
    assert effuse.wrap(pipe).sample([1], steps=2, rng=seeded()).isfinite().all()


def test_odd_requests_are_refused():
    with pytest.raises(ValueError, match="no heads or neurons"):
        EcoDiff().attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing was learnt"):
        EcoDiff().attach(tiny_dit()).cut()
    with pytest.raises(ValueError, match="no calls"):
        EcoDiff().attach(tiny_dit()).observe([])
    for bad in ({"kinds": ("layers",)}, {"rates": {}}, {"beta": -1.0}, {"steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            EcoDiff(**bad)
    with pytest.raises(TypeError, match="expected Curvature"):
        EcoDiff(by="curvature")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draws"):
        Curvature(0)
    pipe = tiny_dit_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0 of DDIM"):
        QUICK.attach(pipe.transformer).learn(walks(pipe, [1], steps=2, batch=1), progress=False)
    assert all(p.requires_grad for p in pipe.transformer.parameters())


# ---- on disk

SIZE = {"height": 16, "width": 16}
PIPES = {
    "ddpm": (tiny_ddpm, {}, 2),
    "sd": (tiny_sd, {"prompt": "ab"}, ["ab"]),
    "sdxl": (tiny_sdxl, {"prompt": "ab", **SIZE}, ["ab"]),
    "dit": (tiny_dit_pipe, {"class_labels": [1]}, [1]),
    "pixart": (tiny_pixart_pipe, {"prompt": "ab", "use_resolution_binning": False}, ["ab"]),
    "sd3": (tiny_sd3, {"prompt": "ab", **SIZE}, ["ab"]),
    "flux": (tiny_flux, {"prompt": "ab", **SIZE}, ["ab"]),
}
READ = """
import json, sys
from pathlib import Path
import numpy, torch
import effuse
from diffusers import DiffusionPipeline

for folder in sorted(Path(sys.argv[1]).iterdir()):
    given = json.loads((folder / "given").read_text())
    expected = numpy.load(folder / "expected.npy")
    pipe = DiffusionPipeline.from_pretrained(folder / "after")
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    picture = pipe(**given, num_inference_steps=2, output_type="np", generator=rng).images
    assert (picture == expected).all(), folder.name
"""


def learnt(name):
    """Learn on whole walks of a tiny pipeline; cut half of every layer, and one layer whole."""
    make, given, what = PIPES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    network = network_of(pipe)
    handle = dataclasses.replace(QUICK, kinds=("heads", "neurons", "channels")).attach(network)
    handle.learn(walks(pipe, what, steps=2, batch=1), progress=False)
    kept = dict(handle.kept)
    kept[next(iter(kept))] = []
    handle.narrow(kept)
    return pipe, network, handle, given


def test_trajectories_of_every_shape_can_be_learnt_from():
    for name in PIPES:
        _, network, handle, _ = learnt(name)
        spread = torch.cat(list(handle.logits.values())).std()
        assert spread > 0, name
        assert handle.report()["kept"] < 0.95, name
        assert len(handle.report()["emptied"]) >= 1, name
        text = json.loads(json.dumps(handle.plan()))
        fresh = network_of(PIPES[name][0]())
        QUICK.restore(fresh, text)
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {
            k: v.shape for k, v in network.state_dict().items()
        }


@pytest.mark.slow
def test_all_shapes_come_back_in_a_fresh_process(tmp_path):
    """Smaller by what is gone, and the same picture to the last bit."""
    for name in PIPES:
        pipe, network, handle, given = learnt(name)
        folder = tmp_path / name
        part = next(n for n, m in pipe.components.items() if m is network)
        store.save(PIPES[name][0](), folder / "before")
        store.save(pipe, folder / "after", [(part, handle)])

        def size(which, folder=folder, part=part):
            return sum(f.stat().st_size for f in (folder / which / part).glob("*.safetensors"))

        freed = 4 * (handle.total - parameters(network))
        assert size("before") - size("after") > 0.99 * freed > 0
        rng = seeded()
        picture = pipe(**given, num_inference_steps=2, output_type="np", generator=rng).images
        np.save(folder / "expected.npy", picture)
        Path(folder / "given").write_text(json.dumps(given))
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, timeout=300)
