"""Train a VLA of OpenVLA's class from scratch, at a size that two CPU cores can train (``configs/train/nano_vla.yaml``).

The loss is OpenVLA's own, cross-entropy on the action tokens, with the target spread over neighbouring bins. Two things
that exist during training alone make it work from little data: heat maps over the patches (where the hand, the place and,
by a pointer that the prompt's last token sends out, the asked object are), and random dropping of visual tokens, so that
pruning later meets a model that has seen it. The averaged weights are written as a checkpoint in OpenVLA's published form.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from data.envs.base import POINTS
from spvla.errors import InputError
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.model import PROMPT, OpenVLAModel
from spvla.vlas.openvla.policy import OpenVLA
from spvla.vlas.openvla.weights import save_pretrained
from spvla.vlas.registry import load_vla
from train.vla.averaged import AveragedModule, pixels
from train.vla.frames import FrameBatch
from train.vla.network import PlainAttention, Questions, TrainedVLA
from train.vla.targets import (
    action_loss,
    contents,
    draw,
    expected_points,
    heat_loss,
    mean_where,
    reach_loss,
    soft_targets,
)


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A tokenizer that knows OpenVLA's prompt and these words; every other word is unknown to it."""
    known = ["<unk>", "<s>", "</s>", *PROMPT.format(instruction="").lower().replace(":", " :").replace("?", " ?").split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*known, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def take_weights(model: OpenVLAModel, earlier: OpenVLAModel, where: str) -> None:
    """Give ``model`` the weights of ``earlier``, a model of the same shape that was read from ``where``.

    Raises:
        InputError: another shape, or words that have other token ids here (codes ``shape-mismatch``, ``vocabulary-mismatch``).
    """
    assert model.tokenizer is not None
    mine, theirs = (m.tokenizer.get_vocab() if m.tokenizer is not None else {} for m in (model, earlier))
    moved = sorted(word for word, i in theirs.items() if mine.get(word) != i)
    if moved:
        raise InputError(
            f"{where}: the word {moved[0]!r} has token {theirs[moved[0]]} there and {mine.get(moved[0])} here; list the "
            "checkpoint's words first, in the same order",
            code="vocabulary-mismatch",
            field="vocabulary",
        )
    try:
        model.load_state_dict(earlier.state_dict())
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise InputError(f"{where}: does not fit the architecture ({told})", code="shape-mismatch", field=where) from None


class VLAModule(AveragedModule):
    """Trains an OpenVLA.

    Args:
        architecture: fields of :class:`spvla.vlas.openvla.config.OpenVLAConfig`.
        vocabulary: words that instructions are made of.
        output: folder that the averaged model is written to, in OpenVLA's checkpoint form.
        start: checkpoint of the same shape whose weights training begins with, a folder or ``nano_vla`` for the packaged one.
            What exists in training alone, such as the heat maps, begins anew. Further words may follow those that it knows.
        save_every: optimiser steps between two writings.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: optimiser steps of linear warm-up; afterwards the rate stays, until ...
        cooldown: ... over the last share of the trainer's ``max_steps`` it falls to zero.
        averaging: decay of the exponential average of the weights.
        look: least and largest share of the image's patches that the encoders see in training, drawn for each batch: the
            fewer, the cheaper the step. Patches with much in them are chosen more often, as a pruner chooses them.
        look_all: share of the batches whose encoders see everything.
        keep: least and largest share of those that reach the decoder, drawn for each batch, chosen likewise.
        smoothing: standard deviation, in bins, of a continuous dimension's target.
        mean_weight: loss weight of the distance between the mean of a continuous token's distribution and the teacher's action,
            in units of its full range.
        rotation_weight: loss weight of rotation tokens; the other dimensions count 1.
        rotation_slack: labels' rotations are taught as so much less, environment units, and none below it: from a teacher that
            always levels the hand a little a student gets errors that add up, until its hand tilts.
        heat_weight: loss weight of the heat maps and the pointer.
        reach_weight: loss weight of the way from the hand to the object and to the place, decimetres.
        pointer_layer: decoder layer whose hidden states the pointer reads; by default the middle one.
        bf16: compute in bfloat16 where autocast allows; weights stay float32.
    """

    network: TrainedVLA
    weights: Tensor
    continuous: Tensor

    def __init__(
        self,
        architecture: dict[str, Any],
        vocabulary: list[str],
        output: Path,
        start: str | None = None,
        save_every: int = 200,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 200,
        cooldown: float = 0.2,
        averaging: float = 0.998,
        look: tuple[float, float] = (1.0, 1.0),
        look_all: float = 0.0,
        keep: tuple[float, float] = (0.25, 1.0),
        smoothing: float = 2.0,
        mean_weight: float = 0.0,
        rotation_weight: float = 0.1,
        rotation_slack: float = 0.0,
        heat_weight: float = 0.3,
        reach_weight: float = 1.0,
        pointer_layer: int | None = None,
        bf16: bool = True,
    ) -> None:
        config = OpenVLAConfig.from_dicts({"model_type": "openvla", **architecture})
        model = OpenVLAModel(config, tokenizer=word_tokenizer(vocabulary), conventions="libero")
        if start is not None:
            earlier = load_vla("nano_vla", None if start == "nano_vla" else start)
            assert isinstance(earlier, OpenVLA)
            take_weights(model, earlier.model, start)
        layers = model.language_model.config.num_hidden_layers
        network = TrainedVLA(model, layers // 2 if pointer_layer is None else pointer_layer)
        super().__init__(network, output, save_every, learning_rate, weight_decay, warmup_steps, cooldown, averaging)
        self.look, self.look_all = look, look_all
        self.keep, self.smoothing, self.heat_weight, self.bf16 = keep, smoothing, heat_weight, bf16
        self.mean_weight = mean_weight
        self.rotation_slack, self.reach_weight = rotation_slack, reach_weight
        self.patch = config.image_sizes[0] / config.grid
        self.first_bin = config.vocab - config.n_action_bins + 1  # ids from here on stand for one bin each
        space = model.action_space
        weights = torch.ones(space.dim)
        weights[list(space.rotation)] = rotation_weight
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("continuous", torch.tensor([d in space.continuous for d in range(space.dim)]), persistent=False)

    # ---------------------------------------------------------------------------------------------------- inputs

    def tokens(self, batch: FrameBatch) -> tuple[Questions, Tensor]:
        """Prompts and answers of a batch, and the action tokens (B, Q, D); where none is to be learnt, some."""
        model = self.network.model
        labels = batch.labels.nan_to_num().cpu().numpy()
        turns = labels[..., model.action_space.rotation]
        labels[..., model.action_space.rotation] = np.sign(turns) * np.maximum(np.abs(turns) - self.rotation_slack, 0)
        actions = torch.from_numpy(model.action_tokens(labels)).to(batch.images.device)  # (B, Q, D)
        actions = actions.clamp(min=self.first_bin)  # +1 itself has an id of its own, which means the last bin as well
        return Questions.of([model.tokenize(text) for text in batch.instructions], actions), actions

    # ------------------------------------------------------------------------------------------------------ loss

    def losses(
        self, network: nn.Module, batch: FrameBatch, look: float = 1.0, share: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss terms, and what metrics need: scores, heat, pointer, targets.

        Args:
            network: the model in training, or the average.
            batch: frames.
            look: share of the patches that the encoders see.
            share: share of those that reach the decoder.
        """
        asked, actions = self.tokens(batch)
        model = self.network.model
        weights = contents(batch.images, model.config.grid)  # (B, N)
        patches = None if look >= 1 else draw(weights, look)
        keep = draw(weights if patches is None else weights.gather(1, patches), share)
        plain = PlainAttention() if self.device.type == "cpu" else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), plain:
            scores, heat, pointer, names, reach = network(pixels(model, batch.images), asked, keep, patches)
        target, seen = soft_targets(batch.points, model.config.grid, self.patch)  # (B, 2 + Q, N), (B, 2 + Q)
        if patches is not None:
            target = target.gather(2, patches[:, None].expand(-1, target.shape[1], -1))
        taught = batch.labels.isfinite().all(-1)  # (B, Q)
        bins, dims = (self.first_bin, model.action_tokenizer.vocab), (self.continuous, self.weights)
        terms = {
            "action": action_loss(scores[taught], actions[taught], *bins, *dims, self.smoothing, self.mean_weight),
            "reach": reach_loss(reach, batch.positions),
            "heat": heat_loss(heat, pointer, names, target, seen, keep),
        }
        return terms, {"scores": scores.detach(), "heat": heat.detach(), "pointer": pointer.detach(), "actions": actions}

    # -------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:
        chance, look, share = torch.rand(3).tolist()
        look = 1.0 if chance < self.look_all else self.look[0] + (self.look[1] - self.look[0]) * look
        share = self.keep[0] + (self.keep[1] - self.keep[0]) * share
        terms, _ = self.losses(self.network, batch, look, share)
        loss = terms["action"] + self.heat_weight * terms["heat"] + self.reach_weight * terms["reach"]
        self.log_dict({f"train/{k}": v for k, v in terms.items()}, prog_bar=True, batch_size=len(batch.images))
        return loss

    def write(self, folder: Path) -> None:
        """The averaged model, in OpenVLA's checkpoint form."""
        model = self.average.module.model
        assert isinstance(model, OpenVLAModel)
        save_pretrained(model, folder)

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:
        terms, seen = self.losses(self.average.module, batch)
        space = self.network.model.action_space
        off = (seen["scores"].argmax(-1) - seen["actions"]).abs()  # (B, Q, D) bins
        values = {f"val/{k}": v for k, v in terms.items()}
        for name, dims in {"translation": space.translation, "gripper": space.gripper}.items():
            if dims:
                own = off[:, 0, list(dims)].float()  # of the frame's own instruction
                values[f"val/{name}_right"] = (own <= 4).float().mean()  # within 0.03 of the teacher's
                values[f"val/{name}_error"] = own.mean() * 2 / self.network.model.config.n_action_bins
        grid = self.network.model.config.grid
        heat = torch.cat([seen["heat"], seen["pointer"]], 1).float()  # (B, 2 + Q, N)
        error = (expected_points(heat, grid, self.patch) - batch.points).norm(dim=-1)  # (B, 2 + Q)
        for k, name in enumerate(POINTS):
            values[f"val/{name}_pixels"] = error[:, k].nanmedian()
        best = heat.argmax(-1)[..., None]  # (B, 2 + Q, 1)
        best = torch.cat([best % grid, best // grid], -1) * self.patch + (self.patch - 1) / 2  # column and row, pixels
        found = ((best - batch.points).abs().amax(-1) < 1.5 * self.patch)[:, 2:]  # (B, Q): that patch or one beside it
        known = batch.points[:, 2:].isfinite().all(-1)
        values["val/item_found"] = mean_where(found[:, :1], known[:, :1])
        if known[:, 1:].any():  # what else could have been asked for
            taught = batch.labels[:, 1:].isfinite().all(-1)
            others = off[:, 1:, list(space.translation)].float().mean(-1)
            self.log("val/other_found", mean_where(found[:, 1:], known[:, 1:]), batch_size=int(known[:, 1:].sum()))
            if taught.any():
                error = mean_where(others, taught) * 2 / self.network.model.config.n_action_bins
                self.log("val/other_translation_error", error, batch_size=int(taught.sum()))
        self.log_dict(values, batch_size=len(batch.images))
