"""LeRobot data sets, formats v2.0, v2.1 and v3.0, read with pyarrow; video frames are decoded on demand (``data.video``).

v2.x keeps one Parquet file and one video per episode, v3.0 puts many episodes into each file
(https://huggingface.co/docs/lerobot/lerobot-dataset-v3). What ``meta/`` claims and the data contradicts is noted, and the
data wins: which episodes there are, how long they are and how fast they went is what the Parquet files say. Rollout stores
are v3.0 folders with extra features, which come back with the episodes. (The writer of v3.0 is ``spvla.episodes``.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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

from data.named_actions import conventions_from_names, tell_other_names
from data.openx import Conventions, Field, find_conventions, first_action_note, standardize
from data.parts import Part, Problem
from data.video import VideoFrames, count_frames
from spvla.episodes import VECTOR_COLUMNS, Episode, read_action_space, read_parquet, read_sources, read_vectors, vectors
from spvla.errors import InputError

EPISODES_PER_PART = 16
VERSIONS = ("v2.0", "v2.1", "v3.0")
DATA_PATH_V2 = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
EPISODES_TIMED = 16  # whose recorded times say how fast the robot was
EPISODES_CHECKED = 256  # that are compared with what meta/ says of them
RATE_SLACK = 0.1  # the claimed control rate may be off the recorded times by so much
JITTER = 0.25  # of a control step: larger deviations of the recorded times are noted
LABELS = tuple(name for name in VECTOR_COLUMNS if name not in ("actions", "states"))


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


class LerobotSource:
    """A LeRobot folder as :class:`~data.sources.Source`.

    Args:
        path: the folder, with ``meta/info.json``.
        conventions: name or file; None: the store's own action space, or what the names of the action's entries say.
        camera: image or video feature to read in place of the conventions' one.

    Raises:
        InputError: not such a folder, another version, nothing readable in it, conventions that nobody can tell.
    """

    def __init__(self, path: Path, conventions: str | Path | None = None, camera: str | None = None) -> None:
        self.path = Path(path)
        self.about = self.path / "meta" / "info.json"
        self.info = _read_json(self.about)
        self.features: dict[str, Any] = self.info.get("features") or {}
        self.name = self.path.resolve().name
        self.told: list[str] = []  # what came up while opening
        self.version = self._find_version()
        self.rows = list(self._find_v3() if self.version == "v3.0" else self._find_v2())
        if not self.rows:
            raise InputError(f"{self.path}: holds no episodes")
        first = self.first_table
        self.widths = {n: first[n].type.list_size for n in first.column_names if pa.types.is_fixed_size_list(first[n].type)}
        self.own_space = (self.path / "meta" / "spvla.json").is_file() and conventions is None
        self.conventions = self._find_conventions(conventions)
        self.space = read_action_space(self.path) if self.own_space else self.conventions.space(self.name, self.widths)
        for key in self.conventions.keys:
            if key not in first.column_names:
                raise InputError(f"{self.path}: no feature {key!r}; there are: {', '.join(first.column_names)}")
        self.camera = camera or self.conventions.camera
        if self.camera is not None and self.camera not in self.features:
            raise InputError(f"{self.path}: no camera {self.camera!r}; there are: {', '.join(self.cameras()) or 'none'}")
        self.image_shape = self._image_shape()
        self.parts = []
        for at in range(0, len(self.rows), EPISODES_PER_PART):
            rows = self.rows[at : at + EPISODES_PER_PART]
            size = sum(f.stat().st_size for f in dict.fromkeys(r.file for r in rows) if f.is_file())
            self.parts.append(Part(f"{self.name}-{at:06d}", str(rows[0].file), at, len(rows), at, size))

    # ------------------------------------------------------------------------------------------------------- episodes

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images from Parquet are encoded, those from video :class:`VideoFrames`."""
        if images and self.camera is None:
            raise InputError(f"{self.path}: has no camera, or its conventions name none; there are: {self.cameras()}")
        for row in self.rows[part.first : part.first + part.count]:
            yield self._episode(row, images)

    def _episode(self, row: EpisodeRows, images: bool) -> Episode | Problem:
        file = str(row.file)
        if row.problem is not None:
            return Problem(file, row.problem, row.number)
        try:
            table = self.table(row, images)
        except InputError as error:
            return Problem(file, str(error).removeprefix(f"{file}: "), row.number)
        if table.num_rows != row.length:
            return Problem(file, f"holds {table.num_rows} rows of an episode of {row.length}", row.number)
        if "frame_index" in table.column_names:
            frames = table["frame_index"].to_numpy()
            if (wrong := frames != np.arange(len(frames))).any():
                k = int(wrong.argmax())
                reason = f"row {k} is frame {frames[k]}: rows are missing, twice or out of order"
                return Problem(file, reason, row.number, "frame_index")
        steps = {}
        for key in self.conventions.keys:
            if key not in table.column_names:
                return Problem(file, "there is no such feature", row.number, key)
            try:
                steps[key] = _array(table[key])
            except (ValueError, TypeError, pa.ArrowException) as error:
                return Problem(file, f"cannot be read ({error})", row.number, key)
        pictures: dict[str, Sequence[Any]] = {}
        if images and self.camera is not None:
            found = self._frames(row, table)
            if isinstance(found, Problem):
                return found
            pictures[self.camera.rpartition(".")[2]] = found
        times = _times(table)
        facts: dict[str, Any] = {"dataset": self.name, "file": row.file.name, "number": row.number}
        if "metadata" in row.meta:
            try:
                facts = {**json.loads(row.meta["metadata"]), "number": row.number}
            except (ValueError, TypeError):
                return Problem(file, f"is {row.meta['metadata']!r} in meta/episodes, not a JSON object", row.number, "metadata")
        number = -1 if row.number is None else row.number
        instruction = self._instruction(row, table)
        out = standardize(steps, self.conventions, file, number, facts, {}, instruction, times, pictures)
        if isinstance(out, Episode):
            out.success = row.meta.get("success")
            if self.own_space:  # a rollout store: its labels come along
                try:
                    for name in LABELS:
                        if VECTOR_COLUMNS[name] in table.column_names:
                            setattr(out, name, read_vectors(table, VECTOR_COLUMNS[name], file))
                    out.sources = read_sources(table, file)
                    out.check(self.space, file)
                except InputError as error:
                    return Problem(file, str(error).removeprefix(f"{file}: "), row.number)
        return out

    def _instruction(self, row: EpisodeRows, table: pa.Table) -> str:
        told = row.meta.get("tasks")
        if told is not None and len(told):
            return str(told if isinstance(told, str) else told[0])
        index = table["task_index"][0].as_py() if "task_index" in table.column_names and table.num_rows else None
        return self._tasks.get(index, "")

    @cached_property
    def _tasks(self) -> dict[Any, str]:
        """Instruction by task index, as far as ``meta/`` has them."""
        lines, table = self.path / "meta" / "tasks.jsonl", self.path / "meta" / "tasks.parquet"
        if lines.is_file():
            return {e["task_index"]: str(e["task"]) for e in self._read_lines(lines) if {"task_index", "task"} <= e.keys()}
        try:
            rows = pq.read_table(table, page_checksum_verification=True).to_pylist()
        except (pa.ArrowException, OSError):
            return {}
        return {r["task_index"]: next((v for v in r.values() if isinstance(v, str)), "") for r in rows if "task_index" in r}

    def _frames(self, row: EpisodeRows, table: pa.Table) -> Sequence[Any] | Problem:
        assert self.camera is not None
        if self.features[self.camera].get("dtype") == "video":
            found = self._video(row, self.camera)
            return found if isinstance(found, Problem) else VideoFrames(*found, row.length)
        if self.camera not in table.column_names:
            return Problem(str(row.file), "there is no such feature", row.number, self.camera)
        return [None if v is None else v["bytes"] for v in table[self.camera].to_pylist()]

    def _video(self, row: EpisodeRows, camera: str) -> tuple[Path, int] | Problem:
        """The file with an episode's video, and its first frame there."""
        template, prefix, first = str(self.info.get("video_path") or ""), f"videos/{camera}/", 0
        if self.version == "v3.0":
            chunk, number = row.meta.get(f"{prefix}chunk_index"), row.meta.get(f"{prefix}file_index")
            if chunk is None:
                return Problem(str(row.file), "meta/episodes names no video for it", row.number, camera)
            place = {"video_key": camera, "chunk_index": chunk, "file_index": number}
            rate = (self.features[camera].get("info") or {}).get("video.fps") or self.space.control_rate
            first = round((row.meta.get(f"{prefix}from_timestamp") or 0.0) * float(rate))
        else:
            chunk = (row.number or 0) // self._chunk_size
            place = {"video_key": camera, "episode_chunk": chunk, "episode_index": row.number}
        path = self._fill(template, place)
        return (path, first) if path.is_file() else Problem(str(path), "the video is not there", row.number, camera)

    def _image_shape(self) -> tuple[int, ...] | None:
        """(H, W, 3), whatever order the metadata lists them in, or None where it does not say."""
        if self.camera is None:
            return None
        feature = self.features[self.camera]
        shape, names = feature.get("shape") or [], feature.get("names") or ["height", "width", "channel"]
        sizes = dict(zip((str(n).rstrip("s") for n in names), shape, strict=False))
        wanted = tuple(sizes.get(n) for n in ("height", "width", "channel"))
        return None if None in wanted else tuple(int(n) for n in wanted if n is not None)

    def cameras(self) -> list[str]:
        return [k for k, f in self.features.items() if f.get("dtype") in ("video", "image")]

    # ---------------------------------------------------------------------------------------------------------- files

    def table(self, row: EpisodeRows, images: bool = False) -> pa.Table:
        """The rows of an episode; images only if they are asked for, and only the camera's.

        Raises:
            InputError: a damaged file, or rows of different lengths.
        """
        part = self._read_file(row.file, images).slice(row.first, row.length)
        for name in part.column_names:
            column = part[name]
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):  # they must turn out to be equally long
                lengths = set(pc.fill_null(pc.list_value_length(column), 0).unique().to_pylist())
                if len(lengths) > 1:
                    raise InputError(f"{row.file}: {name} has rows of different lengths in episode {row.number}")
                fixed = pa.list_(column.type.value_type, lengths.pop() if lengths else 0)
                part = part.set_column(part.column_names.index(name), name, column.cast(fixed))
        return part

    def _read_file(self, path: Path, images: bool) -> pa.Table:
        """A data file; the last one stays in memory, since episodes of one file are read one after the other."""
        key = (path, images)
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != key:
            try:
                schema = pq.read_schema(path)
                names = [f.name for f in schema if not _holds_bytes(f.type) or (images and f.name == self.camera)]
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
        listed = {int(e["episode_index"]): e for e in self._read_lines(lines) if "episode_index" in e}
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

    def _read_lines(self, path: Path) -> list[dict[str, Any]]:
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

    # ------------------------------------------------------------------------------------- what the data says of meta/

    @cached_property
    def notes(self) -> list[str]:
        """See :class:`~data.sources.Source`; times, statistics and first actions are those of the first episodes."""
        found = {"total_episodes": len(self.rows), "total_frames": sum(r.length for r in self.rows)}
        out = [
            f"{self.about}: {name} claims {self.info.get(name)}, the data holds {count}"
            for name, count in found.items()
            if self.info.get(name) != count
        ]
        for split, span in (self.info.get("splits") or {}).items():
            last = str(span).rpartition(":")[2]
            if last.isdecimal() and int(last) > len(self.rows):
                out.append(f"{self.about}: split {split} claims {span}, there are {len(self.rows)} episodes")
        for name, width in self.widths.items():
            shape = (self.features.get(name) or {}).get("shape")
            if shape and list(shape) != [width]:
                out.append(f"{self.about}: {name} claims the shape {list(shape)}, the data has {width} entries")
        for camera in self.cameras():
            if self.features[camera].get("dtype") == "video":
                videos = [(row, self._video(row, camera)) for row in self.rows]
                if missing := sum(isinstance(video, Problem) for _, video in videos):
                    out.append(f"{self.path}: {missing} of {len(self.rows)} videos of {camera} are not there")
                for row, video in videos[:EPISODES_TIMED] if self.version != "v3.0" else ():
                    frames = None if isinstance(video, Problem) else count_frames(video[0])
                    if frames and row.length and frames != row.length:
                        out.append(f"{row.file}: {row.length} steps, but its video of {camera} has {frames} frames")
        episodes = [e for e in (self._episode(row, False) for row in self.rows[:EPISODES_TIMED]) if isinstance(e, Episode)]
        return [*out, *self.told, *self._check_rows(), *first_action_note(str(self.path), episodes, self.space)]

    def _check_rows(self) -> list[str]:
        """The first episodes' times against the control rate, and their extremes against those that ``meta/`` states."""
        gaps: list[NDArray[np.float64]] = []
        untimed, silent, out = 0, 0, []
        stated = self._stated_extremes()
        for row in self.rows[:EPISODES_CHECKED]:
            try:
                table = self.table(row) if row.problem is None else None
            except InputError:
                table = None
            if table is None or not table.num_rows:
                continue
            silent += not self._instruction(row, table).strip()
            times = _times(table)
            untimed += times is None
            numbers = table["episode_index"].unique().to_pylist() if "episode_index" in table.column_names else [row.number]
            if numbers != [row.number]:
                out.append(f"{row.file}: its rows say episode {numbers}, its name says {row.number}; the name counts")
            gaps += [] if times is None else [np.diff(times)]
            for key, (low, high) in stated.get(row.number, {}).items():
                values = vectors(table[key]) if key in self.widths and key in table.column_names else np.zeros((0, 1))
                if len(values) and not (_close(values.min(0), low) and _close(values.max(0), high)):
                    told = f"{key} of episode {row.number} has other extremes than meta/ states: one of them is damaged"
                    out.append(f"{row.file}: {told}")
        steps = np.concatenate(gaps) if gaps else np.zeros(0)
        nominal = 1 / self.space.control_rate
        if len(steps) and np.abs(steps - nominal).max() > JITTER * nominal:
            out.append(
                f"{self.path}: steps take {steps.min():.3f} to {steps.max():.3f} s (median {np.median(steps):.3f}), the "
                f"control rate of {self.space.control_rate:g} Hz would be {nominal:.3f} s; it stays, and the times are kept"
            )
        for count, what in (
            (untimed, "no usable timestamps; they are counted by the control rate"),
            (silent, "no instruction"),
        ):
            if count:
                out.append(f"{self.path}: {count} of the first {min(len(self.rows), EPISODES_CHECKED)} episodes have {what}")
        return out

    def _stated_extremes(self) -> dict[int | None, dict[str, tuple[Any, Any]]]:
        """Smallest and largest values (D,) of action and state by episode, as ``meta/`` states them."""
        keys = ("action", "observation.state")
        lines = self.path / "meta" / "episodes_stats.jsonl"
        out: dict[int | None, dict[str, tuple[Any, Any]]] = {}
        if lines.is_file() and self.version != "v3.0":
            for entry in self._read_lines(lines):
                stats = entry.get("stats") or {}
                out[entry.get("episode_index")] = {
                    key: (stats[key]["min"], stats[key]["max"])
                    for key in keys
                    if {"min", "max"} <= (stats.get(key) or {}).keys()
                }
        for file in sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))[:1]:
            try:
                names = set(pq.read_schema(file).names)
                there = [key for key in keys if {f"stats/{key}/min", f"stats/{key}/max"} <= names]
                columns = ["episode_index", *(f"stats/{key}/{end}" for key in there for end in ("min", "max"))]
                stats = pq.read_table(file, columns=columns, page_checksum_verification=True)
                for e in stats.slice(0, EPISODES_CHECKED).to_pylist():
                    out[e["episode_index"]] = {key: (e[f"stats/{key}/min"], e[f"stats/{key}/max"]) for key in there}
            except (pa.ArrowException, OSError, KeyError):
                break  # told when the episodes were looked up
        return out

    def _find_rate(self) -> float:
        """Control steps per second: as claimed, unless the recorded times say otherwise throughout.

        Raises:
            InputError: neither is there.
        """
        claimed = self.info.get("fps")
        valid = float(claimed) if isinstance(claimed, int | float) and claimed > 0 else None
        gaps = []
        for row in self.rows[:EPISODES_TIMED]:
            try:
                times = _times(self.table(row)) if row.problem is None else None
            except InputError:
                continue
            gaps += [] if times is None else [np.diff(times)]
        steps = np.concatenate(gaps) if gaps else np.zeros(0)
        if not len(steps):
            if valid is None:
                raise InputError(
                    f"{self.about}: fps is {claimed}, and no recorded times tell the control rate; name conventions"
                )
            return valid
        measured = 1 / float(np.median(steps))
        if valid is not None and abs(measured / valid - 1) <= RATE_SLACK:
            return valid
        rate = float(round(measured)) if abs(round(measured) / measured - 1) < 0.02 else float(f"{measured:.3g}")
        self.told.append(
            f"{self.about}: fps claims {claimed}, by the recorded times it is {measured:.3g} Hz; {rate:g} is taken"
        )
        return rate

    # ---------------------------------------------------------------------------------------------------- conventions

    def _find_conventions(self, wanted: str | Path | None) -> Conventions:
        if self.own_space:
            state = (Field(key="observation.state"),) if "observation.state" in self.widths else ()
            return Conventions("eef_delta", 1.0, (Field(key="action"),), state, next(iter(self.cameras()), None), None)
        robot = str(self.info.get("robot_type"))
        if wanted is None:
            return conventions_from_names(self, self._find_rate)
        found = find_conventions(wanted, robot)
        rate = self._find_rate() if self._rate_known() else found.control_rate
        if abs(rate / found.control_rate - 1) > RATE_SLACK:
            told = f"the control rate is {rate:g} Hz by the data set, {found.control_rate:g} by the conventions"
            self.told.append(f"{self.path}: {told}; the conventions are taken")
        tell_other_names(self, found, wanted)
        return found

    def _rate_known(self) -> bool:
        return "timestamp" in self.first_table.column_names or bool(self.info.get("fps"))


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column as (T, D) or (T,); missing values are NaN."""
    if pa.types.is_fixed_size_list(column.type):
        if column.null_count:
            rows = [[np.nan] * column.type.list_size if v is None else v for v in column.to_pylist()]
            return np.array(rows, np.float32).reshape(len(rows), column.type.list_size)
        flat = column.combine_chunks()
        if not pa.types.is_floating(column.type.value_type) and not pa.types.is_integer(column.type.value_type):
            raise TypeError(f"its values are {column.type.value_type}, not numbers")
        return vectors(pa.chunked_array([flat]) if not isinstance(flat, pa.ChunkedArray) else flat)
    return np.asarray(column.to_numpy())


def _times(table: pa.Table) -> NDArray[np.float64] | None:
    """Recorded times, seconds (T,), or None where there are none that are finite and only ever grow."""
    if "timestamp" not in table.column_names:
        return None
    times = np.asarray(table["timestamp"].to_numpy(), np.float64)
    return times if np.isfinite(times).all() and (np.diff(times) > 0).all() else None


def _close(found: NDArray[np.float32], stated: Any) -> bool:
    """Whether two vectors are equal up to rounding; True where the stated one is of another kind or not finite."""
    try:
        values = np.asarray(stated, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return True
    usable = values.shape == found.shape and np.isfinite(values).all() and np.isfinite(found).all()
    return bool(not usable or np.allclose(found, values, rtol=1e-4, atol=1e-5))


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
