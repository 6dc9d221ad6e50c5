"""A small call: ``pytest -s bench/test_small_call.py``.

At N=64, D=64, V=1000 a forward may spend 60 us in Python, outside the compiled engine.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("torch")

from logitless.cli.harness.cases import MODES, Mode, problem
from logitless.cli.harness.contenders import CONTENDERS
from logitless.cli.harness.overhead import SMALL, python_seconds

LIMIT = 60e-6


def test_python_in_a_forward() -> None:
    typical = python_seconds(mode="forward")
    print(f"\nPython in a forward: {typical * 1e6:.1f} us")
    assert typical <= LIMIT


@pytest.mark.parametrize("name", ["eager", "lean"])
@pytest.mark.parametrize("mode", MODES[:2])
def test_small_call(benchmark, mode: Mode, name: str) -> None:
    benchmark.group = f"{SMALL.label}, {mode}"
    benchmark(CONTENDERS[name].step(problem(SMALL), mode))
