"""However a control loop ends, the last command that reaches the robot is its stop: one, at once, and the loop returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.store import RolloutStore
from examples.robot_loop import SimulatedArm, ToyVLA, control_loop
from spvla import InputError, accelerate
from spvla.history import Source
from spvla.safety import Commands, Watchdog
from spvla.vlas.base import VLAOutput

ROOT = Path(__file__).parents[1]
PERIOD = 0.05
SLACK = 0.15  # a busy machine's


class Noted(SimulatedArm):
    """Writes what arrives into ``log``, and to a pipe if there is one."""

    def __init__(self, pipe=None):
        super().__init__()
        self.log, self.pipe = [], pipe

    def note(self, what):
        self.log.append((what, time.monotonic()))
        if self.pipe is not None:
            os.write(self.pipe, f"{what} {time.monotonic()}\n".encode())

    def send(self, action):
        before = len(self.sent)
        super().send(action)
        assert len(self.sent) == before + 1
        self.note("send")

    def stop(self):
        super().stop()
        self.note("stop")


def require_stopped_last(log):
    names = [what for what, _ in log]
    assert names[-1] == "stop" and names.count("stop") == 1, names


def make(vla=None, **options):
    return accelerate(vla or ToyVLA(0.0), generator="ridge", gate="release", **options)


CHILD = """
import sys, threading, time
from examples.robot_loop import ToyVLA, control_loop
from tests.test_safety import Noted, make
how, record = sys.argv[1], sys.argv[2]

class Hanging(ToyVLA):
    def predict(self, observation, keep_mass=1.0):
        threading.Event().wait()

class Held(Noted):
    def transmit(self):
        if len(self.sent) == 5:
            time.sleep(30)

class Busy(Noted):
    def state(self):
        if len(self.sent) == 5:
            self.note("stuck")
            time.sleep(1.5)
        return super().state()

arm = {"send": Held, "state": Busy}.get(how, Noted)(1)
vla = Hanging() if how == "policy" else ToyVLA(0.0)
arm.note("ready")
with make(vla, record=record) as policy:
    control_loop(policy, arm, "go", seconds=1.0 if how == "policy-end" else 60.0, watchdog=20.0)
"""


def child(how, record):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, how, str(record)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("busy_with", "number"),
    [
        ("nothing", signal.SIGTERM),
        ("nothing", signal.SIGINT),
        ("policy", signal.SIGHUP),
        ("send", signal.SIGTERM),
        ("state", signal.SIGINT),
    ],
)
def test_a_signal_stops_the_robot_within_a_period(busy_with, number, tmp_path):
    with child(busy_with, tmp_path / "store") as process:
        lines = []
        enough = {"nothing": 11, "policy": 1, "send": 6, "state": 7}[busy_with]
        while len(lines) < enough:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        time.sleep(0.3)
        sent = time.monotonic()
        process.send_signal(number)
        rest, errors = process.communicate(timeout=20)
    log = [line.split() for line in [*lines, *rest.splitlines()]]
    require_stopped_last([what for what in log if what[0] not in ("ready", "stuck")])
    took = float(log[-1][1]) - sent
    assert took < PERIOD + SLACK, f"{1e3 * took:.0f} ms"
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
    else:
        assert process.returncode == 128 + number, errors
    if busy_with == "nothing":
        episodes = RolloutStore(tmp_path / "store").episodes
        assert len(episodes) == 1
    print(f"{busy_with}, {number.name}: {1e3 * took:.1f} ms")


@pytest.mark.slow
def test_a_policy_that_hangs_does_not_keep_the_loop():
    class Hanging(ToyVLA):
        asked = 0

        def predict(self, observation, keep_mass=1.0):
            self.asked += 1
            if self.asked > 3:
                threading.Event().wait()
            return super().predict(observation)

    policy, arm = accelerate(Hanging(0.0), generator="none"), Noted()
    start = time.monotonic()
    report = control_loop(policy, arm, "go", seconds=0.6, watchdog=5)
    assert report.hung and time.monotonic() - start < 4
    require_stopped_last(arm.log)
    assert np.abs(np.array(arm.sent)[4:, :6]).max() == 0, "it stands still meanwhile"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 100])
def test_a_blocked_send_is_not_carried_out_after_the_watchdogs_stop(seconds):
    class Held(Noted):
        def transmit(self):
            if len(self.sent) == 5:
                over.wait(seconds)

    over, arm = threading.Event(), Held()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"stood still for more than 0\.3 s; the robot was stopped"):
        control_loop(make(), arm, "go", seconds=60, watchdog=0.3)
    assert time.monotonic() - start < 3
    stopped = arm.log[-1][1]
    assert stopped - arm.times[-1] < 0.3 + 3 * PERIOD + SLACK
    time.sleep(0.8)
    over.set()
    time.sleep(0.1)
    require_stopped_last(arm.log)
    assert len(arm.sent) == 5


@pytest.mark.slow
def test_a_robot_that_carries_out_a_blocked_command_all_the_same_is_stopped_again():
    class Careless(Noted):
        def send(self, action):
            if len(self.sent) == 5:
                time.sleep(0.8)
            super().send(action)

    arm = Careless()
    with pytest.raises(RuntimeError, match="stood still"):
        control_loop(make(), arm, "go", seconds=60, watchdog=0.3)
    time.sleep(1.0)
    assert [what for what, _ in arm.log[-3:]] == ["stop", "send", "stop"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["state", "send", "policy", "done"])
def test_an_exception_stops_the_robot_and_the_episode_is_kept(where, tmp_path):
    class Broken(Noted):
        def state(self):
            if where == "state" and len(self.sent) == 5:
                raise OSError("no route to the robot")
            return super().state()

        def transmit(self):
            if where == "send" and len(self.sent) == 5:
                raise OSError("no route to the robot")

    class Raising(ToyVLA):
        def predict(self, observation, keep_mass=1.0):
            if where == "policy" and len(arm.sent) >= 5:
                raise OSError("no route to the robot")
            return super().predict(observation)

    def done():
        if where == "done" and len(arm.sent) == 5:
            raise OSError("no route to the robot")
        return False

    arm = Broken()
    with (
        pytest.raises(OSError, match="no route"),
        accelerate(Raising(0.0), generator="none", record=tmp_path / "store") as policy,
    ):
        control_loop(policy, arm, "go", seconds=60, watchdog=5, done=done)
    require_stopped_last(arm.log)
    store = RolloutStore(tmp_path / "store")
    (episode,) = store.episodes
    assert episode.success is None and episode.metadata["exception"] == "OSError"
    assert len(store.arrays["actions"]) >= 5


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_watchdog_that_would_never_bite_is_refused(seconds):
    arm = Noted()
    with pytest.raises(InputError, match="watchdog must be a positive number of seconds"):
        control_loop(make(), arm, "go", seconds=1, watchdog=seconds)
    with pytest.raises(InputError, match="watchdog must be"):
        Watchdog(seconds, arm.stop)
    assert not arm.log


def test_after_the_stop_nothing_is_sent():
    arm = Noted()
    commands = Commands(arm, 0.02)
    assert commands.send(np.zeros(7, np.float32))
    commands.stop()
    commands.stop()
    assert not commands.send(np.zeros(7, np.float32))
    require_stopped_last(arm.log)


def test_a_stop_that_fails_is_told():
    class Deaf(Noted):
        def stop(self):
            raise OSError("no route to the robot")

    with pytest.raises(OSError, match="no route"):
        Commands(Deaf(), 0.02).stop()


class Varying(ToyVLA):
    """Its features have another width in the fourth answer, and infinity in the fifth."""

    asked = 0

    def predict(self, observation, keep_mass=1.0):
        self.asked += 1
        features = np.ones(5 if self.asked != 4 else 6, np.float32)
        return VLAOutput(np.zeros((1, 7), np.float32), features=features * (np.inf if self.asked == 5 else 1))


def test_features_of_another_width_do_not_cost_the_episode(tmp_path):
    with accelerate(Varying(), generator="none", record=tmp_path / "store") as policy:
        policy.reset("go")
        arm = SimulatedArm()
        from spvla import Observation

        for _ in range(6):
            policy.select_action(Observation(arm.image(), arm.state()))
        policy.finish(success=True)
    store = RolloutStore(tmp_path / "store")
    features = store.arrays["vla_features"]
    assert features.shape == (6, 5) and np.isnan(features[3:5]).all() and np.isfinite(features[[0, 1, 2, 5]]).all()
    assert (store.arrays["sources"] == Source.VLA).all() and store.episodes[0].success is True


def test_a_program_ends_while_a_worker_is_busy_and_leaves_it_time_to_finish():
    """A thread that the interpreter cuts off in native code aborts the program."""
    code = """
import sys, threading
from spvla.safety import Worker
busy = Worker("busy")
begun = threading.Event()
def call(seconds):
    begun.set()
    threading.Event().wait(seconds)
    print("finished", flush=True)
busy.submit(lambda: call(float(sys.argv[1])))
busy.submit(lambda: print("never", flush=True))
begun.wait()
"""
    for seconds, said in (("0.3", "finished\n"), ("60", "")):
        done = subprocess.run([sys.executable, "-c", code, seconds], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (0, said)
