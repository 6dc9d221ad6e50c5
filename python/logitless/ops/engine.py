"""Torch tensors in, torch tensors out, through the compiled engines.

Nothing here is differentiable: `forward` allocates the statistics and has the engine fill them,
`backward` allocates the wanted gradients and has it fill those. A head with extra dimensions is one
engine call for each of its positions.
"""

from __future__ import annotations

from itertools import product

from logitless._extras import torch
from logitless.ops import device as device_calls
from logitless.ops import layout
from logitless.ops.call import Call, Tensors, core_spec
from logitless.ops.loan import Loan
from logitless.ops.operands import Problem, Slots, kept_handles

__all__ = ["backward", "forward"]

Tensor = torch.Tensor
Optional = torch.Tensor | None


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
        spec = core_spec(call)
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
    spec, columns = core_spec(call), [c for _, c, _ in call.fields]
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
