"""What is read from files and messages, damaged in hundreds of ways: see tests/fuzz."""

import json
import os

import pytest

from tests.fuzz import runner
from tests.fuzz.__main__ import main
from tests.fuzz.base import Kind, Outcome
from tests.fuzz.kinds import KINDS, MESSAGES
from tests.fuzz.runner import BAD, Fuzzer


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_read_hangs_or_raises_anything_else(kind):
    with Fuzzer(kind, seed=0) as fuzzer:
        results = list(fuzzer.run(range(200 if kind in MESSAGES else 60)))
        assert not [r for r in results if r.result in BAD]
        again = list(fuzzer.run(range(20, 30)))
    assert [(r.how, r.result) for r in again] == [(r.how, r.result) for r in results[20:30]], "by seed and number alone"


def hurt(folder):
    """Reads a number from a folder; some numbers hurt."""
    number = json.loads((folder / "value.json").read_text())["value"]
    if isinstance(number, bool | str):
        os._exit(9)
    if isinstance(number, dict | list):
        bytearray(2**40)
    if number == 2**63:
        raise KeyError(number)
    if number == 10**12:
        while True:
            pass
    return Outcome(f"{number}")


def make(folder):
    folder.mkdir()
    (folder / "value.json").write_text(json.dumps({"value": 7}))
    return [folder]


@pytest.mark.slow
def test_deaths_hangs_exceptions_and_memory_are_found_and_the_next_input_is_read(monkeypatch):
    monkeypatch.setitem(KINDS, "hurtful", Kind(make, hurt))
    monkeypatch.setattr(runner, "SECONDS", 0.3)
    with Fuzzer("hurtful", seed=0) as fuzzer:
        results = list(fuzzer.run(range(60)))
    assert [r.number for r in results] == list(range(60))
    assert {"same", "accepted", "death", "hang", "exception", "blow-up"} <= {r.result for r in results}
    assert all(r.result == "death" for r in results if r.how == "value: 'True'")
    assert all(r.result == "blow-up" for r in results if r.how == "value: '[]'")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_summary(tmp_path, monkeypatch):
    def summary(name, stop=None):
        line = ["fuzz", "--kind", "from an openpi server", "--messages", "60", "--output", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", line)
        with monkeypatch.context() as patched:
            if stop is not None:
                patched.setattr("tests.fuzz.__main__.ROUNDS", 3)
                patched.setattr("tests.fuzz.__main__.write_json", stop)
            main()
        rows = json.loads((tmp_path / name).read_text())["rows"]
        return [{k: v for k, v in row.items() if k not in ("memory", "largest")} for row in rows]

    from spvla.files import write_json

    def once(path, value, indent):
        write_json(path, value, indent)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        summary("stopped", once)
    assert json.loads((tmp_path / "stopped").read_text())["rows"][0]["inputs"] == 20
    assert summary("stopped") == summary("whole")
