"""The two heads that the demo compares: functions from hidden states to the mean cross entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def ordinary(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits of every token, then their cross entropy: (B, T, D), (V, D), (B, T) -> ()."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def streamed(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same number without the logits: (B, T, D), (V, D), (B, T) -> ()."""
    from logitless import functional

    loss: Tensor = functional.linear_cross_entropy(hidden, weight, target)
    return loss


HEADS: dict[str, Head] = {"ordinary": ordinary, "logitless": streamed}
