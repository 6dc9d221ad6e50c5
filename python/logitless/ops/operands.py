"""The operands of an engine call as handles: its inputs, what is kept, its gradients."""

from __future__ import annotations

from math import prod
from typing import Any

from logitless._arrays import Handle, torch_handle
from logitless._extras import torch
from logitless.ops import layout
from logitless.ops.call import ALIGNMENT, BIAS, DENSE, INPUT, SCALE, WEIGHT, Call, Tensors, plan
from logitless.ops.loan import Loan

__all__ = ["Problem", "Slots", "kept_handles"]

Tensor = torch.Tensor
Optional = torch.Tensor | None


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
        self.plan = plan(call, device, address % ALIGNMENT, shape, strides, lends)

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


def kept_handles(store: Optional, loan: Loan | None) -> tuple[Handle | None, Handle | None]:
    """Return the handles of what a forward keeps: its store, and the memory of d_weight."""
    if loan is None or loan.store is None:
        return (None if store is None else torch_handle(store)), None
    lent = None if loan.d_weight is None else torch_handle(loan.d_weight)
    return torch_handle(loan.store), lent


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


def _rounded(gradient: Optional, like: Optional) -> Optional:
    if gradient is None or like is None or gradient.dtype is like.dtype:
        return gradient
    return gradient.to(like.dtype)
