"""The least time that a VLA's call can take on a machine: every weight it reads must come out of memory."""

from __future__ import annotations

from time import perf_counter

import torch

from spvla.vlas.openvla.policy import OpenVLA

SIZE = 2**28  # bytes, more than any cache holds
REPEATS = 9


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that ``device`` reads and writes, together, while it copies: the best of several copies."""
    source = torch.zeros(SIZE // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    return 2 * SIZE / min(copy() for _ in range(REPEATS))


def bytes_read(vla: OpenVLA, passes: int) -> int:
    """Bytes of weights that a call reads whose language model runs ``passes`` times: once for the prompt, once for each action
    token that is fed back. Tables of which it looks up single rows do not count."""
    model = vla.model
    looked_up = {id(model.language_model.get_input_embeddings().weight)}
    if model.language_model.config.tie_word_embeddings:
        looked_up = set()

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in looked_up)

    return size(model.vision_backbone) + size(model.projector) + passes * size(model.language_model)
