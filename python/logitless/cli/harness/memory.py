"""Peak memory of one call: what it adds above what was there when it started.

On CUDA the framework's allocator keeps the count. On the CPU the kernel does: the high-water mark
of the resident set, reset before the call (Linux), read after it. Freed blocks that the C library
still holds would hide growth, so they are returned first; and the mark is only trusted in a process
that has done nothing else: `clean_growth` starts one.
"""

from __future__ import annotations

import ctypes
import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from logitless.cli.harness.cases import Case, Mode

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class PeakMeter:
    """Peak growth of memory between `start` and `stop`, in bytes.

    Parameters
    ----------
    device : torch.device
        ``cuda``: bytes of the caching allocator. Otherwise: resident bytes of this process.

    Notes ----- Without Linux's resettable mark, `stop` falls back to the growth of ``ru_maxrss``,
    which is right in a process whose peak so far is its present size.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0

    def start(self) -> None:
        """Return freed memory, reset the mark and note the present size."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        return_freed_memory()
        if resettable():
            RESET.write_text("5")
            self.before = status_bytes("VmRSS")
        else:
            self.before = lifetime_peak()

    def stop(self) -> int:
        """Bytes by which the peak since `start` lies above the size at `start`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return (status_bytes("VmHWM") if resettable() else lifetime_peak()) - self.before


def resettable() -> bool:
    """Whether this kernel keeps a resident high-water mark that can be reset."""
    return RESET.exists()


def status_bytes(field: str) -> int:
    """One of the memory fields of ``/proc/self/status``, in bytes."""
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(f"/proc/self/status has no field {field!r}; expected VmRSS or VmHWM")


def lifetime_peak() -> int:
    """Largest resident size of this process so far, in bytes (macOS counts bytes, others KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give free heap pages back to the system where the C library can (glibc's ``malloc_trim``)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def clean_growth(case: Case, contender: str, mode: Mode, seed: int = 0) -> int:
    """Peak growth of one call in a fresh process, in bytes; gradients are part of it.

    The child makes the inputs, runs the call once at a tiny size (code, kernels and thread stacks
    are loaded by it) and then measures one call at full size.

    Raises
    ------
    RuntimeError
        When the child fails; the message ends with its last line of output.
    """
    request = {"case": asdict(case), "contender": contender, "mode": mode, "seed": seed}
    child = subprocess.run(
        [sys.executable, "-m", "logitless.cli.harness.clean", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise RuntimeError(f"measuring {contender} on {case.label} failed: {lines[-1]}")
    growth: int = json.loads(child.stdout.strip().splitlines()[-1])["growth"]
    return growth
