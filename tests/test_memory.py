"""Memory: what the plan says, what the engine allocates, what the process grows by."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import logitless
import logitless.numpy as ln
from logitless import _core, stats, testing

CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
SPEC = ("rest", "target")
MIB = 2**20


def plan(
    rows: int, features: int, classes: int, dtype: str, memory: int, gradients: int = 3
) -> Any:
    spec = _core.Spec(SPEC, targets=1)
    return _core.plan(spec, rows, features, classes, CODES[dtype], memory, gradients)


# The plan -----------------------------------------------------------------------------------------

SHAPES = [(1024, 512, 32768), (2048, 1024, 16384), (1024, 512, 50257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.05), ("bfloat16", 0.09)])
def test_lean_workspace_is_a_small_share_of_eagers(
    shape: tuple[int, int, int], dtype: str, share: float
) -> None:
    """Eager torch holds the logits and two gradients of their size."""
    rows, features, classes = shape
    eager = 3 * rows * classes * (4 if dtype == "float32" else 2)
    found = plan(rows, features, classes, dtype, -1)
    assert found.store_bytes == 0
    allowed = share * eager
    assert found.workspace_bytes <= allowed, f"{found.workspace_bytes / eager:.1%} of eager's"


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("budget", [0, 1, 10**5, 10**7, 10**9])
def test_the_store_keeps_to_its_budget(dtype: str, budget: int) -> None:
    found = plan(512, 64, 20_000, dtype, budget)
    assert found.store_bytes <= budget
    acc = 8 if dtype == "float64" else 4
    assert found.store_bytes <= plan(512, 64, 20_000, dtype, -2).store_bytes <= 513 * 20_096 * acc


def test_a_forward_alone_stores_nothing_and_needs_less() -> None:
    alone = plan(512, 64, 20_000, "float32", -2, gradients=0)
    assert alone.store_bytes == 0
    assert alone.forward_bytes <= plan(512, 64, 20_000, "float32", -1).workspace_bytes


def test_lean_workspace_hardly_grows_with_the_classes() -> None:
    small, large = (plan(1024, 256, classes, "float32", -1) for classes in (2**16, 2**20))
    assert large.workspace_bytes <= small.workspace_bytes + 2**20 * 64


def test_plans_are_values() -> None:
    import pickle

    found = plan(100, 16, 1000, "float32", -1)
    assert found == plan(100, 16, 1000, "float32", -1)
    assert found != plan(101, 16, 5000, "float32", -2)
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.workspace_bytes == found.store_bytes + max(
        found.forward_bytes, found.backward_bytes
    )
    assert all(value >= 0 for value in found.parts.values())
    assert str(found.forward_bytes) in repr(found) or "Plan" in repr(found)


# The engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (100, 33, 1000), (600, 64, 3000)])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_the_engine_allocates_what_the_plan_says(
    size: tuple[int, int, int], dtype: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = testing.make_case(*size, dtype=dtype)
    vectors = np.ones((2, size[2]))
    threads = logitless.get_num_threads()
    plans: list[Any] = []
    original = _core.plan

    def recorded(*arguments: Any, **options: Any) -> Any:
        plans.append(original(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(_core, "plan", recorded)
    for want in (SPEC, ("lse", "entropy", "variance", stats.weighted(vectors), stats.topk(1))):
        fields, vjp = ln.row_statistics(
            case.input, case.linear_weight, case.target, want=want, memory=memory
        )
        slack = threads * plans[-1].threads_bytes
        assert _core.last_workspace_bytes() <= plans[-1].forward_bytes + slack
        vjp(**{name: 1.0 for name in fields if getattr(fields, name).dtype != np.int64})
        assert _core.last_workspace_bytes() <= plans[-1].backward_bytes + slack


# The process --------------------------------------------------------------------------------------

PROBE = """
import json, os, sys
import numpy as np
import logitless, logitless.numpy as ln
from logitless import _core, testing

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

rows, features, classes, dtype, memory, call = json.loads(sys.argv[1])
logitless.set_num_threads(2)
rng = np.random.default_rng(0)
input = rng.standard_normal((rows, features), dtype=np.float32).astype(dtype)
weight = rng.standard_normal((classes, features), dtype=np.float32).astype(dtype)
target = rng.integers(0, classes, rows)
warm = testing.make_case(8, 8, 64, dtype=dtype)
ln.linear_cross_entropy(warm.input, warm.linear_weight, warm.target, memory=memory)
plans, original = [], _core.plan
def recorded(*arguments):
    plans.append(original(*arguments))
    return plans[-1]
_core.plan = recorded
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark of resident memory starts again from here
before = status("VmRSS")
if call == "loss":
    result = ln.linear_cross_entropy(input, weight, target, memory=memory)
    kept = sum(gradient.nbytes for gradient in result[1:3])
elif call == "forward":
    result = ln.linear_cross_entropy(input, weight, target, memory=memory, gradients=())
    kept = 0
else:
    result = ln.logsumexp(weight, 0 if call == "columns" else 1)
    kept = result.nbytes
grown = status("VmHWM") - before
planned = max((plan.workspace_bytes + 2 * plan.threads_bytes for plan in plans), default=0)
print(json.dumps({"grown": grown, "kept": kept, "planned": planned}))
"""


def probe(*arguments: Any) -> dict[str, int]:
    import json

    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system cannot reset the high-water mark of resident memory")
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.memory
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("memory", ["lean", "fast"])
def test_the_process_grows_by_the_plan(dtype: str, memory: str) -> None:
    rows, features, classes = 1024, 64, 40_000
    found = probe(rows, features, classes, dtype, memory, "loss")
    vectors = 64 * rows * 8
    assert found["grown"] <= found["kept"] + found["planned"] + vectors + 6 * MIB, found
    if memory == "lean":
        logits = rows * classes * (8 if dtype == "float64" else 4)
        assert found["grown"] - found["kept"] < logits / 4, found


@pytest.mark.memory
def test_a_forward_grows_by_its_workspace_only() -> None:
    found = probe(1024, 64, 100_000, "float32", "lean", "forward")
    assert found["grown"] <= found["planned"] + 6 * MIB, found


@pytest.mark.memory
@pytest.mark.parametrize("call", ["rows", "columns"])
def test_logsumexp_makes_no_temporary(call: str) -> None:
    found = probe(1, 1000, 60_000, "float32", "lean", call)
    assert found["grown"] <= found["kept"] * 6 + 6 * MIB, found
