"""A fixed-rate control loop around the accelerated policy: camera, policy, safe hold, watchdog, recording.

    python examples/robot_loop.py --seconds 10 --record runs/robot                      # a simulated arm, a toy VLA, 20 Hz
    python examples/robot_loop.py --url ws://gpu:8000 --export EXPORT --seconds 10      # the VLA on another machine

To drive a robot, write the four methods of :class:`~spvla.safety.Robot` for it (docs/robot.md has them for a Franka) and call
:func:`control_loop`. A policy made with ``mode="bridge"`` never waits: its VLA thinks in a thread of its own while the robot
moves. One made with ``mode="wait"`` is put into a thread as a whole, and the robot stands while it thinks. Whoever sends has a
thread, too; the loop's clock waits for none of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

import spvla
from spvla.actions import LIBERO, ActionSpace, FloatArray
from spvla.errors import InputError
from spvla.history import Source
from spvla.recording import Policy
from spvla.safety import PATIENCE, Commands, Robot, Signals, Watchdog, Worker
from spvla.vlas.base import VLAOutput


@dataclass
class Report:
    """What happened in an episode.

    Args:
        ticks: control periods.
        held: of these, how many found nobody who may act: a stop was commanded.
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

    At each tick the policy gets the newest state. One that never waits says at once what to do. Of one that waits for its VLA
    the action is sent at once if it is there by the deadline; if not, the robot is told to stand still, tick by tick, until it
    is. The policy learns what was executed, so its history stays true.

    Args:
        policy: made with ``mode="bridge"``, or else with ``when_unavailable=...`` if its VLA is remote; and with ``record=...``
            to keep the episode.
        robot: see :class:`~spvla.safety.Robot`.
        instruction: what to do.
        seconds: longest duration.
        deadline: fraction of a period that a policy that waits may think before the robot holds.
        watchdog: seconds of silence after which another thread stops the robot.
        done: asked at each tick; ends the episode.

    Raises:
        RuntimeError: the watchdog stopped the robot.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM or SIGHUP.
    """
    space, period, report = policy.space, 1 / policy.space.control_rate, Report()
    commands = Commands(robot, period / 2)
    dog = Watchdog(watchdog, commands.stop)
    thinker = (Waiting if policy.waits else Bridging)(policy, robot)
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
                    action = thinker.next(robot.state(), at + deadline * period)
                    report.held += thinker.held
                    dog.feed()
                    if action is not None and not commands.send(action):
                        policy.executed(space.stop(action))
                        break
                    report.ticks += 1
                    commands.stopping.wait(max(0.0, start + report.ticks * period - time.monotonic()))
        finally:
            commands.stop()
            report.hung = not thinker.close()
        dog.feed()
    report.stats = policy.stats()
    return report


State = NDArray[np.float32]


class Bridging:
    """What a policy that never waits does at each tick."""

    def __init__(self, policy: Policy, robot: Robot) -> None:
        self.policy, self.robot = policy, robot
        self.held = False  # in the last tick

    def next(self, state: State, by: float) -> FloatArray | None:
        """The action (D,) for ``state`` (S,); None as long as nothing may be sent."""
        action = self.policy.tick(lambda: spvla.Observation(self.robot.image(), state), state)
        self.held = self.policy.last_step.source == Source.HELD
        return None if action is None else self.policy.space.clip(action)

    def close(self) -> bool:
        """Whether the policy can be used again."""
        return True


class Waiting:
    """What is done at each tick with a policy that waits for its VLA, in a thread."""

    def __init__(self, policy: Policy, robot: Robot) -> None:
        self.policy, self.robot = policy, robot
        self.held = False  # in the last tick
        self._thinker = Worker("policy")
        self._pending: Future[FloatArray] | None = None
        self._waited: list[tuple[State | None, FloatArray | None]] = []  # states, and what was sent, since it was asked
        self._last: FloatArray | None = None

    def next(self, state: State, by: float) -> FloatArray | None:
        """The policy's action (D,), if it is there ``by`` that time; else a stop, or nothing before the first action, since the
        gripper's command is not known yet."""
        if self._pending is None:
            self._pending = self._thinker.submit(
                lambda: self.policy.select_action(lambda: spvla.Observation(self.robot.image(), state), state)
            )
            self._waited = []
        wait([self._pending], max(0.0, by - time.monotonic()))
        self.held = not self._pending.done()
        if self.held:
            action = None if self._last is None else self.policy.space.stop(self._last)
            self._waited.append((state, action))
            return action
        self._last = self.policy.space.clip(self._pending.result())
        self._tell([*self._waited, (state, self._last)], self._last)
        self._pending = None
        return self._last

    def close(self) -> bool:
        """End; False if the policy's last step has not ended by then: do not use it again."""
        self._thinker.close()
        if self._pending is None:
            return True
        if wait([self._pending], PATIENCE).not_done:
            return False
        if self._pending.exception() is None:
            self._tell(self._waited or [(None, None)], self._pending.result())
        return True

    def _tell(self, ticks: list[tuple[State | None, FloatArray | None]], answer: FloatArray) -> None:
        """Tell the policy what was executed from the tick at which it was asked to the one at which its ``answer`` was used."""
        actions = [self.policy.space.stop(answer) if action is None else action for _, action in ticks]
        self.policy.executed(actions[0])
        for (state, _), action in zip(ticks[1:], actions[1:], strict=True):
            self.policy.waited(action, state)


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
    mode: Literal["bridge", "wait"] = "bridge",
    record: str | None = None,
    rerun: str | None = None,
) -> None:
    """Drive the simulated arm.

    Args:
        url: a server's address, ``ws://host:port``; left out: a toy VLA here.
        export: generators and gates; left out: ridge under the published rule.
        risk: the one knob; the export's default if left out.
        instruction: what the VLA is told.
        seconds: duration.
        mode: bridge: the robot moves while the VLA thinks; wait: it stands.
        record: folder of a rollout store for the episode.
        rerun: show it in Rerun while it runs: an .rrd file, spawn, or a viewer's address rerun+http://...
    """
    from spvla.rerun_log import RerunLog, Viewed
    from spvla.vlas.remote import RemoteVLA

    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds must be positive, got {seconds:g}")
    vla: Any = ToyVLA() if url is None else RemoteVLA(url)
    when_unavailable = "raise" if mode == "bridge" else "stop"
    policy = spvla.accelerate(vla, export, risk, mode=mode, when_unavailable=when_unavailable, record=record)
    log = None if rerun is None else RerunLog(rerun, policy.space)
    seen = policy if log is None else cast(Policy, Viewed(policy, log))
    arm = SimulatedArm()
    with policy:  # a recording keeps an episode that ends early, too
        report = control_loop(seen, arm, instruction, seconds=seconds)
        policy.finish(success=bool(np.abs(arm.position[:2]).max() < 0.05))
    if log is not None:
        log.close()
    late = [f"{1e3 * np.percentile(report.lateness, q):.1f} ms (p{q:g})" for q in (50, 99, 99.9)]
    print(
        f"{report.ticks} ticks, {report.held} held, {report.overruns} overruns; they begin within {', '.join(late)} of their ",
        end="",
    )
    print(f"time; at {arm.position.round(3).tolist()}")
    print(", ".join(f"{k} {v:.4g}" for k, v in report.stats.items()))


if __name__ == "__main__":
    import sys

    from jsonargparse import auto_cli

    from spvla.cli import guard

    sys.exit(guard(lambda: auto_cli(main, as_positional=False)))
