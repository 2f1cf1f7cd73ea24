"""Every operator: linear, <Ax, y> = <x, A'y>, A A+ A = A, A+ A A+ = A+."""

from __future__ import annotations

import pytest
import torch

from effuse.core import Operator, methods
from effuse.operators import Average, Blur, Known, Mix, colors

OPERATORS = {
    f"{card.name}-{cls.__name__}": made
    for card in methods().values()
    for made, cls in zip(card.examples, card.classes, strict=True)
    if issubclass(cls, Operator)
}


@pytest.fixture(params=OPERATORS, ids=str)
def operator(request) -> Operator:
    return OPERATORS[request.param]()


def picture(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=rng, dtype=torch.float64)


def test_linear(operator):
    x, y = picture(), picture(1)
    torch.testing.assert_close(operator(2 * x - y), 2 * operator(x) - operator(y))


def test_the_adjoint_is_the_adjoint(operator):
    x = picture()
    y = torch.randn(operator(x).shape, dtype=torch.float64)
    left, right = (operator(x) * y).sum(), (x * operator.adjoint(y, x)).sum()
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(operator.adjoint(y, x), Operator.adjoint(operator, y, x))


def test_the_pseudo_inverse_is_one(operator):
    y = operator(picture())
    torch.testing.assert_close(operator(operator.pinv(y)), y)
    back = operator.pinv(y)
    torch.testing.assert_close(operator.pinv(operator(back)), back)


def test_keeps_the_dtype(operator):
    x = picture().float()
    y = operator(x)
    assert y.dtype == operator.pinv(y).dtype == operator.adjoint(y, x).dtype == torch.float32


def test_values():
    x = picture()
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    assert torch.equal(Known(mask)(x)[..., :4, :], x[..., :4, :])
    assert not Known(mask)(x)[..., 4:, :].any()
    turn = colors()
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(Mix(turn[:1])(x)[:, 0], x.sum(1) / 3**0.5)
    torch.testing.assert_close(Mix(turn).pinv(Mix(turn)(x)), x)
    torch.testing.assert_close(Average(4)(x)[0, 0, 0, 0], x[0, 0, :4, :4].mean())
    point = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    point[..., 3, 5] = 1
    kernel = torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.4, 0.3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(Blur(kernel)(point)[0, 0, 2:5, 4:7], kernel.double())


def test_refuses_nonsense():
    with pytest.raises(ValueError, match="ones where known"):
        Known(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="of rank K"):
        Mix(torch.ones(2, 3))
    with pytest.raises(ValueError, match="factor=0"):
        Average(0)
    with pytest.raises(ValueError, match="divisible by 3"):
        Average(3)(picture())
    with pytest.raises(ValueError, match="not zero"):
        Blur(torch.zeros(3, 3))
