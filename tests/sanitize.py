r"""One small case of every CUDA path, for compute-sanitizer; not collected by pytest.

    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --kernel-name-exclude kernel_substring=at6native \
            python tests/sanitize.py  # or a part of it: bf16, f16, f32, f64, partly
    done

(The products alone, with their own reference: bench/kernels/sanitize.sh. synccheck is for those
alone, built for clusters of one: here it counts a warp's arrival at the barrier of the other block
of its cluster as divergence, in the first Hopper kernel that it meets.)
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import logitless
import logitless.functional as LF
from logitless import stats


def tensor(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape).to("cuda", dtype)


def cross_entropy(dtype: Any, memory: str, features: int) -> None:
    """Fused and stored: ignored rows, a target far off, an odd number of features and classes."""
    e = tensor(70, features, dtype=dtype).requires_grad_()
    w = tensor(301, features, dtype=dtype).requires_grad_()
    b = tensor(301, dtype=dtype).requires_grad_()
    y = torch.randint(301, (70,))
    y[::5] = -100
    y = y.cuda()
    with torch.no_grad():
        e[1] *= 60
    loss = LF.linear_cross_entropy(e, w, y, linear_bias=b, ignore_index=-100, memory=memory)
    loss.backward()
    # A head and a bias without gradients, a scale with one.
    fixed, bias = w.detach(), b.detach()
    LF.linear_cross_entropy(
        e, fixed, y, linear_bias=bias, ignore_index=-100, memory=memory, softcap=9.0
    ).backward()
    scale = torch.tensor(0.8, device="cuda", requires_grad=True)
    LF.linear_cross_entropy(
        e, w, y, linear_bias=b, ignore_index=-100, memory=memory, logit_scale=scale
    ).backward()


def partly_stored() -> None:
    """Exponentials of most classes: more than lean holds; few live rows, and an entropy."""
    e = tensor(520, 64, dtype=torch.bfloat16).requires_grad_()
    w = (tensor(200_011, 64, dtype=torch.bfloat16) / 8).detach().requires_grad_()
    y = torch.arange(520, device="cuda") * 384
    for every in (600, 2):
        losses = LF.linear_cross_entropy(e, w, y, reduction="none")
        losses[torch.arange(520, device="cuda") % every > 0].sum().backward()
    s = LF.linear_log_prob(e, w, y)
    (s.log_prob + s.entropy).sum().backward()


def forward_alone(dtype: Any) -> None:
    """Rows left in their places, or packed, where nothing is kept for a backward."""
    e, w = tensor(520, 64, dtype=dtype), tensor(301, 64, dtype=dtype)
    y = torch.arange(520, device="cuda") % 301
    for ignored in (3, 300):
        y[:ignored] = -100
        LF.linear_cross_entropy(e, w, y, ignore_index=-100)
        LF.linear_log_prob(e, w, y, ignore_index=-100)


def few_rows(dtype: Any, memory: str) -> None:
    """The input's gradient in slices of the classes."""
    e = tensor(9, 64, dtype=dtype).requires_grad_()
    w = tensor(5000, 64, dtype=dtype).requires_grad_()
    y = torch.arange(9, device="cuda")
    LF.linear_cross_entropy(e, w, y, memory=memory).backward()
    LF.linear_cross_entropy(e, w.detach(), y, memory=memory).backward()


def everything(dtype: Any) -> None:
    """Tiled: every statistic, several targets."""
    e = tensor(40, 40, dtype=dtype).requires_grad_()
    w = tensor(2500, 40, dtype=dtype).requires_grad_()
    ids = torch.randint(2500, (40, 3))
    ids[3] = -100
    ids = ids.cuda()
    want = (
        *("rest", "target", "entropy", "sum", "sum_sq", "variance", "max"),
        stats.power_lse(2.0),
        stats.weighted(tensor(2, 2500)),
        stats.dot(tensor(40, 2500)),
        stats.topk(4),
    )
    s = logitless.row_statistics(
        e, w, ids, want=want, softcap=9.0, logit_scale=torch.tensor(0.7, device="cuda")
    )
    total = s.rest + s.entropy + s.sum + s.variance + s.max + s.dot + s.power_lse
    (total.sum() + s.weighted_sum.sum() + s.weighted_mean.sum() + s.topk_values.sum()).backward()


def of(dtype: Any) -> None:
    """Every path of a dtype."""
    for memory in ("lean", "fast"):
        for features in (64, 33):
            cross_entropy(dtype, memory, features)
        few_rows(dtype, memory)
    forward_alone(dtype)
    everything(dtype)


PARTS = {
    "bf16": lambda: of(torch.bfloat16),
    "f16": lambda: of(torch.float16),
    "f32": lambda: of(torch.float32),
    "f64": lambda: of(torch.float64),
    "partly": partly_stored,
}


def main() -> None:
    """Run every path once, or those of the parts that are named."""
    for name in sys.argv[1:] or PARTS:
        torch.manual_seed(0)
        PARTS[name]()
        torch.cuda.synchronize()
        print(f"{name}: every path ran", file=sys.stderr)


if __name__ == "__main__":
    main()
