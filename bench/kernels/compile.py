"""Compiles every tensor-core kernel of cuda/arch.toml for Hopper, without Rust and without a GPU.

``python bench/kernels/compile.py --nvrtc DIR [--out DIR] [PATTERN...]``. DIR holds the wheel
``nvidia-cuda-nvrtc-cu12==12.9.86`` (``pip install --target DIR``). Beside the cubins goes
kernels.json, with what check.py and timing.py need to launch them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cuda"
ARCH = "sm_90a"


@dataclass
class Kernel:
    """One instance of a mainloop, with the macros that make it."""

    name: str
    file: str
    operation: str
    dtype: str
    mapped: bool
    m: int
    n: int
    cluster: int
    threads: int
    shared: int
    options: list[str] = field(default_factory=list)

    @property
    def by_maps(self) -> bool:
        """Operands arrive as tensor maps (the Hopper mainloop)."""
        return self.file == "gemm_sm90.cu"


def kernels(cluster: int | None = None) -> Iterator[Kernel]:
    """Every tensor-core kernel of the table, with clusters of its size or of another.

    Those of mma.sync run on Hopper too.
    """
    table = tomllib.loads((CUDA / "arch.toml").read_text())
    operations, dtypes = table["operations"], table["dtypes"]
    numbers = [f"-DOP_{name.upper()}={i}" for i, name in enumerate(operations)]
    numbers += [f"-DDTYPE_{name.upper()}={i}" for i, name in enumerate(dtypes)]
    for unit in table["unit"]:
        tile = table["tile"].get(unit.get("tile", ""))
        for operation in unit.get("operations", []):
            for dtype in unit["dtypes"]:
                for mapped in unit["maps"]:
                    stages, panels = unit["stages"], unit.get("panels", 0)
                    size = min(cluster or tile["cluster"], tile["cluster"])
                    rows = tile["m"] + tile["n"]
                    shared = tile.get("shared", stages * (rows * 128 + 16) + panels * 2 * 8192)
                    name = f"{operation}_{dtype}{'m' if mapped else ''}_{unit['tile']}"
                    macros = {
                        "NAME": name,
                        "OP": operations.index(operation),
                        "DTYPE": dtypes.index(dtype),
                        "MAP": mapped,
                        "TILE_M": tile["m"],
                        "TILE_N": tile["n"],
                        "STAGES": stages,
                        "PANELS": panels,
                        "CLUSTER": size,
                        "PINGPONG": int(tile["pingpong"]),
                        "THREADS": tile["threads"],
                        "SMEM": shared,
                    }
                    options = numbers + [f"-D{key}={value}" for key, value in macros.items()]
                    yield Kernel(
                        name,
                        unit["file"],
                        operation,
                        dtype,
                        bool(mapped),
                        tile["m"],
                        tile["n"],
                        size,
                        tile["threads"],
                        shared,
                        options,
                    )


class Nvrtc:
    """The compiler's library, from its wheel."""

    def __init__(self, site: Path) -> None:
        folder = site / "nvidia/cuda_nvrtc/lib"
        ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so.12*"))), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))

    def compile(self, source: str, name: str, options: list[str]) -> tuple[bytes | None, str]:
        """The cubin (None: it failed) and the log."""
        call, program = self.library, ctypes.c_void_p()
        created = call.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), 0, None, None
        )
        if created:
            raise RuntimeError(f"nvrtcCreateProgram: error {created}")
        encoded = [option.encode() for option in options]
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        failed = call.nvrtcCompileProgram(program, len(encoded), array)
        size = ctypes.c_size_t()
        call.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        call.nvrtcGetProgramLog(program, log)
        image = None
        if not failed:
            call.nvrtcGetCUBINSize(program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value)
            call.nvrtcGetCUBIN(program, buffer)
            image = buffer.raw
        call.nvrtcDestroyProgram(ctypes.byref(program))
        return image, log.value.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nvrtc", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "target/kernels")
    parser.add_argument("--cluster", type=int, help="largest cluster (1: no multicast)")
    parser.add_argument("patterns", nargs="*")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    compiler = Nvrtc(arguments.nvrtc)
    base = [f"--gpu-architecture={ARCH}", "--std=c++17", f"-I{CUDA / 'include'}"]
    base.append("--ptxas-options=-v")
    built: dict[str, dict[str, object]] = {}
    for kernel in kernels(arguments.cluster):
        if kernel.name in built:  # the same kernel for another architecture
            continue
        if arguments.patterns and not any(re.fullmatch(p, kernel.name) for p in arguments.patterns):
            continue
        source = (CUDA / "kernels" / kernel.file).read_text()
        image, log = compiler.compile(source, kernel.file, base + kernel.options)
        if image is None:
            raise SystemExit(f"{kernel.name}\n{log}")
        (arguments.out / f"{kernel.name}.cubin").write_bytes(image)
        registers = re.findall(r"Used (\d+) registers", log)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        print(f"{kernel.name:32s} registers {registers} spills {spills} shared {kernel.shared}")
        for line in re.findall(r".*(?:warning|serialized).*", log):
            print("   ", line)
        built[kernel.name] = asdict(kernel) | {"by_maps": kernel.by_maps}
    (arguments.out / "kernels.json").write_text(json.dumps(built, indent=1))


if __name__ == "__main__":
    main()
