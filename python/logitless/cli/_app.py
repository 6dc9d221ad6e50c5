"""The typer application that ties the commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from logitless._core import __version__
from logitless.cli.bench import bench
from logitless.cli.demo import demo
from logitless.cli.info import info
from logitless.cli.memory import memory

app = typer.Typer(
    help="Softmax losses without the logits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (info, memory, bench, demo):
    app.command()(command)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer's callback protocol
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Softmax losses without the logits."""
