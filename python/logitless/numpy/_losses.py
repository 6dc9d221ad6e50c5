"""Cross entropy of a linear head for NumPy: the value and its gradients in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from logitless import stats
from logitless._check import (
    argument_error,
    check_class_vector,
    check_label_smoothing,
    check_per_row,
    check_reduction,
)
from logitless.numpy._derive import Floats
from logitless.numpy._head import Array, Head, any_array
from logitless.numpy._statistics import DEFAULT_GRADIENTS, Call, check_gradients


class CrossEntropy(NamedTuple):
    """A loss and its gradients, named as the arguments they belong to.

    A gradient has the shape and dtype of its argument; None if it was not wanted.
    """

    loss: Array
    input: Array | None
    linear_weight: Array | None
    linear_bias: Array | None = None


def linear_cross_entropy(
    input: Array,
    linear_weight: Array,
    target: Array,
    *,
    linear_bias: Array | None = None,
    weight: Array | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    target_weight: Array | None = None,
    row_weight: Array | None = None,
    denominator: float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    z_loss_weight: float = 0.0,
    memory: str | int = "lean",
    gradients: Sequence[str] = DEFAULT_GRADIENTS,
    cotangent: Any = 1.0,
) -> CrossEntropy:
    """Cross entropy of the softmax of a linear head, with gradients, without the logits.

    The loss of a row with target y is ``−log softmax(z)_y + z_loss_weight · lse(z)²`` for the
    logits ``z = softcap · tanh(x / softcap)``, ``x = logit_scale · E Wᵀ + b``. It is computed in
    complement form, which keeps its relative accuracy however small it is.

    Parameters
    ----------
    input : (..., D) float32, float64, float16 or bfloat16 (``ml_dtypes``)
        Any strides; read in place.
    linear_weight : (V, D) or (V, d1, ..., dK, D), dtype of input
    target : integer or floating
        Class ids of shape ``input.shape[:-1] + (d1, ..., dK)``; the same with a last axis of K ids
        when `target_weight` is given; or class probabilities of shape
        ``input.shape[:-1] + (V, d1, ..., dK)``, which may be negative or sum to anything.
    linear_bias : (V,) or (V, d1, ..., dK), dtype of input, optional
    weight : (V,), optional
        Class weights. They enter the mean of class ids as in torch: it divides by Σ w_y.
    reduction : "mean", "sum" or "none"
        With "none" the loss has one value a row, and the gradients are those of their sum (of
        ``Σ cotangent · loss``, to be exact).
    ignore_index : int, optional
        Ids equal to it are skipped; −100 unless given. Not allowed with class probabilities.
    label_smoothing : float in [0, 1]
    target_weight : (..., K), optional
        Weights of the K ids of a row (sparse soft targets): duplicates add, any sign.
    row_weight : shape of a row, optional
        Factor of each row's loss. Never part of the mean's denominator.
    denominator : float, optional
        Replaces the denominator of the mean, such as the token count of a whole batch.
    logit_scale, softcap, shift, memory
        As in `row_statistics`.
    z_loss_weight : float
        Weight of the lse² regulariser (PaLM's z-loss).
    gradients : names of "input", "linear_weight", "linear_bias"
        Wanted gradients; the others are None and cost nothing. ``()``: the value only.
    cotangent : number or array of the loss's shape
        What the loss is multiplied with before it is differentiated.

    Returns
    -------
    CrossEntropy
        ``(loss, input, linear_weight, linear_bias)``; the loss is float32, float64 for float64.

    Raises
    ------
    ValueError, TypeError, IndexError
        Before any work, naming the argument, its value, what was expected and the remedy.

    Examples
    --------
    >>> import numpy as np, logitless.numpy as ln
    >>> rng = np.random.default_rng(0)
    >>> hidden, head = rng.standard_normal((4, 8)), rng.standard_normal((50, 8))
    >>> result = ln.linear_cross_entropy(hidden, head, np.array([3, 1, -100, 1]))
    >>> result.loss.shape, result.input.shape, result.linear_bias
    ((), (4, 8), None)
    >>> bool((result.input[2] == 0).all())
    True
    """
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    probabilities = isinstance(target, np.ndarray) and target.dtype.kind not in "iu"
    if probabilities and ignore_index is not None:
        raise argument_error(
            "ignore_index", ignore_index, "None with class probabilities", "use row_weight"
        )
    head = Head(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        target_weight=target_weight,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        shift=shift,
        memory=memory,
        gradients=check_gradients(gradients, bias=linear_bias is not None, dot=False),
    )
    if head.geometry.kind == "sparse" and target_weight is None:
        remedy = "it holds the weight of each of the K ids of a row"
        raise argument_error("target_weight", None, f"shape {target.shape}", remedy)
    classes = head.geometry.classes
    w = None
    if weight is not None:
        check_class_vector("weight", any_array("weight", weight).shape, classes)
        w = weight.astype(np.float64)
    row = np.ones(head.rows * len(head.positions))
    if row_weight is not None:
        shape = (*head.geometry.lead, *head.geometry.positions)
        check_per_row("row_weight", any_array("row_weight", row_weight).shape, shape)
        row = head.flat(head.cut(row_weight)).astype(np.float64)

    smooth = label_smoothing / classes
    want: list[str | stats.Statistic] = ["lse"] if probabilities else ["log_prob"]
    if z_loss_weight or smooth:
        want.append("lse")
    if smooth:
        want.append("sum" if weight is None else stats.weighted_sum(weight))
    share = np.zeros((len(row), 0))
    if probabilities:
        dense = target if weight is None else _weigh_classes(target, weight, head)
        share = head.flat(head.cut(_class_sum(dense, head)))[:, None]
        want.append(stats.dot(dense))
    elif target_weight is not None:
        share = head.flat(head.cut(target_weight), target.shape[-1:]).astype(np.float64)
    else:
        share = np.ones((len(row), 1))
    call = Call(head, tuple(dict.fromkeys(want)))
    kept, valid = call.derived.kept, call.derived.valid
    if not probabilities:
        assert head.ids is not None
        share = np.where(valid, share, 0.0)
        if w is not None:
            share = share * w[np.where(valid, head.ids, 0)]

    # Row losses and, beside each term, its derivative by the statistic it is made of.
    lse = call.flat("lse") if "lse" in call.fields else np.zeros(len(row))
    uniform = "weighted_sum" if weight is not None else "sum"
    target_part = 1.0 - label_smoothing
    with np.errstate(all="ignore"):
        if probabilities:
            losses = target_part * (share[:, 0] * lse - call.flat("dot"))
        else:
            log_prob = call.flat("log_prob")
            losses = -target_part * np.where(share == 0.0, 0.0, share * log_prob).sum(axis=1)
        total_weight = classes if w is None else float(w.sum())
        if smooth:
            losses = losses + smooth * (total_weight * lse - call.flat(uniform).reshape(len(row)))
        regulariser = z_loss_weight * lse**2

        per_loss, per_regulariser = 1.0, 1.0
        if reduction == "mean":
            per_loss = per_regulariser = float(kept.sum() if denominator is None else denominator)
            if denominator is None and w is not None and head.geometry.kind == "index":
                per_loss = float(share.sum())
        totals = row * (losses / np.float64(per_loss) + regulariser / np.float64(per_regulariser))
        totals = np.where(kept, totals, 0.0)
        if reduction == "none":
            loss = head.public(totals.astype(head.acc), ())
        else:
            empty_mean = reduction == "mean" and denominator is None and not kept.any()
            loss = np.asarray(np.nan if empty_mean else totals.sum(), head.acc)

        g = row * head.flat(np.broadcast_to(cotangent, head.geometry.rows_shape)).astype(float)
        g_loss, g_regulariser = g / np.float64(per_loss), g / np.float64(per_regulariser)
        cotangents: dict[str, Floats] = {}
        g_lse = 2.0 * z_loss_weight * lse * g_regulariser + smooth * total_weight * g_loss
        if probabilities:
            g_lse = g_lse + target_part * share[:, 0] * g_loss
            cotangents["dot"] = -target_part * g_loss
        else:
            cotangents["log_prob"] = -target_part * share * g_loss[:, None]
        if "lse" in call.fields:
            cotangents["lse"] = g_lse
        if smooth:
            g_uniform = -smooth * g_loss
            cotangents[uniform] = g_uniform if weight is None else g_uniform[:, None]
    if not head.gradients:
        return CrossEntropy(loss, None, None)
    found = call.backward(cotangents)
    return CrossEntropy(loss, found.input, found.linear_weight, found.linear_bias)


def _weigh_classes(target: Array, weight: Array, head: Head) -> Array:
    """Probabilities times class weights: an array of the size of the one that the caller holds."""
    shape = (-1, *(1,) * len(head.geometry.positions))
    return np.multiply(target, weight.reshape(shape), dtype=head.acc)


def _class_sum(target: Array, head: Head) -> Floats:
    axis = len(head.geometry.lead)
    return np.asarray(target.sum(axis=axis, dtype=np.float64))
