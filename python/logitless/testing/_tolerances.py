"""What may be asked of each dtype, in one table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from logitless.testing._dense import as_float64


class Tolerance(NamedTuple):
    """``|actual − expected| ≤ rtol·|expected| + atol·scale`` for every element.

    The scale is the natural size of the quantity (see :func:`assert_close`), so that one number
    serves small and large heads alike.
    """

    rtol: float
    atol: float


# Unit roundoffs: fp32 2⁻²⁴ = 6e-8, bf16 2⁻⁹ = 2e-3, fp16 2⁻¹² = 2.4e-4 (half an ulp, relative).
# Statistics are accumulated in fp32 for the half types, so they share fp32's row; a gradient that
# is returned in a half type is rounded to it, and its dz may be rounded once before the product.
TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "float64": {
        "logit": Tolerance(1e-13, 1e-14),
        "sum": Tolerance(1e-13, 1e-13),
        "log_sum": Tolerance(1e-13, 1e-13),
        "entropy": Tolerance(1e-12, 1e-13),
        "loss": Tolerance(1e-13, 1e-13),
        "gradient": Tolerance(1e-12, 1e-13),
    },
    "float32": {
        "logit": Tolerance(1e-6, 1e-6),
        "sum": Tolerance(1e-5, 2e-6),
        "log_sum": Tolerance(1e-6, 2e-6),
        "entropy": Tolerance(2e-5, 2e-6),
        "loss": Tolerance(2e-6, 2e-6),
        "gradient": Tolerance(1e-5, 2e-6),
    },
    "bfloat16": {
        "logit": Tolerance(1e-6, 1e-6),
        "sum": Tolerance(1e-5, 2e-6),
        "log_sum": Tolerance(1e-6, 2e-6),
        "entropy": Tolerance(2e-5, 2e-6),
        "loss": Tolerance(2e-6, 2e-6),
        "gradient": Tolerance(1e-2, 4e-3),
    },
    "float16": {
        "logit": Tolerance(1e-6, 1e-6),
        "sum": Tolerance(1e-5, 2e-6),
        "log_sum": Tolerance(1e-6, 2e-6),
        "entropy": Tolerance(2e-5, 2e-6),
        "loss": Tolerance(2e-6, 2e-6),
        "gradient": Tolerance(1.5e-3, 5e-4),
    },
}
"""dtype name to quantity to :class:`Tolerance`."""

# What rounds to zero: the smallest normal number of the accumulation, and for gradients of float16
# the spacing of its subnormal numbers.
SMALLEST = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-24,
}

QUANTITY_OF_FIELD: dict[str, str] = {
    "rest": "log_sum",
    "target": "logit",
    "rest_entropy": "entropy",
    "sum": "sum",
    "sum_sq": "sum",
    "mean": "logit",
    "variance": "sum",
    "max": "logit",
    "rest_power": "log_sum",
    "weighted_sum": "sum",
    "weighted_rest": "sum",
    "dot": "sum",
    "topk_values": "logit",
    "lse": "log_sum",
    "log_prob": "log_sum",
    "entropy": "entropy",
    "mean_logit": "logit",
    "power_lse": "log_sum",
    "weighted_mean": "sum",
}
"""The row of the table that a statistic's field belongs to."""


def tolerance(dtype: Any, quantity: str) -> Tolerance:
    """Look a tolerance up; `quantity` is a column of the table or the name of a field.

    >>> tolerance("float32", "rest") == TOLERANCES["float32"]["log_sum"]
    True
    """
    return TOLERANCES[dtype_name(dtype)][QUANTITY_OF_FIELD.get(quantity, quantity)]


def dtype_name(dtype: Any) -> str:
    """Name of a NumPy, ml_dtypes or torch dtype, or of an array that has one.

    >>> dtype_name(np.float32), dtype_name(np.ones(1))
    ('float32', 'float64')
    """
    dtype = getattr(dtype, "dtype", dtype) if not isinstance(dtype, type) else dtype
    name = str(dtype)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    return name if name in TOLERANCES else np.dtype(dtype).name


def assert_close(
    actual: Any,
    expected: Any,
    quantity: str,
    dtype: Any,
    *,
    scale: float | None = None,
    factor: float = 1.0,
    label: str = "",
) -> None:
    """Assert that `actual` is `expected` to what `dtype` can hold of `quantity`.

    Parameters
    ----------
    actual, expected : arrays or torch tensors of one shape
        nan and infinities must stand in the same places.
    quantity : str
        A column of :data:`TOLERANCES` or the name of a statistic's field.
    dtype : dtype of the inputs (not of the statistic)
    scale : float, optional
        Natural size of the quantity: what ``atol`` is multiplied with. Default: the largest finite
        magnitude of `expected`, and at least 1 for anything but gradients.
    factor : float
        Widens both tolerances, for inputs that are harder than ordinary ones; say why at the call.
    label : str
        Named in the message.
    """
    got, want = as_float64(actual), as_float64(expected)
    where = f" of {label}" if label else ""
    if got.shape != want.shape:
        raise AssertionError(f"{quantity}{where}: shape {got.shape}, expected {want.shape}")
    rtol, atol = tolerance(dtype, quantity)
    finite = np.isfinite(want)
    largest = float(np.abs(want[finite]).max()) if finite.any() else 0.0
    if scale is None:
        scale = largest if quantity == "gradient" else max(1.0, largest)
    with np.errstate(all="ignore"):
        error = np.abs(got - want)
        allowed = factor * (rtol * np.abs(want) + atol * scale) + SMALLEST[dtype_name(dtype)]
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        bad = ~same & ~(finite & (error <= allowed))
    if not bad.any():
        return
    ratio = np.where(bad & finite & np.isfinite(error), error / np.maximum(allowed, 1e-300), np.inf)
    worst = np.unravel_index(int(np.where(bad, ratio, -1.0).argmax()), got.shape)
    raise AssertionError(
        f"{quantity}{where} in {dtype_name(dtype)}: {int(bad.sum())} of {got.size} elements are "
        f"off; the worst at {tuple(int(i) for i in worst)} is {got[worst]!r}, expected "
        f"{want[worst]!r}, error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )
