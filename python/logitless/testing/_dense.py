"""The dense head: logits of a linear layer in float64, and the way back to its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def as_float64(array: Any) -> Floats:
    """Return `array` (anything NumPy reads, or a torch tensor) as float64.

    Torch tensors are recognised by their methods, so that torch is never imported here; bfloat16
    needs no ``ml_dtypes`` on that road because the widening happens in torch.
    """
    if hasattr(array, "detach"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array, dtype=np.float64)


def as_int64(array: Any) -> Ints:
    """Return integer `array` (or torch tensor) as int64."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().numpy()
    return np.asarray(array).astype(np.int64)


def is_floating(array: Any) -> bool:
    """Whether `array` holds probabilities (any float dtype) rather than class indices."""
    if hasattr(array, "is_floating_point"):
        return bool(array.is_floating_point())
    kind = np.asarray(array).dtype
    return kind.kind == "f" or kind.name == "bfloat16"


class DenseHead:
    """Logits ``z`` (rows, V) of a linear head in float64.

    The maps are applied in the library's order: ``x = logit_scale · E Wᵀ + b`` and then
    ``z = softcap · tanh(x / softcap)``.

    Parameters
    ----------
    input : (..., D)
    linear_weight : (V, D) or (V, d1, ..., dK, D)
        With extra dimensions every row of `input` has one softmax for each (d1, ..., dK).
    linear_bias : (V,) or (V, d1, ..., dK), optional
    logit_scale : float
    softcap : float, optional
    shift : int
        The last `shift` positions of the last leading axis of `input` make no rows.

    Attributes
    ----------
    z : (rows, V) float64
    shape : tuple of int
        Shape of a per-row quantity, ``input.shape[:-1] + (d1, ..., dK)`` (cut by `shift`).
    """

    def __init__(
        self,
        input: Any,
        linear_weight: Any,
        linear_bias: Any = None,
        *,
        logit_scale: Any = 1.0,
        softcap: float | None = None,
        shift: int = 0,
    ) -> None:
        full = as_float64(input)
        weight = as_float64(linear_weight)
        self._input_shape: tuple[int, ...] = full.shape
        self._shift = shift
        self._weight_shape = weight.shape
        self._bias_shape: tuple[int, ...] | None = None
        if linear_bias is not None:
            self._bias_shape = as_float64(linear_bias).shape
        self._leading = full.shape[:-1]
        if shift:
            full = full[..., : full.shape[-2] - shift, :]
            self._leading = full.shape[:-1]
        features = weight.shape[-1]
        self.classes = weight.shape[0]
        self.extra = weight.shape[1:-1]
        self.shape = self._leading + self.extra
        self._input = full.reshape(-1, features)
        self._weight = weight.reshape(-1, features)
        self._scale = float(as_float64(logit_scale))
        self._softcap = softcap
        with np.errstate(all="ignore"):
            self._product = self._input @ self._weight.T
            x = self._product * self._scale
            if linear_bias is not None:
                x = x + as_float64(linear_bias).reshape(-1)
            z = x if softcap is None else softcap * np.tanh(x / softcap)
        self.z = self._to_rows(z)

    def _to_rows(self, z: Floats) -> Floats:
        """(N, V·d1···dK) to (N·d1···dK, V): the classes become the last axis."""
        dense = z.reshape(-1, self.classes, *self.extra)
        return np.ascontiguousarray(np.moveaxis(dense, 1, -1)).reshape(-1, self.classes)

    def _from_rows(self, dz: Floats) -> Floats:
        rows = dz.reshape(-1, *self.extra, self.classes)
        return np.moveaxis(rows, -1, 1).reshape(-1, self._weight.shape[0])

    def gradients(self, dz: Floats, *, magnitudes: bool = False) -> dict[str, Floats]:
        """Carry ∂L/∂z (rows, V) to ``input``, ``linear_weight``, ``linear_bias``, ``logit_scale``.

        A zero of `dz` contributes exactly zero, also where the logit is infinite.

        Parameters
        ----------
        dz : (rows, V)
        magnitudes : bool
            Return the sums of the absolute values of the terms instead: what the rounding errors
            of a gradient are relative to, however much of it cancels.
        """
        size = np.abs if magnitudes else np.asarray
        scale, weight = size(self._scale), size(self._weight)
        with np.errstate(all="ignore"):
            dx = dz
            if self._softcap is not None:
                dx = dz * (1.0 - (self.z / self._softcap) ** 2)
            dx = size(self._from_rows(np.where(dz == 0.0, 0.0, dx)))
            # A row without a gradient is not read: it may hold anything.
            read = np.where((dx != 0.0).any(axis=1)[:, None], size(self._input), 0.0)
            d_input: Floats = np.zeros(self._input_shape)
            kept = d_input[..., : d_input.shape[-2] - self._shift, :] if self._shift else d_input
            kept[...] = (scale * (dx @ weight)).reshape(kept.shape)
            d_weight = (scale * (dx.T @ read)).reshape(self._weight_shape)
            d_scale = np.where(dx == 0.0, 0.0, dx * size(self._product)).sum()
        d_bias: Floats = np.asarray(dx.sum(axis=0))
        if self._bias_shape is not None:
            d_bias = d_bias.reshape(self._bias_shape)
        return {
            "input": d_input,
            "linear_weight": d_weight,
            "linear_bias": d_bias,
            "logit_scale": np.asarray(d_scale),
        }


def log_softmax(z: Floats, where: NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
    """Log-probabilities and log-sum-exp over the last axis, over the classes of `where` only.

    The largest class is kept out of the sum and put back by ``log1p``: its log-probability then
    has full relative accuracy however peaked the row is (``z - lse`` gives exactly 0 from a
    margin of 37 nats in float64). Classes outside `where` get −inf, as do rows without a class.
    """
    inside = np.ones(z.shape, bool) if where is None else where
    with np.errstate(all="ignore"):
        masked = np.where(inside, z, -np.inf)
        top = masked.max(axis=-1, keepdims=True) if z.shape[-1] else np.full((len(z), 1), -np.inf)
        at_top = np.arange(z.shape[-1]) == masked.argmax(axis=-1)[:, None]
        relative = masked - top
        others = np.where(at_top, 0.0, np.exp(relative)).sum(axis=-1, keepdims=True)
        extra = np.log1p(others)
        lse = top + extra
        log_p = np.where(at_top, -extra, relative - extra)
    log_p = np.where(np.isneginf(masked), -np.inf, log_p)
    infinite = np.isposinf(top)
    lse = np.where(infinite, np.inf, np.where(np.isneginf(top), -np.inf, lse))
    log_p = np.where(infinite & inside, np.nan, log_p)
    return log_p, lse[:, 0]


def plogp(log_p: Floats) -> Floats:
    """``p · log p`` from ``log p``, with its limit 0 at p = 0."""
    with np.errstate(all="ignore"):
        return np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * log_p)
