"""LINAS and what it stands on: the space, the journal, predictors, evolution, workers."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch

from effuse.compress.search import (
    Budget,
    Gene,
    Journal,
    Local,
    RandomSearch,
    Ray,
    SearchSpace,
    Study,
    search,
)
from effuse.compress.search.dynas import LINAS, _Pool
from effuse.compress.search.evolution import NSGA2, UNSGA3, Variation, engine_for
from effuse.compress.search.predictors import SVR, Predictor, Ridge, agreement, unit_of
from effuse.ops import pareto

SPACE = SearchSpace({f"g{i}": (0, 1, 2, 3) for i in range(6)})
GOALS = {"a": "min", "b": "min"}
A = torch.tensor([[3.0, 2.0, 1.5, 1.0], [1, 5, 2, 2.5], [4, 1, 1, 3], [2, 2, 1, 1]] * 2)[:6]
B = torch.tensor([[1.0, 2.0, 2.5, 3.0], [6, 1, 3, 2.5], [1, 4, 4, 2], [1, 2, 3, 4]] * 2)[:6]


def additive(config):
    g = [config[f"g{i}"] for i in range(6)]
    at = torch.arange(6)
    return {"a": float(A[at, g].sum()), "b": float(B[at, g].sum())}


def every(space=SPACE, f=additive):
    genes = space.points()
    return genes, torch.tensor([list(f(space.decode(g)).values()) for g in genes]).double()


# ---- the space


def test_there_and_back():
    space = SearchSpace({"depth": (2, 3, 4), "ratio": Gene((1.0, 2.0), count=4)})
    assert space.size == 3 * 2**4
    genes = space.points()
    assert len(genes) == space.size
    for g in genes:
        assert space.encode(space.decode(g)) == g.tolist()
    assert space.decode([1, 0, 1, 1, 0]) == {"depth": 3, "ratio": (1.0, 2.0, 2.0, 1.0)}
    hot = space.onehot(genes)
    assert hot.shape == (48, 3 + 8)
    assert torch.equal(hot.sum(1), torch.full((48,), 5.0).double())
    assert len(hot.unique(dim=0)) == 48


def test_silent_choices_are_one_point():
    space = SearchSpace(
        {"depth": (1, 2, 3), "ratio": Gene((10, 20), count=3)},
        silent=lambda c: [f"ratio[{i}]" for i in range(c["depth"], 3)],
    )
    genes = space.points()
    assert len(genes) == 2 + 4 + 8
    assert torch.equal(space.onehot(genes).sum(1), 1 + genes[:, 0].double() + 1)
    drawn = space.random(100, torch.Generator().manual_seed(0))
    assert len(drawn) == 14
    count = []
    found = search(space, lambda c: count.append(c) or {"a": 1.0}, {"a": "min"}, budget=100,
                   tactic=RandomSearch())  # fmt: skip
    assert found.measured == len(count) == 14


def test_bad_spaces_and_points():
    with pytest.raises(ValueError, match="a value stands there twice"):
        SearchSpace({"a": (1, 1)})
    with pytest.raises(ValueError, match="without choices"):
        SearchSpace({})
    with pytest.raises(ValueError, match="expected 1 of"):
        SearchSpace({"a": (1, 2)}).encode({"a": 3})
    with pytest.raises(ValueError, match=r"did you mean 'depth'"):
        SearchSpace({"depth": (1, 2)}).encode({"depht": 1, "depth": 1})
    for objectives in ({}, dict.fromkeys("abcd", "min")):
        with pytest.raises(ValueError, match="one, two or three"):
            search(SPACE, additive, objectives)
    with pytest.raises(ValueError, match="'min' or 'max'"):
        search(SPACE, additive, {"a": "lower"})


# ---- budgets


def test_budgets_are_read():
    assert Budget.parse("latency<0.5x") == Budget("latency", 0.5, False, True)
    assert Budget.parse(" bytes <= 2e6 ") == Budget("bytes", 2e6)
    assert Budget.parse("score>0.95x").at({"score": 2.0}) == Budget("score", 1.9, True)
    for text in ("latency", "<3", "latency=3", "latency<fast", "latency<1..2"):
        with pytest.raises(ValueError, match="expected a metric, < or >, and a number"):
            Budget.parse(text)
    with pytest.raises(ValueError, match="did you mean 'latency'"):
        Budget.parse("latencyy<0.5x").at({"latency": 1.0})
    over = Budget("a", 2.0).excess(torch.tensor([1.0, 2.0, 3.0]))
    assert over.tolist() == [0, 0, 0.5]
    assert Budget("a", 2.0, above=True).excess(torch.tensor([1.0, 3.0])).tolist() == [0.5, 0]


def test_a_front_keeps_its_budget():
    _, y = every()
    for tactic in (NSGA2(20), LINAS(25, 600)):
        found = search(SPACE, additive, GOALS, tactic=tactic, budget=200, budgets=["a<14"])
        assert found.front
        assert all(t.metrics["a"] <= 14 for t in found.front)
        best = y[y[:, 0] <= 14][:, 1].min()
        assert min(t.metrics["b"] for t in found.front) <= best + 1.0
    with pytest.raises(ValueError, match="expected 'c' too"):
        search(SPACE, additive, GOALS, budget=5, budgets=["c<1"], tactic=RandomSearch())


# ---- predictors


def test_units():
    assert [unit_of(torch.tensor([v])) for v in (75.3, -0.42, 0.0)] == [1, pytest.approx(0.01), 1]


def test_ridge_is_the_closed_form():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((30, 4), (30,)))
    found = Ridge((0.7,)).fit(x, y)(x[:5])[:, 0]
    xc, yc = x - x.mean(0), y - y.mean()
    w = torch.linalg.solve(xc.mT @ xc + 0.7 * torch.eye(4).double(), xc.mT @ yc)
    torch.testing.assert_close(found, (x[:5] - x.mean(0)) @ w + y.mean())


def test_svr_is_at_the_optimum():
    """Duality: the primal, C sum |y - f| + 1/2 |f|^2, equals the dual at the optimum alone."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(25, 3, generator=rng, dtype=torch.float64)
    y = x[:, 0] * x[:, 1] + 0.3 * torch.randn(25, generator=rng, dtype=torch.float64)
    model = SVR((1.0, 10.0), 4000)
    f = model.fit(x, y)(x)
    k = model._kernel(x, x)
    for i, c in enumerate(model.costs):
        # b = K^-1 (f - b0) with sum b = 0
        inverse = torch.linalg.inv(k)
        b0 = (inverse @ f[:, i]).sum() / inverse.sum()
        b = inverse @ (f[:, i] - b0)
        assert b.abs().max() <= c * (1 + 1e-4)
        dual = y @ b - b @ k @ b / 2
        primal = c * (y - f[:, i]).abs().sum() + b @ k @ b / 2
        assert primal.item() == pytest.approx(dual.item(), rel=1e-3)


def test_svr_is_scikit_learns():
    svm = pytest.importorskip("sklearn.svm")
    rng = torch.Generator().manual_seed(2)
    x = torch.randint(0, 2, (40, 6), generator=rng).double()
    y = x @ torch.arange(6.0).double() + x[:, 0] * x[:, 1] * 3
    y = y + torch.randn(40, generator=rng, dtype=torch.float64)
    theirs = svm.SVR(gamma="auto", epsilon=0.0, C=5.0, tol=1e-8).fit(x.numpy(), y.numpy())
    mine = SVR((5.0,), 5000).fit(x, y)(x)[:, 0]
    expected = torch.from_numpy(theirs.predict(x.numpy()))
    torch.testing.assert_close(mine, expected, atol=2e-3, rtol=0)


def test_additive_metrics_are_predicted_exactly():
    genes, y = every()
    some = SPACE.random(60, torch.Generator().manual_seed(0))
    labels = torch.tensor([additive(SPACE.decode(g))["a"] for g in some]).double()
    f = Predictor((Ridge((1e-9,)),)).fit(SPACE.onehot(some), labels)
    torch.testing.assert_close(f(SPACE.onehot(genes)), y[:, 0], atol=1e-5, rtol=0)


def test_the_better_model_is_taken():
    rng = torch.Generator().manual_seed(0)
    space = SearchSpace({f"g{i}": (0, 1) for i in range(6)})
    x = space.points()
    parity = 10 + ((x[:, 0] + x[:, 1]) % 2).double() * 5  # nothing for a line
    x = space.onehot(x)
    at = torch.randperm(64, generator=rng)[:50]
    both = Predictor().fit(x[at], parity[at])(x)
    line = Predictor((Ridge(),)).fit(x[at], parity[at])(x)
    assert agreement(both, parity)["mape"] < 0.3 * agreement(line, parity)["mape"]


def test_nothing_to_learn():
    with pytest.warns(UserWarning, match="teach nothing"):
        f = Predictor().fit(torch.eye(4).double(), torch.full((4,), 2.0).double())
    assert f(torch.zeros(3, 4)).tolist() == [2, 2, 2]
    with pytest.warns(UserWarning, match="2 labels"):
        Predictor().fit(torch.eye(2).double(), torch.tensor([1.0, 3.0]).double())


# ---- evolution


def test_children_of_twins_are_twins_but_for_mutation():
    rng = torch.Generator().manual_seed(0)
    a = torch.randint(0, 4, (50, 6), generator=rng)
    sizes = torch.full((6,), 4)
    out = Variation(mutation=0.0).children(a, a, sizes, rng)
    assert torch.equal(out, torch.cat([a, a]))
    out = Variation(crossover=0.0, mutation=0.0).children(a, a.flip(0), sizes, rng)
    assert torch.equal(out, torch.cat([a, a.flip(0)]))
    out = Variation(mutation=1.0).children(a, a.flip(0), sizes, rng)
    assert 0 <= int(out.min()) <= int(out.max()) <= 3
    assert not torch.equal(out, torch.cat([a, a.flip(0)]))


def test_crossover_keeps_the_middle():
    """SBX spreads two children evenly about their parents."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.full((4000, 1), 40), torch.full((4000, 1), 60)
    made = Variation(crossover=1.0, mutation=0.0).children(a, b, torch.tensor([101]), rng)
    pairs = made.view(2, -1).double()
    assert float((pairs.sum(0) - 100).abs().max()) <= 1  # rounding
    # E|beta| of SBX: 1/2 (1/(1 + p)) + 1/2 ..., p = 1/(eta + 1), crossed with one half
    p = 1 / 16
    expected = 0.5 + 0.5 * (0.5 / (1 + p) + 0.5 / (1 - p))
    apart = (pairs[0] - pairs[1]).abs().mean() / 20
    assert apart.item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("engine", [NSGA2(30), engine_for(2, 30)])
def test_a_perfect_oracle_gives_the_true_front(engine):
    space = SearchSpace({f"g{i}": (0, 1, 2, 3) for i in range(4)})
    genes = space.points()
    y = torch.stack([A[range(4), genes].sum(1), B[range(4), genes].sum(1)], 1).double()
    truth = {tuple(v) for v in y[pareto.front(y)].tolist()}

    def fitness(some):
        return torch.stack([A[range(4), some].sum(1), B[range(4), some].sum(1)], 1).double(), None

    last = engine.evolve(space, fitness, 3000, torch.Generator().manual_seed(0))
    found = {tuple(v) for v in fitness(last)[0].tolist()}
    assert truth <= found


def test_one_and_three_objectives():
    best = min(additive(SPACE.decode(g))["a"] for g in SPACE.points())
    found = search(SPACE, additive, {"a": "min"}, tactic=NSGA2(20), budget=400)
    assert found.front[0].metrics["a"] == pytest.approx(best)

    def three(config):
        return {**additive(config), "c": float(sum(config.values()))}

    goals = {**GOALS, "c": "max"}
    reference = (25.0, 25.0, 0.0)
    u = search(SPACE, three, goals, tactic=UNSGA3(20), budget=400)
    blind = search(SPACE, three, goals, tactic=RandomSearch(), budget=400)
    assert u.asked == 400 > u.measured  # a child that was dropped comes again: not paid twice
    assert u.hypervolume(reference) > blind.hypervolume(reference)
    few = search(SPACE, three, goals, tactic=LINAS(20, 400), budget=60)
    assert few.hypervolume(reference) > 0.9 * blind.hypervolume(reference)


# ---- LINAS


def test_one_loop_is_random_search():
    ours = search(SPACE, additive, GOALS, tactic=LINAS(30, 100), budget=30, seed=5)
    blind = search(SPACE, additive, GOALS, tactic=RandomSearch(), budget=30, seed=5)
    assert [t.config for t in ours.trials] == [t.config for t in blind.trials]


def test_linas_needs_fewer_measurements():
    _, y = every()
    reference = y.max(0).values.tolist()
    whole = pareto.hypervolume(y, reference)
    ours = search(SPACE, additive, GOALS, tactic=LINAS(25, 1000), budget=100)
    blind = search(SPACE, additive, GOALS, tactic=RandomSearch(), budget=100)
    assert ours.hypervolume(reference) > 0.97 * whole > blind.hypervolume(reference)
    assert ours.asked == 100
    assert ours.measured == len(ours.trials) == len({str(t.config) for t in ours.trials})
    again = search(SPACE, additive, GOALS, tactic=LINAS(25, 1000), budget=100)
    assert [t.config for t in again.trials] == [t.config for t in ours.trials]
    assert ours.samples_to_reach(0.9 * whole, reference) <= 75


def test_warm_start_skips_the_blind_population():
    _, y = every()
    reference = y.max(0).values.tolist()
    before = search(SPACE, additive, GOALS, tactic=RandomSearch(), budget=60, seed=1)

    def elsewhere(config):  # a machine half as fast
        return {n: 2.0 * v for n, v in additive(config).items()}

    goals = [2 * v for v in reference]
    cold = search(SPACE, elsewhere, GOALS, tactic=LINAS(20, 1000), budget=20)
    warm = search(SPACE, elsewhere, GOALS, tactic=LINAS(20, 1000, warm=before.trials), budget=20)
    assert warm.measured == 20
    assert warm.hypervolume(goals) > 1.1 * cold.hypervolume(goals)


def test_fresh_loses_no_place():
    small = SearchSpace({f"g{i}": (0, 1, 2, 3) for i in range(6)})
    kept = search(small, additive, GOALS, tactic=LINAS(20, 300), budget=100)
    fresh = search(small, additive, GOALS, tactic=LINAS(20, 300, fresh=True), budget=100)
    assert fresh.measured == 100 >= kept.measured


def test_the_best_that_nobody_measured_comes_instead():
    """All is known but a few: those evolution met come back, the best by rank first."""
    space = SearchSpace({"g0": (0, 1, 2, 3), "g1": (0, 1, 2, 3)})
    study = Study(space, lambda c: {"a": 1.0}, {"a": "min"}, [], Journal(None), Local())
    genes = space.points()
    study.measure(genes[:10])
    pool = _Pool(NSGA2(3), study, torch.Generator().manual_seed(0))
    y = torch.arange(16.0, dtype=torch.float64)[:, None]
    for part in (genes[:12], genes[4:], genes):  # the same again changes nothing
        pool.add(part, y[part[:, 0] * 4 + part[:, 1]], None)
    assert sorted(pool.best().tolist()) == genes[10:13].tolist()
    broken = _Pool(NSGA2(2), study, torch.Generator().manual_seed(0))
    broken.add(genes[10:14], y[10:14], torch.tensor([1.0, 0.5, 0.0, 0.0]).double())
    assert sorted(broken.best().tolist()) == genes[12:14].tolist()


# ---- failures, the journal


def test_failures_are_written_as_failures(tmp_path):
    def fragile(config):
        if config["g0"] == 0:
            raise RuntimeError("out of memory")
        return additive(config) if config["g0"] == 1 else {"a": math.nan, "b": 1.0}

    found = search(SPACE, fragile, GOALS, tactic=LINAS(20, 200), budget=60, journal=tmp_path)
    failed = [t for t in found.trials if t.failure]
    assert {t.failure for t in failed} == {"RuntimeError: out of memory", "a is nan"}
    assert all(t.config["g0"] == 1 for t in found.front)
    assert found.to_dict()["failures"] == len(failed)


def test_a_stopped_search_goes_on(tmp_path):
    whole = search(SPACE, additive, GOALS, tactic=LINAS(20, 200), budget=80, seed=3)
    calls = []

    def slow(config):
        if len(calls) == 33:
            raise KeyboardInterrupt
        calls.append(config)
        return additive(config)

    how = {"tactic": LINAS(20, 200), "budget": 80, "seed": 3, "journal": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, slow, GOALS, **how)
    files = list((tmp_path / "trials").glob("*.json"))
    assert len(files) == 33
    files[0].write_text(files[0].read_text()[:20])  # torn
    calls.clear()
    again = search(SPACE, additive, GOALS, **how)
    assert [t.config for t in again.trials] == [t.config for t in whole.trials]
    assert again.measured == whole.measured - 32
    assert [t.config for t in again.front] == [t.config for t in whole.front]
    with pytest.raises(ValueError, match="another search"):
        search(SearchSpace({"x": (1, 2)}), additive, GOALS, journal=tmp_path)
    with pytest.raises(ValueError, match="another search"):
        search(SPACE, additive, GOALS, journal=Journal(tmp_path, {"pipeline": "other"}))
    json.dumps(again.to_dict())


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path):
    ray = pytest.importorskip("ray")
    space = SearchSpace({"g0": (0, 1, 2), "g1": (0, 1, 2)})
    flag = tmp_path / "killed"

    def deadly(config):
        if config == {"g0": 1, "g1": 1} and not flag.exists():
            flag.write_text("once")
            os._exit(9)
        return {"a": float(config["g0"]), "b": float(config["g1"]), "process": float(os.getpid())}

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        how = {"tactic": RandomSearch(), "budget": 9, "journal": tmp_path / "j"}
        found = search(space, deadly, GOALS, workers=Ray(2), **how)
    finally:
        ray.shutdown()
    assert flag.exists()
    assert len(found.trials) == found.measured == 9
    assert not any(t.failure for t in found.trials)
    assert len({t.metrics["process"] for t in found.trials}) >= 2
    assert len(list((tmp_path / "j" / "trials").glob("*.json"))) == 9
    here = search(space, deadly, GOALS, **how)
    assert here.measured == 0
