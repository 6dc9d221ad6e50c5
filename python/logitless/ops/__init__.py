"""The op under every loss: `row_statistics` and its result."""

from __future__ import annotations

from logitless.ops.row_statistics import RowStatistics, row_statistics

__all__ = ["RowStatistics", "row_statistics"]
