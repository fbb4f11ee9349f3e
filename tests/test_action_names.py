"""What the names of an action's entries say of a LeRobot set, and what is decided by all its data or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.action_names import read_name, read_names
from data.convert import convert
from data.lerobot import LerobotSource
from spvla.errors import InputError
from spvla.store import read_action_space

RATE = 20.0


@pytest.mark.parametrize(
    ("name", "role", "quantity"),
    [
        ("elbow_flex.pos", "joint", "position"),
        ("wrist_roll.pos", "joint", "position"),
        ("jointVelocity3", "joint", "velocity"),
        ("deltajoint2", "joint", "delta"),
        ("left-arm/joint 4 delta position", "joint", "delta"),
        ("J2Torque", "joint", "effort"),
        ("motor_current_1", "joint", "effort"),
        ("theta.vel", "joint", "velocity"),
        ("delta_z", "translation", "delta"),
        ("ee_dyaw", "rotation", "delta"),
        ("right_tcp_pos_x", "translation", "position"),
        ("gripper_opening", "gripper", None),
        ("left_gripper.pos", "gripper", "position"),
        ("delta_gripper", "gripper", "delta"),
        ("motor_12", "joint", None),
        ("revolute_1", "joint", None),  # "vel" and "rel" are not words of it
        ("develop_0", "joint", None),
        ("postal_joint", "joint", None),
    ],
)
def test_a_name_says_what_its_words_say(name, role, quantity):
    found = read_name(name)
    assert (found.role, found.quantity) == (role, quantity)


@pytest.mark.parametrize(
    ("names", "kind", "motions"),
    [
        (["pan.pos", "lift.pos", "gripper.pos"], "joint_position", ()),
        (["joint_a_delta", "joint_b_delta", "gripper"], "joint_delta", (0, 1)),
        (["qvel_0", "qvel_1"], "joint_velocity", (0, 1)),
        (["delta_x", "delta_y", "delta_z", "gripper"], "eef_delta", (0, 1, 2)),
        (["eef_pos_x", "eef_pos_y", "eef_pos_z"], "eef_absolute", ()),
        (["arm_lift.pos", "arm_gripper.pos", "x.vel", "theta.vel"], "joint_position", (2, 3)),
        (["joint_1_pos", "gripper_vel"], "joint_position", (1,)),
        (["waist", "elbow", "gripper"], None, ()),
    ],
)
def test_names_together_say_the_kind_and_what_stops(names, kind, motions):
    found = read_names(names)
    assert (found.kind, found.motions) == (kind, motions)


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["joint_1_torque", "joint_2_torque"], "effort-actions"),
        (["joint_1_pos", "joint_2_current"], "effort-actions"),
        (["joint_1_accel"], "effort-actions"),
        (["joint_1_pos_vel"], "unclear-names"),
        (["joint_1", "joint_2_pos"], "unclear-names"),
        (["joint_1_vel", "joint_2_delta"], "unclear-names"),
        (["left_gripper", "right_gripper"], "unclear-names"),
    ],
)
def test_efforts_and_contradictions_are_refused(names, code):
    with pytest.raises(InputError) as error:
        read_names(names)
    assert error.value.code == code


def write_set(folder: Path, names, actions: list[np.ndarray], states: list[np.ndarray]) -> Path:
    """A v2.1 folder of these episodes."""
    lines = []
    for k, (action, state) in enumerate(zip(actions, states, strict=True)):
        columns = {
            "action": pa.array(action.astype(np.float32).tolist(), pa.list_(pa.float32())),
            "observation.state": pa.array(state.astype(np.float32).tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array((np.arange(len(action)) / RATE).astype(np.float32)),
            "frame_index": pa.array(range(len(action)), pa.int64()),
            "episode_index": pa.array([k] * len(action), pa.int64()),
            "task_index": pa.array([0] * len(action), pa.int64()),
        }
        path = folder / "data" / "chunk-000" / f"episode_{k:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        lines.append(json.dumps({"episode_index": k, "tasks": ["turn the wheel"], "length": len(action)}))
    (folder / "meta").mkdir()
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "turn the wheel"}) + "\n")
    features = {
        name: {"dtype": "float32", "shape": [x[0].shape[1]], "names": n}
        for name, x, n in (("action", actions, names), ("observation.state", states, None))
    }
    info = {"codebase_version": "v2.1", "robot_type": "wheel", "fps": RATE, "features": features}
    info |= {"total_episodes": len(actions), "total_frames": sum(map(len, actions)), "chunks_size": 1000}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return folder


def episodes(reading: str, count: int = 5, steps: int = 80) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Actions and states of three joints and a gripper; the actions are what ``reading`` says."""
    actions, states = [], []
    for k in range(count):
        g = np.random.default_rng(k)
        path = np.cumsum(np.cumsum(g.normal(0, 0.004, (steps + 1, 3)), 0), 0) + g.uniform(-1, 1, 3)
        change = np.diff(path, axis=0)
        values = {"position": path[1:], "delta": change, "velocity": change * RATE, "noise": g.normal(0, 1, change.shape)}[
            reading
        ]
        gripper = (np.arange(steps) > 20 + k).astype(float)
        actions.append(np.c_[values + g.normal(0, 1e-4, values.shape), gripper])
        states.append(np.c_[path[:-1], gripper])
    return actions, states


BARE = ["motor_1", "motor_2", "motor_3", "gripper"]


def test_bare_names_are_positions_where_all_the_data_shows_it(tmp_path):
    source = LerobotSource(write_set(tmp_path / "set", BARE, *episodes("position")))
    assert (source.space.kind, source.space.gripper, source.space.binary_gripper) == ("joint_position", (3,), True)
    assert any("motor_1" in note for note in source.notes)


@pytest.mark.parametrize("reading", ["delta", "velocity", "noise"])
def test_bare_names_are_refused_where_it_does_not(tmp_path, reading):
    with pytest.raises(InputError) as error:
        LerobotSource(write_set(tmp_path / "set", BARE, *episodes(reading)))
    assert error.value.code == "unclear-names" and str(error.value.field).endswith("features.action.names")


def test_a_first_episode_of_positions_does_not_decide_for_the_others(tmp_path):
    actions, states = (a[:1] + b[1:] for a, b in zip(episodes("position"), episodes("delta"), strict=True))
    with pytest.raises(InputError):
        LerobotSource(write_set(tmp_path / "set", BARE, actions, states))


@pytest.mark.parametrize(
    ("suffix", "reading", "kind"),
    [("pos", "position", "joint_position"), ("delta", "delta", "joint_delta"), ("velocity", "velocity", "joint_velocity")],
)
def test_names_that_say_what_they_are_convert_and_stop(tmp_path, capsys, suffix, reading, kind):
    folder = write_set(tmp_path / "set", [f"j{k}_{suffix}" for k in range(3)] + ["gripper"], *episodes(reading))
    convert("lerobot", folder, tmp_path / "store")
    space = read_action_space(tmp_path / "store")
    assert space.kind == kind and space.gripper == (3,)
    stopped = space.stop(np.array([0.1, 0.2, 0.3, 1.0], np.float32))
    np.testing.assert_allclose(stopped, [0.1, 0.2, 0.3, 1] if reading == "position" else [0, 0, 0, 1])
    assert "is that the right kind" not in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "reading"), [("vel", "position"), ("pos", "delta"), ("delta", "velocity")])
def test_names_that_the_data_contradicts_are_noted(tmp_path, capsys, suffix, reading):
    folder = write_set(tmp_path / "set", [f"j{k}_{suffix}" for k in range(3)] + ["gripper"], *episodes(reading))
    convert("lerobot", folder, tmp_path / "store")
    out = capsys.readouterr().out
    assert "is that the right kind" in out and reading in out


@pytest.mark.parametrize("names", [{"motors": BARE}, [BARE], {name: k for k, name in enumerate(BARE)}])
def test_names_in_any_form(tmp_path, names):
    assert LerobotSource(write_set(tmp_path / "set", names, *episodes("position"))).space.gripper == (3,)


def test_a_gripper_that_rests_in_the_first_episode_is_continuous(tmp_path):
    actions, states = episodes("position")
    for k in range(1, 5):
        actions[k][:, 3] = np.clip(np.sin(np.arange(80) / 15), 0, 1)
    for order, name in (([0, 1, 2, 3, 4], "rest-first"), ([4, 3, 2, 1, 0], "rest-last")):
        folder = write_set(tmp_path / name, BARE, [actions[k] for k in order], [states[k] for k in order])
        assert not LerobotSource(folder).space.binary_gripper


def test_conventions_that_names_contradict_are_taken_and_noted(tmp_path):
    folder = write_set(tmp_path / "set", [f"j{k}_torque" for k in range(3)] + ["gripper"], *episodes("position"))
    with pytest.raises(InputError) as error:
        LerobotSource(folder)
    assert error.value.code == "effort-actions"
    yaml = tmp_path / "own.yaml"
    yaml.write_text(
        f"kind: joint_position\ncontrol_rate: {RATE}\ninstruction: null\naction:\n"
        "  - {key: action, index: [0, 1, 2]}\n  - {role: gripper, key: action, index: [3]}\n"
    )
    source = LerobotSource(folder, yaml)
    assert source.space.kind == "joint_position" and any("j0_torque" in note for note in source.notes)
