"""The differentiable op of eager mode: an autograd.Function straight over the engine.

Under torch.compile, fake tensors and dispatch modes the same call goes through `custom_ops`
instead; a custom op alone costs more than a whole small call here.
"""

from __future__ import annotations

from typing import Any

from logitless._extras import torch
from logitless.ops import custom_ops, engine
from logitless.ops.double_backward import double_backward
from logitless.ops.engine import BIAS, DENSE, INPUT, SCALE, WEIGHT, Call

__all__ = ["gradient_mask", "statistics"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

_BITS = (INPUT, WEIGHT, BIAS, SCALE, DENSE)


def gradient_mask(*tensors: Optional) -> int:
    """Bits of those of (input, weight, bias, scale, dense) that a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return 0
    mask = 0
    for bit, tensor in zip(_BITS, tensors, strict=True):
        if tensor is not None and tensor.requires_grad:
            mask |= bit
    return mask


def statistics(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    scale: Optional,
    dense: Optional,
    ids: Optional,
    vectors: Optional,
) -> tuple[Tensor, ...]:
    """Compute the core's fields of a call, differentiably, by whichever way the context needs."""
    if custom_ops.needed(input, weight, bias, scale, dense):
        return custom_ops.statistics(call, input, weight, bias, scale, dense, ids, vectors)
    transformed = torch._C._are_functorch_transforms_active()
    if call.gradients or transformed:
        op = _Transformed if transformed else _RowStatistics
        outputs = op.apply(input, weight, bias, scale, dense, ids, vectors, call)
        return outputs[:-1]  # type: ignore[no-any-return]
    return engine.forward(call, input, weight, bias, scale, dense, ids, vectors)[0]


class _Refusals(torch.autograd.Function):
    """What neither direction supports, with the way out."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse forward mode."""
        raise NotImplementedError(
            "logitless has no forward-mode derivative (jvp, jacfwd, torch.func.hessian): use "
            "reverse mode, e.g. torch.func.grad or torch.autograd.grad; a Hessian-vector product "
            "is torch.autograd.grad of torch.autograd.grad(loss, x, create_graph=True)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        """Refuse vmap."""
        raise NotImplementedError(
            "logitless has no vmap rule: pass the batch as leading dimensions of input (..., D) "
            "and target (...); per-sample values come from reduction='none', per-sample gradients "
            "from a loop over the samples"
        )


class _RowStatistics(_Refusals):
    """Statistics with gradients for input, weight, bias, scale and dense weights."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Optional, ...]:
        """Return the fields, then the store (None for none)."""
        output = _compute(*arguments)
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
        """Recompute tiles, or differentiate the recomputation if a graph of it is wanted."""
        *inputs, ids, vectors = ctx.saved_tensors[:7]
        *fields, store = ctx.saved_tensors[7:]
        wanted = sum(b for b, need in zip(_BITS, ctx.needs_input_grad[:5], strict=True) if need)
        if not torch.is_grad_enabled():
            gradients = engine.backward(
                ctx.call, wanted, *inputs, ids, vectors, store, tuple(fields), cotangents[:-1]
            )
        else:
            gradients = _RowStatisticsBackward.apply(
                *inputs, ids, vectors, store, ctx.call, wanted, *fields, *cotangents[:-1]
            )
        return (*gradients, None, None, None)


class _Transformed(_RowStatistics):
    """The same for torch.func, which wants forward and context apart: 25 µs more a call."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        """Return the fields, then the store (None for none)."""
        return _compute(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward needs."""
        _keep(ctx, inputs, output)


def _compute(*arguments: Any) -> tuple[Optional, ...]:
    *tensors, call = arguments
    fields, store = engine.forward(call, *tensors)
    return (*fields, store)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep inputs, fields and store: never anything of N x V."""
    *tensors, ctx.call = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    constant = [t for t, f in zip(output, ctx.call.fields, strict=False) if f[2]]
    if output[-1] is not None:
        constant.append(output[-1])
    ctx.mark_non_differentiable(*constant)


class _RowStatisticsBackward(_Refusals):
    """The backward as a function of the inputs and the cotangents, differentiable once."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        """Return the gradients of (input, weight, bias, scale, dense)."""
        inputs, (ids, vectors, store, call, wanted), rest = _split(arguments)
        count = len(rest) // 2
        return engine.backward(
            call, wanted, *inputs, ids, vectors, store, rest[:count], rest[count:]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep what the dense recomputation starts from."""
        tensors, (ids, vectors, _, ctx.call, _), rest = _split(inputs)
        ctx.save_for_backward(*tensors, ids, vectors, *rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *directions: Optional) -> tuple[Optional, ...]:
        """Differentiate twice by dense torch on chunks of rows."""
        *inputs, ids, vectors = ctx.saved_tensors[:7]
        rest = ctx.saved_tensors[7:]
        count = len(rest) // 2
        gradients, cotangents = double_backward(
            ctx.call, *inputs, ids, vectors, rest[:count], rest[count:], directions
        )
        return (*gradients, None, None, None, None, None, *(None,) * count, *cotangents)


def _split(arguments: Any) -> tuple[Any, Any, Any]:
    """(input, weight, bias, scale, dense), (ids, vectors, store, call, wanted), the rest."""
    return arguments[:5], arguments[5:10], arguments[10:]
