"""SP-VLA's hand-set rules in their two published forms (arXiv 2506.12723 and its released code).

A step that the robot held, waiting for the VLA, counts as the VLA's.

Thresholds act on actions in environment units, read as velocity per control step. They are data: presets per suite live
in ``configs/``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.fields import check_fields, naming
from spvla.gates.base import Decision
from spvla.generators.base import Proposal
from spvla.history import ActionHistory, Source


def _require_translation(space: ActionSpace, rule: str, dims: int) -> None:
    if len(space.translation) < dims:
        raise InputError(
            f"rule {rule!r} reads {dims} translation dimensions, action space {space.name!r} has {len(space.translation)}"
        )


@dataclass(frozen=True)
class PaperRule:
    """Intuitive iff every |translation| of the last action lies in [v_min, v_max] and N_G / N_A > tau, where N_G counts
    the VLA's actions in the buffer and N_A all of them.

    Args:
        v_min, v_max: not published; environment units per step.
        tau, buffer: published values 0.5 and 6.
    """

    space: ActionSpace
    v_min: float = 0.02
    v_max: float = 0.9
    tau: float = 0.5
    buffer: int = 6

    def __post_init__(self) -> None:
        _require_translation(self.space, "paper", 1)
        with naming("rule 'paper'"):
            check_fields(self, at_least={"buffer": 1})

    @property
    def history_length(self) -> int:
        """Steps of history this rule reads."""
        return self.buffer

    def decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        """Label the coming step."""
        makers = history.recent_makers(self.buffer)
        if not len(makers):
            return Decision(False, "no history")
        if not (makers != Source.GENERATOR).mean() > self.tau:
            return Decision(False, "VLA share")
        speed = np.abs(history.actions[-1, list(self.space.translation)])
        if (speed < self.v_min).any():
            return Decision(False, "slow")
        return Decision(True, "intuitive") if (speed <= self.v_max).all() else Decision(False, "fast")


@dataclass(frozen=True)
class ReleaseRule:
    """Intuitive iff each of the last ``step_skip`` actions is planar, |z| / max(|x|, |y|, 1e-4) < z_xy_rate and
    |z| < z_max, and the VLA made at least 4 of the 6 buffered actions.

    The cap that follows is the pattern V V V V G G G: at most 3/7 of the steps are generated, so scheduling by this rule
    can never pass 1.75x.
    """

    space: ActionSpace
    step_skip: int = 2
    z_xy_rate: float = 0.6
    z_max: float = 0.5
    buffer: int = 6
    vla_share: float = 4 / 6

    def __post_init__(self) -> None:
        _require_translation(self.space, "release", 3)
        with naming("rule 'release'"):
            check_fields(self, at_least={"step_skip": 1, "buffer": 1})

    @property
    def history_length(self) -> int:
        """Steps of history this rule reads."""
        return max(self.buffer, self.step_skip)

    def decide(self, history: ActionHistory, proposal: Proposal) -> Decision:
        """Label the coming step."""
        if history.steps < self.step_skip:
            return Decision(False, "no history")
        if (history.recent_makers(self.buffer) != Source.GENERATOR).sum() / self.buffer < self.vla_share - 1e-9:
            return Decision(False, "VLA share")
        xyz = np.abs(history.recent(self.step_skip)[:, list(self.space.translation[:3])])
        planar = (xyz[:, 2] / np.maximum(xyz[:, :2].max(1), 1e-4) < self.z_xy_rate) & (xyz[:, 2] < self.z_max)
        return Decision(True, "intuitive") if planar.all() else Decision(False, "not planar")
