"""The control loop against a simulated 20 Hz robot: it keeps its rate, holds, stops, and records what was executed."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from data.store import RolloutStore
from examples.robot_loop import SimulatedArm, ToyVLA, control_loop
from spvla import InputError, VLAUnavailable, accelerate
from spvla.actions import LIBERO
from spvla.history import Source
from spvla.safety import Watchdog

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock


def make(seconds=0.0, **options):
    return accelerate(ToyVLA(seconds), gate="release", generator="ridge", **options), SimulatedArm()


def test_twenty_actions_a_second_and_no_drift():
    policy, arm = make()
    report = control_loop(policy, arm, "go", seconds=1.5, watchdog=5)
    assert report.ticks == 30 and len(arm.sent) >= 30 - report.held
    assert report.held <= 10  # this machine may be busy: then a tick is held or late, but never all of them
    if not report.overruns and not report.held:
        off = np.array(arm.times) - arm.times[0] - np.arange(30) / 20
        assert abs(np.median(off)) < 0.01
    assert np.diff(arm.times).min() > 0.005 and arm.stopped == 1
    np.testing.assert_array_equal([s.source for s in policy.steps[:3]], [Source.VLA] * 3)


def test_while_the_vla_thinks_the_robot_stands_still_and_the_history_says_so(tmp_path):
    policy, arm = make(0.12, record=tmp_path / "store")
    report = control_loop(policy, arm, "go to the middle", seconds=3, watchdog=5)
    policy.finish(success=True)
    policy.close()
    assert report.held > 0 and report.stats["vla_calls"] > 0
    store = RolloutStore(tmp_path / "store")
    recorded = store.arrays["actions"]
    waiting = len(recorded) - len(arm.sent)  # ticks before the first answer, at which nothing was sent
    assert waiting >= 1 and len(recorded) == report.ticks
    np.testing.assert_array_equal(recorded[waiting:], arm.sent)
    made = store.arrays["sources"]
    held = made == Source.HELD
    assert held.any() and (made == Source.VLA).sum() == report.stats["vla_calls"]
    moving = np.abs(recorded[:, :2]).max(1) > 0.01
    assert moving.any() and not moving[held].all(), "stops are sent between the VLA's answers"
    far = np.abs(store.arrays["states"][[0, -1], :2]).max(1)
    assert far[1] < far[0], "and it gets nearer nevertheless"


def test_a_vla_that_goes_away_and_returns():
    class Flaky(ToyVLA):
        away = False

        def predict(self, observation, keep_mass=1.0):
            if self.away:
                raise VLAUnavailable("no answer in 1 s")
            return super().predict(observation)

    vla, arm = Flaky(0.0), SimulatedArm()
    policy = accelerate(vla, generator="none", when_unavailable="stop")
    timers = [threading.Timer(t, setattr, (vla, "away", away)) for t, away in ((0.5, True), (1.0, False))]
    for timer in timers:
        timer.start()
    report = control_loop(policy, arm, "go", seconds=1.6, watchdog=5)
    down = np.array([s.unavailable is not None for s in policy.steps])
    assert 3 <= down.sum() <= 20 and not down[0] and not down[-1] and report.stats["unavailable"] == down.sum()
    assert np.abs(np.array(arm.sent)[down][:, :6]).max() == 0


def test_the_watchdog_stops_the_robot_when_the_loop_stands_still():
    class Stuck(SimulatedArm):
        def state(self):
            if len(self.sent) == 5:
                time.sleep(1.0)
            return super().state()

    class Noted(Stuck):
        def stop(self):
            super().stop()
            self.at = getattr(self, "at", time.monotonic())

    policy, arm = make()[0], Noted()
    with pytest.raises(RuntimeError, match=r"stood still for more than 0\.3 s; the robot was stopped"):
        control_loop(policy, arm, "go", seconds=5, watchdog=0.3)
    assert len(arm.sent) == 5 and arm.at - arm.times[-1] < 0.8, "in another thread, while the loop was stuck"
    with Watchdog(0.3, arm.stop) as dog:
        for _ in range(60):
            time.sleep(0.01)
            dog.feed()
    assert not dog.tripped


def test_however_it_ends_the_robot_is_stopped():
    class Blind(SimulatedArm):
        def image(self):
            return np.zeros((4, 4), np.uint8)

    policy, arm = make()[0], Blind()
    with pytest.raises(InputError, match="RGB image"):
        control_loop(policy, arm, "go", seconds=5)
    assert arm.stopped == 1 and not arm.sent
    policy, arm = make()
    report = control_loop(policy, arm, "go", seconds=5, done=lambda: len(arm.sent) >= 3)
    assert report.ticks == 3 and arm.stopped == 1


def test_actions_out_of_bounds_are_clipped_and_the_policy_knows():
    class Wild(ToyVLA):
        def predict(self, observation, keep_mass=1.0):
            output = super().predict(observation)
            output.actions[:] = 3.0
            return output

    policy, arm = accelerate(Wild(0.0), generator="none"), SimulatedArm()
    control_loop(policy, arm, "go", seconds=0.3, watchdog=5)
    np.testing.assert_array_equal(arm.sent, np.ones((len(arm.sent), 7)))
    np.testing.assert_array_equal(policy.history.last_action, np.ones(7))
    assert LIBERO.high[0] == 1
