"""Next words in Python code: the Z-loss head against log-softmax over a large real vocabulary.

    python bench/examples/word_model.py --device cuda --corpus words.npz --out bench/examples

Nine words predict the next one. The body (embeddings, two linear layers, a layer norm; Adam) is the
same for all, and so is the initial head; the head is trained by SGD:

* *log-softmax*: torch's cross entropy of dense logits;
* *linear_cross_entropy*: the same loss without the logits, timed on a part of the epoch;
* *Z-loss*: `logitless.nn.SphericalHead`, whose step does not visit the classes.

Each loss gets the learning rate of the head, and the Z-loss its a and b, from a grid of short runs
(`GRID`, `ZGRID`), judged by top-1 on the first half of the held-out files; the numbers reported are
of the second half. All rates fall linearly to a tenth. Everything is fp32 without TF32. Writes
word_model.md, word_model.json and word_model.png. Without ``--corpus`` the words are read from this
machine's Python packages; see words.py, which also writes a corpus to carry.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import words
from torch import nn

import logitless.functional as LF
from logitless import losses
from logitless.nn import SphericalHead

CONTEXT = 9
TOPS = (1, 5, 10)
GRID = (1.0, 3.0, 10.0, 30.0)
# (a, b, learning rate of the head)
ZGRID = tuple(
    (a, b, lr)
    for a, b in ((1.0, 0.0), (1.0, 10.0), (0.3, 10.0), (0.1, 28.0), (0.1, 60.0))
    for lr in (10.0, 100.0, 1000.0)
)


@dataclass(frozen=True)
class Data:
    """Ids on the device and the places whose word is predicted."""

    ids: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def of(ids: Any, device: torch.device) -> Data:
        """Predict every word that is a class, from the second file's first word on."""
        tensor = torch.from_numpy(ids).to(device)
        places = (tensor >= words.SPECIAL).nonzero()[:, 0]
        return Data(tensor, places[places >= CONTEXT])

    def batch(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts (N, 9) and classes (N,); the ids of the two special words are no classes."""
        back = torch.arange(-CONTEXT, 0, device=places.device)
        return self.ids[places[:, None] + back].long(), self.ids[places].long() - words.SPECIAL


class Body(nn.Module):
    """Nine words to D features of unit variance."""

    def __init__(self, words_known: int, embedding: int, hidden: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words_known, embedding)
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * embedding, hidden),
            nn.ReLU(),
            nn.Linear(hidden, features),
            nn.LayerNorm(features, elementwise_affine=False),
        )

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """(N, 9) ids to (N, D)."""
        return self.layers(self.embedding(context).flatten(1))


class DenseHead(nn.Module):
    """A dense weight trained by SGD with torch's cross entropy or ours."""

    def __init__(self, linear: nn.Linear, *, lr: float, fused: bool) -> None:
        super().__init__()
        self.weight_ = nn.Parameter(linear.weight.detach().clone())
        self.optimiser = torch.optim.SGD([self.weight_], lr=lr)
        self.fused = fused

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss."""
        if self.fused:
            return LF.linear_cross_entropy(features, self.weight_, target)
        return F.cross_entropy(F.linear(features, self.weight_), target)

    def step(self, lr: float) -> None:
        """Take an SGD step."""
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def weight(self) -> torch.Tensor:
        """W, (V, D)."""
        return self.weight_.detach()


class ZHead(nn.Module):
    """The factored head with the same interface."""

    def __init__(self, linear: nn.Linear, *, a: float, b: float, lr: float) -> None:
        super().__init__()
        module = losses.zloss.module(a=a, b=b)
        self.head = SphericalHead.from_linear(linear, loss=module, optimizer="sgd", lr=lr)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return self.head(features, target)

    def step(self, lr: float) -> None:
        """Take an SGD step in O(D²) a row."""
        self.head.lr = lr
        self.head.step()

    def weight(self) -> torch.Tensor:
        """W, (V, D), materialised."""
        return self.head.weight()


class Trainer:
    """A body and a head from fixed seeds, trained and scored."""

    def __init__(self, given: argparse.Namespace, train: Data, classes: int) -> None:
        self.given, self.train, self.classes = given, train, classes
        self.device = torch.device(given.device)

    def run(
        self, arm: str, settings: dict[str, float], steps: int, scored: Data, marks: int = 0
    ) -> dict[str, Any]:
        """Train for some steps; score at the end and at ``marks`` moments before, off the clock."""
        given = self.given
        torch.manual_seed(given.seed)
        known = self.classes + words.SPECIAL
        body = Body(known, given.embedding, given.hidden, given.features).to(self.device)
        linear = nn.Linear(given.features, self.classes, bias=False).to(self.device)
        with torch.no_grad():
            linear.weight -= linear.weight.mean(0)  # as SphericalHead starts by itself
        head: DenseHead | ZHead
        if arm == "Z-loss":
            head = ZHead(linear, **settings)
        else:
            head = DenseHead(linear, fused=arm != "log-softmax", **settings)
        del linear
        adam = torch.optim.Adam(body.parameters(), lr=given.lr)
        generator = torch.Generator().manual_seed(given.seed)
        per_epoch = len(self.train.places) // given.batch
        at = {round(steps * (i + 1) / (marks + 1)) for i in range(marks)} | {steps}
        curve: list[dict[str, float]] = []
        seconds, order = 0.0, torch.empty(0)
        begin = self.now()
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(self.train.places), generator=generator)
                order = self.train.places[order.to(self.device)]
            fall = 1 - 0.9 * step / steps
            place = step % per_epoch * given.batch
            context, target = self.train.batch(order[place : place + given.batch])
            head(body(context), target).backward()
            head.step(settings["lr"] * fall)
            adam.param_groups[0]["lr"] = given.lr * fall
            adam.step()
            adam.zero_grad(set_to_none=True)
            if step + 1 in at:
                seconds += self.now() - begin
                found = top_accuracy(body, head.weight(), scored, given.batch)
                curve.append({"step": step + 1, "seconds": seconds, **found})
                begin = self.now()
        return {"arm": arm, "settings": settings, "steps": steps, "curve": curve, **curve[-1]}

    def now(self) -> float:
        """The clock, when the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tune(self, arm: str, grid: list[dict[str, float]], scored: Data) -> list[dict[str, Any]]:
        """Short runs of a grid, the best first; one that diverges counts as nothing."""
        found = []
        for settings in grid:
            try:
                run = self.run(arm, settings, self.given.tune_steps, scored)
            except (FloatingPointError, RuntimeError) as error:
                print(f"  {arm} {settings}: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            print(f"  {arm} {settings}: {percent(run)}, {run['seconds']:.1f} s", flush=True)
            found.append(run)
        return sorted(found, key=lambda run: -run["top1"])


@torch.no_grad()
def top_accuracy(body: Body, weight: torch.Tensor, data: Data, batch: int) -> dict[str, float]:
    """Share of places whose word is among the 1, 5, 10 largest logits; ties count as worse."""
    hits = torch.zeros(len(TOPS), device=weight.device)
    for places in data.places.split(batch):
        context, target = data.batch(places)
        logits = body(context) @ weight.T
        own = logits.gather(1, target[:, None])
        rank = (logits >= own).sum(1) if bool(own.isfinite().all()) else torch.full_like(target, 99)
        hits += torch.stack([(rank <= k).sum() for k in TOPS])
    return {f"top{k}": h / len(data.places) for k, h in zip(TOPS, hits.tolist(), strict=True)}


def percent(run: dict[str, Any]) -> str:
    """Top-1/5/10 in percent."""
    return " / ".join(f"{100 * run[f'top{k}']:.1f}" for k in TOPS)


def experiment(given: argparse.Namespace, corpus: words.Corpus) -> dict[str, Any]:
    """Tune, train an epoch of each, then the Z-loss for as long as log-softmax took."""
    device = torch.device(given.device)
    # The files come in random order: a part of the ids is a sample of them.
    train = Data.of(corpus.train[: given.train_words], device)
    held_out = Data.of(corpus.held_out, device)
    places = held_out.places[torch.randperm(len(held_out.places)).to(device)[: 2 * given.scored]]
    places = places.sort().values
    tuning, scored = (Data(held_out.ids, p) for p in places.chunk(2))
    classes = len(corpus.words) - words.SPECIAL
    trainer = Trainer(given, train, classes)
    epoch = len(train.places) // given.batch
    if given.steps:
        epoch = min(epoch, given.steps)
    print(f"{len(train.places)} words, {classes} classes, {epoch} steps an epoch", flush=True)
    # The two exact cross entropies share a rate: they are one function.
    dense = trainer.tune("log-softmax", [{"lr": lr} for lr in GRID], tuning)
    zgrid = [{"a": a, "b": b, "lr": lr} for a, b, lr in ZGRID]
    spherical = trainer.tune("Z-loss", zgrid[:: given.thin], tuning)
    runs = [trainer.run("log-softmax", dense[0]["settings"], epoch, scored, given.marks)]
    print(f"log-softmax: {percent(runs[0])}, {runs[0]['seconds']:.1f} s", flush=True)
    part = max(1, epoch // 16)
    lean = trainer.run("linear_cross_entropy", dense[0]["settings"], part, scored)
    runs.append({**lean, "seconds": lean["seconds"] * epoch / part, "part": part})
    best = spherical[0]["settings"]
    runs.append(trainer.run("Z-loss", best, epoch, scored, given.marks))
    print(f"Z-loss: {percent(runs[2])}, {runs[2]['seconds']:.1f} s", flush=True)
    epochs = max(1, math.floor(runs[0]["seconds"] / runs[2]["seconds"]))
    epochs = min(epochs, given.most_epochs)
    if epochs > 1:
        runs.append(trainer.run("Z-loss", best, epochs * epoch, scored, given.marks))
        name = f"Z-loss, {epochs} epochs"
        print(f"{name}: {percent(runs[3])}, {runs[3]['seconds']:.1f} s", flush=True)
    return {
        "classes": classes,
        "words": len(train.places),
        "scored": len(scored.places),
        "epoch": epoch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "arguments": {k: v for k, v in vars(given).items() if isinstance(v, (int, float, str))},
        "tuning": [{k: v for k, v in r.items() if k != "curve"} for r in dense + spherical],
        "runs": runs,
    }


def main() -> None:
    """Run the experiment and write what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--corpus", type=Path, help="written by words.py")
    parser.add_argument("--roots", type=Path, nargs="+", default=words.installed())
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the corpus at most")
    parser.add_argument("--train-words", type=int, help="of the corpus to train on, all if absent")
    parser.add_argument("--steps", type=int, help="of an epoch at most")
    parser.add_argument("--tune-steps", type=int, default=40)
    parser.add_argument("--thin", type=int, default=1, help="every n-th point of the Z-loss grid")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the body's Adam")
    parser.add_argument("--scored", type=int, default=10_000, help="held-out words of each half")
    parser.add_argument("--marks", type=int, default=6, help="scores along a run")
    parser.add_argument("--most-epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    corpus = (
        words.Corpus.load(given.corpus)
        if given.corpus
        else words.collect(given.roots, tokens=given.tokens)
    )
    result = experiment(given, corpus)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "word_model.json").write_text(json.dumps(result, indent=1) + "\n")
    from word_model_report import write

    write(result, given.out)


if __name__ == "__main__":
    main()
