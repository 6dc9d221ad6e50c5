"""The Gram route: Σz, Σz² and the logit variance of an ordinary weight, in O(D²) a row.

With m = Wᵀ1/V and the centred Gram matrix Q = (W − 1mᵀ)ᵀ(W − 1mᵀ), the mean of a row's logits is
h·m and their variance hᵀQh/V: neither visits the classes. Q and m are computed once per version of
the weight, so one optimiser step pays 2VD² for them and 2VD² for its gradient
dW = W X + 1 xᵀ + target rows, whatever the number of rows; streaming pays 6NVD to 8NVD. The centred
form keeps the digits of a variance far below the squared mean, which Σz²/V − mean² loses.

The weight's version counter tells whether Q is stale. Edits that do not move it (through ``.data``,
inference tensors, or another library writing to the memory) cannot be seen: call
:func:`invalidate` after them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from logitless._extras import torch

# Rows of W widened and centred at a time: big enough for a full-speed product, small enough for L2.
BLOCK = 4096


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
        Storage pointers, version counters and layouts it was computed from.
    """

    mean: torch.Tensor
    centred: torch.Tensor
    key: tuple[Any, ...]


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _key(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    return tuple(
        None
        if t is None
        else (t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.stride(), t.dtype)
        for t in tensors
    )


def gram(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Gram:
    """Centred Gram matrix and mean row of a (V, D) weight, with the bias as a last column; cached.

    Cost 2VD² flops when the weight has changed since the last call, nothing otherwise. The cache
    holds P² + P numbers a weight and does not keep the weight alive.
    """
    key = _key(weight, bias)
    found: Gram | None = _cache.get(weight)
    if found is None or found.key != key:
        found = _compute(weight.detach(), None if bias is None else bias.detach(), key)
        _cache[weight] = found
    return found


def invalidate(weight: torch.Tensor) -> None:
    """Forget what is cached for ``weight``, after an edit that its version counter misses."""
    _cache.pop(weight, None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and D×D matrices are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compute(weight: torch.Tensor, bias: torch.Tensor | None, key: tuple[Any, ...]) -> Gram:
    dtype, classes = wide(weight.dtype), weight.shape[0]
    size = weight.shape[1] + (bias is not None)
    mean = weight.sum(0, dtype=torch.float64)
    if bias is not None:
        mean = torch.cat([mean, bias.sum(dtype=torch.float64)[None]])
    mean = (mean / classes).to(dtype)
    centred = torch.zeros(size, size, dtype=dtype, device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, classes, BLOCK):
            block = weight[start : start + BLOCK].to(dtype)
            if bias is not None:
                block = torch.cat([block, bias[start : start + BLOCK, None].to(dtype)], 1)
            block = block - mean
            centred.addmm_(block.T, block)
    return Gram(mean, centred, key)


def is_fresh(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether the Gram matrix of this version of the weight is cached."""
    found: Gram | None = _cache.get(weight)
    return found is not None and found.key == _key(weight, bias)
