"""What ``eval latency`` times of an export: the live gate beside the learned one, on steps that an export decides."""

import json
import warnings

import numpy as np
import pytest

from eval.latency import latency, smooth_motion
from eval.report.command import report
from spvla import load_export

EXPORT = "generator_libero_expert"


def test_states_are_such_as_the_export_was_trained_on():
    export = load_export(EXPORT)
    actions, states = smooth_motion(export, 500, seed=3)
    assert actions.shape == (500, 7) and np.abs(np.diff(actions[:, :6], axis=0)).max() < 0.2
    for gate in export.gates.values():
        assert np.abs(gate.features._states(states)).max() <= 1 + 1e-6
        assert gate.features.familiar(states).all() and states.std(axis=0)[list(gate.features.state_dims)].min() > 0


@pytest.mark.parametrize("generators", [None, ["ridge"]])
def test_each_generator_has_a_row_under_each_gate_and_on_each_path(tmp_path, generators):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*calibrated on")  # a random motion is no robot's
        latency(tmp_path / "cost", EXPORT, generators, steps=30)
    rows = json.loads((tmp_path / "cost" / "summary.json").read_text())["rows"]
    names = generators or ["mlp", "transformer", "ridge"]
    kinds = [(g, p) for g in ("learned", "live") for p in ("arrays", "torch")]
    assert [(r["generator"], r["gate"], r["path"]) for r in rows] == [(n, *kind) for n in names for kind in kinds]
    assert all(r["of_torch"] == r["polluted_of_torch"] == 1 for r in rows if r["path"] == "torch")
    by_pair = {(r["generator"], r["gate"], r["path"]): r["generated"] for r in rows}
    assert all(by_pair[n, "learned", "arrays"] == by_pair[n, "learned", "torch"] for n in names)  # the same decisions
    assert all(("more_ms_p50" in r) == (r["gate"] == "live") and 0 <= r["generated"] <= 1 for r in rows)
    assert max(r["generated"] for r in rows) > 0.2
    report(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "ridge + live" in page and "ridge + live, torch" in page
