"""The command line: what it prints, what it refuses, and whether its memory figures are true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer import BadParameter
from typer.testing import CliRunner

from logitless._core import __version__
from logitless._extras import available
from logitless.cli import footprint
from logitless.cli._app import app
from logitless.cli._console import bytes_text, parse_bytes, seconds_text
from logitless.cli.footprint import Head

run = CliRunner().invoke

needs_torch = pytest.mark.skipif(not available("torch"), reason="torch is not installed")


def out(*arguments: str) -> str:
    result = run(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    """The error text, on one line, of a command line that must be refused."""
    result = run(app, list(arguments))
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_version() -> None:
    assert out("--version").strip() == __version__


@pytest.mark.parametrize("command", ["info", "memory", "bench", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in out(command, "--help")


def test_without_typer_the_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom logitless.cli import main; main()"
    block = "import importlib.util as u; real = u.find_spec\n"
    block += "u.find_spec = lambda name, *rest: None if name == 'typer' else real(name, *rest)\n"
    child = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)
    assert child.returncode == 1
    assert "pip install 'logitless[cli]'" in child.stderr
    assert "Traceback" not in child.stderr


# --- info ------------------------------------------------------------------------------------


def test_info_says_why_an_engine_is_off() -> None:
    found = json.loads(out("info", "--json"))
    assert found["logitless"] == __version__
    assert found["cpu"]["level"] in found["cpu"]["levels"]
    assert found["cuda"]["engine"] == "on" or found["cuda"]["reason"]
    assert found["packages"]["numpy"]


def test_info_prints_a_table() -> None:
    text = out("info")
    assert "level" in text
    assert "torch" in text


# --- memory ----------------------------------------------------------------------------------

SHAPE = ("--tokens", "1024", "--hidden", "128", "--vocab", "16384", "--dtype", "fp32")


def test_memory_json_holds_every_moment() -> None:
    found = json.loads(out("memory", *SHAPE, "--json"))
    block = 1024 * 16384 * 4
    assert found["methods"]["eager"]["peak_bytes"] == 3 * block
    assert found["methods"]["lean"]["peak_bytes"] < found["methods"]["eager"]["peak_bytes"] / 4
    assert found["input_bytes"] == (1024 + 16384) * 128 * 4 + 1024 * 8
    for method in found["methods"].values():
        peak = max(sum(moment.values()) for moment in method["moments"].values())
        assert method["peak_bytes"] == peak


def test_memory_table_and_plot(tmp_path: Path) -> None:
    text = out("memory", *SHAPE, "--plot", str(tmp_path / "memory.png"))
    assert "log-softmax" in text
    assert "192 MiB" in text
    assert (tmp_path / "memory.png").stat().st_size < 300_000


def test_memory_refuses_a_budget_that_is_no_size() -> None:
    assert "24GiB" in refused("memory", "--budget", "lots")


def test_memory_on_a_gpu_needs_an_engine_that_can_plan() -> None:
    result = run(app, ["memory", "--device", "cuda"])
    if result.exit_code != 0:
        assert "use --device cpu here" in " ".join(result.output.split())


@pytest.mark.parametrize("method", footprint.METHODS)
def test_largest_batch_fits_and_the_next_does_not(method: str) -> None:
    budget = 512 * 2**20
    head = Head(1, 64, 8192, "fp32")
    rows = footprint.largest_rows(method, head, budget)

    def total(rows: int) -> int:
        tried = Head(rows, 64, 8192, "fp32")
        return tried.inputs + footprint.METHODS[method](tried).peak

    assert total(rows) <= budget < total(rows + 1)


def test_nothing_fits_a_budget_below_the_weight() -> None:
    assert footprint.largest_rows("eager", Head(1, 64, 8192, "fp32"), 1000) == 0


@needs_torch
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(1024, 128, 16384), (64, 512, 50257), (7, 300, 200)])
def test_chunk_rows_are_those_torch_picks(sizes: tuple[int, int, int], dtype: str) -> None:
    import torch

    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    rows, features, classes = sizes
    element = torch.float32 if dtype == "fp32" else torch.bfloat16
    options = torch.nn.LinearCrossEntropyOptions()
    chosen = options._adjust(rows, features, classes, element, torch.device("cpu"))
    expected = footprint.chunk_rows(Head(*sizes, dtype), accurate=dtype == "bf16")
    assert chosen.batch_chunk_size == expected


@needs_torch
@pytest.mark.memory
@pytest.mark.parametrize(
    ("method", "dtype"),
    [("eager", "fp32"), ("eager", "bf16"), ("chunked", "fp32"), ("lean", "fp32")],
)
def test_computed_peak_is_the_measured_one(method: str, dtype: str) -> None:
    import torch

    from logitless.cli.harness.cases import Case
    from logitless.cli.harness.memory import clean_growth, resettable

    if not resettable():
        pytest.skip("no resettable high-water mark here")
    if method == "chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked linear_cross_entropy")
    computed = footprint.METHODS[method](Head(1024, 512, 8192, dtype)).peak
    allowed = 6 * 2**20  # beside the tensors, a library may keep packed operands
    measured = clean_growth(Case(1024, 512, 8192, dtype), method, "forward+backward")
    if method == "chunked":  # what is computed for it is a lower bound
        assert measured >= computed - allowed
        return
    if dtype == "bf16":  # oneDNN transposes the logits' gradient on some thread counts
        assert computed - allowed <= measured <= computed + 1024 * 8192 * 2 + allowed
        return
    assert measured == pytest.approx(computed, rel=0.12, abs=allowed)


# --- bench -----------------------------------------------------------------------------------


@needs_torch
def test_bench_measures_a_shape(tmp_path: Path) -> None:
    text = out(
        *("bench", "--shape", "32,16,100", "--only", "eager,lean,products", "--seconds", "0"),
        *("--no-memory", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")),
        "--markdown",
    )
    assert "allocator" in text
    assert "OMP" in text
    assert "| 32 x 16 x 100 fp32 | forward+backward | **logitless lean** |" in text
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {(row["mode"], row["contender"]): row for row in found["rows"]}
    ours = rows["forward+backward", "lean"]
    assert ours["time"]["count"] >= 5
    assert ours["ratio"]["lower"] <= ours["ratio"]["median"] <= ours["ratio"]["upper"]
    assert ours["error"]["d_weight"] < 1e-5
    assert rows["forward", "eager"]["ratio"]["median"] == 1.0
    assert (tmp_path / "b.png").stat().st_size > 0


@needs_torch
def test_an_interrupted_bench_reports_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitless.cli.harness import timing

    real, calls = timing.interleaved, []

    def once(*arguments: Any, **options: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(timing, "interleaved", once)
    text = out(
        *("bench", "--shape", "8,8,16", "--only", "eager,lean", "--seconds", "0"),
        *("--no-memory", "--no-error"),
    )
    assert "8 x 8 x 16 fp32 on cpu, forward, interleaved" in text
    assert "forward+backward, interleaved" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("clock", ["interleaved", "sustained"])
def test_bench_on_a_gpu(tmp_path: Path, clock: str) -> None:
    out(
        *("bench", "--shape", "256,64,1000", "--device", "cuda", "--dtype", "bf16"),
        *("--only", "eager,lean,fast,products", "--clock", clock, "--seconds", "0.2"),
        *("--json", str(tmp_path / "b.json")),
    )
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    ours = [row for row in rows if row["contender"] == "lean"]
    assert all(row["peak_bytes"] > 0 for row in ours)
    assert ours[-1]["error"]["d_weight"] < 0.01


@needs_torch
@pytest.mark.memory
def test_bench_measures_memory_in_a_process_of_its_own(tmp_path: Path) -> None:
    out(
        *("bench", "--shape", "512,64,8192", "--only", "eager", "--mode", "forward+backward"),
        *("--seconds", "0", "--no-error", "--json", str(tmp_path / "b.json")),
    )
    (row,) = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert row["peak_bytes"] == pytest.approx(3 * 512 * 8192 * 4, rel=0.15)


@needs_torch
def test_a_contender_that_fails_is_reported_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from logitless.cli.harness import contenders
    from logitless.cli.harness.cases import Case
    from logitless.cli.harness.run import Options, measure

    def explode() -> contenders.Loss:
        raise RuntimeError("no such kernel\nsecond line")

    broken = contenders.FromLoss("broken", "always fails", build=explode)
    monkeypatch.setitem(contenders.CONTENDERS, "broken", broken)
    options = Options(("eager", "broken"), ("forward",), seconds=0, memory=False)
    ((eager, failed),) = measure([Case(8, 8, 16)], options)
    assert failed.reason == "RuntimeError: no such kernel"
    assert failed.time is None
    assert eager.time is not None


@needs_torch
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shape", "12,34"), "three positive integers N,D,V"),
        (("--shape", "12,0,34"), "three positive integers N,D,V"),
        (("--preset", "huge"), "expected one of quick"),
        (("--only", "eager,magic"), "--only names magic"),
    ],
)
def test_bench_refuses(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refused("bench", *arguments)


@needs_torch
def test_gpu_presets_without_a_gpu_are_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no CUDA device" in refused("bench", "--preset", "gpu")


@needs_torch
def test_ratios_are_paired() -> None:
    from logitless.cli.harness.timing import paired_ratio

    # The second side is exactly twice the first in every round, however slow the round was.
    rounds = [1.0, 5.0, 0.1, 3.0, 2.0, 9.0, 1.5]
    ratio = paired_ratio(rounds, [2 * value for value in rounds])
    assert (ratio.lower, ratio.median, ratio.upper) == (0.5, 0.5, 0.5)


@needs_torch
def test_rounds_run_everyone_once() -> None:
    import torch

    from logitless.cli.harness.timing import interleaved

    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(steps, torch.device("cpu"), seconds=0.0, rounds=(4, 10))
    assert [len(values) for values in times.values()] == [4, 4, 4]
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


@needs_torch
def test_the_reference_is_the_dense_loss() -> None:
    import torch
    import torch.nn.functional as F

    from logitless.cli.harness import accuracy
    from logitless.cli.harness.cases import Case, problem

    given = problem(Case(50, 7, 33, "fp64"))
    loss = F.cross_entropy(F.linear(given.input, given.weight), given.target)
    d_input, d_weight = torch.autograd.grad(loss, (given.input, given.weight))
    found = accuracy.errors((loss, d_input, d_weight), accuracy.reference(given))
    assert max(found.loss, found.d_input, found.d_weight) < 1e-14


# --- units -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("500 MB", 500_000_000), ("1.5gib", 3 * 2**29), ("4096", 4096)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "3 parsecs", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="24GiB"):
        parse_bytes(text)


def test_units_are_printed_with_three_digits() -> None:
    assert [bytes_text(n) for n in (12, 2048, 1.5 * 2**20, 3 * 2**40)] == [
        "12 B",
        "2.00 KiB",
        "1.50 MiB",
        "3.00 TiB",
    ]
    assert [seconds_text(s) for s in (5e-5, 0.0123, 2.5)] == ["50.0 us", "12.3 ms", "2.50 s"]
