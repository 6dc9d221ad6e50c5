"""Every statistic of the compiled registry against its dense float64 twin: the one parity test.

The registry is walked by name, alone and all together, forward and backward, for each dtype, with
and without logit maps, with no, one and several ids a row, on sizes around the tile edges. One test
repeats this, and the equality of bits over threads, at every instruction level of the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitless import _core, stats, testing

DTYPES = ("float32", "float64", "bfloat16", "float16")
CODES = {name: code for code, name in enumerate(("float32", "float64", "bfloat16", "float16"))}
POWERS = (2.0, 0.5)
VECTORS = 2

# N, D, V: single elements, tails of every tile (32 rows, 14 and 16 lanes, 128 classes, 256 of K).
SIZES = ((1, 1, 1), (5, 3, 2), (33, 17, 131), (70, 64, 257), (2, 300, 513))
MAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mapped": {"bias": True, "logit_scale": 0.7, "softcap": 3.0},
}


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to `dtype` and hold the values in float64 (bfloat16 needs no package here)."""
    if dtype == "bfloat16":
        bits = array.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return array.astype(dtype).astype(np.float64)


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """Encode an array that `rounded` made in memory as the engine reads it."""
    if dtype == "bfloat16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(dtype)


def loaded(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def handle(array: np.ndarray, code: int) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return array.ctypes.data, code, array.shape, strides


@dataclass
class Call:
    """One problem, run through the engine and through the reference."""

    names: tuple[str, ...]
    dtype: str
    size: tuple[int, int, int]
    targets: int
    bias: bool = False
    logit_scale: float = 1.0
    softcap: float = 0.0
    memory: int = -1
    threads: int = 0
    seed: int = 0
    keep: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        rows, features, classes = self.size
        self.acc = np.float64 if self.dtype == "float64" else np.float32
        self.acc_code = CODES["float64" if self.dtype == "float64" else "float32"]
        spread = 2.0 / np.sqrt(features)
        self.input = rounded(rng.standard_normal((rows, features)), self.dtype)
        self.weight = rounded(rng.standard_normal((classes, features)) * spread, self.dtype)
        self.b = rounded(rng.standard_normal(classes), self.dtype) if self.bias else None
        self.ids = None
        if self.targets:
            self.ids = rng.integers(0, classes, (rows, self.targets))
            self.ids[rng.random(self.ids.shape) < 0.25] = -100
            self.ids = np.ascontiguousarray(self.ids, np.int64)
        self.vectors = np.ascontiguousarray(rng.standard_normal((VECTORS, classes)), self.acc)
        self.vectors[0, 0] = 0.0
        self.q = rounded(rng.standard_normal((rows, classes)), self.dtype)
        self.topk = min(4, classes)
        needs_vectors = {"weighted_sum", "weighted_rest"} & set(self.names)
        self.spec = _core.Spec(
            self.names,
            powers=POWERS if "rest_power" in self.names else (),
            vectors=VECTORS if needs_vectors else 0,
            topk=self.topk if "topk" in self.names else 0,
            targets=self.targets,
        )
        self.plan = _core.plan(
            self.spec, rows, features, classes, CODES[self.dtype], self.memory, 31
        )
        code = CODES[self.dtype]
        arrays = {
            "input": stored(self.input[None], self.dtype),
            "weight": stored(self.weight, self.dtype),
            "q": stored(self.q, self.dtype),
        }
        if self.b is not None:
            arrays["bias"] = stored(self.b, self.dtype)
        self.keep.update(arrays)
        self.problem = (
            handle(arrays["input"], code),
            handle(arrays["weight"], code),
            handle(arrays["bias"], code) if self.b is not None else None,
            None if self.ids is None else handle(self.ids, 4),
            -100,
            self.logit_scale,
            self.softcap,
            handle(self.vectors, self.acc_code) if needs_vectors else None,
            handle(arrays["q"], code) if "dot" in self.names else None,
        )

    def forward(self) -> dict[str, np.ndarray]:
        rows = self.size[0]
        outputs = {
            name: np.full(
                (rows, columns) if columns else (rows,), 77, np.int64 if integer else self.acc
            )
            for name, columns, integer in self.spec.fields
        }
        store = np.empty(self.plan.store_bytes, np.uint8) if self.plan.store_bytes else None
        self.keep.update(outputs=outputs, store=store)
        _core.forward(
            self.spec,
            *self.problem,
            self._handles(outputs),
            None if store is None else handle(store, 5),
            self.plan,
            self.threads,
        )
        return outputs

    def _handles(self, arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
        return tuple(
            handle(array, 4 if array.dtype == np.int64 else self.acc_code)
            for array in arrays.values()
        )

    def backward(self, cotangents: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows, features, classes = self.size
        code, store = CODES[self.dtype], self.keep["store"]
        raw = np.uint16 if self.dtype == "bfloat16" else self.dtype
        found: dict[str, np.ndarray] = {
            "input": np.full((1, rows, features), 77, raw),
            "linear_weight": np.full((classes, features), 77, raw),
            "linear_bias": np.full(classes, 77, raw),
            "logit_scale": np.full(1, 77, self.acc),
            "dense": np.full((rows, classes), 77, raw),
        }
        self.cotangents = {
            name: np.ascontiguousarray(g, self.acc) for name, g in cotangents.items()
        }
        _core.backward(
            self.spec,
            *self.problem,
            self._handles(self.keep["outputs"]),
            tuple(
                handle(self.cotangents[name], self.acc_code) if name in cotangents else None
                for name, _, _ in self.spec.fields
            ),
            None if store is None else handle(store, 5),
            handle(found["input"], code),
            handle(found["linear_weight"], code),
            handle(found["linear_bias"], code) if self.b is not None else None,
            handle(found["logit_scale"], self.acc_code),
            handle(found["dense"], code) if "dot" in self.names else None,
            False,
            self.plan,
            self.threads,
        )
        found["input"] = found["input"][0]
        scale = found.pop("logit_scale")
        decoded = {name: loaded(array, self.dtype) for name, array in found.items()}
        return {**decoded, "logit_scale": scale[0]}

    def reference(self) -> tuple[dict[str, np.ndarray], Any]:
        return testing.row_statistics(
            self.input,
            self.weight,
            self.ids,
            fields=[name for name, _, _ in self.spec.fields],
            linear_bias=self.b,
            ignore_index=-100,
            logit_scale=self.logit_scale,
            softcap=self.softcap or None,
            powers=POWERS,
            vectors=self.vectors,
            dense=self.q,
            topk=self.topk,
        )

    def magnitude(self) -> float:
        """Size of the terms that a logit is summed from, which rounding is relative to."""
        largest = float((np.abs(self.input) @ np.abs(self.weight).T).max())
        return max(1.0, abs(self.logit_scale) * largest)


def check(call: Call) -> None:
    """Compare every output and every gradient with the reference."""
    label = f"{'+'.join(call.names)} {call.size} K={call.targets}"
    found = call.forward()
    expected, vjp = call.reference()
    classes, magnitude = call.size[2], call.magnitude()
    terms = {"sum": classes, "sum_sq": classes * magnitude, "weighted_sum": classes, "dot": classes}
    for name, value in found.items():
        if value.dtype == np.int64:
            if call.dtype == "float64":
                np.testing.assert_array_equal(value, expected[name], err_msg=label)
            continue
        scale = magnitude * terms.get(name, 1.0)
        if name == "variance":
            scale = magnitude**2
        testing.assert_close(value, expected[name], name, call.dtype, scale=scale, label=label)

    rng = np.random.default_rng(1)
    floats = [name for name, _, integer in call.spec.fields if not integer]
    if call.dtype != "float64":
        # Near ties fall either way in less than float64: their gradients are checked there.
        floats = [name for name in floats if name not in ("max", "topk_values")]
    for names in [[name] for name in floats] + ([floats] if len(floats) > 1 else []):
        cotangents = {name: rng.standard_normal(found[name].shape) for name in names}
        for g in cotangents.values():
            g[:: max(2, len(g) // 3)] = 0.0  # rows without a cotangent are skipped
        cotangents = {name: g.astype(np.float32) for name, g in cotangents.items()}
        gradients, expected_gradients = call.backward(cotangents), vjp(**cotangents)
        sizes = vjp(magnitudes=True, **cotangents)
        # Parts of one dz may cancel: each is of the size of g/V.
        part = max(float(np.abs(g).max(initial=0.0)) for g in cotangents.values()) / classes
        for argument, gradient in gradients.items():
            absent = {"linear_bias": call.b is None, "dense": "dot" not in names}
            if absent.get(argument):
                continue
            scale = max(part, float(np.abs(sizes[argument]).max()))
            testing.assert_close(
                gradient,
                expected_gradients[argument].reshape(np.shape(gradient)),
                # The gradient of the scale is accumulated and returned in fp32 at least.
                "sum" if argument == "logit_scale" else "gradient",
                call.dtype,
                scale=scale,
                label=f"d {argument} of {'+'.join(names)}, {label}",
            )


def test_the_registry_is_the_one_that_python_knows() -> None:
    assert len(stats.CORE_ORDER) == 12
    spec = _core.Spec(stats.CORE_ORDER, powers=(2.0,), vectors=3, topk=5, targets=2)
    assert spec.fields == stats.core_fields(stats.CORE_ORDER, (2.0,), 3, 5, 2)
    assert all(name in testing.FIELDS for name, _, _ in spec.fields)
    shuffled = _core.Spec(stats.CORE_ORDER[::-1], powers=(2.0,), vectors=3, topk=5, targets=2)
    assert shuffled.fields == spec.fields
    with pytest.raises(ValueError, match="softmax"):
        _core.Spec(("rest", "softmax"))


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", stats.CORE_ORDER)
def test_statistic(name: str, dtype: str, maps: str) -> None:
    for targets in (0, 1, 3):
        if name == "target" and not targets:
            continue
        for seed, size in enumerate(SIZES):
            # What a backward needs beside the statistic is asked for with it, as callers do.
            needs = ("rest",) if name in ("entropy", "weighted_rest") else ()
            names = tuple(dict.fromkeys((*needs, name)))
            check(Call(names, dtype, size, targets, seed=seed, **MAPS[maps]))


@pytest.mark.parametrize("memory", [-1, -2, 100_000], ids=["lean", "fast", "bytes"])
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_statistics_together(dtype: str, maps: str, memory: int) -> None:
    for targets in (0, 1, 3):
        names = tuple(n for n in stats.CORE_ORDER if targets or n != "target")
        for seed, size in enumerate(SIZES):
            check(Call(names, dtype, size, targets, memory=memory, seed=seed, **MAPS[maps]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_larger_problem(dtype: str) -> None:
    """Several row groups, class blocks and feature blocks."""
    for memory in (-1, -2):
        check(Call(("rest", "target"), dtype, (300, 160, 5000), 1, memory=memory))


@pytest.mark.parametrize("level", _core.cpu_levels())
def test_every_level(level: str) -> None:
    if level == _core.cpu_level():
        pytest.skip("this run is at that level")
    if "LOGITLESS_PARITY_CHILD" in os.environ:
        pytest.skip("a level does not start others")
    environment = {**os.environ, "LOGITLESS_CPU": level, "LOGITLESS_PARITY_CHILD": "1"}
    threads = str(Path(__file__).with_name("test_threads.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [__file__, threads, "-k", "(statistic and plain) or lean or larger or bits"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def test_an_unknown_level_is_refused() -> None:
    environment = {**os.environ, "LOGITLESS_CPU": "abacus"}
    code = "from logitless import _core; _core.cpu_level()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "abacus" in done.stderr
    assert "portable" in done.stderr
