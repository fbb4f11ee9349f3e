"""An offline evaluation on the page: errors, coverage, ROC, and the risk that its episodes support."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from eval.report.figures import COLOURS, Picture, Section, Table, legend, percent, picture
from spvla.gates.floor import NoiseFloor

MAX_DEVIATING_AMONG_SKIPPED = 0.05  # up to which a risk is recommended


def section(folder: Path, summary: dict[str, Any]) -> Section:
    """Errors by horizon, coverage against error, ROC and the risk table of one offline evaluation."""
    header = "generator|max error|deviating %|ROC area|risk|skipped %|refused %|measured risk %|± SE|deviating among skipped %"
    body = [
        [
            r["generator"],
            f"{r['max_abs_error']:.3f}",
            percent(r["deviating"]),
            f"{r['roc_auc']:.3f}" if "roc_auc" in r else "–",
            f"{r['risk']:g}" if "risk" in r else "–",
            percent(r.get("skipped")) if "note" not in r else r["note"],
            percent(r.get("refused")),
            percent(r.get("measured_risk")),
            percent(r.get("measured_risk_standard_error")),
            percent(r.get("deviating_among_skipped")),
        ]
        for r in summary["rows"]
    ]
    calibration = [
        {"generator": k, "risk": r, "coverage": c}
        for k, curve in summary["calibration"].items()
        for r, c in zip(curve["risk"], curve["coverage"], strict=True)
    ]
    pictures = [
        lines(calibration, "risk", "coverage", "risk bound", "share called intuitive", "Calibrated risk against coverage."),
        lines(summary["errors"], "horizon", "max_abs_error", "steps ahead", "mean max-abs error", "Error by horizon."),
        lines(summary["coverage"], "coverage", "max_abs_error", "share kept", "mean max-abs error", "Coverage and error."),
        lines(
            *(summary["roc"], "false_positive_rate", "true_positive_rate", "false positive rate", "true positive rate"),
            "ROC of each gate: does it find the steps that deviate?",
        ),
    ]
    title = f"Offline: {summary['episodes']} held-out episodes"
    advice = risk_advice(summary["rows"], summary["episodes"])
    floor = NoiseFloor.of(summary)
    sentences = [f"{line}." for line in floor.lines()] if floor is not None else []
    return Section(title, sentences, tables=[Table(header.split("|"), body)], advice=advice, pictures=pictures)


def lines(rows: Sequence[dict[str, Any]], x: str, y: str, xlabel: str, ylabel: str, caption: str) -> Picture:
    """Column ``y`` over column ``x``, a line per generator."""

    def draw(f: Any) -> None:
        axis = f.add_subplot()
        for k, name in enumerate(dict.fromkeys(r["generator"] for r in rows)):
            mine = [r for r in rows if r["generator"] == name]
            axis.plot([r[x] for r in mine], [r[y] for r in mine], ".-", lw=1.2, ms=4, color=COLOURS[k % 7], label=name)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        legend(f)

    return picture(draw, caption)


def risk_advice(rows: Sequence[dict[str, Any]], episodes: int) -> tuple[str, str]:
    """The largest risk that these episodes support, as a sentence and what stands out at its end.

    The measured risk stays below it by two standard errors, there are as many episodes as its own bound needs, and few of the
    skipped steps deviated.
    """

    def supported(r: dict[str, Any]) -> bool:
        error = r["measured_risk_standard_error"]
        if error is None or not isfinite(error) or (r["deviating_among_skipped"] or 0) > MAX_DEVIATING_AMONG_SKIPPED:
            return False
        return episodes + 1 >= 1 / r["risk"] and bool(r["measured_risk"] + 2 * error <= r["risk"])

    parts = []
    for name in dict.fromkeys(r["generator"] for r in rows if "skipped" in r):
        fit = [r for r in rows if r["generator"] == name and "skipped" in r and supported(r)]
        if fit:
            r = max(fit, key=lambda r: r["risk"])
            parts.append(f"{name} at {r['risk']:g} (skips {percent(r['skipped'])} %)")
    if not parts:
        told = f"These {episodes} episodes support no risk: record more, or calibrate on such rollouts before acting."
        return told, ""
    return (
        "Largest risk that these episodes support (the measured fraction stays below it by two standard errors, and at most "
        f"{percent(MAX_DEVIATING_AMONG_SKIPPED)} % of the skipped steps are off by more than the tolerance): ",
        "; ".join(parts),
    )
