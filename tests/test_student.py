"""The DAgger student: it acts, and the teacher helps where it is stuck, goes astray, or takes too long."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from data.student import ASTRAY_STEPS, HEAD_SHARE, HELP_STEPS, PATIENCE, STALL_STEPS, Student
from spvla.actions import LIBERO

LABEL = np.array([0.5, 0, 0, 0, 0, 0, -1], np.float32)


class Scripted:
    """A policy that always does the same."""

    action_space = LIBERO

    def __init__(self, action: np.ndarray) -> None:
        self.action = action

    def reset(self, instruction: str) -> None:
        pass

    def predict(self, observation, keep_mass: float = 1.0):
        return SimpleNamespace(actions=self.action[None])


def helped(monkeypatch, action, moves: bool = True, steps: int = 60) -> list[bool]:
    """At which steps the teacher's label is executed, in an episode that the student begins."""
    monkeypatch.setattr("data.student.load_vla", lambda *_: Scripted(np.asarray(action, np.float32)))
    student = Student("scripted", None, LIBERO)
    seed = next(s for s in range(99) if np.random.default_rng([s, 2]).random() >= HEAD_SHARE)
    student.start("pick up the milk", seed)
    out = []
    for step in range(steps):
        position = np.array([0.01 * step if moves else 0.0, 0.0, 0.0])
        seen = SimpleNamespace(state=position.astype(np.float32))
        out.append(bool(student.drive(lambda seen=seen: seen, LABEL, step) is LABEL))
    assert student.helped == sum(out)
    return out


def test_a_good_student_is_left_alone_until_patience_ends(monkeypatch):
    out = helped(monkeypatch, [0.3, 0.1, 0, 0, 0, 0, -1], steps=PATIENCE + 5)
    assert not any(out[:PATIENCE]) and all(out[PATIENCE:])


@pytest.mark.parametrize("action", [[-0.3, 0, 0, 0, 0, 0, -1], [0.5, 0, 0.9, 0, 0, 0, -1]])
def test_one_that_goes_astray_is_helped_for_a_while(monkeypatch, action):
    out = helped(monkeypatch, action)
    assert not any(out[:ASTRAY_STEPS]) and out[ASTRAY_STEPS]
    again = out.index(False, ASTRAY_STEPS)
    assert HELP_STEPS[0] - 1 <= again - ASTRAY_STEPS < HELP_STEPS[1]


def test_one_that_is_stuck_is_helped(monkeypatch):
    out = helped(monkeypatch, [0.3, 0, 0, 0, 0, 0, -1], moves=False)
    assert not any(out[: STALL_STEPS - 1]) and out[STALL_STEPS - 1]


def test_of_a_students_plans_more_or_fewer_actions_are_executed(monkeypatch):
    class Planner(Scripted):
        asked = 0

        def predict(self, observation, keep_mass: float = 1.0):
            self.asked += 1
            plan = np.tile(self.action, (4, 1))
            plan[:, 1] = np.arange(4) / 100  # which action of the plan it is
            return SimpleNamespace(actions=plan)

    planner = Planner(np.array([0.4, 0, 0, 0, 0, 0, -1], np.float32))
    monkeypatch.setattr("data.student.load_vla", lambda *_: planner)
    student = Student("planner", None, LIBERO)
    student.start("pick up the milk", next(s for s in range(99) if np.random.default_rng([s, 2]).random() >= HEAD_SHARE))
    ages = []
    for step in range(100):
        seen = SimpleNamespace(state=np.array([0.01 * step, 0.0, 0.0], np.float32))
        ages.append(round(100 * float(student.drive(lambda seen=seen: seen, LABEL, step)[1])))
    starts = [i for i, age in enumerate(ages) if age == 0]
    assert len(starts) == planner.asked and all(b - a == 1 for a, b in itertools.pairwise(ages) if b)
    assert {b - a for a, b in itertools.pairwise(starts)} == {1, 2, 3, 4}
