"""How fast the robot of a LeRobot folder went, and in which unit its times are."""

from __future__ import annotations

import numpy as np

from data.lerobot.columns import recorded_times
from data.lerobot.layout import Layout
from data.openx import FASTEST, SLOWEST, require_rate
from spvla.errors import InputError

EPISODES_TIMED = 16  # whose recorded times say how fast the robot was
RATE_SLACK = 0.1  # the claimed control rate may be off the recorded times by so much
UNITS = {1.0: "s", 1e-3: "ms", 1e-6: "us", 1e-9: "ns"}  # seconds per unit of a clock


def find_rate(layout: Layout, named: float | None = None) -> float:
    """Control steps per second: as claimed, unless the recorded times say otherwise throughout.

    Args:
        layout: the folder.
        named: the control rate that somebody's conventions name; it helps to know the times' unit.

    Raises:
        InputError: neither is there, or no robot is controlled at such a rate.
    """
    claimed, where = layout.info.get("fps"), f"{layout.about}: fps"
    valid = _claimed(layout)
    step = _median_step(layout)
    if step is None:
        if valid is None:
            told = f"{layout.about}: fps is {claimed}, and the recorded times do not show the control rate; give --conventions"
            raise InputError(told, code="control-rate", field=where)
        return require_rate(valid, where)
    measured = 1 / (step * _unit(layout, step, named))
    if valid is not None and abs(measured / valid - 1) <= RATE_SLACK:
        return require_rate(valid, where)
    require_rate(measured, f"{layout.path}: the control rate by the recorded times")
    rate = float(round(measured)) if abs(round(measured) / measured - 1) < 0.02 else float(f"{measured:.3g}")
    layout.told.append(
        f"{layout.about}: fps claims {claimed}, but the recorded times give {measured:.3g} Hz; {rate:g} Hz is used"
    )
    return rate


def find_unit(layout: Layout, rate: float) -> float:
    """Seconds per unit of the recorded times of a robot of this control rate (Hz); another unit than the second is noted."""
    step = _median_step(layout)
    unit = 1.0 if step is None else _unit(layout, step, rate)
    if unit != 1:
        told = f"the timestamps are {step:g} apart: taken as {UNITS[unit]} and converted to seconds"
        layout.told.append(f"{layout.path}: {told}")
    return unit


def _unit(layout: Layout, step: float, named: float | None) -> float:
    """The unit in which a ``step`` gives a rate that is named or claimed; else the second, if that gives a possible rate;
    else the only one that does."""
    for rate in (named, _claimed(layout)):
        for unit in UNITS if rate is not None else ():
            if abs(1 / (step * unit) / rate - 1) <= RATE_SLACK:  # type: ignore[operator]
                return unit
    possible = [unit for unit in UNITS if SLOWEST <= 1 / (step * unit) <= FASTEST]
    if len(possible) > 1 and 1.0 not in possible:
        rates = " or ".join(f"{1 / (step * unit):.3g} Hz in {UNITS[unit]}" for unit in possible)
        raise InputError(
            f"{layout.path}: the recorded times are {step:g} apart: {rates}? Write fps into {layout.about.name}",
            code="control-rate",
            field="timestamp",
        )
    return possible[0] if possible else 1.0


def _claimed(layout: Layout) -> float | None:
    claimed = layout.info.get("fps")
    return float(claimed) if isinstance(claimed, int | float) and claimed > 0 else None


def _median_step(layout: Layout) -> float | None:
    """The median step of the first episodes' recorded times, in their own unit."""
    steps = []
    for row in layout.rows[:EPISODES_TIMED]:
        try:
            times = recorded_times(layout.table(row, ["timestamp"])) if row.problem is None else None
        except InputError:
            continue
        steps += [] if times is None else [np.diff(times)]
    joined = np.concatenate(steps) if steps else np.zeros(0)
    return float(np.median(joined)) if len(joined) else None
