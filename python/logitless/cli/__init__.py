"""The command line: ``logitless info | memory | bench | demo``.

Each command is a module here with one public function of its own name; importing this package
imports neither typer nor torch, so that a machine without an extra gets a sentence and not a
traceback.
"""

from __future__ import annotations

import sys

from logitless._extras import available


def main() -> None:
    """Entry point of the ``logitless`` script and of ``python -m logitless``."""
    missing = [name for name in ("typer", "rich") if not available(name)]
    if missing:
        sys.exit(
            f"the logitless command needs {' and '.join(missing)}, not installed here;"
            " run: pip install 'logitless[cli]'"
        )
    from logitless.cli._app import app

    app()
