"""What the commands share at the terminal: the console, units, errors and missing extras."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from logitless._extras import EXTRAS, available

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

ACCENT = "bold dark_orange"
QUIET = "grey58"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def fail(message: str) -> NoReturn:
    """Print an error and leave with status 2."""
    errors.print(f"[bold red]error:[/] {message}", soft_wrap=True)
    raise typer.Exit(2)


def need(command: str, extra: str, *modules: str) -> None:
    """Leave with a sentence that names the extra if one of `modules` is not installed."""
    missing = [name for name in modules if not available(name)]
    if missing:
        # The brackets would otherwise be read as markup.
        name = extra if extra != "auto" else EXTRAS[missing[0]]
        fail(
            f"logitless {command} needs {' and '.join(missing)}, not installed here;"
            rf" run: pip install 'logitless\[{name}]'"
        )


def bytes_text(count: float) -> str:
    """Bytes in binary units with three digits: ``1.25 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{_three(size)} {unit}"
        size /= 1024
    return f"{_three(size)} TiB"


def seconds_text(seconds: float) -> str:
    """Seconds in the unit that shows three digits: ``12.3 ms``."""
    if seconds < 1e-3:
        return f"{_three(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_three(seconds * 1e3)} ms"
    return f"{_three(seconds)} s"


def parse_bytes(text: str) -> int:
    """Read ``24GiB``, ``500 MB`` or a plain number of bytes.

    Raises
    ------
    typer.BadParameter
        When the text is no number followed by a unit.
    """
    compact = text.replace(" ", "").upper()
    digits = compact.rstrip("BIKMGT")
    factor = _UNITS.get(compact[len(digits) :] or "B")
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if factor is None or value <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write a number and a unit, as in 24GiB")
    return round(value * factor)


def _three(value: float) -> str:
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def progress() -> Progress:
    """The progress bar of every long command; it vanishes when done."""
    return Progress(
        SpinnerColumn(style=ACCENT),
        TextColumn("{task.description}"),
        BarColumn(complete_style=ACCENT, finished_style=ACCENT),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
        transient=True,
    )
