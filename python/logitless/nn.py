"""Modules over a linear head that they own."""

from __future__ import annotations

from math import prod
from typing import Any

from logitless import _check
from logitless._check import argument_error
from logitless._extras import torch
from logitless.functional import linear_cross_entropy
from logitless.spherical.adapter import SphericalOptimizer
from logitless.spherical.head import SphericalHead

__all__ = ["LinearCrossEntropyLoss", "SphericalHead", "SphericalOptimizer"]

Tensor = torch.Tensor


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross entropy of a linear head that the module owns.

    Mirrors `torch.nn.LinearCrossEntropyLoss` (2.15): same arguments, parameter names and
    initialisation, so that state dicts go both ways. All work happens inside ``forward``, for which
    FSDP's hooks unshard the weight; the logits are never stored.

    Parameters
    ----------
    in_features
        D.
    num_classes
        V.
    out_features
        (d1, ..., dK) for K-dimensional targets.
    bias
        Whether the head has a bias.
    device, dtype
        Of the weight.
    reduction, weight, ignore_index, label_smoothing, options
        As in `logitless.functional.linear_cross_entropy`; ``weight`` is a buffer.
    logit_scale, softcap, shift, z_loss_weight, memory
        As there. A `torch.nn.Parameter` as logit_scale is registered and trained.

    Attributes
    ----------
    linear
        The head, a `torch.nn.Linear` with a weight of (V · d1 · ... · dK, D).

    Examples
    --------
    >>> head = LinearCrossEntropyLoss(1024, 65536, shift=1)
    >>> loss = head(hidden, tokens)  # (B, T, 1024), (B, T)
    """

    weight: Tensor | None
    logit_scale: Any

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        shift: int = 0,
        z_loss_weight: float = 0.0,
        memory: str | int = "lean",
    ) -> None:
        super().__init__()
        _check.check_reduction(reduction)
        _check.check_label_smoothing(label_smoothing)
        _check.check_softcap(softcap)
        _check.check_memory(memory)
        if weight is not None:
            _check.check_class_vector("weight", tuple(weight.shape), num_classes)
        if num_classes < 1:
            raise argument_error("num_classes", num_classes, "at least one class", "a softmax")
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.softcap = softcap
        self.shift = shift
        self.z_loss_weight = z_loss_weight
        self.memory = memory
        self.register_buffer("weight", weight)
        if type(logit_scale) is torch.Tensor:
            self.register_buffer("logit_scale", logit_scale)
        else:
            self.logit_scale = logit_scale
        rows = prod(self.out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        target_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        return_statistics: bool = False,
        grad_buffer: Tensor | None = None,
    ) -> Any:
        """Compute the loss of input (..., D) and target."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            shape = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*shape, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.reshape(shape)
            grad_buffer = None if grad_buffer is None else grad_buffer.view(linear_weight.shape)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            target_weight=target_weight,
            row_weight=row_weight,
            denominator=denominator,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            shift=self.shift,
            z_loss_weight=self.z_loss_weight,
            memory=self.memory,
            return_statistics=return_statistics,
            grad_buffer=grad_buffer,
        )

    def extra_repr(self) -> str:
        """List what differs from the defaults."""
        shown = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "bias": self.linear.bias is not None,
        }
        defaults = {
            "out_features": (),
            "reduction": "mean",
            "ignore_index": None,
            "label_smoothing": 0.0,
            "softcap": None,
            "shift": 0,
            "z_loss_weight": 0.0,
            "memory": "lean",
        }
        shown |= {n: getattr(self, n) for n, d in defaults.items() if getattr(self, n) != d}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
