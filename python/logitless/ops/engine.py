"""Torch tensors in, torch tensors out, through the compiled engines: the place that knows devices.

Nothing here is differentiable: `forward` allocates the statistics and has the engine fill them,
`backward` allocates the wanted gradients and has it fill those. A head with extra dimensions is one
engine call for each of its positions.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    "forward",
    "keeps_when_lean",
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
    positions: tuple[int, ...]  # (d1, ..., dK) of the head
    shift: int
    ignore_index: int | None
    logit_scale: float  # unless it is a tensor
    softcap: float  # 0.0: none
    memory: int
    gradients: int
    dtype: torch.dtype  # of the products; differs from the tensors' own under autocast
    grad_buffer: Optional = None  # d_weight is added to it instead of being returned

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of the statistics: float64 for float64, else float32."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def rows(self) -> int:
        """N, the rows of one position."""
        return prod(self.rows_shape[: len(self.rows_shape) - len(self.positions)])


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
    size: int = _plan(call, device, weight, None).store_bytes
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
    outputs = [
        torch.empty(
            (count, rows, columns) if columns else (count, rows),
            dtype=torch.int64 if integer else accumulation,
            device=device,
        )
        for _, columns, integer in call.fields
    ]
    store = store_handle = None
    if rows:
        problem = Problem(call, tensors, loan)
        if loan is not None and loan.take(problem.plan, tensors.weight):
            store_handle = _handle(loan.store)
        elif size := store_bytes(call, device, problem.head):
            store = torch.empty(size, dtype=torch.uint8, device=device)
            store_handle = torch_handle(store)
        for index, position in enumerate(positions):
            device_calls.forward(
                device,
                problem.plan,
                *problem.arguments(index, position),
                tuple(
                    layout.field_handle(output, index, rows, columns)
                    for output, (_, columns, _) in zip(outputs, call.fields, strict=True)
                ),
                store_handle,
                scale=problem.device_scale,
                lent=None if loan is None else _handle(loan.d_weight),
            )
    return tuple(
        layout.to_rows(output, call.rows_shape, count, columns)
        for output, (_, columns, _) in zip(outputs, call.fields, strict=True)
    ), store


def backward(
    call: Call,
    wanted: int,
    tensors: Tensors,
    store: Optional,
    fields: tuple[Tensor, ...],
    cotangents: tuple[Optional, ...],
    loan: Loan | None = None,
) -> tuple[Optional, Optional, Optional, Optional, Optional]:
    """Turn the cotangents of the fields into the wanted gradients.

    Returns those of (input, weight, bias, scale, dense), None where not `wanted`: in the dtype of
    their tensors, rounded once from the accumulation dtype. A `loan` that the forward took ends
    here: its memory is then that of the gradients.
    """
    rows, accumulation = call.rows, call.accumulation
    positions = list(product(*map(range, call.positions)))
    count = len(positions)
    slots = Slots(call, wanted, tensors, loan)
    if not rows:
        return slots.zero().results()
    problem = Problem(call, tensors, loan)
    columns = [c for _, c, _ in call.fields]
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
            tensors.input.device,
            problem.plan,
            *problem.arguments(index, position),
            tuple(
                layout.field_handle(field, index, rows, c)
                for field, c in zip(saved, columns, strict=True)
            ),
            tuple(
                None if g is None else layout.field_handle(g, index, rows, c)
                for g, c in zip(given, columns, strict=True)
            ),
            _handle(store if loan is None else loan.store),
            *slots.handles(index, position),
            index > 0,
            scale=problem.device_scale,
            accumulate_weight=slots.accumulates,
            lent=None if loan is None else _handle(loan.d_weight),
        )
    return slots.results()


class Slots:
    """The gradients that a backward fills: allocated, handed out as handles, finished."""

    def __init__(self, call: Call, wanted: int, tensors: Tensors, loan: Loan | None = None) -> None:
        self.call = call
        self.likes = tensors
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
        self.accumulates = None
        if wanted & WEIGHT and call.grad_buffer is not None:
            # CUDA kernels add to the buffer; the CPU's sums are added to it at the end.
            self.accumulates = True if input.is_cuda else None
            self.weight = call.grad_buffer if input.is_cuda else torch.empty_like(call.grad_buffer)
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
        accumulation = self.call.accumulation
        return like.dtype if like.dtype in (self.call.dtype, accumulation) else accumulation

    def handles(self, index: int, position: tuple[int, ...]) -> tuple[Handle | None, ...]:
        """Return the handles of d_input, d_weight, d_bias, d_scale and d_dense of one head."""
        return (
            self.rows,
            None if self.weight is None else layout.class_handle(self.weight, position),
            None if self.bias is None else layout.class_handle(self.bias, position),
            None if self.scale is None else torch_handle(self.scale[index]),
            None if self.dense is None else torch_handle(self.dense[index]),
        )

    def zero(self) -> Slots:
        """Fill with zeros: there are no rows."""
        for gradient in (self.input, self.weight, self.bias, self.scale, self.dense):
            if gradient is not None and gradient is not self.call.grad_buffer:
                gradient.zero_()
        return self

    def results(self) -> tuple[Optional, Optional, Optional, Optional, Optional]:
        """Return the gradients in the dtype of their tensors."""
        input, weight, bias, scale, dense = self.likes[:5]
        d_weight, d_scale, d_dense = self.weight, self.scale, self.dense
        if d_weight is not None and self.call.grad_buffer is not None:
            if not self.accumulates:
                self.call.grad_buffer.add_(d_weight)
            d_weight = None
        if d_scale is not None and scale is not None:
            d_scale = d_scale.sum().to(dtype=scale.dtype, device=scale.device)
        if d_dense is not None and dense is not None:
            call = self.call
            d_dense = layout.scatter_dense(d_dense, dense, call.positions, call.shift)
        return (
            None if self.input is None else self.input.to(input.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
            d_scale,
            d_dense,
        )


class Problem:
    """The inputs of a call as the engine takes them; keeps alive what its handles point into."""

    def __init__(self, call: Call, tensors: Tensors, loan: Loan | None = None) -> None:
        input, weight, bias, scale, dense, ids, vectors = tensors
        self.call = call
        self.rows = call.rows
        self.spec = stats.core_spec(call.core, call.powers, call.vectors, call.topk, call.targets)
        self.input, self.input_rows = layout.rows_handle(
            layout.plain(input, call.dtype), call.shift
        )
        self.weight = layout.plain(weight, call.dtype)
        self.bias = None if bias is None else layout.plain(bias, call.dtype)
        self.ids = ids
        if ids is not None:
            self.ids = layout.to_positions(ids, prod(call.positions), call.targets, torch.int64)
        self.scale, self.device_scale = call.logit_scale, None
        if scale is not None and scale.is_cuda:
            # Reading it would wait for the device.
            self._scale = scale.detach().to(call.accumulation).reshape(1)
            self.device_scale = torch_handle(self._scale)
        elif scale is not None:
            self.scale = float(scale)
        self.dense = (
            None
            if dense is None
            else layout.dense_rows(dense, self.rows, call.positions, call.shift)
        )
        self.vectors = None if vectors is None else torch_handle(vectors)
        self.head = layout.class_handle(self.weight, (0,) * len(call.positions))
        self.plan = _plan(call, input.device, self.head, None if loan is None else loan.lends)

    def arguments(self, index: int, position: tuple[int, ...]) -> tuple[Any, ...]:
        """The leading arguments that the core's forward and backward share."""
        call = self.call
        return (
            self.spec,
            self.input_rows,
            layout.class_handle(self.weight, position),
            None if self.bias is None else layout.class_handle(self.bias, position),
            None
            if self.ids is None
            else layout.field_handle(self.ids, index, self.rows, call.targets),
            call.ignore_index,
            self.scale,
            call.softcap,
            self.vectors,
            None if self.dense is None else torch_handle(self.dense[..., index]),
        )


def _capped_entropy(call: Call, device: torch.device) -> bool:
    return call.softcap > 0 and "entropy" in call.core and device.type == "cuda"


def _handle(tensor: Optional) -> Handle | None:
    return None if tensor is None else torch_handle(tensor)


def _plan(call: Call, device: torch.device, weight: Handle, lends: int | None) -> Any:
    return device_calls.plan(
        device,
        weight,
        stats.core_spec(call.core, call.powers, call.vectors, call.topk, call.targets),
        call.rows,
        weight[2][1],
        weight[2][0],
        torch_code(call.dtype),
        # What is kept belongs to one head: one with extra dimensions recomputes. Exponentials of a
        # softcap carry its slope, which an entropy's gradient cannot take out again.
        0 if call.positions or _capped_entropy(call, device) else call.memory,
        call.gradients,
        lends=lends,
        compact=not call.shift,
    )
