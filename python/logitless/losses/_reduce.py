"""From one loss a row to what the caller gets: masks, weights, reductions."""

from __future__ import annotations

from logitless._check import argument_error, type_error
from logitless._extras import torch

__all__ = ["check_denominator", "masked", "reduce"]

Tensor = torch.Tensor


def masked(value: Tensor, kept: Tensor | None) -> Tensor:
    """Set skipped rows to 0, in the value and in its cotangent."""
    return value if kept is None else torch.where(kept, value, 0.0)


def check_denominator(denominator: object, reduction: str) -> None:
    """Check what replaces the divisor of reduction="mean"."""
    if denominator is None:
        return
    if reduction != "mean":
        raise argument_error(
            "denominator", denominator, f"None with reduction={reduction!r}", "use reduction='mean'"
        )
    if isinstance(denominator, torch.Tensor):
        if denominator.dim() != 0:
            raise argument_error(
                "denominator.shape",
                tuple(denominator.shape),
                "a number or a 0-d tensor",
                "use denominator.squeeze()",
            )
    elif isinstance(denominator, bool) or not isinstance(denominator, (int, float)):
        raise type_error(
            "denominator", repr(denominator), "a number or a 0-d tensor", "e.g. a count of tokens"
        )


def reduce(
    losses: Tensor,
    kept: Tensor | None,
    reduction: str,
    row_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> Tensor:
    """Weigh, mask and reduce the losses of the rows.

    "mean" divides by `denominator`, or by the number of kept rows (0/0 = nan, as in torch); row
    weights never enter the divisor. Nothing is read back to the host.
    """
    if row_weight is not None:
        losses = losses * masked(row_weight.to(losses.dtype), kept)
    losses = masked(losses, kept)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if denominator is None:
        denominator = losses.numel() if kept is None else kept.sum()
    if not isinstance(denominator, torch.Tensor) and denominator == 0:
        return total / torch.zeros_like(total)
    return total / denominator
