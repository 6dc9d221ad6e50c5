"""Optional dependencies: the one place that imports them and says how to get a missing one.

`logitless` itself needs NumPy only. Every other package belongs to an extra of the
distribution, and a missing one must tell the reader which. A module that needs torch writes
``from logitless._extras import torch`` instead of ``import torch``; code that needs a package
in one branch only calls `require` there.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    import torch as torch

EXTRAS = {
    "cupy": "cupy13",
    "matplotlib": "cli",
    "psutil": "bench",
    "rich": "cli",
    "tokenizers": "demo",
    "torch": "torch",
    "typer": "cli",
}
"""Import name of every optional package -> the extra that installs it."""


def available(module: str) -> bool:
    """Tell whether `module` is installed, without importing it."""
    return find_spec(module) is not None


def require(module: str, purpose: str = "this part of logitless") -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Parameters
    ----------
    module
        Import name, one of `EXTRAS`.
    purpose
        What needs it: the subject of the error message.

    Returns
    -------
    ModuleType
        The imported module.

    Raises
    ------
    ImportError
        `module` is not installed. The message names the extra. A package that is installed
        but fails to import raises its own error unchanged.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        command = f"pip install 'logitless[{EXTRAS[module]}]'"
        if module == "cupy":
            command += " (cupy12 for a CUDA 12 driver)"
        message = f"{purpose} needs {module}, which is not installed; run: {command}"
        raise ImportError(message, name=module) from error


def __getattr__(name: str) -> ModuleType:
    """Import ``torch`` on first use, so that its absence names the extra."""
    if name == "torch":
        return require("torch", "the torch interface of logitless")
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
