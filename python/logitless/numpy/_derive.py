"""Derived statistics: functions of the engine's fields, with their gradients, on vectors of rows.

Notation, per row: R the classes that are no target, ``a_g`` the logit of a group g (``rest`` for R,
``t_k`` for one of the distinct targets). The largest target is singled out, and everything else
forms its complement, ``others = logaddexp(rest, lse of the other targets)``. All probabilities are
then products of positive factors,

    p_top = sigmoid(t_top − others)      p_g = sigmoid(others − t_top) · e^{a_g − others}

so that each keeps its relative accuracy however peaked the row is. The vectors are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from logitless.numpy._head import Array, Head
from logitless.stats import Request

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Add = Callable[[str, Floats], None]
AddTargets = Callable[[Floats], None]


def softplus(x: Floats) -> Floats:
    """Log of 1 + e^x, exact to rounding at both ends."""
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))


def log_sum(a: Floats, b: Floats) -> Floats:
    """Log of e^a + e^b, also where both are −inf."""
    return np.asarray(np.logaddexp(a, b))


class Derived:
    """Fields of a `row_statistics` call, all from the flat core outputs of one forward."""

    def __init__(self, head: Head, request: Request, outputs: dict[str, Array]) -> None:
        self._head = head
        self._request = request
        self.core = outputs
        ids = head.ids
        self.rows = len(next(iter(outputs.values())))
        valid: Mask = np.zeros((self.rows, 0), bool)
        if ids is not None:
            valid = np.asarray(ids != head.ignore_index)
        self.valid = valid
        kept: Mask = np.ones(self.rows, bool)
        if ids is not None:
            kept = np.asarray(valid.any(axis=1))
        self.kept = kept

    @cached_property
    def distinct(self) -> Mask:
        """(N, K): the first appearance of each id of a row."""
        ids, distinct = self._head.ids, self.valid.copy()
        if ids is not None:
            for k in range(1, ids.shape[1]):
                distinct[:, k] &= ~(ids[:, :k] == ids[:, k : k + 1]).any(axis=1)
        return distinct

    def _wide(self, name: str) -> Floats:
        return np.asarray(self.core[name], dtype=np.float64)

    @cached_property
    def rest(self) -> Floats:
        return self._wide("rest")

    @cached_property
    def targets(self) -> Floats:
        """(N, K): logits of the distinct targets, −inf in the other columns."""
        if self._head.ids is None:
            empty: Floats = np.zeros((self.rows, 0))
            return empty
        return np.where(self.distinct, self._wide("target"), -np.inf)

    @cached_property
    def top(self) -> Floats:
        """Logit of the largest target, −inf without one."""
        return np.asarray(self.targets.max(axis=1, initial=-np.inf))

    @cached_property
    def others(self) -> Floats:
        """Log-sum-exp of everything but the largest target."""
        others = self.rest
        if self.targets.shape[1] > 1:
            at_top = self.targets.argmax(axis=1)[:, None]
            without = self.targets.copy()
            np.put_along_axis(without, at_top, -np.inf, axis=1)
            for k in range(without.shape[1]):
                others = log_sum(others, without[:, k])
        return others

    @cached_property
    def lse(self) -> Floats:
        return log_sum(self.others, self.top)

    @cached_property
    def log_complement(self) -> Floats:
        """Log of 1 − p_top."""
        if not self.targets.shape[1]:
            return np.zeros(self.rows)
        return -softplus(self.top - self.others)

    @cached_property
    def log_p_rest(self) -> Floats:
        """Log of the probability of R."""
        return self.log_complement + np.where(
            np.isneginf(self.rest), -np.inf, self.rest - self.others
        )

    @cached_property
    def log_p(self) -> Floats:
        """(N, K): log-probabilities at the targets; columns of one id agree, padding is −inf."""
        at_target = np.where(self.valid, self._wide("target"), -np.inf)
        top, others = self.top[:, None], self.others[:, None]
        inside = -softplus(others - top) + np.where(at_target == top, 0.0, at_target - top)
        # As torch's log_softmax: a logit of +inf leaves no probability defined in its row.
        inside = np.where(np.isposinf(others) | np.isposinf(top), np.nan, inside)
        return np.where(self.valid, inside, -np.inf)

    @cached_property
    def p_distinct(self) -> Floats:
        """(N, K): probabilities of the distinct targets, 0 in the other columns."""
        if self._head.ids is None:
            return np.zeros(self.targets.shape)
        return np.where(self.distinct, np.exp(self.log_p), 0.0)

    @cached_property
    def p_rest(self) -> Floats:
        return np.exp(self.log_p_rest)

    @cached_property
    def entropy(self) -> Floats:
        """By grouping: −Σ_g p_g log p_g + p_R · entropy of the softmax over R."""
        total = self.p_rest * self._wide("rest_entropy")
        total -= _times(self.p_rest, self.log_p_rest)
        if self._head.ids is not None:
            total -= _times(self.p_distinct, self.log_p).sum(axis=1)
        return np.asarray(total)

    # Values and pullbacks -----------------------------------------------------------------------

    def value(self, name: str) -> Array:
        """A field, flat; rows that are ignored hold zeros."""
        with np.errstate(all="ignore"):
            value = self._value(name)
        if name in self.core and name != "target":
            return value
        kept = self.kept if value.ndim == 1 else self.kept[:, None]
        return np.where(kept, value, 0.0).astype(self._head.acc)

    def _value(self, name: str) -> Array:
        core = self.core
        if name == "lse":
            return self.lse
        if name == "log_prob":
            return np.where(self.valid, self.log_p, 0.0)
        if name == "entropy":
            return self.entropy
        if name == "mean_logit":
            return self.lse - self.entropy
        if name == "mean" and "mean" not in core:
            return self._wide("sum") / self._head.geometry.classes
        if name == "power_lse":
            return np.stack([self._power_lse(c) for c in self._columns(name)], axis=1)
        if name == "rest_power":
            return core[name][:, self._columns(name)]
        if name == "weighted_mean":
            return self._weighted_mean()
        return core[name]

    def _columns(self, name: str) -> list[int]:
        everything = tuple(range(len(self._request.powers)))
        return list(dict(self._request.columns).get(name, everything))

    def _power_lse(self, column: int) -> Floats:
        total = self._wide("rest_power")[:, column]
        for k in range(self.targets.shape[1]):
            total = log_sum(total, self._request.powers[column] * self.targets[:, k])
        return total

    def _class_values(self) -> Floats:
        """(N, K, C): the class vectors at the targets."""
        vectors = np.atleast_2d(self._request.vectors).astype(np.float64)
        if self._head.ids is None:
            empty: Floats = np.zeros((self.rows, 0, len(vectors)))
            return empty
        return np.moveaxis(vectors[:, np.where(self.valid, self._head.ids, 0)], 0, -1)

    def _weighted_mean(self) -> Floats:
        mean = self.p_rest[:, None] * self._wide("weighted_rest")
        return np.asarray(mean + (self.p_distinct[:, :, None] * self._class_values()).sum(axis=1))

    def pullback(self, cotangents: dict[str, Floats]) -> dict[str, Floats]:
        """Cotangents of fields to cotangents of the core's fields."""
        into: dict[str, Floats] = {}
        for name, g in cotangents.items():
            kept = self.kept if g.ndim == 1 else self.kept[:, None]
            with np.errstate(all="ignore"):
                self._pull(name, np.where(kept, g, 0.0), into)
        return {
            name: np.where(self.kept if g.ndim == 1 else self.kept[:, None], g, 0.0)
            for name, g in into.items()
        }

    def _pull(self, name: str, g: Floats, into: dict[str, Floats]) -> None:
        def add(core: str, value: Floats) -> None:
            into[core] = into[core] + value if core in into else value

        def add_targets(value: Floats) -> None:
            if self._head.ids is not None:
                add("target", np.where(self.valid, value, 0.0))

        if name == "lse":
            add("rest", g * self.p_rest)
            add_targets(g[:, None] * self.p_distinct)
        elif name == "log_prob":
            self._pull_log_prob(g, add, add_targets)
        elif name == "entropy":
            inner = self._wide("rest_entropy")
            surprise = _times(self.p_rest, self.log_p_rest + self.entropy - inner)
            add("rest", -g * surprise)
            add("rest_entropy", g * self.p_rest)
            if self._head.ids is not None:
                add_targets(
                    -g[:, None] * _times(self.p_distinct, self.log_p + self.entropy[:, None])
                )
        elif name == "mean_logit":
            self._pull("lse", g, into)
            self._pull("entropy", -g, into)
        elif name == "mean" and "mean" not in self.core:
            add("sum", g / self._head.geometry.classes)
        elif name == "power_lse":
            self._pull_power(g, add, add_targets)
        elif name == "rest_power":
            wide = np.zeros(self.core[name].shape)
            wide[:, self._columns(name)] = g
            add(name, wide)
        elif name == "weighted_mean":
            mean = self._weighted_mean()
            centred = self._wide("weighted_rest") - mean
            add("weighted_rest", g * self.p_rest[:, None])
            add("rest", self.p_rest * (g * centred).sum(axis=1))
            values = self._class_values() - mean[:, None, :]
            add_targets(self.p_distinct * (values * g[:, None, :]).sum(axis=2))
        else:
            add(name, g)

    def _pull_log_prob(self, g: Floats, add: Add, add_targets: AddTargets) -> None:
        """Use d log p_k = dt_k − Σ_g p_g da_g, with 1 − p as the sum of the others' p."""
        g = np.where(self.valid, g, 0.0)
        total = g.sum(axis=1)
        add("rest", -total * self.p_rest)
        if g.shape[1] == 1:
            add_targets(g * np.exp(self.log_complement)[:, None])
            return
        # A duplicate's cotangent moves to the first column of its id, where p is.
        gathered = np.zeros(g.shape)
        ids = self._head.ids
        assert ids is not None
        for k in range(g.shape[1]):
            same = (ids[:, k : k + 1] == ids) & self.valid
            gathered[:, k] = np.where(same, g, 0.0).sum(axis=1)
        complement = 1.0 - self.p_distinct
        at_top = self.targets.argmax(axis=1)[:, None]
        np.put_along_axis(complement, at_top, np.exp(self.log_complement)[:, None], axis=1)
        elsewhere = total[:, None] - gathered
        pulled = gathered * complement - elsewhere * self.p_distinct
        add_targets(np.where(self.distinct, pulled, 0.0))

    def _pull_power(self, g: Floats, add: Add, add_targets: AddTargets) -> None:
        rest_power = self._wide("rest_power")
        into = np.zeros(rest_power.shape)
        targets = np.zeros(self.targets.shape)
        for c, column in enumerate(self._columns("power_lse")):
            m, total = self._request.powers[column], self._power_lse(column)
            into[:, column] = g[:, c] * np.exp(rest_power[:, column] - total)
            targets += m * g[:, [c]] * np.exp(m * self.targets - total[:, None])
        add("rest_power", into)
        add_targets(targets)


def _times(p: Floats, value: Floats) -> Floats:
    """Product that is 0 where p is 0."""
    return np.where(p == 0.0, 0.0, p * value)
