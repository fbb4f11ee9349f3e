"""What makes a recording the same one again: its data and the name that its publisher gave it, not the folder it lies in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spvla.errors import InputError
from spvla.files import read_json

TAIL = 32 * 2**10  # bytes read of a Parquet file: its footer, with sizes and extremes of all columns; small files whole


def hub_name(path: Path) -> str | None:
    """``owner--name`` for a folder in the hub's cache (``.../datasets--owner--name/snapshots/HASH``), else None; a folder
    inside the snapshot adds its own path."""
    parts = path.resolve().parts
    for i, part in enumerate(parts[:-2]):
        if part.startswith("datasets--") and parts[i + 1] == "snapshots":
            return "--".join([part.removeprefix("datasets--"), *parts[i + 3 :]])
    return None


def digest(values: Iterable[object]) -> str:
    """A short hash of values."""
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()[:16]


def file_content(path: Path) -> str:
    """A fingerprint of a Parquet file: its size and its last :data:`TAIL` bytes; of one that is not there, nothing."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            return ""
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            return hashlib.sha256(size.to_bytes(8, "little") + stream.read()).hexdigest()[:16]
    except OSError:
        return ""


def place_of(path: str | Path) -> str:
    """A folder, whatever way it was named."""
    return str(Path(path).resolve())


def number_of(metadata: Mapping[str, Any]) -> int | None:
    """The number of an episode in the data set that it was read from: for one that came from a rollout store its row there,
    while ``number`` remains that of the original recording."""
    return metadata.get("row", metadata.get("number"))


def read_note(note: Path) -> dict[str, Any]:
    """What is kept beside a shard (see :class:`data.derive.Shards`), empty where a recorder wrote it. Raises
    :class:`InputError` if it is damaged."""
    if not note.exists():
        return {}
    try:
        values = read_json(note)
        known = {name: values[name] for name in values.keys() | {"size", "episodes", "problems"}}
    except (InputError, KeyError) as error:
        raise InputError(f"{note}: not readable ({error}); delete it to make its shard anew") from None
    return {"changed": {}, "path": None, "part": None, "content": None, "apart": "", **known}
