"""One self-contained HTML page from raw results: ``python -m eval report``.

Reads every ``summary.json`` below a folder (and the raw files beside it) and draws what it finds: the table, calls against
success, the risk knob, offline errors, run lengths, action traces coloured by who acted, latency. Pictures are SVG that
takes the page's own text colour, so that the page reads in light, in dark and on paper.
"""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from math import isfinite, isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from spvla.errors import InputError
from spvla.fields import naming
from spvla.files import write_text

COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#f58518", "#b279a2", "#72b7b2", "#9d755d")
MARKERS = "osD^vP"
VLA_COLOUR, GENERATOR_COLOUR, HELD_COLOUR = "#4c78a8", "#f58518", "#999999"
SPEAKING = 0.05  # share of skipped steps that deviate, up to which a risk is recommended
TRACES = 4
HEIGHT = 3.6  # of a picture, inches

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #fff; --faint: #8884; --accent: #2f6db5; --good: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --paper: #14191f; --accent: #7fb2ea; --good: #81c784; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 1280px;
  padding: 1.5rem }
h1 { font-size: 1.7rem; margin: 0 }
h2 { margin: 2.4rem 0 .6rem; font-size: 1.2rem }
h2 small { font-weight: normal; opacity: .6; margin-left: .5rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem }
p { max-width: 46rem } .note { opacity: .75; font-size: .87rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; width: 100% }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
tr.best td { color: var(--good); font-weight: 600 }
figure { margin: .5rem 0 1rem } figure svg { width: 100%; height: auto; color: var(--ink) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 1rem }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.headline div { border: 1px solid var(--faint); border-radius: 8px; padding: .6rem 1rem; min-width: 9rem }
.headline b { display: block; font-size: 1.5rem; color: var(--accent) }
.film { display: flex; gap: .8rem; align-items: center; margin: .4rem 0 }
.film img { width: 0; flex: 1; min-width: 300px } .film video { width: 190px }
@media print { body { max-width: none } h2 { break-after: avoid } figure { break-inside: avoid }
  .scroll { overflow: visible } table { font-size: .45rem } th, td { white-space: normal; padding: .2rem } }
"""


def svg(draw: Callable[[Any], None], width: float = 6.0, height: float = HEIGHT) -> str:
    """Draw on a matplotlib figure and return it as inline SVG in the page's text colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = "#010203"  # a colour nothing else uses, replaced by currentColor below
    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "spvla",
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), ink)
    with plt.rc_context(style):  # type: ignore[arg-type]
        figure = plt.figure(figsize=(width, height))
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(ink, "currentColor")
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[\d.]+pt"', r"\1", text, count=2)


def legend(f: Any) -> None:
    """What is drawn, below the axes, where it hides nothing."""
    handles, labels = f.axes[0].get_legend_handles_labels()
    f.legend(handles, labels, loc="outside lower center", ncols=2 if max(map(len, labels)) > 20 else 3, fontsize=8)


def figure(picture: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{picture}<figcaption class=note>{html.escape(caption)}</figcaption></figure>"


def cell_name(row: dict[str, Any]) -> str:
    """A cell as people read it."""
    risk = f", risk {row['risk']:g}" if row.get("risk") is not None else ""
    return scheduling_name(row) + risk


def scheduling_name(row: dict[str, Any]) -> str:
    """A cell without its risk."""
    pruning = "" if row["pruning"] == "none" else f", pruning {row['pruning']}"
    name = pair_name(row)
    return f"VLA{pruning}" if pruning and name == "VLA alone" else name + pruning


def pair_name(row: dict[str, Any]) -> str:
    """Generator and gate of a cell, without its pruning and its risk."""
    return "VLA alone" if row["generator"] == "none" else f"{row['generator']} + {row['gate']}"


def percent(value: float | None, signed: bool = False) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """A table; row ``best`` stands out."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def best_row(rows: Sequence[dict[str, Any]]) -> int | None:
    """The row with the fewest calls among those that lose at most one point."""
    fit = [i for i, r in enumerate(rows) if r["generator"] != "none" and (r.get("paired_delta") or 0) >= -0.0100001]
    return min(fit, key=lambda i: rows[i]["vla_calls_per_episode"]) if fit else None


def closed_loop_setting(summary: dict[str, Any]) -> list[str]:
    """The title of a closed-loop evaluation, and sentences that say what was run."""
    real_time, nudge = summary.get("real_time"), summary.get("nudge")
    kind = (", in real time" if real_time else "") + (", objects moved on the way" if nudge else "")
    tasks, states, resets = len(summary["tasks"]), summary["init_states"], summary.get("random_resets")
    starts = " and ".join([f"initial states {states}"] * bool(states) + [f"{resets} seeded resets"] * bool(resets))
    out = [
        f"Closed loop: {summary['suite']}{kind}",
        f"Policy {summary['policy']}, {tasks} tasks, {starts}, paired by task, initial state and seed. Calls of failed "
        "episodes count up to the step limit.",
    ]
    if real_time:
        ms = "the measured time" if real_time["vla_ms"] is None else f"{real_time['vla_ms']:g} ms"
        does = "stops" if real_time["hold"] == "stop" else "repeats its last action"
        out.append(f"The world moves on while the policy thinks: {ms} a VLA call; meanwhile the robot {does}.")
    if nudge:
        out.append(f"The asked object is moved by {100 * nudge['distance']:g} cm while the hand is on its way.")
    return out


def closed_loop_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of cells: what matters most first, and only what was measured."""

    def number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: "–" if r.get(key) is None else format(r[key], form)

    def interval(key: str, signed: bool, between: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: between.join(percent(x, signed) for x in r[key]) if r.get(key) else "–"

    def tokens(r: dict[str, Any]) -> str:
        return f"{r['visual_tokens_mean']:.0f} of {r['visual_tokens_total']}" if "visual_tokens_mean" in r else "–"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "cell": cell_name,
        "episodes": number("episodes", "d"),
        "success %": lambda r: percent(r["success_rate"]),
        "95 %": interval("success_ci95", False, "–"),
        "paired Δ": lambda r: percent(r.get("paired_delta"), True),
        "paired 95 %": interval("paired_delta_ci95", True, " to "),
        "McNemar p": number("mcnemar_p", ".2g"),
        "calls/episode": number("vla_calls_per_episode", ".1f"),
        "speedup": number("policy_speedup", ".3g"),
        "policy s/episode": number("policy_seconds_per_episode", ".3g"),
        "skipped %": lambda r: percent(r["skipped"]),
        "deviating %": lambda r: percent(r.get("deviation_rate")),
        "steps": number("steps_per_episode", ".1f"),
        "run": number("generated_run_length_mean", ".1f"),
        "fallbacks": number("fallbacks", "d"),
        "tokens": tokens,
        "ms p50": number("policy_ms_per_step_p50", ".2f"),
        "waiting steps": number("held_per_episode", ".3g"),
        "moved": number("nudged", ".3g"),
        "success, moved": number("nudged_successes", ".3g"),
        "steps to the VLA": number("reaction_steps_mean", ".3g"),
        "at most": number("reaction_steps_max", ".3g"),
    }
    body = [[tell(r) for tell in columns.values()] for r in rows]
    shown = [i for i in range(len(columns)) if any(b[i] not in ("–", "0") for b in body)]
    return [list(columns)[i] for i in shown], [[b[i] for i in shown] for b in body]


def closed_loop_section(folder: Path, summary: dict[str, Any]) -> str:
    """Headline figures, table, calls against success, risk, run lengths and traces of one closed-loop evaluation."""
    rows = summary["rows"]
    best = best_row(rows)
    setting = summary.get("real_time"), summary.get("nudge")
    title, *sentences = closed_loop_setting(summary)
    parts = [f"<h2>{html.escape(title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in sentences)]
    if best is not None:
        r, low = rows[best], 100 * rows[best]["paired_delta_ci95"][0]
        high = 100 * r["paired_delta_ci95"][1]
        boxes = [
            (f"{r['vla_calls_ratio']:.2f}×", "fewer VLA calls"),
            (f"{percent(r['skipped'])} %", "of the steps skip the VLA"),
            (f"{percent(r['success_rate'])} %", "success"),
            (f"{percent(r['paired_delta'], True)}", f"points to the VLA alone ({low:+.1f} to {high:+.1f})"),
        ]
        if r.get("policy_speedup") is not None:
            boxes.insert(0, (f"{r['policy_speedup']:.2f}×", "faster in policy wall clock"))
        inner = "".join(f"<div><b>{html.escape(a)}</b>{html.escape(b)}</div>" for a, b in boxes)
        parts.append(
            f"<p class=note>Best cell within one point: {html.escape(cell_name(r))}</p><div class=headline>{inner}</div>"
        )
    header, body = closed_loop_table(rows)
    parts.append(html_table(header, body, best))

    pairs, prunings = (list(dict.fromkeys(names)) for names in (map(pair_name, rows), (r["pruning"] for r in rows)))

    def look(r: dict[str, Any]) -> tuple[int, int]:  # which colour and which marker
        return pairs.index(pair_name(r)), prunings.index(r["pruning"])

    def against_success(column: str, label: str) -> str:
        def draw(f: Any) -> None:
            axis = f.add_subplot()
            for (pair, pruning), group in groupby(sorted(rows, key=look), look):
                mine = sorted(group, key=lambda r: r[column])
                x, y = [r[column] for r in mine], np.array([100 * r["success_rate"] for r in mine])
                ci = 100 * np.array([r["success_ci95"] for r in mine]).T
                style = {"color": COLOURS[pair % 7], "marker": MARKERS[pruning % 6], "label": scheduling_name(mine[0])}
                axis.errorbar(x, y, np.abs(ci - y), ms=5, lw=1.2, elinewidth=0.8, **style)
            axis.set(xlabel=label, ylabel="success %", xlim=(0, None))
            legend(f)

        return figure(svg(draw, height=HEIGHT + 0.1 * len(rows)), f"{label} against success; bars are 95 % Wilson intervals.")

    pictures = [against_success("vla_calls_per_episode", "VLA calls per episode")]
    for column, label in (
        ("policy_seconds_per_episode", "Policy seconds per episode"),
        *((("seconds_per_episode", "Seconds per episode"),) if setting[0] else ()),
    ):
        if all(r.get(column) is not None for r in rows):
            pictures.append(against_success(column, label))
    knob = [r for r in rows if r.get("risk") is not None]
    if len({r["risk"] for r in knob}) > 1:

        def risk_knob(f: Any) -> None:
            axis = f.add_subplot()
            for k, name in enumerate(dict.fromkeys(map(scheduling_name, knob))):
                mine = sorted((r for r in knob if scheduling_name(r) == name), key=lambda r: r["risk"])
                x = [r["risk"] for r in mine]
                axis.plot(x, [100 * r["skipped"] for r in mine], "o-", color=COLOURS[k % 7], label=f"{name}: skipped")
                if all(r.get("deviation_rate") is not None for r in mine):
                    y, e = (np.array([100 * r[c] for r in mine]) for c in ("deviation_rate", "deviation_rate_standard_error"))
                    axis.errorbar(x, y, 2 * e, fmt="s--", color=COLOURS[k % 7], ms=4, label=f"{name}: deviating")
            limit = max(r["risk"] for r in knob)
            axis.plot([0, limit], [0, 100 * limit], color="#888888", lw=0.8, label="allowed risk")
            axis.set(xlabel="allowed risk", ylabel="% of steps")
            legend(f)

        pictures.append(figure(svg(risk_knob), "The risk knob in closed loop; bars are two standard errors."))
    episodes = folder / "episodes.csv.gz"
    if episodes.exists():
        with gzip.open(episodes, "rt") as stream:
            runs: dict[str, list[int]] = {}
            names = {r["cell"]: cell_name(r | {"pruning": "none"}) for r in rows}
            colours = dict(zip(dict.fromkeys(names.values()), COLOURS * len(rows), strict=False))
            for line in csv.DictReader(stream):
                runs.setdefault(names[line["cell"]], []).extend(json.loads(line["generated_run_lengths"]))
        shown = {k: v for k, v in runs.items() if v}
        if shown:

            def run_histogram(f: Any) -> None:
                axis = f.add_subplot()
                top = max(max(v) for v in shown.values())
                for name, values in shown.items():
                    counts = np.bincount(values, minlength=top + 1)[1:]
                    axis.plot(range(1, top + 1), 100 * counts / counts.sum(), ".-", color=colours[name], lw=1, label=name)
                axis.set(xlabel="generated steps in a row", ylabel="% of runs")
                legend(f)

            pooled = ", with any pruning" if len({r["pruning"] for r in rows if names[r["cell"]] in shown}) > 1 else ""
            pictures.append(figure(svg(run_histogram), f"How long the generator acts before the VLA takes over{pooled}."))
    parts.append(f"<div class=pair>{''.join(pictures)}</div>")
    parts.append(kept_section(rows))
    parts.append(film_section(folder / "films", rows, best))
    traces = folder / "traces.json.gz"
    if traces.exists() and best is not None:
        parts.append(trace_section(json.loads(gzip.decompress(traces.read_bytes())), rows[best]))
    return "".join(parts)


def kept_section(rows: Sequence[dict[str, Any]]) -> str:
    """How often each visual token reached the language model, by pruning."""
    shown = {cell_name(r): np.array(r["kept_share"]) for r in rows if "kept_share" in r}
    if not shown:
        return ""
    columns = min(6, len(shown))
    lines = -(-len(shown) // columns)

    def draw(f: Any) -> None:
        axes = f.subplots(lines, columns, squeeze=False).ravel()
        for axis, (name, share) in zip(axes, shown.items(), strict=False):
            picture = axis.imshow(share.reshape(isqrt(len(share)), -1), vmin=0, vmax=1, cmap="viridis")
            axis.set_title(name.replace(", ", "\n"), fontsize=7)
        for axis in axes:
            axis.set_axis_off()
        f.colorbar(picture, ax=list(axes), shrink=0.7, label="share of the VLA's calls")

    caption = "How often each visual token, where it is in the image, reached the language model."
    return f"<h3>Kept tokens</h3>{figure(svg(draw, 10, 2.3 * lines), caption)}"


def film_section(folder: Path, rows: Sequence[dict[str, Any]], best: int | None) -> str:
    """A strip of frames and a film of one episode of each cell, as far as there are any; the best one's is open."""
    parts: list[str] = []
    for i, r in enumerate(rows):
        strip, film = folder / f"{r['cell']}.jpg", folder / f"{r['cell']}.mp4"
        if strip.exists():
            image, video = (base64.b64encode(p.read_bytes()).decode() if p.exists() else "" for p in (strip, film))
            name = html.escape(cell_name(r))
            player = f"<video controls muted loop src='data:video/mp4;base64,{video}'></video>" if video else ""
            parts.append(
                f"<details{' open' if i == (best or 0) else ''}><summary>{name}</summary>"
                f"<div class=film><img alt='{name}' src='data:image/jpeg;base64,{image}'>{player}</div></details>"
            )
    if not parts:
        return ""
    caption = (
        "What the encoders saw in the first episode, dark: visual tokens that did not reach the language model. The border "
        "and the bar below say who acted: blue the VLA, orange the generator."
    )
    return f"<h3>One episode</h3>{''.join(parts)}<p class=note>{caption}</p>"


def trace_section(traces: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    """Action traces of the best cell, coloured by who acted, with the gate's probability."""
    mine = [t for t in traces if t["cell"] == row["cell"]][:TRACES]
    parts = [f"<h3>Who acted: {html.escape(cell_name(row))}</h3>"]
    for t in mine:
        actions, generated = np.array(t["trace"]["actions"]), np.array(t["trace"]["generated"], bool)
        colours = np.where(generated, GENERATOR_COLOUR, VLA_COLOUR)
        colours[np.array(t["trace"].get("held", []), bool).nonzero()] = HELD_COLOUR  # in real time only
        p = np.array([np.nan if v is None else v for v in t["trace"]["probability"]])

        def draw(f: Any, actions: np.ndarray = actions, colours: np.ndarray = colours, p: np.ndarray = p) -> None:
            axis, bar = f.subplots(2, 1, sharex=True, height_ratios=[5, 1])
            steps = np.arange(len(actions))
            for d in range(actions.shape[1]):
                if np.ptp(actions[:, d]) > 0.05:
                    axis.plot(steps, actions[:, d], lw=1, color=COLOURS[d % 7], label=str(d))
            axis.legend(ncols=7, fontsize=7, loc="upper right", title="action dimension", title_fontsize=7)
            axis.set(ylabel="action", ylim=(-1.15, 2.3))
            bar.bar(steps, 1, width=1, color=colours)
            bar.plot(steps, p, color="#010203", lw=0.7)
            bar.set(yticks=[], xlabel="control step", xlim=(-0.5, len(actions) - 0.5))
            bar.grid(False)

        outcome = "success" if t["success"] else "failure"
        start = "seeded reset" if t["init_state"] is None else f"initial state {t['init_state']}"
        caption = (
            f"{t['task_name'].replace('_', ' ')}, {start}: {outcome}. Blue: the VLA acted; orange: "
            f"the generator{'; grey: nobody, while the VLA computed' if HELD_COLOUR in colours else ''}. "
        )
        parts.append(figure(svg(draw, 9, 2.3), caption + "Line in the bar: probability of deviating (0 to 1)."))
    return "".join(parts)


def offline_section(folder: Path, summary: dict[str, Any]) -> str:
    """Errors by horizon, coverage against error, ROC and the risk table of one offline evaluation."""
    parts = [f"<h2>Offline: {summary['episodes']} held-out episodes</h2>"]
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
    parts.append(html_table(header.split("|"), body) + risk_advice(summary["rows"], summary["episodes"]))

    def lines(rows: Sequence[dict[str, Any]], x: str, y: str, xlabel: str, ylabel: str) -> str:
        def draw(f: Any) -> None:
            axis = f.add_subplot()
            for k, name in enumerate(dict.fromkeys(r["generator"] for r in rows)):
                mine = [r for r in rows if r["generator"] == name]
                axis.plot([r[x] for r in mine], [r[y] for r in mine], ".-", lw=1.2, ms=4, color=COLOURS[k % 7], label=name)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            legend(f)

        return svg(draw)

    calibration = [
        {"generator": k, "risk": r, "coverage": c}
        for k, curve in summary["calibration"].items()
        for r, c in zip(curve["risk"], curve["coverage"], strict=True)
    ]
    pictures = [
        figure(
            lines(calibration, "risk", "coverage", "risk bound", "share called intuitive"), "Calibrated risk against coverage."
        ),
        figure(lines(summary["errors"], "horizon", "max_abs_error", "steps ahead", "mean max-abs error"), "Error by horizon."),
        figure(
            lines(summary["coverage"], "coverage", "max_abs_error", "share kept", "mean max-abs error"), "Coverage and error."
        ),
        figure(
            lines(summary["roc"], "false_positive_rate", "true_positive_rate", "false positive rate", "true positive rate"),
            "ROC of each gate: does it find the steps that deviate?",
        ),
    ]
    return "".join(parts) + f"<div class=pair>{''.join(pictures)}</div>"


def risk_advice(rows: Sequence[dict[str, Any]], episodes: int) -> str:
    """Which risk these episodes speak for: the largest that the share measured stays below by two standard errors, with as
    many episodes as its own bound needs, and at which few of the skipped steps deviated."""

    def speaks(r: dict[str, Any]) -> bool:
        error = r["measured_risk_standard_error"]
        if error is None or not isfinite(error) or (r["deviating_among_skipped"] or 0) > SPEAKING:
            return False
        return episodes + 1 >= 1 / r["risk"] and bool(r["measured_risk"] + 2 * error <= r["risk"])

    parts = []
    for name in dict.fromkeys(r["generator"] for r in rows if "skipped" in r):
        fit = [r for r in rows if r["generator"] == name and "skipped" in r and speaks(r)]
        if fit:
            r = max(fit, key=lambda r: r["risk"])
            parts.append(f"{name} at {r['risk']:g} (skips {percent(r['skipped'])} %)")
    if not parts:
        return f"<p>These {episodes} episodes speak for no risk: record more, or calibrate on such rollouts before acting.</p>"
    return (
        "<p>Largest risk that these episodes speak for (the share measured stays below it by two standard errors, and at most "
        f"{percent(SPEAKING)} % of the skipped steps are off by more than the tolerance): "
        f"<b>{html.escape('; '.join(parts))}</b>.</p>"
    )


def latency_section(folder: Path, summary: dict[str, Any]) -> str:
    """Milliseconds by stage, stacked, and the table."""
    stages = summary.get("stages", [])
    inner = ("queries_keys", "score", "contours", "selection")
    vla, beside = ("preprocess", "vision", *inner, "projector", "prefill", "decode"), ("proposal", "gate", "bookkeeping")
    order = (*vla, *beside)
    bars = {
        n if n != "none" else "VLA": {s["stage"]: s["p50"] for s in stages if s["pruning"] == n}
        for n in dict.fromkeys(s["pruning"] for s in stages)
    }
    generators = [r for r in summary["rows"] if "generator" in r]
    bars |= {r["generator"]: {k: r[f"{k}_ms_p50"] for k in beside} for r in generators}
    by = " and ".join(name for name, found in (("pruning", stages), ("generator", generators)) if found)

    def draw(f: Any) -> None:
        axis = f.add_subplot()
        left = np.zeros(len(bars))
        for k, stage in enumerate(s for s in order if any(s in v for v in bars.values())):
            width = np.array([v.get(stage, 0.0) for v in bars.values()])
            axis.barh(list(bars), width, left=left, height=0.6, color=f"C{k}", label=stage.replace("_", " "))
            left += width
        axis.invert_yaxis()
        axis.set(xlabel="milliseconds (medians)")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    facts = ", ".join(f"{k} {summary[k]}" for k in ("device", "dtype", "threads", "attention") if k in summary)
    picture = figure(svg(draw, 9, 1.4 + 0.45 * len(bars)), f"By stage; {facts}.")
    return plain_section(folder, summary).replace("</h2>", f" by {by}</h2>{picture}", 1)


def plain_tables(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and body of any rows; those that begin with another column, as a VLA's and generators' do, have their own."""
    out = []
    for _, group in groupby(rows, key=lambda row: next(iter(row))):
        mine = list(group)
        names = dict.fromkeys(k for r in mine for k in r)
        columns = [c for c in names if not any(isinstance(r.get(c), list | dict) for r in mine)]
        body = [[f"{v:.3g}" if isinstance(v := r.get(c, "–"), float) else str(v) for c in columns] for r in mine]
        out.append(([c.replace("_", " ") for c in columns], body))
    return out


def plain_section(folder: Path, summary: dict[str, Any]) -> str:
    """A results file as its table."""
    heading = f"<h2>{html.escape(summary['kind'].replace('_', ' ').capitalize())}</h2>"
    return heading + "".join(html_table(*table) for table in plain_tables(summary["rows"]))


def markdown(found: Sequence[tuple[Path, dict[str, Any]]], results: Path, title: str) -> str:
    """Every table as Markdown, with a link to its raw file."""
    parts = [
        f"# {title}",
        "Every table is drawn from its raw file: `python -m eval report --results results --output docs/tables.md`.",
    ]
    for folder, summary in found:
        name = folder.relative_to(results).as_posix()
        loop = summary["kind"] == "closed_loop"
        heading, *sentences = closed_loop_setting(summary) if loop else [summary["kind"].replace("_", " ").capitalize()]
        tables = [closed_loop_table(summary["rows"])] if loop else plain_tables(summary["rows"])
        lines = [
            "\n".join(" | ".join(["", *cells, ""]).strip() for cells in (header, ["---"] * len(header), *body))
            for header, body in tables
        ]
        raw = f"[`{results.name}/{name}`](../{results.name}/{name}/summary.json)"
        parts += [f"## {heading} ({name})", " ".join([*sentences, f"Raw: {raw}."]), *lines]
    return "\n\n".join(parts) + "\n"


def drawing(folder: Path) -> AbstractContextManager[None]:
    """What a damaged file makes of drawing becomes an :class:`InputError` that names its folder."""
    return naming(f"{folder}: summary.json or a file beside it is damaged", EOFError, OSError, zlib.error)


SECTIONS = {"closed_loop": closed_loop_section, "offline": offline_section, "latency": latency_section}


def report(results: Path, output: Path, title: str = "Results: learned against linear", export: Path | None = None) -> None:
    """Draw one self-contained HTML page from the raw files of earlier evaluations, or their tables alone as Markdown.

    Args:
        results: folder that holds results (each with a summary.json), at any depth.
        output: the page to write; its name's end, .html or .md, says which.
        title: its title.
        export: results is a recording (a rollout store made with record=, in shadow mode): judge this export on it, as
            python -m eval offline does, and draw that.
    """
    if output.suffix not in (".html", ".md"):
        raise InputError(f"{output}: a report ends in .html or .md")
    recording = (results / "meta" / "spvla.json").exists()
    if recording and export is not None:
        from eval.offline import offline

        with TemporaryDirectory() as judged:
            offline(results, export, Path(judged))
            return report(Path(judged), output, title)
    if recording or export is not None:
        told = "is a recording: name the --export to judge on it" if recording else "is no recording for an --export"
        raise InputError(f"{results}: {told}")
    found = []
    for path in sorted(results.rglob("summary.json")):
        try:
            summary = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        rows = summary.get("rows") if isinstance(summary, dict) else None
        if not rows or not all(isinstance(row, dict) and row for row in rows) or not isinstance(summary.get("kind"), str):
            raise InputError(f"{path}: not a summary of an evaluation (it needs a kind, and rows of values)")
        found.append((path.parent, summary))
    if not found:
        raise InputError(f"{results}: no summary.json below it; run an evaluation with --output there first")
    order = ["closed_loop", "offline", "latency", "data"]

    def rank(entry: tuple[Path, dict[str, Any]]) -> tuple[int, int]:  # by kind, then the most episodes a cell first
        kind, rows = entry[1].get("kind"), entry[1]["rows"]
        return order.index(kind) if kind in order else len(order), -max(r.get("episodes") or 0 for r in rows)

    found.sort(key=rank)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".md":
        with drawing(results):
            text = markdown(found, results, title)
        write_text(output, text)
        print(f"written: {output}")
        return
    sources = [(folder / "summary.json").relative_to(results).as_posix() for folder, _ in found]
    body = ""
    for (folder, summary), source in zip(found, sources, strict=True):
        with drawing(folder):
            section = SECTIONS.get(summary["kind"], plain_section)(folder, summary)
        body += section.replace("</h2>", f" <small>{html.escape(source.removesuffix('/summary.json'))}</small></h2>", 1)
    machine = found[0][1].get("machine", {})
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}"
        f"<p class=note>Drawn from {html.escape(', '.join(sources))}. Python {machine.get('python')}, "
        f"{machine.get('processor')}.</p>"
        "</body></html>\n"
    )
    write_text(output, page)
    print(f"written: {output}")
