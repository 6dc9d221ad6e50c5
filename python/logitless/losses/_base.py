"""`row_loss`: a loss from a function of row statistics.

The function sees the statistics of all rows and returns one loss a row; everything around it
(ignored rows, row weights, reductions, shift, a module, documentation) is the same for every loss
and lives here.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from logitless import _check, stats
from logitless._check import ArgumentError, argument_error, type_error
from logitless._extras import torch
from logitless.losses import _heads
from logitless.losses._reduce import check_denominator, masked, reduce
from logitless.ops import inputs
from logitless.ops.row_statistics import RowStatistics, compute

if TYPE_CHECKING:
    from logitless.losses._module import LossModule

__all__ = ["PerRow", "RowLoss", "row_loss"]

Tensor = torch.Tensor


class _PerRowMark:
    """Marks a keyword as a tensor of one value a row."""


PerRow = Annotated[Tensor, _PerRowMark()]
"""Annotation of a loss's keyword: a tensor of the target's shape, shifted and masked with it."""

Function = Callable[..., Tensor]
Want = stats.Want | Callable[..., stats.Want]
Head = str | _heads.HeadMap | None


class RowLoss(Protocol):
    """What `row_loss` makes of a function; the hyper-parameters of the function are keywords."""

    __name__: str
    __signature__: inspect.Signature
    definition: Definition
    module: type[LossModule]

    def __call__(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor | None,
        *,
        linear_bias: Tensor | None = None,
        target_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        ignore_index: int | None = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        shift: int = 0,
        memory: str | int = "lean",
        return_statistics: bool = False,
        grad_buffer: Tensor | None = None,
        **hyper_parameters: Any,
    ) -> Any:
        """Compute the loss."""
        ...

    def rows(self, statistics: RowStatistics, **hyper_parameters: Any) -> Tensor:
        """Compute one loss a row, 0 where skipped, from statistics that are there already."""
        ...


def _common(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    target_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    ignore_index: int | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    shift: int = 0,
    memory: str | int = "lean",
    return_statistics: bool = False,
    grad_buffer: Tensor | None = None,
) -> None:
    """Only its signature counts: the arguments that every loss has."""


COMMON = inspect.signature(_common).parameters

_COMMON_DOC = """
Parameters
----------
input
    (..., D).
linear_weight
    (V, D), or (V, d1, ..., dK, D); input's dtype.
target
    Class ids (..., [d1, ..., dK]), or (..., K) for K ids a row.
{hyper}linear_bias
    (V, [d1, ..., dK]).
target_weight
    (..., K): weights of the K ids, for losses that use them.
row_weight
    A weight for each row, any float; it does not enter the divisor of "mean".
reduction
    "mean" over the kept rows, "sum", or "none".
denominator
    Replaces the divisor of "mean": a number or a 0-d tensor.
ignore_index
    Rows whose target equals it are skipped: loss 0, no gradient. None means -100.
logit_scale, softcap
    Logits are softcap · tanh((logit_scale · input @ linear_weightᵀ + linear_bias) / softcap).
shift
    Position t predicts target t + shift.
memory
    "lean", "fast", or bytes that may be kept for the backward.
return_statistics
    Return (loss, `RowStatistics`).
grad_buffer
    float32 (float64 for float64 inputs) of linear_weight's shape: each backward adds the weight's
    gradient to it and returns none. See `logitless.row_statistics`.

Returns
-------
Tensor
    float32 (float64 for float64 inputs): a scalar, or one loss a row for "none".
"""


@dataclass(frozen=True, eq=False)
class Definition:
    """A loss as its author declared it."""

    function: Function
    want: Any  # stats.Want, or a function of the hyper-parameters in `want_names`
    want_names: tuple[str, ...] | None
    head: Any  # a head map or its name, or a function of the hyper-parameters in `head_names`
    head_names: tuple[str, ...] | None
    parameters: Mapping[str, inspect.Parameter]  # hyper-parameters, PerRow ones included
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    per_row: tuple[str, ...]
    compute: Callable[..., RowStatistics]  # what makes the statistics
    compute_names: tuple[str, ...]  # its own keywords, which the loss takes and passes on

    def hyper(self, given: dict[str, Any]) -> dict[str, Any]:
        """Complete the hyper-parameters with defaults; refuse unknown and missing ones."""
        for name in given:
            if name not in self.names:
                known = ", ".join((*self.names, *COMMON))
                raise TypeError(
                    f"{self.function.__name__}() got an unexpected keyword argument {name!r}; "
                    f"it takes {known}"
                )
        for name in self.names:
            if name not in given and name not in self.defaults:
                raise TypeError(
                    f"{self.function.__name__}() missing the required keyword argument {name!r}"
                )
        return {name: given[name] if name in given else self.defaults[name] for name in self.names}

    def resolve_want(self, hyper: dict[str, Any], *, has_target: bool) -> stats.Request:
        """Resolve the statistics for these hyper-parameters."""
        want = self.want
        if self.want_names is not None:
            want = want(**{name: hyper[name] for name in self.want_names})
        return stats.resolve(want, has_target=has_target, cached=not torch.compiler.is_compiling())

    def resolve_head(self, hyper: dict[str, Any]) -> _heads.HeadMap | None:
        """Resolve the head map for these hyper-parameters."""
        head = self.head
        if self.head_names is not None:
            head = head(**{name: hyper[name] for name in self.head_names})
        return _heads.resolve(head)

    def losses(self, s: RowStatistics, hyper: dict[str, Any]) -> Tensor:
        """Run the function on the rows: one loss each, anything for skipped rows."""
        own = {name: hyper[name] for name in hyper if name not in self.compute_names}
        values = self.function(s, **own)
        expected = tuple(s.kept.shape)
        if tuple(values.shape) != expected:
            raise ArgumentError(
                f"{self.function.__name__} returned shape {tuple(values.shape)}: expected "
                f"{expected}, one loss a row; reduce class, power and target axes inside it"
            )
        return values


def row_loss(
    *,
    want: Want,
    head: Head | Callable[..., Head] = None,
    compute: Callable[..., RowStatistics] = compute,
) -> Callable[[Function], RowLoss]:
    """Make a loss from a function of row statistics.

    Parameters
    ----------
    want
        The statistics that the function reads: names and `logitless.stats` objects; or a function
        of (some of) the hyper-parameters that returns them.
    head
        "cosine" or "distance", or a function (input, linear_weight, linear_bias) -> the same three
        that is applied first.
    compute
        What makes the statistics; keywords of its own become keywords of the loss.

    Returns
    -------
    Callable
        A decorator. The function takes a `RowStatistics` and keyword hyper-parameters and returns
        one loss a row; keywords annotated `PerRow` are tensors of one value a row. The result is
        called as ``loss(input, linear_weight, target, **hyper_parameters, ...)`` with reductions,
        ignored rows, row weights, shift and the rest, and carries

        - ``loss.rows(statistics, **hyper_parameters)``: one loss a row, from statistics;
        - ``loss.module(**hyper_parameters, reduction=..., ...)``: a picklable `torch.nn.Module`.

    Raises
    ------
    ValueError
        At decoration: a hyper-parameter with the name of an argument that every loss has, or
        that is not a keyword.

    Notes
    -----
    Skipped rows hold safe finite values (0); what the function makes of them is masked in the
    forward and in the backward, so it may ignore them.

    Examples
    --------
    >>> @row_loss(want=("rest", "target"))
    ... def focal(s: RowStatistics, *, gamma: float = 2.0) -> Tensor:
    ...     log_p = logsigmoid(s.target - s.rest)
    ...     return -((-torch.expm1(log_p)) ** gamma) * log_p
    >>> focal(hidden, head.weight, labels, gamma=1.5)
    """

    def decorate(function: Function) -> RowLoss:
        return _make(_define(function, want, head, compute))

    return decorate


def _define(
    function: Function, want: Want, head: Any, computing: Callable[..., RowStatistics]
) -> Definition:
    signature = inspect.signature(function)
    _, *parameters = signature.parameters.values()
    standard = inspect.signature(compute).parameters
    extra = [p for n, p in inspect.signature(computing).parameters.items() if n not in standard]
    parameters += extra
    if not callable(want):
        stats.resolve(want, has_target=True)  # unknown names fail where they are written
    if isinstance(head, str):
        _heads.resolve(head)
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise argument_error(
                f"{function.__name__}: parameter",
                str(parameter),
                "named hyper-parameters",
                "list them one by one as keywords",
            )
        if parameter.name in COMMON or hasattr(torch.nn.Module, parameter.name):
            raise argument_error(
                f"{function.__name__}: parameter",
                repr(parameter.name),
                "a name that is not reserved",
                f"reserved are {', '.join(COMMON)} and the attributes of torch.nn.Module",
            )
    names = tuple(p.name for p in parameters)
    # A function of (some of) the hyper-parameters; a head map takes tensors instead.
    want_names = tuple(inspect.signature(want).parameters) if callable(want) else None
    head_names = None
    if callable(head) and head not in _heads.HEADS.values():
        arguments = tuple(inspect.signature(head).parameters)
        head_names = arguments if set(arguments) <= set(names) else None
    return Definition(
        function=function,
        want=want,
        want_names=want_names,
        head=head,
        head_names=head_names,
        parameters={p.name: p.replace(kind=p.KEYWORD_ONLY) for p in parameters},
        names=names,
        defaults={p.name: p.default for p in parameters if p.default is not p.empty},
        per_row=tuple(p.name for p in parameters if p not in extra and _is_per_row(function, p)),
        compute=computing,
        compute_names=tuple(p.name for p in extra),
    )


def _is_per_row(function: Function, parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except NameError:
            # Names that only a type checker imports: the text has to do.
            return "PerRow" in re.split(r"\W+", annotation)
        annotation = hints[parameter.name]
    options = (annotation, *typing.get_args(annotation))
    metadata = [m for option in options for m in getattr(option, "__metadata__", ())]
    return any(isinstance(m, _PerRowMark) for m in metadata)


def _make(definition: Definition) -> RowLoss:
    from logitless.losses._module import make_module

    def loss(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor | None,
        *,
        linear_bias: Tensor | None = None,
        target_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        reduction: str = "mean",
        denominator: float | Tensor | None = None,
        ignore_index: int | None = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        shift: int = 0,
        memory: str | int = "lean",
        return_statistics: bool = False,
        grad_buffer: Tensor | None = None,
        **hyper_parameters: Any,
    ) -> Any:
        _check.check_reduction(reduction)
        check_denominator(denominator, reduction)
        hyper = definition.hyper(hyper_parameters)
        geometry = inputs.inspect(input, linear_weight, target, linear_bias, target_weight, shift)
        if geometry.kind == "probability":
            raise type_error(
                "target.dtype",
                None if target is None else target.dtype,
                "class ids (an integer dtype)",
                f"{definition.function.__name__} takes ids; K of them a row with target_weight",
            )
        if row_weight is not None:
            row_weight = inputs.per_row("row_weight", row_weight, geometry, shift, input)
        for name in definition.per_row:
            if hyper[name] is not None:
                hyper[name] = inputs.per_row(name, hyper[name], geometry, shift, input)
        head_map = definition.resolve_head(hyper)
        if grad_buffer is not None and (head_map is not None or definition.compute is not compute):
            raise argument_error(
                "grad_buffer",
                "a tensor",
                f"None for {definition.function.__name__}, whose head is not linear_weight itself",
                "leave it out",
            )
        if head_map is not None:
            input, linear_weight, linear_bias = head_map(input, linear_weight, linear_bias)
            geometry = inputs.inspect(
                input, linear_weight, target, linear_bias, target_weight, shift
            )
        s = definition.compute(
            definition.resolve_want(hyper, has_target=target is not None),
            geometry,
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
            **{name: hyper[name] for name in definition.compute_names},
            **({} if grad_buffer is None else {"grad_buffer": grad_buffer}),
        )
        kept = None if target is None else s.kept
        for name in definition.per_row:
            if hyper[name] is not None:
                hyper[name] = masked(hyper[name], kept)
        losses = definition.losses(s, hyper)
        result = reduce(losses, kept, reduction, row_weight, denominator)
        return (result, s) if return_statistics else result

    def rows(statistics: RowStatistics, **hyper_parameters: Any) -> Tensor:
        hyper = definition.hyper(hyper_parameters)
        kept = statistics.kept
        for name in definition.per_row:
            if hyper[name] is not None:
                _check.check_per_row(name, tuple(hyper[name].shape), tuple(kept.shape))
                hyper[name] = masked(hyper[name], kept)
        return masked(definition.losses(statistics, hyper), kept)

    function = definition.function
    made: Any = loss
    made.definition = definition
    _document(made, function, definition)
    made.rows = _document_rows(rows, function, definition)
    made.module = make_module(made, definition)
    return made  # type: ignore[no-any-return]


def _document(made: Any, function: Function, definition: Definition) -> None:
    """Give the loss the name, signature and text of its function."""
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(made, attribute, getattr(function, attribute))
    common = list(COMMON.values())
    made.__signature__ = inspect.Signature(
        [*common[:3], *definition.parameters.values(), *common[3:]], return_annotation=Tensor
    )
    made.__annotations__ = {
        p.name: p.annotation for p in made.__signature__.parameters.values()
    } | {"return": Tensor}
    hyper = "".join(
        f"{name}\n    "
        + (
            "A tensor of target's shape: one value a row.\n"
            if name in definition.per_row
            else "Hyper-parameter of the loss"
            + (f" (default {p.default!r}).\n" if p.default is not p.empty else ".\n")
        )
        for name, p in definition.parameters.items()
    )
    text = inspect.cleandoc(function.__doc__ or f"{function.__name__}: a loss of row statistics.")
    made.__doc__ = f"{text}\n{_COMMON_DOC.format(hyper=hyper)}"


def _document_rows(rows: Any, function: Function, definition: Definition) -> Any:
    rows.__name__ = "rows"
    rows.__qualname__ = f"{function.__qualname__}.rows"
    rows.__module__ = function.__module__
    first = inspect.Parameter(
        "statistics", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=RowStatistics
    )
    rows.__signature__ = inspect.Signature(
        [first, *definition.parameters.values()], return_annotation=Tensor
    )
    rows.__doc__ = (
        f"Compute `{function.__name__}` for each row from statistics; 0 where skipped.\n\n"
        "PerRow keywords have the rows' shape (after the shift)."
    )
    return rows
