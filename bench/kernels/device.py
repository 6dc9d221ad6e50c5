"""Launches single kernels through the CUDA driver: what rust/gpu does, in one sitting.

The parameter block mirrors ``GemmParams`` of cuda/include/logitless/params.cuh.
"""

from __future__ import annotations

import ctypes as c
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

driver = c.CDLL("libcuda.so.1")

POINTERS = ("count", "alpha", "ref", "target", "coef", "bias", "part")
INTEGERS = ("m", "n", "k", "ld_row", "col0", "group", "accumulate", "count_is_k")


class Params(c.Structure):
    """GemmParams."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("a", "b", "d")),
        *((name, c.c_int64) for name in ("lda", "ldb", "ldd")),
        *((name, c.c_void_p) for name in POINTERS),
        ("part_plane", c.c_int64),
        *((name, c.c_void_p) for name in ("gate", "onehot_w", "onehot_g")),
        ("onehot_ld", c.c_int64),
        *((name, c.c_void_p) for name in ("onehot_start", "onehot_rows", "onehot_sums")),
        *((name, c.c_void_p) for name in ("scale_at", "columns", "dots", "target_z", "in_place")),
        *((name, c.c_int) for name in INTEGERS),
        *((name, c.c_float) for name in ("scale", "softcap", "shift")),
        ("reserved", c.c_int),
        ("slices", c.c_int),
        ("slice_rows", c.c_int),
        ("early", c.c_int),
        ("head", c.c_int),
    )


assert c.sizeof(Params) == 272


class Attribute(c.Structure):
    """CUlaunchAttribute: its id, padding, and the first of 64 bytes of value."""

    _fields_ = (("id", c.c_uint), ("padding", c.c_uint), ("value", c.c_int), ("rest", c.c_int * 15))


PROGRAMMATIC_STREAM_SERIALIZATION = 6


class LaunchConfig(c.Structure):
    """CUlaunchConfig; the cluster's shape is compiled in."""

    _fields_ = (
        ("grid", c.c_uint * 3),
        ("block", c.c_uint * 3),
        ("shared", c.c_uint),
        ("stream", c.c_void_p),
        ("attributes", c.c_void_p),
        ("attribute_count", c.c_uint),
    )


def check(code: int, what: str) -> None:
    """Raises for a driver's error."""
    if code:
        text = c.c_char_p()
        driver.cuGetErrorString(code, c.byref(text))
        raise RuntimeError(f"{what}: CUDA error {code}, {text.value!r}")


class Kernels:
    """The kernels of one folder that compile.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[str, dict[str, Any]] = json.loads((folder / "kernels.json").read_text())
        torch.cuda.current_stream()  # torch's context is current from here on

    @cache  # noqa: B019
    def function(self, name: str) -> c.c_void_p:
        """The loaded kernel."""
        image = (self.folder / f"{name}.cubin").read_bytes()
        library, kernel, function = c.c_void_p(), c.c_void_p(), c.c_void_p()
        load = driver.cuLibraryLoadData
        check(load(c.byref(library), image, None, None, 0, None, None, 0), name)
        check(driver.cuLibraryGetKernel(c.byref(kernel), library, name.encode()), name)
        check(driver.cuKernelGetFunction(c.byref(function), kernel), name)
        check(driver.cuFuncSetAttribute(function, 8, self.table[name]["shared"]), name)
        return function


def tensor_map(x: torch.Tensor, columns: int, rows: int, box: tuple[int, int]) -> c.Array[c.c_char]:
    """A map of x's first rows and columns: 128-byte swizzle and L2 promotion, zero fill."""
    raw = (c.c_char * 256)()
    aligned = (c.c_char * 128).from_buffer(raw, -c.addressof(raw) % 128)
    kind = {torch.bfloat16: 9, torch.float16: 6, torch.float32: 7}[x.dtype]
    code = driver.cuTensorMapEncodeTiled(
        aligned,
        kind,
        2,
        c.c_void_p(x.data_ptr()),
        (c.c_uint64 * 2)(columns, rows),
        (c.c_uint64 * 1)(x.stride(0) * x.element_size()),
        (c.c_uint32 * 2)(*box),
        (c.c_uint32 * 2)(1, 1),
        0,
        3,
        2,
        0,
    )
    check(code, f"tensor map {columns} x {rows}, box {box}")
    return aligned


class Launch:
    """D[m, n] = epilogue(A[m, k] B[n, k]ᵀ), prepared; calling it enqueues it on the current stream.

    A and B are given as the operation stores them: dw and dw_f32 take K as rows of both, de and
    de_f32 of B. ``beside``: the kernel may start as blocks of the one ahead end. ``clusters`` take
    turns at the tiles; by default as many as the device holds at once.
    """

    def __init__(
        self,
        kernels: Kernels,
        name: str,
        extents: tuple[int, int, int],
        a: torch.Tensor,
        b: torch.Tensor,
        d: torch.Tensor | None = None,
        *,
        beside: bool = False,
        clusters: int | None = None,
        **fields: Any,
    ) -> None:
        m, n, k = extents
        kernel = kernels.table[name]
        transposed_a = kernel["operation"].startswith("dw")
        transposed_b = transposed_a or kernel["operation"].startswith("de")
        self.keep = (a, b, d, fields)
        self.function = kernels.function(name)
        group = max(2048 // (kernel["m"] * kernel["cluster"]), 1)  # as rust/gpu/src/product.rs
        params = Params(m=m, n=n, k=k, group=group, scale=1.0, ld_row=m)
        params.a, params.b = a.data_ptr(), b.data_ptr()
        params.lda, params.ldb = a.stride(0), b.stride(0)
        if d is not None:
            params.d, params.ldd = d.data_ptr(), d.stride(0)
        for key, value in fields.items():
            setattr(params, key, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        if kernel["by_maps"]:
            tile_m, tile_n, cluster = kernel["m"], kernel["n"], kernel["cluster"]
            depth = 64 if tile_n // 64 % cluster == 0 else 64 // cluster
            map_a = (
                tensor_map(a, m, k, (64, 64)) if transposed_a else tensor_map(a, k, m, (64, tile_m))
            )
            map_b = (
                tensor_map(b, n, k, (64, depth))
                if transposed_b
                else tensor_map(b, k, n, (64, tile_n // cluster))
            )
            map_d = map_a
            if d is not None:
                map_d = tensor_map(d, n, m, (32 if d.dtype == torch.float32 else 64, 64))
            self.arguments = [map_a, map_b, map_d, params]
            grid = (clusters or multiprocessors // cluster) * cluster
        else:
            self.arguments = [params]
            tiles = -(-m // kernel["m"]) * -(-n // kernel["n"])
            grid = min(tiles, clusters or 2 * multiprocessors)
        addresses = [c.addressof(argument) for argument in self.arguments]
        self.pointers = (c.c_void_p * len(addresses))(*addresses)
        self.config = LaunchConfig(
            grid=(c.c_uint * 3)(grid, 1, 1),
            block=(c.c_uint * 3)(kernel["threads"], 1, 1),
            shared=kernel["shared"],
        )
        if beside:
            self.attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
            self.config.attributes = c.addressof(self.attribute)
            self.config.attribute_count = 1

    def __call__(self) -> None:
        """Enqueues."""
        self.config.stream = torch.cuda.current_stream().cuda_stream
        launch = driver.cuLaunchKernelEx
        check(launch(c.byref(self.config), self.function, self.pointers, None), "launch")
