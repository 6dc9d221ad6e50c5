"""Every tensor-core kernel against float64: ragged shapes, live-row counts, repair lists, targets.

``python bench/kernels/check.py --kernels target/kernels [SUBSTRING...]``. Padding is nan on the way
in, and must be nan past the last 16 bytes on the way out. ``--part 2/8`` takes the second kernel of
every eight. ``--small`` is for the sanitizer (sanitize.sh): the least that meets every barrier more
than once. One cluster of two CTAs makes every tile, so that each warpgroup has two, and six blocks
of K go once around a ring of three to five stages. ``--uniform`` has no targets: all warps of a
warpgroup take the same body of an epilogue.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from device import Kernels, Launch
from torch import Tensor

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ROUNDING = {"bf16": 3e-3, "f16": 5e-4, "f32": 1e-5}  # relative Frobenius error of a rounded result
EXACT = {"bf16": 2e-5, "f16": 2e-5, "f32": 2e-5}  # of one that stays in float
SHAPES = ((128, 256, 64), (300, 520, 200), (1000, 1777, 136), (2051, 4001, 328))
SMALL = (140, 580, 328)
SCALE, SOFTCAP, FIRST_CLASS = 0.7, 3.0, 1000


@dataclass
class Report:
    """Counts, and prints what fails."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def near(self, what: str, found: Tensor, wanted: Tensor, most: float) -> None:
        """Relative error of the whole."""
        wanted = wanted.double()
        error = ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
        self.true(f"{what}: {error:.2e} > {most:.0e}", error <= most)

    def true(self, what: str, fine: bool) -> None:
        """A condition."""
        self.passed += fine
        if not fine:
            self.failed.append(what)
            print("FAIL", what, flush=True)


def round_up(x: int, step: int) -> int:
    return -(-x // step) * step


def stored(x: Tensor, transposed: bool) -> Tensor:
    """x as the kernel reads it, in a pitch of 16 bytes with nan behind."""
    source = x.t() if transposed else x
    rows, columns = source.shape
    out = torch.full((rows, round_up(columns, 8)), math.nan, device=DEVICE, dtype=x.dtype)
    out[:, :columns] = source
    return out


@dataclass
class Case:
    """One kernel at one shape."""

    kernels: Kernels
    name: str
    extents: tuple[int, int, int]
    report: Report
    count: int | None = None
    listed: bool = False
    uneven: bool = False  # the first cluster makes the last two tiles first
    clusters: int | None = None  # None: as many as fit
    targets: bool = True

    def __post_init__(self) -> None:
        m, n, k = self.extents
        kernel = self.kernels.table[self.name]
        self.operation, self.dtype = kernel["operation"], kernel["dtype"]
        self.is_gradient = self.operation[:2] in ("dw", "de")
        self.block = kernel["n"] if kernel["by_maps"] else 64
        self.mapped = kernel["mapped"]
        self.tag = f"{self.name} {m}x{n}x{k} count {self.count} listed {self.listed}"
        self.tag += " uneven" * self.uneven
        dtype = DTYPES[self.dtype]
        spread = 1.0 if self.is_gradient else 1.5 / math.sqrt(k)
        a = torch.randn(m, k, device=DEVICE).to(dtype)
        b = (torch.randn(n, k, device=DEVICE) * spread).to(dtype)
        self.fields: dict[str, Any] = {"ld_row": m + 3, "group": 3, "col0": FIRST_CLASS}
        self.rows = torch.arange(m, device=DEVICE)
        if self.count is not None:
            self.fields["count"] = torch.tensor([self.count], device=DEVICE, dtype=torch.int32)
            if self.operation.startswith("dw"):
                self.fields["count_is_k"] = 1
                a[:, self.count :] = 0
                b[:, self.count :] = 0
            else:
                self.rows = self.rows[: self.count]
        if self.listed:
            blocks = list(range(0, -(-m // 256), 2))
            listed = torch.tensor([len(blocks), *blocks], device=DEVICE, dtype=torch.int32)
            self.fields["gate"] = listed
            self.rows = torch.cat([self.rows[i * 256 : (i + 1) * 256] for i in blocks])
        self.a = stored(a, self.operation.startswith("dw"))
        self.b = stored(b, self.is_gradient)
        self.product = a.double() @ b.double().t()

    def output(self, dtype: torch.dtype) -> Tensor:
        m, n, _ = self.extents
        return torch.full((m, round_up(n, 8) + 8), math.nan, device=DEVICE, dtype=dtype)

    def launch(self, d: Tensor | None = None) -> None:
        if self.uneven:
            self.fields.update(early=1, head=2)
        options: dict[str, Any] = self.fields | {"clusters": self.clusters}
        Launch(self.kernels, self.name, self.extents, self.a, self.b, d, **options)()

    def result(self, what: str, out: Tensor, wanted: Tensor, most: float) -> None:
        n = self.extents[1]
        self.report.near(f"{self.tag} {what}", out[self.rows, :n], wanted[self.rows], most)
        past = out[:, round_up(n, 8) :]
        self.report.true(f"{self.tag} {what}: padding untouched", bool(past.isnan().all()))

    # -- products --------------------------------------------------------------------------------
    def gradient_product(self) -> None:
        m, n, _ = self.extents
        dtype = DTYPES[self.dtype]
        self.fields["alpha"] = torch.tensor([0.37], device=DEVICE)
        wanted = 0.37 * self.product
        hot = self.class_targets() if self.operation.startswith("dw") else 0.0
        if self.operation.endswith("f32"):
            out = self.output(torch.float32)
            self.launch(out)
            self.fields["accumulate"] = 1
            self.launch(out)
            self.result("twice", out, 2 * (wanted + hot), EXACT[self.dtype])
            return
        factor = torch.rand(m + 3, device=DEVICE) + 0.5
        self.fields["coef"] = factor
        wanted = wanted * factor[:m, None].double()
        if self.operation == "de":
            w = torch.randn(50, round_up(n, 8), device=DEVICE).to(dtype)
            target = torch.randint(-1, 50, (m,), device=DEVICE, dtype=torch.int32)
            g = torch.randn(m, device=DEVICE)
            self.fields.update(onehot_w=w, onehot_g=g, onehot_ld=w.stride(0), target=target)
            at_target = torch.where(target >= 0, g, 0.0).double()[:, None]
            hot = at_target * w.double()[target.clamp(min=0).long(), :n]
        out = self.output(dtype)
        self.launch(out)
        self.result("result", out, wanted + hot, ROUNDING[self.dtype])

    def class_targets(self) -> Tensor:
        """The targets' part of dW, from lists of 0, 1, a few and hundreds of rows a class."""
        m, n, _ = self.extents
        counts = torch.randint(0, 3, (m,), device=DEVICE)
        counts[5::67] = torch.randint(8, 10, counts[5::67].shape, device=DEVICE)
        counts[[7, 20, m - 1]] = torch.tensor([333, 64, 130], device=DEVICE)
        start = torch.zeros(m + 1, device=DEVICE, dtype=torch.int32)
        start[1:] = counts.cumsum(0)
        entries = int(start[-1])
        w = torch.randn(50, round_up(n, 8), device=DEVICE).to(DTYPES[self.dtype])
        rows = torch.randint(0, 50, (entries,), device=DEVICE, dtype=torch.int32)
        g = torch.randn(entries, device=DEVICE)
        # Offsets count from the head of the lists: a chunk of classes starts anywhere in them.
        lead = torch.full((40,), -(1 << 30), device=DEVICE, dtype=torch.int32)
        self.fields.update(
            onehot_w=w,
            onehot_ld=w.stride(0),
            onehot_g=torch.cat([torch.full((40,), math.nan, device=DEVICE), g]),
            onehot_start=start + 40,
            onehot_rows=torch.cat([lead, rows]),
        )
        classes = torch.repeat_interleave(torch.arange(m, device=DEVICE), counts)
        hot = torch.zeros(m, 50, device=DEVICE, dtype=torch.float64)
        hot.index_put_((classes, rows.long()), g.double(), accumulate=True)
        return hot @ w.double()[:, :n]

    # -- logits ----------------------------------------------------------------------------------
    def logits(self) -> tuple[Tensor, Tensor]:
        """z in float64, and where the targets are; fills the fields that make them."""
        m, n, _ = self.extents
        z = SCALE * self.product
        self.fields["scale"] = SCALE
        if self.mapped:
            bias = torch.randn(n, device=DEVICE)
            self.fields.update(bias=bias, softcap=SOFTCAP)
            z = SOFTCAP * torch.tanh((z + bias.double()) / SOFTCAP)
        column = torch.randint(0, n, (m,), device=DEVICE)
        column[::7] = n + 5  # in another chunk
        target = column + FIRST_CLASS
        target[1::5] = -1  # none
        if not self.targets:
            target[:] = -1
        inside = (target >= 0) & (column < n)
        hot = torch.zeros(m, n, device=DEVICE, dtype=torch.bool)
        hot[torch.nonzero(inside).flatten(), column[inside]] = True
        self.fields["target"] = target.int()
        return z, hot

    def partials(self, planes: int) -> Tensor:
        m, n, _ = self.extents
        part = torch.full((planes, -(-n // self.block), m + 3), math.nan, device=DEVICE)
        self.fields.update(part=part, part_plane=part.stride(0))
        return part

    def blocks(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        pieces = x[self.rows].split(self.block, dim=1)
        return torch.stack([f(piece) for piece in pieces])

    def online(self) -> None:
        planes = {"online_rest": 2, "repair": 2, "online": 3, "statistics": 7}[self.operation]
        z, hot = self.logits()
        part = self.partials(planes)
        self.launch()
        part = part[:, :, self.rows]
        rest = torch.where(hot, -math.inf, z)

        def sums(x: Tensor) -> Tensor:
            top = x.max(1).values
            t = x - torch.where(top.isinf(), 0.0, top)[:, None]
            e = torch.exp(t)
            excess = torch.where(top.isinf(), 0.0, e.sum(1) - 1)
            return torch.stack([top, excess, torch.where(e > 0, e * t, 0.0).sum(1)])

        wanted = self.blocks(sums, rest).transpose(0, 1)
        some = ~wanted[0].isinf()
        self.report.true(f"{self.tag} empty blocks", torch.equal(part[0].isinf(), ~some))
        for plane, what in enumerate(("maximum", "excess", "moment")[:planes]):
            found = part[plane][some] if plane == 0 else part[plane]
            exact = wanted[plane][some] if plane == 0 else wanted[plane]
            self.report.near(f"{self.tag} {what}", found, exact, 2 * EXACT[self.dtype])
        if planes < 7:
            return
        near = self.report.near
        near(f"{self.tag} sum", part[3], self.blocks(lambda x: x.sum(1), z), EXACT[self.dtype])

        def spread(x: Tensor) -> Tensor:
            return ((x - x.mean(1, keepdim=True)) ** 2).sum(1)

        near(f"{self.tag} deviations", part[4], self.blocks(spread, z), EXACT[self.dtype])
        top = self.blocks(lambda x: x.max(1).values, z)
        near(f"{self.tag} top", part[5], top, EXACT[self.dtype])
        ids = part[6].view(torch.int32).long() - FIRST_CLASS
        at = z[self.rows[None], ids.clamp(0, z.shape[1] - 1)]
        self.report.true(f"{self.tag} argmax", bool(((at - top).abs() < 1e-4).all()))

    def store_exp(self) -> None:
        z, hot = self.logits()
        moments = self.operation == "store_moment"
        part = self.partials(2 if moments else 1)
        reference = z[:, 0].float() + 0.5
        reference[3::11] = math.inf  # rows that count for nothing
        shift = 116.0 if self.extents[1] % 2 else 0.0
        self.fields.update(ref=reference, shift=shift)
        out = self.output(DTYPES[self.dtype])
        self.launch(out)
        e = torch.where(hot, 0.0, torch.exp(z - reference.double()[:, None]))
        sums = self.blocks(lambda x: x.sum(1), e)
        self.report.near(f"{self.tag} sums", part[0][:, self.rows], sums, EXACT[self.dtype])
        if moments:
            t = torch.where(e > 0, z - reference.double()[:, None], 0.0)
            wanted = self.blocks(lambda x: x.sum(1), e * t)
            found = part[1][:, self.rows]
            self.report.near(f"{self.tag} moments", found, wanted, EXACT[self.dtype])
        kept = torch.where(e >= 2.0 ** (shift - 126), e, 0.0)
        if self.mapped:
            kept = kept * (1 - (z / SOFTCAP) ** 2)
        self.result("exponentials", out, kept, ROUNDING[self.dtype])

    def gradient(self) -> None:
        m, _, _ = self.extents
        z, hot = self.logits()
        rest = torch.logsumexp(z, 1).float()
        coef = torch.randn(5, m + 3, device=DEVICE)
        shift = 96.0 if self.extents[1] % 2 else 0.0
        self.fields.update(ref=rest, coef=coef, shift=shift)
        out = self.output(DTYPES[self.dtype])
        if self.operation == "gradient_sums":
            self.gradient_sums(out)
        self.launch(out)
        a, b, c, d, e = coef.double()[:, :m, None]
        t = z - rest.double()[:, None]
        r = torch.exp(t)
        r = torch.where(r >= 2.0 ** (shift - 126), r, 0.0)
        if self.operation == "gradient_ce":
            wanted = torch.where(hot, e, a * r)
        else:
            wanted = torch.where(hot, e, r * (a + b * t)) + c + d * z
        if self.mapped:
            wanted = wanted * (1 - (z / SOFTCAP) ** 2)
        self.result("tile", out, wanted, ROUNDING[self.dtype])
        if self.operation == "gradient_sums":
            sums = torch.zeros(round_up(m, 16), z.shape[1], device=DEVICE, dtype=torch.float64)
            sums[self.rows] = wanted[self.rows]
            sums = sums.view(-1, 16, z.shape[1]).sum(1)[: -(-len(self.rows) // 16)]
            columns = self.fields["columns"][: len(sums), : z.shape[1]]
            self.report.near(f"{self.tag} columns", columns, sums, EXACT[self.dtype])
            dots = self.blocks(lambda x: x.sum(1), wanted * self.product)
            found = self.fields["dots"][:, self.rows]
            self.report.near(f"{self.tag} dots", found, dots, EXACT[self.dtype])

    def gradient_sums(self, out: Tensor) -> None:
        """Memory of the sums that come with the tile."""
        m, n, _ = self.extents
        columns = torch.full((round_up(m, 256) // 16, out.stride(0)), math.nan, device=DEVICE)
        dots = torch.full((-(-n // self.block), m + 3), math.nan, device=DEVICE)
        self.fields.update(columns=columns, dots=dots)

    def plain_logits(self) -> None:
        z, _ = self.logits()
        out = self.output(torch.float32)
        self.launch(out)
        self.result("logits", out, z, EXACT[self.dtype])

    def run(self) -> None:
        """Launches and compares."""
        table: dict[str, Callable[[], None]] = {
            "online_rest": self.online,
            "repair": self.online,
            "online": self.online,
            "statistics": self.online,
            "store_exp": self.store_exp,
            "store_moment": self.store_exp,
            "gradient_ce": self.gradient,
            "gradient": self.gradient,
            "gradient_sums": self.gradient,
            "logits": self.plain_logits,
        }
        table.get(self.operation, self.gradient_product)()
        torch.cuda.synchronize()


def check(kernels: Kernels, name: str, report: Report) -> None:
    """One kernel at every shape."""
    operation, by_maps = (kernels.table[name][key] for key in ("operation", "by_maps"))
    for extents in SHAPES:
        Case(kernels, name, extents, report).run()
    Case(kernels, name, (700, 1500, 520), report, count=333).run()
    if operation.startswith("dw"):
        Case(kernels, name, (300, 520, 200), report, count=0).run()
        if by_maps:
            Case(kernels, name, (1000, 1500, 136), report, uneven=True, clusters=2).run()
    if operation in ("store_exp", "store_moment", "repair"):
        Case(kernels, name, (1000, 1500, 136), report, listed=True).run()


def check_small(kernels: Kernels, name: str, report: Report, targets: bool) -> None:
    """One kernel for the sanitizer."""
    operation, by_maps = (kernels.table[name][key] for key in ("operation", "by_maps"))

    def run(extents: tuple[int, int, int], **how: Any) -> None:
        Case(kernels, name, extents, report, clusters=1, targets=targets, **how).run()

    run(SMALL)
    run(SMALL, count=70)
    if operation.startswith("dw") and by_maps:
        run((600, 580, 136), uneven=True)
    if operation in ("store_exp", "store_moment", "repair"):
        run((600, 400, 136), listed=True)


def check_beside(kernels: Kernels, de: str, dw: str, report: Report) -> None:
    """The two products of a gradient tile beside each other: the bits of one after the other."""
    rows, features, classes = 2048, 1024, 8192
    dtype = DTYPES[kernels.table[de]["dtype"]]
    x = torch.randn(rows, classes, device=DEVICE).to(dtype)
    w = torch.randn(classes, features, device=DEVICE).to(dtype)
    e = torch.randn(rows, features, device=DEVICE).to(dtype)

    def run(beside: bool) -> list[Tensor]:
        out = []
        for name, other in ((de, w), (dw, e)):
            result = DTYPES["f32"] if name.split("_")[1] == "f32" else dtype
            out.append(torch.full_like(e if name == de else w, math.nan, dtype=result))
            extents = (rows, features, classes) if name == de else (classes, features, rows)
            uneven = beside and name == dw
            head: dict[str, int] = {"early": 20, "head": 2} if uneven else {}
            launch = Launch(kernels, name, extents, x, other, out[-1], beside=uneven, **head)
            launch()
        return [t.clone() for t in out]  # right behind the second

    for what, one, other in zip((de, dw), run(False), run(True), strict=True):
        report.true(f"{de}, {dw} beside each other: {what}", torch.equal(one, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--part", default="1/1", help="k/n: the k-th kernel of every n")
    parser.add_argument("substrings", nargs="*")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    kernels, report = Kernels(arguments.kernels), Report()
    names = [
        name
        for name in kernels.table
        if not arguments.substrings or any(part in name for part in arguments.substrings)
    ]
    part, parts = map(int, arguments.part.split("/"))
    for name in names[part - 1 :: parts]:
        if arguments.small:
            check_small(kernels, name, report, not arguments.uniform)
        else:
            check(kernels, name, report)
    if not arguments.small and part == 1:
        halves = [name for name in names if kernels.table[name]["by_maps"]]
        for de in [name for name in halves if name.startswith("de_")]:
            dtype = kernels.table[de]["dtype"]
            of_type = [name for name in halves if kernels.table[name]["dtype"] == dtype]
            for dw in [name for name in of_type if name.startswith("dw_")]:
                check_beside(kernels, de, dw, report)
    print(f"{report.passed} passed, {len(report.failed)} failed")
    raise SystemExit(bool(report.failed))


if __name__ == "__main__":
    main()
