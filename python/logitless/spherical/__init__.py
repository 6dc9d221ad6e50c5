"""Losses that never visit the classes: the spherical family in O(D²) a row.

Two routes. *Gram* (:mod:`logitless.spherical.statistics`) works on an ordinary parameter with any
optimiser and is what ``logitless.losses.zloss`` and its family choose by themselves. *Factored*
(:class:`logitless.nn.SphericalHead`) keeps the weight in two factors and updates it in O(D²) too.
"""

from logitless.spherical.accumulate import Accumulator, accumulate
from logitless.spherical.gram import invalidate
from logitless.spherical.plan import Plan, plan

__all__ = ["Accumulator", "Plan", "accumulate", "invalidate", "plan"]
