"""How many robots one VLA serves, alone and accelerated: ``python -m eval serving``."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.output import table, write_summary
from eval.serving_load import Heard, Robot, served
from spvla.actions import ActionSpace
from spvla.cli import PositiveFloat, PositiveInt
from spvla.errors import InputError
from spvla.export import load_export
from spvla.fields import check_values
from spvla.store.reader import read_action_space, read_episodes

AT_RATE = 0.9  # of its control rate: a VLA whose call takes the whole control period serves one robot
ON_TIME = 0.99  # of a robot's answers
WARM_UP = 5.0  # seconds
APART = 0.37  # seconds between the robots' starts
DEFINITIONS = {
    "robots_at_rate": f"the most robots of which each gets {AT_RATE:.0%} of its control rate in actions, however late",
    "robots_on_time": f"the most of which, besides, each one gets {ON_TIME:.0%} of its answers within its control period",
    "robot": "plays recorded states back; it sends the next one a control period after the last, or when a late answer comes",
    "action": "an answer other than to stand still; first steps of episodes, which always wait for the VLA, are left out",
    "simulated": "the robots; the VLA, which answers as recorded after a wait of vla_ms, one call at a time. "
    "The server is real",
}
CELL = {"export": str | None, "mode": str, "risk": float | None}


@dataclass(frozen=True)
class Cell:
    """A way to serve.

    Args:
        name: of the cell.
        export: folder of the export; None: the VLA acts alone.
        mode: ``wait`` or ``bridge``.
        risk: the export's default if None.
    """

    name: str
    export: str | None = None
    mode: str = "wait"
    risk: float | None = None

    @property
    def options(self) -> list[str]:
        """The server's."""
        if self.export is None:
            return ["--generator", "none"]
        return ["--export", self.export, "--mode", self.mode, *([] if self.risk is None else ["--risk", f"{self.risk:g}"])]


def read_cells(cells: dict[str, dict[str, Any]]) -> list[Cell]:
    """Cells by their names. Raises :class:`InputError` for unknown fields."""
    for name, fields in cells.items():
        if unknown := fields.keys() - CELL.keys():
            raise InputError(f"cells: {name}: field {min(unknown)!r} is unknown; it takes: {', '.join(CELL)}", field="cells")
        check_values(fields, CELL)
    return [Cell(name, **fields) for name, fields in cells.items()]


async def drive(robots: Sequence[Robot], address: str, seconds: float) -> tuple[list[Heard], float]:
    """Let ``robots`` act at the same time, each from a moment of its own on. Also the VLA's calls in the counted time."""
    start = time.monotonic() + 0.5
    warm_up = WARM_UP + APART * len(robots)
    each = [robot.drive(address, start + APART * k, warm_up - APART * k, seconds) for k, robot in enumerate(robots)]

    async def calls_at(moment: float) -> float:
        await asyncio.sleep(moment - time.monotonic())
        return await asyncio.to_thread(vla_calls, address)

    counts = asyncio.gather(calls_at(start + warm_up), calls_at(start + warm_up + seconds))
    heard = await asyncio.gather(*each)
    before, after = await counts
    return list(heard), after - before


def vla_calls(address: str) -> float:
    """Calls of the VLA so far, by the server's own count."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("spvla_batch_size_sum "))


def row_of(cell: Cell, vla_ms: float, heard: Sequence[Heard], calls: float, space: ActionSpace) -> dict[str, Any]:
    """What came of one cell with so many robots."""
    milliseconds = 1e3 * np.concatenate([h.seconds for h in heard])
    steps = len(milliseconds)
    on_time, rate = min(h.on_time(1 / space.control_rate) for h in heard), min(h.rate for h in heard)
    at_rate = rate >= AT_RATE * space.control_rate
    generated = np.concatenate([np.array(h.generated, bool) for h in heard])
    deviates = np.concatenate([np.array(h.deviates, bool) for h in heard])
    seconds = float(np.mean([h.ended - h.begun for h in heard]))
    return {
        "vla_ms": vla_ms,
        "cell": cell.name,
        "robots": len(heard),
        "served_at_rate": at_rate,
        "served_on_time": at_rate and on_time >= ON_TIME,
        "answer_ms_p50": float(np.percentile(milliseconds, 50)),
        "answer_ms_p99": float(np.percentile(milliseconds, 99)),
        "on_time_worst": on_time,
        "rate_worst": rate,
        "held": float(np.mean(np.concatenate([h.held for h in heard]))),
        "generated": float(generated.mean()),
        "generated_deviating": float((generated & deviates).mean()),
        "vla_calls_per_second": calls / seconds,
        "steps": steps,
        "seconds": seconds,
    }


def most_robots(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each VLA's time and cell the most robots that were served, by both definitions; 0 if one was too many. The p99
    is that of the most at rate."""
    out = []
    for vla_ms, cell in dict.fromkeys((r["vla_ms"], r["cell"]) for r in rows):
        mine = [r for r in rows if (r["vla_ms"], r["cell"]) == (vla_ms, cell)]
        best = {
            name: max((r["robots"] for r in mine if r[served_by]), default=0)
            for name, served_by in (("robots_at_rate", "served_at_rate"), ("robots_on_time", "served_on_time"))
        }
        p99 = {r["robots"]: r["answer_ms_p99"] for r in mine}.get(best["robots_at_rate"])
        out.append({"vla_ms": vla_ms, "cell": cell, **best, "answer_ms_p99": p99})
    return out


def serving(
    output: Path,
    data: Path,
    cells: dict[str, dict[str, Any]],
    vla_ms: list[PositiveFloat] = [50.0, 240.0],  # noqa: B006
    robots: list[PositiveInt] = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16],  # noqa: B006
    seconds: PositiveFloat = 30.0,
) -> None:
    """Serve recorded robots from one VLA, more and more of them, and measure what each one gets.

    The server is ``spvla serve`` in a process of its own, the robots are clients in this one. The VLA answers what the recorded
    teacher did, after a wait of vla_ms, one call at a time.

    Args:
        output: folder for summary.json.
        data: rollout store whose episodes the robots play back.
        cells: by name: export (none: the VLA alone), mode (wait or bridge) and risk (the export's default if left out).
        vla_ms: milliseconds of a VLA call.
        robots: how many at once, ascending; a cell ends where they are too many.
        seconds: that count, after a warm-up.
    """
    wanted, space = read_cells(cells), read_action_space(data)
    episodes = list(read_episodes(data))
    tolerances = {c: 0.2 if c.export is None else load_export(c.export).tolerance for c in wanted}
    load, rows = os.getloadavg()[0], []
    for ms in vla_ms:
        for cell in wanted:
            for number in tqdm(sorted(robots), f"{cell.name}, {ms:g} ms", unit="run"):
                with served(data, ms, cell.options) as address:
                    crowd = [Robot(episodes, space, tolerances[cell], k) for k in range(number)]
                    heard, calls = asyncio.run(drive(crowd, address, seconds))
                rows.append(row_of(cell, ms, heard, calls, space))
                if not rows[-1]["served_at_rate"]:
                    break
    most = most_robots(rows)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"control_rate": space.control_rate, "cells": cells, "episodes": len(episodes), "load_average_before": load}
    path = write_summary(output, "serving", rows, most=most, definitions=DEFINITIONS, **facts)
    print(table(rows, list(rows[0])), "\n")
    print(table(most, list(most[0])))
    print(f"written: {path}")
