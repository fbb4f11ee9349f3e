"""What every evaluation leaves behind: tables as text, summary.json, compressed raw rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from math import isqrt
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tabulate import tabulate

from spvla.errors import InputError
from spvla.files import explained, parse_object, read_bytes, read_json, write_text

TEXT = (  # columns that stay text, whatever they look like
    *("cell", "generator", "gate", "pruning", "mode", "verify", "export", "suite", "task_name"),
    *("asked", "instruction", "object", "own_object", "lifted"),
)


def cell(value: Any, missing: str = "-") -> str:
    """A value as a table shows it: three significant digits."""
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(cell(v) for v in value) + "]"
    return str(value)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as an aligned text table; missing values are dashes."""
    return tabulate([[cell(r.get(c)) for c in columns] for r in rows], columns, "plain", disable_numparse=True)


def main_image(tokens: NDArray[Any]) -> NDArray[Any]:
    """The main image's part of values of all visual tokens, (N,), as a grid (rows, columns).

    A VLA of n images counts them one after another, the main one first. N = n grid² has a square N / n for one n up to 3 alone.
    """
    n = next((n for n in (1, 2, 3) if tokens.size % n == 0 and isqrt(tokens.size // n) ** 2 * n == tokens.size), 1)
    grid = isqrt(tokens.size // n)
    return tokens[: tokens.size // n].reshape(grid, -1)


def write_summary(output: Path, kind: str, rows: Sequence[dict[str, Any]], **facts: Any) -> Path:
    """``summary.json``: what was measured, on what, and one row per cell."""
    path = output / "summary.json"
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("spvla", "torch", "numpy")}
    summary = {"kind": kind, "rows": list(rows), **facts, "machine": machine, "versions": versions}
    write_text(path, json.dumps(summary, indent=1) + "\n")
    return path


def continued(raw: Path, setting_path: Path, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (JSON lines in ``raw``) of an earlier run with the same setting, which this one continues.

    Raises:
        InputError: the folder holds another setting's rows, or rows that somebody damaged; a killed run's last row is none.
    """
    rows = _whole_rows(raw) if raw.exists() else []
    if rows:
        try:
            theirs = read_json(setting_path)
        except InputError as error:
            raise InputError(f"{error}, so {raw.name} cannot be continued", code=error.code, field=error.field) from None
        if theirs != json.loads(json.dumps(fixed)):
            raise InputError(
                f"{setting_path.parent}: holds results of another setting (see setting.json); choose another --output"
            )
    write_text(setting_path, json.dumps(fixed, indent=1) + "\n")
    return rows


def _whole_rows(raw: Path) -> list[dict[str, Any]]:
    """The rows of JSON lines; a last one that a killed run left unfinished is cut off the file."""
    text = read_bytes(raw)
    whole = text.rfind(b"\n") + 1
    try:
        rows = [parse_object(line, f"{raw}: line {k}") for k, line in enumerate(text[:whole].split(b"\n")[:-1], 1)]
    except InputError as error:
        raise InputError(f"{error}; delete it to start again", code=error.code, field=str(raw)) from None
    if whole < len(text):
        os.truncate(raw, whole)
    return rows


def append(raw: Path, row: dict[str, Any]) -> None:
    """Add a row for :func:`continued`: a killed run loses at most the last line."""
    with explained(raw), raw.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows as :func:`write_csv` wrote them; names of things stay text, whatever they look like. Raises :class:`InputError` if
    there is no such file."""
    if not path.exists():
        raise InputError(f"{path}: the raw rows are missing", code="missing")
    with gzip.open(path, "rt", newline="") as stream:
        return [{k: v if k in TEXT and v else _value(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def _value(text: str) -> Any:
    if text in ("", "True", "False"):
        return None if text == "" else text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as gzip-compressed CSV; lists are written as JSON. The file's bytes depend on the rows alone."""
    text = io.StringIO()
    columns = list(dict.fromkeys(k for row in rows for k in row))
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    return path
