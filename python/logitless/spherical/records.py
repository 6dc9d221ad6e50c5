"""What a backward pass leaves for the step: rows of features with their cotangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from logitless._extras import torch
from logitless.spherical.factored import FactoredMatrix
from logitless.spherical.gather import gather_rows


@dataclass(frozen=True)
class Record:
    """One backward pass over n rows, everything float64.

    Attributes
    ----------
    features : Tensor
        E (n, D), the constant bias feature included.
    square, linear : Tensor
        γ and ς (n,): derivatives by Σz² and Σz.
    ids, target : Tensor
        Class ids (n, K), negative where padded, and the derivatives by their logits.
    rows : Tensor
        The targets' rows of the factored matrix M, (n, K, P); 0 where padded.
    response : Tensor
        dz·M, (n, P): the features' gradient, and the same of the velocity if there is one.
    """

    features: torch.Tensor
    square: torch.Tensor
    linear: torch.Tensor
    ids: torch.Tensor
    target: torch.Tensor
    rows: torch.Tensor
    response: torch.Tensor

    def scaled(self, factor: float | torch.Tensor) -> Record:
        """The record of ``factor`` times the loss."""
        return replace(
            self,
            square=self.square * factor,
            linear=self.linear * factor,
            target=self.target * factor,
            response=self.response * factor,
        )

    def finite(self) -> torch.Tensor:
        """Whether features and cotangents are finite (0-d bool)."""
        small = torch.cat([self.square, self.linear, self.target.flatten()])
        return torch.isfinite(small.sum() + self.features.sum())

    def where(self, ok: torch.Tensor) -> Record:
        """The record, or one of nothing where ``ok`` (0-d bool) is false."""
        return replace(
            self,
            features=torch.where(ok, self.features, 0.0),
            square=torch.where(ok, self.square, 0.0),
            linear=torch.where(ok, self.linear, 0.0),
            target=torch.where(ok, self.target, 0.0),
            response=torch.where(ok, self.response, 0.0),
        )


def combine(records: list[Record]) -> Record:
    """One record of the sum of several losses; K is the largest of theirs."""
    if len(records) == 1:
        return records[0]
    width = max(r.ids.shape[1] for r in records)

    def pad(t: torch.Tensor, value: int) -> torch.Tensor:
        missing = [0, 0] * (t.dim() - 2) + [0, width - t.shape[1]]
        return torch.nn.functional.pad(t, missing, value=value)

    return Record(
        torch.cat([r.features for r in records]),
        torch.cat([r.square for r in records]),
        torch.cat([r.linear for r in records]),
        torch.cat([pad(r.ids, -1) for r in records]),
        torch.cat([pad(r.target, 0) for r in records]),
        torch.cat([pad(r.rows, 0) for r in records]),
        torch.cat([r.response for r in records]),
    )


def gather(record: Record, matrix: FactoredMatrix, group: Any) -> Record:
    """The records of all ranks of ``group`` in rank order, scaled to the mean of their losses.

    Moves n·(D + 2 + 2K) numbers a rank. Ranks may hold different numbers of rows, not different K.
    """
    packed = torch.cat(
        [
            record.features,
            record.square[:, None],
            record.linear[:, None],
            record.ids.to(torch.float64),  # exact: ids are below 2⁵³
            record.target,
        ],
        1,
    )
    whole = gather_rows(packed, group)
    width, k = record.features.shape[1], record.ids.shape[1]
    features, columns = whole[:, :width], whole[:, width:]
    ids, target = columns[:, 2 : 2 + k].to(torch.int64), columns[:, 2 + k :]
    share = 1.0 / torch.distributed.get_world_size(group)
    square, linear, target = columns[:, 0] * share, columns[:, 1] * share, target * share
    rows = target_rows(matrix, ids)
    response = _response(
        square, linear, target, features @ matrix.gram[:width], matrix.column_sum, rows
    )
    return Record(features, square, linear, ids, target, rows, response)


def target_rows(matrix: FactoredMatrix, ids: torch.Tensor) -> torch.Tensor:
    """The rows (n, K, P) of ids (n, K), 0 where negative."""
    kept = ids >= 0
    rows = matrix.rows(torch.where(kept, ids, matrix.classes).flatten())
    return torch.where(kept[..., None], rows.view(*ids.shape, matrix.width), 0.0)


def _response(
    square: torch.Tensor,
    linear: torch.Tensor,
    target: torch.Tensor,
    product: torch.Tensor,
    column_sum: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """dz·M = 2γ E MᵀM + ς 1ᵀM + Σ a' M_y."""
    out = product * (2 * square)[:, None]
    out.addcmul_(linear[:, None], column_sum)
    for k in range(rows.shape[1]):
        out.addcmul_(target[:, k, None], rows[:, k])
    return out


class FactoredStatistics(torch.autograd.Function):
    """(features (N, D), ids (N, K), matrix, sink) to mean, variance (N,), target (N, K), float64.

    The backward gives the features' gradient and hands the weight's to ``sink`` as a Record.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        ids: torch.Tensor,
        matrix: FactoredMatrix,
        sink: Callable[[Record], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the statistics in O(ND²)."""
        d, classes = features.shape[1], matrix.classes
        product = features @ matrix.gram[:d]
        column_sum = matrix.column_sum.clone()
        rows = target_rows(matrix, ids)
        mean = (features @ column_sum[:d]) / classes
        variance = ((product[:, :d] * features).sum(1) / classes - mean * mean).clamp_(min=0)
        target = torch.einsum("nkd,nd->nk", rows[..., :d], features)
        ctx.save_for_backward(features, ids, product, column_sum, rows, mean)
        ctx.matrix, ctx.sink, ctx.version = matrix, sink, matrix.version
        return mean, variance, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_mean: torch.Tensor, g_variance: torch.Tensor, g_target: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Give the features' gradient; record the weight's."""
        features, ids, product, column_sum, rows, mean = ctx.saved_tensors
        if ctx.sink is not None and ctx.version != ctx.matrix.version:
            raise RuntimeError(
                "SphericalHead: the weight has changed between this forward and its backward; "
                "call backward before step(), or run the forward again"
            )
        classes = ctx.matrix.classes
        square = g_variance / classes
        linear = (g_mean - 2 * g_variance * mean) / classes
        g_target = torch.where(ids >= 0, g_target, 0.0)
        response = _response(square, linear, g_target, product, column_sum, rows)
        if ctx.sink is not None:
            ctx.sink(Record(features.detach(), square, linear, ids, g_target, rows, response))
        d_features = response[:, : features.shape[1]] if ctx.needs_input_grad[0] else None
        return d_features, None, None, None
