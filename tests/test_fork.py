"""A child of a process that has used the engine can use it too."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading

import numpy as np
import pytest

import logitless
import logitless.numpy as ln
from logitless import LogSumExp, testing

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork"),
    # Python 3.12 and later warn about forking with threads: being right then is what is tested.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
TIMEOUT = 60


def fingerprint(threads: int = 3) -> bytes:
    logitless.set_num_threads(threads)
    case = testing.make_case(200, 24, 2000)
    found = ln.linear_cross_entropy(case.input, case.linear_weight, case.target)
    assert found.input is not None
    assert found.linear_weight is not None
    parts = (found.loss, found.input, found.linear_weight, ln.logsumexp(case.linear_weight, 0))
    return b"".join(part.tobytes() for part in parts)


def in_child() -> bytes:
    """`fingerprint` computed in a forked child; fails, instead of hanging, if the child does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(TIMEOUT)
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(fingerprint(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    return bytes(pickle.loads(data))


def test_fork_before_and_after_use() -> None:
    expected = fingerprint()
    assert in_child() == expected
    assert fingerprint() == expected
    assert in_child() == expected


def test_fork_while_other_threads_compute() -> None:
    """Locks that other threads hold at the fork must not be waited for in the child."""
    expected = fingerprint()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            fingerprint()

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for _ in range(5):
            assert in_child() == expected
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert fingerprint() == expected


def test_children_of_children() -> None:
    expected = fingerprint()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(TIMEOUT)
            same = fingerprint() == expected and in_child() == expected
            os.write(writer, b"1" if same else b"0")
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"1"
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method: str) -> None:
    if method != "fork" and not getattr(sys.modules["__main__"], "__file__", None):
        pytest.skip("spawned children need a main module")
    total = LogSumExp(axis=1).update(np.arange(12.0).reshape(3, 4))
    expected = total.value()
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        values = pool.map_async(LogSumExp.value, [total, total]).get(TIMEOUT)
    for value in values:
        np.testing.assert_array_equal(value, expected)
