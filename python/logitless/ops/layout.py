"""Torch layouts as the engine reads them: addresses and strides worked out by hand.

Leading dimensions, the shift and the extra dimensions of a head become handles with the right
address, shape and strides. No view is made and nothing is copied unless a layout cannot be walked
with two row strides. A handle holds an address only: the caller keeps the tensor alive.
"""

from __future__ import annotations

from math import prod

from logitless._arrays import Handle, torch_code, torch_handle
from logitless._extras import torch

__all__ = [
    "class_handle",
    "dense_rows",
    "field_handle",
    "loss_handles",
    "plain",
    "rows_handle",
    "scatter_dense",
    "to_positions",
    "to_rows",
]


def plain(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor itself, or a copy where dtype, a lazy negation or alignment ask for it."""
    if tensor.dtype is not dtype:
        return tensor.to(dtype)
    if tensor.is_neg():
        return tensor.resolve_neg()
    if tensor.data_ptr() % tensor.element_size():
        return tensor.clone()
    return tensor


def rows_handle(tensor: torch.Tensor, shift: int) -> tuple[torch.Tensor, Handle]:
    """Read (..., T, D) as (outer, inner, D) rows, the last `shift` positions left out.

    Returns the tensor that the handle points into: a copy where more than two leading dimensions
    cannot be collapsed.
    """
    address, code, shape, strides = torch_handle(tensor)
    if len(shape) == 2:
        return tensor, (address, code, (1, shape[0] - shift, shape[1]), (0, *strides))
    if len(shape) == 3:
        return tensor, (address, code, (shape[0], shape[1] - shift, shape[2]), strides)
    if len(shape) == 1:
        return tensor, (address, code, (1, 1, shape[0]), (0, 0, strides[0]))
    for k in range(len(shape) - 3):
        if shape[k + 1] != 1 and strides[k] != strides[k + 1] * shape[k + 1] and shape[k] != 1:
            tensor = tensor.contiguous()
            address, _, _, strides = torch_handle(tensor)
            break
    outer = (prod(shape[:-2]), shape[-2] - shift, shape[-1])
    return tensor, (address, code, outer, (strides[-3], strides[-2], strides[-1]))


def class_handle(tensor: torch.Tensor, position: tuple[int, ...]) -> Handle:
    """Read one head of (V, d1, ..., dK, D) or (V, d1, ..., dK): its weight or its bias."""
    handle = torch_handle(tensor)
    if not position:
        return handle
    address, code, shape, strides = handle
    extra = len(position)
    offset = sum(index * stride for index, stride in zip(position, strides[1:], strict=False))
    return (
        address + offset * tensor.element_size(),
        code,
        (shape[0], *shape[extra + 1 :]),
        (strides[0], *strides[extra + 1 :]),
    )


def field_handle(tensor: torch.Tensor, index: int, rows: int, columns: int) -> Handle:
    """Read head `index` of a contiguous (P, N[, columns]) tensor; columns 0 means none."""
    address, code = tensor.data_ptr(), torch_code(tensor.dtype)
    if index:
        address += index * rows * max(columns, 1) * tensor.element_size()
    if columns:
        return (address, code, (rows, columns), (columns, 1))
    return (address, code, (rows,), (1,))


def loss_handles(tensor: torch.Tensor, rows: int) -> tuple[Handle, Handle, Handle]:
    """Read (2 N + 1,) as what a cross entropy keeps: rest (N,), target (N, 1) and a share ()."""
    address, code = tensor.data_ptr(), torch_code(tensor.dtype)
    step = rows * tensor.element_size()
    return (
        (address, code, (rows,), (1,)),
        (address + step, code, (rows, 1), (1, 1)),
        (address + 2 * step, code, (), ()),
    )


def to_rows(
    tensor: torch.Tensor, rows_shape: tuple[int, ...], positions: int, columns: int
) -> torch.Tensor:
    """Turn the engine's (P, N[, columns]) into the caller's (..., d1, ..., dK[, columns])."""
    shape = (*rows_shape, columns) if columns else rows_shape
    if positions == 1:
        return tensor.view(shape)
    return tensor.view(positions, -1, max(columns, 1)).transpose(0, 1).reshape(shape)


def to_positions(
    tensor: torch.Tensor, positions: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Undo `to_rows`: the contiguous (P, N[, columns]) that `field_handle` reads."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    if positions > 1:
        tensor = tensor.reshape(-1, positions, max(columns, 1)).transpose(0, 1)
    return tensor.contiguous()


def dense_rows(
    tensor: torch.Tensor, rows: int, positions: tuple[int, ...], shift: int
) -> torch.Tensor:
    """Read dense weights (..., V, d1, ..., dK) as (N, V, P): a view where strides allow."""
    axis = tensor.dim() - len(positions) - 1
    classes = tensor.shape[axis]
    if shift:
        tensor = tensor.narrow(axis - 1, shift, tensor.shape[axis - 1] - shift)
    return tensor.reshape(rows, classes, prod(positions))


def scatter_dense(
    gradient: torch.Tensor, like: torch.Tensor, positions: tuple[int, ...], shift: int
) -> torch.Tensor:
    """Turn a gradient (P, N, V) into `like`'s shape and dtype, zero where shifted."""
    gradient = gradient.movedim(0, -1)
    if not shift:
        return gradient.reshape(like.shape).to(like.dtype)
    axis = like.dim() - len(positions) - 2
    result = torch.zeros_like(like, memory_format=torch.contiguous_format)
    kept = result.narrow(axis, shift, like.shape[axis] - shift)
    kept.copy_(gradient.reshape(kept.shape))
    return result
