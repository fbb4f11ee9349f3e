"""The network that is trained: a VLA with the heads that only training needs, and what it is asked about B images.

One pass answers Q questions about each image: the visual tokens come before the text and see nothing of it, and a question
sees itself, what all questions have in common, and the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from data.envs.base import POINTS
from spvla.vlas.openvla.model import OpenVLAModel, joined


@dataclass(frozen=True)
class Questions:
    """Prompts about B images, Q for each, and the beginning of their answers.

    Args:
        common: token ids that all prompts begin with, (P,), ``<s>`` among them.
        own: the rest of each prompt, and its action tokens but the last, which no token follows; padded at the end,
            (B, Q, T): no token looks ahead, so padding changes nothing before it.
        lengths: how many of ``own`` are the prompt's, (B, Q), at least 1.
    """

    common: Tensor
    own: Tensor
    lengths: Tensor

    def layout(self, first: int) -> tuple[Tensor, Tensor]:
        """By place in a sequence whose own tokens begin at ``first``, (L,): which question it is of, 0 all; position ids."""
        _, q, t = self.own.shape
        part = torch.cat([torch.zeros(first, dtype=torch.long), torch.arange(1, q + 1).repeat_interleave(t)])
        positions = torch.cat([torch.arange(first), (first + torch.arange(t)).repeat(q)])
        return part.to(self.own.device), positions.to(self.own.device)

    @classmethod
    def of(cls, prompts: list[list[int]], actions: Tensor) -> Questions:
        """From prompts, B x Q, and action tokens (B, Q, D)."""
        b, q, _ = actions.shape
        shortest = min(map(len, prompts)) - 1
        shared = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), shortest)
        shared = max(1, min(shared, shortest))
        rows = [
            torch.cat([torch.tensor(prompt[shared:]), answer[:-1].cpu()])
            for prompt, answer in zip(prompts, actions.flatten(0, 1), strict=True)
        ]
        own = nn.utils.rnn.pad_sequence(rows, batch_first=True).view(b, q, -1)
        lengths = torch.tensor([len(prompt) - shared for prompt in prompts]).view(b, q)
        device = actions.device
        return cls(torch.tensor(prompts[0][:shared], device=device), own.to(device), lengths.to(device))


class TrainedVLA(nn.Module):
    """The model with the heads that only training needs.

    Args:
        model: the VLA.
        pointer_layer: decoder layer whose hidden states the pointer reads.
        pointer_width: width of the pointer's query and keys.
    """

    def __init__(self, model: OpenVLAModel, pointer_layer: int, pointer_width: int = 64) -> None:
        super().__init__()
        self.model = model
        self.pointer_layer = pointer_layer
        hidden = model.language_model.config.hidden_size
        self.heat = nn.Sequential(
            nn.LayerNorm(model.vision_backbone.width), nn.Linear(model.vision_backbone.width, len(POINTS) - 1)
        )
        self.query = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.key = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.reach = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 6))
        self.name = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, pointer_width))
        self.look = nn.Sequential(
            nn.LayerNorm(model.vision_backbone.width), nn.Linear(model.vision_backbone.width, pointer_width)
        )

    def forward(
        self, pixels: Tensor, asked: Questions, keep: Tensor, patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Scores of action tokens and heat maps.

        The visual tokens come before the text and see nothing of it: one pass through the model answers all questions
        about an image, each of which sees itself, what all have in common, and the image.

        Args:
            pixels: (B, 3 x encoders, S, S).
            asked: Q questions about each image.
            keep: visual tokens that reach the decoder, (B, K), among the patches.
            patches: the ones that the encoders see, (B, N); None: all.

        Returns:
            scores (B, Q, D, V) of each action token; heat (B, 2, N) of hand and place over the patches; pointer (B, Q, K) to
            the asked object over the kept ones, from the decoder; names (B, Q, N), the same over all, from the encoders'
            features and the bare words: the shortest way for them to learn what things are called; all these are logits.
            reach (B, Q, 2, 3): from the hand to the asked object and to the place, in decimetres, read from the decoder.
        """
        model = self.model
        features, _ = model.vision_backbone(pixels, patches)  # (B, N, C)
        kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))  # (B, K, C)
        b, q, t = asked.own.shape
        text = model.language_model.get_input_embeddings()(torch.cat([asked.common.expand(b, -1), asked.own.flatten(1)], 1))
        embeds = joined(text, model.projector(kept))  # (B, L, H)
        first = keep.shape[1] + len(asked.common)  # where the questions' own tokens begin
        part, positions = asked.layout(first)  # (L,), (L,)
        sees = (part == part[:, None]) | (part == 0)  # (L, L)
        mask = (sees & (torch.arange(len(part)) <= torch.arange(len(part))[:, None]).to(sees.device))[None, None]
        states = model.language_model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[None].to(embeds.device),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        dims = model.action_space.dim
        starts = first + t * torch.arange(q, device=embeds.device)  # (Q,)
        ends = starts + asked.lengths - 1  # (B, Q): the prompts' last tokens; token t scores token t + 1
        at = ends[..., None] + torch.arange(dims, device=embeds.device)  # (B, Q, D)
        scores = model.language_model.lm_head(_at(states[-1], at))  # (B, Q, D, V)
        middle = states[self.pointer_layer]
        query = self.query(_at(middle, ends))  # (B, Q, W)
        keys = self.key(middle[:, 1 : keep.shape[1] + 1])  # (B, K, W)
        pointer = query @ keys.transpose(1, 2) / math.sqrt(query.shape[-1])  # (B, Q, K)
        first_words, words = text[:, : len(asked.common)], text[:, len(asked.common) :].unflatten(1, (q, t))  # (B, Q, T, H)
        prompt = torch.arange(t, device=words.device) < asked.lengths[..., None]  # (B, Q, T)
        total = first_words.sum(1, keepdim=True) + (words * prompt[..., None]).sum(2)  # (B, Q, H)
        name = self.name(total / (len(asked.common) + asked.lengths[..., None]))  # (B, Q, W)
        names = name @ self.look(features).transpose(1, 2) / math.sqrt(name.shape[-1])  # (B, Q, N)
        reach = self.reach(_at(middle, ends)).unflatten(-1, (2, 3))  # (B, Q, 2, 3)
        return scores, self.heat(features).transpose(1, 2), pointer, names, reach


def _at(states: Tensor, places: Tensor) -> Tensor:
    """The states (B, L, H) at places (B, ...): (B, ..., H)."""
    index = places.flatten(1)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index).view(*places.shape, -1)


class PlainAttention(TorchFunctionMode):
    """Inside, attention is two matrix products and a softmax: on a CPU a fifth less time per training step than torch's own.

    The backward pass of torch's fused kernel is slow there, and its plain one spends its time on rows that see nothing, of
    which there are none here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return plain_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` for what the model asks of it: queries, keys and values of one number of heads."""
    assert not (dropout_p or is_causal or enable_gqa), "not needed here"
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)  # (B, nh, L, L)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, -1e4)
        scores = scores + attn_mask
    return scores.softmax(-1).to(v.dtype) @ v
