"""A corpus that every machine with Python has: the words of its packages' sources and docs.

    python bench/examples/words.py words.npz [--roots FOLDER ...] [--tokens 4000000]

Files of one content count once. Their order, what is held out (one file in twenty) and where the
corpus ends if it is limited follow from a hash of the content, so that the same files give the same
corpus. A word is what Python would take for a name, digits and underscores included.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUFFIXES = frozenset((".py", ".pyi", ".rst", ".md", ".txt"))
WORD = re.compile(r"[^\W\d]\w*")
LONGEST = 40  # characters: longer ones are encoded data
HELD_OUT = 20
# The first ids are no words: any that is too rare to be a class, and the start of a file.
UNKNOWN, START = 0, 1
SPECIAL = 2


@dataclass(frozen=True)
class Corpus:
    """Word ids of the files one after another, each begun by START.

    Attributes
    ----------
    words : list of str
        What the ids stand for, the most frequent first; ids 0 and 1 are "<unknown>" and "<file>".
    train, held_out : ndarray
        int32 ids; rare words are UNKNOWN.
    """

    words: list[str]
    train: np.ndarray
    held_out: np.ndarray

    def save(self, path: Path) -> None:
        """Write an .npz file, planes of bytes apart, which packs better."""
        planes = {
            f"{name}{byte}": (ids >> 8 * byte).astype(np.uint8)
            for name, ids in (("train", self.train), ("held_out", self.held_out))
            for byte in range(3)
        }
        text = np.frombuffer("\n".join(self.words).encode(), np.uint8)
        np.savez_compressed(path, words=text, **planes)

    @staticmethod
    def load(path: Path) -> Corpus:
        """Read what `save` wrote."""
        with np.load(path) as found:
            train, held_out = (
                sum(found[f"{name}{byte}"].astype(np.int32) << 8 * byte for byte in range(3))
                for name in ("train", "held_out")
            )
            return Corpus(found["words"].tobytes().decode().split("\n"), train, held_out)


def collect(roots: list[Path], *, tokens: int | None = None, least: int = 2) -> Corpus:
    """Read the sources and docs under ``roots``; words seen fewer than ``least`` times are unknown.

    Only the training part decides what is a word.
    """
    parts: dict[bool, list[list[str]]] = {False: [], True: []}
    total = 0
    for digest, text in sorted(_documents(roots)):
        found = [word for word in WORD.findall(text) if len(word) <= LONGEST]
        parts[digest[-1] % HELD_OUT == 0].append(found)
        total += len(found)
        if tokens is not None and total >= tokens:
            break
    counts = Counter(word for document in parts[False] for word in document)
    words = [word for word, count in counts.most_common() if count >= least]
    ids = {word: place for place, word in enumerate(words, SPECIAL)}

    def encode(documents: list[list[str]]) -> np.ndarray:
        return np.array(
            [i for d in documents for i in (START, *(ids.get(word, UNKNOWN) for word in d))],
            np.int32,
        )

    return Corpus(["<unknown>", "<file>", *words], encode(parts[False]), encode(parts[True]))


def installed() -> list[Path]:
    """The standard library and site-packages of this Python."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def _documents(roots: list[Path]) -> Iterator[tuple[bytes, str]]:
    seen = set()
    for root in roots:
        for path in root.rglob("*"):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                yield digest, content.decode("utf-8", "ignore")


def main() -> None:
    """Write a corpus for another machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--roots", type=Path, nargs="+", default=installed())
    parser.add_argument("--tokens", type=int)
    given = parser.parse_args()
    corpus = collect(given.roots, tokens=given.tokens)
    corpus.save(given.path)
    sizes = f"{len(corpus.train)} + {len(corpus.held_out)} tokens"
    print(f"{given.path}: {sizes}, {len(corpus.words)} classes")


if __name__ == "__main__":
    main()
