"""Inputs for tests: heads of any dtype and size, and one array in every memory layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """Arguments of a linear head with targets."""

    input: NDArray[Any]
    linear_weight: NDArray[Any]
    linear_bias: NDArray[Any]
    target: NDArray[np.int64]
    ignore_index: int


def to_dtype(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Cast to a NumPy dtype or to ``"bfloat16"`` (which needs the package ``ml_dtypes``)."""
    if str(dtype) == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return array.astype(dtype)


def make_case(
    rows: int = 7,
    features: int = 5,
    classes: int = 11,
    *,
    dtype: Any = "float32",
    seed: int = 0,
    leading: tuple[int, ...] = (),
    targets: int | None = None,
    ignored: float = 0.2,
    ignore_index: int = -100,
    spread: float = 2.0,
    offset: float = 0.0,
) -> Case:
    """Make a head whose logits have about the standard deviation `spread` and the mean `offset`.

    Parameters
    ----------
    rows, features, classes : int
        N (the last leading axis), D and V.
    dtype : dtype or name
        Of input, weight and bias.
    leading : tuple of int
        Axes in front of the rows.
    targets : int, optional
        Ids a row K; None gives targets without a column axis.
    ignored : float
        Share of the ids that are `ignore_index`.

    Returns
    -------
    Case
        ``input`` (*leading, rows, D), ``linear_weight`` (V, D), ``linear_bias`` (V,), ``target``
        (*leading, rows) or (*leading, rows, K), ids with repetitions.
    """
    rng = np.random.default_rng(seed)
    shape = (*leading, rows)
    hidden = rng.standard_normal((*shape, features))
    weight = rng.standard_normal((classes, features)) * (spread / np.sqrt(features))
    bias = rng.standard_normal(classes) * 0.5 + offset
    columns = shape if targets is None else (*shape, targets)
    ids = rng.integers(0, classes, columns)
    ids = np.where(rng.random(columns) < ignored, ignore_index, ids)
    return Case(
        to_dtype(hidden, dtype),
        to_dtype(weight, dtype),
        to_dtype(bias, dtype),
        ids.astype(np.int64),
        ignore_index,
    )


def layouts(array: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield (name, view) with the values of `array` in every memory layout a caller may hold.

    Contiguous, Fortran order, every second element, reversed axes, a column window, unaligned by
    one byte, read-only, and (where it has the same values) a broadcast row.
    """
    array = np.ascontiguousarray(array)
    yield "contiguous", array.copy()
    yield "fortran", np.asfortranarray(array)
    doubled = np.empty(tuple(2 * n for n in array.shape), array.dtype)
    every_second = doubled[(slice(None, None, 2),) * array.ndim]
    every_second[...] = array
    yield "strided", every_second
    reverse = (slice(None, None, -1),) * array.ndim
    yield "negative", array[reverse].copy()[reverse]
    window = np.empty((*array.shape[:-1], array.shape[-1] + 3), array.dtype)[..., 1:-2]
    window[...] = array
    yield "window", window
    raw = np.empty(array.nbytes + 1, np.uint8)[1:]
    unaligned = raw.view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    yield "unaligned", unaligned
    fixed = array.copy()
    fixed.flags.writeable = False
    yield "readonly", fixed
    if array.ndim and array.shape[0] and (array == array[:1]).all():
        yield "broadcast", np.broadcast_to(array[:1], array.shape)
