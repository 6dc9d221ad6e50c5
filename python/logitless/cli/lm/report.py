"""The demo's record: everything it found, as plain data for the table, the figure and the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from logitless.cli.footprint import Head, logitless
from logitless.cli.lm.corpus import Corpus
from logitless.cli.lm.train import Run, Settings, largest_difference

SHORT = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


@dataclass(frozen=True)
class Outcome:
    """What training left: both runs, the text, and whether it was interrupted."""

    settings: Settings
    corpus: Corpus
    ordinary: Run
    streamed: Run
    interrupted: bool
    sample: str

    @property
    def head(self) -> Head:
        """Sizes of the head as the loss sees them."""
        shape = self.streamed.body.shape
        return Head(
            self.settings.tokens,
            shape.features,
            shape.classes,
            SHORT[str(self.settings.dtype)],
            self.settings.device.type,
        )


def record(outcome: Outcome, facts: dict[str, str]) -> dict[str, Any]:
    """The contents of ``demo.json``."""
    shape, settings = outcome.streamed.body.shape, outcome.settings
    plan = logitless(outcome.head, "lean")
    gradients = sum(outcome.head.gradients.values())
    return {
        "complete": not outcome.interrupted,
        "machine": facts,
        "corpus": {
            "files": outcome.corpus.files,
            "characters": outcome.corpus.characters,
            "tokens": outcome.corpus.training.numel(),
        },
        "model": {
            "vocabulary": shape.classes,
            "features": shape.features,
            "layers": shape.layers,
            "context": shape.context,
            "parameters": sum(each.numel() for each in outcome.streamed.body.parameters()),
        },
        "training": {
            "tokens per step": settings.tokens,
            "steps": len(outcome.streamed.losses),
            "steps asked for": settings.steps,
            "dtype": outcome.head.dtype,
            "device": str(settings.device),
            "threads": torch.get_num_threads(),
            "seed": settings.seed,
        },
        "largest loss difference": finite(largest_difference(outcome.ordinary, outcome.streamed)),
        "head gradients bytes": gradients,
        "planned workspace bytes": max(0, plan.peak - gradients),
        "runs": {run.name: describe(run) for run in (outcome.ordinary, outcome.streamed)},
        "sample": outcome.sample,
    }


def finite(value: float) -> float | None:
    """The value, or None for a number that JSON cannot hold."""
    return value if math.isfinite(value) else None


def describe(run: Run) -> dict[str, Any]:
    """One run: its curve, the median step in parts, memory and speed."""
    typical = run.typical()
    found: dict[str, Any] = {
        "failure": run.failure,
        "losses": run.losses,
        "validation loss": finite(run.validation),
        "head peak bytes": run.head_peak,
    }
    if typical is not None:
        found["seconds"] = {
            "body": typical.body,
            "head": typical.head,
            "optimizer": typical.optimizer,
            "step": typical.step,
        }
        found["tokens per second"] = run.settings.tokens / typical.step
    return found
