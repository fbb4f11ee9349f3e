"""LeRobot data sets, formats v2.0, v2.1 and v3.0, read with pyarrow; video frames are decoded on demand (``data.video``).

What ``meta/`` claims and the data contradicts is noted, and the data wins: which episodes there are, how long they are and how
fast they went is what the Parquet files say. Rollout stores are v3.0 folders with extra features, which come back with the
episodes. (The writer of v3.0 is ``spvla.store.lerobot_v3``.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.identity import digest, file_content, hub_name
from data.lerobot import audit
from data.lerobot.clock import find_frames
from data.lerobot.columns import INDEX, recorded_times, to_array
from data.lerobot.guess import choose_conventions
from data.lerobot.layout import EpisodeRows, Layout
from data.lerobot.pictures import Pictures
from data.lerobot.times import find_unit
from data.openx import standardize
from data.parts import Part, Problem
from data.video import VideoFrames
from data.words import Words, split_at_words
from spvla.errors import InputError
from spvla.files import parse_object
from spvla.images import open_image
from spvla.store import VECTOR_COLUMNS, Episode, read_action_space
from spvla.store.columns import read_ages, read_propensities, read_sources, read_vectors

EPISODES_PER_PART = 16
LABELS = tuple(name for name in VECTOR_COLUMNS if name not in ("actions", "states"))
LABEL_COLUMNS = (*(VECTOR_COLUMNS[name] for name in LABELS), "action.source", "vla_age", "vla_propensity")


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
        hub = hub_name(self.path)
        self.name, self.named = hub or self.path.resolve().name, hub is not None
        self.own_space = (self.path / "meta" / "spvla.json").is_file() and conventions is None
        self.conventions = choose_conventions(layout, conventions, self.own_space)
        self.space = read_action_space(self.path) if self.own_space else self.conventions.space(self.name, layout.widths)
        for key in self.conventions.keys:
            if key not in layout.columns:
                raise InputError(f"{self.path}: no feature {key!r}; available: {', '.join(layout.columns)}")
        self.pictures = Pictures(layout)
        self.cameras = self.pictures.find_cameras(camera or self.conventions.camera)
        self.camera = self.cameras.chosen
        self.image_shape = None if self.camera is None else self.pictures.image_shape(self.camera)
        self.time_unit = 1.0 if self.own_space else find_unit(layout, self.conventions.control_rate)  # seconds
        self.columns = (*INDEX, *self.conventions.keys, *(LABEL_COLUMNS if self.own_space else ()))
        files = {file: file_content(file) for file in dict.fromkeys(row.file for row in layout.rows)}
        self._contents = [digest((files[row.file], row.first, row.length, row.number)) for row in layout.rows]
        self.parts = []
        for at in range(0, len(layout.rows), EPISODES_PER_PART):
            rows = layout.rows[at : at + EPISODES_PER_PART]
            size = sum(f.stat().st_size for f in dict.fromkeys(r.file for r in rows) if f.is_file())
            content = digest(self._contents[at : at + EPISODES_PER_PART])
            self.parts.append(Part(f"{self.name}-{at:06d}", str(rows[0].file), at, len(rows), at, size, content))

    @cached_property
    def contents(self) -> dict[int, tuple[Any, ...]]:
        """See :class:`~data.sources.Source`; an episode of a rollout store is the recording that it was made from."""
        out: dict[int, tuple[Any, ...]] = {}
        for row, content in zip(self.layout.rows, self._contents, strict=True):
            recorded = _recorded(row) or {}
            if row.number is not None:
                known = recorded.get("content")
                out[row.number] = (content,) if known is None else (known, recorded.get("part"))
        return out

    @cached_property
    def notes(self) -> list[str]:
        """See :class:`~data.sources.Source`; times, statistics and first actions are those of the first episodes."""
        return audit.notes(self)

    def episodes(self, part: Part, images: bool = False) -> Iterator[Episode | Problem]:
        """See :class:`~data.sources.Source`. Images from Parquet are encoded, those from video :class:`VideoFrames`."""
        if images:
            self.cameras.require()
        for row in self.layout.rows[part.first : part.first + part.count]:
            found = self.read(row, images)
            yield from [found] if isinstance(found, Problem) else found

    def read(self, row: EpisodeRows, images: bool) -> list[Episode] | Problem:
        """One recording as an episode per instruction, with images if they are asked for, or the problem that it has."""
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
        recorded = _recorded(row)
        if recorded is None:
            return Problem(file, f"is {row.meta['metadata']!r} in meta/episodes, not a JSON object", row.number, "metadata")
        facts: dict[str, Any] = {"dataset": self.name, "named": self.named, "file": row.file.name, "number": row.number}
        facts["content"] = self.contents.get(row.number, ("",))[0] if row.number is not None else ""
        if "metadata" in row.meta:
            facts = {**recorded, "row" if "number" in recorded else "number": row.number}
        number = -1 if row.number is None else row.number
        words = self.words(row, table)
        if isinstance(words, Problem):
            return words
        lost = not any(map(str.strip, words.used())) and self.layout.has_words
        if lost and not self.own_space and self.conventions.instruction is None:
            told = "its task has no text in meta/, unlike those of other episodes"
            return Problem(file, told, row.number, "task_index")
        out = standardize(steps, self.conventions, file, number, facts, {}, None, times, pictures)
        if isinstance(out, Problem):
            return out
        out.success = row.meta.get("success")
        if self.own_space:  # a rollout store: its labels come along
            try:
                for name in LABELS:
                    if VECTOR_COLUMNS[name] in table.column_names:
                        setattr(out, name, read_vectors(table, VECTOR_COLUMNS[name], file))
                out.sources = read_sources(table, file)
                out.vla_ages = read_ages(table, np.arange(table.num_rows), file)
                out.vla_propensities = read_propensities(table, file)
                out.check(self.space, file)
            except InputError as error:
                return Problem(file, str(error).removeprefix(f"{file}: "), row.number)
        return split_at_words(out, words[self.conventions.kept(table.num_rows)])

    def words(self, row: EpisodeRows, table: pa.Table) -> Words | Problem:
        """The words of each frame, '' where there are none: what the task table says of its ``task_index``; where it says
        nothing, the only words that ``meta/`` has for the whole episode."""
        told, tasks = row.tasks, self.layout.tasks
        only = told[0] if len(told) == 1 else ""
        if "task_index" in table.column_names:
            indices = table["task_index"].to_numpy()
            if len(told) < 2 or tasks.keys() & set(np.unique(indices).tolist()):
                return Words.of(indices, lambda index: tasks.get(index, only))
        if len(told) > 1:
            reason = f"has {len(told)} tasks in meta/, and nothing says which step is part of which"
            return Problem(str(row.file), reason, row.number, "task_index")
        return Words([only], np.zeros(table.num_rows, np.int64))

    def _frames(self, row: EpisodeRows, table: pa.Table) -> Sequence[Any] | Problem:
        assert self.camera is not None
        if self.layout.features[self.camera].get("dtype") == "video":
            found = find_frames(self.pictures, row, table, self.camera, self.time_unit)
            return found if isinstance(found, Problem) else VideoFrames(found.path, found.numbers)
        if self.camera not in table.column_names:
            return Problem(str(row.file), "there is no such feature", row.number, self.camera)
        frames = [v.get("bytes") if isinstance(v, dict) else v for v in table[self.camera].to_pylist()]
        if _is_deep(next((f for f in frames if f is not None), b"")):
            return Problem(str(row.file), "is a depth map (more than 8 bits of grey), not an image", row.number, self.camera)
        return frames


def _is_deep(image: bytes) -> bool:
    """Whether an encoded image has numbers of more than 8 bits."""
    try:
        with open_image(image) as opened:
            return opened.mode.startswith(("I", "F"))
    except InputError:
        return False  # a damaged image, which is reported when decoded


def _recorded(row: EpisodeRows) -> dict[str, Any] | None:
    """The metadata that a rollout store keeps of an episode, empty for any other data set; None if it cannot be read."""
    try:
        return parse_object(row.meta.get("metadata", "{}"), "metadata")
    except (InputError, TypeError):
        return None
