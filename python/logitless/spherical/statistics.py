"""Mean, variance and target logits by the Gram route, as one differentiable function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from logitless._extras import torch
from logitless.ops import custom_ops
from logitless.spherical.accumulate import Accumulator, collector
from logitless.spherical.gram import gram, wide
from logitless.spherical.structure import Structure

Tensor = torch.Tensor
Optional = torch.Tensor | None

_DOUBLE = (
    "the Gram route of a spherical loss is differentiable once; for higher derivatives call the "
    "loss with route='stream'"
)


def gram_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Optional,
    logit_scale: Tensor | float,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of z = logit_scale · E Wᵀ + b without visiting the classes.

    Parameters
    ----------
    input
        E, (N, D).
    weight, bias
        W (V, D) and b (V,), any float dtype.
    ids
        (N, K) int64 in [0, V), or ``padding``, whose target logit is 0; a row of padding alone is
        skipped: zeros, no gradient, whatever its features. None: no targets. Another id is refused
        on the CPU and makes its row nan on CUDA, where looking would wait for the device.
    logit_scale
        Float or 0-d tensor.
    padding
        The id to ignore.

    Returns
    -------
    mean, variance : Tensor
        (N,); fp32, or fp64 for fp64 inputs.
    target : Tensor
        (N, K); (N, 0) without targets.
    """
    number, scale = 1.0, None
    if isinstance(logit_scale, torch.Tensor):
        scale = logit_scale
    else:
        number = logit_scale
    if ids is None:
        ids = torch.empty(input.shape[0], 0, dtype=torch.int64, device=input.device)
    arguments = (input, weight, bias, ids, scale, number, padding)
    if custom_ops.needed(input, weight, bias, scale, ids):
        from logitless.spherical.compiled import statistics

        return statistics(*arguments)
    if not ids.is_cuda:
        check_ids(ids, weight.shape[0], padding)
    result: tuple[Tensor, Tensor, Tensor] = _GramStatistics.apply(*arguments)
    return result


def check_ids(ids: Tensor, classes: int, padding: int = -1) -> None:
    """Refuse an id of (n, K) outside [0, V) that is not ``padding``."""
    wrong = (((ids >= classes) | (ids < 0)) & (ids != padding)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        value = next(i for i in ids[row].tolist() if i != padding and not 0 <= i < classes)
        raise IndexError(
            f"target[{row}] = {value} is out of range; expected a class id in [0, {classes}), "
            "or ignore_index for positions to skip"
        )


def row_values(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,
    number: float,
    padding: int,
    mean: Tensor,
    centred: Tensor,
) -> tuple[Tensor, ...]:
    """Compute mean, variance and target logits; and what backward needs: features (N, P), hQ."""
    safe, real = real_ids(ids, weight.shape[0])
    features = _features(input, bias, real, scale, number, centred.dtype)
    row_mean, product = features @ mean, features @ centred
    variance = (product * features).sum(1).clamp_(min=0).div_(weight.shape[0])
    target = features.new_empty(ids.shape)
    for k in range(ids.shape[1]):
        target[:, k] = _target_rows(weight, bias, safe[:, k]).mul_(features).sum(1)
    if ids.shape[1]:
        # Times 1, or 0 for padding; and 0 / 0 for an id that is neither.
        target.mul_(real).div_(real | (ids == padding))
    return row_mean, variance, target, features, product


def real_ids(ids: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Ids that may be looked up, and which of them were meant."""
    safe = ids.clamp(0, classes - 1)
    return safe, safe == ids


def d_features(
    weight: Tensor,
    bias: Optional,
    safe: Tensor,
    mean: Tensor,
    product: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Gradient with respect to the features, (N, P)."""
    g_mean, per_variance, g_target = cotangents
    out = (product * per_variance[:, None]).addr_(g_mean, mean)
    for k in range(g_target.shape[1]):
        out.addcmul_(g_target[:, k, None], _target_rows(weight, bias, safe[:, k]))
    return out


def structure(
    features: Tensor,
    safe: Tensor,
    real: Tensor,
    mean: Tensor,
    classes: int,
    cotangents: tuple[Tensor, Tensor, Tensor],
) -> Structure:
    """The parts of the weight's gradient."""
    g_mean, per_variance, g_target = cotangents
    multiplier = (features * per_variance[:, None]).T @ features
    addend = torch.addmv(features.T @ g_mean, multiplier, mean, beta=1 / classes, alpha=-1)
    # Padding adds zeros to classes of its own choice: finding and dropping it would wait for a
    # device, and one class for all would be a long chain of additions.
    count = safe.numel()
    spread = torch.arange(count, device=safe.device)
    if count > classes:
        spread %= classes
    ids = torch.where(real.view(-1), safe.view(-1), spread)
    rows = (features[:, None, :] * g_target[:, :, None]).view(count, features.shape[1])
    return Structure(multiplier, addend, ids, rows)


def masked(
    real: Tensor, classes: int, g_mean: Tensor, g_variance: Tensor, g_target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of mean, of hQh (per_variance, twice) and of the targets, zeros at padding.

    A loss may have no finite derivative at the zeros of a skipped row.
    """
    per_variance = g_variance * (2 / classes)
    if not real.shape[1]:
        return g_mean, per_variance, g_target
    kept, zero = _any(real), g_mean.new_zeros(())
    return (
        torch.where(kept, g_mean, zero),
        torch.where(kept, per_variance, zero),
        torch.where(real, g_target, zero),
    )


def _any(real: Tensor) -> Tensor:
    return real[:, 0] if real.shape[1] == 1 else real.any(1)


def _features(
    input: Tensor,
    bias: Optional,
    real: Tensor,
    scale: Optional,
    number: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of [scale · E, 1] in the dtype of the sums, zeros at skipped rows: (N, P)."""
    rows, width = input.shape
    features = torch.empty(rows, width + (bias is not None), dtype=dtype, device=input.device)
    own = features[:, :width]
    own.copy_(input)
    if scale is not None:
        own.mul_(scale)
    elif number != 1.0:
        own.mul_(number)
    if bias is not None:
        features[:, width] = 1.0
    if real.shape[1]:
        features.masked_fill_(_any(real).logical_not()[:, None], 0.0)
    return features


def _target_rows(weight: Tensor, bias: Optional, safe: Tensor) -> Tensor:
    """Rows of [W, b] at (N,) ids: (N, P)."""
    rows = weight[safe].to(wide(weight.dtype))
    if bias is not None:
        rows = torch.cat([rows, bias[safe].to(rows.dtype)[:, None]], 1)
    return rows


def input_gradients(
    input: Tensor, scale: Optional, number: float, gradient: Tensor, needs: tuple[bool, bool]
) -> tuple[Optional, Optional]:
    """Gradients of input and logit_scale from those of the features, (N, P)."""
    own = gradient[:, : input.shape[1]]
    d_scale = None
    if scale is not None and needs[1]:
        # A skipped row's gradient is zero, but its input may be anything.
        d_scale = torch.where(own == 0, 0.0, own * input).sum().to(scale)
    if not needs[0]:
        return None, d_scale
    if scale is not None:
        own = own * scale
    elif number != 1.0:
        own = own * number
    return own.to(input.dtype), d_scale


def gradients(
    input: Tensor,
    weight: Tensor,
    bias: Optional,
    ids: Tensor,
    scale: Optional,
    number: float,
    features: Tensor,
    product: Tensor,
    mean: Tensor,
    cotangents: Sequence[Tensor],
    wanted: Sequence[bool],
    collecting: Accumulator | None = None,
) -> tuple[Optional, Optional, Optional, Optional]:
    """The ``wanted`` gradients of (input, weight, bias, scale) from those of the statistics.

    With ``collecting``, the parts of the weight's and the bias's go there instead.
    """
    classes = weight.shape[0]
    safe, real = real_ids(ids, classes)
    parts = masked(real, classes, *cotangents)
    d_input = d_weight = d_bias = d_scale = None
    if wanted[0] or wanted[3]:
        gradient = d_features(weight, bias, safe, mean, product, parts)
        d_input, d_scale = input_gradients(input, scale, number, gradient, (wanted[0], wanted[3]))
        del gradient
    if wanted[1] or wanted[2]:
        found = structure(features, safe, real, mean, classes, parts)
        if collecting is not None:
            collecting.add(found)
        else:
            d_weight = torch.empty_like(weight) if wanted[1] else None
            d_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
            found.write(weight, bias, d_weight, d_bias)
    return d_input, d_weight, d_bias, d_scale


class _GramStatistics(torch.autograd.Function):
    """(E, W, b, ids, scale) to (mean, variance, target); keeps [E, 1] and [E, 1]Q, (N, P) each."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Optional,
        ids: Tensor,
        scale: Optional,
        number: float,
        padding: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = gram(weight, bias)
        mean, variance, target, features, product = row_values(
            input, weight, bias, ids, scale, number, padding, state.mean, state.centred
        )
        ctx.save_for_backward(input, weight, bias, ids, scale, features, product, state.mean)
        ctx.number = number
        return mean, variance, target

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Optional, ...]:
        if torch.is_grad_enabled() and any(g.requires_grad for g in cotangents):
            raise NotImplementedError(_DOUBLE)
        with torch.autocast(cotangents[0].device.type, enabled=False):
            return _GramStatistics._backward(ctx, *cotangents)

    @staticmethod
    def _backward(ctx: Any, *cotangents: Tensor) -> tuple[Optional, ...]:
        input, weight, bias, ids, scale, features, product, mean = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_input, d_weight, d_bias, d_scale = gradients(
            *(input, weight, bias, ids, scale, ctx.number),
            *(features, product, mean, cotangents),
            wanted=(needs[0], needs[1], needs[2], needs[4]),
            collecting=collector(weight),
        )
        return d_input, d_weight, d_bias, None, d_scale, None, None
