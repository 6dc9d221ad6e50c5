"""Statistic objects: what `row_statistics(want=...)` and `row_loss(want=...)` can be asked for.

Plain names where no parameter is needed, objects from the functions below where one is:

===================  ===================================  =========================================
want                 fields of the result                 definition, for each row
===================  ===================================  =========================================
"rest"               rest                                 log Σ e^z over the classes not in target
"target"             target                               z at the target id(s)
"lse"                lse                                  log Σ e^z over all classes
"log_prob"           log_prob                             log p at the target id(s)
"entropy"            entropy, mean_logit, rest_entropy    -Σ p log p
"mean_logit"         mean_logit, entropy                  Σ p z
"sum", "sum_sq"      sum, sum_sq                          Σ z, Σ z²
"mean", "variance"   mean; variance and mean              over the classes, divided by V
"max", "argmax"      max, argmax                          lowest id wins ties; nan wins
power_lse(m, ...)    power_lse                            log Σ e^(m z)
rest_power(m, ...)   rest_power                           log Σ e^(m z) without the target(s)
weighted(c)          weighted_sum, weighted_mean          Σ c z and Σ c p for class vectors c
weighted_sum(c)      weighted_sum                         Σ c z
weighted_mean(c)     weighted_mean                        Σ c p
dot(q)               dot                                  Σ q z, q dense
topk(k)              topk_values, topk_ids                the k largest logits, sorted
===================  ===================================  =========================================

A statistic of one power, or of one class vector of shape (V,), has one value a row; several add a
last axis. `resolve` turns what was wanted into what the compiled core computes; everything else is
derived from it on vectors of one value a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

from logitless import _core
from logitless._check import MAX_TOPK, ArgumentError, argument_error, type_error

__all__ = [
    "Reading",
    "Request",
    "Statistic",
    "Want",
    "dot",
    "power_lse",
    "resolve",
    "rest_power",
    "topk",
    "weighted",
    "weighted_mean",
    "weighted_sum",
]

# The core's registry, in its order: the order of `Spec.fields`.
CORE_ORDER = (
    "rest",
    "target",
    "entropy",
    "sum",
    "sum_sq",
    "variance",
    "max",
    "rest_power",
    "weighted_sum",
    "weighted_rest",
    "dot",
    "topk",
)

# name: (core statistics with a target, without one; None: it needs a target).
_CORE: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "rest": (("rest",), None),
    "target": (("target",), None),
    "lse": (("rest", "target"), ("rest",)),
    "log_prob": (("rest", "target"), None),
    "entropy": (("rest", "target", "entropy"), ("rest", "entropy")),
    "mean_logit": (("rest", "target", "entropy"), ("rest", "entropy")),
    "rest_entropy": (("rest", "entropy"), None),
    "sum": (("sum",), ("sum",)),
    "sum_sq": (("sum_sq",), ("sum_sq",)),
    "mean": (("sum",), ("sum",)),
    "variance": (("variance",), ("variance",)),
    "max": (("max",), ("max",)),
    "argmax": (("max",), ("max",)),
    "power_lse": (("rest_power", "target"), ("rest_power",)),
    "rest_power": (("rest_power",), None),
    "weighted": (
        ("rest", "target", "weighted_sum", "weighted_rest"),
        ("rest", "weighted_sum", "weighted_rest"),
    ),
    "weighted_sum": (("weighted_sum",), ("weighted_sum",)),
    "weighted_mean": (("rest", "target", "weighted_rest"), ("rest", "weighted_rest")),
    "dot": (("dot",), ("dot",)),
    "topk": (("topk",), ("topk",)),
}
_WITH_PARAMETER = {
    "power_lse": "stats.power_lse(2)",
    "rest_power": "stats.rest_power(2)",
    "weighted": "stats.weighted(c)",
    "weighted_sum": "stats.weighted_sum(c)",
    "weighted_mean": "stats.weighted_mean(c)",
    "dot": "stats.dot(q)",
    "topk": "stats.topk(8)",
}
NAMES = tuple(_CORE)


@dataclass(frozen=True, slots=True, eq=False)
class Statistic:
    """A statistic with its parameter. Made by the functions of this module."""

    name: str
    powers: tuple[float, ...] = ()
    k: int = 0
    array: Any = None  # class vectors (V,) or (C, V); or dense weights (..., V)

    def _key(self) -> tuple[object, ...]:
        return (self.name, self.powers, self.k, None if self.array is None else id(self.array))

    def __eq__(self, other: object) -> bool:
        """Compare by value, arrays by identity."""
        return isinstance(other, Statistic) and self._key() == other._key()

    def __hash__(self) -> int:
        """Hash what `==` compares."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Show the call that makes it."""
        if self.array is not None:
            return f"stats.{self.name}(<array of shape {tuple(self.array.shape)}>)"
        parameters = self.powers or (self.k,)
        return f"stats.{self.name}({', '.join(f'{p:g}' for p in parameters)})"


Want = str | Statistic | Iterable[str | Statistic]


def topk(k: int) -> Statistic:
    """Keep the k largest logits, sorted, with their ids: fields `topk_values`, `topk_ids` (..., k).

    Ties: lowest id first; nan first, as in torch. 1 <= k <= 64. The values are differentiable.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise type_error("stats.topk(k): k", repr(k), "an int", "how many logits to keep")
    if not 1 <= k <= MAX_TOPK:
        raise argument_error(
            "stats.topk(k): k", k, f"1 <= k <= {MAX_TOPK}", "more need the logits themselves"
        )
    return Statistic("topk", k=k)


def power_lse(*powers: float) -> Statistic:
    """Log Σ e^(m z) over all classes, for each power m: field `power_lse` (...) or (..., M).

    Σ pᵐ = exp(power_lse - m·lse).
    """
    return Statistic("power_lse", powers=_check_powers("power_lse", powers))


def rest_power(*powers: float) -> Statistic:
    """Log Σ e^(m z) over the classes not in target: field `rest_power` (...) or (..., M).

    Keeps the digits of Σ p² - 2 p_y + 1 where p_y is near 1.
    """
    return Statistic("rest_power", powers=_check_powers("rest_power", powers))


def weighted(c: Any) -> Statistic:
    """Both `weighted_sum` (Σ c z) and `weighted_mean` (Σ c p) for class vectors c.

    c is (V,), giving fields of the rows' shape, or (C, V), giving (..., C). It is a constant: no
    gradient flows to it. c_j = 0 contributes 0 even where z_j is infinite.
    """
    return Statistic("weighted", array=_check_array("weighted", c))


def weighted_sum(c: Any) -> Statistic:
    """Σ c z for class vectors c, (V,) or (C, V): field `weighted_sum`."""
    return Statistic("weighted_sum", array=_check_array("weighted_sum", c))


def weighted_mean(c: Any) -> Statistic:
    """Σ c p for class vectors c, (V,) or (C, V): field `weighted_mean`."""
    return Statistic("weighted_mean", array=_check_array("weighted_mean", c))


def dot(q: Any) -> Statistic:
    """Σ q z for dense weights q of shape (..., V): field `dot`. Differentiable in q too.

    With a head of extra dimensions q is (..., V, d1, ..., dK), as class probabilities are.
    q_j = 0 contributes 0 even where z_j is infinite.
    """
    return Statistic("dot", array=_check_array("dot", q))


def _check_powers(name: str, powers: tuple[float, ...]) -> tuple[float, ...]:
    if not powers:
        raise argument_error(f"stats.{name}()", "()", "at least one power", f"stats.{name}(2)")
    for m in powers:
        if isinstance(m, bool) or not isinstance(m, (int, float)):
            raise type_error(f"stats.{name}: power", repr(m), "a number", f"stats.{name}(2)")
        if not 0.0 < m < inf:
            raise argument_error(
                f"stats.{name}: power", m, "a positive finite number", "sum of e^(m z)"
            )
    return tuple(float(m) for m in powers)


def _check_array(name: str, array: Any) -> Any:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise type_error(
            f"stats.{name}: argument", repr(type(array)), "an array or tensor", "convert it first"
        )
    return array


class Reading(NamedTuple):
    """How fields read the core's outputs: the part of a `Request` that outlives the call."""

    powers: tuple[float, ...]
    columns: tuple[tuple[str, tuple[int, ...]], ...]
    single: frozenset[str]
    has_target: bool


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What the core must compute for a `want`, and how the wanted fields read it.

    `columns` says which columns of the core's `rest_power` a field reads; `single` names the fields
    whose only column is dropped, so that they have one value a row.
    """

    core: tuple[str, ...]
    powers: tuple[float, ...] = ()
    topk: int = 0
    vectors: Any = None
    dense: Any = None
    columns: tuple[tuple[str, tuple[int, ...]], ...] = ()
    single: frozenset[str] = frozenset()
    has_target: bool = True

    @property
    def reading(self) -> Reading:
        """What a result needs to know to read the core's outputs."""
        return Reading(self.powers, self.columns, self.single, self.has_target)

    @property
    def vector_count(self) -> int:
        """C, the number of class vectors."""
        if self.vectors is None:
            return 0
        return 1 if len(self.vectors.shape) == 1 else int(self.vectors.shape[0])

    def spec(self, targets: int) -> _core.Spec:
        """Make the core's specification for `targets` ids a row (0: none)."""
        return core_spec(self.core, self.powers, self.vector_count, self.topk, targets)


@lru_cache(maxsize=256)
def core_spec(
    core: tuple[str, ...], powers: tuple[float, ...], vectors: int, k: int, targets: int
) -> _core.Spec:
    """Make the core's specification, once for every distinct one."""
    return _core.Spec(core, powers=powers, vectors=vectors, topk=k, targets=targets)


@lru_cache(maxsize=256)
def core_fields(
    core: tuple[str, ...], powers: tuple[float, ...], vectors: int, k: int, targets: int
) -> tuple[tuple[str, int, bool], ...]:
    """List (name, columns, is integer) of the core's outputs: `Spec.fields`, known without a Spec.

    torch.compile traces through calls, where a compiled object would break the graph.
    """
    outputs = {
        "target": (("target", targets, False),),
        "entropy": (("rest_entropy", 0, False),),
        "variance": (("mean", 0, False), ("variance", 0, False)),
        "max": (("max", 0, False), ("argmax", 0, True)),
        "rest_power": (("rest_power", len(powers), False),),
        "weighted_sum": (("weighted_sum", vectors, False),),
        "weighted_rest": (("weighted_rest", vectors, False),),
        "topk": (("topk_values", k, False), ("topk_ids", k, True)),
    }
    return tuple(field for name in core for field in outputs.get(name, ((name, 0, False),)))


def resolve(want: Want, *, has_target: bool, cached: bool = True) -> Request:
    """Turn what a caller wants into a `Request`.

    `cached` is for tracers, which must see plain code.

    Raises
    ------
    ValueError
        For an unknown statistic, one that needs a parameter, or one that needs a target.
    """
    items = (want,) if isinstance(want, (str, Statistic)) else _as_tuple(want)
    for item in items:
        if isinstance(item, Statistic) and item.array is not None:
            cached = False  # a cache would keep the array alive
    return (_resolve_cached if cached else _resolve)(items, has_target)


def _as_tuple(want: Iterable[str | Statistic]) -> tuple[str | Statistic, ...]:
    try:
        items = tuple(want)
    except TypeError:
        items = (want,)  # type: ignore[assignment]
    for item in items:
        if not isinstance(item, (str, Statistic)):
            raise type_error(
                "want", repr(want), "names or stats objects", 'want=("rest", "target")'
            )
    return items


def _resolve(items: tuple[str | Statistic, ...], has_target: bool) -> Request:  # noqa: FBT001
    if not items:
        raise argument_error("want", "()", "at least one statistic", f"one of {', '.join(NAMES)}")
    core: set[str] = set()
    powers: dict[float, int] = {}
    columns: dict[str, tuple[int, ...]] = {}
    single: set[str] = set()
    k = 0
    vectors: Any = None
    dense: Any = None
    for item in items:
        name = item.name if isinstance(item, Statistic) else item
        core.update(_core_of(name, item, has_target))
        if not isinstance(item, Statistic):
            continue
        if item.powers:
            if name in columns:
                raise argument_error(
                    "want",
                    f"two of stats.{name}",
                    "one",
                    f"stats.{name}(2, 3) takes several powers",
                )
            columns[name] = tuple(powers.setdefault(m, len(powers)) for m in item.powers)
            if len(item.powers) == 1:
                single.add(name)
        elif name == "topk":
            if k not in (0, item.k):
                raise _two("topk")
            k = item.k
        elif name == "dot":
            if dense is not None and dense is not item.array:
                raise _two("dot")
            dense = item.array
        else:
            if vectors is not None and vectors is not item.array:
                raise _two("weighted")
            vectors = item.array
            if len(item.array.shape) == 1:
                single.update(("weighted_sum", "weighted_mean", "weighted_rest"))
    return Request(
        core=tuple(name for name in CORE_ORDER if name in core),
        powers=tuple(powers),
        topk=k,
        vectors=vectors,
        dense=dense,
        columns=tuple(columns.items()),
        single=frozenset(single),
        has_target=has_target,
    )


_resolve_cached = lru_cache(maxsize=256)(_resolve)


def _core_of(name: object, item: object, has_target: bool) -> tuple[str, ...]:  # noqa: FBT001
    if not isinstance(name, str):
        raise type_error("want", repr(item), "names or stats objects", 'want=("rest", "target")')
    if name not in _CORE:
        raise argument_error(
            "want",
            repr(name),
            f"one of {', '.join(NAMES)}",
            "parameters go through logitless.stats",
        )
    if name in _WITH_PARAMETER and not isinstance(item, Statistic):
        raise argument_error(
            "want", repr(name), "its parameter", f"write {_WITH_PARAMETER[name]} (logitless.stats)"
        )
    with_target, without = _CORE[name]
    if has_target:
        return with_target
    if without is None:
        remedy = (
            "ask for 'lse', the log-sum-exp over all classes"
            if name != "rest_power"
            else ("ask for stats.power_lse, the sum over all classes")
        )
        raise argument_error(
            "want", repr(name), "a target for this statistic", f"pass target, or {remedy}"
        )
    return without


def _two(name: str) -> ArgumentError:
    return argument_error(
        "want",
        f"two different stats.{name}",
        "one",
        "stack class vectors; make two calls otherwise",
    )
