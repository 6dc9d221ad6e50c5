"""`row_statistics` for NumPy: the statistics of every row, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from logitless._check import argument_error, type_error
from logitless.numpy._derive import Derived, Floats
from logitless.numpy._head import GRADIENT_BITS, Array, Head
from logitless.stats import Statistic, Want, resolve

DEFAULT_GRADIENTS = ("input", "linear_weight", "linear_bias")

# Field to the core's statistics that it is worked out from: with a target, and without one (None:
# it needs a target).
_SOURCES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "rest": (("rest",), None),
    "target": (("target",), None),
    "rest_entropy": (("entropy",), None),
    "rest_power": (("rest_power",), None),
    "log_prob": (("rest", "target"), None),
    "lse": (("rest", "target"), ("rest",)),
    "entropy": (("rest", "target", "entropy"), ("entropy",)),
    "mean_logit": (("rest", "target", "entropy"), ("rest", "entropy")),
    "sum": (("sum",), ("sum",)),
    "sum_sq": (("sum_sq",), ("sum_sq",)),
    "mean": (("sum",), ("sum",)),
    "variance": (("variance",), ("variance",)),
    "max": (("max",), ("max",)),
    "argmax": (("max",), ("max",)),
    "power_lse": (("rest_power", "target"), ("rest_power",)),
    "weighted_sum": (("weighted_sum",), ("weighted_sum",)),
    "weighted_mean": (("rest", "target", "weighted_rest"), ("weighted_rest",)),
    "dot": (("dot",), ("dot",)),
    "topk_values": (("topk",), ("topk",)),
    "topk_ids": (("topk",), ("topk",)),
}
INTEGER_FIELDS = ("argmax", "topk_ids")


def available_fields(core: tuple[str, ...], *, has_target: bool) -> tuple[str, ...]:
    """Name every field that follows from what the core computed."""
    names = []
    for name, (with_target, without) in _SOURCES.items():
        sources = with_target if has_target else without
        by_variance = name == "mean" and "variance" in core
        if sources is not None and (by_variance or set(sources) <= set(core)):
            names.append(name)
    return tuple(names)


class RowStatistics:
    """Statistics of every row, as attributes; worked out on first use.

    A field has the shape of a row, ``input.shape[:-1] + (d1, ..., dK)`` less `shift` positions,
    and a last axis where it has several columns. Its dtype is float64 for float64 inputs and
    float32 otherwise, int64 for ids. Ignored rows hold 0, and −1 for ids. Iterating gives the names
    of all fields that follow from what was wanted.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Array:
        if name.startswith("_"):
            raise AttributeError(name)
        fields = self._call.fields
        if name not in fields:
            remedy = f"ask for it in want=(..., {name!r})" if name in _SOURCES else "see help()"
            message = f"RowStatistics.{name} is not among {', '.join(fields)}: {remedy}"
            raise AttributeError(message)
        value = self._call.public(name)
        self.__dict__[name] = value
        return value

    def __iter__(self) -> Iterator[str]:
        """Names of the fields."""
        return iter(self._call.fields)

    def __dir__(self) -> list[str]:
        """Attributes for completion."""
        return [*super().__dir__(), *self._call.fields]

    def __repr__(self) -> str:
        """List the fields."""
        return f"RowStatistics(rows={self._call.head.geometry.rows_shape}: {', '.join(self)})"


class Gradients(NamedTuple):
    """Gradients of one scalar; None where it was not wanted or there is no such argument.

    Each has the shape and dtype of its argument (`dot` of the q of ``stats.dot(q)``), but
    `logit_scale`, which is 0-d in the dtype of the statistics.
    """

    input: Array | None = None
    linear_weight: Array | None = None
    linear_bias: Array | None = None
    logit_scale: Array | None = None
    dot: Array | None = None


class Vjp:
    """Turns cotangents of a call's fields into gradients of its arguments.

    The arguments of the call are read again by every use, because tiles of logits are recomputed:
    they must not be changed in between.
    """

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, **cotangents: Any) -> Gradients:
        """Gradients of Σ cotangent · field.

        Parameters
        ----------
        **cotangents
            A field's name to an array of the field's shape, or a number for all of its elements.

        Returns
        -------
        Gradients
        """
        return self._call.gradients(cotangents)

    def __repr__(self) -> str:
        """Name the fields whose cotangents are taken."""
        return f"<vjp of {', '.join(self._call.fields)}>"


class Call:
    """One forward on a `Head`, its derived fields, and its backward."""

    def __init__(self, head: Head, want: Want) -> None:
        self.head = head
        items = (want,) if isinstance(want, (str, Statistic)) else tuple(want)
        self.request = resolve(items, has_target=head.ids is not None)
        self._saved = head.forward(self.request)
        self.derived = Derived(head, self.request, self._saved.outputs)
        self.fields = available_fields(self.request.core, has_target=self.request.has_target)

    def flat(self, name: str) -> Floats:
        """A field as a float64 vector (or matrix) in flat row order."""
        return self.derived.value(name).astype(np.float64)

    def public(self, name: str) -> Array:
        """A field in the shape and dtype that callers see."""
        return self.head.public(self.derived.value(name), self._columns(name))

    def _columns(self, name: str) -> tuple[int, ...]:
        """The trailing axes of a field in public."""
        if name in ("target", "log_prob"):
            assert self.head.ids is not None
            return self.head.ids.shape[1:] if self.head.geometry.kind == "sparse" else ()
        if name in self.request.single:
            return ()
        return self.derived.value(name).shape[1:]

    def gradients(self, cotangents: dict[str, Any]) -> Gradients:
        """`Vjp.__call__`: cotangents in public shapes."""
        if not self.head.gradients:
            remedy = "name them in row_statistics(gradients=...)"
            raise argument_error("gradients", "()", "at least one wanted gradient", remedy)
        flat = {name: self._cotangent(name, value) for name, value in cotangents.items()}
        return self.backward(flat)

    def _cotangent(self, name: str, value: Any) -> Floats:
        """Check one cotangent and bring it to flat order, with the columns of the core."""
        if name not in self.fields or name in INTEGER_FIELDS:
            known = ", ".join(field for field in self.fields if field not in INTEGER_FIELDS)
            raise type_error("vjp: field", name, f"one of {known}", "name it in want=")
        columns = self._columns(name)
        shape = (*self.head.geometry.rows_shape, *columns)
        value = np.asarray(value, dtype=np.float64)
        if value.shape not in ((), shape):
            remedy = "a cotangent has the shape of its field"
            raise argument_error(f"vjp: {name}.shape", value.shape, f"{shape} or ()", remedy)
        wide = self.derived.value(name).shape[1:]
        return self.head.flat(np.broadcast_to(value, shape), columns).reshape(-1, *wide)

    def backward(self, cotangents: dict[str, Floats]) -> Gradients:
        """Gradients from flat cotangents of fields."""
        core = self.derived.pullback(cotangents)
        return Gradients(**self.head.backward(self.request, self._saved, core))


def check_gradients(names: Sequence[str], *, bias: bool, dot: bool) -> tuple[str, ...]:
    """Check the names of wanted gradients; drop those whose argument was not given."""
    if isinstance(names, str):
        names = (names,)
    for name in names:
        if name not in GRADIENT_BITS:
            remedy = "name the arguments whose gradient is wanted"
            raise argument_error("gradients", repr(name), f"of {', '.join(GRADIENT_BITS)}", remedy)
    absent = {"linear_bias"} if not bias else set()
    if not dot:
        absent.add("dot")
    return tuple(name for name in GRADIENT_BITS if name in names and name not in absent)


def row_statistics(
    input: Array,
    linear_weight: Array,
    target: Array | None = None,
    *,
    want: Want = ("rest", "target"),
    linear_bias: Array | None = None,
    target_weight: Array | None = None,
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    memory: str | int = "lean",
    gradients: Sequence[str] = DEFAULT_GRADIENTS,
) -> tuple[RowStatistics, Vjp]:
    """Statistics of the softmax of every row, without its logits, and their gradient function.

    The logits of a row are ``z = softcap · tanh(x / softcap)`` with ``x = logit_scale · E Wᵀ + b``,
    made tile by tile and never stored. A loss is a function of the statistics; its derivative by
    them goes into `vjp`, which returns the gradients of the head's arguments.

    Parameters
    ----------
    input : (..., D) float32, float64, float16 or bfloat16 (``ml_dtypes``)
        Any strides; read in place.
    linear_weight : (V, D) or (V, d1, ..., dK, D), dtype of input
    target : integer (...), optional
        Class ids, or (..., K) ids a row. R below is the set of classes that are no target.
    want : name, `stats` object, or a sequence of them
        See `logitless.stats` for the list of statistics.
    linear_bias : (V,) or (V, d1, ..., dK), dtype of input, optional
    target_weight : (..., K), optional
        Only says that the last axis of target holds K ids; the weights are the loss's business.
    ignore_index : int, optional
        Ids equal to it are padding; rows of padding only are skipped. −100 unless given.
    logit_scale, softcap, shift
        The logit maps; position t of the last leading axis predicts target t + shift.
    memory : "lean", "fast" or int
        Scratch that may be kept from forward to backward, in bytes or by name.
    gradients : names of "input", "linear_weight", "linear_bias", "logit_scale", "dot"
        What `vjp` returns. An unwanted gradient costs nothing; ``()`` is a forward only.

    Returns
    -------
    stats : RowStatistics
    vjp : callable
        ``vjp(field=cotangent, ...)`` returns `Gradients`.

    Raises
    ------
    ValueError, TypeError, IndexError
        Before any work, naming the argument, its value, what was expected and the remedy.

    Examples
    --------
    Focal loss, (1 − p)² times −log p, and its gradient by the chain rule:

    >>> import numpy as np, logitless.numpy as ln
    >>> rng = np.random.default_rng(0)
    >>> hidden, head = rng.standard_normal((4, 8)), rng.standard_normal((50, 8))
    >>> stats, vjp = ln.row_statistics(hidden, head, np.array([3, 1, 4, 1]), want="log_prob")
    >>> p = np.exp(stats.log_prob)
    >>> loss = (-((1 - p) ** 2) * stats.log_prob).sum()
    >>> g = vjp(log_prob=2 * (1 - p) * p * stats.log_prob - (1 - p) ** 2)
    >>> g.input.shape, g.linear_weight.shape
    ((4, 8), (50, 8))
    """
    want = want if isinstance(want, (str, Statistic)) else tuple(want)
    request = resolve(want, has_target=target is not None)
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
        gradients=check_gradients(
            gradients, bias=linear_bias is not None, dot=request.dense is not None
        ),
    )
    if head.geometry.kind == "probability":
        remedy = "pass class probabilities through stats.dot(q)"
        raise type_error("target.dtype", head.dtype, "an integer dtype for class ids", remedy)
    call = Call(head, want)
    return RowStatistics(call), Vjp(call)
