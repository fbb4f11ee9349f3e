"""The cameras of a LeRobot folder, and the files with their images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.cameras import Cameras, is_depth
from data.lerobot.layout import EpisodeRows, Layout
from data.lerobot.metadata import whole_number
from data.parts import Problem
from spvla.errors import InputError
from spvla.files import inside


@dataclass(frozen=True)
class EpisodeVideo:
    """Where an episode's video is.

    Args:
        path: the file.
        camera: the feature that it belongs to.
        start: seconds in the file at which the episode's time 0 is.
        end: seconds at which the episode ends, as ``meta/`` states it; infinite where it does not.
        following: seconds at which the next episode of the file begins; infinite where there is none.
        before: the episode before it in the file, if there is one.
    """

    path: Path
    camera: str
    start: float
    end: float
    following: float
    before: EpisodeRows | None


class Pictures:
    """The cameras of a folder, and where their videos are."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._shared_videos: dict[str, dict[Any, list[tuple[float, EpisodeRows]]]] = {}

    def cameras(self) -> list[str]:
        return [k for k, f in self.layout.features.items() if f.get("dtype") in ("video", "image")]

    def image_shape(self, camera: str) -> tuple[int, ...] | None:
        """(H, W, C), whatever order the metadata lists them in, or None where it does not say."""
        feature = self.layout.features[camera]
        shape, names = feature.get("shape") or [], feature.get("names")
        names = names if names and isinstance(names, list) else ["height", "width", "channel"]
        sizes = dict(zip((str(n).rstrip("s") for n in names), shape, strict=False))
        wanted = tuple(sizes.get(n) for n in ("height", "width", "channel"))
        numbers = tuple(whole_number(n) for n in wanted)
        return None if None in numbers else tuple(n for n in numbers if n is not None)

    def has_images(self, camera: str) -> bool:
        """Whether any episode has images of a camera, in a video file or in its Parquet file."""
        rows = [row for row in self.layout.rows if row.problem is None]
        if self.layout.features[camera].get("dtype") == "video":
            return any(isinstance(self.video_file(row, camera), Path) for row in rows)
        return any(camera in self.layout.schema(file).names for file in dict.fromkeys(row.file for row in rows))

    def find_cameras(self, named: str | None) -> Cameras:
        """The folder's cameras by kind, and which of them is ``named``. Raises :class:`InputError`: see
        :class:`~data.cameras.Cameras`."""
        every = self.cameras()
        depth = [c for c in every if is_depth(self.layout.features[c])]
        plain = [c for c in every if c not in depth and (self.image_shape(c) or (0, 0, 3))[2] in (3, 4)]
        colour = [c for c in plain if self.has_images(c)]
        others = [c for c in every if c not in colour and c not in depth]
        return Cameras(str(self.layout.path), colour, depth, others, named)

    def video(self, row: EpisodeRows, camera: str) -> EpisodeVideo | Problem:
        """The file with an episode's video, and where the episode lies in it."""
        path = self.video_file(row, camera)
        if isinstance(path, Problem):
            return path
        shared = self._sharing(camera)[self._place_v3(row, camera)] if self.layout.version == "v3.0" else [(0.0, row)]
        at = next(k for k, (_, other) in enumerate(shared) if other is row)
        start = shared[at][0]
        if len(shared) > 1 and not np.isfinite(start):
            reason = "meta/episodes does not say where in the video it begins"
            return Problem(str(row.file), reason, row.number, f"videos/{camera}/from_timestamp")
        end = row.meta.get(f"videos/{camera}/to_timestamp") if self.layout.version == "v3.0" else None
        before = shared[at - 1][1] if at else None
        following = shared[at + 1][0] if at + 1 < len(shared) else np.inf
        following = following if np.isfinite(following) else np.inf
        start, end = start if np.isfinite(start) else 0.0, np.inf if end is None else float(end)
        return EpisodeVideo(path, camera, start, end, following, before)

    def video_file(self, row: EpisodeRows, camera: str) -> Path | Problem:
        """The file with an episode's video: where the metadata says, else wherever in the folder it lies."""
        if self.layout.version == "v3.0":
            numbers = self._place_v3(row, camera)
            place = dict(zip(("chunk_index", "file_index"), numbers, strict=True))
            if None in numbers:
                return Problem(str(row.file), "meta/episodes names no video for it", row.number, camera)
        else:
            numbers = (row.number,)
            place = {"episode_chunk": (row.number or 0) // self.layout.chunk_size, "episode_index": row.number}
        template = str(self.layout.info.get("video_path") or "")
        try:
            path = inside(
                self.layout.path, self.layout.fill(template, {"video_key": camera, **place}).relative_to(self.layout.path)
            )
            if path.is_file():
                return path
            found = [inside(self.layout.path, file) for file in self._videos.get((camera, *numbers), [])]
        except InputError as error:
            return Problem(str(row.file), str(error), row.number, camera)
        if len(found) == 1:
            about = self.layout.about
            self.layout.tell_once(
                f"{about}: video_path is {template!r}, some videos lie elsewhere in the folder and were found"
            )
            return found[0]
        told = f"the video is not there, and {len(found)} others could be meant: {found[0]}, {found[1]}" if found else ""
        return Problem(str(path), told or "the video is not there", row.number, camera)

    def _place_v3(self, row: EpisodeRows, camera: str) -> tuple[int | None, ...]:
        """Numbers of chunk and file of an episode's video, None where ``meta/`` does not say."""
        return tuple(whole_number(row.meta.get(f"videos/{camera}/{name}_index")) for name in ("chunk", "file"))

    def _sharing(self, camera: str) -> dict[Any, list[tuple[float, EpisodeRows]]]:
        """The episodes in each video file of v3.0 by where they begin (seconds; NaN, last, where ``meta/`` does not say)."""
        if camera not in self._shared_videos:
            files = self._shared_videos[camera] = {}
            for row in self.layout.rows:
                if None not in (where := self._place_v3(row, camera)):
                    start = row.meta.get(f"videos/{camera}/from_timestamp")
                    files.setdefault(where, []).append((np.nan if start is None else float(start), row))
            for rows in files.values():
                rows.sort(key=lambda r: (not np.isfinite(r[0]), r[0]))
        return self._shared_videos[camera]

    @cached_property
    def _videos(self) -> dict[tuple[str | int | None, ...], list[Path]]:
        """All videos in the folder by camera (one of the folders above has its name) and the episode's number; in v3.0, by
        camera and the numbers of chunk and file."""
        found: dict[tuple[str | int | None, ...], list[Path]] = {}
        for path in self.video_files:
            camera = next((name for name in path.parts if name in self.layout.features), None)
            chunk = next((name for name in path.parts if name.startswith("chunk")), "")
            names = (chunk, path.stem) if self.layout.version == "v3.0" else (path.stem,)
            numbers = [re.search(r"\d+$", name) for name in names]
            found.setdefault((camera, *(int(n[0]) if n else None for n in numbers)), []).append(path)
        return found

    @cached_property
    def video_files(self) -> list[Path]:
        """All video files, seen from the folder."""
        suffix = Path(str(self.layout.info.get("video_path") or "")).suffix or ".mp4"
        return sorted(path.relative_to(self.layout.path) for path in self.layout.path.rglob(f"*{suffix}"))
