"""Which claims of a LeRobot folder's ``meta/`` its data contradicts."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.lerobot.columns import INDEX, is_regular, recorded_times
from data.lerobot.layout import Layout
from data.lerobot.metadata import whole_number
from data.lerobot.pictures import Pictures
from data.lerobot.times import EPISODES_TIMED
from data.openx import first_action_note
from data.parts import Problem
from data.video import frame_clock
from data.words import several_words_note
from spvla.errors import InputError
from spvla.store.columns import vectors

if TYPE_CHECKING:
    from data.lerobot.reader import LerobotSource

EPISODES_CHECKED = 256  # that are compared with what meta/ says of them
STATED = ("action", "observation.state")  # whose extremes meta/ states
JITTER = 0.25  # of a control step: larger deviations of the recorded times are noted


def notes(source: LerobotSource) -> list[str]:
    """See :class:`~data.sources.Source`; times, statistics and first actions are those of the first episodes."""
    layout, pictures = source.layout, source.pictures
    filmed = [camera for camera in pictures.cameras() if layout.features[camera]["dtype"] == "video"]
    videos = {camera: [pictures.video_file(row, camera) for row in layout.rows] for camera in filmed}
    found = {"total_episodes": len(layout.rows), "total_frames": sum(r.length for r in layout.rows)}
    if layout.version != "v3.0":
        there = sum(isinstance(video, Path) for of_camera in videos.values() for video in of_camera)
        more = {"total_videos": there, "total_chunks": len({row.file.parent for row in layout.rows})}
        found |= {name: count for name, count in more.items() if name in layout.info}
    out = [
        f"{layout.about}: {name} claims {layout.info.get(name)}, the data holds {count}"
        for name, count in found.items()
        if layout.info.get(name) != count
    ]
    splits = layout.info.get("splits")
    for split, span in splits.items() if isinstance(splits, dict) else ():
        last = str(span).rpartition(":")[2]
        if last.isdecimal() and int(last) > len(layout.rows):
            out.append(f"{layout.about}: split {split} claims {span}, there are {len(layout.rows)} episodes")
    for name, width in layout.widths.items():
        shape = (layout.features.get(name) or {}).get("shape")
        if shape and prod(whole_number(n) or 0 for n in shape) != width:
            out.append(f"{layout.about}: {name} claims the shape {list(shape)}, the data has {width} entries")
    for camera, of_camera in videos.items():
        if missing := sum(isinstance(video, Problem) for video in of_camera):
            told = f"{layout.path}: {missing} of {len(layout.rows)} videos of {camera} are not there"
            out.append(told if missing < len(layout.rows) else f"{told}{_other_videos(pictures)}")
        pairs = list(zip(layout.rows, of_camera, strict=True))[:EPISODES_TIMED]
        for row, video in pairs if layout.version != "v3.0" else ():
            frames = _count_frames(video) if isinstance(video, Path) else None
            if frames and row.length and frames != row.length:
                out.append(f"{row.file}: {row.length} steps, but its video of {camera} has {frames} frames")
    read = (source.read(row, False) for row in layout.rows[:EPISODES_TIMED])
    episodes = [e for found in read if not isinstance(found, Problem) for e in found]
    out += [*layout.told, *source.cameras.note, *_check_rows(source), *several_words_note(str(layout.path), episodes)]
    whole = [e for e in episodes if not e.metadata.get("part")]
    return [*out, *first_action_note(str(layout.path), whole, source.space)]


def _other_videos(pictures: Pictures) -> str:
    """Which videos there are, for whoever named a camera that has none."""
    files, layout = pictures.video_files, pictures.layout
    unlisted = {path.parent.name for path in files} | {path.parent.parent.name for path in files}
    unlisted = {name for name in unlisted if name not in ("", "videos", *layout.features) and not name.startswith("chunk")}
    there = [camera for camera in pictures.cameras() if pictures.has_images(camera)]
    told = f"; there are pictures of {', '.join(there)}" if there else ""
    folders = ", ".join(sorted(unlisted))
    return f"{told}; the folders {folders} hold videos of cameras that {layout.about.name} does not list" if folders else told


def _count_frames(path: Path) -> int | None:
    """How many frames a video has; None where it cannot be read."""
    try:
        return len(frame_clock(path))
    except InputError:
        return None


def _check_rows(source: LerobotSource) -> list[str]:
    """The first episodes' times against the control rate, and their extremes against those that ``meta/`` states."""
    layout = source.layout
    gaps: list[NDArray[np.float64]] = []
    untimed, silent, retold, out = 0, 0, 0, []
    stated = _stated_extremes(layout)
    for row in layout.rows[:EPISODES_CHECKED]:
        try:
            table = layout.table(row, (*INDEX, *STATED)) if row.problem is None else None
        except InputError:
            table = None
        if table is None or not table.num_rows:
            continue
        words = source.words(row, table)
        used = {""} if isinstance(words, Problem) else words.used()
        silent += not any(map(str.strip, used))
        retold += bool(row.tasks) and not isinstance(words, Problem) and used != set(row.tasks)
        times = recorded_times(table, source.time_unit)
        untimed += times is None
        numbers = table["episode_index"].unique().to_pylist() if "episode_index" in table.column_names else [row.number]
        if numbers != [row.number]:
            out.append(f"{row.file}: its rows say episode {numbers}, its name says {row.number}; the name counts")
        gaps += [] if times is None else [np.diff(times)]
        for key, (low, high) in stated.get(row.number, {}).items():
            regular = key in table.column_names and is_regular(table[key].type)
            values = vectors(table[key]) if regular else np.zeros((0, 1))
            if len(values) and not (_close(values.min(0), low) and _close(values.max(0), high)):
                told = f"{key} of episode {row.number} has other extremes than meta/ states: one of them is damaged"
                out.append(f"{row.file}: {told}")
    steps = np.concatenate(gaps) if gaps else np.zeros(0)
    nominal = 1 / source.space.control_rate
    if len(steps) and np.abs(steps - nominal).max() > JITTER * nominal:
        out.append(
            f"{layout.path}: steps take {steps.min():.3f} to {steps.max():.3f} s (median {np.median(steps):.3f}), the "
            f"control rate of {source.space.control_rate:g} Hz would be {nominal:.3f} s; it stays, and the times are kept"
        )
    for count, what in (
        (untimed, "no usable timestamps; they are counted by the control rate"),
        (silent, "no instruction"),
        (retold, "other words in meta/episodes than by their task_index, which counts"),
    ):
        if count:
            out.append(f"{layout.path}: {count} of the first {min(len(layout.rows), EPISODES_CHECKED)} episodes have {what}")
    return out


def _stated_extremes(layout: Layout) -> dict[int | None, dict[str, tuple[Any, Any]]]:
    """Smallest and largest values (D,) of action and state by episode, as ``meta/`` states them."""
    lines = layout.path / "meta" / "episodes_stats.jsonl"
    out: dict[int | None, dict[str, tuple[Any, Any]]] = {}
    if lines.is_file() and layout.version != "v3.0":
        for entry in layout.read_lines(lines):
            stats = entry.get("stats")
            stats = stats if isinstance(stats, dict) else {}
            stated = {key: stats[key] for key in STATED if isinstance(stats.get(key), dict)}
            out[whole_number(entry.get("episode_index"))] = {
                key: (values["min"], values["max"]) for key, values in stated.items() if {"min", "max"} <= values.keys()
            }
    for file in sorted((layout.path / "meta" / "episodes").glob("*/*.parquet"))[:1]:
        try:
            names = set(layout.schema(file).names)
            there = [key for key in STATED if {f"stats/{key}/min", f"stats/{key}/max"} <= names]
            columns = ["episode_index", *(f"stats/{key}/{end}" for key in there for end in ("min", "max"))]
            stats = pq.read_table(file, columns=columns, page_checksum_verification=True)
            for e in stats.slice(0, EPISODES_CHECKED).to_pylist():
                out[whole_number(e["episode_index"])] = {key: (e[f"stats/{key}/min"], e[f"stats/{key}/max"]) for key in there}
        except (pa.ArrowException, OSError, KeyError, InputError):
            break  # told when the episodes were looked up
    return out


def _close(found: NDArray[np.float32], stated: Any) -> bool:
    """Whether two vectors are equal up to rounding; True where the stated one is of another kind or not finite."""
    try:
        values = np.asarray(stated, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return True
    usable = values.shape == found.shape and np.isfinite(values).all() and np.isfinite(found).all()
    return bool(not usable or np.allclose(found, values, rtol=1e-4, atol=1e-5))
