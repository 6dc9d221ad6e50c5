"""The examples run: a tiny one of each."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "bench" / "examples"
TINY = "--steps 4 --tune-steps 2 --thin 6 --batch 16 --features 8 --hidden 16 --embedding 4"
TINY += " --scored 32 --marks 1 --most-epochs 2 --tokens 3000"


@pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are in the repository only")
def test_word_model(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    draw = random.Random(0)
    names = [f"{a}_{b}" for a in ("row", "loss", "mean", "class") for b in range(50)]
    for number in range(60):
        text = "\n".join(f"{draw.choice(names)} = {draw.choice(names)}()" for _ in range(20))
        (sources / f"{number}.py").write_text(text)
    arguments = [*TINY.split(), "--roots", str(sources), "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "word_model.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "word_model.json").read_text())
    assert {run["arm"] for run in result["runs"]} >= {"log-softmax", "Z-loss"}
    assert all(0 <= run["top10"] <= 1 for run in result["runs"])
    assert "| log-softmax, 1 epoch |" in (tmp_path / "word_model.md").read_text()
    assert (tmp_path / "word_model.png").stat().st_size > 10_000
