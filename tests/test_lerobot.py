"""LeRobot folders of every version: what they hold, where their metadata lies, and what is damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert import convert
from data.lerobot import LerobotSource
from data.parts import Problem
from data.video import VideoFrames
from spvla.errors import InputError
from spvla.store import read_episodes
from tests.conftest import APPLE, CR5

REACHY = Path(__file__).parents[1] / "configs" / "openx" / "lerobot_reachy2.yaml"


@pytest.fixture
def cr5() -> Path:
    return CR5


@pytest.fixture
def apple() -> Path:
    return APPLE


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
    assert len(episodes) == 34 and sum(map(len, episodes)) == 7445
    for k in (0, 17, 33):
        table = pq.read_table(cr5 / "data" / "chunk-000" / f"episode_{k:06d}.parquet")
        np.testing.assert_array_equal(episodes[k].actions, np.array(table["action"].to_pylist(), np.float32))
        np.testing.assert_array_equal(episodes[k].states, np.array(table["observation.state"].to_pylist(), np.float32))
        np.testing.assert_array_equal(episodes[k].timestamps.astype(np.float32), table["timestamp"].to_numpy())
    space = source.space
    assert (space.kind, space.control_rate, space.gripper, space.translation) == ("joint_velocity", 10, (6,), ())
    assert space.binary_gripper and episodes[0].instruction == "put the banana on the plate"
    told = "\n".join(source.notes)
    assert "0.274 s" in told and "33 of 34 videos" in told and "no conventions given" in told


def test_missing_videos_are_problems_only_where_images_are_wanted(cr5):
    found = outcomes(LerobotSource(cr5), images=True)
    bad = [e for e in found if isinstance(e, Problem)]
    assert len(bad) == 33 and bad[0].record == 1 and "video is not there" in bad[0].reason
    frames = found[0].images["top"]
    assert len(frames) == len(found[0]) == 12
    first = frames[0]
    assert first.shape == (480, 640, 3) and first.std() > 10
    np.testing.assert_array_equal(frames[0], first)


def test_video_frames_in_any_order(tmp_path):
    path = tmp_path / "x.mp4"
    write_video(path, 30)
    frames = VideoFrames(path, np.arange(3, 23))

    def level(image: np.ndarray) -> float:
        return float(image.mean())

    in_order = [level(f) for f in frames]
    np.testing.assert_allclose(in_order, 8 * np.arange(3, 23), atol=3)
    for k in (19, 0, 7, 8, 2):
        assert level(frames[k]) == in_order[k]
    assert [level(f) for f in frames[5:8]] == in_order[5:8]
    with pytest.raises(IndexError):
        frames[20]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="not a readable video"):
        VideoFrames(tmp_path / "bad.mp4", np.arange(1))


def test_lying_metadata_is_told_and_the_data_wins(apple):
    with pytest.raises(InputError, match="which does not tell what they are"):
        LerobotSource(apple)
    source = LerobotSource(apple, REACHY)
    episodes = outcomes(source)
    assert [len(e) for e in episodes] == [299, 300, 300] and source.space.dim == 19
    assert source.space.gripper == (7, 15) and source.space.kind == "joint_position"
    told = "\n".join(source.notes)
    assert "3 of 3 videos of observation.image are not there" in told
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
    assert sorted(bad) == [2, 4, 5] and len(found) == 33
    assert "damaged Parquet" in bad[2].reason and bad[4].field == "observation.state"
    assert "NaN or infinity at step 17" in bad[5].reason and bad[5].field == "action"
    assert any("episode_000003.parquet: is not there" in note for note in source.notes)
    assert any("total_episodes claims 34, the data holds 33" in note for note in source.notes)
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(InputError, match=r"info\.json: not valid JSON"):
        LerobotSource(folder)
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v1.6"}))
    with pytest.raises(InputError, match=r"codebase_version v1\.6 is not one of"):
        LerobotSource(folder)
    with pytest.raises(InputError, match="is this a LeRobot data set"):
        LerobotSource(tmp_path)


@pytest.fixture
def five(cr5, tmp_path) -> Path:
    """The first five episodes of CR5, to be damaged."""
    folder = tmp_path / "five"
    shutil.copytree(cr5 / "meta", folder / "meta")
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for k in range(5):
        shutil.copy(cr5 / "data" / "chunk-000" / f"episode_{k:06d}.parquet", folder / "data" / "chunk-000")
    lines = (folder / "meta" / "episodes.jsonl").read_text().splitlines()[:5]
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    claim(folder, total_episodes=5, total_frames=948, splits={"train": "0:5"})
    return folder


def claim(folder: Path, **values) -> None:
    """Change what meta/info.json says."""
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change(folder: Path, episode: int, column: str, values: pa.Array) -> None:
    path = folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)


def rows_of(folder: Path, episode: int, column: str) -> list:
    return pq.read_table(folder / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")[column].to_pylist()


@pytest.mark.parametrize("fps", [30, None, 0, "ten"])
def test_recorded_times_win_over_the_claimed_rate(five, fps):
    claim(five, fps=fps)
    source = LerobotSource(five)
    assert source.space.control_rate == 10
    assert any(f"fps claims {fps}, by the recorded times it is 10.1 Hz; 10 is taken" in note for note in source.notes)


def test_no_rate_at_all_is_refused(five):
    claim(five, fps=None)
    for k in range(5):
        change(five, k, "timestamp", pa.nulls(len(rows_of(five, k, "timestamp")), pa.float32()))
    with pytest.raises(InputError, match="fps is None, and no recorded times tell the control rate"):
        LerobotSource(five)
    claim(five, fps=10)
    source = LerobotSource(five)
    assert any("5 of the first 5 episodes have no usable timestamps" in note for note in source.notes)
    assert outcomes(source)[0].timestamps[10] == 1.0


def test_episodes_are_those_of_the_data_files(five):
    (five / "meta" / "episodes.jsonl").unlink()
    claim(five, data_path=None, chunks_size=None, codebase_version="v3.0")
    source = LerobotSource(five)
    found = outcomes(source)
    assert len(found) == 5 and found[4].instruction == "put the banana on the plate"  # from the task table
    told = "\n".join(source.notes)
    assert "codebase_version claims v3.0, the files are laid out as in v2.1" in told
    assert "meta/episodes.jsonl does not list episode 4; it is read all the same" in told


def test_odd_rows_are_named_and_the_rest_is_read(five):
    first = five / "data" / "chunk-000" / "episode_000000.parquet"
    first.write_bytes(first.read_bytes()[:2000])
    actions = rows_of(five, 1, "action")
    change(five, 1, "action", pa.array([None, *actions[1:]], pa.list_(pa.float32(), 7)))
    change(five, 2, "action", pa.array([[str(v) for v in row] for row in rows_of(five, 2, "action")]))
    frames = rows_of(five, 3, "frame_index")
    change(five, 3, "frame_index", pa.array([*frames[:50], *(k + 1 for k in frames[50:])]))
    states = np.array(rows_of(five, 4, "observation.state"), np.float32)
    states[7, 0] = 9
    change(five, 4, "observation.state", pa.array(states.tolist(), pa.list_(pa.float32(), 6)))
    source = LerobotSource(five)
    found = outcomes(source)
    told = [str(e) if isinstance(e, Problem) else "" for e in found]
    assert "record 0: damaged Parquet file" in told[0]
    assert "record 1, field action: contains NaN or infinity at step 0" in told[1]
    assert "record 2, field action: cannot be read (its values are string, not numbers)" in told[2]
    assert "record 3, field frame_index: row 50 is frame 51" in told[3]
    assert len(found[4]) == 237
    assert any("observation.state of episode 4 has other extremes than meta/ states" in note for note in source.notes)


def test_names_that_do_not_fit_the_data_are_no_conventions(five):
    features = json.loads((five / "meta" / "info.json").read_text())["features"]
    features["action"] |= {"shape": [6], "names": [f"joint_{k}_vel" for k in range(6)]}
    claim(five, features=features)
    with pytest.raises(InputError, match="the action's 7 entries are named"):
        LerobotSource(five)
    claim(five, data_path="data/{robot}.parquet")
    with pytest.raises(InputError, match=r"info\.json: cannot fill in \{robot\} in the path 'data/\{robot\}\.parquet'"):
        LerobotSource(five)


def test_a_video_that_ends_early_costs_its_episode_alone(five, tmp_path):
    folder = five / "videos" / "chunk-000" / "observation.images.top"
    folder.mkdir(parents=True)
    features = json.loads((five / "meta" / "info.json").read_text())["features"]
    features["observation.images.top"]["shape"] = [48, 64, 3]
    claim(five, features=features)
    for k, frames in enumerate((9, 4, 12)):
        path = five / "data" / "chunk-000" / f"episode_{k:06d}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 9), path)
        write_video(folder / f"episode_{k:06d}.mp4", frames)
    source = LerobotSource(five)
    told = "\n".join(source.notes)
    assert "9 steps, but its video of observation.images.top has 4 frames" in told
    assert "9 steps, but its video of observation.images.top has 12 frames" in told
    with pytest.raises(InputError, match=r"record 1, field observation\.images\.top: step . .* from the nearest frame"):
        convert("lerobot", five, tmp_path / "store", images=True, episodes="1")


def test_damaged_files_of_v3_cost_their_episodes_alone(apple, tmp_path):
    folder = shutil.copytree(apple, tmp_path / "apple")
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for k, (first, length) in enumerate([(0, 299), (299, 100), (399, 200), (599, 300)]):
        pq.write_table(table.slice(first, length), path.with_name(f"file-{k:03d}.parquet"))
    last = path.with_name("file-003.parquet")
    last.write_bytes(last.read_bytes()[:1000])
    episodes = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    episodes.write_bytes(episodes.read_bytes()[:500])
    source = LerobotSource(folder, REACHY)
    found = outcomes(source)
    assert len(found[0]) == 299 and found[0].instruction == "place the apple in the plate"
    assert len(found) == 4 and all(isinstance(e, Problem) for e in found[1:])
    assert [(Path(e.file).name, e.record, e.reason[:24]) for e in found[1:]] == [
        ("file-001.parquet", 1, "episode 1 lies in 2 piec"),
        ("file-002.parquet", 1, "episode 1 lies in 2 piec"),
        ("file-003.parquet", None, "damaged Parquet file (Pa"),
    ]
    assert any("damaged Parquet file" in note and "meta/episodes" in note for note in source.notes)


def test_a_rollout_store_is_a_source(store_folder):
    source = LerobotSource(store_folder)
    again = outcomes(source)
    for mine, theirs in zip(again, read_episodes(store_folder), strict=True):
        for name in ("actions", "states", "vla_actions", "sources"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
        assert mine.metadata == theirs.metadata | {"number": mine.metadata["number"]} and mine.success == theirs.success
    assert [e.metadata["number"] for e in again] == list(range(60))
    assert source.space.name == "libero"
