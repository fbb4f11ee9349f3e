"""A Llama's forward pass without what it does not need here: the same weights, one cache that stays where it is.

transformers' own pass remains the reference (:meth:`~spvla.vlas.openvla.model.OpenVLAModel.generate` with ``eager``); on a
small VLA most of its time goes into its bookkeeping for each of many small operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layer:
    """One block's weights, with projections of one input joined.

    Args:
        before, after: the norms' weights before attention and before the MLP, (H,).
        qkv: queries, keys and values, ((nh + 2 nkv) hs, H), and their bias or None.
        out: (H, nh hs), and its bias or None.
        gate_up: (2 F, H), and its bias or None.
        down: (H, F), and its bias or None.
    """

    before: Tensor
    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    after: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


class Decoder:
    """A Llama's weights, ready to be read with. Thread-safe: what was read is kept by each :class:`Reading` alone.

    Joining copies no weight twice: the model's own parameters become views of the joined ones.

    Args:
        llama: a ``LlamaModel``, which :meth:`refusal` accepts.
    """

    def __init__(self, llama: Any) -> None:
        config = llama.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim
        self.eps = config.rms_norm_eps
        self.rotary, self.norm = llama.rotary_emb, llama.norm.weight
        with torch.inference_mode(False), torch.no_grad():  # else the weights could not be trained any more
            self.layers = [self._layer(block) for block in llama.layers]

    @staticmethod
    def refusal(llama: Any) -> str | None:
        """Why this pass cannot stand in for the model's own, or None."""
        if type(llama).__name__ != "LlamaModel":
            return f"the language model is a {type(llama).__name__}"
        if llama.config.hidden_act != "silu":
            return f"hidden_act is {llama.config.hidden_act!r}"
        for name, module in llama.named_modules():
            if name.endswith("_proj") and type(module) is not nn.Linear:
                return f"{name} is wrapped ({type(module).__name__})"
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return f"{name or 'the language model'} has a hook"
        return None

    def is_of(self, llama: Any) -> bool:
        """Whether these are still the model's weights: nothing replaced, moved or converted them."""

        def same(whole: Tensor, part: Tensor) -> bool:
            return whole.data_ptr() == part.data_ptr() and whole.dtype == part.dtype and whole.device == part.device

        return len(self.layers) == len(llama.layers) and all(
            same(layer.qkv[0], block.self_attn.q_proj.weight)
            and same(layer.out[0], block.self_attn.o_proj.weight)
            and same(layer.gate_up[0], block.mlp.gate_proj.weight)
            and same(layer.down[0], block.mlp.down_proj.weight)
            for layer, block in zip(self.layers, llama.layers, strict=True)
        )

    @staticmethod
    def _layer(block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            block.input_layernorm.weight,
            _joined(attention.q_proj, attention.k_proj, attention.v_proj),
            _joined(attention.o_proj),
            block.post_attention_layernorm.weight,
            _joined(mlp.gate_proj, mlp.up_proj),
            _joined(mlp.down_proj),
        )

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm in float32, as Llama has it (arXiv 1910.07467)."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def begin(self, rows: int, capacity: int, like: Tensor) -> Reading:
        """Begin to read.

        Args:
            rows: sequences that are read side by side (B).
            capacity: tokens of each that will be read at most.
            like: a tensor of the weights' type, where they are.
        """
        return Reading(self, rows, capacity, like)


class Reading:
    """Sequences that are read one stretch after another, each token once: see :meth:`Decoder.begin`."""

    def __init__(self, weights: Decoder, rows: int, capacity: int, like: Tensor) -> None:
        self.weights, self.length = weights, 0
        shape = (len(weights.layers), 2, rows, weights.kv_heads, capacity, weights.head_size)
        self._cache = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._mask: Tensor | None = None  # (B, length), or None if nothing was padded

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        assert 0 <= length <= self.length, f"{length} of {self.length} tokens"
        self.length = length
        self._mask = None if self._mask is None else self._mask[:, :length]

    def read(self, embeds: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, H), normed as the scores' layer wants them, after reading ``embeds`` behind what was read.

        Args:
            embeds: (B, L, H).
            ids: position ids, (B, L).
            mask: 0 where a row is padded, (B, L); None: nowhere. Only the first stretch may be padded, on the left.
        """
        w, cache = self.weights, self._cache
        rows, new, _ = embeds.shape
        first, end = self.length, self.length + new
        assert end <= cache.shape[4], f"{end} tokens, begun for {cache.shape[4]}"
        if first == 0:
            self._mask = mask
        elif self._mask is not None:
            self._mask = F.pad(self._mask, (0, new), value=1)
        allowed = self._allowed(first, new, embeds.device)
        cos, sin = (x[:, None] for x in w.rotary(embeds, ids))  # (B, 1, L, hs)
        x = embeds
        for layer, (keys, values) in zip(w.layers, cache, strict=True):
            joint = F.linear(w.normed(x, layer.before), *layer.qkv).view(rows, new, -1, w.head_size).transpose(1, 2)
            qk, v = joint[:, : -w.kv_heads], joint[:, -w.kv_heads :]  # (B, heads, L, hs)
            qk = _turned(qk, cos, sin)
            keys[:, :, first:end], values[:, :, first:end] = qk[:, w.heads :], v
            seen = F.scaled_dot_product_attention(
                qk[:, : w.heads],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=allowed,
                is_causal=allowed is None and new > 1,
                enable_gqa=w.kv_heads != w.heads,
            )
            x = x + F.linear(seen.transpose(1, 2).reshape(rows, new, -1), *layer.out)
            gate, up = F.linear(w.normed(x, layer.after), *layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, *layer.down)
        self.length = end
        return w.normed(x, w.norm)

    def _allowed(self, first: int, new: int, device: torch.device) -> Tensor | None:
        """What each new token sees, bool (B or 1, 1, L, first + L); None: all before it, which needs no mask."""
        if self._mask is None and (first == 0 or new == 1):
            return None
        places = torch.arange(first + new, device=device)
        seen = places <= places[first:, None]
        if self._mask is None:
            return seen[None, None]
        # A padded place sees itself, or its row of attention would have nothing to sum over.
        return (seen & self._mask.bool()[:, None, None]) | (places == places[first:, None])


class EagerReading:
    """The same by the model's own forward pass: the reference, and what reads with adapters."""

    def __init__(self, llama: Any) -> None:
        from transformers import DynamicCache

        self.llama = llama
        self._cache = DynamicCache(config=llama.config)
        self._mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return int(self._cache.get_seq_length())

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if more := self.length - length:
            self._cache.crop(-more)
        self._mask = None if self._mask is None else self._mask[:, :length]

    def read(self, embeds: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """As :meth:`Reading.read`."""
        if self.length == 0:
            self._mask = mask
        elif self._mask is not None:
            self._mask = F.pad(self._mask, (0, embeds.shape[1]), value=1)
        out = self.llama(
            inputs_embeds=embeds, attention_mask=self._mask, position_ids=ids, past_key_values=self._cache, use_cache=True
        )
        hidden: Tensor = out.last_hidden_state
        return hidden


def _joined(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weights (and biases) of layers of one input as one matrix, of which the layers' own become views."""
    out = []
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if len(parts) == 1 or any(part is None for part in parts):
            out.append(parts[0])
            continue
        whole = torch.cat([part.data for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
        out.append(whole)
    return out[0], out[1]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B, heads, L, hs), halves as Llama's published weights have them."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin
