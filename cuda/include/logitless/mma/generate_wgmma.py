"""Writes wgmma.cuh: wgmma m64nNk16, both operands in shared memory, N = 256, 192, 128.

cd cuda/include/logitless/mma && python generate_wgmma.py > wgmma.cuh
"""

HEADER = """\
// wgmma.cuh - written by generate_wgmma.py: D[64 x N] (+)= A[64 x 16] B[N x 16]^T, both operands in
// shared memory. TA, TB = 1 when the operand is MN-major there; accumulate = 0 overwrites D (no
// clearing of 128 registers).
#pragma once
#include "logitless/ptx/half.cuh"

namespace logitless {

template <class Half, int N, int TA, int TB>
struct Wgmma;
"""


def lines(items: list[str], indent: str, end: str, width: int = 100) -> str:
    """Join items by commas, broken into lines."""
    out, line = [], indent
    for item in items:
        if len(line) + len(item) + 2 > width:
            out.append(line.rstrip())
            line = indent
        line += item + ", "
    out.append(line.rstrip().rstrip(",") + end)
    return "\n".join(out)


def quoted(items: list[str], indent: str, width: int = 96) -> str:
    """The same inside string literals."""
    out, line = [], ""
    for item in items:
        if len(line) + len(item) + len(indent) + 6 > width:
            out.append(f'{indent}"{line}"')
            line = ""
        line += item + ", "
    out.append(f'{indent}"{line.rstrip().rstrip(",")}"')
    return "\n".join(out)


def wrapper(half: str, kind: str, n: int) -> str:
    """One specialisation."""
    r = n // 2
    registers = quoted([f"%{i}" for i in range(r)], " " * 8)
    outputs = lines([f'"+f"(d[{i}])' for i in range(r)], " " * 10, "")
    return f"""
template <int TA, int TB>
struct Wgmma<{half}, {n}, TA, TB> {{
  static __device__ __forceinline__ void mma(float (&d)[{r}], u64 a, u64 b, int accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{r + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{"
{registers}
        "}}, %{r}, %{r + 1}, p, 1, 1, %{r + 3}, %{r + 4};\\n}}\\n"
        :
{outputs}
        : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
  }}
}};"""


print(HEADER, end="")
for half, kind in (("Bf16", "bf16"), ("F16", "f16")):
    for n in (256, 192, 128):
        print(wrapper(half, kind, n))
print("\n}  // namespace logitless")
