"""The second derivative: dense torch on chunks of rows, in bounded memory.

The gradient of <g, F(θ)> in direction u is the derivative of <g, F> along u, so its own gradient
needs nothing but F on dense logits. Rows are independent given the head: a chunk of rows forms its
logits, is differentiated twice by torch, and is gone. Third derivatives are refused by the caller.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from logitless._extras import torch
from logitless.ops import layout
from logitless.ops.call import BITS, DENSE, INPUT, SCALE, Call, Tensors

__all__ = ["double_backward"]

Tensor = torch.Tensor
Optional = torch.Tensor | None

# A chunk holds about so many (rows, V) tensors at once, forward, backward and twice backward.
_TENSORS = 24
_CHUNK_BYTES = 256 * 2**20


class _Place(NamedTuple):
    """Where a chunk lies: its rows, and the head."""

    rows: slice
    head: int  # of the head among those of a weight with extra dimensions
    position: tuple[int, ...]  # the same as (i1, ..., iK)


class _Leaves(NamedTuple):
    """What the statistics are functions of, for one chunk of rows and one head."""

    input: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Optional  # (V,)
    scale: Optional  # 0-d
    dense: Optional  # (n, V)


def double_backward(
    call: Call,
    tensors: Tensors,
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

    def as_positions(tensor: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        tensor = layout.to_positions(tensor, count, columns, dtype)
        return tensor.view(count, rows, max(columns, 1))

    input, weight, bias, scale, dense, ids, vectors = tensors
    sources = (as_rows(input), weight, bias, scale, as_dense(dense))
    ways = (as_rows(directions[0]), *directions[1:4], as_dense(directions[4]))
    sums = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in sources]
    saved = [as_positions(f, c, f.dtype) for f, c in zip(fields, columns, strict=True)]
    given = [
        None if g is None else as_positions(g, c, dtype)
        for g, c in zip(cotangents, columns, strict=True)
    ]
    results = [None if g is None else torch.zeros_like(g) for g in given]
    ids = None if ids is None else as_positions(ids, call.targets, torch.int64)
    step = max(1, _CHUNK_BYTES // (_TENSORS * weight.shape[0] * dtype.itemsize))
    for (index, position), start in product(enumerate(positions), range(0, rows, step)):
        place = _Place(slice(start, min(start + step, rows)), index, position)
        parts = [None if g is None else g[index, place.rows] for g in given]
        d_leaves, d_parts = _chunk(
            call,
            [_cut(t, bit, place) for t, bit in zip(sources, BITS, strict=True)],
            [_cut(t, bit, place) for t, bit in zip(ways, BITS, strict=True)],
            None if ids is None else ids[index, place.rows],
            vectors,
            [f[index, place.rows] for f in saved],
            parts,
        )
        for total, value, bit in zip(sums, d_leaves, BITS, strict=True):
            into = _cut(total, bit, place)
            if into is not None and value is not None:
                into.add_(value)
        for result, value in zip(results, d_parts, strict=True):
            if result is not None and value is not None:
                result[index, place.rows] = value
    return (
        tuple(
            None if total is None or t is None else _finish(call, total, t, bit)
            for total, t, bit in zip(sums, tensors[:5], BITS, strict=True)
        ),
        tuple(
            None if r is None else layout.to_rows(r, call.rows_shape, count, c)
            for r, c in zip(results, columns, strict=True)
        ),
    )


def _cut(tensor: Optional, bit: int, place: _Place) -> Optional:
    """Return the view of a chunk and head into an input, by its bit."""
    if tensor is None or bit == SCALE:
        return tensor
    if bit == INPUT:
        return tensor[place.rows]
    if bit == DENSE:
        return tensor[place.rows, :, place.head]
    for axis in place.position:
        tensor = tensor.select(1, axis)
    return tensor


def _chunk(
    call: Call,
    sources: list[Optional],
    ways: list[Optional],
    ids: Optional,
    vectors: Optional,
    saved: list[Tensor],
    cotangents: list[Optional],
) -> tuple[list[Optional], list[Optional]]:
    """Differentiate <ways, ∇<cotangents, statistics>> for one chunk and head."""
    dtype = call.accumulation
    names = [name for name, _, _ in call.fields]
    # Rounded as the engine reads them, then widened.
    leaves: list[Any] = [
        None
        if t is None
        else t.detach().to(dtype if bit in (SCALE, DENSE) else call.dtype).to(dtype)
        for t, bit in zip(sources, BITS, strict=True)
    ]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    given = [None if g is None else g.detach().requires_grad_() for g in cotangents]
    wrt = [t for t in (*leaves, *given) if t is not None]
    with torch.enable_grad():
        values = _statistics(
            call, _Leaves(*leaves), ids, vectors, dict(zip(names, saved, strict=True))
        )
        first = [
            (g * values[name]).sum()
            for name, g in zip(names, given, strict=True)
            if g is not None and name in values
        ]
        slopes = torch.autograd.grad(
            sum(first[1:], first[0]),
            [t for t in leaves if t is not None],
            create_graph=True,
            allow_unused=True,
        )
        along = [way for way, t in zip(ways, leaves, strict=True) if t is not None]
        second = [
            (way.detach().to(dtype) * slope).sum()
            for way, slope in zip(along, slopes, strict=True)
            if way is not None and slope is not None and slope.requires_grad
        ]
        if not second:
            return [None] * len(leaves), [None] * len(given)
        outcome = iter(torch.autograd.grad(sum(second[1:], second[0]), wrt, allow_unused=True))
    return (
        [None if t is None else next(outcome) for t in leaves],
        [None if g is None else next(outcome) for g in given],
    )


def _finish(call: Call, total: Tensor, like: Tensor, bit: int) -> Tensor:
    if bit == DENSE:
        return layout.scatter_dense(total.movedim(-1, 0), like, call.positions, call.shift)
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
