"""Shared fixtures: a policy that costs nothing, small rollout stores, and where the real recordings lie."""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from spvla.actions import LIBERO, ActionSpace
from spvla.observation import Observation
from spvla.store import Episode, RolloutWriter
from spvla.vlas.base import VLAOutput

settings.register_profile("spvla", deadline=None)
settings.load_profile("spvla")
os.environ.setdefault("OMP_NUM_THREADS", "1")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DATA = Path(__file__).parent / "data"  # NOTICE files say where each folder comes from
BRIDGE = DATA / "bridge_rlds" / "bridge_dataset" / "1.0.0"  # 10 training records; 1 for validation, which repeats
CR5 = DATA / "lerobot_cr5_banana"  # 34 episodes, the first one short and with its video
APPLE = DATA / "lerobot_v3_apple_storage"


def write_records(path: Path, records: list[bytes]) -> None:
    """TFRecord framing, written independently of the reader."""
    import google_crc32c

    def crc(data: bytes) -> int:
        value = google_crc32c.value(data)
        return ((value >> 15 | value << 17) + 0xA282EAD8) % 2**32

    with path.open("wb") as stream:
        for record in records:
            length = struct.pack("<Q", len(record))
            stream.write(length + struct.pack("<I", crc(length)) + record + struct.pack("<I", crc(record)))


TOOLS = {"browser": BROWSER is not None} | {
    name: find_spec(name) is not None for name in ("inspect_robots", "lerobot", "rerun")
}


def pytest_collection_modifyitems(config, items):
    """Tests of tools that are installed elsewhere are not selected here: nothing is skipped for want of data."""
    absent = [item for item in items if any(item.get_closest_marker(name) and not there for name, there in TOOLS.items())]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Derived arrays never touch the user's cache."""
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


class ScriptedVLA:
    """Plays back given actions (T, D); counts its calls."""

    needs_images = False

    def __init__(self, actions: np.ndarray, space: ActionSpace = LIBERO, chunk: int = 1) -> None:
        self.actions, self.action_space, self.chunk = np.asarray(actions, np.float32), space, chunk
        self.calls = 0

    def reset(self, instruction: str) -> None:
        self.calls = 0

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        first = self.calls * self.chunk
        self.calls += 1
        rows = np.arange(first, first + self.chunk) % len(self.actions)
        return VLAOutput(self.actions[rows])


class PrunableVLA(ScriptedVLA):
    """Remembers what it was asked to keep, and reports tokens accordingly."""

    pruner = None

    def with_pruner(self, pruner):
        twin = PrunableVLA(self.actions, self.action_space)
        twin.pruner, twin.asked = pruner, []
        return twin

    def predict(self, observation, keep_mass=1.0):
        self.asked.append(keep_mass)
        return replace(super().predict(observation), visual_tokens=(round(256 * keep_mass), 256))


def smooth_episode(seed: int, steps: int = 60, noise: float = 0.1) -> Episode:
    """An episode whose teacher follows a smooth law of the state: a spiral into a point, gripper closing at the end."""
    g = np.random.default_rng(seed)
    position, target = g.uniform(-0.3, 0.3, 3), np.array([0.0, 0.1, 0.2])
    actions, labels, states = [], [], []
    for t in range(steps):
        label = np.zeros(7, np.float32)
        label[:3] = np.clip(4 * (target - position), -1, 1)
        label[6] = 1.0 if np.linalg.norm(target - position) < 0.05 else -1.0
        action = label.copy()
        action[:3] = np.clip(action[:3] + noise * g.standard_normal(3), -1, 1)
        states.append(np.concatenate([position, [label[6] * 0.04, t * 0.0]]).astype(np.float32))
        actions.append(action)
        labels.append(label)
        position = position + 0.05 * action[:3]
    sources = (g.random(steps) < 0.4).astype(np.uint8)
    sources[0] = 0
    return Episode(
        np.array(actions),
        f"task {seed % 3}",
        np.arange(steps) / 20,
        states=np.array(states),
        sources=sources,
        vla_actions=np.array(labels),
        success=True,
        metadata={"init_state": seed % 30, "suite": "libero_synthetic", "task": seed % 3},
    )


def write_store(folder: Path, seeds: range) -> Path:
    """A finalised store of smooth episodes."""
    writer = RolloutWriter(folder, LIBERO, policy="synthetic")
    for seed in seeds:
        writer.write(f"job-{seed:03d}", [smooth_episode(seed)])
    return writer.finalize()


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory) -> Path:
    """60 episodes: initial states 0-29 twice, so a third is for calibration."""
    return write_store(tmp_path_factory.mktemp("store") / "rollouts", range(60))
