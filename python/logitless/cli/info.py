"""``logitless info``: what is installed, which engines run here, and why one does not."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.table import Table

from logitless import _core
from logitless.cli._console import ACCENT, console

PACKAGES = ("numpy", "torch", "cupy-cuda12x", "cupy-cuda13x", "tokenizers", "matplotlib")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the version, the engines, the processor level, the GPU, and the packages found."""
    found = gather()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style=ACCENT)
    table.add_column()
    for name, value in found.items():
        table.add_row(name, describe(value))
    console.print(table)


def gather() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    return {
        "logitless": _core.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "cuda": cuda(),
        "packages": {name: installed(name) for name in PACKAGES},
    }


def cpu() -> dict[str, Any]:
    """Instruction level in use, the levels this processor has, and threads."""
    return {
        "engine": "on",
        "level": _core.cpu_level(),
        "levels": _core.cpu_levels(),
        "level forced": os.environ.get("LOGITLESS_CPU", "no"),
        "threads": _core.get_num_threads(),
    }


def cuda() -> dict[str, Any]:
    """The GPU engine: driver, devices and images, or the reason why it is off."""
    information = getattr(_core, "cuda_info", None)
    if information is None:
        return {"engine": "off", "reason": "this build has no CUDA engine; tensors on CPUs work"}
    found: dict[str, Any] = dict(information())
    reason = found.pop("reason", "")
    return {"engine": "off", "reason": reason, **found} if reason else {"engine": "on", **found}


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def describe(value: object) -> str:
    """One cell of the table: nested values as ``name value`` pairs, absent ones as a dash."""
    if isinstance(value, dict):
        return "\n".join(f"[grey58]{name}[/] {describe(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(describe(part) for part in value) or "none"
    return "-" if value is None else str(value)
