"""pytest-benchmark suite over the harness's CPU shapes: ``pytest bench/test_heads.py``.

One group a shape and kind of work, one entry a contender; compare within a group. For the ratios of
the tables in RESULTS.md use ``logitless bench``, which interleaves the contenders.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("torch")

from logitless.cli.harness.cases import MODES, PRESETS, Case, Mode, problem
from logitless.cli.harness.contenders import CONTENDERS


@pytest.mark.parametrize("name", ["eager", "compile", "chunked", "lean", "fast", "products"])
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("case", PRESETS["cpu"], ids=lambda case: case.label.replace(" ", ""))
def test_head(benchmark, case: Case, mode: Mode, name: str) -> None:
    contender = CONTENDERS[name]
    reason = contender.unavailable(case)
    if reason:
        pytest.skip(reason)
    if name == "chunked" and case.dtype == "bf16":
        pytest.skip("minutes a call on a CPU")
    benchmark.group = f"{case.label}, {mode}"
    step = contender.step(problem(case), mode)
    benchmark.pedantic(step, warmup_rounds=1, rounds=5)
