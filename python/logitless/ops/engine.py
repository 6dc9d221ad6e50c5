"""Torch tensors in, torch tensors out, through the compiled engines: the place that knows devices.

Nothing here is differentiable: `forward` allocates the statistics and has the engine fill them,
`backward` allocates the wanted gradients and has it fill those. A head with extra dimensions is one
engine call for each of its positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from logitless import stats
from logitless._arrays import Handle, torch_code, torch_handle
from logitless._extras import torch
from logitless.ops import device as device_calls
from logitless.ops import layout
from logitless.ops.loan import Loan

__all__ = [
    "BIAS",
    "BITS",
    "DENSE",
    "INPUT",
    "SCALE",
    "WEIGHT",
    "Call",
    "Problem",
    "Slots",
    "Tensors",
    "backward",
    "call_of",
    "forward",
    "keeps_when_lean",
    "kept_handles",
    "recomputing",
    "store_bytes",
]

# Bits of `Call.gradients` and of `backward`'s `wanted`.
BITS = INPUT, WEIGHT, BIAS, SCALE, DENSE = (1, 2, 4, 8, 16)

Tensor = torch.Tensor
Optional = torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Everything about a call that is not a tensor."""

    core: tuple[str, ...]  # core statistics, in registry order
    powers: tuple[float, ...]
    vectors: int
    topk: int
    targets: int  # ids a row
    fields: tuple[tuple[str, int, bool], ...]  # (name, columns or 0, is integer) of each output
    rows_shape: tuple[int, ...]  # of a per-row field: leading dimensions less shift, positions
    rows: int  # N, of one position
    positions: tuple[int, ...]  # (d1, ..., dK) of the head
    shift: int
    ignore_index: int | None
    logit_scale: float  # unless it is a tensor
    softcap: float  # 0.0: none
    memory: int
    gradients: int
    dtype: torch.dtype  # of the products; differs from the tensors' own under autocast

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of the statistics: float64 for float64, else float32."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32


# A step that repeats its shapes repeats its calls. Equal ones are one object, and a plan is found
# again by it. Tracers, whose sizes may be symbols, make their own.
call_of = lru_cache(maxsize=256)(Call)


@lru_cache(maxsize=256)
def recomputing(call: Call) -> Call:
    """Return the same call with a forward that keeps nothing."""
    return replace(call, memory=0)


class Tensors(NamedTuple):
    """The tensors of a call."""

    input: Tensor  # (..., D)
    weight: Tensor  # (V, [d1, ..., dK,] D)
    bias: Optional = None  # (V, [d1, ..., dK])
    scale: Optional = None  # 0-d; None: call.logit_scale
    dense: Optional = None  # (..., V, [d1, ..., dK])
    ids: Optional = None  # int64, of the rows' shape (and K)
    vectors: Optional = None  # (C, V) in the accumulation dtype, contiguous


def store_bytes(call: Call, device: torch.device, weight: Handle) -> int:
    """Bytes that the forward keeps for the backward; 0 where there is nothing to plan."""
    if not call.gradients or call.memory == 0 or call.positions or call.rows == 0:
        return 0
    if call.memory == -1 and not keeps_when_lean(call, device):
        return 0
    size: int = _planned(call, device, weight, None).store_bytes
    return size


def keeps_when_lean(call: Call, device: torch.device) -> bool:
    """Tell whether lean may keep something: on CUDA, sums for the gradient of the input alone."""
    return call.gradients == INPUT and device.type == "cuda" and call.dtype is torch.bfloat16


def forward(
    call: Call, tensors: Tensors, loan: Loan | None = None
) -> tuple[tuple[Tensor, ...], Optional]:
    """Compute the statistics of a call.

    Returns the core's fields in order, and the store: what `memory` lets the forward keep for the
    backward, or None. A `loan` is filled instead, if a plan makes use of it.
    """
    rows, device = call.rows, tensors.input.device
    positions = list(product(*map(range, call.positions)))
    count, accumulation = len(positions), call.accumulation
    shape = (count, rows) if call.positions else call.rows_shape
    outputs = [
        torch.empty(
            (*shape, columns) if columns else shape,
            dtype=torch.int64 if integer else accumulation,
            device=device,
        )
        for _, columns, integer in call.fields
    ]
    store = None
    if rows:
        problem = Problem(call, tensors, loan)
        store = problem.store(loan, tensors.weight)
        kept, lent = kept_handles(store, loan)
        spec = _spec(call)
        for index, position in enumerate(positions):
            device_calls.forward(
                problem.plan,
                device,
                spec,
                *problem.arguments(index, position),
                problem.vectors,
                problem.dense(index),
                tuple(
                    layout.field_handle(output, index, rows, columns)
                    for output, (_, columns, _) in zip(outputs, call.fields, strict=True)
                ),
                kept,
                scale=problem.device_scale,
                lent=lent,
            )
    if call.positions:
        outputs = [
            layout.to_rows(output, call.rows_shape, count, columns)
            for output, (_, columns, _) in zip(outputs, call.fields, strict=True)
        ]
    return tuple(outputs), store


def backward(
    call: Call,
    wanted: int,
    tensors: Tensors,
    store: Optional,
    fields: tuple[Tensor, ...],
    cotangents: tuple[Optional, ...],
    loan: Loan | None = None,
    grad_buffer: Optional = None,
) -> tuple[Optional, Optional, Optional, Optional, Optional]:
    """Turn the cotangents of the fields into the wanted gradients.

    Returns those of (input, weight, bias, scale, dense), None where not `wanted`: in the dtype of
    their tensors, rounded once from the accumulation dtype. The weight's is added to `grad_buffer`
    instead, if there is one. A `loan` that the forward took ends here: its memory is then that of
    the gradients.
    """
    rows, accumulation = call.rows, call.accumulation
    positions = list(product(*map(range, call.positions)))
    count = len(positions)
    slots = Slots(call, wanted, tensors, loan, grad_buffer)
    if not rows:
        return slots.zero().results()
    problem = Problem(call, tensors, loan)
    kept, lent = kept_handles(store, loan)
    spec, columns = _spec(call), [c for _, c, _ in call.fields]
    saved = [
        layout.to_positions(field, count, c, field.dtype)
        for field, c in zip(fields, columns, strict=True)
    ]
    given = [
        None if g is None else layout.to_positions(g, count, c, accumulation)
        for g, c in zip(cotangents, columns, strict=True)
    ]
    for index, position in enumerate(positions):
        device_calls.backward(
            problem.plan,
            tensors.input.device,
            spec,
            *problem.arguments(index, position),
            problem.vectors,
            problem.dense(index),
            tuple(
                layout.field_handle(field, index, rows, c)
                for field, c in zip(saved, columns, strict=True)
            ),
            tuple(
                None if g is None else layout.field_handle(g, index, rows, c)
                for g, c in zip(given, columns, strict=True)
            ),
            kept,
            *slots.handles(index, position),
            slots.dense_handle(index),
            index > 0,
            scale=problem.device_scale,
            accumulate_weight=slots.accumulates,
            lent=lent,
        )
    return slots.results()


class Slots:
    """The gradients that a backward fills: allocated, handed out as handles, finished."""

    def __init__(
        self,
        call: Call,
        wanted: int,
        tensors: Tensors,
        loan: Loan | None = None,
        grad_buffer: Optional = None,
    ) -> None:
        self.call, self.likes, self.buffer = call, tensors, grad_buffer
        input, weight, bias, scale, dense = tensors[:5]
        count, device = prod(call.positions), input.device
        self.input = self.weight = self.bias = self.scale = self.dense = self.rows = None
        if wanted & INPUT:
            # The heads of several positions add up in it, in the accumulation dtype.
            dtype = self._dtype(input) if count == 1 else call.accumulation
            self.input = torch.empty(input.shape, dtype=dtype, device=device)
            if call.shift:
                self.input.narrow(-2, input.shape[-2] - call.shift, call.shift).zero_()
            self.rows = layout.rows_handle(self.input, call.shift)[1]
        # CUDA kernels add to the buffer; the CPU's sums are added to it at the end.
        self.accumulates = bool(wanted & WEIGHT) and grad_buffer is not None and input.is_cuda
        if self.accumulates:
            self.weight = grad_buffer
        elif wanted & WEIGHT and grad_buffer is not None:
            self.weight = torch.empty_like(grad_buffer)
        elif wanted & WEIGHT and loan is not None and loan.d_weight is not None:
            self.weight = loan.d_weight
        elif wanted & WEIGHT:
            self.weight = torch.empty_like(weight, dtype=self._dtype(weight))
        if wanted & BIAS and bias is not None:
            self.bias = torch.empty_like(bias, dtype=self._dtype(bias))
        if wanted & SCALE and scale is not None:
            self.scale = torch.empty((count, 1), dtype=call.accumulation, device=device)
        if wanted & DENSE and dense is not None:
            shape = (count, call.rows, weight.shape[0])
            self.dense = torch.empty(shape, dtype=call.accumulation, device=device)

    def _dtype(self, like: Tensor) -> torch.dtype:
        """Write `like`'s dtype directly where the engine can: its own, or that of its sums."""
        dtype, accumulation = like.dtype, self.call.accumulation
        return dtype if dtype is self.call.dtype or dtype is accumulation else accumulation

    def handles(self, index: int = 0, position: tuple[int, ...] = ()) -> tuple[Handle | None, ...]:
        """Return the handles of d_input, d_weight, d_bias and d_scale of one head."""
        return (
            self.rows,
            None if self.weight is None else layout.class_handle(self.weight, position),
            None if self.bias is None else layout.class_handle(self.bias, position),
            None if self.scale is None else torch_handle(self.scale[index]),
        )

    def dense_handle(self, index: int) -> Handle | None:
        """Return the handle of d_dense of one head."""
        return None if self.dense is None else torch_handle(self.dense[index])

    def zero(self) -> Slots:
        """Fill with zeros: there are no rows."""
        for gradient in (self.input, self.weight, self.bias, self.scale, self.dense):
            if gradient is not None and gradient is not self.buffer:
                gradient.zero_()
        return self

    def results(self) -> tuple[Optional, Optional, Optional, Optional, Optional]:
        """Return the gradients in the dtype of their tensors."""
        input, weight, bias, scale, dense = self.likes[:5]
        d_weight, d_scale, d_dense = self.weight, self.scale, self.dense
        if d_weight is not None and self.buffer is not None:
            if not self.accumulates:
                self.buffer.add_(d_weight)
            d_weight = None
        if d_scale is not None and scale is not None:
            d_scale = d_scale.sum().to(dtype=scale.dtype, device=scale.device)
        if d_dense is not None and dense is not None:
            call = self.call
            d_dense = layout.scatter_dense(d_dense, dense, call.positions, call.shift)
        return (
            _rounded(self.input, input),
            _rounded(d_weight, weight),
            _rounded(self.bias, bias),
            d_scale,
            d_dense,
        )


class Problem:
    """The inputs of a call as the engine takes them; keeps alive what its handles point into."""

    def __init__(self, call: Call, tensors: Tensors, loan: Loan | None = None) -> None:
        input, weight, bias, scale, dense, ids, vectors = tensors
        dtype, device, positions = call.dtype, input.device, call.positions
        self.call, self.device = call, device
        self._input, self._rows = layout.rows_handle(layout.plain(input, dtype), call.shift)
        self._weight = layout.plain(weight, dtype)
        self._bias = None if bias is None else layout.plain(bias, dtype)
        self._head = layout.class_handle(self._weight, (0,) * len(positions))
        self._ids = ids
        if ids is not None:
            self._ids = layout.to_positions(ids, prod(positions), call.targets, torch.int64)
        self._scale, self.device_scale = call.logit_scale, None
        if scale is not None and scale.is_cuda:
            # Reading it would wait for the device.
            self._scale_there = scale.detach().to(call.accumulation).reshape(1)
            self.device_scale = torch_handle(self._scale_there)
        elif scale is not None:
            self._scale = float(scale)
        self._dense = dense
        if dense is not None:
            self._dense = layout.dense_rows(dense, call.rows, positions, call.shift)
        self.vectors = None if vectors is None else torch_handle(vectors)
        address, _, shape, strides = self._head
        lends = None if loan is None else loan.lends
        self.plan = _plan(call, device, address % _ALIGNMENT, shape, strides, lends)

    def store(self, loan: Loan | None, weight: Tensor) -> Optional:
        """Allocate what the forward keeps for the backward, if not in the loan that it takes."""
        if loan is not None and loan.take(self.plan, weight):
            return None
        size = self.plan.store_bytes
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None

    def arguments(self, index: int = 0, position: tuple[int, ...] = ()) -> tuple[Any, ...]:
        """The arguments that every entry point of the engine begins with, after the spec."""
        call, ids, bias = self.call, self._ids, self._bias
        return (
            self._rows,
            layout.class_handle(self._weight, position) if position else self._head,
            None if bias is None else layout.class_handle(bias, position),
            None if ids is None else layout.field_handle(ids, index, call.rows, call.targets),
            call.ignore_index,
            self._scale,
            call.softcap,
        )

    def dense(self, index: int) -> Handle | None:
        """The dense weights of one head."""
        return None if self._dense is None else torch_handle(self._dense[..., index])


def _rounded(gradient: Optional, like: Optional) -> Optional:
    if gradient is None or like is None or gradient.dtype is like.dtype:
        return gradient
    return gradient.to(like.dtype)


def kept_handles(store: Optional, loan: Loan | None) -> tuple[Handle | None, Handle | None]:
    """Return the handles of what a forward keeps: its store, and the memory of d_weight."""
    if loan is None or loan.store is None:
        return (None if store is None else torch_handle(store)), None
    lent = None if loan.d_weight is None else torch_handle(loan.d_weight)
    return torch_handle(loan.store), lent


@lru_cache(maxsize=256)
def _spec(call: Call) -> Any:
    return stats.core_spec(call.core, call.powers, call.vectors, call.topk, call.targets)


# Tensor cores read a weight in place by its strides, and by its address up to this much.
_ALIGNMENT = 256


@lru_cache(maxsize=256)
def _plan(
    call: Call,
    device: torch.device,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    lends: int | None,
) -> Any:
    """Size a call, once for every layout of its weight."""
    return _planned(call, device, (address, torch_code(call.dtype), shape, strides), lends)


def _planned(call: Call, device: torch.device, weight: Handle, lends: int | None) -> Any:
    # What is kept belongs to one head: one with extra dimensions recomputes. Exponentials of a
    # softcap carry its slope, which an entropy's gradient cannot take out again.
    capped = call.softcap > 0 and "entropy" in call.core and device.type == "cuda"
    return device_calls.plan(
        device,
        weight,
        stats.core_spec(call.core, call.powers, call.vectors, call.topk, call.targets),
        call.rows,
        weight[2][1],
        weight[2][0],
        torch_code(call.dtype),
        0 if call.positions or capped else call.memory,
        call.gradients,
        lends=lends,
        compact=not call.shift,
    )
