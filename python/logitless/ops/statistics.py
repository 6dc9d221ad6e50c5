"""`RowStatistics`: what the core computed for each row, and what follows from it.

The core sums over R, the classes that are not the row's targets, so that nothing near one is ever
subtracted from one. The fields below put the targets back by `logaddexp` and `logsigmoid`; they are
worked out on first use, on tensors of one value a row, and autograd differentiates them.
"""

from __future__ import annotations

from typing import Any

from logitless._extras import torch
from logitless.ops.elementwise import (
    entropy_with,
    logaddexp,
    logsigmoid,
    logsumexp,
    margin,
    softplus,
    weighted,
)
from logitless.stats import Reading

__all__ = ["RowStatistics"]

Tensor = torch.Tensor

# Core fields with a last axis of their own.
_COLUMNED = ("target", "rest_power", "weighted_sum", "weighted_rest", "topk_values", "topk_ids")


class RowStatistics:
    """Statistics of the rows of ``z``, the logits of a linear head; made by `row_statistics`.

    Every field is a tensor of shape ``input.shape[:-1]`` (+ the extra dimensions of the head), its
    position axis shortened by ``shift``; ``target`` and ``log_prob`` have a last axis K for K ids a
    row, top-k fields one of length k. What follows from what was computed can be read; the rest
    raises an AttributeError that names ``want=``. Skipped rows hold finite values (0, ids -1): mask
    with ``kept`` before use.

    A registered pytree: ``torch.utils._pytree.tree_map(torch.Tensor.detach, s)`` works.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        *,
        reading: Reading,
        classes: int,
        ids: Tensor | None,
        several: bool,
        ignore_index: int | None,
        vectors: Tensor | None,
        target_weight: Tensor | None,
        route: str = "stream",
    ) -> None:
        self._values = values
        self._reading = reading
        self._classes = classes
        self._ids = ids
        self._several = several
        self._ignore_index = ignore_index
        self._vectors = vectors
        self._target_weight = target_weight
        self._route = route
        self._derived: dict[str, Tensor] = {}

    # What the core computed.

    @property
    def rest(self) -> Tensor:
        """Log Σ e^z over the classes that are not in target; -inf if there are none."""
        self._needs_target("rest", "'lse', the log-sum-exp over all classes")
        return self._core("rest", "rest")

    @property
    def target(self) -> Tensor:
        """Logit at the target id; (..., K) for K ids a row, 0 at padding."""
        self._needs_target("target", "'lse', the log-sum-exp over all classes")
        value = self._core("target", "target")
        return value if self._several else self._once("target", lambda: value.squeeze(-1))

    @property
    def rest_entropy(self) -> Tensor:
        """Entropy of the softmax over the classes that are not in target."""
        self._needs_target("rest_entropy", "'entropy'")
        return self._core("rest_entropy", "entropy")

    @property
    def sum(self) -> Tensor:
        """Σ z over the classes."""
        return self._core("sum", "sum")

    @property
    def sum_sq(self) -> Tensor:
        """Σ z² over the classes."""
        return self._core("sum_sq", "sum_sq")

    @property
    def mean(self) -> Tensor:
        """Σ z / V."""
        if "mean" in self._values:
            return self._values["mean"]
        return self._once("mean", lambda: self._core("sum", "mean") / self._classes)

    @property
    def variance(self) -> Tensor:
        """Σ (z - mean)² / V."""
        return self._core("variance", "variance")

    @property
    def max(self) -> Tensor:
        """Largest logit; nan wins, and the lowest id takes the whole gradient of a tie."""
        return self._core("max", "max")

    @property
    def argmax(self) -> Tensor:
        """Id of the largest logit (int64); -1 in skipped rows."""
        return self._core("argmax", "argmax")

    @property
    def rest_power(self) -> Tensor:
        """Log Σ e^(m z) over the classes that are not in target, for each power m."""
        self._needs_target("rest_power", "stats.power_lse")
        return self._powers("rest_power", self._core("rest_power", "stats.rest_power(2)"))

    @property
    def weighted_sum(self) -> Tensor:
        """Σ c z for each class vector c."""
        return self._vector(self._core("weighted_sum", "stats.weighted(c)"))

    @property
    def dot(self) -> Tensor:
        """Σ q z for the dense weights q."""
        return self._core("dot", "stats.dot(q)")

    @property
    def topk_values(self) -> Tensor:
        """Largest logits, sorted: (..., k)."""
        return self._core("topk_values", "stats.topk(8)")

    @property
    def topk_ids(self) -> Tensor:
        """Ids of the largest logits (int64), lowest first among equals: (..., k)."""
        return self._core("topk_ids", "stats.topk(8)")

    # What follows from it.

    @property
    def target_lse(self) -> Tensor:
        """Log Σ e^z over the row's distinct target ids: ``target`` itself for one id a row."""
        if not self._several:
            return self.target
        return self._once("target_lse", lambda: logsumexp(self._masked_target()))

    @property
    def lse(self) -> Tensor:
        """Log Σ e^z over all classes."""
        rest = self._core("rest", "lse")
        if not self._reading.has_target:
            return rest
        return self._once("lse", lambda: logaddexp(rest, self.target_lse))

    @property
    def log_prob(self) -> Tensor:
        """Log p at the target id(s), precise near p = 1: to p = 1 - e^-87 in float32."""
        self._needs_target("log_prob", "'lse'")
        return self._once("log_prob", self._log_prob)

    @property
    def entropy(self) -> Tensor:
        """-Σ p log p; keeps its digits on peaked rows."""
        rest_entropy = self._core("rest_entropy", "entropy")
        if not self._reading.has_target:
            return rest_entropy
        return self._once("entropy", lambda: self._entropy(rest_entropy))

    @property
    def mean_logit(self) -> Tensor:
        """Σ p z = lse - entropy."""
        return self._once("mean_logit", lambda: self.lse - self.entropy)

    @property
    def power_lse(self) -> Tensor:
        """Log Σ e^(m z) over all classes, for each power m."""
        value = self._core("rest_power", "stats.power_lse(2)")
        if self._reading.has_target:
            value = self._once("power_lse", lambda: self._power_lse(value))
        return self._powers("power_lse", value)

    @property
    def weighted_mean(self) -> Tensor:
        """Σ c p for each class vector c."""
        value = self._core("weighted_rest", "stats.weighted(c)")
        if self._reading.has_target:
            value = self._once("weighted_mean", lambda: self._weighted_mean(value))
        return self._vector(value)

    # The target itself.

    @property
    def target_ids(self) -> Tensor:
        """Ids (int64) that the rows predict, after the shift; ignore_index where skipped."""
        if self._ids is None:
            raise AttributeError("RowStatistics.target_ids: no target was given; pass target=")
        return self._ids

    @property
    def target_weight(self) -> Tensor:
        """Weights of the K ids a row, after the shift and 0 at padding."""
        weight = self._target_weight
        if weight is None:
            raise AttributeError("RowStatistics.target_weight: none was given; pass target_weight=")
        return self._once(
            "target_weight",
            lambda: torch.where(self._real(), weight.to(self._dtype()), 0.0),
        )

    @property
    def weights(self) -> Tensor:
        """`target_weight`, or 1 where none was given; 0 at padding: (..., K)."""
        if self._target_weight is not None:
            return self.target_weight
        return self._once("weights", lambda: self.real.to(self._dtype()))

    @property
    def real(self) -> Tensor:
        """Ids that are no padding (bool), of ``target_ids``' shape."""
        return self._real()

    @property
    def kept(self) -> Tensor:
        """Rows that count (bool): False where every id of the row is ignore_index."""
        return self._once("kept", self._kept)

    # The call.

    @property
    def values(self) -> dict[str, Tensor]:
        """What the core computed, by name: a copy of the table, not of the tensors."""
        return dict(self._values)

    @property
    def classes(self) -> int:
        """V."""
        return self._classes

    @property
    def several(self) -> bool:
        """Whether a row has K ids, so that ``target`` has a last axis."""
        return self._several

    @property
    def route(self) -> str:
        """How the classes were visited: "stream", or "gram" for the spherical statistics."""
        return self._route

    def __repr__(self) -> str:
        """List the core's fields with their shapes."""
        fields = ", ".join(f"{name}={tuple(v.shape)}" for name, v in self._values.items())
        return f"RowStatistics({fields})"

    # Reading.

    def _core(self, name: str, want: str) -> Tensor:
        try:
            return self._values[name]
        except KeyError:
            quoted = want if "(" in want else repr(want)
            raise AttributeError(
                f"RowStatistics: this field needs {name!r}, which was not computed; "
                f"add {quoted} to want="
            ) from None

    def _needs_target(self, name: str, instead: str) -> None:
        if not self._reading.has_target:
            raise AttributeError(
                f"RowStatistics.{name}: the call had no target; pass target=, or use {instead}"
            )

    def _once(self, name: str, make: Any) -> Tensor:
        value = self._derived.get(name)
        if value is None:
            value = self._derived[name] = make()
        return value

    def _powers(self, name: str, value: Tensor) -> Tensor:
        columns = dict(self._reading.columns).get(name, range(len(self._reading.powers)))
        if name in self._reading.single:
            return value[..., columns[0]]
        if tuple(columns) == tuple(range(value.shape[-1])):
            return value
        return torch.stack([value[..., column] for column in columns], dim=-1)

    def _vector(self, value: Tensor) -> Tensor:
        return value[..., 0] if "weighted_sum" in self._reading.single else value

    # Formulas.

    def _dtype(self) -> torch.dtype:
        return next(v.dtype for v in self._values.values() if v.is_floating_point())

    def _kept(self) -> Tensor:
        if self._ids is None or self._ignore_index is None:
            name, value = next(iter(self._values.items()))
            value = value[..., 0] if name in _COLUMNED else value
            return torch.ones_like(value, dtype=torch.bool)
        return self._real().any(dim=-1) if self._several else self._real()

    def _real(self) -> Tensor:
        """Ids that are no padding."""
        return self._once("_real", lambda: self.target_ids != self._ignore_index)

    def _distinct(self) -> Tensor:
        """Ids that are no padding and the first of their kind in the row."""
        return self._once("_distinct", lambda: self._real() & _first_occurrence(self.target_ids))

    def _masked_target(self) -> Tensor:
        """Target logits, -inf where an id is padding or a repetition; 0 throughout skipped rows."""
        use = self._distinct() | ~self.kept.unsqueeze(-1)
        return torch.where(use, self.target, -torch.inf)

    def _log_share(self) -> Tensor:
        """Log of each target's share of the targets' probability; anything at padding.

        Only the largest target can have a share near 1: it alone is put against the sum of the
        others, the rest lose nothing by a difference.
        """
        z = self._masked_target()
        winner = z.argmax(dim=-1, keepdim=True)
        is_winner = torch.zeros_like(z, dtype=torch.bool).scatter(-1, winner, True)
        others = logsumexp(torch.where(is_winner, -torch.inf, z))
        best = logsigmoid(z.gather(-1, winner) - others.unsqueeze(-1))
        wins = self.target_ids == self.target_ids.gather(-1, winner)  # repetitions too
        return torch.where(wins, best, self.target - self.target_lse.unsqueeze(-1))

    def _log_prob(self) -> Tensor:
        if not self._several:
            return -softplus(margin(self.rest, self.target))
        return self._log_share() + logsigmoid(self.target_lse - self.rest).unsqueeze(-1)

    def _entropy(self, rest_entropy: Tensor) -> Tensor:
        ahead = margin(self._core("rest", "entropy"), self.target_lse)
        value = entropy_with(ahead, rest_entropy)
        if self._several:  # and p_Y H_Y
            log_q = torch.where(self._distinct(), self._log_share(), -torch.inf)
            among = weighted(torch.exp(log_q), -log_q).sum(dim=-1)
            value = value + torch.sigmoid(-ahead) * among
        return value

    def _power_lse(self, rest_power: Tensor) -> Tensor:
        columns = []
        for column, power in enumerate(self._reading.powers):
            if self._several:
                at_target = logsumexp(power * self._masked_target())
            else:
                at_target = power * self.target
            columns.append(logaddexp(rest_power[..., column], at_target))
        return torch.stack(columns, dim=-1)

    def _weighted_mean(self, weighted_rest: Tensor) -> Tensor:
        assert self._vectors is not None
        ids = torch.where(self._real(), self.target_ids, 0)
        at_target = self._vectors[:, ids].movedim(0, -1)  # (..., [K,] C)
        p_rest = torch.sigmoid(self.rest - self.target_lse).unsqueeze(-1)
        if self._several:
            p = torch.where(self._distinct(), torch.exp(self.log_prob), 0.0)
            return p_rest * weighted_rest + (p.unsqueeze(-1) * at_target).sum(dim=-2)
        p_target = torch.sigmoid(self.target - self.rest).unsqueeze(-1)
        return p_rest * weighted_rest + p_target * at_target


def _first_occurrence(ids: Tensor) -> Tensor:
    """Mark the first of equal ids along the last axis."""
    ordered, order = ids.sort(dim=-1, stable=True)
    fresh = ordered[..., 1:] != ordered[..., :-1]
    return torch.ones_like(ids, dtype=torch.bool).scatter(-1, order[..., 1:], fresh)


def _flatten(s: RowStatistics) -> tuple[list[Tensor], Any]:
    extras = {"ids": s._ids, "vectors": s._vectors, "target_weight": s._target_weight}
    present = {name: tensor for name, tensor in extras.items() if tensor is not None}
    constants = (
        ("reading", s._reading),
        ("classes", s._classes),
        ("several", s._several),
        ("ignore_index", s._ignore_index),
        ("route", s._route),
    )
    context = (tuple(s._values), tuple(present), constants)
    return [*s._values.values(), *present.values()], context


def _unflatten(children: Any, context: Any) -> RowStatistics:
    names, present, constants = context
    children = list(children)
    extras: dict[str, Any] = dict.fromkeys(("ids", "vectors", "target_weight"))
    extras.update(zip(present, children[len(names) :], strict=True))
    values = dict(zip(names, children, strict=False))
    return RowStatistics(values, **extras, **dict(constants))


torch.utils._pytree.register_pytree_node(
    RowStatistics,
    _flatten,
    _unflatten,
    serialized_type_name="logitless.RowStatistics",
)
