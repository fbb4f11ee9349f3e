"""A closed-loop evaluation on the page: headline figures, table, calls against success, the risk knob, films and traces."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from eval.motion import MOTION
from eval.output import main_image, read_csv
from eval.report.figures import COLOURS, HEIGHT, Film, Picture, Section, Table, legend, percent, picture
from eval.report.live import deployments
from spvla.files import parse_json
from spvla.gates.floor import NoiseFloor

MARKERS = "osD^vP"
VLA_COLOUR, GENERATOR_COLOUR, HELD_COLOUR, PLAN_COLOUR = "#4c78a8", "#f58518", "#999999", "#72b7b2"
TRACES = 4


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
    if row.get("horizon") is not None:
        return f"horizon {row['horizon']}"
    return "VLA alone" if row["generator"] == "none" else f"{row['generator']} + {row['gate']}"


def best_row(rows: Sequence[dict[str, Any]]) -> int | None:
    """The row with the fewest calls among those that lose at most one point."""
    fit = [i for i, r in enumerate(rows) if r["generator"] != "none" and (r.get("paired_delta") or 0) >= -0.0100001]
    return min(fit, key=lambda i: rows[i]["vla_calls_per_episode"]) if fit else None


def setting_of(summary: dict[str, Any]) -> list[str]:
    """The title of a closed-loop evaluation, and sentences that say what was run."""
    real_time, nudge = summary.get("real_time"), summary.get("nudge")
    kind = (", in real time" if real_time else "") + (", objects moved on the way" if nudge else "")
    tasks, states, resets = len(summary["tasks"]), summary["init_states"], summary.get("random_resets")
    starts = " and ".join([f"initial states {states}"] * bool(states) + [f"{resets} seeded resets"] * bool(resets))
    out = [
        f"Closed loop: {summary['suite']}{kind}",
        f"Policy {summary['vla']}, {tasks} tasks, {starts}, paired by task, initial state and seed. Calls of failed "
        "episodes count up to the step limit.",
    ]
    if real_time:
        ms = "the measured time" if real_time["vla_ms"] is None else f"{real_time['vla_ms']:g} ms"
        does = "stops" if real_time["hold"] == "stop" else "repeats its last action"
        out.append(f"The world moves on while the policy thinks: {ms} a VLA call; meanwhile the robot {does}.")
    if nudge:
        out.append(f"The asked object is moved by {100 * nudge['distance']:g} cm while the hand is on its way.")
    return out


def number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    """How a column of a row is shown."""
    return lambda r: "–" if r.get(key) is None else format(r[key], form)


def shown_table(columns: dict[str, Callable[[dict[str, Any]], str]], rows: Sequence[dict[str, Any]], **named: Any) -> Table:
    """A table of those ``columns`` that say something about a row; ``named`` are its other fields."""
    body = [[tell(r) for tell in columns.values()] for r in rows]
    shown = [i for i in range(len(columns)) if any(b[i] not in ("–", "0") for b in body)]
    return Table([list(columns)[i] for i in shown], [[b[i] for i in shown] for b in body], **named)


def cells_tables(rows: Sequence[dict[str, Any]], best: int | None = None) -> list[Table]:
    """What a closed-loop evaluation tells of its cells, in tables."""
    tables = [cells_table(rows, best)]
    if any(r.get(name) is not None for r in rows for name in MOTION):
        tables.append(motion_table(rows, best))
    return tables


def motion_table(rows: Sequence[dict[str, Any]], best: int | None = None) -> Table:
    """How each cell moves, see :mod:`eval.motion`."""
    columns = {
        "cell": cell_name,
        "path, m": number("path_metres", ".3f"),
        "path, commanded": number("commanded_path", ".3g"),
        "jerk²": number("squared_jerk", ".3g"),
        "jerk², commanded": number("commanded_squared_jerk", ".3g"),
        "gripper reversals": number("gripper_reversals", ".1f"),
        "jump at a hand-over": number("hand_over_jump", ".2f"),
        "seconds to success": number("seconds_to_success", ".2f"),
    }
    note = (
        "Means over episodes. Path and jerk² (mean square of the jerk): of the hand as measured, in m and (m/s³)²; commanded: "
        "of the motion that the actions ask for, in the action's own units and (units/s³)². Jump: the largest change of a "
        "normalised action between two steps where generator and VLA take turns, in an episode. Seconds to success: of "
        "successful episodes."
    )
    return shown_table(columns, rows, best=best, title="Motion", note=note)


def cells_table(rows: Sequence[dict[str, Any]], best: int | None = None) -> Table:
    """The table of cells: what matters most first, and only what was measured."""

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
        "pairs for ±1": number("pairs_for_one_point", "d"),
        "calls/episode": number("vla_calls_per_episode", ".1f"),
        "speedup": number("policy_speedup", ".3g"),
        "policy s/episode": number("policy_seconds_per_episode", ".3g"),
        "skipped %": lambda r: percent(r["skipped"]),
        "kept %": lambda r: percent(r["kept"]) if "kept" in r else "–",
        "generated %": lambda r: percent(r["generated"]) if "kept" in r else "–",
        "deviating %": lambda r: percent(r.get("deviation_rate")),
        "steps": number("steps_per_episode", ".1f"),
        "run": number("generated_run_length_mean", ".1f"),
        "fallbacks": number("fallbacks", "d"),
        "tokens": tokens,
        "ms p50": number("policy_ms_per_step_p50", ".2f"),
        "waiting steps": number("held_per_episode", ".3g"),
        "moved": number("nudged", ".3g"),
        "success, moved": number("nudged_successes", ".3g"),
        "steps to the VLA": number("reaction_steps_mean", ".1f"),
        "at most": number("reaction_steps_max", ".3g"),
    }
    return shown_table(columns, rows, best=best)


def section(folder: Path, summary: dict[str, Any]) -> Section:
    """One closed-loop evaluation."""
    rows = summary["rows"]
    best = best_row(rows)
    title, *sentences = setting_of(summary)
    raw = folder / "episodes.csv.gz"
    episodes = read_csv(raw) if raw.exists() else []
    if (floor := NoiseFloor.of(summary)) is not None:
        sentences += [f"{line}." for line in floor.lines()]
    out = Section(title, sentences, tables=cells_tables(rows, best))
    if best is not None:
        out.best_cell, out.headline = cell_name(rows[best]), headline(rows[best])
    columns = {"vla_calls_per_episode": "VLA calls per episode", "policy_seconds_per_episode": "Policy seconds per episode"}
    if summary.get("real_time"):
        columns["seconds_per_episode"] = "Seconds per episode"
    shown = [c for c in columns if c == "vla_calls_per_episode" or all(r.get(c) is not None for r in rows)]
    out.pictures = [against_success(rows, c, columns[c]) for c in shown] + risk_knob(rows) + run_lengths(episodes, rows)
    out.more = deployments(episodes, {r["cell"]: cell_name(r) for r in rows}) + kept_tokens(rows)
    out.films = films(folder / "films", rows, best)
    traces = folder / "traces.json.gz"
    if traces.exists() and best is not None:
        out.traces = [who_acted(parse_json(gzip.decompress(traces.read_bytes()), str(traces)), rows[best])]
    return out


def headline(r: dict[str, Any]) -> list[tuple[str, str]]:
    """The best cell's numbers, and what each one is."""
    low, high = (100 * x for x in r["paired_delta_ci95"])
    boxes = [
        (f"{r['vla_calls_ratio']:.2f}×", "fewer VLA calls"),
        (f"{percent(r['skipped'])} %", "of the steps skip the VLA"),
        (f"{percent(r['success_rate'])} %", "success"),
        (percent(r["paired_delta"], True), f"points to the VLA alone ({low:+.1f} to {high:+.1f})"),
    ]
    if r.get("policy_speedup") is not None:
        boxes.insert(0, (f"{r['policy_speedup']:.2f}×", "faster in policy wall clock"))
    return boxes


def against_success(rows: Sequence[dict[str, Any]], column: str, label: str) -> Picture:
    """A column against the success rate; colour and marker say which cell."""
    pairs, prunings = (list(dict.fromkeys(names)) for names in (map(pair_name, rows), (r["pruning"] for r in rows)))

    def look(r: dict[str, Any]) -> tuple[int, int]:
        return pairs.index(pair_name(r)), prunings.index(r["pruning"])

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

    return picture(draw, f"{label} against success; bars are exact 95 % intervals.", height=HEIGHT + 0.1 * len(rows))


def risk_knob(rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """Skipped and deviating steps against the allowed risk, if there are several."""
    knob = [r for r in rows if r.get("risk") is not None]
    if len({r["risk"] for r in knob}) < 2:
        return []

    def draw(f: Any) -> None:
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

    return [picture(draw, "The risk knob in closed loop; bars are two standard errors.")]


def run_lengths(episodes: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[Picture]:
    """How many steps the generator acts in a row, where the raw episodes are there."""
    runs: dict[str, list[int]] = {}
    names = {r["cell"]: cell_name(r | {"pruning": "none"}) for r in rows}
    colours = dict(zip(dict.fromkeys(names.values()), COLOURS * len(rows), strict=False))
    for episode in episodes:
        runs.setdefault(names[episode["cell"]], []).extend(episode["generated_run_lengths"])
    shown = {k: v for k, v in runs.items() if v}
    if not shown:
        return []

    def draw(f: Any) -> None:
        axis = f.add_subplot()
        top = max(max(v) for v in shown.values())
        for name, values in shown.items():
            counts = np.bincount(values, minlength=top + 1)[1:]
            axis.plot(range(1, top + 1), 100 * counts / counts.sum(), ".-", color=colours[name], lw=1, label=name)
        axis.set(xlabel="steps in a row without a fresh look", ylabel="% of runs")
        legend(f)

    pooled = ", with any pruning" if len({r["pruning"] for r in rows if names[r["cell"]] in shown}) > 1 else ""
    return [picture(draw, f"How long the policy goes on before the VLA looks again{pooled}.")]


def kept_tokens(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[Picture]]]:
    """How often each visual token reached the language model, by pruning."""
    shown = {cell_name(r): np.array(r["kept_share"]) for r in rows if "kept_share" in r}
    if not shown:
        return []
    columns = min(6, len(shown))
    lines = -(-len(shown) // columns)

    def draw(f: Any) -> None:
        axes = f.subplots(lines, columns, squeeze=False).ravel()
        for axis, (name, share) in zip(axes, shown.items(), strict=False):
            shades = axis.imshow(main_image(share), vmin=0, vmax=1, cmap="viridis")
            axis.set_title(name.replace(", ", "\n"), fontsize=7)
        for axis in axes:
            axis.set_axis_off()
        f.colorbar(shades, ax=list(axes), shrink=0.7, label="share of the VLA's calls")

    caption = "How often each visual token, where it is in the main image, reached the language model."
    return [("Kept tokens", [picture(draw, caption, 10, 2.3 * lines)])]


def films(folder: Path, rows: Sequence[dict[str, Any]], best: int | None) -> list[Film]:
    """One episode of each cell, as far as there are films; the best one's is open."""
    out = []
    for i, r in enumerate(rows):
        strip, video = (folder / f"{r['cell']}.{kind}" for kind in ("jpg", "mp4"))
        if strip.exists():
            frames, moving = (base64.b64encode(p.read_bytes()).decode() if p.exists() else "" for p in (strip, video))
            out.append(Film(cell_name(r), frames, moving, open=i == (best or 0)))
    return out


def who_acted(traces: Sequence[dict[str, Any]], row: dict[str, Any]) -> tuple[str, list[Picture]]:
    """Action traces of the best cell, coloured by who acted, with the gate's probability."""
    mine = [t for t in traces if t["cell"] == row["cell"]][:TRACES]
    pictures = []
    for t in mine:
        actions, generated = np.array(t["trace"]["actions"]), np.array(t["trace"]["generated"], bool)
        colours = np.where(generated, GENERATOR_COLOUR, VLA_COLOUR)
        colours[np.array(t["trace"].get("kept", []), bool).nonzero()] = PLAN_COLOUR
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
            f"the generator{'; green: an earlier plan' if PLAN_COLOUR in colours else ''}"
            f"{'; grey: nobody, while the VLA computed' if HELD_COLOUR in colours else ''}. "
        )
        pictures.append(picture(draw, caption + "Line in the bar: probability of deviating (0 to 1).", 9, 2.3))
    return f"Who acted: {cell_name(row)}", pictures
