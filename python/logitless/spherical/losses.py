"""The losses a `SphericalHead` can train: functions of mean, variance and target logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logitless import stats
from logitless._check import argument_error
from logitless._extras import torch
from logitless.losses import spherical
from logitless.losses._base import RowLoss
from logitless.losses._module import LossModule
from logitless.ops.row_statistics import RowStatistics
from logitless.spherical.route import SPHERICAL

NAMES = ("zloss", "spherical_softmax", "taylor_softmax", "squared_error")


@dataclass(frozen=True)
class SphericalLoss:
    """A loss with its hyper-parameters, checked to need spherical statistics only."""

    loss: RowLoss
    hyper: dict[str, Any]
    request: stats.Request

    @property
    def name(self) -> str:
        """The function's name."""
        return self.loss.__name__

    def rows(self, s: RowStatistics) -> torch.Tensor:
        """One loss a row."""
        return self.loss.rows(s, **self.hyper)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the loss's importable module."""
        return _rebuild, (self.loss.module, self.hyper)


def _rebuild(module: type[LossModule], hyper: dict[str, Any]) -> SphericalLoss:
    return spherical_loss(module(**hyper))


def spherical_loss(loss: str | torch.nn.Module) -> SphericalLoss:
    """Look up a loss by name, or take a loss module with its hyper-parameters."""
    remedy = "e.g. loss='zloss' or loss=losses.zloss.module(a=0.1, b=28.0)"
    if isinstance(loss, str):
        if loss not in NAMES:
            raise argument_error("loss", repr(loss), f"one of {', '.join(NAMES)}", remedy)
        loss = getattr(spherical, loss).module()
    if not isinstance(loss, LossModule):
        raise argument_error("loss", repr(loss), "a name or a loss module", remedy)
    function = type(loss).loss
    definition = function.definition
    own = [n for n in definition.names if n not in definition.compute_names]
    hyper = {name: getattr(loss, name) for name in own}
    request = definition.resolve_want(definition.hyper(hyper), has_target=True)
    beyond = [name for name in request.core if name not in SPHERICAL]
    if beyond:
        raise argument_error(
            "loss",
            function.__name__,
            f"a loss of {', '.join(sorted(SPHERICAL))} alone",
            f"it needs {', '.join(beyond)}, which visits every class; train it on a dense weight",
        )
    if definition.per_row:
        raise argument_error(
            "loss", function.__name__, "no keyword of one value a row", "use row_weight"
        )
    return SphericalLoss(function, hyper, request)
