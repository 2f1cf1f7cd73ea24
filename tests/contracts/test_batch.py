"""Every solver: a sample does not know its neighbors, comes from its generator, shares nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import DDIMScheduler

import effuse
from effuse.core import Mixture, Solver, methods, sample
from effuse.processes import Linear, Tabulated, Tapered

SOLVERS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Solver)
}
STEPS = 6
LIKE = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
TABLE = Tabulated.from_alphas_cumprod(LIKE.alphas_cumprod)


def ring(process) -> Mixture:
    angle = torch.arange(5) * 2 * torch.pi / 5
    means = torch.stack([angle.cos(), angle.sin()], 1).reshape(5, 2, 1, 1)
    return Mixture(process, means, torch.linspace(0.1, 0.3, 5))


@pytest.fixture(params=SOLVERS, ids=str)
def solver(request) -> Solver:
    return SOLVERS[request.param]()


def walk(solver: Solver, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    process = Linear()
    times = Tapered()(process, STEPS)
    return sample(ring(process), solver, x, times, rng=torch.Generator().manual_seed(seed))


def noise(count: int, dtype=torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(count, 2, 1, 1, generator=rng, dtype=dtype)


def test_a_row_does_not_know_its_neighbors(solver):
    x = noise(6)
    if solver.stochastic:  # the noise of a row is what its place in the batch draws
        others = torch.cat([x[:1], noise(11)[6:]])
        assert torch.allclose(walk(solver, x)[0], walk(solver, others)[0], rtol=0, atol=1e-12)
        return
    alone = torch.cat([walk(solver, row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(walk(solver, x), alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(walk(solver, x.flip(0)), alone.flip(0), rtol=0, atol=1e-10)


def test_a_generator_decides_all_noise(solver):
    x = noise(4, torch.float32)
    torch.manual_seed(1)
    first = walk(solver, x, seed=3)
    torch.manual_seed(2)
    assert torch.equal(walk(solver, x, seed=3), first)
    assert torch.equal(walk(solver, x, seed=4), first) is not solver.stochastic


def in_threads(runs) -> list[torch.Tensor]:
    """Run all at once, and return what they give."""
    out: list[torch.Tensor | None] = [None] * len(runs)
    gate = threading.Barrier(len(runs))

    def go(i):
        gate.wait()
        out[i] = runs[i]()

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(o is not None for o in out)
    return out  # type: ignore[return-value]


def test_one_solver_in_two_threads_gives_what_it_gives_alone(solver):
    starts = [noise(3), -0.5 * noise(8)]
    alone = [walk(solver, x, seed=i) for i, x in enumerate(starts)]
    for _ in range(3):
        both = in_threads([lambda i=i, x=x: walk(solver, x, i) for i, x in enumerate(starts)])
        assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


def drive(made, x: torch.Tensor, seed: int) -> torch.Tensor:
    model, rng = ring(TABLE), torch.Generator().manual_seed(seed)
    made.set_timesteps(STEPS)
    for t in made.timesteps:
        out = model(x, float(TABLE.time_of(float(t)))).noise
        x = made.step(out, t, x, generator=rng).prev_sample
    return x


def test_schedulers_of_one_solver_in_two_threads(solver):
    """A scheduler holds its run, as all of diffusers' do: one a thread, one solver for all."""
    try:
        effuse.scheduler(solver, LIKE).set_timesteps(2)
    except (TypeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"no pipeline can drive it: {error}")
    starts = [noise(3, torch.float32), 0.5 * noise(4, torch.float32)]
    alone = [drive(effuse.scheduler(solver, LIKE), x, i) for i, x in enumerate(starts)]
    both = in_threads(
        [lambda i=i, x=x: drive(effuse.scheduler(solver, LIKE), x, i) for i, x in enumerate(starts)]
    )
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
