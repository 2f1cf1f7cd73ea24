"""DAREx: moments of the error, best q, masks, exactness, files, LoRA, merging, and AdamR."""

from __future__ import annotations

import math
import tracemalloc
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effuse.compress.prune.darex import (
    Delta,
    Pruned,
    analytical_q,
    closed_q,
    error_moments,
    merge,
    merge_files,
    random_keep,
    sub_gaussian,
)
from effuse.compress.prune.rescale import (
    Change,
    Labels,
    TopLogits,
    average_q,
    find_q,
    learn_q,
    output_change,
    select,
)
from effuse.optim import AdamR


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two(scale=0.1):
    base = {"a.weight": normal(40, 50), "a.bias": normal(40, seed=1), "head": normal(5, 40, seed=2)}
    tuned = {k: v + normal(*v.shape, seed=9, scale=scale) for k, v in base.items()}
    return tuned, base


@pytest.mark.parametrize("q", [0.1, 0.3])
def test_moments_against_draws(q):
    c = normal(64, seed=3).double() + 0.2
    p = 0.9
    keep = torch.rand(200_000, 64, generator=torch.Generator().manual_seed(0)) >= p
    error = (c * (1 - keep.double() / q)).sum(1)
    mean, variance = error_moments(c, p, q)
    assert float(error.mean()) == pytest.approx(float(mean), abs=0.15)
    assert float(error.var()) == pytest.approx(float(variance), rel=0.02)
    assert (float(mean) == pytest.approx(0, abs=1e-9)) == (q == 0.1)


def test_closed_q_is_the_minimum_and_has_its_limits():
    c = (0.004 + normal(32, 512, scale=0.02).double()) * (0.5 + normal(64, 1, 512, seed=1).double())
    s1, s2 = c.sum(-1), c.square().sum(-1)
    q = closed_q(0.99, s1, s2)

    def power(q):
        mean, variance = error_moments(c, 0.99, q)
        return float((mean.square() + variance).mean())

    assert 0.01 < q < 1
    assert power(q) < min(power(0.97 * q), power(1.03 * q), power(0.01))
    one = torch.ones(1)
    assert closed_q(0.9, one, one) == pytest.approx(1)
    assert closed_q(0.9, one, 0 * one) == pytest.approx(0.1)


def test_sub_gaussian_constant():
    assert sub_gaussian(0.5) == 0.5
    assert sub_gaussian(0.5001) == pytest.approx(0.5, abs=1e-6)
    assert sub_gaussian(0.9) == pytest.approx(sub_gaussian(0.1))
    assert sub_gaussian(0.99) == pytest.approx(0.98 / math.log(99))


def test_analytical_q_by_hand():
    p, eta, gamma = 0.9, 0.5, 0.95
    s1, s2 = torch.tensor([-20.0]), torch.tensor([1.0])

    def size(q):
        bias = eta * (1 - 0.1 / q) * -20
        return abs(bias + eta**2 * sub_gaussian(p) / (4 * q * q) + math.log(2 / (1 - gamma)))

    grid = [0.1 + 0.001 * i for i in range(900)]
    assert analytical_q(s1, s2, p, eta=eta) == pytest.approx(min(grid, key=size), abs=1e-9)


def test_nothing_dropped_is_the_fine_tune_bit_for_bit():
    tuned, base = two()
    found = Delta.between(tuned, base).prune(0.0).rescale(1.0).apply(base)
    assert all(torch.equal(found[k], tuned[k]) for k in tuned)


@pytest.mark.parametrize("structure", ["element", "column", "row"])
def test_dare_is_unbiased_and_its_mask_is_its_seed(structure):
    tuned, base = two()
    delta = Delta.between(tuned, base)
    runs = [delta.prune(0.5, seed=s, structure=structure).apply(base) for s in range(300)]
    mean = torch.stack([r["a.weight"] for r in runs]).mean(0)
    assert (mean - tuned["a.weight"]).abs().max() < 0.1
    one, same = (delta.prune(0.5, seed=3, structure=structure) for _ in range(2))
    assert torch.equal(one.change("a.weight"), same.change("a.weight"))
    other = delta.prune(0.5, seed=4, structure=structure)
    assert not torch.equal(one.change("a.weight"), other.change("a.weight"))
    gone = one.change("a.weight") == 0
    along = {"element": None, "column": 0, "row": 1}[structure]
    if along is not None:
        assert torch.equal(gone.all(along), gone.any(along))
    d = delta["a.weight"]
    assert torch.allclose(one.change("a.weight")[~gone], 2 * d[~gone], rtol=1e-6)


def test_share_dropped_is_binomial():
    keep = random_keep((400, 500), 0.99, "element", 0, "w")
    assert abs(int(keep.sum()) - 2000) < 5 * math.sqrt(200_000 * 0.01 * 0.99)


def test_importance_keeps_the_largest():
    tuned, base = two()
    delta = Delta.between(tuned, base, dense=["head"])
    found = delta.prune(0.9, "magnitude").change("a.weight")
    d = delta["a.weight"]
    kept = found != 0
    assert int(kept.sum()) == 200
    assert d[kept].abs().min() > d[~kept].abs().max()
    torch.testing.assert_close(found[kept], d[kept], rtol=1e-6, atol=0)
    norms = torch.linspace(0.1, 10, 50)
    rows = delta.prune(0.9, "wanda", norms={"a.weight": norms}).change("a.weight") != 0
    assert rows.sum(1).tolist() == [5] * 40
    score = d.abs() * norms
    assert (score.masked_fill(~rows, 99).amin(1) > score.masked_fill(rows, 0).amax(1)).all()
    assert torch.equal(delta.prune(0.9).apply(base)["head"], tuned["head"])
    with pytest.raises(ValueError, match="norms"):
        delta.prune(0.9, "wanda")


def test_files_are_small_exact_and_merged_a_tensor_at_a_time(tmp_path):
    tuned, base = two()
    save_file(tuned, tmp_path / "tuned.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    delta = Delta.between(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors")
    pruned = delta.prune(0.95, seed=5).rescale(0.2)
    again = Pruned.load(pruned.save(tmp_path / "delta").parent)
    assert again.bytes < 0.07 * sum(v.nbytes for v in tuned.values())
    other = delta.prune(0.5, "magnitude")
    file = merge_files(
        tmp_path / "base.safetensors", [again, other], tmp_path / "m.safetensors", [0.5, -1.0]
    )
    found = load_file(file)
    for name, b in base.items():
        by_hand = b + 0.5 * pruned.change(name) - other.change(name)
        torch.testing.assert_close(found[name], by_hand.float(), rtol=1e-6, atol=1e-6)
    assert found.keys() == merge(base, [pruned]).keys()


def test_lora_is_the_change_it_makes():
    a, b = normal(4, 50), normal(40, 4, seed=1)
    file = {"base_model.model.a.lora_A.weight": a, "base_model.model.a.lora_B.weight": b}
    delta = Delta.of_lora(file, scale=0.5)
    torch.testing.assert_close(delta["a.weight"].float(), 0.5 * b @ a)
    base = two()[1]
    found = delta.prune(0.0).apply(base)
    torch.testing.assert_close(found["a.weight"], base["a.weight"] + 0.5 * b @ a)
    assert torch.equal(found["head"], base["head"])


def test_find_q_beats_dare_on_the_output():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    base = {k: normal(*v.shape, scale=0.2) for k, v in net.state_dict().items()}
    tuned = {k: v + normal(*v.shape, seed=1, scale=0.2) for k, v in base.items()}
    calls: list[Any] = [((normal(16, 64, seed=s),), {}) for s in range(2)]
    dare = Delta.between(tuned, base).prune(0.95)
    ours = find_q(dare, net, base, tuned, calls)
    assert dare.q == pytest.approx(0.05)
    wanted = [torch.func.functional_call(net, tuned, x).detach().double() for x, _ in calls]
    losses = [output_change(c, net, base, wanted, calls) for c in (ours, dare)]
    assert losses[0] < 0.7 * losses[1]


def small_problem(rows=16):
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    base = {k: normal(*v.shape, scale=0.2) for k, v in net.state_dict().items()}
    tuned = {k: v + normal(*v.shape, seed=1, scale=0.2) for k, v in base.items()}
    calls: list[Any] = [((normal(rows, 64, seed=s),), {}) for s in range(2)]
    wanted = [torch.func.functional_call(net, tuned, x).detach().double() for x, _ in calls]
    return net, base, tuned, calls, wanted


def test_top_logits_look_at_the_fine_tunes_largest():
    """Only the two largest of what was wanted count, wherever the output has its own."""
    wanted = torch.tensor([[0.0, 5.0, 1.0, 4.0]])
    output = torch.tensor([[9.0, 4.0, 9.0, 2.0]])
    assert float(TopLogits(2).loss(output, wanted, 0)) == pytest.approx((1 + 4) / 2)
    assert float(TopLogits(9).loss(wanted, wanted, 0)) == 0
    assert float(Change().loss(output, wanted, 0)) == pytest.approx((9 + 1 + 8 + 2) / 4)


def test_labels_choose_another_q_than_outputs():
    """With labels that like the base, q goes to 1; the loss of each call is its own."""
    net, base, tuned, calls, _ = small_problem()
    dare = Delta.between(tuned, base).prune(0.9)
    bare = [torch.func.functional_call(net, base, x).detach().double() for x, _ in calls]
    losses = [lambda out, b=b: (out - b).square().mean() for b in bare]
    found = find_q(dare, net, base, tuned, calls, by=Labels(losses), patience=60)
    assert found.q > 0.99
    with pytest.raises(ValueError, match="one for every call"):
        find_q(dare, net, base, tuned, calls, by=Labels(losses[:1]))


def test_average_q_leaves_the_farthest_out():
    net, base, tuned, calls, _ = small_problem(4)
    delta = Delta.between(tuned, base)
    each = [find_q(delta.prune(0.9, seed=s), net, base, tuned, calls).q for s in range(4)]
    mean = sum(each) / 4
    left = sorted(each, key=lambda q: abs(q - mean))[:3]
    found = average_q(delta, 0.9, net, base, tuned, calls)
    assert found == pytest.approx(sum(left) / 3)


def test_learned_q_is_better_than_one_for_all_and_is_kept():
    """A q a tensor: at least 1 - p, no worse by its own measure than DARE, saved with the rest."""
    net, base, tuned, calls, _ = small_problem()
    tuned["2.weight"] = base["2.weight"]  # this tensor needs no q, the other one does
    dare = Delta.between(tuned, base).prune(0.95)
    ours = learn_q(dare, net, base, tuned, calls, by=TopLogits(8), lr=3e-2)
    assert set(ours.layer_q) == set(base)
    assert all(0.05 - 1e-9 <= q <= 1 for q in ours.layer_q.values())
    wanted = [torch.func.functional_call(net, tuned, x).detach().double() for x, _ in calls]
    losses = [output_change(c, net, base, wanted, calls, TopLogits(8)) for c in (ours, dare)]
    assert losses[0] < 0.7 * losses[1]
    still = learn_q(Delta.between(tuned, base).prune(0.0), net, base, tuned, calls)
    assert still.q == 1
    assert not still.layer_q


def test_select_takes_the_least_change_of_outputs():
    """A change in a few places is kept by magnitude; one everywhere is not."""
    net, base, tuned, calls, wanted = small_problem()
    few = {k: v.clone() for k, v in base.items()}
    few["0.weight"][:2] += 3.0
    found = select(Delta.between(few, base), 0.95, net, base, few, calls)
    assert found.name == "magnitude"
    assert found.losses["magnitude"] == min(found.losses.values())
    assert "keeps most" in found.advice
    spread = select(Delta.between(tuned, base), 0.99, net, base, tuned, calls)
    assert spread.losses["DAREx-q"] < spread.losses["DARE"]
    assert "AdamR" in spread.advice
    by_hand = output_change(spread.pruned, net, base, wanted, calls)
    assert spread.losses[spread.name] == pytest.approx(by_hand)


def test_heads_go_together():
    """The same heads go from queries, keys, values, their biases and the output's columns."""
    shape = {"to_q.weight": (60, 8), "to_v.weight": (60, 8), "to_q.bias": (60,)}
    masks = {n: random_keep(s, 0.5, "head:3", 4, f"x.attn1.{n}") for n, s in shape.items()}
    out = random_keep((8, 60), 0.5, "head:3", 4, "x.attn1.to_out.0.weight")
    heads = masks["to_q.bias"].reshape(20, 3)
    assert (heads.all(1) | ~heads.any(1)).all()
    assert 0 < heads[:, 0].sum() < 20
    for name in ("to_q.weight", "to_v.weight"):
        assert torch.equal(masks[name], masks["to_q.bias"][:, None].expand(60, 8))
    assert torch.equal(out, masks["to_q.bias"][None].expand(8, 60))
    other = random_keep((6, 30), 0.5, "head:3", 4, "x.ff.net.2.weight")
    assert 60 < other.sum() < 120
    with pytest.raises(ValueError, match="heads of 7"):
        random_keep((60, 8), 0.5, "head:7", 4, "x.attn1.to_q.weight")
    with pytest.raises(ValueError, match="structure"):
        Delta.between(*two()).prune(0.5, structure="head")


def test_lora_files_of_diffusers():
    """Names of one component, and the alpha of each layer."""
    a, b = normal(4, 50), normal(40, 4, seed=1)
    file = {
        "unet.a.lora_A.weight": a,
        "unet.a.lora_B.weight": b,
        "unet.a.alpha": torch.tensor(2.0),
        "text_encoder.a.lora_A.weight": a,
        "text_encoder.a.lora_B.weight": b,
    }
    delta = Delta.of_lora(file, prefix="unet.")
    assert list(delta.finetuned.names()) == ["a.weight"]
    torch.testing.assert_close(delta["a.weight"].float(), 0.5 * b @ a)
    with pytest.raises(ValueError, match="transformer"):
        Delta.of_lora(file, prefix="transformer.")


def test_refusals():
    tuned, base = two()
    with pytest.raises(ValueError, match="one checkpoint only"):
        Delta.between(tuned, {**base, "more": base["head"]})
    delta = Delta.between(tuned, {**base, "head": base["head"][:2]})
    with pytest.raises(ValueError, match="shape"):
        delta.prune(0.5)
    with pytest.raises(ValueError, match="p must"):
        delta.prune(1.0)
    pruned = Delta.between(tuned, base).prune(0.9)
    for q in (0.05, 1.5):
        with pytest.raises(ValueError, match="q must"):
            pruned.rescale(q)
    with pytest.raises(ValueError, match="has no"):
        pruned.apply({"x": base["head"]})


@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_adam_r_by_hand(penalty):
    start = normal(3, 4).double()
    w = torch.nn.Parameter(start + 0.5)
    g = normal(3, 4, seed=1).double()
    w.grad = g.clone()
    AdamR([w], [start], lr=0.1, weight_decay=0.2, penalty=penalty, eps=0).step()
    pull = torch.full_like(start, 0.5 if penalty == "l2" else 1.0)
    s = float(g.square().mean().sqrt())  # v_hat of the first step is g^2
    torch.testing.assert_close(w.data, start + 0.5 - 0.1 * 0.2 / s * pull - 0.1 * g.sign())


def test_adam_r_without_decay_is_adam():
    one, other = (torch.nn.Parameter(normal(3, 4).double()) for _ in range(2))
    a, b = AdamR([one], lr=0.1, weight_decay=0), torch.optim.Adam([other], lr=0.1)
    for seed in range(4):
        one.grad = other.grad = normal(3, 4, seed=seed).double()
        a.step()
        b.step()
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_memory_holds_one_tensor_of_the_fine_tune(tmp_path):
    """Names are read from the header; of the weights, as many bytes at a time as the largest."""
    count, size = 24, 1 << 16
    for file, seed in (("a", 0), ("b", 1)):
        save_file(
            {f"w{i}": normal(size, seed=100 * seed + i) for i in range(count)},
            tmp_path / f"{file}.safetensors",
        )
    alive: list[Any] = []
    most = 0
    delta = Delta.between(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for _, change in delta.items():
        alive = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(change))
        most = max(most, len(alive))
    assert most <= 2, "the one in hand and the one just read"
    pruned = delta.prune(0.99)
    tracemalloc.start()
    merge_files(tmp_path / "b.safetensors", [pruned], tmp_path / "m.safetensors")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 4 * size, "bytes on the way to the file: not the whole of 24 tensors"
    a, m = load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "m.safetensors")
    assert all(0 < int((a[k] != m[k]).sum()) < 0.02 * size for k in a)


def test_adam_r_refers_a_group_added_later_to_its_own_start():
    one, later = (torch.nn.Parameter(normal(3, 4, seed=s)) for s in range(2))
    optimizer = AdamR([one], lr=0.1, weight_decay=0.5)
    optimizer.add_param_group({"params": [later]})
    before = later.detach().clone()
    one.grad, later.grad = torch.ones(3, 4), torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(later, before)
