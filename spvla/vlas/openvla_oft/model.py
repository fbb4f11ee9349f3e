"""The network: OpenVLA's encoders, projector and Llama, read at once in both directions, and a head that regresses a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.openvla_oft.parts import ActionHead, FiLM, ProprioProjector
from spvla.vlas.openvla_oft.recipe import ProprioStatistics, Recipe

STOP_TOKEN = 2  # Llama's </s>: the last position, whose embedding counts


class OpenVLAOFTModel(nn.Module):
    """OpenVLA's network and the parts that make it a chunked policy.

    Args:
        vla: OpenVLA's network, its action statistics chosen.
        recipe: how the checkpoint was fine-tuned; ``proprio`` and ``film`` as they are in fact (None counts as no).
        proprio: the states' range where it reads proprioception.
    """

    def __init__(self, vla: OpenVLAModel, recipe: Recipe, proprio: ProprioStatistics | None) -> None:
        super().__init__()
        assert bool(recipe.proprio) == (proprio is not None)
        self.vla, self.recipe, self.proprio_statistics = vla, recipe, proprio
        width, dim = vla.language_model.config.hidden_size, vla.action_space.dim
        self.slots = recipe.chunk * dim
        self.visual_tokens = len(recipe.cameras) * vla.config.grid**2
        self.action_head = ActionHead(dim, width)
        self.proprio_projector = None if proprio is None else ProprioProjector(proprio.low.size, width)
        names = [name for name, _ in vla.vision_backbone.named_children()]
        self.film = None
        if recipe.film:
            self.film = nn.ModuleDict({n: FiLM(width, vit) for n, vit in zip(names, vla.config.encoders, strict=True)})

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids of the prompt (p,). Raises :class:`InputError` as :meth:`OpenVLAModel.tokenize` does."""
        others = self.slots + 1 + (self.proprio_projector is not None)
        return self.vla.tokenize(instruction, self.visual_tokens, others)

    def language(self, prompts: Sequence[list[int]]) -> Tensor:
        """What FiLM hears of each instruction: the mean embedding of the prompt and the stop token, (B, H)."""
        embed = self.vla.language_model.get_input_embeddings()
        device = self.vla.device
        return torch.stack([embed(torch.tensor([*prompt, STOP_TOKEN], device=device)).mean(0) for prompt in prompts])

    def see(self, pixels: Tensor, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Patch features of each observation's images, and the scoring block's input image by image.

        Args:
            pixels: (B, n, 3 x encoders, S, S), n images.
            prompts: B x (p,); they count if there is FiLM.

        Returns:
            (B, n N, C), image after image, and (B n, N, C_last).
        """
        b, n = pixels.shape[:2]
        film = None
        if self.film is not None:
            language = self.language(prompts).repeat_interleave(n, dim=0)  # (B n, H)
            film = [encoder(language) for encoder in self.film.values()]
        features, score_input = self.vla.vision_backbone(pixels.flatten(0, 1), film=film)  # (B n, N, C)
        return features.reshape(b, n * features.shape[1], -1), score_input

    def sequences(
        self,
        visual: Sequence[Tensor],
        prompts: Sequence[list[int]],
        keep: Sequence[Tensor],
        states: Tensor | None,
        positions: str = "packed",
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the language model reads: ``<s>``, visual tokens, proprioception, prompt, empty slots, stop token.

        Args:
            visual: projected visual tokens, B x (K, H).
            prompts: B x (p,).
            keep: which of the n N tokens they are, B x (K,).
            states: normalised proprioception (B, S), or None.
            positions: as :meth:`OpenVLAModel.sequences` takes it; as that returns embeddings, mask and position ids.
        """
        total = self.visual_tokens
        if self.proprio_projector is not None:
            assert states is not None
            tokens = self.proprio_projector(states)[:, None]  # (B, 1, H)
            visual = [torch.cat([v, t]) for v, t in zip(visual, tokens, strict=True)]
            keep = [torch.cat([k, k.new_tensor([total])]) for k in keep]
            total += 1
        texts = [[*prompt, *[STOP_TOKEN] * self.slots, STOP_TOKEN] for prompt in prompts]
        embeds, mask, ids = self.vla.sequences(visual, texts, keep, total, positions)
        embeds[:, -self.slots - 1 : -1] = 0
        return embeds, mask, ids

    def read(self, embeds: Tensor, mask: Tensor | None, ids: Tensor) -> Tensor:
        """The final hidden states one place before each slot, (B, T D, H), every position having attended to every other.

        Args:
            embeds, mask, ids: from :meth:`sequences`; padding is not attended to.
        """
        b, length = embeds.shape[:2]
        seen = torch.ones(b, length, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        whole = seen[:, None, None].expand(b, 1, length, length)  # four dimensions: transformers adds no causal mask to it
        out = self.vla.language_model.model(inputs_embeds=embeds, attention_mask=whole, position_ids=ids, use_cache=False)
        states: Tensor = out.last_hidden_state[:, -self.slots - 2 : -2]
        return states

    def forward(self, embeds: Tensor, mask: Tensor | None, ids: Tensor) -> Tensor:
        """Normalised actions (B, T, D) of what :meth:`sequences` made."""
        out: Tensor = self.action_head(self.read(embeds, mask, ids))
        return out
