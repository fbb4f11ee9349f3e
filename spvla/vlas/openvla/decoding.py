"""Action tokens read off a language model one after another, or a proposal's all at once.

Greedy decoding asks the model once for each token. A proposal that is mostly right is cheaper: with its tokens behind the
prompt, one pass says what the model would have written at every place. Up to the first place where they differ that is what
greedy decoding gives, and from there it goes on with nothing computed twice (speculative decoding, arXiv 2211.17192; with
tolerance: relaxed acceptance, arXiv 2507.22424).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from spvla.vlas.openvla.decoder import EagerReading, Reading
    from spvla.vlas.openvla.model import OpenVLAModel

Agree = Callable[[NDArray[np.int64]], NDArray[np.bool_]]


@dataclass(frozen=True)
class Decoded:
    """What the model wrote.

    Args:
        tokens: (B, D).
        scores: that they were read from, float32 (B, D, V).
        states: the hidden states behind these, (B, D, H).
        accepted: leading tokens of a proposal that it agreed with; None: there was no proposal.
    """

    tokens: Tensor
    scores: Tensor
    states: Tensor
    accepted: int | None = None


def greedy(
    model: OpenVLAModel, embeds: Tensor, mask: Tensor | None, ids: Tensor, after_prefill: Callable[[], None] = lambda: None
) -> Decoded:
    """The likeliest token at each place, given those before it.

    Args:
        model: the network.
        embeds, mask, ids: from :meth:`OpenVLAModel.sequences`. The last action token is only read, never fed back.
        after_prefill: called when the prompt has been read.
    """
    dim, length = model.action_space.dim, embeds.shape[1]
    reading = model.begin(len(embeds), length + dim - 1)
    states = reading.read(embeds, ids, mask)[:, -1:]  # (B, 1, H)
    assert reading.length == length, f"{reading.length} tokens reached the decoder, not {length}"
    after_prefill()
    return _go_on(model, reading, states, model.scores(states), ids[:, -1:])


def verified(
    model: OpenVLAModel,
    embeds: Tensor,
    ids: Tensor,
    proposal: NDArray[np.int64],
    agree: Agree,
    after_prefill: Callable[[], None] = lambda: None,
) -> Decoded:
    """The model's own tokens, given a proposal that is probably right.

    Args:
        model: the network.
        embeds, ids: from :meth:`OpenVLAModel.sequences`, one row.
        proposal: token ids, (D,).
        agree: says of the likeliest tokens (D,), each after the proposal's before it, which agree with the proposal's, bool
            (D,). If only equal ones do, the result is :func:`greedy`'s.
        after_prefill: called when prompt and proposal have been read.
    """
    length, dim = embeds.shape[1], len(proposal)
    given = torch.from_numpy(proposal[:-1]).to(embeds.device)[None]  # (1, D - 1)
    reading = model.begin(1, length + dim - 1)
    following = ids[:, -1:] + torch.arange(1, dim, device=ids.device)
    hidden = reading.read(torch.cat([embeds, model.embed(given)], 1), torch.cat([ids, following], 1))
    after_prefill()
    states = hidden[:, length - 1 :]  # (1, D, H)
    scores = model.scores(states)  # (1, D, V)
    likeliest = scores[0].argmax(-1).cpu().numpy()
    agreeing = agree(likeliest)
    accepted = int(np.argmin(agreeing)) if not agreeing.all() else dim
    known = min(accepted + 1, dim)  # the first that differs is the model's own word, too
    reading.crop(length + min(accepted, dim - 1))
    out = _go_on(model, reading, states[:, :known], scores[:, :known], ids[:, -1:] + accepted)
    return Decoded(out.tokens, out.scores, out.states, accepted)


def _go_on(model: OpenVLAModel, reading: Reading | EagerReading, states: Tensor, scores: Tensor, last: Tensor) -> Decoded:
    """Decode greedily behind what is known.

    Args:
        reading: the prompt and all but the last known token were read.
        states, scores: of the known tokens, (B, n, H) and (B, n, V).
        last: position id of the last token that was read, (B, 1).
    """
    tokens, seen, found = [scores.argmax(-1)], [states], [scores]
    for _ in range(model.action_space.dim - states.shape[1]):
        last = last + 1
        seen.append(reading.read(model.embed(tokens[-1][:, -1:]), last))
        found.append(model.scores(seen[-1]))
        tokens.append(found[-1].argmax(-1))
    return Decoded(torch.cat(tokens, 1), torch.cat(found, 1), torch.cat(seen, 1))
