"""RLDS without TensorFlow: byte for byte what tfds returns, and what happens to damaged shards."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.openx import find_conventions
from data.parts import Problem
from data.rlds.features import RldsFolder
from data.rlds.source import RldsSource
from data.rlds.tfrecord import masked_crc, read_records, scan
from data.sources import open_source
from spvla.errors import InputError
from tests.conftest import BRIDGE, write_records

REFERENCE = Path(__file__).parents[1] / "results" / "data" / "tfds_reference.json"
KEYS = ["action", "observation/state", "language_instruction", "observation/image_0"]


@pytest.fixture
def bridge() -> Path:
    return BRIDGE


@pytest.fixture
def copy(bridge, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")


def shard(folder: Path, split: str = "train") -> Path:
    return next(folder.glob(f"*-{split}.tfrecord*"))


def outcomes(source: RldsSource, images: bool = False) -> list:
    return [e for part in source.parts for e in source.episodes(part, images)]


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_framing_round_trip(tmp_path_factory, records, first, count):
    path = tmp_path_factory.mktemp("records") / "x.tfrecord"
    write_records(path, records)
    index = scan(path)
    assert index.problem is None and len(index) == len(records)
    expected = list(enumerate(records))[first : first + count]
    assert list(read_records(index, first, count)) == expected


def test_check_sum_is_the_published_one():
    # CRC-32C of 32 zero bytes, RFC 3720, appendix B.4
    assert google_crc32c.value(bytes(32)) == 0x8A9136AA
    assert masked_crc(bytes(32)) == (((0x8A9136AA >> 15) | (0x8A9136AA << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_equals_tfds_byte_for_byte(bridge):
    reference = json.loads(REFERENCE.read_text())["digests"]
    folder = RldsFolder(bridge)
    reader = folder.reader(KEYS)
    for split, shards in folder.splits.items():
        rows = []
        for path, _ in shards:
            for i, record in read_records(scan(path)):
                steps = reader.parse(record, str(path), i)
                row = {"steps": len(steps["action"])}
                for key in KEYS:
                    value = steps[key]
                    joined = b"\0".join(value) if value.dtype == object else value.tobytes()
                    row[key] = hashlib.sha256(joined).hexdigest()[:32]
                rows.append(row)
        assert rows == reference[split][: len(rows)] and len(rows) == {"train": 10, "val": 1}[split]


@pytest.mark.slow
def test_tensorflow_is_never_imported(bridge):
    code = (
        "import sys; from data.sources import open_source\n"
        f"s = open_source('rlds', {str(bridge)!r}); e = [len(e) for p in s.parts for e in s.episodes(p, images=True)]\n"
        "assert len(e) == 10, e\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] in ('tensorflow', 'jax')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_validation_split_repeats_the_training_split(bridge):
    source = open_source("rlds", bridge, split="all")
    assert len(outcomes(source)) == 10
    assert any("1 records of split val repeat records of train" in note for note in source.notes)
    assert len(outcomes(open_source("rlds", bridge, split="val"))) == 1


def test_bridge_conventions(bridge):
    """The first, empty action is left out; movement is the difference of states; the gripper is 0 or 1."""
    source = open_source("rlds", bridge)
    episodes = outcomes(source, images=True)
    raw = [source.folder.reader(KEYS).parse(r, "x", i) for i, r in read_records(scan(shard(bridge)))]
    assert max(np.abs(s["action"][0, :6]).max() for s in raw) < 1e-3
    for episode, steps in zip(episodes, raw, strict=True):
        state = steps["observation/state"]
        assert len(episode) == len(state) - 2
        np.testing.assert_array_equal(episode.actions[:, :6], np.diff(state, axis=0)[1:, :6])
        np.testing.assert_array_equal(episode.states, state[1:-1])
        assert list(episode.images["image_0"]) == steps["observation/image_0"].tolist()[1:-1]
        assert episode.instruction == steps["language_instruction"][0].decode()
    assert len({e.instruction for e in episodes}) == 4
    assert source.space.control_rate == 5 and source.space.kind == "eef_delta" and source.space.gripper == (6,)


def test_a_damaged_record_is_named_and_the_rest_read(copy):
    path = shard(copy)
    index = scan(path)
    content = bytearray(path.read_bytes())
    content[index.offsets[7] + 100] ^= 1
    path.write_bytes(content)
    found = outcomes(open_source("rlds", copy))
    assert len(found) == 10
    assert [i for i, e in enumerate(found) if isinstance(e, Problem)] == [7]
    assert found[7].record == 7 and found[7].file == str(path) and "check sum" in found[7].reason


def test_a_wrong_length_ends_the_shard(copy):
    path = shard(copy)
    content = bytearray(path.read_bytes())
    content[scan(path).offsets[7] - 12] ^= 1
    path.write_bytes(content)
    found = outcomes(open_source("rlds", copy))
    assert len(found) == 8 and isinstance(found[7], Problem) and found[7].record == 7
    assert "nothing after it" in found[7].reason


@pytest.mark.parametrize("cut", [5, 4000])
def test_a_cut_off_shard_keeps_its_whole_records(copy, cut):
    path = shard(copy)
    index = scan(path)
    path.write_bytes(path.read_bytes()[: index.offsets[8] - 12 + cut])
    found = outcomes(open_source("rlds", copy))
    assert len(found) == 9 and isinstance(found[8], Problem)
    assert "cut off" in found[8].reason and found[8].record == 8


def test_a_missing_feature_is_named(copy):
    path = shard(copy)
    records = [r for _, r in read_records(scan(path))]
    records[3] = records[3].replace(b"steps/action", b"steps/axtion")
    write_records(path, records)
    found = outcomes(open_source("rlds", copy))
    assert isinstance(found[3], Problem) and found[3].field == "action" and found[3].record == 3
    assert sum(not isinstance(e, Problem) for e in found) == 9


def test_a_feature_of_the_wrong_size_is_named(copy):
    path = shard(copy)
    reader = RldsFolder(copy).reader(KEYS)
    records = [r for _, r in read_records(scan(path))]
    example = reader.message.FromString(records[3])
    example.features.feature["steps/action"].float_list.value.append(1.0)
    records[3] = example.SerializeToString()
    write_records(path, records)
    found = outcomes(open_source("rlds", copy))
    assert isinstance(found[3], Problem) and (found[3].record, found[3].field) == (3, "action")
    assert "cannot reshape array of size 71" in found[3].reason


def test_what_flags_claim_and_images_show_is_told(bridge):
    told = "\n".join(open_source("rlds", bridge).notes)
    assert "no step has is_last or is_terminal set; an episode ends where its record ends" in told
    assert "episode_metadata/has_image_0 is false, yet observation/image_0 shows something" in told
    assert "1 of 1 records of split val are also in train; neither can be held out" in told
    assert "these steps are left out: the first 1 of each episode and the last, whose difference" in told
    told = "\n".join(open_source("rlds", bridge, camera="observation/image_3").notes)
    assert "images of observation/image_3 have one colour only: the camera was not connected" in told


def test_an_empty_first_action_is_told(bridge, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: eef_delta\ncontrol_rate: 5\naction: [{role: joint, key: action, index: [0, 1, 2, 3, 4, 5]}]\n")
    notes = open_source("rlds", bridge, conventions=mine).notes
    assert any("the first action of every episode is (almost) zero; skip_first: 1" in note for note in notes)


def test_one_shard_of_several_may_be_missing(copy):
    path = shard(copy)
    records = [r for _, r in read_records(scan(path))]
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["4", "6"]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    write_records(path, records[:4])
    path.rename(path.with_name(path.name.replace("of-00001", "of-00002")))
    found = outcomes(open_source("rlds", copy))
    assert len(found) == 5 and isinstance(found[4], Problem)
    assert found[4].file.endswith("train.tfrecord-00001-of-00002") and "is not there" in found[4].reason


def test_features_that_are_not_plain_go_through_tfds(tmp_path):
    import tensorflow_datasets as tfds

    folder = RldsFolder.__new__(RldsFolder)
    folder.steps = tfds.features.FeaturesDict(
        {
            "packed": tfds.features.Tensor(shape=(3,), dtype=np.float32, encoding="zlib"),
            "plain": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "flag": tfds.features.Scalar(dtype=np.bool_),
        }
    )
    reader = folder.reader(["packed", "plain", "flag"])
    assert set(reader.others) == {"packed"} and set(reader.plain) == {"plain", "flag"}
    example = reader.message()
    feature = example.features.feature
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    feature["steps/packed"].bytes_list.value.extend(zlib.compress(row.tobytes()) for row in values)
    feature["steps/plain"].float_list.value.extend([1, 2, 3, 4])
    feature["steps/flag"].int64_list.value.extend([0, 1])
    steps = reader.parse(example.SerializeToString(), "x", 0)
    np.testing.assert_array_equal(steps["packed"], values)
    np.testing.assert_array_equal(steps["plain"], [[1, 2], [3, 4]])
    assert steps["flag"].tolist() == [False, True] and steps["flag"].dtype == bool


def test_bytes_that_are_no_example(copy):
    path = shard(copy)
    records = [r for _, r in read_records(scan(path))]
    records[0] = b"\xff" * 50
    write_records(path, records)
    found = outcomes(open_source("rlds", copy))
    assert isinstance(found[0], Problem) and len(found) == 10


def test_metadata_that_lies_about_its_length_is_told(copy):
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["31"]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    source = open_source("rlds", copy)
    assert any("holds 10 records, dataset_info.json claims 31" in note for note in source.notes)
    assert len(outcomes(source)) == 10


def test_bad_folders_are_one_line_errors(copy, tmp_path, bridge):
    with pytest.raises(InputError, match="no such folder"):
        open_source("rlds", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no dataset_info\.json"):
        open_source("rlds", tmp_path / "empty")
    with pytest.raises(InputError, match="no split 'test'; there are: train, val"):
        open_source("rlds", bridge, split="test")
    with pytest.raises(InputError, match="no feature 'observation/top'"):
        open_source("rlds", bridge, camera="observation/top")
    with pytest.raises(InputError, match="no conventions for data set 'unheard_of'"):
        find_conventions(None, "unheard_of")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("kind: eef_delta\ncontrol_rate: 5\naction: [{key: action/world_vector, index: [0, 1, 2]}]\n")
    with pytest.raises(InputError, match="no feature 'action/world_vector'"):
        open_source("rlds", bridge, conventions=wrong)
    shard(copy).unlink()
    with pytest.raises(InputError, match="shard is not there"):
        open_source("rlds", copy)
    (copy / "features.json").write_text("{")
    with pytest.raises(InputError, match=r"features\.json: not valid JSON"):
        open_source("rlds", copy)
