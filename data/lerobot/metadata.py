"""The files under ``meta/`` of a LeRobot folder, as their writers and other people's editors leave them.

JSON may begin with a byte order mark, and only a line feed ends one of its lines: U+2028, U+0085 and the like stand inside
instructions. Numbers may be text or lists of one entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spvla.errors import InputError
from spvla.files import inside, parse_json, read_bytes

LARGEST = 2**63  # beyond every whole number that Parquet holds


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file of JSON lines, and a note on whatever is not there or not readable."""
    try:
        content = read_bytes(path)
        lines = content.decode(json.detect_encoding(content)).split("\n")
    except (InputError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        return [], [f"{path}: cannot be read ({reason}); the data files count"]
    out, notes = [], []
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("\ufeff")  # files that were joined have such a mark in their middle
        try:
            value = parse_json(text, str(path)) if text else {}
        except InputError:
            value = None
        if not isinstance(value, dict):
            notes.append(f"{path}, line {number}: not a JSON object; left out")
        elif value:
            out.append(value)
    return out, notes


def read_tasks(folder: Path) -> tuple[dict[int, str], list[str]]:
    """Instruction by task index, as far as ``meta/`` has them, and notes on what is not readable."""
    lines, table = folder / "meta" / "tasks.jsonl", folder / "meta" / "tasks.parquet"
    notes: list[str] = []
    if lines.is_file():
        rows, notes = read_json_lines(lines)
        found = [(row.get("task_index"), row.get("task")) for row in rows]
    else:
        try:
            inside(folder, table.relative_to(folder))
            rows = pq.read_table(table, page_checksum_verification=True).to_pylist()
        except FileNotFoundError:
            return {}, []
        except (pa.ArrowException, OSError, UnicodeDecodeError, InputError) as error:
            return {}, [f"{table}: damaged Parquet file ({' '.join(str(error).split())}); there are no instructions"]
        found = [(row.get("task_index"), next((v for v in row.values() if isinstance(v, str)), None)) for row in rows]
    numbered = [(whole_number(index), words) for index, words in found]
    return {index: str(words) for index, words in numbered if index is not None and words is not None}, notes


def read_episode_tables(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """What v3.0's ``meta/episodes`` says of each episode, without the statistics, and notes on what is not readable."""
    out: dict[int, dict[str, Any]] = {}
    notes = []
    for file in sorted((folder / "meta" / "episodes").glob("**/*.parquet")):
        try:
            inside(folder, file.relative_to(folder))
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            rows = pq.read_table(file, columns=names, page_checksum_verification=True).to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError, InputError) as error:
            notes.append(f"{file}: damaged Parquet file ({' '.join(str(error).split())}); the data files are used")
            continue
        out |= by_episode(rows, file, notes)
    return out, notes


def by_episode(entries: list[dict[str, Any]], file: Path, notes: list[str]) -> dict[int, dict[str, Any]]:
    """Entries by their ``episode_index``; those without one are noted."""
    out = {}
    for entry in entries:
        number = whole_number(entry.get("episode_index"))
        if number is None:
            notes.append(f"{file}: an entry has the episode_index {entry.get('episode_index')!r}; left out")
        else:
            out[number] = {key: value if key == "tasks" else _unwrapped(value) for key, value in entry.items()}
    return out


def whole_number(value: Any) -> int | None:
    """A value as a whole number, be it stored as one, as text or as a list of one; else None, also beyond 64 bits."""
    value = _unwrapped(value)
    try:
        number = int(value)
        return number if float(value) == number and abs(number) < LARGEST else None
    except (TypeError, ValueError, OverflowError):
        return None


def _unwrapped(value: Any) -> Any:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value
