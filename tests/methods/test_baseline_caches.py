"""DeepCache and the first-block cache, against what they say; caches on caches and in threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.tiny import tiny_dit, tiny_sd, tiny_unet

from effuse.compress.cache.deep_cache import DeepCache
from effuse.compress.cache.error_budget import ErrorBudget
from effuse.compress.cache.first_block import FirstBlock
from effuse.compress.cache.harmonica import Harmonica, Units
from effuse.compress.cache.keys import Route
from effuse.compress.rewire.asdm_assembly import Blocks, Inherit, Uniform

TIMES = (900, 850, 500, 450, 100, 50)
LABELS = torch.tensor([1, 2])


def walk(model, seed=0, rows=2, stop=None):
    rng = torch.Generator().manual_seed(seed)
    x, out = torch.randn(rows, model.config.in_channels, 8, 8, generator=rng), []
    more = {"class_labels": LABELS[:rows]} if hasattr(model, "transformer_blocks") else {}
    with torch.no_grad():
        for t in TIMES[:stop]:
            noise = model(x, timestep=torch.full((rows,), t), return_dict=False, **more)[0]
            out.append(noise)
            x = x - 0.1 * noise[:, : x.shape[1]]
    return out


def walk_to(model, last):
    walk(model, stop=last + 1)


def same(one, two):
    return all(map(torch.equal, one, two))


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_deep_cache_is_inheritance_of_everything_deep(make):
    model = make()
    with DeepCache(every=2, fresh=1).attach(model) as handle:
        ours = walk(model)
        assert handle.report()["key_calls"] == 3
    with Inherit(Blocks(1), Uniform(2)).attach(model):
        assert same(ours, walk(model))
    plain = walk(model)
    assert not same(ours, plain)
    with DeepCache(every=1).attach(model):
        assert same(walk(model), plain)


def test_first_block_runs_the_rest_where_the_residual_of_the_first_block_moved():
    model = tiny_dit()
    block = model.transformer_blocks[0]
    with FirstBlock(tau=1e9).attach(model) as handle:
        seen = []
        hook = block.register_forward_hook(lambda m, args, out: seen.append(out - args[0]))
        walk(model)
        assert handle.report()["key_calls"] == 1
    hook.remove()
    key = seen[0]
    far = [(r - key).flatten(1).norm(dim=1) / key.flatten(1).norm(dim=1) for r in seen[1:]]
    changes = [float(f.max()) for f in far]
    first = next(i for i, c in enumerate(changes) if c >= sorted(changes)[2])
    with FirstBlock(tau=changes[first] - 1e-6).attach(model) as handle:
        for step in range(first + 2):
            walk_to(model, step)
            assert handle.report()["key_calls"] == 1 + (step == first + 1)
            handle.reset()
            handle.accounts.key_calls = 0


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_first_block_ends(make):
    model = make()
    plain = walk(model)
    with FirstBlock(tau=1e-9).attach(model):
        assert same(walk(model), plain)
    with FirstBlock(tau=1e9).attach(model) as handle:
        out = walk(model)
        assert torch.equal(out[0], plain[0])
        assert not torch.equal(out[1], plain[1])
        assert handle.report()["key_calls"] == 1
    with pytest.raises(ValueError, match="fresh=0"):
        FirstBlock(fresh=0)
    with pytest.raises(ValueError, match="tau"):
        FirstBlock(tau=0.0)


def half(handle):
    """Inherit at every second step, parts in turn."""
    table = {p: tuple(range(1 + k % 2, 6, 2)) for k, p in enumerate(handle.parts)}
    handle.follow(Route(6, table))
    return handle


CACHES = {
    "deep": lambda m: DeepCache(every=2).attach(m),
    "first": lambda m: FirstBlock(tau=0.05).attach(m),
    "harmonica": lambda m: half(Harmonica().attach(m)),
    "budget": lambda m: half(ErrorBudget(level=Units(deep=None), order=1).attach(m)),
}


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(CACHES, 2)))
def test_caches_stack_stay_close_and_come_off(one, two, make):
    """Stacked, they lead astray as far as they do alone, not further; or the second refuses."""
    model = make()
    plain = walk(model)
    alone = {}
    for name in (one, two):
        with CACHES[name](model):
            alone[name] = walk(model)
    first = CACHES[one](model)
    try:
        second = CACHES[two](model)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "put that cache on last" in refusal
        assert one in ("deep", "first")
        assert same(walk(model), alone[one])
        first.detach()
        assert same(walk(model), plain)
        return
    out = walk(model)
    again = walk(model)  # the next run begins by itself
    assert same(out, again)
    second.detach()
    assert same(walk(model), alone[one])
    first.detach()
    assert same(walk(model), plain)
    worst = max(gap(alone[n], plain) for n in (one, two))
    assert gap(out, plain) < 4 * worst + 1e-6


def gap(one, two):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", CACHES)
def test_threads_and_batch_sizes_do_not_meet(name):
    model = tiny_dit()
    handle = CACHES[name](model)
    jobs = [(seed, rows) for seed in range(3) for rows in (1, 2)]
    want = [walk(model, *job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda job: walk(model, *job), jobs))
    assert all(map(same, want, got))
    handle.detach()


@pytest.mark.parametrize("name", ["deep", "first"])
def test_under_guidance_both_halves_are_served(name):
    """One picture in a batch of two halves, and the same by a batch of two pictures."""
    pipe = tiny_sd()

    def pictures(prompts, seeds):
        rng = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(
            prompts, num_inference_steps=4, generator=rng, output_type="latent", guidance_scale=3.0
        ).images

    plain = pictures(["a cat"], [1])
    with CACHES[name](pipe.unet) as handle:
        one = pictures(["a cat"], [1])
        if name == "deep":
            both = pictures(["a cat", "a dog"], [1, 2])
            torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-4)
            assert not torch.equal(one, plain)
        assert handle.report()["runs"] >= 1
    assert torch.equal(pictures(["a cat"], [1]), plain)
