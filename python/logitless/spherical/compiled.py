"""The Gram route as torch.library ops: for torch.compile, fake tensors and dispatch modes.

A tracer cannot follow a cache that depends on a version counter, so these compute the Gram matrix
in every forward: right for any weight, also one that the graph itself computes, at 2VD² flops a
call. The rest is that of :mod:`logitless.spherical.statistics`.
"""

from __future__ import annotations

from typing import Any

from logitless._extras import torch
from logitless.spherical import gram as grams
from logitless.spherical import statistics as eager
from logitless.spherical.accumulate import refuse_collecting

Tensor = torch.Tensor
Optional = torch.Tensor | None


def statistics(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,
    number: float,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean, variance and target logits through the op; see `gram_statistics`."""
    outputs = torch.ops.logitless.gram_statistics(input, weight, bias, ids, scale, number, padding)
    return outputs[0], outputs[1], outputs[2]


@torch.library.custom_op("logitless::gram_statistics", mutates_args=())
def _forward_op(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,
    number: float,
    padding: int,
) -> list[Tensor]:
    if not ids.is_cuda:
        eager.check_ids(ids, weight.shape[0], padding)
    mean, centred = grams.compute(weight, bias)
    values = eager.row_values(input, weight, bias, ids, scale, number, padding, mean, centred)
    return [*values, mean]


@_forward_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,  # noqa: ARG001
    number: float,  # noqa: ARG001
    padding: int,  # noqa: ARG001
) -> list[Tensor]:
    rows, size = input.shape[0], weight.shape[1] + (bias is not None)
    targets = ids.shape[1]
    shapes = [(rows,), (rows,), (rows, targets), (rows, size), (rows, size), (size,)]
    dtype = grams.wide(weight.dtype)
    return [input.new_empty(shape, dtype=dtype) for shape in shapes]


@torch.library.custom_op("logitless::gram_statistics_backward", mutates_args=())
def _backward_op(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,
    number: float,
    features: Tensor,
    product: Tensor,
    mean: Tensor,
    cotangents: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    if wanted[1] or wanted[2]:
        refuse_collecting(weight)
    found = eager.gradients(
        *(input, weight, bias, ids, scale, number),
        *(features, product, mean, cotangents, wanted),
    )
    return [g for g in found if g is not None]


@_backward_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,  # noqa: ARG001
    scale: Optional,
    number: float,  # noqa: ARG001
    features: Tensor,  # noqa: ARG001
    product: Tensor,  # noqa: ARG001
    mean: Tensor,  # noqa: ARG001
    cotangents: list[Tensor],  # noqa: ARG001
    wanted: list[bool],
) -> list[Tensor]:
    found: list[Tensor] = []
    if wanted[0]:
        found.append(torch.empty_like(input, memory_format=torch.contiguous_format))
    likes = (weight, bias, scale)
    return found + [
        torch.empty_like(t)
        for t, need in zip(likes, wanted[1:], strict=True)
        if need and t is not None
    ]


def _setup_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    *tensors, ctx.number, _ = inputs
    ctx.save_for_backward(*tensors, *output[3:])


def _backward(ctx: Any, cotangents: list[Optional]) -> tuple[Any, ...]:
    input, weight, bias, ids, scale, features, product, mean = ctx.saved_tensors
    rows, targets = features.shape[0], ids.shape[1]
    given = [
        features.new_zeros(shape) if g is None else g
        for g, shape in zip(cotangents[:3], [(rows,), (rows,), (rows, targets)], strict=True)
    ]
    needs = ctx.needs_input_grad
    wanted = [bool(needs[0]), bool(needs[1]), bool(needs[2]), bool(needs[4])]
    gradients = iter(
        torch.ops.logitless.gram_statistics_backward(
            input, weight, bias, ids, scale, ctx.number, features, product, mean, given, wanted
        )
    )
    d_input, d_weight, d_bias, d_scale = (next(gradients) if w else None for w in wanted)
    return d_input, d_weight, d_bias, None, d_scale, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
