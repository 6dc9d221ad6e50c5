"""The differentiable op of eager mode: an autograd.Function straight over the engine.

Under torch.compile, fake tensors and dispatch modes the same call goes through `custom_ops`
instead; a custom op alone costs more than a whole small call here.
"""

from __future__ import annotations

from typing import Any

from logitless._extras import torch
from logitless.ops import custom_ops, engine
from logitless.ops.call import BITS, WEIGHT, Call, Tensors, recomputing
from logitless.ops.double_backward import double_backward
from logitless.ops.loan import offer

__all__ = ["gradient_mask", "in_forward_mode", "plain", "statistics", "wanted_bits"]

Tensor = torch.Tensor
Optional = torch.Tensor | None


def gradient_mask(*tensors: Optional, grad_buffer: Optional = None) -> int:
    """Bits of those of (input, weight, bias, scale, dense) that a gradient may be asked for."""
    if not torch.is_grad_enabled():
        return 0
    mask, bit = 0 if grad_buffer is None else WEIGHT, 1
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            mask |= bit
        bit <<= 1
    return mask


def statistics(call: Call, tensors: Tensors, grad_buffer: Optional = None) -> tuple[Tensor, ...]:
    """Compute the core's fields of a call, differentiably, by whichever way the context needs."""
    plain = not custom_ops.needed(*tensors)
    transformed = torch._C._are_functorch_transforms_active()
    if grad_buffer is not None and (transformed or not plain):
        raise NotImplementedError(
            "grad_buffer is changed by the backward, which torch.compile, torch.func and dispatch "
            "modes cannot follow: leave it out there"
        )
    if not plain:
        return custom_ops.statistics(call, tensors)
    if transformed:
        return _Transformed.apply(*tensors, call, None)[:-1]  # type: ignore[no-any-return]
    if call.gradients or in_forward_mode():
        return _RowStatistics.apply(*tensors, call, grad_buffer)[:-1]  # type: ignore[no-any-return]
    return engine.forward(call, tensors)[0]


def in_forward_mode() -> bool:
    """Tell whether tensors may carry tangents, which must not be dropped silently."""
    return torch.autograd.forward_ad._current_level >= 0


def plain(*tensors: Optional) -> bool:
    """Tell whether nothing but autograd follows the call: no tracer, transform or tangents."""
    return (
        not custom_ops.needed(*tensors)
        and not torch._C._are_functorch_transforms_active()
        and not in_forward_mode()
    )


def wanted_bits(needs: tuple[bool, ...], grad_buffer: Optional) -> int:
    """Bits of the gradients that this backward must make."""
    wanted = 0
    for bit, need in zip(BITS, needs, strict=False):
        if need:
            wanted |= bit
    if grad_buffer is None:
        return wanted
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "grad_buffer cannot be differentiated: leave it out where create_graph=True is needed"
        )
    return wanted | WEIGHT


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
        *tensors, call, grad_buffer = arguments
        loan = offer(call, tensors[1], grad_buffer)
        fields, store = engine.forward(call, Tensors(*tensors), loan)
        output = (*fields, store)
        _keep(ctx, arguments, output)
        # Not among the saved tensors: the backward writes to it.
        ctx.loan = loan
        ctx.borrowed = loan is not None and loan.store is not None
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Optional, ...]:
        """Recompute tiles, or differentiate the recomputation if a graph of it is wanted."""
        saved = ctx.saved_tensors  # once: checkpointing recomputes on each access
        tensors, fields, store = Tensors(*saved[:7]), saved[7:-1], saved[-1]
        wanted = wanted_bits(ctx.needs_input_grad[:5], ctx.grad_buffer)
        call, loan = ctx.call, None
        if ctx.borrowed:
            # Good for one backward; another one, or its derivative, recomputes.
            loan, ctx.loan = ctx.loan, None
            if loan is None or torch.is_grad_enabled():
                call, loan = recomputing(call), None
        if not torch.is_grad_enabled():
            gradients = engine.backward(
                call, wanted, tensors, store, fields, cotangents[:-1], loan, ctx.grad_buffer
            )
        else:
            gradients = _RowStatisticsBackward.apply(
                *tensors, store, call, wanted, *fields, *cotangents[:-1]
            )
        return (*gradients, None, None, None, None)


class _Transformed(_RowStatistics):
    """The same for torch.func, which wants forward and context apart: 25 µs more a call."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        """Return the fields, then the store (None for none)."""
        *tensors, call, _ = arguments
        fields, store = engine.forward(call, Tensors(*tensors))
        return (*fields, store)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the backward needs."""
        _keep(ctx, inputs, output)
        ctx.borrowed = False


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep inputs, fields and store: never anything of N x V."""
    *tensors, ctx.call, ctx.grad_buffer = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)
    constant = [t for t, f in zip(output, ctx.call.fields, strict=False) if f[2]]
    if output[-1] is not None:
        constant.append(output[-1])
    ctx.mark_non_differentiable(*constant)


class _RowStatisticsBackward(_Refusals):
    """The backward as a function of the inputs and the cotangents."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        """Return the gradients of (input, weight, bias, scale, dense)."""
        (*tensors, store, call, wanted), rest = arguments[:10], arguments[10:]
        count = len(rest) // 2
        return engine.backward(call, wanted, Tensors(*tensors), store, rest[:count], rest[count:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        """Keep what the dense recomputation starts from."""
        ctx.call = inputs[8]
        ctx.save_for_backward(*inputs[:7], *inputs[10:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Optional, ...]:
        """Differentiate twice."""
        saved = ctx.saved_tensors
        count = (len(saved) - 7) // 2
        results = _SecondDerivative.apply(ctx.call, *saved, *directions)
        return (*results[:5], *(None,) * (5 + count), *results[5:])


class _SecondDerivative(_Refusals):
    """Dense torch on chunks of rows; a node of its own, so that a third derivative is refused.

    `once_differentiable` would not do: its error is not on the way from a result to the inputs, and
    a third derivative would silently be partial.
    """

    @staticmethod
    def forward(call: Call, *arguments: Any) -> tuple[Optional, ...]:
        """Return the gradients of (input, weight, bias, scale, dense), then of the cotangents."""
        rest = arguments[7:-5]
        count = len(rest) // 2
        gradients, cotangents = double_backward(
            call, Tensors(*arguments[:7]), rest[:count], rest[count:], arguments[-5:]
        )
        return (*gradients, *cotangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> Any:
        """Refuse the third derivative."""
        raise NotImplementedError(
            "logitless has no third derivatives: two create_graph=True are the limit; "
            "torch.nn.functional.cross_entropy on the logits has all of them"
        )
