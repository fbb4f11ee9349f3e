"""A policy that never waits: the VLA thinks while the robot moves.

Asking a VLA takes several control steps. :class:`BridgePolicy` asks ahead and lets the generator act meanwhile. When the answer
comes it is *context*, the VLA's last word about the state that it saw, with its age: generator and gate take it in like any
other, and decide anew. It is executed itself only if the robot has stood still since that state, or, of a plan, from the step
on that is due now: in turn, or where the gate keeps it. Where neither may act the robot stands still, and that is counted.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spvla.actions import FloatArray
from spvla.errors import InputError
from spvla.gates.base import Decision
from spvla.gates.live import LiveGate
from spvla.history import Source
from spvla.judgement import Acted, Judged
from spvla.observation import Observation
from spvla.policy import SPVLAPolicy
from spvla.safety import Worker
from spvla.steps import StepInfo
from spvla.vlas.base import VLA, VLAOutput, VLAUnavailable, checked

MOST_AUDITS = 2  # that wait for their turn; while so many do, the generator may not act
REMEMBERED = 20  # calls that the latency is measured over


@dataclass(frozen=True)
class Call:
    """A question to the VLA.

    Args:
        step: the control step at which it was asked.
        state: proprioception (S,) then.
        proposal: what the generator would have done then, (D,), environment units, or None.
        audit: the live gate counts the answer.
        keep_mass: what pruning keeps.
        proposed: what the generator itself would have done, normalised (D,), or None.
    """

    step: int
    state: FloatArray
    proposal: FloatArray | None
    audit: bool = False
    keep_mass: float = 1.0
    proposed: FloatArray | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a call: the VLA's output, or what it raised."""

    call: Call
    output: VLAOutput | None
    error: Exception | None = None


class Calls(Protocol):
    """Who asks the VLA, one call after another, while the control loop goes on."""

    def reset(self, instruction: str) -> None:
        """Start an episode: answers to earlier calls never come."""

    def ask(self, call: Call, observation: Callable[[], Observation]) -> None:
        """Ask about ``observation`` as it is now, after the calls before."""

    def answers(self, step: int) -> list[Answer]:
        """The answers that are there at control step ``step`` and were not given before, in the order of their calls."""

    def wait(self) -> None:
        """Return when the oldest call is answered."""

    def __len__(self) -> int:
        """Calls that are not answered yet."""


class ThreadedCalls:
    """Asks in a thread. What the camera shows is captured in another one, at once, so that a call that has to wait for its
    turn is still about the step at which it was made. A VLA that hangs holds up later episodes' calls, never the loop."""

    def __init__(self, vla: VLA) -> None:
        self.vla = vla
        self._thinking, self._camera = Worker("vla"), Worker("camera")
        self._calls: deque[tuple[Call, Future[VLAOutput]]] = deque()
        for worker in (self._thinking, self._camera):
            weakref.finalize(self, worker.close)

    def reset(self, instruction: str) -> None:
        """Start an episode; a call under way is finished first, in its thread."""
        self._calls.clear()
        self._thinking.submit(lambda: self.vla.reset(instruction))

    def ask(self, call: Call, observation: Callable[[], Observation]) -> None:
        """Capture the observation now, ask in turn."""
        seen = self._camera.submit(observation)
        answer = self._thinking.submit(lambda: self.vla.predict(seen.result(), keep_mass=call.keep_mass))
        self._calls.append((call, answer))

    def answers(self, step: int) -> list[Answer]:
        """What is there by now."""
        out = []
        while self._calls and self._calls[0][1].done():
            call, future = self._calls.popleft()
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            out.append(Answer(call, None if error else future.result(), error))
        return out

    def wait(self) -> None:
        """Return when the oldest call is answered."""
        if self._calls:
            wait([self._calls[0][1]])

    def __len__(self) -> int:
        return len(self._calls)


class SimulatedCalls:
    """Asks in simulated time: the answer is computed at once and given ``steps`` control steps after its call's turn began.

    Args:
        vla: the VLA.
        steps: control steps that a call takes; 0: the answer is there in the same step.
    """

    def __init__(self, vla: VLA, steps: int) -> None:
        self.vla, self.steps = vla, steps
        self._calls: deque[tuple[int, Answer]] = deque()  # and when each answer is due

    @property
    def coming(self) -> VLAOutput | None:
        """The next answer, which nobody can know yet."""
        return self._calls[0][1].output if self._calls else None

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self._calls.clear()
        self.vla.reset(instruction)

    def ask(self, call: Call, observation: Callable[[], Observation]) -> None:
        """Ask now, answer later."""
        begins = max([call.step, *(due for due, _ in list(self._calls)[-1:])])
        try:
            answer = Answer(call, self.vla.predict(observation(), keep_mass=call.keep_mass))
        except VLAUnavailable as error:
            answer = Answer(call, None, error)
        self._calls.append((begins + self.steps, answer))

    def answers(self, step: int) -> list[Answer]:
        """What is due by ``step``."""
        out = []
        while self._calls and self._calls[0][0] <= step:
            out.append(self._calls.popleft()[1])
        return out

    def wait(self) -> None:
        """Let the oldest answer be due."""
        if self._calls:
            self._calls[0] = (-1, self._calls[0][1])

    def __len__(self) -> int:
        return len(self._calls)


class BridgePolicy(SPVLAPolicy):
    """The accelerated policy in a world that does not wait. :meth:`tick` never blocks.

    Args:
        parts: see :class:`~spvla.policy.SPVLAPolicy`. ``max_generated_run`` limits the age of the VLA's last word.
        ahead: the VLA is asked as soon as the gate's probability reaches this fraction of the gate's threshold; 0 asks
            whenever it is idle.
        calls: who asks the VLA; None: :class:`ThreadedCalls`.
    """

    waits = False

    def __init__(self, *parts: Any, ahead: float = 0.5, calls: Calls | None = None, **options: Any) -> None:
        super().__init__(*parts, **options)
        if not 0 <= ahead <= 1:
            raise InputError(f"policy: ahead must lie in [0, 1], got {ahead}", field="ahead")
        self.ahead = ahead
        self.calls: Calls = ThreadedCalls(self.ledger.counted(self.vla)) if calls is None else calls
        if isinstance(self.gate, LiveGate):
            if self.gate.options.executed:
                raise InputError("policy: a robot that never waits cannot execute audits; make them silent", field="executed")
            self.gate.outstanding = 1 + MOST_AUDITS
        self._latencies: deque[int] = deque(maxlen=REMEMBERED)
        self.latency = 1  # control steps that a call takes: nine tenths of the last ones took no longer
        self._told = False
        self._audits = 0  # under way

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.calls.reset(instruction)
        self._give_up(self._audits)
        self._audits = 0
        self._begin(instruction)
        self._step = 0  # control steps of the episode
        self._standing: list[FloatArray | None] = []  # states before the first answer
        self._still_since: int | None = None  # the step from which on the robot has stood still
        self._fresh: VLAOutput | None = None  # an answer that may be executed now
        self.arrived: list[tuple[int, VLAOutput]] = []  # answers that the last tick took in, with their steps
        self.still: FloatArray | None = None  # what counts as executed, (D,), in the steps before the first answer

    def select_action(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray:
        """As :meth:`tick`, but an episode's first step waits for the VLA: before its first answer no action is known."""
        while (action := self.tick(observation, state)) is None:
            if self.last_step.unavailable is not None:
                raise VLAUnavailable(self.last_step.unavailable)
            self.calls.wait()
            self._step, self._standing, self.steps = 0, [], []  # the wait was no control step
        return action

    def tick(
        self, observation: Observation | Callable[[], Observation], state: NDArray[np.floating] | None = None
    ) -> FloatArray | None:
        """The action (D,) of this control step, float32, environment units; None as long as the VLA has not answered for the
        first time: the robot is to be left standing. Never waits for the VLA.

        Args:
            observation: what the robot sees, or a callable that captures it, called in another thread and only where the VLA
                is asked.
            state: current proprioception (S,) if ``observation`` is a callable; else the observation's own is used.

        Raises:
            InputError: the VLA's answer is not one, or whatever else than :class:`VLAUnavailable` it raised.
        """
        start = perf_counter()
        if self._instruction is None:
            raise InputError("policy: call reset(instruction) before the first tick()")
        state = observation.state if isinstance(observation, Observation) else state
        capture = (lambda: observation) if isinstance(observation, Observation) else observation
        answers = self.calls.answers(self._step)
        if not self.history.steps and not any(a.output for a in answers):
            self._wait_for_the_first(capture, state, answers, start)
            return None
        self._leave_the_start(answers)
        self.history.observe(state)
        unavailable = self._take_in(answers)
        judged = self._judge()
        times = {"scheduling": 1e3 * (perf_counter() - start)}
        asked = self._ask_ahead(judged, capture)
        age = self.history.vla_age
        acted = self._act(judged, capture, times)
        step = replace(self._account(judged, acted, times), called_vla=asked, unavailable=unavailable, vla_age=age)
        since = self._step if self._still_since is None else self._still_since
        self._still_since = since if acted.source == Source.HELD else None
        self._step += 1
        times["total"] = 1e3 * (perf_counter() - start)
        self.steps.append(step)
        self.ledger.took(step, self.waits)
        return acted.action.copy()

    def _wait_for_the_first(
        self, capture: Callable[[], Observation], state: NDArray[np.floating] | None, failures: list[Answer], start: float
    ) -> None:
        """A control step before the VLA's first answer."""
        self.arrived, failed = [], None
        for failure in failures:
            failed = str(_unavailable(failure))
        asked = not len(self.calls)
        if asked:
            known = np.zeros(0, np.float32) if state is None else np.array(state, np.float32)
            self.calls.ask(Call(self._step, known, None), capture)
        self._standing.append(None if state is None else np.array(state, np.float32))
        self._still_since = 0
        self._step += 1
        ms = {"total": 1e3 * (perf_counter() - start)}
        info = StepInfo(Source.HELD, False, "first answer", called_vla=asked, unavailable=failed, vla_age=0, milliseconds=ms)
        self.steps.append(info)

    def _leave_the_start(self, answers: list[Answer]) -> None:
        """The first answer is there. The steps that the robot stood before become the history's: now it is known how the
        gripper was to be commanded."""
        if not self._standing:
            return
        first = next(a.output for a in answers if a.output is not None)
        self.still = self.space.stop(checked(first, self.space.dim, self.vla).actions[0])
        for state in self._standing:
            self.history.observe(state)
            self.history.act(self.still, Source.HELD)
        self._standing = []

    def _take_in(self, answers: list[Answer]) -> str | None:
        """Make answers the VLA's last word; why it could not be asked, if one says so."""
        self.arrived, self._fresh, unavailable = [], None, None
        for answer in answers:
            call, age = answer.call, self._step - answer.call.step
            self._audits -= call.audit
            if answer.output is None:
                unavailable = str(_unavailable(answer))
                self._give_up(call.audit)
                continue
            output = checked(answer.output, self.space.dim, self.vla)
            self.arrived.append((call.step, output))
            self._latencies.append(age)
            self.latency = int(np.quantile(self._latencies, 0.9, method="higher"))
            if isinstance(self.gate, LiveGate) and call.proposal is not None:
                self.gate.settle(call.proposal, output.actions[0], call.audit)
            self.history.answer(output, call.state, max(1, age), call.proposed)
            still = age == 0 or (self._still_since is not None and self._still_since <= call.step)
            self._fresh = output if still else None
            if not self._arms:  # else a plan is in the history, and the gate decides about each of its actions
                self._queue = deque(output.actions[1 if still else age :])
        if self.latency >= self.max_generated_run and not self._told:
            self._told = True
            warnings.warn(
                f"the VLA's answers take {self.latency} control steps, and the generator may go on for "
                f"{self.max_generated_run} without one: the robot will stand between them",
                stacklevel=3,
            )
        return unavailable

    def _give_up(self, audits: int) -> None:
        """So many audits will not be answered."""
        if isinstance(self.gate, LiveGate):
            for _ in range(audits):
                self.gate.unanswered()

    def _judge(self) -> Judged:
        if self._fresh is not None:
            return Judged(Decision(False, "fresh answer"), proposed=self._unasked())
        if isinstance(self.gate, LiveGate) and len(self.calls) > MOST_AUDITS:
            return Judged(Decision(False, "audits waiting"), proposed=self._unasked())
        return super()._judge()

    def _steps_without_vla(self) -> int:
        """What the run limit counts: steps since the state that the VLA last answered about."""
        return self.history.vla_age - 1

    def _ask_ahead(self, judged: Judged, capture: Callable[[], Observation]) -> bool:
        """Ask the VLA about this step, if it is an audit, or if its word will be wanted by the time it comes."""
        decision, latency = judged.decision, self.latency
        if not decision.audit:
            if len(self.calls):
                return False
            if self._fresh is not None or self._queue:
                wanted = self.generator is None and 0 < len(self._queue) <= latency
            else:
                foreseen = decision.probability is not None and decision.threshold is not None
                wanted = (
                    not judged.skips
                    or self._steps_without_vla() + latency >= self.max_generated_run
                    or (foreseen and decision.probability >= self.ahead * decision.threshold)  # type: ignore[operator]
                )
            if not wanted:
                return False
        keep_mass = 1.0 if self.pruner is None else self.pruner.speed(self.history.last_action, self.history.space)
        assert self.history.states is not None, "this step was observed"
        state = self.history.states[-1].copy()
        self._audits += decision.audit
        self.calls.ask(Call(self._step, state, judged.proposal, decision.audit, keep_mass, judged.proposed), capture)
        return True

    def _propensity(self, judged: Judged, acted: Acted) -> float | None:
        """Unknown: whether an answer comes depends on more than a coin."""
        return None

    def _learn(self, judged: Judged, acted: Acted) -> None:
        """Steps that the robot stands do not count: they would hide how often the generator deviates while it moves."""
        if acted.source != Source.HELD:
            super()._learn(judged, acted)

    def _act(self, judged: Judged, observation: Observation | Callable[[], Observation], times: dict[str, float]) -> Acted:
        last = self.history.last_action
        if self._fresh is not None:
            action = self._fresh.actions[0]
            return Acted(action if last is None else self.space.toward(action, last), Source.VLA, output=self._fresh)
        assert last is not None, "the first action is the VLA's"
        if judged.skips and judged.proposal is not None:
            if judged.decision.kept:
                return Acted(self.space.toward(judged.proposal, last), Source.PLAN)
            return Acted(judged.proposal, Source.GENERATOR)
        if self._queue:
            action = self.space.toward(self._queue.popleft(), last)
            return Acted(action, Source.VLA)
        return Acted(self.space.stop(last), Source.HELD)


def _unavailable(answer: Answer) -> VLAUnavailable:
    """Why the VLA could not be asked. Raises whatever else it raised."""
    assert answer.error is not None, "an answer is an output or an error"
    if not isinstance(answer.error, VLAUnavailable):
        raise answer.error
    return answer.error
