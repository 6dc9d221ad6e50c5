"""The targets' part of the weight's gradient: lists of rows by class, added in float."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import logitless.functional as LF  # noqa: E402

pytestmark = pytest.mark.gpu

# One rounding of the result is 1.66e-3; with the targets among the 16-bit operands it was 2.9e-3.
FLOOR, TWO_ROUNDINGS = 1.9e-3, 2.6e-3


def make(rows: int, features: int, classes: int, frequent: int, pitch: int = 0) -> Any:
    """Rows of which half have one of a few frequent targets."""
    generator = torch.Generator("cuda").manual_seed(2)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device="cuda")

    e = normal(rows, max(features, pitch)).bfloat16()[:, :features].requires_grad_()
    w = (normal(classes, features) * 1.5 / features**0.5).bfloat16().requires_grad_()
    y = torch.randint(classes, (rows,), generator=generator, device="cuda")
    some = torch.rand(rows, generator=generator, device="cuda") < 0.5
    y = torch.where(some, y % frequent, y)
    y[torch.rand(rows, generator=generator, device="cuda") < 0.1] = -100
    return e, w, y


def error(e: Any, w: Any, y: Any, found: Any) -> float:
    """Relative Frobenius error of dW."""
    leaves = [x.detach().double().requires_grad_() for x in (e, w)]
    loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, y)
    (wanted,) = torch.autograd.grad(loss, leaves[1:])
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "shape", [(1000, 256, 5003), (3000, 200, 777), (257, 96, 151), (64, 64, 50257)]
)
@pytest.mark.parametrize("frequent", [1, 7, 300])
def test_error_is_the_rounding_of_the_result(shape: Any, frequent: int) -> None:
    e, w, y = make(*shape, min(frequent, shape[2]))
    loss = LF.linear_cross_entropy(e, w, y, memory="fast")
    (found,) = torch.autograd.grad(loss, [w])
    assert error(e, w, y, found) < FLOOR
    (again,) = torch.autograd.grad(LF.linear_cross_entropy(e, w, y, memory="fast"), [w])
    assert torch.equal(found, again)


@pytest.mark.parametrize("pitch", [210, 201])  # rows in pairs, and not
def test_rows_of_any_pitch(pitch: int) -> None:
    e, w, y = make(900, 200, 1500, 5, pitch)
    loss = LF.linear_cross_entropy(e, w, y, memory="fast")
    (found,) = torch.autograd.grad(loss, [w])
    assert error(e, w, y, found) < (FLOOR if pitch % 2 == 0 else TWO_ROUNDINGS)


def test_a_buffer_gets_the_sum_unrounded() -> None:
    e, w, y = make(900, 192, 1500, 5)
    buffer = torch.zeros(w.shape, device="cuda")
    LF.linear_cross_entropy(e, w, y, memory="fast", grad_buffer=buffer).backward()
    assert error(e, w, y, buffer) < 1.5e-3
