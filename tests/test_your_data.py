"""The example of docs/your_data.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.inspect import inspect
from spvla.store import read_action_space, read_episodes
from spvla.vlas.conventions import decode_image

PAGE = Path(__file__).parents[1] / "docs" / "your_data.md"


@pytest.fixture
def recordings(tmp_path, monkeypatch) -> list[np.ndarray]:
    """Three HDF5 files; their actions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    random, actions = np.random.default_rng(0), []
    for k, steps in enumerate((12, 9, 15)):
        actions.append(random.uniform(-2, 2, (steps, 7)).astype(np.float32))
        actions[-1][:, 6] = random.permutation(steps) % 2
        with h5py.File(tmp_path / "recordings" / f"run_{k}.hdf5", "w") as file:
            file["action"] = actions[-1]
            file["observations/qpos"] = actions[-1].astype(np.float64) - 0.1
            file["observations/images/top"] = np.tile(np.uint8([200, 40, k]), (steps, 16, 24, 1))
            file.attrs["instruction"] = f"stack {k} cups"
    return actions


def run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})


def test_the_example_makes_a_store_and_continues_one(recordings, tmp_path, capsys):
    run()
    store = tmp_path / "runs" / "my_arm"
    episodes = list(read_episodes(store))
    assert [(e.instruction, e.metadata["number"]) for e in episodes] == [(f"stack {k} cups", k) for k in range(3)]
    for episode, actions in zip(episodes, recordings, strict=True):
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_allclose(episode.states, actions - 0.1, rtol=1e-5)
        np.testing.assert_allclose(np.diff(episode.timestamps), 0.02, rtol=1e-4)
        assert decode_image(episode.images["image"][3])[..., 0].mean() == pytest.approx(200, abs=3)  # RGB, not BGR
    space = read_action_space(store)
    assert space.q99[0] == pytest.approx(np.quantile(np.concatenate(recordings)[:, 0], 0.99), abs=0.02)
    inspect(data=store)
    assert "3 episodes, 36 steps at 50 Hz (my_arm, joint_position)" in capsys.readouterr().out

    (store / ".shards" / "run_1.parquet").unlink()
    run()
    assert [len(e) for e in read_episodes(store)] == [12, 9, 15]
