"""The only framework switch: what a torch, NumPy or CuPy array is to the compiled core.

Arrays cross into the core as `(address, dtype code, shape, strides)`, strides in elements. Nothing
is copied and nothing is imported: a framework that the caller does not use stays unloaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from logitless._check import type_error

if TYPE_CHECKING:
    import torch

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I64",
    "U8",
    "Handle",
    "framework",
    "handle",
    "torch_code",
    "torch_handle",
]

# Codes of the core: rust/core/src/tensor.rs.
F32, F64, BF16, F16, I64, U8 = range(6)

Handle = tuple[int, int, tuple[int, ...], tuple[int, ...]]
Framework = Literal["torch", "numpy", "cupy"]

# By the name of a dtype, the same in the three frameworks ("torch.float32" less its prefix).
CODES = {
    "float32": F32,
    "float64": F64,
    "bfloat16": BF16,
    "float16": F16,
    "int64": I64,
    "uint8": U8,
}


class _TorchCodes(dict[object, int]):
    """torch.dtype -> code, filled on the first look-up, which costs less than `str(dtype)`."""

    def __missing__(self, dtype: object) -> int:
        torch = sys.modules["torch"]
        self.update({getattr(torch, name): code for name, code in CODES.items()})
        if dtype not in self:
            raise KeyError(dtype)
        return self[dtype]


_torch_codes = _TorchCodes()


def framework(array: object) -> Framework | None:
    """Name the framework of an array; None for anything else."""
    names: tuple[Framework, ...] = ("torch", "numpy", "cupy")
    for name in names:
        module = sys.modules.get(name)
        if module is None:
            continue
        kind = module.Tensor if name == "torch" else module.ndarray
        if isinstance(array, kind):
            return name
    return None


def torch_code(dtype: torch.dtype) -> int:
    """Return the code of a torch dtype that the core knows."""
    return _torch_codes[dtype]


def torch_handle(tensor: torch.Tensor) -> Handle:
    """Describe a strided torch tensor of a dtype the core knows."""
    return (tensor.data_ptr(), _torch_codes[tensor.dtype], tensor.shape, tensor.stride())


def handle(array: Any) -> Handle:
    """Describe an array of any framework.

    Raises
    ------
    TypeError
        Not an array, or a dtype that the core does not know.
    ValueError
        A NumPy array whose strides are no multiple of its item size: copy it first.
    """
    kind = framework(array)
    if kind == "torch":
        return torch_handle(array)
    if kind is None:
        raise type_error(
            "array", type(array).__name__, "a torch, NumPy or CuPy array", "convert it"
        )
    code = CODES.get(array.dtype.name)
    if code is None:
        raise type_error("array.dtype", array.dtype, f"one of {', '.join(CODES)}", "convert it")
    address = array.ctypes.data if kind == "numpy" else array.data.ptr
    size = array.itemsize
    if any(stride % size for stride in array.strides):
        message = (
            f"array.strides = {array.strides}: expected multiples of {size} bytes; copy it first"
        )
        raise ValueError(message)
    return (address, code, array.shape, tuple(stride // size for stride in array.strides))
