"""OpenVLA-OFT from the command line: latency by stage, and LIBERO with two cameras, films and reports."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.__main__ import COMMANDS
from eval.output import main_image
from spvla.cli import run
from tests.test_openvla_oft import SMALL

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "eval" / "openvla_oft_libero_object.yaml"


def call(*arguments):
    return run(COMMANDS, "x", [str(a) for a in arguments])


def test_latency_tells_stages_tokens_and_ratios(tmp_path):
    options = ("--vla", "spvla.vlas.openvla_oft:untrained", "--vla_options", json.dumps(SMALL), "--suite", "libero_10")
    assert call("latency", *options, "--repeats", 3, "--keep_ratios", 0.5, "--output", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["pruning"]: row for row in summary["rows"]}
    assert {name: (r["visual_tokens_mean"], r["visual_tokens_total"]) for name, r in rows.items()} == {
        "none": (32, 32),
        "keep 0.5": (16, 32),
    }
    assert rows["keep 0.5"]["gflop"] < rows["none"]["gflop"] and rows["none"]["prefill_ratio"] == 1
    stages = {(s["pruning"], s["stage"]) for s in summary["stages"]}
    assert {("keep 0.5", stage) for stage in ("vision", "queries_keys", "contours", "prefill", "decode", "total")} <= stages


def test_the_measured_model_is_a_quarter_of_the_published_one():
    options = yaml.safe_load((ROOT / "configs" / "eval" / "latency_openvla_oft.yaml").read_text())["vla_options"]
    assert [4 * kwargs["embed_dim"] for kwargs in options["timm_model_kwargs"]] == [1024, 1152]
    assert [4 * kwargs["num_heads"] for kwargs in options["timm_model_kwargs"]] == [16, 16]
    text = options["text_config"]
    assert (text["hidden_size"], text["num_hidden_layers"], 4 * text["intermediate_size"]) == (1024, 8, 11008)


def test_the_configuration_uses_published_weights_and_all_initial_states():
    config = yaml.safe_load(CONFIG.read_text())
    assert (config["vla"], config["suite"], config["init_states"]) == ("openvla_oft", "libero_object", "0-49")
    assert config["checkpoint"] == "hf://moojink/openvla-7b-oft-finetuned-libero-object"


@pytest.mark.parametrize("images", [1, 2, 3])
def test_pictures_of_kept_tokens_show_the_main_image(images):
    tokens = np.arange(images * 16)
    np.testing.assert_array_equal(main_image(tokens), np.arange(16).reshape(4, 4))


@pytest.mark.slow
def test_in_libero_with_two_cameras_films_and_a_report(tmp_path):
    options = ("--vla", "spvla.vlas.openvla_oft:untrained", "--checkpoint", "null", "--vla_options", json.dumps(SMALL))
    pruning = ("--pruning.half", "{speed: constant, measure: ratio, keep: 0.5, contours: false}", "--cells", '["vla+half"]')
    what = (*options, *pruning, "--tasks", "[0]", "--init_states", 0, "--max_steps", 9, "--timing_episodes", 0)
    assert call("closed_loop", "--config", CONFIG, *what, "--output", tmp_path / "out") == 0
    rows = {row["cell"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    assert [rows[cell]["visual_tokens_mean"] for cell in ("vla", "vla+half")] == [32, 16]
    assert len(rows["vla+half"]["kept_share"]) == rows["vla"]["visual_tokens_total"] == 32
    assert (tmp_path / "out" / "films" / "vla+half.mp4").exists()
    assert call("report", "--results", tmp_path / "out", "--output", tmp_path / "report.html") == 0
