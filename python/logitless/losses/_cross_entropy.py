"""Row losses of cross entropy for every kind of target: the formulas of `linear_cross_entropy`."""

from __future__ import annotations

from typing import Any

from logitless import stats
from logitless._check import Geometry
from logitless._extras import torch
from logitless.losses._reduce import masked
from logitless.ops.elementwise import margin, softplus
from logitless.ops.row_statistics import RowStatistics, compute

__all__ = ["cross_entropy_rows"]

Tensor = torch.Tensor


def cross_entropy_rows(
    geometry: Geometry,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    target_weight: Tensor | None,
    **options: Any,
) -> tuple[RowStatistics, Tensor, Tensor | None]:
    """Return the statistics, one loss a row, and what the mean divides by (None: kept rows)."""
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32
    if weight is not None:
        weight = weight.to(wide)
    want: list[str | stats.Statistic] = ["rest", "target"]
    if label_smoothing:
        want.append("sum" if weight is None else stats.weighted_sum(weight))
    q = None
    if geometry.kind == "probability":
        # The most probable class is left out of the streamed sum, as a target would be.
        q = target
        axis = len(geometry.lead)
        if weight is not None:
            q = q * weight.reshape(-1, *(1,) * len(geometry.positions)).to(wide)
        want.append(stats.dot(q))
        target = q.detach().argmax(dim=axis)
        geometry = geometry._replace(kind="index", targets=1)
    request = stats.resolve(want, has_target=True, cached=not torch.compiler.is_compiling())
    s = compute(
        request, geometry, input, linear_weight, target, target_weight=target_weight, **options
    )
    divisor = None
    if q is not None:
        losses = _probability_rows(s, _row_sums(q, geometry, options["shift"], wide))
    elif s.several:
        losses = _sparse_rows(s, weight)
    else:
        losses = softplus(margin(s.rest, s.target))
        if weight is not None:
            class_weight = weight[torch.where(s.kept, s.target_ids, 0)]
            divisor = masked(class_weight, s.kept).sum()
            losses = class_weight * losses
    if label_smoothing:
        smooth = _uniform_rows(s, weight) * (label_smoothing / geometry.classes)
        # 0 * inf would spoil a smoothing of 1.
        losses = smooth if label_smoothing == 1.0 else (1.0 - label_smoothing) * losses + smooth
    return s, losses, divisor


def _uniform_rows(s: RowStatistics, weight: Tensor | None) -> Tensor:
    """Σ_j w_j (lse - z_j): the cross entropy of the uniform distribution, times V."""
    if weight is None:
        return s.classes * s.lse - s.sum
    return weight.sum() * s.lse - s.weighted_sum


def _row_sums(q: Tensor, geometry: Geometry, shift: int, dtype: torch.dtype) -> Tensor:
    axis = len(geometry.lead)
    if shift:
        q = q.narrow(axis - 1, shift, q.shape[axis - 1] - shift)
    return q.sum(dim=axis, dtype=dtype)


def _probability_rows(s: RowStatistics, mass: Tensor) -> Tensor:
    """Σ_j q_j (lse - z_j) = A (lse - z_y) + (A z_y - Σ q z), A = Σ q, y the likeliest class.

    For a one-hot q the second term is exactly 0 and the first keeps the digits of log1p.
    """
    finite = s.target.isfinite()
    target = torch.where(finite, s.target, 0.0)
    gap = torch.where(finite, softplus(s.rest - target), s.lse)
    return mass * gap + (mass * target - s.dot)


def _sparse_rows(s: RowStatistics, weight: Tensor | None) -> Tensor:
    """Σ_k q_k (lse - z_k) = (Σ q) (lse - lse_Y) + Σ_k q_k (lse_Y - z_k), right for signed q."""
    q = s.target_weight
    if weight is not None:
        q = q * weight[torch.where(s.real, s.target_ids, 0)]
    inside = s.target_lse.unsqueeze(-1) - s.target
    # An id of weight 0 may sit on a class of logit -inf; one of several may be all there is.
    counts = (q != 0) & (s.target != s.target_lse.unsqueeze(-1))
    within = (q * torch.where(counts, inside, 0.0)).sum(dim=-1)
    return q.sum(dim=-1) * softplus(margin(s.rest, s.target_lse)) + within
