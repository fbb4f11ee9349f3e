"""Deployments of a live gate on the page: its threshold and what it estimates of the risk, step by step, and its audits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.report.figures import COLOURS, Headed, Picture, Section, legend, percent, picture
from spvla.fields import naming
from spvla.files import parse_object
from spvla.store import read_episode_table

Row = dict[str, Any]
AUDIT_COLOUR = "#888888"


def deployments(episodes: Sequence[Row], names: dict[str, str]) -> Headed:
    """A picture of each live cell among the rows of episodes; ``names`` are the cells as people read them."""
    live = [e for e in episodes if e.get("live_steps") is not None]
    pictures = []
    for cell in dict.fromkeys(e["cell"] for e in live):
        mine = sorted((e for e in live if e["cell"] == cell), key=lambda e: e["live_steps"])
        pictures.append(deployment(mine, names.get(cell, cell)))
    return [("Live gate", pictures)] if pictures else []


def recorded(recording: Path) -> list[Row]:
    """What the episodes of a recording say of their live gate, in a row each. A deployment, which is their ``cell``, ends where
    another one begins to count its steps."""
    rows: list[Row] = []
    for i, episode in enumerate(read_episode_table(recording)):
        with naming(f"{recording}: metadata of episode {i}"):
            row = parse_object(episode["metadata"] or "{}", "its JSON").get("live")
            if row is None:
                continue
            goes_on = bool(rows) and row["risk"] == rows[-1]["risk"] and row["live_steps"] > rows[-1]["live_steps"]
            number = rows[-1]["number"] + (not goes_on) if rows else 1
            rows.append({"cell": f"deployment {number}, risk {row['risk']:g}", "number": number, **row})
    return rows


def section(folder: Path, summary: dict[str, Any]) -> Section:
    """The live gate of a recording."""
    ((_, pictures),) = deployments(summary["rows"], {})
    return Section("Live gate", pictures=pictures)


def deployment(episodes: Sequence[Row], name: str) -> Picture:
    """Estimated risk with its 95 % bound against the allowed one, and the threshold with a tick for every audit, over the steps
    of a deployment; ``episodes`` in their order."""
    last, risk = episodes[-1], episodes[-1]["risk"]
    steps = np.array([e["live_steps"] for e in episodes])
    decided, audits = np.array([e["steps"] - e["held"] for e in episodes]), audits_of(episodes)
    bound = np.array([e["live_risk_bound95"] for e in episodes])
    thresholds = [e["threshold"] for e in episodes]
    labelled = all(e.get("deviating") is not None for e in episodes)

    def draw(f: Any) -> None:
        above, below = f.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        above.axhline(100 * risk, color=AUDIT_COLOUR, lw=0.8, label="allowed risk")
        above.plot(steps, 100 * np.array([e["live_risk"] for e in episodes]), color=COLOURS[0], lw=1.2, label="estimated")
        above.plot(steps, 100 * bound, "--", color=COLOURS[0], lw=1, label="its 95 % bound")
        if labelled:
            measured = np.cumsum([e["deviating"] for e in episodes]) / np.cumsum(decided)
            above.plot(steps, 100 * measured, color=COLOURS[1], lw=1.2, label="measured with labels")
        told = bound[steps >= steps[-1] / 5]  # the bound begins at 100 %
        above.set(ylabel="% of steps", ylim=(0, 100 * max(2 * risk, 1.1 * told.max())))
        below.plot(steps, thresholds, color=COLOURS[2], lw=1.2, label="threshold")
        if audits:
            below.plot(audits, np.zeros(len(audits)), "|", color=AUDIT_COLOUR, ms=6, mew=0.5, label="audits", clip_on=False)
        below.set(xlabel="control steps", ylabel="threshold", xlim=(0, None), ylim=(min(0, *thresholds), 1))
        legend(f)

    caption = (
        f"{name}: over {last['live_steps']} steps, estimated {percent(last['live_risk'])} % generated and deviating, with 95 % "
        f"certainty below {percent(last['live_risk_bound95'])} % at any time. Threshold: the fraction of calibration steps on "
        f"which the generator may act{'; a tick is an audit' if audits else ''}."
    )
    return picture(draw, caption)


def audits_of(episodes: Sequence[Row]) -> list[int]:
    """The steps of a deployment on which its gate audited: rows count them from the beginning of each episode."""
    starts = [e["live_steps"] - (e["steps"] - e["held"]) for e in episodes]
    return [start + i for start, e in zip(starts, episodes, strict=True) for i in e.get("audit_steps") or ()]
