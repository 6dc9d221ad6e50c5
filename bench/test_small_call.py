"""Python's share of a small call: ``pytest bench/test_small_call.py``.

At N=64, D=64, V=1000 a forward may spend 60 us outside the compiled engine. The share is what is
left of a call after the time inside the engine's own functions, which are wrapped with a clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("torch")

import torch

from logitless import _core
from logitless import functional as LF

LIMIT = 60e-6
ENGINE = ("forward", "backward", "cross_entropy_forward", "cross_entropy_backward")


class Clock:
    """Adds up the seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.total = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.total += time.perf_counter() - begin

        return timed


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for name in ENGINE:
        if hasattr(_core, name):
            monkeypatch.setattr(_core, name, clock.wrap(getattr(_core, name)))
    return clock


def inputs() -> tuple[Any, Any, Any]:
    hidden = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(1000, 64, requires_grad=True)
    return hidden, weight, torch.randint(1000, (64,))


def test_forward_overhead(engine: Clock) -> None:
    hidden, weight, target = inputs()
    outside = []
    for _ in range(2000):
        engine.total = 0.0
        begin = time.perf_counter()
        LF.linear_cross_entropy(hidden, weight, target)
        outside.append(time.perf_counter() - begin - engine.total)
    typical = statistics.median(outside)
    print(f"Python in a forward: {typical * 1e6:.1f} us")
    assert typical <= LIMIT


def test_forward(benchmark) -> None:
    benchmark(LF.linear_cross_entropy, *inputs())


def test_forward_backward(benchmark) -> None:
    hidden, weight, target = inputs()

    def step() -> Any:
        loss = LF.linear_cross_entropy(hidden, weight, target)
        return torch.autograd.grad(loss, (hidden, weight))

    benchmark(step)


def test_eager_forward_backward(benchmark) -> None:
    hidden, weight, target = inputs()

    def step() -> Any:
        loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
        return torch.autograd.grad(loss, (hidden, weight))

    benchmark(step)
