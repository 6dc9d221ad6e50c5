"""A torch optimiser that drives a `SphericalHead`: for schedulers and gradient scalers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from logitless._extras import torch
from logitless.spherical.head import SphericalHead

__all__ = ["SphericalOptimizer"]


class SphericalOptimizer(torch.optim.Optimizer):
    """``step()`` sets the head's ``lr`` from the parameter group and calls ``head.step()``.

    Parameters
    ----------
    head
        The head. Its weight is no parameter: the only group holds an empty one.

    Notes
    -----
    Works with ``torch.amp.GradScaler`` (the scale is divided out, steps with non-finite gradients
    are skipped) and with every scheduler of ``torch.optim.lr_scheduler``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, head: SphericalHead) -> None:
        self.head = head
        probe = torch.nn.Parameter(torch.zeros(0, device=head.matrix.factor.device))
        super().__init__([probe], {"lr": head.lr})
        self._probe()

    def _probe(self) -> None:
        """Give the scaler a gradient to look at; the head checks the real ones."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the head's step with the group's ``lr``; raises what `SphericalHead.step` does."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        scale = getattr(self, "grad_scale", None)
        self.head.lr = self.param_groups[0]["lr"]
        while True:
            try:
                self.head.step(1.0 if scale is None else scale)
            except FloatingPointError:
                if scale is None:
                    raise
                # A scaler expects the step to be skipped. What raised may be an earlier one.
                continue
            return result

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001
        """Forget what backward has recorded."""
        self.head.zero_grad(set_to_none)
        self._probe()
