"""The policy around the network: observations in, a chunk of actions out; visual tokens pruned on request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.selector import TokenSelector
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import UInt8Array
from spvla.vlas.openvla.images import resized, standardized
from spvla.vlas.openvla.policy import Prompted, Stopwatch, backend, check_keep, select_tokens
from spvla.vlas.openvla_oft.model import OpenVLAOFTModel


class OpenVLAOFT(Prompted):
    """The policy (:class:`~spvla.vlas.base.VLA`) that a network makes.

    Args:
        model: the network.
        selector: selects visual tokens where ``keep_mass`` < 1, in each image by itself: none goes blind. Its budget too is
            one image's.
    """

    def __init__(self, model: OpenVLAOFTModel, selector: TokenSelector | None = None) -> None:
        if selector is not None:
            selector.require(model.vla.config.grid**2)
        self.model, self.selector = model, selector

    @property
    def action_space(self) -> ActionSpace:
        """Layout, scale and bounds of predicted actions."""
        return self.model.vla.action_space

    @property
    def cameras(self) -> Sequence[str]:
        """The cameras it looks through, in the order of training."""
        return self.model.recipe.cameras

    @property
    def state_dim(self) -> int | None:
        """How many values of ``observation.state`` it reads; None: it reads none."""
        statistics = self.model.proprio_statistics
        return None if statistics is None else statistics.low.size

    @property
    def backend(self) -> dict[str, str]:
        """``device``, ``dtype`` and ``attention`` (kernels that torch may choose from), for reports of timing."""
        return backend(self.model.vla)

    def predict_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], keep_mass: float = 1.0
    ) -> list[VLAOutput]:
        """A chunk for each of B independent observations; the episode's instruction stays as it is.

        Args:
            observations: an image of each of :attr:`cameras`, uint8 (H, W, 3) RGB of any size, and the state (S,) if it reads
                proprioception.
            instructions: one for each observation; they may differ in length.
            keep_mass: in (0, 1]; what the selector keeps of each image. 1: all tokens.

        Returns:
            for each: ``actions`` (T, D) in environment units; ``features`` (H,), the mean of the hidden states that they were
            read from; ``visual_tokens``; ``kept_tokens``, counted through all images; ``timings`` in ms of the stages
            preprocess, vision, projector, prefill (the Llama's only pass) and decode (the head), and where tokens are pruned
            ``PRUNING_STAGES``, this batch's divided by B. There are no tokens and no confidence: nothing is sampled.

        Raises:
            InputError: bad images, states or instructions, counts differ, ``keep_mass`` < 1 without a selector.
        """
        return self._predict(observations, self.prompts(observations, instructions), keep_mass)

    def with_pruner(self, selector: TokenSelector | None) -> OpenVLAOFT:
        """A policy of the same network with another selector and an episode of its own."""
        return OpenVLAOFT(self.model, selector)

    def view(self, image: UInt8Array) -> UInt8Array:
        """What the encoders see of an environment's ``image``, uint8 (S, S, 3): tokens are its patches, row by row."""
        return self.model.vla.conventions.apply_image(image, self.model.vla.config.image_sizes[-1])

    def states(self, observations: Sequence[Observation]) -> Tensor | None:
        """Normalised proprioception (B, S), in the network's type; None if it reads none.

        Raises:
            InputError: a state of another shape, or one that is not finite (field ``observation.state``).
        """
        statistics = self.model.proprio_statistics
        if statistics is None:
            return None
        for o in observations:
            state = o.state
            if not isinstance(state, np.ndarray) or state.shape != statistics.low.shape or not np.isfinite(state).all():
                got = (
                    "NaN or infinity"
                    if getattr(state, "shape", None) == statistics.low.shape
                    else getattr(state, "shape", None)
                )
                raise InputError(
                    f"observation.state: the policy needs shape {statistics.low.shape} of finite numbers, got {got}",
                    code="state",
                    field="observation.state",
                )
        normalized = statistics.normalize(np.stack([np.asarray(o.state) for o in observations]))
        return torch.from_numpy(normalized).to(self.model.vla.device, self.model.vla.dtype)

    @torch.inference_mode()
    def _predict(self, observations: Sequence[Observation], prompts: Sequence[list[int]], keep_mass: float) -> list[VLAOutput]:
        check_keep(keep_mass, self.selector)
        model, vla, selector = self.model, self.model.vla, self.selector
        statistics = vla.statistics
        assert statistics is not None
        clock = Stopwatch(vla.device)
        views = [[resized(self.view(o.require_image(c)), vla.config) for c in self.cameras] for o in observations]
        pixels = torch.stack([torch.stack([standardized(v, vla.config) for v in row]) for row in views])
        pixels = pixels.to(vla.device)  # (B, n, 3 x encoders, S, S)
        states = self.states(observations)
        clock.lap("preprocess")
        features, score_input = model.see(pixels, prompts)  # (B, n N, C), (B n, N, C_last)
        clock.lap("vision")
        total = features.shape[1]
        keep = [torch.arange(total, device=vla.device)] * len(views)
        if keep_mass < 1 and selector is not None:
            images = [v[-1] for row in views for v in row]
            chosen = select_tokens(vla.vision_backbone, selector, score_input, images, keep_mass, clock)
            keep = _joined(chosen, len(self.cameras), score_input.shape[1])
            features = torch.cat([f[k] for f, k in zip(features, keep, strict=True)])  # (sum of K, C)
            clock.lap("selection")
        visual = vla.projector(features.flatten(0, -2)).split([len(k) for k in keep])  # B x (K, H)
        clock.lap("projector")
        sequences = model.sequences(visual, prompts, keep, states, selector.positions if selector else "packed")
        hidden = model.read(*sequences)  # (B, T D, H)
        clock.lap("prefill")
        normalized = model.action_head(hidden).float().cpu().numpy()  # (B, T, D)
        if not np.isfinite(normalized).all():
            raise InputError(
                f"{type(self).__name__}: the actions contain NaN or infinity, though weights are finite when loaded: dtype "
                f"{str(vla.dtype).removeprefix('torch.')} may be too narrow for them"
            )
        actions = vla.conventions.to_environment(statistics.denormalize(normalized), vla.action_space.gripper)
        pooled = hidden.float().mean(1).cpu().numpy()  # (B, H)
        clock.lap("decode")
        timings = {name: ms / len(views) for name, ms in clock.laps.items()}
        return [
            VLAOutput(
                actions=actions[i],
                features=pooled[i],
                visual_tokens=(len(keep[i]), total),
                kept_tokens=keep[i].cpu().numpy(),
                timings=dict(timings),
            )
            for i in range(len(views))
        ]


def _joined(chosen: Sequence[Tensor], images: int, tokens: int) -> list[Tensor]:
    """Choices in B n images of N tokens as one choice each, counted through an observation's images: B x (K,)."""
    rows = [chosen[i : i + images] for i in range(0, len(chosen), images)]
    return [torch.cat([k + i * tokens for i, k in enumerate(row)]) for row in rows]
