"""Checks and normalisation of the tensors of a call, before any work.

A refusal names the argument, its value, what was expected and the way out. Shapes are the business
of `logitless._check`; this page knows torch's dtypes, devices, layouts and subclasses.
"""

from __future__ import annotations

import os
from numbers import Real

from logitless import _check
from logitless._check import Geometry, argument_error, type_error
from logitless._extras import torch
from logitless.ops import device as device_calls

__all__ = [
    "class_ids",
    "compute_dtype",
    "grad_buffer",
    "inspect",
    "logit_scale",
    "per_row",
    "per_row_shape",
]

Tensor = torch.Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
IDS = frozenset((torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8))
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
IGNORE_INDEX = -100  # torch's default for class ids


def inspect(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    target_weight: Tensor | None,
    shift: int,
) -> Geometry:
    """Check the tensors of a call against each other; say what the shapes mean."""
    _check_tensor("input", input)
    _check_tensor("linear_weight", linear_weight)
    device, dtype = input.device, input.dtype
    if dtype not in FLOATS:
        raise type_error(
            "input.dtype",
            dtype,
            "float32, bfloat16, float16 or float64",
            "integer and complex inputs have no softmax; dequantize() quantised tensors",
        )
    _check_same_dtype("linear_weight", linear_weight, input)
    _check_same_device("linear_weight", linear_weight, device)
    device_calls.check(input)
    if linear_bias is not None:
        _check_tensor("linear_bias", linear_bias)
        _check_same_dtype("linear_bias", linear_bias, input)
        _check_same_device("linear_bias", linear_bias, device)
    is_float = False
    if target is not None:
        _check_tensor("target", target)
        _check_same_device("target", target, device)
        is_float = target.dtype in FLOATS
        if not is_float and target.dtype not in IDS:
            raise type_error(
                "target.dtype",
                target.dtype,
                "int64, int32 or uint8 for class ids, floating for class probabilities",
                "use target.long()",
            )
    if target_weight is not None:
        _check_tensor("target_weight", target_weight)
        _check_same_device("target_weight", target_weight, device)
        _check_float("target_weight", target_weight)
    # Dynamo traces the plain function; a cache would make it warn, and keys may be symbolic there.
    geometry = _check.geometry.__wrapped__ if torch.compiler.is_compiling() else _check.geometry
    return geometry(
        input.shape,
        linear_weight.shape,
        None if linear_bias is None else linear_bias.shape,
        None if target is None else target.shape,
        is_float,
        None if target_weight is None else target_weight.shape,
        shift,
    )


def class_ids(target: Tensor, geometry: Geometry, shift: int, ignore_index: int) -> Tensor:
    """Return the ids that the rows predict: int64, of the rows' shape (and K).

    The CPU engine checks their range. On CUDA that would wait for the device: an id out of range
    makes its row nan there, and LOGITLESS_CHECK=1 in the environment raises.
    """
    if shift:
        axis = len(geometry.lead) - 1
        target = target.narrow(axis, shift, target.shape[axis] - shift)
    ids = target if target.dtype is torch.int64 else target.to(torch.int64)
    if ids.is_cuda and os.environ.get("LOGITLESS_CHECK") == "1":
        _check_range(ids, geometry.classes, ignore_index)
    return ids


def _check_range(ids: Tensor, classes: int, ignore_index: int) -> None:
    """Do on CUDA what the CPU engine does for itself; waits for the device."""
    wrong = ((ids < 0) | (ids >= classes)) & (ids != ignore_index)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"target[{', '.join(map(str, place))}] = {ids[place].item()}: expected 0 <= id < "
            f"{classes}, or ignore_index = {ignore_index}"
        )


def per_row_shape(geometry: Geometry) -> tuple[int, ...]:
    """Shape of a tensor with one value a row, before the shift."""
    return (*geometry.lead, *geometry.positions)


def per_row(argument: str, value: Tensor, geometry: Geometry, shift: int, like: Tensor) -> Tensor:
    """Check a tensor with one value a row and shift it with the target."""
    _check_tensor(argument, value)
    _check_same_device(argument, value, like.device)
    _check.check_per_row(argument, tuple(value.shape), per_row_shape(geometry))
    if shift:
        axis = len(geometry.lead) - 1
        value = value.narrow(axis, shift, value.shape[axis] - shift)
    return value


def logit_scale(value: float | Tensor) -> tuple[float, Tensor | None]:
    """Split a scale into a number and a 0-d tensor: one of them counts."""
    if type(value) is float:
        return value, None
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise argument_error(
                "logit_scale",
                f"tensor of shape {tuple(value.shape)}, {value.dtype}",
                "a number or a 0-d floating tensor",
                "use logit_scale.squeeze()",
            )
        return 1.0, value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise type_error(
            "logit_scale", repr(value), "a number or a 0-d floating tensor", "use float(...)"
        )
    return float(value), None


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of the products: the input's, or what autocast makes of a linear layer."""
    dtype = input.dtype
    if not torch._C._is_any_autocast_enabled():
        return dtype
    kind = input.device.type
    # autocast leaves float64 alone, and meta tensors have no autocast of their own.
    if dtype is not torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def grad_buffer(value: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Check the buffer that a weight's gradient is added to."""
    if value is None:
        return None
    check_float_tensor("grad_buffer", value, weight.device)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    if value.dtype is not expected:
        raise type_error(
            "grad_buffer.dtype", value.dtype, f"{expected}, that of the sums", "allocate it so"
        )
    if value.shape != weight.shape or value.requires_grad:
        raise argument_error(
            "grad_buffer",
            f"tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}",
            f"shape {tuple(weight.shape)} of linear_weight, without gradient",
            "use torch.zeros_like(linear_weight, dtype=torch.float32, requires_grad=False)",
        )
    return value


def check_class_weight(weight: Tensor, input: Tensor, classes: int) -> None:
    """Check torch's class `weight`: (V,), floating, a constant."""
    _check_tensor("weight", weight)
    _check_float("weight", weight)
    _check_same_device("weight", weight, input.device)
    _check.check_class_vector("weight", tuple(weight.shape), classes)
    if weight.requires_grad:
        raise argument_error(
            "weight.requires_grad",
            True,
            "False: class weights are constants",
            "use weight.detach()",
        )


def _check_tensor(argument: str, value: object) -> None:
    if type(value) not in _PLAIN:
        if not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise type_error(
                argument, kind, "a torch.Tensor", "use torch.as_tensor, or logitless.numpy"
            )
        if hasattr(value, "full_tensor"):
            raise type_error(
                argument,
                "a DTensor",
                "a plain tensor",
                f"use {argument}.full_tensor() for the whole, or .to_local() inside its own module",
            )
    elif not isinstance(value, torch.Tensor):
        return
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise type_error(
            f"{argument}.layout",
            layout,
            "a dense strided tensor",
            "use to_padded_tensor() with ignore_index" if value.is_nested else "use to_dense()",
        )


def check_float_tensor(argument: str, value: object, device: torch.device) -> None:
    """Check a floating tensor on the input's device."""
    _check_tensor(argument, value)
    assert isinstance(value, torch.Tensor)
    _check_float(argument, value)
    _check_same_device(argument, value, device)


def _check_float(argument: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise type_error(f"{argument}.dtype", value.dtype, "a floating dtype", "use .float()")


def _check_same_dtype(argument: str, value: Tensor, input: Tensor) -> None:
    if value.dtype is input.dtype:
        return
    kind = input.device.type
    castable = FLOATS - {torch.float64}  # autocast leaves float64 alone
    both = value.dtype in castable and input.dtype in castable
    if both and kind != "meta" and torch.is_autocast_enabled(kind):
        return
    raise type_error(
        f"{argument}.dtype",
        value.dtype,
        f"{input.dtype}, the dtype of input",
        f"use {argument}.to(input.dtype), or torch.autocast",
    )


def _check_same_device(argument: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise argument_error(
            f"{argument}.device",
            value.device,
            f"{device}, the device of input",
            f"use {argument}.to(input.device)",
        )
