"""Which route costs less: flops of each, and how fast each gets through its own."""

from __future__ import annotations

from logitless._extras import torch

# Flops of the upper panels of the Gram matrix beside 2VD² of the full product, with the centring.
SYMMETRIC = 0.75
# How many flops a second streaming gets through for each of the Gram route's, by device and dtype
# of the weight. `python bench/spherical_gram.py --break-even` measures where the routes take the
# same time, in N / D with both gradients and no cached matrix; a speed of s crosses at 0.44 s. For
# D of 64 to 1024:
#   CPU, 2 threads: fp32 0.36 to 0.68 on a Xeon, 0.93 to 1.03 on an EPYC, whose MKL is slower than
#   our tiles; fp64 0.4 to 1.0; bf16 2.5 to 2.8 on the Xeon, as its tiles use AMX and Q is fp32.
#   H200: below 0.125 in fp32 and fp64 (a small N leaves the tiles empty), above 4 in bf16, whose
#   tiles run on tensor cores.
STREAM_SPEED = {
    ("cpu", torch.float32): 1.4,
    ("cpu", torch.bfloat16): 6.0,
    ("cpu", torch.float16): 1.4,
    ("cpu", torch.float64): 1.4,
    ("cuda", torch.float32): 0.25,
    ("cuda", torch.bfloat16): 18.0,
    ("cuda", torch.float16): 18.0,
    ("cuda", torch.float64): 0.15,
}
# Streamed flops (2NVD each pass) that take a GPU as long as launching the Gram route's many small
# kernels does.
LEAST_WORK = {"cpu": 0.0, "cuda": 4e10}


def choose(
    rows: int,
    features: int,
    classes: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    fresh: bool = False,
    gradients: tuple[bool, bool] = (True, True),
) -> str:
    """Return the route that costs less: "gram" or "stream".

    Parameters
    ----------
    rows, features, classes
        N, D and V of the call.
    device, dtype
        Of the weight.
    fresh
        Whether the Gram matrix of the weight is cached already.
    gradients
        Whether the input's and the weight's gradients will be asked for.
    """
    # In units of 2·V·D flops: N for each streamed product, D for one pass of W against D×D.
    if device in LEAST_WORK and 8.0 * rows * classes * features < LEAST_WORK[device]:
        return "stream"
    streamed = rows * (1 + any(gradients) + sum(gradients))
    passes = (0.0 if fresh else SYMMETRIC) + (1.0 if gradients[1] else 0.0)
    small = rows * features / classes * (1 + sum(gradients))
    grams = passes * features + small
    speed = STREAM_SPEED.get((device, dtype), 1.0)
    return "gram" if streamed >= speed * grams else "stream"
