"""log-sum-exp of an array over any axes, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from logitless.accumulator import LogSumExp
from logitless.numpy._head import Array


@overload
def logsumexp(
    a: Array,
    axis: int | Sequence[int] | None = ...,
    *,
    weights: Array | None = ...,
    keepdims: bool = ...,
    return_sign: Literal[False] = ...,
) -> Array: ...


@overload
def logsumexp(
    a: Array,
    axis: int | Sequence[int] | None = ...,
    *,
    weights: Array | None = ...,
    keepdims: bool = ...,
    return_sign: Literal[True],
) -> tuple[Array, Array]: ...


def logsumexp(
    a: Array,
    axis: int | Sequence[int] | None = None,
    *,
    weights: Array | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
) -> Array | tuple[Array, Array]:
    """``log Σ w e^a`` over one, several or all axes, without a temporary of the array's size.

    The array is read once, in place, whatever its strides; blocks give (maximum, sum) pairs that
    merge in a fixed order in float64, so that the bits depend on neither threads nor memory.

    Parameters
    ----------
    a : array of float32, float64, float16 or bfloat16
    axis : int or sequence of int, optional
        Axes to reduce; all by default, none for ``()``.
    weights : array that broadcasts to `a`, optional
        Factors w of any sign. A zero drops its element, also an infinite or nan one.
    keepdims : bool
        Keep reduced axes with length one.
    return_sign : bool
        Return ``(log |Σ|, sign Σ)``. Without it a negative sum gives nan.

    Returns
    -------
    array
        float32 for half and float32 input, float64 for float64. The error is below
        2e-6 · max(1, |result|) in float32 for positive weights, up to 2**31 terms; with weights of
        both signs it grows by Σ|w|e^a / |Σ w e^a|.

    Examples
    --------
    >>> import numpy as np, logitless.numpy as ln
    >>> float(ln.logsumexp(np.array([1000.0, 1000.0])))
    1000.6931471805599
    >>> ln.logsumexp(np.zeros((2, 3, 4)), axis=(0, 2)).shape
    (3,)
    """
    total = LogSumExp(axis=axis).update(a, weights=weights)
    result: Array | tuple[Array, Array] = total.value(keepdims=keepdims, return_sign=return_sign)
    return result
