"""Reading a finalised rollout store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import inside, parse_object, read_json
from spvla.store.columns import read_ages, read_column, read_parquet, read_propensities, read_sources, read_vectors
from spvla.store.episode import VECTOR_COLUMNS, Episode
from spvla.store.lerobot_v3 import DATA_PATH

EPISODE_COLUMNS = {  # of meta/episodes, and what each entry is
    "length": int,
    "dataset_from_index": int,
    "data/file_index": int,
    "tasks": list,
    "success": bool | NoneType,
    "metadata": str,
}


def read_episodes(folder: str | Path) -> Iterator[Episode]:
    """The episodes of a finalised store, in order, images left encoded. See ``data.store`` for training arrays.

    Raises:
        InputError: naming file or episode and field for whatever is damaged.
    """
    folder = Path(folder)
    rows, space = read_episode_table(folder), read_action_space(folder)
    loaded, first, path, part_of = None, 0, folder, pa.table({})
    for number, row in enumerate(rows):
        if row["data/file_index"] != loaded:  # one file in memory at a time
            loaded, first = row["data/file_index"], row["dataset_from_index"]
            path = inside(folder, DATA_PATH.format(chunk_index=0, file_index=loaded))
            part_of = read_parquet(path)
        part, what = part_of.slice(row["dataset_from_index"] - first, row["length"]), f"{path}, episode {number}"
        if part.num_rows != row["length"]:
            raise InputError(f"{what}: holds {part.num_rows} of the {row['length']} steps that meta/episodes claims")
        names = part.column_names
        values = {
            field: read_vectors(part, store, what)
            for field, store in VECTOR_COLUMNS.items()
            if store in names or field == "actions"
        }
        images = {
            n.removeprefix("observation.images."): read_column(part, n, what, pa.types.is_struct, "images")
            .combine_chunks()
            .field("bytes")
            .to_pylist()
            for n in names
            if n.startswith("observation.images.")
        }
        times = read_column(part, "timestamp", what, pa.types.is_floating, "numbers")
        episode = Episode(
            **values,
            instruction=row["tasks"][0],
            timestamps=times.to_numpy().astype(np.float64),
            sources=read_sources(part, what),
            vla_ages=read_ages(part, np.arange(part.num_rows), what),
            vla_propensities=read_propensities(part, what),
            images=images,
            success=row["success"],
            metadata=parse_object(row["metadata"], f"{what}: metadata"),
        )
        episode.check(space, what)
        yield episode


def read_episode_table(folder: str | Path) -> list[dict[str, Any]]:
    """One dict per episode of a finalised store (length, tasks, success, metadata as JSON text, frame range).

    Raises:
        InputError: not finalised, or naming file, episode and field for whatever is damaged.
    """
    folder = Path(folder)
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        if (folder / ".shards").is_dir():
            raise InputError(
                f"{folder}: recording is not finalised; run its command again, or call spvla.store.finalize(folder)"
            )
        raise InputError(f"{folder}: not a rollout store (no meta/episodes)")
    rows: list[dict[str, Any]] = []
    frames = 0
    for file in files:
        for row in read_parquet(inside(folder, file.relative_to(folder))).to_pylist():
            _check_row(row, frames, f"{file}, episode {len(rows)}")
            rows.append(row)
            frames += row["length"]
    if not rows:
        raise InputError(f"{files[0]}: lists no episodes")
    return rows


def _check_row(row: dict[str, Any], frames: int, what: str) -> None:
    """Raise :class:`InputError` unless a row of meta/episodes is whole and follows an episode that ends at ``frames``."""
    for name, kind in EPISODE_COLUMNS.items():
        if name not in row or not isinstance(row[name], kind):
            raise InputError(f"{what}: {name} is {row[name]!r}" if name in row else f"{what}: {name} is missing")
    if row["length"] < 1 or row["dataset_from_index"] != frames:
        told = f"dataset_from_index is {row['dataset_from_index']} and length {row['length']}"
        raise InputError(f"{what}: {told}; the previous episode ends at {frames}")
    if not row["tasks"] or not isinstance(row["tasks"][0], str):
        raise InputError(f"{what}: tasks is {row['tasks']}, expected an instruction")
    parse_object(row["metadata"], f"{what}: metadata")


def read_action_space(folder: str | Path) -> ActionSpace:
    """The action space that a finalised store was recorded in."""
    path = Path(folder) / "meta" / "spvla.json"
    if not path.exists():
        raise InputError(f"{folder}: not a finalised rollout store (no meta/spvla.json)")
    values = read_json(path)
    if "action_space" not in values:
        raise InputError(f"{path}: no action_space")
    return ActionSpace.from_dict(values["action_space"], str(path))
