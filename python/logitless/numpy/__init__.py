"""Losses and statistics of linear heads for NumPy arrays: values with their gradients, no autograd.

The names and arguments are those of `logitless.functional`. Where torch would return a tensor with
a graph, `linear_cross_entropy` returns a tuple of the loss and its gradients, and `row_statistics`
returns the statistics with a function that carries any loss's derivatives back to the parameters.

Inputs are float32, float64, float16 or bfloat16 (with the package ``ml_dtypes``) arrays of any
strides, read in place. Logits are streamed in tiles: nothing of size N × V is ever stored.
"""

from __future__ import annotations

from logitless.numpy._logsumexp import logsumexp
from logitless.numpy._losses import CrossEntropy, linear_cross_entropy
from logitless.numpy._readout import (
    LogProb,
    TopK,
    linear_accuracy,
    linear_argmax,
    linear_log_prob,
    linear_logsumexp,
    linear_topk,
)
from logitless.numpy._statistics import Gradients, RowStatistics, Vjp, row_statistics

__all__ = [
    "CrossEntropy",
    "Gradients",
    "LogProb",
    "RowStatistics",
    "TopK",
    "Vjp",
    "linear_accuracy",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_logsumexp",
    "linear_topk",
    "logsumexp",
    "row_statistics",
]
