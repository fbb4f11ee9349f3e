"""LeRobot data sets, formats v2.0, v2.1 and v3.0, read with pyarrow; video frames are decoded on demand (``data.video``).

What ``meta/`` claims and the data contradicts is noted, and the data wins: which episodes there are, how long they are and how
fast they went is what the Parquet files say. Rollout stores are v3.0 folders with extra features, which come back with the
episodes. (The writer of v3.0 is ``spvla.episodes``.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.lerobot import audit
from data.lerobot.clock import find_frames
from data.lerobot.columns import INDEX, recorded_times, to_array
from data.lerobot.guess import choose_conventions
from data.lerobot.layout import EpisodeRows, Layout
from data.lerobot.times import find_unit
from data.openx import standardize
from data.parts import Part, Problem
from data.video import VideoFrames
from spvla.episodes import VECTOR_COLUMNS, Episode, read_action_space, read_sources, read_vectors
from spvla.errors import InputError

EPISODES_PER_PART = 16
LABELS = tuple(name for name in VECTOR_COLUMNS if name not in ("actions", "states"))
LABEL_COLUMNS = (*(VECTOR_COLUMNS[name] for name in LABELS), "action.source")


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
        self.layout = layout = Layout(self.path)
        self.name = self.path.resolve().name
        self.own_space = (self.path / "meta" / "spvla.json").is_file() and conventions is None
        self.conventions = choose_conventions(layout, conventions, self.own_space)
        self.space = read_action_space(self.path) if self.own_space else self.conventions.space(self.name, layout.widths)
        for key in self.conventions.keys:
            if key not in layout.columns:
                raise InputError(f"{self.path}: no feature {key!r}; there are: {', '.join(layout.columns)}")
        self.camera = camera or self.conventions.camera
        if self.camera is not None and self.camera not in layout.features:
            raise InputError(f"{self.path}: no camera {self.camera!r}; there are: {', '.join(layout.cameras()) or 'none'}")
        self.image_shape = self._image_shape()
        self.time_unit = 1.0 if self.own_space else find_unit(layout, self.conventions.control_rate)  # seconds
        self.columns = (*INDEX, *self.conventions.keys, *(LABEL_COLUMNS if self.own_space else ()))
        self.parts = []
        for at in range(0, len(layout.rows), EPISODES_PER_PART):
            rows = layout.rows[at : at + EPISODES_PER_PART]
            size = sum(f.stat().st_size for f in dict.fromkeys(r.file for r in rows) if f.is_file())
            self.parts.append(Part(f"{self.name}-{at:06d}", str(rows[0].file), at, len(rows), at, size))

    @cached_property
    def notes(self) -> list[str]:
        """See :class:`~data.sources.Source`; times, statistics and first actions are those of the first episodes."""
        return audit.notes(self)

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images from Parquet are encoded, those from video :class:`VideoFrames`."""
        if images and self.camera is None:
            listed = self.layout.cameras()
            there = [camera for camera in listed if self.layout.has_images(camera)]
            told = f"no camera with pictures, or the conventions name none; listed are {listed}, pictures are there of {there}"
            raise InputError(f"{self.path}: {told}", code="no-camera", field="camera")
        for row in self.layout.rows[part.first : part.first + part.count]:
            yield self.read(row, images)

    def read(self, row: EpisodeRows, images: bool) -> Episode | Problem:
        """One episode, with images if they are asked for, or the problem that it has."""
        file = str(row.file)
        if row.problem is not None:
            return Problem(file, row.problem, row.number)
        if not row.length:
            return Problem(file, "the episode has no rows", row.number)
        try:
            table = self.layout.table(row, (*self.columns, self.camera) if images and self.camera else self.columns)
        except InputError as error:
            field = error.field if error.code == "unusable-column" else None
            return Problem(file, str(error).removeprefix(f"{file}: "), row.number, field)
        if table.column_names and table.num_rows != row.length:
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
                steps[key] = to_array(table[key])
            except (ValueError, TypeError, pa.ArrowException) as error:
                return Problem(file, f"cannot be read ({error})", row.number, key)
        pictures: dict[str, Sequence[Any]] = {}
        if images and self.camera is not None:
            found = self._frames(row, table)
            if isinstance(found, Problem):
                return found
            pictures[self.camera.rpartition(".")[2]] = found
        times = recorded_times(table, self.time_unit)
        facts: dict[str, Any] = {"dataset": self.name, "file": row.file.name, "number": row.number}
        if "metadata" in row.meta:
            try:
                facts = {**json.loads(row.meta["metadata"]), "number": row.number}
            except (ValueError, TypeError):
                return Problem(file, f"is {row.meta['metadata']!r} in meta/episodes, not a JSON object", row.number, "metadata")
        number = -1 if row.number is None else row.number
        instruction = self.instruction(row, table)
        if not instruction.strip() and not self.own_space and self.conventions.instruction is None and self.layout.has_words:
            told = "its task has no words in meta/, as the tasks of other episodes have"
            return Problem(file, told, row.number, "task_index")
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

    def instruction(self, row: EpisodeRows, table: pa.Table) -> str:
        """The words of an episode, or nothing where there are none."""
        told = row.meta.get("tasks")
        if told is not None and len(told):
            return str(told if isinstance(told, str) else told[0])
        index = table["task_index"][0].as_py() if "task_index" in table.column_names and table.num_rows else None
        return "" if index is None else self.layout.tasks.get(index, "")

    def _frames(self, row: EpisodeRows, table: pa.Table) -> Sequence[Any] | Problem:
        assert self.camera is not None
        if self.layout.features[self.camera].get("dtype") == "video":
            found = find_frames(self.layout, row, table, self.camera, self.time_unit)
            return found if isinstance(found, Problem) else VideoFrames(found.path, found.numbers)
        if self.camera not in table.column_names:
            return Problem(str(row.file), "there is no such feature", row.number, self.camera)
        return [v["bytes"] if isinstance(v, dict) else v for v in table[self.camera].to_pylist()]

    def _image_shape(self) -> tuple[int, ...] | None:
        """(H, W, 3), whatever order the metadata lists them in, or None where it does not say."""
        if self.camera is None:
            return None
        feature = self.layout.features[self.camera]
        shape, names = feature.get("shape") or [], feature.get("names") or ["height", "width", "channel"]
        sizes = dict(zip((str(n).rstrip("s") for n in names), shape, strict=False))
        wanted = tuple(sizes.get(n) for n in ("height", "width", "channel"))
        return None if None in wanted else tuple(int(n) for n in wanted if n is not None)
