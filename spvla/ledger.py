"""What a VLA was really asked: calls are counted and timed where they are made, so that a policy's own records can be checked
against them, and nobody takes a policy for faster that is not."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

import numpy as np

from spvla.history import UNSEEN
from spvla.observation import Observation
from spvla.steps import StepInfo
from spvla.vlas.base import VLA, VLAOutput

FIRST = 20  # steps after which an accelerated policy says what it gains
REMEMBERED = 500  # calls and steps whose times are kept
PLANNED = ("chunk", "waited")  # reasons of steps about which nobody decided
logger = logging.getLogger("spvla")


@dataclass(frozen=True)
class Gain:
    """What acceleration is worth, in milliseconds a control step.

    Args:
        before: with the VLA asked for every action or plan.
        after: as it is.
    """

    before: float
    after: float

    @property
    def factor(self) -> float:
        """How many times as fast."""
        return self.before / max(self.after, 1e-9)


@dataclass
class Counted:
    """What a call's answer held.

    Args:
        plan: actions.
        visual_tokens: (kept, total).
        accepted: dimensions of a proposal that it took over.
    """

    plan: int = 1
    visual_tokens: tuple[int, int] = (0, 0)
    accepted: int = 0


class Ledger:
    """The calls of one policy's VLA since it was made, and what its steps took.

    Attributes:
        calls: how often ``predict`` was called, whatever came of it.
        answers: of these, how many returned.
        milliseconds: of the last answers.
        plan: actions in the last answer.
        kept, total: visual tokens of all answers that reported them.
        verified: answers that took over some of a proposal.
        steps: control steps.
        reasons: what decided each of them.
        generated: steps in which the generator, or an earlier plan by the gate's leave, acted.
        announce: say what is gained after :data:`FIRST` steps, in one line.
    """

    def __init__(self) -> None:
        self.calls = self.answers = self.steps = self.generated = 0
        self.kept = self.total = self.verified = 0
        self.plan = 1
        self.milliseconds: deque[float] = deque(maxlen=REMEMBERED)
        self.reasons: Counter[str] = Counter()
        self.announce = False
        self._own: deque[float] = deque(
            maxlen=REMEMBERED
        )  # milliseconds of steps, without those of the VLA and its observation
        self._captures: deque[float] = deque(maxlen=REMEMBERED)  # milliseconds of capturing what the VLA is shown
        self._asked: deque[bool] = deque(maxlen=REMEMBERED)
        self._waits = True
        self._lock = Lock()  # a bridge asks in a thread

    def ask(self, answer: Callable[[], VLAOutput]) -> VLAOutput:
        """What ``answer`` returns, which calls the VLA. Nowhere else does a policy ask."""
        with self.call() as call:
            output = answer()
            call.plan = len(output.actions) if isinstance(getattr(output, "actions", None), np.ndarray) else 1
            call.visual_tokens = getattr(output, "visual_tokens", None) or (0, 0)
            call.accepted = getattr(output, "accepted", None) or 0
        return output

    @contextmanager
    def call(self) -> Iterator[Counted]:
        """Count and time a call of the VLA, which is made inside."""
        with self._lock:
            self.calls += 1
        counted, start = Counted(), perf_counter()
        yield counted
        took = 1e3 * (perf_counter() - start)
        with self._lock:
            self.answers += 1
            self.milliseconds.append(took)
            self.plan = counted.plan
            self.kept, self.total = self.kept + counted.visual_tokens[0], self.total + counted.visual_tokens[1]
            self.verified += counted.accepted > 0

    def counted(self, vla: VLA) -> CountedVLA:
        """``vla`` for whoever asks in the policy's place."""
        return CountedVLA(vla, self)

    def took(self, step: StepInfo, waits: bool) -> None:
        """Take in a control step; ``waits``: the VLA's time is part of it."""
        ms = step.milliseconds
        self.steps += 1
        self.generated += step.source in UNSEEN
        self.reasons[step.reason] += 1
        self._waits = waits
        shown = ms.get("capture", 0.0) if step.called_vla or step.unavailable is not None else 0.0  # else the gate's eyes look
        self._own.append(ms.get("total", 0.0) - (ms.get("vla", 0.0) + shown if waits else 0.0))
        self._asked.append(step.called_vla)
        if waits and step.called_vla:
            self._captures.append(ms.get("capture", 0.0))
        if self.announce and self.steps == FIRST:
            self._announce(step)

    @property
    def decided(self) -> int:
        """Steps that were not the rest of a plan."""
        return self.steps - sum(self.reasons[reason] for reason in PLANNED)

    @property
    def gain(self) -> Gain | None:
        """Milliseconds a step, from the times of the last steps; None before the first answer.

        Medians, so that first calls, which load and compile, do not speak for the others.
        """
        if not self.milliseconds or not self._own:
            return None
        call = float(np.median(self.milliseconds)) + (float(np.median(self._captures)) if self._captures else 0.0)
        own = float(np.median(self._own))
        return Gain(call / max(1, self.plan), own + (call * float(np.mean(self._asked)) if self._waits else 0.0))

    @property
    def idle(self) -> bool:
        """Nothing is gained so far: each step that somebody decided was a whole call, on all visual tokens."""
        return 0 < self.decided <= self.calls and self.kept == self.total and not self.verified

    def _announce(self, step: StepInfo) -> None:
        gain = self.gain
        if gain is None:
            logger.warning("spvla: the VLA was not asked once in the first %d steps", FIRST)
            return
        if step.deviates is not None:
            told = f"shadow mode: the VLA acts on every step, at {gain.before:.1f} ms"
        else:
            told = f"VLA alone {gain.before:.1f} ms a step, accelerated {gain.after:.1f} ms ({gain.factor:.1f}x)"
        told += f"; asked {self.calls} times in the first {FIRST} steps"
        if (self.idle or gain.factor < 1) and step.deviates is None:
            why = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(3))
            logger.warning("spvla: nothing is gained so far: %s (%s); spvla.explain(policy) says why", told, why)
        else:
            logger.info("spvla: %s", told)


class CountedVLA:
    """A VLA whose calls ``ledger`` counts."""

    def __init__(self, vla: VLA, ledger: Ledger) -> None:
        self.vla, self.ledger = vla, ledger
        self.action_space = vla.action_space

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.vla.reset(instruction)

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """As the VLA's own."""
        return self.ledger.ask(lambda: self.vla.predict(observation, keep_mass=keep_mass))
