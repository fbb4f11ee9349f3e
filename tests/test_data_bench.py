"""``python -m eval data``: every rate, its ratio to a public alternative, and the memory that passes take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BRIDGE, CR5

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_bench_tells_rates_ratios_and_memory(tmp_path):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps({"rates": {"nested": {"wall": 100.0, "cpu": 100.0}}}))
    command = [sys.executable, "-m", "eval", "data", "--output", tmp_path / "out", "--rlds", BRIDGE, "--lerobot", CR5]
    command += ["--reference", reference, "--steps", 10_000, "--batch_size", 256, "--repeats", 1]
    # A process of its own: the memory of this one grows by what other tests left.
    said = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = {row["reader"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    for name in ("RLDS without TensorFlow, one camera left encoded", "LeRobot, whole episodes", "windows, 1 thread"):
        row = rows[name]
        assert row["ratio_per_second"] == row["per_second"] / rows[row["beside"]]["per_second"] > 1
        assert all(abs(grown) < 64 for grown in row["rss_anon_growth_mib"])
    assert "RssAnon" in said
    assert not list((tmp_path / "out").glob("*/store"))  # the made-up store is gone
