"""Collecting on real LIBERO physics: killed, split or extended, the store holds exactly the episodes it should."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data.collect import collect
from data.frames import Frames
from data.jobs import episode_seed, parse_range
from data.parallel import Workers, chunks, run_groups
from data.rollout import ActionNoise
from data.store import RolloutStore
from spvla.actions import LIBERO
from spvla.errors import InputError
from spvla.store import read_episodes
from spvla.vlas.conventions import decode_image
from tests.test_train_vla import module

SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
ROOT = Path(__file__).parents[1]
COMMAND = [
    *(sys.executable, "-m", "data", "collect", "--suite", "libero_object", "--tasks", "0", "--init_states", "0-5"),
    *("--noise", "0.3", "--seed", "7", "--output"),
]


def test_ranges():
    assert parse_range("0-2,7, 9-9") == [0, 1, 2, 7, 9]
    for bad in ("", "a", "3-1", "-1", "1-", "1,,2"):
        with pytest.raises(InputError, match="init_states"):
            parse_range(bad)


def test_chunks_cover_everything_in_order():
    for n in range(1, 12):
        parts = chunks(list(range(n)), 4)
        assert [x for part in parts for x in part] == list(range(n)) and len(parts) == min(n, 4) and all(parts)


def test_noise_is_seeded_bounded_and_gentle_when_slow():
    noise, still = ActionNoise(0.4), np.zeros(7, np.float32)
    fast = np.array([1, -1, 0.5, 0, 0, 0, -1], np.float32)

    def draw(seed, action):
        noise.start(LIBERO, seed)
        return np.array([noise(action) for _ in range(50)])

    np.testing.assert_array_equal(draw(3, fast), draw(3, fast))
    assert not np.array_equal(draw(3, fast), draw(4, fast))
    assert np.abs(draw(3, fast)).max() <= 1 and (draw(3, fast)[:, 3:] == fast[3:]).all()
    np.testing.assert_array_equal(draw(3, still), np.tile(still, (50, 1)))


def double(group):
    if group == "bad":
        raise InputError("group 'bad' is bad")
    if group == "crash":
        os._exit(9)
    yield group * 2


@pytest.mark.slow
def test_workers_yield_everything_and_pass_errors_on():
    assert sorted(run_groups(double, [1, 2, 3], workers=2)) == [2, 4, 6]
    with pytest.raises(InputError, match="group 'bad' is bad"):
        list(run_groups(double, [1, "bad"], workers=1))
    with pytest.raises(RuntimeError, match="exit code 9"):
        list(run_groups(double, ["crash"], workers=1))


def load_and_count(fault):
    """For worker processes: loads once, and says with each result how often it did and in which process."""
    if fault is not None:
        raise fault
    loads = []
    loads.append(1)
    return lambda group: iter([(group, len(loads), os.getpid())]), "loaded"


@pytest.mark.slow
def test_each_worker_loads_once_and_says_what_it_loaded():
    with Workers(partial(load_and_count, None), 2) as pool:
        assert pool.facts() == "loaded"
        groups, loads, processes = zip(*pool.run(range(6)), strict=True)
    assert sorted(groups) == list(range(6)) and set(loads) == {1} and 1 <= len(set(processes)) <= 2
    with (
        pytest.raises(InputError, match="cannot be made"),
        Workers(partial(load_and_count, InputError("cannot be made")), 2) as pool,
    ):
        pool.facts()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".tmp"}


@pytest.mark.slow
def test_killed_or_split_the_store_is_the_same(tmp_path):
    """SIGKILL at random moments and start again; two workers; one undisturbed worker: equal to the byte."""
    pytest.importorskip("libero", reason="the libero extra is not installed")
    whole, killed, split = (tmp_path / n for n in ("whole", "killed", "split"))
    subprocess.run([*COMMAND, whole, "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    rng = np.random.default_rng()
    shards = killed / ".shards"
    for target in (1, 3):
        process = subprocess.Popen(
            [*COMMAND, killed, "--workers", "1"],
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(list(shards.glob("[!.]*.parquet"))) < target and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))  # anywhere in the next episode, or while its shard is written
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*COMMAND, killed, "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*COMMAND, split, "--workers", "2"], cwd=ROOT, check=True, capture_output=True)
    assert contents(killed) == contents(whole) and contents(split) == contents(whole)
    store = RolloutStore(whole)
    assert [e.metadata["init_state"] for e in store.episodes] == list(range(6))
    assert len({e.metadata["job"] for e in store.episodes}) == 6
    clean = store.arrays["targets"]
    assert not np.isnan(clean).any() and not np.array_equal(clean, store.arrays["actions"])
    assert store.episodes[0].metadata["seed"] == episode_seed(7, _task(), 0, 0)


def _task():
    from data.envs import load_tasks

    return load_tasks("libero_object", [0])[0]


@pytest.mark.slow
def test_a_student_acts_and_the_teacher_labels_every_step(tmp_path):
    """DAgger with a tiny, untrained student: killed between episodes and started again, images and labels at each step."""
    pytest.importorskip("libero", reason="the libero extra is not installed")
    module(tmp_path / "student").save()
    command = [sys.executable, "-m", "data", "collect", "--suite", "libero_object", "--tasks", "0", "6", "--images", "true"]
    command += ["--instructions", "scene", "--init_states", "3", "--workers", "1", "--student", "nano_vla"]
    command += ["--student_checkpoint", str(tmp_path / "student"), "--output", str(tmp_path / "store")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **SILENT)
    shards = tmp_path / "store" / ".shards"
    while not list(shards.glob("[!.]*.parquet")) and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {p: p.read_bytes() for p in shards.glob("[!.]*.parquet")}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert all(p.read_bytes() == content for p, content in first.items()), "finished episodes stay"
    episodes = list(read_episodes(tmp_path / "store"))
    assert len(episodes) == 2 and {e.metadata["task"] for e in episodes} == {0, 6}
    for e in episodes:
        assert e.vla_actions is not None and np.isfinite(e.vla_actions).all() and len(e.images["agentview"]) == len(e)
        acted = (np.abs(e.vla_actions - e.actions) > 1e-6).any(1).sum()
        assert 0 < acted <= len(e) - e.metadata["student"]["helped"], "the student acts, the teacher helps it out"
        assert decode_image(e.images["agentview"][0]).shape == (256, 256, 3)
    frames = Frames([tmp_path / "store"])
    assert frames.scan() > 150 and np.isfinite(frames[len(frames) - 1].points).all()


@pytest.mark.slow
def test_random_resets_are_as_many_as_asked_for(tmp_path):
    pytest.importorskip("libero", reason="the libero extra is not installed")
    collect("libero_object", tmp_path, tasks=[0], random_resets=2, max_steps=5, workers=1)
    episodes = list(read_episodes(tmp_path))
    assert [e.metadata["init_state"] for e in episodes] == [None, None]
    first, second = (e.environment_states[0] for e in episodes)
    assert np.abs(first - second).max() > 1e-3, "the objects lie elsewhere"
