"""The compiled module's boundary: tensor tuples, plans, errors, and the calls that have no face."""

from __future__ import annotations

import math
import pickle
import threading
from typing import NamedTuple

import numpy as np
import pytest

from logitless import _core

CODES = {"float32": 0, "float64": 1, "int64": 4}
NONE, MEAN, SUM = 0, 1, 2


def tensor(array: np.ndarray) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Describe an array as the boundary takes it."""
    strides = tuple(step // array.itemsize for step in array.strides)
    return array.ctypes.data, CODES[array.dtype.name], array.shape, strides


class Head(NamedTuple):
    """A small linear head with one target a row."""

    input: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    ids: np.ndarray

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def operands(self) -> tuple[object, ...]:
        tensors = (*map(tensor, (self.input, self.weight, self.bias, self.ids)),)
        return (*tensors, -100, 1.0, 0.0)

    def plan(self, gradients: int = 7) -> _core.Plan:
        spec = _core.Spec(("rest", "target"), targets=1)
        classes, features = self.weight.shape
        code = CODES[self.input.dtype.name]
        return _core.plan(spec, self.rows, features, classes, code, -1, gradients)

    def logits(self) -> np.ndarray:
        return self.input[0] @ self.weight.T + self.bias


@pytest.fixture
def head(rng: np.random.Generator) -> Head:
    ids = rng.integers(0, 50, (20, 1))
    ids[3] = -100
    return Head(rng.normal(size=(1, 20, 6)), rng.normal(size=(50, 6)), rng.normal(size=50), ids)


def test_spec_is_a_value() -> None:
    spec = _core.Spec(["target", "rest", "rest_power"], powers=[2.0, 0.5], targets=3)
    assert spec.statistics == ("rest", "target", "rest_power")
    assert spec.fields == (("rest", 0, False), ("target", 3, False), ("rest_power", 2, False))
    assert (spec.powers, spec.vectors, spec.topk, spec.targets) == ((2.0, 0.5), 0, 0, 3)
    again = pickle.loads(pickle.dumps(spec))
    assert (again, hash(again), repr(again)) == (spec, hash(spec), repr(spec))
    assert spec != _core.Spec(("rest", "target", "rest_power"), powers=(2.0,), targets=3)


def test_spec_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"unknown statistic \"median\"; expected some of rest,"):
        _core.Spec(("rest", "median"))
    with pytest.raises(ValueError, match="topk = 65; expected 1 to 64"):
        _core.Spec(("topk",), topk=65)


def test_plan_is_a_value(head: Head) -> None:
    plan = head.plan()
    assert plan == pickle.loads(pickle.dumps(plan))
    assert plan.workspace_bytes == plan.store_bytes + max(plan.forward_bytes, plan.backward_bytes)
    shared = sum(size for name, size in plan.parts.items() if not name.startswith("thread."))
    assert shared == plan.forward_bytes + plan.backward_bytes
    assert head.plan(gradients=0).backward_bytes == 0
    with pytest.raises(ValueError, match="memory = -3; expected -1"):
        _core.plan(_core.Spec(("max",)), 1, 1, 1, 0, -3, 0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("x", TypeError, r"expected \(address, dtype, shape, strides\), got 'x'"),
        ((1, 0, (2,)), TypeError, "expected .address"),
        ((1, 9, (2, 2), (2, 1)), ValueError, "dtype code 9"),
        ((1, 0, (2, 2), (1,)), ValueError, "a stride for each"),
        ((1, 0, (1,) * 5, (1,) * 5), ValueError, "at most 4"),
        ((1, 0, (-1, 2), (2, 1)), OverflowError, "negative"),
    ],
)
def test_malformed_tensors_are_refused(
    head: Head, bad: object, error: type[Exception], message: str
) -> None:
    saved = (tensor(np.empty(20)), tensor(np.empty((20, 1))))
    loss = tensor(np.empty(1))
    with pytest.raises(error, match=message):
        _core.cross_entropy_forward(
            bad, *head.operands[1:], SUM, 0.0, loss, *saved, None, head.plan(), 1
        )


def test_errors_have_the_expected_types(head: Head) -> None:
    saved = (tensor(np.empty(20)), tensor(np.empty((20, 1))))
    loss = tensor(np.empty(1))

    def call(changed: Head) -> None:
        operands, plan = changed.operands, head.plan()
        _core.cross_entropy_forward(*operands, SUM, 0.0, loss, *saved, None, plan, 1)

    ids = head.ids.copy()
    ids[7] = 50
    with pytest.raises(IndexError, match=r"target\[7\] = 50 is out of range"):
        call(head._replace(ids=ids))
    with pytest.raises(TypeError, match="weight has dtype float32"):
        call(head._replace(weight=head.weight.astype(np.float32)))
    with pytest.raises(ValueError, match=r"bias has shape \[49\]"):
        call(head._replace(bias=head.bias[:-1]))


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
def test_cross_entropy_in_one_call(head: Head, reduction: int, z_weight: float) -> None:
    rest, target = np.empty(20), np.empty((20, 1))
    loss = np.empty(20 if reduction == NONE else ())
    options = (reduction, z_weight)
    saved = (tensor(rest), tensor(target))
    plan = head.plan()
    kept = _core.cross_entropy_forward(
        *head.operands, *options, tensor(loss), *saved, None, plan, 0
    )
    assert kept == 19

    z = head.logits()
    lse = np.log(np.exp(z).sum(axis=1))
    rows, chosen = np.arange(20), np.where(head.ids[:, 0] < 0, 0, head.ids[:, 0])
    live = head.ids[:, 0] >= 0
    row_loss = np.where(live, lse - z[rows, chosen] + z_weight * lse**2, 0.0)
    reduce = {NONE: lambda a: a, MEAN: lambda a: a.sum() / 19, SUM: np.sum}[reduction]
    np.testing.assert_allclose(loss, reduce(row_loss), rtol=1e-12)

    grad = np.broadcast_to(np.array(1.5), loss.shape)
    d_input, d_weight, d_bias = map(np.empty_like, (head.input, head.weight, head.bias))
    gradients = (*map(tensor, (d_input, d_weight, d_bias)), None)
    _core.cross_entropy_backward(
        *head.operands, *options, *saved, tensor(grad), None, *gradients, plan, 0
    )
    p = np.exp(z - lse[:, None])
    dz = p * (1 + 2 * z_weight * lse[:, None])
    dz[rows, chosen] -= 1
    dz *= 1.5 * live[:, None] / (19 if reduction == MEAN else 1)
    np.testing.assert_allclose(d_input[0], dz @ head.weight, atol=1e-12)
    np.testing.assert_allclose(d_weight, dz.T @ head.input[0], atol=1e-12)
    np.testing.assert_allclose(d_bias, dz.sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("rows", [0, 4])
def test_cross_entropy_of_no_kept_row(head: Head, rows: int) -> None:
    ignored = head._replace(input=head.input[:, :rows], ids=np.full((rows, 1), -100))
    saved = (tensor(np.empty(rows)), tensor(np.empty((rows, 1))))
    for reduction, expected in ((MEAN, math.nan), (SUM, 0.0)):
        loss = np.empty(())
        options = (reduction, 0.0)
        plan = ignored.plan()
        kept = _core.cross_entropy_forward(
            *ignored.operands, *options, tensor(loss), *saved, None, plan, 0
        )
        assert kept == 0
        np.testing.assert_equal(loss[()], expected)
        d_weight = np.full_like(head.weight, 7.0)
        gradients = (None, tensor(d_weight), None, None)
        _core.cross_entropy_backward(
            *ignored.operands, *options, *saved, tensor(np.ones(())), None, *gradients, plan, 0
        )
        assert not d_weight.any()


def test_a_confident_row_keeps_its_digits() -> None:
    head = Head(
        np.ones((1, 1, 1), np.float32),
        np.array([[87.0], [0.0]], np.float32),
        np.zeros(2, np.float32),
        np.zeros((1, 1), np.int64),
    )
    loss, rest, target = (
        np.empty(1, np.float32),
        np.empty(1, np.float32),
        np.empty((1, 1), np.float32),
    )
    outputs = (*map(tensor, (loss, rest, target)), None)
    _core.cross_entropy_forward(*head.operands, SUM, 0.0, *outputs, head.plan(), 1)
    np.testing.assert_allclose(loss[0], math.exp(-87), rtol=1e-6)


def test_the_interpreter_runs_on_during_a_call() -> None:
    array = np.zeros(4_000_000)
    maximum, total = np.empty(()), np.empty(())
    pair = (tensor(maximum), tensor(total))
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(1e-4):
            ticks[0] += 1

    other = threading.Thread(target=tick)
    other.start()
    try:
        for _ in range(50):
            before = ticks[0]
            _core.logsumexp_pairs(tensor(array), None, (0,), *pair, False, 1)
            if ticks[0] > before:
                break
        else:
            pytest.fail("no other thread ran during fifty calls of milliseconds each")
    finally:
        stop.set()
        other.join()
    assert (maximum, total) == (0.0, 4_000_000.0)


def test_threads_are_set_and_told() -> None:
    before = _core.get_num_threads()
    try:
        _core.set_num_threads(3)
        assert _core.get_num_threads() == 3
        with pytest.raises(ValueError, match="threads = 0; expected 1 or more"):
            _core.set_num_threads(0)
    finally:
        _core.set_num_threads(before)
