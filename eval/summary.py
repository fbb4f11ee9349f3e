"""One row per cell from the raw rows of its episodes, paired against the VLA alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.motion import motion_means
from eval.statistics import exact_interval, mcnemar, mean_and_error, paired_difference, pairs_needed

Row = dict[str, Any]
COLUMNS = (
    *(
        "generator",
        "gate",
        "pruning",
        "risk",
        "episodes",
        "success_rate",
        "paired_delta",
        "paired_delta_ci95",
        "vla_call_rate",
    ),
    *("vla_calls_per_episode", "steps_per_episode", "deviation_rate", "generated_run_length_mean", "fallbacks"),
    *("visual_tokens_mean", "policy_ms_per_step_p50", "policy_seconds_per_episode", "policy_speedup"),
)
LIVE = ("live_risk", "live_risk_bound95", "threshold", "live_steps", "drift_alarms")  # of a deployment so far
UNTIMED = dict.fromkeys([*(f"policy_ms_per_step_p{q}" for q in (50, 95, 99)), "policy_seconds_per_episode"])


def summarise(episodes: Sequence[Row], timing: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row per cell, paired against the VLA alone."""
    cells = list(dict.fromkeys(e["cell"] for e in episodes))
    by_cell = {c: {(e["suite"], e["task"], e["init_state"], e["seed"]): e for e in episodes if e["cell"] == c} for c in cells}
    control = by_cell.get("vla:paused") or by_cell.get("vla", {})
    rows = []
    for name, found in by_cell.items():
        es = list(found.values())
        row: Row = {k: es[0].get(k) for k in ("cell", "generator", "gate", "pruning", "mode", "risk")}
        row |= {k: es[0][k] for k in ("verify", "horizon") if es[0].get(k) is not None}  # not in every raw row
        pairs = [(e, control[key]) for key, e in found.items() if key in control]
        row |= (
            _success(es)
            | _pairs(pairs, es)
            | _resets(es)
            | _calls(es)
            | _arms(es)
            | _nudges(es)
            | _tokens(es)
            | _verified(es)
            | _deviations(es)
            | _live(es)
            | motion_means(es)
        )
        row |= UNTIMED | dict(timing.get(name, {}))
        if "vla" in timing and name in timing:
            of = "policy_seconds_per_episode"
            row["policy_speedup"] = timing["vla"][of] / timing[name][of]
        rows.append(row)
    return rows


def by_task(episodes: Sequence[Row]) -> list[Row]:
    """One row per task: its episodes per cell, and each cell's successes among them; the task with the fewest goes first."""
    rows: list[Row] = []
    for suite, task, name in dict.fromkeys((e["suite"], e["task"], e["task_name"]) for e in episodes):
        mine = [e for e in episodes if (e["suite"], e["task"]) == (suite, task)]
        cells = {cell: [e for e in mine if e["cell"] == cell] for cell in dict.fromkeys(e["cell"] for e in mine)}
        successes = {cell: _total(es, "success") for cell, es in cells.items()}
        rows.append({"suite": suite, "task": task, "name": name, "episodes": max(map(len, cells.values())), **successes})
    return sorted(rows, key=lambda row: min(v for k, v in row.items() if k not in ("suite", "task", "name", "episodes")))


def columns_of(rows: Sequence[Row], *, real_time: bool, nudge: bool) -> list[str]:
    """What a table of rows shows, as text."""
    extra = ["mode", "seconds_per_episode", "seconds_ratio", "held_per_episode"] if real_time else []
    extra += ["audits_per_episode", "live_risk", "live_risk_bound95"] if any("live_risk" in r for r in rows) else []
    extra += ["horizon", "kept", "generated"] if any("kept" in r for r in rows) else []
    extra += ["verify", "accepted_mean"] if any("accepted_mean" in r for r in rows) else []
    extra += ["nudged", "nudged_successes", "reaction_steps_mean"] if nudge else []
    return [*COLUMNS, *extra]


def _live(episodes: Sequence[Row]) -> Row:
    """What a live gate had found at the end of its deployment, which is the episode with the most steps before it."""
    if (last := max(episodes, key=lambda e: e.get("live_steps") or 0)).get("live_steps") is None:
        return {}
    return {"audits_per_episode": float(np.mean([e["audits"] for e in episodes])), **{name: last[name] for name in LIVE}}


def _total(episodes: Sequence[Row], column: str) -> int:
    return int(sum(e[column] for e in episodes))


def _mean(episodes: Sequence[Row], column: str) -> float:
    return float(np.mean([e[column] for e in episodes]))


def _success(es: Sequence[Row]) -> Row:
    n, successes = len(es), _total(es, "success")
    return {"episodes": n, "successes": successes, "success_rate": successes / n, "success_ci95": exact_interval(successes, n)}


def _pairs(pairs: Sequence[tuple[Row, Row]], es: Sequence[Row]) -> Row:
    if not pairs:
        return {}
    treated, base = ([e["success"] for e in side] for side in zip(*pairs, strict=True))
    delta, interval = paired_difference(treated, base)
    ratio = _total([c for _, c in pairs], "vla_calls") / max(1, _total(es, "vla_calls"))
    known = all("seconds" in e for e in es)
    seconds = _mean(es, "seconds") / max(1e-9, _mean([c for _, c in pairs], "seconds")) if known else None
    tested = {"paired_delta": delta, "paired_delta_ci95": interval, "mcnemar_p": mcnemar(treated, base)}
    itself = all(e is control for e, control in pairs)
    counts = {"pairs": len(pairs), "pairs_for_one_point": None if itself else pairs_needed(treated, base)}
    return {**counts, **tested, "vla_calls_ratio": ratio, "seconds_ratio": seconds}


def _resets(es: Sequence[Row]) -> Row:
    """Successes from official initial states and from seeded resets, where there are both."""
    official = [e for e in es if e["init_state"] is not None]
    if not 0 < len(official) < len(es):
        return {}
    right = _total(official, "success")
    return {"official_successes": right, "reset_successes": _total(es, "success") - right, "resets": len(es) - len(official)}


def _calls(es: Sequence[Row]) -> Row:
    decided = _total(es, "steps") - _total(es, "held")  # without those that only went by
    runs = [r for e in es for r in e["generated_run_lengths"]]
    return {
        "vla_call_rate": _total(es, "vla_calls") / _total(es, "steps"),
        "skipped": _total(es, "generated") / decided,
        "vla_calls_per_episode": _mean(es, "vla_calls"),
        "steps_per_episode": _mean(es, "steps"),
        "seconds_per_episode": _mean(es, "seconds") if "seconds" in es[0] else None,
        "held_per_episode": _mean(es, "held"),
        "generated_run_length_mean": float(np.mean(runs)) if runs else 0.0,
        "fallbacks": _total(es, "fallbacks"),
        "switches": _total(es, "switches"),
    }


def _kept(e: Row) -> int:
    """Steps that an earlier plan made; earlier versions counted tokens under that name, or nothing."""
    kept = e.get("kept")
    return kept if isinstance(kept, int) else 0


def _arms(es: Sequence[Row]) -> Row:
    """Of the steps that somebody decided: the fractions that an earlier plan and the generator made; nothing without plans."""
    kept = sum(map(_kept, es))
    if not kept and es[0].get("horizon") is None:
        return {}
    decided, generated = _total(es, "steps") - _total(es, "held"), _total(es, "generated")
    return {"kept": kept / decided, "generated": generated / decided, "skipped": (kept + generated) / decided}


def _nudges(es: Sequence[Row]) -> Row:
    nudged = [e for e in es if e["nudged"] is not None]
    if not nudged:
        return {}
    reactions = [e["reaction"] for e in nudged if e["reaction"] is not None]
    return {
        "nudged": len(nudged),
        "nudged_successes": _total(nudged, "success"),
        "reaction_steps_mean": float(np.mean(reactions)) if reactions else None,
        "reaction_steps_max": max(reactions, default=None),
    }


def _tokens(es: Sequence[Row]) -> Row:
    """Visual tokens of a call, weighted by calls, and how often each one reached the language model."""
    out: Row = {}
    if seeing := [e for e in es if e["visual_tokens_mean"] is not None]:
        weights = [e["vla_calls"] for e in seeing]
        out["visual_tokens_mean"] = float(np.average([e["visual_tokens_mean"] for e in seeing], weights=weights))
        out["visual_tokens_total"] = seeing[0]["visual_tokens_total"]
    if counted := [e for e in seeing if e.get("kept_tokens") is not None]:
        kept = np.sum([e["kept_tokens"] for e in counted], axis=0)
        out["kept_share"] = (kept / _total(counted, "vla_calls")).round(3).tolist()
    return out


def _verified(es: Sequence[Row]) -> Row:
    """How often the VLA agreed with 0, 1, ... D leading dimensions of a proposal, and how many on average."""
    verified = [e["accepted"] for e in es if e.get("accepted") is not None]
    if not verified:
        return {}
    counts = np.sum(verified, axis=0)
    return {"accepted": counts.tolist(), "accepted_mean": float(np.average(np.arange(len(counts)), weights=counts))}


def _deviations(es: Sequence[Row]) -> Row:
    labelled = [e for e in es if e["deviating"] is not None]
    if not labelled:
        return {"deviation_rate": None}
    mean, error = mean_and_error([e["deviating"] / (e["steps"] - e["held"]) for e in labelled])
    return {
        "deviation_rate": mean,
        "deviation_rate_standard_error": error,
        "deviating_among_generated": _total(labelled, "deviating") / max(1, _total(es, "generated") + sum(map(_kept, es))),
    }


def write_traces(path: Path, episodes: Sequence[Row]) -> None:
    """One episode's actions per cell and task, coloured by who acted in the report."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for e in episodes:
        first.setdefault((e["cell"], e["task"]), e)
    keep = ("cell", "suite", "task", "task_name", "init_state", "success", "trace")
    rows = [{k: e[k] for k in keep} for e in first.values()]
    path.write_bytes(gzip.compress(json.dumps(rows).encode(), mtime=0))
