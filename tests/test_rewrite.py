"""Summaries from the raw rows beside them: what is committed is what the raw rows say, and nothing else changes."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from eval.output import read_csv, write_csv
from eval.rewrite import rewrite
from spvla.errors import InputError

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def copy(tmp_path):
    for folder in ("nudge", "nano/instructions", "latency"):
        shutil.copytree(RESULTS / folder, tmp_path / folder)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*") if p.suffix in (".json", ".txt")}


def test_committed_summaries_are_what_their_raw_rows_say(tmp_path, capsys):
    for path in RESULTS.rglob("*.csv.gz"):
        if path.name in ("episodes.csv.gz", "trials.csv.gz"):
            (tmp_path / path.parent.relative_to(RESULTS)).mkdir(parents=True)
            for raw in (path, path.parent / "summary.json"):
                shutil.copy(raw, tmp_path / raw.relative_to(RESULTS))
    rewrite(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 11 and not [line for line in said if not line.startswith("unchanged")]


def test_statistics_are_computed_again_and_what_only_the_run_knew_stays(copy, capsys):
    whole = contents(copy)
    for name, column in (("nudge", "success_ci95"), ("nano/instructions", "rate")):
        path = copy / name / "summary.json"
        summary = json.loads(path.read_text())
        for row in summary["rows"]:
            row |= {column: "once", "policy_ms_per_step_p50": 3.5}
        path.write_text(json.dumps(summary))
        (path.parent / "table.txt").write_text("once")
    rewrite(copy)
    assert capsys.readouterr().out.count("written") == 2
    rows = json.loads((copy / "nudge" / "summary.json").read_text())["rows"]
    assert [r.pop("policy_ms_per_step_p50") for r in rows] == [3.5] * len(rows), "no raw row has times"
    was = json.loads(whole["nudge/summary.json"])["rows"]
    assert rows == [{k: v for k, v in r.items() if k != "policy_ms_per_step_p50"} for r in was]
    assert (copy / "nano/instructions" / "table.txt").read_text().startswith("asked")
    assert (copy / "latency" / "summary.json").read_text() == whole["latency/summary.json"]


def test_missing_and_damaged_rows_are_named(copy):
    raw = copy / "nudge" / "episodes.csv.gz"
    raw.write_bytes(raw.read_bytes()[:200])
    with pytest.raises(InputError, match=r"nudge.*damaged"):
        rewrite(copy)
    raw.unlink()
    with pytest.raises(InputError) as error:
        rewrite(copy)
    assert error.value.code == "missing"
    with pytest.raises(InputError, match=r"no summary\.json of a closed loop"):
        rewrite(copy / "latency")


def test_raw_rows_are_read_as_they_were_written(tmp_path):
    row = {"cell": "1e5", "task": 3, "init_state": None, "success": True, "seconds": 0.3, "runs": [1, 2], "export": "0123"}
    path = write_csv(tmp_path / "x.csv.gz", [row, {**row, "success": False, "task_name": 'a "b", c'}])
    assert read_csv(path) == [row | {"task_name": None}, {**row, "success": False, "task_name": 'a "b", c'}]
    assert gzip.decompress(path.read_bytes()).startswith(b"cell,")
