"""Stores of one robot that were measured apart, an export and a VLA: every number is in one scale."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spvla
from data.splits import split_episodes
from data.store import RolloutStore
from data.windows import Windows
from eval.offline import offline
from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.export import load_export
from spvla.store import Episode, RolloutWriter
from spvla.vlas.base import VLAOutput
from tests.conftest import ScriptedVLA, smooth_episode
from train.distill import distill

ARM = ActionSpace(
    name="arm",
    kind="eef_delta",
    control_rate=20.0,
    q01=(-0.8, -0.9, -0.7, -0.5, -0.5, -0.5, -1.0),
    q99=(0.9, 0.8, 0.6, 0.5, 0.5, 0.5, 1.0),
    low=(-1.0,) * 7,
    high=(1.0,) * 7,
    translation=(0, 1, 2),
    rotation=(3, 4, 5),
    gripper=(6,),
)
WIDER = replace(ARM, q01=(-1.6, -1.0, -0.7, -0.25, -0.6, -0.5, -1.0), q99=(0.9, 1.4, 0.6, 0.5, 0.5, 0.75, 1.0))
SMALL = {
    "generators": ["mlp"],
    "steps": 150,
    "gate_steps": 80,
    "batch_size": 256,
    "default_risk": 0.3,
    "mlp": {"width": 32, "depth": 1},
}


def store(folder, space: ActionSpace, seeds, **changes) -> RolloutStore:
    """A store of the same recordings, whatever the scale of its action space."""
    writer = RolloutWriter(folder, space, policy="synthetic")
    for seed in seeds:
        episode = smooth_episode(seed)
        for name, value in changes.items():
            setattr(episode, name, value(episode) if callable(value) else value)
        writer.write(f"job-{seed:03d}", [episode])
    writer.finalize()
    return RolloutStore(folder)


def arrays(windows: Windows, frames) -> dict[str, np.ndarray]:
    batch = windows.batch(np.asarray(frames, np.int64))
    return {**vars(batch.window), "targets": batch.targets, "valid": batch.valid}


scales = st.lists(st.tuples(st.floats(-3, 3), st.floats(0.1, 4)), min_size=7, max_size=7)


@settings(max_examples=30, deadline=None)
@given(scales)
def test_normalised_actions_of_one_scale_become_those_of_another(scale):
    other = replace(ARM, q01=tuple(m - w for m, w in scale), q99=tuple(m + w for m, w in scale))
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 7)).astype(np.float32)
    found = other.rescaling(ARM)
    factor, shift = (np.ones(7), np.zeros(7)) if found is None else found
    np.testing.assert_allclose(other.normalize(actions) * factor + shift, ARM.normalize(actions), atol=1e-4)
    assert ARM.rescaling(replace(ARM, name="same", low=(-9.0,) * 7)) is None


def test_windows_of_stores_measured_apart_are_those_of_one_store(tmp_path):
    one = Windows([store(tmp_path / f"one{i}", ARM, range(3 * i, 3 * i + 3)) for i in (0, 1)], history=5, horizon=3)
    two = Windows([store(tmp_path / "a", ARM, range(3)), store(tmp_path / "b", WIDER, range(3, 6))], history=5, horizon=3)
    assert two.space.q99 == ARM.q99
    frames = np.random.default_rng(0).permutation(len(one))[:200]
    for name, value in arrays(one, frames).items():
        if value is not None:
            np.testing.assert_allclose(arrays(two, frames)[name], value, atol=2e-6, err_msg=name)
    asked = Windows(two.stores, history=5, horizon=3, space=WIDER)
    expected = WIDER.normalize(ARM.denormalize(arrays(one, frames)["targets"]))
    known = arrays(one, frames)["valid"] > 0
    np.testing.assert_allclose(arrays(asked, frames)["targets"][known], expected[known], atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"kind": "joint_velocity"}, {"control_rate": 10.0}, {"translation": (0, 1)}, {"binary_gripper": False}, {"gripper": ()}],
)
def test_spaces_that_differ_in_more_than_scale_are_refused(tmp_path, change):
    with pytest.raises(InputError) as error:
        Windows([store(tmp_path / "a", ARM, [0]), store(tmp_path / "b", replace(ARM, **change), [1])], history=4)
    assert (error.value.code, error.value.field) == ("space-mismatch", next(iter(change)))


def test_states_of_another_size_are_refused(tmp_path):
    longer = {"states": lambda e: np.concatenate([e.states, e.states[:, :1]], 1)}
    with pytest.raises(InputError) as error:
        Windows([store(tmp_path / "a", ARM, [0]), store(tmp_path / "b", ARM, [1], **longer)], history=4)
    assert error.value.code == "state-mismatch"


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    store(folder / "rollouts", ARM, range(40))
    distill([folder / "rollouts"], folder / "export", **SMALL)
    return folder / "export"


def rows(folder):
    import json

    return json.loads((folder / "summary.json").read_text())["rows"]


@pytest.mark.slow
def test_offline_figures_do_not_depend_on_the_scale_of_the_held_out_store(export_folder, tmp_path):
    for name, space in (("same", ARM), ("wider", WIDER)):
        store(tmp_path / name, space, range(60, 66))
        offline(tmp_path / name, export_folder, tmp_path / f"{name}-results", risk=[0.2, 0.3])
    same, wider = rows(tmp_path / "same-results"), rows(tmp_path / "wider-results")
    assert [r["generator"] for r in same] == [r["generator"] for r in wider]
    for a, b in zip(same, wider, strict=True):
        for name in a.keys() & {"max_abs_error", "deviating", "skipped", "refused", "measured_risk", "roc_auc"}:
            assert b[name] == pytest.approx(a[name], abs=2e-3), name


@pytest.mark.slow
def test_calibration_does_not_depend_on_the_scale_of_the_store_that_calibrates(export_folder, tmp_path):
    rollouts, curves = export_folder.parent / "rollouts", []
    for name, space in (("same", ARM), ("wider", WIDER)):
        more = store(tmp_path / name, space, range(80, 90))  # initial states 20-29
        distill([rollouts], tmp_path / f"{name}-export", calibration_data=[more.folder], **SMALL)
        curves.append(load_export(tmp_path / f"{name}-export").calibration["mlp"])
    for risk in (0.1, 0.2, 0.3):
        if risk >= curves[0].smallest_risk:
            assert curves[1].coverage_at(risk) == pytest.approx(curves[0].coverage_at(risk), abs=5e-3)


def run(export, space: ActionSpace) -> list[np.ndarray]:
    """What an accelerated policy executes, environment units, around a VLA of another scale."""
    episode = smooth_episode(61)
    policy = spvla.accelerate(ScriptedVLA(episode.vla_actions, space), export, generator="mlp", gate="release")
    policy.reset("go")
    return [policy.select_action(spvla.Observation(None, state)) for state in episode.states]


@pytest.mark.slow
def test_a_policy_acts_the_same_whatever_the_scale_of_its_vla(export_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(run(export_folder, WIDER), run(export_folder, ARM), atol=1e-5)


@pytest.mark.slow
def test_another_unit_is_said(export_folder):
    millimetres = replace(ARM, q01=tuple(1000 * v for v in ARM.q01), q99=tuple(1000 * v for v in ARM.q99))
    with pytest.warns(UserWarning, match="scale differs"):
        spvla.accelerate(ScriptedVLA(np.zeros((5, 7)), millimetres), export_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spvla.accelerate(ScriptedVLA(np.zeros((5, 7)), ARM), export_folder)


@pytest.mark.slow
def test_a_robot_that_is_elsewhere_is_told_so_once(export_folder):
    class Still(ScriptedVLA):
        def predict(self, observation, keep_mass=1.0):
            return VLAOutput(np.zeros((1, 7), np.float32))

    policy = spvla.accelerate(Still(np.zeros((1, 7)), ARM), export_folder, risk=0.3, generator="mlp", gate="learned")
    policy.reset("go")
    far = np.full(5, 50.0, np.float32)
    with pytest.warns(UserWarning, match="outside of what the export was calibrated on") as told:
        for _ in range(200):
            policy.select_action(spvla.Observation(None, far))
    assert len(told) == 1


def recorded(folder, numbers, labels: bool) -> RolloutStore:
    """Episodes of one data set, as converting or relabelling leaves them."""
    writer = RolloutWriter(folder, ARM, policy="")
    for k in numbers:
        episode: Episode = smooth_episode(k)
        episode.metadata = {"dataset": "arm", "file": f"episode_{k:06d}.parquet", "number": k}
        episode.vla_actions = episode.vla_actions if labels else None
        episode.sources = None
        writer.write(f"job-{k:03d}", [episode])
    writer.finalize()
    return RolloutStore(folder)


def test_a_recording_and_its_relabelled_twin_are_on_one_side(tmp_path):
    stores = [recorded(tmp_path / "converted", range(20), False), recorded(tmp_path / "relabelled", range(20), True)]
    windows = Windows(stores, history=4)
    split = split_episodes(windows, 0.3)
    number = {first: info.metadata["number"] for _, first, info in windows.episodes}
    trains, calibrates = ({number[first] for first, _ in part} for part in (split.train, split.calibration))
    assert not trains & calibrates and len(calibrates) == 6 and len(split.calibration) == 12
    alone = split_episodes(Windows(stores[:1], history=4), 0.3)
    assert {number[first] for first, _ in alone.calibration} == calibrates, "a store further back changes nothing"


def test_statistics_of_the_training_episodes_give_the_scale_that_converting_them_measures(tmp_path):
    """Joint 2 rests: by its own q01 and q99 its sensor noise would be full motion."""
    import json

    from data.convert import published_space
    from data.stats import Measured
    from spvla.store.scale import measured_space

    joints = ActionSpace("arm", "joint_velocity", 10.0, *((v,) * 4 for v in (-1.0, 1.0, -9.0, 9.0)), gripper=(3,))
    g = np.random.default_rng(0)
    actions = np.stack([g.normal(0, 0.3, 999), g.normal(0, 0.2, 999), g.normal(0, 1e-4, 999), g.random(999) > 0.5], 1)
    found = Measured.nothing()
    found.actions.add(actions.astype(np.float32))
    found.lengths.append(len(actions))
    (tmp_path / "s.json").write_text(json.dumps({"arm": found.result(joints)}))
    one, other = published_space(joints, tmp_path / "s.json"), measured_space(joints, found.actions, [(0.0, 1.0)])
    for name in ("q01", "q99", "low", "high"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6, err_msg=name)
    assert one.q99[2] - one.q01[2] > 0.02, "a resting joint borrows the scale of the others"
