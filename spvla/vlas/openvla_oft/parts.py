"""The small networks beside OpenVLA's own: proprioception's projector, the action head, FiLM. Names are the files' own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spvla.vlas.vision import Modulation, ViTConfig

BLOCKS = 2  # of the action head


class ProprioProjector(nn.Module):
    """A normalised state (B, S) as one token of the language model, (B, H)."""

    def __init__(self, state: int, llm: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state, llm)
        self.fc2 = nn.Linear(llm, llm)

    def forward(self, state: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(state)))
        return out


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """The states of one time step's slots (..., D H) to its normalised action (..., D), which may leave [-1, 1]."""

    def __init__(self, dim: int, llm: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dim * llm)
        self.fc1 = nn.Linear(dim * llm, llm)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(llm) for _ in range(BLOCKS))
        self.layer_norm2 = nn.LayerNorm(llm)
        self.fc2 = nn.Linear(llm, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        out: Tensor = self.fc2(self.layer_norm2(x))
        return out


class ActionHead(nn.Module):
    """Hidden states of the slots (B, T D, H), step by step, to normalised actions (B, T, D)."""

    def __init__(self, dim: int, llm: int) -> None:
        super().__init__()
        self.dim = dim
        self.model = MLPResNet(dim, llm)

    def forward(self, states: Tensor) -> Tensor:
        b, slots, h = states.shape
        out: Tensor = self.model(states.reshape(b, slots // self.dim, self.dim * h))
        return out


class FiLMBlock(nn.Module):
    """One block's scale and shift of its tokens, from the instruction's embedding."""

    def __init__(self, llm: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Linear(llm, width)
        self.shift = nn.Linear(llm, width)

    def forward(self, language: Tensor) -> Modulation:
        """The instruction's embedding (B, H) to scale and shift, 2 x (B, C)."""
        return self.scale(language), self.shift(language)


class FiLM(nn.Module):
    """Feature-wise modulation of one encoder's blocks (arXiv 1709.07871)."""

    def __init__(self, llm: int, encoder: ViTConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FiLMBlock(llm, encoder.embed_dim) for _ in range(encoder.depth))

    def forward(self, language: Tensor) -> Sequence[Modulation]:
        return [block(language) for block in self.blocks]
