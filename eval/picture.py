"""The pictures of README and docs: a headline from one summary.json, and what latency costs, from one for each latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spvla.errors import InputError
from spvla.files import read_json

PANELS = {  # column of a row: title, how a value is written
    "policy_seconds_per_episode": ("policy seconds per episode", "{:.2f} s"),
    "vla_calls_per_episode": ("VLA calls per episode", "{:.1f}"),
    "success_rate": ("success", "{:.1%}"),
}


def label(row: dict[str, Any]) -> str:
    """Name of a row for a reader who does not know how cells are written."""
    name = "VLA" if row["generator"] == "none" else f"{row['generator']} + {row['gate']} gate"
    kept, total = row.get("visual_tokens_mean"), row.get("visual_tokens_total")
    if kept is not None and kept < total:
        return f"{name},\n{kept:.0f} of {total} tokens"
    return "VLA alone" if name == "VLA" else name


def picture(results: Path, output: Path | None = None) -> None:
    """Draw a closed-loop evaluation as an SVG.

    Of one evaluation: computation, VLA calls and success of each cell. Of a folder of evaluations in real time, one for each
    latency (--vla_ms): success and seconds over the latency, a line for each cell.

    Args:
        results: folder with the evaluation's summary.json, whose cells all need a timing (--timing_episodes), or with a folder
            for each latency.
        output: the SVG to write; docs/headline.svg or docs/real_time.svg if omitted.
    """
    if (results / "summary.json").exists():
        _headline(results, output or Path("docs/headline.svg"))
    else:
        _over_latency(results, output or Path("docs/real_time.svg"))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "spvla", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11})
    import matplotlib.pyplot as plt

    return plt


def _headline(results: Path, output: Path) -> None:
    plt = _pyplot()
    rows = read_json(results / "summary.json")["rows"]
    missing = [f"{row['cell']}: {key}" for row in rows for key in PANELS if row.get(key) is None]
    if missing:
        raise InputError(f"{results}: no value for {', '.join(missing)}")
    names = [label(row) for row in rows]
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 2.2), sharey=True, layout="constrained")
    for axes, (key, (title, form)) in zip(panels, PANELS.items(), strict=True):
        values = [row[key] for row in rows]
        bars = axes.barh(names, values, color=["#9aa5b1"] * (len(rows) - 1) + ["#1a7f5a"], height=0.62)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, color="#57606a")
        axes.set_title(title, loc="left", fontsize=11, color="#57606a")
        axes.set_xlim(0, 1.28 * max(values))
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(left=False, labelcolor="#57606a")
    panels[0].invert_yaxis()
    _write(figure, output)


def _over_latency(results: Path, output: Path) -> None:
    summaries = [read_json(path) for path in sorted(results.glob("*/summary.json"))]
    timed = {s["real_time"]["vla_ms"]: s["rows"] for s in summaries if (s.get("real_time") or {}).get("vla_ms") is not None}
    if not timed:
        raise InputError(
            f"{results}: neither a summary.json nor folders with one of an evaluation with --vla_ms", field="results"
        )
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 3.0), layout="constrained")
    cells = list(dict.fromkeys(row["cell"] for ms in sorted(timed) for row in timed[ms]))
    for cell in cells:
        found = [(ms, row) for ms in sorted(timed) for row in timed[ms] if row["cell"] == cell]
        for axes, key in zip(panels, ("success_rate", "seconds_per_episode"), strict=True):
            style = "--" if cell.startswith("vla") else "-"
            axes.plot([ms for ms, _ in found], [row[key] for _, row in found], style, marker="o", ms=4, label=cell)
    for axes, title in zip(panels, ("success", "seconds per episode"), strict=True):
        axes.set_title(title, loc="left", fontsize=11, color="#57606a")
        axes.set_xlabel("milliseconds a VLA call takes", color="#57606a")
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    _write(figure, output)


def _write(figure: Any, output: Path) -> None:
    import matplotlib.pyplot as plt

    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(f"written: {output}")
