"""LeRobot folders of every version: what they hold, where their metadata lies, and what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.lerobot import LerobotSource, VideoFrames
from data.sources import Problem
from spvla.episodes import read_episodes
from spvla.errors import InputError

REACHY = Path(__file__).parents[1] / "configs" / "openx" / "lerobot_reachy2.yaml"


@pytest.fixture
def cr5(shared) -> Path:
    return shared / "lerobot_cr5_banana"


@pytest.fixture
def apple(shared) -> Path:
    return shared / "lerobot_v3_apple_storage"


def outcomes(source: LerobotSource, images: bool = False) -> list:
    return [e for part in source.parts for e in source.episodes(part, images)]


def write_video(path: Path, frames: int, rate: int = 10) -> None:
    """Frame k is grey level 8 k."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "5", "crf": "1"}
        for k in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * k, np.uint8), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_cr5_is_what_its_parquet_files_hold(cr5):
    source = LerobotSource(cr5)
    episodes = outcomes(source)
    assert len(episodes) == 81 and sum(map(len, episodes)) == 18039
    for k in (0, 40, 80):
        table = pq.read_table(cr5 / "data" / "chunk-000" / f"episode_{k:06d}.parquet")
        np.testing.assert_array_equal(episodes[k].actions, np.array(table["action"].to_pylist(), np.float32))
        np.testing.assert_array_equal(episodes[k].states, np.array(table["observation.state"].to_pylist(), np.float32))
        np.testing.assert_array_equal(episodes[k].timestamps.astype(np.float32), table["timestamp"].to_numpy())
    space = source.space
    assert (space.kind, space.control_rate, space.gripper, space.translation) == ("joint_velocity", 10, (6,), ())
    assert space.binary_gripper and episodes[0].instruction == "put the banana on the plate"
    told = "\n".join(source.notes)
    assert "0.352 s" in told and "78 of 81 videos" in told and "no conventions given" in told


def test_missing_videos_are_problems_only_where_images_are_wanted(cr5):
    found = outcomes(LerobotSource(cr5), images=True)
    bad = [e for e in found if isinstance(e, Problem)]
    assert len(bad) == 78 and bad[0].record == 3 and "video is not there" in bad[0].reason
    frames = found[1].images["top"]
    assert len(frames) == len(found[1]) == 215
    first = frames[0]
    assert first.shape == (480, 640, 3) and first.std() > 10
    np.testing.assert_array_equal(frames[0], first)


def test_video_frames_in_any_order(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, 30)
    frames = VideoFrames(path, 3, 20)

    def level(image: np.ndarray) -> float:
        return float(image.mean())

    in_order = [level(f) for f in frames]
    np.testing.assert_allclose(in_order, 8 * np.arange(3, 23), atol=3)
    for k in (19, 0, 7, 8, 2):
        assert level(frames[k]) == in_order[k]
    assert [level(f) for f in frames[5:8]] == in_order[5:8]
    with pytest.raises(IndexError):
        frames[20]
    with pytest.raises(InputError, match="ends before frame 30"):
        list(VideoFrames(path, 25, 10))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="not a readable video"):
        VideoFrames(tmp_path / "bad.mp4", 0, 1)[0]


def test_lying_metadata_is_told_and_the_data_wins(apple):
    with pytest.raises(InputError, match="which does not tell what they are"):
        LerobotSource(apple)
    source = LerobotSource(apple, REACHY)
    episodes = outcomes(source)
    assert [len(e) for e in episodes] == [299, 300, 300] and source.space.dim == 19
    assert source.space.gripper == (7, 15) and source.space.kind == "joint_position"
    told = "\n".join(source.notes)
    assert "total_frames claims 14983, the data holds 899" in told and "claims 0:50, there are 3 episodes" in told
    assert episodes[0].instruction == "place the apple in the plate"
    with pytest.raises(InputError, match=r"no camera 'observation\.images\.top'; there are: observation\.image"):
        LerobotSource(apple, REACHY, "observation.images.top")


def test_episode_rows_follow_the_data_not_the_metadata(apple, tmp_path):
    folder = shutil.copytree(apple, tmp_path / "apple")
    path = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    lengths = table["length"].to_pylist()
    table = table.set_column(table.column_names.index("length"), "length", pa.array([lengths[0] - 9, *lengths[1:]]))
    pq.write_table(table, path)
    source = LerobotSource(folder, REACHY)
    assert [len(e) for e in outcomes(source)] == [299, 300, 300]
    assert any("episode 0 has 299 steps, meta/episodes claims 290" in note for note in source.notes)


def test_damaged_files_are_named(cr5, tmp_path):
    folder = shutil.copytree(cr5, tmp_path / "cr5", ignore=shutil.ignore_patterns("videos"))
    file = folder / "data" / "chunk-000" / "episode_000002.parquet"
    file.write_bytes(file.read_bytes()[:3000])
    (folder / "data" / "chunk-000" / "episode_000003.parquet").unlink()
    table = pq.read_table(folder / "data" / "chunk-000" / "episode_000004.parquet")
    pq.write_table(table.drop_columns(["observation.state"]), folder / "data" / "chunk-000" / "episode_000004.parquet")
    path = folder / "data" / "chunk-000" / "episode_000005.parquet"
    table = pq.read_table(path)
    values = np.array(table["action"].to_pylist(), np.float32)
    values[17, 2] = np.nan
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", fixed), path)
    source = LerobotSource(folder)
    found = outcomes(source)
    bad = {e.record: e for e in found if isinstance(e, Problem)}
    assert sorted(bad) == [2, 4, 5] and len(found) == 80
    assert "damaged Parquet" in bad[2].reason and bad[4].field == "observation.state"
    assert "NaN or infinity at step 17" in bad[5].reason and bad[5].field == "action"
    assert any("episode_000003.parquet: is not there" in note for note in source.notes)
    assert any("total_episodes claims 81, the data holds 80" in note for note in source.notes)
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(InputError, match=r"info\.json: not readable JSON"):
        LerobotSource(folder)
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v1.6"}))
    with pytest.raises(InputError, match=r"codebase_version v1\.6 is not one of"):
        LerobotSource(folder)
    with pytest.raises(InputError, match="is this a LeRobot data set"):
        LerobotSource(tmp_path)


def test_a_rollout_store_is_a_source(store_folder):
    source = LerobotSource(store_folder)
    again = outcomes(source)
    for mine, theirs in zip(again, read_episodes(store_folder), strict=True):
        for name in ("actions", "states", "vla_actions", "sources"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        assert mine.metadata == theirs.metadata and mine.success == theirs.success
    assert source.space.name == "libero"
