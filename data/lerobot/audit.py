"""What the data of a LeRobot folder says of its ``meta/``: which claims are wrong, and how fast the robot went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.lerobot.layout import Layout, recorded_times
from data.openx import first_action_note
from data.parts import Problem
from data.video import count_frames
from data.words import several_words_note
from spvla.episodes import vectors
from spvla.errors import InputError

if TYPE_CHECKING:
    from data.lerobot.reader import LerobotSource

EPISODES_TIMED = 16  # whose recorded times say how fast the robot was
EPISODES_CHECKED = 256  # that are compared with what meta/ says of them
RATE_SLACK = 0.1  # the claimed control rate may be off the recorded times by so much
JITTER = 0.25  # of a control step: larger deviations of the recorded times are noted


def notes(source: LerobotSource) -> list[str]:
    """See :class:`~data.sources.Source`; times, statistics and first actions are those of the first episodes."""
    layout = source.layout
    found = {"total_episodes": len(layout.rows), "total_frames": sum(r.length for r in layout.rows)}
    out = [
        f"{layout.about}: {name} claims {layout.info.get(name)}, the data holds {count}"
        for name, count in found.items()
        if layout.info.get(name) != count
    ]
    for split, span in (layout.info.get("splits") or {}).items():
        last = str(span).rpartition(":")[2]
        if last.isdecimal() and int(last) > len(layout.rows):
            out.append(f"{layout.about}: split {split} claims {span}, there are {len(layout.rows)} episodes")
    for name, width in layout.widths.items():
        shape = (layout.features.get(name) or {}).get("shape")
        if shape and list(shape) != [width]:
            out.append(f"{layout.about}: {name} claims the shape {list(shape)}, the data has {width} entries")
    for camera in layout.cameras():
        if layout.features[camera].get("dtype") == "video":
            videos = [(row, layout.video(row, camera, source.space.control_rate)) for row in layout.rows]
            if missing := sum(isinstance(video, Problem) for _, video in videos):
                out.append(f"{layout.path}: {missing} of {len(layout.rows)} videos of {camera} are not there")
            for row, video in videos[:EPISODES_TIMED] if layout.version != "v3.0" else ():
                frames = None if isinstance(video, Problem) else count_frames(video[0])
                if frames and row.length and frames != row.length:
                    out.append(f"{row.file}: {row.length} steps, but its video of {camera} has {frames} frames")
    read = (source.read(row, False) for row in layout.rows[:EPISODES_TIMED])
    episodes = [e for found in read if not isinstance(found, Problem) for e in found]
    out += [*layout.told, *source.cameras.note, *_check_rows(source), *several_words_note(str(layout.path), episodes)]
    whole = [e for e in episodes if not e.metadata.get("part")]
    return [*out, *first_action_note(str(layout.path), whole, source.space)]


def _check_rows(source: LerobotSource) -> list[str]:
    """The first episodes' times against the control rate, and their extremes against those that ``meta/`` states."""
    layout = source.layout
    gaps: list[NDArray[np.float64]] = []
    untimed, silent, retold, out = 0, 0, 0, []
    stated = _stated_extremes(layout)
    for row in layout.rows[:EPISODES_CHECKED]:
        try:
            table = layout.table(row) if row.problem is None else None
        except InputError:
            table = None
        if table is None or not table.num_rows:
            continue
        words = source.words(row, table)
        used = {""} if isinstance(words, Problem) else words.used()
        silent += not any(map(str.strip, used))
        retold += bool(row.tasks) and not isinstance(words, Problem) and used != set(row.tasks)
        times = recorded_times(table)
        untimed += times is None
        numbers = table["episode_index"].unique().to_pylist() if "episode_index" in table.column_names else [row.number]
        if numbers != [row.number]:
            out.append(f"{row.file}: its rows say episode {numbers}, its name says {row.number}; the name counts")
        gaps += [] if times is None else [np.diff(times)]
        for key, (low, high) in stated.get(row.number, {}).items():
            values = vectors(table[key]) if key in layout.widths and key in table.column_names else np.zeros((0, 1))
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
    keys = ("action", "observation.state")
    lines = layout.path / "meta" / "episodes_stats.jsonl"
    out: dict[int | None, dict[str, tuple[Any, Any]]] = {}
    if lines.is_file() and layout.version != "v3.0":
        for entry in layout.read_lines(lines):
            stats = entry.get("stats") or {}
            out[entry.get("episode_index")] = {
                key: (stats[key]["min"], stats[key]["max"]) for key in keys if {"min", "max"} <= (stats.get(key) or {}).keys()
            }
    for file in sorted((layout.path / "meta" / "episodes").glob("*/*.parquet"))[:1]:
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


def find_rate(layout: Layout) -> float:
    """Control steps per second: as claimed, unless the recorded times say otherwise throughout.

    Raises:
        InputError: neither is there.
    """
    claimed = layout.info.get("fps")
    valid = float(claimed) if isinstance(claimed, int | float) and claimed > 0 else None
    gaps = []
    for row in layout.rows[:EPISODES_TIMED]:
        try:
            times = recorded_times(layout.table(row)) if row.problem is None else None
        except InputError:
            continue
        gaps += [] if times is None else [np.diff(times)]
    steps = np.concatenate(gaps) if gaps else np.zeros(0)
    if not len(steps):
        if valid is None:
            raise InputError(f"{layout.about}: fps is {claimed}, and no recorded times tell the control rate; name conventions")
        return valid
    measured = 1 / float(np.median(steps))
    if valid is not None and abs(measured / valid - 1) <= RATE_SLACK:
        return valid
    rate = float(round(measured)) if abs(round(measured) / measured - 1) < 0.02 else float(f"{measured:.3g}")
    layout.told.append(
        f"{layout.about}: fps claims {claimed}, by the recorded times it is {measured:.3g} Hz; {rate:g} is taken"
    )
    return rate


def _close(found: NDArray[np.float32], stated: Any) -> bool:
    """Whether two vectors are equal up to rounding; True where the stated one is of another kind or not finite."""
    try:
        values = np.asarray(stated, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return True
    usable = values.shape == found.shape and np.isfinite(values).all() and np.isfinite(found).all()
    return bool(not usable or np.allclose(found, values, rtol=1e-4, atol=1e-5))
