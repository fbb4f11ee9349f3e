"""What a LeRobot folder holds, whatever its version: where each episode's rows and videos are, and what ``meta/`` says of them.

v2.x keeps one Parquet file and one video per episode, v3.0 puts many episodes into each file
(https://huggingface.co/docs/lerobot/lerobot-dataset-v3).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.lerobot.columns import in_one_form, is_vector
from data.lerobot.metadata import by_episode, read_episode_tables, read_json_lines, read_tasks, whole_number
from spvla.errors import InputError
from spvla.files import inside, read_json

FIELD = re.compile(r"\{(\w+)(?::0?(\d)d)?\}")  # of data_path and video_path
VERSIONS = ("v2.0", "v2.1", "v3.0")
DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
EPISODES_MEASURED = 16  # in which the sizes of all vectors must show


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
        return [told] if isinstance(told, str) else [str(text) for text in told] if isinstance(told, list) else []


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
        if not self.about.is_file():
            raise InputError(f"{self.about}: no such file; is this a LeRobot data set?", code="missing", field=str(self.about))
        self.info = read_json(self.about)
        self.told: list[str] = []  # what came up while opening
        self.features = self._find_features()
        self.version = self._find_version()
        self.rows = list(self._find_v3() if self.version == "v3.0" else self._find_v2())
        if not self.rows:
            raise InputError(f"{path}: holds no episodes")

    @cached_property
    def columns(self) -> list[str]:
        """The columns of the first episode that has every feature that the metadata names, else of the first one.

        Raises:
            InputError: no episode has rows.
        """
        wanted = {name for name, f in self.features.items() if f.get("dtype") not in ("video", "image")}
        first: list[str] | None = None
        for row in self._usable():
            names = list(self.schema(row.file).names)
            if wanted <= set(names):
                return names
            first = first or names
        if first is None:
            raise InputError(f"{self.path}: {self.rows[0].problem or 'no episode has any rows'}")
        return first

    @cached_property
    def widths(self) -> dict[str, int]:
        """How many numbers each vector has, by feature; those whose rows differ in length are left out.

        Raises:
            InputError: no episode can be read.
        """
        widths: dict[str, int] = {}
        error, read = None, 0
        for row in self._usable():
            left = {f.name for f in self.schema(row.file) if is_vector(f.type)} & set(self.columns) - widths.keys()
            try:
                part = self._read_file(row.file, left).slice(row.first, row.length)
            except InputError as damaged:
                error = error or damaged
                continue
            for name in part.column_names:
                try:
                    column = in_one_form(name, part[name])
                except (ValueError, pa.ArrowException):
                    continue
                if column is not None and pa.types.is_fixed_size_list(column.type):
                    widths[name] = column.type.list_size
            read += 1
            if left <= widths.keys() or read == EPISODES_MEASURED:
                break
        if error is not None and not read:
            raise error
        return widths

    def _usable(self) -> Iterator[EpisodeRows]:
        """The episodes that have rows and no known problem."""
        return (row for row in self.rows if row.problem is None and row.length)

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Instruction by task index, as far as ``meta/`` has them."""
        tasks, notes = read_tasks(self.path)
        self.told += notes
        return tasks

    @cached_property
    def has_words(self) -> bool:
        """Whether the data set puts any of its tasks in words."""
        return any(text.strip() for text in (*self.tasks.values(), *(t for row in self.rows for t in row.tasks)))

    def table(self, row: EpisodeRows, columns: Iterable[str]) -> pa.Table:
        """The rows of an episode: those of the ``columns`` that its file has, each :func:`in one form <in_one_form>`.

        Raises:
            InputError: a damaged file, or a column that has no such form.
        """
        part = self._read_file(row.file, columns).slice(row.first, row.length)
        out: dict[str, pa.ChunkedArray] = {}
        for name in part.column_names:
            try:
                column = in_one_form(name, part[name])
            except (ValueError, pa.ArrowException) as error:
                told = f"{name} {error} in episode {row.number}"
                raise InputError(f"{row.file}: {told}", code="unusable-column", field=name) from None
            if column is not None:
                out[name] = column
        return pa.table(out)

    def _read_file(self, path: Path, columns: Iterable[str]) -> pa.Table:
        """Some columns of a data file; what was read last stays in memory, since episodes of one file are read one after the
        other."""
        key = (path, frozenset(columns))
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != key:
            names = [n for n in self.schema(path).names if n in key[1]]
            try:
                table = pq.read_table(path, columns=names, memory_map=True, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(path, error) from None
            cached = self._cached = (key, table)
        return cached[1]

    def schema(self, path: Path) -> pa.Schema:
        try:
            schema = pq.read_schema(inside(self.path, path.relative_to(self.path)))
            _ = schema.names  # text that is none
            return schema
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from None

    def tell_once(self, note: str) -> None:
        if note not in self.told:
            self.told.append(note)

    def fill(self, template: str, place: Mapping[str, Any]) -> Path:
        """The file that a path of ``meta/info.json`` names, its fields such as ``{episode_chunk:03d}`` filled in.

        Raises:
            InputError: another field (``str.format`` itself would reach attributes), or a path out of the folder.
        """

        def value(found: re.Match[str]) -> str:
            known = place.get(found[1])
            if known is None or (isinstance(known, str) and found[2]):
                raise InputError(
                    f"{self.about}: cannot fill in {found[0]} in the path {template!r}; there are: {', '.join(place)}",
                    code="path-template",
                    field=str(self.about),
                )
            return f"{known:0{found[2]}d}" if found[2] else str(known)

        if re.search(r"[{}]", FIELD.sub("", template)):
            told = "its fields are names with at most a width, such as {episode_chunk:03d}"
            raise InputError(
                f"{self.about}: cannot fill in the path {template!r}: {told}", code="path-template", field=str(self.about)
            )
        filled = os.path.normpath(FIELD.sub(value, template))
        if filled.startswith(("..", os.sep)):
            raise InputError(
                f"{self.about}: the path {template!r} leads out of the folder", code="outside-folder", field=str(self.about)
            )
        return self.path / filled

    @property
    def chunk_size(self) -> int:
        size = whole_number(self.info.get("chunks_size") or 1000)
        if size is None or size < 1:
            raise InputError(f"{self.about}: chunks_size is {self.info['chunks_size']!r}, no number of episodes")
        return size

    def _find_features(self) -> dict[str, dict[str, Any]]:
        found = self.info.get("features") or {}
        if not isinstance(found, dict) or not all(isinstance(feature, dict) for feature in found.values()):
            raise InputError(f"{self.about}: features must map names to objects", field=str(self.about))
        for name, feature in found.items():
            shape = feature.get("shape") or []
            if not isinstance(shape, list) or None in map(whole_number, shape):
                self.told.append(
                    f"{self.about}: the shape of {name} is {str(shape)[:100]!r}, no list of sizes; it is not looked at"
                )
                feature["shape"] = None
        return found

    def _find_version(self) -> str:
        """The format: as claimed, unless the folder is laid out as another one."""
        claimed = str(self.info.get("codebase_version"))
        if claimed not in VERSIONS:
            raise InputError(f"{self.about}: codebase_version {claimed} is not one of {', '.join(VERSIONS)}")
        v2 = next((self.path / "data").glob("**/episode_*.parquet"), None) is not None
        v3 = next((self.path / "data").glob("**/file-*.parquet"), None) is not None
        if v2 != v3 and v2 == (claimed == "v3.0"):
            actual = "v2.1" if v2 else "v3.0"
            self.told.append(f"{self.about}: codebase_version claims {claimed}, the files are laid out as in {actual}")
            return actual
        return claimed

    def _find_v2(self) -> Iterator[EpisodeRows]:
        lines = self.path / "meta" / "episodes.jsonl"
        listed = by_episode(self.read_lines(lines), lines, self.told)
        there: dict[int, list[Path]] = {}
        for path in sorted((self.path / "data").glob("**/episode_*.parquet")):
            if (number := whole_number(path.stem.rpartition("_")[2])) is not None:
                there.setdefault(number, []).append(path)
        template = str(self.info.get("data_path") or DATA_PATH_V2)
        for number in sorted(listed.keys() | there.keys()):
            meta = listed.get(number, {})
            file = self.fill(template, {"episode_chunk": number // self.chunk_size, "episode_index": number})
            found = there.get(number, [])
            if not file.is_file() and len(found) > 1:
                problem = f"episode {number} is not there, and {len(found)} files might be it: {found[0]}, {found[1]}"
                yield EpisodeRows(number, file, 0, 0, meta, problem)
                continue
            if not file.is_file() and found:
                file = found[0]
                told = f"{self.about}: data_path is {template!r}, some data files lie elsewhere under data and were found"
                self.tell_once(told)
            if number not in listed:
                self.told.append(f"{file}: meta/episodes.jsonl does not list episode {number}; it is read all the same")
            try:
                length = pq.read_metadata(inside(self.path, file.relative_to(self.path))).num_rows
            except FileNotFoundError:
                self.told.append(f"{file}: is not there, though meta/episodes.jsonl lists episode {number}")
                continue
            except (pa.ArrowException, OSError, InputError) as error:
                fault = error if isinstance(error, InputError) else _damaged(file, error)
                yield EpisodeRows(number, file, 0, 0, meta, str(fault).removeprefix(f"{file}: "))
                continue
            if "length" in meta and length != whole_number(meta["length"]):
                self.told.append(f"{file}: holds {length} steps, meta/episodes.jsonl claims {meta['length']}")
            yield EpisodeRows(number, file, 0, length, meta)

    def _find_v3(self) -> Iterator[EpisodeRows]:
        meta, notes = read_episode_tables(self.path)
        self.told += notes
        found: list[EpisodeRows] = []
        for file in sorted((self.path / "data").glob("**/*.parquet")):
            try:
                numbers = self._episode_numbers(file)
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
                elif whole_number(row.meta.get("length", row.length)) != row.length:
                    told = f"episode {row.number} has {row.length} steps, meta/episodes claims {row.meta['length']}"
                    self.told.append(f"{row.file}: {told}")
                yield row
        if lacking := sorted(meta.keys() - pieces.keys()):
            which = ", ".join(map(str, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
            self.told.append(f"{self.path}: meta/episodes lists {len(lacking)} episodes without rows in any data file: {which}")

    def _episode_numbers(self, file: Path) -> NDArray[np.int64]:
        """The ``episode_index`` of every row of a data file."""
        table = self._read_file(file, ["episode_index"])
        try:
            column = in_one_form("episode_index", table["episode_index"]) if table.column_names else None
        except (ValueError, pa.ArrowException) as error:
            raise InputError(f"{file}: episode_index {error}", code="unusable-column", field="episode_index") from None
        if column is None:
            raise InputError(f"{file}: no column episode_index", code="unusable-column", field="episode_index")
        return np.asarray(column.to_numpy(), np.int64)

    def read_lines(self, path: Path) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; what is not there or not readable is noted."""
        entries, notes = read_json_lines(path)
        self.told += notes
        return entries


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: damaged Parquet file ({' '.join(str(error).split())})", code="damaged-file", field=str(path))
