"""A fixed-rate control loop around the accelerated policy: camera, policy, deadline, safe hold, watchdog, recording.

    python examples/robot_loop.py --seconds 10 --record runs/robot                      # a simulated arm, a toy VLA, 20 Hz
    python examples/robot_loop.py --url ws://gpu:8000 --export EXPORT --seconds 10      # the VLA on another machine

To drive a robot, write the four methods of :class:`~spvla.safety.Robot` for it (docs/robot.md has them for a Franka) and call
:func:`control_loop`. The policy thinks in a thread of its own, and so does whoever sends; the loop's clock waits for neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import spvla
from spvla.actions import LIBERO, ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.recording import Policy
from spvla.safety import PATIENCE, Commands, Robot, Signals, Watchdog, Worker
from spvla.vlas.base import VLAOutput


@dataclass
class Report:
    """What happened in an episode.

    Args:
        ticks: control periods.
        held: of these, how many found no answer in time: a stop was commanded.
        overruns: ticks that began more than half a period late.
        hung: the policy's last step had not ended when the loop returned; do not use that policy again.
        lateness: seconds that each tick began after its time.
        stats: the policy's own.
    """

    ticks: int = 0
    held: int = 0
    overruns: int = 0
    hung: bool = False
    lateness: list[float] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=dict)


def control_loop(
    policy: Policy,
    robot: Robot,
    instruction: str,
    *,
    seconds: float,
    deadline: float = 0.8,
    watchdog: float = 0.5,
    done: Callable[[], bool] = lambda: False,
) -> Report:
    """Run an episode at the action space's control rate. However it ends, the last command that reaches the robot is its stop.

    At each tick the policy gets the newest state. Its action is sent at once if it is there by the deadline; if not, the robot
    is told to stand still, tick by tick, until it is. The policy learns what was executed, so its history stays true.

    Args:
        policy: made with ``when_unavailable=...`` if its VLA is remote, and ``record=...`` to keep the episode.
        robot: see :class:`~spvla.safety.Robot`.
        instruction: what to do.
        seconds: longest duration.
        deadline: fraction of a period that the policy may think before the robot holds.
        watchdog: seconds of silence after which another thread stops the robot.
        done: asked at each tick; ends the episode.

    Raises:
        RuntimeError: the watchdog stopped the robot.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM or SIGHUP.
    """
    space, period, report = policy.space, 1 / policy.space.control_rate, Report()
    pending: Future[FloatArray] | None = None
    waited: list[Executed] = []  # since the pending step was asked
    last: FloatArray | None = None
    commands = Commands(robot, period / 2)
    dog = Watchdog(watchdog, commands.stop)
    thinker = Worker("policy")
    policy.reset(instruction)
    with Signals(commands.stop):
        try:
            with dog:
                start = time.monotonic()
                while report.ticks * period < seconds and not commands.stopping.is_set() and not done():
                    at = start + report.ticks * period
                    report.lateness.append(time.monotonic() - at)
                    if report.lateness[-1] > period / 2:
                        report.overruns += 1
                        start += report.lateness[-1]  # a late tick moves the ones after it: commands never come in bursts
                        at = time.monotonic()
                    state = robot.state()
                    if pending is None:
                        capture = (lambda s: lambda: spvla.Observation(robot.image(), s))(state)
                        step = (lambda c, s: lambda: policy.select_action(c, s))(capture, state)
                        pending, waited = thinker.submit(step), []
                    wait([pending], max(0.0, at + deadline * period - time.monotonic()))
                    action: FloatArray | None
                    if pending.done():
                        action = answer = space.clip(pending.result())
                        _tell(policy, [*waited, (state, answer)], answer)
                        pending = None
                    else:
                        report.held += 1
                        action = None if last is None else space.stop(last)
                        waited.append((state, action))
                    dog.feed()
                    if action is not None:
                        if not commands.send(action):
                            policy.executed(space.stop(action))
                            break
                        last = action
                    report.ticks += 1
                    commands.stopping.wait(max(0.0, start + report.ticks * period - time.monotonic()))
        finally:
            commands.stop()
            thinker.close()
            if pending is not None:
                report.hung = bool(wait([pending], PATIENCE).not_done)
                if not report.hung and pending.exception() is None:
                    _tell(policy, waited or [(None, None)], pending.result())
        dog.feed()
    report.stats = policy.stats()
    return report


Executed = tuple[NDArray[np.float32] | None, FloatArray | None]
"""A tick's state (S,), and what was sent (D,). None: nothing, since before the first action no gripper command is known."""


def _tell(policy: Policy, ticks: list[Executed], answer: FloatArray) -> None:
    """Tell the policy what was executed from the tick at which it was asked to the one at which its ``answer`` was used."""
    actions = [policy.space.stop(answer) if action is None else action for _, action in ticks]
    policy.executed(actions[0])
    for (state, _), action in zip(ticks[1:], actions[1:], strict=True):
        policy.waited(action, state)


# ------------------------------------------------------------------------------------------------- to try it without one


class SimulatedArm:
    """A point that moves 5 cm per unit and control step; its state is LIBERO's: position, rotation, two fingers."""

    def __init__(self) -> None:
        self.position, self.fingers = np.array([0.3, 0.3, 0.3]), 0.04
        self.sent: list[FloatArray] = []
        self.times: list[float] = []
        self.stopped = 0
        self._lock = threading.Lock()

    def state(self) -> NDArray[np.float32]:
        """(8,)"""
        return np.array([*self.position, 0, 0, 0, self.fingers, -self.fingers], np.float32)

    def image(self) -> NDArray[np.uint8]:
        """A white square where the point is, seen from above."""
        out = np.zeros((64, 64, 3), np.uint8)
        row, column = np.clip(32 + 60 * self.position[:2], 2, 61).astype(int)
        out[row - 2 : row + 2, column - 2 : column + 2] = 255
        return out

    def transmit(self) -> None:
        """The way to the arm, which may hold a command up."""

    def send(self, action: FloatArray) -> None:
        """Move for one period. Raises RuntimeError if the arm was stopped while the command was on its way."""
        stops = self.stopped
        self.transmit()
        with self._lock:
            if self.stopped != stops:
                raise RuntimeError("the arm was stopped before this command arrived")
            self.sent.append(action.copy())
            self.times.append(time.monotonic())
            self.position = self.position + 0.05 * action[:3]
            self.fingers = 0.0 if action[6] > 0 else 0.04

    def stop(self) -> None:
        """Stand still."""
        with self._lock:
            self.stopped += 1


class ToyVLA:
    """Finds the white square and moves it to the middle, thinking ``seconds`` about it."""

    action_space: ActionSpace = LIBERO

    def __init__(self, seconds: float = 0.12) -> None:
        self.seconds = seconds

    def reset(self, instruction: str) -> None:
        """Start an episode."""

    def predict(self, observation: spvla.Observation, keep_mass: float = 1.0) -> VLAOutput:
        """Towards the middle, open."""
        time.sleep(self.seconds)
        seen = np.argwhere(observation.require_image()[..., 0]).mean(0)
        move = np.clip((31.5 - seen) / 20, -1, 1)
        return VLAOutput(np.array([[*move, 0, 0, 0, 0, -1]], np.float32))


def main(
    url: str | None = None,
    export: str | None = None,
    risk: float | None = None,
    instruction: str = "go to the middle",
    seconds: float = 10.0,
    when_unavailable: str = "stop",
    record: str | None = None,
) -> None:
    """Drive the simulated arm.

    Args:
        url: a server's address, ``ws://host:port``; left out: a toy VLA here.
        export: generators and gates; left out: ridge under the published rule.
        risk: the one knob; the export's default if left out.
        instruction: what the VLA is told.
        seconds: duration.
        when_unavailable: raise, stop, hold or generator.
        record: folder of a rollout store for the episode.
    """
    from spvla.vlas.remote import RemoteVLA

    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds must be positive, got {seconds:g}")
    vla: Any = ToyVLA() if url is None else RemoteVLA(url)
    policy = spvla.accelerate(vla, export, risk, when_unavailable=when_unavailable, record=record)
    arm = SimulatedArm()
    with policy:  # a recording keeps an episode that ends early, too
        report = control_loop(policy, arm, instruction, seconds=seconds)
        policy.finish(success=bool(np.abs(arm.position[:2]).max() < 0.05))
    print(f"{report.ticks} ticks, {report.held} held, {report.overruns} overruns; ticks begin within ", end="")
    print(f"{1e3 * np.percentile(report.lateness, 99):.1f} ms (p99) of their time; at {arm.position.round(3).tolist()}")
    print(", ".join(f"{k} {v:.4g}" for k, v in report.stats.items()))


if __name__ == "__main__":
    import sys

    from jsonargparse import auto_cli

    from spvla.cli import guard

    sys.exit(guard(lambda: auto_cli(main, as_positional=False)))
