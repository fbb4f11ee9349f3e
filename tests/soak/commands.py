"""The long commands on small inputs, and what they write: the same bytes again, wherever times do not belong to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.conftest import BRIDGE, write_store
from tests.lerobot_sets import write_set

Result = dict[str, Any]
SUITE = "metaworld_mt50"


@dataclass(frozen=True)
class Command:
    """A command that is killed and called again.

    Args:
        make: writes its inputs to a folder.
        run: the command, from that folder to an output.
        read: an output's content by file; equal for two runs that came to the same. Raises if something cannot be read.
    """

    make: Callable[[Path], None]
    run: Callable[[Path, Path], None]
    read: Callable[[Path], Result]


def files(folder: Path) -> Result:
    """Every file's bytes, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def store(folder: Path) -> Result:
    """A rollout store's files, once each episode was read, none twice."""
    from spvla.store import read_episodes

    seen = [(e.instruction, e.actions.tobytes()) for e in read_episodes(folder)]
    assert len(set(seen)) == len(seen), "an episode twice"
    return files(folder)


def make_lerobot(folder: Path) -> None:
    write_set(folder / "set", "v2.1", episodes=6)


def convert(inputs: Path, output: Path) -> None:
    from data.convert import convert

    convert("lerobot", inputs / "set", output)


def make_bridge(folder: Path) -> None:
    """Bridge's records in five shards, which are five parts of the work."""
    from data.rlds.tfrecord import FOOTER, scan

    target = folder / "bridge_dataset" / "1.0.0"
    shutil.copytree(BRIDGE, target)
    whole = next(target.glob("*-train.tfrecord*"))
    index, data = scan(whole), whole.read_bytes()
    ends = [0, *(int(index.offsets[k] + index.lengths[k]) + FOOTER.size for k in range(5))]
    whole.unlink()
    for k in range(5):
        name = whole.name.replace("00000-of-00001", f"{k:05d}-of-00005")
        whole.with_name(name).write_bytes(data[ends[k] : ends[k + 1]])
    info = json.loads((target / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1"] * 5
    (target / "dataset_info.json").write_text(json.dumps(info))


def relabel(inputs: Path, output: Path) -> None:
    from data.relabel import relabel

    where = inputs / "bridge_dataset" / "1.0.0"
    relabel(output, "tests.test_relabel:seeing", source="rlds", path=where, accelerator="cpu", decode_ahead=False)


def make_nothing(folder: Path) -> None:
    """A simulator needs no files; this process imports it for those that are forked from it."""
    import metaworld  # noqa: F401


def collect(inputs: Path, output: Path) -> None:
    from data.collect import collect

    collect(SUITE, output, tasks=["reach-v3"], episodes_per_task=5, noise=0.3, max_steps=30, workers=1)


def closed_loop(inputs: Path, output: Path) -> None:
    from eval.closed_loop import closed_loop

    options: dict[str, Any] = {"init_states": "30-32", "cells": ["ridge+release"], "timing_episodes": 0, "films": False}
    closed_loop(SUITE, output, tasks=["reach-v3"], max_steps=30, workers=1, **options)


def evaluation(folder: Path) -> Result:
    """An evaluation's files without the times that it took."""
    found = files(folder)
    rows = [json.loads(line) for line in found["episodes.jsonl"].splitlines()]
    found["episodes.jsonl"] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    summary = json.loads(found["summary.json"])
    found["summary.json"] = [{k: v for k, v in row.items() if k not in TIMES} for row in summary["rows"]]
    cells = [(row["cell"], row["task"], row["init_state"]) for row in rows]
    assert len(set(cells)) == len(cells) == 6, "an episode lost or twice"
    return found


TIMES = ("seconds", "started")


def make_store(folder: Path) -> None:
    write_store(folder / "rollouts", range(30))


def distill(inputs: Path, output: Path) -> None:
    from train.distill import distill

    small: dict[str, Any] = {"history": 8, "steps": 3, "gate_steps": 3, "batch_size": 32, "threads": 1, "default_risk": 0.5}
    distill([inputs / "rollouts"], output, generators=["mlp"], mlp={"width": 8, "depth": 1}, **small)


def export(folder: Path) -> Result:
    """An export's files, once it was loaded."""
    from spvla import load_export

    load_export(folder)
    return files(folder)


def fit(inputs: Path, output: Path) -> None:
    from train.__main__ import fit

    checkpoints = {"dirpath": str(output / "checkpoints"), "save_last": True, "enable_version_counter": False}
    callback = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}]
    options = {
        "data.init_args.data": json.dumps([str(inputs / "rollouts")]),
        "data.init_args.state_dims": "[0, 1, 2]",
        "data.init_args.batch_size": 64,
        "model.init_args.width": 8,
        "trainer.max_epochs": 2,
        "trainer.limit_train_batches": 3,
        "trainer.check_val_every_n_epoch": 1,
        "trainer.logger": "false",
        "trainer.callbacks": json.dumps(callback),
        "trainer.default_root_dir": output,
    }
    fit(["--config", "configs/train/generator.yaml", *(f"--{name}={value}" for name, value in options.items())])


def checkpoints(folder: Path) -> Result:
    """The weights of a training's checkpoints."""
    out: Result = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        out[name] = path.suffix
        if path.suffix == ".ckpt":
            weights = torch.load(path, weights_only=True)["state_dict"]
            out[name] = {key: tensor.numpy().tobytes() for key, tensor in weights.items()}
    return out


COMMANDS: dict[str, Command] = {
    "convert": Command(make_lerobot, convert, store),
    "relabel": Command(make_bridge, relabel, store),
    "collect": Command(make_nothing, collect, store),
    "closed_loop": Command(make_nothing, closed_loop, evaluation),
    "distill": Command(make_store, distill, export),
    "fit": Command(make_store, fit, checkpoints),
}
