"""The kill harness finds what it is there for; see tests/soak."""

import os
import time
from pathlib import Path

import pytest

from spvla import save_export
from tests.soak.commands import COMMANDS, Command, files
from tests.soak.kills import compare, kill_command, small_export

pytestmark = pytest.mark.slow


def test_a_converted_store_is_the_same_after_kills():
    found = kill_command("convert", 3, seed=0, minutes=float("inf"))
    assert found["kills"] == found["same"] == 3


def careless(inputs: Path, output: Path) -> None:
    """Writes three files in place, one after the other, and takes for whole what is there."""
    output.mkdir(exist_ok=True)
    (output / f"{os.getpid()}.tmp").touch()
    for name in ("a", "b", "c"):
        if not (output / name).exists():
            with (output / name).open("w") as stream:
                stream.write("half ")
                stream.flush()
                time.sleep(0.02)
                stream.write("whole")
    (output / f"{os.getpid()}.tmp").unlink()


def test_left_overs_and_half_files_are_found(monkeypatch):
    monkeypatch.setitem(COMMANDS, "careless", Command(lambda folder: None, careless, files))
    found = kill_command("careless", 8, seed=0, minutes=float("inf"))
    assert found["kills"] == 8 and found["left over"] + found["other"] == len(found["found"]) >= 1


def test_results_are_compared_by_file():
    whole = {"a": b"1", "b": b"2"}
    assert compare(whole, whole) == ("same", "")
    assert compare({"a": b"1"}, whole) == ("lost", "b")
    assert compare(whole | {"c": b""}, whole) == ("left over", "c")
    assert compare(whole | {"a": b"2"}, whole) == ("other", "a")


def test_the_small_export_is_one(tmp_path):
    assert {"config.json", "gates/mlp.safetensors"} <= files(save_export(small_export(0, 0.2), tmp_path / "e")).keys()
