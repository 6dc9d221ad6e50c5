"""Losses as functions of row statistics: the catalogue, by family."""

from __future__ import annotations

from logitless.losses.spherical import (
    spherical_softmax,
    squared_error,
    squentropy,
    taylor_softmax,
    zloss,
)

__all__ = ["spherical_softmax", "squared_error", "squentropy", "taylor_softmax", "zloss"]
