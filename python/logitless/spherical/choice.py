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
#   H200: below 0.125 in fp32 and fp64 (a small N leaves the tiles empty); in bf16, where both run
#   on tensor cores, about 5 at D = 1024 (1.33 at 4; cached 3.2) and more at less.
STREAM_SPEED = {
    ("cpu", torch.float32): 1.4,
    ("cpu", torch.bfloat16): 6.0,
    ("cpu", torch.float16): 1.4,
    ("cpu", torch.float64): 1.4,
    ("cuda", torch.float32): 0.25,
    ("cuda", torch.bfloat16): 12.0,
    ("cuda", torch.float16): 18.0,
    ("cuda", torch.float64): 0.15,
}
# Streamed flops, 8NVD, that take a GPU as long as a host needs to launch the Gram route's 80 small
# kernels: 3 to 4 ms beside the H200 above.
LEAST_WORK = {
    ("cuda", torch.float32): 1e11,
    ("cuda", torch.bfloat16): 1e12,
    ("cuda", torch.float16): 1e12,
    ("cuda", torch.float64): 3e10,
}


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
    if 8.0 * rows * classes * features < LEAST_WORK.get((device, dtype), 0.0):
        return "stream"
    streamed = rows * (1 + any(gradients) + sum(gradients))
    passes = (0.0 if fresh else SYMMETRIC) + (1.0 if gradients[1] else 0.0)
    small = rows * features / classes * (1 + sum(gradients))
    grams = passes * features + small
    speed = STREAM_SPEED.get((device, dtype), 1.0)
    return "gram" if streamed >= speed * grams else "stream"
