"""Head maps: what a loss may do to input and head before the statistics see them.

A head map is a differentiable function (input, linear_weight, linear_bias) -> the same three.
"""

from __future__ import annotations

from collections.abc import Callable

from logitless._check import argument_error
from logitless._extras import torch

__all__ = ["HEADS", "HeadMap", "cosine", "distance", "resolve"]

Tensor = torch.Tensor
Mapped = tuple[Tensor, Tensor, Tensor | None]
HeadMap = Callable[[Tensor, Tensor, Tensor | None], Mapped]


def cosine(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Mapped:
    """Cosine similarities: logits are <e, w> / (|e| |w|).

    Norms are taken in float32 (float64 for float64). Memory: a copy of input and of the head.
    """
    return _unit(input), _unit(linear_weight), linear_bias


def distance(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Mapped:
    """Negative squared distances: logits are -|e - w|².

    Written as <[2e, |e|²], [w, -1]> - |w|², in float32 (float64 for float64) because half types
    would lose the difference. Memory: a copy of input and of the head in that dtype.
    """
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    e, w = input.to(dtype), linear_weight.to(dtype)
    bias = -w.square().sum(dim=-1)
    if linear_bias is not None:
        bias = bias + linear_bias.to(dtype)
    e = torch.cat([2 * e, e.square().sum(dim=-1, keepdim=True)], dim=-1)
    w = torch.cat([w, torch.full_like(w[..., :1], -1.0)], dim=-1)
    return e, w, bias


def _unit(x: Tensor) -> Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    return torch.nn.functional.normalize(wide, dim=-1).to(x.dtype)


HEADS: dict[str, HeadMap] = {"cosine": cosine, "distance": distance}


def resolve(head: str | HeadMap | None) -> HeadMap | None:
    """Look up a head map by name."""
    if head is None or callable(head):
        return head
    if head not in HEADS:
        raise argument_error(
            "head", repr(head), f"one of {', '.join(HEADS)}, or a function", "see losses._heads"
        )
    return HEADS[head]
