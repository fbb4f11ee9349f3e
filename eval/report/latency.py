"""Latency, and any other rows, on the page: medians by stage, stacked, and plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from eval.output import cell
from eval.report.figures import Section, Table, picture


def section(folder: Path, summary: dict[str, Any]) -> Section:
    """Milliseconds by stage, stacked, and the table."""
    stages = summary.get("stages", [])
    inner = ("queries_keys", "score", "contours", "selection")
    vla, beside = ("preprocess", "vision", *inner, "projector", "prefill", "decode"), ("proposal", "gate", "bookkeeping")
    order = (*vla, *beside)
    bars = {
        n if n != "none" else "VLA": {s["stage"]: s["p50"] for s in stages if s["pruning"] == n}
        for n in dict.fromkeys(s["pruning"] for s in stages)
    }
    generators = [r for r in summary["rows"] if "generator" in r]
    bars |= {pair(r): {k: r[f"{k}_ms_p50"] for k in beside} for r in generators}
    by = " and ".join(name for name, found in (("pruning", stages), ("generator", generators)) if found)

    def draw(f: Any) -> None:
        axis = f.add_subplot()
        left = np.zeros(len(bars))
        for k, stage in enumerate(s for s in order if any(s in v for v in bars.values())):
            width = np.array([v.get(stage, 0.0) for v in bars.values()])
            axis.barh(list(bars), width, left=left, height=0.6, color=f"C{k}", label=stage.replace("_", " "))
            left += width
        axis.invert_yaxis()
        axis.set(xlabel="milliseconds (medians)")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    facts = ", ".join(f"{k} {summary[k]}" for k in ("device", "dtype", "threads", "attention") if k in summary)
    out = plain_section(folder, summary)
    out.title += f" by {by}"
    out.lead = [picture(draw, f"By stage; {facts}.", 9, 1.4 + 0.45 * len(bars))]
    return out


def pair(row: dict[str, Any]) -> str:
    """A generator and its gate, which rows of older versions do not name, and where the networks run through torch that."""
    named = f"{row['generator']} + {row['gate']}" if "gate" in row else str(row["generator"])
    return f"{named}, torch" if row.get("path") == "torch" else named


def plain_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Any rows; those that begin with another column, as a VLA's and generators' do, have a table of their own."""
    out = []
    for _, group in groupby(rows, key=lambda row: next(iter(row))):
        mine = list(group)
        names = dict.fromkeys(k for r in mine for k in r)
        columns = [c for c in names if not any(isinstance(r.get(c), list | dict) for r in mine)]
        out.append(Table([c.replace("_", " ") for c in columns], [[cell(r.get(c), "–") for c in columns] for r in mine]))
    return out


def plain_section(folder: Path, summary: dict[str, Any]) -> Section:
    """A results file as its tables."""
    return Section(summary["kind"].replace("_", " ").capitalize(), tables=plain_tables(summary["rows"]))
