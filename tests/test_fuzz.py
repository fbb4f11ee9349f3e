"""What is read from files and messages, damaged in a thousand ways: see tests/fuzz."""

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import BAD, run


def test_messages_damaged_anyhow_are_errors():
    results = list(run("wire", range(100), seed=0))
    assert len(results) == 100 and not [r for r in results if r.result in BAD]
    assert [r.how for r in results] == [r.how for r in run("wire", range(100), seed=0)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_read_hangs_or_raises_anything_else(kind, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fuzz", "--kind", kind, "--count", "50"])
    assert main() == 0, capsys.readouterr().out
