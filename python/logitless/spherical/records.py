"""What a backward pass leaves for the step: rows of features with their cotangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from logitless._extras import torch
from logitless.spherical.factored import FactoredMatrix
from logitless.spherical.gather import gather_rows
from logitless.spherical.updates import Gradient


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
    """

    features: torch.Tensor
    square: torch.Tensor
    linear: torch.Tensor
    ids: torch.Tensor
    target: torch.Tensor

    def scaled(self, factor: float) -> Record:
        """The record of ``factor`` times the loss."""
        return Record(
            self.features,
            self.square * factor,
            self.linear * factor,
            self.ids,
            self.target * factor,
        )


def combine(records: list[Record]) -> Record:
    """One record of the sum of several losses; K is the largest of theirs."""
    if len(records) == 1:
        return records[0]
    width = max(r.ids.shape[1] for r in records)

    def pad(t: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value)

    return Record(
        torch.cat([r.features for r in records]),
        torch.cat([r.square for r in records]),
        torch.cat([r.linear for r in records]),
        torch.cat([pad(r.ids, -1) for r in records]),
        torch.cat([pad(r.target, 0) for r in records]),
    )


def gather(record: Record, group: Any) -> Record:
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
    features, k = record.features.shape[1], record.ids.shape[1]
    columns = whole[:, features:]
    ids, target = columns[:, 2 : 2 + k].to(torch.int64), columns[:, 2 + k :]
    gathered = Record(whole[:, :features], columns[:, 0], columns[:, 1], ids, target)
    return gathered.scaled(1.0 / torch.distributed.get_world_size(group))


def gradient(record: Record) -> Gradient:
    """The parts of ∇W that a step needs."""
    return Gradient.collect(
        record.features, record.square, record.linear, record.ids, record.target
    )


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
        d, classes = features.shape[1], matrix.factor.shape[0]
        product = features @ matrix.gram[:d, :d]
        column_sum = matrix.column_sum[:d].clone()
        kept = ids >= 0
        targets = matrix.rows(ids.clamp(min=0).flatten())[:, :d].reshape(*ids.shape, d)
        targets = torch.where(kept[..., None], targets, 0.0)
        mean = features @ column_sum / classes
        variance = ((product * features).sum(1) / classes - mean * mean).clamp(min=0)
        target = torch.einsum("nkd,nd->nk", targets, features)
        ctx.save_for_backward(features, ids, product, column_sum, targets, mean)
        ctx.classes, ctx.sink = classes, sink
        return mean, variance, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_mean: torch.Tensor, g_variance: torch.Tensor, g_target: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Give the features' gradient; record the weight's."""
        features, ids, product, column_sum, targets, mean = ctx.saved_tensors
        square = g_variance / ctx.classes
        linear = (g_mean - 2 * g_variance * mean) / ctx.classes
        g_target = torch.where(ids >= 0, g_target, 0.0)
        d_features = None
        if ctx.needs_input_grad[0]:
            d_features = (2 * square)[:, None] * product + torch.outer(linear, column_sum)
            d_features += torch.einsum("nk,nkd->nd", g_target, targets)
        if ctx.sink is not None:
            ctx.sink(Record(features.detach(), square, linear, ids, g_target))
        return d_features, None, None, None
