"""``logitless bench``: time, memory and error against every other way that is installed."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from logitless.cli._console import (
    ACCENT,
    QUIET,
    bytes_text,
    console,
    fail,
    need,
    progress,
    seconds_text,
)
from logitless.cli.memory import Device, Dtype

if TYPE_CHECKING:
    from logitless.cli.harness.cases import Case, Mode
    from logitless.cli.harness.run import Options, Row


class Work(str, Enum):
    """What one call does."""

    forward = "forward"
    forward_backward = "forward+backward"
    frozen_head = "frozen head"


class Clock(str, Enum):
    """How calls are timed; see ``harness.timing``."""

    interleaved = "interleaved"
    sustained = "sustained"


def bench(
    preset: Annotated[
        str, typer.Option(help="quick, cpu, cpu-fp32, cpu-bf16, gpu or gpu-edge.")
    ] = "quick",
    shape: Annotated[
        list[str] | None, typer.Option(help="N,D,V instead of a preset; may be repeated.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the shapes given.")] = Dtype.fp32,
    device: Annotated[Device, typer.Option(help="Of the shapes given.")] = Device.cpu,
    mode: Annotated[
        list[Work] | None, typer.Option(help="Work of a call; may be repeated.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Contenders by name, with commas: eager,compile,lean ...")
    ] = "",
    clock: Annotated[
        Clock, typer.Option(help="Random order in rounds, or each contender alone.")
    ] = Clock.interleaved,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing for a shape and mode.")] = 10.0,
    measure_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")
    ] = True,
    error: Annotated[
        bool, typer.Option("--error/--no-error", help="Measure the error against float64.")
    ] = True,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 keeps torch's.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the inputs and the order.")] = 0,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw ratios and memory to this file.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table as well.")] = False,
) -> None:
    """Compare logitless with eager torch, torch.compile, chunked torch and installed rivals.

    Every table states the machine, the allocator and the thread settings. Ratios are times relative
    to eager; interleaved ones are medians of ratios within a round, with their 95% interval. Ctrl-C
    ends early and reports the shapes that are done.
    """
    need("bench", "torch", "torch")
    if plot is not None:
        need("bench --plot", "cli", "matplotlib")
    import torch

    from logitless.cli.harness.cases import MODES
    from logitless.cli.harness.contenders import CONTENDERS
    from logitless.cli.harness.machine import facts
    from logitless.cli.harness.run import Options, measure, stages, usable

    if threads:
        torch.set_num_threads(threads)
    cases = chosen(preset, shape or [], dtype, device)
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        fail(f"--only names {', '.join(unknown)}; expected some of {', '.join(CONTENDERS)}")
    modes: tuple[Mode, ...] = tuple(item.value for item in mode) if mode else MODES[:2]
    options = Options(
        usable(names, cases[0].device), modes, clock.value, seconds, measure_memory, error, seed
    )
    machine = facts(torch.device(cases[0].device))
    rows: list[Row] = []
    with progress() as bar, suppress(KeyboardInterrupt):
        task = bar.add_task("measuring", total=stages(cases, options), note="")
        for done in measure(
            cases,
            options,
            say=lambda text: bar.update(task, note=f"[{QUIET}]{text}[/]"),
            advance=lambda: bar.advance(task),
        ):
            rows.extend(done)
    if not rows:
        fail("interrupted before the first shape was measured: nothing to report")
    for name, value in machine.items():
        console.print(Text(f"{name}: {value}", style=QUIET), soft_wrap=True)
    for group in grouped(rows):
        console.print(group_table(group, options))
    for row in rows:
        if row.peak_reason:
            console.print(Text(row.peak_reason, style="red"))
    if markdown:
        typer.echo(markdown_table(rows, machine, command_line()))
    if as_json is not None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(record(rows, options, machine), indent=1) + "\n")
        console.print(f"wrote {as_json}", style=QUIET)
    if plot is not None:
        from logitless.cli._bench_figure import draw

        draw(rows, machine, plot)
        console.print(f"wrote {plot}", style=QUIET)


def chosen(preset: str, shapes: list[str], dtype: Dtype, device: Device) -> tuple[Case, ...]:
    """The cases the command line asks for, refused with a reason where they cannot run."""
    import torch

    from logitless.cli.harness.cases import PRESETS, Case

    if shapes:
        cases = tuple(Case(*sizes(text), dtype.value, device.value) for text in shapes)
    elif preset in PRESETS:
        cases = PRESETS[preset]
    else:
        fail(f"--preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    if cases[0].device == "cuda" and not torch.cuda.is_available():
        fail("these shapes are for a GPU, but torch finds no CUDA device; try --preset cpu")
    return cases


def sizes(text: str) -> tuple[int, int, int]:
    """Read ``N,D,V``."""
    parts = text.replace("x", ",").split(",")
    try:
        rows, features, classes = (int(part) for part in parts)
        if min(rows, features, classes) < 1:
            raise ValueError
    except ValueError:
        fail(f"--shape is {text!r}, expected three positive integers N,D,V such as 1024,512,32768")
    return rows, features, classes


def command_line() -> str:
    """The command that made a table, to be run again."""
    return shlex.join(["logitless", *sys.argv[1:]])


def record(rows: list[Row], options: Options, machine: dict[str, str]) -> dict[str, Any]:
    """The JSON form of a run."""
    return {
        "command": command_line(),
        "machine": machine,
        "clock": options.clock,
        "rows": [row.plain() for row in rows],
    }


def grouped(rows: list[Row]) -> list[list[Row]]:
    """Rows of one case and mode together, in order."""
    groups: dict[tuple[Case, Mode], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.mode), []).append(row)
    return list(groups.values())


def group_table(rows: list[Row], options: Options) -> Table:
    """One case and mode: a line a contender; err: of the gradients, against float64."""
    from logitless.cli.harness.contenders import OURS

    case, mode = rows[0].case, rows[0].mode
    table = Table(
        title=f"{case.label} on {case.device}, {mode}, {options.clock}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("", no_wrap=True)
    for name in ("median", "spread", "x eager", "95%", "peak", "err dE", "err dW"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label = f"logitless {row.contender}" if row.contender in OURS else row.contender
        if row.reason:
            continue
        table.add_row(label, *cells(row), style=ACCENT if row.contender in OURS else "")
    left_out = [f"{row.contender}: {row.reason}" for row in rows if row.reason]
    table.caption = Text("\n".join(left_out), style=QUIET, justify="left")
    return table


def cells(row: Row) -> list[str]:
    """The numbers of a row as text; empty where nothing was measured."""
    found = ["", "", "", ""]
    if row.time is not None:
        found[:2] = [seconds_text(row.time.median), f"{row.time.spread:.0%}"]
    if row.ratio is not None:
        found[2] = f"{row.ratio.median:.2f}"
        found[3] = f"{row.ratio.lower:.2f}-{row.ratio.upper:.2f}"
    found.append(bytes_text(row.peak_bytes) if row.peak_bytes is not None else "")
    if row.peak_reason:
        found[-1] = "failed"
    if row.error is None:
        return [*found, "", ""]
    return [*found, f"{row.error.d_input:.1e}", f"{row.error.d_weight:.1e}"]


def markdown_table(rows: list[Row], machine: dict[str, str], command: str) -> str:
    """One table of all rows, with the command and the machine above it."""
    from logitless.cli.harness.contenders import OURS

    lines = [f"`{command}`", "", *(f"* {name}: {value}" for name, value in machine.items()), ""]
    lines.append("| N x D x V | work | | median | x eager (95%) | peak | error of dE, dW |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"**logitless {row.contender}**" if row.contender in OURS else row.contender
        text = cells(row)
        ratio = f"{text[2]} ({text[3]})" if text[2] else ""
        error = f"{text[5]}, {text[6]}" if text[5] else ""
        time = row.reason or text[0]
        lines.append(
            f"| {row.case.label} | {row.mode} | {name} | {time} | {ratio} | {text[4]} | {error} |"
        )
    return "\n".join(lines) + "\n"
