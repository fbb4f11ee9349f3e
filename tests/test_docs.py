"""The documentation can be followed: links lead somewhere, commands and files exist, figures are those of the raw files."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import data.__main__
import eval.__main__
import train.__main__
from eval.picture import picture
from spvla import InputError
from spvla.serve.command import serve_policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for folder in ("docs", "results", "spvla") for p in (ROOT / folder).rglob("*.md"))]
COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "data": data.__main__.COMMANDS,
    "train": train.__main__.COMMANDS,
    "eval": eval.__main__.COMMANDS,
}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pages
def test_every_named_file_of_the_repository_exists(page):
    for name in re.findall(r"\b((?:configs|docs|examples|tests)/[\w./-]*\w)", page.read_text()):
        assert (ROOT / name).exists(), name


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of ours in ``text``; shell variables that are set in it are put in their places."""
    text = re.sub(r"\\\n[\s#]*", " ", text)
    variables = dict(re.findall(r'(?:^|\s)([A-Z])="([^"]+)"', text))
    for _ in range(2):  # a variable may hold another
        text = re.sub(r"\$([A-Z])\b", lambda match: variables.get(match[1], match[0]), text)
    for found in re.findall(r"python -m (?:data|train|eval|spvla\.serve)\b[^\n`]*", text):
        words = shlex.split(found.rstrip('"'), comments=True)
        if len(words) > 3:  # not the bare name of a program
            yield words[2 : words.index("&") if "&" in words else None]


def options(words: list[str]) -> tuple[Callable[..., Any], list[str]]:
    if words[0] == "spvla.serve":
        return serve_policy, words[1:]
    return COMMANDS[words[0]][words[1]], words[2:]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))], ids=lambda p: p.name)
def test_every_command_has_its_options(page):
    for words in commands(page.read_text()):
        if words[:2] == ["train", "fit"]:  # Lightning's options
            continue
        command, arguments = options(words)
        parameters = inspect.signature(command).parameters
        for option in (a[2:].split("=")[0].split(".")[0] for a in arguments if a.startswith("--")):
            assert option in {*parameters, "config", "help"}, (words, option)


def numbers(value: object) -> Iterator[float]:
    """Every number of a row of a summary.json, and the same as a percentage."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield from (value, 100 * value)


def tables(page: Path) -> Iterator[tuple[list[dict[str, Any]], list[list[str]]]]:
    """Each table with a summary.json linked in it or right below it: rows of that file, and cells of the table."""
    for block in re.findall(r"(?:^\|.*\n)+(?:\n\[Raw data\].*)?", page.read_text(), re.MULTILINE):
        raw: list[dict[str, Any]] | None = None
        if below := re.search(r"\n\[Raw data\]\(([^)]+)", block):
            raw = json.loads((page.parent / below[1]).read_text())["rows"]
        lines: list[list[str]] = []
        for line in [x for x in block.splitlines() if x.startswith("|")][2:]:
            if link := re.search(r"\]\(([^)]+summary\.json)\)", line):
                if raw is not None:
                    yield raw, lines
                raw, lines = json.loads((page.parent / link[1]).read_text())["rows"], []
            else:
                lines.append([cell.strip() for cell in line.strip("|").split("|")])
        if raw is not None:
            yield raw, lines


def holds(row: dict[str, Any], cell: str) -> bool:
    """Whether each number of a table's cell is one of ``row``, to the digits shown."""
    known = [*numbers(row), row.get("held_per_episode", 0) / 20]  # waiting in seconds, at 20 Hz
    return all(
        any(abs(value - float(shown)) <= 0.501 * 10.0 ** -len(shown.partition(".")[2]) for value in known)
        for shown in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", cell)
    )


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/results.md", 15), ("docs/verification.md", 1)])
def test_tables_show_the_numbers_that_they_link(page, count):
    found = list(tables(ROOT / page))
    assert len(found) == count
    for raw, lines in found:
        for cells in lines:
            assert any(all(holds(row, cell) for cell in cells[1:]) for row in raw), cells


def test_the_picture_shows_the_raw_file(tmp_path):
    folder = ROOT / "results" / "nano" / "headline"
    picture(folder, tmp_path / "headline.svg")
    drawn, kept = (
        re.findall(r">([\d.]+(?: s|%)?)</text>", p.read_text()) for p in (tmp_path / "headline.svg", ROOT / "docs/headline.svg")
    )
    assert drawn == kept and len(kept) == 9
    row = {"cell": "vla", "generator": "none", "success_rate": 1.0, "vla_calls_per_episode": 8.0}
    (tmp_path / "summary.json").write_text(json.dumps({"rows": [row]}))
    with pytest.raises(InputError, match="no value for vla: policy_seconds_per_episode"):
        picture(tmp_path, tmp_path / "headline.svg")


def test_the_picture_over_the_latency_has_a_line_for_each_cell(tmp_path):
    for ms in (0, 240, 1000):
        rows = [
            {"cell": c, "success_rate": 1.0, "seconds_per_episode": 4.0 + ms / 500} for c in ("vla:wait", "mlp+learned:bridge")
        ]
        (tmp_path / str(ms)).mkdir()
        (tmp_path / str(ms) / "summary.json").write_text(json.dumps({"rows": rows, "real_time": {"vla_ms": float(ms)}}))
    picture(tmp_path, tmp_path / "out.svg")
    drawn = (tmp_path / "out.svg").read_text()
    assert "vla:wait" in drawn and "mlp+learned:bridge" in drawn and drawn.count("<use") >= 12  # a marker for each figure
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        picture(tmp_path / "empty", tmp_path / "out.svg")
    assert caught.value.field == "results"
