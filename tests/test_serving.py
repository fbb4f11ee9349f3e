"""What ``python -m eval serving`` counts, and that its robots reach the real server."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval import serving
from eval.serving_load import Heard, RecordedVLA, recorded_actions
from spvla import LIBERO, InputError, Observation
from spvla.store import RolloutWriter
from tests.conftest import smooth_episode

pytest.importorskip("vla_eval")
pytest.importorskip("prometheus_client")


def heard(seconds, held=(), lasted=1.0):
    """A robot's second, or more, of answers."""
    flags = [i in held for i in range(len(seconds))]
    return Heard(list(seconds), flags, [False] * len(seconds), [False] * len(seconds), begun=10.0, ended=10.0 + lasted)


def test_a_robot_is_served_at_rate_by_its_actions_and_on_time_by_its_answers():
    cell = serving.Cell("x")
    for answers, at_rate, on_time in (
        ([heard([0.01] * 20)], True, True),
        ([heard([0.01] * 20, held={3, 7})], True, True),  # 18 actions a second
        ([heard([0.01] * 20, held={3, 5, 7})], False, False),
        ([heard([0.01] * 19 + [0.06])], True, False),
        ([heard([0.01] * 199 + [0.06], lasted=10.0)], True, True),  # one answer in 200
        ([heard([0.01] * 20), heard([0.01] * 17)], False, False),  # each robot counts
    ):
        row = serving.row_of(cell, 50.0, answers, 12.0, LIBERO)
        assert (row["served_at_rate"], row["served_on_time"]) == (at_rate, on_time), answers
    assert row["robots"] == 2 and row["steps"] == 37 and row["vla_calls_per_second"] == 12


def test_the_most_robots_of_each_cell():
    def row(cell, robots, at_rate, on_time):
        return {
            **{"vla_ms": 50.0, "cell": cell, "robots": robots, "answer_ms_p99": float(robots)},
            **{"served_at_rate": at_rate, "served_on_time": on_time},
        }

    rows = [row("a", 1, True, True), row("a", 2, True, False), row("a", 3, False, False), row("b", 1, False, False)]
    assert serving.most_robots(rows) == [
        {"vla_ms": 50.0, "cell": "a", "robots_at_rate": 2, "robots_on_time": 1, "answer_ms_p99": 2.0},
        {"vla_ms": 50.0, "cell": "b", "robots_at_rate": 0, "robots_on_time": 0, "answer_ms_p99": None},
    ]


def test_the_recorded_vla_says_what_the_teacher_said():
    episode = smooth_episode(0)
    vla = RecordedVLA(LIBERO, recorded_actions([episode]), 0.0).with_pruner(None)
    for state, label in zip(episode.states, episode.vla_actions, strict=True):
        np.testing.assert_array_equal(vla.predict(Observation(state=state)).actions[0], label)


def test_unknown_fields_of_a_cell_are_named():
    with pytest.raises(InputError, match="cells: x: field 'gait' is unknown; it takes: export, mode, risk"):
        serving.read_cells({"x": {"gait": 1}})


@pytest.mark.slow
def test_robots_drive_the_real_server(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "WARM_UP", 1.0)
    writer = RolloutWriter(tmp_path / "store", LIBERO, policy="recorded")
    writer.write("shard-000000", [smooth_episode(k) for k in range(3)])
    writer.finalize()
    options = {"vla_ms": [5.0], "robots": [2], "seconds": 3.0}
    serving.serving(tmp_path / "out", tmp_path / "store", {"alone": {}}, **options)
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert row["robots"] == 2 and row["steps"] > 0 and row["generated"] == 0 and row["answer_ms_p50"] >= 5
    with pytest.raises(InputError, match=r"the server does not start: .*risk must lie in \(0, 1\], got 7"):
        serving.serving(tmp_path / "out", tmp_path / "store", {"odd": {"export": "generator_nano", "risk": 7.0}}, **options)
