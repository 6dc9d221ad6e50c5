"""Mean, variance and target logits by the Gram route, as one differentiable function."""

from __future__ import annotations

from typing import Any

from logitless._extras import torch
from logitless.spherical.accumulate import collector
from logitless.spherical.gram import gram, wide
from logitless.spherical.structure import Structure

_DOUBLE = (
    "the Gram route of a spherical loss is differentiable once; for higher derivatives call the "
    "loss with route='stream'"
)


def gram_statistics(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    logit_scale: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics of z = logit_scale · E Wᵀ + b without visiting the classes.

    Parameters
    ----------
    input
        E, (N, D).
    weight, bias
        W (V, D) and b (V,), any float dtype.
    ids
        (N, K) int64; negative ids are padding, their target logit is 0. None: no targets.
    logit_scale
        Float or 0-d tensor.

    Returns
    -------
    mean, variance : Tensor
        (N,); fp32, or fp64 for fp64 inputs.
    target : Tensor
        (N, K); (N, 0) without targets.
    """
    features = input.to(wide(weight.dtype)) * logit_scale
    if bias is not None:
        features = torch.cat([features, features.new_ones(features.shape[0], 1)], 1)
    if ids is None:
        ids = torch.empty(input.shape[0], 0, dtype=torch.int64, device=input.device)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _GramStatistics.apply(
        features, weight, bias, ids
    )
    return result


def _target_rows(
    weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor
) -> torch.Tensor:
    """Rows of [W, b] at (N,) ids, zeros at padding: (N, P)."""
    kept = ids >= 0
    safe = ids.clamp(min=0)
    rows = weight[safe].to(wide(weight.dtype))
    if bias is not None:
        rows = torch.cat([rows, bias[safe].to(rows.dtype)[:, None]], 1)
    return torch.where(kept[:, None], rows, 0.0)


class _GramStatistics(torch.autograd.Function):
    """(features (N, P), W, b, ids) to (mean, variance, target); saves the inputs and hQ (N, P)."""

    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = gram(weight, bias)
        centred = features @ state.centred
        mean = features @ state.mean
        variance = (centred * features).sum(1).clamp(min=0) / weight.shape[0]
        target = features.new_empty(ids.shape)
        for k in range(ids.shape[1]):
            target[:, k] = (_target_rows(weight, bias, ids[:, k]) * features).sum(1)
        ctx.save_for_backward(features, weight, bias, ids, centred)
        ctx.mean = state.mean
        return mean, variance, target

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and any(g.requires_grad for g in cotangents):
            raise NotImplementedError(_DOUBLE)
        features, weight, bias, ids, centred = ctx.saved_tensors
        g_mean, g_variance, g_target = cotangents
        classes = weight.shape[0]
        d_features = d_weight = d_bias = None
        per_variance = (2 / classes) * g_variance
        if ctx.needs_input_grad[0]:
            d_features = torch.outer(g_mean, ctx.mean).addcmul_(per_variance[:, None], centred)
            for k in range(ids.shape[1]):
                rows = _target_rows(weight, bias, ids[:, k])
                d_features.addcmul_(g_target[:, k, None], rows)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            multiplier = (features * per_variance[:, None]).T @ features
            addend = (g_mean / classes) @ features - multiplier @ ctx.mean
            kept = (ids >= 0).nonzero(as_tuple=True)
            rows = features[kept[0]] * g_target[kept][:, None]
            structure = Structure(multiplier, addend, ids[kept], rows)
            collecting = collector(weight)
            if collecting is not None:
                collecting.add(structure)
            else:
                d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
                if bias is not None and ctx.needs_input_grad[2]:
                    d_bias = torch.empty_like(bias)
                structure.write(weight, bias, d_weight, d_bias)
        return d_features, d_weight, d_bias, None
