"""A closed loop's episodes in the form of LeRobot's ``eval_info.json``, for tools that read that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spvla.files import write_text

LISTS = ("sum_rewards", "max_rewards", "successes", "video_paths", "predicted_video_paths")


def eval_info(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``lerobot-eval`` 0.6 writes: ``per_task``, ``per_group``, ``overall``.

    A task group is a cell. Rewards are 1 for an episode that succeeded and 0 otherwise. Nobody has measured how long the
    evaluation took as a whole: ``eval_s`` and ``eval_ep_s`` are null.

    Args:
        episodes: rows with ``cell``, ``task`` and ``success``.
    """
    tasks: dict[tuple[str, int], list[bool]] = {}
    for e in episodes:
        tasks.setdefault((e["cell"], e["task"]), []).append(bool(e["success"]))
    groups: dict[str, list[bool]] = {}
    for (cell, _), found in tasks.items():
        groups.setdefault(cell, []).extend(found)
    return {
        "per_task": [{"task_group": c, "task_id": t, "metrics": _metrics(found)} for (c, t), found in tasks.items()],
        "per_group": {cell: _aggregate(found) for cell, found in groups.items()},
        "overall": _aggregate([s for found in groups.values() for s in found]) | {"eval_s": None, "eval_ep_s": None},
    }


def _metrics(successes: Sequence[bool]) -> dict[str, Any]:
    rewards = [float(s) for s in successes]
    return dict(zip(LISTS, (rewards, rewards, list(successes), [], []), strict=True))


def _aggregate(successes: Sequence[bool]) -> dict[str, Any]:
    mean = float(np.mean(successes))
    return {
        "avg_sum_reward": mean,
        "avg_max_reward": mean,
        "pc_success": 100 * mean,
        "n_episodes": len(successes),
        "video_paths": [],
        "predicted_video_paths": [],
    }


def write_eval_info(output: Path, episodes: Sequence[dict[str, Any]]) -> None:
    """``eval_info.json`` in the folder ``output``."""
    write_text(output / "eval_info.json", json.dumps(eval_info(episodes), indent=2) + "\n")
