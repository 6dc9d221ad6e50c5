"""Plain cross entropy of class ids, fused.

What `row_statistics` and a few operations on vectors say, in one autograd node and one engine call
each way: the CPU makes the row losses and their reduction beside the statistics, CUDA in one launch
behind them, and their cotangents in one before the backward. Second derivatives go back to the
unfused form.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from logitless._check import Geometry
from logitless._extras import torch
from logitless.ops import autograd, inputs, layout
from logitless.ops import device as device_calls
from logitless.ops.call import Call, Tensors, recomputing
from logitless.ops.elementwise import margin, softplus
from logitless.ops.loan import Loan, offer
from logitless.ops.operands import Problem, Slots, kept_handles

__all__ = ["applies", "cross_entropy", "row_losses"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def applies(geometry: Geometry, *tensors: Optional) -> bool:
    """Tell whether a call with class ids can take this path."""
    return (
        geometry.kind == "index"
        and not geometry.positions
        and tensors[0] is not None
        and (tensors[0].is_cuda or tensors[0].is_cpu)
        and geometry.rows > 0
        and autograd.plain(*tensors)
    )


def cross_entropy(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Optional,
    *,
    reduction: str,
    ignore_index: int,
    logit_scale: float | Tensor,
    softcap: float,
    shift: int,
    z_loss_weight: float,
    memory: int,
    grad_buffer: Optional,
) -> Tensor:
    """Cross entropy of class ids: `applies` holds and every argument is checked."""
    number, scale = inputs.logit_scale(logit_scale)
    gradients = autograd.gradient_mask(input, weight, bias, scale, None, grad_buffer=grad_buffer)
    dtype = inputs.compute_dtype(input)
    call = _call(
        geometry.rows_shape,
        geometry.rows,
        shift,
        ignore_index,
        number,
        softcap,
        memory,
        gradients,
        dtype,
    )
    buffer = inputs.grad_buffer(grad_buffer, weight, dtype)
    ids = inputs.class_ids(target, geometry, shift, ignore_index).contiguous()
    tensors = Tensors(input, weight, bias, scale, ids=ids)
    options = (call, _REDUCTIONS[reduction], z_loss_weight)
    if gradients:
        return _CrossEntropy.apply(  # type: ignore[no-any-return]
            input, weight, bias, scale, ids, buffer, *options
        )
    return _forward(tensors, *options)[0]


@lru_cache(maxsize=256)
def _call(
    rows_shape: tuple[int, ...],
    rows: int,
    shift: int,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    memory: int,
    gradients: int,
    dtype: torch.dtype,
) -> Call:
    return Call(
        core=("rest", "target"),
        powers=(),
        vectors=0,
        topk=0,
        targets=1,
        fields=(("rest", 0, False), ("target", 1, False)),
        rows_shape=rows_shape,
        rows=rows,
        positions=(),
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=gradients,
        dtype=dtype,
    )


def row_losses(rest: Tensor, target: Tensor, z_loss_weight: float) -> Tensor:
    """Loss of each row in torch: log(1 + e^(rest - target)), and the squared log-sum-exp."""
    losses = softplus(margin(rest, target))
    if z_loss_weight:
        losses = losses + z_loss_weight * (losses + target).square()  # lse = loss + target
    return losses


def _forward(
    tensors: Tensors, call: Call, reduction: int, z_loss_weight: float, loan: Loan | None = None
) -> tuple[Tensor, Optional, Optional]:
    """Return the loss, what the backward reads of each row, and the store."""
    rows, dtype, device = call.rows, call.accumulation, tensors.input.device
    problem = Problem(call, tensors, loan)
    store = problem.store(loan, tensors.weight)
    kept, lent = kept_handles(store, loan)
    loss = torch.empty(() if reduction else call.rows_shape, dtype=dtype, device=device)
    statistics = rest = target = share = None
    if call.gradients or tensors.input.is_cpu:
        statistics = torch.empty(2 * rows + 1, dtype=dtype, device=device)
        rest, target, share = layout.loss_handles(statistics, rows)
    device_calls.cross_entropy_forward(
        problem.plan,
        device,
        *problem.arguments(),
        reduction,
        z_loss_weight,
        layout.field_handle(loss, 0, 1 if reduction else rows, 0),
        rest,
        target,
        kept,
        share=share,
        scale=problem.device_scale,
        lent=lent,
    )
    return loss, statistics, store


class _CrossEntropy(torch.autograd.Function):
    """Loss with gradients for input, weight, bias and scale."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Optional,
        scale: Optional,
        ids: Tensor,
        grad_buffer: Optional,
        call: Call,
        reduction: int,
        z_loss_weight: float,
    ) -> Tensor:
        """Keep two values a row."""
        loan = offer(call, weight, grad_buffer)
        tensors = Tensors(input, weight, bias, scale, ids=ids)
        loss, statistics, store = _forward(tensors, call, reduction, z_loss_weight, loan)
        ctx.save_for_backward(input, weight, bias, scale, ids, statistics, store)
        ctx.options, ctx.grad_buffer = (call, reduction, z_loss_weight), grad_buffer
        # Not among the saved tensors: the backward writes to it.
        ctx.borrowed = loan is not None and loan.store is not None
        ctx.loan = loan if ctx.borrowed else None
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional, ...]:
        """Recompute tiles; differentiate the unfused form if a graph is wanted."""
        input, weight, bias, scale, ids, statistics, store = ctx.saved_tensors
        tensors = Tensors(input, weight, bias, scale, ids=ids)
        call, reduction, z_loss_weight = ctx.options
        needs, grad_buffer = ctx.needs_input_grad[:4], ctx.grad_buffer
        wanted = autograd.wanted_bits(needs, grad_buffer)
        nothing = (None,) * 5  # ids, the buffer and the options
        # Good for one backward; another one, or its derivative, recomputes.
        loan, ctx.loan = ctx.loan, None
        if torch.is_grad_enabled():
            loan = None
            leaves = [t for t, n in zip(tensors, needs, strict=False) if n and t is not None]
            loss = _unfused(tensors, recomputing(call), reduction, z_loss_weight)
            slopes = iter(torch.autograd.grad(loss, leaves, gradient, create_graph=True))
            return (*(next(slopes) if need else None for need in needs), *nothing)
        if ctx.borrowed and loan is None:
            call = recomputing(call)
        problem = Problem(call, tensors, loan)
        slots = Slots(call, wanted, tensors, loan, grad_buffer)
        kept, lent = kept_handles(store, loan)
        gradient = gradient.contiguous()
        rest, target, share = layout.loss_handles(statistics, call.rows)
        device_calls.cross_entropy_backward(
            problem.plan,
            input.device,
            *problem.arguments(),
            reduction,
            z_loss_weight,
            rest,
            target,
            layout.field_handle(gradient, 0, 1 if reduction else call.rows, 0),
            kept,
            *slots.handles(),
            share=share,
            accumulate_weight=slots.accumulates,
            scale=problem.device_scale,
            lent=lent,
        )
        return (*slots.results()[:4], *nothing)


def _unfused(tensors: Tensors, call: Call, reduction: int, z_loss_weight: float) -> Tensor:
    rest, target = autograd.statistics(call, tensors)
    assert tensors.ids is not None
    assert call.ignore_index is not None
    kept = tensors.ids.ne(call.ignore_index)
    losses = torch.where(kept, row_losses(rest, target.squeeze(-1), z_loss_weight), 0.0)
    if not reduction:
        return losses
    total: Tensor = losses.sum()
    return total if reduction == 2 else total / kept.sum()
