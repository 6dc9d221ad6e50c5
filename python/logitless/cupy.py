"""Losses and statistics of linear heads for CuPy arrays: values with their gradients.

The names and arguments are those of `logitless.numpy`, for a head (V, D). Everything runs on CuPy's
current stream, in memory from its current pool; nothing is read back and nothing waits for the
device. Inputs are float32, float64, float16 or bfloat16 arrays of any strides.

>>> import cupy as cp, logitless.cupy as lc  # doctest: +SKIP
>>> loss, d_hidden, d_head, _ = lc.linear_cross_entropy(hidden, head, target)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from logitless import _core, _extras
from logitless._arrays import CODES, handle
from logitless._check import (
    argument_error,
    check_label_smoothing,
    check_memory,
    check_reduction,
    check_softcap,
    check_topk,
    geometry,
    type_error,
)
from logitless.stats import Want, resolve

# Long positional calls, as in `logitless.ops.device`.
_CUDA: Any = _core
cp: Any = _extras.require("cupy", "logitless.cupy")

__all__ = ["CrossEntropy", "RowStatistics", "Vjp", "linear_cross_entropy", "row_statistics"]

Array = Any
FLOATS = ("float32", "float64", "bfloat16", "float16")
IGNORE_INDEX = -100
# Bits of the gradient mask of `_core.cuda_plan`.
GRADIENTS = {"input": 1, "linear_weight": 2, "linear_bias": 4, "logit_scale": 8}
DEFAULT_GRADIENTS = ("input", "linear_weight", "linear_bias")


class CrossEntropy(NamedTuple):
    """A loss and its gradients, named as the arguments they belong to; None if not wanted."""

    loss: Array
    input: Array | None
    linear_weight: Array | None
    linear_bias: Array | None = None


class RowStatistics(dict[str, Array]):
    """The core's statistics of every row by name, also as attributes; flat rows, (N,) or (N, k)."""

    def __getattr__(self, name: str) -> Array:
        try:
            return self[name]
        except KeyError:
            message = f"RowStatistics.{name}: expected one of {', '.join(self)}; name it in want="
            raise AttributeError(message) from None


class Vjp:
    """Turns cotangents of a call's statistics into gradients of its arguments.

    The arguments are read again by every use: they must not be changed in between.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call

    def __call__(self, **cotangents: Array) -> dict[str, Array]:
        """Gradients of Σ cotangent · statistic, by the names of the arguments.

        Parameters
        ----------
        **cotangents
            A statistic's name to an array that broadcasts to its shape.
        """
        return self._call.backward(cotangents)


class _Call:
    """One forward on a head, and its backward."""

    def __init__(
        self,
        input: Array,
        linear_weight: Array,
        target: Array | None,
        want: Want,
        *,
        linear_bias: Array | None,
        ignore_index: int | None,
        logit_scale: float,
        softcap: float | None,
        memory: str | int,
        gradients: Sequence[str],
    ) -> None:
        self.input = _floats("input", input)
        dtype = self.input.dtype
        self.weight = _floats("linear_weight", linear_weight, dtype)
        self.bias = None if linear_bias is None else _floats("linear_bias", linear_bias, dtype)
        self.acc = cp.float64 if dtype == cp.float64 else cp.float32
        if self.weight.ndim != 2:
            remedy = "use logitless.functional for a head with more dimensions"
            raise argument_error("linear_weight.shape", self.weight.shape, "(V, D)", remedy)
        lead, features, classes = self.input.shape[:-1], self.input.shape[-1], len(self.weight)
        ids = None
        if target is not None:
            _on_device("target", target)
            if target.dtype.kind not in "iu":
                raise type_error("target.dtype", target.dtype, "an integer dtype", "class ids")
            columns = target.shape[len(lead) :] or (1,)
            ids = cp.ascontiguousarray(target.reshape(-1, *columns), dtype=cp.int64)
        bias_shape = None if self.bias is None else self.bias.shape
        target_shape = None if target is None else target.shape
        weights = target_shape if ids is not None and target_shape != lead else None
        geometry(self.input.shape, self.weight.shape, bias_shape, target_shape, False, weights, 0)
        for name in gradients:
            if name not in GRADIENTS:
                remedy = "name the arguments whose gradient is wanted"
                raise argument_error("gradients", repr(name), f"of {', '.join(GRADIENTS)}", remedy)
        self.gradients = [n for n in gradients if n != "linear_bias" or self.bias is not None]
        self.ids, self.rows = ids, self.input.size // max(features, 1)
        self.softcap = check_softcap(softcap)
        request = resolve(want, has_target=ids is not None)
        if request.topk:
            check_topk(request.topk, classes)
        self.vectors = self.dense = None
        if request.vectors is not None:
            vectors = cp.atleast_2d(request.vectors)
            self.vectors = cp.ascontiguousarray(vectors, dtype=self.acc)
        if request.dense is not None:
            self.dense = request.dense.reshape(self.rows, classes)
        self.spec = request.spec(0 if ids is None else ids.shape[1])
        self.scale = float(logit_scale)
        self.ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
        self.device = self.input.device.id
        self.plan = _CUDA.cuda_plan(
            self.spec,
            self.rows,
            features,
            classes,
            CODES[dtype.name],
            check_memory(memory),
            sum(GRADIENTS[name] for name in self.gradients),
            _CUDA.cuda_describable(handle(self.weight)),
            self.device,
        )
        self.store = cp.empty(self.plan.store_bytes, cp.uint8) if self.plan.store_bytes else None
        self.outputs = {
            name: cp.empty((self.rows, k) if k else (self.rows,), cp.int64 if i else self.acc)
            for name, k, i in self.spec.fields
        }
        workspace = cp.empty(self.plan.forward_bytes, cp.uint8)
        outputs = tuple(map(handle, self.outputs.values()))
        _CUDA.cuda_forward(
            *self._operands(), outputs, _maybe(self.store), self.plan, *self._where(workspace)
        )

    def _operands(self) -> tuple[Any, ...]:
        rows = self.input.reshape(-1, *self.input.shape[-2:]) if self.input.ndim > 1 else None
        return (
            self.spec,
            handle(self.input[None, None] if rows is None else rows),
            handle(self.weight),
            _maybe(self.bias),
            _maybe(self.ids),
            self.ignore_index,
            self.scale,
            self.softcap,
            _maybe(self.vectors),
            _maybe(self.dense),
        )

    def _where(self, workspace: Array) -> tuple[Any, ...]:
        return (0, self.device, cp.cuda.get_current_stream().ptr, handle(workspace))

    def backward(self, cotangents: dict[str, Array]) -> dict[str, Array]:
        for name in cotangents:
            if name not in self.outputs or self.outputs[name].dtype == cp.int64:
                raise type_error("vjp: field", name, f"one of {', '.join(self.outputs)}", "want=")
        given = [
            None
            if name not in cotangents
            else cp.ascontiguousarray(
                cp.broadcast_to(cp.asarray(cotangents[name], dtype=self.acc), value.shape)
            )
            for name, value in self.outputs.items()
        ]
        empty = {
            "input": lambda: cp.empty(self.input.shape, self.input.dtype),
            "linear_weight": lambda: cp.empty(self.weight.shape, self.weight.dtype),
            "linear_bias": lambda: cp.empty(len(self.weight), self.input.dtype),
            "logit_scale": lambda: cp.empty(1, self.acc),
        }
        found = {name: empty[name]() for name in self.gradients}
        d_input = found.get("input")
        if d_input is not None:
            shape = self.input.shape
            d_input = d_input.reshape(-1, *((1, *shape) if len(shape) == 1 else shape[-2:]))
        workspace = cp.empty(self.plan.backward_bytes, cp.uint8)
        _CUDA.cuda_backward(
            *self._operands(),
            tuple(map(handle, self.outputs.values())),
            tuple(map(_maybe, given)),
            _maybe(self.store),
            _maybe(d_input),
            _maybe(found.get("linear_weight")),
            _maybe(found.get("linear_bias")),
            _maybe(found.get("logit_scale")),
            None,
            False,
            self.plan,
            *self._where(workspace),
        )
        return found


def _maybe(array: Array | None) -> Any:
    return None if array is None else handle(array)


def _on_device(name: str, value: Any) -> None:
    if not isinstance(value, cp.ndarray):
        raise type_error(name, type(value).__name__, "a cupy.ndarray", "use cupy.asarray")


def _floats(name: str, value: Any, dtype: Any = None) -> Array:
    _on_device(name, value)
    if value.dtype.name not in FLOATS or (dtype is not None and value.dtype != dtype):
        expected = ", ".join(FLOATS) if dtype is None else f"{dtype}, the dtype of input"
        raise type_error(f"{name}.dtype", value.dtype, expected, f"use {name}.astype(...)")
    return value


def row_statistics(
    input: Array,
    linear_weight: Array,
    target: Array | None = None,
    *,
    want: Want = ("rest", "target"),
    linear_bias: Array | None = None,
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory: str | int = "lean",
    gradients: Sequence[str] = DEFAULT_GRADIENTS,
) -> tuple[RowStatistics, Vjp]:
    """Statistics of the softmax of every row, without its logits, and their gradient function.

    Parameters
    ----------
    input : (..., D)
    linear_weight : (V, D), dtype of input
    target : integer (...) or (..., K), optional
    want : name, `stats` object, or a sequence of them
        The result holds the core's fields that these are worked out from.
    linear_bias, ignore_index, logit_scale, softcap, memory, gradients
        As in `logitless.numpy.row_statistics`.

    Returns
    -------
    stats : RowStatistics
    vjp : Vjp
    """
    call = _Call(
        input,
        linear_weight,
        target,
        want,
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=gradients,
    )
    return RowStatistics(call.outputs), Vjp(call)


def linear_cross_entropy(
    input: Array,
    linear_weight: Array,
    target: Array,
    *,
    linear_bias: Array | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    row_weight: Array | None = None,
    denominator: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
    memory: str | int = "lean",
    gradients: Sequence[str] = DEFAULT_GRADIENTS,
) -> CrossEntropy:
    """Cross entropy of a linear head with its gradients, without the logits.

    Parameters
    ----------
    input : (..., D)
    linear_weight : (V, D), dtype of input
    target : integer (...)
        Class ids. On the device an id out of range makes its row nan.
    linear_bias, reduction, ignore_index, label_smoothing, row_weight, denominator, logit_scale,
    softcap, z_loss_weight, memory, gradients
        As in `logitless.numpy.linear_cross_entropy`.

    Returns
    -------
    CrossEntropy
        ``(loss, input, linear_weight, linear_bias)``; the loss is float32, float64 for float64.
    """
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    if target.shape != input.shape[:-1]:
        remedy = "one class id a row"
        raise argument_error("target.shape", target.shape, str(input.shape[:-1]), remedy)
    call = _Call(
        input,
        linear_weight,
        target,
        ("rest", "target", "sum") if label_smoothing else ("rest", "target"),
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=gradients,
    )
    kept = target.reshape(-1) != call.ignore_index
    weight = kept.astype(call.acc)
    if row_weight is not None:
        weight = cp.where(kept, row_weight.reshape(-1).astype(call.acc), 0)
    rest, z = call.outputs["rest"], call.outputs["target"][:, 0]
    # softplus(rest - z), lse and the probabilities of both sides, each with all of its digits.
    gap = rest - z
    small = cp.log1p(cp.exp(-cp.abs(gap)))
    nll, lse = cp.maximum(gap, 0) + small, cp.maximum(rest, z) + small
    of_rest, of_target = 1 / (1 + cp.exp(-gap)), 1 / (1 + cp.exp(gap))
    share = 1.0 - label_smoothing
    losses, g_lse = share * nll, label_smoothing + 2 * z_loss_weight * lse
    if label_smoothing:
        losses = losses + label_smoothing * (lse - call.outputs["sum"] / len(linear_weight))
    if z_loss_weight:
        losses = losses + z_loss_weight * lse * lse
    if reduction == "mean":
        weight = weight / (kept.sum() if denominator is None else denominator)
    losses = cp.where(kept, weight * losses, 0)
    loss = losses.reshape(target.shape) if reduction == "none" else losses.sum()
    if not call.gradients:
        return CrossEntropy(loss.astype(call.acc), None, None)
    weight = cp.where(kept, weight, 0)
    cotangents = {
        "rest": weight * (share * of_rest + g_lse * of_rest),
        "target": (weight * (-share * of_rest + g_lse * of_target))[:, None],
    }
    if label_smoothing:
        cotangents["sum"] = -weight * (label_smoothing / len(linear_weight))
    found = call.backward(cotangents)
    return CrossEntropy(
        loss.astype(call.acc),
        found.get("input"),
        found.get("linear_weight"),
        found.get("linear_bias"),
    )
