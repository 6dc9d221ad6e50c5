"""The demo's picture: loss curves on top of each other, the head's memory, the step's time."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from logitless.cli._console import bytes_text, seconds_text
from logitless.cli._figure import GRID, INK, SOFT, bare, figure, headline, note

ORDINARY = "#94a3b8"
STREAMED = "#ea580c"
BODY = "#dbe3ee"
NAMES = {"ordinary": "ordinary head", "logitless": "logitless"}
COLOURS = {"ordinary": ORDINARY, "logitless": STREAMED}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the record of a demo (see `report.record`) to `path`."""
    model, training = found["model"], found["training"]
    with figure(10.4, 4.6, path) as drawn:
        partial = "" if found["complete"] else "  (interrupted)"
        headline(
            drawn,
            title(found) + partial,
            f"A {model['parameters'] / 1e6:.1f} M parameter language model learns Python's standard"
            f" library: vocabulary {model['vocabulary']:,}, {training['tokens per step']:,} tokens"
            f" a step, {training['dtype']}, {device(found)}",
        )
        halves: Any = drawn.subfigures(1, 2, width_ratios=(1.15, 1))
        loss, side = halves
        curves, gap = loss.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        draw_loss(curves, found)
        draw_difference(gap, found)
        memory, seconds = side.subplots(2, 1)
        draw_memory(memory, found)
        draw_time(seconds, found)


def title(found: dict[str, Any]) -> str:
    """The finding in a few words, as far as it was found."""
    runs = found["runs"]
    ordinary, streamed = (runs[name]["head peak bytes"] for name in ("ordinary", "logitless"))
    if runs["ordinary"]["failure"] or not ordinary:
        return f"The ordinary head does not fit; logitless needs {bytes_text(streamed)}"
    return f"The same loss; the head takes {bytes_text(streamed)} instead of {bytes_text(ordinary)}"


def device(found: dict[str, Any]) -> str:
    """The machine in a few words."""
    machine = found["machine"]
    if "GPU" in machine:
        return str(machine["GPU"]).split(",")[0]
    threads = found["training"]["threads"]
    name = str(machine["processor"]).split(",")[0]
    return f"{threads} thread{'s' if threads > 1 else ''} of {name}"


def draw_loss(axes: Axes, found: dict[str, Any]) -> None:
    """Both training curves: the ordinary one wide, ours thin on top of it."""
    axes.set_title("Training loss (nats per token)")
    for name in ("ordinary", "logitless"):
        losses = found["runs"][name]["losses"]
        if not losses:
            continue
        ours = name == "logitless"
        axes.plot(
            smooth(losses),
            color=COLOURS[name],
            lw=1.5 if ours else 5.5,
            alpha=1.0 if ours else 0.6,
            label=NAMES[name],
            solid_capstyle="round",
        )
    axes.grid(visible=True, axis="y")
    axes.margins(x=0.01)
    axes.tick_params(labelbottom=False)
    axes.legend(loc="upper right", fontsize=9.5)


def draw_difference(axes: Axes, found: dict[str, Any]) -> None:
    """Distance of the curves at every step, unsmoothed, on a logarithmic axis."""
    first, second = (found["runs"][name]["losses"] for name in ("ordinary", "logitless"))
    axes.set_title("Difference of the two, step by step")
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    axes.grid(visible=True, axis="y")
    gaps = [abs(a - b) for a, b in zip(first, second, strict=False)]
    if not any(gaps):
        bare(axes, keep="bottom")
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=SOFT)
        return
    floor = min(gap for gap in gaps if gap) / 2
    axes.semilogy([max(gap, floor) for gap in gaps], color=INK, lw=0.9)
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(floor / 2, max(gaps) * 4)


def smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    means = accumulate(values, lambda mean, value: keep * mean + (1 - keep) * value, initial=0.0)
    next(means)
    return [mean / (1 - keep**count) for count, mean in enumerate(means, start=1)]


def draw_memory(axes: Axes, found: dict[str, Any]) -> None:
    """Peak of the head's forward and backward; what every head must hold is grey."""
    axes.set_title("Peak memory of the head")
    peaks = {name: run["head peak bytes"] for name, run in found["runs"].items()}
    longest = max(peaks.values()) or 1
    gradients = found["head gradients bytes"]
    for row, (name, peak) in enumerate(peaks.items()):
        common = min(gradients, peak) if name == "logitless" else 0
        axes.barh(row, common, color=GRID, height=0.6)
        axes.barh(row, peak - common, left=common, color=COLOURS[name], height=0.6)
        text = bytes_text(peak) if peak else "out of memory"
        note(axes, peak + longest * 0.015, row, text, fontweight="bold")
    label_rows(axes, longest)
    axes.text(
        1.0, -0.02, f"light: gradients, {bytes_text(gradients)}", transform=axes.transAxes,
        ha="right", va="top", color=SOFT, fontsize=8.5,
    )  # fmt: skip


def draw_time(axes: Axes, found: dict[str, Any]) -> None:
    """Median step in three parts; the head is the part that differs."""
    axes.set_title("Time of a step")
    totals = {name: run.get("seconds", {}).get("step", 0.0) for name, run in found["runs"].items()}
    longest = max(totals.values()) or 1
    for row, name in enumerate(totals):
        seconds = found["runs"][name].get("seconds")
        if seconds is None:
            continue
        left = 0.0
        for part, colour in (("head", COLOURS[name]), ("body", BODY), ("optimizer", GRID)):
            width = seconds[part]
            axes.barh(row, width, left=left, color=colour, height=0.6)
            if part != "optimizer" and width > 0.18 * longest:
                roomy = width > 0.265 * longest
                text = f"{part} {seconds_text(width)}" if roomy else part
                shade = "white" if part == "head" else SOFT
                middle = left + width / 2
                note(axes, middle, row, text, ha="center", color=shade, fontsize=8.5)
            left += width
        speed = found["runs"][name]["tokens per second"]
        note(axes, left + longest * 0.015, row, f"{speed:,.0f} tok/s", fontweight="bold")
    label_rows(axes, longest)


def label_rows(axes: Axes, longest: float) -> None:
    """Name both rows and leave room for the text behind the bars."""
    axes.set_yticks(range(len(NAMES)), list(NAMES.values()), color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.28)
    bare(axes, keep="left")
    axes.spines["left"].set_visible(False)
