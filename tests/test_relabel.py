"""Relabelling: the same store from any number of processes, killed or not, and what happens to frames that are no good."""

from __future__ import annotations

import io
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
from PIL import Image

import data.batches
import data.relabel
from data.relabel import relabel
from data.rlds.tfrecord import read_records, scan
from spvla.actions import LIBERO, ActionSpace
from spvla.errors import InputError
from spvla.export import load_export
from spvla.observation import Observation
from spvla.store import Episode, RolloutWriter, read_episodes
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import decode_image
from spvla.vlas.registry import load_vla
from tests.conftest import BRIDGE, DATA, write_records

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]


def bridge_space(dim: int = 7) -> ActionSpace:
    return ActionSpace(
        name="bridge_orig",
        kind="eef_delta",
        control_rate=5,
        q01=(-1,) * dim,
        q99=(1,) * dim,
        low=(-1,) * dim,
        high=(1,) * dim,
        translation=(0, 1, 2),
        rotation=(3, 4, 5),
        gripper=(6,),
    )


class SeeingVLA:
    """Its action says what it saw: the image's mean, the instruction's length, the state's first entry."""

    def __init__(self, space: ActionSpace, batched: bool = True) -> None:
        self.action_space = space
        self.batches: list[int] = []
        if batched:
            self.predict_batch = self._predict_batch

    def reset(self, instruction: str) -> None:
        self.instruction = instruction

    def predict(self, observation, keep_mass: float = 1.0) -> VLAOutput:
        action = np.zeros((1, self.action_space.dim), np.float32)
        action[0, :3] = observation.image.mean() / 255, len(self.instruction) / 100, observation.state[0]
        return VLAOutput(action, confidence=np.full(7, 0.5, np.float32), features=action[0, :2])

    def _predict_batch(self, observations, instructions):
        self.batches.append(len(observations))
        out = []
        for observation, instruction in zip(observations, instructions, strict=True):
            self.reset(instruction)
            out.append(self.predict(observation))
        return out


def seeing(checkpoint: str | None) -> SeeingVLA:
    """A factory for other processes: ``tests.test_relabel:seeing``."""
    return SeeingVLA(bridge_space())


@pytest.fixture
def bridge() -> Path:
    return BRIDGE


@pytest.fixture
def two_shards(tmp_path) -> Path:
    """Bridge's training records in two shards, which are two parts of the work."""
    folder = shutil.copytree(BRIDGE, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    records = [r for _, r in read_records(scan(path))]
    path.unlink()
    for k, rows in enumerate((records[:6], records[6:])):
        write_records(path.with_name(path.name.replace("00000-of-00001", f"{k:05d}-of-00002")), rows)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["6", "4"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def vla(monkeypatch) -> SeeingVLA:
    policy = SeeingVLA(bridge_space())
    monkeypatch.setattr(data.relabel, "load_vla", lambda *args: policy)
    return policy


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for kind in ("data", "meta") for p in sorted((folder / kind).rglob("*.*"))
    }


def run(output: Path, bridge: Path, **options) -> None:
    relabel(output, "seeing", source="rlds", path=bridge, decode_ahead=False, **options)


def test_labels_are_of_the_right_frames(bridge, vla, tmp_path):
    run(tmp_path / "store", bridge, images=True)
    episodes = list(read_episodes(tmp_path / "store"))
    assert len(episodes) == 10 and max(vla.batches) == 32
    for episode in episodes:
        for t, encoded in enumerate(episode.images["image_0"]):
            saw = decode_image(encoded).mean() / 255
            expected = [saw, len(episode.instruction) / 100, episode.states[t, 0]]
            np.testing.assert_allclose(episode.vla_actions[t, :3], expected, rtol=1e-6)
        np.testing.assert_array_equal(episode.vla_confidence, 0.5)
        assert episode.vla_features.shape == (8, 2)


def test_batching_changes_nothing(bridge, vla, tmp_path, monkeypatch):
    run(tmp_path / "a", bridge)
    run(tmp_path / "b", bridge, batch_size=5)
    single = SeeingVLA(bridge_space(), batched=False)
    monkeypatch.setattr(data.relabel, "load_vla", lambda *args: single)
    run(tmp_path / "c", bridge)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_a_vla_with_a_memory_is_reset_between_episodes_alone(bridge, tmp_path, monkeypatch):
    class Counting(SeeingVLA):
        def reset(self, instruction):
            super().reset(instruction)
            self.steps = -1

        def predict(self, observation, keep_mass=1.0):
            self.steps += 1
            return VLAOutput(np.full((1, 7), self.steps, np.float32))

    monkeypatch.setattr(data.relabel, "load_vla", lambda *args: Counting(bridge_space(), batched=False))
    run(tmp_path / "store", bridge, batch_size=5)
    for episode in read_episodes(tmp_path / "store"):
        assert episode.vla_actions[:, 0].tolist() == list(range(len(episode)))


def test_a_store_without_images_is_told_plainly(tmp_path, capsys):
    writer = RolloutWriter(tmp_path / "blind", LIBERO)
    writer.write("a", [Episode(np.zeros((4, 7), np.float32), "go", np.arange(4) / 20)])
    with pytest.raises(InputError, match="blind: has no images"):
        relabel(tmp_path / "new", "seeing", data=writer.finalize())
    assert not (tmp_path / "new").exists()


def test_errors_of_the_decoding_worker_lose_their_traceback():
    def worker():
        yield 1
        raise InputError(
            "Caught InputError in DataLoader worker process 0.\nTraceback ...\nspvla.errors.InputError: a.png: bad\n"
        )

    items = data.batches.without_traceback(worker())
    assert next(items) == 1
    with pytest.raises(InputError, match=r"^a\.png: bad$"):
        next(items)


def test_what_is_finished_is_not_done_again(two_shards, vla, tmp_path):
    run(tmp_path / "store", two_shards)
    whole = tree(tmp_path / "store")
    shards = sorted((tmp_path / "store" / ".shards").glob("*.parquet"))
    assert len(shards) == 2
    shards[1].unlink()
    vla.batches.clear()
    run(tmp_path / "store", two_shards)
    assert sum(vla.batches) == 4 * 8  # the second part's episodes alone
    assert tree(tmp_path / "store") == whole


def test_a_rollout_store_can_be_relabelled(vla, tmp_path, monkeypatch):
    writer = RolloutWriter(tmp_path / "old", LIBERO)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(stream, "PNG")
    frames = [stream.getvalue()] * 4
    actions, states = np.full((4, 7), 0.25, np.float32), np.full((4, 2), 0.5, np.float32)
    writer.write("a", [Episode(actions, "go", np.arange(4) / 20, states, images={"main": frames}, metadata={"init_state": 3})])
    writer.finalize()
    policy = SeeingVLA(LIBERO)
    monkeypatch.setattr(data.relabel, "load_vla", lambda *args: policy)
    relabel(tmp_path / "new", "seeing", data=tmp_path / "old", decode_ahead=False)
    (episode,) = read_episodes(tmp_path / "new")
    np.testing.assert_array_equal(episode.actions, actions)
    assert episode.vla_actions[0, 2] == 0.5 and episode.metadata["init_state"] == 3


def test_bad_frames_are_named_and_the_rest_labelled(bridge, vla, tmp_path):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    path = next(folder.glob("*-train.tfrecord*"))
    records = [r for _, r in read_records(scan(path))]
    records[2] = records[2].replace(b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x00")
    records[4] = records[4].replace(b"steps/observation/state", b"steps/observation/stute")
    write_records(path, records)
    content = bytearray(path.read_bytes())
    content[scan(path).offsets[6] + 50] ^= 1
    cut = scan(path).offsets[8] + 1000
    path.write_bytes(content[:cut])
    with pytest.raises(InputError, match="record 2, field observation/image_0: the image of step 0 cannot be read"):
        run(tmp_path / "store", folder)
    run(tmp_path / "store", folder, on_error="skip")
    left_out = json.loads((tmp_path / "store" / "problems.json").read_text())
    assert {(p["record"], p["field"]) for p in left_out} == {
        (2, "observation/image_0"),
        (4, "observation/state"),
        (6, None),
        (8, None),
    }
    episodes = list(read_episodes(tmp_path / "store"))
    assert sorted(e.metadata["record"] for e in episodes) == [i for i in range(8) if i not in (2, 4, 6)]


def test_a_black_camera_is_refused(bridge, vla, tmp_path):
    with pytest.raises(InputError, match="field observation/image_3: every image has one colour only"):
        run(tmp_path / "store", bridge, camera="observation/image_3")
    with pytest.raises(InputError, match=r"no episode could be used; the first problem: .*one colour only"):
        run(tmp_path / "store", bridge, camera="observation/image_3", on_error="skip")


def test_wrong_image_shapes_are_named(bridge, vla, tmp_path):
    folder = shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0")
    (folder / "features.json").write_text((folder / "features.json").read_text().replace('"64"', '"96"'))
    with pytest.raises(InputError, match=r"the image of step 0 is \(64, 64, 3\), the data set says \(96, 96, 3\)"):
        run(tmp_path / "store", folder)


def test_action_spaces_must_fit(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(data.relabel, "load_vla", lambda *args: SeeingVLA(bridge_space(8)))
    with pytest.raises(InputError, match="dim = 8"):
        run(tmp_path / "store", bridge)
    with pytest.raises(InputError, match="give either data"):
        relabel(tmp_path / "store", "seeing")


def test_two_processes_and_a_kill_give_the_same_store(two_shards, tmp_path):
    """Over Bridge: one process, two processes, and one that is killed and started again on two."""

    def command(output: str, *more: str) -> list[str]:
        base = ["-m", "data", "relabel", "--source", "rlds", "--path", str(two_shards), "--output", str(tmp_path / output)]
        return [
            sys.executable,
            *base,
            "--vla",
            "tests.test_relabel:seeing",
            "--accelerator",
            "cpu",
            "--batch_size",
            "8",
            *more,
        ]

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command("one"), check=True, env=environment, cwd=ROOT)
    subprocess.run(command("two", "--devices", "2"), check=True, env=environment, cwd=ROOT)
    victim = subprocess.Popen(command("killed", "--decode_ahead", "false"), env=environment, cwd=ROOT, start_new_session=True)
    shards = tmp_path / "killed" / ".shards"
    while not list(shards.glob("[!.]*.parquet")) and victim.poll() is None:
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    kept = {p: p.stat().st_mtime_ns for p in shards.glob("[!.]*.parquet")}
    subprocess.run(command("killed", "--devices", "2", "--decode_ahead", "false"), check=True, env=environment, cwd=ROOT)
    assert kept and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "killed")


def test_labels_of_the_tiny_openvla_are_its_own_actions(bridge, tmp_path):
    options = {"unnorm_key": "bridge_orig"}
    checkpoint = str(DATA / "openvla_tiny")
    relabel(
        tmp_path / "store",
        "openvla",
        checkpoint,
        options,
        source="rlds",
        path=bridge,
        images=True,
        episodes="3",
        decode_ahead=False,
    )
    (episode,) = read_episodes(tmp_path / "store")
    vla = load_vla("openvla", checkpoint, options)
    vla.reset(episode.instruction)
    for t in (0, 5):
        output = vla.predict(Observation(decode_image(episode.images["image_0"][t])))
        np.testing.assert_allclose(episode.vla_actions[t], output.actions[0], atol=1e-6)
        np.testing.assert_allclose(episode.vla_confidence[t], output.confidence, rtol=1e-3)
        np.testing.assert_allclose(episode.vla_features[t], output.features, atol=1e-3)


def test_from_rlds_to_an_export_in_one_command(tmp_path):
    """configs/distill/openx.yaml as it is, with few steps; called again, it labels nothing anew."""
    command = [sys.executable, "-m", "train", "distill", "--config", "configs/distill/openx.yaml", "--steps", "3"]
    command += ["--gate_steps", "3", "--output", str(tmp_path / "export")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    export = load_export(tmp_path / "export")
    assert export.space.control_rate == 5 and set(export.gates) == {"mlp", "ridge"}
    (store,) = (tmp_path / "export" / ".relabelled").iterdir()
    assert store.name.startswith("bridge_dataset-")
    episodes = list(read_episodes(store))
    assert len(episodes) == 10 and all(np.isfinite(e.vla_actions).all() for e in episodes)
    times = {p: p.stat().st_mtime_ns for p in (store / ".shards").glob("*.parquet")}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert times == {p: p.stat().st_mtime_ns for p in (store / ".shards").glob("*.parquet")}


def test_a_data_set_is_not_its_own_output(vla, store_folder):
    before = tree(store_folder)
    with pytest.raises(InputError, match="--output is the data set itself"):
        relabel(store_folder, "seeing", data=store_folder)
    assert tree(store_folder) == before


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"accelerator": "abacus"}, {"devices": 0}, {"devices": -3}, {"num_nodes": 0}]
)
def test_bad_options_are_named(bridge, tmp_path, options):
    (name,) = options
    with pytest.raises(InputError, match=f"relabel: .*{name} "):
        run(tmp_path / "store", bridge, **{"accelerator": "cpu"} | options)
    assert not (tmp_path / "store").exists()
