"""Continue a VLA as OpenVLA-OFT has it (arXiv 2502.19645): a chunk of continuous actions in one pass, by L1 regression.

The vision encoders stay as they are, so a chunked VLA costs a fraction of its one-step parent's training. Projector and
Llama go on, and learn to be read in both directions; proprioception's projector and the action head begin anew. Patches
are dropped at random, as in :mod:`train.vla.module`, so that pruning later meets a model that has seen it.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spvla.errors import InputError
from spvla.observation import MAIN
from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.openvla.policy import OpenVLA
from spvla.vlas.openvla_oft.components import ACTION_HEAD, save_pretrained
from spvla.vlas.openvla_oft.model import OpenVLAOFTModel
from spvla.vlas.openvla_oft.policy import OpenVLAOFT
from spvla.vlas.openvla_oft.recipe import ProprioStatistics, Recipe
from spvla.vlas.registry import load_vla
from train.vla.averaged import AveragedModule, pixels
from train.vla.frames import FrameBatch
from train.vla.module import take_weights
from train.vla.network import PlainAttention
from train.vla.targets import contents, draw, mean_where

PACKAGED = ("nano_vla", "nano_oft")
LEVELS = (0.0, 0.5, 1.0)  # of a chunk: where validation tells the error


def chunked(vla: OpenVLAModel, chunk: int, context: int, low: list[float], high: list[float]) -> OpenVLAOFTModel:
    """The chunked network that begins with the weights of ``vla``.

    Args:
        vla: a trained network with one set of statistics.
        chunk: T, actions of one answer.
        context: longest sequence of the new network, tokens.
        low, high: range of the state that it reads, in the robot's units, (S,).
    """
    assert vla.statistics is not None
    stats = deepcopy(dict(vla.config.norm_stats))
    stats[vla.statistics.key]["proprio"] = {"q01": low, "q99": high}
    text = {**vla.config.text_config, "max_position_embeddings": context}
    config = replace(vla.config, text_config=text, llm_max_length=context, norm_stats=stats)
    wider = OpenVLAModel(config, tokenizer=vla.tokenizer, unnorm_key=vla.statistics.key, conventions=vla.conventions)
    take_weights(wider, vla, "start")
    recipe = Recipe(cameras=(MAIN,), chunk=chunk, proprio=True, film=False)
    return OpenVLAOFTModel(wider, recipe, ProprioStatistics(low, high))


def begin(start: str, chunk: int, context: int, low: list[float], high: list[float]) -> OpenVLAOFTModel:
    """The network that training begins with: :func:`chunked` of a one-step VLA's, or a chunked one's own.

    Raises:
        InputError: a chunked one that gives another number of actions or reads other states (code ``shape-mismatch``).
    """
    folder = None if start in PACKAGED else start
    if start != "nano_oft" and (folder is None or not any(Path(folder).glob(f"{ACTION_HEAD}--*"))):
        earlier = load_vla("nano_vla", folder)
        assert isinstance(earlier, OpenVLA)
        return chunked(earlier.model, chunk, context, low, high)
    recipe = {"cameras": [MAIN], "chunk": chunk, "proprio": True, "film": False}
    vla = load_vla("nano_oft", folder, {"recipe": recipe})
    assert isinstance(vla, OpenVLAOFT) and vla.model.proprio_statistics is not None
    known = vla.model.proprio_statistics
    if known.low.tolist() != low or known.high.tolist() != high or vla.model.vla.context != context:
        raise InputError(
            f"{start}: reads states from {known.low.tolist()} to {known.high.tolist()}, up to {vla.model.vla.context} tokens; "
            "give the same state_low, state_high and context",
            code="shape-mismatch",
            field="start",
        )
    return vla.model


class ChunkModule(AveragedModule):
    """Trains an OpenVLA-OFT that reads one camera and the robot's state.

    Args:
        output: folder that the averaged model is written to, in the published form.
        state_low, state_high: range of the recorded state, its own units, (S,): what becomes -1 and 1.
        start: VLA whose weights training begins with, a folder or a packaged one's name: a one-step VLA such as ``nano_vla``,
            or a chunked one of the same shape.
        chunk: T, actions of one answer; the data's ``chunk`` must be the same.
        context: longest sequence, tokens: visual ones, the prompt, T x D slots.
        train_vision: the encoders go on learning too, for twice the time per step.
        save_every: optimiser steps between two writings.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; afterwards the rate stays, until ...
        cooldown: ... over the last share of the trainer's ``max_steps`` it falls to zero.
        averaging: decay of the exponential average of the weights.
        keep: least and largest share of the image's patches that the model sees, drawn for each batch: the fewer, the cheaper
            the step. Patches with much in them are chosen more often, as a pruner chooses them.
        bf16: compute in bfloat16 where autocast allows; weights stay float32.
    """

    network: OpenVLAOFTModel

    def __init__(
        self,
        output: Path,
        state_low: list[float],
        state_high: list[float],
        start: str = "nano_vla",
        chunk: int = 16,
        context: int = 448,
        train_vision: bool = False,
        save_every: int = 200,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        cooldown: float = 0.3,
        averaging: float = 0.995,
        keep: tuple[float, float] = (0.4, 1.0),
        bf16: bool = False,
    ) -> None:
        network = begin(start, chunk, context, state_low, state_high).float()
        network.requires_grad_(True)
        network.vla.vision_backbone.requires_grad_(train_vision)
        network.vla.language_model.lm_head.requires_grad_(False)  # no token is predicted
        super().__init__(network, output, save_every, learning_rate, weight_decay, warmup_steps, cooldown, averaging)
        self.train_vision, self.keep, self.bf16 = train_vision, keep, bf16

    def targets(self, batch: FrameBatch) -> Tensor:
        """Labels (B, T, D) as the head is to give them; NaN: none to be learnt.

        Raises:
            InputError: the data's chunks are of another length (code ``shape-mismatch``).
        """
        vla, recipe, statistics = self.network.vla, self.network.recipe, self.network.vla.statistics
        assert statistics is not None
        if batch.ahead.shape[1] != recipe.chunk:
            raise InputError(
                f"data.chunk: {batch.ahead.shape[1]} labels of each frame, the model's chunks have {recipe.chunk}",
                code="shape-mismatch",
                field="data.chunk",
            )
        labels = vla.conventions.from_environment(batch.ahead.cpu().numpy(), vla.action_space.gripper)
        return torch.from_numpy(statistics.normalize(labels).astype(np.float32)).to(batch.images.device)

    def predict(self, network: nn.Module, batch: FrameBatch, share: float = 1.0) -> Tensor:
        """Normalised actions (B, T, D) from a ``share`` of each image's patches."""
        assert isinstance(network, OpenVLAOFTModel) and network.proprio_statistics is not None
        vla = network.vla
        if not batch.states.isfinite().all():
            raise InputError("observation.state: this model reads the robot's state, which some frames lack", code="state")
        states = torch.from_numpy(network.proprio_statistics.normalize(batch.states.cpu().numpy())).to(batch.images.device)
        prompts = [network.tokenize(text) for text in batch.instructions]
        plain = PlainAttention() if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), plain:
            keep = draw(contents(batch.images, vla.config.grid), share)  # (B, K)
            with nullcontext() if self.train_vision else torch.no_grad():
                features, _ = vla.vision_backbone(pixels(vla, batch.images), keep if share < 1 else None)  # (B, K, C)
            visual = vla.projector(features)
            actions: Tensor = network(*network.sequences(list(visual), prompts, list(keep), states.float()))
        return actions.float()

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        share = self.keep[0] + (self.keep[1] - self.keep[0]) * torch.rand(()).item()
        target = self.targets(batch)
        error = (self.predict(self.network, batch, share) - target.nan_to_num()).abs()
        loss = mean_where(error, target.isfinite())
        self.log("train/l1", loss, prog_bar=True, batch_size=len(batch.images))
        return loss

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        target = self.targets(batch)
        error = (self.predict(self.average.module, batch) - target.nan_to_num()).abs()  # (B, T, D)
        known = target.isfinite()
        space = self.network.vla.action_space
        values = {"val/l1": mean_where(error, known)}
        for level in LEVELS:
            step = round(level * (error.shape[1] - 1))
            for name, dims in {"translation": space.translation, "gripper": space.gripper}.items():
                if dims:
                    at = (slice(None), step, list(dims))
                    values[f"val/{name}_error_{step}"] = mean_where(error[at], known[at])
        self.log_dict(values, batch_size=len(batch.images))

    def write(self, folder: Path) -> None:
        """The averaged model, in OpenVLA-OFT's published form."""
        model: Any = self.average.module
        save_pretrained(model, folder)
