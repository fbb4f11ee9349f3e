"""What stands between a control loop and a robot, so that the robot's last command is its stop, however the loop ends.

``examples/robot_loop.py`` puts it together. Nothing here helps if Python itself stands still, as in a C extension that keeps
the interpreter's lock: the robot's own controller must hold when commands cease.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from spvla.actions import FloatArray
from spvla.errors import InputError

PATIENCE = 2.0  # seconds that the robot's stop() and the policy's last step are waited for when a loop ends


class Robot(Protocol):
    """What a robot is to the loop. ``image`` is called in the policy's thread, ``send`` in one of its own, ``stop`` in any."""

    def state(self) -> NDArray[np.float32]:
        """Proprioception (S,), as the policy's generator was trained with."""

    def image(self) -> NDArray[np.uint8]:
        """The newest camera frame, uint8 (H, W, 3) RGB; only called when the VLA acts."""

    def send(self, action: FloatArray) -> None:
        """Command an action (D,) for one control period, in the units of the policy's action space.

        A call that is held up while :meth:`stop` is called must raise, and its command must not be carried out any more:
        ``SimulatedArm`` in ``examples/robot_loop.py`` shows how. If it returns after all, the robot is stopped a second time.
        """

    def stop(self) -> None:
        """Stand still, whatever was commanded before."""


class Worker:
    """A thread that makes one call after another. Unlike an executor's it does not keep the program from ending: that waits for
    the call under way, for :data:`PATIENCE` at most, since native code must not be cut off in the middle."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _WORKERS.add(self)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Make ``call`` after those before it."""
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        """End after the calls so far."""
        self.submit(lambda: None).cancel()

    def join(self, timeout: float) -> None:
        """Drop the calls that wait, and return when the one under way has ended, or after ``timeout`` seconds."""
        with contextlib.suppress(Empty):
            while True:
                self._calls.get_nowait()[1].cancel()
        self.close()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


_WORKERS: WeakSet[Worker] = WeakSet()


@atexit.register
def _join_workers() -> None:
    end = time.monotonic() + PATIENCE
    for worker in list(_WORKERS):
        worker.join(max(0.0, end - time.monotonic()))


class Commands:
    """The only way to the robot: one command at a time, none after the stop, and one stop.

    Args:
        robot: see :class:`Robot`.
        grace: seconds that a command under way has to arrive before the robot is stopped beside it.
    """

    def __init__(self, robot: Robot, grace: float) -> None:
        self.robot, self.grace = robot, grace
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._sender, self._stopper = Worker("send"), Worker("stop")
        self._sent: Future[None] = Future()  # the last command
        self._sent.set_result(None)
        self._stopped: Future[None] | None = None

    def send(self, action: FloatArray) -> bool:
        """Send ``action`` (D,) and wait until the robot has it, or is stopped: then False. Raises what its ``send`` raised."""
        with self._lock:
            if self.stopping.is_set():
                return False
            sent = self._sent = self._sender.submit(lambda: self.robot.send(action))
        while not sent.done() and not self.stopping.is_set():
            wait([sent], 0.01)
        if self.stopping.is_set():
            return False
        sent.result()
        return True

    def stop(self) -> None:
        """Stop the robot, the first time this is called; return when that is done. Raises what its ``stop`` raised."""
        with self._lock:
            self.stopping.set()
            if self._stopped is None:
                self._stopped = self._stopper.submit(self._stop)
        if not wait([self._stopped], PATIENCE + self.grace).done:
            raise RuntimeError(f"the robot's stop() did not return in {PATIENCE:g} s: use its emergency stop")
        self._stopped.result()

    def _stop(self) -> None:
        sent = self._sent
        on_its_way = bool(wait([sent], self.grace).not_done)
        self.robot.stop()
        self._sender.close()
        if on_its_way:
            sent.add_done_callback(lambda late: None if late.exception() else self.robot.stop())


class Watchdog:
    """Stops the robot from a thread of its own if the loop does not come round in ``timeout`` seconds."""

    def __init__(self, timeout: float, stop: Callable[[], None]) -> None:
        if not (0 < timeout < math.inf):
            raise InputError(f"watchdog must be a positive number of seconds, got {timeout}", field="watchdog")
        self.timeout, self.stop, self.tripped = timeout, stop, False
        self._fed, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def feed(self) -> None:
        """The loop is alive. Raises RuntimeError if it was taken for dead: the robot stands still already."""
        if self.tripped:
            raise RuntimeError(f"the control loop stood still for more than {self.timeout:g} s; the robot was stopped")
        self._fed = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(max(0.001, self._fed + self.timeout - time.monotonic())):
            if time.monotonic() - self._fed > self.timeout:
                self.tripped = True
                self.stop()
                return

    def __enter__(self) -> Watchdog:
        self.feed()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)


class Signals:
    """Stops the robot at once at Ctrl-C, SIGTERM and SIGHUP, whatever the main thread is busy with.

    On leaving, Ctrl-C is a KeyboardInterrupt and the others a SystemExit with 128 plus their number. Elsewhere than in the main
    thread, where Python allows no handlers, this does nothing.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop
        self._caught: list[int] = []
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Signals:
        if self._main:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._before = {number: signal.signal(number, lambda n, _: self._caught.append(n)) for number in self.NUMBERS}
            self._descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def _watch(self, reading: int) -> None:
        while number := os.read(reading, 1):
            if number[0] in self.NUMBERS:
                self.stop()
        os.close(reading)

    def __exit__(self, *_: object) -> None:
        if not self._main:
            return
        signal.set_wakeup_fd(self._descriptor)
        os.close(self._writing)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if signal.SIGINT in self._caught:
            raise KeyboardInterrupt
        if self._caught:
            raise SystemExit(128 + self._caught[0])
