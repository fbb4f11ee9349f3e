"""The LeRobotDataset v3.0 folder around a store's shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import write_json, write_text
from spvla.images import open_image
from spvla.statistics import Statistics
from spvla.store.columns import read_parquet, vectors
from spvla.store.scale import judge_shards, measured_space, wrong_grippers
from spvla.store.shards import require_features, shard_info, shard_schema

CODEBASE_VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_FILE_BYTES = 100 * 2**20
WIDEST_WITH_QUANTILES = 64  # entries of a feature; more (the VLA's pooled features) have mean and spread only
README_TITLE = "# Rollouts on "


def finalize(folder: str | Path) -> Path:
    """Number the episodes of all finished shards, ordered by job id, and write the LeRobot v3.0 folder around them.

    The shards stay, so that a store can be extended and finalised again. In a measured store with a binary gripper, an episode
    in which the gripper has a value that is neither of its ends is left out; ``meta/spvla.json`` lists it. Returns the folder.

    Raises:
        InputError: no shards, damaged ones, ones that hold different features, ``data`` or ``meta`` that are not a store's, or
            grippers that are not binary where the action space says so.
    """
    folder = Path(folder)
    require_own(folder)
    shards = {path: shard_info(path) for path in sorted((folder / ".shards").glob("*.parquet"))}
    if not shards:
        raise InputError(f"{folder}: no finished shards under .shards, nothing to finalise")
    first, info = next(iter(shards.items()))
    space = ActionSpace.from_dict(info["action_space"], str(first))
    measured = any(info["measured"] for info in shards.values())
    grippers = judge_shards(shards, space) if measured and space.binary_gripper and space.gripper else []
    building = folder / ".building"
    shutil.rmtree(building, ignore_errors=True)
    contents = _write_data(building, shards, wrong_grippers(space, grippers))
    if not contents.rows:
        raise InputError(
            f"{folder}: every episode was left out; {contents.left_out[0]['reason']}", code="no-episodes", field="action"
        )
    if measured:
        space = measured_space(space, contents.stats["action"], [(g.low, g.high) for g in grippers])
    policies = sorted({info["policy"] for info in shards.values()})
    _write_meta(building / "meta", contents, space, policies)
    for name in ("meta", "data"):  # meta goes first and comes last: a store with meta is whole
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("data", "meta"):
        (building / name).rename(folder / name)
    building.rmdir()
    readme = folder / "README.md"
    if not readme.exists() or README_TITLE in readme.read_text(errors="replace"):  # any other README is the user's
        write_text(readme, _readme(space, contents))
    return folder


@dataclass
class _Contents:
    """What the data files hold, as it grows while they are written.

    Args:
        schema: of the data files.
        image_shapes: height, width and channels by image column.
        stats: statistics by vector column.
        rows: one row of ``meta/episodes`` per episode.
        tasks: number by instruction.
        frames: steps of all episodes.
        left_out: what could not be used, as ``meta/spvla.json`` lists it.
    """

    schema: pa.Schema
    image_shapes: dict[str, list[int]]
    stats: dict[str, Statistics]
    rows: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def add(self, table: pa.Table, episodes: list[dict[str, Any]], file_index: int, facts: dict[str, Any]) -> pa.Table:
        """Count in the steps of ``episodes``; returns them as they stand in the data file ``file_index``. ``facts`` are
        added to the metadata of each."""
        for name, statistics in self.stats.items():
            statistics.add(vectors(table[name]))
        lengths = [e["length"] for e in episodes]
        first, tasks = len(self.rows), []
        for e in episodes:
            tasks.append(self.tasks.setdefault(e["instruction"], len(self.tasks)))
            self.rows.append(
                {
                    "episode_index": len(self.rows),
                    "data/chunk_index": 0,
                    "data/file_index": file_index,
                    "dataset_from_index": self.frames,
                    "dataset_to_index": self.frames + e["length"],
                    "tasks": [e["instruction"]],
                    "length": e["length"],
                    "success": e["success"],
                    "metadata": json.dumps({**e["metadata"], **facts}),
                }
            )
            self.frames += e["length"]
        numbers = {
            "episode_index": np.repeat(np.arange(first, len(self.rows)), lengths),
            "index": np.arange(self.frames - sum(lengths), self.frames),
            "task_index": np.repeat(tasks, lengths),
        }
        for name, values in numbers.items():
            table = table.append_column(name, pa.array(values, pa.int64()))
        return table.replace_schema_metadata(self.schema.metadata)


def _write_data(building: Path, shards: Mapping[Path, dict[str, Any]], left_out: Mapping[int, str]) -> _Contents:
    """Write the data files: the steps of all shards but those of the episodes ``left_out``, which are counted over all."""
    first = next(iter(shards))
    schema = shard_schema(first).remove_metadata()
    contents = _empty(first, schema)
    number = 0  # of episodes so far, those left out too
    with closing(_DataFiles(building, contents.schema)) as files:
        for path, info in shards.items():
            table = read_parquet(path).replace_schema_metadata(None)
            require_features(table.schema, schema, str(first), str(path))
            episodes = info["episodes"]
            lengths = [e["length"] for e in episodes]
            if sum(lengths) != table.num_rows:
                told = f"holds {table.num_rows} steps, its episodes have {sum(lengths)}"
                raise InputError(f"{path}: {told}; delete it to do its job again")
            kept = [number + i not in left_out for i in range(len(episodes))]
            contents.left_out += [
                {"file": str(path), "record": e["metadata"].get("number", i), "field": "action", "reason": left_out[number + i]}
                for i, e in enumerate(episodes)
                if not kept[i]
            ]
            number += len(kept)
            if any(kept):
                table = table.select(schema.names)
                table = table if all(kept) else table.filter(np.repeat(kept, lengths))
                episodes = [e for e, keep in zip(episodes, kept, strict=True) if keep]
                files.write(contents.add(table, episodes, files.index, {"job": path.stem, "policy": info["policy"]}))
    return contents


def _empty(shard: Path, schema: pa.Schema) -> _Contents:
    """The contents of a store with the features of ``shard``, before any episode."""
    widths = {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}
    stats = {name: Statistics(quantiles=width <= WIDEST_WITH_QUANTILES) for name, width in widths.items()}
    for name in ("episode_index", "index", "task_index"):
        schema = schema.append(pa.field(name, pa.int64()))
    image_shapes: dict[str, list[int]] = {}
    if cameras := [f.name for f in schema if pa.types.is_struct(f.type)]:
        images = read_parquet(shard, cameras)
        image_shapes = {name: _image_shape(images[name], f"{shard}: {name}") for name in cameras}
        schema = _described(schema)
    return _Contents(schema, image_shapes, stats)


class _DataFiles:
    """The files under ``data``; another one begins when one has :data:`DATA_FILE_BYTES`.

    Attributes:
        index: of the file that the next table goes to.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema, self.index = folder, schema, 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append a table."""
        path = self.folder / DATA_PATH.format(chunk_index=0, file_index=self.index)
        if self._writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, self.schema, compression="zstd", write_page_checksum=True)
        self._writer.write_table(table)
        if path.stat().st_size > DATA_FILE_BYTES:
            self.close()
            self.index += 1

    def close(self) -> None:
        """Finish the last file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _write_meta(meta: Path, contents: _Contents, space: ActionSpace, policies: list[str]) -> None:
    """Write the files under ``meta``."""
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    episodes = meta / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pa.Table.from_pylist(contents.rows), episodes, write_page_checksum=True)
    _write_tasks(meta / "tasks.parquet", list(contents.tasks))
    write_json(meta / "stats.json", {name: s.result() for name, s in contents.stats.items() if s.count})
    write_json(meta / "info.json", _info(contents, space))
    about = {"action_space": space.to_dict(), "policies": policies}
    write_json(meta / "spvla.json", about | ({"left_out": contents.left_out} if contents.left_out else {}))


def _info(contents: _Contents, space: ActionSpace) -> dict[str, Any]:
    """``meta/info.json``, as LeRobot defines it."""
    fps = space.control_rate
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": space.name,
        "total_episodes": len(contents.rows),
        "total_frames": contents.frames,
        "total_tasks": len(contents.tasks),
        "chunks_size": 1000,
        "fps": int(fps) if float(fps).is_integer() else fps,
        "splits": {"train": f"0:{len(contents.rows)}"},
        "data_path": DATA_PATH,
        "video_path": None,
        "features": {f.name: _feature(f.type, fps, contents.image_shapes.get(f.name, [])) for f in contents.schema},
        "data_files_size_in_mb": DATA_FILE_BYTES // 2**20,
    }


def require_own(folder: Path) -> None:
    """Raise :class:`InputError` if :func:`finalize` would replace ``data`` or ``meta`` that it did not make from shards."""
    there = [folder / name for name in ("data", "meta") if (folder / name).exists()]
    shards = any((folder / ".shards").glob("*.parquet"))
    if there and not (shards and ((folder / "meta" / "spvla.json").exists() or not (folder / "meta").exists())):
        names = " and ".join(path.name for path in there)
        raise InputError(
            f"{folder}: has {names}, but no .shards folder to rebuild them from; choose another folder, or "
            "copy .shards too if this is a copy of a rollout store"
        )
    for path in (p for kind in there for p in sorted(kind.rglob("[!.]*"))):
        if path.is_file() and path.suffix not in (".parquet", ".json"):
            raise InputError(f"{path}: not part of a rollout store and would be deleted; move it or choose another folder")


def _described(schema: pa.Schema) -> pa.Schema:
    """``schema`` with the note by which Hugging Face ``datasets`` decodes image columns."""

    def kind(column: pa.DataType) -> dict[str, Any]:
        if pa.types.is_struct(column):
            return {"_type": "Image"}
        if pa.types.is_fixed_size_list(column):
            return {"feature": kind(column.value_type), "length": column.list_size, "_type": "List"}
        return {"dtype": _dtype(column), "_type": "Value"}

    note = {"info": {"features": {f.name: kind(f.type) for f in schema}}}
    return schema.with_metadata({b"huggingface": json.dumps(note).encode()})


def _feature(column: pa.DataType, fps: float, image_shape: list[int]) -> dict[str, Any]:
    """A column as LeRobot's meta/info.json describes it."""
    if pa.types.is_fixed_size_list(column):
        return {"dtype": "float32", "shape": [column.list_size], "names": None, "fps": fps}
    if pa.types.is_struct(column):
        return {"dtype": "image", "shape": image_shape, "names": ["height", "width", "channel"], "fps": fps}
    return {"dtype": _dtype(column), "shape": [1], "names": None, "fps": fps}


def _dtype(column: pa.DataType) -> str:
    return str(column).replace("float", "float32")


def _image_shape(images: pa.ChunkedArray, what: str) -> list[int]:
    """Height, width and channels of the first image of a column; an :class:`InputError` names ``what`` if it is no image."""
    if not len(images):
        raise InputError(f"{what}: there are no steps", code="damaged", field=what)
    try:
        with open_image(images[0]["bytes"].as_py()) as image:
            return [image.height, image.width, len(image.getbands())]
    except InputError as error:
        raise InputError(f"{what}: the first image {error}", code=error.code, field=what) from None


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """LeRobot reads tasks as a data frame indexed by the instruction; this writes that form without pandas."""
    index = "__index_level_0__"
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": None, "field_name": index, **text},
        ],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()}), path)


def _readme(space: ActionSpace, contents: _Contents) -> str:
    return (
        "---\nconfigs:\n- config_name: default\n  data_files: data/*/*.parquet\ntags:\n- LeRobot\n- robotics\n---\n\n"
        f"{README_TITLE}{space.name}\n\n{len(contents.rows)} episodes, {contents.frames} frames at {space.control_rate:g} Hz, "
        f"in LeRobotDataset {CODEBASE_VERSION} form.\n\nExtra features: `vla_action` (the teacher's action at the visited "
        "state), `vla_confidence`, `vla_features`, `vla_plan` (the VLA's whole plan at the state, action after action), "
        "`vla_again` (the first action of a second plan), `action.source` (0: the VLA acted, 1: the generator did, 2: nobody, "
        "the robot held or stopped, 3: an earlier plan of the VLA was kept), `vla_age` (steps since the state that the VLA "
        "last answered about, where it answers late), "
        "`vla_propensity` (probability with which the step was to get the VLA's action, where a coin decided on some).\n"
    )
