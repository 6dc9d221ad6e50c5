"""Plain cross entropy of class ids, fused.

What `row_statistics` and a few operations on vectors say: on the CPU the row losses and their
reduction run beside the statistics, in one engine call and one autograd node; on CUDA they are one
launch behind the statistics, and their cotangents one before the backward. Second derivatives go
back to the unfused form.
"""

from __future__ import annotations

from typing import Any

from logitless import _core
from logitless._arrays import torch_handle
from logitless._check import Geometry
from logitless._extras import torch
from logitless.ops import autograd, custom_ops, engine, inputs, layout
from logitless.ops import device as device_calls
from logitless.ops.elementwise import margin, softplus
from logitless.ops.engine import Call, Tensors

__all__ = ["applies", "cross_entropy", "row_losses"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

_CPU: Any = _core  # the problem arrives as a tuple
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_CORE = ("rest", "target")
_FIELDS = (("rest", 0, False), ("target", 1, False))


def applies(geometry: Geometry, *tensors: Optional) -> bool:
    """Tell whether a call with class ids can take this path."""
    return (
        geometry.kind == "index"
        and not geometry.positions
        and tensors[0] is not None
        and tensors[0].device.type in ("cpu", "cuda")
        and geometry.rows > 0
        and not custom_ops.needed(*tensors)
        and not torch._C._are_functorch_transforms_active()
        and not autograd.in_forward_mode()
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
    gradients = 0
    if torch.is_grad_enabled():
        gradients = autograd.gradient_mask(
            input, weight, bias, scale, None, grad_buffer=grad_buffer
        )
    dtype = inputs.compute_dtype(input)
    call = Call(
        core=_CORE,
        powers=(),
        vectors=0,
        topk=0,
        targets=1,
        fields=_FIELDS,
        rows_shape=geometry.rows_shape,
        positions=(),
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=number,
        softcap=softcap,
        memory=memory,
        gradients=gradients,
        dtype=dtype,
        grad_buffer=inputs.grad_buffer(grad_buffer, weight, dtype),
    )
    ids = inputs.class_ids(target, geometry, shift, ignore_index).contiguous()
    tensors = Tensors(input, weight, bias, scale, ids=ids)
    arguments = (call, _REDUCTIONS[reduction], z_loss_weight)
    if input.is_cuda:
        rest, target = autograd.statistics(call, tensors)
        return _Losses.apply(rest, target, ids, *arguments)  # type: ignore[no-any-return]
    if gradients:
        return _CrossEntropy.apply(*tensors, *arguments)  # type: ignore[no-any-return]
    return _forward(tensors, *arguments)[0]


def row_losses(rest: Tensor, target: Tensor, z_loss_weight: float) -> Tensor:
    """Loss of each row in torch: log(1 + e^(rest - target)), and the squared log-sum-exp."""
    losses = softplus(margin(rest, target))
    if z_loss_weight:
        losses = losses + z_loss_weight * (losses + target).square()  # lse = loss + target
    return losses


def _forward(
    tensors: Tensors, call: Call, reduction: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor, Optional]:
    """Return loss, rest, target and the store."""
    rows, dtype = call.rows, call.accumulation
    loss = torch.empty(() if reduction else call.rows_shape, dtype=dtype)
    rest = torch.empty((rows,), dtype=dtype)
    target = torch.empty((rows, 1), dtype=dtype)
    problem = engine.Problem(call, tensors)
    store = None
    if size := engine.store_bytes(call, tensors.input.device, problem.head):
        store = torch.empty(size, dtype=torch.uint8)
    _CPU.cross_entropy_forward(
        *problem.arguments(0, ())[1:8],
        reduction,
        z_loss_weight,
        layout.field_handle(loss, 0, 1 if reduction else rows, 0),
        torch_handle(rest),
        torch_handle(target),
        None if store is None else torch_handle(store),
        problem.plan,
        torch.get_num_threads(),
    )
    return loss, rest, target, store


class _CrossEntropy(torch.autograd.Function):
    """Loss with gradients for input, weight, bias and scale."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Keep two values a row."""
        tensors, options = Tensors(*arguments[:7]), arguments[7:]
        loss, rest, target, store = _forward(tensors, *options)
        ctx.save_for_backward(*tensors, rest, target, store)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional, ...]:
        """Recompute tiles; differentiate the unfused form if a graph is wanted."""
        *saved, rest, target, store = ctx.saved_tensors
        tensors = Tensors(*saved)
        call, reduction, z_loss_weight = ctx.options
        needs = ctx.needs_input_grad[:4]
        wanted = autograd.wanted_bits(call, needs)
        nothing = (None,) * 6  # dense, ids, vectors and the options
        if torch.is_grad_enabled():
            leaves = [t for t, n in zip(tensors, needs, strict=False) if n and t is not None]
            loss = _unfused(tensors, call, reduction, z_loss_weight)
            slopes = iter(torch.autograd.grad(loss, leaves, gradient, create_graph=True))
            return (*(next(slopes) if need else None for need in needs), *nothing)
        problem = engine.Problem(call, tensors)
        slots = engine.Slots(call, wanted, tensors)
        gradient = gradient.to(call.accumulation)
        _CPU.cross_entropy_backward(
            *problem.arguments(0, ())[1:8],
            reduction,
            z_loss_weight,
            torch_handle(rest),
            torch_handle(target),
            torch_handle(gradient if reduction else gradient.reshape(-1)),
            None if store is None else torch_handle(store),
            *slots.handles(0, ())[:4],
            problem.plan,
            torch.get_num_threads(),
        )
        return (*slots.results()[:4], *nothing)


class _Losses(torch.autograd.Function):
    """CUDA: the losses of the rows from their statistics, or their reduction."""

    @staticmethod
    def forward(
        ctx: Any, rest: Tensor, target: Tensor, ids: Tensor, call: Call, *options: Any
    ) -> Tensor:
        """Keep the statistics, and what the reduction multiplies a row by."""
        loss = rest.new_empty(() if options[0] else call.rows_shape)
        share = rest.new_empty(())
        rows = (rest, target, ids)
        device_calls.losses(rest.device, *rows, call.ignore_index, *options, loss, share)
        ctx.save_for_backward(*rows, share)
        ctx.call, ctx.options = call, options
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional, ...]:
        """Make the cotangents of both statistics."""
        rest, target, ids, share = ctx.saved_tensors
        call, options = ctx.call, ctx.options
        nothing = (None,) * 4  # ids and the options
        if torch.is_grad_enabled():
            loss = _reduced(rest, target, ids, call, *options)
            slopes = torch.autograd.grad(loss, (rest, target), gradient, create_graph=True)
            return (*slopes, *nothing)
        cotangents = torch.empty_like(rest), torch.empty_like(target)
        device_calls.cotangents(
            rest.device,
            *(rest, target, ids),
            call.ignore_index,
            *options,
            gradient.contiguous(),
            share,
            *cotangents,
        )
        return (*cotangents, *nothing)


def _unfused(tensors: Tensors, call: Call, reduction: int, z_loss_weight: float) -> Tensor:
    rest, target = autograd.statistics(call, tensors)
    assert tensors.ids is not None
    return _reduced(rest, target, tensors.ids, call, reduction, z_loss_weight)


def _reduced(
    rest: Tensor, target: Tensor, ids: Tensor, call: Call, reduction: int, z_loss_weight: float
) -> Tensor:
    assert call.ignore_index is not None
    kept = ids.ne(call.ignore_index)
    losses = torch.where(kept, row_losses(rest, target.squeeze(-1), z_loss_weight), 0.0)
    if not reduction:
        return losses
    total: Tensor = losses.sum()
    return total if reduction == 2 else total / kept.sum()
