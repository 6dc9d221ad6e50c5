"""The Gram route: Σz, Σz² and the logit variance of an ordinary weight, in O(D²) a row.

With m = Wᵀ1/V and the centred Gram matrix Q = (W − 1mᵀ)ᵀ(W − 1mᵀ), the mean of a row's logits is
h·m and their variance hᵀQh/V: neither visits the classes. Q and m are computed once per version of
the weight: one optimiser step pays VD² multiply-adds for them, of which symmetry saves 3/8, and as
many for its gradient dW = W X + 1 xᵀ + target rows, whatever the number of rows; streaming pays
3NVD to 4NVD. The centred form keeps the digits of a variance far below the squared mean, which
Σz²/V − mean² loses.

The weight's version counter tells whether Q is stale. Edits that do not move it (through ``.data``,
inference tensors, replays of a CUDA graph that was captured without a spherical loss, or another
library writing to the memory) cannot be seen: call :func:`invalidate` after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from logitless._extras import torch
from logitless.spherical.products import (
    add_square,
    add_square_split,
    block_rows,
    blocks,
    mirror,
    tensor_cores,
)


@dataclass(frozen=True)
class Gram:
    """m and Q of [W, b] at one version of both.

    Attributes
    ----------
    mean : Tensor
        (P,), P = D, or D + 1 with a bias; float64 for float64 weights, else float32.
    centred : Tensor
        (P, P), the same dtype.
    key : tuple
        Storage pointers, version counters, layouts and the stream it was computed from.
    """

    mean: torch.Tensor
    centred: torch.Tensor
    key: tuple[Any, ...]


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Weights whose Gram matrix was captured in a CUDA graph. Replays change such a weight without
# moving its version counter, so eager calls may never trust a cached matrix of it again.
_captured: WeakIdKeyDictionary = WeakIdKeyDictionary()


def gram(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Gram:
    """Centred Gram matrix and mean row of a (V, D) weight, with the bias as a last column; cached.

    Costs 5/4 VD² flops or more when the weight has changed since the last call, nothing otherwise.
    The cache holds P² + P numbers a weight and does not keep the weight alive. Inside the capture
    of a CUDA graph, and for a weight that was part of one, it is computed anew on every call.
    """
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[weight] = True
        _cache.pop(weight, None)
        return Gram(*compute(weight, bias), key=())
    key = _key(weight, bias)
    found: Gram | None = _cache.get(weight)
    if found is None or found.key != key:
        found = Gram(*compute(weight, bias), key=key)
        if weight not in _captured:
            _cache[weight] = found
    return found


def is_fresh(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether the Gram matrix of this version of the weight is cached and may be used."""
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    found: Gram | None = _cache.get(weight)
    return found is not None and found.key == _key(weight, bias)


def invalidate(weight: torch.Tensor) -> None:
    """Forget what is cached for ``weight``, after an edit that its version counter misses."""
    _cache.pop(weight, None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and D×D matrices are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _key(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    # The matrix is ready in the order of the stream that computed it: another stream, which need
    # not wait for that one to read the weight, makes its own.
    stream = None
    if tensors[0] is not None and tensors[0].is_cuda:
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
    return (
        stream,
        *(
            None
            if t is None
            else (t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.stride(), t.dtype)
            for t in tensors
        ),
    )


@torch.no_grad()
def compute(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute m (P,) and Q (P, P), in fp32 or fp64; scratch is one block of rows."""
    classes, features = weight.shape
    size, dtype, device = features + (bias is not None), wide(weight.dtype), weight.device
    rows = block_rows(size, dtype, device)
    centred = torch.empty(size, size, dtype=dtype, device=device)
    cross = torch.empty_like(centred) if bias is None and tensor_cores(weight) else None
    parts = list(blocks(classes, rows))
    with torch.autocast(device.type, enabled=False):
        mean = _mean(weight, bias, parts, dtype)
        scratch = torch.empty(min(rows, classes), size, dtype=dtype, device=device)
        for part in parts:
            block = scratch[: part.stop - part.start]
            if bias is None and weight.dtype == dtype:
                torch.sub(weight[part], mean, out=block)
            else:
                block[:, :features].copy_(weight[part])
                if bias is not None:
                    block[:, features].copy_(bias[part])
                block.sub_(mean)
            if cross is None:
                add_square(centred, block, first=part.start == 0)
            else:
                add_square_split(centred, cross, block, first=part.start == 0)
        mirror(centred)
        if cross is not None:
            centred.add_(cross).add_(cross.T)
    return mean, centred


def _mean(
    weight: torch.Tensor, bias: torch.Tensor | None, parts: list[slice], dtype: torch.dtype
) -> torch.Tensor:
    """Mean row of [W, b] in ``dtype``: sums of blocks, added up in float64."""
    classes, features = weight.shape
    size = features + (bias is not None)
    sums = torch.empty(len(parts), size, dtype=dtype, device=weight.device)
    for row, part in zip(sums, parts, strict=True):
        torch.sum(weight[part], 0, dtype=dtype, out=row[:features])
        if bias is not None:
            torch.sum(bias[part], 0, dtype=dtype, out=row[features])
    if len(parts) == 1:
        return sums[0].div_(classes)
    return (sums.sum(0, dtype=torch.float64) / classes).to(dtype)
