"""The command ``python -m eval report``: finds results, and writes them as a page or as Markdown."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tabulate import tabulate

from eval.offline import offline
from eval.output import write_summary
from eval.report import closed_loop, latency, live
from eval.report import offline as offline_report
from eval.report.figures import Table
from spvla.errors import InputError
from spvla.fields import naming
from spvla.files import read_json, write_text

SECTIONS = {
    "closed_loop": closed_loop.section,
    "offline": offline_report.section,
    "live": live.section,
    "latency": latency.section,
}
FORMER = {"scheduler": "gate", "policy": "vla", "policy_options": "vla_options"}  # names in the results of older versions
ORDER = ("closed_loop", "offline", "live", "latency", "data")

Found = Sequence[tuple[Path, dict[str, Any]]]


def report(results: Path, output: Path, title: str = "Results: learned against linear", export: Path | None = None) -> None:
    """Draw one self-contained HTML page from the raw files of earlier evaluations, or their tables alone as Markdown.

    Args:
        results: folder that holds results (each with a summary.json), at any depth.
        output: the page to write; its name's end, .html or .md, says which.
        title: its title.
        export: for a recording (a rollout store made with record=) whose every step has the VLA's answer, as in shadow mode:
            judge this export on it, as python -m eval offline does. Of a recording with a live gate its risk, threshold and
            audits are drawn, with or without an export.
    """
    if output.suffix not in (".html", ".md"):
        raise InputError(f"{output}: a report ends in .html or .md")
    if (results / "meta" / "spvla.json").exists():
        return _recording(results, output, title, export)
    if export is not None:
        raise InputError(f"{results}: is not a recording: leave out --export")
    found = read(results)
    with drawing(results):
        text = page(found, results, title) if output.suffix == ".html" else markdown(found, results, title)
    write_text(output, text)
    print(f"written: {output}")


def _recording(recording: Path, output: Path, title: str, export: Path | None) -> None:
    """The report of a recording: its live gate if it had one, and the judgement of an export if one is given."""
    deployments = live.recorded(recording)
    if export is None and not deployments:
        raise InputError(f"{recording}: is a recording without a live gate: give the --export to evaluate on it")
    with TemporaryDirectory() as folder:
        judged = Path(folder) / recording.name
        if export is not None:
            offline(recording, export, judged)
        if deployments:
            write_summary(judged / "live", "live", deployments)
        report(judged, output, title)


def read(results: Path) -> Found:
    """Every summary below a folder and where it lies: by kind, then the most episodes a cell first."""
    found = []
    for path in sorted(results.rglob("summary.json")):
        summary = read_json(path)
        rows = summary.get("rows")
        if not rows or not all(isinstance(row, dict) and row for row in rows) or not isinstance(summary.get("kind"), str):
            raise InputError(f"{path}: not a summary of an evaluation (it needs a kind, and rows of values)")
        found.append((path.parent, renamed(summary)))
    if not found:
        raise InputError(f"{results}: no summary.json below it; run an evaluation with --output there first")

    def rank(entry: tuple[Path, dict[str, Any]]) -> tuple[int, int]:
        kind, rows = entry[1]["kind"], entry[1]["rows"]
        return ORDER.index(kind) if kind in ORDER else len(ORDER), -max(r.get("episodes") or 0 for r in rows)

    return sorted(found, key=rank)


def renamed(value: Any) -> Any:
    """A summary with today's names for what older versions called otherwise."""
    if isinstance(value, list):
        return [renamed(v) for v in value]
    if not isinstance(value, dict):
        return "gate" if value == "scheduler" else value
    return {FORMER.get(k, k.replace("scheduler_ms", "gate_ms")): renamed(v) for k, v in value.items()}


def page(found: Found, results: Path, title: str) -> str:
    """One HTML page that needs nothing from outside."""
    sections = []
    for folder, summary in found:
        with drawing(folder):
            section = SECTIONS.get(summary["kind"], latency.plain_section)(folder, summary)
        section.source = folder.relative_to(results).as_posix()
        sections.append(section)
    sources = [(folder / "summary.json").relative_to(results).as_posix() for folder, _ in found]
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html.j2")
    machine = {"python": None, "processor": None, **found[0][1].get("machine", {})}
    return template.render(title=title, sections=sections, sources=sources, machine=machine) + "\n"


def markdown(found: Found, results: Path, title: str) -> str:
    """Every table as Markdown, with a link to its raw file."""
    parts = [
        f"# {title}",
        "Every table is drawn from its raw file: `python -m eval report --results results --output docs/tables.md`.",
    ]
    for folder, summary in found:
        name = folder.relative_to(results).as_posix()
        loop = summary["kind"] == "closed_loop"
        heading, *sentences = closed_loop.setting_of(summary) if loop else [summary["kind"].replace("_", " ").capitalize()]
        tables = closed_loop.cells_tables(summary["rows"]) if loop else latency.plain_tables(summary["rows"])
        lines = [text for t in tables for text in table_lines(t)]
        raw = f"[`{results.name}/{name}`](../{results.name}/{name}/summary.json)"
        parts += [f"## {heading} ({name})", " ".join([*sentences, f"Raw: {raw}."]), *lines]
    return "\n\n".join(parts) + "\n"


def table_lines(t: Table) -> list[str]:
    """A table as Markdown, its title before it and its note behind it."""
    title = [f"### {t.title}"] if t.title else []
    return [*title, tabulate(t.rows, t.header, "pipe", disable_numparse=True), *([t.note] if t.note else [])]


def drawing(folder: Path) -> AbstractContextManager[None]:
    """What a damaged file makes of drawing becomes an :class:`InputError` that names its folder."""
    return naming(f"{folder}: summary.json or a file beside it is damaged", EOFError, OSError, zlib.error)
