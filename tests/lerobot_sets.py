"""Small LeRobot folders with known numbers, to be stored in other forms by the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

JOINTS = ["elbow_vel", "wrist_vel", "gripper"]
STEPS = 12
RATE = 20.0

Column = pa.Array | pa.ChunkedArray
Change = Callable[[str, Column], Column | None]


def actions(episode: int, steps: int = STEPS) -> np.ndarray:
    """Two joint velocities and a gripper, float32 (T, 3)."""
    moves = np.random.default_rng(episode).normal(size=(steps, 2))
    return np.concatenate([moves, (np.arange(steps) % 4 > 1)[:, None]], 1).astype(np.float32)


def times(steps: int = STEPS) -> np.ndarray:
    return np.arange(steps) / RATE


def columns(episode: int, steps: int = STEPS, task: int = 0) -> dict[str, pa.Array]:
    return {
        "action": pa.array(actions(episode, steps).tolist(), pa.list_(pa.float32())),
        "observation.state": pa.array(actions(episode + 100, steps)[:, :2].tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array(times(steps), pa.float32()),
        "frame_index": pa.array(range(steps), pa.int64()),
        "episode_index": pa.array([episode] * steps, pa.int64()),
        "task_index": pa.array([task] * steps, pa.int64()),
    }


def write_set(
    folder: Path,
    version: str = "v2.1",
    episodes: int = 3,
    change: Change = lambda name, column: column,
    extra: Mapping[str, Callable[[int], Column]] = {},
    tasks: Mapping[int, str] = {0: "stack the cups"},
    task_of: Callable[[int], int] = lambda episode: 0,
    steps: Callable[[int], int] = lambda episode: STEPS,
    cameras: Mapping[str, str] = {},
    listed: bool = True,
    **info: Any,
) -> Path:
    """A folder of that version. ``change`` stores a column in another form (None: not at all), ``extra`` adds columns by
    episode, ``listed``: ``meta/`` names each episode's task in words."""
    tables = []
    for k in range(episodes):
        stored = {name: change(name, column) for name, column in columns(k, steps(k), task_of(k)).items()}
        stored |= {name: make(k) for name, make in extra.items()}
        tables.append(pa.table({name: column for name, column in stored.items() if column is not None}))
    about = [{"episode_index": k, "length": steps(k)} for k in range(episodes)]
    if listed:
        about = [entry | {"tasks": [tasks[task_of(k)]]} for k, entry in enumerate(about)]
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    if version == "v3.0":
        pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(about), folder / "meta/episodes/chunk-000/file-000.parquet")
        words = {"task_index": pa.array(list(tasks), pa.int64()), "__index_level_0__": pa.array(list(tasks.values()))}
        pq.write_table(pa.table(words), folder / "meta/tasks.parquet")
    else:
        for k, table in enumerate(tables):
            pq.write_table(table, folder / f"data/chunk-000/episode_{k:06d}.parquet")
        write_lines(folder / "meta/episodes.jsonl", about)
        write_lines(folder / "meta/tasks.jsonl", [{"task_index": i, "task": words} for i, words in tasks.items()])
    features = {
        "action": {"dtype": "float32", "shape": [3], "names": JOINTS},
        "observation.state": {"dtype": "float32", "shape": [2], "names": ["elbow", "wrist"]},
        **{name: {"dtype": "float32", "shape": [1], "names": None} for name in extra},
        **{name: {"dtype": kind, "shape": [48, 64, 3]} for name, kind in cameras.items()},
    }
    values = {"codebase_version": version, "robot_type": "toy", "fps": RATE, "chunks_size": 1000, "features": features}
    values |= {"total_episodes": episodes, "total_frames": sum(map(steps, range(episodes)))}
    values["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    if version == "v3.0":
        values["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    (folder / "meta/info.json").write_text(json.dumps(values | info))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
