"""The CuPy face against the NumPy face on the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import logitless.numpy as ln

pytestmark = pytest.mark.gpu


def arrays(dtype: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((5, 13, 24)).astype(dtype)
    head = (rng.standard_normal((700, 24)) / 3).astype(dtype)
    bias = rng.standard_normal(700).astype(dtype)
    target = rng.integers(0, 700, (5, 13))
    target[1, :4] = -100
    return hidden, head, bias, target


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss_weight": 0.01}], ids=str)
def test_cross_entropy(dtype: str, reduction: str, options: dict[str, Any]) -> None:
    cp = pytest.importorskip("cupy")
    import logitless.cupy as lc

    hidden, head, bias, target = arrays(dtype)
    moved = [cp.asarray(x) for x in (hidden, head, target)]
    with cp.cuda.Stream():
        got = lc.linear_cross_entropy(
            *moved, linear_bias=cp.asarray(bias), reduction=reduction, **options
        )
        cp.cuda.get_current_stream().synchronize()
    want = ln.linear_cross_entropy(
        hidden, head, target, linear_bias=bias, reduction=reduction, **options
    )
    bound = {"float64": 1e-10, "float32": 1e-4, "float16": 4e-3}[dtype]
    for mine, theirs in zip(got, want, strict=True):
        difference = cp.asnumpy(mine).astype(np.float64) - theirs
        assert np.linalg.norm(difference) <= bound * np.linalg.norm(theirs)


def test_row_statistics() -> None:
    cp = pytest.importorskip("cupy")
    import logitless.cupy as lc

    hidden, head, _, target = arrays("float64")
    stats, vjp = lc.row_statistics(
        *(cp.asarray(x) for x in (hidden, head, target)), want=("rest", "target", "entropy")
    )
    same, same_vjp = ln.row_statistics(hidden, head, target, want=("rest", "target", "entropy"))
    assert np.allclose(cp.asnumpy(stats.rest), same.rest.ravel(), rtol=1e-12)
    weights = np.random.default_rng(1).standard_normal(target.shape)
    got = vjp(rest=cp.asarray(weights.ravel()))
    want = same_vjp(rest=weights)
    assert np.allclose(cp.asnumpy(got["linear_weight"]), want.linear_weight, rtol=1e-9, atol=1e-12)
    with pytest.raises(AttributeError, match="name it in want"):
        _ = stats.variance


def test_a_numpy_array_is_refused() -> None:
    pytest.importorskip("cupy")
    import logitless.cupy as lc

    hidden, head, _, target = arrays("float64")
    with pytest.raises(TypeError, match=r"cupy\.asarray"):
        lc.linear_cross_entropy(hidden, head, target)
