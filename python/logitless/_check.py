"""Argument errors shared by the torch and the NumPy faces: shapes, ranges, names.

Everything here works on shapes and names, never on arrays, so one text serves every framework. The
checks run once per distinct set of shapes (`geometry` is cached): a training step that repeats its
shapes pays for one dictionary look-up.

Two exception types, each of which is what a torch user *and* what a NumPy user would catch: torch
raises RuntimeError where NumPy raises ValueError or TypeError.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, prod
from numbers import Integral, Real
from typing import Literal, NamedTuple

__all__ = ["ArgumentError", "ArgumentTypeError", "Geometry", "TargetKind", "geometry"]

TargetKind = Literal["none", "index", "sparse", "probability"]
Shape = tuple[int, ...]

REDUCTIONS = ("none", "mean", "sum")
MAX_TOPK = 64


class ArgumentError(ValueError, RuntimeError):
    """An argument has a wrong shape, value or device."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument is of a type, dtype or layout that cannot be used."""


class Geometry(NamedTuple):
    """What the shapes of one call say, after the shift."""

    kind: TargetKind
    rows_shape: (
        Shape  # of every per-row field: leading dimensions (last one less shift) + positions
    )
    lead: Shape  # input.shape[:-1], before the shift
    positions: Shape  # (d1, ..., dK) of the weight
    rows: int  # of one position: the product of the leading dimensions after the shift
    features: int
    classes: int
    targets: int  # ids a row: 0 without a target and for probabilities, 1 for plain class ids


def argument_error(argument: str, value: object, expected: str, remedy: str) -> ArgumentError:
    """Name the argument, its value, what was expected, and the way out."""
    return ArgumentError(f"{argument} = {value}: expected {expected}; {remedy}")


def type_error(argument: str, value: object, expected: str, remedy: str) -> ArgumentTypeError:
    """Like `argument_error`, for types, dtypes and layouts."""
    return ArgumentTypeError(f"{argument} = {value}: expected {expected}; {remedy}")


@lru_cache(maxsize=1024)
def geometry(
    input_shape: Shape,
    weight_shape: Shape,
    bias_shape: Shape | None,
    target_shape: Shape | None,
    target_is_float: bool,  # noqa: FBT001 (positional: the cache key)
    target_weight_shape: Shape | None,
    shift: int,
) -> Geometry:
    """Check the shapes of a call against each other and say what the target is.

    Parameters
    ----------
    input_shape
        (..., D).
    weight_shape
        (V, D), or (V, d1, ..., dK, D) for a head with K extra dimensions.
    bias_shape
        (V,) or (V, d1, ..., dK).
    target_shape
        (..., d1, ..., dK) class ids; the same plus a last axis of K ids; or, for floating targets,
        (..., V, d1, ..., dK) class probabilities.
    target_is_float
        Whether the target's dtype is floating: ids and probabilities are told apart by it.
    target_weight_shape
        Shape of the weights of the K ids a row (sparse soft targets).
    shift
        Position t predicts target t + shift.
    """
    # Messages print plain tuples, not torch.Size.
    input_shape, weight_shape = tuple(input_shape), tuple(weight_shape)
    bias_shape = None if bias_shape is None else tuple(bias_shape)
    target_shape = None if target_shape is None else tuple(target_shape)
    target_weight_shape = None if target_weight_shape is None else tuple(target_weight_shape)
    if len(input_shape) < 1:
        raise argument_error(
            "input.shape", input_shape, "at least one dimension, (..., features)", "unsqueeze it"
        )
    if len(weight_shape) < 2:
        raise argument_error(
            "linear_weight.shape",
            weight_shape,
            "at least two dimensions, (classes, features)",
            "pass the weight of torch.nn.Linear as it is",
        )
    lead, features = input_shape[:-1], input_shape[-1]
    classes, positions = weight_shape[0], weight_shape[1:-1]
    if weight_shape[-1] != features:
        raise argument_error(
            "linear_weight.shape",
            weight_shape,
            f"a last dimension of {features}, the features of input {input_shape}",
            "linear_weight is (classes, features): transpose it if it is (features, classes)",
        )
    if features < 1:
        raise argument_error(
            "input.shape", input_shape, "at least one feature", "the last dimension is empty"
        )
    if classes < 1 or prod(positions) < 1:
        raise argument_error(
            "linear_weight.shape", weight_shape, "at least one class", "a softmax needs a class"
        )
    if positions and not lead:
        raise argument_error(
            "input.shape",
            input_shape,
            f"(N, {features}) for a head with extra dimensions {positions}",
            "add a batch dimension with input.unsqueeze(0)",
        )
    expected_bias = (classes, *positions)
    if bias_shape is not None and bias_shape != expected_bias:
        raise argument_error(
            "linear_bias.shape",
            bias_shape,
            f"{expected_bias}, one value a class of linear_weight {weight_shape}",
            "reshape it, or leave it out",
        )
    check_shift(shift, lead)
    rows_lead = (*lead[:-1], lead[-1] - shift) if lead else ()
    kind, targets = _target_kind(
        lead, classes, positions, target_shape, target_is_float, target_weight_shape
    )
    rows_shape, rows = (*rows_lead, *positions), prod(rows_lead)
    return Geometry(kind, rows_shape, lead, positions, rows, features, classes, targets)


def _target_kind(
    lead: Shape,
    classes: int,
    positions: Shape,
    shape: Shape | None,
    is_float: bool,  # noqa: FBT001
    weight_shape: Shape | None,
) -> tuple[TargetKind, int]:
    if shape is None:
        if weight_shape is not None:
            raise argument_error(
                "target_weight.shape", weight_shape, "None without a target", "pass target too"
            )
        return "none", 0
    ids_shape = (*lead, *positions)
    if is_float:
        probabilities = (*lead, classes, *positions)
        if shape != probabilities:
            raise argument_error(
                "target.shape",
                shape,
                f"{probabilities} for class probabilities (target is floating)",
                f"class ids are integers of shape {ids_shape}: use target.long()"
                if shape == ids_shape
                else "give every row one probability a class",
            )
        if weight_shape is not None:
            raise argument_error(
                "target_weight.shape",
                weight_shape,
                "None with class probabilities",
                "target_weight belongs to (..., K) class ids; multiply the probabilities instead",
            )
        return "probability", 0
    if weight_shape is not None:
        if shape != weight_shape or shape[:-1] != ids_shape or len(shape) != len(ids_shape) + 1:
            raise argument_error(
                "target_weight.shape",
                weight_shape,
                f"{(*ids_shape, 'K')}, the shape of target (here {shape})",
                "every one of the K ids a row has one weight",
            )
        if shape[-1] < 1:
            raise argument_error("target.shape", shape, "at least one id a row", "pad with one")
        return "sparse", shape[-1]
    if shape == ids_shape:
        return "index", 1
    if shape[:-1] == ids_shape and len(shape) == len(ids_shape) + 1 and shape[-1] >= 1:
        return "sparse", shape[-1]
    raise argument_error(
        "target.shape",
        shape,
        f"{ids_shape}, one class id a row of input {(*lead, '...')}",
        f"or {(*ids_shape, 'K')} with target_weight for K ids a row, "
        f"or floating {(*lead, classes, *positions)} for class probabilities",
    )


def check_shift(shift: int, lead: Shape) -> None:
    """`shift` moves the targets along the last leading dimension of input."""
    if isinstance(shift, bool) or not isinstance(shift, Integral):
        raise type_error("shift", repr(shift), "an int", "shift=1 predicts the next position")
    if shift == 0:
        return
    if not lead:
        raise argument_error(
            "shift", shift, "0 for an input without positions", "input must be (..., T, D)"
        )
    if shift < 0 or shift >= lead[-1]:
        raise argument_error(
            "shift",
            shift,
            f"0 <= shift < {lead[-1]}, the number of positions (input.shape[-2])",
            "position t predicts target t + shift",
        )


def check_reduction(reduction: object) -> None:
    """One of torch's three reductions."""
    if reduction not in REDUCTIONS:
        raise argument_error(
            "reduction",
            repr(reduction),
            "'none', 'mean' or 'sum'",
            "as in torch.nn.CrossEntropyLoss",
        )


def check_label_smoothing(value: float) -> None:
    """In [0, 1], as in torch."""
    if not 0.0 <= value <= 1.0:
        raise argument_error("label_smoothing", value, "a number in [0, 1]", "0 means no smoothing")


def check_softcap(softcap: float | None) -> float:
    """`None` becomes 0.0, which the engine reads as no cap."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise type_error(
            "softcap", repr(softcap), "a positive number or None", "use float(softcap)"
        )
    if not 0.0 < softcap < inf:
        raise argument_error(
            "softcap", softcap, "a positive finite number", "None switches the cap off"
        )
    return float(softcap)


def check_memory(memory: str | int) -> int:
    """`"lean"`, `"fast"` or a number of bytes, as the engine's plan takes it."""
    if memory == "lean":
        return -1
    if memory == "fast":
        return -2
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
        raise argument_error(
            "memory",
            repr(memory),
            "'lean', 'fast' or a number of bytes >= 0",
            "'lean' is the default; see `logitless memory`",
        )
    return memory


def check_topk(k: int, classes: int) -> None:
    """`k` of topk against the number of classes."""
    if k > classes:
        raise argument_error(
            "topk", k, f"at most {classes}, the number of classes", "ask for fewer"
        )


def check_class_vector(argument: str, shape: Shape, classes: int) -> None:
    """Require one value a class."""
    if shape != (classes,):
        raise argument_error(
            f"{argument}.shape", shape, f"({classes},), one value a class", "reshape it"
        )


def check_vectors(shape: Shape, classes: int) -> None:
    """Class vectors of `stats.weighted`: (V,) or (C, V)."""
    if len(shape) not in (1, 2) or shape[-1] != classes or prod(shape) < 1:
        raise argument_error(
            "stats.weighted(c): c.shape",
            shape,
            f"({classes},) or (C, {classes}), one value a class",
            "stack several class vectors along the first axis",
        )


def check_dense(shape: Shape, expected: Shape) -> None:
    """Dense weights of `stats.dot`: one row a row of input."""
    if shape != expected:
        raise argument_error(
            "stats.dot(q): q.shape", shape, f"{expected}", "one weight for each row and class"
        )


def check_per_row(argument: str, shape: Shape, expected: Shape) -> None:
    """Require one value a row, before the shift (row_weight, PerRow keywords)."""
    if shape != expected:
        raise argument_error(
            f"{argument}.shape",
            shape,
            f"{expected}, one value a row as target",
            "it is shifted and masked together with target: pass it unshifted",
        )
