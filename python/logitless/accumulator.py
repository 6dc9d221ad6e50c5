"""`LogSumExp`: log-sum-exp of data that arrives in chunks, from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitless import _core
from logitless._arrays import BF16, CODES, F16, F32, F64, Handle, framework, handle
from logitless._check import argument_error, type_error

__all__ = ["LogSumExp"]

Floats = NDArray[np.float64]
FLOATS = ("float32", "float64", "bfloat16", "float16")

# The engine reads tensors of up to four dimensions; more are looped over where they do not fold.
MAX_RANK = 4
ITEM_SIZE = {F32: 4, F64: 8, BF16: 2, F16: 2}


class LogSumExp:
    """``log Σ w e^a`` over chunks, merged as (maximum, sum) pairs.

    Each chunk is read once, in place, whatever its strides, and gives for every kept element the
    pair ``m = max a`` and ``s = Σ w e^{a−m}``. Pairs merge without a logarithm,

        m = max(m₁, m₂),   s = s₁ e^{m₁−m} + s₂ e^{m₂−m},

    in float64 and in the order of the calls, so that no increment is lost below half an ulp of the
    result, as happens when logarithms are merged: there, 2048 chunks lose up to 6e-4. One logarithm
    is taken at the end. Merging is associative and commutative to within one rounding of float64 a
    merge: for chunks of up to 32 bits every grouping agrees to 2e-6 · max(1, |value|), and to
    1e-13 · max(1, |value|) · (number of merges) for float64, unless signed weights cancel.

    Parameters
    ----------
    axis : int or sequence of int, optional
        Axes of the chunks to reduce, all by default. Chunks may have any length along them, but one
        shape along the others.

    Notes
    -----
    One accumulator belongs to one thread at a time; give each thread its own and merge them.

    Examples
    --------
    A row of logits in two parts, and the merge of two accumulators:

    >>> import numpy as np
    >>> from logitless import LogSumExp
    >>> z = np.random.default_rng(0).standard_normal((3, 10))
    >>> first = LogSumExp(axis=-1).update(z[:, :4])
    >>> second = LogSumExp(axis=-1).update(z[:, 4:])
    >>> bool(np.allclose(first.merge(second).value(), np.log(np.exp(z).sum(axis=-1))))
    True
    """

    def __init__(self, axis: int | Sequence[int] | None = None) -> None:
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self._maximum: Floats | None = None
        self._total: Floats | None = None
        self._wide = False
        self._torch = False
        self._axes: tuple[int, ...] = ()

    def update(self, chunk: Any, *, weights: Any = None) -> LogSumExp:
        """Add a chunk; return the accumulator itself.

        Parameters
        ----------
        chunk : NumPy array or torch CPU tensor of float32, float64, bfloat16 or float16
            Not differentiated. A row without elements changes nothing.
        weights : array or tensor that broadcasts to `chunk`, optional
            Factors of any sign; integers and booleans will do. A zero drops its element, also an
            infinite or nan one.

        Raises
        ------
        TypeError
            Not an array of floats, or a mix of NumPy and torch.
        ValueError
            A shape that does not fit the axes, the weights or the chunks before.
        """
        kind = _check_chunk(chunk)
        if self._maximum is not None and (kind == "torch") != self._torch:
            before = "torch tensors" if self._torch else "NumPy arrays"
            raise type_error("chunk", f"a {kind} array", before, "as the chunks before: convert it")
        array = chunk.detach() if kind == "torch" else _readable(chunk)
        axes = self._normalised(tuple(array.shape))
        kept = tuple(n for axis, n in enumerate(array.shape) if axis not in axes)
        factors = None if weights is None else _weights(weights, tuple(array.shape))
        if self._maximum is None:
            self._maximum, self._total = np.full(kept, -np.inf), np.zeros(kept)
            self._torch, self._axes = kind == "torch", axes
        elif kept != self._maximum.shape or axes != self._axes:
            raise argument_error(
                "chunk.shape",
                tuple(array.shape),
                f"{self._maximum.shape} without axes {self._axes}, as the chunks before",
                "chunks differ in length along the reduced axes only",
            )
        assert self._total is not None
        if prod(array.shape):
            _accumulate(
                handle(array),
                None if factors is None else handle(factors),
                tuple(axis in axes for axis in range(array.ndim)),
                handle(self._maximum),
                handle(self._total),
            )
        self._wide |= str(array.dtype).endswith("float64")
        return self

    def merge(self, other: LogSumExp) -> LogSumExp:
        """Add what `other` has seen, after what this one has seen; return this accumulator.

        `other` is not changed. An accumulator without chunks is neutral.
        """
        if not isinstance(other, LogSumExp):
            raise type_error("other", type(other).__name__, "a LogSumExp", "update() takes arrays")
        if other._maximum is None or other._total is None:
            return self
        if self._maximum is None or self._total is None:
            self._maximum, self._total = other._maximum.copy(), other._total.copy()
            self._torch, self._wide = other._torch, other._wide
            self._axes = other._axes
            return self
        if self._maximum.shape != other._maximum.shape:
            raise argument_error(
                "other", other, f"the shape {self._maximum.shape}", "accumulate the same rows"
            )
        self._maximum, self._total = _merged(
            self._maximum, self._total, other._maximum, other._total
        )
        self._wide |= other._wide
        return self

    def value(self, *, keepdims: bool = False, return_sign: bool = False) -> Any:
        """Return ``log Σ``, or ``(log |Σ|, sign Σ)``.

        Parameters
        ----------
        keepdims : bool
            Keep the reduced axes with length one.
        return_sign : bool
            Return the sign of the sum (−1, 0 or 1) too. Without it a negative sum gives nan.

        Returns
        -------
        array of the kept shape, in the framework of the chunks
            float32, or float64 once a chunk was float64. −inf for an empty sum, nan where a nan or
            infinities of both signs entered.
        """
        if self._maximum is None or self._total is None:
            raise ValueError("LogSumExp.value(): no chunk yet; call update(chunk) first")
        with np.errstate(all="ignore"):
            value = self._maximum + np.log(np.abs(self._total))
        sign = np.sign(self._total)
        if not return_sign:
            value = np.where(sign < 0, np.nan, value)
        if keepdims:
            value, sign = (np.expand_dims(array, self._axes) for array in (value, sign))
        if return_sign:
            return self._finished(value), self._finished(sign)
        return self._finished(value)

    def _finished(self, array: Floats) -> Any:
        narrow = np.asarray(array, np.float64 if self._wide else np.float32)
        if not self._torch:
            return narrow
        from logitless._extras import torch

        return torch.from_numpy(narrow.copy())

    def _normalised(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of a chunk that are reduced, sorted and non-negative."""
        if self.axis is None:
            return tuple(range(len(shape)))
        given = (self.axis,) if isinstance(self.axis, int) else self.axis
        axes = sorted(axis + len(shape) if axis < 0 else axis for axis in given)
        if any(not 0 <= axis < len(shape) for axis in axes) or len(set(axes)) < len(axes):
            raise argument_error(
                "axis",
                self.axis,
                f"different axes of a chunk of shape {shape}",
                "axis=None reduces everything",
            )
        return tuple(axes)

    def __repr__(self) -> str:
        seen = "empty" if self._maximum is None else f"shape={self._maximum.shape}"
        return f"LogSumExp(axis={self.axis}, {seen})"


def _merged(m0: Floats, s0: Floats, m1: Floats, s1: Floats) -> tuple[Floats, Floats]:
    """Merge two pairs, the first one first. A side that holds the maximum is not rescaled."""
    top = np.maximum(m0, m1)
    with np.errstate(all="ignore"):
        first = np.where(m0 == top, s0, s0 * np.exp(m0 - top))
        second = np.where(m1 == top, s1, s1 * np.exp(m1 - top))
    return top, first + second


def _check_chunk(chunk: Any) -> str:
    kind = framework(chunk)
    if kind not in ("numpy", "torch") or isinstance(chunk, np.ma.MaskedArray):
        remedy = "use numpy.asarray or torch.as_tensor"
        raise type_error("chunk", type(chunk).__name__, "a NumPy array or torch tensor", remedy)
    name = str(chunk.dtype).removeprefix("torch.") if kind == "torch" else chunk.dtype.name
    if name not in FLOATS:
        raise type_error("chunk.dtype", name, f"one of {', '.join(FLOATS)}", "convert it")
    if kind == "torch" and (chunk.device.type != "cpu" or chunk.layout != _strided()):
        place = f"{chunk.layout} on {chunk.device}"
        raise type_error("chunk", place, "a strided CPU tensor", "use chunk.to_dense().cpu()")
    return kind


def _strided() -> Any:
    from logitless._extras import torch

    return torch.strided


def _readable(array: NDArray[Any]) -> NDArray[Any]:
    """`array` itself if the engine can read it in place, else a native copy."""
    if (
        array.flags.aligned
        and array.dtype.isnative
        and all(stride % array.itemsize == 0 for stride in array.strides)
    ):
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _weights(weights: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Weights as an array of floats that broadcasts to `shape`, without expanding it."""
    if framework(weights) == "torch":
        weights = weights.detach().cpu()
        weights = (weights if str(weights.dtype) in CODES else weights.double()).numpy()
    array = np.asarray(weights)
    if array.dtype.kind == "c" or array.dtype == object:
        raise type_error("weights.dtype", array.dtype, "real numbers", "convert them")
    if array.dtype.name not in ("float32", "float64"):
        array = array.astype(np.float64)
    try:
        return np.broadcast_to(_readable(array), shape)
    except ValueError:
        raise argument_error(
            "weights.shape", array.shape, f"a shape that broadcasts to {shape}", "as in NumPy"
        ) from None


def _accumulate(
    array: Handle,
    weights: Handle | None,
    reduced: tuple[bool, ...],
    maximum: Handle,
    total: Handle,
) -> None:
    """Merge an array's pairs into (maximum, total), in place.

    Neighbouring axes that are laid out as one are folded first. What is left beyond the rank that
    the engine takes is walked along its first kept axis (or first axis, if none is kept), in order.
    """
    array, weights, reduced = _folded(array, weights, reduced)
    shape = array[2]
    kept = tuple(n for n, gone in zip(shape, reduced, strict=True) if not gone)
    pairs = [(address, code, kept, _contiguous(kept)) for address, code, _, _ in (maximum, total)]
    if len(shape) <= MAX_RANK:
        axes = tuple(axis for axis, gone in enumerate(reduced) if gone)
        _core.logsumexp_pairs(array, weights, axes, pairs[0], pairs[1], True, 0)
        return
    axis = reduced.index(False) if kept else 0
    inner = reduced[:axis] + reduced[axis + 1 :]
    for i in range(shape[axis]):
        at = [_select(pair, 0, i) if kept else pair for pair in pairs]
        part = None if weights is None else _select(weights, axis, i)
        _accumulate(_select(array, axis, i), part, inner, at[0], at[1])


def _select(view: Handle, axis: int, i: int) -> Handle:
    """``view[..., i, ...]`` along `axis`."""
    address, code, shape, strides = view
    address += i * strides[axis] * ITEM_SIZE[code]
    return (
        address,
        code,
        (*shape[:axis], *shape[axis + 1 :]),
        (*strides[:axis], *strides[axis + 1 :]),
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _folded(
    array: Handle, weights: Handle | None, reduced: tuple[bool, ...]
) -> tuple[Handle, Handle | None, tuple[bool, ...]]:
    """Fold each axis into the one after it where both are reduced or kept and no stride breaks."""
    shape, flags = list(array[2]), list(reduced)
    views = [array] if weights is None else [array, weights]
    strides = [list(view[3]) for view in views]
    for axis in reversed(range(len(shape) - 1)):
        compatible = all(s[axis] == s[axis + 1] * shape[axis + 1] for s in strides)
        if compatible and flags[axis] == flags[axis + 1]:
            shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
            del flags[axis]
            for s in strides:
                del s[axis]
    folded = [(v[0], v[1], tuple(shape), tuple(s)) for v, s in zip(views, strides, strict=True)]
    return folded[0], None if weights is None else folded[1], tuple(flags)
