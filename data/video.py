"""Frames of a video file by their presentation times, decoded with PyAV when they are asked for.

A frame is found by its own time alone. Numbers and average rates mislead wherever a video was joined from pieces, its camera
has another rate than the robot, or frames were dropped. The times come from the packets, without decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from spvla.errors import InputError

NEIGHBOURS = 9  # spacings whose median is the local one
DROPPED = 1.5  # times the local spacing: in a longer gap, frames are missing
ROUNDING = 0.02  # of the spacing: times are stored as float32 and in ticks


@dataclass(frozen=True, eq=False)
class FrameClock:
    """When each frame of a video is shown, in the order of presentation.

    Args:
        pts: presentation times (F,), ticks.
        seconds: the same in seconds (F,).
        keys: numbers of the frames at which decoding can begin, ascending.
    """

    pts: NDArray[np.int64]
    seconds: NDArray[np.float64]
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pts)

    def nearest(self, times: NDArray[np.float64], first: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """Numbers (T,) of the frames nearest to ``times`` (T,), seconds, among frames ``first`` to ``end`` - 1."""
        middles = (self.seconds[1:] + self.seconds[:-1]) / 2
        last = (len(self) if end is None else end) - 1
        return np.clip(np.searchsorted(middles, times), first, last).astype(np.int64)

    def half_frames(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far (T,), seconds, a frame may be from each of ``times`` (T,): half the spacing of the frames there.

        In a gap, where frames are missing, and beyond the ends, it is half the spacing that the frames around have.
        """
        gaps = np.diff(self.seconds)
        if not len(gaps):
            return np.full(len(times), np.inf)
        width = min(NEIGHBOURS, len(gaps) - 1 + len(gaps) % 2)  # odd
        padded = np.pad(gaps, width // 2, mode="edge")
        local = np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1)
        after = np.searchsorted(self.seconds, times, side="right")  # first frame later than the time
        gap = np.clip(after - 1, 0, len(gaps) - 1)
        inside = (after > 0) & (after < len(self)) & (gaps[gap] < DROPPED * local[gap])
        return np.asarray(np.where(inside, gaps[gap], local[gap]) * (0.5 + ROUNDING))

    def evenly_spaced(self, first: int, end: int) -> bool:
        """Whether frames ``first`` to ``end`` - 1 follow each other at one rate, as a counter would number them."""
        gaps = np.diff(self.seconds[first:end])
        return not len(gaps) or float(np.ptp(gaps)) <= ROUNDING * float(np.median(gaps))


def frame_clock(path: Path) -> FrameClock:
    """The presentation times of a video's frames; those of the last files are kept.

    Raises:
        InputError: not a readable video, or one without presentation times.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise _unreadable(path, str(error)) from None
    return _read_clock(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=32)
def _read_clock(path: Path, _size: int, _changed: int) -> FrameClock:
    import av

    try:
        with av.open(str(path)) as container:
            stream = _picture_track(container, path)
            tick = float(stream.time_base)  # not to be read once the file is closed
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, str(error)) from None
    if not packets or any(pts is None for pts, _ in packets):
        raise _unreadable(path, "its frames have no presentation times" if packets else "it has no frames")
    pts, first = np.unique(np.array([pts for pts, _ in packets], np.int64), return_index=True)
    keys = np.flatnonzero(np.array([key for _, key in packets])[first])
    return FrameClock(pts, np.asarray(pts * tick, np.float64), keys)


class VideoFrames(Sequence[NDArray[np.uint8]]):
    """Chosen frames of a video file, decoded when they are asked for.

    Args:
        path: the video.
        numbers: which frames (T,), counted in the order of presentation; one may occur several times.

    Frames are uint8 (H, W, 3) RGB. Reading in order decodes each frame once.
    """

    def __init__(self, path: Path, numbers: NDArray[np.int64]) -> None:
        self.path, self.numbers = path, numbers
        self._clock = frame_clock(path)
        self._images: Iterator[Any] = iter(())
        self._number = -1
        self._image: Any = None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> VideoFrames: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | VideoFrames:
        if isinstance(index, slice):
            return VideoFrames(self.path, self.numbers[index])
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(self.numbers[index])
        if self._image is None or number != self._number:
            self._image, self._number = self._decode(number), number
        return np.asarray(self._image.to_ndarray(format="rgb24"))

    def _decode(self, number: int) -> Any:
        import av

        wanted = int(self._clock.pts[number])
        try:
            for images in self._ways_to(number):
                self._images = images
                for image in images:
                    if image.pts is not None and image.pts >= wanted:
                        if image.pts == wanted:
                            return image
                        break
        except av.FFmpegError as error:
            raise _unreadable(self.path, str(error)) from None
        raise _unreadable(self.path, f"frame {number}, at {self._clock.seconds[number]:.3f} s, cannot be decoded")

    def _ways_to(self, number: int) -> Iterator[Iterator[Any]]:
        """Images among which frame ``number`` is: those after the last one, unless decoding can begin nearer to it."""
        keys = self._clock.keys[: np.searchsorted(self._clock.keys, number, side="right")]
        key = int(keys[-1]) if len(keys) else 0
        if self._image is not None and key <= self._number < number:
            yield self._images
        yield self._open(int(self._clock.pts[key]))
        yield self._open(None)  # some files cannot be entered at every key frame

    def _open(self, start: int | None) -> Iterator[Any]:
        """Images from the key frame at tick ``start`` on, or from the beginning."""
        import av

        with av.open(str(self.path)) as container:
            stream = _picture_track(container, self.path)
            if start is not None:
                container.seek(start, stream=stream)
            yield from container.decode(stream)


def _picture_track(container: Any, path: Path) -> Any:
    stream = next(iter(container.streams.video), None)
    if stream is None or not stream.time_base:
        raise _unreadable(path, "it has no picture track")
    return stream


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a readable video ({reason})", code="unreadable-video", field=str(path))
