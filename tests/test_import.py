"""`import logitless`: cheap, quiet, and complete."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import pytest

import logitless

BUDGET_SECONDS = 0.150


def run(code: str) -> dict[str, object]:
    """Run `code`, which assigns `report`, in a fresh interpreter."""
    script = f"{code}\nimport json; print(json.dumps(report))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_takes_little_longer_than_numpy() -> None:
    code = """
import time, numpy
start = time.perf_counter()
import logitless
report = {"seconds": time.perf_counter() - start}
"""
    seconds = [run(code)["seconds"] for _ in range(5)]
    assert statistics.median(seconds) <= BUDGET_SECONDS


def test_import_loads_no_framework_and_starts_no_thread() -> None:
    code = """
import os, sys
before = len(os.listdir("/proc/self/task"))
import logitless
report = {
    "frameworks": sorted({"torch", "cupy", "numpy", "typer", "rich"} & {*sys.modules}),
    "threads": len(os.listdir("/proc/self/task")) - before,
    "driver": "libcuda" in open("/proc/self/maps").read(),
}
"""
    assert run(code) == {"frameworks": [], "threads": 0, "driver": False}


def test_numpy_face_needs_no_torch() -> None:
    code = """
import sys
import logitless.numpy
report = {"torch": "torch" in sys.modules}
"""
    assert run(code) == {"torch": False}


def test_every_public_name_is_listed_and_loads() -> None:
    pytest.importorskip("torch")
    assert {*logitless.__all__} <= {*dir(logitless)}
    for name in logitless.__all__:
        assert getattr(logitless, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'logits'"):
        logitless.logits  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    try:
        installed = version("logitless")
    except PackageNotFoundError:
        pytest.skip("logitless is not installed")
    assert logitless.__version__ == installed


def test_types_are_shipped() -> None:
    shipped = {entry.name for entry in files(logitless).iterdir()}
    assert {"py.typed", "_core.pyi"} <= shipped
