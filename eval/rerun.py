"""Episodes of a closed loop as Rerun recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.rollout import Rollout, deviations
from spvla.recording import Policy
from spvla.rerun_log import RerunLog


def log_rollout(path: Path, policy: Policy, result: Rollout, tolerance: float) -> None:
    """Write a finished episode to a .rrd file: what :class:`~spvla.rerun_log.RerunLog` shows, the risk by the teacher's labels.

    Args:
        path: the file.
        policy: whose episode it was.
        result: the episode.
        tolerance: error beyond which a generated step deviates, normalised units.
    """
    episode = result.episode
    labelled = episode.vla_actions is not None
    lost = np.cumsum(deviations(episode, policy.space, tolerance)) / np.arange(1, len(episode) + 1)
    log = RerunLog(path, policy.space)
    log.episode_of(episode, "episode", result.steps, result.outputs, lost.tolist() if labelled else None)
    log.close()
