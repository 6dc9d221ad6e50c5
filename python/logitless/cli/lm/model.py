"""A decoder-only transformer without a head: tokens in, hidden states out.

The head is kept out on purpose. What the demo compares is two ways to go from hidden states to the
loss, and a caller that holds `hidden` and `embedding.weight` can use either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the head is tied to the embedding."""

    classes: int
    features: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.project_in = nn.Linear(shape.features, 3 * shape.features, bias=False)
        self.project_out = nn.Linear(shape.features, shape.features, bias=False)
        width = shape.features // shape.heads
        frequency = 10_000.0 ** -(torch.arange(0, width, 2) / width)
        angle = torch.arange(shape.context)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, length, features = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.project_in(x).split(features, dim=-1)
        )
        query, key = self.rotate(query), self.rotate(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.project_out(mixed.transpose(1, 2).reshape(batch, length, features))
        return out

    def rotate(self, x: Tensor) -> Tensor:
        """Turn each pair of features (B, H, T, width) by an angle that grows with the position."""
        length = x.shape[-2]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a normalisation and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.features)
        self.attention = Attention(shape)
        self.perceptron_norm = nn.RMSNorm(shape.features)
        self.perceptron = nn.Sequential(
            nn.Linear(shape.features, 4 * shape.features, bias=False),
            nn.GELU(),
            nn.Linear(4 * shape.features, shape.features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.perceptron(self.perceptron_norm(x))
        return out


class Body(nn.Module):
    """Embedding, blocks and a final normalisation; `embedding.weight` (V, D) is also the head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.classes, shape.features)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.features)
        self.apply(initialise)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        hidden: Tensor = self.norm(x)
        return hidden

    @torch.no_grad()
    def generate(self, tokens: Tensor, length: int, temperature: float, seed: int) -> Tensor:
        """Continue `tokens` (T,) by `length` sampled tokens; one position's logits at a time.

        Parameters
        ----------
        temperature : float
            Logits are divided by it; nucleus sampling keeps the top 90% of the probability.
        """
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(length):
            hidden = self(tokens[None, -self.shape.context :])[0, -1]
            logits = F.linear(hidden, self.embedding.weight.to(hidden.dtype)).float()
            probability, ids = (logits / temperature).softmax(-1).sort(descending=True)
            probability = probability.where(probability.cumsum(-1) - probability < 0.9, 0)
            choice = torch.multinomial(probability, 1, generator=generator)
            tokens = torch.cat((tokens, ids[choice]))
        return tokens


def initialise(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02, as in GPT-2."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
