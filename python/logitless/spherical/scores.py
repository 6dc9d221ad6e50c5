"""Top-k, ranks and scores of a factored head, streamed over its classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitless import functional
from logitless._extras import torch
from logitless.spherical.checks import target_ids

if TYPE_CHECKING:
    from logitless.spherical.head import SphericalHead

# Classes whose logits exist at once in `rank`.
BLOCK = 8192


def _project(head: SphericalHead, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features h' (N, P) in A's dtype with z = h' Aᵀ, and A (V, P).

    Rows of several epochs have several maps, so all are brought up to date first.
    """
    matrix = head.matrix
    matrix.consolidate()
    flat = head._widen(input).to(matrix.factor.dtype)
    # The velocity's columns count for nothing.
    return torch.nn.functional.pad(flat, (0, matrix.width - flat.shape[1])), matrix.factor


def _score(head: SphericalHead, logits: torch.Tensor) -> torch.Tensor:
    """What orders the classes: the logit, or how far it is from the least likely one."""
    if head.loss.name == "spherical_softmax":
        return logits.abs()
    if head.loss.name == "taylor_softmax":
        return (logits + 1).abs()
    return logits


def topk(head: SphericalHead, input: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `SphericalHead.topk`."""
    features, factor = _project(head, input)
    top = functional.linear_topk(features, factor, k)
    logits, ids = top.values, top.indices
    if head.loss.name in ("spherical_softmax", "taylor_softmax"):  # both ends of the logits count
        low = functional.linear_topk(-features, factor, k)
        logits = torch.cat([logits, -low.values], 1)
        ids = torch.cat([ids, low.indices], 1)
        logits, ids = _without_repeats(logits, ids, _score(head, logits), k)
        rows = input.reshape(-1, 1, head.features).expand(-1, k, -1)
        values = head.log_prob(rows, ids)
    else:
        values = logits
    shape = (*input.shape[:-1], k)
    return values.reshape(shape), ids.reshape(shape)


def _without_repeats(
    logits: torch.Tensor, ids: torch.Tensor, score: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of two lists of k; a class in both counts once."""
    repeated = (ids[:, k:, None] == ids[:, None, :k]).any(2)
    score = score.clone()
    score[:, k:][repeated] = -torch.inf
    best = score.topk(k, dim=1).indices
    return logits.gather(1, best), ids.gather(1, best)


def rank(head: SphericalHead, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """See `SphericalHead.rank`."""
    ids, _ = target_ids(input, target, -100, head.num_classes)
    features, factor = _project(head, input)
    flat = ids.reshape(features.shape[0], -1)
    own = torch.einsum("nkd,nd->nk", factor[flat.clamp(min=0)], features)
    own = _score(head, own)
    above = torch.zeros_like(flat)
    for start in range(0, factor.shape[0], BLOCK):
        block = _score(head, features @ factor[start : start + BLOCK].T)
        inside = torch.arange(start, start + block.shape[1], device=flat.device)
        for column in range(flat.shape[1]):  # the target itself is left out: rounding may differ
            larger = (block > own[:, column, None]) & (inside != flat[:, column, None])
            above[:, column] += larger.sum(1)
    return torch.where(flat >= 0, above + 1, 0).reshape(target.shape)
