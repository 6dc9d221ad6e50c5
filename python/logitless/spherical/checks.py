"""Arguments of `SphericalHead`: what is refused, and why."""

from __future__ import annotations

import math

from logitless._check import argument_error
from logitless._extras import torch
from logitless.spherical.route import check_ids

OPTIMIZERS = ("sgd", "momentum", "muon")


def target_ids(
    input: torch.Tensor, target: torch.Tensor, ignore_index: int, classes: int
) -> tuple[torch.Tensor, bool]:
    """Targets as int64 with -1 at padding, and whether there are several a row."""
    lead = tuple(input.shape[:-1])
    several = target.dim() == len(lead) + 1
    if tuple(target.shape[: len(lead)]) != lead or target.dim() > len(lead) + 1:
        raise argument_error(
            "target.shape",
            tuple(target.shape),
            f"{lead} or {(*lead, 'K')}",
            "one row, one target",
        )
    if target.is_floating_point():
        raise argument_error("target.dtype", target.dtype, "class ids (int64)", "use .long()")
    ids = target.to(torch.int64)
    ids = torch.where(ids == ignore_index, -1, ids)
    if not ids.is_cuda:
        check_ids(ids.reshape(math.prod(lead), -1), classes)
    return ids, several


def check_optimizer(name: str) -> str:
    """Refuse what has no exact O(D²) form, and say why."""
    if name not in OPTIMIZERS:
        raise argument_error(
            "optimizer",
            repr(name),
            f"one of {', '.join(OPTIMIZERS)}",
            "Adam, AdamW, Adagrad, RMSprop and sign methods square or take the sign of single "
            "elements of the gradient, which has no exact O(D²) form; for them train an ordinary "
            "nn.Linear with logitless.losses and route='gram'",
        )
    return name


def check_positive(argument: str, value: int) -> None:
    """Refuse a size below 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise argument_error(argument, repr(value), "a positive int", "V and D are at least 1")


def check_number(argument: str, value: float, *, maximum: float = math.inf) -> float:
    """Refuse what is not a finite number in [0, maximum)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < math.inf or value >= maximum:
        upper = "" if maximum == math.inf else f" below {maximum:g}"
        raise argument_error(argument, repr(value), f"a finite number ≥ 0{upper}", "0 turns it off")
    return float(value)


def check_optional(argument: str, value: float | None) -> float | None:
    """Refuse what is neither None nor a positive number."""
    if value is None:
        return None
    if check_number(argument, value) == 0.0:
        raise argument_error(argument, value, "a positive number or None", "None turns it off")
    return float(value)
