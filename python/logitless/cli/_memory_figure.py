"""The picture of ``logitless memory``: parts at one batch size, and the peak as the batch grows."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from logitless.cli._console import bytes_text
from logitless.cli._figure import COLOURS, GRID, INK, SOFT, bare, figure, headline, note
from logitless.cli.footprint import METHODS, Footprint, Head, largest_rows

NAMES = {"eager": "eager torch", "chunked": "chunked torch", "lean": "logitless", "fast": "fast"}


def draw(head: Head, found: dict[str, Footprint], budget: int, path: Path) -> None:
    """Draw to `path`; its suffix chooses the format."""
    with figure(10, 4.2, path) as drawn:
        times = found["eager"].peak / found["lean"].peak
        headline(
            drawn,
            f"The head's memory: {bytes_text(found['lean'].peak)} instead of"
            f" {bytes_text(found['eager'].peak)} ({times:.0f}x less)"
            if times >= 1.5
            else f"The head's memory: {bytes_text(found['lean'].peak)}",
            f"{head.rows} tokens, hidden {head.features}, vocabulary {head.classes}, {head.dtype};"
            " forward and backward of a cross entropy, beyond its inputs",
        )
        bars, lines = drawn.subplots(1, 2, width_ratios=(1, 1.1))
        draw_bars(bars, head, found)
        draw_lines(lines, head, budget)


def draw_bars(axes: Axes, head: Head, found: dict[str, Footprint]) -> None:
    """One bar a method, at its worst moment: gradients of the inputs light, the rest coloured."""
    axes.set_title("At this batch")
    longest = max(item.peak for item in found.values())
    gradients = sum(head.gradients.values())
    for row, (name, item) in enumerate(found.items()):
        common = sum(item.worst.get(part, 0) for part in head.gradients)
        axes.barh(row, common, color=GRID, height=0.62)
        axes.barh(row, item.peak - common, left=common, color=COLOURS[name], height=0.62)
        note(axes, item.peak + longest * 0.015, row, bytes_text(item.peak), fontweight="bold")
    axes.set_yticks(range(len(found)), [NAMES[name] for name in found], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.2)
    bare(axes, keep="left")
    axes.spines["left"].set_visible(False)
    note(axes, 0, len(found) - 0.45, f"light: the gradients, {bytes_text(gradients)}", color=SOFT)


def draw_lines(axes: Axes, head: Head, budget: int) -> None:
    """Inputs plus peak against the number of tokens, and where each line crosses the budget."""
    axes.set_title(f"As the batch grows, inputs included; {bytes_text(budget)} dashed")
    largest = max(largest_rows(name, head, budget) for name in METHODS)
    start, end = max(1, head.rows // 8), max(4 * head.rows, 2 * largest, 16)
    counts = sorted({round(start * (end / start) ** (k / 60)) for k in range(61)})
    for name, method in reversed(METHODS.items()):
        heads = [Head(n, head.features, head.classes, head.dtype, head.device) for n in counts]
        totals = [(each.inputs + method(each).peak) / 2**30 for each in heads]
        axes.plot(counts, totals, color=COLOURS[name], lw=2.4 if name == "lean" else 1.8)
        fitting = largest_rows(name, head, budget)
        if fitting and name != "fast":
            axes.plot(fitting, budget / 2**30, "o", color=COLOURS[name], ms=6, zorder=3)
            axes.annotate(
                f"{NAMES[name]}\n{count_text(fitting)}",
                (fitting, budget / 2**30),
                (6, -6) if name == "lean" else (-5, 5),
                textcoords="offset points",
                ha="left" if name == "lean" else "right",
                va="top" if name == "lean" else "bottom",
                fontsize=8.5,
                color=INK if name == "lean" else SOFT,
                fontweight="bold" if name == "lean" else "normal",
            )
    axes.axhline(budget / 2**30, color=SOFT, lw=0.8, ls=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set_ylim(top=budget / 2**30 * 8)
    axes.xaxis.set_major_formatter(lambda value, _: count_text(value))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} GiB")
    axes.set_xlabel("tokens")
    axes.grid(visible=True)


def count_text(value: float) -> str:
    """A number of tokens in three digits: ``65.5k``, ``1.4M``."""
    if value < 1000:
        return f"{value:.0f}"
    if value < 1e6:
        return f"{value / 1e3:.3g}k"
    return f"{value / 1e6:.3g}M"
