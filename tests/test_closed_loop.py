"""Cells of generator x gate x pruning: their names, their policies, their rows, and the configurations that ship."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.envs import load_tasks
from data.jobs import episode_seed
from eval.cells import Cell, cell_pruner, parse_cells
from eval.closed_loop import closed_loop
from eval.film import bar, draw
from eval.run import Evaluation, kept_counts, make_policy
from eval.summary import by_task, summarise
from spvla import InputError, load_export
from spvla.export import save_export
from spvla.history import Source
from spvla.pruning import make_pruner
from spvla.vlas.base import VLAOutput
from spvla.vlas.registry import VLASource
from tests.conftest import PrunableVLA, ScriptedVLA
from tests.test_export import make_export

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]
CONFIGS = sorted([*(ROOT / "configs" / "eval").glob("*.yaml"), *(ROOT / "configs" / "distill_demo").glob("*/evaluate.yaml")])


def setting(**changes) -> Evaluation:
    given = {"export": None, "rules": {}, "max_generated_run": None, "label": False}
    return Evaluation(source=VLASource("x"), **{**given, **changes})


def test_cells_are_read_as_they_are_written():
    texts = ["ridge+release", "vla+slow_fewer", "mlp+learned+half_dual@0.05", "mlp+learned", "ridge+paper+fast_fewer", "vla"]
    cells = parse_cells(texts, [0.1, 0.2])
    assert [c.name for c in cells] == [
        *("vla", "ridge+release", "vla+slow_fewer", "mlp+learned+half_dual@0.05", "mlp+learned@0.1", "mlp+learned@0.2"),
        "ridge+paper+fast_fewer",
    ]
    assert cells[0] == Cell("none", "none") and cells[3] == Cell("mlp", "learned", 0.05, "half_dual")
    for cell in cells:
        assert parse_cells([cell.name], [None])[-1] == cell


@pytest.mark.parametrize(
    "text", ["mlp", "vla+", "+learned", "a+b+c+d", "vla@0.1", "vla+x@0.1", "ridge+release@0.1", "mlp+learned@much", "mlp++x"]
)
def test_bad_cells_are_named(text):
    with pytest.raises(InputError, match="cell '" + text.replace("+", r"\+")):
        parse_cells([text], [None])


def test_prunings_by_name():
    named = {"half": {"speed": "constant", "measure": "ratio", "keep": 0.5}, "fast_fewer": {"z_threshold": 0.3}}
    assert cell_pruner("none", named) is None
    assert cell_pruner("slow_fewer", named) == make_pruner("slow_fewer")
    assert cell_pruner("fast_fewer", named) == make_pruner({"z_threshold": 0.3})
    assert cell_pruner("half", named) == make_pruner(named["half"])
    with pytest.raises(InputError, match="pruning 'third' is unknown; available: half, fast_fewer, slow_fewer"):
        cell_pruner("third", named)
    with pytest.raises(InputError, match="pruning 'half': field 'share' is unknown"):
        cell_pruner("half", {"half": {"share": 0.5}})


def test_a_cell_that_cannot_be_made_is_named():
    still = np.zeros((5, 7))
    with pytest.raises(InputError, match=r"cell vla\+fast_fewer: pruning: ScriptedVLA cannot run on fewer visual tokens"):
        make_policy(Cell("none", "none", None, "fast_fewer"), ScriptedVLA(still), None, setting())
    with pytest.raises(InputError, match=r"cell ridge\+learned: .*; learned cells need --export"):
        make_policy(Cell("ridge", "learned"), ScriptedVLA(still), None, setting())
    policy = make_policy(Cell("none", "none", None, "fast_fewer"), PrunableVLA(still), None, setting())
    assert policy.pruner == make_pruner("fast_fewer") and policy.generator is None


def test_rows_weigh_tokens_by_calls():
    def episode(cell, tokens, calls, held=0):
        counts = {
            "steps": 10 + held,
            "vla_calls": calls,
            "generated": 10 - calls,
            "fallbacks": 0,
            "switches": 0,
            "deviating": None,
        }
        counts |= {"seconds": 0.5, "held": held, "nudged": None, "reaction": None}
        where = {"suite": "s", "task": 0, "init_state": calls, "seed": 0, "success": True, "generated_run_lengths": []}
        facts = {"generator": "none", "gate": "none", "pruning": "half", "risk": None}
        return {
            "cell": cell,
            **facts,
            **where,
            **counts,
            "visual_tokens_mean": tokens,
            "visual_tokens_total": 256,
            "kept_tokens": [calls, 0],
        }

    (row,) = summarise([episode("vla+half", 100.0, 9), episode("vla+half", 200.0, 1)], {})
    assert row["visual_tokens_mean"] == pytest.approx(110) and row["visual_tokens_total"] == 256
    assert (row["cell"], row["pruning"]) == ("vla+half", "half") and row["kept_share"] == [1, 0]
    (waiting,) = summarise([episode("vla+half", 100.0, 4, held=20)], {})
    assert waiting["skipped"] == 0.6, "of the steps that somebody decided"
    times = {cell: {"policy_seconds_per_episode": s} for cell, s in {"vla": 3.0, "vla+half": 2.0}.items()}
    assert [r["policy_speedup"] for r in summarise([episode(c, 1.0, 1) for c in times], times)] == [1, 1.5]


def test_the_worst_task_goes_first():
    rows = [
        {"suite": "s", "task": task, "task_name": f"t{task}", "cell": cell, "success": success}
        for task, cell, successes in ((0, "vla", [1, 1, 1]), (0, "a", [1, 0, 1]), (1, "vla", [1, 0]), (1, "a", [0, 0]))
        for success in successes
    ]
    first, second = by_task(rows)
    assert first == {"suite": "s", "task": 1, "name": "t1", "episodes": 2, "vla": 1, "a": 0}
    assert second == {"suite": "s", "task": 0, "name": "t0", "episodes": 3, "vla": 3, "a": 2}


def test_kept_tokens_are_counted():
    every = VLAOutput(np.zeros((1, 7)), visual_tokens=(4, 4))
    some = VLAOutput(np.zeros((1, 7)), visual_tokens=(2, 4), kept_tokens=np.array([0, 3]))
    assert kept_counts([every, None, some, some]) == [3, 1, 1, 3]
    assert kept_counts([None]) is None


def test_frames_show_what_reached_the_language_model_and_who_acted():
    image = np.full((224, 224, 3), 200, np.uint8)
    output = VLAOutput(np.zeros((1, 7), np.float32), visual_tokens=(2, 16), kept_tokens=np.array([0, 5]))
    frame = draw(image, Source.VLA, output)
    patches = np.array([[frame[r * 80 + 40, c * 80 + 40, 0] for c in range(4)] for r in range(4)])
    assert (np.flatnonzero(patches > 150) == [0, 5]).all() and (patches[patches <= 150] == 50).all()
    assert tuple(frame[0, 0]) != tuple(draw(image, Source.GENERATOR, None)[0, 0])
    colours = bar([Source.VLA, Source.GENERATOR, Source.HELD, Source.VLA], 2)
    assert len(np.unique(colours[0, :240], axis=0)) == 3 and (colours[0, 240:] == 40).all()


class Verifying(PrunableVLA):
    def verify(self, observation, proposal, tolerance=None, keep_mass=1.0):
        return self.predict(observation, keep_mass)


def has_cells(path):
    return isinstance(yaml.safe_load(path.read_text()).get("cells"), list)


@pytest.mark.parametrize("path", filter(has_cells, CONFIGS), ids=lambda p: p.stem)
def test_every_shipped_cell_can_be_made(path):
    config = yaml.safe_load(path.read_text())
    vla = Verifying(np.zeros((5, 7)))
    export = load_export(config["export"]) if "export" in config else make_export()
    vla.action_space = export.space
    cells = parse_cells(config["cells"], [export.defaults["risk"]])
    assert len(cells) == 1 + len(config["cells"])
    for cell in cells:
        made = setting(rules=config.get("rules", {}), pruning=config.get("pruning"))
        policy = make_policy(cell, vla, export, made)
        assert (policy.pruner is None) == (cell.pruning == "none")


@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "10"])
def test_openvla_configurations_use_the_published_weights_and_all_initial_states(suite):
    path = next(p for p in CONFIGS if p.stem == f"openvla_libero_{suite}")
    config = yaml.safe_load(path.read_text())
    assert config["suite"] == f"libero_{suite}" and config["init_states"] == "0-49" and config["vla"] == "openvla"
    assert config["checkpoint"] == f"hf://openvla/openvla-7b-finetuned-libero-{suite}"
    assert {c.split("+")[1] for c in config["cells"]} == {"paper", "release", "learned"}


def test_official_states_and_seeded_resets_side_by_side(tmp_path):
    what = {"suite": "libero_object", "tasks": [0], "timing_episodes": 0, "workers": 1, "output": tmp_path}
    with pytest.raises(InputError, match="there are no episodes"):
        closed_loop(**what, init_states=None, cells=[])
    closed_loop(**what, init_states="30", random_resets=2, cells=[], max_steps=130)
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert (row["episodes"], row["resets"], row["official_successes"], row["reset_successes"]) == (3, 2, 1, 2)
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["per_group"]["vla"]["pc_success"] == 100 and info["per_task"][0]["metrics"]["successes"] == [True] * 3
    with gzip.open(tmp_path / "episodes.csv.gz", "rt") as stream:
        episodes = list(csv.DictReader(stream))
    assert sorted(e["init_state"] for e in episodes) == ["", "", "30"] and len({e["seed"] for e in episodes}) == 3
    (task,) = load_tasks("libero_object", [0])
    assert not {int(e["seed"]) for e in episodes} & {episode_seed(0, task, None, i) for i in range(50)}, "not training's resets"


def test_another_export_runs_only_the_cells_that_use_it_anew(tmp_path):
    what = {
        "suite": "libero_object",
        "tasks": [0],
        "init_states": "30",
        "timing_episodes": 0,
        "workers": 1,
        "output": tmp_path / "x",
    }
    first, second = (save_export(make_export(tolerance=t), tmp_path / str(t)) for t in (0.2, 0.3))
    runs = []
    for export in (first, second, second):
        closed_loop(**what, export=str(export), cells=["ridge+release"], max_steps=5)
        lines = (tmp_path / "x" / "episodes.jsonl").read_text().splitlines()
        runs.append([json.loads(line)["cell"] for line in lines])
        assert [row["episodes"] for row in json.loads((tmp_path / "x" / "summary.json").read_text())["rows"]] == [1, 1]
    assert runs == [["vla", "ridge+release"], *[["vla", "ridge+release", "ridge+release"]] * 2]


def two_cameras(checkpoint: str | None) -> ScriptedVLA:
    """A factory for worker processes: a policy that fails unless it sees through both cameras."""

    class TwoCameras(ScriptedVLA):
        needs_images, cameras = True, ("image", "wrist_image")

        def predict(self, observation, keep_mass=1.0):
            main, wrist = observation.require_image(), observation.require_image("wrist_image")
            assert main.shape == wrist.shape == (256, 256, 3) and (main != wrist).mean() > 0.5
            return super().predict(observation, keep_mass)

    return TwoCameras(np.zeros((1, 7), np.float32))


def test_a_policy_with_two_cameras_gets_both(tmp_path):
    what = {"suite": "libero_object", "tasks": [0], "init_states": "30", "cells": [], "max_steps": 2, "render": "fast"}
    closed_loop(**what, vla="tests.test_closed_loop:two_cameras", timing_episodes=1, workers=1, output=tmp_path / "x")
    with gzip.open(tmp_path / "x" / "timing.csv.gz", "rt") as stream:
        (timed,) = csv.DictReader(stream)
    assert (timed["cell"], timed["steps"], timed["vla_calls"]) == ("vla", "2", "2") and float(timed["policy_seconds"]) > 0
