# SPDX-License-Identifier: MIT
"""A small GPT to train on: plain torch, deterministic, its data a function of seed, rank and iteration."""

from __future__ import annotations

import zlib

import torch
from torch import nn

__all__ = ["GPT", "batch", "build"]

VOCABULARY = 64
CONTEXT = 16
LAYERS = 2
HEADS = 2
BATCH = 4


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for (batch, time, width)."""
        rows, time, width = x.shape
        q, k, v = (
            self.qkv(self.norm_attention(x)).view(rows, time, 3 * HEADS, width // HEADS).transpose(1, 2).chunk(3, 1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(rows, time, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer; its output layer is tied to its token embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, time, vocabulary) for token numbers (batch, time)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(parameters: int, seed: int) -> GPT:
    """Return a model of about so many parameters, its values drawn from the seed."""
    width = HEADS
    with torch.device("meta"):
        while sum(p.numel() for p in GPT(width + HEADS).parameters()) <= parameters:
            width += HEADS
    torch.manual_seed(seed)
    return GPT(width)


def batch(seed: int, rank: int, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (inputs, targets) of a rank's batch in an iteration: nothing to remember between iterations."""
    # torch's CPU generator takes the low 32 bits of a seed: all three numbers must be in them.
    mixed = zlib.crc32(f"{seed} {rank} {iteration}".encode())
    generator = torch.Generator().manual_seed(mixed)
    text = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    return text[:, :-1], text[:, 1:]
