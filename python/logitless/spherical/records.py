"""What a backward pass leaves for the step: rows of features with their cotangents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
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
    cotangents : Tensor
        (n, 2 + K): γ and ς, the derivatives by Σz² and Σz, and those by the target logits.
    ids : Tensor
        Class ids (n, K), V where padded.
    rows : Tensor
        Their rows of the factored matrix M, (n, K, P).
    response : Tensor
        dz·M, (n, P): the features' gradient, and the same of the velocity if there is one.
    """

    features: torch.Tensor
    cotangents: torch.Tensor
    ids: torch.Tensor
    rows: torch.Tensor
    response: torch.Tensor

    @property
    def square(self) -> torch.Tensor:
        """γ, (n,)."""
        return self.cotangents[:, 0]

    @property
    def linear(self) -> torch.Tensor:
        """ς, (n,)."""
        return self.cotangents[:, 1]

    @property
    def target(self) -> torch.Tensor:
        """Cotangents of the target logits, (n, K)."""
        return self.cotangents[:, 2:]

    def scaled(self, factor: float | torch.Tensor) -> Record:
        """The record of ``factor`` times the loss."""
        cotangents, response = self.cotangents * factor, self.response * factor
        return Record(self.features, cotangents, self.ids, self.rows, response)

    def finite(self) -> torch.Tensor:
        """Whether features and cotangents are finite (0-d bool)."""
        total = self.response.sum()  # each of them is a factor of it
        return (total - total) == 0  # isfinite, in half of its kernels

    def where(self, ok: torch.Tensor, zero: torch.Tensor) -> Record:
        """The record, or one of nothing where ``ok`` (0-d bool) is false."""
        features = torch.where(ok, self.features, zero)
        cotangents = torch.where(ok, self.cotangents, zero)
        response = torch.where(ok, self.response, zero)
        return Record(features, cotangents, self.ids, self.rows, response)


def combine(records: list[Record], matrix: FactoredMatrix, width: int) -> Record:
    """One record of the sum of several losses, or of none; K is the largest of theirs."""
    if len(records) == 1:
        return records[0]
    if not records:
        features = matrix.gram.new_zeros(0, width)
        ids = torch.zeros(0, 1, dtype=torch.int64, device=features.device)
        rows = features.new_zeros(0, 1, matrix.width)
        return Record(features, features.new_zeros(0, 3), ids, rows, rows[:, 0])
    targets = max(r.ids.shape[1] for r in records)

    def pad(t: torch.Tensor, value: int, missing: int) -> torch.Tensor:
        ends = [0, 0] * (t.dim() - 2) + [0, missing]
        return torch.nn.functional.pad(t, ends, value=value)

    missing = [targets - r.ids.shape[1] for r in records]
    return Record(
        torch.cat([r.features for r in records]),
        torch.cat([pad(r.cotangents, 0, m) for r, m in zip(records, missing, strict=True)]),
        torch.cat([pad(r.ids, matrix.classes, m) for r, m in zip(records, missing, strict=True)]),
        torch.cat([pad(r.rows, 0, m) for r, m in zip(records, missing, strict=True)]),
        torch.cat([r.response for r in records]),
    )


def gather(record: Record, matrix: FactoredMatrix, group: Any) -> Record:
    """The records of all ranks of ``group`` in rank order, scaled to the mean of their losses.

    Moves n·(D + 2 + 2K) numbers a rank. Ranks may hold different numbers of rows, not different K.
    """
    ids = record.ids.to(torch.float64)  # exact: ids are below 2⁵³
    whole = gather_rows(torch.cat([record.features, record.cotangents, ids], 1), group)
    width, k = record.features.shape[1], record.ids.shape[1]
    features, cotangents, ids = whole.split([width, 2 + k, k], 1)
    cotangents = cotangents / torch.distributed.get_world_size(group)
    ids = ids.to(torch.int64)
    rows = matrix.rows(ids.flatten()).view(*ids.shape, matrix.width)
    product = features @ matrix.gram[:width]
    response = _response(cotangents, product, matrix.column_sum, rows)
    return Record(features, cotangents, ids, rows, response)


def _response(
    cotangents: torch.Tensor,
    product: torch.Tensor,
    column_sum: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """dz·M = 2γ E MᵀM + ς 1ᵀM + Σ a' M_y."""
    out = torch.outer(cotangents[:, 1], column_sum)
    out.addcmul_(cotangents[:, :1], product, value=2)
    for k in range(rows.shape[1]):
        out.addcmul_(cotangents[:, 2 + k, None], rows[:, k])
    return out


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def run(function: Callable[..., Any], compile: bool) -> Callable[..., Any]:  # noqa: FBT001
    """The function, or what torch.compile makes of it.

    A step of 200 rows at D = 512 is 137 kernels on CUDA, most of them of a few thousand numbers:
    339 µs on an H200. Compiled it is 48 kernels and 192 µs, of which products are 110.
    """
    return _compiled(function) if compile else function


def _statistics(
    features: torch.Tensor,
    ids: torch.Tensor,
    matrix: FactoredMatrix,
    every: bool,  # noqa: FBT001
) -> tuple[torch.Tensor, ...]:
    """Mean, variance, target; and what the backward needs besides features and ids."""
    d, classes = features.shape[1], matrix.classes
    known = ids.clamp(-1, classes - 1)
    padded = known.remainder(classes + 1)  # -1 to V
    product = features @ matrix.gram[:d]
    column_sum = matrix.column_sum.clone()
    rows = matrix.rows(padded.flatten(), every=every).view(*ids.shape, matrix.width)
    mean = (features @ column_sum[:d]).div_(classes)
    variance = (product[:, :d] * features).sum(1).div_(classes)
    variance.addcmul_(mean, mean, value=-1).clamp_(min=0)
    target = (rows[..., :d] * features[:, None]).sum(2)
    target = torch.where(known == ids, target, matrix.nan)
    return mean, variance, target, padded, product, column_sum, rows


def _cotangents(
    g_mean: torch.Tensor,
    g_variance: torch.Tensor,
    g_target: torch.Tensor,
    ids: torch.Tensor,
    mean: torch.Tensor,
    product: torch.Tensor,
    column_sum: torch.Tensor,
    rows: torch.Tensor,
    matrix: FactoredMatrix,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents and the response of a Record."""
    square = g_variance / matrix.classes
    linear = torch.addcmul(g_mean, g_variance, mean, value=-2).div_(matrix.classes)
    cotangents = torch.cat([square[:, None], linear[:, None], g_target], 1)
    kept = ids >= 0 if ids.shape[1] == 1 else (ids >= 0).any(1, keepdim=True)
    cotangents = torch.where(kept, cotangents, matrix.zero)
    return cotangents, _response(cotangents, product, column_sum, rows)


class FactoredStatistics(torch.autograd.Function):
    """(features (N, D), ids (N, K), matrix, sink) to mean, variance (N,), target (N, K), float64.

    An id of -1 is padding; the logit of any other outside [0, V) is nan. The backward gives the
    features' gradient and hands the weight's to ``sink`` as a Record. Rows of padding alone get
    none, whatever their statistics.
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
        mean, variance, target, *saved = run(_statistics, matrix.compile)(
            features, ids, matrix, matrix.fixed()
        )
        ctx.save_for_backward(features, ids, mean, *saved)
        ctx.matrix, ctx.sink, ctx.version = matrix, sink, matrix.version
        return mean, variance, target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g_mean: torch.Tensor, g_variance: torch.Tensor, g_target: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Give the features' gradient; record the weight's."""
        features, ids, mean, padded, product, column_sum, rows = ctx.saved_tensors
        matrix = ctx.matrix
        if ctx.sink is not None and ctx.version != matrix.version:
            raise RuntimeError(
                "SphericalHead: the weight has changed between this forward and its backward; "
                "call backward before step(), or run the forward again"
            )
        cotangents, response = run(_cotangents, matrix.compile)(
            g_mean, g_variance, g_target, ids, mean, product, column_sum, rows, matrix
        )
        if ctx.sink is not None:
            ctx.sink(Record(features.detach(), cotangents, padded, rows, response))
        d_features = response[:, : features.shape[1]] if ctx.needs_input_grad[0] else None
        return d_features, None, None, None
