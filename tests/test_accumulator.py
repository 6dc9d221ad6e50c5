"""`LogSumExp` and the streamed `logsumexp` that is built on it."""

from __future__ import annotations

import doctest
import pickle
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import logitless.accumulator
import logitless.numpy as ln
from logitless import LogSumExp, testing


def dense(a: np.ndarray, axis: Any, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(log |Σ w e^a|, sign) in float64, the definition."""
    a = np.asarray(a, np.float64)
    w = np.ones(a.shape) if weights is None else np.broadcast_to(weights, a.shape)
    a = np.where(w == 0, -np.inf, a)
    with np.errstate(all="ignore"):
        top = a.max(axis=axis, keepdims=True, initial=-np.inf)
        shift = np.where(np.isfinite(top), top, 0.0)
        total = np.where(w == 0, 0.0, w * np.exp(a - shift)).sum(axis=axis)
        return np.log(np.abs(total)) + shift.reshape(total.shape), np.sign(total)


def close(found: Any, expected: np.ndarray, dtype: str = "float32") -> None:
    """The error that the class promises."""
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    found = np.asarray(found)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    error = np.abs(found[finite] - expected[finite])
    assert (error <= tolerance * np.maximum(1.0, np.abs(expected[finite]))).all(), error.max()


AXES: list[Any] = [None, (), *(c for n in (1, 2, 3) for c in combinations(range(3), n))]


@pytest.mark.parametrize("axis", [*AXES, -1, (-2, 0)])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 70, 33), (40, 1, 2)])
def test_any_axes_of_any_layout(dtype: str, axis: Any, shape: tuple[int, ...]) -> None:
    array = testing.to_dtype(np.random.default_rng(0).standard_normal(shape) * 3, dtype)
    expected, _ = dense(array, axis)
    for name, view in testing.layouts(array):
        found = ln.logsumexp(view, axis)
        assert found.dtype == (np.float64 if dtype == "float64" else np.float32), name
        assert found.shape == expected.shape
        close(found, expected, dtype)
    kept = ln.logsumexp(array, axis, keepdims=True)
    assert kept.shape == array.sum(axis=axis, keepdims=True).shape


@pytest.mark.parametrize("axis", [None, 0, (1, 3, 5), (0, 2, 4), (5,), ()])
def test_more_axes_than_the_engine_takes(axis: Any, rng: np.random.Generator) -> None:
    array = rng.standard_normal((2, 3, 4, 2, 3, 2))
    mixed = array.transpose(3, 0, 5, 2, 1, 4)
    for view in (array, mixed, mixed[:, ::-1, :, ::2]):
        close(ln.logsumexp(view, axis), dense(view, axis)[0], "float64")
        weights = rng.standard_normal(view.shape)
        expected, sign = dense(view, axis, weights)
        found, found_sign = ln.logsumexp(view, axis, weights=weights, return_sign=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(found_sign, sign)


def test_scalars_and_empty_arrays() -> None:
    assert ln.logsumexp(np.array(2.5)) == 2.5
    assert ln.logsumexp(np.zeros(0, np.float32)) == -np.inf
    found = ln.logsumexp(np.zeros((3, 0)), axis=1)
    np.testing.assert_array_equal(found, [-np.inf] * 3)
    assert ln.logsumexp(np.zeros((0, 3)), axis=1).shape == (0,)


def test_infinities_and_nan() -> None:
    inf, nan = np.inf, np.nan
    rows = [
        ([-inf, -inf, -inf], -inf),
        ([inf, 0.0, -inf], inf),
        ([inf, inf, 1.0], inf),
        ([nan, 0.0, 0.0], nan),
        ([nan, inf, 0.0], nan),
        ([0.0, -inf, -inf], 0.0),
    ]
    for dtype in (np.float32, np.float64):
        array = np.array([row for row, _ in rows], dtype)
        expected = [value for _, value in rows]
        np.testing.assert_array_equal(ln.logsumexp(array, axis=1), expected)
        np.testing.assert_array_equal(ln.logsumexp(array.T.copy(), axis=0), expected)
        halves = LogSumExp(axis=1).update(array[:, :1]).update(array[:, 1:])
        np.testing.assert_array_equal(halves.value(), expected)


def test_weights_and_signs(rng: np.random.Generator) -> None:
    array = rng.standard_normal((4, 300)).astype(np.float32)
    weights = rng.standard_normal((4, 300))
    expected, sign = dense(array, 1, weights)
    found, found_sign = ln.logsumexp(array, 1, weights=weights, return_sign=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found_sign, sign)
    plain = ln.logsumexp(array, 1, weights=weights)
    np.testing.assert_array_equal(np.isnan(plain), sign < 0)
    for broadcast in (weights[0], weights[:, :1], np.float64(2.0), np.arange(300) % 2 == 0):
        full = np.broadcast_to(np.asarray(broadcast, float), array.shape)
        expected, _ = dense(array, 1, full)
        found, _ = ln.logsumexp(array, 1, weights=broadcast, return_sign=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_zero_weight_drops_its_element() -> None:
    array = np.array([np.nan, np.inf, 1.0, 2.0])
    found = ln.logsumexp(array, weights=np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(found, np.logaddexp(1.0, 2.0))
    value, sign = ln.logsumexp(array, weights=np.zeros(4), return_sign=True)
    assert value == -np.inf
    assert sign == 0


def test_terms_that_cancel() -> None:
    array = np.array([700.0, 700.0, 3.0])
    value, sign = ln.logsumexp(array, weights=np.array([1.0, -1.0, 0.0]), return_sign=True)
    assert value == -np.inf
    assert sign == 0
    both = np.array([np.inf, np.inf])
    assert np.isnan(ln.logsumexp(both, weights=np.array([1.0, -1.0])))


# The accumulator ----------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
    seed=st.integers(0, 1000),
    cut=st.integers(0, 8),
)
def test_any_grouping_of_chunks_agrees(
    lengths: list[int], scale: float, dtype: str, seed: int, cut: int
) -> None:
    rng = np.random.default_rng(seed)
    chunks = [(scale * rng.standard_normal((3, n))).astype(dtype) for n in lengths]
    expected, _ = dense(np.concatenate(chunks, axis=1), 1)
    in_order = LogSumExp(axis=1)
    for chunk in chunks:
        in_order.update(chunk)
    close(in_order.value(), expected, dtype)
    left, right = LogSumExp(axis=1), LogSumExp(axis=1)
    for chunk in chunks[:cut]:
        left.update(chunk)
    for chunk in chunks[cut:]:
        right.update(chunk)
    before = pickle.dumps(right)
    close(left.merge(right).value(), expected, dtype)
    assert pickle.dumps(right) == before
    # A balanced tree of single chunks.
    parts = [LogSumExp(axis=1).update(chunk) for chunk in chunks]
    while len(parts) > 1:
        paired = [parts[i].merge(parts[i + 1]) for i in range(0, len(parts) - 1, 2)]
        parts = paired + parts[len(paired) * 2 :]
    close(parts[0].value(), expected, dtype)


def test_thousands_of_small_chunks_lose_nothing() -> None:
    """Merging logarithms instead loses up to 6e-4 here."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal(262144).astype(np.float32)
    z[0] = 20.0
    total = LogSumExp()
    for start in range(0, len(z), 128):
        total.update(z[start : start + 128])
    close(total.value(), dense(z, None)[0])


def test_order_and_repetition_give_the_same_bits(rng: np.random.Generator) -> None:
    z = rng.standard_normal((5, 10000)).astype(np.float32)
    values = {LogSumExp(axis=1).update(z).value().tobytes() for _ in range(5)}
    assert len(values) == 1


def test_pickling_and_empty_accumulators(rng: np.random.Generator) -> None:
    z = rng.standard_normal((3, 7))
    total = pickle.loads(pickle.dumps(LogSumExp(axis=-1).update(z)))
    np.testing.assert_array_equal(total.value(), LogSumExp(axis=-1).update(z).value())
    np.testing.assert_array_equal(total.merge(LogSumExp(axis=-1)).value(), total.value())
    copied = LogSumExp(axis=-1).merge(total)
    copied.update(z)
    np.testing.assert_allclose(copied.value(), total.value() + np.log(2))
    assert total.value(keepdims=True).shape == (3, 1)
    assert "empty" in repr(LogSumExp())
    assert "(3,)" in repr(total)


def test_one_float64_chunk_widens_the_result() -> None:
    total = LogSumExp().update(np.zeros(3, np.float32))
    assert total.value().dtype == np.float32
    assert total.update(np.zeros(3)).value().dtype == np.float64
    np.testing.assert_allclose(total.value(), np.log(6.0), rtol=1e-15)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
def test_torch_chunks(name: str) -> None:
    torch = pytest.importorskip("torch")
    z = torch.randn(4, 6, 8).to(getattr(torch, name)).requires_grad_()
    total = LogSumExp(axis=(0, -1))
    for chunk in z.split(3, dim=2):
        total.update(chunk, weights=torch.ones(1, dtype=torch.bool))
    value = total.value()
    assert isinstance(value, torch.Tensor)
    assert not value.requires_grad
    assert value.dtype == (torch.float64 if name == "float64" else torch.float32)
    expected = torch.logsumexp(z.detach().double(), dim=(0, 2))
    close(value.numpy(), expected.numpy(), name)
    with pytest.raises(TypeError, match="torch tensors"):
        total.update(np.zeros((4, 6, 8)))


def test_a_refused_chunk_changes_nothing() -> None:
    total = LogSumExp(axis=1)
    with pytest.raises(ValueError, match="weights"):
        total.update(np.ones((2, 3)), weights=np.ones(2))
    assert "empty" in repr(total)
    total.update(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"chunk\.shape"):
        total.update(np.ones((2, 3)))
    np.testing.assert_allclose(total.value(), np.log(3.0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LogSumExp().value(), ValueError, "update"),
        (lambda: LogSumExp().update([1.0]), TypeError, "NumPy array or torch tensor"),
        (lambda: LogSumExp().update(np.ones(3, int)), TypeError, "chunk.dtype"),
        (lambda: LogSumExp().update(np.ones(3, complex)), TypeError, "chunk.dtype"),
        (lambda: LogSumExp(axis=1).update(np.ones(3)), ValueError, "axis = 1"),
        (lambda: LogSumExp(axis=(0, 0)).update(np.ones(3)), ValueError, "axis"),
        (
            lambda: LogSumExp(axis=1).update(np.ones((2, 3))).update(np.ones((3, 3))),
            ValueError,
            "chunk.shape",
        ),
        (lambda: LogSumExp().update(np.ones(3), weights=np.ones(2)), ValueError, "weights.shape"),
        (lambda: LogSumExp().update(np.ones(3), weights=1j), TypeError, "weights.dtype"),
        (lambda: LogSumExp().merge(np.ones(3)), TypeError, "LogSumExp"),
        (
            lambda: (
                LogSumExp(axis=1)
                .update(np.ones((2, 3)))
                .merge(LogSumExp(axis=1).update(np.ones((4, 3))))
            ),
            ValueError,
            r"\(2,\)",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_examples_in_the_documentation() -> None:
    failed, attempted = doctest.testmod(logitless.accumulator)
    assert attempted > 0
    assert failed == 0
