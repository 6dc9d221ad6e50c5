"""Which route costs less: flops of each, and how fast each gets through its own."""

from __future__ import annotations

from logitless._extras import torch

# Flops of the upper panels of the Gram matrix beside 2VD² of the full product, with the centring.
SYMMETRIC = 0.75
# How many flops a second streaming gets through for each of the Gram route's matrix products,
# by device and dtype of the weight: `python bench/spherical_gram.py --break-even` measures it.
STREAM_SPEED = {
    ("cpu", torch.float32): 2.0,
    ("cpu", torch.bfloat16): 2.0,
    ("cpu", torch.float16): 1.0,
    ("cpu", torch.float64): 2.0,
    ("cuda", torch.float32): 1.0,
    ("cuda", torch.bfloat16): 8.0,
    ("cuda", torch.float16): 8.0,
    ("cuda", torch.float64): 1.0,
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
    streamed = rows * (1 + any(gradients) + sum(gradients))
    passes = (0.0 if fresh else SYMMETRIC) + (1.0 if gradients[1] else 0.0)
    small = rows * features / classes * (1 + sum(gradients))
    grams = passes * features + small
    speed = STREAM_SPEED.get((device, dtype), 1.0)
    return "gram" if streamed >= speed * grams else "stream"
