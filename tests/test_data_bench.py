"""``python -m eval data``: every rate, its ratio to a public alternative, and the memory that passes take."""

import json

import pytest

from eval.data import bench_data
from tests.conftest import BRIDGE, CR5


@pytest.mark.slow
def test_the_bench_tells_rates_ratios_and_memory(tmp_path, capsys):
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps({"rates": {"nested": {"wall": 100.0, "cpu": 100.0}}}))
    bench_data(tmp_path / "out", None, BRIDGE, CR5, None, reference, steps=10_000, batch_size=256, repeats=1)
    rows = {row["reader"]: row for row in json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]}
    for name in ("RLDS without TensorFlow, one camera left encoded", "LeRobot, whole episodes", "windows, 1 thread"):
        row = rows[name]
        assert row["ratio_per_second"] == row["per_second"] / rows[row["beside"]]["per_second"] > 1
        assert all(abs(grown) < 64 for grown in row["rss_anon_growth_mib"])
    assert "RssAnon" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*/store"))  # the made-up store is gone
