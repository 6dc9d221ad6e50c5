"""Every field of every row statistic: its definition and its gradient, one table entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logitless.testing._dense import (
    DenseHead,
    Floats,
    Ints,
    as_float64,
    as_int64,
    log_softmax,
    plogp,
)


class Rows:
    """The logits of a call with its targets and parameters, and the distributions they give.

    R of a row is the set of classes that are not among its targets (all classes without a target).
    """

    def __init__(
        self,
        z: Floats,
        ids: Ints | None,
        ignore_index: int | None,
        powers: Sequence[float],
        vectors: Floats | None,
        dense: Floats | None,
        topk: int,
    ) -> None:
        self.z = z
        rows, classes = z.shape
        self.ids = np.zeros((rows, 0), np.int64) if ids is None else ids
        padding = np.zeros(self.ids.shape, bool)
        if ignore_index is not None:
            padding = self.ids == ignore_index
        self.valid = ~padding
        self.kept = np.ones(rows, bool) if ids is None else self.valid.any(axis=1)
        self.has_target = ids is not None
        self.safe_ids = np.where(self.valid, self.ids, 0)
        if ((self.safe_ids < 0) | (self.safe_ids >= classes)).any():
            raise IndexError(f"target has an id outside [0, {classes})")
        self.excluded = np.zeros(z.shape, bool)
        row, column = np.nonzero(self.valid)
        self.excluded[row, self.ids[row, column]] = True
        self.powers = powers
        self.vectors = vectors
        self.dense = dense
        self.topk = topk

    @cached_property
    def log_p(self) -> Floats:
        return log_softmax(self.z)[0]

    @cached_property
    def lse(self) -> Floats:
        return log_softmax(self.z)[1]

    @cached_property
    def log_r(self) -> Floats:
        return log_softmax(self.z, ~self.excluded)[0]

    @cached_property
    def rest(self) -> Floats:
        return log_softmax(self.z, ~self.excluded)[1]

    @cached_property
    def order(self) -> Ints:
        """Ids by falling logit; nan first, ties by rising id."""
        ids = np.broadcast_to(np.arange(self.z.shape[1]), self.z.shape)
        return np.lexsort((ids, -self.z, ~np.isnan(self.z)), axis=-1).astype(np.int64)

    def gathered(self, ids: Ints) -> Floats:
        return np.take_along_axis(self.z, ids, axis=1)

    def scatter(self, ids: Ints, g: Floats) -> Floats:
        """(N, V) zeros with ``g[i, k]`` added at ``ids[i, k]``; duplicates add."""
        out = np.zeros(self.z.shape)
        np.add.at(out, (np.arange(len(out))[:, None], ids), g)
        return out

    def power(self, m: float, inside: NDArray[np.bool_] | None) -> tuple[Floats, Floats]:
        with np.errstate(all="ignore"):
            log_q, total = log_softmax(m * self.z, inside)
            return np.exp(log_q), total


class Field(NamedTuple):
    """One field: ``value(rows)`` and ``dz(rows, g)``, the (N, V) gradient for a cotangent g."""

    value: Callable[[Rows], NDArray[Any]]
    dz: Callable[[Rows, Floats], Floats] | None
    needs: str = ""


def _product(weights: Floats, values: Floats) -> Floats:
    """Elementwise product in which a zero weight gives zero, also against an infinite value."""
    with np.errstate(all="ignore"):
        return np.where(weights == 0.0, 0.0, weights * values)


def _expectation(log_p: Floats, values: Floats) -> Floats:
    return np.asarray(_product(np.exp(log_p), values).sum(axis=1))


def _entropy_dz(log_p: Floats, g: Floats) -> Floats:
    entropy = -plogp(log_p).sum(axis=1, keepdims=True)
    return -g[:, None] * _product(np.exp(log_p), log_p + entropy)


def _mean_logit(rows: Rows) -> Floats:
    return _expectation(rows.log_p, rows.z)


def _mean_logit_dz(rows: Rows, g: Floats) -> Floats:
    mean = _mean_logit(rows)[:, None]
    return g[:, None] * _product(np.exp(rows.log_p), 1.0 + rows.z - mean)


def _log_prob(rows: Rows) -> Floats:
    """As torch: nan in a row whose logits are all −inf."""
    at_target = np.take_along_axis(rows.log_p, rows.safe_ids, axis=1)[:, 0]
    return np.where(np.isneginf(rows.lse), np.nan, at_target)


def _log_prob_dz(rows: Rows, g: Floats) -> Floats:
    at_target = np.arange(rows.z.shape[1]) == rows.safe_ids[:, :1]
    return g[:, None] * np.where(at_target, -np.expm1(rows.log_p), -np.exp(rows.log_p))


def _mean(rows: Rows) -> Floats:
    return np.asarray(rows.z.mean(axis=1))


def _variance(rows: Rows) -> Floats:
    return np.asarray(((rows.z - rows.z.mean(axis=1, keepdims=True)) ** 2).mean(axis=1))


def _variance_dz(rows: Rows, g: Floats) -> Floats:
    centred = rows.z - rows.z.mean(axis=1, keepdims=True)
    return np.asarray(g[:, None] * 2.0 / rows.z.shape[1] * centred)


def _powers(rows: Rows, inside: NDArray[np.bool_] | None) -> Floats:
    return np.stack([rows.power(m, inside)[1] for m in rows.powers], axis=1)


def _powers_dz(rows: Rows, g: Floats, inside: NDArray[np.bool_] | None) -> Floats:
    parts = (g[:, [c]] * m * rows.power(m, inside)[0] for c, m in enumerate(rows.powers))
    return np.asarray(sum(parts, np.zeros(rows.z.shape)))


def _vectors(rows: Rows) -> Floats:
    assert rows.vectors is not None
    return rows.vectors


def _weighted_sum(rows: Rows) -> Floats:
    return np.stack([_product(c, rows.z).sum(axis=1) for c in _vectors(rows)], axis=1)


def _weighted(rows: Rows, log_q: Floats) -> Floats:
    return np.asarray(np.exp(log_q) @ _vectors(rows).T)


def _weighted_dz(rows: Rows, g: Floats, log_q: Floats) -> Floats:
    mean = _weighted(rows, log_q)
    out = np.zeros(rows.z.shape)
    for c, vector in enumerate(_vectors(rows)):
        out += g[:, [c]] * np.exp(log_q) * (vector - mean[:, [c]])
    return out


def _dense(rows: Rows) -> Floats:
    assert rows.dense is not None
    return rows.dense


def _everywhere(rows: Rows, g: Floats) -> Floats:
    return np.broadcast_to(g[:, None], rows.z.shape).copy()


FIELDS: Mapping[str, Field] = {
    # Primary fields: what the engines compute, in registry order.
    "rest": Field(
        lambda s: s.rest,
        lambda s, g: g[:, None] * np.exp(s.log_r),
    ),
    "target": Field(
        lambda s: np.where(s.valid, s.gathered(s.safe_ids), 0.0),
        lambda s, g: s.scatter(s.safe_ids, np.where(s.valid, g, 0.0)),
        needs="target",
    ),
    "rest_entropy": Field(
        lambda s: -plogp(s.log_r).sum(axis=1),
        lambda s, g: _entropy_dz(s.log_r, g),
    ),
    "sum": Field(lambda s: s.z.sum(axis=1), _everywhere),
    "sum_sq": Field(lambda s: (s.z**2).sum(axis=1), lambda s, g: 2.0 * g[:, None] * s.z),
    "mean": Field(_mean, lambda s, g: _everywhere(s, g / s.z.shape[1])),
    "variance": Field(_variance, _variance_dz),
    "max": Field(
        lambda s: s.gathered(s.order[:, :1])[:, 0],
        lambda s, g: s.scatter(s.order[:, :1], g[:, None]),
    ),
    "argmax": Field(lambda s: s.order[:, 0], None),
    "rest_power": Field(
        lambda s: _powers(s, ~s.excluded),
        lambda s, g: _powers_dz(s, g, ~s.excluded),
        needs="powers",
    ),
    "weighted_sum": Field(
        _weighted_sum,
        lambda s, g: np.asarray(g @ _vectors(s)),
        needs="vectors",
    ),
    "weighted_rest": Field(
        lambda s: _weighted(s, s.log_r),
        lambda s, g: _weighted_dz(s, g, s.log_r),
        needs="vectors",
    ),
    "dot": Field(
        lambda s: _product(_dense(s), s.z).sum(axis=1),
        lambda s, g: g[:, None] * _dense(s),
        needs="dense",
    ),
    "topk_values": Field(
        lambda s: s.gathered(s.order[:, : s.topk]),
        lambda s, g: s.scatter(s.order[:, : s.topk], g),
        needs="topk",
    ),
    "topk_ids": Field(lambda s: s.order[:, : s.topk], None, needs="topk"),
    # Derived fields: functions of the primary ones, here from their own definitions.
    "lse": Field(lambda s: s.lse, lambda s, g: g[:, None] * np.exp(s.log_p)),
    "log_prob": Field(_log_prob, _log_prob_dz, needs="target"),
    "entropy": Field(
        lambda s: -plogp(s.log_p).sum(axis=1),
        lambda s, g: _entropy_dz(s.log_p, g),
    ),
    "mean_logit": Field(_mean_logit, _mean_logit_dz),
    "power_lse": Field(
        lambda s: _powers(s, None),
        lambda s, g: _powers_dz(s, g, None),
        needs="powers",
    ),
    "weighted_mean": Field(
        lambda s: _weighted(s, s.log_p),
        lambda s, g: _weighted_dz(s, g, s.log_p),
        needs="vectors",
    ),
}
"""Name of a field to its dense definition. The first fifteen are the engines' primary fields."""

Vjp = Callable[..., dict[str, Floats]]


def row_statistics(
    input: Any,
    linear_weight: Any,
    target: Any = None,
    *,
    fields: Sequence[str] | None = None,
    linear_bias: Any = None,
    ignore_index: int | None = None,
    logit_scale: Any = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    powers: Sequence[float] = (),
    vectors: Any = None,
    dense: Any = None,
    topk: int = 0,
) -> tuple[dict[str, NDArray[Any]], Vjp]:
    """Return every field that its arguments allow, dense in float64, and its gradient function.

    Parameters
    ----------
    input : (..., D)
    linear_weight : (V, D) or (V, d1, ..., dK, D)
    target : integer (rows) or (rows, K), optional
        `rows` stands for ``input.shape[:-1] + (d1, ..., dK)``. An id equal to `ignore_index` is
        padding (−100 unless given); a row of padding only is ignored: its fields are 0, ids −1.
    fields : names from :data:`FIELDS`, optional
        Default: every field whose parameters are given (``log_prob`` only with one id a row).
    powers, vectors, dense, topk
        Parameters of ``rest_power``/``power_lse``, the weighted fields ((C, V) class vectors),
        ``dot`` (q, of shape rows + (V,)) and ``topk_values``/``topk_ids``.

    Returns
    -------
    stats : dict
        Name to array of shape rows, or rows + (columns,).
    vjp : callable
        ``vjp(rest=g, entropy=h, ...)`` takes cotangents of the fields' shapes and returns the
        gradients ``input``, ``linear_weight``, ``linear_bias``, ``logit_scale`` (and ``dense``).
        With ``magnitudes=True``: the sums of their terms' absolute values, the scale of rounding.
    """
    head = DenseHead(
        input, linear_weight, linear_bias, logit_scale=logit_scale, softcap=softcap, shift=shift
    )
    ids = None
    if target is not None:
        ids = as_int64(target)
        if shift:
            axis = np.ndim(input) - 2
            ids = np.take(ids, np.arange(shift, ids.shape[axis]), axis=axis)
        columns = ids.shape[len(head.shape) :]
        ids = ids.reshape(-1, *(columns or (1,)))
    if ignore_index is None:
        ignore_index = -100
    q = None if dense is None else as_float64(dense).reshape(head.z.shape)
    c = None if vectors is None else np.atleast_2d(as_float64(vectors))
    rows = Rows(head.z, ids, ignore_index, tuple(powers), c, q, topk)
    available = {
        "": True,
        "target": rows.has_target,
        "powers": bool(rows.powers),
        "vectors": c is not None,
        "dense": q is not None,
        "topk": topk > 0,
    }
    if fields is None:
        fields = [name for name, field in FIELDS.items() if available[field.needs]]
        if rows.ids.shape[1] != 1 and "log_prob" in fields:
            fields.remove("log_prob")

    stats = {}
    for name in fields:
        with np.errstate(all="ignore"):
            value = np.array(FIELDS[name].value(rows))
        value[~rows.kept] = -1 if value.dtype.kind == "i" else 0
        stats[name] = _unflatten(name, value, head.shape, target)

    def vjp(*, magnitudes: bool = False, **cotangents: Any) -> dict[str, Floats]:
        dz = np.zeros(head.z.shape)
        d_dense = np.zeros(head.z.shape)
        for name, cotangent in cotangents.items():
            derivative = FIELDS[name].dz
            if derivative is None:
                raise TypeError(f"{name} holds class ids and has no gradient")
            shape = (len(rows.z), *stats[name].shape[len(head.shape) :])
            if name == "target":
                shape = rows.ids.shape
            g = np.broadcast_to(as_float64(cotangent), stats[name].shape).reshape(shape)
            with np.errstate(all="ignore"):
                dz += derivative(rows, g)
                if name == "dot":
                    d_dense += g[:, None] * rows.z
        dz[~rows.kept] = 0.0
        d_dense[~rows.kept] = 0.0
        gradients = head.gradients(dz, magnitudes=magnitudes)
        if q is not None:
            gradients["dense"] = d_dense.reshape(*head.shape, -1)
        return gradients

    return stats, vjp


def _unflatten(name: str, value: NDArray[Any], shape: tuple[int, ...], target: Any) -> NDArray[Any]:
    """Give a flat field its public shape; ``target`` has a column axis only if the ids had one."""
    columns = value.shape[1:]
    if name == "target" and np.ndim(target) == len(shape):
        columns = ()
    return value.reshape((*shape, *columns))
