"""Shards: the episodes of one job as one Parquet file, with what they are as JSON in its metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spvla.errors import InputError
from spvla.files import inside, parse_object
from spvla.store.columns import is_vectors, one_line
from spvla.store.episode import VECTOR_COLUMNS, Episode

SHARD_KEY = b"spvla"
SUM_KEY = b"spvla_sha256"  # of what SHARD_KEY holds: Parquet's own check sums cover columns alone


def shard_metadata(text: bytes) -> dict[bytes, bytes]:
    """A shard's metadata and its check sum."""
    return {SHARD_KEY: text, SUM_KEY: digest(text)}


def digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def to_table(episode: Episode) -> pa.Table:
    steps = len(episode)
    columns: dict[str, pa.Array] = {
        store: _vectors(getattr(episode, name)) for name, store in VECTOR_COLUMNS.items() if getattr(episode, name) is not None
    }
    sources = np.zeros(steps, np.int64) if episode.sources is None else episode.sources.astype(np.int64)
    columns["action.source"] = pa.array(sources)
    if episode.vla_ages is not None:
        columns["vla_age"] = pa.array(episode.vla_ages.astype(np.int64))
    if episode.vla_propensities is not None:
        columns["vla_propensity"] = pa.array(episode.vla_propensities.astype(np.float32))
    for camera, frames in episode.images.items():
        fields = [pa.array(list(frames), pa.binary()), pa.nulls(steps, pa.string())]
        columns[f"observation.images.{camera}"] = pa.StructArray.from_arrays(fields, ["bytes", "path"])
    columns["timestamp"] = pa.array(episode.timestamps.astype(np.float32))
    columns["frame_index"] = pa.array(np.arange(steps, dtype=np.int64))
    return pa.table(columns)


def _vectors(values: NDArray[np.floating]) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def shard_info(path: Path) -> dict[str, Any]:
    """A shard's own metadata: ``action_space``, ``policy``, ``measured`` and one dict per episode (see
    :class:`RolloutWriter`)."""
    schema = shard_schema(path)
    try:
        text = schema.metadata[SHARD_KEY]
        if schema.metadata.get(SUM_KEY, digest(text)) != digest(text):  # earlier versions wrote none
            raise InputError("the SHA-256 of its metadata differs")
        info = parse_object(text, str(path))
        [e[name] for e in info["episodes"] for name in ("length", "instruction", "success", "metadata")]
        return {name: info[name] for name in ("action_space", "policy", "episodes")} | {"measured": info.get("measured", False)}
    except (InputError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def shard_schema(path: Path) -> pa.Schema:
    try:
        schema = pq.read_schema(inside(path.parent, path.name))
        _ = schema.names  # text that is none
        return schema
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"{path}: incomplete or damaged shard of a rollout store ({one_line(error)}); delete it, and its job will run again"
    )


def require_features(schema: pa.Schema, expected: pa.Schema, where: str, what: str) -> None:
    """Raise :class:`InputError` naming ``what`` and the features in which ``schema`` differs from that of ``where``."""

    def forms(schema: pa.Schema) -> dict[str, str]:
        return {f.name: f"{f.type.list_size} entries" if is_vectors(f.type) else str(f.type) for f in schema}

    mine, theirs = forms(schema), forms(expected)
    odd = [n for n in sorted(mine.keys() | theirs.keys()) if mine.get(n) != theirs.get(n)]
    if odd:
        told = "; ".join(f"{n} (here {mine.get(n, 'absent')}, there {theirs.get(n, 'absent')})" for n in odd)
        raise InputError(f"{what}: features differ from those of {where}: {told}; choose another store")
