"""Same bits for any number of threads, from run to run, and from many callers at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import logitless
import logitless.numpy as ln
from logitless import stats, testing


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = logitless.get_num_threads()
    yield
    logitless.set_num_threads(before)


def fingerprint(size: tuple[int, int, int], dtype: str, memory: str = "lean") -> list[bytes]:
    """Bits of a loss, its gradients, and of every statistic with its gradients."""
    case = testing.make_case(*size, dtype=dtype)
    arguments = (case.input, case.linear_weight, case.target)
    found = ln.linear_cross_entropy(
        *arguments, linear_bias=case.linear_bias, memory=memory, label_smoothing=0.1
    )
    vectors = np.linspace(-1, 1, size[2])
    want = ("lse", "entropy", "variance", "sum_sq", "max", stats.topk(1), stats.weighted(vectors))
    fields, vjp = ln.row_statistics(
        *arguments, want=want, memory=memory, gradients=("input", "linear_weight", "logit_scale")
    )
    gradients = vjp(lse=1.0, entropy=0.5, variance=-0.1, max=2.0, weighted_mean=1.5)
    arrays: list[Any] = [*found, *(getattr(fields, name) for name in fields), *gradients[:2]]
    return [array.tobytes() for array in [*arrays, gradients.logit_scale]]


SIZES = [(1, 7, 1000), (65, 33, 259), (200, 48, 3000), (700, 16, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_bits_do_not_depend_on_threads_or_runs(
    size: tuple[int, int, int], dtype: str, memory: str
) -> None:
    logitless.set_num_threads(1)
    expected = fingerprint(size, dtype, memory)
    for threads in (1, 2, 3, 5, 8):
        logitless.set_num_threads(threads)
        assert logitless.get_num_threads() == threads
        assert fingerprint(size, dtype, memory) == expected, f"{threads} threads"


def test_logsumexp_bits_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.standard_normal((3, 200_000)), rng.standard_normal((5000, 40))
    for array, axis in ((rows, 1), (rows, 0), (columns, 0), (columns, None)):
        values = set()
        for threads in (1, 2, 5):
            logitless.set_num_threads(threads)
            values.add(ln.logsumexp(array.astype(np.float32), axis).tobytes())
        assert len(values) == 1


def test_many_callers_at_once() -> None:
    """Python threads share the pool; each gets its own result."""
    sizes = SIZES[1:3]
    logitless.set_num_threads(3)
    expected = [fingerprint(size, "float32") for size in sizes]
    barrier = threading.Barrier(6)

    def work(caller: int) -> bool:
        barrier.wait()
        same = True
        for repeat in range(5):
            which = (caller + repeat) % len(sizes)
            same &= fingerprint(sizes[which], "float32") == expected[which]
        return same

    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(work, range(6)))


def test_the_number_of_threads_may_change_while_others_compute() -> None:
    expected = fingerprint(SIZES[1], "float32")
    stop = threading.Event()

    def change() -> None:
        threads = 1
        while not stop.is_set():
            threads = threads % 4 + 1
            logitless.set_num_threads(threads)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(20):
            assert fingerprint(SIZES[1], "float32") == expected
    finally:
        stop.set()
        changer.join()


def test_the_interpreter_runs_on_while_the_engine_computes() -> None:
    case = testing.make_case(512, 64, 20_000)
    counted = 0
    done = threading.Event()

    def count() -> None:
        nonlocal counted
        while not done.is_set():
            counted += 1
            done.wait(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    before = counted
    ln.linear_cross_entropy(case.input, case.linear_weight, case.target)
    after = counted
    done.set()
    counter.join()
    assert after > before


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_numbers_of_threads(threads: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        logitless.set_num_threads(threads)
