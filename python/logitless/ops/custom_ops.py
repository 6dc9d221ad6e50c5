"""The same two calls as torch.library ops: one graph node each for torch.compile and its kin.

Traced code must not meet a compiled object, so the ops take the parts of a `Call` as plain
arguments and put it together inside. The fake implementations give shapes and dtypes; they also
serve meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from logitless import stats
from logitless._arrays import torch_code
from logitless._extras import torch
from logitless.ops import engine
from logitless.ops.call import (
    BITS,
    DENSE,
    INPUT,
    Call,
    Tensors,
    call_of,
    keeps_when_lean,
    store_bytes,
)

__all__ = ["needed", "statistics"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

# The parts of a Call, in the order of `_pack` and `_unpack`.
_CALL = (
    "str core, float[] powers, int topk, int shift, int? ignore_index, float logit_scale, "
    "float softcap, int memory, int gradients, ScalarType dtype"
)
_TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? dense, Tensor? ids, "
    "Tensor? vectors"
)


def needed(*tensors: Optional) -> bool:
    """Tell whether the call must be visible to a tracer, a dispatch mode or a tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return True
    return False


def statistics(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """Compute the core's fields through the custom op."""
    outputs = torch.ops.logitless.row_statistics(*tensors, *_pack(call, tensors))
    return tuple(outputs[: len(call.fields)])


def _pack(call: Call, tensors: Tensors) -> tuple[Any, ...]:
    memory = call.memory
    if memory == -1 and keeps_when_lean(call, tensors.input.device):
        # A plan needs numbers. Where a traced size has none, what lean would keep is made again.
        memory = -1 if _has_numbers(tensors.input, tensors.weight) else 0
    return (
        ",".join(call.core),
        list(call.powers),
        call.topk,
        call.shift,
        call.ignore_index,
        call.logit_scale,
        call.softcap,
        memory,
        call.gradients,
        call.dtype,
    )


def _has_numbers(*tensors: Tensor) -> bool:
    """Tell whether every size is known to whoever traces this."""
    # Loaded by every tracer, and slowly by others. torch before 2.7 cannot tell.
    from torch.fx.experimental import symbolic_shapes

    is_known = getattr(symbolic_shapes, "has_static_value", None)
    if is_known is None:
        return False
    return all(is_known(size) for tensor in tensors for size in tensor.shape)


def _unpack(
    make: Callable[..., Call],
    input: Tensor,
    weight: Tensor,
    ids: Optional,
    vectors: Optional,
    *packed: Any,
) -> Call:
    core, powers, topk, shift, ignore_index, logit_scale, softcap, memory, gradients, dtype = packed
    lead, positions = tuple(input.shape[:-1]), tuple(weight.shape[1:-1])
    if shift:
        lead = (*lead[:-1], lead[-1] - shift)
    rows_shape = (*lead, *positions)
    targets = 0
    if ids is not None:
        targets = 1 if ids.dim() == len(rows_shape) else ids.shape[-1]
    parts = (
        tuple(core.split(",")),
        tuple(powers),
        0 if vectors is None else vectors.shape[0],
        topk,
        targets,
    )
    return make(
        *parts,
        fields=stats.core_fields.__wrapped__(*parts),  # sizes may be symbolic: no cache
        rows_shape=rows_shape,
        rows=prod(lead),
        positions=positions,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=gradients,
        dtype=dtype,
    )


@torch.library.custom_op(
    "logitless::row_statistics", mutates_args=(), schema=f"({_TENSORS}, {_CALL}) -> Tensor[]"
)
def _forward_op(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    scale: Optional,
    dense: Optional,
    ids: Optional,
    vectors: Optional,
    *packed: Any,
) -> list[Tensor]:
    call = _unpack(call_of, input, weight, ids, vectors, *packed)
    fields, store = engine.forward(call, Tensors(input, weight, bias, scale, dense, ids, vectors))
    return [*fields] if store is None else [*fields, store]


@_forward_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Optional,  # noqa: ARG001
    scale: Optional,  # noqa: ARG001
    dense: Optional,  # noqa: ARG001
    ids: Optional,
    vectors: Optional,
    *packed: Any,
) -> list[Tensor]:
    call = _unpack(Call, input, weight, ids, vectors, *packed)
    outputs = [
        input.new_empty(
            (*call.rows_shape, columns) if columns else call.rows_shape,
            dtype=torch.int64 if integer else call.accumulation,
        )
        for _, columns, integer in call.fields
    ]
    if input.device.type == "cuda" and not torch.cuda.is_available():
        return outputs
    # No address here; the engine's plan for a head of this layout.
    address: Any = 0
    if weight.dtype == call.dtype:
        address = weight.storage_offset() * weight.element_size()
    shape, strides = (weight.shape[0], weight.shape[-1]), (weight.stride(0), weight.stride(-1))
    head = (address, torch_code(call.dtype), shape, strides)
    if size := store_bytes(call, input.device, head):
        outputs.append(input.new_empty((size,), dtype=torch.uint8))
    return outputs


@torch.library.custom_op(
    "logitless::row_statistics_backward",
    mutates_args=(),
    schema=(
        f"({_TENSORS}, Tensor? store, Tensor[] fields, Tensor?[] cotangents, int wanted, {_CALL})"
        " -> Tensor[]"
    ),
)
def _backward_op(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    scale: Optional,
    dense: Optional,
    ids: Optional,
    vectors: Optional,
    store: Optional,
    fields: list[Tensor],
    cotangents: list[Optional],
    wanted: int,
    *packed: Any,
) -> list[Tensor]:
    call = _unpack(call_of, input, weight, ids, vectors, *packed)
    gradients = engine.backward(
        call,
        wanted,
        Tensors(input, weight, bias, scale, dense, ids, vectors),
        store,
        tuple(fields),
        tuple(cotangents),
    )
    return [g for g in gradients if g is not None]


@_backward_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    scale: Optional,
    dense: Optional,
    ids: Optional,  # noqa: ARG001
    vectors: Optional,  # noqa: ARG001
    store: Optional,  # noqa: ARG001
    fields: list[Tensor],  # noqa: ARG001
    cotangents: list[Optional],  # noqa: ARG001
    wanted: int,
    *packed: Any,  # noqa: ARG001
) -> list[Tensor]:
    # `engine.backward` allocates the input's gradient contiguous and the others like their tensors.
    contiguous = torch.contiguous_format
    inputs = (input, weight, bias, scale, dense)
    return [
        torch.empty_like(t, memory_format=contiguous)
        if bit in (INPUT, DENSE)
        else torch.empty_like(t)
        for t, bit in zip(inputs, BITS, strict=True)
        if t is not None and wanted & bit
    ]


def _setup_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    ctx.packed = inputs[7:]
    core = tuple(ctx.packed[0].split(","))
    # Neither the parameters of the statistics nor a cache matter for counting their fields.
    ctx.count = len(stats.core_fields(core, (), 0, 0, 0))
    ctx.save_for_backward(*inputs[:7], *output)


def _backward(ctx: Any, cotangents: list[Optional]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpointing recomputes on each access
    inputs, outputs = saved[:7], saved[7:]
    fields = outputs[: ctx.count]
    store = outputs[ctx.count] if len(outputs) > ctx.count else None
    wanted = [bool(need) for need in ctx.needs_input_grad[:5]]
    mask = sum(bit for bit, need in zip(BITS, wanted, strict=True) if need)
    given = [
        None if g is None or not field.is_floating_point() else g
        for g, field in zip(cotangents[: ctx.count], fields, strict=True)
    ]
    gradients = iter(
        torch.ops.logitless.row_statistics_backward(
            *inputs, store, list(fields), given, mask, *ctx.packed
        )
    )
    results = [next(gradients) if need else None for need in wanted]
    # ids and vectors, then the packed call; torch takes an empty list for a list of tensors.
    nothing: list[Any] = [[] if p == [] else None for p in ctx.packed]
    return (*results, None, None, *nothing)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
