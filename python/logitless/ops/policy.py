"""Log-probability and entropy of rows with one target, fused.

What `RowStatistics` says in two dozen operations on vectors: on CUDA a launch behind the statistics
and one before their backward. Second derivatives go back to the unfused form.
"""

from __future__ import annotations

from typing import Any

from logitless._arrays import Handle
from logitless._extras import torch
from logitless.ops import autograd, layout
from logitless.ops import device as device_calls
from logitless.ops.elementwise import entropy_with, margin, softplus
from logitless.ops.statistics import RowStatistics

__all__ = ["applies", "log_prob_and_entropy"]

Tensor = torch.Tensor
Optional = torch.Tensor | None


def applies(s: RowStatistics) -> bool:
    """Tell whether statistics of class ids can take this path."""
    rest = s.rest
    return (
        rest.is_cuda
        and not s.several
        and rest.numel() > 0
        and rest.is_contiguous()  # not one of several heads' turned to rows
        and autograd.plain(rest)
    )


def log_prob_and_entropy(s: RowStatistics, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return both, 0 in rows of `ignore_index`: `applies` holds."""
    ids = s.target_ids.contiguous()
    return _Policy.apply(  # type: ignore[no-any-return]
        s.rest, s.target, s.rest_entropy, ids, ignore_index
    )


class _Policy(torch.autograd.Function):
    """Log-probability and entropy with gradients for the three statistics."""

    @staticmethod
    def forward(
        ctx: Any, rest: Tensor, target: Tensor, rest_entropy: Tensor, ids: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """Keep the statistics, which their own backward keeps too."""
        ctx.save_for_backward(rest, target, rest_entropy, ids)
        ctx.ignore_index = ignore_index
        ctx.set_materialize_grads(False)
        log_prob, entropy = torch.empty_like(rest), torch.empty_like(rest)
        arguments = (*map(_handle, (rest, target, rest_entropy, ids)), ignore_index)
        device_calls.policy_forward(rest.device, *arguments, _handle(log_prob), _handle(entropy))
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_prob: Optional, grad_entropy: Optional) -> tuple[Optional, ...]:
        """Return the statistics' cotangents; the entropy's has one only if the result's has."""
        saved, given = ctx.saved_tensors, (grad_log_prob, grad_entropy)
        if grad_log_prob is None and grad_entropy is None:
            return (None,) * 5
        if torch.is_grad_enabled():
            return (*_differentiable_slopes(saved, ctx.ignore_index, given), None, None)
        rest = saved[0]
        cotangents = [None if g is None else g.contiguous() for g in given]
        d_rest, d_target = torch.empty_like(rest), torch.empty_like(rest)
        d_rest_entropy = None if grad_entropy is None else torch.empty_like(rest)
        device_calls.policy_backward(
            rest.device,
            *map(_handle, saved),
            ctx.ignore_index,
            *(None if t is None else _handle(t) for t in cotangents),
            _handle(d_rest),
            _handle(d_target),
            None if d_rest_entropy is None else _handle(d_rest_entropy),
        )
        return d_rest, d_target, d_rest_entropy, None, None


def _handle(tensor: Tensor) -> Handle:
    return layout.field_handle(tensor, 0, tensor.numel(), 0)


def _unfused(
    rest: Tensor, target: Tensor, rest_entropy: Tensor, ids: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    kept, x = ids.ne(ignore_index), margin(rest, target)
    entropy = entropy_with(x, rest_entropy)
    return torch.where(kept, -softplus(x), 0.0), torch.where(kept, entropy, 0.0)


def _differentiable_slopes(
    saved: tuple[Tensor, ...], ignore_index: int, given: tuple[Optional, Optional]
) -> tuple[Optional, ...]:
    rest, target, rest_entropy, ids = saved
    values = _unfused(rest, target, rest_entropy, ids, ignore_index)
    used = [(value, g) for value, g in zip(values, given, strict=True) if g is not None]
    return torch.autograd.grad(
        [value for value, _ in used],
        [rest, target, rest_entropy],
        [g for _, g in used],
        create_graph=True,
        allow_unused=True,
    )
