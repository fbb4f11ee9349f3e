"""Export folders: round trip, what is refused, and that a robot needs nothing but spvla."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spvla import InputError, Observation, VLAOutput, accelerate, load_export, save_export
from spvla.actions import LIBERO
from spvla.export import Export, fingerprint
from spvla.gates.calibration import calibrate
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.generators import make_network
from spvla.generators.features import FeatureConfig
from spvla.generators.learned import GeneratorConfig
from tests.conftest import PrunableVLA, ScriptedVLA

ROOT = Path(__file__).parents[1]


def make_export(dim: int = 7, seed: int = 0, **changes) -> Export:
    torch.manual_seed(seed)
    g = np.random.default_rng(0)
    features = FeatureConfig(dim, 6, (0, 2), (-1, -1), (1, 1))
    p = [g.random(40) for _ in range(60)]
    curve = calibrate(p, [g.random(40) < 0.3 * x for x in p])
    networks = {
        "mlp": make_network(vars(GeneratorConfig("mlp", features, (6,), width=16, depth=1))),
        "transformer": make_network(vars(GeneratorConfig("transformer", features, (6,), width=16, depth=1, heads=2))),
    }
    gates = {n: ActionTypeClassifier(ClassifierConfig(features, width=8, depth=1)) for n in (*networks, "ridge")}
    defaults = {"generator": "mlp", "gate": "learned", "risk": 0.1, "max_generated_run": 8}
    export = Export(LIBERO.with_max_jump(np.full(7, 2)), 0.2, networks, gates, dict.fromkeys(gates, curve), defaults)
    return replace(export, **changes)


@pytest.fixture
def folder(tmp_path):
    return save_export(make_export(), tmp_path / "export")


def drive(policy, steps=40):
    g = np.random.default_rng(3)
    policy.reset("go")
    return np.array([policy.select_action(Observation(state=g.normal(size=3))) for _ in range(steps)])


@pytest.mark.parametrize("generator", ["mlp", "transformer", "ridge"])
@pytest.mark.parametrize("gate", ["learned", "release"])
def test_every_cell_survives_the_round_trip(folder, generator, gate):
    vla = ScriptedVLA(np.random.default_rng(0).uniform(-1, 1, (50, 7)))
    options = {"generator": generator, "gate": gate, "risk": 0.3}
    before, after = (drive(accelerate(vla, e, **options)) for e in (make_export(), folder))
    np.testing.assert_array_equal(before, after)


def test_defaults_come_from_the_export_and_the_knob_overrides(folder):
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), folder)
    with pytest.raises(InputError, match="max_generated_run must be at least 1, got 0"):
        accelerate(ScriptedVLA(np.zeros((5, 7))), folder, max_generated_run=0)
    assert policy.max_generated_run == 8 and policy.space.max_jump == (2.0,) * 7
    curve = load_export(folder).calibration["mlp"]
    assert policy.gate.threshold == curve.threshold(0.1)
    assert accelerate(ScriptedVLA(np.zeros((5, 7))), folder, 0.3).gate.threshold == curve.threshold(0.3)


def test_an_export_can_ask_for_pruning(tmp_path):
    export = make_export()
    export = replace(export, defaults={**export.defaults, "pruning": {"speed": "constant", "keep": 0.5}})
    folder = save_export(export, tmp_path / "pruned")
    with pytest.raises(InputError, match="ScriptedVLA cannot run on fewer visual tokens"):
        accelerate(ScriptedVLA(np.zeros((5, 7))), folder)
    policy = accelerate(PrunableVLA(np.zeros((5, 7))), folder)
    drive(policy, 3)
    assert policy.steps[0].visual_tokens == (128, 256)
    assert accelerate(ScriptedVLA(np.zeros((5, 7))), folder, pruning="none").pruner is None


def test_nothing_in_the_folder_is_a_pickle(folder):
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".md", ".safetensors"}


def damage(folder, change):
    if change == "missing config":
        (folder / "config.json").unlink()
    elif change == "missing weights":
        (folder / "gates" / "mlp.safetensors").unlink()
    elif change == "truncated":
        path = folder / "generators" / "mlp.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "not json":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        if change == "missing field":
            del config["tolerance"]
        elif change == "other sizes":
            config["generators"]["mlp"]["width"] = 32
        elif change == "unknown option":
            config["gates"]["mlp"]["colour"] = 1
        elif change == "no calibration":
            del config["calibration"]["ridge"]
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing config", r"config\.json: missing"),
        ("missing weights", r"gates/mlp\.safetensors: missing"),
        ("truncated", r"generators/mlp\.safetensors: incomplete or damaged safetensors file"),
        ("not json", r"config\.json: not valid JSON"),
        ("missing field", r"config\.json: field 'tolerance' is missing"),
        ("other sizes", r"mlp\.safetensors: tensor 'net\.0\.bias' has shape \(16,\), config\.json asks for \(32,\)"),
        ("unknown option", r"config\.json: .*colour"),
        ("no calibration", r"calibration for gate 'ridge' is missing"),
    ],
)
def test_a_damaged_export_names_its_culprit(folder, change, message):
    damage(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


def mlp(config):
    return config["generators"]["mlp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(tolerance="wide"), r"tolerance must be a finite number, got 'wide'"),
        (lambda c: c.update(tolerance=float("nan")), r"tolerance must be a finite number, got nan"),
        (lambda c: c.update(tolerance=-1), r"tolerance must be positive, got -1"),
        (lambda c: c.update(defaults=None), r"defaults must be a map, got None"),
        (lambda c: c["defaults"].pop("risk"), r"defaults: risk is missing"),
        (lambda c: c["defaults"].update(risk="low"), r"defaults: risk must be a finite number, got 'low'"),
        (lambda c: c["defaults"].update(risk=7), r"defaults: risk must lie in \(0, 1\], got 7"),
        (lambda c: c["defaults"].update(max_generated_run="many"), r"defaults: max_generated_run must be a whole number"),
        (lambda c: c["defaults"].update(generator="magic"), r"defaults: generator 'magic' is unknown; available: mlp, "),
        (lambda c: c["defaults"].update(pruning=5), r"defaults: pruning must be .*, got 5"),
        (lambda c: c["calibration"]["mlp"]["risk"].reverse(), r"calibration\.mlp: risk must not decrease"),
        (lambda c: c["calibration"]["mlp"]["thresholds"].reverse(), r"calibration\.mlp: thresholds must not decrease"),
        (lambda c: c["calibration"]["mlp"]["risk"].__setitem__(3, float("nan")), r"calibration\.mlp: risk must be a list"),
        (lambda c: c["calibration"]["mlp"]["coverage"].__setitem__(3, "a"), r"calibration\.mlp: coverage must be a list"),
        (lambda c: c["calibration"]["mlp"]["risk"].pop(), r"calibration\.mlp: .* must have the same length"),
        (lambda c: c["calibration"]["mlp"].update(episodes=-1), r"calibration\.mlp: episodes must be at least 1, got -1"),
        (lambda c: c["calibration"].update(mlp=None), r"calibration must be a map of maps"),
        (lambda c: mlp(c).update(width=-1), r"generators\.mlp: generator: width must be at least 1, got -1"),
        (lambda c: mlp(c).update(width=10**15), r"generators\.mlp: "),
        (lambda c: mlp(c).update(dropout=7), r"generators\.mlp: generator: dropout must lie below 1, got 7"),
        (lambda c: mlp(c).update(gripper=[9]), r"generators\.mlp: generator: gripper \(9,\) lies outside 0\.\.6"),
        (lambda c: c["generators"]["transformer"].update(heads=5), r"heads 5 must divide width 16"),
        (lambda c: c["generators"]["transformer"].update(heads=0), r"heads must be at least 1, got 0"),
        (lambda c: mlp(c)["features"].update(state_q01=["a", "b"]), r"features: state_q01 must be a list \(a finite number"),
        (
            lambda c: c["gates"]["mlp"]["features"].update(state_dims=[-1, 2]),
            r"gates\.mlp: features: state_dims must be at least 0",
        ),
        (lambda c: c["action_space"].update(translation=["x"]), r"action space 'libero': translation must be a list"),
        (lambda c: c["action_space"].update(low=[2] * 7), r"high must not lie below low"),
        (lambda c: c["action_space"].update(low=[float("nan")] * 7), r"low must be a list"),
        (lambda c: c["action_space"].update(max_jump=[-1] * 7), r"max_jump must be at least 0"),
        (lambda c: c["action_space"].update(max_jump=[float("nan")] * 7), r"max_jump must be a list"),
    ],
)
def test_values_that_cannot_be_are_named_with_their_file(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"{folder}/config\.json: .*{message}") as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_named(folder):
    (folder / "gates" / "mlp.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"gates/mlp\.safetensors: incomplete or damaged safetensors file"):
        load_export(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        load_export(folder)


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_takes_the_place_of_an_older_one_whole(folder):
    (folder / ".stages").mkdir()
    (folder / "generators" / "mlp.onnx").write_bytes(b"")
    other = make_export(tolerance=0.3)
    save_export(replace(other, generators={"mlp": other.generators["mlp"]}), folder)
    assert load_export(folder).tolerance == 0.3
    assert sorted(p.name for p in folder.iterdir()) == [".stages", "README.md", "config.json", "gates", "generators"]
    assert [p.name for p in (folder / "generators").iterdir()] == ["mlp.safetensors"]


@pytest.mark.slow
def test_a_save_that_is_killed_anywhere_leaves_the_old_export_or_the_new_one(tmp_path):
    """At every third of its file operations; ``python -m tests.soak kills --only export`` takes all of them."""
    from tests.soak.kills import files, kill_save, small_export

    old, new = small_export(0, 0.2), small_export(1, 0.3)
    expected = {e.tolerance: files(save_export(e, tmp_path / f"{e.tolerance}")) for e in (old, new)}
    results = []
    for moment in itertools.count(1, 3):
        result = kill_save(moment, tmp_path / "export", old, new, expected)
        if result is None:
            break
        results.append(result)
    assert len(results) > 10 and set(results) == {("same", "")}


def test_exchanged_and_damaged_weights_are_refused(folder):
    generators = folder / "generators"
    gates = folder / "gates"
    for a, b in ((gates / "ridge.safetensors", gates / "mlp.safetensors"), (generators / "mlp.safetensors", None)):
        kept = a.read_bytes()
        a.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if b is None else b.read_bytes())
        with pytest.raises(InputError) as error:
            load_export(folder)
        assert (error.value.code, error.value.field) == ("damaged", str(a))
        a.write_bytes(kept)
    load_export(folder)


@pytest.mark.parametrize(
    ("kind", "path"), [("generators", ["depth"]), ("gates", ["width"]), ("gates", ["features", "history"])], ids=str
)
def test_sizes_are_refused_before_anything_of_that_size_is_built(folder, kind, path):
    config = json.loads((folder / "config.json").read_text())
    *way, last = path
    where = config[kind]["mlp"]
    for name in way:
        where = where[name]
    where[last] = 10**12
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_export(folder)
    assert (error.value.code, error.value.field) == ("too-large", last)


def test_names_that_leave_the_folder_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["generators"]["../../elsewhere"] = config["generators"].pop("mlp")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not a valid name"):
        load_export(folder)


@pytest.mark.parametrize("what", ["a folder in it", "values no JSON holds"])
def test_an_export_that_cannot_be_replaced_is_left_as_it_was(folder, what):
    export = make_export()
    if what == "a folder in it":
        (folder / "generators" / "notes").mkdir()
    else:
        export = replace(export, provenance={"teacher": object()})
    before = everything(folder)
    with pytest.raises((InputError, TypeError)):
        save_export(export, folder)
    assert everything(folder) == before and load_export(folder).tolerance == 0.2


@pytest.mark.parametrize("name", ["generators/base.py", "config.json", "README.md"])
def test_a_folder_of_other_things_is_not_written_to(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is neither empty nor an export"):
        save_export(make_export(), tmp_path)
    assert everything(tmp_path) == {name: b"{}"}


@pytest.mark.parametrize("state", [None, np.zeros(1)])
def test_a_state_too_short_is_told(folder, state):
    policy = accelerate(ScriptedVLA(np.zeros((5, 7))), folder)
    policy.reset("go")
    with pytest.raises(InputError) as error:
        policy.select_action(Observation(state=state))
    assert (error.value.code, error.value.field) == ("state-mismatch", "observation.state")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": 123}, "export must be a folder, hf://owner/name or an Export, got int"),
        ({"risk": 7, "gate": "release"}, r"risk must lie in \(0, 1\], got 7"),
        ({"risk": "0.1"}, "risk must be a finite number, got '0.1'"),
        ({"generator": "none", "gate": "lerned"}, "gate 'lerned' is unknown; available: learned, live, release, paper"),
        ({"rule": {"z_max": 1}}, "z_max"),
        ({"gate": "paper", "rule": {"tau": "x"}}, "rule 'paper': tau must be a finite number, got 'x'"),
        ({"gate": "paper", "rule": {"buffer": 0}}, "rule 'paper': buffer must be at least 1, got 0"),
        ({"max_generated_run": 2.5}, "max_generated_run must be a whole number, got 2.5"),
        ({"pruning": 5}, "pruning must be .*, got 5"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        accelerate(ScriptedVLA(np.zeros((5, 7))), **{"export": folder, **options})


@pytest.mark.parametrize("answer", [None, [0.0] * 7, VLAOutput([0.0] * 7)])
def test_a_vla_that_returns_no_array_is_named(answer):
    vla = ScriptedVLA(np.zeros((5, 7)))
    vla.predict = lambda observation, keep_mass=1.0: answer
    policy = accelerate(vla)
    policy.reset("go")
    with pytest.raises(InputError, match=r"VLA ScriptedVLA: predict\(\) must return a VLAOutput .*, got (NoneType|list)"):
        policy.select_action(Observation())


def test_ill_fitting_uses_are_refused(folder):
    slow = replace(LIBERO, control_rate=5.0)
    with pytest.raises(InputError, match="control_rate"):
        accelerate(ScriptedVLA(np.zeros((5, 7)), slow), folder)
    vla = ScriptedVLA(np.zeros((5, 7)))
    with pytest.raises(InputError, match="'last' has no gate; gates exist for: mlp, ridge, transformer"):
        accelerate(vla, folder, generator="last")
    with pytest.raises(InputError, match="'magic' is unknown"):
        accelerate(vla, folder, generator="magic")
    with pytest.raises(InputError, match="60 calibration episodes"):
        accelerate(vla, folder, 0.01)
    with pytest.raises(InputError, match="no such folder"):
        load_export(folder / "nowhere")


def test_scales_may_differ_between_robots_of_one_kind(folder):
    """q01/q99 belong to the VLA: normalised weights and thresholds carry over."""
    wide = replace(LIBERO, q01=(-2.0,) * 7, q99=(2.0,) * 7, low=(-2.0,) * 7, high=(2.0,) * 7)
    policy = accelerate(ScriptedVLA(np.full((5, 7), 1.9), wide), folder)
    assert np.abs(drive(policy)).max() <= 2


@pytest.mark.slow
def test_a_robot_needs_spvla_alone(folder):
    """Training, simulation and their packages are hidden; the export loads and drives."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"data", "train", "eval", "lightning", "datasets", "libero", "mujoco", "robosuite", "wandb",
                                   "tensorflow_datasets", "matplotlib", "peft"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np, spvla
class V:
    action_space = spvla.LIBERO
    def reset(self, instruction): pass
    def predict(self, observation, keep_mass=1.0): return spvla.VLAOutput(np.zeros((1, 7), np.float32))
policy = spvla.accelerate(V(), {str(folder)!r}, 0.3)
policy.reset("go")
for _ in range(20): policy.select_action(spvla.Observation(state=np.zeros(3)))
assert policy.stats()["steps"] == 20
heavy = {{"transformers", "cv2", "sklearn", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packaged_exports_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mlp" in load_export("generator_nano").generators
    assert fingerprint("generator_nano") == fingerprint(str(ROOT / "spvla" / "pretrained" / "generator_nano"))
    (tmp_path / "generator_nano").mkdir()  # what lies here comes first
    with pytest.raises(InputError, match=r"generator_nano.config\.json: missing"):
        load_export("generator_nano")
