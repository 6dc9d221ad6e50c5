"""Sizes where 32-bit offsets, naive sums and careless merges would show."""

from __future__ import annotations

import numpy as np
import pytest

import logitless.numpy as ln
from logitless import LogSumExp, testing

CLASSES = 262144


def draw(name: str, rng: np.random.Generator) -> np.ndarray:
    """Logits of six kinds, among them the worst cases of streamed sums."""
    normal = rng.standard_normal(CLASSES)
    match name:
        case "normal":
            z = normal
        case "wide":
            z = 3 * normal
        case "offset":
            z = normal + 100
        case "zipf":
            z = -np.log1p(np.arange(CLASSES))
            z = rng.permutation(z)
        case "ascending":
            z = np.sort(3 * normal)
        case "one large":
            z = normal
            z[rng.integers(CLASSES)] = 20.0
        case _:
            raise KeyError(name)
    return z.astype(np.float32)


KINDS = ["normal", "wide", "offset", "zipf", "ascending", "one large"]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_log_sum_exp_of_many_classes(kind: str) -> None:
    """Within 2e-6 · max(1, |lse|), where element-wise or logarithmic merges lose up to 6e-4."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        z = draw(kind, rng)
        wide = z.astype(np.float64)
        expected = wide.max() + np.log(np.exp(wide - wide.max()).sum())
        allowed = 2e-6 * max(1.0, abs(expected))
        one = np.ones((1, 1), np.float32)
        chunks = LogSumExp()
        for chunk in np.array_split(z, 1000):
            chunks.update(chunk)
        found = {
            "head": ln.linear_logsumexp(one, z[:, None])[0],
            "array": ln.logsumexp(z),
            "columns": ln.logsumexp(np.stack([z, z], axis=1), 0)[1],
            "chunks": chunks.value(),
        }
        for name, value in found.items():
            assert abs(value - expected) <= allowed, f"{name}: {value} against {expected}"
        stats, _ = ln.row_statistics(one, z[:, None], np.array([7]), want=("lse", "entropy"))
        assert abs(stats.lse[0] - expected) <= allowed
        p = np.exp(wide - expected)
        entropy = (p * (expected - wide)).sum()
        assert abs(stats.entropy[0] - entropy) <= 4e-6 * max(1.0, entropy)


def repeated(distinct: np.ndarray, count: int) -> np.ndarray:
    return np.ascontiguousarray(np.resize(distinct, (count, distinct.shape[1])))


@pytest.mark.slow
def test_more_logits_than_32_bits_count() -> None:
    """N · V > 2³¹, from few distinct rows and classes so that the answer is known."""
    rows, classes, kinds = 32768, 65600, 16
    assert rows * classes > 2**31
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((kinds, 2)).astype(np.float32)
    weight = rng.standard_normal((32, 2)).astype(np.float32)
    copies = classes // len(weight)
    target = np.resize(np.arange(kinds) * 2 + len(weight) * (copies - 1), rows)
    found = ln.linear_cross_entropy(repeated(hidden, rows), repeated(weight, classes), target)
    # A softmax over `copies` equal classes of each kind.
    z = hidden.astype(np.float64) @ weight.astype(np.float64).T
    lse = np.log(np.exp(z).sum(axis=1)) + np.log(copies)
    kind_target = target[:kinds] % len(weight)
    at_target = z[np.arange(kinds), kind_target]
    np.testing.assert_allclose(found.loss, (lse - at_target).mean(), rtol=2e-6)
    p = np.exp(z - lse[:, None])
    d_hidden = (copies * p @ weight - weight[kind_target]) / rows
    testing.assert_close(found.input[-kinds:], d_hidden, "gradient", "float32", factor=4.0)
    d_weight = (p.T @ hidden) / kinds
    testing.assert_close(found.linear_weight[:32], d_weight, "gradient", "float32", factor=4.0)


def test_strides_beyond_32_bits() -> None:
    """Three classes whose rows lie 2³⁰ elements apart, in memory that is reserved, not touched."""
    step = 2**30 + 8
    try:
        reserved = np.zeros(2 * step + 64, np.float32)
    except MemoryError:
        pytest.skip("the address space is too small")
    weight = np.lib.stride_tricks.as_strided(reserved, (3, 5), (4 * step, 4))
    assert weight[-1].ctypes.data - weight.ctypes.data > 2**32
    case = testing.make_case(40, 5, 3)
    weight[...] = case.linear_weight
    found = ln.linear_cross_entropy(case.input, weight, case.target)
    expected = ln.linear_cross_entropy(case.input, case.linear_weight, case.target)
    np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(found.linear_weight, expected.linear_weight)
    np.testing.assert_allclose(ln.logsumexp(weight, 0), ln.logsumexp(case.linear_weight, 0))


@pytest.mark.parametrize("margin", [-500.0, 500.0])
def test_margins_of_hundreds_of_nats(margin: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.standard_normal(5000).astype(np.float32)
    z[123] += np.float32(margin)
    for target in (123, 7):
        found, vjp = ln.row_statistics(
            np.ones((1, 1), np.float32),
            z[:, None],
            np.array([target]),
            want=("rest", "target", "log_prob", "entropy", "lse"),
        )
        expected, expected_vjp = testing.row_statistics(
            np.ones((1, 1)), z[:, None], np.array([target])
        )
        for name in found:
            testing.assert_close(getattr(found, name), expected[name], name, "float32")
        for name in ("log_prob", "entropy", "lse"):
            gradient = vjp(**{name: 1.0}).linear_weight
            want = expected_vjp(**{name: 1.0})["linear_weight"]
            assert np.isfinite(gradient).all()
            testing.assert_close(gradient, want, "gradient", "float32", scale=1.0)
