"""Python's share of a small call: what a call takes beyond the time inside the compiled engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logitless import _core
from logitless.cli.harness.cases import Case, Mode, problem
from logitless.cli.harness.contenders import CONTENDERS

SMALL = Case(64, 64, 1000)
ENGINE = ("forward", "backward", "cross_entropy_forward", "cross_entropy_backward")


class Clock:
    """Adds up the seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.total = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its time added to `total`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.total += time.perf_counter() - begin

        return timed


@contextmanager
def watched_engine() -> Iterator[Clock]:
    """Put a clock around every entry point of the engine for the duration of a block."""
    clock = Clock()
    originals = {name: getattr(_core, name) for name in ENGINE if hasattr(_core, name)}
    try:
        for name, function in originals.items():
            setattr(_core, name, clock.wrap(function))
        yield clock
    finally:
        for name, function in originals.items():
            setattr(_core, name, function)


def python_seconds(case: Case = SMALL, mode: Mode = "forward", calls: int = 2000) -> float:
    """Median seconds that a call spends outside the engine."""
    step = CONTENDERS["lean"].step(problem(case), mode)
    outside = []
    with watched_engine() as clock:
        for _ in range(calls):
            clock.total = 0.0
            begin = time.perf_counter()
            step()
            outside.append(time.perf_counter() - begin - clock.total)
    return statistics.median(outside)
