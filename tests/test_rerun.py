"""Rerun recordings, read back by Rerun itself: they hold what the episode held."""

from __future__ import annotations

import numpy as np
import pytest

import examples.robot_loop as robot_loop
from data.inspect import inspect
from examples.robot_loop import SimulatedArm, ToyVLA
from spvla import InputError, SPVLAPolicy
from spvla.actions import LIBERO
from spvla.generators.ridge import LastActionGenerator
from spvla.history import Source
from spvla.rerun_log import RerunLog, Viewed, token_centres
from spvla.steps import StepInfo
from spvla.vlas.base import VLAOutput
from spvla.vlas.conventions import encode_jpeg
from tests.test_doctor import journey, store_of
from tests.test_policy import Always


def read(path) -> dict[str, dict[int, dict]]:
    """What a recording holds: by entity, the logged values of each step."""
    from rerun.chunk import RrdReader

    out: dict[str, dict[int, dict]] = {}
    for chunk in RrdReader(path).stream().to_chunks():
        if chunk.is_static:
            continue
        for row in chunk.to_record_batch().to_pylist():
            values = {k.partition(":")[2]: v for k, v in row.items() if ":" in k}
            out.setdefault(chunk.entity_path, {}).setdefault(row["step"], {}).update(values | {"seconds": row["seconds"]})
    return out


def scalars(entity) -> np.ndarray:
    return np.array([entity[step]["scalars"] for step in sorted(entity)])


def test_centres_of_kept_tokens():
    np.testing.assert_array_equal(token_centres(np.array([0, 5, 15]), 16, (40, 80)), [[10, 5], [30, 15], [70, 35]])
    np.testing.assert_array_equal(token_centres(np.array([3, 4]), 8, (10, 10)), [[7.5, 7.5]], "of two images the first")
    assert token_centres(np.array([0]), 10, (10, 10)) is None


@pytest.mark.rerun
def test_a_target_that_is_none(tmp_path):
    with pytest.raises(InputError) as caught:
        RerunLog(tmp_path / "film.mp4", LIBERO)
    assert caught.value.field == "rerun"


@pytest.mark.rerun
def test_a_policy_is_logged_while_it_acts(tmp_path):
    policy = SPVLAPolicy(ToyVLA(0.0), LastActionGenerator(LIBERO), Always(), max_generated_run=3)
    log = RerunLog(tmp_path / "a.rrd", LIBERO)
    viewed = Viewed(policy, log)
    viewed.reset("go")
    sample, acted = journey(10), []
    for observation in sample.observations:
        acted.append(viewed.select_action(lambda seen=observation: seen, state=observation.state))
    log.close()
    found = read(tmp_path / "a.rrd")
    np.testing.assert_array_equal(scalars(found["/episode_000/action"]), np.float64(acted))
    np.testing.assert_array_equal(scalars(found["/episode_000/state"]), np.float64([o.state for o in sample.observations]))
    who = scalars(found["/episode_000/who"])[:, 0]
    np.testing.assert_array_equal(who, [s.source for s in policy.steps])
    assert [found["/episode_000/why"][t]["text"][0] for t in range(10)] == [s.reason for s in policy.steps]
    asked = {t for t, step in enumerate(policy.steps) if step.called_vla}
    assert set(found["/episode_000/camera/image"]) == asked, "what was captured, and nothing else"
    assert set(found["/episode_000/gate/probability"]) == set(range(10)) - asked
    assert found["/episode_000/action"][4]["seconds"].total_seconds() == pytest.approx(4 / 20)


@pytest.mark.rerun
def test_kept_tokens_and_risk(tmp_path):
    log = RerunLog(tmp_path / "a.rrd", LIBERO)
    log.begin("e", "go")
    kept = VLAOutput(np.zeros((1, 7), np.float32), visual_tokens=(2, 4), kept_tokens=np.array([0, 3]))
    info = StepInfo(Source.VLA, False, "classifier", probability=0.4, threshold=0.25)
    image = np.zeros((8, 8, 3), np.uint8)
    log.step(np.zeros(7), images={"image": encode_jpeg(image), "wrist_image": image}, info=info, output=kept, risk=0.125)
    log.close()
    found = read(tmp_path / "a.rrd")
    assert found["/e/camera/image/kept"][0]["positions"] == [[2, 2], [6, 6]]
    assert "blob" in found["/e/camera/image"][0] and "/e/camera/wrist_image/kept" not in found
    values = [scalars(found[f"/e/{name}"]).item() for name in ("gate/probability", "gate/threshold", "risk", "who")]
    assert values == [0.4, 0.25, 0.125, 0]


@pytest.mark.rerun
def test_a_store_is_shown(tmp_path):
    samples = [journey(6), journey(8, start=(-0.3, 0.1, 0.2))]
    store = store_of(tmp_path / "store", *samples)
    inspect(data=store, rerun=str(tmp_path / "a.rrd"))
    found = read(tmp_path / "a.rrd")
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(scalars(found[f"/episode_{i:03d}/action"]), np.float64(sample.labels))
        assert len(found[f"/episode_{i:03d}/camera/image"]) == len(sample.observations)


@pytest.mark.rerun
@pytest.mark.slow
def test_the_robot_loop_shows_what_it_sends(tmp_path, monkeypatch):
    arms = []
    monkeypatch.setattr(robot_loop, "SimulatedArm", lambda: arms.append(SimulatedArm()) or arms[0])
    robot_loop.main(seconds=1.5, mode="wait", rerun=str(tmp_path / "a.rrd"))
    found = read(tmp_path / "a.rrd")
    logged = scalars(found["/episode_000/action"])
    sent = np.float64(arms[0].sent)
    assert len(logged) > 3 and all((np.abs(sent - action).max(1) < 1e-6).any() for action in logged[:-1])
    assert found["/episode_000/camera/image"]


@pytest.mark.rerun
@pytest.mark.slow
def test_a_closed_loop_leaves_a_recording_of_each_cell_that_holds_its_trace(tmp_path):
    import gzip
    import json

    from eval.closed_loop import closed_loop

    one = {"tasks": [0], "init_states": "30-30", "timing_episodes": 0, "workers": 1}
    closed_loop("libero_object", tmp_path, cells=["ridge+release"], rerun=True, **one)
    rows = json.loads(gzip.decompress((tmp_path / "traces.json.gz").read_bytes()))
    traces = {row["cell"]: row["trace"] for row in rows}
    assert traces.keys() == {"vla", "ridge+release"}
    for cell, trace in traces.items():
        found = read(tmp_path / "rerun" / f"{cell}.rrd")
        np.testing.assert_allclose(scalars(found["/episode/action"]), trace["actions"], atol=6e-4)
        assert (scalars(found["/episode/who"])[:, 0] == Source.GENERATOR).astype(int).tolist() == trace["generated"]
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["per_group"].keys() == traces.keys() and info["overall"]["n_episodes"] == 2


def test_a_viewed_policy_is_the_policy():
    class Nowhere:
        def __init__(self):
            self.steps = []

        def begin(self, *_):
            pass

        def step(self, action, **_):
            self.steps.append(action)

    policy, log = SPVLAPolicy(ToyVLA(0.0), LastActionGenerator(LIBERO), Always()), Nowhere()
    viewed = Viewed(policy, log)
    viewed.reset("go")
    acted = [viewed.tick(o) for o in journey(5).observations]
    np.testing.assert_array_equal(log.steps, acted)
    assert viewed.stats()["steps"] == 5 and viewed.space is policy.space
