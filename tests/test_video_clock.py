"""Each step of an episode sees the frame of its own time, or the episode is refused: at any rates, offsets, drifts and gaps."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.lerobot.clock import StepFrames, find_frames
from data.lerobot.layout import EpisodeRows
from data.lerobot.pictures import EpisodeVideo
from data.parts import Problem
from data.video import VideoFrames, frame_clock
from spvla.errors import InputError

TICKS = 90000


def write_video(path: Path, seconds: np.ndarray, b_frames: int = 0, codec: str = "libx264") -> None:
    """Frame k, shown at ``seconds[k]``, has the bits of k as black and white columns."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 128, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        stream.options = {"crf": "10", "bf": str(b_frames), "g": "7", "preset": "ultrafast" if not b_frames else "medium"}
        for k, at in enumerate(seconds):
            bits = np.array([255 * (k >> j & 1) for j in range(8)], np.uint8)
            picture = np.broadcast_to(np.repeat(bits, 16)[None, :, None], (16, 128, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(float(at) * TICKS), Fraction(1, TICKS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def number(image: np.ndarray) -> int:
    columns = image.astype(float).mean((0, 2)).reshape(8, 16).mean(1)
    return int(sum(int(c > 127) << j for j, c in enumerate(columns)))


def ask(path: Path, times: np.ndarray | None, start=0.0, end=np.inf, following=np.inf, steps=None) -> StepFrames | Problem:
    """The frames of an episode that ``meta/`` places so."""
    row = EpisodeRows(3, path, 0, len(times) if steps is None else steps)
    pictures = SimpleNamespace(video=lambda *_: EpisodeVideo(path, "top", start, end, following, None))
    table = pa.table({"timestamp": times}) if times is not None else pa.table({"x": np.zeros(row.length)})
    return find_frames(pictures, row, table, "top")


@settings(max_examples=25, deadline=None)
@given(
    camera=st.sampled_from([5.0, 10.0, 14.985, 30.0]),
    robot=st.sampled_from([5.0, 10.0, 20.0]),
    first=st.sampled_from([0.0, 0.02, 0.7]),
    start=st.floats(0, 2),
    drift=st.floats(-0.01, 0.01),
    gap=st.sampled_from([0.0, 0.04, 0.5]),
    jitter=st.floats(0, 0.3),
)
def test_a_steps_frame_is_within_half_a_frame_or_the_episode_is_refused(camera, robot, first, start, drift, gap, jitter):
    shown = first + np.arange(100) / camera + np.random.default_rng(0).uniform(0, jitter / camera, 100)
    shown[50:] += gap
    times = np.arange(15) / robot * (1 + drift)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.mp4"
        write_video(path, shown)
        found = ask(path, times, start)
        distance = np.abs(shown[:, None] - (start + times))
        if isinstance(found, Problem):
            assert (distance.min(0) > 0.3 / camera).any()  # only what is far off is refused
            return
        seen = np.array([number(image) for image in VideoFrames(path, found.numbers)])
        np.testing.assert_allclose(distance[seen, np.arange(15)], distance.min(0), atol=2e-3)  # containers round times
        assert (distance.min(0) <= 0.75 / camera).all()


@pytest.mark.parametrize("b_frames", [0, 3])
def test_frames_in_any_order_are_those_of_their_time(tmp_path, b_frames):
    write_video(tmp_path / "x.mp4", 0.4 + np.arange(60) / 10, b_frames)
    clock = frame_clock(tmp_path / "x.mp4")
    np.testing.assert_allclose(clock.seconds - clock.seconds[0], np.arange(60) / 10, atol=1e-4)
    order = np.array([0, 0, 5, 6, 59, 3, 31, 30, 30, 33])
    assert [number(image) for image in VideoFrames(tmp_path / "x.mp4", order)] == order.tolist()


def test_what_lies_beyond_the_video_or_in_another_episode_is_refused(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, np.arange(40) / 10)
    times = np.arange(10) / 10
    assert ask(path, times, 2.0, 3.0, 3.0).numbers.tolist() == list(range(20, 30))
    for wrong in (
        ask(path, times, 3.5),  # beyond the end
        ask(path, times, -0.5),
        ask(path, times, 2.0, following=2.5),  # the next one's frames
        ask(path, times, 2.0, end=2.4),  # to_timestamp says otherwise
        ask(path, times, 2.0, following=2.0),
    ):
        assert isinstance(wrong, Problem) and wrong.record == 3 and wrong.field == "top"


def test_without_times_frames_are_counted_only_if_there_is_one_per_step(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, np.arange(40) / 10)
    assert ask(path, None, 1.0, following=3.0, steps=20).numbers.tolist() == list(range(10, 30))
    assert isinstance(ask(path, None, 1.0, following=3.0, steps=19), Problem)


def test_a_numbered_video_goes_with_a_clock_that_wavers_but_not_with_one_that_is_shifted(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, np.arange(40) / 10)
    wavering = np.cumsum(np.tile([0.09, 0.1, 0.1, 0.14], 10)) - 0.09
    found = ask(path, wavering)
    assert found.counted and found.numbers.tolist() == list(range(40))
    assert isinstance(ask(path, wavering[:39]), Problem)
    assert isinstance(ask(path, np.arange(40) / 10 + 0.3), Problem)
    assert isinstance(ask(path, np.arange(40) / 8), Problem)


def test_a_file_that_is_no_video_says_so(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"none")
    with pytest.raises(InputError) as error:
        frame_clock(tmp_path / "x.mp4")
    assert error.value.code == "unreadable-video"
