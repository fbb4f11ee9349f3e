"""No generator at all: what the VLA has planned already, for gates that only say how long a plan is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spvla.actions import ActionSpace, FloatArray
from spvla.history import Window, rest_of_plan


@dataclass(frozen=True)
class PlanGenerator:
    """Proposes the next action of the VLA's last plan."""

    space: ActionSpace
    history_length: int = 1
    reads_plan: ClassVar[bool] = True

    def propose(self, window: Window) -> FloatArray:
        """What the plans of B windows have next, (B, 1, D), normalised; NaN, which is refused, where a plan is used up."""
        plan, left = rest_of_plan(window, "generator 'plan'")
        return np.where(left[:, None, None] > 0, plan[:, :1], np.float32(np.nan))
