"""The frames of a data set, decoded, in batches for a VLA; a worker process can make them ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.derive import Setting, record_of
from data.images import ImageCheck, encode_images, is_upside_down, read_rgb
from data.parts import Part, Problem
from spvla.errors import InputError
from spvla.store import Episode


@dataclass(frozen=True)
class Frames:
    """Decoded frames for one call of the VLA.

    Args:
        images: uint8 (B, H, W, 3).
        states: float32 (B, S), or None.
        instructions: one per frame.
        episodes: which episode of the part each frame is of, (B,).
    """

    images: torch.Tensor
    states: torch.Tensor | None
    instructions: list[str]
    episodes: list[int]


@dataclass(frozen=True)
class End:
    """A part has been read: its good episodes by their number in :class:`Frames`, and the problems of the others."""

    part: Part
    episodes: dict[int, Episode]
    problems: list[Problem]


class FrameStream(torch.utils.data.IterableDataset[Any]):
    """The frames of parts, decoded, in batches; after each part its :class:`End`.

    Args:
        setting: the data set.
        parts: which parts of it.
        batch_size: frames per batch (B).
    """

    def __init__(self, setting: Setting, parts: Sequence[Part], batch_size: int) -> None:
        self.setting, self.parts, self.batch_size = setting, list(parts), batch_size

    def __iter__(self) -> Iterator[Frames | End]:
        torch.set_num_threads(1)
        source = self.setting.open()
        for part in self.parts:
            yield from self._part(source, part)

    def _part(self, source: Any, part: Part) -> Iterator[Frames | End]:
        episodes: dict[int, Episode] = {}
        problems: list[Problem] = []
        waiting: list[tuple[NDArray[np.uint8], Any, str, int]] = []
        for number, found in enumerate(self.setting.read(source, part, images=True)):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            (images,) = found.images.values()
            check = ImageCheck(source.image_shape)
            reason = None if found.instruction.strip() else "has no instruction: a VLA cannot be asked"
            for t in range(len(found)) if reason is None else ():
                image = None
                try:
                    image = images[t]
                    frame = read_rgb(image) if isinstance(image, bytes) else image
                except InputError as error:
                    reason = f"the image of step {t} {error}" if isinstance(image, bytes) else str(error)
                    break
                reason = check.add(frame)
                if reason is not None:
                    break
                frame = frame[::-1, ::-1] if is_upside_down(found.metadata) else frame
                if waiting and (len(waiting) == self.batch_size or waiting[0][0].shape != frame.shape):
                    yield _batch(waiting)
                    waiting = []
                state = None if found.states is None else found.states[t]
                waiting.append((frame, state, found.instruction, number))
            reason = reason or check.end()
            if reason is None and self.setting.images:
                reason = encode_images(found, source.image_shape)
            if reason is None:
                found.images = found.images if self.setting.images else {}
                episodes[number] = found
            else:
                problems.append(Problem(part.file, reason, record_of(found), source.camera))
        if waiting:
            yield _batch(waiting)
        yield End(part, episodes, problems)


def _batch(frames: list[tuple[NDArray[np.uint8], Any, str, int]]) -> Frames:
    images, states, instructions, episodes = zip(*frames, strict=True)
    stacked = None if states[0] is None else torch.from_numpy(np.stack(states))
    return Frames(torch.from_numpy(np.stack(images)), stacked, list(instructions), list(episodes))


def without_traceback(items: Iterable[Frames | End]) -> Iterator[Frames | End]:
    """The same items; an :class:`InputError` from their worker process comes without its traceback."""
    try:
        yield from items
    except InputError as error:
        raise InputError(str(error).strip().rpartition(f"{InputError.__name__}: ")[2]) from None
