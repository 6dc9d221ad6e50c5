"""Dense float64 references, tolerances and input makers for testing losses on softmax heads.

Everything here is written for clarity and digits, not for speed or memory: the logits are made as
one float64 array, every quantity follows from its textbook definition, and every gradient is the
closed form of that definition. NumPy alone is needed; torch tensors are accepted as inputs.

>>> from logitless import testing
>>> case = testing.make_case(rows=5, features=3, classes=7, seed=0)
>>> reference = testing.linear_cross_entropy(case.input, case.linear_weight, case.target)
>>> sorted(reference.gradients)
['input', 'linear_bias', 'linear_weight', 'logit_scale', 'target']

The parts: :func:`row_statistics` (value and vector-Jacobian product of every row statistic, primary
and derived), :func:`linear_cross_entropy` (with every option), :data:`TOLERANCES` and
:func:`assert_close` (what may be expected of each dtype), :func:`make_case` and :func:`layouts`
(inputs of every dtype and memory layout).
"""

from __future__ import annotations

from logitless.testing._dense import DenseHead, as_float64
from logitless.testing._fields import FIELDS, Field, row_statistics
from logitless.testing._inputs import Case, layouts, make_case, to_dtype
from logitless.testing._losses import Reference, linear_cross_entropy
from logitless.testing._tolerances import TOLERANCES, Tolerance, assert_close, tolerance

__all__ = [
    "FIELDS",
    "TOLERANCES",
    "Case",
    "DenseHead",
    "Field",
    "Reference",
    "Tolerance",
    "as_float64",
    "assert_close",
    "layouts",
    "linear_cross_entropy",
    "make_case",
    "row_statistics",
    "to_dtype",
    "tolerance",
]
