"""A causal transformer over the history as a learned generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spvla.errors import InputError
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
