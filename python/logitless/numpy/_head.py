"""A linear head over NumPy arrays: what is checked, copied and allocated around an engine call.

Rows are *flat* here: with a weight (V, d1, ..., dK, D) the engine runs once for each position
(d1, ..., dK), and every per-row array holds the positions one after the other. `Head.public` and
`Head.flat` translate between this order and the shapes that callers see.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitless import _core
from logitless._arrays import CODES, Handle, handle
from logitless._check import (
    Geometry,
    check_dense,
    check_memory,
    check_softcap,
    check_topk,
    check_vectors,
    geometry,
    type_error,
)
from logitless.stats import Request

Array = NDArray[Any]
Index = tuple[Any, ...]
Problem = tuple[
    Handle,
    Handle | None,
    Handle | None,
    int | None,
    float,
    float,
    Handle | None,
    Handle | None,
]
FLOATS = ("float32", "float64", "bfloat16", "float16")

IGNORE_INDEX = -100

# Bits of the gradient mask of `_core.plan`.
GRADIENT_BITS = {"input": 1, "linear_weight": 2, "linear_bias": 4, "logit_scale": 8, "dot": 16}


def float_array(name: str, value: Any, dtype: Any = None) -> Array:
    """Check that `value` is a NumPy array of floats; copy it only if the engine cannot read it.

    Any strides are read in place. Unaligned data, foreign byte orders and strides that are no
    multiple of the item size (fields of records) are copied.
    """
    array = any_array(name, value)
    if array.dtype.name not in FLOATS:
        raise type_error(
            f"{name}.dtype", array.dtype, f"one of {', '.join(FLOATS)}", f"use {name}.astype(...)"
        )
    array = readable(array)
    if dtype is not None and array.dtype != dtype:
        raise type_error(
            f"{name}.dtype", array.dtype, f"{dtype}, the dtype of input", f"use {name}.astype(...)"
        )
    return array


def any_array(name: str, value: Any) -> Array:
    """Check that `value` is a plain NumPy array (or scalar)."""
    array: Array = np.asarray(value) if isinstance(value, np.generic) else value
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        remedy = "use numpy.asarray, or logitless.functional for torch tensors"
        raise type_error(name, type(array).__name__, "a numpy.ndarray", remedy)
    return np.asarray(array)  # numpy.matrix and other subclasses index in ways of their own


def readable(array: Array) -> Array:
    """`array` itself if its elements can be read in place, else a copy in native layout."""
    whole = all(stride % array.itemsize == 0 for stride in array.strides)
    if array.flags.aligned and array.dtype.isnative and whole:
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def integer_array(name: str, array: Any) -> NDArray[np.int64]:
    """Class ids of any integer dtype as int64."""
    array = any_array(name, array)
    if array.dtype.kind not in "iu":
        raise type_error(
            f"{name}.dtype", array.dtype, "an integer dtype for class ids", f"{name}.astype(int)"
        )
    return np.asarray(array, dtype=np.int64)


def is_floating(array: Any) -> bool:
    """Whether `array` holds class probabilities."""
    return isinstance(array, (np.ndarray, np.generic)) and array.dtype.name in FLOATS


def _real(name: str, value: Any) -> float:
    if np.ndim(value) or not np.isrealobj(value) or isinstance(value, (str, bytes)):
        raise type_error(name, repr(value), "a number", "one scale for all logits")
    return float(value)


def _maybe(array: Array | None) -> Handle | None:
    return None if array is None else handle(array)


class Saved(NamedTuple):
    """What a forward leaves for its backward."""

    plan: _core.Plan
    outputs: dict[str, Array]
    stores: list[Array | None]


class Head:
    """The checked arguments of one call on a linear head.

    Parameters
    ----------
    input, linear_weight, linear_bias, target, ignore_index, logit_scale, softcap, shift, memory
        As in `logitless.numpy.row_statistics`.
    target_weight : array, optional
        Only its shape is checked here.
    gradients : tuple of str
        Names of the gradients that a backward will be asked for.
    """

    def __init__(
        self,
        input: Any,
        linear_weight: Any,
        target: Any = None,
        *,
        linear_bias: Any = None,
        target_weight: Any = None,
        ignore_index: int | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: int = 0,
        memory: str | int = "lean",
        gradients: tuple[str, ...] = (),
    ) -> None:
        self.input = float_array("input", input)
        self.dtype = self.input.dtype
        self.acc = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)
        self.weight = float_array("linear_weight", linear_weight, self.dtype)
        self.bias = None
        if linear_bias is not None:
            self.bias = float_array("linear_bias", linear_bias, self.dtype)
        floating = is_floating(target)
        ids = None
        if target is not None and not floating:
            ids = integer_array("target", target)
        self.geometry: Geometry = geometry(
            self.input.shape,
            self.weight.shape,
            None if self.bias is None else self.bias.shape,
            None if target is None else target.shape,
            floating,
            None if target_weight is None else any_array("target_weight", target_weight).shape,
            shift,
        )
        self.shift = shift
        self.ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
        self.scale = _real("logit_scale", logit_scale)
        self.softcap = check_softcap(softcap)
        self.memory = check_memory(memory)
        self.gradients = gradients
        self.positions: list[tuple[int, ...]] = list(np.ndindex(*self.geometry.positions))
        self.rows = prod(self.geometry.rows_shape[: len(self.geometry.lead)])
        self.ids: NDArray[np.int64] | None = None
        if ids is not None:
            self.set_ids(ids)

    def set_ids(self, ids: NDArray[np.int64]) -> None:
        """Take class ids of the rows' shape (before the shift), or with an axis of K ids."""
        columns = ids.shape[len(self.geometry.lead) + len(self.geometry.positions) :]
        cut = self.cut(ids)
        if len(self.positions) > 1:
            self._check_ids(cut)
        self.ids = np.ascontiguousarray(self.flat(cut, columns or (1,)), dtype=np.int64)

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        """Check the ids of all positions before the engine works on the first."""
        classes = self.geometry.classes
        bad = ((ids < 0) | (ids >= classes)) & (ids != self.ignore_index)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise IndexError(
                f"target[{', '.join(map(str, first))}] = {ids[first]} is out of range; expected a "
                f"class id in [0, {classes}), or ignore_index for positions to skip"
            )

    # Shapes -------------------------------------------------------------------------------------

    def cut(self, array: Array) -> Array:
        """Drop the first `shift` positions of a per-row argument: row t belongs to t + shift."""
        axis = len(self.geometry.lead) - 1
        return array[(slice(None),) * axis + (slice(self.shift, None),)] if self.shift else array

    def flat(self, array: Array, columns: tuple[int, ...] = ()) -> Array:
        """(rows, positions, columns) as callers see it to (positions · rows, columns)."""
        lead, positions = len(self.geometry.lead), len(self.geometry.positions)
        axes = (*range(lead, lead + positions), *range(lead), *range(lead + positions, array.ndim))
        return array.transpose(axes).reshape(len(self.positions) * self.rows, *columns)

    def public(self, array: Array, columns: tuple[int, ...]) -> Array:
        """Undo `flat`; the result is contiguous."""
        lead, positions = len(self.geometry.lead), len(self.geometry.positions)
        shape = self.geometry.rows_shape
        split = array.reshape((*shape[lead:], *shape[:lead], *columns))
        axes = (*range(positions, positions + lead), *range(positions))
        axes += tuple(range(lead + positions, split.ndim))
        return np.ascontiguousarray(split.transpose(axes)).reshape((*shape, *columns))

    def input_rows(self, array: Array) -> Array:
        """The rows of an array of input's shape as the engine takes them: (outer, inner, D).

        A view, unless the leading axes of `array` do not fold to two.
        """
        if array.ndim == 1:
            return array[None, None, :]
        kept = array[..., : array.shape[-2] - self.shift, :]
        return kept.reshape(prod(kept.shape[:-2]), *kept.shape[-2:])

    def _vectors(self, request: Request) -> Array | None:
        if request.vectors is None:
            return None
        vectors = any_array("stats.weighted(c): c", request.vectors)
        check_vectors(vectors.shape, self.geometry.classes)
        return np.ascontiguousarray(np.atleast_2d(vectors), dtype=self.acc)

    def _dense(self, request: Request) -> list[Array] | None:
        """One (N, V) view of q for each position."""
        if request.dense is None:
            return None
        dense = float_array("stats.dot(q): q", request.dense)
        shape = self.geometry
        check_dense(dense.shape, (*shape.lead, shape.classes, *shape.positions))
        dense = self.cut(dense)
        at: list[Index] = [(..., *position) for position in self.positions]
        parts = (dense[index] for index in at)
        return [part.reshape(self.rows, shape.classes) for part in parts]

    # Engine calls -------------------------------------------------------------------------------

    def _problem(self, p: int, vectors: Array | None, dense: Array | None) -> Problem:
        """Arguments that forward and backward share, for position number `p`."""
        at: Index = (slice(None), *self.positions[p])
        ids = None if self.ids is None else self.ids[p * self.rows : (p + 1) * self.rows]
        return (
            handle(self.weight[at]),
            None if self.bias is None else handle(self.bias[at]),
            _maybe(ids),
            self.ignore_index,
            self.scale,
            self.softcap,
            _maybe(vectors),
            _maybe(dense),
        )

    def forward(self, request: Request) -> Saved:
        """Run the engine; outputs are flat, one array for each of the spec's fields."""
        if request.topk:
            check_topk(request.topk, self.geometry.classes)
        spec = request.spec(0 if self.ids is None else self.ids.shape[1])
        vectors, dense = self._vectors(request), self._dense(request)
        rows = self.input_rows(self.input)
        size = self.input.itemsize
        plan = _core.plan(
            spec,
            self.rows,
            self.geometry.features,
            self.geometry.classes,
            CODES[self.dtype.name],
            self.memory,
            sum(GRADIENT_BITS[name] for name in self.gradients),
            rows.strides[-1] == size and self.weight.strides[-1] == size,
        )
        total = self.rows * len(self.positions)
        outputs = {
            name: np.empty(
                (total, columns) if columns else (total,), np.int64 if integer else self.acc
            )
            for name, columns, integer in spec.fields
        }
        stores: list[Array | None] = []
        for p in range(len(self.positions)):
            store = np.empty(plan.store_bytes, np.uint8) if plan.store_bytes else None
            stores.append(store)
            _core.forward(
                spec,
                handle(rows),
                *self._problem(p, vectors, None if dense is None else dense[p]),
                tuple(self._part(array, p) for array in outputs.values()),
                _maybe(store),
                plan,
                0,
            )
        return Saved(plan, outputs, stores)

    def _part(self, array: Array, p: int) -> Handle:
        return handle(array[p * self.rows : (p + 1) * self.rows])

    def backward(
        self, request: Request, saved: Saved, cotangents: dict[str, Array]
    ) -> dict[str, Array]:
        """Gradients named in `gradients`, each in the dtype and shape of its argument."""
        spec = request.spec(0 if self.ids is None else self.ids.shape[1])
        vectors, dense = self._vectors(request), self._dense(request)
        rows = self.input_rows(self.input)
        wanted, several = self.gradients, len(self.positions) > 1
        given = {
            name: np.ascontiguousarray(array, dtype=self.acc) for name, array in cotangents.items()
        }

        def empty(name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
            return np.empty(shape, dtype) if name in wanted else None

        # Every position adds to the gradient of input: in the accumulation dtype, cast at the end.
        d_input = d_rows = None
        if "input" in wanted:
            d_input = np.zeros(self.input.shape, self.acc if several else self.dtype)
            d_rows = self.input_rows(d_input)
        d_weight = empty("linear_weight", self.weight.shape, self.dtype)
        d_bias = empty("linear_bias", (self.geometry.classes, *self.geometry.positions), self.dtype)
        d_scale = np.zeros((len(self.positions), 1), self.acc)
        d_dense = None
        if "dot" in wanted:
            d_dense = np.zeros(request.dense.shape, request.dense.dtype.newbyteorder("="))
        for p, position in enumerate(self.positions):
            at: Index = (slice(None), *position)
            part_bias = empty("linear_bias", (self.geometry.classes,), self.dtype)
            view = part_dense = None
            if d_dense is not None:
                across: Index = (..., *position)
                view = self.cut(d_dense)[across]
                part_dense = view.reshape(self.rows, self.geometry.classes)  # a view if it folds
            _core.backward(
                spec,
                handle(rows),
                *self._problem(p, vectors, None if dense is None else dense[p]),
                tuple(self._part(array, p) for array in saved.outputs.values()),
                tuple(
                    self._part(given[name], p) if name in given else None for name in saved.outputs
                ),
                _maybe(saved.stores[p]),
                _maybe(d_rows),
                None if d_weight is None else handle(d_weight[at]),
                _maybe(part_bias),
                handle(d_scale[p]) if "logit_scale" in wanted else None,
                _maybe(part_dense),
                several and p > 0,
                saved.plan,
                0,
            )
            if d_bias is not None:
                d_bias[at] = part_bias
            if (
                view is not None
                and part_dense is not None
                and not np.may_share_memory(view, part_dense)
            ):
                view[...] = part_dense.reshape(view.shape)
        found: dict[str, Any] = {
            "input": None if d_input is None else d_input.astype(self.dtype, copy=False),
            "linear_weight": d_weight,
            "linear_bias": d_bias,
            "logit_scale": np.asarray(d_scale.sum(dtype=np.float64), self.acc),
            "dot": d_dense,
        }
        return {name: found[name] for name in wanted}
