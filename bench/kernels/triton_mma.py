"""The yardstick of the mma.sync path: E Wᵀ by a Triton GEMM that is kept from wgmma, on one card.

``python bench/kernels/triton_mma.py 8192,4096,32064`` prints the best of a few tiles. Compare with
the t128x256 kernels of timing.py on the same card.
"""

from __future__ import annotations

import os
import sys
from functools import partial

os.environ["DISABLE_MMA_V3"] = "1"  # Triton reads it when it compiles

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# Block of D, depth of a step, warps, stages.
TILES = ((128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 4, 4))


@triton.jit  # type: ignore[untyped-decorator]
def product(a, b, d, m, n, k, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr):  # type: ignore[no-untyped-def]
    """D[m, n] = A[m, k] B[n, k]ᵀ, groups of 8 row blocks."""
    blocks_m, blocks_n = tl.cdiv(m, bm), tl.cdiv(n, bn)
    at = tl.program_id(0)
    group = at // (8 * blocks_n)
    height = tl.minimum(blocks_m - group * 8, 8)
    row = group * 8 + at % (8 * blocks_n) % height
    column = at % (8 * blocks_n) // height
    rows = row * bm + tl.arange(0, bm)
    columns = column * bn + tl.arange(0, bn)
    depth = tl.arange(0, bk)
    total = tl.zeros((bm, bn), dtype=tl.float32)
    for first in range(0, k, bk):
        x = tl.load(a + (rows % m)[:, None] * k + (first + depth)[None, :])
        y = tl.load(b + (columns % n)[:, None].to(tl.int64) * k + (first + depth)[None, :])
        total = tl.dot(x, tl.trans(y), total)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    where = d + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(where, total.to(tl.bfloat16), mask=inside)


def main() -> None:
    for shape in sys.argv[1:]:
        n, d, v = map(int, shape.split(","))
        if d % 64:
            raise SystemExit(f"{shape}: D must be a multiple of 64")
        e = torch.randn(n, d, device="cuda").bfloat16()
        w = torch.randn(v, d, device="cuda").bfloat16()
        out = torch.empty(n, v, device="cuda", dtype=torch.bfloat16)
        exact = e[:64].float() @ w.float().t()
        for bm, bn, bk, warps, stages in TILES:
            launch = product[(triton.cdiv(n, bm) * triton.cdiv(v, bn),)]
            run = partial(
                launch, e, w, out, n, v, d, bm, bn, bk, num_warps=warps, num_stages=stages
            )
            assembly = run().asm["ptx"]
            if "wgmma" in assembly or "mma.sync" not in assembly:
                raise SystemExit("DISABLE_MMA_V3 has no effect in this version of Triton")
            error = ((out[:64].float() - exact).norm() / exact.norm()).item()
            ms = triton.testing.do_bench(run, warmup=100, rep=300, return_mode="median")
            tile = f"{bm}x{bn}x{bk}"
            rate = 2e-9 * n * d * v / ms
            print(f"{shape} Triton {tile:12s} {ms:8.3f} ms {rate:5.0f} TFLOP/s, error {error:.1e}")


if __name__ == "__main__":
    main()
