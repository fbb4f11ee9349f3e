"""Frames of a video file, decoded with PyAV when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError


class VideoFrames(Sequence[NDArray[np.uint8]]):
    """Frames of a video file, decoded when they are asked for.

    Args:
        path: the video.
        first: frame of the file that is number 0 here.
        length: how many frames.

    Frames are uint8 (H, W, 3) RGB. Reading in order decodes each frame once.
    """

    def __init__(self, path: Path, first: int, length: int) -> None:
        self.path, self.first, self.length = path, first, length
        self._frames: Iterator[Any] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> VideoFrames: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | VideoFrames:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step != 1:
                raise ValueError("video frames are read in order")
            return VideoFrames(self.path, self.first + start, max(0, stop - start))
        if not 0 <= index < self.length:
            raise IndexError(index)
        frame = self.first + index
        if frame != self._next:
            self._frames, self._next = self._seek(frame), frame
        try:
            image = next(self._frames)
        except StopIteration:
            raise InputError(f"{self.path}: ends before frame {frame}") from None
        self._next += 1
        return np.asarray(image.to_ndarray(format="rgb24"))

    def _seek(self, frame: int) -> Iterator[Any]:
        import av

        try:
            container = av.open(str(self.path))
            stream: Any = next(iter(container.streams.video), None)
            if stream is None or not stream.average_rate:
                raise InputError(f"{self.path}: not a readable video (it has no picture track of a known rate)")
            ticks = 1 / stream.average_rate / stream.time_base  # per frame
            start = stream.start_time or 0
            if frame:
                container.seek(start + int(frame * ticks), stream=stream)
            for image in container.decode(stream):
                if round(((image.pts or 0) - start) / ticks) >= frame:
                    yield image
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: not a readable video ({error})") from None


def count_frames(path: Path) -> int | None:
    """How many frames a video says it has; None where it does not say, or cannot be read."""
    import av

    try:
        with av.open(str(path)) as container:
            stream: Any = next(iter(container.streams.video), None)
            return int(stream.frames) or None if stream is not None else None
    except (av.FFmpegError, OSError):
        return None
