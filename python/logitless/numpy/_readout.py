"""What a linear head says about each row: log-probability, log-sum-exp, best classes, accuracy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from logitless import stats
from logitless._check import argument_error, check_reduction, type_error
from logitless.numpy._head import Array, Head, float_array
from logitless.numpy._statistics import Call, row_statistics


class LogProb(NamedTuple):
    """log p of each row's target, and the entropy of its softmax (None if not wanted)."""

    log_prob: Array
    entropy: Array | None


class TopK(NamedTuple):
    """The largest logits of each row, sorted, and their class ids."""

    values: Array
    indices: Array


def linear_log_prob(
    input: Array,
    linear_weight: Array,
    target: Array,
    *,
    linear_bias: Array | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    shift: int = 0,
    entropy: bool = True,
    memory: str | int = "lean",
) -> LogProb:
    """Log of softmax(z / temperature) at the target of each row, and that softmax's entropy.

    Parameters
    ----------
    temperature : float
        Divides the logits after `softcap`: folded into the scale, the bias and the cap.
    entropy : bool
        Whether to compute the entropy too.

    The other parameters are those of `row_statistics`, which also gives the gradients. Ids equal to
    `ignore_index` (−100 unless given) give 0. The bias is divided in its own dtype.

    Returns
    -------
    LogProb
        ``log_prob`` of target's shape (less `shift` positions) and ``entropy`` of the rows' shape;
        float32, float64 for float64.

    Examples
    --------
    >>> import numpy as np, logitless.numpy as ln
    >>> hidden, head = np.zeros((3, 2)), np.ones((8, 2))
    >>> result = ln.linear_log_prob(hidden, head, np.array([0, 5, 7]))
    >>> bool(np.allclose(result.log_prob, -np.log(8)) and np.allclose(result.entropy, np.log(8)))
    True
    """
    if not (temperature > 0.0 and np.isfinite(temperature)):
        raise argument_error(
            "temperature", temperature, "a positive finite number", "use linear_argmax for 0"
        )
    if linear_bias is not None and temperature != 1.0:
        bias = float_array("linear_bias", linear_bias)
        linear_bias = np.asarray(bias / np.asarray(temperature, bias.dtype), bias.dtype)
    found, _ = row_statistics(
        input,
        linear_weight,
        target,
        want=("log_prob", "entropy") if entropy else "log_prob",
        linear_bias=linear_bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale / temperature,
        softcap=None if softcap is None else softcap / temperature,
        shift=shift,
        memory=memory,
        gradients=(),
    )
    return LogProb(found.log_prob, found.entropy if entropy else None)


def linear_logsumexp(
    input: Array,
    linear_weight: Array,
    *,
    linear_bias: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory: str | int = "lean",
) -> Array:
    """Log Σ_j e^{z_j} of each row. Arguments as in `row_statistics`, which gives gradients too.

    Examples
    --------
    >>> import numpy as np, logitless.numpy as ln
    >>> ln.linear_logsumexp(np.zeros((2, 3)), np.ones((1, 3))).tolist()
    [0.0, 0.0]
    """
    found, _ = row_statistics(
        input,
        linear_weight,
        want="lse",
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=(),
    )
    return found.lse


def linear_argmax(input: Array, linear_weight: Array, *, linear_bias: Array | None = None) -> Array:
    """Class id (int64) of each row's largest logit: the lowest id wins ties, nan wins over all.

    Examples
    --------
    >>> import numpy as np, logitless.numpy as ln
    >>> ln.linear_argmax(np.eye(3)[:2], np.eye(3)).tolist()
    [0, 1]
    """
    found, _ = row_statistics(
        input, linear_weight, want="max", linear_bias=linear_bias, gradients=()
    )
    return found.argmax


def linear_topk(
    input: Array,
    linear_weight: Array,
    k: int,
    *,
    linear_bias: Array | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory: str | int = "lean",
) -> TopK:
    """The k largest logits of each row with their class ids, sorted.

    Parameters
    ----------
    k : int
        1 ≤ k ≤ min(64, V). Ties: lowest id first; nan first.

    The other parameters are those of `row_statistics`.

    Returns
    -------
    TopK
        ``values`` and ``indices``, the rows' shape with a last axis of k.
    """
    found, _ = row_statistics(
        input,
        linear_weight,
        want=stats.topk(k),
        linear_bias=linear_bias,
        logit_scale=logit_scale,
        softcap=softcap,
        memory=memory,
        gradients=(),
    )
    return TopK(found.topk_values, found.topk_ids)


def linear_accuracy(
    input: Array,
    linear_weight: Array,
    target: Array,
    *,
    linear_bias: Array | None = None,
    topk: int = 1,
    reduction: str = "mean",
    ignore_index: int | None = None,
    shift: int = 0,
) -> Array:
    """Share of the rows whose target is among the `topk` largest logits.

    Parameters
    ----------
    target : integer (...), or (..., K) of which any may be hit
    topk : int
        1 ≤ topk ≤ min(64, V); ties count for the lowest ids.
    reduction : "mean", "sum" or "none"
        Over the rows that are not ignored (nan if there is none), or 0 and 1 a row.

    The other parameters are those of `row_statistics`.

    Returns
    -------
    array
        float32, float64 for float64 inputs.
    """
    check_reduction(reduction)
    want: str | stats.Statistic = "max" if topk == 1 else stats.topk(topk)
    call = Call(
        Head(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            ignore_index=ignore_index,
            shift=shift,
        ),
        want,
    )
    ids, kept = call.head.ids, call.derived.kept
    if ids is None:
        raise type_error("target", "class probabilities or None", "class ids", "use q.argmax(-1)")
    best = call.derived.core["argmax"][:, None] if topk == 1 else call.derived.core["topk_ids"]
    hits = ((ids[:, :, None] == best[:, None, :]).any(axis=(1, 2)) & kept).astype(call.head.acc)
    if reduction == "none":
        return call.head.public(hits, ())
    with np.errstate(invalid="ignore"):
        divisor = np.float64(kept.sum() if reduction == "mean" else 1)
        return np.asarray(hits.sum(dtype=np.float64) / divisor, call.head.acc)
