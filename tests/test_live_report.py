"""A live deployment in a recording and on the page: what the gate found, where it audited, and when another one begins."""

import re

import numpy as np
import pytest

from eval.report.command import report
from eval.report.live import audits_of, deployments, recorded
from spvla import InputError, Observation, accelerate, load_export
from spvla.recording import Recorder
from spvla.store import read_episode_table
from tests.conftest import ScriptedVLA

EXPORT = "generator_libero_expert"


def episodes(policy, count, steps=30):
    """Play episodes in which the VLA answers something else than the generator expects now and then."""
    for _ in range(count):
        policy.reset("do it")
        for _ in range(steps):
            policy.select_action(Observation(state=np.zeros(8, np.float32)))
        policy.finish(True, place="lab")


def make(**rule):
    actions = np.cumsum(np.random.default_rng(0).normal(0, 0.02, (400, 7)), axis=0)
    return accelerate(ScriptedVLA(actions), load_export(EXPORT), risk=0.2, gate="live", rule={"audit": 0.4, **rule})


@pytest.fixture
def recording(tmp_path):
    """Two deployments: three episodes, and after a restart that did not load what was learned, two."""
    kept = []
    for count in (3, 2):
        with Recorder(make(), tmp_path / "recording") as policy:
            episodes(policy, count)
            kept.append((policy.live.stats(), policy.live.state.audits))
    return tmp_path / "recording", kept


def test_a_recording_says_what_the_gate_found(recording):
    folder, kept = recording
    rows = recorded(folder)
    assert [row["cell"] for row in rows] == ["deployment 1, risk 0.2"] * 3 + ["deployment 2, risk 0.2"] * 2
    for last, (stats, audits) in ((rows[2], kept[0]), (rows[4], kept[1])):
        assert {name: last[name] for name in stats} == stats
        mine = [row for row in rows if row["number"] == last["number"]]
        assert sum(len(row["audit_steps"]) for row in mine) == audits > 0
    assert all('"place": "lab"' in row["metadata"] for row in read_episode_table(folder))


def test_without_a_live_gate_a_recording_says_nothing(tmp_path):
    with Recorder(accelerate(ScriptedVLA(np.zeros((9, 7))), load_export(EXPORT)), tmp_path / "recording") as policy:
        episodes(policy, 1)
    assert recorded(tmp_path / "recording") == []


def test_the_page_of_a_recording_shows_each_deployment(recording, tmp_path):
    folder, _ = recording
    report(folder, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Live gate" in text and text.count("95 % certainty below") == 2
    report(folder, tmp_path / "page.md")
    assert "deployment 2, risk 0.2" in (tmp_path / "page.md").read_text()
    with pytest.raises(InputError, match="without the VLA's label"):  # an export is judged in shadow mode
        report(folder, tmp_path / "page.html", export=EXPORT)


def test_audits_are_placed_in_the_deployment():
    """Two episodes of 10 and 8 decided steps; waiting steps are nobody's."""
    rows = [
        {"live_steps": 10, "steps": 13, "held": 3, "audit_steps": [0, 9]},
        {"live_steps": 18, "steps": 8, "held": 0, "audit_steps": [7]},
        {"live_steps": 20, "steps": 2, "held": 0},  # a row from before they were written
    ]
    assert audits_of(rows) == [0, 9, 17]


def test_one_picture_a_live_cell():
    row = {"live_risk": 0.04, "live_risk_bound95": 0.1, "threshold": 0.8, "steps": 10, "held": 0, "risk": 0.05, "deviating": 1}
    rows = [row | {"cell": c, "live_steps": n, "audit_steps": [3]} for c in ("mlp+live@0.05", "b") for n in (20, 10)]
    ((heading, (first, second)),) = deployments([*rows, {"cell": "vla", "live_steps": None}], {"b": "another"})
    assert heading == "Live gate" and first.caption.startswith("mlp+live@0.05: over 20 steps") and "another:" in second.caption
    for label in ("allowed risk", "estimated", "its 95 % bound", "measured with labels"):
        assert re.search(rf">{label}</text>", first.svg), label
    ((_, (bare,)),) = deployments([row | {"cell": "b", "live_steps": 10, "deviating": None}], {})
    assert "measured with labels" not in bare.svg and "audit" not in bare.caption
    assert deployments([{"cell": "vla"}], {}) == []
