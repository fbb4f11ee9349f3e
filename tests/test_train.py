"""Training on synthetic rollouts whose teacher is a known law: what must be learnt is learnt, what is written is right."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.store import RolloutStore
from data.windows import frames_of
from eval.offline import offline
from spvla import InputError, load_export, save_export
from spvla.actions import LIBERO
from spvla.gates.classifier import ActionTypeClassifier, ClassifierConfig
from spvla.generators.ridge import LastActionGenerator, RidgeGenerator
from spvla.history import Source
from spvla.store import RolloutWriter
from tests.conftest import smooth_episode, write_store
from train.calibrate import calibration_curve
from train.datamodules import RolloutData, fold_of_frames
from train.distill import distill
from train.modules import ClassifierModule, GeneratorModule

ROOT = Path(__file__).parents[1]
SMALL = {"width": 32, "depth": 2}
OPTIONS = {
    **{"generators": ["mlp", "transformer"], "mlp": SMALL, "transformer": {**SMALL, "heads": 2}},
    **{"history": 8, "steps": 300, "gate_steps": 150, "batch_size": 256, "threads": 1},
}


@pytest.fixture(scope="module")
def export_folder(store_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "export"
    distill([store_folder], folder, **OPTIONS)
    return folder


@pytest.mark.slow
def test_the_learned_generator_beats_the_linear_one(export_folder, store_folder):
    data = RolloutData([store_folder], history=8)
    batch = data.windows.batch(frames_of(data.split.calibration))
    moving = (batch.valid[:, 0] > 0) & (batch.window.mask[:, -2] > 0)
    export = load_export(export_folder)

    def error(generator):
        return np.abs(generator.propose(batch.window)[moving, 0, :3] - batch.targets[moving, 0, :3]).max(1).mean()

    learned = error(export.generator("mlp", data.space))
    assert learned < 0.6 * error(RidgeGenerator(data.space)) and learned < 0.6 * error(LastActionGenerator(data.space))


@pytest.mark.slow
def test_the_export_holds_a_calibrated_gate_per_generator(export_folder):
    export = load_export(export_folder)
    assert set(export.gates) == {"mlp", "transformer", "ridge"} and set(export.generators) == {"mlp", "transformer"}
    assert all(c.episodes == 20 for c in export.calibration.values())
    provenance = json.loads((export_folder / "config.json").read_text())["provenance"]
    assert provenance["teacher"] == "synthetic" and provenance["split"] == "the simulator"
    assert max(export.space.max_jump[:3]) < 2.1 and export.space.max_jump[3] == 0


@pytest.mark.slow
def test_distilling_again_redoes_nothing(export_folder, store_folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in (export_folder / ".stages").iterdir()}
    weights = (export_folder / "generators" / "mlp.safetensors").read_bytes()
    options = {"history": 8, "steps": 300, "gate_steps": 150, "batch_size": 256, "threads": 1}
    distill(
        [store_folder],
        export_folder,
        generators=["mlp", "transformer"],
        mlp=SMALL,
        transformer={**SMALL, "heads": 2},
        **options,
    )
    assert {p: p.stat().st_mtime_ns for p in (export_folder / ".stages").iterdir()} == before
    assert (export_folder / "generators" / "mlp.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": {"widht": 8}}, "mlp: 'widht' is unknown; available: batch_size, depth"),
        ({"mlp": {"kind": "transformer"}}, "mlp: 'kind' is unknown"),
        ({"mlp": {"width": -1}}, "mlp: generator: width must be at least 1, got -1"),
        ({"mlp": {"learning_rate": -1}}, "mlp: learning_rate must be at least 0, got -1"),
        ({"transformer": {"heads": 5}}, "transformer: generator: heads 5 must divide width 256"),
        ({"gate": {"colour": 1}}, "gate: 'colour' is unknown; available: depth, dropout"),
        ({"gate": {"width": 0}}, "gate: gate: width must be at least 1, got 0"),
        ({"generators": ["mlp", "mlp"]}, "generators: 'mlp' is given twice"),
        ({"baselines": ["rigde"]}, "baselines: 'rigde' is unknown; available: ridge, ridge_paper, last"),
        ({"default_generator": "last"}, "default_generator 'last' is not among the distilled ones: mlp, transformer, ridge"),
        ({"generators": [], "baselines": []}, "nothing to distil: give generators or baselines"),
        *[({name: 0}, f"{name} must be at least 1, got 0") for name in ("threads", "batch_size", "steps", "gate_steps")],
        ({"max_generated_run": -3}, "max_generated_run must be at least 1, got -3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"folds": 0}, "folds must be at least 2, got 0"),
        ({"folds": 500}, "folds must be at most the 40 training episodes and 255, got 500"),
        ({"state_dims": [99]}, "state_dims: 99 is no entry of the state in .*rollouts, which has 5"),
        ({"state_dims": [-1]}, r"state_dims must be at least 0, got \[-1\]"),
        ({"hide": 7}, "hide must be at most 1, got 7"),
        ({"hide": float("nan")}, "hide must be a finite number, got nan"),
        ({"calibration_fraction": 7}, "calibration_fraction must be at most 1, got 7"),
        ({"tolerance": -1}, "tolerance must be positive, got -1"),
        ({"default_risk": 7}, r"default_risk: risk must lie in \(0, 1\], got 7"),
        ({"default_pruning": "relase"}, "default_pruning 'relase' is unknown"),
    ],
)
def test_what_cannot_be_distilled_is_told_before_anything_is_trained(store_folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        distill([store_folder], tmp_path / "e", **{**OPTIONS, **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "e").exists()


def test_data_twice_or_an_output_of_other_things_is_told_before_anything_is_trained(store_folder, tmp_path):
    with pytest.raises(InputError, match=r"data: '.*rollouts' is given twice"):
        distill([store_folder, store_folder / ".." / "rollouts"], tmp_path / "e", **OPTIONS)
    (tmp_path / "code.py").write_text("")
    with pytest.raises(InputError, match="is neither empty nor an export"):
        distill([store_folder], tmp_path, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["code.py"]


def test_a_stage_cut_short_is_named(store_folder, tmp_path):
    options = {**OPTIONS, "generators": ["mlp"], "steps": 2, "gate_steps": 2}
    distill([store_folder], tmp_path / "e", **options)
    stage = next((tmp_path / "e" / ".stages").glob("mlp-[0-9a-f]*"))
    stage.write_bytes(stage.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{stage}: incomplete stage weights .*; delete it"):
        distill([store_folder], tmp_path / "e", **options)
    assert load_export(tmp_path / "e").gates.keys() == {"mlp", "ridge"}


@pytest.mark.slow
def test_side_by_side_or_one_after_the_other_gives_the_same_weights(store_folder, tmp_path):
    options = {**OPTIONS, "generators": ["mlp"], "steps": 20, "gate_steps": 20}
    for threads in (1, 2):
        distill([store_folder], tmp_path / str(threads), **{**options, "threads": threads})
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / t / ".stages").iterdir()} for t in "12")
    assert one == two and len(one) == 5  # two folds, the generator, two gates


@pytest.mark.slow
def test_a_store_that_only_calibrates_trains_nothing_anew(export_folder, store_folder, tmp_path):
    copy = shutil.copytree(export_folder, tmp_path / "export")
    stages = {p.name: p.read_bytes() for p in (copy / ".stages").iterdir()}
    more = write_store(tmp_path / "more", range(80, 90))  # initial states 20-29
    distill([store_folder], copy, calibration_data=[more], **OPTIONS)
    assert {p.name: p.read_bytes() for p in (copy / ".stages").iterdir()} == stages
    before, after = load_export(export_folder), load_export(copy)
    assert after.provenance["calibration_episodes"] == before.provenance["calibration_episodes"] + 10
    assert after.provenance["training_episodes"] == before.provenance["training_episodes"]
    trained_on = write_store(tmp_path / "trained_on", range(3))
    with pytest.raises(InputError) as error:
        distill([store_folder], copy, calibration_data=[trained_on], **OPTIONS)
    assert error.value.code == "calibration-leak"


@pytest.mark.slow
def test_offline_evaluation_of_the_export(export_folder, store_folder, tmp_path):
    offline(store_folder, export_folder, tmp_path / "o")
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    by_name = {r["generator"]: r for r in summary["rows"]}
    assert {"mlp", "transformer", "ridge", "last"} <= set(by_name)
    assert by_name["mlp"]["max_abs_error"] < by_name["ridge"]["max_abs_error"]
    skipped = [r["skipped"] for r in summary["rows"] if r["generator"] == "mlp" and "skipped" in r]
    tight = replace(load_export(export_folder), space=LIBERO.with_max_jump(np.full(7, 1e-6)))  # refuses whatever moves
    offline(store_folder, save_export(tight, tmp_path / "tight"), tmp_path / "t")
    held = json.loads((tmp_path / "t" / "summary.json").read_text())["rows"]
    for free, refusing in zip(summary["rows"], held, strict=True):
        if free["generator"] == "mlp" and "skipped" in free:
            assert refusing["skipped"] < 0.05
            assert refusing["refused"] + refusing["skipped"] == pytest.approx(free["refused"] + free["skipped"])
    assert skipped == sorted(skipped) and by_name["mlp"]["roc_auc"] > 0.6


def test_folds_hold_whole_episodes_and_calibration_is_in_none(store_folder):
    data = RolloutData([store_folder], history=8)
    fold = fold_of_frames(data.split, 3, len(data.windows))
    for first, length in data.split.train:
        assert len(set(fold[first : first + length])) == 1 and fold[first] < 3
    assert (fold[frames_of(data.split.calibration)] == 3).all()
    assert np.ptp(np.bincount(fold[[f for f, _ in data.split.train]])) <= 1


def test_gate_labels_come_from_the_judge_of_the_fold(store_folder):
    """A judge that is always right and one that is always wrong: labels follow the fold."""
    data = RolloutData([store_folder], history=8)
    fold = fold_of_frames(data.split, 2, len(data.windows))

    class Judge:
        def __init__(self, offset):
            self.offset = offset

        def propose(self, window):
            return np.full((len(window.actions), 1, 7), self.offset, np.float32)

    module = ClassifierModule(data.features, [Judge(0.0), Judge(0.9), Judge(0.0)], fold, data.space, **SMALL)
    frames = frames_of(data.split.train)
    batch = data.windows.batch(frames)
    batch.targets[:] = 0.0
    proposals, deviates, known = module.label(frames, batch)
    assert (deviates.numpy() == (fold[frames] == 1)).all() and known.all()
    assert (proposals.numpy()[:, 0] == np.where(fold[frames] == 1, np.float32(0.9), 0)).all()


def test_calibration_leaves_out_episodes_whose_generated_steps_nobody_labelled(store_folder, tmp_path, capsys):
    """What a robot records while the policy acts: where the generator acted the VLA said nothing."""
    writer = RolloutWriter(tmp_path / "robot", LIBERO, policy="synthetic")
    for seed in range(20, 25):
        episode = smooth_episode(100 + seed)
        episode.vla_actions[episode.sources == Source.GENERATOR] = np.nan
        episode.metadata["init_state"] = seed
        writer.write(f"job-{seed}", [episode])
    robot = writer.finalize()

    data = RolloutData([store_folder], history=8)
    gate = ActionTypeClassifier(ClassifierConfig(data.features, **SMALL)).eval()
    alone = calibration_curve(data, LastActionGenerator(LIBERO), gate, 0.2, LIBERO)
    both = RolloutData([store_folder, robot], history=8)
    assert calibration_curve(both, LastActionGenerator(LIBERO), gate, 0.2, LIBERO) == alone
    assert "5 of 25 calibration episodes" in capsys.readouterr().out


def fit(config, *overrides, cwd):
    arguments = [sys.executable, "-m", "train", "fit", "--config", str(ROOT / config), *map(str, overrides)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=cwd, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_fit_gate_export_and_onnx(store_folder, tmp_path):
    """LightningCLI with the W&B logger offline, for generator and gate; `train export --onnx` puts them together."""
    common = ["--data.init_args.data", f"[{store_folder}]", "--data.init_args.state_dims", "[0, 1, 2]"]
    logger = "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true, save_dir: " + str(tmp_path) + "}}"
    common += ["--trainer.logger", logger, "--trainer.check_val_every_n_epoch", "1"]
    checkpoints = "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {dirpath: %s, save_last: true}}]"
    generator, gate = tmp_path / "generator", tmp_path / "gate"
    fit(
        *("configs/train/generator.yaml", *common, "--trainer.max_epochs", "2", "--model.init_args.width", "32"),
        *("--trainer.callbacks", checkpoints % generator),
        cwd=tmp_path,
    )
    fit(
        *("configs/train/gate.yaml", *common, "--trainer.max_epochs", "2", "--data.init_args.steps", "20"),
        *("--data.init_args.generator", generator / "last.ckpt", "--trainer.callbacks", checkpoints % gate),
        cwd=tmp_path,
    )
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    logged = [b"".join(p.read_bytes() for p in run.glob("*.wandb")) for run in runs]
    assert all(k in logged[0] for k in (b"train/loss", b"val/error_1", b"val/error_4"))
    assert all(k in logged[1] for k in (b"train/loss", b"risk_curve/coverage_at_0.1"))
    command = [
        "-m",
        "train",
        "export",
        "--generator",
        generator / "last.ckpt",
        "--gate",
        gate / "last.ckpt",
        "--data",
        store_folder,
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--output", str(tmp_path / "export"), "--onnx", "true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("on 1000 windows") == 2
    assert set(load_export(tmp_path / "export").gates) == {"mlp"}
    assert {p.suffix for p in (tmp_path / "export").rglob("*") if p.is_file()} == {".json", ".md", ".safetensors", ".onnx"}


def test_checkpoints_rebuild_their_module(store_folder, tmp_path):
    import lightning as L

    data = RolloutData([store_folder], history=8, batch_size=64)
    module = GeneratorModule(data.features, data.space, kind="transformer", heads=2, later_weight=0.5, **SMALL)
    trainer = L.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )
    trainer.fit(module, data.train_dataloader())
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = GeneratorModule.from_checkpoint(tmp_path / "m.ckpt")
    assert again.options() == module.options() and again.space == module.space
    window = data.windows.batch(np.arange(10)).window
    with torch.inference_mode():
        torch.testing.assert_close(again.network(window), module.network.eval().cpu()(window))


def test_a_store_says_what_its_labels_are(store_folder):
    assert RolloutStore(store_folder).labelled_by_teacher
