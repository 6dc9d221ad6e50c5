"""``logitless demo``: train a small language model twice, once with each head, and compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from logitless.cli._console import (
    ACCENT,
    QUIET,
    bytes_text,
    console,
    errors,
    fail,
    need,
    progress,
    seconds_text,
)
from logitless.cli.memory import Device, Dtype

if TYPE_CHECKING:
    from logitless.cli.lm.corpus import Corpus
    from logitless.cli.lm.report import Outcome
    from logitless.cli.lm.train import Run, Settings

PROMPT = "    def __init__(self"
HELD_OUT_SEQUENCES = 32


def demo(
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a training step.")] = 2048,
    vocab: Annotated[int, typer.Option(min=512, help="Entries of the vocabulary.")] = 16384,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each run.")] = 90,
    hidden: Annotated[int, typer.Option(min=64, help="Width of the model.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = 2,
    context: Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")] = 128,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="fp32, or bf16 under autocast.")] = Dtype.fp32,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    limit: Annotated[float, typer.Option(min=1, help="Most seconds of training.")] = 120.0,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("."),
) -> None:
    """Train a small language model on Python's own library, with and without the logits.

    Two runs start from one seed and see the same batches; one has the ordinary head, the other
    logitless. Prints their losses, the head's memory and time, and a text sample; writes demo.png
    and demo.json. Ctrl-C ends training early and still reports.
    """
    need("demo", "demo", "torch", "tokenizers", "matplotlib")
    check(tokens, context, hidden, device, dtype)
    import torch

    from logitless.cli.harness.cases import DTYPES
    from logitless.cli.harness.machine import facts
    from logitless.cli.lm import figure, report
    from logitless.cli.lm.corpus import build_corpus
    from logitless.cli.lm.model import Shape
    from logitless.cli.lm.train import Settings, make_run

    with console.status("") as status:
        corpus = build_corpus(vocab, lambda text: status.update(f"{text} ..."))
    console.print(
        f"[{QUIET}]{corpus.files} files, {corpus.characters / 1e6:.1f} M characters,"
        f" {corpus.training.numel() / 1e6:.2f} M tokens, vocabulary {corpus.classes}[/]"
    )
    if corpus.classes < vocab:
        console.print(f"the text gives a vocabulary of {corpus.classes}, not {vocab}", style=QUIET)
    settings = Settings(tokens, steps, seed, torch.device(device.value), DTYPES[dtype.value], limit)
    shape = Shape(corpus.classes, hidden, layers, hidden // 64, context)
    ordinary, streamed = (make_run(name, shape, settings) for name in ("ordinary", "logitless"))
    outcome = run_both(ordinary, streamed, corpus, settings)
    if not streamed.losses:
        fail(streamed.failure or "interrupted before the first step ended: nothing to report")
    found = report.record(outcome, facts(settings.device))
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    figure.draw(found, out / "demo.png")
    show(found)
    console.print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}", style=QUIET)


def check(tokens: int, context: int, hidden: int, device: Device, dtype: Dtype) -> None:
    """Refuse sizes that do not fit together, and a device or dtype that cannot train here."""
    if tokens % context:
        fail(
            f"--tokens is {tokens}, expected a multiple of --context ({context}): a step holds"
            f" whole sequences; try --tokens {max(1, round(tokens / context)) * context}"
        )
    if hidden % 64:
        fail(f"--hidden is {hidden}, expected a multiple of 64, the width of an attention head")
    if dtype not in (Dtype.fp32, Dtype.bf16):
        fail(f"--dtype is {dtype.value}, expected fp32 or bf16: fp16 would need loss scaling")
    if device is Device.cuda:
        import torch

        from logitless.cli.info import cuda

        if not torch.cuda.is_available():
            fail("--device is cuda, but torch finds no CUDA device here; use --device cpu")
        engine = cuda()
        if engine.get("engine") == "off":
            fail(f"--device is cuda, but the CUDA engine is off: {engine.get('reason')}")


def run_both(ordinary: Run, streamed: Run, corpus: Corpus, settings: Settings) -> Outcome:
    """Train in lock-step behind a progress bar; an interrupt keeps what is there."""
    from logitless.cli.harness.machine import available_memory
    from logitless.cli.lm.report import Outcome
    from logitless.cli.lm.train import train

    interrupted = False
    sample = ""
    reason = too_large(streamed, settings, available_memory(settings.device))
    if reason:
        ordinary.failure = reason
        console.print(f"ordinary head left out: {reason}", style="bold red")
    try:
        with progress() as bar:
            task = bar.add_task("training", total=settings.steps, note="")
            for number in train([ordinary, streamed], corpus, settings):
                bar.update(task, completed=number + 1, note=losses_text(ordinary, streamed))
        with console.status("held-out files ..."):
            inputs, targets = (
                part.to(settings.device)
                for part in corpus.validation(HELD_OUT_SEQUENCES, streamed.body.shape.context)
            )
            for run in (ordinary, streamed):
                if not run.failure:
                    run.validate(inputs, targets, 4)
        with console.status("writing a sample ..."):
            sample = write_sample(streamed, corpus)
    except KeyboardInterrupt:
        interrupted = True
        errors.print("interrupted: reporting what there is", style="bold yellow")
    return Outcome(settings, corpus, ordinary, streamed, interrupted, sample)


def too_large(run: Run, settings: Settings, available: int | None) -> str:
    """Why the ordinary head would not fit in this machine's memory; empty if it should."""
    from logitless.cli.footprint import Head, eager
    from logitless.cli.lm.report import SHORT

    shape = run.body.shape
    dtype = SHORT[str(settings.dtype)]
    head = Head(settings.tokens, shape.features, shape.classes, dtype, settings.device.type)
    peak = eager(head).peak
    # A GPU says so itself, and recovers; a CPU process would be killed.
    if available is None or settings.device.type != "cpu" or peak < 0.9 * available:
        return ""
    return f"its logits need {bytes_text(peak)}, and {bytes_text(available)} are free"


def losses_text(ordinary: Run, streamed: Run) -> str:
    """The two present losses, for the progress bar."""
    left, right = (f"{run.losses[-1]:.4f}" if run.losses else "-" for run in (ordinary, streamed))
    return f"[{QUIET}]loss {left} ordinary, [/][{ACCENT}]{right} logitless[/]"


def write_sample(run: Run, corpus: Corpus) -> str:
    """A hundred tokens of the model's own Python."""
    import torch

    prompt = torch.tensor(corpus.tokenizer.encode(PROMPT).ids, device=run.settings.device)
    with run.autocast():
        tokens = run.body.generate(prompt, 100, temperature=0.9, seed=run.settings.seed)
    text: str = corpus.tokenizer.decode(tokens.tolist())
    return text


def show(found: dict[str, Any]) -> None:
    """Print the comparison and the sample."""
    runs = found["runs"]
    ordinary, streamed = runs["ordinary"], runs["logitless"]
    training = found["training"]
    table = Table(
        title=f"{training['steps']} steps of {training['tokens per step']} tokens, vocabulary"
        f" {found['model']['vocabulary']}, {training['dtype']} on {training['device']}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column()
    table.add_column("ordinary head", justify="right")
    table.add_column("logitless", justify="right", style=ACCENT)
    table.add_column("ratio", justify="right")
    for name, values, text in (
        ("last training loss", last_losses(runs), "{:.4f}".format),
        ("held-out loss", pair(runs, "validation loss"), "{:.4f}".format),
        ("peak memory of the head", pair(runs, "head peak bytes"), bytes_text),
        ("head, forward and backward", part(runs, "head"), seconds_text),
        ("body, forward and backward", part(runs, "body"), seconds_text),
        ("optimizer", part(runs, "optimizer"), seconds_text),
        ("step", part(runs, "step"), seconds_text),
        ("tokens per second", pair(runs, "tokens per second"), "{:,.0f}".format),
    ):
        left, right = values
        cells = [text(value) if known(value) else "-" for value in values]
        ratio = f"{right / left:.2f}" if known(left) and known(right) and left else "-"
        table.add_row(name, *cells, "" if "loss" in name else ratio)
    console.print(table)
    if ordinary["losses"]:
        difference = found["largest loss difference"]
        console.print(f"largest difference between the loss curves: [{ACCENT}]{difference:.2g}[/]")
    workspace = bytes_text(found["planned workspace bytes"])
    gradients = bytes_text(found["head gradients bytes"])
    console.print(f"logitless planned {workspace} beside {gradients} of gradients", style=QUIET)
    for run in (ordinary, streamed):
        if run["failure"]:
            console.print(run["failure"], style="bold red")
    if found["sample"]:
        code = Syntax(found["sample"], "python", theme="ansi_light", background_color="default")
        console.print(Panel(code, title="what the model writes", title_align="left", style=QUIET))


def last_losses(runs: dict[str, Any]) -> tuple[float, float]:
    """The final training loss of each run."""
    left, right = (run["losses"][-1] if run["losses"] else math.nan for run in runs.values())
    return left, right


def pair(runs: dict[str, Any], name: str) -> tuple[float, float]:
    """One number of each run; nan where it is missing."""
    left, right = (run.get(name, math.nan) or math.nan for run in runs.values())
    return left, right


def part(runs: dict[str, Any], name: str) -> tuple[float, float]:
    """One part of the median step of each run, in seconds."""
    left, right = (run.get("seconds", {}).get(name, math.nan) for run in runs.values())
    return left, right


def known(value: float) -> bool:
    """Whether a number was measured."""
    return not math.isnan(value)
