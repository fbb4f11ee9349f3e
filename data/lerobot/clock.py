"""Which frame of a video each step of a LeRobot episode saw: the one whose own time is nearest to the step's.

The format says so: a step's frame is at ``from_timestamp`` + ``timestamp`` in a video of v3.0, at ``timestamp`` in one of v2.x.
An episode whose steps have no such frame is refused rather than given others.

Some writers put one frame per step into a video at a nominal rate, while they record the steps' times with a clock that
wavers. Such a video has no times of its own, only numbers; its frames are the steps', one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.lerobot.columns import recorded_times
from data.lerobot.layout import EpisodeRows
from data.lerobot.pictures import EpisodeVideo, Pictures
from data.parts import Problem
from data.video import FrameClock, frame_clock
from spvla.errors import InputError

WAVERS = 0.02  # of a step: clocks read while recording vary by more, times that a writer computed do not
NOMINAL = 0.1  # a video's nominal rate is that of the steps, up to so much


@dataclass(frozen=True, eq=False)
class StepFrames:
    """The frames of an episode.

    Args:
        path: the video.
        numbers: for each step (T,) its frame there.
        counted: whether they were counted, since the video has no times of its own or the steps have none.
    """

    path: Path
    numbers: NDArray[np.int64]
    counted: bool = False


def find_frames(pictures: Pictures, row: EpisodeRows, table: pa.Table, camera: str, unit: float = 1.0) -> StepFrames | Problem:
    """The frame of each step of an episode, or why there is none.

    Args:
        pictures: of the folder.
        row, table: the episode, and its rows.
        camera: a video feature.
        unit: seconds per unit of recorded times.
    """
    video = pictures.video(row, camera)
    if isinstance(video, Problem):
        return video
    try:
        clock = frame_clock(video.path)
    except InputError as error:
        return Problem(str(video.path), str(error).removeprefix(f"{video.path}: "), row.number, camera)
    first = int(clock.nearest(np.array([video.start]))[0])
    beyond = video.following > clock.seconds[-1] + clock.half_frames(clock.seconds[-1:])[0]
    end = len(clock) if beyond else int(clock.nearest(np.array([video.following]))[0])
    times = recorded_times(table, unit)
    counted = StepFrames(video.path, first + np.arange(row.length), counted=True)
    if times is None:
        if end - first == row.length:
            return counted
        reason = f"its steps have no usable timestamps, and its video has {end - first} frames for {row.length} steps"
        return Problem(str(row.file), reason, row.number, camera)
    wrong = _stray(video, clock, times, first, end) or _overlap(pictures, video, clock, unit)
    if wrong is None:
        return StepFrames(video.path, clock.nearest(video.start + times, first, end))
    if end - first == row.length and _is_numbered(video, clock, times, first, end):
        return counted
    return Problem(str(video.path), wrong, row.number, camera)


def _stray(video: EpisodeVideo, clock: FrameClock, times: NDArray[np.float64], first: int, end: int) -> str | None:
    """What is wrong if a step has no frame of its own time among the episode's frames ``first`` to ``end`` - 1, or None."""
    if end <= first:
        return f"the episode begins at {video.start:.3f} s, and the next one before its first frame"
    wanted = video.start + times
    off = np.abs(clock.seconds[clock.nearest(wanted, first, end)] - wanted)
    half = clock.half_frames(wanted)
    if (off > half).any():
        k = int((off > half).argmax())
        span = f"{clock.seconds[first]:.3f} to {clock.seconds[end - 1]:.3f} s"
        return (
            f"step {k} is at {wanted[k]:.3f} s of the video, {off[k]:.3f} s from the nearest frame of the episode; at most "
            f"half a frame, {half[k]:.3f} s, would be right (its frames lie at {span})"
        )
    if wanted[-1] > video.end + half[-1]:
        return (
            f"its last step is at {wanted[-1]:.3f} s of the video, to_timestamp says that the episode ends at {video.end:.3f} s"
        )
    return None


def _overlap(pictures: Pictures, video: EpisodeVideo, clock: FrameClock, unit: float) -> str | None:
    """What is wrong if the episode before in the same file is not over when this one begins, or None."""
    if video.before is None:
        return None
    before = pictures.video(video.before, video.camera)
    try:
        rows = pictures.layout.table(video.before, ["timestamp"]) if video.before.problem is None else None
        times = None if rows is None else recorded_times(rows, unit)
    except InputError:
        return None  # that is the other episode's problem
    if times is None or not len(times) or isinstance(before, Problem):
        return None
    last = before.start + float(times[-1])
    if last <= video.start + clock.half_frames(np.array([last]))[0]:
        return None
    return (
        f"the episode begins at {video.start:.3f} s of the video, but episode {video.before.number} of the same video lasts "
        f"until {last:.3f} s: one of them would be given the other's frames"
    )


def _is_numbered(video: EpisodeVideo, clock: FrameClock, times: NDArray[np.float64], first: int, end: int) -> bool:
    """Whether the episode's frames are numbered at a nominal rate rather than timed, while the steps' clock wavers."""
    if len(times) < 3 or not clock.evenly_spaced(first, end):
        return False
    spacing, steps = float(clock.seconds[first + 1] - clock.seconds[first]), np.diff(times)
    begins = abs(clock.seconds[first] - video.start) <= spacing / 2 and abs(times[0]) <= spacing
    wavers = float(np.ptp(steps)) > WAVERS * spacing
    return begins and wavers and abs(float(np.median(steps)) / spacing - 1) <= NOMINAL
