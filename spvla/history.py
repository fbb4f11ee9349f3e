"""What a policy remembers between control steps.

:class:`ActionHistory` keeps the last ``length`` executed actions, who made each, the proprioception around them and the
VLA's last output with its age. :class:`Window` is the same content as arrays with a leading batch dimension: generators
and gates read windows only, so that what they see on a robot (B = 1) and in training (B = thousands) is one type.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spvla.actions import ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.vlas.base import VLAOutput


class Source(IntEnum):
    """Who made an executed action."""

    VLA = 0
    GENERATOR = 1
    HELD = 2  # nobody: the robot held or stopped because the VLA's answer was late or did not come
    PLAN = 3  # the VLA, some steps ago: the next action of its plan was kept by a gate that could have had it plan again


COLUMNS = {"actions": "normalized", "sources": "sources", "mask": "mask", "credited": "credited"}  # of a window, in a history
UNSEEN = (Source.GENERATOR, Source.PLAN)  # they act without a fresh look at the scene


@dataclass(frozen=True)
class Window:
    """The history before a decision, for B decisions at once; oldest first, padded at the front.

    Args:
        actions: executed actions, normalised, (B, n, D); zeros where padded.
        sources: 1 where the generator made the action, else 0, (B, n).
        mask: 1 where a step exists, 0 where padded, (B, n).
        states: proprioception in its own units at the n steps and now, (B, n + 1, S); the first known state where
            padded. S = 0 where a robot reports none.
        vla_action: the VLA's own last action, normalised, (B, D); zeros before the first call.
        vla_state: proprioception when the VLA was last asked, (B, S).
        vla_age: steps since that call, (B,): 1 directly after it, 0 if it was never asked.
        vla_confidence: the VLA's confidence in that action, (B, D), or None if it reports none.
        vla_features: its pooled features, (B, F), or None.
        credited: 1 where hand-set rules count the step as the generator's, (B, n); None: as ``sources``. They differ in shadow
            mode, where the VLA acts in the place of the generator.
        plan: the rest of the VLA's last plan, from the action on that is due now, normalised, (B, P, D); zeros beyond its end.
            None where nobody reads plans.
        plan_left: how many actions that are, (B,), or None.
        frame: what the gate's eyes see now, uint8 (B, S, S, 3), or None where it has none.
        vla_frame: the same when the VLA was last asked, or None.
        vla_error: the generator's proposal less the VLA's action at that call, normalised, (B, D); zeros where there was no
            proposal that means anything, as before the first call. None where nobody reads it.
    """

    actions: FloatArray
    sources: FloatArray
    mask: FloatArray
    states: FloatArray
    vla_action: FloatArray
    vla_state: FloatArray
    vla_age: FloatArray
    vla_confidence: FloatArray | None = None
    vla_features: FloatArray | None = None
    credited: FloatArray | None = None
    plan: FloatArray | None = None
    plan_left: FloatArray | None = None
    frame: NDArray[np.uint8] | None = None
    vla_frame: NDArray[np.uint8] | None = None
    vla_error: FloatArray | None = None


def rest_of_plan(window: Window, who: str) -> tuple[FloatArray, FloatArray]:
    """``plan`` and ``plan_left`` of a window. Raises :class:`InputError` (code ``no-plan``) that names ``who`` reads them, a
    gate or a generator, if it has none."""
    if window.plan is None or window.plan_left is None:
        raise InputError(f"{who}: there are no plans in this window", code="no-plan", field=who.split()[0])
    return window.plan, window.plan_left


class ActionHistory:
    """The last ``length`` steps of an episode, kept in place (no allocation a step).

    Args:
        space: action space of the policy.
        length: steps to remember (n).
        plans: windows have the rest of the VLA's plan.
        errors: windows have the generator's error at the VLA's last call.
    """

    def __init__(self, space: ActionSpace, length: int, plans: bool = False, errors: bool = False) -> None:
        if length < 1:
            raise InputError(f"history length must be at least 1, got {length}")
        self.space = space
        self.length = length
        self.plans, self.errors = plans, errors
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new episode starts."""
        n, d = self.length, self.space.dim
        self.steps = 0  # actions executed in this episode
        self.generated_run = self._run_before = 0  # steps without a fresh look since the last one, now and a step ago
        self._rows = rows = np.zeros((n, 2 * d + 3), np.float32)  # all that is known of each step; what follows are its columns
        self.actions = rows[:, :d]  # environment units
        self.normalized = rows[:, d : 2 * d]
        self.sources = rows[:, 2 * d]  # 1 where the generator acted
        self.credited = rows[:, 2 * d + 1]  # 1 where rules count the step as the generator's
        self.mask = rows[:, 2 * d + 2]
        self._batch = {k: getattr(self, v)[None] for k, v in COLUMNS.items()}
        self.states: FloatArray | None = None  # (n + 1, S) once a state was observed
        self.vla_output: VLAOutput | None = None
        self.vla_action = np.zeros(d, np.float32)  # normalised
        self.vla_state: FloatArray | None = None
        self.vla_age = 0
        self.vla_error = np.zeros(d, np.float32)  # the generator's, normalised
        self.frame: NDArray[np.uint8] | None = None  # (S, S, 3) that the gate's eyes see
        self.vla_frame: NDArray[np.uint8] | None = None
        self._observed = False  # since the last action
        self._window: Window | None = None

    def observe(self, state: NDArray[np.floating] | None, frame: NDArray[np.uint8] | None = None) -> None:
        """Take in the current proprioception (S,), before anyone decides. None on a robot that reports none. ``frame`` is
        what the gate's eyes see, (S, S, 3), if it has any.

        Before the next action a second call replaces the first: a step that failed may be tried again.
        """
        self._window = None
        if state is None:
            if self.states is not None and self.states.shape[1] > 0:
                raise InputError("observation.state: missing, though earlier steps of this episode had one")
            state = np.zeros(0, np.float32)
        state = np.asarray(state, np.float32)
        if state.ndim != 1:
            raise InputError(f"observation.state: expected shape (S,), got {state.shape}")
        if False in np.isfinite(state).tolist():  # for so few values faster than all()
            raise InputError("observation.state: contains NaN or infinity")
        if self.states is None or not self.steps:
            self.states = np.repeat(state[None], self.length + 1, axis=0)
            self.vla_state = state.copy()
            self.vla_frame = frame
        elif state.shape[0] != self.states.shape[1]:
            raise InputError(f"observation.state: {state.shape[0]} values, earlier steps had {self.states.shape[1]}")
        else:
            if not self._observed:
                self.states[:-1] = self.states[1:]
            self.states[-1] = state
        self.frame = frame
        self._observed = True

    def act(
        self, action: FloatArray, source: Source, output: VLAOutput | None = None, proposed: FloatArray | None = None
    ) -> None:
        """Take in an executed action.

        Args:
            action: (D,), environment units.
            source: who made it.
            output: the VLA's output if it was asked.
            proposed: what the generator would have done, normalised (D,), or None.
        """
        action = self._checked(action)
        self._window = None
        normalized = self.space.normalize(action)
        generated = float(source == Source.GENERATOR)
        self._rows[:-1] = self._rows[1:]
        self._rows[-1] = (*action.tolist(), *normalized.tolist(), generated, generated, 1.0)
        self.steps += 1
        self._observed = False
        self.vla_age += self.vla_age > 0
        self._run_before = self.generated_run
        self.generated_run = 0 if source == Source.VLA else self.generated_run + (source in UNSEEN)
        if source == Source.VLA:
            # The VLA's own output, also where something else was executed (noise while collecting).
            self.vla_action = normalized if output is None else self.space.normalize(output.actions[0])
            self.vla_age = 1
            self.vla_error = self._error(proposed)
            if self.states is not None:
                self.vla_state = self.states[-1].copy()
            self.vla_frame = self.frame
            if output is not None:
                self.vla_output = output

    def answer(self, output: VLAOutput, state: FloatArray, age: int, proposed: FloatArray | None = None) -> None:
        """Take in the VLA's answer to an earlier observation, before anyone decides: from now on it is the VLA's last word.

        Args:
            output: what it answered.
            state: proprioception (S,) when it was asked.
            age: control steps since then.
            proposed: what the generator would have done then, normalised (D,), or None.
        """
        self._window = None
        self.vla_action, self.vla_state = self.space.normalize(output.actions[0]), state
        self.vla_output, self.vla_age = output, age
        self.vla_error = self._error(proposed)

    def _error(self, proposed: FloatArray | None) -> FloatArray:
        """What a proposal (D,) is off the VLA's last action by, (D,); zeros without one, or for one that is not finite."""
        if not self.errors or proposed is None or False in np.isfinite(proposed).tolist():
            return np.zeros(self.space.dim, np.float32)
        return proposed - self.vla_action

    def credit(self, source: Source) -> None:
        """Let hand-set rules and the run limit count the last step as ``source``'s, though another made it: in shadow mode the
        VLA acts where the generator would have."""
        self._window = None
        self.credited[-1] = float(source == Source.GENERATOR)
        self.generated_run = 0 if source == Source.VLA else self._run_before + (source == Source.GENERATOR)

    def amend(self, action: FloatArray) -> None:
        """Replace the last executed action (D,), environment units: something downstream changed it."""
        if not self.steps:
            raise InputError("history: no action has been executed yet")
        action = self._checked(action)
        self._window = None
        self.actions[-1] = action
        self.normalized[-1] = self.space.normalize(action)

    def _checked(self, action: ArrayLike) -> FloatArray:
        """An executed action as float32 (D,), or an :class:`InputError` if it is of another shape or not finite."""
        values = np.asarray(action, np.float32)
        if values.shape != (self.space.dim,):
            raise InputError(f"executed action: expected shape ({self.space.dim},), got {values.shape}")
        if False in np.isfinite(values).tolist():
            raise InputError("executed action: contains NaN or infinity")
        return values

    @property
    def planned(self) -> FloatArray | None:
        """The action (D,) of the VLA's last plan that is due now, environment units; None if the plan is used up."""
        plan = None if self.vla_output is None else self.vla_output.actions
        return plan[self.vla_age] if plan is not None and 0 < self.vla_age < len(plan) else None

    @property
    def last_action(self) -> FloatArray | None:
        """The last executed action (D,), environment units, or None at the start of an episode."""
        return self.actions[-1] if self.steps else None

    def recent(self, n: int) -> FloatArray:
        """The last ``n`` executed actions, fewer at the start: (k <= n, D), oldest first, environment units."""
        k = min(n, self.steps, self.length)
        return self.actions[self.length - k :]

    def window(self) -> Window:
        """This history as a batch of one, the same object until the next change. The arrays are views: read them before."""
        if self._window is not None:
            return self._window
        if self.states is None or self.vla_state is None:
            raise InputError("history: observe() was not called before window()")
        output = self.vla_output
        confidence = None if output is None else output.confidence
        features = None if output is None else output.features
        plan, left = self._rest_of_plan() if self.plans else (None, None)
        self._window = Window(
            **self._batch,
            states=self.states[None],
            vla_action=self.vla_action[None],
            vla_state=self.vla_state[None],
            vla_age=np.array([self.vla_age], np.float32),
            vla_confidence=None if confidence is None else confidence[None],
            vla_features=None if features is None else features[None],
            plan=plan,
            plan_left=left,
            frame=None if self.frame is None else self.frame[None],
            vla_frame=None if self.vla_frame is None else self.vla_frame[None],
            vla_error=self.vla_error[None] if self.errors else None,
        )
        return self._window

    def _rest_of_plan(self) -> tuple[FloatArray, FloatArray]:
        """``plan`` (1, P, D) and ``plan_left`` (1,) of a :class:`Window`."""
        output = self.vla_output
        rest = np.zeros((0, self.space.dim)) if output is None or self.planned is None else output.actions[self.vla_age :]
        plan = np.zeros((1, max(1, len(rest)), self.space.dim), np.float32)
        if len(rest):
            plan[0] = self.space.normalize(rest)
        return plan, np.array([len(rest)], np.float32)
