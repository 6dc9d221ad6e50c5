"""What a linear head says about each row: log-probability, log-sum-exp, best classes, accuracy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from logitless import stats
from logitless._check import argument_error
from logitless.numpy._head import IGNORE_INDEX, Array, float_array
from logitless.numpy._statistics import row_statistics


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
    `ignore_index` (−100 unless given) give 0.

    Returns
    -------
    LogProb
        Of the shape of target (less `shift` positions); float32, float64 for float64.

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


def linear_logsumexp(input: Array, linear_weight: Array, **options: Any) -> Array:
    """Log Σ_j e^{z_j} of each row. `options` are those of `row_statistics`.

    >>> import numpy as np, logitless.numpy as ln
    >>> float(ln.linear_logsumexp(np.zeros(2), np.ones((1, 2))))
    0.0
    """
    found, _ = row_statistics(input, linear_weight, want="lse", gradients=(), **options)
    return found.lse


def linear_argmax(input: Array, linear_weight: Array, **options: Any) -> Array:
    """Class id of each row's largest logit: the lowest id wins ties, nan wins over everything.

    `options` are those of `row_statistics`.

    >>> import numpy as np, logitless.numpy as ln
    >>> ln.linear_argmax(np.eye(3)[:2], np.eye(3)).tolist()
    [0, 1]
    """
    found, _ = row_statistics(input, linear_weight, want="argmax", gradients=(), **options)
    return found.argmax


def linear_topk(input: Array, linear_weight: Array, k: int, **options: Any) -> TopK:
    """The k largest logits of each row with their class ids, sorted, lowest id first among equals.

    Parameters
    ----------
    k : int
        1 ≤ k ≤ min(64, V).
    **options
        Those of `row_statistics`.

    Returns
    -------
    TopK
        ``values`` and ``indices``, the rows' shape with a last axis of k.
    """
    want = stats.topk(k)
    found, _ = row_statistics(input, linear_weight, want=want, gradients=(), **options)
    return TopK(found.topk_values, found.topk_ids)


def linear_accuracy(
    input: Array,
    linear_weight: Array,
    target: Array,
    *,
    topk: int = 1,
    ignore_index: int | None = None,
    shift: int = 0,
    **options: Any,
) -> Array:
    """Share of the rows whose target is among the `topk` largest logits; ignored rows do not count.

    Returns
    -------
    array
        0-d float64; nan if every row is ignored.
    """
    skip = IGNORE_INDEX if ignore_index is None else ignore_index
    found, _ = row_statistics(
        input,
        linear_weight,
        target,
        want="argmax" if topk == 1 else stats.topk(topk),
        ignore_index=skip,
        shift=shift,
        gradients=(),
        **options,
    )
    best = found.argmax[..., None] if topk == 1 else found.topk_ids
    axis = np.ndim(input) - 2
    aligned = target[(slice(None),) * axis + (slice(shift, None),)] if shift else np.asarray(target)
    kept = aligned != skip
    hits = (best == aligned[..., None]).any(axis=-1) & kept
    with np.errstate(invalid="ignore"):
        return np.asarray(hits.sum() / np.float64(kept.sum()))
