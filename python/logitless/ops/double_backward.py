"""The second derivative: dense torch on chunks of rows, in bounded memory.

The gradient of <g, F(θ)> in direction u is the derivative of <g, F> along u, so its own gradient
needs nothing but F on dense logits. Rows are independent given the head: a chunk of rows forms its
logits, is differentiated twice by torch, and is gone. Third derivatives are refused by the caller.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from logitless._extras import torch
from logitless.ops import layout
from logitless.ops.engine import BIAS, DENSE, INPUT, SCALE, WEIGHT, Call

__all__ = ["double_backward"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

# A chunk holds about so many (rows, V) tensors at once, forward, backward and twice backward.
_TENSORS = 24
_CHUNK_BYTES = 256 * 2**20

_BITS = (INPUT, WEIGHT, BIAS, SCALE, DENSE)  # the order in which gradients are listed


class _Leaves(NamedTuple):
    """What the statistics are functions of, for one chunk of rows and one head."""

    input: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Optional  # (V,)
    scale: Optional  # 0-d
    dense: Optional  # (n, V)


def double_backward(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    scale: Optional,
    dense: Optional,
    ids: Optional,
    vectors: Optional,
    fields: tuple[Tensor, ...],
    cotangents: tuple[Optional, ...],
    directions: tuple[Optional, ...],
) -> tuple[tuple[Optional, ...], tuple[Optional, ...]]:
    """Differentiate the backward once more.

    `directions` are the cotangents of the gradients (input, weight, bias, scale, dense), None for
    zero. Returns the gradients for (input, weight, bias, scale, dense) and for the cotangents.

    Memory: about 256 MiB of chunks, and a few copies of the head in the accumulation dtype.
    """
    positions = list(product(*map(range, call.positions)))
    count, rows, dtype = len(positions), call.rows, call.accumulation
    names = [name for name, _, _ in call.fields]
    columns = [c for _, c, _ in call.fields]

    def as_rows(tensor: Optional) -> Optional:
        if tensor is None:
            return None
        if call.shift:
            tensor = tensor.narrow(-2, 0, tensor.shape[-2] - call.shift)
        return tensor.reshape(rows, tensor.shape[-1])

    def as_dense(tensor: Optional) -> Optional:
        if tensor is None:
            return None
        return layout.dense_rows(tensor, rows, call.positions, call.shift)

    sources = (as_rows(input), weight, bias, scale, as_dense(dense))
    ways = (as_rows(directions[0]), *directions[1:4], as_dense(directions[4]))
    sums: list[Optional] = [
        None if t is None else torch.zeros(t.shape, dtype=dtype, device=t.device) for t in sources
    ]

    def as_positions(tensor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        tensor = layout.to_positions(tensor, count, columns, dtype)
        return tensor.view(count, rows, max(columns, 1))

    saved = [as_positions(f, c, f.dtype) for f, c in zip(fields, columns, strict=True)]
    given = [
        None if g is None else as_positions(g, c, dtype)
        for g, c in zip(cotangents, columns, strict=True)
    ]
    ids = None if ids is None else as_positions(ids, call.targets, torch.int64)
    results = [None if g is None else torch.zeros_like(g) for g in given]
    step = max(1, _CHUNK_BYTES // (_TENSORS * weight.shape[0] * dtype.itemsize))
    for index, position in enumerate(positions):
        for start in range(0, rows, step):
            chunk = slice(start, min(start + step, rows))

            def cut(tensor: Optional, bit: int) -> Optional:
                if tensor is None:
                    return None
                if bit == INPUT:
                    part = tensor[chunk]  # noqa: B023 (used before the loop moves on)
                elif bit == DENSE:
                    part = tensor[chunk, :, index]  # noqa: B023
                else:
                    part = tensor[(slice(None), *position)] if bit != SCALE else tensor  # noqa: B023
                return part

            leaves = _Leaves(
                *(
                    None
                    if (part := cut(t, bit)) is None
                    # Rounded as the engine reads it, then widened.
                    else part.detach()
                    .to(dtype if bit in (SCALE, DENSE) else call.dtype)
                    .to(dtype)
                    .requires_grad_()
                    for t, bit in zip(sources, _BITS, strict=True)
                )
            )
            along = [
                None if (part := cut(t, bit)) is None else part.detach().to(dtype)
                for t, bit in zip(ways, _BITS, strict=True)
            ]
            g_chunk = [
                None if g is None else g[index, chunk].detach().requires_grad_() for g in given
            ]
            with torch.enable_grad():
                values = _statistics(
                    call,
                    leaves,
                    None if ids is None else ids[index, chunk],
                    vectors,
                    {n: f[index, chunk] for n, f in zip(names, saved, strict=True)},
                )
                first = [
                    (g * values[name]).sum()
                    for name, g in zip(names, g_chunk, strict=True)
                    if g is not None and name in values
                ]
                wrt = [t for t in leaves if t is not None]
                slopes = torch.autograd.grad(
                    sum(first[1:], first[0]), wrt, create_graph=True, allow_unused=True
                )
                ways_of = [u for u, t in zip(along, leaves, strict=True) if t is not None]
                second = [
                    (u * slope).sum()
                    for u, slope in zip(ways_of, slopes, strict=True)
                    if u is not None and slope is not None and slope.requires_grad
                ]
                if not second:
                    continue
                targets = [*wrt, *(g for g in g_chunk if g is not None)]
                outcome = iter(
                    torch.autograd.grad(sum(second[1:], second[0]), targets, allow_unused=True)
                )
            for total, leaf, bit in zip(sums, leaves, _BITS, strict=True):
                if leaf is not None and (value := next(outcome)) is not None:
                    part = cut(total, bit)
                    assert part is not None
                    part.add_(value)
            for result, g in zip(results, g_chunk, strict=True):
                if g is not None and result is not None and (value := next(outcome)) is not None:
                    result[index, chunk] = value
    originals = (input, weight, bias, scale, dense)
    return (
        tuple(
            None if total is None or t is None else _finish(call, total, t, bit)
            for total, t, bit in zip(sums, originals, _BITS, strict=True)
        ),
        tuple(
            None if r is None else layout.to_rows(r, call.rows_shape, count, c)
            for r, c in zip(results, columns, strict=True)
        ),
    )


def _finish(call: Call, total: Tensor, like: Tensor, bit: int) -> Tensor:
    if bit == DENSE:
        return layout.scatter_dense(total, like, call.positions, call.shift)
    if bit == INPUT and call.shift:
        result = torch.zeros_like(like, memory_format=torch.contiguous_format)
        kept = result.narrow(-2, 0, like.shape[-2] - call.shift)
        kept.copy_(total.reshape(kept.shape))
        return result
    return total.reshape(like.shape).to(like.dtype)


def _statistics(
    call: Call, leaves: _Leaves, ids: Optional, vectors: Optional, saved: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the core's floating fields densely, as (n, columns), twice differentiable.

    `saved` gives the ids that argmax and topk chose.
    """
    scale = call.logit_scale if leaves.scale is None else leaves.scale
    x = scale * (leaves.input @ leaves.weight.T)
    if leaves.bias is not None:
        x = x + leaves.bias
    z = call.softcap * torch.tanh(x / call.softcap) if call.softcap else x
    nothing = z.new_zeros(())
    in_rest = torch.ones_like(z, dtype=torch.bool)
    live = torch.ones_like(z[:, :1], dtype=torch.bool)
    if ids is not None:
        real = torch.ones_like(ids, dtype=torch.bool)
        if call.ignore_index is not None:
            real = ids != call.ignore_index
        live = real.any(dim=1, keepdim=True)
        places = torch.where(real, ids, 0)
        in_rest = torch.zeros_like(z).scatter_add_(1, places, real.to(z.dtype)) == 0
    z_rest = torch.where(in_rest, z, -torch.inf)
    rest = _logsumexp(z_rest)
    r = torch.where(in_rest, torch.exp(z_rest - torch.where(rest.isfinite(), rest, 0.0)), nothing)
    values: dict[str, Tensor] = {"rest": rest}
    if "target" in call.core and ids is not None:
        values["target"] = torch.where(real, z.gather(1, places), nothing)
    if "entropy" in call.core:
        held = torch.where(r > 0, z_rest, nothing)
        values["rest_entropy"] = torch.where(
            rest.isfinite(), rest - (r * held).sum(1, keepdim=True), nothing
        )
    if "sum" in call.core:
        values["sum"] = z.sum(1, keepdim=True)
    if "sum_sq" in call.core:
        values["sum_sq"] = z.square().sum(1, keepdim=True)
    if "variance" in call.core:
        values["mean"] = z.mean(1, keepdim=True)
        values["variance"] = (z - values["mean"]).square().mean(1, keepdim=True)
    if "max" in call.core:
        values["max"] = z.gather(1, saved["argmax"].clamp(min=0))
    if "rest_power" in call.core:
        values["rest_power"] = torch.cat([_logsumexp(m * z_rest) for m in call.powers], dim=1)
    if vectors is not None and "weighted_sum" in call.core:
        parts = [(c * torch.where(c != 0, z, nothing)).sum(1) for c in vectors]
        values["weighted_sum"] = torch.stack(parts, dim=1)
    if vectors is not None and "weighted_rest" in call.core:
        values["weighted_rest"] = r @ vectors.T
    if leaves.dense is not None and "dot" in call.core:
        finite = torch.where((leaves.dense != 0) | z.isfinite(), z, nothing)
        values["dot"] = (leaves.dense * finite).sum(1, keepdim=True)
    if "topk" in call.core:
        values["topk_values"] = z.gather(1, saved["topk_ids"].clamp(min=0))
    # Ignored rows are constants.
    return {name: torch.where(live, value, nothing) for name, value in values.items()}


def _logsumexp(z: Tensor) -> Tensor:
    """Log-sum-exp over the last axis, kept; -inf with zero gradient where every entry is -inf."""
    top = z.detach().amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    total = torch.exp(z - top).sum(1, keepdim=True)
    empty = total == 0
    return torch.where(empty, -torch.inf, top + torch.log(torch.where(empty, 1.0, total)))
