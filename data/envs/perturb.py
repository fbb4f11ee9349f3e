"""What happens to a robot outside of a simulator that waits: time goes by, and things get moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.envs.base import Env, Perturbable
from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.steps import StepInfo


def whole_steps(milliseconds: float, space: ActionSpace) -> int:
    """So much time in control steps, rounded."""
    return int(milliseconds * space.control_rate / 1e3 + 0.5)


@dataclass(frozen=True)
class RealTime:
    """The world moves on while the policy thinks.

    A policy that waits for its VLA: the action that answers an observation is executed as many control steps later as its
    computation took, rounded to whole steps; until then the robot holds. One that does not wait
    (:class:`~spvla.realtime.BridgePolicy`) acts in every step, and the VLA's answers come so many steps later.

    Args:
        vla_ms: milliseconds of a step on which the VLA is asked; None: as measured, for policies that wait alone. Other steps
            take what they took.
        hold: ``stop`` (no motion, gripper as it is) or ``last`` (the last executed action again): of policies that wait.
        mode: ``wait`` or ``bridge``, what :func:`spvla.accelerate` makes of a policy.
    """

    vla_ms: float | None = None
    hold: str = "stop"
    mode: str = "wait"

    def __post_init__(self) -> None:
        if self.mode not in ("wait", "bridge"):
            raise InputError(f"real time: mode {self.mode!r} is neither wait nor bridge", field="mode")
        if self.mode == "bridge" and (self.vla_ms is None or self.hold != "stop"):
            told = "needs vla_ms" if self.vla_ms is None else "always stops the robot where nobody may act"
            raise InputError(f"real time: a policy that never waits {told}", field="vla_ms" if self.vla_ms is None else "hold")
        if self.hold not in ("stop", "last"):
            raise InputError(f"real time: hold {self.hold!r} is neither stop nor last")
        if self.vla_ms is not None and not self.vla_ms >= 0:
            raise InputError(f"real time: vla_ms must not be negative, got {self.vla_ms}")

    def steps(self, space: ActionSpace) -> int:
        """Control steps that a call of the VLA takes in ``bridge`` mode: its ``vla_ms``."""
        assert self.vla_ms is not None, "checked when it was made"
        return whole_steps(self.vla_ms, space)

    def delay(self, step: StepInfo, space: ActionSpace) -> int:
        """Control steps that go by before the action of ``step`` is there."""
        capture = step.milliseconds.get("capture", 0.0)  # the simulator renders; a camera has its own clock
        ms = self.vla_ms if step.called_vla and self.vla_ms is not None else step.milliseconds["total"] - capture
        return whole_steps(ms, space)

    def held(self, action: FloatArray, last: FloatArray | None, space: ActionSpace) -> FloatArray:
        """What is executed in place of ``action`` (D,), given the action before, (D,)."""
        return space.stop(action if last is None else last) if self.hold == "stop" or last is None else last


@dataclass(frozen=True)
class Nudge:
    """Somebody moves the object that is asked for while the hand is on its way to it.

    At a step drawn from 5 to 20 the object jumps ``distance`` metres in a direction drawn from the seed, unless the hand
    is there already.
    """

    distance: float = 0.04

    def apply(self, env: Env, seed: int) -> bool:
        """Nudge the asked object if this is the moment; whether it did.

        Raises:
            InputError: the simulator cannot move things (code ``unsupported``).
        """
        if not isinstance(env, Perturbable):
            raise InputError(f"nudge: the simulator of {env.task.suite} cannot move objects", code="unsupported", field="nudge")
        generator = np.random.default_rng([seed, 4])
        when, angle = int(generator.integers(5, 21)), generator.uniform(0, 2 * np.pi)
        return env.steps == when and env.nudge(self.distance * np.array([np.cos(angle), np.sin(angle)]))
