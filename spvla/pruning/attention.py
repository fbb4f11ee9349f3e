"""The semantic score: how much attention each visual token receives (SP-VLA, arXiv 2506.12723).

Computed from queries and keys alone, so that every block of the encoder keeps its fast attention kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """Attention received per token: softmax(q k' / sqrt(hs)), mean over heads, then over queries.

    Args:
        q, k: queries and keys of one block, (B, nh, N, hs) or (nh, N, hs), any float type.

    Returns:
        float32 (B, N) or (N,); non-negative, each row sums to 1.
    """
    q, k = q.float(), k.float()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (..., nh, N, N)
    received = torch.softmax(scores, dim=-1).mean(dim=(-3, -2))  # (..., N)
    return received / received.sum(-1, keepdim=True)  # float32 rounding apart, the sum is 1 already


def attention(queries: Tensor, keys: Tensor, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """:func:`attention_received`, as a :class:`~spvla.pruning.selector.Scorer`; the pixels do not count."""
    return attention_received(queries, keys)
