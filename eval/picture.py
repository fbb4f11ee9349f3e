"""The picture of the README: the VLA alone, pruned and as the whole system, from one summary.json."""

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


def picture(results: Path, output: Path = Path("docs/headline.svg")) -> None:
    """Draw the headline of a closed-loop evaluation as an SVG: computation, VLA calls and success of each cell.

    Args:
        results: folder of the evaluation, with its summary.json; every cell needs a timing (--timing_episodes).
        output: the SVG to write.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "spvla", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11})
    import matplotlib.pyplot as plt

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
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(f"written: {output}")
