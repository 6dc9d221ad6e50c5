"""The demo's text: the standard library's own source, a byte-pair vocabulary and batches of tokens.

Every machine that can run the demo has the text, so nothing is downloaded. Test suites are left
out: some distributions do not ship them, and the corpus should be about the same everywhere.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SKIPPED_FOLDERS = frozenset({"__pycache__", "idle_test", "site-packages", "test", "tests"})
END = "<|end|>"
HELD_OUT = 0.02


def standard_library() -> list[str]:
    """Source text of every module of this interpreter's standard library, sorted by path.

    Raises
    ------
    FileNotFoundError
        When the library's folder holds no ``.py`` files (a frozen or zipped interpreter).
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    if not paths:
        raise FileNotFoundError(
            f"the standard library's folder {root} holds no .py files; run the demo with an"
            " interpreter that ships its library as source"
        )
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def train_tokenizer(texts: list[str], classes: int) -> Tokenizer:
    """A byte-level byte-pair vocabulary of `classes` entries; fewer if pairs run out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=classes,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Encoded text.

    Attributes
    ----------
    tokenizer : Tokenizer
    training, held_out : (T,) int64
        Token streams; files are separated by the end token, held-out files are whole files.
    characters : int
    files : int
    """

    tokenizer: Tokenizer
    training: Tensor
    held_out: Tensor
    characters: int
    files: int

    @property
    def classes(self) -> int:
        """Size V of the vocabulary that was reached."""
        return int(self.tokenizer.get_vocab_size())

    def batches(self, sequences: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random windows of the stream: inputs and targets, each (sequences, context)."""
        generator = torch.Generator().manual_seed(seed)
        last = self.training.numel() - context - 1
        while True:
            starts = torch.randint(last, (sequences,), generator=generator)
            yield windows(self.training, starts, context)

    def validation(self, sequences: int, context: int) -> tuple[Tensor, Tensor]:
        """Evenly spaced windows of the held-out stream: (inputs, targets)."""
        last = self.held_out.numel() - context - 1
        return windows(self.held_out, torch.linspace(0, last, sequences).long(), context)


def windows(stream: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of `context` tokens from `starts`, and the same windows one token later."""
    positions = starts[:, None] + torch.arange(context + 1)
    tokens = stream[positions]
    return tokens[:, :-1], tokens[:, 1:]


def build_corpus(classes: int, say: Callable[[str], None] = lambda _: None) -> Corpus:
    """Read the library, train the vocabulary, encode.

    Parameters
    ----------
    classes : int
        Vocabulary size asked for.
    say : callable
        Told what is being done, for a progress display.
    """
    say("reading the standard library")
    texts = standard_library()
    say(f"training a byte-pair vocabulary of {classes}")
    tokenizer = train_tokenizer(texts, classes)
    say("encoding")
    end = tokenizer.encode(END).ids
    streams: tuple[list[int], list[int]] = ([], [])
    stride = round(1 / HELD_OUT)
    for number, encoding in enumerate(tokenizer.encode_batch(texts)):
        stream = streams[number % stride == 0]
        stream.extend(encoding.ids)
        stream.extend(end)
    training, held_out = (torch.tensor(stream) for stream in streams)
    return Corpus(tokenizer, training, held_out, sum(map(len, texts)), len(texts))
