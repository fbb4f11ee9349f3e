"""Lightning data for training a VLA: shuffled batches of recorded frames, as the model's encoders will see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.frames import Frame, Frames, Question
from spvla.cli import PositiveInt
from spvla.errors import InputError
from spvla.vlas.conventions import Conventions, conventions_by_name

REQUEST = re.compile(
    r"(?:pick up|pick|grab|lift|take) (?:the )?(.+?) and (?:place|put|set) (?:it )?(in|into|on|onto) (?:the )?(.+)"
)
VERBS, PLACINGS = ("pick up", "pick", "grab", "lift", "take"), ("place", "put", "set")
PREPOSITIONS = {"in": ("in", "into"), "into": ("in", "into"), "on": ("on", "onto"), "onto": ("on", "onto")}


@dataclass(frozen=True)
class FrameBatch:
    """B frames with Q instructions each.

    Args:
        images: what the encoders see before normalisation, uint8 (B, S, S, 3).
        instructions: B x Q texts, a frame's own first.
        labels: the teacher's actions for each, environment units, float32 (B, Q, D); NaN: none to be learnt.
        points: where hand, place and each instruction's object are, column and row in pixels of ``images``, float32
            (B, 2 + Q, 2), or NaN. With one instruction they are :data:`data.frames.POINTS`.
        positions: the same in the world, metres, float32 (B, 2 + Q, 3).
        ahead: the teacher's actions from each frame on, (B, T, D); NaN from the episode's end on.
        states: the robot's, as recorded, float32 (B, S); NaN: not recorded.
    """

    images: Tensor
    instructions: list[str]
    labels: Tensor
    points: Tensor
    positions: Tensor
    ahead: Tensor
    states: Tensor

    def to(self, device: torch.device) -> FrameBatch:
        """The same on ``device``."""
        arrays = (x.to(device) for x in (self.labels, self.points, self.positions, self.ahead, self.states))
        return FrameBatch(self.images.to(device), self.instructions, *arrays)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training image.

    Args:
        shift: largest shift along each axis, pixels of the recorded image.
        brightness: largest change of brightness, in units of the full range.
        contrast: largest change of contrast, as a factor less one.
        tint: the same for each colour channel alone.
    """

    shift: float = 5.0
    brightness: float = 0.12
    contrast: float = 0.2
    tint: float = 0.06


def view(
    image: NDArray[np.uint8],
    points: NDArray[np.float32],
    conventions: Conventions,
    size: int,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """What an encoder of ``size`` pixels sees of an image, uint8 (S, S, 3), and where points of it are then, (P, 2).

    Without augmentation this is what :meth:`Conventions.apply_image` does, in one interpolation in place of two; images that
    are not square, or much larger, are brought to that size first.
    """
    if image.shape[0] != image.shape[1] or image.shape[0] > 1.5 * size:
        factor = np.array([size / image.shape[1], size / image.shape[0]], np.float32)
        points = (points + 0.5) * factor - 0.5
        image = np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
    height = image.shape[0]
    if conventions.rotate_180:
        image, points = np.ascontiguousarray(image[::-1, ::-1]), height - 1 - points
    side = np.sqrt(conventions.center_crop)
    scale = side * height / size
    # Pixel i of the view samples the resized image at (1 - side) / 2 (S - 1) + side i, the recorded one at scale i + offset.
    offset = np.full(2, ((1 - side) / 2 * (size - 1) + 0.5) * height / size - 0.5)
    if augmentation is not None:
        offset += rng.uniform(-augmentation.shift, augmentation.shift, 2)
    affine = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(image, affine, (size, size), flags=how, borderMode=cv2.BORDER_REPLICATE)
    if augmentation is not None:
        a = augmentation
        gain = (1 + rng.uniform(-a.contrast, a.contrast)) * (1 + rng.uniform(-a.tint, a.tint, 3))
        levels = (np.arange(256)[:, None] - 128) * gain + 128 + 255 * rng.uniform(-a.brightness, a.brightness)
        seen = cv2.LUT(seen, np.clip(levels, 0, 255).astype(np.uint8)[None])
    return np.asarray(seen, np.uint8), ((points - offset) / scale).astype(np.float32)


def questions(frame: Frame, count: int, rng: np.random.Generator) -> list[Question]:
    """The frame's own instruction, and others drawn without replacement; too few are filled up with ones to be ignored."""
    own = Question(frame.instruction, frame.label, frame.points[2], frame.positions[2])
    drawn = rng.permutation(len(frame.others))[: count - 1]
    nothing = (np.full_like(values, np.nan) for values in (own.label, own.item, own.position))
    ignored = Question(frame.instruction, *nothing)
    return [own, *(frame.others[i] for i in drawn), *[ignored] * (count - 1 - len(drawn))]


def reword(instruction: str, rng: np.random.Generator) -> str:
    """A pick-and-place instruction in other words, such as "grab milk and put it into the basket"; any other as it is."""
    match = REQUEST.fullmatch(instruction.lower())
    if match is None:
        return instruction
    item, preposition, place = match.groups()

    def one(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    words = [one(VERBS), one(("the", "")), item, "and", one(PLACINGS), one(("it", "it", ""))]
    return " ".join(filter(None, [*words, one(PREPOSITIONS[preposition]), one(("the", "")), place]))


class FrameStream(IterableDataset[FrameBatch]):
    """A given number of random batches, a student's mistakes more often; each pass first looks for new shards."""

    def __init__(self, data: FrameData, frames: Frames, batches: int, augmentation: Augmentation | None) -> None:
        self.data, self.frames, self.batches, self.augmentation = data, frames, batches, augmentation

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[FrameBatch]:
        if self.augmentation is None:
            rng = np.random.default_rng(self.data.seed)  # the same frames every time
        else:
            rng = np.random.default_rng([self.data.seed, self.data.passes(), self.data.rank()])
            self.frames.scan()
        weights = self.frames.weights()
        for chosen in rng.choice(len(weights), (self.batches, self.data.batch_size), p=weights / weights.sum()):
            yield self.batch([self.frames[int(i)] for i in chosen], rng)

    def batch(self, frames: list[Frame], rng: np.random.Generator) -> FrameBatch:
        """The batch of these frames."""
        data = self.data
        asked = [questions(f, data.questions, rng) for f in frames]  # B x Q
        points = [np.concatenate([f.points[:2], [q.item for q in a]]) for f, a in zip(frames, asked, strict=True)]
        size, augmentation = data.image_size, self.augmentation
        texts = [q.instruction for a in asked for q in a]
        if augmentation is not None and data.rewording:
            texts = [reword(text, rng) if rng.random() < data.rewording else text for text in texts]
        views = [view(f.image, p, data.conventions, size, augmentation, rng) for f, p in zip(frames, points, strict=True)]
        return FrameBatch(
            torch.from_numpy(np.stack([image for image, _ in views])),
            texts,
            torch.from_numpy(np.stack([[q.label for q in a] for a in asked])),
            torch.from_numpy(np.stack([p for _, p in views])),
            torch.from_numpy(
                np.stack(
                    [np.concatenate([f.positions[:2], [q.position for q in a]]) for f, a in zip(frames, asked, strict=True)]
                )
            ),
            torch.from_numpy(np.stack([f.ahead for f in frames])),
            torch.from_numpy(np.stack([f.state for f in frames])),
        )


class FrameData(L.LightningDataModule):
    """Frames for :class:`train.vla.module.VLAModule` and :class:`train.recover.RecoverModule`.

    Args:
        data: rollout stores with images; they may grow during training, and need not be finalised.
        batch_size: frames per optimiser step.
        batches: optimiser steps per epoch; new shards are picked up at its beginning, validation follows its end.
        validation_batches: batches of validation frames, always the same: demonstrations that their simulator assigns to
            calibration (and without labels one in ten of the episodes that none assigns).
        image_size: side of the encoders' input in pixels.
        conventions: what lies between the environment's images and the model's: a name, fields of
            :class:`spvla.vlas.conventions.Conventions`, or None for nothing.
        augmentation: random changes of training images.
        questions: instructions per frame (Q): its own, and with more than one also those for other objects of its
            scene, with what the expert would do then; the image is encoded once for all. Needs LIBERO's scenes.
        labelled, camera, chunk: see :class:`data.frames.Frames`.
        rewording: fraction of the training instructions that are put in other words, see :func:`reword`.
        seed: of the order and the augmentation.
    """

    def __init__(
        self,
        data: list[Path],
        batch_size: PositiveInt = 32,
        batches: PositiveInt = 200,
        validation_batches: PositiveInt = 8,
        image_size: PositiveInt = 224,
        conventions: str | dict[str, Any] | None = "libero",
        augmentation: Augmentation = Augmentation(),
        questions: PositiveInt = 1,
        labelled: bool = True,
        camera: str | None = None,
        rewording: float = 0.0,
        chunk: PositiveInt = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rewording = rewording
        self.batch_size, self.batches, self.validation_batches = batch_size, batches, validation_batches
        self.image_size, self.conventions = image_size, conventions_by_name(conventions)
        self.augmentation, self.questions, self.seed = augmentation, questions, seed
        self.train_frames, self.validation_frames = (
            Frames(data, validation, questions > 1, labelled, camera, chunk) for validation in (False, True)
        )

    def passes(self) -> int:
        """Epochs so far, resumed ones included."""
        return 0 if self.trainer is None else int(self.trainer.current_epoch)

    def rank(self) -> int:
        """Which of the trainer's processes this is; each draws frames of its own."""
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    def setup(self, stage: str) -> None:
        """Read what there is. Raises :class:`InputError` if a part is empty."""
        for frames, what in ((self.train_frames, "training"), (self.validation_frames, "validation")):
            frames.scan()
            if not len(frames):
                folders = ", ".join(map(str, frames.folders))
                told = "of LIBERO initial states 0-19 are for training and 20-29 for validation"
                raise InputError(f"{folders}: no frames for {what}; collect some with --images true ({told})")

    def train_dataloader(self) -> DataLoader[FrameBatch]:
        stream = FrameStream(self, self.train_frames, self.batches, self.augmentation)
        return DataLoader(stream, batch_size=None)

    def val_dataloader(self) -> DataLoader[FrameBatch]:
        stream = FrameStream(self, self.validation_frames, self.validation_batches, None)
        return DataLoader(stream, batch_size=None)
