"""What an installation promises: extras, their error messages, the console script."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires
from pathlib import Path

import pytest

from logitless import _extras


def is_installed() -> bool:
    """Tell whether the tests see an installed distribution or only a source folder."""
    try:
        metadata("logitless")
    except PackageNotFoundError:
        return False
    return True


needs_installation = pytest.mark.skipif(not is_installed(), reason="logitless is not installed")

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({names!r}))
"""
"""Makes packages look missing: None in `sys.modules` turns an import into ModuleNotFoundError."""


def run_without(names: list[str], code: str) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(names=names) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )


@needs_installation
def test_extras_of_the_distribution_cover_every_optional_package() -> None:
    declared = {*metadata("logitless").get_all("Provides-Extra", [])}
    assert declared == {"torch", "cupy12", "cupy13", "cli", "demo", "bench", "test"}
    assert {*_extras.EXTRAS.values()} <= declared


@needs_installation
def test_base_installation_needs_numpy_alone() -> None:
    base = [entry for entry in requires("logitless") or [] if "extra ==" not in entry]
    assert [re.match(r"[a-z]+", entry).group() for entry in base] == ["numpy"]


@pytest.mark.parametrize("module", ["functional", "nn", "losses", "ops"])
def test_torch_modules_name_their_extra(module: str) -> None:
    done = run_without(["torch"], f"import logitless.{module}")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "pip install 'logitless[torch]'" in done.stderr


@pytest.mark.parametrize("name", ["row_statistics", "row_loss", "RowStatistics", "functional"])
def test_torch_names_of_the_package_name_their_extra(name: str) -> None:
    done = run_without(["torch"], f"import logitless; logitless.{name}")
    assert "pip install 'logitless[torch]'" in done.stderr


def test_command_line_names_its_extra() -> None:
    done = run_without(["typer"], "from logitless.cli import main; main()")
    assert done.returncode == 1
    assert "pip install 'logitless[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@needs_installation
def test_console_script_is_declared() -> None:
    (script,) = entry_points(group="console_scripts", name="logitless")
    assert script.value == "logitless.cli:main"


@pytest.mark.parametrize(("module", "extra"), _extras.EXTRAS.items())
def test_require_names_the_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"pip install 'logitless[{extra}]'")) as caught:
        _extras.require(module, "the demo")
    assert str(caught.value).startswith(f"the demo needs {module}")
    assert caught.value.name == module


def test_a_broken_package_keeps_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tokenizers.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        _extras.require("tokenizers")
