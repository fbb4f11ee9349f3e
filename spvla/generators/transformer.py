"""A causal transformer over the history as a learned generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.generators.arrays import ArrayForm, views
from spvla.generators.learned import MLP, GeneratorConfig, LearnedGenerator
from spvla.history import Window


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = MLP([width, 4 * width, width], dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, nh, n, hs)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(b, n, w))
        return x + self.mlp(self.norm2(x))


class TransformerGenerator(LearnedGenerator):
    """One token per executed step, and one for now that carries everything else."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        if config.width % config.heads:
            raise InputError(f"generator: heads {config.heads} must divide width {config.width}", field="generator.width")
        w = config.width
        self.embed = nn.Linear(self.features.token_size + self.changes_size, w)
        self.embed_now = nn.Linear(self.features.token_size + self.features.global_size, w)
        self.position = nn.Parameter(torch.randn(config.features.history + 1, w) * 0.02)
        self.blocks = nn.ModuleList(CausalBlock(w, config.heads, config.dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(w)
        self.head = nn.Linear(w, self.out)
        self.start_from_last_action(self.head)

    def outputs(self, window: Window, changes: Tensor | None) -> Tensor:
        tokens, rest = self.features.tokens(window)  # (B, n + 1, token), (B, G)
        now, steps = self.embed_now(torch.cat([tokens[:, -1], rest], dim=1)), tokens[:, :-1]
        if changes is not None:
            steps = torch.cat([steps, changes], dim=2)
        x = torch.cat([self.embed(steps), now[:, None]], dim=1) + self.position  # (B, n + 1, W)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x[:, -1]))
        return out

    def arrays(self) -> ArrayForm:
        return ArrayTransformer(self)


class ArrayNorm:
    """:class:`torch.nn.LayerNorm` over the last axis, on arrays."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = norm.weight.detach().numpy(), norm.bias.detach().numpy(), norm.eps
        self.mean = np.full((len(self.weight), 1), 1 / len(self.weight), np.float32)  # a product is faster than numpy's mean

    def __call__(self, x: FloatArray) -> FloatArray:
        x = x - x.dot(self.mean)
        x /= np.sqrt((x * x).dot(self.mean) + self.eps)
        return x * self.weight + self.bias


class ArrayBlock:
    """:class:`CausalBlock` on arrays; a last block computes the last token alone, which is all that is read of it."""

    def __init__(self, block: CausalBlock, last: bool) -> None:
        self.last, self.heads = last, block.heads
        self.norm1, self.norm2, self.mlp = ArrayNorm(block.norm1), ArrayNorm(block.norm2), block.mlp.arrays
        self.qkv, self.proj = views(block.qkv), views(block.proj)

    def __call__(self, x: FloatArray) -> FloatArray:
        b, n, w = x.shape
        qkv = self.norm1(x).dot(self.qkv[0]) + self.qkv[1]
        q, k, v = qkv.reshape(b, n, 3, self.heads, w // self.heads).transpose(2, 0, 3, 1, 4)  # (B, nh, n, hs)
        if self.last:
            q, x = q[:, :, -1:], x[:, -1:]
        scores = q @ k.swapaxes(2, 3) * np.float32((w // self.heads) ** -0.5)  # (B, nh, queries, n)
        if not self.last:
            scores += np.triu(np.full((n, n), -np.inf, np.float32), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        a = scores @ v / scores.sum(-1, keepdims=True)
        x = x + a.swapaxes(1, 2).reshape(x.shape).dot(self.proj[0]) + self.proj[1]
        return x + self.mlp(self.norm2(x))


class ArrayTransformer:
    """:meth:`TransformerGenerator.outputs` of few rows on arrays."""

    def __init__(self, network: TransformerGenerator) -> None:
        self.features, self.position = network.features, network.position.detach().numpy()
        self.embed, self.embed_now, self.head = views(network.embed), views(network.embed_now), views(network.head)
        blocks = cast(Sequence[CausalBlock], network.blocks)
        self.blocks = [ArrayBlock(block, last=i == len(blocks) - 1) for i, block in enumerate(blocks)]
        self.norm = ArrayNorm(network.norm)

    def __call__(self, window: Window, changes: FloatArray | None) -> FloatArray:
        tokens, rest = self.features.token_rows(window)  # (B, n + 1, token), (B, G)
        now = np.concatenate([tokens[:, -1], rest], 1).dot(self.embed_now[0]) + self.embed_now[1]
        steps = tokens[:, :-1] if changes is None else np.concatenate([tokens[:, :-1], changes], 2)
        x = np.concatenate([steps.dot(self.embed[0]) + self.embed[1], now[:, None]], 1) + self.position  # (B, n + 1, W)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, -1]).dot(self.head[0]) + self.head[1]
