"""Cross entropy of a linear head for NumPy: the value and its gradients in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from logitless import stats
from logitless._check import (
    argument_error,
    check_class_vector,
    check_label_smoothing,
    check_per_row,
    check_reduction,
    type_error,
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
    if denominator is not None and reduction != "mean":
        remedy = "use reduction='mean'"
        raise argument_error("denominator", denominator, f"None with {reduction!r}", remedy)
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
    _check_target(head, target, target_weight, ignore_index)
    class_weight = None
    if weight is not None:
        class_weight = any_array("weight", weight)
        check_class_vector("weight", class_weight.shape, head.geometry.classes)
    row = _row_weights(head, row_weight)
    g_row = row * _row_cotangent(head, cotangent, reduction)

    sums = _Sums(head, 1.0 - label_smoothing, class_weight)
    if head.geometry.kind == "probability":
        sums.probabilities(target)
    else:
        sums.class_ids(target_weight)
    if label_smoothing:
        sums.uniform(label_smoothing / head.geometry.classes)
    if z_loss_weight:
        sums.want.append("lse")
    call = Call(head, tuple(dict.fromkeys(sums.want)))
    losses, slopes = sums.evaluate(call)

    kept = call.derived.kept
    per_row, per_square = 1.0, 1.0
    if reduction == "mean":
        per_row = per_square = float(kept.sum() if denominator is None else denominator)
        if denominator is None and weight is not None and head.geometry.kind == "index":
            per_row = sums.weight_of_targets
    with np.errstate(all="ignore"):
        g_loss = g_row / np.float64(per_row)
        cotangents = {
            name: slope * (g_loss if slope.ndim == 1 else g_loss[:, None])
            for name, slope in slopes.items()
        }
        totals = losses / np.float64(per_row)
        if z_loss_weight:
            lse = call.flat("lse")
            totals = totals + z_loss_weight * lse**2 / np.float64(per_square)
            slope = 2.0 * z_loss_weight * lse * g_row / np.float64(per_square)
            cotangents["lse"] = cotangents.get("lse", 0.0) + slope
        totals = np.where(kept, row * totals, 0.0)
    if reduction == "none":
        loss = head.public(totals.astype(head.acc), ())
    else:
        empty = reduction == "mean" and denominator is None and not kept.any()
        loss = np.asarray(np.nan if empty else totals.sum(), head.acc)
    if not head.gradients:
        return CrossEntropy(loss, None, None)
    found = call.backward(cotangents)
    return CrossEntropy(loss, found.input, found.linear_weight, found.linear_bias)


@dataclass
class _Sums:
    """Row losses as sums of coefficients times statistics, which makes their slopes the former.

    Every target is a distribution q, and ``−Σ_j q_j log p_j`` is linear in log-probabilities at
    class ids, in ``dot``, in ``sum``, and in ``lse``.
    """

    head: Head
    target_share: float  # 1 − label_smoothing
    weight: Array | None
    want: list[str | stats.Statistic] = field(default_factory=list)
    terms: list[tuple[str, Floats]] = field(default_factory=list)
    weight_of_targets: float = 0.0
    mass: Floats | None = None

    def class_ids(self, target_weight: Array | None) -> None:
        """−Σ_k q_k w_k log p_k over the ids of each row."""
        head = self.head
        assert head.ids is not None
        valid = head.ids != head.ignore_index
        share: Floats = valid.astype(np.float64)
        if target_weight is not None:
            columns = target_weight.shape[-1:]
            given = head.flat(head.cut(target_weight), columns).astype(np.float64)
            share = np.where(valid, given, 0.0)
        if self.weight is not None:
            share = share * self.weight.astype(np.float64)[np.where(valid, head.ids, 0)]
        self.weight_of_targets = float(share.sum())
        self.want.append("log_prob")
        self.terms.append(("log_prob", -self.target_share * share))

    def probabilities(self, target: Array) -> None:
        """Σ_j q_j (lse − z_j) = −A log p_y + A z_y − Σ_j q_j z_j for A = Σ_j q_j.

        y is the most probable class: for a one-hot q the last two terms cancel exactly, and the
        first has the digits of a class id's loss.
        """
        head = self.head
        shape = (-1, *(1,) * len(head.geometry.positions))
        if self.weight is not None:
            # Of the size of the array that the caller holds.
            target = np.multiply(target, self.weight.reshape(shape), dtype=head.acc)
        axis = len(head.geometry.lead)
        head.set_ids(target.argmax(axis=axis))
        mass = head.flat(head.cut(np.asarray(target.sum(axis=axis, dtype=np.float64))))
        self.mass = self.target_share * mass
        self.want += ["log_prob", stats.dot(target)]

    def _distribution(self, call: Call, mass: Floats) -> list[tuple[str, Floats]]:
        """Terms of `probabilities`, those that may cancel first.

        In a row whose likeliest class has no finite logit, A·lse replaces the first two.
        """
        finite = np.isfinite(call.flat("target"))
        at_class = np.where(finite, mass[:, None], 0.0)
        dot = np.full(len(mass), -self.target_share)
        lse = np.where(finite[:, 0], 0.0, mass)
        return [("target", at_class), ("dot", dot), ("log_prob", -at_class), ("lse", lse)]

    def uniform(self, each: float) -> None:
        """Σ_j each · w_j (lse − z_j): what label smoothing adds."""
        rows = self.head.rows * len(self.head.positions)
        total = self.head.geometry.classes if self.weight is None else float(self.weight.sum())
        self.want.append("lse")
        self.terms.append(("lse", np.full(rows, each * total)))
        if self.weight is None:
            self.want.append("sum")
            self.terms.append(("sum", np.full(rows, -each)))
        else:
            self.want.append(stats.weighted_sum(self.weight))
            self.terms.append(("weighted_sum", np.full((rows, 1), -each)))

    def evaluate(self, call: Call) -> tuple[Floats, dict[str, Floats]]:
        """One loss a row, and its slope in every statistic. A coefficient of 0 adds nothing."""
        losses = np.zeros(len(call.derived.kept))
        slopes: dict[str, Floats] = {}
        terms = self.terms
        if self.mass is not None:
            terms = self._distribution(call, self.mass) + terms
        for name, coefficient in terms:
            with np.errstate(all="ignore"):
                part = np.where(coefficient == 0.0, 0.0, coefficient * call.flat(name))
                losses += part if part.ndim == 1 else part.sum(axis=1)
            slopes[name] = slopes[name] + coefficient if name in slopes else coefficient
        return losses, slopes


def _check_target(
    head: Head, target: Array, target_weight: Array | None, ignore_index: int | None
) -> None:
    kind = head.geometry.kind
    if kind == "none":
        raise type_error("target", None, "a numpy.ndarray", "linear_logsumexp needs no target")
    if kind == "probability" and ignore_index is not None:
        expected = "None with class probabilities"
        raise argument_error("ignore_index", ignore_index, expected, "use a row_weight of 0")
    if kind == "sparse" and target_weight is None:
        remedy = "it holds the weight of each of the K ids of a row"
        raise argument_error("target_weight", None, f"an array of shape {target.shape}", remedy)


def _row_weights(head: Head, row_weight: Array | None) -> Floats:
    if row_weight is None:
        return np.ones(head.rows * len(head.positions))
    shape = (*head.geometry.lead, *head.geometry.positions)
    check_per_row("row_weight", any_array("row_weight", row_weight).shape, shape)
    return head.flat(head.cut(row_weight)).astype(np.float64)


def _row_cotangent(head: Head, cotangent: Any, reduction: str) -> Floats:
    value = np.asarray(cotangent, dtype=np.float64)
    shape = head.geometry.rows_shape if reduction == "none" else ()
    if value.shape not in ((), shape):
        raise argument_error(
            "cotangent.shape", value.shape, f"{shape}, the shape of the loss", "or a number"
        )
    return head.flat(np.broadcast_to(value, head.geometry.rows_shape))
