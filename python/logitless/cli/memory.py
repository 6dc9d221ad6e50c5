"""``logitless memory``: bytes by part for one shape, and the batch that a budget allows."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from logitless.cli import footprint
from logitless.cli._console import ACCENT, QUIET, bytes_text, console, fail, need, parse_bytes
from logitless.cli.footprint import METHODS, Footprint, Head

TITLES = {
    "eager": "eager",
    "chunked": "chunked",
    "lean": "logitless",
    "fast": "fast",
}
SMALL = 1e-3
"""Share of the largest part below which a part gets no line of its own."""


class Dtype(str, Enum):
    """Short names of the dtypes."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Device(str, Enum):
    """Where the head lives."""

    cpu = "cpu"
    cuda = "cuda"


def memory(
    tokens: Annotated[int, typer.Option(min=1, help="Rows N: tokens of a batch.")] = 8192,
    hidden: Annotated[int, typer.Option(min=1, help="Features D of a hidden state.")] = 4096,
    vocab: Annotated[int, typer.Option(min=1, help="Classes V.")] = 128256,
    dtype: Annotated[Dtype, typer.Option(help="Of input and weight.")] = Dtype.bf16,
    device: Annotated[Device, typer.Option(help="Where the head lives.")] = Device.cpu,
    budget: Annotated[str, typer.Option(help="Memory for the head, as in 24GiB.")] = "24GiB",
    plot: Annotated[Path | None, typer.Option(help="Also draw it to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a cross entropy holds, part by part: logitless, eager torch, chunked torch."""
    head = Head(tokens, hidden, vocab, dtype.value, device.value)
    limit = parse_bytes(budget)
    try:
        found = {name: method(head) for name, method in METHODS.items()}
    except RuntimeError as error:
        fail(f"--device is {device.value}: {error}; use --device cpu here")
    batches = {name: footprint.largest_rows(name, head, limit) for name in METHODS}
    if as_json:
        typer.echo(json.dumps(record(head, found, batches, limit), indent=2))
    else:
        console.print(table_of(head, found, batches, limit))
    if plot is not None:
        need("memory --plot", "cli", "matplotlib")
        from logitless.cli._memory_figure import draw

        draw(head, found, limit, plot)
        console.print(f"wrote {plot}", style=QUIET)


def record(
    head: Head, found: dict[str, Footprint], batches: dict[str, int], budget: int
) -> dict[str, Any]:
    """The JSON form: sizes, every moment of every method, peaks and largest batches."""
    return {
        "tokens": head.rows,
        "hidden": head.features,
        "vocab": head.classes,
        "dtype": head.dtype,
        "device": head.device,
        "input_bytes": head.inputs,
        "budget_bytes": budget,
        "methods": {
            name: {
                "peak_bytes": print_.peak,
                "moments": print_.moments,
                "largest_tokens": batches[name],
            }
            for name, print_ in found.items()
        },
    }


def table_of(
    head: Head, found: dict[str, Footprint], batches: dict[str, int], budget: int
) -> Table:
    """What is alive at the worst moment of each method, largest parts first, and what follows."""
    table = Table(
        title=f"{head.rows} tokens, hidden {head.features}, vocabulary {head.classes}, {head.dtype}"
        f" on {head.device}\nalive at the worst moment, beyond {bytes_text(head.inputs)} of inputs",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in found:
        table.add_column(TITLES[name], justify="right", style=style(name), no_wrap=True)
    sizes: dict[str, int] = {}
    for print_ in found.values():
        for part, size in print_.worst.items():
            sizes[part] = max(size, sizes.get(part, 0))
    largest = max(sizes.values())
    named = [part for part in sizes if sizes[part] > SMALL * largest]
    for part in sorted(named, key=lambda part: -sizes[part]):
        table.add_row(part, *(blank_or_bytes(each.worst.get(part, 0)) for each in found.values()))
    rest = [each.peak - sum(each.worst.get(part, 0) for part in named) for each in found.values()]
    table.add_row("smaller parts", *(blank_or_bytes(size) for size in rest))
    table.add_section()
    base = found["eager"].peak
    gradients = sum(head.gradients.values())
    table.add_row("peak", *(bytes_text(print_.peak) for print_ in found.values()), style="bold")
    table.add_row("share of eager's", *(share(item.peak / base) for item in found.values()))
    table.add_row(
        "without gradients",
        *(share(max(0, item.peak - gradients) / base) for item in found.values()),
    )
    table.add_section()
    table.add_row(
        f"tokens in {bytes_text(budget)}", *(f"{batches[name]:,}" for name in found), style="bold"
    )
    return table


def blank_or_bytes(size: int) -> str:
    """Bytes, or nothing for none."""
    return bytes_text(size) if size else ""


def share(value: float) -> str:
    """A share in per cent, with a digit after the point below ten."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def style(name: str) -> str:
    """Ours stand out."""
    return ACCENT if name in ("lean", "fast") else ""
