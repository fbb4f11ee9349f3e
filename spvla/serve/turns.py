"""One VLA for many sessions: their calls wait in one queue, and those that wait together are answered together if it can."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import perf_counter

from spvla.errors import InputError
from spvla.observation import Observation
from spvla.pruning.selector import TokenSelector
from spvla.safety import Worker
from spvla.serve.metrics import Metrics
from spvla.vlas.base import VLA, BatchedVLA, PrunableVLA, VLAOutput, VLAUnavailable


@dataclass(eq=False)
class Request:
    """A session's call that waits.

    Args:
        vla: the session's own, which shares its weights with the others' if it is prunable.
        selector: what it prunes with.
        instruction: the session's.
        observation, keep_mass: see :meth:`~spvla.vlas.base.VLA.predict`.
    """

    vla: VLA
    selector: TokenSelector | None
    instruction: str
    observation: Observation
    keep_mass: float
    since: float = field(default_factory=perf_counter)
    answer: Future[VLAOutput] = field(default_factory=Future)

    def joins(self, other: Request) -> bool:
        """Whether one pass can answer both."""
        shares = isinstance(self.vla, BatchedVLA) and isinstance(self.vla, PrunableVLA)
        return shares and self.selector == other.selector and self.keep_mass == other.keep_mass


class Turns:
    """The queue in front of a VLA, first come, first served.

    Args:
        most: calls that one pass may answer, where the VLA is a :class:`~spvla.vlas.base.BatchedVLA` that shares its weights;
            1: one at a time.
        deadline: seconds within which a call must be answered, the wait included; None: it may take any time.
        metrics: what is counted.
    """

    def __init__(self, most: int = 1, deadline: float | None = None, metrics: Metrics | None = None) -> None:
        self.most, self.deadline = most, deadline
        self.metrics = metrics or Metrics()
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()  # guards the queue
        self._worker = Worker("vla-turns")

    def ask(self, request: Request) -> VLAOutput:
        """The VLA's answer; the wait before it is reported as the stage ``turn``.

        Raises:
            VLAUnavailable: it is not there by the deadline. A call that still waits is given up.
        """
        with self._lock:
            self._waiting.append(request)
        self._worker.submit(self._serve)
        try:
            return request.answer.result(self.deadline)
        except TimeoutError:
            if request.answer.done():  # just now, or the error is the VLA's own
                return request.answer.result()
            request.answer.cancel()
            self.metrics.late.inc()
            raise VLAUnavailable(f"the VLA did not answer within the deadline of {self.deadline:g} s") from None

    def _serve(self) -> None:
        """Answer the oldest call, and those that one pass can answer with it. There is nothing to do where an earlier pass took
        the call for which this was submitted."""
        with self._lock:
            batch: list[Request] = []
            others: deque[Request] = deque()
            for request in self._waiting:
                fits = not batch or (len(batch) < self.most and request.joins(batch[0]))
                if not fits:
                    others.append(request)
                elif request.answer.set_running_or_notify_cancel():
                    batch.append(request)
            self._waiting = others
        if not batch:
            return
        start = perf_counter()
        for request in batch:
            self.metrics.turn_seconds.observe(start - request.since)
        self.metrics.batch_size.observe(len(batch))
        answers = dict(zip(batch, _together(batch), strict=False)) if len(batch) > 1 else {}
        for request in batch:
            try:
                output = answers.get(request) or request.vla.predict(request.observation, keep_mass=request.keep_mass)
                timings = {"turn": 1e3 * (start - request.since), **output.timings}
                request.answer.set_result(replace(output, timings=timings))
            except BaseException as error:
                request.answer.set_exception(error)
        self.metrics.vla_seconds.observe(perf_counter() - start)


def _together(batch: Sequence[Request]) -> Sequence[VLAOutput]:
    """The answers of one pass; none if it failed: then each call is answered, or fails, alone."""
    first = batch[0]
    assert isinstance(first.vla, BatchedVLA), "calls join only then"
    try:
        seen, told = [r.observation for r in batch], [r.instruction for r in batch]
        answers = list(first.vla.predict_batch(seen, told, keep_mass=first.keep_mass))
    except Exception:
        return []
    return answers if len(answers) == len(batch) else []


class InTurn:
    """A session's VLA, asked in its turn."""

    def __init__(self, vla: VLA, turns: Turns, selector: TokenSelector | None = None) -> None:
        self.vla, self.turns, self.selector, self.action_space = vla, turns, selector, vla.action_space
        self._instruction: str | None = None

    def reset(self, instruction: str) -> None:
        """Start an episode."""
        self.vla.reset(instruction)
        self._instruction = instruction

    def predict(self, observation: Observation, keep_mass: float = 1.0) -> VLAOutput:
        """As the VLA's own."""
        if self._instruction is None:
            raise InputError("predict: call reset(instruction) first")
        return self.turns.ask(Request(self.vla, self.selector, self._instruction, observation, keep_mass))
