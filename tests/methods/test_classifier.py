"""Class guidance: with the exact classifier it is the exact conditional denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effuse.control.classifier import Classified, NoisyClasses
from effuse.core import Gaussian, Mixture, fit, sample
from effuse.processes import VE, Cosine, Flow, Linear, SubVP, Uniform
from effuse.solvers import DDIM
from effuse.solvers.likelihood import log_likelihood

MEANS = torch.tensor([[-1.0, 0.5], [0.8, -0.3], [0.2, 1.2]], dtype=torch.float64)
PROCESSES = [Linear(), VE(), SubVP(), Flow(), Cosine()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def three(process) -> Mixture:
    """Return three components of two classes."""
    return Mixture(process, MEANS, torch.tensor([0.4, 0.6, 0.3]), labels=torch.tensor([0, 1, 1]))


def exact(model: Mixture):
    """Return the classifier of the mixture's own law at every level."""

    def logits(x, t):
        share = model.shares(x, t)
        return torch.stack([share[:, 0], share[:, 1] + share[:, 2]], 1).log()

    return logits


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_exact_classifier_gives_the_conditional_denoiser(process):
    model = three(process)
    guided = Classified(model, exact(model))
    x, t = rows(6, 2), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 0, -1, 0])
    found, truth = guided(x, t, label=label), model(x, t, label=label)
    torch.testing.assert_close(found.noise, truth.noise)
    torch.testing.assert_close(found.x0, truth.x0)
    one = guided.given(label=1)(x, 0.4)
    torch.testing.assert_close(one.x0, model(x, 0.4, label=1).x0)
    torch.testing.assert_close(process.corrupt(one.x0, 0.4, one.noise), x)


def test_scales_along_the_line_of_guidance():
    """Score + scale (conditional - unconditional): as classifier-free guidance, on exact models."""
    model = three(Linear())
    x, t = rows(6, 2), 0.6
    for scale in (0.0, 0.5, 3.0):
        found = Classified(model, exact(model), scale)(x, t, label=1)
        line = model(x, t).mix(model(x, t, label=1), scale)
        torch.testing.assert_close(found.noise, line.noise)
        torch.testing.assert_close(found.x0, line.x0)


def test_likelihoods_and_samples_are_those_of_the_class():
    model = three(Linear())
    guided = Classified(model, exact(model)).given(label=1)
    x = model.draw(20, rng=generator())
    found = log_likelihood(guided, x, start=1e-3)
    assert (found.nats - model.log_prob(x, 1e-3, label=1)).abs().max() < 1e-3
    start, times = rows(50, 2), Uniform(1.0, 1e-3)(model.process, 30)
    torch.testing.assert_close(
        sample(guided, DDIM(), start, times), sample(model.given(label=1), DDIM(), start, times)
    )


def test_a_row_does_not_know_its_neighbors():
    model = three(Linear())
    guided, x = Classified(model, exact(model), 2.0), rows(6, 2)
    label = torch.tensor([0, 1, 1, 0, -1, 0])
    whole = guided(x, 0.5, label=label).x0
    for i in range(6):
        torch.testing.assert_close(whole[i : i + 1], guided(x[i : i + 1], 0.5, label=label[i]).x0)
    torch.testing.assert_close(whole[4], model(x, 0.5).x0[4])


class Small(nn.Module):
    """Logits of two classes from two values and the level."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t):
        return self.net(torch.cat([x.float(), t.float().unsqueeze(1)], 1))


def test_a_learned_classifier_guides_to_its_class():
    model = three(Linear())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Small()
    objective = NoisyClasses(student, model.process)

    def batch(rng):
        pick = torch.randint(3, (256,), generator=rng)
        x0 = model.draw_of(pick, rng=rng).float()
        return {"x0": x0, "label": model.labels[pick]}

    def judged(classifier) -> float:
        """Return the cross-entropy over all levels, on one large draw."""
        pick = torch.randint(3, (20_000,), generator=generator(5))
        held = {"x0": model.draw_of(pick, rng=generator(6)), "label": model.labels[pick]}
        with torch.no_grad():
            return float(NoisyClasses(classifier, model.process).loss("student", held).total)

    before = judged(student)
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    fit(objective, batch, optimizer, steps=800, rng=generator(1), progress=False)
    best = judged(exact(model))
    assert best - 0.015 < judged(student) < best + 0.04 < before
    guided = Classified(model, student, 1.0)
    start, times = rows(400, 2).float(), Uniform(1.0, 1e-3)(model.process, 20)
    hits = []
    for label in (0, 1):
        out = sample(guided.given(label=label), DDIM(), start, times)
        hits.append(float(model.shares(out.double(), 1e-3)[:, 0].mean()))
    assert hits[0] > 0.85
    assert hits[1] < 0.15
    plain = model.shares(sample(model, DDIM(), start, times).double(), 1e-3)[:, 0].mean()
    assert 0.2 < float(plain) < 0.45


def test_refuses_nonsense():
    model = three(Cosine())
    guided, x = Classified(model, exact(model)), rows(3, 2)
    with pytest.raises(ValueError, match="alpha = 0"):
        guided(x, 1.0, label=0)
    with pytest.raises(ValueError, match="label 2: expected below 2"):
        guided(x, 0.5, label=2)
    with pytest.raises(ValueError, match="logits of shape"):
        Classified(model, lambda x, t: x.sum())(x, 0.5, label=0)
    with pytest.raises(ValueError, match="scale=nan"):
        Classified(model, exact(model), float("nan"))
    with pytest.raises(ValueError, match="first=0"):
        NoisyClasses(Small(), Gaussian(Linear(), 0.0, 1.0).process, 0.0)
