"""Summaries written anew from the raw rows that earlier evaluations left: ``python -m eval summarise``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from eval import instructions
from eval.output import read_csv, table
from eval.summary import Row, columns_of, summarise
from spvla.errors import InputError
from spvla.fields import naming
from spvla.files import read_json, write_text


def _closed_loop(episodes: Sequence[Row]) -> list[Row]:
    return summarise([{"held": 0, "nudged": None} | e for e in episodes], {})


RAW: dict[str, tuple[str, str, Callable[[Sequence[Row]], list[Row]]]] = {  # by kind: raw rows, what names a row, statistics
    "closed_loop": ("episodes.csv.gz", "cell", _closed_loop),
    "instructions": ("trials.csv.gz", "asked", instructions.summarise),
}


def rewrite(results: Path) -> None:
    """Write the summaries below a folder anew from the raw rows beside them, with today's statistics. No episode runs.

    Columns that raw rows do not hold (times, kept tokens) and all facts about the run stay what they are.

    Args:
        results: folder that holds results of eval closed_loop or eval instructions, at any depth; others are left alone.
    """
    found = [path for path in sorted(results.rglob("summary.json")) if read_json(path).get("kind") in RAW]
    if not found:
        raise InputError(f"{results}: no summary.json of a closed loop or of instructions below it")
    for path in found:
        with naming(f"{path}, or a file beside it, is damaged", EOFError, OSError):
            changed = _rewrite(path)
        print(f"{'written' if changed else 'unchanged'}: {path}")


def _rewrite(path: Path) -> bool:
    """Whether the statistics of one summary changed; if so it is written, and its table.txt."""
    summary = read_json(path)
    name, key, statistics = RAW[summary["kind"]]
    before = {row[key]: row for row in summary["rows"]}
    rows = [_joined(row, before[row[key]]) for row in statistics(read_csv(path.parent / name))]
    if json.loads(json.dumps(rows)) == summary["rows"]:
        return False
    write_text(path, json.dumps({**summary, "rows": rows}, indent=1) + "\n")
    kinds = {"real_time": bool(summary.get("real_time")), "nudge": bool(summary.get("nudge"))}
    columns = columns_of(rows, **kinds) if summary["kind"] == "closed_loop" else instructions.COLUMNS
    write_text(path.parent / "table.txt", table(rows, columns) + "\n")
    return True


def _joined(row: Row, before: Row) -> Row:
    """A new row with what only the one before knows."""
    return row | {k: v for k, v in before.items() if row.get(k) is None}
