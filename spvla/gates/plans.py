"""How long a plan is kept, by rule: what the field does with policies that plan in chunks, as baselines.

``horizon`` keeps so many actions of each plan, ``pace`` keeps them while the robot is to move fast, and ``reuse`` repeats the
last action where two looks in a row said nearly the same. Distances and speeds are in normalised units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.fields import check_fields, naming
from spvla.gates.base import Decisions
from spvla.history import Window, rest_of_plan


def _keep(window: Window, wanted: NDArray[np.bool_], used_up: str, unwanted: str) -> Decisions:
    """Keep the plans of B windows where that is ``wanted`` (B,) and something is left."""
    left = rest_of_plan(window, "gate")[1] > 0
    kept = np.asarray(left & wanted)
    return Decisions(kept, np.where(kept, "plan", np.where(left, unwanted, used_up)), kept=kept)


@dataclass(frozen=True)
class HorizonGate:
    """A fixed horizon: of each plan ``steps`` actions are executed, then the VLA plans again.

    Args:
        space: the action space.
        steps: the horizon; a plan with fewer actions is executed whole.
    """

    space: ActionSpace
    steps: int = 8
    history_length: ClassVar[int] = 1
    reads_plan: ClassVar[bool] = True

    def __post_init__(self) -> None:
        with naming("gate 'horizon'"):
            check_fields(self, at_least={"steps": 1})

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Keep plans that are younger than the horizon; the proposals do not matter."""
        return _keep(window, np.asarray(window.vla_age < self.steps), "used up", "horizon")


@dataclass(frozen=True)
class PaceGate:
    """Plan again where the plan is slow, as precise work is: a plan is kept while its next action moves at least at ``speed``.

    Speed is the largest absolute translation, or of any joint where an action has none; actions that are targets are compared
    with the last executed one. A change of the gripper counts as slow.

    Args:
        space: the action space.
        speed: normalised units a step.
    """

    space: ActionSpace
    speed: float = 0.3
    history_length: ClassVar[int] = 1
    reads_plan: ClassVar[bool] = True

    def __post_init__(self) -> None:
        with naming("gate 'pace'"):
            check_fields(self, at_least={"speed": 0})

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Keep fast plans; the proposals do not matter."""
        planned, last = rest_of_plan(window, "gate 'pace'")[0][:, 0], window.actions[:, -1]
        moving = np.isin(np.arange(self.space.dim), self.space.moving)
        motion = np.abs(np.where(moving, planned, planned - last))
        fast = motion[:, list(self.space.translation or self.space.continuous)].max(1, initial=0.0) >= self.speed
        grippers = list(self.space.gripper)
        turning = ((planned[:, grippers] >= 0) != (last[:, grippers] >= 0)).any(1)
        return _keep(window, np.asarray(fast & ~turning), "used up", "slow")


@dataclass(frozen=True)
class ReuseGate:
    """Repeat the last action, with the generator ``last``, where the last two differ by at most ``similar`` in every
    dimension, ``most`` times in a row; otherwise the VLA plans, and of its plan only the first action is executed.

    Like FlashVLA (arXiv 2505.21200), which reuses where consecutive actions point the same way; its second condition, on the
    visual tokens, needs to look inside of a VLA.

    Args:
        space: the action space.
        similar: largest difference of two similar actions, normalised units.
        most: steps in a row.
    """

    space: ActionSpace
    similar: float = 0.1
    most: int = 3
    reads_plan: ClassVar[bool] = True

    def __post_init__(self) -> None:
        with naming("gate 'reuse'"):
            check_fields(self, at_least={"similar": 0, "most": 1})

    @property
    def history_length(self) -> int:
        """Steps of history this rule reads."""
        return self.most + 2

    def decide(self, window: Window, proposals: FloatArray) -> Decisions:
        """Label the steps that follow B windows; the proposals do not matter."""
        known = window.mask[:, -2:].all(1)
        alike = ~self.space.deviation(window.actions[:, -1], window.actions[:, -2], self.similar)
        generated = window.sources if window.credited is None else window.credited
        reused = (generated[:, -self.most :] == 1).all(1)
        reason = np.where(known, np.where(alike, np.where(reused, "in a row", "intuitive"), "changing"), "no history")
        return Decisions(np.asarray(known & alike & ~reused), reason)
