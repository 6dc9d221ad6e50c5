"""Softmax losses without the logits.

A linear head with N rows, D features and V classes never needs its N x V logits: nearly every
loss is a function of a few statistics of each row, and those are streamed.

``logitless.functional``, ``logitless.nn``, ``logitless.losses`` and ``logitless.spherical`` serve
torch; ``logitless.numpy`` and ``logitless.cupy`` serve arrays; `row_statistics` and `row_loss`
serve losses of your own.

Importing this package imports neither torch nor NumPy, starts no thread and touches no driver:
every public name below is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from logitless._core import __version__ as __version__

if TYPE_CHECKING:
    from logitless import functional, losses, nn, numpy, ops, spherical, stats, testing
    from logitless._core import get_num_threads, set_num_threads
    from logitless._cuda import warmup
    from logitless.accumulator import LogSumExp
    from logitless.losses._base import PerRow, row_loss
    from logitless.ops.row_statistics import RowStatistics, row_statistics

_MODULES = ("cupy", "functional", "losses", "nn", "numpy", "ops", "spherical", "stats", "testing")
_HOME = {
    "LogSumExp": "logitless.accumulator",
    "PerRow": "logitless.losses._base",
    "RowStatistics": "logitless.ops.row_statistics",
    "get_num_threads": "logitless._core",
    "row_loss": "logitless.losses._base",
    "row_statistics": "logitless.ops.row_statistics",
    "set_num_threads": "logitless._core",
    "warmup": "logitless._cuda",
}

__all__ = [
    "LogSumExp",
    "PerRow",
    "RowStatistics",
    "functional",
    "get_num_threads",
    "losses",
    "nn",
    "numpy",
    "ops",
    "row_loss",
    "row_statistics",
    "set_num_threads",
    "spherical",
    "stats",
    "testing",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use and keep it, so that this runs once a name."""
    if name in _MODULES:
        value: Any = import_module(f"logitless.{name}")
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        message = f"module 'logitless' has no attribute {name!r}"
        raise AttributeError(message)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
