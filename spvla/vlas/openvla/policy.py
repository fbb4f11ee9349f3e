"""The policy around the network: an observation in, an action out, with each stage's time; visual tokens pruned on request."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.selector import TokenSelector
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import UInt8Array
from spvla.vlas.openvla.decoding import Decoded, greedy, verified
from spvla.vlas.openvla.images import resized, standardized
from spvla.vlas.openvla.model import OpenVLAModel, VisionBackbone

PRUNING_STAGES = ("queries_keys", "score", "contours", "selection")  # in ``timings`` where tokens are pruned


class Stopwatch:
    """Milliseconds between laps, by name; waits for a GPU's queue so that each stage is charged its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = (now - self.last) * 1e3
        self.last = now


class Prompted(ABC):
    """What OpenVLA's policies share: an episode's instruction as a prompt, and the network's weights.

    Attributes:
        model: the network, with ``tokenize(instruction)`` and ``state_dict()``.
    """

    model: Any
    _prompt: list[int] | None = None

    @abstractmethod
    def _predict(self, observations: Sequence[Observation], prompts: Sequence[list[int]], keep_mass: float) -> list[VLAOutput]:
        """An output for each observation under its prompt."""

    def state_dict(self) -> Mapping[str, Any]:
        """The network's weights by name."""
        weights: Mapping[str, Any] = self.model.state_dict()
        return weights

    def reset(self, instruction: str) -> None:
        """Start an episode with ``instruction``. Raises :class:`InputError` as the model's ``tokenize`` does."""
        self._prompt = self.model.tokenize(instruction)

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """The output for one observation under :meth:`reset`'s instruction; fields as ``predict_batch`` says."""
        if self._prompt is None:
            raise InputError("predict: call reset(instruction) first")
        return self._predict([observation], [self._prompt], keep_mass)[0]

    def prompts(self, observations: Sequence[Observation], instructions: Sequence[str]) -> list[list[int]]:
        """The prompt of each observation. Raises :class:`InputError` if there are not as many, or none."""
        if len(observations) != len(instructions) or not observations:
            raise InputError(f"predict_batch: {len(observations)} observations for {len(instructions)} instructions")
        return [self.model.tokenize(i) for i in instructions]


class OpenVLA(Prompted):
    """The policy (:class:`~spvla.vlas.base.VLA`) that a network makes.

    Args:
        model: the network; its action statistics are chosen.
        selector: selects visual tokens where ``keep_mass`` < 1.
    """

    def __init__(self, model: OpenVLAModel, selector: TokenSelector | None = None) -> None:
        if selector is not None:
            selector.require(model.config.grid**2)
        self.model, self.selector = model, selector

    @property
    def action_space(self) -> ActionSpace:
        """Layout, scale and bounds of predicted actions. Raises :class:`InputError` before statistics are chosen."""
        return self.model.action_space

    def predict_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], keep_mass: float = 1.0
    ) -> list[VLAOutput]:
        """One action for each of B independent observations; the episode's instruction stays as it is.

        Args:
            observations: images are uint8 (H, W, 3) RGB of any size.
            instructions: one for each observation; they may differ in length.
            keep_mass: in (0, 1]; what the selector keeps. 1: all tokens, the unpruned model's very computation.

        Returns:
            for each: ``actions`` (1, D) in environment units; ``tokens`` (1, D); ``confidence`` (D,), the softmax
            probability of each chosen token over the whole vocabulary; ``features`` (H,), the mean over the D last
            hidden states that the tokens were read from; ``visual_tokens``; ``timings`` in ms of the stages
            preprocess, vision, projector, prefill and decode, and where tokens are pruned ``PRUNING_STAGES``, this
            batch's divided by B.

        Raises:
            InputError: bad images or instructions, counts differ, ``keep_mass`` < 1 without a selector.
        """
        return self._predict(observations, self.prompts(observations, instructions), keep_mass)

    def with_pruner(self, selector: TokenSelector | None) -> OpenVLA:
        """A policy of the same network with another selector and an episode of its own."""
        return OpenVLA(self.model, selector)

    def view(self, image: UInt8Array) -> UInt8Array:
        """What the encoders see of the environment's ``image``, uint8 (S, S, 3): tokens are its patches, row by row."""
        return self.model.conventions.apply_image(image, self.model.config.image_sizes[-1])

    @property
    def backend(self) -> dict[str, str]:
        """``device``, ``dtype`` and ``attention`` (kernels that torch may choose from), for reports of timing."""
        return backend(self.model)

    def verify(
        self, observation: Observation, proposal: FloatArray, tolerance: float | None = None, keep_mass: float = 1.0
    ) -> VLAOutput:
        """As :meth:`predict`, for a proposal that is probably right: cheaper by one step of decoding for each leading dimension
        in which the model agrees with it.

        Args:
            observation, keep_mass: as for :meth:`predict`.
            proposal: what a generator would do, (D,), environment units.
            tolerance: None: the output is :meth:`predict`'s, token by token. Else the model agrees with a dimension of the
                proposal if its own value, given the proposal's before it, deviates by no more than this (normalised units; a
                binary gripper: if both are on one side), and says what it would have done.

        Returns:
            as :meth:`predict`, with ``accepted``, the leading dimensions that were agreed on.
        """
        if self._prompt is None:
            raise InputError("verify: call reset(instruction) first")
        model, space = self.model, self.action_space
        proposed = model.action_tokens(space.clip(proposal)[None])[0]  # (D,)

        def agree(tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
            if tolerance is None:
                return tokens == proposed
            mine, its = (space.normalize(model.actions(t)) for t in (tokens, proposed))
            return ~space.deviating(its, mine, tolerance)

        def decode(embeds: Tensor, mask: Tensor | None, ids: Tensor, after_prefill: Callable[[], None]) -> Decoded:
            return verified(model, embeds, ids, proposed, agree, after_prefill)

        return self._predict([observation], [self._prompt], keep_mass, decode)[0]

    @torch.inference_mode()
    def _predict(
        self,
        observations: Sequence[Observation],
        prompts: Sequence[list[int]],
        keep_mass: float,
        decode: Callable[..., Decoded] | None = None,
    ) -> list[VLAOutput]:
        """``decode`` takes what :meth:`OpenVLAModel.sequences` returns and ``after_prefill``; None: greedily."""
        check_keep(keep_mass, self.selector)
        model, selector = self.model, self.selector
        clock = Stopwatch(model.device)
        images = [resized(self.view(o.require_image()), model.config) for o in observations]  # B x encoders
        pixels = torch.stack([standardized(views, model.config) for views in images])  # (B, 3 x encoders, S, S)
        pixels = pixels.to(model.device)
        clock.lap("preprocess")
        features, score_input = model.vision_backbone(pixels)  # (B, N, C)
        clock.lap("vision")
        total = features.shape[1]
        keep = [torch.arange(total, device=model.device)] * len(images)
        if keep_mass < 1 and selector is not None:
            keep = select_tokens(
                model.vision_backbone, selector, score_input, [views[-1] for views in images], keep_mass, clock
            )
            features = torch.cat([f[k] for f, k in zip(features, keep, strict=True)])  # (sum of K, C)
            clock.lap("selection")
        visual = model.projector(features.flatten(0, -2)).split([len(k) for k in keep])  # B x (K, H)
        clock.lap("projector")
        sequences = model.sequences(visual, prompts, keep, total, selector.positions if selector else "packed")
        decoded = (decode or partial(greedy, model))(*sequences, after_prefill=lambda: clock.lap("prefill"))
        tokens = decoded.tokens.cpu().numpy()  # (B, D)
        actions = model.actions(tokens)
        confidence = decoded.scores.softmax(-1).amax(-1).cpu().numpy()  # (B, D)
        if not np.isfinite(confidence).all():
            raise InputError(
                f"{type(self).__name__}: the scores of the action tokens contain NaN or infinity, though weights are finite "
                f"when loaded: dtype {str(model.dtype).removeprefix('torch.')} may be too narrow for them"
            )
        pooled = decoded.states.float().mean(1).cpu().numpy()  # (B, H)
        clock.lap("decode")
        kept = [k.cpu().numpy() for k in keep]
        timings = {name: ms / len(images) for name, ms in clock.laps.items()}
        return [
            VLAOutput(
                actions=actions[i : i + 1],
                tokens=tokens[i : i + 1],
                confidence=confidence[i],
                features=pooled[i],
                visual_tokens=(len(keep[i]), total),
                kept_tokens=kept[i],
                accepted=decoded.accepted,
                timings=dict(timings),
            )
            for i in range(len(images))
        ]


def select_tokens(
    backbone: VisionBackbone,
    selector: TokenSelector,
    score_input: Tensor,
    images: Sequence[UInt8Array],
    keep_mass: float,
    clock: Stopwatch,
) -> list[Tensor]:
    """The selector's choice for each of B images, as the last encoder sees it: B x (K,), ascending."""
    q, k = backbone.queries_keys(score_input)  # (B, nh, N, hs)
    clock.lap("queries_keys")
    scores = selector.scores(q, k, images).cpu().numpy()  # (B, N)
    clock.lap("score")
    contours = [selector.contour_mask(image, scores.shape[1]) for image in images]  # B x (N,)
    clock.lap("contours")
    keep = [selector.choose(s, c, keep_mass) for s, c in zip(scores, contours, strict=True)]
    assert all((np.diff(k) > 0).all() for k in keep), "visual tokens out of order"
    return [torch.from_numpy(k).to(score_input.device) for k in keep]


def check_keep(keep_mass: float, selector: TokenSelector | None) -> None:
    """Raise :class:`InputError` for a ``keep_mass`` outside (0, 1], or below 1 without a selector."""
    if not 0 < keep_mass <= 1:
        raise InputError(f"keep_mass must lie in (0, 1], got {keep_mass}")
    if keep_mass < 1 and selector is None:
        raise InputError(f"keep_mass is {keep_mass}, but this model was given no selector")


def backend(model: OpenVLAModel) -> dict[str, str]:
    """``device``, ``dtype`` and ``attention`` (kernels that torch may choose from), for reports of timing."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    kernels = "CPU"
    if device.type == "cuda":
        allowed = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        kernels = ", ".join(kernel for kernel, on in allowed.items() if on)
    llama = model.language_model.config._attn_implementation
    attention = f"encoders: torch sdpa ({kernels}); language model: transformers {llama} ({kernels})"
    return {"device": name, "dtype": str(model.dtype).removeprefix("torch."), "attention": attention}
