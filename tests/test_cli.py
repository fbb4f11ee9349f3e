"""Commands: bad input is one line and exit code 2, lists are easy to type, help is there."""

import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

from eval.output import append, continued
from spvla.cli import guard, join_list_options, rename_former_options, run, spell_out_flags
from spvla.errors import InputError
from tests.conftest import smooth_episode, write_store
from train.__main__ import fit

ROOT = Path(__file__).parents[1]
LOOP = ("--suite", "libero_object", "--cells", "vla+fast_fewer", "--output", "{tmp}/c")


def call(*arguments, **options):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, **options)


def test_lists():
    names = {"tasks", "data"}
    assert join_list_options(["--tasks", "0", "1", "--seed", "3"], names) == ["--tasks=[0,1]", "--seed", "3"]
    assert join_list_options(["--tasks", "[0, 1]"], names) == ["--tasks=[0, 1]"]
    assert join_list_options(["--data", "a", "--tasks", "7"], names) == ["--data=[a]", "--tasks=[7]"]


def test_a_bare_flag_says_true():
    seen: list[tuple[bool, bool, str]] = []

    def command(shadow: bool = False, onnx: bool = True, name: str = "") -> None:
        seen.append((shadow, onnx, name))

    for line in ("--shadow --name a", "--shadow false --onnx false", "--onnx=false --shadow"):
        assert run({"c": command}, "x", ["c", *line.split()]) == 0
    assert seen == [(True, True, "a"), (False, False, ""), (True, False, "")]
    assert spell_out_flags(["--a", "--b", "1", "--b"], {"b"}) == ["--a", "--b", "1", "--b=true"]


def test_former_option_names_still_work_with_a_warning(capsys):
    given = ["--policy", "expert", "--policy_options.dtype=x", "--scheduler", "release"]
    assert rename_former_options(given, {"vla", "vla_options"}) == [
        *("--vla", "expert", "--vla_options.dtype=x", "--scheduler", "release")
    ]
    assert capsys.readouterr().err.count("warning: ") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "closed_loop", *LOOP, "--random_resets", "-3"),
        ("eval", "closed_loop", *LOOP, "--nudge", "-1"),
        ("eval", "latency", "--output", "{tmp}", "--threads", "0"),
        ("eval", "offline", "--data", "{tmp}", "--export", "{tmp}", "--output", "{tmp}/o", "--risk", "0.1", "-0.2"),
        ("eval", "data", "--output", "{tmp}", "--batch_size", "-3"),
        ("data", "collect", "--suite", "libero_object", "--output", "{tmp}/o", "--noise", "-1"),
        ("data", "inspect", "--data", "{tmp}", "--trajectories", "0"),
    ],
)
def test_numbers_out_of_range_are_refused_when_the_line_is_parsed(arguments, tmp_path, capsys):
    package, *rest = (a.format(tmp=tmp_path) for a in arguments)
    with pytest.raises(SystemExit, match="2"):
        run(import_module(f"{package}.__main__").COMMANDS, "x", rest)
    option = [a for a in rest if a.startswith("--")][-1].removeprefix("--")
    assert option in capsys.readouterr().err


def test_a_run_continues_after_a_kill_and_never_over_damage(tmp_path):
    raw, setting, fixed = tmp_path / "rows.jsonl", tmp_path / "setting.json", {"suite": "x"}
    assert continued(raw, setting, fixed) == [] and continued(raw, setting, {"suite": "y"}) == [], (
        "nothing done, nothing to mix"
    )
    rows = [{"task": i, "trace": list(range(i * 1000))} for i in range(40)]
    continued(raw, setting, fixed)
    sizes = []
    for row in rows:
        append(raw, row)
        sizes.append(raw.stat().st_size)
    assert continued(raw, setting, fixed) == rows
    whole = raw.read_bytes()
    raw.write_bytes(whole[:-5])
    assert continued(raw, setting, fixed) == rows[:-1] and raw.stat().st_size == sizes[-2]
    append(raw, rows[-1])
    assert continued(raw, setting, fixed) == rows
    with pytest.raises(InputError, match="another setting"):
        continued(raw, setting, {"suite": "y"})
    setting.write_text('{"suite"')
    with pytest.raises(InputError, match=r"setting\.json: not valid JSON"):
        continued(raw, setting, fixed)
    setting.unlink()
    with pytest.raises(InputError, match=r"setting\.json: missing"):
        continued(raw, setting, fixed)
    setting.write_text('{"suite": "x"}')
    for first in (0, sizes[4] - 1, sizes[20] + 15):
        damaged = whole[:first] + bytes(8) + whole[first + 8 :]
        raw.write_bytes(damaged)
        with pytest.raises(InputError, match=r"rows\.jsonl: line \d+: not valid JSON"):
            continued(raw, setting, fixed)
        assert raw.read_bytes() == damaged, "nothing that was finished is thrown away"


def test_fit_names_what_it_cannot_use(tmp_path, capsys):
    pytest.importorskip("peft")
    (tmp_path / "bad.ckpt").write_text("junk")
    config = ["--config", str(ROOT / "configs/train/recover_pruned.yaml")]
    for options, message in (
        (["--model.init_args.checkpoint", f"{tmp_path}/none"], "none: no such folder"),
        (["--ckpt_path", f"{tmp_path}/bad.ckpt"], "bad.ckpt is not a whole checkpoint"),
        ([f"--ckpt_path={tmp_path}/none.ckpt"], "none.ckpt does not exist"),
        (["--trainer.max_steps", "-7"], "max_steps"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert guard(lambda options=options: fit([*config, *options])) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "configuration", "hyper-parameters"])
def test_fit_runs_no_code_of_a_checkpoint(tmp_path, capsys, monkeypatch, how):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "payload.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    hyper = {"hyper_parameters": {"_class_path": "payload.Module"}}
    torch.save({"state_dict": {}, **(hyper if how == "hyper-parameters" else {"x": Payload()})}, "bad.ckpt")
    arguments = ["--config", str(ROOT / "configs/train/recover_pruned.yaml")]
    if how == "configuration":
        (tmp_path / "own.yaml").write_text("ckpt_path: bad.ckpt\n")
        arguments += ["--config", "own.yaml"]
    else:
        arguments += ["--ckpt_path", "bad.ckpt"]
    assert guard(lambda: fit(arguments)) == 2
    assert "bad.ckpt is not a whole checkpoint" in capsys.readouterr().err and not (tmp_path / "ran").exists()


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
        (("data", "collect", "--suite", "libero_object", "--vla", "nobody", "--output", "{tmp}/o"), "nobody"),
        (("data", "inspect", "--data", "{tmp}"), "{tmp}"),
        (("data", "inspect", "--data", "{tmp}", "--output", "{tmp}/o.xyz"), "o.xyz is not an image file"),
        (("train", "distill", "--data", "{tmp}", "--output", "{tmp}/e"), "{tmp}"),
        (("train", "export", "--generator", "{tmp}/x.ckpt", "--gate", "y", "--data", "{tmp}", "--output", "{tmp}/e"), "x.ckpt"),
        (("eval", "report", "--results", "{tmp}", "--output", "{tmp}/r.html"), "no summary.json"),
        (("eval", "latency", "--export", "{tmp}", "--output", "{tmp}/l"), "config.json"),
        (("eval", "report", "--results", "{tmp}", "--output", "{tmp}/r.pdf"), "ends in .html or .md"),
        (("data", "collect", "--suite", "libero_object", "--risk", "0.1", "--output", "{tmp}/o"), "risk: applies only to"),
        (
            ("data", "collect", "--suite", "libero_object", "--student_checkpoint", "x", "--output", "{tmp}/o"),
            "student_checkpoint",
        ),
        (("data", "collect", "--suite", "libero_object", "--init_states", "0", "--output", "/proc/o"), "/proc/o"),
        (("eval", "closed_loop", *LOOP, "--rules", "{{relase: {{step_skip: 2}}}}"), "'relase' is unknown"),
        (
            ("eval", "closed_loop", *LOOP, "--pruning", "{{half: {{speed: constant, keep: 7}}}}"),
            "keep must lie between 0 and 1, got 7",
        ),
        (("eval", "closed_loop", *LOOP, "--hold", "last"), "hold: applies in real time only"),
        (("eval", "closed_loop", "--suite", "libero_object", "--cells", "mlp", "--output", "{tmp}/c"), "mlp"),
        (("eval", "closed_loop", *LOOP[:2], "--cells", "mlp+learned", "--output", "{tmp}/c"), "generator 'mlp'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, culprit, tmp_path, capsys):
    pytest.importorskip("libero", reason="the libero extra is not installed")
    package, *rest = (a.format(tmp=tmp_path) for a in arguments)
    commands = import_module(f"{package}.__main__").COMMANDS
    assert run(commands, "x", rest) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and culprit.format(tmp=tmp_path) in error


@pytest.mark.slow
def test_help_names_every_option():
    done = call("data", "collect", "--help")
    assert done.returncode == 0
    for option in (
        "--vla",
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


@pytest.mark.slow
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
