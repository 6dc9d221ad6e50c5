"""The facts that every table of measurements states: machine, versions, allocator, threads."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import logitless

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "LOGITLESS_")


def facts(device: torch.device) -> dict[str, str]:
    """Name -> value, in the order in which they are printed."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": processor(),
        "load": f"{os.getloadavg()[0]:.1f} runnable when it began",
        "threads": f"torch {torch.get_num_threads()}, logitless follows torch",
        "OMP": settings(THREAD_VARIABLES),
        "allocator": allocator(),
        "versions": f"logitless {logitless.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["GPU"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}"
        )
    return found


def processor() -> str:
    """Model name and cores this process may use, with the instruction level logitless chose."""
    from logitless import _core

    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores, level {_core.cpu_level()}"


def cores() -> int:
    """Processors this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allocator() -> str:
    """Which malloc serves the process, its tuning, and the huge-page policy."""
    preloaded = [Path(part).name for part in os.environ.get("LD_PRELOAD", "").split(":") if part]
    text = ", ".join(preloaded) if preloaded else " ".join(platform.libc_ver()).strip() or "system"
    text += f"; {settings(ALLOCATOR_VARIABLES)}"
    if HUGE_PAGES.exists():
        policy = HUGE_PAGES.read_text().split("[")[-1].split("]")[0]
        text += f"; transparent huge pages {policy}"
    return text


def settings(prefixes: tuple[str, ...]) -> str:
    """Environment variables that start with one of `prefixes`, or the word default."""
    found = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(prefixes)]
    return " ".join(sorted(found)) or "default"


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, or None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    for line in information.read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return None
