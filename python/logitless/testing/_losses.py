"""Dense float64 reference of linear cross entropy with all of its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from logitless.testing._dense import (
    DenseHead,
    Floats,
    as_float64,
    as_int64,
    is_floating,
    log_softmax,
)


class Reference(NamedTuple):
    """A loss with the gradients of its product with the cotangent (1, unless given).

    `magnitudes` holds, for "loss" and for each gradient, the sum of the absolute values of its
    terms: what rounding errors are relative to, however much cancels.
    """

    loss: Floats
    gradients: dict[str, Floats]
    magnitudes: dict[str, Floats]


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    target_weight: Any = None,
    row_weight: Any = None,
    denominator: Any = None,
    logit_scale: Any = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    z_loss_weight: float = 0.0,
    cotangent: Any = 1.0,
) -> Reference:
    """Cross entropy of a linear head and all of its gradients, dense in float64.

    Every form of target becomes one dense (rows, V) array q, after smoothing and class weights,
    and the loss of a row is −Σ_j q_j log p_j + λ lse². The reductions are those of torch 2.15:
    the mean divides by the kept rows; by Σ w_y for index targets with class weights; by all rows
    for class probabilities. λ lse² is always divided by the kept rows; `denominator` replaces all
    of these.

    Parameters
    ----------
    target : integer (rows), integer (rows, K) with `target_weight`, or float probabilities of
        the logits' shape ``input.shape[:-1] + (V, d1, ..., dK)``
    cotangent : of the loss's shape
        What the loss is contracted with before it is differentiated.

    Returns
    -------
    Reference
        ``loss``, ``gradients`` and ``magnitudes``. The gradients: ``input``, ``linear_weight``,
        ``linear_bias``, ``logit_scale`` and ``target`` (for probabilities of the target's shape,
        for sparse soft targets of the shape of `target_weight`, for indices zeros).
    """
    head = DenseHead(
        input, linear_weight, linear_bias, logit_scale=logit_scale, softcap=softcap, shift=shift
    )
    axis = np.ndim(input) - 2
    rows, classes = head.z.shape
    class_weight = np.ones(classes) if weight is None else as_float64(weight)
    probabilities = is_floating(target)
    if ignore_index is None:
        ignore_index = -100

    def cut(array: Any) -> Any:
        return np.take(array, np.arange(shift, array.shape[axis]), axis=axis) if shift else array

    if probabilities:
        kept = np.ones(rows, bool)
        q = head._to_rows(cut(as_float64(target)).reshape(-1, head._weight.shape[0]))
    else:
        columns = 1 if target_weight is None else np.shape(target)[-1]
        ids = cut(as_int64(target)).reshape(rows, columns)
        valid = ids != ignore_index
        kept = valid.any(axis=1)
        share = np.ones(ids.shape)
        if target_weight is not None:
            share = cut(as_float64(target_weight)).reshape(rows, columns)
        share = np.where(valid, share, 0.0)
        q = np.zeros((rows, classes))
        np.add.at(q, (np.arange(rows)[:, None], np.where(valid, ids, 0)), share)
    smooth = (1.0 - label_smoothing) * q + label_smoothing / classes
    smooth = np.where(kept[:, None], smooth, 0.0) * class_weight

    log_p, lse = log_softmax(head.z)
    with np.errstate(all="ignore"):
        losses = -np.where(smooth == 0.0, 0.0, smooth * log_p).sum(axis=1)
        regulariser = np.where(kept, z_loss_weight * lse**2, 0.0)
    row = np.ones(rows)
    if row_weight is not None:
        row = cut(np.broadcast_to(as_float64(row_weight), _row_shape(input, head))).reshape(-1)

    per_loss: Any = 1.0
    per_regulariser: Any = 1.0
    if reduction == "mean":
        if denominator is not None:
            per_loss = per_regulariser = float(as_float64(denominator))
        else:
            per_loss = per_regulariser = float(kept.sum())
            if weight is not None and not probabilities and target_weight is None:
                per_loss = float((q @ class_weight)[kept].sum())
    with np.errstate(all="ignore"):
        total = row * (losses / per_loss + regulariser / per_regulariser)
        total = np.where(kept, total, 0.0)
        g = np.broadcast_to(as_float64(cotangent), head.shape if reduction == "none" else ())
        g_row = row * (g.reshape(-1) if reduction == "none" else np.full(rows, float(g)))
        g_loss = np.where(kept, g_row / per_loss, 0.0)
        g_lse = np.where(kept, g_row / per_regulariser * 2.0 * z_loss_weight * lse, 0.0)
        loss = total.reshape(head.shape) if reduction == "none" else np.asarray(total.sum())
        if reduction == "mean" and not kept.any() and denominator is None:
            loss = np.asarray(np.nan)

    mass = smooth.sum(axis=1, keepdims=True)
    p = np.exp(log_p)
    with np.errstate(all="ignore"):
        # Where one class holds the whole mass, mass·p − mass is written so that no digit is lost.
        dz = np.where(smooth == mass, mass * np.expm1(log_p), mass * p - smooth)
        dz = np.where(kept[:, None], g_loss[:, None] * dz + g_lse[:, None] * p, 0.0)
        parts = np.abs(dz)
        if label_smoothing or probabilities or target_weight is not None:
            parts = np.abs(g_loss)[:, None] * (np.abs(mass) * p + np.abs(smooth)) + parts
            parts = np.where(kept[:, None], parts, 0.0)
        terms = np.where(
            smooth == 0.0, 0.0, np.abs(smooth) * (np.abs(lse)[:, None] + np.abs(head.z))
        )
        size = np.abs(row) * (terms.sum(axis=1) / per_loss + np.abs(regulariser) / per_regulariser)
    gradients = head.gradients(dz)
    magnitudes = head.gradients(parts, magnitudes=True)
    size = np.where(kept, size, 0.0)
    magnitudes["loss"] = size.reshape(head.shape) if reduction == "none" else np.asarray(size.sum())
    with np.errstate(all="ignore"):
        dq = -g_loss[:, None] * (1.0 - label_smoothing) * class_weight * log_p
    gradients["target"] = _target_gradient(head, dq, target, target_weight, shift, axis, kept)
    return Reference(loss, gradients, magnitudes)


def _row_shape(input: Any, head: DenseHead) -> tuple[int, ...]:
    """Shape of a per-row argument before the shift."""
    return (*np.shape(input)[:-1], *head.extra)


def _target_gradient(
    head: DenseHead,
    dq: Floats,
    target: Any,
    target_weight: Any,
    shift: int,
    axis: int,
    kept: Any,
) -> Floats:
    """Gradient for the weights of the targets, in the shape in which they were given."""
    if is_floating(target):
        out = np.zeros(np.shape(target))
        values = head._from_rows(dq)
    elif target_weight is not None:
        out = np.zeros(np.shape(target_weight))
        ids = as_int64(target)
        if shift:
            ids = np.take(ids, np.arange(shift, ids.shape[axis]), axis=axis)
        ids = ids.reshape(len(dq), np.shape(target)[-1])
        inside = (ids >= 0) & (ids < dq.shape[1]) & kept[:, None]
        values = np.take_along_axis(dq, np.where(inside, ids, 0), axis=1)
        values = np.where(inside, values, 0.0)
    else:
        return np.zeros(np.shape(target))
    index = (slice(None),) * max(axis, 0) + (slice(shift, None),) if shift else ...
    view = out[index]
    view[...] = values.reshape(view.shape)
    return out
