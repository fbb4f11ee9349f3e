"""Data sets from elsewhere into rollout stores: conventions, statistics, damaged records, many workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

import data.inspect
from data.conversions import binarize, difference, quaternion_to_euler, relative
from data.convert import convert, published_space
from data.inspect import inspect
from data.openx import Conventions, load_table, standardize
from data.parts import Problem
from data.rlds.features import RldsFolder
from data.rlds.tfrecord import read_records, scan
from data.stats import stats
from data.store import RolloutStore
from spvla.errors import InputError
from spvla.statistics import Statistics
from spvla.store import finalize, read_action_space, read_episodes
from tests.conftest import BRIDGE, CR5, DATA, write_records, write_store

ROOT = Path(__file__).parents[1]
COLUMN = st.integers(1, 12).flatmap(lambda n: arrays(np.float32, (n, 1), elements=st.floats(-1, 1, width=16)))


@pytest.fixture
def bridge() -> Path:
    return BRIDGE


@pytest.fixture
def cr5() -> Path:
    return CR5


# ------------------------------------------------------------------------------------------------------------- statistics


@given(
    st.lists(arrays(np.float32, st.tuples(st.integers(1, 50), st.just(2)), elements=st.floats(-1e6, 1e6, width=32)), min_size=1)
)
def test_statistics_are_numpys(parts):
    seen = Statistics()
    for part in parts:
        seen.add(part)
    x = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(seen.mean, x.mean(0), rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(np.sqrt(seen.squares / seen.count), x.std(0), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(seen.min, x.min(0))
    np.testing.assert_array_equal(seen.max, x.max(0))
    for q in (0.01, 0.3, 0.99):  # between the neighbouring values, each off by one part in 4096
        low, high = np.quantile(x, q, axis=0, method="lower"), np.quantile(x, q, axis=0, method="higher")
        slack = np.maximum(np.abs(low), np.abs(high)) / 4000 + 1e-37
        assert ((seen.quantile(q) >= low - slack) & (seen.quantile(q) <= high + slack)).all()


def test_wide_features_have_no_quantiles():
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    wide, whole = Statistics(quantiles=False), Statistics()
    for part in np.array_split(x, 4):
        wide.add(part)
    whole.add(x)
    assert wide.result().keys() == whole.result().keys() - {"q01", "q99"}
    for name, value in wide.result().items():
        np.testing.assert_allclose(value, whole.result()[name], rtol=1e-6)


def test_statistics_do_not_depend_on_order_or_parts():
    x = np.random.default_rng(0).standard_normal((4000, 3)).astype(np.float32)
    whole, pieces = Statistics(), Statistics()
    whole.add(x)
    for part in np.array_split(x[::-1], 7):
        other = Statistics()
        other.add(part)
        pieces.merge(other)
    assert np.array_equal(whole.quantile(0.01), pieces.quantile(0.01))
    np.testing.assert_allclose(whole.quantile(0.99), np.quantile(x, 0.99, axis=0), rtol=5e-4)
    np.testing.assert_allclose(whole.squares, pieces.squares, rtol=1e-9)


def test_stats_agree_with_the_published_ones(cr5, tmp_path, capsys):
    stats(source="lerobot", path=cr5, output=tmp_path / "s.json")
    entry = json.loads((tmp_path / "s.json").read_text())["lerobot_cr5_banana"]
    published = [json.loads(line)["stats"] for line in (cr5 / "meta" / "episodes_stats.jsonl").read_text().splitlines()]
    for ours, theirs in (("action", "action"), ("proprio", "observation.state")):
        counts = np.array([p[theirs]["count"][0] for p in published], float)[:, None]
        mean = np.array([p[theirs]["mean"] for p in published])
        std = np.array([p[theirs]["std"] for p in published])
        pooled = (mean * counts).sum(0) / counts.sum()
        spread = np.sqrt(((std**2 + (mean - pooled) ** 2) * counts).sum(0) / counts.sum())
        np.testing.assert_allclose(entry[ours]["mean"], pooled, atol=1e-5)
        np.testing.assert_allclose(entry[ours]["std"], spread, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(entry[ours]["min"], np.min([p[theirs]["min"] for p in published], axis=0), rtol=1e-6)
        np.testing.assert_allclose(entry[ours]["max"], np.max([p[theirs]["max"] for p in published], axis=0), rtol=1e-6)
    assert entry["num_trajectories"] == 34 and entry["num_transitions"] == 7445
    assert entry["action"]["mask"] == [True] * 6 + [False]


# ------------------------------------------------------------------------------------------------------------ conventions


@given(COLUMN)
def test_relative_gripper_as_the_published_scan(x):
    command = np.where(x[:, 0] < -0.1, 1, np.where(x[:, 0] > 0.1, -1, 0))
    state = -command[np.argmax(command != 0)]
    state = 1 if state == 0 else state
    expected = []
    for c in command:
        state = c if c != 0 else state
        expected.append(state / 2 + 0.5)
    np.testing.assert_array_equal(relative(x)[:, 0], expected)


@given(COLUMN)
def test_binarize_as_the_published_scan(x):
    x = np.abs(x)
    expected, carry = np.empty(len(x), np.float32), x[-1, 0]
    for i in reversed(range(len(x))):
        if x[i, 0] > 0.95 or x[i, 0] < 0.05:
            carry = float(x[i, 0] > 0.95)
        expected[i] = carry
    np.testing.assert_array_equal(binarize(x)[:, 0], expected)


@given(arrays(np.float64, 3, elements=st.floats(-1.5, 1.5)))
def test_euler_angles_make_the_same_rotation(angles):
    """R = Rz(yaw) Ry(pitch) Rx(roll), as the published statistics have it."""

    def turn(axis: int, angle: float) -> np.ndarray:
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        out = np.eye(3)
        out[i, i] = out[j, j] = np.cos(angle)
        out[j, i], out[i, j] = np.sin(angle), -np.sin(angle)
        return out

    matrix = turn(2, angles[2]) @ turn(1, angles[1]) @ turn(0, angles[0])
    quaternion = Rotation.from_matrix(matrix).as_quat()[None].astype(np.float32)
    np.testing.assert_allclose(quaternion_to_euler(quaternion)[0], angles, atol=1e-4)


def test_difference_leaves_the_last_step_out():
    out = difference(np.array([[1.0], [4.0], [9.0]], np.float32))
    np.testing.assert_array_equal(out, [[3], [5], [np.nan]])


def test_the_table_covers_the_published_statistics():
    """25 data sets with a mask: same size, the mask spares the gripper, and constants are constant there too."""
    published = json.loads((DATA / "oxe_statistics" / "dataset_statistics.json").read_text())
    table = load_table()
    covered = [name for name, entry in published.items() if "mask" in entry["action"]]
    assert len(covered) == 25 and set(covered) <= set(table)
    for name in covered:
        action, conventions = published[name]["action"], table[name]
        space = conventions.space(name)
        assert space.dim == len(action["q01"]) == 7
        assert [d not in space.gripper for d in range(7)] == action["mask"]
        assert conventions.control_rate > 0 and conventions.camera.startswith("observation/")
        at = 0
        for field in conventions.action:
            width = 3 if "quaternion_to_euler" in field.convert else field.zeros or len(field.index)
            if field.zeros:
                assert not any(action["std"][at : at + width]), name
            at += width
        g = space.gripper[0]
        assert action["min"][g] >= 0 and action["max"][g] <= 1
        far = max(abs(action["mean"][d]) / (action["std"][d] + 1e-9) for d in (0, 1, 2))
        assert (conventions.kind == "eef_absolute") == (far > 2), name  # poses lie far from zero, differences about it


def test_every_entry_reads_a_made_up_episode():
    """Each entry of the table makes an action of its own size out of features of the shapes that it names."""
    for name, conventions in load_table().items():
        fields = (*conventions.action, *conventions.state)
        steps = {}
        for field in fields:
            if field.key is None:
                continue
            if "zlib" in field.convert:
                import zlib

                steps[field.key] = np.array([zlib.compress(np.ones(7, np.float32).tobytes())] * 5, object)
            elif field.key not in steps:
                steps[field.key] = np.random.default_rng(0).random((5, 15)).astype(np.float32)
        steps[conventions.instruction] = np.array([b"do it"] * 5, object)
        episode = standardize(steps, conventions, "x", 0, {})
        assert not isinstance(episode, Problem), (name, episode)
        episode.check(conventions.space(name), name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "eef"}, "kind 'eef' is not one of"),
        ({"gripper": 6}, "field 'gripper' is unknown"),
        ({"action": [{"role": "grip", "key": "action"}]}, r"action\[0\]: role 'grip' is not one of"),
        ({"action": [{"key": "action", "convert": ["flip"]}]}, "conversion 'flip' is unknown"),
        ({"action": [{"key": "action", "size": 3}]}, r"action\[0\]: "),
        ({"action": []}, "action has no fields"),
    ],
)
def test_wrong_conventions_are_named(change, message):
    values = {"kind": "eef_delta", "control_rate": 5, "action": [{"key": "action", "index": [0]}]} | change
    with pytest.raises(InputError, match=message):
        Conventions.read(values, "mine.yaml")


# ---------------------------------------------------------------------------------------------------------------- convert


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for kind in ("data", "meta") for p in sorted((folder / kind).rglob("*.*"))
    }


def test_bridge_converts_with_images(bridge, tmp_path, capsys):
    convert("rlds", bridge, tmp_path / "store", images=True)
    episodes = list(read_episodes(tmp_path / "store"))
    assert len(episodes) == 10 and sum(map(len, episodes)) == 80
    assert episodes[0].images["image_0"][0].startswith(b"\xff\xd8")
    store = RolloutStore(tmp_path / "store")
    assert store.space.control_rate == 5 and not store.labelled_by_teacher
    inside = (np.abs(store.arrays["actions"]) <= 1.001).mean()
    assert inside > 0.97  # q01 and q99 are those of the actions
    before = tree(tmp_path / "store")
    assert tree(finalize(tmp_path / "store")) == before
    inspect(data=tmp_path / "store", output=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "flip pot upright which is in sink" in capsys.readouterr().out


def test_a_dead_camera_is_refused(bridge, tmp_path, capsys):
    with pytest.raises(InputError, match="no feature 'observation/image_9'"):
        convert("rlds", bridge, tmp_path / "x", camera="observation/image_9", images=True)
    with pytest.raises(InputError, match="record 0, field observation/image_3: every image has one colour only"):
        convert("rlds", bridge, tmp_path / "y", camera="observation/image_3", images=True)


def test_a_cut_off_image_is_named_and_the_rest_kept(bridge, tmp_path):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    records = [r for _, r in read_records(scan(path))]
    example = RldsFolder(folder).reader(["action"]).message.FromString(records[5])
    images = example.features.feature["steps/observation/image_0"].bytes_list.value
    images[4] = images[4][:400]
    write_records(path, [*records[:5], example.SerializeToString(), *records[6:]])
    convert("rlds", folder, tmp_path / "store", images=True, on_error="skip")
    (left_out,) = json.loads((tmp_path / "store" / "problems.json").read_text())
    assert (left_out["record"], left_out["field"]) == (5, "observation/image_0")
    assert "image of step 3 cannot be read" in left_out["reason"]
    assert len(list(read_episodes(tmp_path / "store"))) == 9


def test_a_part_is_known_by_the_file_it_came_from(bridge, tmp_path):
    """Another data set of the same name, or a repaired shard, is never passed off as what was converted before."""
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    convert("rlds", folder, tmp_path / "store", on_error="skip")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="to make it again, or choose another --output"):
        convert("rlds", folder, tmp_path / "store")
    shutil.rmtree(tmp_path / "store")
    convert("rlds", folder, tmp_path / "store")
    assert len(list(read_episodes(tmp_path / "store"))) == 10


def test_inspecting_takes_constant_memory(cr5, capsys, monkeypatch):
    monkeypatch.setattr(data.inspect, "MOST_STEPS", 1000)
    inspect(source="lerobot", path=cr5)
    told = capsys.readouterr().out
    assert "34 episodes, 7445 steps at 10 Hz" in told and "of every 8th episode" in told
    assert "34 episodes  put the banana on the plate" in told


def test_joint_velocities_convert(cr5, tmp_path, capsys):
    convert("lerobot", cr5, tmp_path / "store", episodes="0-9")
    space = read_action_space(tmp_path / "store")
    assert (space.kind, space.control_rate, space.gripper, space.translation) == ("joint_velocity", 10.0, (6,), ())
    width = np.array(space.q99) - np.array(space.q01)
    assert width[4] >= 0.049 * width[:6].max()  # a joint that stands still does not turn its noise into full motion
    assert space.q01[6] == 0 and space.q99[6] == 1
    assert len(list(read_episodes(tmp_path / "store"))) == 10
    assert "33 of 34 videos" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_and_restarts_give_the_same_store(cr5, tmp_path):
    convert("lerobot", cr5, tmp_path / "one")
    convert("lerobot", cr5, tmp_path / "two", workers=2)
    shards = sorted((tmp_path / "two" / ".shards").glob("*.parquet"))
    shards[1].unlink()
    shards[2].unlink()
    shutil.rmtree(tmp_path / "two" / "meta")
    times = {p: p.stat().st_mtime_ns for p in shards if p.exists()}
    convert("lerobot", cr5, tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())  # nothing finished was done again


@pytest.mark.slow
def test_sigkill_and_restart_lose_and_repeat_nothing(cr5, tmp_path):
    convert("lerobot", cr5, tmp_path / "one")
    command = [sys.executable, "-m", "data", "convert", "--source", "lerobot", "--path", str(cr5), "--output"]
    victim = subprocess.Popen([*command, str(tmp_path / "two"), "--workers", "2"], cwd=ROOT, start_new_session=True)
    shards = tmp_path / "two" / ".shards"
    while not list(shards.glob("[!.]*.parquet")) and victim.poll() is None:
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    kept = {p: p.stat().st_mtime_ns for p in shards.glob("[!.]*.parquet")}
    assert kept and not (tmp_path / "two" / "meta").exists()
    with pytest.raises(InputError, match="not finalised"):
        list(read_episodes(tmp_path / "two"))
    convert("lerobot", cr5, tmp_path / "two")
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_damaged_records_stop_or_are_skipped(bridge, tmp_path, capsys):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tfrecord-00000-of-00001, record 1: the check sum is wrong"):
        convert("rlds", folder, tmp_path / "store")
    convert("rlds", folder, tmp_path / "store", on_error="skip")
    assert len(list(read_episodes(tmp_path / "store"))) == 9
    left_out = json.loads((tmp_path / "store" / "problems.json").read_text())
    assert [p["record"] for p in left_out] == [1] and "left out" in capsys.readouterr().out


def test_wrong_image_shape_is_named(bridge, tmp_path):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    text = (folder / "features.json").read_text().replace('"64"', '"96"')
    (folder / "features.json").write_text(text)
    told = r"record 0, field observation/image_0: the image of step 0 is \(64, 64, 3\), the data set says \(96"
    with pytest.raises(InputError, match=told):
        convert("rlds", folder, tmp_path / "store", images=True)


def test_no_episode_comes_twice(bridge, tmp_path):
    convert("rlds", bridge, tmp_path / "store", episodes="0-4")
    convert("rlds", bridge, tmp_path / "store", episodes="5-7")
    for options in ({"episodes": "4-9"}, {}, {"conventions": "bridge_orig", "episodes": "0-1"}):
        with pytest.raises(InputError, match="of these episodes already, made with other options"):
            convert("rlds", bridge, tmp_path / "store", **options)
    assert len(list(read_episodes(tmp_path / "store"))) == 8


def test_published_scale(bridge, tmp_path, capsys):
    file = DATA / "oxe_statistics" / "dataset_statistics.json"
    convert("rlds", bridge, tmp_path / "store", conventions="bridge_orig", statistics=file)
    assert "do units and signs agree" not in capsys.readouterr().out
    published = json.loads(file.read_text())["bridge_orig"]["action"]
    space = read_action_space(tmp_path / "store")
    np.testing.assert_allclose(space.q01[:6], published["q01"][:6])
    np.testing.assert_allclose(space.q99[:6], published["q99"][:6])
    assert (space.q01[6], space.q99[6]) == (0, 1)
    rlbench = published_space(space, file, "rlbench")
    assert "rlbench has no mask" in capsys.readouterr().out and rlbench.q99[6] == 1
    tenth = {k: [v / 10 for v in published[k]] for k in ("q01", "q99", "min", "max")}
    (tmp_path / "tenth.json").write_text(json.dumps({"bridge_dataset": {"action": {**published, **tenth}}}))
    convert("rlds", bridge, tmp_path / "wrong", statistics=tmp_path / "tenth.json")
    assert (
        "dimension 6 (gripper) goes from 0 to 1, but its scale is for 0 to 0.1; do units and signs agree?"
        in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="no usable entry for 'bridge_dataset'"):
        published_space(space, file)
    (tmp_path / "short.json").write_text(json.dumps({"x": {"action": {k: [0.0] for k in ("q01", "q99", "min", "max")}}}))
    with pytest.raises(InputError, match="has actions of 1 dimensions"):
        published_space(space, tmp_path / "short.json", "x")


def test_a_repaired_file_of_the_same_size_is_read_again(bridge, tmp_path):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:200_000] + bytes([whole[200_000] ^ 1]) + whole[200_001:])
    convert("rlds", folder, tmp_path / "store", on_error="skip")
    convert("rlds", folder, tmp_path / "store", on_error="skip")  # nothing was changed
    before = tree(tmp_path / "store")
    path.write_bytes(whole)
    with pytest.raises(
        InputError, match=r"tfrecord-00000-of-00001 had a problem and has changed since; delete .*json"
    ) as error:
        convert("rlds", folder, tmp_path / "store", on_error="skip")
    assert tree(tmp_path / "store") == before
    note = next(p for p in (tmp_path / "store" / ".shards").glob("*.json") if p.name in str(error.value))
    note.unlink()
    convert("rlds", folder, tmp_path / "store")
    assert len(list(read_episodes(tmp_path / "store"))) == 10
    note.write_text("{")
    with pytest.raises(InputError, match=rf"{note.name}: not readable"):
        convert("rlds", folder, tmp_path / "store")


def test_the_only_part_is_made_anew_when_its_note_is_gone(tmp_path):
    data, output = write_store(tmp_path / "data", range(3)), tmp_path / "store"
    convert("lerobot", data, output)
    write_store(data, range(4))
    with pytest.raises(InputError, match=r"delete data-000000.*\.json there") as error:
        convert("lerobot", data, output)
    next(p for p in (output / ".shards").glob("*.json") if p.name in str(error.value)).unlink()
    convert("lerobot", data, output)
    assert len(list(read_episodes(output))) == 4


def test_a_data_set_is_not_its_own_output(store_folder, tmp_path):
    folder = shutil.copytree(store_folder, tmp_path / "store")
    before = tree(folder)
    with pytest.raises(InputError, match="--output is the data set itself"):
        convert("lerobot", folder, tmp_path / "other" / ".." / "store")
    assert tree(folder) == before


def test_episodes_of_a_store_are_chosen_by_number(store_folder, tmp_path, capsys):
    stats(data=store_folder, episodes="0-1")
    assert "2 episodes, 120 steps" in capsys.readouterr().out
    convert("lerobot", store_folder, tmp_path / "store", episodes="3,58")
    mine, theirs = list(read_episodes(tmp_path / "store")), list(read_episodes(store_folder))
    for a, b in zip(mine, (theirs[3], theirs[58]), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
    for call in (
        lambda: stats(data=store_folder, episodes="99"),
        lambda: convert("lerobot", store_folder, tmp_path, episodes="99"),
    ):
        with pytest.raises(InputError, match=r"no episode could be used; --episodes selects none of them \(99 to 99\)"):
            call()
