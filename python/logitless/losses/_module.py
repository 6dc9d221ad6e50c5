"""A loss as a `torch.nn.Module`: `loss.module(hyper-parameters, reduction, ...)`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from logitless import _check
from logitless._extras import torch

if TYPE_CHECKING:
    from logitless.losses._base import Definition, RowLoss

__all__ = ["LossModule", "make_module"]

Tensor = torch.Tensor

# Arguments of every loss that a module fixes; the others are given to `forward`.
_FIXED = ("reduction", "ignore_index", "logit_scale", "softcap", "shift", "memory")


class LossModule(torch.nn.Module):
    """A loss with its hyper-parameters; called with (input, linear_weight, target).

    Parameters among the hyper-parameters or as logit_scale are registered and trained, other
    tensors become buffers. Picklable wherever the loss itself can be imported.
    """

    loss: RowLoss  # set by `make_module` on the class of each loss
    _names: tuple[str, ...]

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        definition = type(self).loss.definition
        fixed = {name: arguments.pop(name) for name in _FIXED if name in arguments}
        for name in definition.per_row:
            if name in arguments:
                raise TypeError(f"{name} has one value a row: pass it when calling the module")
        required = {name: None for name in definition.per_row}
        hyper = definition.hyper({**required, **arguments})
        for name in (*hyper, *_FIXED):
            if name in definition.per_row:
                continue
            value = hyper[name] if name in hyper else fixed.get(name, self._default(name))
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        _check.check_reduction(fixed.get("reduction", "mean"))
        _check.check_softcap(fixed.get("softcap"))
        _check.check_memory(fixed.get("memory", "lean"))

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor | None, **arguments: Any
    ) -> Any:
        """Compute the loss; keywords are linear_bias, row_weight, denominator and PerRow ones."""
        held = {name: getattr(self, name) for name in self._names}
        return type(self).loss(input, linear_weight, target, **held, **arguments)

    def extra_repr(self) -> str:
        """List what differs from the defaults."""
        values = ((name, getattr(self, name)) for name in self._names)
        return ", ".join(
            f"{name}={value!r}"
            for name, value in values
            if not isinstance(value, torch.Tensor) and value != self._default(name)
        )

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.loss.__signature__.parameters[name].default


def make_module(loss: RowLoss, definition: Definition) -> type[LossModule]:
    """Make the module class of a loss: importable, hence picklable, as `<loss>.module`."""
    name = definition.function.__name__
    parameters = loss.__signature__.parameters
    held = [n for n in definition.parameters if n not in definition.per_row] + list(_FIXED)
    keywords = [p for n, p in parameters.items() if n not in held]
    forward_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

    def forward(self: LossModule, *arguments: Any, **keywords: Any) -> Any:
        return LossModule.forward(self, *arguments, **keywords)

    forward.__signature__ = inspect.Signature([forward_self, *keywords])  # type: ignore[attr-defined]
    forward.__doc__ = LossModule.forward.__doc__
    made = type(
        "".join(part.capitalize() for part in name.split("_")) + "Loss",
        (LossModule,),
        {
            "__module__": definition.function.__module__,
            "__qualname__": f"{definition.function.__qualname__}.module",
            "__doc__": f"`{name}` as a module.\n\n{loss.__doc__}",
            "__signature__": inspect.Signature([parameters[n] for n in held]),
            "forward": forward,
            "loss": staticmethod(loss),
            "_names": tuple(held),
        },
    )
    return made
