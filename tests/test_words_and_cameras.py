"""Several instructions in one recording, and several cameras in one data set: nothing is taken because it comes first."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.cameras import Cameras
from data.convert import convert
from data.lerobot import LerobotSource
from data.parts import Problem
from data.rlds.source import RldsSource
from data.splits import _scene
from data.store import RolloutStore
from data.words import Words, split_at_words
from spvla.errors import InputError
from spvla.store import Episode, read_episodes

NAMES = [f"joint_{i}_vel" for i in range(3)]
TEXTS = ["open the drawer", "take the cup", "close the drawer"]


def picture(number: int, channels: int = 3, deep: bool = False) -> dict:
    values = np.full((8, 10, channels), number % 250, np.uint8)
    values[0, 0] = 255 - values[0, 0]
    out = io.BytesIO()
    grey = values[..., 0].astype(np.uint16 if deep else np.uint8)
    Image.fromarray(grey if channels == 1 or deep else values).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def write_lerobot(
    folder: Path,
    words: list[list[int | None]],
    cameras: dict[str, dict] = {},  # noqa: B006
    lacking: tuple[str, ...] = (),
    tasks: list[str] = TEXTS,
    index: bool = True,
    told: bool = True,
    seed: int = 0,
) -> Path:
    """A v2.1 folder; ``words``: per episode the task of each step; pictures show the step's number."""
    random = np.random.default_rng(seed)
    features = {
        "action": {"dtype": "float32", "shape": [3], "names": NAMES},
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
    }
    for name, more in cameras.items():
        features[name] = {"dtype": "image", "shape": [8, 10, 3], "names": ["height", "width", "channel"]} | more
    lines = []
    for number, codes in enumerate(words):
        steps = len(codes)
        columns = {
            "action": pa.array(random.normal(size=(steps, 3)).astype(np.float32).tolist(), pa.list_(pa.float32())),
            "observation.state": pa.array(random.normal(size=(steps, 3)).astype(np.float32).tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array((np.arange(steps) / 10).astype(np.float32)),
            "frame_index": pa.array(range(steps), pa.int64()),
            "episode_index": pa.array([number] * steps, pa.int64()),
        }
        if index:
            columns["task_index"] = pa.array(codes, pa.int64())
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        for name, feature in features.items():
            if feature["dtype"] == "image" and name not in lacking:
                frames = [picture(10 * t + 1, feature["shape"][2], feature.get("deep", False)) for t in range(steps)]  # type: ignore[attr-defined]
                columns[name] = pa.array(frames, struct)
        path = folder / f"data/chunk-000/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        used = [tasks[k] for k in dict.fromkeys(codes) if k is not None and k < len(tasks)]
        lines.append(json.dumps({"episode_index": number, "length": steps} | ({"tasks": used} if told else {})))
    meta = folder / "meta"
    meta.mkdir(exist_ok=True)
    (meta / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (meta / "tasks.jsonl").write_text("".join(json.dumps({"task_index": k, "task": t}) + "\n" for k, t in enumerate(tasks)))
    about = {"codebase_version": "v2.1", "robot_type": "arm", "fps": 10, "features": features, "chunks_size": 1000}
    about |= {"total_episodes": len(words), "total_frames": sum(map(len, words))}
    (meta / "info.json").write_text(json.dumps(about))
    return folder


def outcomes(source, images: bool = False) -> list:
    return [e for part in source.parts for e in source.episodes(part, images)]


# ------------------------------------------------------------------------------------------------------------------ words


@given(st.lists(st.sampled_from(["", "  ", "a", "b", "c"]), min_size=1, max_size=30), st.booleans())
def test_every_step_keeps_its_own_words(texts, repeated):
    steps = len(texts)
    values = np.arange(2 * steps, dtype=np.float32).reshape(steps, 2)
    whole = Episode(values, "", np.arange(steps) / 5 + 7, states=values + 1, sources=np.zeros(steps, np.uint8), success=True)
    whole.images, whole.metadata = {"top": [bytes([t]) for t in range(steps)]}, {"number": 4}
    words = Words(texts, np.arange(steps)) if repeated else Words.of(np.array(texts, object), str)
    pieces = split_at_words(whole, words)

    held, want = "", []  # one step after the other, with what was asked for last
    for text in texts:
        held = text if text.strip() else held
        want.append(held)
    assert [p.instruction for p in pieces for _ in range(len(p))] == want
    assert all(a.instruction != b.instruction for a, b in pairwise(pieces))
    np.testing.assert_array_equal(np.concatenate([p.actions for p in pieces]), values)
    np.testing.assert_array_equal(np.concatenate([p.states for p in pieces]), values + 1)
    assert [b for p in pieces for b in p.images["top"]] == whole.images["top"]
    assert all(len(p.sources) == len(p.timestamps) == len(p) for p in pieces)
    np.testing.assert_allclose(np.concatenate([np.diff(p.timestamps) for p in pieces]), 0.2)
    assert pieces[0].timestamps[0] == 7 and all(p.timestamps[0] == 0 for p in pieces[1:])
    if len(pieces) > 1:
        assert [p.metadata for p in pieces] == [{"number": 4, "part": k} for k in range(len(pieces))]
        assert all(p.success is None for p in pieces)
    else:
        assert pieces[0].metadata == {"number": 4} and pieces[0].success is True


@pytest.mark.parametrize("told", [True, False])
def test_each_frame_of_a_lerobot_set_has_the_words_of_its_task_index(tmp_path, told):
    words = [[2] * 6, [0] * 4 + [1] * 3 + [0] * 5, [1] * 5]
    folder = write_lerobot(tmp_path / "set", words, {"observation.images.eye": {}}, told=told)
    convert("lerobot", folder, tmp_path / "store", images=True)
    episodes = list(read_episodes(tmp_path / "store"))
    assert [(e.instruction, len(e), e.metadata["number"], e.metadata.get("part")) for e in episodes] == [
        (TEXTS[2], 6, 0, None),
        (TEXTS[0], 4, 1, 0),
        (TEXTS[1], 3, 1, 1),
        (TEXTS[0], 5, 1, 2),
        (TEXTS[1], 5, 2, None),
    ]
    firsts = [10 * t + 1 for t in (0, 0, 4, 7, 0)]  # which step's picture each begins with
    assert [np.asarray(Image.open(io.BytesIO(e.images["eye"][0])))[4, 4, 0] for e in episodes] == firsts
    scenes = [_scene(e) for e in RolloutStore(tmp_path / "store").episodes]
    assert len(set(scenes)) == 3 and scenes[1] == scenes[2] == scenes[3]  # one side of every split
    convert("lerobot", folder, tmp_path / "some", episodes="1")
    assert [len(e) for e in read_episodes(tmp_path / "some")] == [4, 3, 5]

    again = LerobotSource(tmp_path / "store")  # a store is read again with the numbers of the recordings
    assert [_scene_of(e) for e in outcomes(again)] == [_scene_of(e) for e in episodes]
    assert [e.metadata["row"] for e in outcomes(again)] == [0, 1, 2, 3, 4]


def _scene_of(episode: Episode) -> tuple:
    return episode.metadata["dataset"], episode.metadata["file"], episode.metadata["number"], episode.metadata.get("part")


def test_what_meta_says_counts_only_where_frames_say_nothing(tmp_path):
    one = outcomes(LerobotSource(write_lerobot(tmp_path / "one", [[1] * 4], index=False)))
    assert [e.instruction for e in one] == [TEXTS[1]]
    (several,) = outcomes(LerobotSource(write_lerobot(tmp_path / "two", [[0, 0, 1, 1]], index=False)))
    assert isinstance(several, Problem) and several.field == "task_index" and several.record == 0
    folder = write_lerobot(tmp_path / "renamed", [[0] * 4])
    (folder / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "pull the drawer"}) + "\n")
    source = LerobotSource(folder)
    assert [e.instruction for e in outcomes(source)] == ["pull the drawer"]
    assert any("other words" in note for note in source.notes)


def png(shape: tuple, dtype: type, number: int) -> io.BytesIO:
    values = np.full(shape, number + 1, dtype)
    values[0, 0] = 200
    out = io.BytesIO()
    Image.fromarray(values if shape[-1] == 3 else values[..., 0]).save(out, "PNG")
    return io.BytesIO(out.getvalue())


def write_rlds(folder: Path, words: list[list[str]], images: dict[str, tuple] = {}) -> Path:  # noqa: B006
    import tensorflow_datasets as tfds

    step = {
        "action": tfds.features.Tensor(shape=(3,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "observation": {name: tfds.features.Image(shape=shape, dtype=dtype) for name, (shape, dtype) in images.items()},
    }
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})
    writer = tfds.core.Version("1.0.0")
    random = np.random.default_rng(3)
    folder = folder / "arm" / str(writer)
    folder.mkdir(parents=True)

    def episode(texts: list[str]) -> dict:
        return {
            "steps": [
                {
                    "action": random.normal(size=3).astype(np.float32),
                    "language_instruction": text,
                    "observation": {n: png(shape, dtype, t) for n, (shape, dtype) in images.items()},
                }
                for t, text in enumerate(texts)
            ]
        }

    from tests.conftest import write_records

    records = [features.serialize_example(features.encode_example(episode(texts))) for texts in words]
    write_records(folder / "arm-train.tfrecord-00000-of-00001", records)
    features.save_config(str(folder))
    split = {"name": "train", "shardLengths": [str(len(words))], "numBytes": "1", "filepathTemplate": ""}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (folder / "dataset_info.json").write_text(
        json.dumps({"name": "arm", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]})
    )
    return folder


CONVENTIONS = """
kind: joint_velocity
control_rate: 10
skip_first: 1
action: [{role: joint, key: action, index: [0, 1, 2]}]
"""


def test_rlds_steps_keep_their_words_too(tmp_path):
    (tmp_path / "arm.yaml").write_text(CONVENTIONS)
    texts = [["a", "b", "b", "c"], ["a", "", "", "d"], ["e"] * 3]
    source = RldsSource(write_rlds(tmp_path, texts), tmp_path / "arm.yaml", "train", None)
    found = [(e.instruction, len(e), e.metadata["number"], e.metadata.get("part")) for e in outcomes(source)]
    assert found == [("b", 2, 0, 0), ("c", 1, 0, 1), ("", 2, 1, 0), ("d", 1, 1, 1), ("e", 2, 2, None)]  # the first is left out
    assert any("several instructions" in note for note in source.notes)


# ---------------------------------------------------------------------------------------------------------------- cameras

COLOUR, GREY = {}, {"shape": [8, 10, 1]}
DEPTH = [{"info": {"video.is_depth_map": True}}, {"info": {"is_depth_map": True}}, {"info": {"video.pix_fmt": "gray16le"}}]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [*DEPTH, GREY])
def test_the_only_colour_camera_is_read_whatever_the_order(tmp_path, other, order):
    cameras = dict([("observation.images.a", other), ("observation.images.b", COLOUR)][::order])
    source = LerobotSource(write_lerobot(tmp_path / "set", [[0] * 3], cameras))
    assert source.camera == "observation.images.b" and any("observation.images.b" in note for note in source.notes)
    (episode,) = outcomes(source, images=True)
    assert list(episode.images) == ["b"]
    if other is not GREY:
        with pytest.raises(InputError) as error:
            LerobotSource(tmp_path / "set", camera="observation.images.a")
        assert (error.value.code, error.value.field) == ("camera-is-depth", "camera")


@pytest.mark.parametrize("shape", [[8, 10, 3], [8, 10, 1]])
def test_numbers_of_sixteen_bits_are_no_image_whatever_the_metadata_says(tmp_path, shape):
    folder = write_lerobot(tmp_path / "set", [[0] * 3], {"observation.images.a": {"shape": shape, "deep": True}})
    (found,) = outcomes(LerobotSource(folder, camera="observation.images.a"), images=True)
    assert isinstance(found, Problem) and found.field == "observation.images.a" and found.record == 0


def test_of_several_colour_cameras_one_has_to_be_named(tmp_path):
    cameras = {"observation.images.hand": COLOUR, "observation.images.table": COLOUR}
    folder = write_lerobot(tmp_path / "set", [[0] * 3, [1] * 3], cameras)
    with pytest.raises(InputError) as error:
        convert("lerobot", folder, tmp_path / "store", images=True)
    assert (error.value.code, error.value.field) == ("camera-ambiguous", "camera")
    assert all(name in str(error.value) for name in cameras)
    convert("lerobot", folder, tmp_path / "store")  # no images are needed
    for name in cameras:
        convert("lerobot", folder, tmp_path / name, camera=name, images=True)
        assert all(list(e.images) == [name.rpartition(".")[2]] for e in read_episodes(tmp_path / name))


def test_a_camera_without_files_is_not_one_to_choose(tmp_path):
    cameras = {
        "observation.images.gone": COLOUR,
        "observation.images.film": {"dtype": "video"},  # no video lies there
        "observation.images.here": COLOUR,
    }
    folder = write_lerobot(tmp_path / "set", [[0] * 3], cameras, lacking=("observation.images.gone",))
    assert LerobotSource(folder).camera == "observation.images.here"
    folder = write_lerobot(tmp_path / "none", [[0] * 3], dict(list(cameras.items())[:1]), lacking=tuple(cameras))
    source = LerobotSource(folder)
    with pytest.raises(InputError) as error:
        outcomes(source, images=True)
    assert error.value.code == "no-camera" and len(outcomes(source)) == 1


def test_rlds_cameras_follow_the_same_rule(tmp_path):
    (tmp_path / "arm.yaml").write_text(CONVENTIONS)
    images = {"deep": ((4, 4, 1), np.uint16), "eye": ((4, 4, 3), np.uint8)}
    folder = write_rlds(tmp_path / "one", [["a"] * 3], images)
    assert RldsSource(folder, tmp_path / "arm.yaml", "train", None).camera == "observation/eye"
    with pytest.raises(InputError) as error:
        RldsSource(folder, tmp_path / "arm.yaml", "train", "observation/deep")
    assert error.value.code == "camera-is-depth"
    folder = write_rlds(tmp_path / "two", [["a"] * 3], images | {"hand": ((4, 4, 3), np.uint8)})
    with pytest.raises(InputError) as error:
        outcomes(RldsSource(folder, tmp_path / "arm.yaml", "train", None), images=True)
    assert error.value.code == "camera-ambiguous"


def test_a_named_camera_is_taken_as_it_is():
    assert Cameras("set", ["a", "b"], named="b").require() == "b"
    assert Cameras("set", ["a"], others=["grey"], named="grey").require() == "grey"
    with pytest.raises(InputError) as error:
        Cameras("set", ["a"], named="c")
    assert error.value.code == "unknown-camera"
