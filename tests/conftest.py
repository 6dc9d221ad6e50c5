"""Options, seeds and skips shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

# The references multiply many small matrices, for which the threads of NumPy's BLAS cost more than
# they bring; and they would spin against the engine's own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from logitless import _core

# Examples are derived from the test's name, so that a run repeats; `deep` searches at random.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

HAS_BFLOAT16 = find_spec("ml_dtypes") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked gpu where there is no CUDA device, instead of skipping them",
    )


def has_gpu() -> bool:
    """Whether the compiled engine and a device for it are there."""
    available = getattr(_core, "cuda_available", None)
    return available is not None and bool(available())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or has_gpu() or config.getoption("--require-gpu"):
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and item.config.getoption("--require-gpu") and not has_gpu():
        pytest.fail("--require-gpu was given and no CUDA device was found", pytrace=False)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same state of the global generators."""
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(
    params=[
        "float32",
        "float64",
        "float16",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="ml_dtypes is not installed"),
        ),
    ]
)
def dtype(request: pytest.FixtureRequest) -> str:
    """Every dtype that NumPy callers can hold."""
    return str(request.param)


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], Any]], int]:
    """Bytes of torch's CUDA allocator that a call needs above what was there, its result too."""

    def peak_bytes(run: Callable[[], Any]) -> int:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return int(peak)

    return peak_bytes


@pytest.fixture
def capture() -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Capture a step as a CUDA graph, after one on a stream of its own: the graph, its results."""

    def capture(step: Callable[[], Any]) -> tuple[Any, Any]:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        return graph, captured

    return capture
