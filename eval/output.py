"""What every evaluation leaves behind: tables as text, summary.json, compressed raw rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spvla.errors import InputError


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as an aligned text table; missing values are dashes."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(cell(v) for v in value) + "]"
        return str(value)

    cells = [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) if cells else len(c) for i, c in enumerate(columns)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True))]
    lines += ["  ".join(v.ljust(w) for v, w in zip(r, widths, strict=True)) for r in cells]
    return "\n".join(lines)


def write_summary(output: Path, kind: str, rows: Sequence[dict[str, Any]], **facts: Any) -> Path:
    """``summary.json``: what was measured, on what, and one row per cell."""
    path = output / "summary.json"
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    versions = {name: version(name) for name in ("spvla", "torch", "numpy")}
    summary = {"kind": kind, "rows": list(rows), **facts, "machine": machine, "versions": versions}
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


def continued(raw: Path, setting_path: Path, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows (gzipped JSON lines in ``raw``) of an earlier run with the same setting, which this one continues.

    Raises:
        InputError: the folder holds another setting's rows.
    """
    if setting_path.exists() and json.loads(setting_path.read_text()) != json.loads(json.dumps(fixed)):
        raise InputError(f"{setting_path.parent}: holds results of another setting (see setting.json); choose another --output")
    setting_path.write_text(json.dumps(fixed, indent=1) + "\n")
    if not raw.exists():
        return []
    out = []
    with gzip.open(raw, "rt") as stream:
        try:
            for line in stream:
                out.append(json.loads(line))
        except (EOFError, json.JSONDecodeError, gzip.BadGzipFile):
            pass  # the line that a killed run was writing
    whole = raw.with_suffix(".tmp")
    with gzip.open(whole, "wt") as stream:
        stream.writelines(json.dumps(e) + "\n" for e in out)
    whole.replace(raw)
    return out


def append(raw: Path, row: dict[str, Any]) -> None:
    """Add a row for :func:`continued`. Members are appended whole: a killed run loses at most the last line."""
    with gzip.open(raw, "at") as stream:
        stream.write(json.dumps(row) + "\n")


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
