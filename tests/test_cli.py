"""Commands: bad input is one line and exit code 2, lists are easy to type, help is there."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from spvla.cli import join_list_options, run
from spvla.errors import InputError
from tests.conftest import smooth_episode, write_store

ROOT = Path(__file__).parents[1]


def call(*arguments, **options):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options)


def test_lists():
    names = {"tasks", "data"}
    assert join_list_options(["--tasks", "0", "1", "--seed", "3"], names) == ["--tasks=[0,1]", "--seed", "3"]
    assert join_list_options(["--tasks", "[0, 1]"], names) == ["--tasks=[0, 1]"]
    assert join_list_options(["--data", "a", "--tasks", "7"], names) == ["--data=[a]", "--tasks=[7]"]


def test_run_dispatches_and_reports(capsys, tmp_path):
    seen = []

    def hello(name: str, tasks: list[int] | None = None) -> None:
        """Say hello."""
        if name == "bad":
            raise InputError("field 'name': bad is not good")
        seen.append((name, tasks))

    config = tmp_path / "c.yaml"
    config.write_text("name: ada\ntasks: [4]\n")
    assert run({"hello": hello}, "x", ["hello", "--name", "you", "--tasks", "1", "2"]) == 0
    assert run({"hello": hello}, "x", ["hello", "--config", str(config), "--tasks", "5"]) == 0
    assert seen == [("you", [1, 2]), ("ada", [5])]
    assert run({"hello": hello}, "x", ["hello", "--name", "bad"]) == 2
    assert capsys.readouterr().err == "error: field 'name': bad is not good\n"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("data", "collect", "--suite", "libero_nothing", "--output", "{tmp}/o"), "libero_nothing"),
        (("data", "collect", "--suite", "libero_object", "--tasks", "77", "--output", "{tmp}/o"), "77"),
        (("data", "collect", "--suite", "libero_object", "--init_states", "9-3", "--output", "{tmp}/o"), "9-3"),
        (("data", "collect", "--suite", "libero_object", "--policy", "nobody", "--output", "{tmp}/o"), "nobody"),
        (("data", "inspect", "--data", "{tmp}"), "{tmp}"),
        (("train", "distill", "--data", "{tmp}", "--output", "{tmp}/e"), "{tmp}"),
        (("train", "export", "--generator", "{tmp}/x.ckpt", "--gate", "y", "--data", "{tmp}", "--output", "{tmp}/e"), "x.ckpt"),
        (("eval", "report", "--results", "{tmp}", "--output", "{tmp}/r.html"), "no summary.json"),
        (("eval", "latency", "--export", "{tmp}", "--output", "{tmp}/l"), "config.json"),
        (("eval", "closed_loop", "--suite", "libero_object", "--cells", "mlp", "--output", "{tmp}/c"), "mlp"),
        (("eval", "closed_loop", "--suite", "libero_object", "--output", "{tmp}/c"), "generator 'mlp'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, culprit, tmp_path, capsys):
    pytest.importorskip("libero", reason="the libero extra is not installed")
    package, *rest = (a.format(tmp=tmp_path) for a in arguments)
    commands = import_module(f"{package}.__main__").COMMANDS
    assert run(commands, "x", rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and culprit.format(tmp=tmp_path) in error


def test_help_names_every_option():
    done = call("data", "collect", "--help")
    assert done.returncode == 0
    for option in (
        "--policy",
        "--checkpoint",
        "--export",
        "--shadow",
        "--suite",
        "--tasks",
        "--init_states",
        "--config",
        "--seed",
    ):
        assert option in done.stdout


def test_a_nan_rollout_stops_distillation_by_name(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_store(tmp_path / "s", range(4))
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    values = smooth_episode(0).states
    states = table["observation.state"].combine_chunks().flatten().to_numpy().copy()
    states[values.shape[1] * 5] = float("nan")
    column = pa.FixedSizeListArray.from_arrays(pa.array(states), values.shape[1])
    pq.write_table(table.set_column(table.column_names.index("observation.state"), "observation.state", column), path)
    done = call("train", "distill", "--data", folder, "--output", tmp_path / "e")
    assert done.returncode == 2
    assert "observation.state contains NaN or infinity in episode 0 at step 5" in done.stderr
