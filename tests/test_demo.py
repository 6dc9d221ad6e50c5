"""The demo: two runs that differ in their head only, and a report of whatever was reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import torch
from typer.testing import CliRunner

from logitless.cli._app import app
from logitless.cli.lm import corpus as corpus_module
from logitless.cli.lm import train as train_module
from logitless.cli.lm.corpus import Corpus, build_corpus
from logitless.cli.lm.heads import HEADS
from logitless.cli.lm.model import Body, Shape
from logitless.cli.lm.train import Run, Settings, largest_difference, make_run, schedule

TINY = ("--vocab", "512", "--tokens", "64", "--context", "16", "--hidden", "64", "--layers", "1")
SHAPE = Shape(512, 64, 1, 1, 16)
SETTINGS = Settings(64, 3, 0, torch.device("cpu"), torch.float32, limit=60.0)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A few real files, to keep the vocabulary quick."""
    return corpus_module.standard_library()[:25]


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> Iterator[Corpus]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "standard_library", lambda: texts)
        yield build_corpus(512)


@pytest.fixture
def _few_files(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    monkeypatch.setattr(corpus_module, "standard_library", lambda: texts)


def demo(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["demo", *TINY, "--out", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "demo.json").read_text())


@pytest.mark.usefixtures("_few_files")
def test_it_trains_both_and_reports(tmp_path: Path) -> None:
    text, found = demo(tmp_path, "--steps", "15")
    assert found["complete"]
    assert found["model"]["vocabulary"] == 512
    runs = found["runs"]
    assert len(runs["ordinary"]["losses"]) == len(runs["logitless"]["losses"]) == 15
    assert found["largest loss difference"] < 1e-4
    assert runs["logitless"]["losses"][-1] < runs["logitless"]["losses"][0]
    for run in runs.values():
        parts = run["seconds"]
        assert parts["body"] > 0
        assert parts["head"] > 0
        assert run["tokens per second"] > 0
        assert run["validation loss"] < 10
    assert found["sample"].startswith("    def __init__(self")
    assert "largest difference" in text
    assert "tokens per second" in text
    assert 0 < (tmp_path / "demo.png").stat().st_size < 300_000


@pytest.mark.usefixtures("_few_files")
def test_an_interrupt_leaves_a_partial_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Run.step

    def interrupted(self: Run, *arguments: Any) -> None:
        if len(self.losses) == 2:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Run, "step", interrupted)
    text, found = demo(tmp_path, "--steps", "9")
    assert "interrupted" in text
    assert not found["complete"]
    assert found["training"]["steps"] == 2
    assert found["runs"]["logitless"]["validation loss"] is None
    assert (tmp_path / "demo.png").exists()


@pytest.mark.usefixtures("_few_files")
def test_an_ordinary_head_that_does_not_fit_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9000 GiB\nand more")

    monkeypatch.setitem(HEADS, "ordinary", too_much)
    text, found = demo(tmp_path, "--steps", "5")
    assert found["runs"]["ordinary"]["failure"].startswith("out of memory at step 0: tried to")
    assert len(found["runs"]["logitless"]["losses"]) == 5
    assert "out of memory" in text
    assert (tmp_path / "demo.png").exists()


@pytest.mark.usefixtures("_few_files")
def test_if_neither_fits_the_reason_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 9000 GiB")

    for name in HEADS:
        monkeypatch.setitem(HEADS, name, too_much)
    result = CliRunner().invoke(app, ["demo", *TINY, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "out of memory at step 0" in " ".join(result.output.split())


@pytest.mark.usefixtures("_few_files")
def test_a_head_larger_than_the_machine_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitless.cli.harness import machine

    monkeypatch.setattr(machine, "available_memory", lambda _: 1000)
    text, found = demo(tmp_path, "--steps", "6")
    assert "its logits need" in found["runs"]["ordinary"]["failure"]
    assert found["runs"]["ordinary"]["losses"] == []
    assert "left out" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tokens", "100"), "expected a multiple of --context (16)"),
        (("--hidden", "100"), "expected a multiple of 64"),
        (("--dtype", "fp64"), "expected fp32 or bf16"),
        (("--dtype", "fp16"), "expected fp32 or bf16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(app, ["demo", *TINY, *arguments])
    assert result.exit_code == 2
    assert expected in " ".join(result.output.split())


@pytest.mark.gpu
@pytest.mark.usefixtures("_few_files")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    _, found = demo(tmp_path, "--steps", "8", "--device", "cuda", "--dtype", dtype)
    assert "GPU" in found["machine"]
    assert found["runs"]["logitless"]["head peak bytes"] > 0
    assert found["largest loss difference"] < (1e-3 if dtype == "fp32" else 0.05)


def test_cuda_without_a_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["demo", *TINY, "--device", "cuda"])
    assert result.exit_code == 2
    assert "no CUDA device" in " ".join(result.output.split())


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from logitless.cli import _console

    monkeypatch.setattr(_console, "available", lambda name: name != "tokenizers")
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2
    assert "pip install 'logitless[demo]'" in " ".join(result.output.split())


# --- the parts -------------------------------------------------------------------------------


def test_the_corpus_holds_out_whole_files(corpus: Corpus) -> None:
    assert corpus.classes == 512
    assert corpus.held_out.numel() > 0
    assert corpus.training.numel() > 10 * corpus.held_out.numel()
    inputs, targets = next(corpus.batches(4, 16, seed=0))
    assert inputs.shape == targets.shape == (4, 16)
    torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])


def test_batches_repeat_with_the_seed(corpus: Corpus) -> None:
    first, second = (next(corpus.batches(4, 16, seed=3))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_encoding_is_reversible(corpus: Corpus) -> None:
    text = "def café(x):\n\treturn x ** 2  # ∑\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text


def test_both_runs_start_from_the_same_weights() -> None:
    first, second = (make_run(name, SHAPE, SETTINGS) for name in HEADS)
    for a, b in zip(first.body.parameters(), second.body.parameters(), strict=True):
        assert torch.equal(a, b)


def test_both_heads_give_the_same_loss_and_gradients(corpus: Corpus) -> None:
    body = Body(SHAPE)
    inputs, targets = next(corpus.batches(4, 16, seed=0))
    found = {}
    for name, head in HEADS.items():
        body.zero_grad()
        loss = head(body(inputs), body.embedding.weight, targets)
        loss.backward()
        found[name] = [loss.detach(), *(p.grad.clone() for p in body.parameters())]
    torch.testing.assert_close(found["ordinary"], found["logitless"], rtol=1e-4, atol=1e-6)


def test_cutting_the_graph_at_the_hidden_states_changes_no_step(corpus: Corpus) -> None:
    inputs, targets = next(corpus.batches(4, 16, seed=0))
    run = make_run("ordinary", SHAPE, SETTINGS)
    run.step(inputs, targets, rate=1e-3)

    whole = make_run("ordinary", SHAPE, SETTINGS)
    for group in whole.optimizer.param_groups:
        group["lr"] = 1e-3
    whole.head(whole.body(inputs), whole.body.embedding.weight, targets).backward()
    whole.optimizer.step()
    for a, b in zip(run.body.parameters(), whole.body.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_the_model_is_causal() -> None:
    body = Body(SHAPE)
    tokens = torch.randint(512, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = 0
    torch.testing.assert_close(body(tokens)[0, :10], body(changed)[0, :10])


def test_the_schedule_rises_holds_and_falls() -> None:
    rates = [schedule(step, step / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == rates[50] == 1.0
    assert rates[99] == pytest.approx(0.025)


def test_the_time_limit_ends_training(corpus: Corpus) -> None:
    settings = Settings(64, 10_000, 0, torch.device("cpu"), torch.float32, limit=0.5)
    run = make_run("logitless", SHAPE, settings)
    steps = list(train_module.train([run], corpus, settings))
    assert 0 < len(steps) < 10_000


def test_the_difference_is_over_common_steps() -> None:
    first, second = (make_run("ordinary", SHAPE, SETTINGS) for _ in range(2))
    first.losses, second.losses = [1.0, 2.0, 9.0], [1.0, 2.5]
    assert largest_difference(first, second) == 0.5
