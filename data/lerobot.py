"""LeRobot data sets, formats v2.0, v2.1 and v3.0, read with pyarrow; video frames are decoded on demand with PyAV.

v2.x keeps one Parquet file and one video per episode, v3.0 puts many episodes into each file. What ``meta/`` claims and
the data contradicts is noted, and the data wins: episodes are what the column ``episode_index`` says. Rollout stores are
v3.0 folders with extra features, which come back with the episodes. (The writer of v3.0 is ``spvla.episodes``.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.openx import Conventions, Field, Raw, find_conventions, standardize
from data.sources import Part, Problem
from spvla.episodes import VECTOR_COLUMNS, Episode, read_action_space, vectors
from spvla.errors import InputError

EPISODES_PER_PART = 16
VERSIONS = ("v2.0", "v2.1", "v3.0")
EPISODES_TIMED = 256  # whose times are compared with the nominal rate
JITTER = 0.25  # of a control step: larger deviations of the recorded times are noted
LABELS = tuple(name for name in VECTOR_COLUMNS if name not in ("actions", "states"))


class VideoFrames(Sequence[NDArray[np.uint8]]):
    """Frames of a video file, decoded when they are asked for.

    Args:
        path: the video.
        first: frame of the file that is number 0 here.
        length: how many frames.

    Frames are uint8 (H, W, 3) RGB. Reading in order decodes each frame once.
    """

    def __init__(self, path: Path, first: int, length: int) -> None:
        self.path, self.first, self.length = path, first, length
        self._frames: Iterator[Any] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> VideoFrames: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.uint8] | VideoFrames:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.length)
            if step != 1:
                raise ValueError("video frames are read in order")
            return VideoFrames(self.path, self.first + start, max(0, stop - start))
        if not 0 <= index < self.length:
            raise IndexError(index)
        frame = self.first + index
        if frame != self._next:
            self._frames, self._next = self._seek(frame), frame
        try:
            image = next(self._frames)
        except StopIteration:
            raise InputError(f"{self.path}: ends before frame {frame}") from None
        self._next += 1
        return np.asarray(image.to_ndarray(format="rgb24"))

    def _seek(self, frame: int) -> Iterator[Any]:
        import av

        try:
            container = av.open(str(self.path))
            stream: Any = container.streams.video[0]
            ticks = 1 / stream.average_rate / stream.time_base  # per frame
            start = stream.start_time or 0
            if frame:
                container.seek(start + int(frame * ticks), stream=stream)
            for image in container.decode(stream):
                if round(((image.pts or 0) - start) / ticks) >= frame:
                    yield image
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: not a readable video ({error})") from None


@dataclass(frozen=True)
class EpisodeRows:
    """Where an episode's rows are: ``file``, its first row there, how many, and what ``meta/`` says of it."""

    number: int
    file: Path
    first: int
    length: int
    meta: Mapping[str, Any]


class LerobotSource:
    """A LeRobot folder as :class:`~data.sources.Source`.

    Args:
        path: the folder, with ``meta/info.json``.
        conventions: name or file; None: the store's own action space, the robot's entry in the table, or what the names
            of the action's entries say.
        camera: image or video feature to read in place of the conventions' one.

    Raises:
        InputError: not such a folder, another version, damaged metadata, conventions that nobody can tell.
    """

    def __init__(self, path: Path, conventions: str | Path | None = None, camera: str | None = None) -> None:
        self.path = Path(path)
        self.info = _read_json(self.path / "meta" / "info.json")
        self.version = str(self.info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise InputError(f"{self.path}/meta/info.json: codebase_version {self.version} is not one of {', '.join(VERSIONS)}")
        self.features: dict[str, Any] = self.info.get("features", {})
        self.name = self.path.resolve().name
        self.notes: list[str] = []
        self.rows = list(self._find_episodes())
        if not self.rows:
            raise InputError(f"{self.path}: holds no episodes")
        self._compare_counts()
        first = self._table(self.rows[0])
        widths = {n: first[n].type.list_size for n in first.column_names if pa.types.is_fixed_size_list(first[n].type)}
        self.own_space = (self.path / "meta" / "spvla.json").is_file() and conventions is None
        self.conventions = self._conventions(conventions, first, widths)
        self.space = read_action_space(self.path) if self.own_space else self.conventions.space(self.name, widths)
        for key in self.conventions.keys:
            if key not in first.column_names:
                raise InputError(f"{self.path}: no feature {key!r}; there are: {', '.join(first.column_names)}")
        self.camera = camera or self.conventions.camera
        if self.camera is not None and self.camera not in self.features:
            known = ", ".join(k for k, f in self.features.items() if f.get("dtype") in ("video", "image")) or "none"
            raise InputError(f"{self.path}: no camera {self.camera!r}; there are: {known}")
        self.image_shape = self._image_shape()
        self.parts = []
        for first_row in range(0, len(self.rows), EPISODES_PER_PART):
            rows = self.rows[first_row : first_row + EPISODES_PER_PART]
            part = f"{self.name}-{first_row:06d}"
            self.parts.append(Part(part, str(rows[0].file), first_row, len(rows), first_row))
        self._check_times()

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images from Parquet are encoded, those from video :class:`VideoFrames`."""
        if images and self.camera is None:
            raise InputError(f"{self.path}: has no camera")
        for row in self.rows[part.first : part.first + part.count]:
            yield self._episode(row, images)

    def _episode(self, row: EpisodeRows, images: bool) -> Episode | Problem:
        file = str(row.file)
        try:
            table = self._table(row)
        except InputError as error:
            return Problem(file, str(error).removeprefix(f"{file}: "), row.number)
        if table.num_rows != row.length:
            return Problem(file, f"holds {table.num_rows} rows of an episode of {row.length}", row.number)
        steps = {}
        for key in self.conventions.keys:
            if key not in table.column_names:
                return Problem(file, "there is no such feature", row.number, key)
            column = table[key]
            steps[key] = vectors(column) if pa.types.is_fixed_size_list(column.type) else column.to_numpy()
        pictures: dict[str, Sequence[Any]] = {}
        if images and self.camera is not None:
            found = self._frames(row, table)
            if isinstance(found, Problem):
                return found
            pictures[self.camera.rpartition(".")[2]] = found
        times = table["timestamp"].to_numpy().astype(np.float64)
        instruction = str((row.meta.get("tasks") or [""])[0])
        facts: dict[str, Any] = {"dataset": self.name, "file": row.file.name, "number": row.number}
        if "metadata" in row.meta:
            facts = json.loads(row.meta["metadata"])
        raw = Raw(steps, row.meta)
        out = standardize(raw, self.conventions, file, row.number, facts, {}, instruction, times, pictures)
        if isinstance(out, Episode):
            out.success = row.meta.get("success")
            if self.own_space:  # a rollout store: its labels come along
                for name in LABELS:
                    if VECTOR_COLUMNS[name] in table.column_names:
                        setattr(out, name, vectors(table[VECTOR_COLUMNS[name]]))
                if "action.source" in table.column_names:
                    out.sources = table["action.source"].to_numpy().astype(np.uint8)
        return out

    def _frames(self, row: EpisodeRows, table: pa.Table) -> Sequence[Any] | Problem:
        assert self.camera is not None
        if self.features[self.camera].get("dtype") != "video":
            return list(table[self.camera].combine_chunks().field("bytes").to_pylist())
        template = self.info.get("video_path") or ""
        prefix = f"videos/{self.camera}/"
        if self.version == "v3.0":
            chunk, number = row.meta.get(f"{prefix}chunk_index"), row.meta.get(f"{prefix}file_index")
            if chunk is None:
                return Problem(str(row.file), "meta/episodes names no video for it", row.number, self.camera)
            place = {"video_key": self.camera, "chunk_index": chunk, "file_index": number}
            first = round(row.meta.get(f"{prefix}from_timestamp", 0.0) * self._video_rate())
        else:
            chunk = row.number // int(self.info.get("chunks_size", 1000))
            place, first = {"video_key": self.camera, "episode_chunk": chunk, "episode_index": row.number}, 0
        path = self.path / template.format(**place)
        if not path.is_file():
            return Problem(str(path), "the video is not there", row.number, self.camera)
        return VideoFrames(path, first, row.length)

    def _video_rate(self) -> float:
        assert self.camera is not None
        return float((self.features[self.camera].get("info") or {}).get("video.fps") or self.info["fps"])

    def _image_shape(self) -> tuple[int, ...] | None:
        """(H, W, 3), whatever order the metadata lists them in, or None where it does not say."""
        if self.camera is None:
            return None
        feature = self.features[self.camera]
        shape, names = feature.get("shape") or [], feature.get("names") or ["height", "width", "channel"]
        sizes = dict(zip((str(n).rstrip("s") for n in names), shape, strict=False))
        wanted = tuple(sizes.get(n) for n in ("height", "width", "channel"))
        return None if None in wanted else tuple(int(n) for n in wanted if n is not None)

    def _table(self, row: EpisodeRows) -> pa.Table:
        """The rows of an episode. The file is memory-mapped; only its row groups that are needed are read."""
        try:
            table = pq.read_table(row.file, memory_map=True) if self.version != "v3.0" else self._read_file(row.file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{row.file}: damaged Parquet file ({error})") from None
        part = table.slice(row.first, row.length)
        for name in part.column_names:
            column = part[name]
            if pa.types.is_list(column.type):  # written without fixed sizes: they must turn out to be equal
                lengths = np.diff(column.combine_chunks().offsets.to_numpy()) if column.num_chunks else np.zeros(0)
                if len(set(lengths.tolist())) == 1:
                    fixed = pa.list_(column.type.value_type, int(lengths[0]))
                    part = part.set_column(part.column_names.index(name), name, column.cast(fixed))
                else:
                    raise InputError(f"{row.file}: {name} has rows of different lengths in episode {row.number}")
        return part

    def _read_file(self, path: Path) -> pa.Table:
        """A data file of v3.0; the last one stays in memory, since its episodes are read one after the other."""
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != path:
            cached = self._cached = (path, pq.read_table(path))
        return cached[1]

    def _find_episodes(self) -> Iterator[EpisodeRows]:
        if self.version == "v3.0":
            yield from self._find_v3()
        else:
            yield from self._find_v2()

    def _find_v2(self) -> Iterator[EpisodeRows]:
        claimed = {int(e["episode_index"]): e for e in _read_lines(self.path / "meta" / "episodes.jsonl")}
        chunk_size, template = int(self.info.get("chunks_size", 1000)), self.info["data_path"]
        for number, meta in sorted(claimed.items()):
            file = self.path / template.format(episode_chunk=number // chunk_size, episode_index=number)
            try:
                length = pq.read_metadata(file).num_rows
            except FileNotFoundError:
                self.notes.append(f"{file}: is not there, though meta/episodes.jsonl lists episode {number}")
                continue
            except (pa.ArrowInvalid, OSError):
                length = int(meta["length"])  # told as a problem when it is read
            if length != int(meta["length"]):
                self.notes.append(f"{file}: holds {length} steps, meta/episodes.jsonl claims {meta['length']}")
            yield EpisodeRows(number, file, 0, length, meta)

    def _find_v3(self) -> Iterator[EpisodeRows]:
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        meta: dict[int, dict[str, Any]] = {}
        for file in files:
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            for entry in pq.read_table(file, columns=names).to_pylist():
                meta[int(entry["episode_index"])] = entry
        for file in sorted((self.path / "data").glob("*/*.parquet")):
            try:
                numbers = pq.read_table(file, columns=["episode_index"])["episode_index"].to_numpy()
            except (pa.ArrowInvalid, OSError, KeyError) as error:
                raise InputError(f"{file}: damaged Parquet file ({error})") from None
            edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for a, b in pairwise(edges):
                number = int(numbers[a])
                entry = meta.get(number, {})
                if not entry:
                    self.notes.append(f"{file}: meta/episodes does not list episode {number}")
                elif int(entry["length"]) != b - a:
                    self.notes.append(f"{file}: episode {number} has {b - a} steps, meta/episodes claims {entry['length']}")
                yield EpisodeRows(number, file, a, b - a, entry)

    def _compare_counts(self) -> None:
        counts = {"total_episodes": len(self.rows), "total_frames": sum(r.length for r in self.rows)}
        for name, found in counts.items():
            if self.info.get(name) != found:
                self.notes.append(f"{self.path}/meta/info.json: {name} claims {self.info.get(name)}, the data holds {found}")
        for split, span in (self.info.get("splits") or {}).items():
            last = str(span).rpartition(":")[2]
            if last.isdecimal() and int(last) > len(self.rows):
                there = f"there are {len(self.rows)} episodes"
                self.notes.append(f"{self.path}/meta/info.json: split {split} claims {span}, {there}")

    def _check_times(self) -> None:
        """Recorded times against the nominal rate; what the videos hold is checked when they are read."""
        steps = []
        for row in self.rows[:EPISODES_TIMED]:
            try:
                times = self._table(row)["timestamp"].to_numpy().astype(np.float64)
            except (InputError, KeyError):
                continue
            steps.append(np.diff(times))
        gaps = np.concatenate(steps) if steps else np.zeros(0)
        if not len(gaps):
            return
        nominal = 1.0 / float(self.info["fps"])
        if np.abs(gaps - nominal).max() > JITTER * nominal:
            self.notes.append(
                f"{self.path}: steps take {gaps.min():.3f} to {gaps.max():.3f} s (median {np.median(gaps):.3f}), "
                f"the nominal {self.info['fps']} Hz would be {nominal:.3f} s; the control rate stays nominal"
            )
        missing = 0
        if self.camera is not None and self.features[self.camera].get("dtype") == "video":
            missing = sum(isinstance(self._frames(row, pa.table({})), Problem) for row in self.rows)
        if missing:
            self.notes.append(f"{self.path}: {missing} of {len(self.rows)} videos of {self.camera} are not there")

    def _conventions(self, wanted: str | Path | None, first: pa.Table, widths: Mapping[str, int]) -> Conventions:
        cameras = [k for k, f in self.features.items() if f.get("dtype") in ("video", "image")]
        robot = str(self.info.get("robot_type"))
        if self.own_space:
            state = (Field(key="observation.state"),) if "observation.state" in widths else ()
            return Conventions("eef_delta", 1.0, (Field(key="action"),), state, next(iter(cameras), None), None)
        if wanted is None:
            guessed = guess_conventions(self.info, first)
            if guessed is not None:
                self.notes.append(f"{self.path}: no conventions given; from the names in meta/info.json: {_told(guessed)}")
                return guessed
            names = (self.features.get("action") or {}).get("names")
            raise InputError(
                f"{self.path}: the action's entries are named {names}, which does not tell what they are; write a YAML file "
                f"with kind, control_rate, action and state (see configs/openx) and name it with --conventions (robot: {robot})"
            )
        found = find_conventions(wanted, robot)
        rate = float(self.info["fps"])
        if found.control_rate != rate:
            told = f"the conventions say {found.control_rate:g}"
            self.notes.append(f"{self.path}/meta/info.json: fps is {rate:g}, {told}; the conventions are taken")
        return found


def guess_conventions(info: Mapping[str, Any], first: pa.Table) -> Conventions | None:
    """What the names of a LeRobot action's entries say, or None where they say too little.

    Args:
        info: ``meta/info.json``.
        first: rows of the first episode, which tell whether a gripper takes two values only.
    """
    feature = info["features"].get("action") or {}
    names = feature.get("names")
    if isinstance(names, dict):
        names = next(iter(names.values()), None)
    if not names or len(names) != feature["shape"][0] or "action" not in first.column_names:
        return None
    words = [str(n).lower() for n in names]
    gripper = [i for i, n in enumerate(words) if "grip" in n]
    rest = [n for i, n in enumerate(words) if i not in gripper]
    if all("vel" in n for n in rest):
        kind = "joint_velocity"
    elif all(n.endswith(".pos") or "_pos" in n or "joint" in n or "motor" in n for n in rest):
        kind = "joint_position"
    else:
        return None
    values = vectors(first["action"])
    binary = bool(gripper) and all(len(np.unique(values[:, i])) <= 2 for i in gripper)
    parts = [Field("gripper" if i in gripper else "joint", "action", (i,)) for i in range(len(words))]
    state = (Field(key="observation.state"),) if "observation.state" in first.column_names else ()
    camera = next((k for k, f in info["features"].items() if f.get("dtype") in ("video", "image")), None)
    return Conventions(kind, float(info["fps"]), tuple(parts), state, camera, None, binary)


def _told(conventions: Conventions) -> str:
    gripper = [i for i, f in enumerate(conventions.action) if f.role == "gripper"]
    kind = "binary" if conventions.binary_gripper else "continuous"
    return f"{conventions.kind} at {conventions.control_rate:g} Hz, gripper {gripper or 'none'} ({kind})"


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


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not readable JSON lines ({error})") from None
