"""The network: two vision encoders, their features projected, and a Llama that writes action tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from spvla.actions import ActionSpace, ActionTokenizer
from spvla.errors import InputError
from spvla.fields import naming
from spvla.pruning.attention import attention_received
from spvla.vlas.checkpoint import tokenizer_errors
from spvla.vlas.conventions import Conventions, conventions_by_name
from spvla.vlas.openvla.config import SPACE_TOKEN, OpenVLAConfig, llama_config
from spvla.vlas.openvla.decoder import Decoder, EagerReading, Reading
from spvla.vlas.openvla.statistics import ActionStatistics
from spvla.vlas.vision import Modulation, VisionTransformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
DEFAULT_CONTROL_RATE = 5.0  # Hz; most of OpenVLA's training data (BridgeData V2)


class VisionBackbone(nn.Module):
    """One encoder, or two with their patch features joined on the channels."""

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__()
        encoders = config.encoders
        self.featurizer = VisionTransformer(encoders[0])
        if config.use_fused_vision_backbone:
            self.fused_featurizer = VisionTransformer(encoders[1])
        self.encoders: list[VisionTransformer] = list(self.children())  # type: ignore[arg-type]
        self.width = sum(vit.embed_dim for vit in encoders)

    def forward(
        self, pixels: Tensor, patches: Tensor | None = None, film: Sequence[Sequence[Modulation]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3 x encoders, S, S) to patch features (B, N, C) and the scoring block's input (B, N, C_last).

        ``patches`` (B, M): the encoders see these alone, and N is M. ``film``: each encoder's scale and shift by block.
        """
        features = []
        for i, (encoder, images) in enumerate(zip(self.encoders, pixels.split(3, dim=1), strict=True)):
            out, score_input = encoder(images, patches, None if film is None else film[i])
            features.append(out)
        return torch.cat(features, dim=-1), score_input

    def queries_keys(self, score_input: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, nh, N, hs) of the last encoder's (SigLIP's) scoring block, for pruning."""
        return self.encoders[-1].queries_keys(score_input)

    def attention(self, score_input: Tensor) -> Tensor:
        """Attention received per patch in that block: float32 (B, N), rows sum to 1."""
        return attention_received(*self.queries_keys(score_input))


class Projector(nn.Module):
    """Patch features to the language model's width: three layers for fused encoders, two for one."""

    def __init__(self, vision: int, llm: int, fused: bool) -> None:
        super().__init__()
        hidden = 4 * vision if fused else llm
        self.fc1 = nn.Linear(vision, hidden)
        self.fc2 = nn.Linear(hidden, llm)
        self.fc3 = nn.Linear(llm, llm) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


def joined(text: Tensor, visual: Tensor) -> Tensor:
    """The language model's input: embeddings of the text (..., T, H) with the visual tokens (..., K, H) after ``<s>``,
    (..., K + T, H)."""
    return torch.cat([text[..., :1, :], visual, text[..., 1:, :]], dim=-2)


class OpenVLAModel(nn.Module):
    """The network, with the tokenizer and the action statistics that its checkpoint holds.

    Module names are the checkpoint's tensor names, so PEFT adapters published for it fit.

    Args:
        config: sizes and conventions; weights are random until they are loaded or trained.
        tokenizer: the prompt's tokenizer; :meth:`tokenize` needs one, :meth:`forward` does not.
        unnorm_key: data set whose statistics give actions their unit; see :meth:`use_statistics`.
        conventions: a name (``libero``), :class:`~spvla.vlas.conventions.Conventions`, or None for none.
        control_rate: control steps per second (Hz); None: the conventions' own, or 5.

    Attributes:
        eager: let transformers' own forward pass of the language model read: the reference, which is slower.
    """

    def __init__(
        self,
        config: OpenVLAConfig,
        *,
        tokenizer: Tokenizer | None = None,
        unnorm_key: str | None = None,
        conventions: Conventions | str | None = None,
        control_rate: float | None = None,
    ) -> None:
        super().__init__()
        from transformers import LlamaForCausalLM

        self.config = config
        self.tokenizer = tokenizer
        self.conventions = conventions_by_name(conventions)
        known = self.conventions.control_rate or DEFAULT_CONTROL_RATE
        self.control_rate = known if control_rate is None else control_rate
        self.action_tokenizer = ActionTokenizer(config.vocab, config.n_action_bins)
        text = llama_config(config)
        self.bos = text.bos_token_id
        self.context = min(config.llm_max_length, text.max_position_embeddings)
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(self.vision_backbone.width, text.hidden_size, config.use_fused_vision_backbone)
        with naming("config.json: text_config"):
            self.language_model = LlamaForCausalLM(text)
        self.eager = False
        self._decoder: Decoder | None = None
        self.statistics: ActionStatistics | None = None
        self._space: ActionSpace | None = None
        if unnorm_key is not None or len(config.norm_stats) == 1:
            self.use_statistics(unnorm_key)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type; the patch embeddings alone may be float32 beside it."""
        return self.vision_backbone.featurizer.pos_embed.dtype

    @property
    def action_space(self) -> ActionSpace:
        """Layout, scale and bounds of predicted actions. Raises :class:`InputError` before statistics are chosen."""
        if self._space is None:
            ActionStatistics.find(self.config.norm_stats, None)
        assert self._space is not None
        return self._space

    def use_statistics(self, unnorm_key: str | None) -> None:
        """Choose the data set whose statistics give actions their unit and number of dimensions.

        Raises:
            InputError: there are none of that name; the message lists the available ones.
        """
        statistics = ActionStatistics.find(self.config.norm_stats, unnorm_key)
        self._space = statistics.action_space(self.conventions, self.control_rate)
        self.statistics = statistics

    def tokenize(self, instruction: str, visual: int | None = None, others: int | None = None) -> list[int]:
        """Token ids of the prompt for ``instruction``.

        Args:
            instruction: a sentence.
            visual, others: visual tokens and other ones that share the context; None: one image's, and one action's.

        Raises:
            InputError: it is empty, or leaves no room for visual and action tokens in the context.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: pass OpenVLAModel(config, tokenizer=...)")
        if not isinstance(instruction, str) or not instruction.strip():
            raise InputError("instruction: expected a sentence, but it is empty")
        with tokenizer_errors("tokenizer.json"):
            ids: list[int] = self.tokenizer.encode(PROMPT.format(instruction=instruction.lower())).ids
        if not ids or ids[0] != self.bos:
            ids = [self.bos, *ids]
        if self.config.append_space_token and ids[-1] != SPACE_TOKEN:
            ids.append(SPACE_TOKEN)
        visual = self.config.grid**2 if visual is None else visual
        others = self.action_space.dim if others is None else others
        room = self.context - visual - others
        if len(ids) > room:
            raise InputError(
                f"instruction: its prompt has {len(ids)} tokens, the context of {self.context} leaves room for {room} "
                f"beside {visual} visual and {others} action tokens"
            )
        return ids

    def actions(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Actions (..., D) in environment units that tokens (..., D) stand for."""
        space, statistics = self.action_space, self.statistics
        assert statistics is not None
        values = statistics.denormalize(self.action_tokenizer.decode(tokens))
        return self.conventions.to_environment(values, space.gripper)

    def action_tokens(self, actions: NDArray[np.float32]) -> NDArray[np.int64]:
        """Tokens (..., D) that stand for actions (..., D) in environment units: what training wants to be predicted."""
        space, statistics = self.action_space, self.statistics
        assert statistics is not None
        return self.action_tokenizer.encode(statistics.normalize(self.conventions.from_environment(actions, space.gripper)))

    def forward(self, pixels: Tensor, input_ids: Tensor, keep: Tensor | None = None, positions: str = "packed") -> Tensor:
        """Scores of the next token after each text token, for training (teacher forcing).

        Args:
            pixels: (B, 3 x encoders, S, S), from :func:`~spvla.vlas.openvla.images.pixel_values`.
            input_ids: prompt and action tokens, (B, T), beginning with ``<s>``. Shorter ones are padded at the end:
                no token looks ahead, so padding changes nothing before it.
            keep: visual tokens to keep, (B, K), strictly ascending in each row; None: all.
            positions: ``packed`` or ``original`` position ids of the kept tokens.

        Returns:
            (B, T, V): entry t scores ``input_ids[:, t + 1]``. Visual tokens stand between entries 0 and 1's inputs.
        """
        features, _ = self.vision_backbone(pixels)  # (B, N, C)
        b, n, c = features.shape
        if keep is None:
            keep = torch.arange(n, device=features.device).expand(b, n)
        visual = self.projector(features.gather(1, keep[..., None].expand(-1, -1, c)))  # (B, K, H)
        embeds, _, ids = self.sequences(list(visual), list(input_ids), list(keep), n, positions)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)  # none given: read as packed batch
        hidden = self.language_model.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.language_model.lm_head(hidden[:, -input_ids.shape[1] :])  # (B, T, V)
        return logits

    def sequences(
        self,
        visual: Sequence[Tensor],
        texts: Sequence[list[int] | Tensor],
        keep: Sequence[Tensor],
        total: int,
        positions: str = "packed",
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the language model reads: embeddings (B, L, H), mask (B, L) or None if nothing is padded, position ids (B, L).

        Rows of different lengths are padded on the left, so that all continue at the same place.

        Args:
            visual: each image's visual tokens, B x (K, H).
            texts: each row's token ids, (T,), beginning with ``<s>``: a prompt, or a prompt and what follows it.
            keep: which of ``total`` the visual tokens are, B x (K,).
            positions: ``packed`` (consecutive position ids) or ``original`` (those of the unpruned sequence).
        """
        if positions not in ("packed", "original"):
            raise InputError(f"positions {positions!r} is not one of packed, original", field="positions")
        rows, ids = [], []
        for tokens, text, kept in zip(visual, texts, keep, strict=True):
            assert len(tokens) == len(kept), f"{len(tokens)} visual tokens for {len(kept)} positions"
            rows.append(joined(self.embed(torch.as_tensor(text, device=self.device)), tokens))  # (K + T, H)
            first = torch.arange(len(rows[-1]), device=self.device)
            if positions == "original":  # <s>, the kept ones, and the text after all of them
                rest = torch.arange(total + 1, total + len(text), device=self.device)
                first = torch.cat([first[:1], kept + 1, rest])
            ids.append(first)  # (K + T,)
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        mask = None
        if any(pads):
            mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long().to(self.device)  # (B, L)
        embeds = torch.stack([F.pad(row, (0, 0, pad, 0)) for row, pad in zip(rows, pads, strict=True)])
        return embeds, mask, torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(ids, pads, strict=True)])

    def begin(self, rows: int, capacity: int) -> Reading | EagerReading:
        """A language model that has read nothing yet.

        Args:
            rows: sequences that are read side by side (B).
            capacity: tokens of each that will be read at most.
        """
        llama = self.language_model.model
        if self.slow is not None:
            return EagerReading(llama)
        if self._decoder is None or not self._decoder.is_of(llama):
            self._decoder = Decoder(llama)
        return self._decoder.begin(rows, capacity, self.projector.fc1.weight)

    @property
    def slow(self) -> str | None:
        """Why the language model reads by transformers' forward pass; None: by :mod:`~spvla.vlas.openvla.decoder`'s."""
        if self.eager:
            return "eager"
        return "in training" if self.training else Decoder.refusal(self.language_model.model)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., H) of token ids (...)."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(tokens)
        return embeddings

    def scores(self, states: Tensor) -> Tensor:
        """Scores of the next token, float32 (..., V), after hidden states (..., H)."""
        scores: Tensor = self.language_model.lm_head(states).float()
        return scores
