"""The table and the plot of word_model.py: ``python word_model_report.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOPS = (1, 5, 10)
COLOURS = {"log-softmax": "#555555", "Z-loss": "#c2410c"}


def label(run: dict[str, Any], epoch: int) -> str:
    """Arm and length of a run."""
    if "part" in run:
        return f"{run['arm']} (1/{epoch // run['part']} of an epoch timed)"
    epochs = run["steps"] / epoch
    return f"{run['arm']}, {epochs:g} epoch{'s' if epochs != 1 else ''}"


def command(arguments: dict[str, Any]) -> str:
    """The command of a run, every option spelled out; where its corpus lies is not part of it."""
    options = (f"--{name.replace('_', '-')} {value}" for name, value in arguments.items())
    return " ".join(["python bench/examples/word_model.py --corpus words.npz", *options])


def markdown(result: dict[str, Any]) -> str:
    """The table, with what was tuned."""
    a, epoch = result["arguments"], result["epoch"]
    base = result["runs"][0]["seconds"]
    lines = [
        "## A word model: the Z-loss head against log-softmax",
        "",
        f"`{command(a)}`",
        "",
        "Nine words of Python code and docs predict the next.",
        "",
        f"* {result['device']}, torch {result['torch']}, fp32 without TF32",
        f"* V = {result['classes']}, {result['words']} training words, D = {a['features']}, "
        f"batch {a['batch']}, {epoch} steps an epoch; scored on {result['scored']} held-out words",
        "* body: embeddings of "
        f"{a['embedding']}, hidden {a['hidden']}, Adam at {a['lr']:g}; heads by SGD",
        "",
        "| | head's settings | seconds an epoch | speed-up | seconds | top-1 | top-5 | top-10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        settings = ", ".join(f"{k} {v:g}" for k, v in run["settings"].items())
        whole = "part" not in run
        each = run["seconds"] * (epoch / run["steps"] if whole else 1)
        tops = [f"{100 * run[f'top{k}']:.1f}%" if whole else "" for k in TOPS]
        cells = [label(run, epoch), settings, f"{each:.1f}", f"{base / each:.1f}"]
        cells += [f"{run['seconds']:.1f}" if whole else "", *tops]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Tuning, {a['tune_steps']} steps each, top-1/5/10 on other held-out words:", ""]
    for run in result["tuning"]:
        settings = ", ".join(f"{k} {v:g}" for k, v in run["settings"].items())
        tops = " / ".join(f"{100 * run[f'top{k}']:.1f}" for k in TOPS)
        lines.append(f"* {run['arm']}, {settings}: {tops}")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Top-1 and top-10 over the seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, k in zip(axes, (1, 10), strict=True):
        for run in result["runs"]:
            if "part" in run:
                continue
            long = run["steps"] > result["epoch"]
            axis.plot(
                [point["seconds"] for point in run["curve"]],
                [100 * point[f"top{k}"] for point in run["curve"]],
                marker="o",
                markersize=3,
                linestyle="--" if long else "-",
                color=COLOURS[run["arm"]],
                label=label(run, result["epoch"]),
            )
        axis.set_xscale("log")
        axis.set_xlabel("seconds of training")
        axis.set_title(f"held-out top-{k}, %", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Next word among {result['classes']}, {result['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(result: dict[str, Any], folder: Path) -> None:
    """Write word_model.md and word_model.png."""
    (folder / "word_model.md").write_text(markdown(result))
    plot(result, folder / "word_model.png")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write(json.loads((where / "word_model.json").read_text()), where)
