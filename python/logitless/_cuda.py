"""Preparing a CUDA device before the first call."""

from __future__ import annotations

from typing import Any

from logitless import _core

__all__ = ["warmup"]


def warmup(device: Any = 0) -> None:
    """Load every kernel that a CUDA device may need, instead of each at its first use.

    Never needed for a right result, graph captures included: kernels load on first use, in a way
    that a capture survives. It takes their few milliseconds out of the first step.

    Parameters
    ----------
    device : int or torch.device
        Index of the device; anything with an ``index``, None meaning device 0.

    Raises
    ------
    RuntimeError
        There is no such device, or no CUDA engine; the message says why.
    """
    index = getattr(device, "index", device)
    _core.cuda_warm_up(0 if index is None else int(index))
