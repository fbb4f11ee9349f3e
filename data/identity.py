"""What makes a recording the same one again: its data and the name that its publisher gave it, not the folder it lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spvla.errors import InputError
from spvla.store.shards import shard_info

if TYPE_CHECKING:
    from data.convert import Setting, Shards
    from data.sources import Source

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
    """What is kept beside a shard (see :class:`data.convert.Shards`), empty where a recorder wrote it. Raises
    :class:`InputError` if it is damaged."""
    try:
        values = json.loads(note.read_text())
        known = {name: values[name] for name in values.keys() | {"size", "episodes", "problems"}}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{note}: not readable ({error!r}); delete it to make its shard anew") from None
    return {"changed": {}, "path": None, "part": None, "content": None, "apart": "", **known}


def settle(output: Path, setting: Setting, source: Source) -> Setting:
    """``setting`` with what tells the data set apart in the store from another one whose folder has the same name. A data set
    that its publisher named needs none, and one that was moved is known by its data."""
    if source.named:
        return setting
    contents = {part.id: part.content for part in source.parts}
    notes = [read_note(note) for note in sorted((output / ".shards").glob("*.json"))]
    namesakes = [n for n in notes if n["part"] in contents]
    for n in namesakes:
        if n["path"] == place_of(setting.path) or n["content"] == contents[n["part"]]:
            return replace(setting, apart=n["apart"])
    place = hashlib.sha256(place_of(setting.path).encode()).hexdigest()[:6]
    return replace(setting, apart=f"-{place}") if namesakes else setting


def require_new(shards: Shards, source: Source) -> None:
    """Raise :class:`InputError`, code ``episode-twice``, if the store would hold episodes of ``source`` twice: those that are
    there were made with other options, or read from a copy or another state of it elsewhere."""
    setting = shards.setting
    mine = {setting.job(part) for part in source.parts}
    wanted = {f"{part.id}{setting.apart}" for part in source.parts}
    chosen = source.contents.keys() if setting.episodes is None else set(setting.episodes)
    contents = {content for number, content in source.contents.items() if number in chosen}
    for shard in sorted(shards.writer.shards.glob("*.parquet")):
        if shard.stem in mine:
            continue
        there = [e["metadata"] for e in shard_info(shard)["episodes"]]
        how = "made with other options"
        if shard.stem.rpartition("-")[0] in wanted:
            twice = [m for m in there if setting.episodes is None or number_of(m) in setting.episodes]
        else:
            twice = [m for m in there if {(m.get("content"),), (m.get("content"), m.get("part"))} & contents]
            how = f"read from {read_note(shard.with_suffix('.json')).get('path')}"
        if twice:
            raise _twice(shard, f"holds {len(twice)} of these episodes already, {how}")
    _require_same_place(shards, source)


def _require_same_place(shards: Shards, source: Source) -> None:
    """The same for shards of the very same jobs. A stopped run goes on from a copy of the data set, a finished one does not."""
    place = place_of(shards.setting.path)
    notes = {part: read_note(shards.note(part)) for part in source.parts if shards.note(part).exists()}
    elsewhere = {part: n for part, n in notes.items() if n["path"] not in (None, place)}
    for part, n in elsewhere.items():
        if source.named and n["content"] != part.content:
            told = f"holds these episodes of {source.name} already, in another state, read from {n['path']}"
            raise _twice(shards.note(part), told)
    if len(elsewhere) == len(source.parts) and all(map(shards.finished, source.parts)):
        there = next(n["path"] for n in elsewhere.values())
        if Path(there).exists():
            raise _twice(shards.writer.folder, f"holds all episodes of {place} already, read from {there}")


def _twice(where: Path, told: str) -> InputError:
    message = f"{where}: {told}; name another --output or other --episodes"
    return InputError(message, code="episode-twice", field=str(where))
