"""What a LeRobot folder holds, whatever its version: where each episode's rows and videos are, and what ``meta/`` says of them.

v2.x keeps one Parquet file and one video per episode, v3.0 puts many episodes into each file
(https://huggingface.co/docs/lerobot/lerobot-dataset-v3).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.cameras import Cameras, is_depth
from data.parts import Problem
from spvla.episodes import read_parquet
from spvla.errors import InputError

VERSIONS = ("v2.0", "v2.1", "v3.0")
DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"


@dataclass(frozen=True)
class EpisodeRows:
    """Where an episode's rows are.

    Args:
        number: its ``episode_index``; None for a file of which nobody can tell what it holds.
        file: the Parquet file.
        first, length: its first row there, and how many.
        meta: what ``meta/`` says of it.
        problem: why it cannot be used, if that is known already.
    """

    number: int | None
    file: Path
    first: int = 0
    length: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def tasks(self) -> list[str]:
        """The words that ``meta/`` has for the episode as a whole."""
        told = self.meta.get("tasks")
        return [told] if isinstance(told, str) else [] if told is None else [str(text) for text in told]


class Layout:
    """The files of a LeRobot folder.

    Args:
        path: the folder, with ``meta/info.json``.

    Raises:
        InputError: not such a folder, another version, no episodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = path / "meta" / "info.json"
        self.info = _read_json(self.about)
        self.features: dict[str, Any] = self.info.get("features") or {}
        self.told: list[str] = []  # what came up while opening
        self.version = self._find_version()
        self.rows = list(self._find_v3() if self.version == "v3.0" else self._find_v2())
        if not self.rows:
            raise InputError(f"{path}: holds no episodes")

    @cached_property
    def widths(self) -> dict[str, int]:
        """How many numbers each vector has, by feature."""
        first = self.first_table
        return {n: first[n].type.list_size for n in first.column_names if pa.types.is_fixed_size_list(first[n].type)}

    @cached_property
    def tasks(self) -> dict[Any, str]:
        """Instruction by task index, as far as ``meta/`` has them."""
        lines, table = self.path / "meta" / "tasks.jsonl", self.path / "meta" / "tasks.parquet"
        if lines.is_file():
            return {e["task_index"]: str(e["task"]) for e in self.read_lines(lines) if {"task_index", "task"} <= e.keys()}
        try:
            rows = pq.read_table(table, page_checksum_verification=True).to_pylist()
        except (pa.ArrowException, OSError):
            return {}
        return {r["task_index"]: next((v for v in r.values() if isinstance(v, str)), "") for r in rows if "task_index" in r}

    def video(self, row: EpisodeRows, camera: str, control_rate: float) -> tuple[Path, int] | Problem:
        """The file with an episode's video, and its first frame there."""
        template, prefix, first = str(self.info.get("video_path") or ""), f"videos/{camera}/", 0
        if self.version == "v3.0":
            chunk, number = row.meta.get(f"{prefix}chunk_index"), row.meta.get(f"{prefix}file_index")
            if chunk is None:
                return Problem(str(row.file), "meta/episodes names no video for it", row.number, camera)
            place = {"video_key": camera, "chunk_index": chunk, "file_index": number}
            rate = (self.features[camera].get("info") or {}).get("video.fps") or control_rate
            first = round((row.meta.get(f"{prefix}from_timestamp") or 0.0) * float(rate))
        else:
            chunk = (row.number or 0) // self._chunk_size
            place = {"video_key": camera, "episode_chunk": chunk, "episode_index": row.number}
        path = self._fill(template, place)
        return (path, first) if path.is_file() else Problem(str(path), "the video is not there", row.number, camera)

    def cameras(self) -> list[str]:
        return [k for k, f in self.features.items() if f.get("dtype") in ("video", "image")]

    def has_images(self, camera: str, control_rate: float) -> bool:
        """Whether any episode has images of a camera, in a video file or in its Parquet file."""
        rows = [row for row in self.rows if row.problem is None]
        if self.features[camera].get("dtype") == "video":
            return any(not isinstance(self.video(row, camera, control_rate), Problem) for row in rows)
        return any(camera in pq.read_schema(file).names for file in dict.fromkeys(row.file for row in rows))

    def image_shape(self, camera: str) -> tuple[int, ...] | None:
        """(H, W, C), whatever order the metadata lists them in, or None where it does not say."""
        feature = self.features[camera]
        shape, names = feature.get("shape") or [], feature.get("names") or ["height", "width", "channel"]
        sizes = dict(zip((str(n).rstrip("s") for n in names), shape, strict=False))
        wanted = tuple(sizes.get(n) for n in ("height", "width", "channel"))
        return None if None in wanted else tuple(int(n) for n in wanted if n is not None)

    def find_cameras(self, named: str | None, control_rate: float) -> Cameras:
        """The folder's cameras by kind, and which of them is ``named``. Raises :class:`InputError`: see
        :class:`~data.cameras.Cameras`."""
        every = self.cameras()
        depth = [c for c in every if is_depth(self.features[c])]
        plain = [c for c in every if c not in depth and (self.image_shape(c) or (0, 0, 3))[2] == 3]
        colour = [c for c in plain if self.has_images(c, control_rate)]
        others = [c for c in every if c not in colour and c not in depth]
        return Cameras(str(self.path), colour, depth, others, named)

    def table(self, row: EpisodeRows, camera: str | None = None) -> pa.Table:
        """The rows of an episode; images only of the ``camera`` that is asked for.

        Raises:
            InputError: a damaged file, or rows of different lengths.
        """
        part = self._read_file(row.file, camera).slice(row.first, row.length)
        for name in part.column_names:
            column = part[name]
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # they must turn out to be equally long
                lengths = set(pc.fill_null(pc.list_value_length(column), 0).unique().to_pylist())
                if len(lengths) > 1:
                    raise InputError(f"{row.file}: {name} has rows of different lengths in episode {row.number}")
                fixed = pa.list_(column.type.value_type, lengths.pop() if lengths else 0)
                part = part.set_column(part.column_names.index(name), name, column.cast(fixed))
        return part

    def _read_file(self, path: Path, camera: str | None) -> pa.Table:
        """A data file; the last one stays in memory, since episodes of one file are read one after the other."""
        key = (path, camera)
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != key:
            try:
                schema = pq.read_schema(path)
                names = [f.name for f in schema if not _holds_bytes(f.type) or f.name == camera]
                table = pq.read_table(path, columns=names, memory_map=True, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{path}: damaged Parquet file ({' '.join(str(error).split())})") from None
            cached = self._cached = (key, table)
        return cached[1]

    @cached_property
    def first_table(self) -> pa.Table:
        """The first episode that can be read and has every feature that the metadata names (else, the first that can be
        read): it tells columns and sizes."""
        wanted = {name for name, f in self.features.items() if f.get("dtype") not in ("video", "image")}
        error, found = None, None
        for row in self.rows:
            try:
                table = self.table(row) if row.problem is None else None
            except InputError as damaged:
                error = error or damaged
                continue
            if table is not None and table.num_rows:
                found = table if found is None else found
                if wanted <= set(table.column_names):
                    return table
        if found is None:
            raise error or InputError(f"{self.path}: {self.rows[0].problem or 'no episode has any rows'}")
        return found

    def _fill(self, template: str, place: Mapping[str, Any]) -> Path:
        try:
            return self.path / template.format(**place)
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(f"{self.about}: cannot fill in the path {template!r} ({error!r})") from None

    @property
    def _chunk_size(self) -> int:
        return int(self.info.get("chunks_size") or 1000)

    def _find_version(self) -> str:
        """The format: as claimed, unless the folder is laid out as another one."""
        claimed = str(self.info.get("codebase_version"))
        if claimed not in VERSIONS:
            raise InputError(f"{self.about}: codebase_version {claimed} is not one of {', '.join(VERSIONS)}")
        v2 = next((self.path / "data").glob("*/episode_*.parquet"), None) is not None
        v3 = next((self.path / "data").glob("*/file-*.parquet"), None) is not None
        if v2 != v3 and v2 == (claimed == "v3.0"):
            actual = "v2.1" if v2 else "v3.0"
            self.told.append(f"{self.about}: codebase_version claims {claimed}, the files are laid out as in {actual}")
            return actual
        return claimed

    def _find_v2(self) -> Iterator[EpisodeRows]:
        lines = self.path / "meta" / "episodes.jsonl"
        listed = {int(e["episode_index"]): e for e in self.read_lines(lines) if "episode_index" in e}
        names = {p.stem.rpartition("_")[2]: p for p in (self.path / "data").glob("*/episode_*.parquet")}
        there = {int(number): p for number, p in names.items() if number.isdecimal()}
        template = str(self.info.get("data_path") or DATA_PATH_V2)
        for number in sorted(listed.keys() | there.keys()):
            meta = listed.get(number, {})
            file = self._fill(template, {"episode_chunk": number // self._chunk_size, "episode_index": number})
            file = file if file.is_file() else there.get(number, file)
            if number not in listed:
                self.told.append(f"{file}: meta/episodes.jsonl does not list episode {number}; it is read all the same")
            try:
                length = pq.read_metadata(file).num_rows
            except FileNotFoundError:
                self.told.append(f"{file}: is not there, though meta/episodes.jsonl lists episode {number}")
                continue
            except (pa.ArrowException, OSError) as error:
                problem = f"damaged Parquet file ({' '.join(str(error).split())})"
                yield EpisodeRows(number, file, 0, 0, meta, problem)
                continue
            if "length" in meta and length != int(meta["length"]):
                self.told.append(f"{file}: holds {length} steps, meta/episodes.jsonl claims {meta['length']}")
            yield EpisodeRows(number, file, 0, length, meta)

    def _find_v3(self) -> Iterator[EpisodeRows]:
        meta = self._read_episode_table()
        found: list[EpisodeRows] = []
        for file in sorted((self.path / "data").glob("*/*.parquet")):
            try:
                numbers = read_parquet(file, ["episode_index"])["episode_index"].to_numpy()
            except KeyError:
                found.append(EpisodeRows(None, file, problem="no column episode_index"))
                continue
            except InputError as error:
                found.append(EpisodeRows(None, file, problem=str(error).removeprefix(f"{file}: ")))
                continue
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for a, b in pairwise(edges):
                if b > a:
                    found.append(EpisodeRows(int(numbers[a]), file, a, b - a, meta.get(int(numbers[a]), {})))
        pieces = Counter(row.number for row in found)
        for row in found:
            if row.number is None:
                yield row
            elif pieces[row.number] > 1:
                problem = f"episode {row.number} lies in {pieces[row.number]} pieces"
                yield EpisodeRows(row.number, row.file, row.first, row.length, row.meta, problem)
            else:
                if not row.meta:
                    self.told.append(f"{row.file}: meta/episodes does not list episode {row.number}")
                elif int(row.meta.get("length", row.length)) != row.length:
                    told = f"episode {row.number} has {row.length} steps, meta/episodes claims {row.meta['length']}"
                    self.told.append(f"{row.file}: {told}")
                yield row
        if lacking := len(meta.keys() - pieces.keys()):
            self.told.append(f"{self.path}: meta/episodes lists {lacking} episodes that no data file holds")

    def _read_episode_table(self) -> dict[int, dict[str, Any]]:
        """What v3.0's ``meta/episodes`` says of each episode, without the statistics."""
        out: dict[int, dict[str, Any]] = {}
        for file in sorted((self.path / "meta" / "episodes").glob("*/*.parquet")):
            try:
                names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
                table = pq.read_table(file, columns=names, page_checksum_verification=True)
                out |= {int(e["episode_index"]): e for e in table.to_pylist()}
            except (pa.ArrowException, OSError, KeyError) as error:
                self.told.append(f"{file}: damaged Parquet file ({' '.join(str(error).split())}); the data files count")
        return out

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; what is not there or not readable is noted."""
        out = []
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self.told.append(f"{path}: cannot be read ({error}); the data files count")
            return []
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError:
                value = None
            if isinstance(value, dict):
                out.append(value)
            else:
                self.told.append(f"{path}, line {number}: not a JSON object; left out")
        return out


def recorded_times(table: pa.Table) -> NDArray[np.float64] | None:
    """Recorded times, seconds (T,), or None where there are none that are finite and only ever grow."""
    if "timestamp" not in table.column_names:
        return None
    times = np.asarray(table["timestamp"].to_numpy(), np.float64)
    return times if np.isfinite(times).all() and (np.diff(times) > 0).all() else None


def _holds_bytes(column: pa.DataType) -> bool:
    return bool(pa.types.is_struct(column) or pa.types.is_binary(column) or pa.types.is_large_binary(column))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is this a LeRobot data set?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object")
    return values
